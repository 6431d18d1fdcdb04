//! What an application and its operator do with a database, all at once: the SQL in `tests/sql`, with pgbench beside
//! it.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::Major;

use crate::dev::{Dev, program, psql};
use crate::limit::{self, COMMAND_MAX};

/// How long pgbench may take beyond what a command may: loads last for minutes.
const LOAD_MAX: Duration = COMMAND_MAX.saturating_mul(3);

/// Settings that the load needs, or that make it harder. Some take effect at a start only.
const SETTINGS: [(&str, &str); 4] = [
    ("max_prepared_transactions", "20"),
    ("track_commit_timestamp", "on"),
    ("autovacuum_naptime", "'1s'"),
    // All WAL of the load, for who wants to have it.
    ("wal_keep_size", "'2GB'"),
];

/// Path of a file of `tests/sql`.
pub fn sql(name: &str) -> String {
    format!("{}/../../tests/sql/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Makes the tenant `acme` of `major`, and gives the compute of its `main`, which was started once more so that
/// settings took effect.
///
/// # Errors
/// When something does not start.
pub fn start(dev: &Dev, major: Major, settings: &[(&str, &str)]) -> anyhow::Result<Value> {
    dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    let db = dev.compute("acme/main", &[])?;
    for (name, value) in SETTINGS.iter().chain(settings) {
        psql(&db, &format!("ALTER SYSTEM SET {name} = {value}"))?;
    }
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.json(&["compute", "start", "acme/main"])
}

/// Runs the load to its end: pgbench at `scale` for some seconds, row lockers, and the SQL beside them; `limits` are
/// arguments of both pgbenches.
///
/// # Errors
/// When a part of it fails.
pub fn load(db: &str, major: Major, scale: u32, seconds: u32, limits: &[&str]) -> anyhow::Result<()> {
    program("pgbench", &["-iq", "-s", &scale.to_string(), db])?;
    psql(db, "CREATE TABLE locked (id int PRIMARY KEY, a int DEFAULT 0); INSERT INTO locked SELECT generate_series(1, 20)")?;
    psql(db, "CREATE TABLE points_at (locked int REFERENCES locked)")?;
    let seconds = seconds.to_string();
    let lockers = sql("comparison/lockers.pgbench");
    let beside = [
        pgbench(db, &[&["-n", "-c", "2", "-T", &seconds], limits].concat())?,
        pgbench(db, &[&["-n", "-c", "5", "-T", &seconds, "-f", &lockers], limits].concat())?,
    ];
    for file in ["ingest/mixed.sql", "comparison/application.sql"] {
        run_script(db, major, file)?;
    }
    psql(db, "VACUUM (FREEZE) locked")?;
    for bench in beside {
        let output = limit::wait_with_output(bench, "pgbench to end", LOAD_MAX, None)?;
        ensure!(output.status.success(), "pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Runs a file of `tests/sql` with psql, in a form that `major` understands.
///
/// # Errors
/// At the first statement that fails.
pub fn run_script(db: &str, major: Major, name: &str) -> anyhow::Result<()> {
    let mut text = std::fs::read_to_string(sql(name)).with_context(|| format!("reading {name}"))?;
    if major < Major::V15 {
        text = text.replace(" STRATEGY file_copy", "").replace(" STRATEGY wal_log", "");
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    program("psql", &[db, "-Xq", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-f", &file.path().display().to_string()])
        .with_context(|| format!("running {name}"))?;
    Ok(())
}

/// pgbench in the background.
///
/// # Errors
/// When it cannot be run.
pub fn pgbench(db: &str, args: &[&str]) -> anyhow::Result<Child> {
    let mut command = Command::new("/usr/lib/postgresql/15/bin/pgbench");
    command.args(args).arg(db).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().context("pgbench cannot be run")
}
