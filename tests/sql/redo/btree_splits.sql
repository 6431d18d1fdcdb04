--! wal_consistency_checking = btree
-- B-tree: leaf and upper pages split left and right, the root splits, suffix truncation makes pivots of every kind.
-- Keys are wide and stored uncompressed, so a few hundred rows make a tree of three and four levels.

CREATE FUNCTION wide(n int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT repeat('k', 500) || lpad(n::text, 8, '0') $$;

-- Ascending: rightmost splits, with the fill factor. The distinguishing part stands last, so pivots cannot be truncated.
CREATE TABLE bt_ascending (k text, n int);
ALTER TABLE bt_ascending ALTER k SET STORAGE PLAIN;
CREATE INDEX ON bt_ascending (k);
INSERT INTO bt_ascending SELECT wide(n), n FROM generate_series(1, 1500) n;

-- Descending: leftmost splits at all levels.
CREATE TABLE bt_descending (k text, n int);
ALTER TABLE bt_descending ALTER k SET STORAGE PLAIN;
CREATE INDEX ON bt_descending (k) WITH (fillfactor = 60);
INSERT INTO bt_descending SELECT wide(n), n FROM generate_series(1500, 1, -1) n;

-- Scattered: the new tuple goes left as often as right. 7919 is prime, so each value comes once.
CREATE TABLE bt_scattered (k text, n int);
ALTER TABLE bt_scattered ALTER k SET STORAGE PLAIN;
CREATE UNIQUE INDEX ON bt_scattered (k);
INSERT INTO bt_scattered SELECT wide((n * 7919) % 3001), n FROM generate_series(1, 3000) n;

-- Many inserts into one spot: splits next to the last split.
INSERT INTO bt_scattered SELECT wide(1000) || lpad(n::text, 6, '0'), n FROM generate_series(1, 400) n;
INSERT INTO bt_scattered SELECT wide(2000) || lpad(n::text, 6, '0'), n FROM generate_series(400, 1, -1) n;

-- Several columns, with nulls and INCLUDE: pivots lose attributes, INCLUDE columns never reach upper pages.
CREATE TABLE bt_columns (a int, b text, c int, payload text);
CREATE INDEX bt_columns_abc ON bt_columns (a, b, c);
CREATE UNIQUE INDEX bt_columns_include ON bt_columns (a, c) INCLUDE (b, payload);
CREATE INDEX bt_columns_desc ON bt_columns (b DESC NULLS LAST, a);
INSERT INTO bt_columns
SELECT n % 40, CASE WHEN n % 7 = 0 THEN NULL ELSE repeat(chr(97 + n % 26), 1 + n % 60) END, CASE WHEN n % 11 = 0 THEN NULL ELSE n END, 'p' || n
FROM generate_series(1, 4000) n;

-- Equal keys that cannot be deduplicated: the heap pointer is what tells pivots apart.
CREATE TABLE bt_equal (k text);
CREATE INDEX ON bt_equal (k) WITH (deduplicate_items = off);
INSERT INTO bt_equal SELECT repeat('same', 20) FROM generate_series(1, 3000);

-- numeric has no equal images: no deduplication either.
CREATE TABLE bt_numeric (k numeric);
CREATE INDEX ON bt_numeric (k);
INSERT INTO bt_numeric SELECT CASE WHEN n % 2 = 0 THEN (n % 50)::numeric ELSE ((n % 50) || '.00')::numeric END FROM generate_series(1, 3000) n;

-- An abort leaves the tuples in; a subtransaction's too.
BEGIN;
INSERT INTO bt_ascending SELECT wide(n), n FROM generate_series(1501, 1700) n;
ROLLBACK;
BEGIN;
INSERT INTO bt_ascending SELECT wide(n), n FROM generate_series(1501, 1600) n;
SAVEPOINT s;
INSERT INTO bt_ascending SELECT wide(n), n FROM generate_series(1601, 1700) n;
ROLLBACK TO s;
COMMIT;

-- Built, not inserted into: pages come as images; insertion goes on in them.
CREATE INDEX bt_built ON bt_scattered (n, k);
INSERT INTO bt_scattered SELECT wide(5000 + n), n FROM generate_series(1, 300) n;
REINDEX INDEX bt_built;
INSERT INTO bt_scattered SELECT wide(6000 + n), n FROM generate_series(1, 300) n;
REINDEX TABLE CONCURRENTLY bt_scattered;
INSERT INTO bt_scattered SELECT wide(7000 + n), n FROM generate_series(1, 300) n;
CREATE INDEX CONCURRENTLY bt_built_too ON bt_scattered (n) WHERE n % 3 = 0;
INSERT INTO bt_scattered SELECT wide(8000 + n), n FROM generate_series(1, 300) n;

-- TRUNCATE begins an index anew.
BEGIN;
TRUNCATE bt_descending;
INSERT INTO bt_descending SELECT wide(n), n FROM generate_series(1, 200) n;
COMMIT;
CHECKPOINT;
INSERT INTO bt_descending SELECT wide(n), n FROM generate_series(201, 400) n;
