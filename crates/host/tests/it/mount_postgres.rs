//! Stock Postgres on the mount does what it does on a plain directory.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::Path,
    sync::Arc,
    time::Duration,
};

use crate::support::{Mounted, Server, StoppedCluster, cluster::copy_directory, scratch};
use parking_lot::Mutex;
use varve_host::mount::FileObserver;
use varve_postgres::Major;
use varve_testbed::postgres::Postgres;

/// A stopped cluster in which `prepare` was run. The cluster lives as long as the first value.
pub(crate) fn cluster(prepare: impl FnOnce(&Postgres)) -> (Postgres, Arc<StoppedCluster>) {
    cluster_of(Major::V15, prepare)
}

fn cluster_of(major: Major, prepare: impl FnOnce(&Postgres)) -> (Postgres, Arc<StoppedCluster>) {
    let mut origin = Postgres::init(major, &[], &[]).expect("a cluster");
    origin.start().expect("it starts");
    prepare(&origin);
    origin.stop("fast").expect("it stops");
    let source = StoppedCluster::open(&origin.data_dir());
    (origin, source)
}

pub(crate) fn pgbench_tables(origin: &Postgres, scale: u32) {
    let mut pgbench = origin.command("pgbench").expect("pgbench");
    let scale = scale.to_string();
    let output = pgbench.args(["-i", "-q", "-s", &scale, "-h"]).arg(origin.dir()).args(["-U", "postgres", "postgres"]).output();
    let output = output.expect("pgbench runs");
    assert!(output.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&output.stderr));
}

/// A directory that Postgres may write to, owned as the cluster is.
fn location(parent: &Path, name: &str, source: &StoppedCluster) -> String {
    let path = parent.join(name);
    let owner = fs::metadata(source.data_dir()).expect("the cluster");
    fs::create_dir_all(&path).expect("a directory");
    chown(&path, Some(owner.uid()), Some(owner.gid())).expect("its owner");
    path.to_str().expect("a plain path").to_owned()
}

/// What the base of the comparison holds: tables of several kinds, a database, a tablespace.
fn varied_base(origin: &Postgres) {
    let tablespace = origin.dir().join("ts");
    fs::create_dir(&tablespace).expect("a directory");
    let owner = fs::metadata(origin.data_dir()).expect("the cluster");
    chown(&tablespace, Some(owner.uid()), Some(owner.gid())).expect("its owner");
    pgbench_tables(origin, 2);
    let sql = format!(
        "CREATE TABLESPACE side LOCATION '{}';
         CREATE DATABASE other TABLESPACE side;
         CREATE TABLE aside (id int, t text) TABLESPACE side;
         INSERT INTO aside SELECT g, repeat('x', g % 50) FROM generate_series(1, 20000) g;
         CREATE INDEX ON aside (id) TABLESPACE side;
         CREATE TABLE doc (id int PRIMARY KEY, words tsvector, box box, many int[]);
         INSERT INTO doc SELECT g, to_tsvector('simple', 'w' || g % 97 || ' v' || g % 13), box(point(g, g), point(g + 1, g + 1)), ARRAY[g % 7, g % 11]
           FROM generate_series(1, 10000) g;
         CREATE INDEX ON doc USING gin (words);
         CREATE INDEX ON doc USING gist (box);
         CREATE INDEX ON doc USING gin (many);
         CREATE INDEX ON doc USING brin (id);
         CREATE INDEX ON doc USING hash (id);
         CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
         INSERT INTO fleeting SELECT generate_series(1, 5000);
         SELECT lo_from_bytea(4242, decode(repeat('ab', 100000), 'hex'));",
        tablespace.display()
    );
    // Tablespaces and databases cannot be made within a transaction.
    for statement in sql.split(";\n") {
        origin.psql("postgres", statement).expect("the base is prepared");
    }
}

