//! `varve scrub` says of each object of a store whether it is sound, names what is not, and leaves servers alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, program, psql};
use varve_testbed::minio::Minio;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long a pass of a small store may take in the background.
const PASS_MAX: Duration = Duration::from_secs(120);

/// What a scrub says, and whether its exit status says that all is sound.
fn scrub(dev: &Dev, arguments: &[&str]) -> anyhow::Result<(Value, bool)> {
    let output = dev.output(Command::new(VARVE).args(["scrub", "--json", "--store", &dev.store()]).args(arguments))?;
    let report = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("expected a report, got {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((report, output.status.success()))
}

fn is_sound(dev: &Dev) -> anyhow::Result<Value> {
    let (report, success) = scrub(dev, &[])?;
    ensure!(success && report["findings"] == 0, "expected a sound store, got {report}");
    Ok(report)
}

fn find(root: &str, part: &str) -> anyhow::Result<Vec<PathBuf>> {
    let found = program("find", &[root, "-type", "f", "-path", part])?;
    Ok(found.lines().map(PathBuf::from).collect())
}

/// Some history: two branches, a long file of settings, WAL that carries its pages.
fn load(dev: &Dev) -> anyhow::Result<()> {
    dev.json(&["tenant", "create", "acme"])?;
    dev.json(&["tenant", "create", "other"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "3", &db])?;
    psql(&db, "COPY (SELECT md5(i::text) FROM generate_series(1, 5000) i) TO PROGRAM 'cat > long.txt'")?;
    psql(&db, "CREATE UNLOGGED TABLE unlogged AS SELECT md5(i::text) AS filler FROM generate_series(1, 20000) i")?;
    psql(&db, "ALTER SYSTEM SET wal_consistency_checking = 'heap'")?;
    psql(&db, "SELECT pg_reload_conf()")?;
    dev.json(&["branch", "create", "acme/child"])?;
    psql(&db, "CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn wal_in_the_store_is_read_as_well() -> anyhow::Result<()> {
    let mut dev = Dev::start_for(VARVE, Major::V15, &["--wal-to-store", "always"])?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "SET synchronous_commit = remote_apply; CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i")?;
    // Before layers have it.
    dev.kill()?;
    let objects = find(&dev.store(), "*/wal/*")?;
    ensure!(objects.len() >= 2, "the beginning of a run, and WAL, are expected, found {objects:?}");
    for path in &objects {
        let whole = std::fs::read(path)?;
        let name = path.strip_prefix(dev.store())?.display().to_string();
        for at in [0, 30, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(path, damaged)?;
            let (report, success) = scrub(&dev, &[])?;
            let is_named = report["found"].as_array().is_some_and(|found| found.iter().any(|finding| finding["object"] == *name));
            ensure!(!success && is_named, "byte {at} of {name} was changed; expected that it is named, got {report}");
        }
        std::fs::write(path, &whole[..whole.len() - 1])?;
        ensure!(!scrub(&dev, &[])?.1, "{name} was cut");
        std::fs::write(path, whole)?;
    }
    is_sound(&dev)?;
    dev.run()?;
    ensure!(psql(&db, "SELECT count(*) FROM t")? == "1000");
    Ok(())
}

/// Damages a file in the middle, looks what a scrub says, and makes it whole again.
fn names_it_when_damaged(dev: &Dev, path: &Path) -> anyhow::Result<()> {
    let whole = std::fs::read(path)?;
    let name = path.strip_prefix(dev.store())?.display().to_string();
    let named = |how: &str| -> anyhow::Result<()> {
        let (report, success) = scrub(dev, &[])?;
        let found = report["found"].as_array().context("findings")?;
        // An entry of a log is named in the words about its log.
        let is_named = found.iter().any(|f| f["object"] == *name || f["problem"].as_str().is_some_and(|words| words.contains(&name)));
        ensure!(!success && is_named, "{name} was {how}; expected that it is named, got {report}");
        Ok(())
    };
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    std::fs::write(path, &flipped)?;
    named("changed by one bit")?;
    std::fs::write(path, &whole[..whole.len() - 1])?;
    named("cut off")?;
    std::fs::remove_file(path)?;
    named("removed")?;
    std::fs::write(path, whole)?;
    Ok(())
}

#[test]
fn what_is_damaged_or_missing_is_named() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    load(&dev)?;
    let acme = dev.json(&["tenant", "show", "acme"])?["id"].as_str().context("an id")?.to_owned();
    dev.stop()?;
    let report = is_sound(&dev)?;
    ensure!(report["tenants"] == 2 && report["layers"].as_u64() > Some(2), "both tenants were read: {report}");
    ensure!(report["unreferenced"] == 0, "nothing is left over after an orderly stop: {report}");
    for part in ["*/timelines/*/layers/*", "*/timelines/*/wal/*", "*/templates/*/template", &format!("*/{acme}/log/*")] {
        // Of a log the first entry, which later ones follow.
        let path = find(&dev.store(), part)?.into_iter().min().with_context(|| format!("there is something in {part}"))?;
        names_it_when_damaged(&dev, &path)?;
    }
    // The long file, and pieces of the unlogged table.
    let files = find(&dev.store(), "*/files/*")?;
    ensure!(files.len() > 1, "expected objects for a long file and for kept pages, got {files:?}");
    files.iter().try_for_each(|path| names_it_when_damaged(&dev, path))?;
    is_sound(&dev)?;
    let (report, success) = scrub(&dev, &["other"])?;
    ensure!(success && report["tenants"] == 1, "one tenant alone: {report}");
    let refused = dev.output(Command::new(VARVE).args(["scrub", "nobody", "--store", &dev.store()]))?;
    let words = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && words.contains("no tenant 'nobody'"), "an unknown tenant is an error: {words}");
    Ok(())
}

