//! Commits that wait for a server that is away hold every place that sessions have, and locks of the catalogues through
//! which one logs in. When the server is back, all of them end soon.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use varve_postgres::Major;
use varve_testbed::dev::{Dev, free_port, psql};
use varve_testbed::limit::Process;
use varve_testbed::postgres::is_skipped;
use varve_testbed::session::Session;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// Places for sessions in these tests, all of which are taken.
const SESSIONS: usize = 20;
/// How long Postgres may take until commits wait where they should.
const WAITING_MAX: Duration = Duration::from_secs(60);
/// How long everything may take to heal once the server answers: some 3 s, on a machine where everything runs at once.
const HEALED_MAX: Duration = Duration::from_secs(20);

/// Reads every file of the database and of the cluster's own relations.
const READ_ALL: &str = "SELECT sum(length(pg_read_binary_file(dir || '/' || name, 0, 1 << 29, true)))
FROM (SELECT 'base/' || oid AS dir FROM pg_database WHERE datname = 'postgres' UNION ALL VALUES ('global'), ('pg_xact')) dirs,
pg_ls_dir(dir) name";

/// A session that has read a table.
fn open(db: &str) -> anyhow::Result<Session> {
    let mut session = Session::open(db)?;
    session.run("SELECT count(*) FROM kept; SELECT rolname FROM pg_roles WHERE rolname = current_user", WAITING_MAX)?;
    Ok(session)
}

/// A compute without room for anybody but the sessions that are given; nothing else connects to it.
fn full_compute(dev: &Dev, major: Major) -> anyhow::Result<(String, u32, Vec<Session>)> {
    dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    let port = free_port()?.to_string();
    let db = dev.compute("acme/main", &["--port", &port])?;
    psql(&db, "CREATE TABLE kept (n int)")?;
    psql(&db, &format!("ALTER SYSTEM SET max_connections = {SESSIONS}"))?;
    psql(&db, "ALTER SYSTEM SET autovacuum = off")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let compute = dev.json(&["compute", "start", "acme/main", "--port", &port])?;
    let pid = compute["pid"].as_u64().and_then(|pid| pid.try_into().ok()).context("a compute has a pid")?;
    let mut sessions = (0..SESSIONS).map(|_| open(&db)).collect::<anyhow::Result<Vec<_>>>()?;
    // What they need must be here, since nothing can be fetched while the server is away.
    for sql in ["VACUUM FULL pg_authid", "VACUUM FULL pg_class", "CREATE TABLE warm ()"] {
        sessions[0].begin(sql)?;
        sessions[0].end(WAITING_MAX)?;
    }
    for session in &mut sessions {
        session.begin("INSERT INTO kept VALUES (-1)")?;
        session.end(WAITING_MAX)?;
    }
    sessions[0].begin(READ_ALL)?;
    sessions[0].end(WAITING_MAX)?;
    let refused = psql(&db, "SELECT 1");
    ensure!(refused.is_err(), "there is no room for another session");
    Ok((db, pid, sessions))
}

/// Waits until `count` processes of the postmaster say that they wait for the pageserver.
fn await_waiting(dev: &Dev, postmaster: u32, count: usize) -> anyhow::Result<()> {
    dev.until(&format!("{count} commits to wait for the pageserver"), WAITING_MAX, || {
        let children = Process::children_of(postmaster);
        let found = children.iter().filter(|process| process.title.contains(" waiting for ")).count();
        Ok((found == count).then_some(()))
    })
}

/// With the server away, a session each begins `lockers`, which keep locks while their commits wait, all others insert;
/// then the server comes back. Gives what the lockers were told.
fn heals(major: Major, lockers: &[&str]) -> anyhow::Result<Vec<Vec<String>>> {
    let mut dev = Dev::start_for(VARVE, major, &[])?;
    let (db, postmaster, mut sessions) = full_compute(&dev, major)?;
    dev.kill()?;
    let inserts = SESSIONS - lockers.len();
    for (n, session) in sessions.iter_mut().skip(lockers.len()).enumerate() {
        session.begin(&format!("INSERT INTO kept VALUES ({n})"))?;
    }
    await_waiting(&dev, postmaster, inserts)?;
    for (n, locker) in lockers.iter().enumerate() {
        sessions[n].begin(locker)?;
        await_waiting(&dev, postmaster, inserts + n + 1)?;
    }

    dev.run()?;
    let back = Instant::now();
    let mut told = Vec::new();
    for (n, session) in sessions.iter_mut().enumerate() {
        let said = session.end(HEALED_MAX)?;
        ensure!(n < lockers.len() || said.is_empty(), "an insert is acknowledged without a warning, psql said {said:?}");
        told.push(said);
    }
    println!("{lockers:?}: all commits ended after {:?}", back.elapsed());
    ensure!(back.elapsed() < HEALED_MAX, "all commits ended after {:?}", back.elapsed());
    drop(sessions);

    // What was acknowledged is there, and there for the next compute.
    let count = "SELECT count(DISTINCT n) FROM kept WHERE n >= 0";
    let found = dev.until("a session", WAITING_MAX, || Ok(psql(&db, count).ok()))?;
    ensure!(found == inserts.to_string(), "{found} of {inserts} acknowledged rows are there");
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    let found = psql(&db, count)?;
    ensure!(found == inserts.to_string(), "{found} of {inserts} acknowledged rows are there for the next compute");
    told.truncate(lockers.len());
    Ok(told)
}

/// Whether psql said that a commit is not acknowledged.
fn is_let_go(told: &[String]) -> bool {
    told.iter().any(|line| line.contains("canceling wait for synchronous replication"))
}

#[test]
fn commits_in_all_places_are_acknowledged() -> anyhow::Result<()> {
    heals(Major::V15, &[]).map(drop)
}

/// Whoever logs in to a database reads `pg_class`.
#[test]
fn a_commit_that_locks_pg_class_is_acknowledged() -> anyhow::Result<()> {
    let told = heals(Major::V15, &["VACUUM FULL pg_class"])?;
    ensure!(told[0].is_empty(), "it is acknowledged without a warning, psql said {told:?}");
    Ok(())
}

/// Whoever logs in reads `pg_authid`: only without this commit does the server get in.
#[test]
fn a_commit_that_locks_pg_authid_is_let_go() -> anyhow::Result<()> {
    let told = heals(Major::V15, &["VACUUM FULL pg_authid"])?;
    ensure!(is_let_go(&told[0]), "it is told so: {told:?}");
    Ok(())
}

fn commits_that_lock_both_end(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let told = heals(major, &["VACUUM FULL pg_authid", "VACUUM FULL pg_class"])?;
    ensure!(is_let_go(&told[0]), "the one that locks pg_authid is told so: {told:?}");
    Ok(())
}

#[test]
fn commits_that_lock_both_end_on_14() -> anyhow::Result<()> {
    commits_that_lock_both_end(Major::V14)
}

#[test]
fn commits_that_lock_both_end_on_15() -> anyhow::Result<()> {
    commits_that_lock_both_end(Major::V15)
}

#[test]
fn commits_that_lock_both_end_on_18() -> anyhow::Result<()> {
    commits_that_lock_both_end(Major::V18)
}