/// Statements that make, change, rewrite and drop what there is.
const WORKLOAD: [&str; 32] = [
    "UPDATE pgbench_accounts SET abalance = aid % 1000 WHERE aid % 3 = 0",
    "DELETE FROM pgbench_accounts WHERE aid % 10 = 0",
    "VACUUM pgbench_accounts",
    "CREATE TABLE wide AS SELECT g AS id, repeat(md5(g::text), 100) AS t FROM generate_series(1, 5000) g",
    "CREATE INDEX ON wide (id)",
    "UPDATE wide SET t = repeat(md5(t), 120) WHERE id % 2 = 0",
    "VACUUM FULL wide",
    "CLUSTER pgbench_accounts USING pgbench_accounts_pkey",
    "ALTER TABLE aside ADD COLUMN n numeric DEFAULT random() * 0 + 1",
    "ALTER TABLE aside SET TABLESPACE pg_default",
    "CREATE TABLE back (id int) TABLESPACE side; INSERT INTO back SELECT generate_series(1, 3000)",
    "ALTER TABLE doc SET TABLESPACE side",
    "REINDEX TABLE doc",
    "INSERT INTO doc SELECT id + 10000, words, box, many FROM doc",
    "DELETE FROM doc WHERE id % 5 = 0",
    "VACUUM (ANALYZE) doc",
    "TRUNCATE pgbench_branches, pgbench_tellers; INSERT INTO pgbench_branches SELECT g, g FROM generate_series(1, 2000) g",
    "CREATE DATABASE logged TEMPLATE other STRATEGY wal_log",
    "CREATE DATABASE copied TEMPLATE other STRATEGY file_copy",
    "CREATE DATABASE gone TEMPLATE template0",
    "DROP DATABASE gone",
    "DO $$ BEGIN FOR n IN 1..2000 LOOP EXECUTE format('CREATE TABLE many_%s (id int)', n); END LOOP; END $$",
    "DO $$ BEGIN FOR n IN 1..2000 LOOP EXECUTE format('DROP TABLE many_%s', n); END LOOP; END $$",
    "BEGIN; CREATE TABLE prepared (id int); INSERT INTO prepared SELECT generate_series(1, 100); PREPARE TRANSACTION 'p'",
    "INSERT INTO fleeting SELECT generate_series(10001, 12000)",
    "CREATE TEMP TABLE passing AS SELECT generate_series(1, 100000) g; SELECT count(DISTINCT g) FROM passing",
    "SET work_mem = '64kB'; SELECT count(*) FROM (SELECT DISTINCT md5(aid::text) FROM pgbench_accounts) s",
    "SELECT lo_put(4242, 1000, 'changed'); SELECT lo_create(4243); SELECT lo_put(4243, 5000000, 'far')",
    "DELETE FROM wide WHERE id > 100",
    "VACUUM wide",
    "COMMIT PREPARED 'p'",
    "CHECKPOINT",
];

/// Everything that can be asked of a cluster, as text.
fn contents(server: &Server) -> String {
    let dump = server.run("pg_dumpall", &["--no-sync"]);
    // What differs from run to run, and where tablespaces lie.
    let kept = dump.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    let all: String = kept.map(|line| line.split_once(" LOCATION ").map_or(line, |(before, _)| before).to_owned() + "\n").collect();
    all + &server
        .psql("postgres", "SELECT relname, relkind, relpages FROM pg_class WHERE relpersistence = 'p' AND relname NOT LIKE 'pg_toast%' ORDER BY relname COLLATE \"C\"")
}

fn assert_same(expected: &str, got: &str, when: &str) {
    if let Some((n, (one, other))) = expected.lines().zip(got.lines()).enumerate().find(|(_, (one, other))| one != other) {
        panic!("{when}: line {n} differs\n  plain: {one:.500}\n  mount: {other:.500}");
    }
    assert_eq!(expected.lines().count(), got.lines().count(), "{when}: one has more than the other");
}

pub(crate) fn check_with_amcheck(server: &Server) {
    server.psql("postgres", "CREATE EXTENSION IF NOT EXISTS amcheck");
    let output = server.run("pg_amcheck", &["--all", "--heapallindexed", "--install-missing", "--no-dependent-toast"]);
    assert_eq!(output, "", "pg_amcheck finds nothing");
}

