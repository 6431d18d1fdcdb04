-- GiST: insertion, one-for-one replacement of downlinks, splits at every level, follow-right, killed tuples, page deletion and reuse, builds.
CREATE EXTENSION IF NOT EXISTS btree_gist;
CREATE TABLE shapes (id int, at point, area box, span int4range, during tsrange, doc tsvector, net inet, exact int, name text);
CREATE INDEX shapes_at ON shapes USING gist (at);
CREATE INDEX shapes_area ON shapes USING gist (area);
CREATE INDEX shapes_span ON shapes USING gist (span);
CREATE INDEX shapes_doc ON shapes USING gist (doc);
CREATE INDEX shapes_net ON shapes USING gist (net inet_ops);
CREATE INDEX shapes_mixed ON shapes USING gist (exact, name, during);

INSERT INTO shapes
SELECT i, point(i * 7919 % 1000, i * 104729 % 997), box(point(i % 100, i % 91), point(i % 100 + i % 7, i % 91 + i % 11)),
       int4range(i % 1000, i % 1000 + i % 17), tsrange(timestamp '2024-01-01' + i * interval '1 hour', timestamp '2024-01-02' + i * interval '1 hour'),
       to_tsvector('simple', md5(i::text) || ' ' || md5((i / 2)::text)), ('10.' || i % 200 || '.' || i % 77 || '.1/24')::inet, i % 500,
       repeat(md5(i::text), 1 + i % 8)
FROM generate_series(1, 1800) AS i;
INSERT INTO shapes (id) SELECT i FROM generate_series(5001, 5100) AS i;
UPDATE shapes SET at = point(id % 50, id % 53) WHERE id % 9 = 0;

-- Wide keys, so that inner pages split too.
CREATE TABLE wide (id int, name text);
CREATE INDEX wide_name ON wide USING gist (name);
INSERT INTO wide SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 700) AS i;

-- Exclusion constraint.
CREATE TABLE booked (room int, during int4range, EXCLUDE USING gist (room WITH =, during WITH &&));
INSERT INTO booked SELECT i % 10, int4range(i * 10, i * 10 + 9) FROM generate_series(1, 500) AS i;

-- Vacuum: tuples go, then whole leaves, whose pages are used again after another transaction.
DELETE FROM shapes WHERE id % 2 = 0;
VACUUM shapes;
DELETE FROM shapes WHERE id > 500;
DELETE FROM wide WHERE id % 50 <> 0;
DELETE FROM booked WHERE lower(during) < 9000;
VACUUM shapes, wide, booked;
CREATE TABLE passing_time (id int);
INSERT INTO passing_time VALUES (1);
INSERT INTO passing_time VALUES (2);
VACUUM shapes, wide, booked;
INSERT INTO shapes (id, at, area, span, net, exact, name)
SELECT i, point(i % 1000, i % 997), box(point(i % 100, i % 91), point(i % 100 + 1, i % 91 + 1)), int4range(i, i + 3), '10.0.0.1', i, md5(i::text)
FROM generate_series(1, 2000) AS i;
INSERT INTO wide SELECT i, repeat(md5(i::text), 20) FROM generate_series(1001, 1500) AS i;

-- Index scans mark dead tuples, and insertion into the full page removes them.
CREATE TABLE killed (id int, at point);
CREATE INDEX killed_at ON killed USING gist (at);
INSERT INTO killed SELECT i, point(i % 40, i / 40) FROM generate_series(1, 1200) AS i;
DELETE FROM killed WHERE id % 3 <> 0;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(*) FROM killed WHERE at <@ box '((-1,-1),(100,100))';
INSERT INTO killed SELECT i, point(i % 40, i / 40) FROM generate_series(1, 1200) AS i;
RESET enable_seqscan;
RESET enable_bitmapscan;

-- Builds: sorted, buffered, plain; then insertion into what they built.
CREATE INDEX shapes_at_sorted ON shapes USING gist (at);
CREATE INDEX shapes_area_buffered ON shapes USING gist (area) WITH (buffering = on);
CREATE INDEX shapes_area_plain ON shapes USING gist (area) WITH (buffering = off);
INSERT INTO shapes (id, at, area)
SELECT i, point(i % 1000, i % 997), box(point(i % 100, i % 91), point(i % 100 + 1, i % 91 + 1)) FROM generate_series(1, 500) AS i;
REINDEX INDEX shapes_at;
