//! Full disks, of a host and of a pageserver, and a pageserver that takes no WAL: who needs more has an error or waits,
//! nothing that was acknowledged is lost, and all goes on without anybody's help once there is room.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::acknowledged::Writers;
use varve_testbed::dev::{Dev, psql, signal};
use varve_testbed::session::Session;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const MB: u64 = 1 << 20;
/// How long anything may take to go on once there is room: the WAL receiver tries each second, flushes every 30 s.
const HEALED_MAX: Duration = Duration::from_secs(90);
/// How long a statement may take on a machine where everything runs at once.
const STATEMENT_MAX: Duration = Duration::from_secs(60);
/// Rows of a batch, which takes about 15 MB.
const BATCH_ROWS: usize = 41_000;

/// A small disk, for as long as this lives.
struct Disk(PathBuf);

impl Disk {
    fn at(path: &Path, megabytes: u64) -> anyhow::Result<Disk> {
        std::fs::create_dir_all(path)?;
        mount("none", path, "tmpfs", MountFlags::empty(), Some(&*std::ffi::CString::new(format!("size={megabytes}m,mode=700"))?))
            .context("a tmpfs")?;
        Ok(Disk(path.to_owned()))
    }

    /// Bytes that are used.
    fn used(&self) -> anyhow::Result<u64> {
        let disk = rustix::fs::statvfs(&self.0)?;
        Ok((disk.f_blocks - disk.f_bfree) * disk.f_frsize)
    }

    /// Somebody else takes all there is.
    fn fill(&self) -> anyhow::Result<()> {
        let mut file = File::options().create(true).append(true).open(self.0.join("foreign"))?;
        let zeros = vec![0; 64 * 1024];
        loop {
            if let Err(error) = file.write_all(&zeros) {
                ensure!(error.kind() == std::io::ErrorKind::StorageFull, "{error}");
                return Ok(());
            }
        }
    }

