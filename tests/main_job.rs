//! From a running Postgres to a branch that you can query: what the README promises, through the CLI, on the local
//! folder.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use varve_postgres::Major;
use varve_testbed::dev::{Dev, free_port, program, psql};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");

fn now_of(db: &str) -> anyhow::Result<String> {
    psql(db, "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
}

#[test]
fn a_dropped_table_comes_back_on_a_branch_and_in_place() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "2", &db])?;
    program("pgbench", &["-c", "2", "-t", "200", &db])?;
    let rows = psql(&db, "SELECT count(*), sum(abalance) FROM pgbench_accounts")?;
    std::thread::sleep(Duration::from_millis(20));
    let moment = now_of(&db)?;
    std::thread::sleep(Duration::from_millis(20));
    psql(&db, "DROP TABLE pgbench_accounts")?;
    psql(&db, "CREATE TABLE later (i int)")?;

    let branch = dev.json(&["branch", "create", "acme/before", "--at", &moment])?;
    ensure!(branch["parent"] == "main", "the branch's parent is main, got {branch}");
    let branch_db = dev.compute("acme/before", &[])?;
    let found = psql(&branch_db, "SELECT count(*), sum(abalance) FROM pgbench_accounts")?;
    ensure!(found == rows, "the branch holds {rows}, got {found}");

    // Parent and child change independently.
    psql(&branch_db, "UPDATE pgbench_accounts SET abalance = 7 WHERE aid <= 10")?;
    psql(&db, "INSERT INTO later VALUES (1)")?;
    ensure!(psql(&branch_db, "SELECT to_regclass('later') IS NULL")? == "t", "what the parent did later is not on the branch");

    dev.json(&["branch", "restore", "acme/main", "--at", &moment])?;
    let found = psql(&db, "SELECT count(*), sum(abalance) FROM pgbench_accounts")?;
    ensure!(found == rows, "after the restore, on the same port, main holds {rows}, got {found}");
    psql(&db, "INSERT INTO pgbench_history SELECT 1, 1, 1, 1, now()")?;
    let branches = dev.json(&["branch", "list", "acme"])?;
    let names: Vec<&str> = branches.as_array().context("a list")?.iter().filter_map(|b| b["name"].as_str()).collect();
    let old = names.iter().find(|name| name.starts_with("main_before_")).context("the old history stays as a branch")?;
    let old_db = dev.compute(&format!("acme/{old}"), &[])?;
    ensure!(psql(&old_db, "SELECT count(*) FROM later")? == "1", "the old history holds what was written last");
    Ok(())
}

#[test]
fn head_holds_every_commit_acknowledged_before_the_call() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t (i int)")?;
    let mut parent = "main".to_owned();
    for i in 0..8 {
        psql(&db, &format!("INSERT INTO t VALUES ({i})"))?;
        let name = format!("b{i}");
        dev.json(&["branch", "create", &format!("acme/{name}"), "--lsn", "head"])?;
        let db = dev.compute(&format!("acme/{name}"), &[])?;
        let n = psql(&db, "SELECT count(*) FROM t")?;
        ensure!(n == (i + 1).to_string(), "branch {name} holds {} rows, got {n}", i + 1);
        if i == 3 {
            psql(&db, "INSERT INTO t VALUES (100)")?;
            parent = name;
        }
    }
    // A branch of a branch.
    dev.json(&["branch", "create", "acme/grandchild", "--from", &parent])?;
    let db = dev.compute("acme/grandchild", &[])?;
    ensure!(psql(&db, "SELECT count(*) FROM t WHERE i = 100")? == "1", "a branch of a branch holds the branch's own rows");
    let deleted = format!("acme/{parent}");
    ensure!(dev.refused(&["branch", "delete", &deleted])?.contains("--yes"), "nothing is deleted without a question");
    // Its history stays as long as the grandchild stands on it.
    dev.json(&["branch", "delete", &deleted, "--yes"])?;
    ensure!(psql(&db, "SELECT count(*) FROM t WHERE i = 100")? == "1", "a child goes on when its parent's name is gone");
    dev.json(&["compute", "stop", "acme/grandchild"])?;
    let db = dev.compute("acme/grandchild", &[])?;
    ensure!(psql(&db, "SELECT count(*) FROM t WHERE i = 100")? == "1", "and so it does from the store");
    ensure!(dev.refused(&["branch", "show", &deleted])?.contains(&parent), "the name is gone");
    let parent = "grandchild";
    dev.json(&["branch", "rename", &format!("acme/{parent}"), "kept"])?;
    ensure!(dev.json(&["branch", "show", "acme/kept"])?["name"] == "kept", "a renamed branch is found under its new name");
    Ok(())
}

