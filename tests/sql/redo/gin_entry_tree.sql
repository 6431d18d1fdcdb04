-- GIN entry tree: insertion in leaves and above, splits at every level, root splits, vacuum of entry pages.
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE TABLE words (id int, tags text[], body text);
CREATE INDEX words_tags ON words USING gin (tags) WITH (fastupdate = off);
CREATE INDEX words_both ON words USING gin (tags, to_tsvector('simple', body)) WITH (fastupdate = off);

-- Null keys, empty arrays, null rows.
INSERT INTO words VALUES (1, NULL, NULL), (2, '{}', ''), (3, ARRAY[NULL, 'a'], 'a'), (4, ARRAY['a', 'a'], 'a a');

-- Many distinct keys in random order: leaves split, downlinks go in everywhere.
INSERT INTO words
SELECT i, ARRAY[md5(i::text), md5((i / 3)::text), 'common' || i % 7], md5(i::text) || ' ' || md5((i / 2)::text)
FROM generate_series(10, 1200) AS i;

-- Long keys: three to a page, so that inner pages of the entry tree split too.
INSERT INTO words
SELECT i, ARRAY[(SELECT string_agg(md5((i * 100 + j)::text), '') FROM generate_series(1, 40) AS j)], NULL
FROM generate_series(3000, 3200) AS i;

-- Ascending keys: the rightmost page splits each time.
INSERT INTO words SELECT i, ARRAY['z' || lpad(i::text, 8, '0')], 'plain' FROM generate_series(5000, 5600) AS i;

-- Posting lists inside entry tuples lose and gain heap pointers.
DELETE FROM words WHERE id % 3 = 0;
VACUUM words;
INSERT INTO words SELECT i, ARRAY['common' || i % 7, md5((i / 5)::text)], md5((i / 4)::text) FROM generate_series(10, 1000) AS i;
UPDATE words SET tags = tags || 'updated'::text WHERE id % 11 = 0;
DELETE FROM words WHERE id % 2 = 0;
VACUUM words;

-- A build, which logs whole pages, and insertion into what it built.
CREATE INDEX words_built ON words USING gin (tags);
CREATE INDEX words_trigrams ON words USING gin (body gin_trgm_ops) WITH (fastupdate = off);
INSERT INTO words SELECT i, ARRAY['after' || i], 'after the build ' || md5(i::text) FROM generate_series(7000, 7150) AS i;
VACUUM words;