#[test]
fn a_workload_leaves_what_it_leaves_on_a_plain_directory() {
    let (_origin, source) = cluster(varied_base);
    let owner = fs::metadata(source.data_dir()).expect("the cluster");
    let plain_dir = scratch("plain");
    let plain_data = plain_dir.path().join("data");
    copy_directory(source.data_dir(), &plain_data, owner.uid(), owner.gid());
    let mounted = Mounted::start(&source, |_| {});
    let settings = [("autovacuum", "off"), ("max_wal_size", "256MB"), ("shared_buffers", "16MB")];
    let mut plain = Server::start(&plain_data, plain_dir.path(), &settings);
    let mut mount = Server::start(&mounted.data(), mounted.dir.path(), &settings);
    // A plain directory keeps unlogged relations over a clean stop; a branch starts without.
    plain.psql("postgres", "TRUNCATE fleeting");
    assert_eq!(mount.psql("postgres", "SELECT count(*) FROM fleeting"), "0");
    assert_same(&contents(&plain), &contents(&mount), "at the start");
    let (outside_plain, outside_mount) = (location(plain_dir.path(), "o", &source), location(mounted.dir.path(), "o", &source));
    for (server, outside) in [(&plain, &outside_plain), (&mount, &outside_mount)] {
        for statement in WORKLOAD {
            server.psql("postgres", statement);
        }
        server.psql("logged", "CREATE TABLE t AS SELECT generate_series(1, 1000) g");
        server.psql("copied", "CREATE TABLE t AS SELECT generate_series(1, 1000) g");
        server.psql("postgres", &format!("CREATE TABLESPACE outside LOCATION '{outside}'"));
        server.psql("postgres", "CREATE TABLE there TABLESPACE outside AS SELECT generate_series(1, 1000) g");
        server.psql("postgres", "ALTER TABLE there SET TABLESPACE pg_default");
        server.psql("postgres", "DROP TABLESPACE outside");
    }
    let expected = contents(&plain);
    assert_same(&expected, &contents(&mount), "after the workload");
    for mode in ["fast", "immediate"] {
        for server in [&mut plain, &mut mount] {
            server.stop(mode);
            server.start_again();
        }
        if mode == "immediate" {
            assert_eq!(mount.psql("postgres", "SELECT count(*) FROM fleeting"), "0", "a crash empties unlogged relations");
        }
        assert_same(&contents(&plain), &contents(&mount), &format!("after a restart from {mode}"));
    }
    check_with_amcheck(&mount);
    assert!(mounted.mount().failure().is_none());
}

#[test]
fn a_load_that_is_killed_recovers_on_the_same_mount() {
    let (_origin, source) = cluster(|origin| pgbench_tables(origin, 5));
    let mounted = Mounted::start(&source, |_| {});
    // Without full-page writes a page that the kill tore would stay torn: a compute starts anew instead.
    let mut server = mounted.postgres(&[("full_page_writes", "on"), ("checkpoint_timeout", "30"), ("shared_buffers", "8MB")]);
    for round in 0..3 {
        let mut load =
            server.command("pgbench").args(["-n", "-T", "60", "-c", "4"]).stderr(std::process::Stdio::null()).spawn().expect("pgbench");
        std::thread::sleep(Duration::from_millis(1500));
        if round == 1 {
            server.psql("postgres", "CHECKPOINT");
        }
        server.kill();
        let _ = load.kill();
        let _ = load.wait();
        server.start_again();
        let sums = "SELECT sum(abalance) = (SELECT sum(bbalance) FROM pgbench_branches)
                       AND sum(abalance) = (SELECT sum(tbalance) FROM pgbench_tellers)
                       AND sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";
        assert_eq!(server.psql("postgres", sums), "t", "the books balance after kill {round}");
        check_with_amcheck(&server);
    }
    assert_ne!(server.psql("postgres", "SELECT count(*) FROM pgbench_history"), "0", "the load did something");
}