    /// And goes.
    fn free(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.0.join("foreign"))?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// The branch `acme/main`, whose compute has its files on a small disk.
struct OnASmallDisk {
    dev: Dev,
    disk: Disk,
    _folder: tempfile::TempDir,
}

impl OnASmallDisk {
    fn start(megabytes: u64) -> anyhow::Result<(OnASmallDisk, String)> {
        let folder = tempfile::Builder::new().prefix("varve-full-").tempdir()?;
        let disk = Disk::at(&folder.path().join("host"), megabytes)?;
        let dev = Dev::start_for(VARVE, Major::V15, &["--computes", disk.0.to_str().context("a path")?])?;
        dev.json(&["tenant", "create", "acme"])?;
        let db = dev.compute("acme/main", &[])?;
        psql(&db, "CREATE TABLE t (i int, b int, f text); CREATE TABLE s (i int); INSERT INTO s VALUES (0)")?;
        Ok((OnASmallDisk { dev, disk, _folder: folder }, db))
    }
}

fn listed(dev: &Dev) -> anyhow::Result<Value> {
    let computes = dev.json(&["compute", "list"])?;
    computes.as_array().and_then(|computes| computes.first()).cloned().context("a compute")
}

fn kinds(dev: &Dev) -> anyhow::Result<Vec<String>> {
    let events = dev.json(&["compute", "events", "acme/main"])?;
    let kind = |event: &Value| event["kind"].as_str().unwrap_or_default().to_owned();
    Ok(events.as_array().context("a list")?.iter().map(kind).collect())
}

fn insert(table: &str, batch: usize) -> String {
    format!("INSERT INTO {table} SELECT n, {batch}, repeat(md5(n::text), 10) FROM generate_series(1, {BATCH_ROWS}) n")
}

/// Does what may find the disk full. Whether it went well; an error of any other kind is one.
fn may_be_full(db: &str, sql: &str) -> anyhow::Result<bool> {
    match psql(db, sql) {
        Ok(_) => Ok(true),
        // Of its cache of catalogues Postgres says no more than that it cannot be written.
        Err(error) if ["No space left on device", "could not write init file"].iter().any(|words| error.to_string().contains(words)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn count(db: &str, table: &str) -> anyhow::Result<usize> {
    Ok(psql(db, &format!("SELECT count(*) FROM {table}"))?.parse()?)
}

#[test]
fn a_full_disk_of_a_host_refuses_growth_and_ends_nothing() -> anyhow::Result<()> {
    let (small, mut db) = OnASmallDisk::start(320)?;
    let (dev, disk) = (&small.dev, &small.disk);
    for round in 1..=2 {
        let pid = listed(dev)?["pid"].clone();
        let mut acknowledged = 0;
        for batch in 0..24 {
            acknowledged += usize::from(may_be_full(&db, &insert("t", batch))?);
        }
        ensure!((1..24).contains(&acknowledged), "the disk is full at some time: {acknowledged} batches fitted");
        println!("round {round}: {acknowledged} batches, {} MB", disk.used()? / MB);
        // The sort does not fit either, and what is read is not kept.
        may_be_full(&db, "SELECT count(*), max(f) FROM (SELECT * FROM t ORDER BY f, i) x")?;
        may_be_full(&db, &format!("CREATE UNLOGGED TABLE IF NOT EXISTS u (i int, b int, f text); {}", insert("u", 1)))?;
        may_be_full(&db, &format!("CREATE TEMP TABLE x (i int, b int, f text); {}", insert("x", 1)))?;
        ensure!(count(&db, "t")? == acknowledged * BATCH_ROWS, "reads go on");
        psql(&db, "UPDATE s SET i = i + 1; CHECKPOINT")?;
        ensure!(listed(dev)?["pid"] == pid, "Postgres is the same: {}", listed(dev)?);
        let told = kinds(dev)?;
        ensure!(["disk_nearly_full", "disk_full"].iter().all(|kind| told.iter().any(|told| told == kind)), "{told:?}");

        // It can be stopped, and what filled the disk was its cache.
        dev.json(&["compute", "stop", "acme/main"])?;
        ensure!(disk.used()? < 16 * MB, "{} MB are left behind", disk.used()? / MB);
        db = dev.compute("acme/main", &[])?;
        ensure!(count(&db, "t")? == acknowledged * BATCH_ROWS, "round {round}: all that was acknowledged is there");
        // What the count has fetched goes first.
        dev.until("room to empty the table", HEALED_MAX, || Ok(may_be_full(&db, "TRUNCATE t; DROP TABLE IF EXISTS u")?.then_some(())))?;
    }
    // What a tenant deletes makes room, without a restart.
    while may_be_full(&db, &insert("t", 1))? {}
    // To drop a table takes no room; to truncate one does, as it begins its files anew.
    dev.until("the table to be dropped", HEALED_MAX, || Ok(may_be_full(&db, "DROP TABLE IF EXISTS t")?.then_some(())))?;
    let again = format!("CREATE TABLE IF NOT EXISTS t (i int, b int, f text); {}", insert("t", 2));
    dev.until("room again", HEALED_MAX, || Ok(may_be_full(&db, &again)?.then_some(())))?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn a_disk_that_somebody_else_fills_keeps_no_compute_from_being_ended_or_healed() -> anyhow::Result<()> {
    let (small, db) = OnASmallDisk::start(320)?;
    let (dev, disk) = (&small.dev, &small.disk);
    psql(&db, &insert("t", 1))?;
    for round in 1..=2 {
        disk.fill()?;
        // Both processes die on a full disk.
        let compute = listed(dev)?;
        for pid in ["mount_pid", "pid"] {
            signal(compute[pid].as_u64().and_then(|pid| pid.try_into().ok()).context("a pid")?, Signal::KILL);
        }
        std::thread::sleep(Duration::from_secs(1));
        disk.fill()?;
        std::thread::sleep(Duration::from_secs(2));
        listed(dev)?;
        disk.free()?;
        dev.until("it to be back by itself, or to have said why not", HEALED_MAX, || {
            let now = listed(dev)?;
            if now["state"] == "failed" {
                ensure!(now["error"].as_str().is_some_and(|error| error.contains("is full")), "{now}");
                dev.json(&["compute", "start", "acme/main"])?;
            }
            Ok(count(&db, "t").ok())
        })?;
        ensure!(count(&db, "t")? == BATCH_ROWS, "round {round}");
        println!("round {round}: back");
    }
    // Stopped while nothing is free.
    disk.fill()?;
    let stopped = dev.cli(&["compute", "stop", "acme/main"])?;
    let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
    // Without a single byte Postgres may not come to its end well. It has ended, nevertheless, and somebody knows how.
    println!("stopped without a byte left: {} {said}", stopped.status);
    ensure!(stopped.status.success() || said.contains("is stopped, but it did not end cleanly"), "{said}");
    ensure!(dev.json(&["compute", "list"])?.as_array().is_some_and(|list| list.iter().all(|compute| compute["state"] != "running")));
    disk.fill()?;
    // What the last one left may be room enough. If not, the error names the disk.
    let started = dev.cli(&["compute", "start", "acme/main"])?;
    let said = String::from_utf8_lossy(&started.stderr).into_owned();
    println!("started on a full disk: {} {said}", started.status);
    ensure!(started.status.success() || said.contains("is full") && said.contains(disk.0.to_str().context("a path")?), "{said}");
    disk.free()?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(count(&db, "t")? == BATCH_ROWS);
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

/// The most that a folder took, looked at all the while.
struct Peak {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
}

impl Peak {
    fn of(folder: PathBuf) -> Peak {
        let peak = Peak { stop: Arc::default(), most: Arc::default() };
        let (stop, most) = (peak.stop.clone(), peak.most.clone());
        std::thread::spawn(move || {
            use std::os::unix::fs::MetadataExt as _;
            while !stop.load(Ordering::Relaxed) {
                let files = std::fs::read_dir(&folder).into_iter().flatten().flatten().filter_map(|file| file.metadata().ok());
                most.fetch_max(files.filter(std::fs::Metadata::is_file).map(|file| file.blocks() * 512).sum(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        peak
    }

    fn megabytes(&self) -> u64 {
        self.most.load(Ordering::Relaxed) / MB
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Commits that wait for nobody, as fast as they can, until one fails or it is enough.
fn write_much(db: &str, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<usize> {
    let (db, stop) = (db.to_owned(), stop.clone());
    std::thread::spawn(move || {
        let sql = format!("SET synchronous_commit = off; {}", insert("t", 1));
        let mut done = 0;
        while !stop.load(Ordering::Relaxed) && psql(&db, &sql).is_ok() {
            done += 1;
        }
        done
    })
}

const CAP_MB: u64 = 128;

#[test]
fn pg_wal_keeps_to_its_cap_while_nobody_takes_wal_and_goes_on_by_itself() -> anyhow::Result<()> {
    let mut dev = Dev::start_for(VARVE, Major::V15, &["--compute-wal-mb", &CAP_MB.to_string()])?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW max_wal_size")? == "32MB", "checkpoints come long before the cap");
    let id = listed(&dev)?["id"].as_str().context("an id")?.to_owned();
    let peak = Peak::of(dev.folder().join("data.computes").join(id).join("pg_wal"));
    psql(&db, "CREATE TABLE t (i int, b int, f text)")?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(10, STATEMENT_MAX)?;
    psql(&db, &insert("t", 0))?;
    let stop = Arc::new(AtomicBool::new(false));

    let server = dev.server_pid().context("a server")?;
    signal(server, Signal::STOP);
    let much: Vec<_> = (0..3).map(|_| write_much(&db, &stop)).collect();
    let begun = Instant::now();
    while peak.megabytes() < CAP_MB - 16 && begun.elapsed() < STATEMENT_MAX {
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_secs(10));
    let most = peak.megabytes();
    println!("pg_wal had {most} MB at most while the server was stopped");
    ensure!((CAP_MB - 16..=CAP_MB).contains(&most), "pg_wal has {most} MB with a cap of {CAP_MB} MB");

    // Another server takes its place: its WAL receiver has to get in.
    let before = writers.total();
    dev.kill()?;
    dev.run()?;
    writers.wait_for(20, HEALED_MAX)?;
    stop.store(true, Ordering::Relaxed);
    let done: usize = much.into_iter().map(|writer| writer.join().unwrap_or(0)).sum();
    let most = peak.megabytes();
    println!("pg_wal had {most} MB at most; {done} transactions nobody waited for, {before} commits before, {} after", writers.total());
    ensure!(most <= 2 * CAP_MB, "pg_wal had {most} MB with a cap of {CAP_MB} MB while a server took WAL");
    dev.until("what was written to be told", HEALED_MAX, || Ok(kinds(&dev)?.iter().any(|kind| kind == "wal_full").then_some(())))?;
    writers.stop().check(&db)?;
    ensure!(count(&db, "t")? == (1 + done) * BATCH_ROWS);
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(count(&db, "t")? == (1 + done) * BATCH_ROWS, "nothing of it is lost by a stop");
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

/// A server whose folder at `path` is a small disk from its second start on.
fn on_a_small_disk(path: impl FnOnce(&Dev) -> PathBuf, megabytes: u64) -> anyhow::Result<(Dev, Disk, String)> {
    let mut dev = Dev::start(VARVE)?;
    dev.stop()?;
    let disk = Disk::at(&path(&dev), megabytes)?;
    dev.run()?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t (i int, b int, f text)")?;
    Ok((dev, disk, db))
}

fn ready(dev: &Dev) -> anyhow::Result<(bool, String)> {
    let output = std::process::Command::new("curl").args(["-s", "-w", "%{http_code}", &format!("{}/readyz", dev.url())]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((said.ends_with("200"), said))
}

#[test]
fn a_pageserver_whose_disk_is_full_says_so_and_takes_wal_again_once_there_is_room() -> anyhow::Result<()> {
    let (mut dev, disk, db) = on_a_small_disk(Dev::data, 200)?;
    let folder = dev.data().display().to_string();
    let writers = Writers::start(&db, 3)?;
    writers.wait_for(20, STATEMENT_MAX)?;
    for round in 1..=2 {
        disk.fill()?;
        // Its segment has room yet; then nothing is taken any more.
        let mut session = Session::open(&db)?;
        session.begin(&format!("{}; {}; {}", insert("t", round), insert("t", round), insert("t", round)))?;
        let error = dev.until("the list to say why commits wait", HEALED_MAX, || {
            let compute = listed(&dev)?;
            ensure!(compute["state"] == "running", "{compute}");
            Ok(compute["error"].as_str().map(str::to_owned))
        })?;
        ensure!(error.contains(&folder) && error.contains("No space left"), "the error names the folder: {error}");
        let (is_ready, said) = ready(&dev)?;
        ensure!(!is_ready && said.contains(&folder), "{said}");
        let log = std::fs::read_to_string(dev.log())?;
        ensure!(log.lines().filter(|line| line.contains("could not be kept")).count() <= 4 * round, "the log is not flooded");
        println!("round {round}: {error}");
        std::thread::sleep(Duration::from_secs(3));
        let before = writers.total();
        disk.free()?;
        session.end(HEALED_MAX)?;
        writers.wait_for(20, HEALED_MAX)?;
        println!("round {round}: {before} commits, then {}", writers.total());
        ensure!(listed(&dev)?["error"].is_null() && ready(&dev)?.0, "all is well again");
    }
    // A server that cannot write ends all the same, and so does one that begins on such a disk: clearly, or well.
    disk.fill()?;
    let begun = Instant::now();
    dev.stop()?;
    ensure!(begun.elapsed() < Duration::from_secs(45), "it took {:?} to end", begun.elapsed());
    disk.free()?;
    dev.run()?;
    writers.wait_for(20, HEALED_MAX)?;
    writers.stop().check(&db)?;
    ensure!(count(&db, "t")? == 6 * BATCH_ROWS);
    ensure!(!std::fs::read_to_string(dev.log())?.contains("panicked"), "nobody panicked: {}", dev.log().display());
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn a_store_whose_disk_is_full_keeps_no_commit_waiting_and_no_server_from_ending() -> anyhow::Result<()> {
    let (mut dev, disk, db) = on_a_small_disk(|dev| PathBuf::from(dev.store()), 300)?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(20, STATEMENT_MAX)?;
    disk.fill()?;
    psql(&db, &insert("t", 1))?;
    writers.wait_for(20, HEALED_MAX)?;
    let log = dev.log();
    dev.until("a flush to fail", HEALED_MAX, || Ok(std::fs::read_to_string(&log)?.contains("a flush failed").then_some(())))?;
    writers.wait_for(20, HEALED_MAX)?;
    let begun = Instant::now();
    dev.stop()?;
    println!("a server with a full store ended within {:?}", begun.elapsed());
    ensure!(begun.elapsed() < Duration::from_secs(60), "it took {:?} to end", begun.elapsed());
    disk.free()?;
    dev.run()?;
    writers.wait_for(20, HEALED_MAX)?;
    disk.fill()?;
    writers.wait_for(20, HEALED_MAX)?;
    disk.free()?;
    writers.stop().check(&db)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(count(&db, "t")? == BATCH_ROWS);
    ensure!(!std::fs::read_to_string(&log)?.contains("panicked"), "nobody panicked: {}", log.display());
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}
