//! What Postgres has written can go from a compute's cache once the page service has it, and nobody notices: neither
//! the statement that is in the middle of it, nor the transaction that goes on, nor a load that writes its database
//! through, however small the cache.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::{Advice, fadvise};
use rustix::process::Signal;
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::application::{load, start};
use varve_testbed::beside::{Private, wait_replayed};
use varve_testbed::comparison::{Comparison, DataDirectory, PageService};
use varve_testbed::dev::{Dev, amcheck, program, psql, settle, signal};
use varve_testbed::dump::{Sequences, ensure_same, everything};
use varve_testbed::postgres::is_skipped;
use varve_testbed::session::Session;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const MAIN: &str = "acme/main";
/// How long the base of a mount may take to move on twice, on a machine where everything runs at once.
const MOVED_MAX: Duration = Duration::from_secs(180);
/// How long a statement may take.
const STATEMENT_MAX: Duration = Duration::from_secs(60);
/// How long a compute may take to be back.
const BACK_MAX: Duration = Duration::from_secs(60);

/// A compute with a cache that is too small.
struct Tight {
    dev: Dev,
    db: String,
    private: Private,
}

impl Tight {
    fn new(major: Major, cache_mb: &str, settings: &[&str]) -> anyhow::Result<Tight> {
        let dev = Dev::start_for(VARVE, major, &["--compute-cache-mb", cache_mb])?;
        dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        let compute = dev.json(&[&["compute", "start", MAIN], &settings[..]].concat())?;
        let db = compute["conninfo"].as_str().context("a compute has a conninfo")?.to_owned();
        let private = Private::of(&compute)?;
        Ok(Tight { dev, db, private })
    }

    fn compute(&self) -> anyhow::Result<Value> {
        Ok(self.dev.json(&["compute", "list"])?[0].clone())
    }

    fn figure(&self, name: &str) -> anyhow::Result<u64> {
        Ok(self.compute()?["cache"][name].as_u64().unwrap_or(0))
    }