#[test]
fn tablespaces_of_the_base_lie_in_the_mount() {
    let (origin, source) = cluster(varied_base);
    let mounted = Mounted::start(&source, |_| {});
    let server = mounted.postgres(&[]);
    assert_eq!(server.psql("postgres", "SELECT count(*), sum(id) FROM aside"), "20000|200010000");
    assert_eq!(server.psql("other", "SELECT current_database()"), "other");
    let location = server.psql("postgres", "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'side'");
    assert_eq!(Path::new(&location).parent(), Some(mounted.data().join("varve_tablespaces").as_path()));
    assert_ne!(server.psql("postgres", "SELECT pg_tablespace_size('side')"), "0");

    // A backup taken from the compute takes it along once, and starts.
    let backup = mounted.dir.path().join("server/backup");
    let mapping = format!("{location}={}", mounted.dir.path().join("server/side").display());
    server.run("pg_basebackup", &["-D", backup.to_str().expect("a plain path"), "-T", &mapping, "-X", "stream", "-c", "fast", "--no-sync"]);
    let left = Path::new(&location).strip_prefix(mounted.data()).expect("it lies in the mount");
    assert!(!backup.join(left).exists(), "not twice");
    let restored = Server::start(&backup, &mounted.dir.path().join("restored"), &[]);
    assert_eq!(restored.psql("postgres", "SELECT count(*), sum(id) FROM aside"), "20000|200010000");
    drop(restored);

    server.psql("postgres", "DROP TABLE aside");
    server.psql("postgres", "DROP DATABASE other");
    server.psql("postgres", "DROP TABLESPACE side");
    assert_eq!(fs::read_dir(mounted.data().join("pg_tblspc")).expect("pg_tblspc").count(), 0);
    drop(server);
    drop(origin);
}

#[test]
fn the_blocks_of_one_start_serve_the_next_in_one_batch() {
    let (_origin, source) = cluster(|_| {});
    let first = Mounted::start(&source, |_| {});
    let server = first.postgres(&[]);
    server.psql("postgres", "SELECT 1");
    let blocks = first.mount().touched_blocks();
    drop(server);
    assert!((40..1000).contains(&blocks.len()), "a start reads about a hundred blocks, not {}", blocks.len());
    let cold = first.mount().statistics().fetches;

    let second = Mounted::start(&source, |_| {});
    second.mount().prefetch(&blocks).expect("prefetch");
    let fetched = second.mount().statistics().fetches;
    let server = second.postgres(&[]);
    server.psql("postgres", "SELECT 1");
    let later = second.mount().statistics().fetches - fetched;
    assert!(fetched == 1 && later * 4 <= cold, "a cold start takes {cold} fetches, one with the blocks at hand {fetched} + {later}");
}

#[derive(Default)]
struct Kept(Mutex<BTreeMap<String, Vec<u8>>>);

impl FileObserver for Kept {
    fn written(&self, path: &str, contents: Vec<u8>) {
        self.0.lock().insert(path.to_owned(), contents);
    }

    fn removed(&self, path: &str) {
        self.0.lock().remove(path);
    }

    fn not_kept(&self, path: &str, why: String) {
        panic!("{path} must be kept: {why}");
    }
}

