//! A clean stop keeps what WAL does not: where sequences stand to the number, and what unlogged relations hold. They
//! are there again exactly where the compute stopped, and nowhere else; after a kill unlogged relations are empty, and
//! no sequence gives a value twice.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use varve_testbed::dev::{Dev, amcheck, free_port, psql, signal};
use varve_testing::random::SeededRng;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long a compute may take to be back.
const BACK_MAX: Duration = Duration::from_secs(60);
const MAIN: &str = "acme/main";
/// What an unlogged relation holds, its index and its large values included.
const CACHED: &str = "SET enable_seqscan = off; SELECT format('%s %s %s', count(*), sum(length(large)), sum(n)) FROM cached WHERE n > 0";
const FORKS: &str = "SELECT string_agg(fork || pg_relation_size('cached', fork), ' ') FROM unnest('{main,fsm,vm,init}'::text[]) fork";

struct Server {
    dev: Dev,
    port: String,
    db: String,
}

impl Server {
    fn new() -> anyhow::Result<Server> {
        let dev = Dev::start(VARVE)?;
        dev.json(&["tenant", "create", "acme"])?;
        let port = free_port()?.to_string();
        let db = dev.compute(MAIN, &["--port", &port])?;
        Ok(Server { dev, port, db })
    }

    /// Stops the compute cleanly; gives what its end is told with.
    fn stop(&self) -> anyhow::Result<String> {
        let stopped = self.dev.json(&["compute", "stop", MAIN])?;
        ensure!(stopped[0]["stopped"].is_string(), "a clean stop says so: {stopped}");
        Ok(stopped.to_string())
    }

    fn start(&self) -> anyhow::Result<()> {
        self.dev.compute(MAIN, &["--port", &self.port]).map(drop)
    }

    fn stop_and_start(&self) -> anyhow::Result<()> {
        self.stop()?;
        self.start()
    }

