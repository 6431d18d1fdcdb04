--! wal_consistency_checking = btree
-- B-tree: VACUUM deletes pages: single leaves, subtrees with their upper pages, all but one page of each level (the fast root moves down and,
-- when that page splits again, up); deleted pages are used again.

CREATE FUNCTION wide_key(n int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT repeat('k', 700) || lpad(n::text, 8, '0') $$;

CREATE TABLE bt_pages (k text, n int);
ALTER TABLE bt_pages ALTER k SET STORAGE PLAIN;
CREATE INDEX bt_pages_k ON bt_pages (k);
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(1, 2500) n;

-- Leaves here and there; a few tuples only; a page's last.
DELETE FROM bt_pages WHERE n BETWEEN 300 AND 330 OR n BETWEEN 900 AND 925 OR n % 97 = 0;
VACUUM (INDEX_CLEANUP ON) bt_pages;

-- Whole subtrees in the middle, up to the children of the root.
DELETE FROM bt_pages WHERE n BETWEEN 600 AND 1900;
VACUUM (INDEX_CLEANUP ON) bt_pages;
SELECT txid_current();
VACUUM (INDEX_CLEANUP ON) bt_pages;

-- The pages are used again.
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(600, 1200) n;

-- The left end, then the right end (whose last page can never go).
DELETE FROM bt_pages WHERE n < 500;
VACUUM (INDEX_CLEANUP ON) bt_pages;
DELETE FROM bt_pages WHERE n > 2200;
VACUUM (INDEX_CLEANUP ON) bt_pages;

-- Everything: what is left is one page on each level, and the fast root is the leaf.
DELETE FROM bt_pages;
VACUUM (INDEX_CLEANUP ON) bt_pages;
SELECT txid_current();
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(1, 3) n;
DELETE FROM bt_pages;
VACUUM (INDEX_CLEANUP ON) bt_pages;

-- It splits: the fast root moves up.
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(1, 900) n;

-- Once more, with the last rows left in, so that the fast root becomes an upper page.
DELETE FROM bt_pages WHERE n < 800;
VACUUM (INDEX_CLEANUP ON) bt_pages;
SELECT txid_current();
VACUUM (INDEX_CLEANUP ON) bt_pages;
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(900, 1500) n;
INSERT INTO bt_pages SELECT wide_key(n), n FROM generate_series(700, 1, -1) n;

-- Narrow keys and posting lists; all of a page's tuples go, with and without posting lists.
CREATE TABLE bt_pages_narrow (k int, d int);
CREATE INDEX bt_pages_narrow_k ON bt_pages_narrow (k);
CREATE INDEX bt_pages_narrow_d ON bt_pages_narrow (d);
INSERT INTO bt_pages_narrow SELECT n, n / 200 FROM generate_series(1, 8000) n;
DELETE FROM bt_pages_narrow WHERE k BETWEEN 1000 AND 5000;
VACUUM (INDEX_CLEANUP ON) bt_pages_narrow;
SELECT txid_current();
DELETE FROM bt_pages_narrow WHERE k % 10 = 0;
VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) bt_pages_narrow;
INSERT INTO bt_pages_narrow SELECT n, n / 200 FROM generate_series(2000, 5000) n;

-- In parallel, and after a rewrite.
SET min_parallel_index_scan_size = 0;
SET max_parallel_maintenance_workers = 2;
DELETE FROM bt_pages_narrow WHERE k % 3 = 0;
VACUUM (INDEX_CLEANUP ON, PARALLEL 2) bt_pages_narrow;
VACUUM FULL bt_pages_narrow;
DELETE FROM bt_pages_narrow WHERE k < 2500;
VACUUM (INDEX_CLEANUP ON) bt_pages_narrow;
CLUSTER bt_pages_narrow USING bt_pages_narrow_k;
INSERT INTO bt_pages_narrow SELECT n, n / 200 FROM generate_series(1, 500) n;
