//! History is kept as long as it must be, and no longer: what left its window goes, what something holds stays to the
//! byte, and who asks for what is gone is told what there is.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_testbed::dev::{Dev, amcheck, program, psql, settle};
use varve_testbed::minio::Minio;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long a cutoff may take to follow the clock.
const CUT_MAX: Duration = Duration::from_secs(60);

/// All rows of pgbench's tables, in a few letters.
const SUM: &str = "SELECT md5(string_agg(a::text, ',' ORDER BY aid)) || (SELECT md5(coalesce(string_agg(h::text, ',' ORDER BY h::text), '')) \
                   FROM pgbench_history h) FROM pgbench_accounts a";

fn head(dev: &Dev, branch: &str) -> anyhow::Result<String> {
    Ok(dev.json(&["branch", "show", branch])?["last_lsn"].as_str().context("an LSN")?.to_owned())
}

fn lsn(text: &str) -> anyhow::Result<varve_postgres::Lsn> {
    Ok(text.parse()?)
}

/// Bytes of the layers in the store, and what a scrub has to say besides.
fn layers(dev: &Dev) -> anyhow::Result<(u64, Value)> {
    let output = dev.output(Command::new(VARVE).args(["scrub", "--json", "--store", &dev.store()]))?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["findings"] == 0, "expected a sound store, got {report}");
    let listed = program("find", &[&dev.store(), "-path", "*/timelines/*/layers/*", "-printf", "%s\n"])?;
    Ok((listed.lines().filter_map(|line| line.parse::<u64>().ok()).sum(), report))
}

/// Every file of a branch's relations and transactions at an LSN.
fn files_at(dev: &Dev, branch: &str, lsn: &str, name: &str) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let folder = dev.folder().join(name);
    let text = folder.display().to_string();
    dev.json(&["materialize", branch, &text, "--lsn", lsn])?;
    let mut files = BTreeMap::new();
    for part in ["base", "global", "pg_xact", "pg_multixact"] {
        for path in program("find", &[&folder.join(part).display().to_string(), "-type", "f"])?.lines() {
            let name = Path::new(path).strip_prefix(&folder)?.display().to_string();
            if name != "global/pg_control" {
                files.insert(name, std::fs::read(path)?);
            }
        }
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(files)
}

/// A page without what is in its unused space: that depends on how often its redo was interrupted, and Postgres's own
/// consistency check masks it (`mask_unused_space`).
fn without_unused_space(page: &[u8]) -> Vec<u8> {
    let mut page = page.to_vec();
    if page.len() < 24 {
        return page; // of a file that has no pages
    }
    let field = |at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    let (lower, upper) = (field(12), field(14));
    if (24..=upper).contains(&lower) && upper <= page.len() {
        page[lower..upper].fill(0);
    }
    page
}

fn same_files(before: &BTreeMap<String, Vec<u8>>, after: &BTreeMap<String, Vec<u8>>) -> anyhow::Result<()> {
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    ensure!(names(before) == names(after), "the same files were expected");
    let mut different = Vec::new();
    for (name, bytes) in before {
        let now = after.get(name).context("the same files")?;
        ensure!(now.len() == bytes.len(), "{name} had {} bytes, and has {} after the collection", bytes.len(), now.len());
        for (block, (before, after)) in bytes.chunks(varve_postgres::BLCKSZ).zip(now.chunks(varve_postgres::BLCKSZ)).enumerate() {
            let (before, after) = (without_unused_space(before), without_unused_space(after));
            let places: Vec<usize> = before.iter().zip(&after).enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at).collect();
            if let (Some(first), Some(last)) = (places.first(), places.last()) {
                let lsn = |page: &[u8]| page.first_chunk::<8>().map(|lsn| format!("{lsn:02x?}"));
                different.push(format!(
                    "block {block} of {name}: {} bytes between {first} and {last}, LSN {:?} and then {:?}, header {:02x?} and then {:02x?}",
                    places.len(),
                    lsn(&before),
                    lsn(&after),
                    &before[..before.len().min(24)],
                    &after[..after.len().min(24)]
                ));
            }
        }
    }
    ensure!(different.is_empty(), "{} pages are others after the collection: {:#?}", different.len(), &different[..different.len().min(5)]);
    Ok(())
}

