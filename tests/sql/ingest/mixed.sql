-- An application's mix, run beside pgbench: every kind of thing that Postgres keeps outside of relation blocks changes here.
CREATE EXTENSION dblink;
CREATE EXTENSION bloom;
CREATE TABLESPACE space LOCATION '';
CREATE TABLE people (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, tags text[], at point, seen timestamptz DEFAULT now(), note text);
CREATE INDEX people_name ON people USING hash (name);
CREATE INDEX people_tags ON people USING gin (tags);
CREATE INDEX people_at ON people USING gist (at);
CREATE INDEX people_place ON people USING spgist (at);
CREATE INDEX people_seen ON people USING brin (seen) WITH (pages_per_range = 4);
CREATE INDEX people_bloom ON people USING bloom (id, name);
CREATE TABLE elsewhere (id int PRIMARY KEY, a text) TABLESPACE space;
CREATE TABLE moved TABLESPACE space AS SELECT i FROM generate_series(1, 2000) i;
CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY, a text);
CREATE SEQUENCE tickets INCREMENT 3;
CREATE MATERIALIZED VIEW named AS SELECT name, count(*) FROM people GROUP BY name;
CREATE TABLE parent (id int PRIMARY KEY, a text);
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
INSERT INTO parent SELECT i, 'parent' FROM generate_series(1, 200) i;
DO $$ BEGIN
    FOR round IN 1 .. 6 LOOP
        INSERT INTO people (name, tags, at, note)
            SELECT 'name ' || i % 97, ARRAY['t' || i % 13, 't' || i % 7], point(i % 50, i % 31), CASE WHEN i % 50 = 0 THEN repeat(md5(i::text), 200) END
            FROM generate_series(1, 400) i;
        UPDATE people SET seen = clock_timestamp(), note = 'round ' || round WHERE id % 5 = round % 5;
        DELETE FROM people WHERE id % 11 = round;
        INSERT INTO elsewhere SELECT i, 'else' FROM generate_series(round * 1000, round * 1000 + 300) i;
        INSERT INTO scratch SELECT i, 'scratch' FROM generate_series(round * 1000, round * 1000 + 300) i;
        PERFORM nextval('tickets') FROM generate_series(1, 40);
        PERFORM lo_from_bytea(0, convert_to(repeat('large ' || round, 3000), 'UTF8'));
        COMMIT;
    END LOOP;
END $$;
-- Subtransactions, more than a snapshot holds.
DO $$ BEGIN
    FOR i IN 1 .. 150 LOOP
        BEGIN
            INSERT INTO child VALUES (i, i);
            IF i % 4 = 0 THEN RAISE EXCEPTION 'back'; END IF;
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END LOOP;
END $$;
BEGIN; SAVEPOINT a; UPDATE parent SET a = 'a' WHERE id < 50; SAVEPOINT b; DELETE FROM parent WHERE id > 180; ROLLBACK TO b; COMMIT;
-- Multixacts: several lockers of a row.
BEGIN; SELECT count(*) FROM (SELECT 1 FROM parent WHERE id <= 60 FOR KEY SHARE) s; PREPARE TRANSACTION 'locks';
BEGIN; SELECT count(*) FROM (SELECT 1 FROM parent WHERE id <= 40 FOR SHARE) s; COMMIT;
BEGIN; UPDATE parent SET a = 'under a lock' WHERE id <= 20; COMMIT;
BEGIN; INSERT INTO child SELECT i, i FROM generate_series(300, 400) i WHERE i < 0; SELECT count(*) FROM (SELECT 1 FROM parent WHERE id <= 60 FOR NO KEY UPDATE) s; SAVEPOINT s; UPDATE parent SET a = 'more' WHERE id < 10; ROLLBACK TO s; COMMIT;
COMMIT PREPARED 'locks';
-- Prepared transactions that end, and one that stays.
BEGIN; CREATE TABLE made_in_two_phases (id int PRIMARY KEY); INSERT INTO made_in_two_phases SELECT generate_series(1, 300); PREPARE TRANSACTION 'create';
BEGIN; SAVEPOINT a; DELETE FROM elsewhere WHERE id % 2 = 0; SAVEPOINT b; INSERT INTO elsewhere VALUES (1, 'one'); PREPARE TRANSACTION 'stays';
BEGIN; INSERT INTO parent VALUES (1000, 'never'); PREPARE TRANSACTION 'undone';
COMMIT PREPARED 'create';
ROLLBACK PREPARED 'undone';
VACUUM people;
VACUUM (FREEZE) parent;
TRUNCATE made_in_two_phases;
INSERT INTO made_in_two_phases SELECT generate_series(1, 3000);
DELETE FROM made_in_two_phases WHERE id > 100;
VACUUM made_in_two_phases;
INSERT INTO made_in_two_phases SELECT generate_series(5000, 6000);
CREATE DATABASE copied STRATEGY file_copy;
CREATE DATABASE logged STRATEGY wal_log;
\c copied
CREATE TABLE t (id int PRIMARY KEY, a text);
INSERT INTO t SELECT i, 'in a copied database' FROM generate_series(1, 500) i;
\c logged
CREATE TABLE t (id int PRIMARY KEY, a text);
INSERT INTO t SELECT i, 'in a logged database' FROM generate_series(1, 500) i;
\c postgres
CREATE DATABASE again TEMPLATE copied STRATEGY file_copy TABLESPACE space;
DROP DATABASE copied;
ALTER DATABASE logged SET TABLESPACE space;
VACUUM FULL people;
CLUSTER parent USING parent_pkey;
REINDEX TABLE CONCURRENTLY people;
VACUUM FULL pg_class;
REFRESH MATERIALIZED VIEW named;
ALTER TABLE moved SET TABLESPACE pg_default;
SELECT lo_unlink(oid) FROM pg_largeobject_metadata ORDER BY oid LIMIT 3;
CREATE TABLE dropped AS SELECT i FROM generate_series(1, 5000) i;
DROP TABLE dropped;
BEGIN; CREATE TABLE aborted AS SELECT i FROM generate_series(1, 5000) i; ROLLBACK;
CREATE ROLE somebody LOGIN PASSWORD 'secret';
GRANT SELECT ON people TO somebody;
SELECT pg_logical_emit_message(true, 'varve', 'a message');
SELECT pg_create_restore_point('here');
SELECT pg_switch_wal();
INSERT INTO parent SELECT i, 'after a switch' FROM generate_series(2000, 2100) i;
CHECKPOINT;
INSERT INTO scratch SELECT i, 'more scratch' FROM generate_series(10000, 10300) i;
UPDATE people SET note = 'last' WHERE id % 3 = 0;
