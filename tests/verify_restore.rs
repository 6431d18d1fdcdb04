//! Somebody proves that a restore works before it is needed: at a moment by chance, with everything that is in it
//! looked at, and with nothing left behind. Damage is told from what was only in the way.

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, program, psql};
use varve_testbed::postgres::is_skipped;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long something may take that happens by itself.
const SOON_MAX: Duration = Duration::from_secs(120);

fn find(root: &str, part: &str) -> anyhow::Result<Vec<PathBuf>> {
    let found = program("find", &[root, "-type", "f", "-path", part])?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// What a verification says, and its exit status.
fn verify(dev: &Dev, arguments: &[&str]) -> anyhow::Result<(Value, Option<i32>)> {
    let Output { status, stdout, stderr } = dev.cli(&[&["tenant", "verify-restore", "--json"], arguments].concat())?;
    let found = serde_json::from_slice(&stdout)
        .with_context(|| format!("expected a result, got {} ({status})", String::from_utf8_lossy(&stderr)))?;
    Ok((found, status.code()))
}

fn known(dev: &Dev, tenant: &str) -> anyhow::Result<Value> {
    Ok(dev.json(&["tenant", "show", tenant])?["restore_verification"].clone())
}

/// That nothing of a verification is there any more: no branch, no compute, no folder of one.
fn nothing_is_left(dev: &Dev, tenant: &str) -> anyhow::Result<()> {
    let branches = dev.json(&["branch", "list", tenant])?;
    let names: Vec<&str> = branches.as_array().context("branches")?.iter().filter_map(|branch| branch["name"].as_str()).collect();
    ensure!(names == ["main"], "expected main alone, got {names:?}");
    let computes = dev.json(&["compute", "list"])?;
    let of_others = |compute: &&Value| compute["branch"].as_str().is_some_and(|branch| branch.contains("verify_restore"));
    let left: Vec<&Value> = computes.as_array().context("computes")?.iter().filter(of_others).collect();
    ensure!(left.is_empty(), "computes are left: {left:?}");
    ensure!(known(dev, tenant)?["running"].is_null(), "something is under way");
    Ok(())
}

/// Folders of computes.
fn folders(dev: &Dev) -> anyhow::Result<Vec<String>> {
    let computes = dev.data().with_extension("computes").display().to_string();
    let found = program("find", &[&computes, "-mindepth", "1", "-maxdepth", "1", "-type", "d", "-regex", ".*/[0-9a-f]*"])?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// A tenant with some of everything that can be looked at, whose compute is stopped.
fn load(dev: &Dev) -> anyhow::Result<()> {
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "2", &db])?;
    psql(&db, "CREATE TABLE words AS SELECT i, ARRAY[i, i + 1] AS several, md5(i::text) AS word FROM generate_series(1, 20000) i")?;
    for index in ["USING gin (several)", "USING hash (word)", "USING brin (i)", "(lower(word))"] {
        psql(&db, &format!("CREATE INDEX ON words {index}"))?;
    }
    psql(&db, "CREATE TABLE long AS SELECT string_agg(md5(i::text), '') AS text FROM generate_series(1, 20000) i GROUP BY i % 10")?;
    psql(&db, "CREATE SEQUENCE numbers")?;
    psql(&db, "CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS one")?;
    psql(&db, "CREATE DATABASE second")?;
    // Nothing of ours may depend on what the tenant does to the extension, or to sessions.
    psql(&db, "CREATE SCHEMA \"Odd one\"; CREATE EXTENSION amcheck WITH SCHEMA \"Odd one\"")?;
    psql(&db, "ALTER DATABASE second SET default_transaction_read_only = on")?;
    psql(&db, "ALTER SYSTEM SET shared_buffers = '512MB'")?;
    program("pgbench", &["-n", "-c", "2", "-t", "200", &db])?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn a_sound_tenant() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    load(&dev)?;
    let before = dev.json(&["branch", "show", "acme/main"])?;
    ensure!(known(&dev, "acme")?["last"].is_null(), "it was never verified");
    let (found, status) = verify(&dev, &["acme", "--lsn", "head"])?;
    ensure!(found["outcome"] == "sound" && status == Some(0), "{found}");
    ensure!(found["databases"].as_u64() >= Some(3), "template1, postgres and second: {found}");
    ensure!(found["relations"].as_u64() > Some(500) && found["pages"].as_u64() > Some(4000), "all of them: {found}");
    ensure!(found["start_ms"].as_u64() > Some(0) && found["check_ms"].as_u64() > Some(0) && found["seed"].is_null(), "{found}");
    nothing_is_left(&dev, "acme")?;
    ensure!(known(&dev, "acme")?["last"] == found, "the result is kept: {}", known(&dev, "acme")?);
    // By chance, and by a number that says it again.
    let (by_chance, status) = verify(&dev, &["acme"])?;
    ensure!(by_chance["outcome"] == "sound" && status == Some(0), "{by_chance}");
    let seed = by_chance["seed"].as_u64().context("a number")?.to_string();
    let (again, _) = verify(&dev, &["acme", "--seed", &seed, "--branch", "main"])?;
    ensure!(again["lsn"] == by_chance["lsn"] && again["seed"] == by_chance["seed"], "{again} {by_chance}");
    let time = found["time"].as_str().context("a time")?.to_owned();
    let (at, _) = verify(&dev, &["acme", "--at", &time])?;
    ensure!(at["outcome"] == "sound", "{at}");
    nothing_is_left(&dev, "acme")?;
    ensure!(folders(&dev)?.is_empty(), "folders of computes are left: {:?}", folders(&dev)?);
    // The branch itself did not notice, and the extension that was made is not in it.
    let after = dev.json(&["branch", "show", "acme/main"])?;
    ensure!(after["last_lsn"] == before["last_lsn"], "{after}");
    let metrics = program("curl", &["-sS", &format!("{}/metrics", dev.url())])?;
    for line in ["varve_restore_verified_sound{tenant=\"acme\"} 1", "varve_restore_verifications_total{outcome=\"sound\"} 4"] {
        ensure!(metrics.contains(line), "expected {line} in {metrics}");
    }
    let told = String::from_utf8_lossy(&dev.cli(&["tenant", "show", "acme"])?.stdout).into_owned();
    ensure!(told.contains("sound: main at"), "{told}");
    Ok(())
}

