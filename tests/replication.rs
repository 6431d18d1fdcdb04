//! Logical and physical replication from and to computes, through all that ends them: what a tenant asks for of
//! `wal_level` holds, slots stay where stock Postgres's stay, and neither side loses a row.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, free_port, psql, signal};
use varve_testbed::limit::{self, COMMAND_MAX};
use varve_testbed::postgres::Postgres;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long what was sent may take to arrive, and a compute to be back.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);

/// How long a subscriber has to apply, and to report, while its server is away.
const APPLY_WAIT: Duration = Duration::from_secs(3);

/// What ends a compute.
#[derive(Clone, Copy, Debug)]
enum End {
    /// It is stopped, and started again.
    Stop,
    /// Its Postgres is killed.
    Postmaster,
    /// Its process is killed, and its Postgres with it.
    Process,
    /// The server is killed, and comes back; the compute runs on.
    Server,
}

const ENDS: [End; 4] = [End::Stop, End::Postmaster, End::Process, End::Server];

/// A branch with a compute.
struct Branch {
    dev: Dev,
    db: String,
    port: String,
}

impl Branch {
    fn new() -> anyhow::Result<Branch> {
        Branch::on(Dev::start(VARVE)?)
    }

    fn on(dev: Dev) -> anyhow::Result<Branch> {
        dev.json(&["tenant", "create", "acme"])?;
        let port = free_port()?.to_string();
        let db = dev.compute("acme/main", &["--port", &port])?;
        Ok(Branch { dev, db, port })
    }

    fn sql(&self, sql: &str) -> anyhow::Result<String> {
        psql(&self.db, sql)
    }

    fn restart(&self) -> anyhow::Result<()> {
        self.dev.json(&["compute", "stop", "acme/main"])?;
        self.dev.compute("acme/main", &["--port", &self.port]).map(drop)
    }

    /// Ends the compute, and waits until it answers again.
    fn end(&mut self, end: End) -> anyhow::Result<()> {
        let list = self.dev.json(&["compute", "list"])?;
        let pid =
            |which: &str| list[0][which].as_u64().and_then(|pid| u32::try_from(pid).ok()).with_context(|| format!("{which} of {list}"));
        match end {
            End::Stop => return self.restart(),
            End::Postmaster => signal(pid("pid")?, Signal::KILL),
            End::Process => signal(pid("mount_pid")?, Signal::KILL),
            End::Server => {
                self.dev.kill()?;
                self.dev.run()?;
            }
        }
        let old = pid("pid")?.to_string();
        self.dev.until(&format!("the compute to be back after {end:?}"), ARRIVAL_MAX, || {
            // Not the one that is about to die.
            let again = matches!(end, End::Server) || self.postmaster()?.is_some_and(|pid| pid != old);
            Ok((again && self.sql("SELECT 1").is_ok()).then_some(()))
        })
    }

    fn postmaster(&self) -> anyhow::Result<Option<String>> {
        let list = self.dev.json(&["compute", "list"])?;
        Ok(list[0]["pid"].as_u64().map(|pid| pid.to_string()))
    }

    /// Its slots but ours.
    fn slots(&self) -> anyhow::Result<String> {
        self.sql("SELECT string_agg(slot_name || ' ' || slot_type, ', ' ORDER BY slot_name) FROM pg_replication_slots WHERE slot_name <> 'varve'")
    }
}

/// Asks one of two servers.
type Ask<'a> = &'a mut dyn FnMut(&str) -> anyhow::Result<String>;

