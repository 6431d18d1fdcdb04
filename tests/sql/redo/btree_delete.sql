--! wal_consistency_checking = btree
-- B-tree: insertions that need room delete what is dead: line pointers that scans and uniqueness checks marked, and, bottom up, old versions
-- of rows that were updated.

-- Marked by index scans.
CREATE TABLE bt_killed (k int, n int);
CREATE INDEX bt_killed_k ON bt_killed (k);
INSERT INTO bt_killed SELECT n, n FROM generate_series(1, 2000) n;
DELETE FROM bt_killed WHERE k % 2 = 0;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT count(n) FROM bt_killed WHERE k BETWEEN 1 AND 2000;
INSERT INTO bt_killed SELECT n, n FROM generate_series(1, 1500) n;
DELETE FROM bt_killed WHERE k % 5 = 1;
SELECT count(n) FROM bt_killed WHERE k BETWEEN 1 AND 2000;
INSERT INTO bt_killed SELECT n, n FROM generate_series(1, 1500) n;

-- Marked in posting lists: some of a list's rows dead means that nothing is marked, all of them that its tuple is.
CREATE TABLE bt_killed_posting (k int, n int);
CREATE INDEX bt_killed_posting_k ON bt_killed_posting (k);
INSERT INTO bt_killed_posting SELECT n % 60, n FROM generate_series(1, 6000) n;
DELETE FROM bt_killed_posting WHERE k % 3 = 0 OR n % 5 = 0;
SELECT count(n) FROM bt_killed_posting WHERE k BETWEEN 0 AND 60;
INSERT INTO bt_killed_posting SELECT n % 60, n FROM generate_series(1, 6000) n;
RESET enable_seqscan;
RESET enable_bitmapscan;

-- Marked by uniqueness checks.
CREATE TABLE bt_unique (k int PRIMARY KEY, n int);
INSERT INTO bt_unique SELECT n, 0 FROM generate_series(1, 200) n;
DO $$
BEGIN
  FOR round IN 1..12 LOOP
    DELETE FROM bt_unique WHERE k % 2 = round % 2;
    INSERT INTO bt_unique SELECT n, round FROM generate_series(1, 200) n WHERE n % 2 = round % 2;
    COMMIT;
  END LOOP;
END $$;

-- Bottom up: updates of another indexed column leave versions with the same key, in a unique index and in ones with duplicates.
CREATE TABLE bt_versions (k int PRIMARY KEY, changes int, same int, label text);
CREATE INDEX bt_versions_changes ON bt_versions (changes);
CREATE INDEX bt_versions_same ON bt_versions (same);
CREATE INDEX bt_versions_label ON bt_versions (label);
INSERT INTO bt_versions SELECT n, n, n % 4, repeat('l', 20 + n % 5) FROM generate_series(1, 300) n;
DO $$
BEGIN
  FOR round IN 1..14 LOOP
    UPDATE bt_versions SET changes = changes + 1000;
    COMMIT;
  END LOOP;
END $$;

-- The same while an old snapshot is not in the way of some of the versions only: one transaction updates twice.
DO $$
BEGIN
  FOR round IN 1..5 LOOP
    UPDATE bt_versions SET changes = changes + 1 WHERE k % 3 = 0;
    UPDATE bt_versions SET changes = changes + 1 WHERE k % 2 = 0;
    COMMIT;
  END LOOP;
END $$;
VACUUM (INDEX_CLEANUP ON) bt_versions;
UPDATE bt_versions SET same = same + 1;
UPDATE bt_versions SET same = same - 1;