#[test]
fn a_compute_that_runs_goes_on_meanwhile() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "1", &db])?;
    let mut load =
        std::process::Command::new("pgbench").args(["-n", "-c", "2", "-t", "2000", &db]).stdout(std::process::Stdio::null()).spawn()?;
    let (found, _) = verify(&dev, &["acme"])?;
    ensure!(load.wait()?.success(), "the load went on");
    ensure!(found["outcome"] == "sound", "{found}");
    ensure!(psql(&db, "SELECT count(*) FROM pg_extension WHERE extname = 'amcheck'")? == "0", "the branch has no extension of ours");
    nothing_is_left(&dev, "acme")
}

/// Flips a byte in the middle of each file.
fn spoil(files: &[PathBuf]) -> anyhow::Result<()> {
    ensure!(!files.is_empty(), "there is something to spoil");
    for file in files {
        let mut bytes = std::fs::read(file)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        std::fs::write(file, bytes)?;
    }
    Ok(())
}

/// A tenant of whose layers some are spoilt: `which` of them, by size.
fn damaged(which: impl Fn(Vec<PathBuf>) -> Vec<PathBuf>) -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    load(&dev)?;
    let id = dev.json(&["tenant", "show", "acme"])?["id"].as_str().context("an id")?.to_owned();
    dev.stop()?;
    dev.wipe()?;
    let mut layers = find(&dev.store(), &format!("*tenants/{id}/timelines/*/layers/*"))?;
    layers.sort_by_key(|path| path.metadata().map(|data| data.len()).unwrap_or(0));
    let spoilt = which(layers);
    spoil(&spoilt)?;
    dev.run()?;
    let (found, status) = verify(&dev, &["acme", "--lsn", "head"])?;
    ensure!(found["outcome"] == "damaged" && status == Some(3), "{found}");
    let problems = found["problems"].to_string();
    for path in &spoilt {
        let name = path.strip_prefix(dev.store())?.display().to_string();
        ensure!(problems.contains(&name), "expected {name} in {problems}");
    }
    nothing_is_left(&dev, "acme")?;
    ensure!(known(&dev, "acme")?["last"]["outcome"] == "damaged", "it is kept");
    let log = std::fs::read_to_string(dev.log())?;
    ensure!(log.lines().any(|line| line.contains("ERROR") && line.contains("acme") && line.contains("main")), "the log says so");
    let metrics = program("curl", &["-sS", &format!("{}/metrics", dev.url())])?;
    ensure!(metrics.contains("varve_restore_verified_damaged{tenant=\"acme\"} 1"), "{metrics}");
    Ok(())
}

