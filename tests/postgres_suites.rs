//! Postgres's own suites on a compute, with `wal_consistency_checking = all`: they pass as on plain Postgres, ingest
//! keeps up, redo makes every page that Postgres made, the page service has every page that the compute has, and the
//! next compute dumps what this one did.
//!
//! They take minutes and gigabytes, so they are run on demand: `scripts/regress [--pg-version 15|18] [SUITE...]`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::{Lsn, Major};
use varve_protocol::ConnectConfig;
use varve_redo::verify::{Difference, PageDiff, Verifier};
use varve_testbed::beside::Private;
use varve_testbed::comparison::{Comparison, DataDirectory, PageService};
use varve_testbed::dev::{Dev, program, psql, settle};
use varve_testbed::dump::{Sequences, dump, ensure_same};
use varve_testbed::suites::{Suite, Suites, Target};
use varve_verify::wal::{self, Extent, WalReport};
use varve_verify::{OverflowFile, WalStream};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// Pages that redo keeps in memory; others go to a file.
const PAGES_MAX: usize = 64 * 1024;
/// How long redo may need until it has caught up with a server that has come to rest.
const CATCH_UP_MAX: Duration = Duration::from_secs(300);
/// What is set for the suites, and why.
const SETTINGS: [(&str, &str); 6] = [
    ("wal_consistency_checking", "'all'"),
    // Who follows the WAL has no slot.
    ("wal_keep_size", "'1GB'"),
    // Postgres's own runs have it, too.
    ("max_prepared_transactions", "20"),
    // A default of computes that is not Postgres's: the test `tablespace` expects an error without it.
    ("allow_in_place_tablespaces", "off"),
    // More of what happens behind the suites' backs.
    ("autovacuum_naptime", "5"),
    ("wal_compression", "lz4"),
];

#[test]
#[ignore = "minutes and gigabytes: scripts/regress"]
fn postgres_15() -> anyhow::Result<()> {
    run(Major::V15)
}

#[test]
#[ignore = "minutes and gigabytes: scripts/regress --pg-version 18"]
fn postgres_18() -> anyhow::Result<()> {
    run(Major::V18)
}

/// A compute, and the files of its branch from before it started.
struct Prepared {
    private: Private,
    conninfo: String,
    target: Target,
    base: varve_verify::DataDirectory,
}

fn prepare(dev: &Dev, major: Major) -> anyhow::Result<Prepared> {
    dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    let conninfo = compute["conninfo"].as_str().context("a compute has a conninfo")?;
    for (name, value) in SETTINGS {
        psql(conninfo, &format!("ALTER SYSTEM SET {name} = {value}"))?;
    }
    // The suites connect as roles that they make, without passwords.
    let hba = Private::of(&compute)?.data_dir().join("pg_hba.conf");
    let lines = std::fs::read_to_string(&hba)?;
    std::fs::write(&hba, format!("local all all trust\n{lines}"))?;
    dev.json(&["compute", "stop", "acme/main"])?;

    let base = dev.folder().join("base");
    dev.json(&["materialize", "acme/main", base.to_str().context("a path of UTF-8")?])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    let private = Private::of(&compute)?;
    let port = compute["port"].as_u64().and_then(|port| u16::try_from(port).ok()).context("a compute has a port")?;
    let target = Target { host: private.socket_dir().display().to_string(), port };
    let conninfo = format!("host={} port={port} user=postgres", target.host);
    for (name, value) in SETTINGS {
        let shown = psql(&format!("{conninfo} dbname=postgres"), &format!("SHOW {name}"))?;
        ensure!(shown.trim_end_matches('s') == value.trim_matches('\''), "{name} is {shown} on the next compute, it was set to {value}");
    }
    Ok(Prepared { conninfo, target, private, base: varve_verify::DataDirectory::open(&base)? })
}

fn run(major: Major) -> anyhow::Result<()> {
    let suites = Suites::of(major)?;
    let chosen = std::env::var("VARVE_TEST_SUITES").unwrap_or_default();
    let chosen = if chosen.is_empty() { Suite::all() } else { Suite::named(chosen.split_whitespace())? };
    // The suites read and write files of this machine, which a sandbox does not show.
    let dev = Dev::start_with(VARVE, major, suites.bin_dir(), &["--sandbox", "none"])?;
    let Prepared { private, conninfo, target, base } = prepare(&dev, major)?;
    let db = format!("{conninfo} dbname=postgres");
    let follower = Follower::start(&private.conninfo(), base)?;

    let mut failures = Vec::new();
    let folder = tempfile::Builder::new().prefix("varve-suites-").permissions(everyone()).tempdir()?;
    for &suite in &chosen {
        let started = Instant::now();
        let outcome = suites.run(suite, &target, &folder.path().join(suite.to_string()))?;
        println!("{suite} ({:.0?}): {outcome}", started.elapsed());
        if !outcome.passed {
            failures.push(format!("the suite {suite} does not pass"));
        }
    }
    if major >= Major::V16 && chosen.contains(&Suite::Extension("bloom")) {
        // Since 16 Postgres does not log the init fork of an unlogged bloom index, so no standby has it and we have
        // not.
        psql(&format!("{conninfo} dbname={}", Suite::Extension("bloom").database()), "DROP INDEX bloomidxu")?;
    }
    let lsn = settle(&db)?;

    let started = Instant::now();
    let report = follower.finish(lsn)?;
    println!("{}", told(&report));
    println!("redo had caught up {:.1?} after the suites", started.elapsed());
    if !report.matched {
        failures.push(format!("redo of the WAL: {} mismatches, {}", report.mismatches, report.failure.unwrap_or_default()));
    }

    let started = Instant::now();
    match compare_pages(&dev, &private, &db, lsn) {
        Ok(pages) => println!("{pages} pages of the compute are as the page service has them (compared in {:.1?})", started.elapsed()),
        Err(error) => failures.push(format!("{error:#}")),
    }

    let expected = dump(suites.bin_dir(), &db)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    let next = format!("host={} port={} user=postgres dbname=postgres", Private::of(&compute)?.socket_dir().display(), compute["port"]);
    match ensure_same(&expected, &dump(suites.bin_dir(), &next)?, Sequences::LoggedAhead) {
        Ok(()) => println!("the next compute dumps the same {} bytes", expected.len()),
        Err(error) => failures.push(format!("the next compute beside this one: {error:#}")),
    }
    failures.extend(errors_logged(&dev)?);
    ensure!(failures.is_empty(), "PostgreSQL {major}:\n{}", failures.join("\n"));
    println!("PostgreSQL {major}: all is as on plain Postgres");
    Ok(())
}

