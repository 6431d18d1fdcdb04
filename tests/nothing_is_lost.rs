//! Every acknowledged commit is there, whatever is killed, frozen or wiped, and `pg_amcheck` is clean.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::Value;
use varve_testbed::acknowledged::Writers;
use varve_testbed::dev::{Dev, amcheck, free_port, program, psql, signal};
use varve_testbed::limit::Process;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const BACK_MAX: Duration = Duration::from_secs(60);

fn tenant_with_compute() -> anyhow::Result<(Dev, String)> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let port = free_port()?.to_string();
    let db = dev.compute("acme/main", &["--port", &port])?;
    Ok((dev, db))
}

fn compute(dev: &Dev) -> anyhow::Result<Value> {
    let list = dev.json(&["compute", "list"])?;
    list.as_array().and_then(|list| list.first()).cloned().context("a compute")
}

fn pid(compute: &Value, which: &str) -> anyhow::Result<u32> {
    compute[which].as_u64().and_then(|pid| pid.try_into().ok()).with_context(|| format!("{which} of {compute}"))
}

/// Kills `what` some times under load, and checks after each time and at the end.
fn survives(kill: impl Fn(&mut Dev, &str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let (mut dev, db) = tenant_with_compute()?;
    let writers = Writers::start(&db, 4)?;
    for _ in 0..3 {
        writers.wait_for(200, BACK_MAX)?;
        kill(&mut dev, &db)?;
        writers.wait_for(50, BACK_MAX).context("commits go on after the kill")?;
    }
    let acknowledged = writers.stop();
    // A Postgres whose mount was killed may go on for a moment with what it has in memory.
    std::thread::sleep(Duration::from_secs(3));
    acknowledged.check(&db)?;
    amcheck(&db)?;
    Ok(())
}

#[test]
fn the_postmaster_is_killed() -> anyhow::Result<()> {
    survives(|dev, _| {
        signal(pid(&compute(dev)?, "pid")?, Signal::KILL);
        Ok(())
    })
}

/// No start of it is the last one for that: what was killed says nothing about its next start.
#[test]
fn the_postmaster_is_killed_as_it_starts() -> anyhow::Result<()> {
    let (dev, db) = tenant_with_compute()?;
    psql(&db, "CREATE TABLE kept AS SELECT generate_series(1, 100) AS i")?;
    let mount = pid(&compute(&dev)?, "mount_pid")?;
    let postmaster = || Process::postmaster_below(mount).map(|process| process.pid);
    let mut killed = postmaster().context("a postmaster")?;
    signal(killed, Signal::KILL);
    for _ in 0..2 {
        killed = dev.until("the next postmaster", BACK_MAX, || Ok(postmaster().filter(|pid| *pid != killed)))?;
        signal(killed, Signal::KILL);
    }
    let found = dev.until("the compute to be back", BACK_MAX, || Ok(psql(&db, "SELECT count(*) FROM kept").ok()))?;
    ensure!(found == "100", "{found} rows of 100 are there");
    Ok(())
}

#[test]
fn a_backend_is_killed() -> anyhow::Result<()> {
    survives(|_, db| {
        // Its number is one of its sandbox's, so it is killed from inside.
        let backend = psql(db, "SELECT pid FROM pg_stat_activity WHERE query LIKE 'INSERT INTO acknowledged%' LIMIT 1")?;
        ensure!(backend.parse::<u32>().is_ok(), "a backend's pid: {backend}");
        // The session that kills it may not hear how that went.
        let _ = psql(db, &format!("COPY (SELECT) TO PROGRAM 'kill -9 {backend}'"));
        Ok(())
    })
}

#[test]
fn the_mount_is_killed() -> anyhow::Result<()> {
    survives(|dev, _| {
        signal(pid(&compute(dev)?, "mount_pid")?, Signal::KILL);
        Ok(())
    })
}

#[test]
fn the_pageserver_is_killed() -> anyhow::Result<()> {
    survives(|dev, _| {
        dev.kill()?;
        std::thread::sleep(Duration::from_millis(300));
        dev.run()
    })
}

#[test]
fn the_pageservers_disk_is_lost_after_a_clean_stop() -> anyhow::Result<()> {
    let (mut dev, db) = tenant_with_compute()?;
    let writers = Writers::start(&db, 4)?;
    writers.wait_for(500, BACK_MAX)?;
    let acknowledged = writers.stop();
    dev.json(&["branch", "create", "acme/child"])?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.stop()?;
    dev.wipe()?;
    dev.run()?;
    let db = dev.compute("acme/main", &[])?;
    acknowledged.check(&db)?;
    acknowledged.check(&dev.compute("acme/child", &[])?)?;
    amcheck(&db)?;
    Ok(())
}

#[test]
fn the_pageservers_disk_is_lost_while_computes_live() -> anyhow::Result<()> {
    let (mut dev, db) = tenant_with_compute()?;
    let writers = Writers::start(&db, 4)?;
    for _ in 0..2 {
        writers.wait_for(500, BACK_MAX)?;
        dev.kill()?;
        dev.wipe()?;
        dev.run()?;
        writers.wait_for(50, BACK_MAX).context("commits go on with the new pageserver")?;
    }
    let acknowledged = writers.stop();
    acknowledged.check(&db)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let db = dev.compute("acme/main", &[])?;
    acknowledged.check(&db)?;
    amcheck(&db)?;
    Ok(())
}

#[test]
fn two_computes_race_for_one_branch() -> anyhow::Result<()> {
    let (dev, db) = tenant_with_compute()?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(100, BACK_MAX)?;
    let started: Vec<Option<String>> = std::thread::scope(|scope| {
        let dev = &dev;
        let racers: Vec<_> = (0..4).map(|_| scope.spawn(move || dev.compute("acme/main", &[]).ok())).collect();
        racers.into_iter().map(|racer| racer.join().ok().flatten()).collect()
    });
    let acknowledged = writers.stop();
    ensure!(started.iter().any(Option::is_some), "one of the racers wins");
    let winner = compute(&dev)?["conninfo"].as_str().context("a conninfo")?.to_owned();
    acknowledged.check(&winner)?;
    amcheck(&winner)?;
    Ok(())
}

#[test]
fn a_frozen_compute_wakes_after_its_successor_wrote() -> anyhow::Result<()> {
    let (dev, db) = tenant_with_compute()?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(100, BACK_MAX)?;
    let old = compute(&dev)?;
    let (postmaster, mount) = (pid(&old, "pid")?, pid(&old, "mount_pid")?);
    let children = program("pgrep", &["-P", &postmaster.to_string()])?;
    let frozen: Vec<u32> = children.lines().filter_map(|line| line.parse().ok()).chain([postmaster, mount]).collect();
    frozen.iter().for_each(|pid| signal(*pid, Signal::STOP));
    let successor = dev.compute("acme/main", &["--replace"])?;
    psql(&successor, "CREATE TABLE by_the_successor AS SELECT generate_series(1, 1000) AS i")?;
    frozen.iter().for_each(|pid| signal(*pid, Signal::CONT));
    std::thread::sleep(Duration::from_secs(2));
    let acknowledged = writers.stop();
    acknowledged.check(&successor)?;
    ensure!(psql(&successor, "SELECT count(*) FROM by_the_successor")? == "1000", "what the successor wrote is there");
    let left: Vec<&u32> = frozen.iter().filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists()).collect();
    ensure!(left.is_empty(), "the frozen compute is gone, left are {left:?}");
    amcheck(&successor)?;
    Ok(())
}
