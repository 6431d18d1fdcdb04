--! wal_consistency_checking = btree
-- B-tree: deduplication, posting lists that an insertion splits (alone, and while its page splits), and tuples that leave them.

SET synchronize_seqscans = off;

-- Few keys, many rows: deduplication passes, with the single-value strategy for the largest runs.
CREATE TABLE bt_posting (k int, filler text);
CREATE INDEX bt_posting_k ON bt_posting (k);
INSERT INTO bt_posting SELECT n % 10, 'f' FROM generate_series(1, 6000) n;
INSERT INTO bt_posting SELECT 77, 'f' FROM generate_series(1, 4000) n;

-- Room in the heap in front of rows that are there already: new heap pointers fall into the middle of posting lists.
DELETE FROM bt_posting WHERE ctid IN (SELECT ctid FROM bt_posting WHERE (ctid::text::point)[1]::int % 3 = 0);
VACUUM (INDEX_CLEANUP ON) bt_posting;
INSERT INTO bt_posting SELECT n % 10, 'f' FROM generate_series(1, 2500) n;
INSERT INTO bt_posting SELECT 77, 'f' FROM generate_series(1, 1000) n;

-- The same at random, for as long as it takes to meet splits of both kinds at once.
CREATE TABLE bt_posting_random (k int, filler text);
CREATE INDEX bt_posting_random_k ON bt_posting_random (k);
SELECT setseed(0.25);
INSERT INTO bt_posting_random SELECT (random() * 40)::int, repeat('f', (random() * 30)::int) FROM generate_series(1, 4000) n;
DELETE FROM bt_posting_random WHERE random() < 0.5;
VACUUM (INDEX_CLEANUP ON) bt_posting_random;
INSERT INTO bt_posting_random SELECT (random() * 40)::int, repeat('f', (random() * 30)::int) FROM generate_series(1, 4000) n;
DELETE FROM bt_posting_random WHERE random() < 0.7;
VACUUM (INDEX_CLEANUP ON) bt_posting_random;
INSERT INTO bt_posting_random SELECT (random() * 40)::int, repeat('f', (random() * 10)::int) FROM generate_series(1, 4000) n;

-- Full pages whose posting lists are split while the pages split: rows that a partial index does not have leave room in the heap between those
-- that it has, without making room in the index.
CREATE TABLE bt_posting_partial (k int, indexed bool, filler text);
CREATE INDEX bt_posting_partial_k ON bt_posting_partial (k) WITH (fillfactor = 100) WHERE indexed;
INSERT INTO bt_posting_partial SELECT (random() * 30)::int, n % 2 = 0, 'f' FROM generate_series(1, 12000) n;
DELETE FROM bt_posting_partial WHERE NOT indexed;
VACUUM bt_posting_partial;
INSERT INTO bt_posting_partial SELECT (random() * 30)::int, true, 'f' FROM generate_series(1, 6000) n;
-- The same with wide keys, so that a page holds few lists: it splits right behind the list that the new tuple splits, too.
-- What fills the pages is checked only when they change again.
SET wal_consistency_checking = '';
DO $$
BEGIN
  FOR width IN 300..600 BY 50 LOOP
    EXECUTE format('CREATE TABLE bt_wide_%s (k text, indexed bool)', width);
    EXECUTE format('ALTER TABLE bt_wide_%s ALTER k SET STORAGE PLAIN', width);
    EXECUTE format('CREATE INDEX ON bt_wide_%s (k) WHERE indexed', width);
    EXECUTE format('INSERT INTO bt_wide_%s SELECT lpad((random() * 3)::int::text, %s, ''w''), n %% 2 = 0 FROM generate_series(1, 4000) n', width, width);
    EXECUTE format('DELETE FROM bt_wide_%s WHERE NOT indexed', width);
  END LOOP;
END $$;
VACUUM bt_wide_300, bt_wide_350, bt_wide_400, bt_wide_450, bt_wide_500, bt_wide_550, bt_wide_600;
RESET wal_consistency_checking;
DO $$
BEGIN
  FOR width IN 300..600 BY 50 LOOP
    EXECUTE format('INSERT INTO bt_wide_%s SELECT lpad((random() * 3)::int::text, %s, ''w''), true FROM generate_series(1, 2000) n', width, width);
  END LOOP;
END $$;

-- Text keys, with and without nulls, wide enough for few tuples a page.
CREATE TABLE bt_posting_text (k text);
ALTER TABLE bt_posting_text ALTER k SET STORAGE PLAIN;
CREATE INDEX bt_posting_text_k ON bt_posting_text (k);
INSERT INTO bt_posting_text SELECT CASE WHEN n % 9 = 0 THEN NULL ELSE repeat(chr(97 + n % 8), 300) END FROM generate_series(1, 1500) n;
DELETE FROM bt_posting_text WHERE ctid IN (SELECT ctid FROM bt_posting_text WHERE (ctid::text::point)[1]::int % 2 = 0);
VACUUM (INDEX_CLEANUP ON) bt_posting_text;
INSERT INTO bt_posting_text SELECT CASE WHEN n % 9 = 0 THEN NULL ELSE repeat(chr(97 + n % 8), 300) END FROM generate_series(1, 1500) n;

-- Posting lists lose all heap pointers but one, all, some.
DELETE FROM bt_posting WHERE k = 3 AND ctid <> (SELECT min(ctid) FROM bt_posting WHERE k = 3);
DELETE FROM bt_posting WHERE k = 4;
DELETE FROM bt_posting WHERE k = 5 AND (ctid::text::point)[1]::int % 5 = 1;
VACUUM (INDEX_CLEANUP ON) bt_posting;

-- Built with posting lists, then changed.
REINDEX INDEX bt_posting_k;
INSERT INTO bt_posting SELECT n % 10, 'f' FROM generate_series(1, 2000) n;
DELETE FROM bt_posting WHERE k IN (1, 2);
VACUUM (INDEX_CLEANUP ON) bt_posting;
