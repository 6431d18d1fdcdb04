//! After a load of everything that an application does, all is the same: on the compute, in the page service, on a
//! branch, in a full backup, on a plain standby that followed, and on the next compute. The oracle is Postgres: its
//! dumps, its files, its redo.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, RelNode};
use varve_protocol::ReadLsn;
use varve_protocol::client::{BaseBackup, BaseBackupOptions, BlockingOptions, BlockingPageClient};
use varve_protocol::connect::{ConnectConfig, Endpoint};
use varve_testbed::application::{load, start};
use varve_testbed::beside::{Private, make_plain, wait_replayed};
use varve_testbed::comparison::{Comparison, DataDirectory, PageService};
use varve_testbed::dev::{Dev, amcheck, program, psql, settle};
use varve_testbed::dump::{Sequences, ensure_same, everything};
use varve_testbed::postgres::{Postgres, is_skipped};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long the page service may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Settings of the plain servers.
const PLAIN: [(&str, &str); 2] = [("shared_buffers", "'32MB'"), ("autovacuum", "off")];

fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    Ok(value[key].as_str().with_context(|| format!("{value} has a {key}"))?.to_owned())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<DataDirectory> {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    program("cp", &["-a", &from, &to])?;
    DataDirectory::open(Path::new(&to))
}

/// Object ids of databases that were made by copying block by block.
fn logged_databases(db: &str, major: Major) -> anyhow::Result<BTreeSet<u32>> {
    if major < Major::V15 {
        return Ok(BTreeSet::new());
    }
    let oids = psql(db, "SELECT oid FROM pg_database WHERE datname IN ('logged', 'collated')")?;
    Ok(oids.lines().filter_map(|oid| oid.parse().ok()).collect())
}

/// Fetches a backup and unpacks it.
fn backup(dev: &Dev, tenant: &str, timeline: &str, lsn: Lsn, options: BaseBackupOptions, to: &Path) -> anyhow::Result<()> {
    let config = ConnectConfig::new(Endpoint::tcp("127.0.0.1", dev.pages_port()), "test");
    let stream = BaseBackup::start(&config, tenant, timeline, Some(lsn), options, SILENCE_MAX)?;
    std::fs::create_dir(to)?;
    tar::Archive::new(stream).unpack(to).context("unpacking the backup")
}

/// A running plain server on a full backup.
fn from_full_backup(dev: &Dev, major: Major, tenant: &str, timeline: &str, lsn: Lsn) -> anyhow::Result<(Postgres, DataDirectory)> {
    let mut postgres = Postgres::bare(major)?;
    backup(dev, tenant, timeline, lsn, BaseBackupOptions { full: true, ..BaseBackupOptions::default() }, &postgres.data_dir())?;
    let directory = copy(&postgres.data_dir(), &postgres.dir().join("as it came"))?;
    make_plain(&postgres, &PLAIN)?;
    postgres.start()?;
    Ok((postgres, directory))
}

/// Counters and small files must be the same in a full backup at the LSN of a checkpoint.
fn compare_small_things(truth: &DataDirectory, ours: &DataDirectory) -> anyhow::Result<()> {
    let (expected, found) = (truth.control().checkpoint_copy, ours.control().checkpoint_copy);
    let counters = |c: &varve_postgres::control::CheckPoint| {
        let ids = [("next_xid", c.next_xid), ("next_oid", c.next_oid.into()), ("next_multi", c.next_multi.into())];
        let more = [("next_multi_offset", c.next_multi_offset.into()), ("oldest_xid", c.oldest_xid.into())];
        let oldest = [("oldest_xid_db", c.oldest_xid_db.into()), ("oldest_multi", c.oldest_multi.into())];
        let last = [("oldest_multi_db", c.oldest_multi_db.into()), ("oldest_commit_ts_xid", c.oldest_commit_ts_xid.into())];
        [&ids[..], &more, &oldest, &last, &[("newest_commit_ts_xid", u64::from(c.newest_commit_ts_xid))]].concat()
    };
    ensure!(counters(&expected) == counters(&found), "counters are {:?}, expected {:?}", counters(&found), counters(&expected));
    let (expected, found) = (truth.small_files()?, ours.small_files()?);
    let names = |files: &std::collections::BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    ensure!(names(&expected) == names(&found), "small files are {:?}, expected {:?}", names(&found), names(&expected));
    for (path, bytes) in &expected {
        ensure!(found.get(path) == Some(bytes), "{path} differs from the server's");
    }
    Ok(())
}

