//! What the store acknowledged (`synchronous_commit = remote_apply`) outlives every machine: server, host and compute
//! are killed, their disks are never seen again, and another server goes on from the bucket.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::Value;
use varve_testbed::acknowledged::Writers;
use varve_testbed::dev::{Dev, amcheck, psql, signal};
use varve_testbed::minio::Minio;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const WRITTEN_MAX: Duration = Duration::from_secs(60);
/// How long objects may stay once layers cover them: a sweep is every 10 s.
const GONE_MAX: Duration = Duration::from_secs(60);

/// Kills everything of a server's machine at once.
fn lose_machine(dev: &mut Dev) -> anyhow::Result<()> {
    let computes = dev.json(&["compute", "list"])?;
    dev.kill()?;
    for compute in computes.as_array().into_iter().flatten() {
        for process in ["mount_pid", "pid"] {
            if let Some(pid) = compute[process].as_u64().and_then(|pid| u32::try_from(pid).ok()) {
                signal(pid, Signal::KILL);
            }
        }
    }
    Ok(())
}

/// Where a refused start says that the store's history ends.
fn end_of_store(dev: &Dev, branch: &str) -> anyhow::Result<String> {
    let said = dev.refused(&["compute", "start", branch])?;
    let (_, after) =
        said.split_once("--lsn ").with_context(|| format!("a start without its last compute names what to do, but said: {said}"))?;
    Ok(after.chars().take_while(|letter| letter.is_ascii_hexdigit() || *letter == '/').collect())
}

fn shipped(dev: &Dev) -> anyhow::Result<Value> {
    let output = dev.output(Command::new("curl").args(["-sS", &format!("{}/v1/server", dev.url())]))?;
    let server: Value = serde_json::from_slice(&output.stdout).context("JSON")?;
    Ok(server["store_acknowledgement"].clone())
}

#[test]
fn what_the_store_acknowledged_outlives_every_machine() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    let mut first = Dev::start_on(VARVE, Some(minio.url("lost")), minio.variables())?;
    let mut writers = Vec::new();
    for (tenant, commits) in [("safe", "remote_apply"), ("second", "remote_apply"), ("usual", "on")] {
        first.json(&["tenant", "create", tenant])?;
        let db = first.compute(&format!("{tenant}/main"), &[])?;
        psql(&db, &format!("ALTER DATABASE postgres SET synchronous_commit = {commits}"))?;
        writers.push((tenant, Writers::start(&db, 3)?));
    }
    for (_, writers) in &writers {
        writers.wait_for(60, WRITTEN_MAX)?;
    }
    lose_machine(&mut first)?;
    let acknowledged: Vec<_> = writers.into_iter().map(|(tenant, writers)| (tenant, writers.stop())).collect();

    let mut second = Dev::start_on(VARVE, Some(minio.url("lost")), minio.variables())?;
    for (tenant, acknowledged) in &acknowledged {
        let branch = format!("{tenant}/main");
        let end = end_of_store(&second, &branch)?;
        second.json(&["branch", "restore", &branch, "--lsn", &end])?;
        let db = second.compute(&branch, &[])?;
        if *tenant == "usual" {
            // What only the lost disks had is lost: at most what a quarter of a second and a put bring.
            let rows: u64 = psql(&db, "SELECT count(*) FROM acknowledged")?.parse()?;
            ensure!(rows > 0, "commits with 'on' reach the store soon, too");
        } else {
            acknowledged.check(&db)?;
        }
        amcheck(&db)?;
    }
    let found = shipped(&second)?;
    ensure!(found["by"] == "objects" && found["found_bytes"].as_u64() > Some(0), "WAL of the lost server was found: {found}");

    // A second loss, of the server that goes on: what it has taken over is its own by now.
    let mut writers = Vec::new();
    for tenant in ["safe", "second"] {
        // It runs already.
        let db = second.compute(&format!("{tenant}/main"), &[])?;
        let rows = psql(&db, "SELECT count(*) FROM acknowledged")?;
        psql(&db, "CREATE TABLE more (i int)")?;
        writers.push((tenant, rows));
    }
    lose_machine(&mut second)?;
    let third = Dev::start_on(VARVE, Some(minio.url("lost")), minio.variables())?;
    for (tenant, rows) in writers {
        let branch = format!("{tenant}/main");
        let end = end_of_store(&third, &branch)?;
        third.json(&["branch", "restore", &branch, "--lsn", &end])?;
        let db = third.compute(&branch, &[])?;
        let now = psql(&db, "SELECT (SELECT count(*) FROM acknowledged), (SELECT count(*) FROM more)")?;
        ensure!(now == format!("{rows}|0"), "{tenant} has {now} after its second loss, and had {rows} rows");
    }
    Ok(())
}

#[test]
fn a_host_that_has_nothing_more_lets_a_new_server_go_on() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    let mut dev = Dev::start_on(VARVE, Some(minio.url("host")), minio.variables())?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i")?;
    // So that the store has all that the compute's pg_wal has.
    psql(&db, "SET synchronous_commit = remote_apply; INSERT INTO t VALUES (0)")?;
    lose_machine(&mut dev)?;
    // The server's disk is lost, the host's is not: nobody has to say what to do.
    dev.wipe()?;
    dev.run()?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SELECT count(*) FROM t")? == "1001", "all that was acknowledged is there");
    psql(&db, "INSERT INTO t VALUES (-1)")?;
    ensure!(shipped(&dev)?["found_bytes"].as_u64() > Some(0), "the new server went on with what the store had");
    Ok(())
}

#[test]
fn objects_of_wal_go_when_layers_have_it_and_nothing_is_written_idle() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    let mut dev = Dev::start_on(VARVE, Some(minio.url("shared")), minio.variables())?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(100, WRITTEN_MAX)?;
    let acknowledged = writers.stop();
    dev.until("WAL to go to the store", WRITTEN_MAX, || {
        let shipped = shipped(&dev)?;
        Ok((shipped["objects"].as_u64() > Some(0) && shipped["wal_bytes"].as_u64() > Some(10_000)).then_some(()))
    })?;
    // The server dies, and what it had put is a former process's: it goes as well.
    dev.kill()?;
    dev.run()?;
    acknowledged.check(&db)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.until("layers to have the WAL", GONE_MAX, || Ok((shipped(&dev)?["held_objects"] == 0).then_some(())))?;
    let before = shipped(&dev)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(shipped(&dev)? == before, "nothing is written while nothing comes: {before}");
    dev.stop()?;
    dev.run()?;
    let store = minio.store("shared")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    dev.until("no WAL to be left in the bucket", GONE_MAX, || {
        let listed = runtime.block_on(store.list(&"wal".parse()?))?;
        // The first object of a run, which says that it has begun, stays.
        let left = listed.iter().filter(|listed| !listed.name.as_str().ends_with("/000000000000")).count();
        Ok((left == 0).then_some(()))
    })?;
    Ok(())
}

#[test]
fn over_a_folder_on_its_own_disk_nothing_is_written_twice() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "SET synchronous_commit = remote_apply; CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")?;
    let said = shipped(&dev)?;
    ensure!(said["by"] == "wal_log", "the server says what it means: {said}");
    let wal = std::path::Path::new(&dev.store()).join("wal");
    ensure!(!wal.exists(), "{} is not made", wal.display());
    Ok(())
}
