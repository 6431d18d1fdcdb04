-- Pruning on access and by VACUUM, with and without indexes, line pointers that are redirected, dead, unused and cut off.
CREATE TABLE p (id int PRIMARY KEY, n int, a text) WITH (fillfactor = 60);
INSERT INTO p SELECT i, 0, repeat('p', 40) FROM generate_series(1, 2000) i;
-- HOT chains, pruned when the pages are read.
UPDATE p SET n = n + 1;
SELECT count(*) FROM p;
UPDATE p SET n = n + 1 WHERE id % 2 = 0;
SELECT sum(n) FROM p;
UPDATE p SET n = n + 1 WHERE id % 3 = 0;
SELECT sum(n) FROM p;
DELETE FROM p WHERE id % 5 = 0;
SELECT sum(n) FROM p;
VACUUM p;                                  -- dead line pointers become unused
INSERT INTO p SELECT i, 0, repeat('q', 20) FROM generate_series(5001, 5500) i; -- and are used again
DELETE FROM p WHERE id BETWEEN 1000 AND 1400;
VACUUM (INDEX_CLEANUP OFF) p;              -- they stay dead
VACUUM (INDEX_CLEANUP ON) p;
BEGIN;
INSERT INTO p SELECT i, 0, 'aborted' FROM generate_series(7001, 7300) i;
UPDATE p SET a = 'aborted' WHERE id < 100;
ROLLBACK;
VACUUM p;
DELETE FROM p WHERE id > 300;
VACUUM p;                                  -- truncates
INSERT INTO p SELECT i, 0, repeat('r', 100) FROM generate_series(8001, 9500) i;
-- Tuples of very different lengths, so that compaction has gaps of all sizes.
CREATE TABLE mixed (id int, a text);
ALTER TABLE mixed ALTER a SET STORAGE PLAIN;
INSERT INTO mixed SELECT i, repeat('m', (i * 37) % 700) FROM generate_series(1, 1500) i;
DELETE FROM mixed WHERE id % 3 = 1;
VACUUM mixed;
INSERT INTO mixed SELECT i, repeat('k', (i * 91) % 300) FROM generate_series(2001, 3000) i;
UPDATE mixed SET a = a || a WHERE id % 4 = 0 AND length(a) < 300;
DELETE FROM mixed WHERE id % 7 < 5;
VACUUM mixed;
INSERT INTO mixed SELECT i, repeat('j', (i * 13) % 150) FROM generate_series(4001, 6000) i;
DELETE FROM mixed WHERE id % 2 = 0;
VACUUM FREEZE mixed;
-- As many line pointers as a page can have.
CREATE TABLE narrow ();
INSERT INTO narrow SELECT FROM generate_series(1, 2000);
DELETE FROM narrow;
VACUUM narrow;
VACUUM FULL p;
CLUSTER p USING p_pkey;
VACUUM (FREEZE, FULL) mixed;
UPDATE p SET a = NULL;
VACUUM p;
