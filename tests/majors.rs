//! The main job on every major of Postgres besides 15, which all other tests use; and no major on a cluster of another.

use std::time::Duration;

use anyhow::ensure;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, amcheck, program, psql};
use varve_testbed::postgres::{bin_dir, is_skipped};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const NOW: &str = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";

/// Create, write, branch, restore in place, stop, start.
fn main_job(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let dev = Dev::start_for(VARVE, major, &[])?;
    let tenant = dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    ensure!(tenant["pg_version"] == major.number(), "the tenant is of major {major}, got {tenant}");
    let db = dev.compute("acme/main", &[])?;
    let number = psql(&db, "SELECT current_setting('server_version_num')::int / 10000")?;
    ensure!(number == major.to_string(), "the server is PostgreSQL {major}, got {number}");
    program("pgbench", &["-iq", &db])?;
    program("pgbench", &["-n", "-c", "2", "-t", "300", &db])?;
    psql(&db, "CREATE DATABASE more")?;
    psql(&db, "CREATE TABLESPACE space LOCATION ''")?;
    psql(&db, "CREATE TABLE there (i int PRIMARY KEY) TABLESPACE space; INSERT INTO there SELECT generate_series(1, 500)")?;
    let rows = "SELECT count(*), sum(abalance), (SELECT sum(i) FROM there) FROM pgbench_accounts";
    let expected = psql(&db, rows)?;
    std::thread::sleep(Duration::from_millis(20));
    let moment = psql(&db, NOW)?;
    std::thread::sleep(Duration::from_millis(20));
    psql(&db, "DROP TABLE pgbench_accounts")?;

    dev.json(&["branch", "create", "acme/before", "--at", &moment])?;
    let branch_db = dev.compute("acme/before", &[])?;
    ensure!(psql(&branch_db, rows)? == expected, "the branch holds {expected}");
    program("pgbench", &["-n", "-c", "2", "-t", "100", &branch_db])?;
    amcheck(&branch_db)?;

    dev.json(&["branch", "restore", "acme/main", "--at", &moment])?;
    ensure!(psql(&db, rows)? == expected, "after the restore, on the same port, main holds {expected}");
    psql(&db, "INSERT INTO there VALUES (1000)")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SELECT count(*) FROM there")? == "501", "what was written after the restore is there after the next start");
    amcheck(&db)
}

#[test]
fn main_job_on_14() -> anyhow::Result<()> {
    main_job(Major::V14)
}

#[test]
fn main_job_on_16() -> anyhow::Result<()> {
    main_job(Major::V16)
}

#[test]
fn main_job_on_17() -> anyhow::Result<()> {
    main_job(Major::V17)
}

#[test]
fn main_job_on_18() -> anyhow::Result<()> {
    main_job(Major::V18)
}

#[test]
fn a_compute_of_another_major_is_refused() -> anyhow::Result<()> {
    let (major, other) = (Major::V15, Major::V16);
    if is_skipped(other) {
        return Ok(());
    }
    let mut dev = Dev::start_for(VARVE, major, &[])?;
    dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.stop()?;

    dev.set_pg_bin_dir(major, &bin_dir(other)?);
    dev.run()?;
    let refused = dev.refused(&["compute", "start", "acme/main"])?;
    let names = [format!("PostgreSQL {major}"), format!("PostgreSQL {other}"), "--pg-bin-dir".to_owned()];
    ensure!(names.iter().all(|name| refused.contains(name)), "the refusal names {names:?}, got {refused}");
    // A template is there already: a tenant needs no host.
    dev.json(&["tenant", "create", "more", "--pg-version", &major.to_string()])?;
    dev.stop()?;

    dev.set_pg_bin_dir(major, &bin_dir(major)?);
    dev.run()?;
    ensure!(psql(&dev.compute("acme/main", &[])?, "SELECT i FROM t")? == "1", "the refused start changed nothing");
    Ok(())
}