#[test]
fn a_damaged_layer_is_damage() -> anyhow::Result<()> {
    // The largest has the blocks of tables; its compute starts.
    damaged(|mut layers| layers.split_off(layers.len() - 1))
}

#[test]
fn damage_that_keeps_postgres_from_starting_is_damage() -> anyhow::Result<()> {
    damaged(|layers| layers)
}

/// An index that does not have what its table has: each page is as Postgres wrote it, and passes every checksum.
const LYING_INDEX: &str = "CREATE FUNCTION f(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1'; \
                           CREATE TABLE g AS SELECT i FROM generate_series(1, 100) i; CREATE INDEX g_f ON g (f(i)); \
                           CREATE OR REPLACE FUNCTION f(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 1'";

fn on(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let dev = Dev::start_for(VARVE, major, &[])?;
    let version = major.number().to_string();
    dev.json(&["tenant", "create", "acme", "--pg-version", &version])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT i, ARRAY[i] AS several FROM generate_series(1, 1000) i")?;
    psql(&db, "CREATE INDEX ON t (i); CREATE INDEX ON t USING gin (several)")?;
    let (found, status) = verify(&dev, &["acme", "--lsn", "head"])?;
    ensure!(found["outcome"] == "sound" && status == Some(0), "{found}");
    psql(&db, LYING_INDEX)?;
    let (found, status) = verify(&dev, &["acme", "--lsn", "head"])?;
    ensure!(found["outcome"] == "damaged" && status == Some(3) && found["problems"].to_string().contains("public.g_f"), "{found}");
    nothing_is_left(&dev, "acme")
}

#[test]
fn what_every_checksum_passes_is_found_on_the_oldest_major() -> anyhow::Result<()> {
    on(Major::V14)
}

#[test]
fn what_every_checksum_passes_is_found_on_the_newest_major() -> anyhow::Result<()> {
    on(Major::V18)
}

#[test]
fn that_no_host_takes_it_is_no_damage() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    dev.stop()?;
    dev.set_arguments(&["--no-host"]);
    dev.run()?;
    let (found, status) = verify(&dev, &["acme"])?;
    ensure!(found["outcome"] == "failed" && status == Some(1), "{found}");
    ensure!(found["problems"].to_string().contains("no host"), "{found}");
    nothing_is_left(&dev, "acme")?;
    let told = String::from_utf8_lossy(&dev.cli(&["tenant", "show", "acme"])?.stdout).into_owned();
    ensure!(told.contains("the data is not in question"), "{told}");
    Ok(())
}

#[test]
fn a_server_that_was_killed_leaves_nothing() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    load(&dev)?;
    // At once, and while it checks.
    for step in ["starting", "checking"] {
        let begun = dev.json(&["tenant", "verify-restore", "acme", "--no-wait"])?;
        let refused = dev.refused(&["tenant", "verify-restore", "acme"])?;
        ensure!(refused.contains("is being verified already"), "{refused}");
        dev.until("the step at which it is killed", SOON_MAX, || {
            let known = known(&dev, "acme")?;
            ensure!(!known["running"].is_null(), "it was over too soon: {known}");
            Ok((known["running"]["step"] == step).then_some(()))
        })?;
        dev.kill()?;
        let left = begun["temporary"].as_str().context("a branch")?;
        ensure!(left.starts_with("verify_restore_"), "{left}");
        dev.run()?;
        dev.until("nothing to be left of it", SOON_MAX, || Ok(nothing_is_left(&dev, "acme").is_ok().then_some(())))?;
        let last = known(&dev, "acme")?["last"].clone();
        ensure!(last["outcome"] == "failed" && last["begun_at"] == begun["begun_at"], "{last}");
        dev.until("its folder to be gone", SOON_MAX, || Ok(folders(&dev)?.is_empty().then_some(())))?;
    }
    let (found, _) = verify(&dev, &["acme"])?;
    ensure!(found["outcome"] == "sound", "{found}");
    Ok(())
}

