//! Loads that tear at everything at once: every index method rebuilt and vacuumed under writes, databases that come and
//! go, Postgres and the pageserver killed in the middle, on a branch of a branch. Afterwards every block that the
//! compute wrote is what the page service has, and the next compute holds the same rows.

use std::collections::BTreeSet;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::application::{pgbench, run_script, sql, start};
use varve_testbed::beside::Private;
use varve_testbed::comparison::{Comparison, DataDirectory, PageService};
use varve_testbed::dev::{Dev, amcheck, program, psql, settle};
use varve_testbed::dump::{Sequences, ensure_same, rows};
use varve_testbed::limit::{self, COMMAND_MAX};
use varve_testbed::postgres::is_skipped;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long each storm lasts.
const STORM_SECONDS: u32 = 5;
/// When, in a storm, the server is killed.
const KILLED_AFTER: Duration = Duration::from_secs(3);
/// How long a killed compute may take until it answers again.
const BACK_MAX: Duration = Duration::from_secs(60);

fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    Ok(value[key].as_str().with_context(|| format!("{value} has a {key}"))?.to_owned())
}

/// Writers beside whom tables are rewritten, indexes rebuilt and databases made, until the time is over or the server
/// is gone.
fn storm(db: &str) -> anyhow::Result<()> {
    let seconds = STORM_SECONDS.to_string();
    let writers = [
        pgbench(db, &["-n", "-c", "2", "-T", &seconds])?,
        pgbench(db, &["-n", "-c", "2", "-T", &seconds, "-f", &sql("harder_loads/writers.pgbench")])?,
    ];
    let end = Instant::now() + Duration::from_secs(STORM_SECONDS.into());
    // What is refused or lost here is nobody's fault: the other side is changed at the same time, or killed.
    while Instant::now() < end && psql(db, "SELECT 1").is_ok() {
        limit::output(Command::new("psql").args([db, "-Xq", "-f", &sql("harder_loads/rewrites.sql")]), COMMAND_MAX, None)?;
    }
    for writer in writers {
        limit::wait_with_output(writer, "pgbench to end", COMMAND_MAX, None)?;
    }
    Ok(())
}

/// Lets the server be, and compares all that it has on disk with the page service, and its rows with those of the next
/// compute.
fn compare(dev: &Dev, branch: &str, compute: &Value) -> anyhow::Result<()> {
    let db = text(compute, "conninfo")?;
    let lsn = settle(&db)?;
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("data");
    program("cp", &["-a", &Private::of(compute)?.data_dir().display().to_string(), &copy.display().to_string()])?;
    let disk = DataDirectory::open(&copy)?;
    let expected = rows(&db)?;
    let (tenant, timeline) =
        (text(&dev.json(&["tenant", "show", "acme"])?, "id")?, text(&dev.json(&["branch", "show", branch])?, "timeline_id")?);
    let oids = psql(&db, "SELECT oid FROM pg_database")?;
    let databases: BTreeSet<u32> = oids.lines().filter_map(|oid| oid.parse().ok()).collect();
    let pages = PageService::new(dev.pages_port(), &tenant, &timeline, lsn);
    let compared = Comparison::new(&disk, &pages).lossy_maps_in(&databases).run().with_context(|| format!("{branch} at {lsn}"))?;
    ensure!(compared > 1000, "{compared} pages were compared, expected thousands");
    let copy_name = format!("{branch}_at_{}", lsn.0);
    dev.json(&["branch", "create", &copy_name, "--from", branch.trim_start_matches("acme/"), "--lsn", &lsn.to_string()])?;
    let copy = dev.compute(&copy_name, &[])?;
    ensure_same(&expected, &rows(&copy)?, Sequences::LoggedAhead).with_context(|| format!("a compute of {branch} at {lsn}"))?;
    amcheck(&copy)?;
    dev.json(&["compute", "stop", &copy_name])?;
    Ok(())
}