/// Waits until both have the same rows of table `t`, of which there are so many.
fn equal(what: &str, rows: usize, ask: [Ask<'_>; 2]) -> anyhow::Result<()> {
    let sql = "SELECT count(*) || ' ' || coalesce(sum(hashtext(t::text)), 0) FROM t";
    let [one, other] = ask;
    let mut seen = String::new();
    let waited = limit::until(&format!("both to have {rows} rows {what}"), ARRIVAL_MAX, None, || {
        let both = [one(sql)?, other(sql)?];
        seen = both.join(", ");
        Ok((both[0].trim() == both[1].trim() && both[0].starts_with(&format!("{rows} "))).then_some(()))
    });
    waited.with_context(|| format!("they have: {seen}"))
}

fn insert(from: usize, rows: usize) -> String {
    format!("INSERT INTO t SELECT n, md5(n::text) FROM generate_series({from}, {}) n", from + rows - 1)
}

#[test]
fn what_a_tenant_asks_for_of_wal_holds_after_a_restart() -> anyhow::Result<()> {
    let branch = Branch::new()?;
    let shown = || {
        branch.sql("SELECT string_agg(setting, ' ' ORDER BY name) FROM pg_settings WHERE name IN ('wal_level', 'max_wal_senders', 'max_replication_slots')")
    };
    ensure!(shown()? == "11 14 replica", "{}", shown()?);
    for (asked, expected) in [
        (
            "ALTER SYSTEM SET wal_level = logical; ALTER SYSTEM SET max_wal_senders = 25; ALTER SYSTEM SET max_replication_slots = 30",
            "31 29 logical",
        ),
        (
            "ALTER SYSTEM SET wal_level = minimal; ALTER SYSTEM SET max_wal_senders = 0; ALTER SYSTEM SET max_replication_slots = 0",
            "11 14 replica",
        ),
        ("ALTER SYSTEM RESET ALL", "11 14 replica"),
    ] {
        asked.split("; ").try_for_each(|one| branch.sql(one).map(drop))?;
        branch.restart()?;
        ensure!(shown()? == expected, "after {asked}: {}", shown()?);
        branch.sql("CREATE TABLE IF NOT EXISTS t (id int)")?;
    }
    Ok(())
}

/// All of a tenant's walsenders, and more: ours come through.
#[test]
fn walsenders_of_a_tenant_do_not_keep_ours_out() -> anyhow::Result<()> {
    let mut branch = Branch::new()?;
    branch.sql("CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    let folder = tempfile::tempdir()?;
    let mut senders = Vec::new();
    for i in 0..20 {
        let mut command = std::process::Command::new("/usr/lib/postgresql/15/bin/pg_receivewal");
        let dir = folder.path().join(i.to_string());
        std::fs::create_dir(&dir)?;
        command.args(["-d", &branch.db, "-D"]).arg(&dir).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        senders.push(command.spawn().context("pg_receivewal")?);
    }
    let outcome =
        (|| {
            let count = "SELECT count(*) FROM pg_stat_replication WHERE usename <> 'varve'";
            branch
                .dev
                .until("the tenant to have his walsenders and no more", ARRIVAL_MAX, || Ok((branch.sql(count)? == "10").then_some(())))?;
            // Both need ours: a server that comes back, and a compute that does.
            for end in [End::Server, End::Postmaster] {
                branch.end(end)?;
                branch.sql(&format!("SET statement_timeout = '50s'; INSERT INTO t VALUES ({}, 'x')", end as u8))?;
            }
            Ok(())
        })();
    for mut sender in senders {
        sender.kill()?;
        sender.wait()?;
    }
    outcome
}

#[test]
fn a_stock_subscriber_follows_a_compute_through_all_its_ends() -> anyhow::Result<()> {
    let mut branch = Branch::new()?;
    branch.sql("ALTER SYSTEM SET wal_level = logical")?;
    branch.restart()?;
    branch.sql("CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    branch.sql("CREATE PUBLICATION p FOR TABLE t")?;
    branch.sql("SELECT pg_create_physical_replication_slot('mine', true)")?;
    let mut subscriber = Postgres::init(Major::V15, &[], &[])?;
    subscriber.start()?;
    subscriber.psql("postgres", "CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    subscriber.psql("postgres", &format!("CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p", branch.db))?;
    let slots = "mine physical, s logical";
    let mut rows = 0;
    let more = |branch: &Branch, rows: &mut usize| -> anyhow::Result<()> {
        branch.sql(&insert(*rows, 100))?;
        *rows += 100;
        Ok(())
    };
    for end in ENDS {
        // Some arrives before the end, some was written while nobody listened, some comes afterwards.
        more(&branch, &mut rows)?;
        equal("at once", rows, [&mut |sql| branch.sql(sql), &mut |sql| subscriber.psql("postgres", sql)])?;
        subscriber.psql("postgres", "ALTER SUBSCRIPTION s DISABLE")?;
        more(&branch, &mut rows)?;
        // What came before the last end is in layers by now, and the WAL log has let go of it.
        branch.sql("CREATE TABLE IF NOT EXISTS other (i int); INSERT INTO other VALUES (1)")?;
        branch.end(end)?;
        ensure!(branch.slots()? == slots, "after {end:?}: {}", branch.slots()?);
        more(&branch, &mut rows)?;
        subscriber.psql("postgres", "ALTER SUBSCRIPTION s ENABLE")?;
        let what = format!("after {end:?}");
        equal(&what, rows, [&mut |sql| branch.sql(sql), &mut |sql| subscriber.psql("postgres", sql)])?;
    }
    // A branch, and a restore, begin without them.
    branch.dev.json(&["branch", "create", "acme/child"])?;
    let child = branch.dev.compute("acme/child", &[])?;
    ensure!(psql(&child, "SELECT count(*) FROM pg_replication_slots WHERE slot_name <> 'varve'")? == "0", "a child has no slots");
    ensure!(psql(&child, "SHOW wal_level")? == "logical", "but its parent's settings");
    ensure!(psql(&child, "SELECT count(*) FROM t")? == rows.to_string(), "and its rows");
    // A slot that decodes keeps the level, whatever is asked for; without it, it goes.
    branch.sql("ALTER SYSTEM SET wal_level = replica")?;
    branch.restart()?;
    ensure!(branch.sql("SHOW wal_level")? == "logical", "a slot that decodes is there");
    subscriber.psql("postgres", "DROP SUBSCRIPTION s")?;
    branch.restart()?;
    ensure!(branch.sql("SHOW wal_level")? == "replica" && branch.slots()? == "mine physical", "{}", branch.slots()?);
    Ok(())
}

#[test]
fn a_compute_that_subscribes_loses_nothing_through_all_its_ends() -> anyhow::Result<()> {
    // From its own network nothing leads out to a publisher.
    let mut branch = Branch::on(Dev::start_for(VARVE, Major::V15, &["--compute-network", "host"])?)?;
    let port = free_port()?.to_string();
    // A compute may see no socket of another's.
    let settings = [("wal_level", "logical"), ("port", &*port), ("listen_addresses", "'127.0.0.1'")];
    let mut publisher = Postgres::init(Major::V15, &[], &settings)?;
    publisher.start()?;
    let address = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let publish = |sql: &str| psql(&address, sql);
    publish("CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    publish("CREATE PUBLICATION p FOR TABLE t")?;
    branch.sql("CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    branch.sql(&format!("CREATE SUBSCRIPTION s CONNECTION '{address}' PUBLICATION p"))?;
    let reported = || {
        // What the publisher was told it need not keep is what could be lost.
        let confirmed = "SELECT confirmed_flush_lsn >= pg_current_wal_lsn() FROM pg_replication_slots";
        limit::until("the subscriber to report", ARRIVAL_MAX, None, || Ok((publish(confirmed)? == "t").then_some(())))
    };
    let mut rows = 0;
    for end in ENDS {
        for _ in 0..2 {
            publish(&insert(rows, 100))?;
            rows += 100;
        }
        reported()?;
        branch.end(end)?;
        equal(&format!("after {end:?}"), rows, [&mut |sql| publish(sql), &mut |sql| branch.sql(sql)])?;
    }
    // While no server takes its WAL, what it applies is in its host's pg_wal alone. Whether it reports that or not,
    // nothing of it is lost.
    for which in ["pid", "mount_pid"] {
        let pid = branch.dev.until("the compute to be attached", ARRIVAL_MAX, || {
            Ok(branch.dev.json(&["compute", "list"])?[0][which].as_u64().and_then(|pid| u32::try_from(pid).ok()))
        })?;
        branch.dev.kill()?;
        publish(&insert(rows, 10))?;
        rows += 10;
        std::thread::sleep(APPLY_WAIT);
        signal(pid, Signal::KILL);
        branch.dev.run()?;
        branch.dev.until("the compute to answer", ARRIVAL_MAX, || Ok(branch.sql("SELECT 1").is_ok().then_some(())))?;
        equal(&format!("after the server and {which}"), rows, [&mut |sql| publish(sql), &mut |sql| branch.sql(sql)])?;
    }
    Ok(())
}

#[test]
fn a_stock_standby_follows_a_compute_through_its_stops() -> anyhow::Result<()> {
    let mut branch = Branch::new()?;
    branch.sql("CREATE TABLE t (id int PRIMARY KEY, word text)")?;
    branch.sql("SELECT pg_create_physical_replication_slot('standby', true)")?;
    let mut standby = Postgres::bare(Major::V15)?;
    let data = standby.data_dir();
    let mut backup = standby.command("pg_basebackup")?;
    backup.args(["-d", &branch.db, "-X", "stream", "-R", "-S", "standby", "--no-sync", "-D"]).arg(&data);
    ensure!(limit::status(&mut backup, COMMAND_MAX, None)?.success(), "pg_basebackup from the compute failed");
    standby.configure(&[("hot_standby", "on")])?;
    standby.start()?;
    let password = branch.db.split([':', '@']).nth(2).context("a password in the URI")?;
    let copy = format!("{} password={password}", standby.conninfo("postgres"));
    let mut rows = 0;
    for end in [End::Stop, End::Postmaster, End::Stop] {
        for _ in 0..2 {
            branch.sql(&insert(rows, 100))?;
            rows += 100;
        }
        equal("at once", rows, [&mut |sql| branch.sql(sql), &mut |sql| psql(&copy, sql)])?;
        branch.end(end)?;
        branch.sql(&insert(rows, 100))?;
        rows += 100;
        equal(&format!("after {end:?}"), rows, [&mut |sql| branch.sql(sql), &mut |sql| psql(&copy, sql)])?;
        // It recovers from what it was sent, from before the compute's start on.
        standby.stop("immediate")?;
        standby.start()?;
        equal("after its own crash", rows, [&mut |sql| branch.sql(sql), &mut |sql| psql(&copy, sql)])?;
    }
    ensure!(Path::new(&data).exists(), "the standby's folder stays");
    Ok(())
}
