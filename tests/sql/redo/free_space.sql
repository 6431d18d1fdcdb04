-- The free-space map of a table that has one already, upper pages too, when the table shrinks and grows.
CREATE TABLE a (id int, a text);
CREATE TABLE b (id int PRIMARY KEY, a text);
CREATE TABLE c (id int, a text);
INSERT INTO a SELECT i, repeat('a', 500) FROM generate_series(1, 3000) i;
INSERT INTO b SELECT i, repeat('b', i % 1000) FROM generate_series(1, 3000) i;
-- More blocks than one page of the map stands for.
ALTER TABLE c ALTER a SET STORAGE PLAIN;
INSERT INTO c SELECT i, repeat('c', 7900) FROM generate_series(1, 4200) i;
DELETE FROM a WHERE id % 2 = 0;
DELETE FROM b WHERE id % 3 = 0;
DELETE FROM c WHERE id % 100 = 0;
VACUUM a, b, c;
--! restart
-- Recovery's own check takes pages that the later truncation already cut off for wrong ones.
SET wal_consistency_checking = '';
DELETE FROM a WHERE id > 1000;
VACUUM a;
INSERT INTO a SELECT i, repeat('new', 300) FROM generate_series(5001, 6000) i;
DELETE FROM b WHERE id > 10;
VACUUM b;
INSERT INTO b SELECT i, repeat('new', 100) FROM generate_series(5001, 5500) i;
UPDATE b SET a = a || 'longer';
DELETE FROM c WHERE id > 4100;
VACUUM c;
DELETE FROM c WHERE id > 3000;
VACUUM c;
INSERT INTO c SELECT i, repeat('c', 5000) FROM generate_series(5001, 5100) i;
BEGIN;
INSERT INTO a SELECT i, 'rolled back' FROM generate_series(1, 500) i;
ROLLBACK;
VACUUM a;
TRUNCATE b;
INSERT INTO b VALUES (1, 'one');
VACUUM b;
