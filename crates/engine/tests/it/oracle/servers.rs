//! Servers at a moment of a history: one that starts on our base backup, and one that stock Postgres recovered to the
//! same place.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use varve_engine::base_backup::{BackupTimeline, ExtraFile, Options, write_base_backup};
use varve_engine::moments::round_down;
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_postgres::{Lsn, Major};
use varve_storage::history::History;
use varve_testbed::postgres::Postgres;

use super::Loaded;

/// How long stock Postgres may take to recover.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// The timeline of a base backup at `lsn` of the history that begins at `from` and goes to `to`.
pub fn timeline(
    history: &impl History,
    system_identifier: u64,
    tli: u32,
    ancestors: Vec<AncestorTimeline>,
    lsn: Lsn,
    (from, to): (Lsn, Lsn),
) -> Result<BackupTimeline> {
    let base = round_down(history, lsn, from, to)?;
    ensure!(base.end == lsn, "{lsn} is a record boundary");
    Ok(BackupTimeline { system_identifier, tli, ancestors, base, mock_authentication_nonce: [7; 32] })
}

/// Everything, with a slot, and with a setting that `ALTER SYSTEM` made.
pub fn whole_directory() -> Options {
    let auto_conf = ExtraFile { path: "postgresql.auto.conf".to_owned(), bytes: b"work_mem = '7MB'\n".to_vec() };
    let slot = Some("varve".to_owned());
    Options {
        slru: true,
        relations: true,
        time_unix: 1_700_000_000,
        slot,
        wal_before: None,
        extra_files: vec![auto_conf],
        short_wal: false,
        gzip: false,
    }
}

/// A stopped server whose data directory is a full backup of `history` at the timeline's base.
pub fn from_backup(history: &impl History, loaded: &Loaded, timeline: &BackupTimeline, settings: &[(&str, &str)]) -> Result<Postgres> {
    let options = whole_directory();
    let mut tar = Vec::new();
    write_base_backup(history, &loaded.imported.cluster, timeline, &options, &mut tar)?;
    let postgres = Postgres::bare(history.major())?;
    fs::create_dir(postgres.data_dir())?;
    tar::Archive::new(&tar[..]).unpack(postgres.data_dir())?;
    fs::write(postgres.data_dir().join("pg_hba.conf"), "local all all trust\nlocal replication all trust\n")?;
    postgres.configure(settings)?;
    postgres.own()?;
    Ok(postgres)
}

/// A running server that stock Postgres recovered from the cluster in `initial` and the WAL in `wal_dir` up to `lsn`.
pub fn recovered(major: Major, initial: &Path, wal_dir: &Path, lsn: Lsn, settings: &[(&str, &str)]) -> Result<Postgres> {
    let mut postgres = Postgres::bare(major)?;
    run(Command::new("cp").arg("-a").arg(initial).arg(postgres.data_dir()))?;
    let restore = format!("'cp \"{}/%f\" \"%p\"'", wal_dir.display());
    let target = format!("'{lsn}'");
    let mut all = settings.to_vec();
    all.extend([
        ("restore_command", &restore[..]),
        ("recovery_target_lsn", &target),
        ("recovery_target_inclusive", "off"),
        ("recovery_target_action", "'promote'"),
        ("hot_standby", "off"),
    ]);
    postgres.configure(&all)?;
    fs::write(postgres.data_dir().join("recovery.signal"), "")?;
    postgres.own()?;
    postgres.start()?;
    let deadline = Instant::now() + RECOVERY_TIMEOUT;
    // It takes no connections before it was promoted.
    while let Err(error) = postgres.psql("postgres", "SELECT 1") {
        if Instant::now() > deadline {
            return Err(error).with_context(|| format!("recovery to {lsn} does not end; the log:\n{}", postgres.log()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(postgres)
}

/// Everything in the cluster, as text: for each table, catalog and sequence of each database its rows' count and
/// digest; and, where there is a `pg_dumpall` for it, the dump.
pub fn dump(postgres: &Postgres) -> Result<String> {
    const TABLES: &str = "SELECT format('SELECT current_database(), %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM (SELECT * FROM %s) t', \
                          oid::regclass, oid::regclass) FROM pg_class WHERE relkind IN ('r', 'm', 'S') AND relpersistence <> 't' ORDER BY oid \\gexec\n";
    let mut all = String::new();
    for database in postgres.psql("postgres", "SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1")?.lines() {
        let file = postgres.dir().join("tables.sql");
        fs::write(&file, TABLES)?;
        all += &postgres.psql_file(database, &file)?;
    }
    if postgres.major() <= Major::V15 {
        let text = run(Command::new("/usr/lib/postgresql/15/bin/pg_dumpall").arg("-d").arg(postgres.conninfo("postgres")))?;
        // Each dump has a random key in these lines.
        for line in text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict")) {
            all += line;
            all.push('\n');
        }
    }
    Ok(all)
}

/// `pg_amcheck` of every database.
pub fn check(postgres: &Postgres) -> Result<()> {
    let mut check = Command::new("/usr/lib/postgresql/15/bin/pg_amcheck");
    // Checks that lock out writers would wait for prepared transactions.
    check.args(["--all", "--install-missing", "--heapallindexed"]);
    check.args(["-h"]).arg(postgres.dir()).args(["-U", "postgres"]);
    run(&mut check).map(|_| ())
}

/// Where two texts differ first, with some lines around.
pub fn first_difference(ours: &str, theirs: &str) -> Option<String> {
    if ours == theirs {
        return None;
    }
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.lines().collect(), theirs.lines().collect());
    let at = ours.iter().zip(&theirs).position(|(a, b)| a != b).unwrap_or(ours.len().min(theirs.len()));
    let around = |lines: &[&str]| lines[at.saturating_sub(3)..(at + 3).min(lines.len())].join("\n");
    Some(format!("line {at}: ours\n{}\nexpected\n{}", around(&ours), around(&theirs)))
}

/// Runs `command` to its end, gives its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{command:?} failed ({}):\n{out}{err}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