    /// Lets Postgres have nothing of these relations in its buffers, and the kernel nothing of their files.
    fn forget(&self, relations: &[&str]) -> anyhow::Result<()> {
        psql(&self.db, "SELECT pg_prewarm('filler')")?;
        for relation in relations {
            let path = psql(&self.db, &format!("SELECT pg_relation_filepath('{relation}')"))?;
            let file = File::open(self.private.data_dir().join(path))?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        Ok(())
    }

    /// Writes until the base has moved on twice, and all that may be dropped is dropped.
    fn move_on(&self, relations: &[&str]) -> anyhow::Result<()> {
        self.forget(relations)?;
        let until = self.figure("rebases")? + 2;
        self.dev.until("the base to move on twice", MOVED_MAX, || {
            psql(&self.db, "UPDATE filler SET n = n + 1")?;
            psql(&self.db, "VACUUM filler")?;
            Ok((self.figure("rebases")? >= until).then_some(()))
        })?;
        self.forget(relations)?;
        // What is read goes through the cache, so that what was handed over is dropped.
        psql(&self.db, "SELECT sum(n) FROM wide")?;
        self.forget(relations)
    }

    /// Compares every page that Postgres has on disk with the page service's. Nobody writes.
    fn compare_pages(&self) -> anyhow::Result<()> {
        let lossy = psql(&self.db, "SELECT oid FROM pg_database WHERE datname IN ('logged', 'collated')")?;
        let lossy: BTreeSet<u32> = lossy.lines().filter_map(|oid| oid.parse().ok()).collect();
        let lsn = settle(&self.db)?;
        let (disk, folder) = (self.private.data_dir(), tempfile::tempdir()?);
        let copy = folder.path().join("compute");
        program("cp", &["-a", &disk.display().to_string(), &copy.display().to_string()])?;
        let disk = DataDirectory::open(&copy)?;
        let text = |value: &Value, key: &str| value[key].as_str().map(str::to_owned).with_context(|| format!("{value} has a {key}"));
        let tenant = text(&self.dev.json(&["tenant", "show", "acme"])?, "id")?;
        let timeline = text(&self.dev.json(&["branch", "show", MAIN])?, "timeline_id")?;
        let pages = PageService::new(self.dev.pages_port(), &tenant, &timeline, lsn);
        let compared = Comparison::new(&disk, &pages).lossy_maps_in(&lossy).run()?;
        println!("{compared} pages of the compute are as the page service has them");
        Ok(())
    }
}

/// Postgres waits in the middle of a row: as often as it comes to it, or the second time only.
const GATES: &str = "
    CREATE FUNCTION gate(n int, at int, key int) RETURNS bool LANGUAGE plpgsql AS $$
    BEGIN
        IF n = at THEN PERFORM pg_advisory_lock_shared(key); PERFORM pg_advisory_unlock_shared(key); END IF;
        RETURN true;
    END $$;
    CREATE FUNCTION gated(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN
        IF n = 7777 AND current_setting('my.gate', true) IS NOT NULL THEN
            PERFORM set_config('my.gate', (current_setting('my.gate')::int + 1)::text, false);
            IF current_setting('my.gate') = '2' THEN
                PERFORM pg_advisory_lock_shared(3);
                PERFORM pg_advisory_unlock_shared(3);
            END IF;
        END IF;
        RETURN n;
    END $$;
    CREATE FUNCTION gated_box(n int) RETURNS box LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN
        IF n = 15000 THEN PERFORM pg_advisory_lock_shared(4); PERFORM pg_advisory_unlock_shared(4); END IF;
        RETURN box(point(n % 1000, n / 1000), point(n % 1000 + 1, n / 1000 + 1));
    END $$";

fn what_a_process_remembers_stays(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let tight = Tight::new(major, "1", &["shared_buffers=1MB", "autovacuum=off", "maintenance_work_mem=1MB"])?;
    let db = &tight.db;
    psql(db, "CREATE EXTENSION pg_prewarm")?;
    psql(db, GATES)?;
    psql(db, "CREATE TABLE filler (n int, pad text) WITH (fillfactor = 40)")?;
    psql(db, "INSERT INTO filler SELECT n, repeat('x', 500) FROM generate_series(1, 3000) n")?;
    psql(db, "CREATE TABLE wide AS SELECT n, repeat('x', 500) pad FROM generate_series(1, 6000) n")?;
    psql(db, "CREATE TABLE inserted (n int, pad text); CREATE TABLE other (n int)")?;
    psql(db, "CREATE TABLE updated AS SELECT n, 0 AS times FROM generate_series(1, 3000) n")?;
    psql(db, "CREATE TABLE speculative (n int); CREATE UNIQUE INDEX ON speculative (gated(n))")?;
    psql(db, "CREATE TABLE boxes AS SELECT n FROM generate_series(1, 20000) n")?;
    psql(db, "CREATE SEQUENCE s; SELECT nextval('s'), nextval('s')")?;
    psql(db, "CREATE TABLE vacuumed (k int); INSERT INTO vacuumed SELECT generate_series(1, 60000)")?;
    psql(db, "CREATE INDEX vacuumed_k ON vacuumed (k) WITH (deduplicate_items = off)")?;
    psql(db, "DELETE FROM vacuumed WHERE k <= 20000")?;
    for _ in 0..3 {
        psql(db, "VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) vacuumed")?;
        psql(db, "SELECT pg_current_xact_id()")?;
    }
    psql(db, "DELETE FROM vacuumed WHERE k % 3 = 0")?;

    let mut gates = Session::open(db)?;
    gates.run("SELECT pg_advisory_lock(key) FROM generate_series(2, 4) key", STATEMENT_MAX)?;
    let mut cursor = Session::open(db)?;
    cursor.run("BEGIN; INSERT INTO inserted SELECT n, repeat('x', 200) FROM generate_series(1, 2000) n", STATEMENT_MAX)?;
    cursor.run("DECLARE c CURSOR FOR SELECT n FROM inserted", STATEMENT_MAX)?;
    cursor.run("INSERT INTO inserted SELECT -n, repeat('x', 200) FROM generate_series(1, 2000) n", STATEMENT_MAX)?;
    let mut update = Session::open(db)?;
    update.run("BEGIN; INSERT INTO other VALUES (1)", STATEMENT_MAX)?;
    update.begin("UPDATE updated SET times = times + 1 WHERE gate(n, 2000, 2)")?;
    let mut insert = Session::open(db)?;
    insert.run("SET my.gate = 0", STATEMENT_MAX)?;
    insert.begin("INSERT INTO speculative VALUES (7777) ON CONFLICT DO NOTHING")?;
    let mut index = Session::open(db)?;
    index.begin("CREATE INDEX CONCURRENTLY boxes_gist ON boxes USING gist (gated_box(n))")?;
    tight.dev.until("three sessions to wait in the middle of a row", STATEMENT_MAX, || {
        let waiting = psql(db, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")?;
        Ok((waiting == "3").then_some(()))
    })?;

    // VACUUM has passed the free pages at the front, and waits for a pin that a cursor has. A leaf that it comes to
    // later is split, and its right half goes to the front.
    let mut pin = Session::open(db)?;
    pin.run("BEGIN; SET enable_seqscan = off; SET enable_bitmapscan = off", STATEMENT_MAX)?;
    pin.run("DECLARE c CURSOR FOR SELECT k FROM vacuumed WHERE k >= 30000 ORDER BY k; FETCH 1 FROM c", STATEMENT_MAX)?;
    let mut vacuum = Session::open(db)?;
    vacuum.begin("VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) vacuumed")?;
    tight.dev.until("VACUUM to wait for a pin", STATEMENT_MAX, || {
        Ok((psql(db, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'BufferPin'")? == "1").then_some(()))
    })?;
    let pages = |what: &str| -> anyhow::Result<u64> { Ok(psql(db, &format!("SELECT pg_relation_size('{what}') / 8192"))?.parse()?) };
    let long = pages("vacuumed_k")?;
    psql(db, "INSERT INTO vacuumed SELECT 50001 + n % 50 FROM generate_series(1, 400) n")?;
    ensure!(pages("vacuumed_k")? == long, "the right halves went to free pages");

    tight.move_on(&["inserted", "updated", "speculative", "other", "vacuumed", "vacuumed_k", "wide", "filler"])?;
    ensure!(tight.figure("blocks_handed_over")? > 100, "what is old is handed over: {}", tight.compute()?);

    let mut wrong: Vec<String> = Vec::new();
    let fetched = cursor.run("FETCH ALL FROM c", STATEMENT_MAX)?;
    let later = fetched.iter().filter(|row| row.starts_with('-')).count();
    if fetched.len() != 2000 || later > 0 {
        wrong.push(format!("the cursor shows {} rows of 2,000, {later} inserted after it was opened", fetched.len()));
    }
    cursor.run("COMMIT", STATEMENT_MAX)?;
    // Somebody else was sooner.
    psql(db, "INSERT INTO speculative VALUES (7777)")?;
    gates.run("SELECT pg_advisory_unlock_all()", STATEMENT_MAX)?;
    pin.run("COMMIT", STATEMENT_MAX)?;
    for (session, what) in
        [(&mut update, "UPDATE"), (&mut insert, "INSERT ON CONFLICT"), (&mut index, "CREATE INDEX CONCURRENTLY"), (&mut vacuum, "VACUUM")]
    {
        let said = session.end(STATEMENT_MAX).context(what)?;
        if !said.is_empty() {
            wrong.push(format!("{what} says {said:?}"));
        }
    }
    update.run("COMMIT", STATEMENT_MAX)?;
    // Line pointers that VACUUM has freed are used again.
    psql(db, "INSERT INTO vacuumed SELECT 100000 + n FROM generate_series(1, 20000) n")?;
    let entries = |way: &str| psql(db, &format!("SET {way} = off; SELECT count(*) FROM vacuumed WHERE k BETWEEN 20001 AND 60100"));
    let boxes = "SET enable_seqscan = off; SELECT count(*) FROM boxes WHERE gated_box(n) && box(point(-1, -1), point(2000, 2000))";
    for (is, should, what) in [
        (psql(db, "SELECT min(times), max(times), count(*) FROM updated")?, "1|1|3000", "each row is updated once"),
        (psql(db, "SELECT count(*) FROM speculative")?, "1", "a key is there once"),
        (psql(db, boxes)?, "20000", "the index that was built has every row"),
        (
            entries("enable_seqscan")?,
            &*entries("enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan")?,
            "VACUUM left no entry",
        ),
        (psql(db, "SELECT nextval('s')")?, "3", "the sequence goes on where it was"),
    ] {
        if is != should {
            wrong.push(format!("{what}: {is}, not {should}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    tight.move_on(&["updated", "boxes_gist", "vacuumed_k"])?;
    ensure!(psql(db, boxes)? == "20000" && psql(db, "SELECT sum(times) FROM updated")? == "3000");
    amcheck(db)
}

#[test]
fn what_a_process_remembers_stays_on_14() -> anyhow::Result<()> {
    what_a_process_remembers_stays(Major::V14)
}

#[test]
fn what_a_process_remembers_stays_on_15() -> anyhow::Result<()> {
    what_a_process_remembers_stays(Major::V15)
}

#[test]
fn what_a_process_remembers_stays_on_16() -> anyhow::Result<()> {
    what_a_process_remembers_stays(Major::V16)
}

#[test]
fn what_a_process_remembers_stays_on_17() -> anyhow::Result<()> {
    what_a_process_remembers_stays(Major::V17)
}

#[test]
fn what_a_process_remembers_stays_on_18() -> anyhow::Result<()> {
    what_a_process_remembers_stays(Major::V18)
}

/// Bytes of disk that a folder takes.
fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(dir).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0, // gone meanwhile
    };
    entries.into_iter().map(bytes).sum()
}

/// The folders of caches below a folder.
fn caches(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name() == "cache" && entry.path().join("files").is_dir() {
                found.push(entry.path());
            } else {
                caches(&entry.path(), found);
            }
        }
    }
}

/// A load that ends with what it was started for.
struct Load(Child);

impl Load {
    fn start(db: &str) -> anyhow::Result<Load> {
        let mut pgbench = Command::new("/usr/lib/postgresql/15/bin/pgbench");
        pgbench.args(["-n", "-c", "4", "-T", "100000", db]).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Load(pgbench.spawn()?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const BOOKS_BALANCE: &str = "SELECT sum(abalance) = (SELECT sum(bbalance) FROM pgbench_branches)
       AND sum(abalance) = (SELECT sum(tbalance) FROM pgbench_tellers)
       AND sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";

/// `VARVE_TEST_LOAD_SECONDS` makes it longer.
#[test]
fn a_database_that_is_written_through_keeps_to_a_small_cache() -> anyhow::Result<()> {
    const CACHE_MB: u64 = 24;
    let seconds = std::env::var("VARVE_TEST_LOAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(70);
    let tight = Tight::new(Major::V15, &CACHE_MB.to_string(), &["shared_buffers=8MB", "autovacuum_naptime=5s"])?;
    let db = &tight.db;
    program("pgbench", &["-iq", "-s", "12", db])?;
    psql(db, "CREATE SEQUENCE s; SELECT nextval('s')")?;
    let size: u64 = psql(db, "SELECT pg_database_size(current_database())")?.parse()?;
    ensure!(size > 7 * (CACHE_MB << 20), "the database has {size} bytes");
    let mut folders = Vec::new();
    caches(tight.dev.folder(), &mut folders);
    let [cache] = folders.as_slice() else { anyhow::bail!("the caches are {folders:?}") };
    let (mut most, mut handed_over) = (0, 0);
    for round in 0..2 {
        let load = Load::start(db)?;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(seconds / 2) {
            std::thread::sleep(Duration::from_millis(500));
            // The first rounds take what the making of the tables has left.
            if began.elapsed() > Duration::from_secs(seconds / 4) {
                most = most.max(allocated(cache));
            }
        }
        handed_over += tight.figure("blocks_handed_over")?;
        println!("round {round}: at most {most} bytes, {}", tight.compute()?["cache"]);
        if round == 0 {
            let pid = tight.compute()?["mount_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("a compute that runs")?;
            signal(pid, Signal::KILL);
        }
        drop(load);
        tight.dev.until("the compute to be back", BACK_MAX, || Ok(psql(db, "SELECT 1").is_ok().then_some(())))?;
        ensure!(psql(db, BOOKS_BALANCE)? == "t", "the books balance in round {round}");
    }
    ensure!(psql(db, "SELECT count(*) > 1000 FROM pgbench_history")? == "t", "the load did something");
    ensure!(handed_over > 2 * (CACHE_MB << 20) / 8192, "{handed_over} blocks were handed over");
    ensure!(most < 4 * (CACHE_MB << 20), "the cache took {most} bytes");
    amcheck(db)?;
    tight.compare_pages()?;
    // A clean stop keeps where a sequence stands, as always.
    let next: u64 = psql(db, "SELECT nextval('s')")?.parse()?;
    tight.dev.json(&["compute", "stop", MAIN])?;
    let db = tight.dev.compute(MAIN, &[])?;
    ensure!(psql(&db, "SELECT nextval('s')")?.parse::<u64>()? == next + 1);
    amcheck(&db)
}

/// All that an application does, in a cache that is far too small: what its clients see is what a standby has whose
/// redo is Postgres's own, and its files are as the page service has them.
fn an_application_in_a_small_cache(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let dev = Dev::start_for(VARVE, major, &["--compute-cache-mb", "4"])?;
    let compute = start(&dev, major, &[("shared_buffers", "'4MB'")])?;
    let private = Private::of(&compute)?;
    let standby = private.standby(&[("shared_buffers", "'32MB'"), ("autovacuum", "off")])?;
    let db = compute["conninfo"].as_str().context("a compute has a conninfo")?.to_owned();
    load(&db, major, 2, 20, &[])?;
    program("vacuumdb", &["--all", "--quiet", "--analyze", "--maintenance-db", &db])?;
    let tight = Tight { dev, db, private };
    ensure!(tight.figure("rebases")? > 3 && tight.figure("blocks_handed_over")? > 1000, "what is old is handed over: {}", tight.compute()?);
    println!("{}", tight.compute()?["cache"]);
    amcheck(&tight.db)?;
    tight.compare_pages()?;
    let expected = everything(&tight.db, major)?;
    wait_replayed(&standby, psql(&tight.db, "SELECT pg_current_wal_flush_lsn()")?.parse()?)?;
    ensure_same(&expected, &everything(&standby.conninfo("postgres"), major)?, Sequences::LoggedAhead).context("the standby")?;
    tight.dev.json(&["compute", "stop", MAIN])?;
    let db = tight.dev.compute(MAIN, &[])?;
    ensure_same(&expected, &everything(&db, major)?, Sequences::Exact).context("the next compute")?;
    amcheck(&db)
}

#[test]
fn an_application_in_a_small_cache_on_15() -> anyhow::Result<()> {
    an_application_in_a_small_cache(Major::V15)
}

#[test]
fn an_application_in_a_small_cache_on_18() -> anyhow::Result<()> {
    an_application_in_a_small_cache(Major::V18)
}
