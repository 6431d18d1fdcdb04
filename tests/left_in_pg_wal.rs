//! What Postgres had flushed when its processes were killed, or when it was stopped while nobody took its WAL, is in
//! the branch's history afterwards, as it is after a crash of a stock server: asynchronous commits, too.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::Value;
use varve_testbed::dev::{Dev, amcheck, free_port, psql, signal};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long a compute may take to be back.
const BACK_MAX: Duration = Duration::from_secs(60);
/// Rows of a transaction that nobody waits for.
const ROWS: usize = 1000;

/// Appends rows that no commit waits for, and gives back once Postgres has flushed them.
fn append(db: &str) -> anyhow::Result<()> {
    let insert = format!("INSERT INTO kept SELECT n, repeat('x', 200) FROM generate_series(1, {ROWS}) n");
    let sql = format!("SET synchronous_commit = off; {insert}; SELECT pg_current_wal_insert_lsn()");
    let written = psql(db, &sql)?;
    let begin = Instant::now();
    while psql(db, &format!("SELECT pg_current_wal_flush_lsn() >= '{written}'::pg_lsn"))? != "t" {
        ensure!(begin.elapsed() < BACK_MAX, "Postgres does not flush up to {written}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn rows(db: &str) -> anyhow::Result<usize> {
    Ok(psql(db, "SELECT count(*) FROM kept")?.parse()?)
}

struct Branch {
    dev: Dev,
    db: String,
}

impl Branch {
    fn new() -> anyhow::Result<Branch> {
        let dev = Dev::start(VARVE)?;
        dev.json(&["tenant", "create", "acme"])?;
        let port = free_port()?.to_string();
        let db = dev.compute("acme/main", &["--port", &port])?;
        psql(&db, "CREATE TABLE kept (n int, filler text)")?;
        psql(&db, "CREATE INDEX ON kept (n)")?;
        // What the same needs later is here then, since nothing can be fetched while the server is away.
        append(&db)?;
        ensure!(rows(&db)? == ROWS, "the rows of a quiet time are there");
        Ok(Branch { dev, db })
    }

    fn pid(&self, which: &str) -> anyhow::Result<u32> {
        let list = self.dev.json(&["compute", "list"])?;
        let compute = list.as_array().and_then(|list| list.first()).context("a compute")?;
        compute[which].as_u64().and_then(|pid| pid.try_into().ok()).with_context(|| format!("{which} of {compute}"))
    }

    /// Waits until the branch's compute answers, and looks at what it has.
    fn has(&self, expected: usize) -> anyhow::Result<()> {
        let found = self.dev.until("the compute to answer", BACK_MAX, || Ok(rows(&self.db).ok()))?;
        ensure!(found == expected, "{found} rows are there, {expected} had been flushed");
        amcheck(&self.db)
    }
}

/// Kills what `which` says while no server takes WAL.
fn killed(which: &[&str]) -> anyhow::Result<()> {
    let mut branch = Branch::new()?;
    let pids = which.iter().map(|which| branch.pid(which)).collect::<anyhow::Result<Vec<_>>>()?;
    branch.dev.kill()?;
    append(&branch.db)?;
    pids.iter().for_each(|pid| signal(*pid, Signal::KILL));
    branch.dev.run()?;
    branch.has(2 * ROWS)?;
    // Nothing of it comes a second time.
    signal(branch.pid("pid")?, Signal::KILL);
    branch.has(2 * ROWS)
}

#[test]
fn the_postmaster_is_killed() -> anyhow::Result<()> {
    killed(&["pid"])
}

#[test]
fn the_compute_process_is_killed() -> anyhow::Result<()> {
    killed(&["mount_pid"])
}

#[test]
fn both_are_killed() -> anyhow::Result<()> {
    killed(&["mount_pid", "pid"])
}

/// A signal stops it while the server is away: when that is back, it gets the rest, and the end is a clean one.
#[test]
fn a_compute_that_is_stopped_without_a_server_is_not_done_before_its_wal_is_there() -> anyhow::Result<()> {
    let mut branch = Branch::new()?;
    let supervisor = branch.pid("mount_pid")?;
    branch.dev.kill()?;
    append(&branch.db)?;
    signal(supervisor, Signal::TERM);
    std::thread::sleep(Duration::from_secs(2));
    branch.dev.run()?;
    branch.has(2 * ROWS)
}

/// Whoever cancels every backend cancels our walsender, too: it comes back, and commits go on.
#[test]
fn a_walsender_that_is_cancelled_comes_back() -> anyhow::Result<()> {
    let branch = Branch::new()?;
    psql(&branch.db, "SELECT pg_cancel_backend(pid) FROM pg_stat_replication WHERE application_name LIKE 'varve%'")?;
    append(&branch.db)?;
    psql(&branch.db, "SET statement_timeout = '30s'; INSERT INTO kept VALUES (0)")?;
    let stopped = branch.dev.json(&["compute", "stop", "acme/main"])?;
    ensure!(stopped[0]["stopped"].is_string(), "a clean stop says so: {stopped}");
    let db = branch.dev.compute("acme/main", &[])?;
    let found = rows(&db)?;
    ensure!(found == 2 * ROWS + 1, "{found} rows are there after a clean stop");
    let list: Value = branch.dev.json(&["compute", "list"])?;
    ensure!(list[0]["state"] == "running", "{list}");
    Ok(())
}
