//! What ingest makes of a server's WAL is what the server itself has on disk when it stops: every block, SLRU page,
//! map, counter and file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use varve_postgres::lsn::WAL_PAGE_SIZE;
use varve_postgres::wal::{record_crc, rmgr};
use varve_postgres::{Lsn, Major};
use varve_testbed::postgres::Postgres;
use varve_testbed::redo::{Preamble, sql_path};

const SETTINGS: [(&str, &str); 10] = [
    ("wal_level", "logical"),
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'1GB'"),
    ("checkpoint_timeout", "'1h'"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'32MB'"),
    ("autovacuum", "off"),
    ("track_commit_timestamp", "on"),
    ("restart_after_crash", "off"),
    ("allow_in_place_tablespaces", "on"),
];

/// Runs corpus files one after the other, each on a server of its own, and compares.
fn compare_after(major: Major, files: &[&str], settings: &[(&str, &str)]) -> Result<()> {
    for file in files {
        let preamble = Preamble::of_file(file)?;
        if !preamble.is_for(major) {
            continue;
        }
        let own = preamble.settings.iter().map(|(name, value)| (&name[..], &value[..]));
        let all: Vec<(&str, &str)> = SETTINGS.into_iter().chain(own).chain(settings.iter().copied()).collect();
        let initdb: Vec<&str> = preamble.initdb.iter().map(String::as_str).collect();
        let mut postgres = Postgres::init(major, &initdb, &all)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        postgres.start()?;
        postgres.psql_file("postgres", &sql_path(file)).with_context(|| format!("running {file}.sql"))?;
        postgres.stop("fast")?;
        crate::oracle::ingest(&postgres, &mut loaded).with_context(|| format!("after {file}.sql"))?;
        let mut comparison = crate::oracle::Comparison::new(&loaded);
        comparison.data_directory(&postgres.data_dir()).with_context(|| format!("after {file}.sql"))?;
        println!("{file}: {} blocks and pages, {} records", comparison.compared_blocks, loaded.boundaries.len());
    }
    Ok(())
}

#[test]
fn heap_and_maps() {
    let files = ["heap_basic", "heap_rows", "heap_freeze", "heap_vacuum", "heap_visibility", "heap_speculative"];
    compare_after(Major::V15, &files, &[]).unwrap();
}

#[test]
fn btree_and_hash() {
    compare_after(Major::V15, &["btree_splits", "btree_posting", "btree_delete", "btree_vacuum", "hash"], &[]).unwrap();
}

#[test]
fn other_indexes_and_sequences() {
    let files = ["gin_entry_tree", "gin_pending_list", "gin_posting_tree", "gist", "spgist", "brin", "generic", "sequences"];
    compare_after(Major::V15, &files, &[]).unwrap();
}

#[test]
fn without_full_page_images() {
    let settings = [("full_page_writes", "off"), ("track_commit_timestamp", "off")];
    compare_after(Major::V15, &["heap_rows", "heap_vacuum", "transactions", "storage"], &settings).unwrap();
}

/// What ingest must know itself, whose records differ between majors: each has its test. (Pages are redo's, which has
/// its own for each.)
macro_rules! for_each_major {
    ($($test:ident $major:ident)*) => {
        mod what_is_outside_pages {
            $(#[test]
            fn $test() {
                let files = ["transactions", "storage", "storage_file_copy", "heap_locks", "heap_visibility"];
                super::compare_after(varve_postgres::Major::$major, &files, &[]).unwrap();
            })*
        }
        mod images {
            $(#[test]
            fn $test() {
                let files = ["checksums", "images_pglz", "images_lz4", "images_zstd"];
                super::compare_after(varve_postgres::Major::$major, &files, &[]).unwrap();
            })*
        }
    };
}

for_each_major! { postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18 }

/// Changes a setting of a stopped server.
fn set(postgres: &Postgres, name: &str, value: &str) -> Result<()> {
    postgres.configure(&[(name, value)])
}

#[test]
fn commit_timestamps_are_switched_off_and_on() {
    fn run() -> Result<()> {
        let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        for (round, on) in ["on", "off", "on"].into_iter().enumerate() {
            set(&postgres, "track_commit_timestamp", on)?;
            postgres.start()?;
            postgres.psql("postgres", &format!("CREATE TABLE t{round} (id int)"))?;
            let many = format!("DO $$ BEGIN FOR i IN 1 .. 900 LOOP INSERT INTO t{round} VALUES (i); COMMIT; END LOOP; END $$");
            postgres.psql("postgres", &many)?;
            postgres.stop("fast")?;
            crate::oracle::ingest(&postgres, &mut loaded)?;
            crate::oracle::Comparison::new(&loaded).data_directory(&postgres.data_dir()).with_context(|| format!("round {round}, {on}"))?;
        }
        Ok(())
    }
    run().unwrap();
}

#[test]
fn the_server_crashes_and_recovers() {
    fn run() -> Result<()> {
        let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        postgres.start()?;
        postgres.psql("postgres", "CREATE TABLE t (id int PRIMARY KEY, a text)")?;
        for round in 0..3 {
            postgres.psql("postgres", &format!("INSERT INTO t SELECT i, 'round' FROM generate_series({round}000, {round}999) i"))?;
            postgres.psql(
                "postgres",
                "BEGIN; UPDATE t SET a = 'prepared'; SAVEPOINT s; DELETE FROM t WHERE id % 2 = 0; PREPARE TRANSACTION 'p'",
            )?;
            postgres.stop("immediate")?;
            postgres.start()?;
            postgres.psql("postgres", if round % 2 == 0 { "COMMIT PREPARED 'p'" } else { "ROLLBACK PREPARED 'p'" })?;
        }
        postgres.stop("fast")?;
        crate::oracle::ingest(&postgres, &mut loaded)?;
        crate::oracle::Comparison::new(&loaded).data_directory(&postgres.data_dir())
    }
    run().unwrap();
}

#[test]
fn a_server_that_leaves_changes_out_of_wal_stops_the_ingest() {
    fn run() -> Result<String> {
        let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        set(&postgres, "wal_level", "minimal")?;
        set(&postgres, "max_wal_senders", "0")?;
        postgres.start()?;
        postgres.psql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS id")?;
        postgres.stop("fast")?;
        let error = crate::oracle::ingest(&postgres, &mut loaded).expect_err("minimal WAL must be refused");
        Ok(format!("{error:#}"))
    }
    let error = run().unwrap();
    assert!(error.contains("wal_level") && error.contains("minimal"), "{error}");
}

/// Where a record's header has its resource manager (`xl_rmid`) and its CRC (`xl_crc`).
const RMID_OFFSET: usize = 17;
const CRC_OFFSET: usize = 20;

/// Makes the first logical message after `from` a record of an extension's resource manager, in the stopped server's
/// own WAL; gives where it begins.
fn hand_to_an_extension(postgres: &Postgres, from: Lsn) -> Result<Lsn> {
    let mut found = None;
    crate::oracle::each_record(postgres.major(), &postgres.data_dir().join("pg_wal"), from, &mut |record| {
        let whole = record.start.page_offset() + record.bytes.len() as u64 <= WAL_PAGE_SIZE;
        if found.is_none() && whole && record.bytes[RMID_OFFSET] == rmgr::LOGICALMSG {
            found = Some(record);
        }
        Ok(())
    })?;
    let record = found.context("a logical message that lies on one page")?;
    let mut bytes = record.bytes.to_vec();
    bytes[RMID_OFFSET] = rmgr::MIN_CUSTOM + 2;
    let crc = record_crc(&bytes);
    bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
    let number = record.start.segment_number();
    let segment = postgres.data_dir().join("pg_wal").join(format!("00000001{:08X}{:08X}", number / 256, number % 256));
    File::options().write(true).open(segment)?.write_all_at(&bytes, record.start.segment_offset())?;
    Ok(record.start)
}

#[test]
fn an_extensions_record_stops_the_ingest_and_what_came_before_stays_readable() {
    fn run() -> Result<()> {
        let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        postgres.start()?;
        postgres.psql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, a text); INSERT INTO t SELECT i, 'before' FROM generate_series(1, 3000) i",
        )?;
        postgres.stop("fast")?;
        crate::oracle::ingest(&postgres, &mut loaded)?;
        let before = loaded.end();
        let kept = tempfile::tempdir()?;
        let data = kept.path().join("data");
        crate::oracle::servers::run(Command::new("cp").arg("-a").arg(postgres.data_dir()).arg(&data))?;

        postgres.start()?;
        postgres.psql("postgres", "UPDATE t SET a = 'later' WHERE id < 10")?;
        postgres.psql("postgres", "SELECT pg_logical_emit_message(false, 'a', 'message') FROM generate_series(1, 5)")?;
        postgres.psql("postgres", "UPDATE t SET a = 'too late'")?;
        postgres.stop("fast")?;
        let stranger = hand_to_an_extension(&postgres, before)?;
        for again in [false, true] {
            let error =
                crate::oracle::ingest(&postgres, &mut loaded).err().context("a record that nobody here can redo was passed over")?;
            let told = format!("{error:#}");
            ensure!(told.contains("custom130") && told.contains(&format!("at {stranger} ")), "rmgr and LSN are named ({again}): {told}");
            ensure!(before < loaded.end() && loaded.end() <= stranger, "all before {stranger} is readable, up to {}", loaded.end());
        }
        let mut comparison = crate::oracle::Comparison::new(&loaded);
        comparison.lsn = before;
        comparison.data_directory(&data)
    }
    run().unwrap();
}
