//! Transaction ids, multixacts and their members wrap around: ingest follows (the next transaction's epoch, pages that
//! begin again at zero, truncation across the edge), and a server starts on the other side.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::oracle::{Comparison, servers};
use anyhow::{Context, Result, ensure};
use varve_postgres::Major;
use varve_testbed::postgres::Postgres;
use varve_testbed::redo::sql_path;

const SETTINGS: [(&str, &str); 7] = [
    ("autovacuum", "off"),
    ("wal_keep_size", "'16GB'"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'32MB'"),
    ("vacuum_freeze_min_age", "0"),
    ("vacuum_multixact_freeze_min_age", "0"),
    ("track_commit_timestamp", "on"),
];
/// Bytes of a whole SLRU segment.
const SEGMENT_BYTES: usize = 32 * 8192;

/// Makes the SLRU segment that holds item `number`, as if the server had come there by itself.
fn make_segment(postgres: &Postgres, area: &str, number: u64, per_page: u64) -> Result<()> {
    let path = postgres.data_dir().join(area).join(format!("{:04X}", number / per_page / 32));
    if !path.exists() {
        fs::write(path, vec![0; SEGMENT_BYTES])?;
    }
    postgres.own()
}

fn resetwal(postgres: &Postgres, args: &[&str]) -> Result<()> {
    let mut command = postgres.command("pg_resetwal")?;
    servers::run(command.args(args).arg("-f").arg("-D").arg(postgres.data_dir())).map(|_| ())
}

fn freeze_everything(postgres: &Postgres) -> Result<()> {
    postgres.psql("postgres", "UPDATE pg_database SET datallowconn = true")?;
    for database in ["template0", "template1", "postgres"] {
        postgres.psql(database, "VACUUM (FREEZE, DISABLE_PAGE_SKIPPING)")?;
    }
    Ok(())
}

/// Moves the stopped server's next transaction to `xid`, and freezes all that is older.
fn jump(postgres: &mut Postgres, xid: u32) -> Result<()> {
    make_segment(postgres, "pg_xact", u64::from(xid), 32768)?;
    make_segment(postgres, "pg_commit_ts", u64::from(xid), 819)?;
    resetwal(postgres, &["-x", &xid.to_string()])?;
    postgres.start().with_context(|| format!("at transaction {xid}"))?;
    freeze_everything(postgres)?;
    postgres.stop("fast")
}

/// Compares the stopped server with the history of its WAL, and starts another on a backup.
fn compare(postgres: &Postgres, loaded: &mut crate::oracle::Loaded) -> Result<Postgres> {
    crate::oracle::ingest(postgres, loaded)?;
    Comparison::new(loaded).data_directory(&postgres.data_dir())?;
    let (end, range) = (loaded.end(), (loaded.imported.end.end, loaded.end()));
    let timeline = servers::timeline(&*loaded.history, loaded.imported.system_identifier, 1, Vec::new(), end, range)?;
    let mut ours = servers::from_backup(&*loaded.history, loaded, &timeline, &SETTINGS)?;
    ours.start()?;
    Ok(ours)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    servers::run(Command::new("cp").arg("-a").arg(from).arg(to)).map(|_| ())
}

#[test]
fn transactions_wrap_around() {
    run_transactions().unwrap();
}

fn run_transactions() -> Result<()> {
    let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
    for xid in [1_600_000_000, 3_200_000_000, u32::MAX - 400] {
        jump(&mut postgres, xid)?;
    }
    let mut loaded = crate::oracle::import(&postgres)?;
    postgres.start()?;
    postgres.psql("postgres", "CREATE TABLE t (id int PRIMARY KEY, a text)")?;
    postgres.psql(
        "postgres",
        "BEGIN; INSERT INTO t VALUES (1, 'prepared before'); SAVEPOINT s; INSERT INTO t VALUES (2, 'too'); PREPARE TRANSACTION 'before'",
    )?;
    let many = "DO $$ BEGIN FOR i IN 10 .. 700 LOOP INSERT INTO t VALUES (i, 'own transaction'); COMMIT; END LOOP; END $$";
    postgres.psql("postgres", many)?;
    postgres.psql("postgres", "BEGIN; INSERT INTO t VALUES (3, 'prepared after'); PREPARE TRANSACTION 'after'")?;
    let epoch = postgres.psql("postgres", "SELECT pg_current_xact_id()::text::numeric > 4294967296")?;
    ensure!(epoch.trim() == "t", "the load crosses the edge");
    postgres.stop("fast")?;
    let copied = tempfile::tempdir()?;
    copy(&postgres.data_dir(), &copied.path().join("data"))?;

    let mut ours = compare(&postgres, &mut loaded)?;
    let dump = servers::dump(&ours)?;
    ours.psql("postgres", "COMMIT PREPARED 'before'")?;
    ours.psql("postgres", "ROLLBACK PREPARED 'after'")?;
    ensure!(ours.psql("postgres", "SELECT count(*) FROM t")?.trim() == "693", "what was prepared on both sides of the edge can be ended");
    servers::check(&ours)?;
    ours.stop("fast")?;

    // The server goes on: it forgets the transactions before the edge.
    postgres.start()?;
    let theirs = servers::dump(&postgres)?;
    if let Some(difference) = servers::first_difference(&dump, &theirs) {
        anyhow::bail!("after the edge, dumps differ at {difference}");
    }
    postgres.psql("postgres", "COMMIT PREPARED 'before'")?;
    postgres.psql("postgres", "COMMIT PREPARED 'after'")?;
    freeze_everything(&postgres)?;
    postgres.psql("postgres", "CHECKPOINT")?;
    postgres.stop("fast")?;
    let segments = fs::read_dir(postgres.data_dir().join("pg_xact"))?.count();
    ensure!(segments == 1, "the status of transactions before the edge is gone: {segments} segments are left");
    compare(&postgres, &mut loaded)?.stop("fast")
}

#[test]
fn multixacts_wrap_around() {
    run_multixacts().unwrap();
}

fn run_multixacts() -> Result<()> {
    let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
    let (multi, offset) = (u32::MAX - 8, u32::MAX - 12);
    make_segment(&postgres, "pg_multixact/offsets", u64::from(multi), 2048)?;
    make_segment(&postgres, "pg_multixact/members", u64::from(offset), 1636)?;
    // The last members page of all is short.
    let last = postgres.data_dir().join("pg_multixact/members").join(format!("{:04X}", u32::MAX / 1636 / 32));
    fs::write(&last, vec![0; (u32::MAX / 1636 % 32 + 1) as usize * 8192])?;
    postgres.own()?;
    resetwal(&postgres, &["-m", &format!("{multi},{multi}"), "-O", &offset.to_string()])?;
    postgres.start()?;
    freeze_everything(&postgres)?;
    postgres.stop("fast")?;
    let mut loaded = crate::oracle::import(&postgres)?;
    postgres.start()?;
    postgres.psql_file("postgres", &sql_path("heap_locks"))?;
    postgres.psql(
        "postgres",
        "BEGIN; SELECT count(*) FROM l WHERE id IN (SELECT id FROM l WHERE id > 250 FOR KEY SHARE); PREPARE TRANSACTION 'p'",
    )?;
    postgres.psql("postgres", "BEGIN; SELECT count(*) FROM l WHERE id IN (SELECT id FROM l WHERE id > 250 FOR SHARE); COMMIT")?;
    postgres.psql("postgres", "UPDATE l SET a = 'under locks' WHERE id > 250")?;
    postgres.stop("fast")?;
    crate::oracle::ingest(&postgres, &mut loaded)?;
    Comparison::new(&loaded).data_directory(&postgres.data_dir())?;
    let next = varve_engine::template::read_control(&postgres.data_dir(), Major::V15)?.checkpoint_copy;
    ensure!(next.next_multi < multi, "the multixacts cross the edge: the next is {}", next.next_multi);
    ensure!(next.next_multi_offset < offset, "the members cross the edge: the next offset is {}", next.next_multi_offset);
    postgres.start()?;
    postgres.psql("postgres", "COMMIT PREPARED 'p'")?;
    freeze_everything(&postgres)?;
    postgres.stop("fast")?;
    let mut ours = compare(&postgres, &mut loaded)?;
    servers::check(&ours)?;
    ours.psql("postgres", "UPDATE l SET a = 'on the other side'")?;
    ours.stop("fast")
}
