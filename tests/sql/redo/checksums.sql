--! initdb --data-checksums
--! full_page_writes = on
--! wal_log_hints = on
--! wal_level = replica
-- With checksums, hint bits and maps come as full-page images, and setting a visibility bit moves the heap page's LSN.
CREATE TABLE h (id int PRIMARY KEY, a text);
INSERT INTO h SELECT i, repeat('h', i % 100) FROM generate_series(1, 3000) i;
SELECT count(*) FROM h;
CHECKPOINT;
SELECT count(*), count(a) FROM h;
VACUUM h;
DELETE FROM h WHERE id % 3 = 0;
CHECKPOINT;
SELECT count(*) FROM h WHERE id < 1000;
UPDATE h SET a = 'after a checkpoint' WHERE id % 2 = 0;
VACUUM FREEZE h;
CHECKPOINT;
DELETE FROM h WHERE id > 1000;
VACUUM h;
INSERT INTO h SELECT i, 'again' FROM generate_series(4000, 5000) i;
