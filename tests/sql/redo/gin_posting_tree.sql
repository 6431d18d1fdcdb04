-- GIN posting trees: creation, leaves (every way of recompression), downlinks, splits, vacuum, page deletion, reuse.

-- A build makes large trees without a record for each row.
CREATE TABLE postings (id int, keys int[]) WITH (fillfactor = 60);
INSERT INTO postings SELECT i, ARRAY[0, 1 + i % 2] FROM generate_series(1, 90000) AS i;
CREATE INDEX postings_keys ON postings USING gin (keys) WITH (fastupdate = off);

-- Insertion behind the last row: the rightmost leaf grows and splits.
INSERT INTO postings SELECT i, ARRAY[0, 1, 2] FROM generate_series(90001, 94000) AS i;

-- Gaps in the heap that new rows fill: items go in the middle of full leaves, which split, and downlinks go in everywhere.
DELETE FROM postings WHERE id % 20 = 3;
VACUUM postings;
INSERT INTO postings SELECT i, ARRAY[0, 2] FROM generate_series(1, 3000) AS i;

-- Transactions of one row each.
DELETE FROM postings WHERE id % 100 = 7;
VACUUM postings;
DO $$
BEGIN
    FOR i IN 1..100 LOOP
        INSERT INTO postings VALUES (i, ARRAY[0, 1, 10]);
        COMMIT;
    END LOOP;
END $$;

-- Whole leaves become empty and are deleted from the tree; other leaves become smaller.
DELETE FROM postings WHERE id BETWEEN 10000 AND 80000 OR id % 3 = 1;
VACUUM postings;
INSERT INTO postings VALUES (-1, ARRAY[-1]);
INSERT INTO postings VALUES (-2, ARRAY[-2]);
VACUUM postings;
-- Their pages are used again.
INSERT INTO postings SELECT i, ARRAY[i % 2, 20 + i % 3] FROM generate_series(1, 5000) AS i;

-- Keys whose posting lists become trees.
CREATE TABLE becoming (id int, keys int[]);
CREATE INDEX becoming_keys ON becoming USING gin (keys) WITH (fastupdate = off);
INSERT INTO becoming SELECT i, ARRAY[i % 3] FROM generate_series(1, 10000) AS i;
DELETE FROM becoming WHERE id % 4 <> 0;
VACUUM becoming;
DELETE FROM becoming;
VACUUM becoming;
INSERT INTO becoming SELECT i, ARRAY[i % 3] FROM generate_series(1, 2000) AS i;

-- By way of the pending list many items come at once, and one record changes many segments.
CREATE TABLE batches (id int, keys int[]) WITH (fillfactor = 60);
CREATE INDEX batches_keys ON batches USING gin (keys) WITH (fastupdate = on, gin_pending_list_limit = 1024);
INSERT INTO batches SELECT i, ARRAY[i % 2] FROM generate_series(1, 5000) AS i;
SELECT gin_clean_pending_list('batches_keys');
DELETE FROM batches WHERE id % 4 = 1;
VACUUM batches;
INSERT INTO batches SELECT i, ARRAY[i % 2] FROM generate_series(1, 2500) AS i;
SELECT gin_clean_pending_list('batches_keys');