/// Kills the postmaster, and waits until the compute is there again.
fn kill(dev: &Dev, branch: &str, compute: &Value) -> anyhow::Result<Value> {
    let pid = compute["pid"].as_u64().context("a compute has a pid")?;
    ensure!(Command::new("kill").args(["-9", &pid.to_string()]).status()?.success(), "the postmaster is killed");
    dev.until("the compute to be back", BACK_MAX, || {
        let computes = dev.json(&["compute", "list"])?;
        let found = computes.as_array().context("a list")?.iter().find(|compute| compute["branch"] == branch);
        Ok(found.filter(|compute| compute["state"] == "running" && compute["pid"].as_u64() != Some(pid)).cloned())
    })
}

fn blocks_and_rows_are_the_same(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    // Little memory, so that layers are written, and blocks read again, all the time.
    let mut dev = Dev::start_for(VARVE, major, &["--memtable-mb", "16", "--cache-mb", "16"])?;
    let mut compute = start(&dev, major, &[("autovacuum", "off")])?;
    let mut db = text(&compute, "conninfo")?;
    program("pgbench", &["-iq", "--foreign-keys", &db])?;
    run_script(&db, major, "harder_loads/schema.sql")?;
    let mut branch = "acme/main".to_owned();
    for child in ["child", "grandchild"] {
        thread::scope(|scope| {
            let storm = scope.spawn(|| storm(&db));
            thread::sleep(KILLED_AFTER);
            compute = kill(&dev, &branch, &compute)?;
            storm.join().map_err(|_| anyhow::anyhow!("the storm panicked"))?
        })?;
        amcheck(&text(&compute, "conninfo")?).context("after the server was killed")?;
        compare(&dev, &branch, &compute).context("after the server was killed")?;
        let parent = branch.trim_start_matches("acme/").to_owned();
        branch = format!("acme/{child}");
        dev.json(&["branch", "create", &branch, "--from", &parent])?;
        compute = dev.json(&["compute", "start", &branch])?;
        db = text(&compute, "conninfo")?;
        thread::scope(|scope| {
            let storm = scope.spawn(|| storm(&db));
            thread::sleep(KILLED_AFTER);
            dev.kill()?;
            dev.run()?;
            storm.join().map_err(|_| anyhow::anyhow!("the storm panicked"))?
        })?;
        compare(&dev, &branch, &compute).context("after the pageserver was killed")?;
    }
    Ok(())
}

/// Memtables share a budget of a few megabytes, which none of them reaches alone: ingest must not wait until they are
/// old.
#[test]
fn ingest_keeps_up_with_little_memory() -> anyhow::Result<()> {
    let dev = Dev::start_for(VARVE, Major::V15, &["--memtable-mb", "4"])?;
    dev.json(&["tenant", "create", "acme"])?;
    dev.json(&["branch", "create", "acme/other"])?;
    for branch in ["acme/main", "acme/other"] {
        let db = dev.compute(branch, &[])?;
        program("pgbench", &["-iq", "-s", "3", &db])?;
    }
    let begun = Instant::now();
    for branch in ["main", "other"] {
        // Reads what was written last.
        let past = dev.json(&["branch", "create", &format!("acme/past_of_{branch}"), "--from", branch])?;
        let db = dev.compute(&text(&past, "name").map(|name| format!("acme/{name}"))?, &[])?;
        ensure!(psql(&db, "SELECT count(*) FROM pgbench_accounts")? == "300000", "a branch has all rows that {branch} has");
    }
    let elapsed = begun.elapsed();
    // About 90 MB: 20 times until everything is 10 s old, or a few seconds.
    ensure!(elapsed < Duration::from_secs(90), "ingest took {elapsed:?} for 90 MB of WAL");
    Ok(())
}

#[test]
fn on_15() -> anyhow::Result<()> {
    blocks_and_rows_are_the_same(Major::V15)
}

#[test]
fn on_18() -> anyhow::Result<()> {
    blocks_and_rows_are_the_same(Major::V18)
}
