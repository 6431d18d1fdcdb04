//! A damaged file is named and refused, never served, and harms nobody else.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use varve_testbed::dev::{Dev, program, psql};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");

fn find(root: &str, part: &str) -> anyhow::Result<Vec<PathBuf>> {
    let found = program("find", &[root, "-type", "f", "-path", part])?;
    Ok(found.lines().map(PathBuf::from).collect())
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

fn two_tenants() -> anyhow::Result<(Dev, String)> {
    let dev = Dev::start(VARVE)?;
    for tenant in ["acme", "other"] {
        dev.json(&["tenant", "create", tenant])?;
        let db = dev.compute(&format!("{tenant}/main"), &[])?;
        psql(&db, "CREATE TABLE t AS SELECT i, md5(i::text) || md5((-i)::text) AS filler FROM generate_series(1, 20000) i")?;
        dev.json(&["compute", "stop", &format!("{tenant}/main")])?;
    }
    let acme = dev.json(&["tenant", "show", "acme"])?;
    let id = acme["id"].as_str().context("an id")?.to_owned();
    Ok((dev, id))
}

fn other_is_well(dev: &Dev) -> anyhow::Result<()> {
    let db = dev.compute("other/main", &[])?;
    ensure!(psql(&db, "SELECT count(*) FROM t")? == "20000", "the other tenant is not harmed");
    Ok(())
}

#[test]
fn a_layer() -> anyhow::Result<()> {
    let (mut dev, id) = two_tenants()?;
    dev.stop()?;
    spoil(&find(&dev.store(), &format!("*{id}*/layers/*"))?)?;
    dev.run()?;
    let outcome = dev.compute("acme/main", &[]).and_then(|db| psql(&db, "SELECT sum(i), max(filler) FROM t"));
    let error = format!("{:#}", outcome.err().context("a spoilt layer must not be served")?);
    let log = std::fs::read_to_string(dev.log())?;
    ensure!(error.contains("/layers/") || log.contains("/layers/"), "the layer is named: {error}");
    other_is_well(&dev)
}

#[test]
fn a_manifest() -> anyhow::Result<()> {
    let (mut dev, id) = two_tenants()?;
    dev.stop()?;
    spoil(&find(&dev.store(), &format!("*{id}/timelines/*/log/*"))?)?;
    dev.run()?;
    let refused = dev.refused(&["compute", "start", "acme/main"])?;
    ensure!(refused.contains("/log/"), "the manifest's object is named: {refused}");
    other_is_well(&dev)
}

#[test]
fn a_tenants_log() -> anyhow::Result<()> {
    let (mut dev, id) = two_tenants()?;
    dev.stop()?;
    spoil(&find(&dev.store(), &format!("*tenants/{id}/log/*"))?)?;
    dev.run()?;
    let refused = dev.refused(&["branch", "list", "acme"])?;
    ensure!(refused.contains(&id), "the log's object is named: {refused}");
    other_is_well(&dev)
}

#[test]
fn the_wal_log() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 1000) i")?;
    for i in 0..20 {
        psql(&db, &format!("INSERT INTO t VALUES ({i})"))?;
    }
    dev.kill()?;
    let segment = find(&dev.data().display().to_string(), "*.wal")?.into_iter().min().context("a segment")?;
    let mut bytes = std::fs::read(&segment)?;
    bytes[2000] ^= 1; // in the first chunk, which was acknowledged long ago
    std::fs::write(&segment, bytes)?;
    let output = dev.output(&mut dev.dev_command())?;
    ensure!(!output.status.success(), "a damaged WAL log must be refused");
    let said = String::from_utf8_lossy(&output.stderr);
    let name = segment.file_name().and_then(|name| name.to_str()).context("a name")?;
    ensure!(said.contains(name) && said.contains("damaged"), "the file is named: {said}");
    Ok(())
}
