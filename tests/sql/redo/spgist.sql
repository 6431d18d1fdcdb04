-- SP-GiST: leaf chains, moves, picksplits, added nodes, split prefixes, nulls, vacuum of leaves, roots and redirections.
CREATE TABLE places (id int, quad point, kd point, name text, net inet, span int4range, area box);
CREATE INDEX places_quad ON places USING spgist (quad);
CREATE INDEX places_kd ON places USING spgist (kd kd_point_ops);
CREATE INDEX places_name ON places USING spgist (name);
CREATE INDEX places_net ON places USING spgist (net);
CREATE INDEX places_span ON places USING spgist (span);
CREATE INDEX places_area ON places USING spgist (area);
CREATE INDEX places_included ON places USING spgist (name) INCLUDE (id, span);

-- Small: the root is a leaf, and vacuum takes tuples off it.
INSERT INTO places SELECT i, point(i, i), point(i, i), 'n' || i, '10.0.0.1', int4range(i, i + 1), NULL FROM generate_series(1, 20) AS i;
DELETE FROM places WHERE id % 3 = 0;
VACUUM places;

INSERT INTO places
SELECT i, point(i * 7919 % 1000, i * 104729 % 997), point(i * 31 % 1009, i * 37 % 1013),
       CASE i % 4 WHEN 0 THEN md5(i::text) WHEN 1 THEN 'common prefix of many ' || i WHEN 2 THEN repeat('x', i % 300) || i ELSE chr(33 + i % 90) || i END,
       ('10.' || i % 200 || '.' || i % 77 || '.' || i % 250)::inet, int4range(i % 1000, i % 1000 + i % 17),
       box(point(i % 100, i % 91), point(i % 100 + i % 7, i % 91 + i % 11))
FROM generate_series(100, 2500) AS i;
-- Nulls have a tree of their own.
INSERT INTO places (id) SELECT i FROM generate_series(5001, 6000) AS i;

-- A long common prefix that later keys leave, at ever earlier places: inner tuples split.
CREATE TABLE prefixes (id int, name text);
CREATE INDEX prefixes_name ON prefixes USING spgist (name);
INSERT INTO prefixes SELECT i, repeat('abcdefghij', 20) || md5(i::text) FROM generate_series(1, 600) AS i;
INSERT INTO prefixes SELECT i, left(repeat('abcdefghij', 20), 200 - i) || 'Z' || i FROM generate_series(1, 199) AS i;
-- New first characters one by one: nodes are added until the inner tuple must move.
INSERT INTO prefixes SELECT i, repeat('abcdefghij', i % 20) || chr(200 + i % 300) || i FROM generate_series(1, 2500) AS i;
-- Identical keys: all the same.
INSERT INTO prefixes SELECT i, 'the same' FROM generate_series(1, 1500) AS i;

-- Vacuum: chains with dead heads, whole chains, redirections that became old, placeholders at the end of pages.
DELETE FROM places WHERE id % 2 = 0;
VACUUM places;
DELETE FROM prefixes WHERE id % 3 <> 1;
VACUUM prefixes;
INSERT INTO prefixes SELECT i, repeat('abcdefghij', i % 20) || md5(i::text) FROM generate_series(1, 1500) AS i;
INSERT INTO places SELECT i, point(i % 1000, i % 997), point(i % 1009, i % 1013), md5(i::text), '10.0.0.1', int4range(i, i + 3), NULL
FROM generate_series(7000, 8000) AS i;
VACUUM places, prefixes;
DELETE FROM places;
DELETE FROM prefixes WHERE id > 100;
VACUUM places, prefixes;
INSERT INTO places SELECT i, point(i % 1000, i % 997), point(i % 1009, i % 1013), md5(i::text), '10.0.0.1', int4range(i, i + 3), NULL
FROM generate_series(9000, 10000) AS i;
VACUUM places, prefixes;

-- A chain of which only a dead head is left, on a page that has become full: the new tuple goes elsewhere.
CREATE TABLE dead_heads (name text);
CREATE INDEX dead_heads_name ON dead_heads USING spgist (name);
INSERT INTO dead_heads SELECT chr(97 + i % 26) || md5(i::text) FROM generate_series(1, 1040) AS i;
DELETE FROM dead_heads WHERE name < 'p';
VACUUM dead_heads;
INSERT INTO dead_heads SELECT chr(112 + i % 11) || md5(i::text) FROM generate_series(1, 1000) AS i;
INSERT INTO dead_heads SELECT chr(97 + i % 15) || repeat(md5(i::text), 60) FROM generate_series(1, 15) AS i;

-- A build, and insertion into what it built.
CREATE INDEX places_built ON places USING spgist (quad);
INSERT INTO places (id, quad) SELECT i, point(i * 7 % 1000, i * 11 % 997) FROM generate_series(1, 1000) AS i;
