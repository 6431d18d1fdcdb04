-- Subtransactions beyond what a snapshot caches, two-phase commits, many relations dropped at once, origins, aborts.
CREATE TABLE x (id int PRIMARY KEY, a text);
DO $$ BEGIN
    FOR i IN 1 .. 300 LOOP
        BEGIN
            INSERT INTO x VALUES (i, 'sub');
            IF i % 3 = 0 THEN RAISE EXCEPTION 'back'; END IF;
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END LOOP;
END $$;
BEGIN;
SAVEPOINT a; UPDATE x SET a = 'a' WHERE id % 2 = 0; SAVEPOINT b; DELETE FROM x WHERE id < 50; ROLLBACK TO b; SAVEPOINT c;
SELECT count(*) FROM (SELECT 1 FROM x FOR UPDATE) s; RELEASE c;
PREPARE TRANSACTION 'two';
BEGIN; INSERT INTO x VALUES (9001, 'other'); PREPARE TRANSACTION 'three';
CHECKPOINT;
COMMIT PREPARED 'two';
ROLLBACK PREPARED 'three';
DO $$ BEGIN FOR i IN 1 .. 50 LOOP EXECUTE format('CREATE TABLE many_%s (id int PRIMARY KEY, a text)', i); EXECUTE format('INSERT INTO many_%s VALUES (1, ''m'')', i); END LOOP; END $$;
DO $$ BEGIN FOR i IN 1 .. 50 LOOP EXECUTE format('DROP TABLE many_%s', i); END LOOP; END $$;
SELECT pg_replication_origin_create('here');
SELECT pg_replication_origin_session_setup('here');
BEGIN; SELECT pg_replication_origin_xact_setup('0/1234567', now()); UPDATE x SET a = 'from elsewhere'; COMMIT;
SELECT pg_replication_origin_session_reset();
SELECT pg_replication_origin_advance('here', '0/2345678');
SELECT pg_replication_origin_drop('here');
-- A catalog table rewritten while a logical slot needs its old rows.
SELECT slot_name FROM pg_create_logical_replication_slot('slot', 'pgoutput');
CREATE TABLE uct (id int PRIMARY KEY, a text) WITH (user_catalog_table = true);
INSERT INTO uct SELECT i, 'u' FROM generate_series(1, 200) i;
BEGIN; UPDATE uct SET a = 'updated' WHERE id % 2 = 0; DELETE FROM uct WHERE id % 5 = 0; COMMIT;
VACUUM FULL uct;
CLUSTER uct USING uct_pkey;
VACUUM FULL pg_class;
SELECT pg_drop_replication_slot('slot');