#[test]
fn what_nothing_refers_to_is_told_and_left() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    load(&dev)?;
    dev.stop()?;
    // Of tenants and of a template.
    let layers = find(&dev.store(), "*/timelines/*/layers/*")?;
    let folders: std::collections::BTreeSet<&Path> = layers.iter().filter_map(|layer| layer.parent()).collect();
    ensure!(folders.len() > 1, "expected layers of more than one timeline, got {folders:?}");
    for layer in folders.into_iter().filter_map(|folder| layers.iter().find(|layer| layer.starts_with(folder))) {
        let stray = layer.with_file_name("00000001-0123456789abcdef0123456789abcdef");
        std::fs::copy(layer, &stray)?;
        let report = is_sound(&dev)?;
        let name = stray.strip_prefix(dev.store())?.display().to_string();
        ensure!(report["unreferenced"] == 1 && report["unreferenced_objects"][0] == *name, "expected {name}, got {report}");
        ensure!(stray.exists(), "it is left");
        std::fs::remove_file(stray)?;
    }
    Ok(())
}

#[test]
fn a_server_goes_on_meanwhile() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    let dev = Dev::start_on(VARVE, Some(minio.url("scrub")), minio.variables())?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "5", &db])?;
    let mut load = Command::new("pgbench").args(["-n", "-c", "2", "-T", "12", &db]).stdout(std::process::Stdio::null()).spawn()?;
    let mut scrubs = 0;
    while load.try_wait()?.is_none() {
        let output = dev.output(Command::new(VARVE).args(["scrub", "--json", "--store", &minio.url("scrub")]).envs(minio.variables()))?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("expected a report, got {}", String::from_utf8_lossy(&output.stderr)))?;
        ensure!(output.status.success() && report["findings"] == 0, "a store that is written is sound, got {report}");
        scrubs += 1;
    }
    ensure!(load.wait()?.success(), "the load went on");
    ensure!(scrubs > 0, "there was a scrub while the load went on");
    ensure!(psql(&db, "SELECT count(*) FROM pgbench_accounts")? == "500000", "the server serves");
    Ok(())
}

/// Waits until a server's own scrub says what is `wanted`.
fn until_status(dev: &Dev, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    dev.until(what, PASS_MAX, || {
        let status = dev.json(&["scrub", "--status"])?;
        Ok(wanted(&status).then_some(status))
    })
}

#[test]
fn a_server_reads_its_tenants_in_the_background() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "aaa"])?;
    load(&dev)?;
    ensure!(dev.json(&["scrub", "--status"])?.is_null(), "it is off unless somebody says a rate");
    let acme = dev.json(&["tenant", "show", "acme"])?["id"].as_str().context("an id")?.to_owned();
    dev.stop()?;
    let size = |path: &Path| path.metadata().map(|data| data.len()).unwrap_or(0);
    let bytes: u64 = find(&dev.store(), &format!("*tenants/{acme}/*"))?.iter().map(|path| size(path)).sum();
    let layers = find(&dev.store(), &format!("*tenants/{acme}/timelines/*/layers/*"))?;
    let spoilt = layers.iter().max_by_key(|layer| size(layer)).context("a layer")?;
    let mut damaged = std::fs::read(spoilt)?;
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(spoilt, damaged)?;
    let name = spoilt.strip_prefix(dev.store())?.display().to_string();

    // Slowly; and a kill in the middle of the second tenant costs no more than that tenant's reads.
    let rate_mb = (bytes >> 20).div_ceil(8).max(1);
    dev.set_arguments(&["--scrub-rate-mb", &rate_mb.to_string()]);
    dev.run()?;
    until_status(&dev, "the first tenant to be read", |status| status["after"] == "aaa")?;
    dev.kill()?;
    dev.run()?;
    let begun = std::time::Instant::now();
    let status = dev.json(&["scrub", "--status"])?;
    ensure!(status["after"] == "aaa" && status["current"]["tenants"] == 1, "its position is kept: {status}");
    let status = until_status(&dev, "the pass to be complete", |status| !status["last"].is_null())?;
    ensure!(begun.elapsed() >= Duration::from_secs(4), "it keeps to its rate: {:?} for {bytes} at {rate_mb} MB", begun.elapsed());
    let last = &status["last"];
    ensure!(last["tenants"] == 3 && last["findings"] == 1 && last["found"][0]["object"] == *name, "{status}");
    ensure!(status["current"].is_null() && status["after"].is_null(), "{status}");
    let log = std::fs::read_to_string(dev.log())?;
    let is_told = |line: &&str| line.contains("ERROR") && line.contains(&name) && line.contains("from the bucket's versions");
    ensure!(log.lines().filter(is_told).count() == 1, "the log names it, once a pass: {log}");
    let metrics = program("curl", &["-sS", &format!("{}/metrics", dev.url())])?;
    ensure!(metrics.contains("varve_scrub_findings 1\n") && metrics.contains("varve_scrub_pass_age_seconds "), "{metrics}");
    let words = String::from_utf8_lossy(&dev.cli(&["scrub", "--status"])?.stdout).into_owned();
    ensure!(words.contains(&name) && words.contains("last pass"), "{words}");
    Ok(())
}
