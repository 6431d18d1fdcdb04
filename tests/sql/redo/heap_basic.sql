-- Insert, update within and across pages, HOT chains, delete, and what rolls back.
CREATE TABLE t (id int PRIMARY KEY, a text, b text);
INSERT INTO t SELECT i, repeat('a', i % 50), repeat('b', i % 200) FROM generate_series(1, 5000) i;
UPDATE t SET a = a || 'x' WHERE id % 7 = 0;
UPDATE t SET b = b || 'y' WHERE id % 5 = 0;
UPDATE t SET a = 'prefix' || a || 'suffix' WHERE id % 3 = 0;
UPDATE t SET id = id + 100000 WHERE id % 11 = 0;
DELETE FROM t WHERE id % 13 = 0;
BEGIN;
INSERT INTO t SELECT i, 'gone', 'gone' FROM generate_series(20001, 20500) i;
UPDATE t SET a = 'gone' WHERE id % 17 = 0;
ROLLBACK;
UPDATE t SET a = NULL WHERE id % 19 = 0;
VACUUM t;
UPDATE t SET a = 'after vacuum' WHERE id % 2 = 0;
DELETE FROM t WHERE id % 4 = 1;
VACUUM FREEZE t;
INSERT INTO t SELECT i, 'more', 'more' FROM generate_series(30001, 31000) i;