#[test]
fn settings_statistics_and_slots_are_observed() {
    let (_origin, source) = cluster(|_| {});
    let kept: Arc<Kept> = Arc::default();
    let observer = kept.clone();
    let mounted = Mounted::start(&source, move |config| config.observer = Some(observer));
    let mut server = mounted.postgres(&[]);
    let has = |path: &str, text: &str| {
        mounted.mount().flush_observer().expect("nothing is lost");
        kept.0.lock().get(path).is_some_and(|contents| String::from_utf8_lossy(contents).contains(text))
    };
    server.psql("postgres", "ALTER SYSTEM SET work_mem = '7MB'");
    assert!(has("postgresql.auto.conf", "work_mem = '7MB'"));
    server.psql("postgres", "SELECT pg_create_physical_replication_slot('kept', true)");
    assert!(has("pg_replslot/kept/state", "kept"));
    server.psql("postgres", "SELECT pg_create_physical_replication_slot('dropped', true)");
    server.psql("postgres", "SELECT pg_drop_replication_slot('dropped')");
    assert!(!has("pg_replslot/dropped/state", ""));
    assert!(!has("pg_stat/pgstat.stat", ""));
    server.stop("fast");
    assert!(has("pg_stat/pgstat.stat", ""), "statistics are written at a clean stop");
    server.start_again();
    assert!(!has("pg_stat/pgstat.stat", ""), "and taken at the start");
}

/// What each major does in ways of its own: 16 and later extend files with fallocate, 17 reads in streams, 18 reads
/// asynchronously and copies files in the kernel.
#[test]
fn every_major_that_is_installed_runs_on_the_mount() {
    for major in Major::ALL {
        if varve_testbed::postgres::bin_dir(major).is_err() {
            println!("{major:?} is not installed: passed over");
            continue;
        }
        let (_origin, source) = cluster_of(major, |origin| {
            origin
                .psql("postgres", "CREATE TABLE old AS SELECT g AS id, md5(g::text) AS t FROM generate_series(1, 30000) g")
                .expect("a table");
            origin.psql("postgres", "CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) g").expect("a table");
            origin.psql("postgres", "CREATE INDEX ON old (id)").expect("an index");
            origin.psql("postgres", "VACUUM old").expect("vacuum");
        });
        let mounted = Mounted::start(&source, |_| {});
        let mut server = mounted.postgres(&[("shared_buffers", "8MB"), ("full_page_writes", "on")]);
        let sums = "SELECT count(*), sum(id), sum(length(t)) FROM old";
        assert_eq!(server.psql("postgres", sums), "30000|450015000|960000", "{major:?}");
        assert_eq!(server.psql("postgres", "SELECT count(*) FROM fleeting"), "0", "{major:?}");
        server.psql(
            "postgres",
            "CREATE TABLE new AS SELECT * FROM old; CREATE INDEX ON new (t); UPDATE old SET t = t || 'x' WHERE id % 3 = 0",
        );
        server.psql("postgres", "VACUUM (ANALYZE) old");
        server.psql("postgres", "INSERT INTO new SELECT id + 100000, t FROM new");
        if major >= Major::V15 {
            server.psql("postgres", "CREATE DATABASE logged TEMPLATE template0 STRATEGY wal_log");
            let clone = if major >= Major::V18 { "SET file_copy_method = clone" } else { "SELECT 1" };
            let mut psql = server.command("psql");
            let copied = psql
                .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-c", clone])
                .args(["-c", "CREATE DATABASE copied TEMPLATE template0 STRATEGY file_copy"]);
            assert!(copied.status().expect("psql runs").success(), "{major:?}");
            assert_eq!(server.psql("copied", "SELECT count(*) > 300 FROM pg_class"), "t", "{major:?}");
        }
        let expected = server.psql("postgres", sums);
        let new = server.psql("postgres", "SELECT count(*), sum(id) FROM new");
        server.kill();
        server.start_again();
        assert_eq!(server.psql("postgres", sums), expected, "{major:?}");
        assert_eq!(server.psql("postgres", "SELECT count(*), sum(id) FROM new"), new, "{major:?}");
        check_with_amcheck(&server);
        if major >= Major::V16 {
            server.stop("fast");
            let direct = mounted.postgres(&[("debug_io_direct", "data"), ("shared_buffers", "8MB")]);
            assert_eq!(direct.psql("postgres", sums), expected, "{major:?} without the kernel's cache");
            direct.psql("postgres", "INSERT INTO new SELECT id + 400000, t FROM new; CHECKPOINT");
            check_with_amcheck(&direct);
        }
        assert!(mounted.mount().failure().is_none());
    }
}
