-- Freezing tuples in every state: committed, updated, deleted, locked by one and by many, aborted; by plans that tuples share.
CREATE TABLE z (id int PRIMARY KEY, a text);
INSERT INTO z SELECT i, 'first' FROM generate_series(1, 500) i;
INSERT INTO z SELECT i, 'second' FROM generate_series(501, 1000) i;
BEGIN; UPDATE z SET a = 'aborted' WHERE id % 10 = 0; ROLLBACK;
BEGIN; DELETE FROM z WHERE id % 10 = 1; ROLLBACK;
BEGIN; SELECT count(*) FROM (SELECT 1 FROM z WHERE id % 10 = 2 FOR KEY SHARE) s; PREPARE TRANSACTION 'a';
BEGIN; SELECT count(*) FROM (SELECT 1 FROM z WHERE id % 20 = 2 FOR SHARE) s; PREPARE TRANSACTION 'b';
BEGIN; UPDATE z SET a = 'under a lock' WHERE id % 40 = 12; PREPARE TRANSACTION 'c';
BEGIN; SELECT count(*) FROM (SELECT 1 FROM z WHERE id % 10 = 3 FOR UPDATE) s; COMMIT;
VACUUM FREEZE z;                           -- what the prepared transactions hold stays
COMMIT PREPARED 'a';
VACUUM FREEZE z;
COMMIT PREPARED 'b';
COMMIT PREPARED 'c';
SET vacuum_freeze_min_age = 0;
SET vacuum_multixact_freeze_min_age = 0;
VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) z;
INSERT INTO z SELECT i, 'third' FROM generate_series(2001, 2500) i;
UPDATE z SET a = 'fourth' WHERE id % 2 = 0;
VACUUM z;
VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) z;
VACUUM FREEZE pg_class, pg_attribute, pg_proc;