    /// Kills what runs, and waits until a compute is back.
    fn kill(&self) -> anyhow::Result<()> {
        let pid = |list: &serde_json::Value| list[0]["mount_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let old = pid(&self.dev.json(&["compute", "list"])?).context("a compute that runs")?;
        signal(old, Signal::KILL);
        self.dev.until("the compute to be back", BACK_MAX, || {
            let again = pid(&self.dev.json(&["compute", "list"])?).is_some_and(|pid| pid != old);
            Ok((again && psql(&self.db, "SELECT 1").is_ok()).then_some(()))
        })
    }

    /// A table that is not logged, with all that one can have.
    fn make_unlogged(&self) -> anyhow::Result<()> {
        psql(&self.db, "CREATE UNLOGGED TABLE cached (n int PRIMARY KEY, large text)")?;
        psql(&self.db, "ALTER TABLE cached ALTER large SET STORAGE EXTERNAL")?;
        psql(
            &self.db,
            "INSERT INTO cached SELECT n, repeat(md5(n::text), CASE WHEN n % 100 = 0 THEN 200 ELSE 1 END) FROM generate_series(1, 20000) n",
        )?;
        psql(&self.db, "DELETE FROM cached WHERE n % 3 = 0")?;
        psql(&self.db, "VACUUM cached")?;
        Ok(())
    }

    /// What a branch shows.
    fn on_branch(&self, name: &str, at: &[&str], look: impl FnOnce(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let branch = format!("acme/{name}");
        self.dev.json(&[&["branch", "create", &branch, "--from", "main"], at].concat())?;
        let db = self.dev.compute(&branch, &[])?;
        look(&db).with_context(|| format!("on {branch}"))?;
        self.dev.json(&["compute", "stop", &branch])?;
        Ok(())
    }
}

#[test]
fn what_stands_beside_wal_is_there_where_the_compute_stopped_and_nowhere_else() -> anyhow::Result<()> {
    let server = Server::new()?;
    let db = &server.db;
    server.make_unlogged()?;
    psql(db, "CREATE SEQUENCE s")?;
    psql(db, "SELECT nextval('s') FROM generate_series(1, 5)")?;
    let (cached, forks) = (psql(db, CACHED)?, psql(db, FORKS)?);
    ensure!(cached.starts_with("13334 "), "{cached}");
    server.stop()?;
    let at = server.dev.json(&["branch", "show", MAIN])?;
    let at = at["last_lsn"].as_str().with_context(|| format!("a head: {at}"))?.to_owned();

    server.on_branch("asleep", &[], |db| {
        ensure!(psql(db, CACHED)? == cached, "a branch of a branch at rest");
        ensure!(psql(db, "SELECT nextval('s')")? == "6");
        amcheck(db)
    })?;
    server.start()?;
    ensure!(psql(db, CACHED)? == cached && psql(db, FORKS)? == forks, "{}: {}", psql(db, CACHED)?, psql(db, FORKS)?);
    amcheck(db)?;
    ensure!(psql(db, "SELECT nextval('s')")? == "6", "the sequence goes on where it was");
    psql(db, "INSERT INTO cached VALUES (-1, 'more'), (30001, 'more')")?;
    psql(db, "CREATE TABLE marks ()")?;

    let same = |db: &str| {
        ensure!(psql(db, CACHED)? == cached, "exactly there: {}", psql(db, CACHED)?);
        ensure!(psql(db, "SELECT nextval('s')")? == "6");
        amcheck(db)
    };
    server.on_branch("there", &["--lsn", &at], same)?;
    server.on_branch("elsewhere", &[], |db| {
        ensure!(psql(db, "SELECT count(*) FROM cached")? == "0", "empty anywhere else");
        ensure!(psql(db, "SELECT nextval('s') > 6")? == "t");
        psql(db, "INSERT INTO cached VALUES (1)")?;
        amcheck(db)
    })?;
    // What was loaded at a start and not touched since is kept by the next stop, too.
    server.stop_and_start()?;
    server.stop_and_start()?;
    ensure!(psql(db, "SELECT count(*) FROM cached")? == "13336", "{}", psql(db, "SELECT count(*) FROM cached")?);
    psql(db, "DROP TABLE cached")?;
    server.stop_and_start()?;
    amcheck(db)
}

#[test]
fn a_kill_empties_what_is_unlogged_though_nothing_was_logged_since_the_stop() -> anyhow::Result<()> {
    let server = Server::new()?;
    server.make_unlogged()?;
    server.stop_and_start()?;
    ensure!(psql(&server.db, CACHED)?.starts_with("13334 "));
    server.kill()?;
    ensure!(psql(&server.db, "SELECT count(*) FROM cached")? == "0", "as a stock server's after a crash");
    psql(&server.db, "INSERT INTO cached VALUES (1, 'x')")?;
    server.stop_and_start()?;
    ensure!(psql(&server.db, "SELECT n FROM cached")? == "1");
    amcheck(&server.db)
}

#[test]
fn unlogged_contents_beyond_the_limit_begin_empty_and_the_stop_says_so() -> anyhow::Result<()> {
    let server = Server::new()?;
    let db = &server.db;
    psql(db, "CREATE SEQUENCE s")?;
    psql(db, "SELECT nextval('s')")?;
    // Their files are lengthened where they lie, which costs no disk.
    for table in ["a", "b"] {
        psql(db, &format!("CREATE UNLOGGED TABLE {table} (n int); INSERT INTO {table} VALUES (1)"))?;
        let path = psql(db, &format!("SELECT pg_relation_filepath('{table}')"))?;
        psql(db, &format!("CHECKPOINT; COPY (SELECT 1) TO PROGRAM 'truncate -s 600M {path}; cat > /dev/null'"))?;
    }
    let told = server.stop()?;
    ensure!(told.contains("unlogged relations hold 1200 MiB, more than 1024 MiB, and begin empty"), "{told}");
    server.start()?;
    ensure!(psql(db, "SELECT pg_relation_size('a') + (SELECT count(*) FROM b)")? == "0");
    ensure!(psql(db, "SELECT nextval('s')")? == "2", "sequences do not suffer from it");
    Ok(())
}

/// A database that is copied with its sequences logs nothing until they have used up what the original logged.
#[test]
fn sequences_of_a_database_made_from_a_template_do_not_step_back() -> anyhow::Result<()> {
    let server = Server::new()?;
    psql(&server.db, "CREATE DATABASE tpl")?;
    let (server_part, _) = server.db.rsplit_once('/').context("the path of a database")?;
    let other = |name: &str| format!("{server_part}/{name}");
    let tpl = other("tpl");
    psql(&tpl, "CREATE TABLE t (id serial PRIMARY KEY, word text)")?;
    psql(&tpl, "INSERT INTO t (word) SELECT 'a' FROM generate_series(1, 5)")?;
    psql(&tpl, "CHECKPOINT")?;
    psql(&server.db, "CREATE DATABASE cust TEMPLATE tpl")?;
    let cust = other("cust");
    for _ in 0..6 {
        psql(&cust, "INSERT INTO t (word) VALUES ('b')")?;
    }
    server.stop_and_start()?;
    psql(&cust, "INSERT INTO t (word) VALUES ('c')")?;
    let last = psql(&cust, "SELECT max(id) FROM t")?;
    ensure!(last == "12", "{last}");
    Ok(())
}

#[test]
fn no_sequence_gives_a_value_twice_whatever_is_stopped_and_killed() -> anyhow::Result<()> {
    let server = Server::new()?;
    let db = &server.db;
    psql(db, "CREATE SEQUENCE s; CREATE SEQUENCE c CACHE 5")?;
    let mut rng = SeededRng::new(7);
    let (mut given, mut cached): (BTreeSet<i64>, BTreeSet<i64>) = Default::default();
    for round in 0..24 {
        for _ in 0..rng.between(1, 4) {
            let sql = format!("SELECT nextval('s') FROM generate_series(1, {})", rng.between(1, 40));
            for (all, sql) in [(&mut given, sql.as_str()), (&mut cached, "SELECT nextval('c')")] {
                for value in psql(db, sql)?.lines() {
                    ensure!(all.insert(value.parse()?), "round {round}: {value} is given twice");
                }
            }
        }
        if rng.chance(500) { server.stop_and_start()? } else { server.kill()? }
    }
    Ok(())
}
