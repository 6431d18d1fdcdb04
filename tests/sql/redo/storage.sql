-- Relations and databases that come, shrink and go.
COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; mkdir varve_space';
SELECT current_setting('data_directory') || '/varve_space' AS space \gset
CREATE TABLESPACE space LOCATION :'space';
CREATE TABLE here (id int PRIMARY KEY, a text) TABLESPACE space;
INSERT INTO here SELECT i, repeat('h', i % 100) FROM generate_series(1, 2000) i;
ALTER TABLE here SET TABLESPACE pg_default;
UPDATE here SET a = 'moved' WHERE id % 3 = 0;
ALTER INDEX here_pkey SET TABLESPACE space;
DELETE FROM here WHERE id > 100;
VACUUM here;
INSERT INTO here SELECT i, 'again' FROM generate_series(200, 3000) i;
BEGIN; CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone SELECT generate_series(1, 500); ROLLBACK;
BEGIN; TRUNCATE here; INSERT INTO here VALUES (1, 'in a transaction that fails'); ROLLBACK;
BEGIN; TRUNCATE here; INSERT INTO here SELECT i, 'kept' FROM generate_series(1, 500) i; COMMIT;
BEGIN; DROP TABLE here; CREATE TABLE here (id int); INSERT INTO here SELECT generate_series(1, 10); PREPARE TRANSACTION 'drop';
COMMIT PREPARED 'drop';
CREATE UNLOGGED TABLE un (id int PRIMARY KEY, a text);
INSERT INTO un SELECT i, 'unlogged' FROM generate_series(1, 500) i;
ALTER TABLE un SET LOGGED;
UPDATE un SET a = 'logged' WHERE id % 2 = 0;
ALTER TABLE un SET UNLOGGED;
UPDATE un SET a = 'not logged' WHERE id % 3 = 0;
CREATE TEMP TABLE tmp AS SELECT * FROM un;
CREATE DATABASE d;
CREATE DATABASE e TEMPLATE d;
\c d
CREATE TABLE in_d (id int PRIMARY KEY, a text);
INSERT INTO in_d SELECT i, 'd' FROM generate_series(1, 1000) i;
\c postgres
CREATE DATABASE f TEMPLATE d TABLESPACE space;
\c f
UPDATE in_d SET a = 'in a copied database' WHERE id % 2 = 0;
\c postgres
DROP DATABASE d;
DROP DATABASE f;
DROP DATABASE e;
DROP TABLESPACE space;
SELECT pg_logical_emit_message(true, 'varve', 'transactional'), pg_logical_emit_message(false, 'varve', 'not transactional');
SELECT pg_create_restore_point('here');
SELECT pg_switch_wal();
CREATE TABLE after_switch AS SELECT generate_series(1, 1000) AS id;