#[test]
fn it_happens_by_itself() -> anyhow::Result<()> {
    let dev = Dev::start_for(VARVE, Major::V15, &["--idle-seconds", "1", "--verify-restore", "3s"])?;
    for tenant in ["acme", "quiet", "off"] {
        dev.json(&["tenant", "create", tenant])?;
    }
    dev.json(&["tenant", "set", "off", "--verify-restore", "off"])?;
    dev.json(&["tenant", "set", "quiet", "--verify-restore", "2s"])?;
    let verified = |tenant: &str| {
        dev.until("a tenant to be verified", SOON_MAX, || {
            let last = known(&dev, tenant)?["last"].clone();
            Ok((!last.is_null()).then_some(last))
        })
    };
    for tenant in ["acme", "quiet"] {
        let last = verified(tenant)?;
        ensure!(last["outcome"] == "sound" && last["seed"].is_u64(), "{last}");
    }
    // Nothing has changed, so nobody is woken again; a tenant that is off never was.
    let before = (known(&dev, "acme")?["last"].clone(), known(&dev, "quiet")?["last"].clone());
    std::thread::sleep(Duration::from_secs(8));
    ensure!(before == (known(&dev, "acme")?["last"].clone(), known(&dev, "quiet")?["last"].clone()), "verified though nothing changed");
    ensure!(known(&dev, "off")?["last"].is_null(), "it is off");
    // Once it has changed, it is verified again.
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS one")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.until("what changed to be verified", SOON_MAX, || {
        let last = known(&dev, "acme")?["last"].clone();
        Ok((last["begun_at"] != before.0["begun_at"] && last["outcome"] == "sound").then_some(()))
    })?;
    // Its schedule goes with the tenant.
    let shown = dev.json(&["tenant", "set", "quiet", "--verify-restore", "default"])?;
    ensure!(shown["restore_verification"]["every_seconds"].is_null(), "{shown}");
    Ok(())
}

#[test]
fn what_cannot_be_is_refused() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    for (arguments, words) in [
        (&["nobody"][..], "there is no tenant 'nobody'"),
        (&["acme", "--branch", "nothing"], "has no branch 'nothing'"),
        (&["acme", "--lsn", "F/0"], "in the future"),
        (&["acme", "--lsn", "0/1"], "0/1"),
        (&["acme", "--lsn", "what"], "lsn"),
        (&["acme", "--at", "yesterday"], "is not a time"),
        (&["acme", "--at", "2999-01-01T00:00:00Z"], "in the future"),
        (&["acme", "--seed", "1", "--lsn", "head"], "cannot be used with"),
        (&["acme", "--seed", "x"], "invalid value"),
    ] {
        let refused = dev.refused(&[&["tenant", "verify-restore"], arguments].concat())?;
        ensure!(refused.contains(words), "{arguments:?}: expected {words}, got {refused}");
    }
    for (value, words) in [("0s", "a second is the least"), ("often", "write 7d"), ("200000d", "verify_restore_seconds")] {
        let refused = dev.refused(&["tenant", "set", "acme", "--verify-restore", value])?;
        ensure!(refused.contains(words), "{value}: expected {words}, got {refused}");
    }
    let both = r#"{"seed": 1, "lsn": "0/1"}"#;
    let url = format!("{}/v1/tenants/acme/restore-verification", dev.url());
    let answer = program("curl", &["-sS", "-H", "Content-Type: application/json", "-d", both, &url])?;
    ensure!(answer.contains("invalid_argument"), "{answer}");
    nothing_is_left(&dev, "acme")?;
    ensure!(known(&dev, "acme")?["last"].is_null(), "nothing was begun");
    Ok(())
}