#[test]
fn a_compute_of_the_past_is_thrown_away() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let lsn = psql(&db, "SELECT pg_current_wal_lsn()")?;
    psql(&db, "DROP TABLE t")?;
    let past = dev.compute("acme/main", &["--lsn", &lsn])?;
    ensure!(psql(&past, "SELECT i FROM t")? == "1", "the past shows the table");
    psql(&past, "INSERT INTO t VALUES (2)")?;
    ensure!(psql(&db, "SELECT to_regclass('t') IS NULL")? == "t", "what it writes does not reach the branch");
    let again = dev.compute("acme/main", &["--lsn", &lsn])?;
    ensure!(psql(&again, "SELECT count(*) FROM t")? == "1", "what a throw-away compute wrote is gone");
    Ok(())
}

#[test]
fn settings_statistics_and_port_outlive_a_compute() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let port = free_port()?.to_string();
    let db = dev.compute("acme/main", &["--port", &port])?;
    ensure!(db.contains(&format!(":{port}/")), "the compute listens on the port that was asked for: {db}");
    psql(&db, "ALTER SYSTEM SET work_mem = '7MB'")?;
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 1000) i")?;
    psql(&db, "SELECT count(*) FROM t")?;
    psql(&db, "SELECT pg_stat_force_next_flush()")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW work_mem")? == "7MB", "ALTER SYSTEM outlives the compute");
    let scans = psql(&db, "SELECT seq_scan >= 1 FROM pg_stat_user_tables WHERE relname = 't'")?;
    ensure!(scans == "t", "statistics outlive the compute, got {scans}");
    Ok(())
}

#[test]
fn a_running_compute_is_left_alone_unless_it_is_to_be_replaced() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let first = dev.compute("acme/main", &[])?;
    psql(&first, "CREATE TABLE t AS SELECT 1 AS i")?;
    let started = "SELECT pg_postmaster_start_time()";
    let before = psql(&first, started)?;
    ensure!(dev.compute("acme/main", &[])? == first, "who starts it again is given what runs");
    ensure!(psql(&first, started)? == before, "and nothing was restarted for that");
    let refused = dev.refused(&["compute", "start", "acme/main", "--port", &varve_testbed::dev::free_port()?.to_string()])?;
    ensure!(refused.contains("--replace"), "another port needs another server: {refused}");
    ensure!(psql(&first, started)? == before, "a refusal ends nothing");
    let second = dev.compute("acme/main", &["--replace"])?;
    ensure!(second == first, "an endpoint keeps its address: {first} became {second}");
    ensure!(psql(&second, started)? != before, "it is another server");
    ensure!(psql(&second, "SELECT i FROM t")? == "1", "which sees what the first committed");
    psql(&second, "INSERT INTO t VALUES (2)")?;
    let list = dev.json(&["compute", "list"])?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 1), "one compute is left, got {list}");
    Ok(())
}

#[test]
fn tenants_are_apart_and_go_with_all_that_is_theirs() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let one = dev.json(&["tenant", "create", "one"])?;
    let two = dev.json(&["tenant", "create", "two", "--pg-version", "15"])?;
    ensure!(one["system_identifier"] != two["system_identifier"], "each tenant has its own system identifier");
    let (db1, db2) = (dev.compute("one/main", &[])?, dev.compute("two/main", &[])?);
    psql(&db1, "CREATE TABLE only_one (i int)")?;
    ensure!(psql(&db2, "SELECT to_regclass('only_one') IS NULL")? == "t", "tenants do not see each other's tables");
    let password_of_two = db2.split([':', '@']).nth(2).context("a password in the URI")?;
    let password_of_one = db1.split([':', '@']).nth(2).context("a password in the URI")?;
    let stranger = db1.replace(password_of_one, password_of_two);
    ensure!(psql(&stranger, "SELECT 1").is_err(), "one tenant's password does not open another's database");
    let identifier = psql(&db1, "SELECT system_identifier FROM pg_control_system()")?;
    ensure!(one["system_identifier"] == identifier.as_str(), "Postgres says system identifier {identifier}, the API {one}");
    let refused = dev.refused(&["tenant", "delete", "one"])?;
    ensure!(refused.contains("--yes"), "without a terminal, delete asks for --yes: {refused}");
    dev.json(&["tenant", "delete", "one", "--yes"])?;
    ensure!(psql(&db1, "SELECT 1").is_err(), "its computes stop");
    let tenants = dev.json(&["tenant", "list"])?;
    ensure!(tenants.as_array().is_some_and(|list| list.len() == 1), "one tenant is left, got {tenants}");
    let id = one["id"].as_str().context("an id")?;
    let left = program("find", &[&dev.store(), "-path", &format!("*{id}*"), "-type", "f", "-size", "+1k"])?;
    ensure!(left.is_empty(), "its objects go, left are:\n{left}");
    dev.json(&["tenant", "create", "one"])?;
    Ok(())
}

