-- Generic WAL: the bloom extension's indexes.
CREATE EXTENSION bloom;
CREATE TABLE bl (id int, a int, b text);
INSERT INTO bl SELECT i, i % 97, md5(i::text) FROM generate_series(1, 3000) i;
CREATE INDEX bl_idx ON bl USING bloom (a, b) WITH (length = 64, col1 = 3);
INSERT INTO bl SELECT i, i % 89, md5(i::text) FROM generate_series(3001, 6000) i;
DELETE FROM bl WHERE id % 2 = 0;
VACUUM bl;
INSERT INTO bl SELECT i, i % 83, md5(i::text) FROM generate_series(6001, 8000) i;
DELETE FROM bl;
VACUUM bl;
INSERT INTO bl VALUES (1, 1, 'one');
REINDEX INDEX bl_idx;