fn collects(mut dev: Dev, counts_bytes: bool) -> anyhow::Result<()> {
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "4", &db])?;
    settle(&db)?;
    // Four things that hold a position, and one that nothing holds.
    dev.json(&["snapshot", "create", "acme/main", "loaded"])?;
    let loaded = dev.json(&["snapshot", "show", "acme", "loaded"])?["lsn"].as_str().context("an LSN")?.to_owned();
    let sum_loaded = psql(&db, SUM)?;
    program("pgbench", &["-n", "-c", "4", "-t", "1000", &db])?;
    settle(&db)?;
    dev.json(&["branch", "create", "acme/child"])?;
    let child_at = dev.json(&["branch", "show", "acme/child"])?["branch_lsn"].as_str().context("an LSN")?.to_owned();
    let sum_child = psql(&db, SUM)?;
    psql(&db, "CREATE TABLE leased AS SELECT 1 AS one")?;
    let leased = settle(&db)?.to_string();
    let pages = format!("host=127.0.0.1 port={} user=u dbname=x sslmode=disable", dev.pages_port());
    let lease = |lsn: &str| program("psql", &["-XAtq", "-d", &pages, "-c", &format!("lease lsn acme main {lsn}")]);
    let until = lease(&leased)?;
    ensure!(until.contains('T') && lease(&leased)? == until, "a lease has an end, and is not renewed at once: {until}");
    psql(&db, "DROP TABLE leased")?;
    psql(&db, "DROP TABLE IF EXISTS gone; CREATE TABLE gone AS SELECT g, repeat('x', 500) FROM generate_series(1, 40000) g")?;
    program("pgbench", &["-n", "-c", "4", "-t", "1000", &db])?;
    let lost = settle(&db)?.to_string();
    psql(&db, "DROP TABLE gone")?;
    for _ in 0..3 {
        psql(&db, "UPDATE pgbench_accounts SET abalance = abalance + 1")?;
        psql(&db, "VACUUM pgbench_accounts")?;
    }
    settle(&db)?;
    let sum_main = psql(&db, SUM)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let end = head(&dev, "acme/main")?;
    let before: Vec<_> =
        [&loaded, &child_at, &leased, &end].map(|lsn| files_at(&dev, "acme/main", lsn, "before")).into_iter().collect::<Result<_, _>>()?;
    let (bytes_before, _) = layers(&dev).unwrap_or_default();

    // The window closes.
    let told = dev.json(&["tenant", "set", "acme", "--history", "3s"])?;
    ensure!(told["history"]["seconds"] == 3, "{told}");
    std::thread::sleep(Duration::from_secs(4));
    dev.json(&["tenant", "collect", "acme"])?;
    dev.until("the cutoff to pass what nothing holds", CUT_MAX, || {
        let earliest = dev.json(&["branch", "show", "acme/main"])?["earliest_lsn"].as_str().context("an LSN")?.to_owned();
        Ok((self::lsn(&earliest)? > self::lsn(&lost)?).then_some(()))
    })?;
    let earliest = dev.json(&["branch", "show", "acme/main"])?["earliest_lsn"].as_str().context("an LSN")?.to_owned();
    for refused in [
        &["branch", "create", "acme/late", "--lsn", &lost][..],
        &["branch", "restore", "acme/main", "--lsn", &lost],
        &["snapshot", "create", "acme/main", "late", "--lsn", &lost],
        &["materialize", "acme/main", "/nowhere", "--lsn", &lost],
    ] {
        let words = dev.refused(refused)?;
        ensure!(words.contains("is not kept any more") && words.contains(&earliest), "{refused:?}: {words}");
    }
    let after: Vec<_> =
        [&loaded, &child_at, &leased, &end].map(|lsn| files_at(&dev, "acme/main", lsn, "after")).into_iter().collect::<Result<_, _>>()?;
    for ((before, after), lsn) in before.iter().zip(&after).zip([&loaded, &child_at, &leased, &end]) {
        same_files(before, after).with_context(|| format!("at {lsn}"))?;
    }

    ensure!(lease(&lost).is_err(), "there is no lease on what is gone");

    // From the snapshot, from the child, and from the branch itself, also after a restart of the server.
    dev.kill()?;
    dev.run()?;
    dev.json(&["branch", "create", "acme/old", "--snapshot", "loaded"])?;
    for (branch, sum) in [("acme/old", &sum_loaded), ("acme/child", &sum_child), ("acme/main", &sum_main)] {
        let db = dev.compute(branch, &[])?;
        ensure!(psql(&db, SUM)? == *sum, "{branch} has other rows after the collection");
        amcheck(&db)?;
        program("pgbench", &["-n", "-t", "50", &db])?;
        dev.json(&["compute", "stop", branch])?;
    }
    if !counts_bytes {
        return Ok(());
    }
    // What was held goes when nothing holds it any more.
    let (bytes_held, _) = layers(&dev)?;
    dev.json(&["branch", "delete", "acme/old", "--yes"])?;
    dev.json(&["branch", "delete", "acme/child", "--yes"])?;
    dev.json(&["snapshot", "delete", "acme", "loaded", "--yes"])?;
    std::thread::sleep(Duration::from_secs(4));
    dev.json(&["tenant", "collect", "acme"])?;
    let (bytes_alone, report) = layers(&dev)?;
    ensure!(
        bytes_held < bytes_before && bytes_alone < bytes_held,
        "bytes of layers: {bytes_before}, then {bytes_held}, then {bytes_alone}"
    );
    let left: Vec<&str> = report["unreferenced_objects"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(left.iter().all(|object| !object.contains("/layers/")), "no layer is left over: {left:?}");
    let db = dev.compute("acme/main", &[])?;
    amcheck(&db)?;
    Ok(())
}

