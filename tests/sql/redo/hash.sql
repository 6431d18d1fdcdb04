--! wal_consistency_checking = hash
-- Hash indexes: buckets split, chains of overflow pages grow and are squeezed, dead tuples go.

-- Empty at first: the metapage and the first bitmap page have records of their own.
CREATE TABLE hash_grows (k int, n int);
CREATE INDEX hash_grows_k ON hash_grows USING hash (k);
INSERT INTO hash_grows SELECT n, n FROM generate_series(1, 4000) n;

-- Built over rows, with another fill factor.
CREATE TABLE hash_built (k text, n int);
INSERT INTO hash_built SELECT 'key ' || n, n FROM generate_series(1, 3000) n;
CREATE INDEX hash_built_k ON hash_built USING hash (k) WITH (fillfactor = 30);
INSERT INTO hash_built SELECT 'key ' || n, n FROM generate_series(3001, 4500) n;

-- One key: a long chain of overflow pages.
CREATE TABLE hash_chain (k int, n int);
CREATE INDEX hash_chain_k ON hash_chain USING hash (k);
INSERT INTO hash_chain SELECT 1, n FROM generate_series(1, 4000) n;
INSERT INTO hash_chain SELECT n % 5, n FROM generate_series(1, 4000) n;

-- Squeezed: the last page goes, pages in the middle fill up, tuples move over several pages.
DELETE FROM hash_chain WHERE k = 1 AND n % 4 = 0;
VACUUM (INDEX_CLEANUP ON) hash_chain;
DELETE FROM hash_chain WHERE k = 1 AND n BETWEEN 100 AND 2500;
VACUUM (INDEX_CLEANUP ON) hash_chain;
DELETE FROM hash_chain WHERE k = 1 AND n % 50 <> 1;
VACUUM (INDEX_CLEANUP ON) hash_chain;
-- Free overflow pages are used again.
INSERT INTO hash_chain SELECT 1, n FROM generate_series(1, 3000) n;
-- All gone: overflow pages without any tuple.
DELETE FROM hash_chain WHERE k = 1;
VACUUM (INDEX_CLEANUP ON) hash_chain;
DELETE FROM hash_chain;
VACUUM (INDEX_CLEANUP ON) hash_chain;
INSERT INTO hash_chain SELECT n % 3, n FROM generate_series(1, 2000) n;

-- Random deletion from chains of random length, again and again.
CREATE TABLE hash_random (k int, n int);
CREATE INDEX hash_random_k ON hash_random USING hash (k);
SELECT setseed(0.5);
INSERT INTO hash_random SELECT (random() * 12)::int, n FROM generate_series(1, 6000) n;
DELETE FROM hash_random WHERE random() < 0.4;
VACUUM (INDEX_CLEANUP ON) hash_random;
INSERT INTO hash_random SELECT (random() * 12)::int, n FROM generate_series(1, 3500) n;
DELETE FROM hash_random WHERE random() < 0.8;
VACUUM (INDEX_CLEANUP ON) hash_random;
INSERT INTO hash_random SELECT (random() * 200)::int, n FROM generate_series(1, 3500) n;
DELETE FROM hash_random WHERE random() < 0.6;
VACUUM (INDEX_CLEANUP ON) hash_random;

-- Marked dead by scans; an insertion that needs room takes them away.
CREATE TABLE hash_killed (k int, n int);
CREATE INDEX hash_killed_k ON hash_killed USING hash (k);
INSERT INTO hash_killed SELECT n % 4, n FROM generate_series(1, 1600) n;
DELETE FROM hash_killed WHERE n % 2 = 0;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(n) FROM hash_killed WHERE k = 0;
SELECT count(n) FROM hash_killed WHERE k = 1;
SELECT count(n) FROM hash_killed WHERE k = 2;
SELECT count(n) FROM hash_killed WHERE k = 3;
INSERT INTO hash_killed SELECT n % 4, n FROM generate_series(1, 1600) n;
RESET enable_seqscan;
RESET enable_bitmapscan;
-- VACUUM meets the marks of a scan, on first pages and overflow pages.
DELETE FROM hash_killed WHERE n % 3 = 0;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(n) FROM hash_killed WHERE k = 1;
SELECT count(n) FROM hash_killed WHERE k = 2;
RESET enable_seqscan;
RESET enable_bitmapscan;
VACUUM (INDEX_CLEANUP ON) hash_killed;

-- Splits of buckets with overflow pages, whose clean-up is part of the split or of the next VACUUM.
CREATE TABLE hash_split (k int, n int);
CREATE INDEX hash_split_k ON hash_split USING hash (k) WITH (fillfactor = 100);
INSERT INTO hash_split SELECT n % 7, n FROM generate_series(1, 3000) n;
INSERT INTO hash_split SELECT n, n FROM generate_series(1, 4000) n;
BEGIN;
DECLARE c CURSOR FOR SELECT k FROM hash_split WHERE k = 3;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
FETCH 1 FROM c;
INSERT INTO hash_split SELECT n, n FROM generate_series(4001, 8000) n;
COMMIT;
VACUUM (INDEX_CLEANUP ON) hash_split;
INSERT INTO hash_split SELECT n, n FROM generate_series(8001, 9000) n;

-- Anew.
REINDEX INDEX hash_grows_k;
INSERT INTO hash_grows SELECT n, n FROM generate_series(6001, 7000) n;
BEGIN;
TRUNCATE hash_grows;
INSERT INTO hash_grows SELECT n, n FROM generate_series(1, 1000) n;
COMMIT;
CHECKPOINT;
INSERT INTO hash_grows SELECT n, n FROM generate_series(1001, 2000) n;

-- An index that is expected to become large begins with more buckets than single-phase split points have, and grows by a quarter at a time.
CREATE TABLE hash_large (k int);
INSERT INTO hash_large VALUES (0);
UPDATE pg_class SET relpages = 1, reltuples = 700000 WHERE relname = 'hash_large';
CREATE INDEX hash_large_k ON hash_large USING hash (k);
INSERT INTO hash_large SELECT generate_series(1, 500);
DROP TABLE hash_large;
CREATE TABLE hash_larger (k int);
INSERT INTO hash_larger VALUES (0);
UPDATE pg_class SET relpages = 1, reltuples = 41000 WHERE relname = 'hash_larger';
CREATE INDEX hash_larger_k ON hash_larger USING hash (k) WITH (fillfactor = 10);
-- What fills it is checked only when it changes again.
SET wal_consistency_checking = '';
INSERT INTO hash_larger SELECT generate_series(1, 45000);
RESET wal_consistency_checking;
INSERT INTO hash_larger SELECT generate_series(45001, 48000);
DELETE FROM hash_larger WHERE k % 100 = 0;
VACUUM (INDEX_CLEANUP ON) hash_larger;

-- Unlogged: the init fork alone has records.
CREATE UNLOGGED TABLE hash_unlogged (k int);
CREATE INDEX ON hash_unlogged USING hash (k);
INSERT INTO hash_unlogged SELECT generate_series(1, 100);