#[test]
fn a_list_says_where_branches_end_and_how_large_they_are_also_after_a_restart() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    dev.json(&["branch", "create", "acme/empty"])?;
    let size = "SELECT pg_size_bytes('1MB') < (SELECT sum(pg_relation_size(oid)) FROM pg_class)";
    psql(&db, "CREATE TABLE t AS SELECT i, repeat('x', 500) AS a FROM generate_series(1, 20000) i")?;
    ensure!(psql(&db, size)? == "t", "the table has its size");
    dev.json(&["branch", "create", "acme/full"])?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let of = |dev: &Dev, name: &str| -> anyhow::Result<(String, u64)> {
        let list = dev.json(&["branch", "list", "acme"])?;
        let branch = list.as_array().context("a list")?.iter().find(|branch| branch["name"] == name).context("the branch")?.clone();
        let bytes = branch["size_bytes"].as_u64().with_context(|| format!("expected a size of {branch}"))?;
        Ok((branch["last_lsn"].as_str().unwrap_or_default().to_owned(), bytes))
    };
    let mut before = Vec::new();
    // Sizes are measured in the background.
    dev.until("the later branch to be larger by the table", Duration::from_secs(60), || {
        before = ["main", "empty", "full"].into_iter().filter_map(|name| of(&dev, name).ok()).collect();
        Ok((before.len() == 3 && before[2].1 > before[1].1 + 8_000_000).then_some(()))
    })?;
    dev.stop()?;
    dev.run()?;
    let after = vec![of(&dev, "main")?, of(&dev, "empty")?, of(&dev, "full")?];
    ensure!(after == before, "expected the list of before the restart, {before:?}, got {after:?}");
    Ok(())
}

#[test]
fn a_commit_that_waits_for_the_store_does_not_wait_long_and_is_there() -> anyhow::Result<()> {
    // Without being told so a server whose store is on its own disk takes the WAL log for the store.
    let mut dev = Dev::start_for(VARVE, Major::V15, &["--wal-to-store", "always"])?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t (i int)")?;
    let begun = std::time::Instant::now();
    for i in 0..5 {
        psql(&db, &format!("SET synchronous_commit = remote_apply; INSERT INTO t VALUES ({i})"))?;
    }
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(8), "five commits that wait for the store took {took:?}; without being seen each waits ten seconds");
    let lsn = psql(&db, "SELECT max(replay_lsn) FROM pg_stat_replication")?;
    // Both machines are lost: the compute's and the pageserver's disks.
    dev.json(&["compute", "list"])?.as_array().context("a list")?.iter().for_each(|compute| {
        for pid in ["pid", "mount_pid"] {
            varve_testbed::dev::signal(compute[pid].as_u64().unwrap_or_default() as u32, rustix::process::Signal::KILL);
        }
    });
    dev.kill()?;
    dev.wipe()?;
    std::fs::remove_dir_all(format!("{}.computes", dev.data().display())).ok();
    dev.run()?;
    dev.json(&["branch", "create", "acme/after", "--lsn", &lsn])?;
    let after = dev.compute("acme/after", &[])?;
    ensure!(psql(&after, "SELECT count(*) FROM t")? == "5", "what the store had acknowledged is there");
    // What only the lost compute had is given up when somebody says so.
    dev.json(&["branch", "restore", "acme/main", "--lsn", &lsn])?;
    let main = dev.compute("acme/main", &[])?;
    ensure!(psql(&main, "SELECT count(*) FROM t")? == "5", "main goes on with what the store had");
    Ok(())
}