fn the_same_everywhere(major: Major, scale: u32, seconds: u32, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let dev = Dev::start_for(VARVE, major, &[])?;
    let compute = start(&dev, major, settings)?;
    let db = text(&compute, "conninfo")?;
    let private = Private::of(&compute)?;
    let mut standby = private.standby(&PLAIN)?;
    let before_load: Lsn = psql(&db, "SELECT pg_current_wal_flush_lsn()")?.parse()?;
    load(&db, major, scale, seconds, &[])?;
    program("vacuumdb", &["--all", "--quiet", "--analyze", "--maintenance-db", &db])?;
    let lsn = settle(&db)?;

    // What the compute has on disk, now that nobody writes and everything was written out.
    let folder = tempfile::tempdir()?;
    let disk = copy(&private.data_dir(), &folder.path().join("compute"))?;
    let expected = everything(&db, major)?;
    let prepared = "SELECT transaction, gid, owner, database FROM pg_prepared_xacts ORDER BY gid";
    let expected_prepared = psql(&db, prepared)?;
    ensure!(expected_prepared.lines().count() == 2, "two transactions stay prepared, got {expected_prepared}");
    let lossy = logged_databases(&db, major)?;
    let branch = dev.json(&["branch", "create", "acme/child", "--lsn", &lsn.to_string()])?;
    ensure!(branch["branch_lsn"] == lsn.to_string().as_str(), "the branch begins at the checkpoint's end {lsn}, got {branch}");

    // Every block, from the page service.
    let tenant = text(&dev.json(&["tenant", "show", "acme"])?, "id")?;
    let main = text(&dev.json(&["branch", "show", "acme/main"])?, "timeline_id")?;
    let child = text(&branch, "timeline_id")?;
    for timeline in [&main, &child] {
        let pages = PageService::new(dev.pages_port(), &tenant, timeline, lsn);
        let compared = Comparison::new(&disk, &pages).lossy_maps_in(&lossy).run()?;
        println!("{compared} pages of the compute are as the page service has them");
    }
    let pages = PageService::new(dev.pages_port(), &tenant, &main, before_load);
    ensure!(Comparison::new(&disk, &pages).run().is_err(), "the comparison finds no difference from what was there before the load");

    // A plain standby that followed the same primary, whose redo is Postgres's own.
    wait_replayed(&standby, lsn)?;
    ensure_same(&expected, &everything(&standby.conninfo("postgres"), major)?, Sequences::LoggedAhead)
        .context("the standby, beside the compute")?;
    let of_standby = everything(&standby.conninfo("postgres"), major)?;
    standby.stop("fast")?;
    let standby_disk = DataDirectory::open(&standby.data_dir())?;
    let pages = PageService::new(dev.pages_port(), &tenant, &main, lsn);
    let compared = Comparison::new(&standby_disk, &pages).run()?;
    println!("{compared} pages of the standby are as the page service has them");

    // A full backup, which plain Postgres starts on.
    let (full, directory) = from_full_backup(&dev, major, &tenant, &main, lsn)?;
    Comparison::new(&disk, &directory).lossy_maps_in(&lossy).run().context("the full backup beside the compute")?;
    compare_small_things(&disk, &directory).context("the full backup beside the compute")?;
    ensure_same(&of_standby, &everything(&full.conninfo("postgres"), major)?, Sequences::Exact)
        .context("the full backup beside the standby")?;
    amcheck(&full.conninfo("postgres")).context("the full backup")?;
    backup(&dev, &tenant, &main, lsn, BaseBackupOptions::default(), &folder.path().join("base backup"))?;

    // A branch, and the next compute of the same branch.
    let branch_db = dev.compute("acme/child", &[])?;
    ensure_same(&of_standby, &everything(&branch_db, major)?, Sequences::Exact).context("the branch beside the standby")?;
    ensure_same(&expected, &everything(&branch_db, major)?, Sequences::LoggedAhead).context("the branch beside the compute")?;
    let scratch = psql(&db, "SELECT count(*) FROM scratch")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure_same(&expected, &everything(&db, major)?, Sequences::Exact).context("the next compute beside the one before")?;
    for (db, scratch, what) in [(&db, &*scratch, "are as a clean stop left them"), (&branch_db, "0", "are empty where the WAL was redone")]
    {
        ensure!(psql(db, prepared)? == expected_prepared, "prepared transactions are {expected_prepared} on every copy");
        let found = psql(db, "SELECT count(*) FROM scratch")?;
        ensure!(found == scratch, "unlogged tables {what}: expected {scratch} rows, got {found}");
        for gid in ["stays", "stays, with locks"] {
            psql(db, &format!("COMMIT PREPARED '{gid}'"))?;
        }
        program("pgbench", &["-n", "-c", "2", "-t", "200", db])?;
        amcheck(db)?;
    }
    Ok(())
}