fn everyone() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::Permissions::from_mode(0o755)
}

/// Every page that the compute has on disk, beside the page service's.
fn compare_pages(dev: &Dev, private: &Private, db: &str, lsn: Lsn) -> anyhow::Result<u64> {
    let copied = dev.folder().join("compute");
    program("cp", &["-a", &private.data_dir().display().to_string(), &copied.display().to_string()])?;
    let disk = DataDirectory::open(&copied)?;
    let id = |value: Value, key: &str| Ok::<_, anyhow::Error>(value[key].as_str().context("an id")?.to_owned());
    let tenant = id(dev.json(&["tenant", "show", "acme"])?, "id")?;
    let timeline = id(dev.json(&["branch", "show", "acme/main"])?, "timeline_id")?;
    let pages = PageService::new(dev.pages_port(), &tenant, &timeline, lsn);
    // The suites' databases are copied block by block.
    let made = psql(db, "SELECT oid FROM pg_database WHERE oid >= 16384")?;
    let lossy: BTreeSet<u32> = made.lines().filter_map(|oid| oid.parse().ok()).collect();
    Comparison::new(&disk, &pages).lossy_maps_in(&lossy).run()
}

/// Lines of the server's log that tell of errors.
fn errors_logged(dev: &Dev) -> anyhow::Result<Vec<String>> {
    let log = std::fs::read_to_string(dev.log())?;
    Ok(log.lines().filter(|line| line.contains("ERROR")).map(|line| format!("the server logged: {line}")).collect())
}

/// Redo of a compute's WAL, beside its work.
struct Follower {
    stop: Arc<AtomicBool>,
    at: Arc<AtomicU64>,
    thread: JoinHandle<WalReport>,
}

impl Follower {
    /// Follows the WAL of the server at `db` from the pages in `base` on.
    fn start(db: &str, base: varve_verify::DataDirectory) -> anyhow::Result<Follower> {
        let from = base.checkpoint();
        let mut stream = WalStream::connect(&ConnectConfig::from_conninfo(db)?, Some(from))?;
        let overflow = Box::new(OverflowFile::create(&std::env::temp_dir())?);
        let verifier = Verifier::new(base.major()).with_base(Box::new(base)).with_limit(PAGES_MAX, overflow);
        let (stop, at) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (stop, at) = (stop.clone(), at.clone());
            move || {
                let extent = Extent { from, until: Lsn::MAX, stop: &stop };
                wal::verify(&mut stream, verifier, extent, &mut |lsn| at.store(lsn.0, Ordering::Relaxed))
            }
        });
        Ok(Follower { stop, at, thread })
    }

    /// Waits until everything up to `lsn` is redone.
    fn finish(self, lsn: Lsn) -> anyhow::Result<WalReport> {
        let deadline = Instant::now() + CATCH_UP_MAX;
        while self.at.load(Ordering::Relaxed) < lsn.0 && Instant::now() < deadline && !self.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(50));
        }
        self.stop.store(true, Ordering::Relaxed);
        let mut report = self.thread.join().map_err(|_| anyhow::anyhow!("redo panicked"))?;
        let to: Lsn = report.to.parse().context("an LSN")?;
        if to < lsn && report.failure.is_none() {
            report.failure = Some(format!("redo came only to {to}, the server to {lsn}"));
            report.matched = false;
        }
        Ok(report)
    }
}

/// A report in words.
fn told(report: &WalReport) -> String {
    let mut text = String::new();
    for found in &report.first_mismatches {
        text += &format!("mismatch: {found:?}\n");
    }
    if let Some(mismatch) = &report.first_difference
        && let Difference::Bytes { at, ours, truth, .. } = &mismatch.difference
    {
        text += &format!("{mismatch}\n{}\n", PageDiff { at, ours, truth });
    }
    text + &format!(
        "{} to {}: {} records of {} types, {} bytes, {} pages compared, {} taken for true, {} mismatches",
        report.from,
        report.to,
        report.records,
        report.types.len(),
        report.bytes,
        report.compared,
        report.adopted,
        report.mismatches
    )
}
