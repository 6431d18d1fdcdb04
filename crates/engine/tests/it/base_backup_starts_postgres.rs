//! A stock Postgres starts on a base backup of any record boundary, and is then what stock Postgres itself recovers to
//! that place; what it writes afterwards goes on the timeline.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::oracle::{Comparison, Loaded, servers};
use anyhow::{Context, Result, ensure};
use varve_postgres::Major;
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_testbed::postgres::Postgres;

const SETTINGS: [(&str, &str); 9] = [
    ("wal_level", "logical"),
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'1GB'"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'32MB'"),
    ("autovacuum_naptime", "'1s'"),
    ("track_commit_timestamp", "on"),
    ("restart_after_crash", "off"),
    ("allow_in_place_tablespaces", "on"),
];

/// Moments of the load that are compared.
const MOMENTS: usize = 6;

fn pgbench(postgres: &Postgres, args: &[&str]) -> Command {
    let mut command = Command::new("/usr/lib/postgresql/15/bin/pgbench");
    command
        .args(args)
        .arg("-n")
        .arg("-h")
        .arg(postgres.dir())
        .args(["-U", "postgres", "bench"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn load(postgres: &Postgres) -> Result<()> {
    postgres.psql("postgres", "CREATE DATABASE bench")?;
    servers::run(&mut pgbench(postgres, &["-i", "-s", "1", "-q"]))?;
    let mut bench = pgbench(postgres, &["-c", "3", "-T", "6"]).spawn().context("starting pgbench")?;
    let mut mixed = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/sql/ingest/mixed.sql"))?;
    if postgres.major() < Major::V15 {
        mixed = mixed.replace(" STRATEGY file_copy", "").replace(" STRATEGY wal_log", "");
    }
    let file = postgres.dir().join("mixed.sql");
    fs::write(&file, mixed)?;
    postgres.psql_file("postgres", &file)?;
    ensure!(bench.wait()?.success(), "pgbench runs beside the mix");
    Ok(())
}

/// The loaded cluster, its history, and a copy of the cluster from before the load.
fn loaded(major: Major) -> Result<(Postgres, Loaded, tempfile::TempDir)> {
    let mut postgres = Postgres::init(major, &[], &SETTINGS)?;
    let mut loaded = crate::oracle::import(&postgres)?;
    let initial = tempfile::tempdir()?;
    servers::run(Command::new("cp").arg("-a").arg(postgres.data_dir()).arg(initial.path().join("data")))?;
    postgres.start()?;
    load(&postgres).with_context(|| format!("the server's log:\n{}", postgres.log()))?;
    postgres.stop("fast")?;
    crate::oracle::ingest(&postgres, &mut loaded)?;
    Ok((postgres, loaded, initial))
}

fn equals_a_recovered_server(major: Major) -> Result<()> {
    let (postgres, loaded, initial) = loaded(major)?;
    Comparison::new(&loaded).data_directory(&postgres.data_dir())?;
    let boundaries = &loaded.boundaries;
    let range = (loaded.imported.end.end, loaded.end());
    // What runs by itself would take transaction ids and change statistics.
    let still: Vec<_> = SETTINGS.into_iter().chain([("autovacuum", "off")]).collect();
    // Spread over the load, at places that differ from run to run with the load itself.
    for i in 0..MOMENTS {
        let lsn = boundaries[(i * 2 + 1) * (boundaries.len() - 2) / (MOMENTS * 2)];
        let timeline = servers::timeline(&*loaded.history, loaded.imported.system_identifier, 1, Vec::new(), lsn, range)?;
        let mut ours = servers::from_backup(&*loaded.history, &loaded, &timeline, &still)?;
        ours.start().with_context(|| format!("a backup at {lsn}"))?;
        let theirs = servers::recovered(major, &initial.path().join("data"), &postgres.data_dir().join("pg_wal"), lsn, &still)?;
        if let Some(difference) = servers::first_difference(&servers::dump(&ours)?, &servers::dump(&theirs)?) {
            anyhow::bail!("the dumps at {lsn} differ at {difference}");
        }
        let next_xid = |server: &Postgres| -> Result<u64> { Ok(server.psql("postgres", "SELECT pg_current_xact_id()")?.trim().parse()?) };
        let (our_xid, their_xid) = (next_xid(&ours)?, next_xid(&theirs)?);
        // Ours also knows of ids that were given out and had written nothing yet.
        ensure!((their_xid..their_xid + 50).contains(&our_xid), "next transaction at {lsn} is {our_xid}, recovery says {their_xid}");
        servers::check(&ours).with_context(|| format!("pg_amcheck of a backup at {lsn}"))?;
        ours.stop("fast")?;
    }
    Ok(())
}

fn goes_on(major: Major) -> Result<()> {
    let (_postgres, loaded, _initial) = loaded(major)?;
    let range = (loaded.imported.end.end, loaded.end());
    let lsn = loaded.boundaries[loaded.boundaries.len() * 2 / 3];
    let branch = Arc::new(loaded.history.branch(lsn)?);
    let ancestors = vec![AncestorTimeline { tli: 1, switch: lsn }];
    let timeline = servers::timeline(&*loaded.history, loaded.imported.system_identifier, 2, ancestors, lsn, range)?;
    let mut ours = servers::from_backup(&*branch, &loaded, &timeline, &SETTINGS)?;
    ours.start()?;
    let slot = ours.psql("postgres", "SELECT restart_lsn, active, wal_status FROM pg_replication_slots WHERE slot_name = 'varve'")?;
    ensure!(slot.trim() == format!("{lsn}|f|reserved"), "the slot that came along keeps WAL from {lsn} on; it is {slot}");
    ensure!(ours.psql("postgres", "SHOW work_mem")?.trim() == "7MB", "settings of ALTER SYSTEM come along");
    ours.psql("postgres", "CREATE TABLE on_the_branch AS SELECT i, md5(i::text) FROM generate_series(1, 3000) i; CHECKPOINT")?;
    servers::run(&mut pgbench(&ours, &["-c", "3", "-T", "3"]))?;
    // A crash, and recovery from the checkpoint that we made up or a later one.
    ours.stop("immediate")?;
    ours.start()?;
    ours.psql("bench", "VACUUM")?;
    ours.psql("bench", "CREATE INDEX ON pgbench_accounts (abalance)")?;
    servers::check(&ours)?;
    ours.stop("fast")?;
    let mut on_branch = Loaded { history: branch, boundaries: Vec::new(), ..loaded };
    crate::oracle::ingest(&ours, &mut on_branch)?;
    Comparison::new(&on_branch).data_directory(&ours.data_dir())?;
    if major == Major::V15 {
        // For Postgres's own tools what stands before the base is the rest of a record that began earlier.
        let wal_dump = Command::new("/usr/lib/postgresql/15/bin/pg_waldump")
            .args(["-t", "2", "-s", &lsn.segment_start().to_string(), "-p"])
            .arg(ours.data_dir().join("pg_wal"))
            .output()?;
        let (told, said) = (String::from_utf8_lossy(&wal_dump.stdout), String::from_utf8_lossy(&wal_dump.stderr));
        let first = told.lines().find(|line| line.starts_with("rmgr:")).unwrap_or_default();
        ensure!(first.contains("CHECKPOINT_SHUTDOWN"), "pg_waldump begins with our checkpoint; it printed {first}\n{said}");
        ensure!(said.contains("invalid record length"), "pg_waldump reads up to the end of WAL; it said {said}");
    }
    Ok(())
}

macro_rules! for_each_major {
    ($($name:ident: $check:ident;)*) => {
        $(mod $name {
            for_each_major!(@major $check postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18);
        })*
    };
    (@major $check:ident $($test:ident $major:ident)*) => {
        $(#[test]
        fn $test() {
            super::$check(varve_postgres::Major::$major).unwrap();
        })*
    };
}

for_each_major! {
    a_backup_equals_a_server_recovered_to_the_same_lsn: equals_a_recovered_server;
    what_a_server_writes_after_its_base_backup_goes_on_the_timeline: goes_on;
}
