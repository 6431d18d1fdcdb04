-- BRIN: builds, summarisation, updates in place and to another page, extension of the range map, evacuation, desummarisation.
CREATE TABLE ranges (id int, at timestamptz, name text, span int4range, net inet, score float8) WITH (fillfactor = 20);
CREATE INDEX ranges_minmax ON ranges USING brin (id, at, name) WITH (pages_per_range = 1, autosummarize = off);
CREATE INDEX ranges_inclusion ON ranges USING brin (span, net inet_inclusion_ops) WITH (pages_per_range = 2);
CREATE INDEX ranges_bloom ON ranges USING brin (id int4_bloom_ops, name text_bloom_ops) WITH (pages_per_range = 4);
CREATE INDEX ranges_multi ON ranges USING brin (id int4_minmax_multi_ops, score float8_minmax_multi_ops) WITH (pages_per_range = 4);

INSERT INTO ranges
SELECT i, timestamptz '2024-01-01' + i * interval '1 minute', md5(i::text), int4range(i, i + i % 9), ('10.' || i % 200 || '.0.0/16')::inet, i % 97
FROM generate_series(1, 2000) AS i;
SELECT brin_summarize_new_values(c::regclass)
FROM unnest(ARRAY['ranges_minmax', 'ranges_inclusion', 'ranges_bloom', 'ranges_multi']) AS c;

-- Values outside the summaries: updates in place, and as summaries grow, to other pages.
DELETE FROM ranges WHERE id % 5 = 0;
VACUUM ranges;
INSERT INTO ranges
SELECT -i, timestamptz '2020-01-01' - i * interval '1 minute', repeat(md5(i::text), 1 + i % 40), int4range(-i, -i + 3),
       ('192.168.' || i % 250 || '.0/24')::inet, -i
FROM generate_series(1, 400) AS i;
UPDATE ranges SET name = repeat('~' || name, 30), score = score * 1000 + id WHERE id % 7 = 0;
VACUUM ranges;

-- Desummarised and summarised again, one range and all.
SELECT brin_desummarize_range('ranges_minmax', block) FROM generate_series(0, 40, 3) AS block;
SELECT brin_desummarize_range('ranges_bloom', block) FROM generate_series(0, 40, 8) AS block;
SELECT brin_summarize_range('ranges_minmax', 3);
SELECT brin_summarize_new_values('ranges_minmax');
SELECT brin_summarize_new_values('ranges_bloom');

-- More ranges than a page of the range map covers (1360): it is extended, over pages whose summaries must first go elsewhere.
CREATE TABLE long (id int, pad text) WITH (fillfactor = 10);
ALTER TABLE long ALTER pad SET STORAGE plain;
CREATE INDEX long_id ON long USING brin (id, pad) WITH (pages_per_range = 1);
INSERT INTO long SELECT i, repeat('p', 700 + i % 100) FROM generate_series(1, 1000) AS i;
SELECT brin_summarize_new_values('long_id');
INSERT INTO long SELECT i, repeat('q', 700 + i % 100) FROM generate_series(1001, 3000) AS i;
SELECT brin_summarize_new_values('long_id');
VACUUM long;

-- Builds.
CREATE INDEX long_built ON long USING brin (id) WITH (pages_per_range = 1);
INSERT INTO long SELECT i, repeat('r', 700) FROM generate_series(3001, 3200) AS i;
VACUUM long;