#[test]
fn what_left_the_window_goes_and_what_is_held_stays() -> anyhow::Result<()> {
    collects(Dev::start(VARVE)?, true)
}

/// Puts copies of a layer where nothing refers to them.
fn stray(store: &str, tenant: &str, names: &[&str]) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let layer = program("find", &[store, "-path", &format!("*/tenants/{tenant}/timelines/*/layers/*")])?;
    let layer = Path::new(layer.lines().next().context("a layer")?).to_owned();
    let timeline = layer.parent().and_then(Path::parent).context("a timeline's folder")?;
    let tenant = timeline.parent().and_then(Path::parent).context("a tenant's folder")?;
    let put = |name: &&str| {
        let path = if name.starts_with("layers/") { timeline.join(name) } else { tenant.join(name) };
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        std::fs::copy(&layer, &path)?;
        Ok(path)
    };
    names.iter().map(put).collect()
}

#[test]
fn what_a_crash_left_is_found_and_deleted_and_nothing_else() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "1", &db])?;
    psql(&db, "COPY (SELECT md5(i::text) FROM generate_series(1, 5000) i) TO PROGRAM 'cat > long.txt'")?;
    let sum = psql(&db, SUM)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    // Another generation owns it from here on.
    dev.stop()?;
    dev.run()?;
    let id = "0123456789abcdef0123456789abcdef";
    let (former, ours, gone) =
        (format!("layers/00000001-{id}"), format!("layers/7fffffff-{id}"), format!("timelines/{id}/layers/00000001-{id}"));
    let (old, new) = (format!("files/{id}"), format!("files/{}", id.replace('0', "1")));
    let acme = dev.json(&["tenant", "show", "acme"])?["id"].as_str().context("an id")?.to_owned();
    let strays = stray(&dev.store(), &acme, &[&former, &gone, &old, &ours, &new])?;
    program("touch", &["-d", "2 days ago", &strays[2].display().to_string()])?;
    dev.json(&["tenant", "collect", "acme"])?;
    let left: Vec<bool> = strays.iter().map(|path| path.exists()).collect();
    ensure!(
        left == [false, false, false, true, true],
        "of a former owner, a deleted timeline, an old file, a later owner, a new file: {left:?}"
    );
    for path in &strays[3..] {
        std::fs::remove_file(path)?;
    }
    let (_, report) = layers(&dev)?;
    ensure!(report["unreferenced"] == 0, "{report}");
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, SUM)? == sum && psql(&db, "SELECT length(pg_read_file('long.txt')) > 100000")? == "t", "everything is there");
    Ok(())
}

#[test]
fn the_same_over_minio() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    collects(Dev::start_on(VARVE, Some(minio.url("retention")), minio.variables())?, false)
}
