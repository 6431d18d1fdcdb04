//! Tablespaces keep the names that their user gave them, in every catalogue and dump, wherever their data lies.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use varve_testbed::dev::{Dev, amcheck, free_port, psql, signal};
use varve_testbed::limit::{self, COMMAND_MAX};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const BIN: &str = "/usr/lib/postgresql/15/bin";
const BACK_MAX: Duration = Duration::from_secs(60);
const LOCATIONS: &str = "SELECT string_agg(spcname || ' ' || pg_tablespace_location(oid), ', ' ORDER BY spcname) FROM pg_tablespace";
const ROWS: &str = "SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b), (SELECT count(*) FROM c), (SELECT count(*) FROM u)";

/// What a dump of roles and tablespaces says.
fn globals(db: &str) -> anyhow::Result<String> {
    let output = limit::output(Command::new(format!("{BIN}/pg_dumpall")).args(["-g", "-d", db]), COMMAND_MAX, None)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Each dump has a key of its own; and what was made again comes later.
    let mut kept: Vec<&str> = text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict")).collect();
    kept.sort_unstable();
    Ok(kept.join("\n"))
}

fn make_folder(db: &str, path: &str) -> anyhow::Result<()> {
    psql(db, &format!("COPY (SELECT 1) TO PROGRAM 'mkdir -p {path}; cat > /dev/null'")).map(drop)
}

struct Seen {
    locations: String,
    globals: String,
}

impl Seen {
    fn of(db: &str) -> anyhow::Result<Seen> {
        Ok(Seen { locations: psql(db, LOCATIONS)?, globals: globals(db)? })
    }

    fn is_shown(&self, db: &str, when: &str) -> anyhow::Result<()> {
        let now = Seen::of(db)?;
        ensure!(now.locations == self.locations, "{when}: {} was {}", now.locations, self.locations);
        ensure!(now.globals == self.globals, "{when}:\n{}\nwas:\n{}", now.globals, self.globals);
        amcheck(db)
    }
}

#[test]
fn tablespaces_keep_their_names_and_can_be_made_again_where_they_were() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let port = free_port()?.to_string();
    let start = || dev.compute("acme/main", &["--port", &port]);
    let db = start()?;
    for folder in ["/tmp/deep/side", "/dev/shm/fast", "/tablespaces/large"] {
        make_folder(&db, folder)?;
    }
    psql(&db, "CREATE TABLESPACE side LOCATION '/tmp/deep/side'")?;
    psql(&db, "CREATE TABLESPACE fast LOCATION '/dev/shm/fast'")?;
    psql(&db, "CREATE TABLESPACE large LOCATION '/tablespaces/large'")?;
    psql(&db, "CREATE TABLESPACE inside LOCATION ''")?;
    psql(&db, "CREATE TABLE a TABLESPACE side AS SELECT n FROM generate_series(1, 1000) n; CREATE INDEX ON a (n) TABLESPACE fast")?;
    psql(&db, "CREATE TABLE c TABLESPACE inside AS SELECT n FROM generate_series(1, 3000) n")?;
    psql(&db, "CREATE UNLOGGED TABLE u TABLESPACE large AS SELECT n FROM generate_series(1, 4) n")?;
    // More than memory has room for.
    psql(&db, "CREATE TABLE b TABLESPACE large AS SELECT n, repeat('x', 2000) FROM generate_series(1, 50000) n")?;
    let seen = Seen::of(&db)?;
    ensure!(
        seen.globals.contains("LOCATION '/tmp/deep/side'") && seen.globals.contains("LOCATION '/tablespaces/large'"),
        "{}",
        seen.globals
    );

    dev.json(&["compute", "stop", "acme/main"])?;
    start()?;
    seen.is_shown(&db, "after a stop")?;
    let rows = psql(&db, ROWS)?;
    ensure!(rows == "1000|50000|3000|4", "{rows}");
    psql(&db, "INSERT INTO u VALUES (5)")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    start()?;
    ensure!(psql(&db, ROWS)? == "1000|50000|3000|5", "unlogged relations of tablespaces, too");

    let pid = |list: &serde_json::Value| list[0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let old = pid(&dev.json(&["compute", "list"])?).context("a compute that runs")?;
    signal(old, Signal::KILL);
    dev.until("the compute to be back", BACK_MAX, || {
        let again = pid(&dev.json(&["compute", "list"])?).is_some_and(|pid| pid != old);
        Ok((again && psql(&db, "SELECT 1").is_ok()).then_some(()))
    })?;
    seen.is_shown(&db, "after a kill")?;

    // A backup has them once, and under their names.
    let backup = dev.folder().join("backup");
    let target = backup.to_str().context("a plain path")?;
    let arguments = ["-d", &db, "-D", target, "-F", "t", "-c", "fast", "--no-sync", "-X", "none"];
    let output = limit::output(Command::new(format!("{BIN}/pg_basebackup")).args(arguments), COMMAND_MAX, None)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let archives = std::fs::read_dir(&backup)?.filter_map(Result::ok).filter(|entry| entry.file_name().to_string_lossy().ends_with(".tar"));
    ensure!(archives.count() == 4, "three tablespaces and the rest");
    let listed = limit::output(Command::new("tar").arg("-tf").arg(backup.join("base.tar")), COMMAND_MAX, None)?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    ensure!(listed.contains("tablespace_map") && !listed.contains("varve_"), "{listed}");

    let marked = psql(&db, "SELECT pg_current_wal_insert_lsn()")?;
    dev.json(&["branch", "create", "acme/copy", "--from", "main"])?;
    let copy = dev.compute("acme/copy", &[])?;
    seen.is_shown(&copy, "on a branch")?;
    dev.json(&["compute", "stop", "acme/copy"])?;

    // Made again at the same place: at once, and after a start.
    psql(&db, "DROP TABLE a, b, c, u")?;
    for (name, place) in [("side", "/tmp/deep/side"), ("large", "/tablespaces/large")] {
        psql(&db, &format!("DROP TABLESPACE {name}"))?;
        psql(&db, &format!("CREATE TABLESPACE {name} LOCATION '{place}'"))?;
        psql(&db, &format!("CREATE TABLE again_{name} TABLESPACE {name} AS SELECT 1"))?;
    }
    dev.json(&["compute", "stop", "acme/main"])?;
    start()?;
    seen.is_shown(&db, "made again")?;
    for (name, place) in [("side", "/tmp/deep/side"), ("large", "/tablespaces/large")] {
        ensure!(psql(&db, &format!("SELECT count(*) FROM again_{name}"))? == "1");
        psql(&db, &format!("DROP TABLE again_{name}"))?;
        psql(&db, &format!("DROP TABLESPACE {name}"))?;
        dev.json(&["compute", "stop", "acme/main"])?;
        start()?;
        // Nothing of it is left there, so a folder is made first, as for any tablespace.
        make_folder(&db, place)?;
        psql(&db, &format!("CREATE TABLESPACE {name} LOCATION '{place}'"))?;
        psql(&db, &format!("CREATE TABLE third_{name} TABLESPACE {name} AS SELECT 1"))?;
    }
    seen.is_shown(&db, "a third time")?;

    dev.json(&["branch", "restore", "acme/main", "--lsn", &marked])?;
    dev.until("the restored compute to answer", BACK_MAX, || {
        Ok((psql(&db, "SELECT count(*) FROM b").is_ok_and(|rows| rows == "50000")).then_some(()))
    })?;
    seen.is_shown(&db, "after a restore")
}