#[test]
fn after_a_load_on_15() -> anyhow::Result<()> {
    the_same_everywhere(Major::V15, 2, 12, &[])
}

#[test]
fn after_a_load_on_14() -> anyhow::Result<()> {
    the_same_everywhere(Major::V14, 1, 5, &[("wal_log_hints", "on")])
}

#[test]
fn after_a_load_on_16() -> anyhow::Result<()> {
    the_same_everywhere(Major::V16, 1, 5, &[("wal_log_hints", "on"), ("wal_compression", "on")])
}

#[test]
fn after_a_load_on_17() -> anyhow::Result<()> {
    the_same_everywhere(Major::V17, 1, 5, &[("wal_consistency_checking", "'all'"), ("wal_compression", "on")])
}

#[test]
fn after_a_load_on_18() -> anyhow::Result<()> {
    the_same_everywhere(Major::V18, 1, 5, &[])
}

/// Whoever reads a map of free space as long as it was before a restart gets empty pages where it is shorter now. Any
/// other fork has an end.
#[test]
fn a_map_of_free_space_is_read_as_far_as_one_asks() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")?;
    let lsn = settle(&db)?;
    let node = psql(&db, "SELECT oid || ' ' || pg_relation_filenode('t') FROM pg_database WHERE datname = current_database()")?;
    let (database, relation) = node.split_once(' ').context("two numbers")?;
    let table = RelNode { spc: 1663, db: database.parse()?, rel: relation.parse()? };
    let (tenant, timeline) =
        (text(&dev.json(&["tenant", "show", "acme"])?, "id")?, text(&dev.json(&["branch", "show", "acme/main"])?, "timeline_id")?);
    let service = ConnectConfig::new(Endpoint::tcp("127.0.0.1", dev.pages_port()), "test");
    let client = BlockingPageClient::new(service, &tenant, &timeline, BlockingOptions::default());
    let read = |fork| client.page_range(table.fork(fork), 0, 20, ReadLsn::at(lsn));
    ensure!(read(Fork::Main)?.len() == 5 * BLCKSZ, "1,000 rows are 5 pages");
    let map = read(Fork::FreeSpaceMap)?;
    ensure!(map.len() == 20 * BLCKSZ, "{} bytes of 20 pages of the map", map.len());
    ensure!(map[10 * BLCKSZ..].iter().all(|byte| *byte == 0), "what the map has not is empty");
    Ok(())
}
