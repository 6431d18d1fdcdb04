-- Records of the server itself: backups, settings that change, wrap-around of what transactions number.
SELECT current_setting('server_version_num')::int >= 150000 AS new_backup \gset
\if :new_backup
SELECT pg_backup_start('b', true);
CREATE TABLE in_backup AS SELECT generate_series(1, 100) AS id;
SELECT lsn FROM pg_backup_stop(false);
\else
SELECT pg_start_backup('b', true, false);
CREATE TABLE in_backup AS SELECT generate_series(1, 100) AS id;
SELECT lsn FROM pg_stop_backup(false, false);
\endif
ALTER SYSTEM SET full_page_writes = on;
SELECT pg_reload_conf();
SELECT pg_sleep(0.5);
CHECKPOINT;
UPDATE in_backup SET id = id + 1;
ALTER SYSTEM SET full_page_writes = off;
SELECT pg_reload_conf();
SELECT pg_sleep(0.5);
CHECKPOINT;
UPDATE in_backup SET id = id + 1;
-- More transactions than a page of pg_xact has, and many pages of commit times.
CREATE PROCEDURE burn(n int) LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1 .. n LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$;
CALL burn(40000);
VACUUM FREEZE;
-- More multixacts than a page of offsets has, each of two members, and more members than a page of them has.
CREATE TABLE m (id int PRIMARY KEY);
INSERT INTO m SELECT generate_series(1, 2500);
BEGIN; SELECT count(*) FROM (SELECT 1 FROM m FOR KEY SHARE) s; PREPARE TRANSACTION 'm';
CREATE PROCEDURE lock_each() LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1 .. 2500 LOOP PERFORM 1 FROM m WHERE id = i FOR SHARE; COMMIT; END LOOP; END $$;
CALL lock_each();
COMMIT PREPARED 'm';
VACUUM FREEZE m;
BEGIN; LOCK TABLE m IN ACCESS EXCLUSIVE MODE; COMMIT;
