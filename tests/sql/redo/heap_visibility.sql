-- Every way to set bits of the visibility map, and every record that clears them.
CREATE TABLE v (id int, a text) WITH (fillfactor = 70);
INSERT INTO v SELECT i, repeat('v', 100) FROM generate_series(1, 3000) i;
VACUUM v;                                   -- all-visible
INSERT INTO v VALUES (3001, 'into an all-visible page');
VACUUM v;
UPDATE v SET a = 'hot' WHERE id = 1;        -- same page
UPDATE v SET a = repeat('w', 2000) WHERE id BETWEEN 100 AND 104; -- another page, old and new both cleared
DELETE FROM v WHERE id % 100 = 0;
VACUUM v;
VACUUM FREEZE v;                            -- all-frozen
SELECT count(*) FROM (SELECT 1 FROM v WHERE id < 40 FOR UPDATE) s; -- locks clear all-frozen only
SELECT count(*) FROM (SELECT 1 FROM v WHERE id BETWEEN 900 AND 940 FOR KEY SHARE) s;
VACUUM FREEZE v;
COPY (SELECT i, 'multi-insert' FROM generate_series(4000, 4300) i) TO PROGRAM 'cat > varve_copy' WITH (FORMAT csv);
COPY v FROM PROGRAM 'cat varve_copy' WITH (FORMAT csv);
VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) v;
DELETE FROM v WHERE id > 2000;
VACUUM v;                                   -- truncates heap and map
INSERT INTO v SELECT i, repeat('z', 300) FROM generate_series(6000, 7000) i; -- extends again
VACUUM v;
TRUNCATE v;
INSERT INTO v VALUES (1, 'x');
VACUUM FREEZE v;
-- COPY FREEZE fills pages that are frozen from the start.
BEGIN;
CREATE TABLE f (id int, a text);
COPY f FROM PROGRAM 'cat varve_copy' WITH (FORMAT csv, FREEZE);
COMMIT;
INSERT INTO f VALUES (1, 'not frozen');
BEGIN;
TRUNCATE f;
COPY f FROM PROGRAM 'cat varve_copy' WITH (FORMAT csv, FREEZE);
COPY f FROM PROGRAM 'cat varve_copy' WITH (FORMAT csv, FREEZE);
COMMIT;
DELETE FROM f WHERE id % 3 = 0;
VACUUM f;
