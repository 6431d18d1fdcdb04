-- Sequences: each of their records writes the page anew.
CREATE SEQUENCE a;
CREATE SEQUENCE b INCREMENT 7 MINVALUE -5 MAXVALUE 50 START 3 CACHE 5 CYCLE;
CREATE SEQUENCE c AS smallint;
CREATE TABLE t (id serial PRIMARY KEY, g bigint GENERATED ALWAYS AS IDENTITY);
SELECT count(nextval('a')) FROM generate_series(1, 500);
SELECT count(nextval('b')) FROM generate_series(1, 40);
SELECT setval('a', 10), setval('a', 20, false), setval('c', 32000);
SELECT nextval('a'), nextval('c');
INSERT INTO t SELECT FROM generate_series(1, 100);
CHECKPOINT;
SELECT nextval('a'), nextval('b');
ALTER SEQUENCE a INCREMENT 2 RESTART 100;
ALTER SEQUENCE c AS bigint MAXVALUE 1000000;
SELECT nextval('a'), nextval('c');
BEGIN; SELECT nextval('a'); ALTER SEQUENCE b OWNED BY t.id; ROLLBACK;
TRUNCATE t RESTART IDENTITY;
DROP SEQUENCE c;
