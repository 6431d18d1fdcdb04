-- INSERT ... ON CONFLICT: speculative insertions that are confirmed, and one that is taken back because another session was faster.
CREATE EXTENSION dblink;
CREATE TABLE s (id int PRIMARY KEY, n int DEFAULT 0, t text);
INSERT INTO s SELECT i, 0, repeat('t', 3000 * (i % 2)) FROM generate_series(1, 100) i ON CONFLICT DO NOTHING;
INSERT INTO s SELECT i FROM generate_series(50, 150) i ON CONFLICT (id) DO UPDATE SET n = s.n + 1;
INSERT INTO s SELECT i FROM generate_series(50, 160) i ON CONFLICT DO NOTHING;
-- The indexed function is called before the insertion and again for the index entry; that second time another session inserts the same key.
CREATE SEQUENCE calls;
CREATE TABLE race (k text);
CREATE FUNCTION meddle(k text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF nextval('calls') = 2 THEN
        PERFORM dblink_exec('host=' || current_setting('unix_socket_directories') || ' user=postgres dbname=postgres',
                            format('INSERT INTO race VALUES (%L)', k));
    END IF;
    RETURN k;
END $$;
CREATE UNIQUE INDEX ON race (meddle(k));
SELECT setval('calls', 1, false);
INSERT INTO race VALUES ('contested') ON CONFLICT DO NOTHING;
INSERT INTO race VALUES ('after it') ON CONFLICT DO NOTHING;
-- The same with a value that is toasted, whose chunks are taken back too.
ALTER TABLE race ADD big text;
ALTER TABLE race ALTER big SET STORAGE EXTERNAL;
SELECT setval('calls', 1, false);
INSERT INTO race VALUES ('contested again', repeat('big', 5000)) ON CONFLICT DO NOTHING;
VACUUM race;
VACUUM s;
