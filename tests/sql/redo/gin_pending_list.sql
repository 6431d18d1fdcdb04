-- GIN fast update: pending list pages, tail insertion, new sublists, cleanup by every way there is.
CREATE TABLE pending (id int, keys text[], doc jsonb);
CREATE INDEX pending_keys ON pending USING gin (keys) WITH (fastupdate = on, gin_pending_list_limit = 64);
CREATE INDEX pending_doc ON pending USING gin (doc jsonb_path_ops) WITH (fastupdate = on, gin_pending_list_limit = 2048);
CREATE INDEX pending_doc_keys ON pending USING gin (doc) WITH (fastupdate = on, gin_pending_list_limit = 2048);

-- Small rows go to the tail page.
INSERT INTO pending SELECT i, ARRAY['k' || i % 50, 'n' || i], jsonb_build_object('a', i, 'b', i % 10) FROM generate_series(1, 200) AS i;
-- Rows with more keys than a page holds become a list of their own.
INSERT INTO pending
SELECT i, (SELECT array_agg(md5((i * 1000 + j)::text)) FROM generate_series(1, 400) AS j),
       (SELECT jsonb_object_agg('key' || j, md5((i * j)::text)) FROM generate_series(1, 400) AS j)
FROM generate_series(301, 325) AS i;
SELECT gin_clean_pending_list('pending_keys');
SELECT gin_clean_pending_list('pending_doc');
VACUUM pending;

-- By overflow.
INSERT INTO pending SELECT i, ARRAY['k' || i % 50, md5(i::text)], jsonb_build_object('a', i) FROM generate_series(400, 1500) AS i;
-- By ANALYZE and by switching it off.
ANALYZE pending;
INSERT INTO pending SELECT i, ARRAY['last'], '{"last": true}' FROM generate_series(4001, 4100) AS i;
ALTER INDEX pending_keys SET (fastupdate = off);
INSERT INTO pending SELECT i, ARRAY['direct'], '{"direct": true}' FROM generate_series(4101, 4200) AS i;
DELETE FROM pending WHERE id % 2 = 0;
VACUUM pending;
