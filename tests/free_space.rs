//! A branch at any LSN knows of the free space of which a stock Postgres knows that recovered to it: the same rows make
//! its tables no longer.
//!
//! The oracle is a promoted server that has nothing of ours: a base backup of the compute, and its WAL.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use varve_postgres::{BLCKSZ, Lsn, Major};
use varve_testbed::application::start;
use varve_testbed::beside::{Archive, Private, Target, recovered};
use varve_testbed::dev::{Dev, psql};
use varve_testbed::postgres::{Postgres, is_skipped};
use varve_testing::random::SeededRng;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// Tables that the load works on.
const TABLES: u64 = 5;
/// Statements of the load.
const STATEMENTS: usize = 90;
/// LSNs that are compared right behind a `VACUUM`, and so many others.
const LSNS_BEHIND_VACUUM: usize = 4;
const LSNS_ANYWHERE: usize = 4;
/// The same for other majors than 15.
const LSNS_OF_OTHERS: usize = 1;
/// Blocks by which a table may grow further than stock's: which page a search finds first is chance.
const LONGER_MAX: i64 = 4;
/// Of so many pages one may say that more is free than there is, beyond what stock's says: what was changed in place
/// since the map was written.
const PAGES_PER_BOAST: usize = 20;
/// Settings of the recovered servers.
const PLAIN: [(&str, &str); 3] = [("shared_buffers", "'32MB'"), ("autovacuum", "off"), ("wal_recycle", "off")];

/// What a server says of a table.
#[derive(Debug, PartialEq, Eq)]
struct Table {
    /// Blocks in the heap.
    blocks: usize,
    /// Free bytes of each block as the map has them.
    map: Vec<i64>,
    /// Free bytes of each block as its header has them, in the map's steps.
    truth: Vec<i64>,
}

fn numbers(text: &str) -> anyhow::Result<Vec<i64>> {
    text.split(',').filter(|number| !number.is_empty()).map(|number| number.trim().parse().context("a number")).collect()
}

fn table(conninfo: &str, name: &str) -> anyhow::Result<Table> {
    let map = numbers(&psql(conninfo, &format!("SELECT string_agg(avail::text, ',' ORDER BY blkno) FROM pg_freespace('{name}')"))?)?;
    // A page with as many line pointers as fit takes no row, however many bytes are free.
    let steps = "CASE WHEN lower >= 24 + 4 * 291 THEN 0 ELSE least((upper - lower - 4) / 32 * 32, 8160) END";
    let truth = format!(
        "SELECT string_agg(greatest({steps}, 0)::text, ',' ORDER BY b) \
         FROM generate_series(0, pg_relation_size('{name}') / {BLCKSZ} - 1) b, page_header(get_raw_page('{name}', b::int))"
    );
    let truth = numbers(&psql(conninfo, &truth)?)?;
    Ok(Table { blocks: truth.len(), map, truth })
}

fn tables(conninfo: &str) -> anyhow::Result<String> {
    psql(conninfo, "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relname ~ '^t[0-9]+$'")
}

/// What is compared before anything is written, and how long the table is after more rows.
fn compare(ours: &str, theirs: &str, name: &str) -> anyhow::Result<()> {
    let (of_us, of_them) = (table(ours, name)?, table(theirs, name)?);
    ensure!(of_us.blocks == of_them.blocks, "{name} has {} blocks, and {} there", of_us.blocks, of_them.blocks);
    let mut boasts = 0;
    for (block, ((ours, theirs), truth)) in of_us.map.iter().zip(&of_them.map).zip(&of_us.truth).enumerate() {
        ensure!(ours >= theirs || ours >= truth, "block {block} of {name} has {ours} in the map, {theirs} there, and {truth} is free");
        boasts += usize::from(ours > theirs.max(truth));
    }
    ensure!(boasts <= of_us.blocks / PAGES_PER_BOAST + 1, "{boasts} of {} blocks of {name} say more than is free", of_us.blocks);
    let fill = format!("INSERT INTO {name} SELECT i, repeat('n', 150) FROM generate_series(1, 4000) i");
    let size = format!("SELECT pg_relation_size('{name}') / {BLCKSZ}");
    let mut lengths = [0, 0];
    for (conninfo, length) in [ours, theirs].into_iter().zip(&mut lengths) {
        psql(conninfo, &fill)?;
        *length = psql(conninfo, &size)?.parse::<i64>().context("a number")?;
    }
    let [ours, theirs] = lengths;
    println!("{name}: {} blocks, after the same rows {ours}, and {theirs} there", of_us.blocks);
    ensure!(ours <= theirs + LONGER_MAX, "{name}, of {} blocks, has {ours} after the same rows, and {theirs} there", of_us.blocks);
    Ok(())
}

/// A load that is over, with all that recovery needs.
struct Loaded {
    dev: Dev,
    base: Postgres,
    archive: Archive,
    begin: Lsn,
    end: Lsn,
    /// Right behind a `VACUUM`.
    behind_vacuum: Vec<Lsn>,
}

fn position(db: &str) -> anyhow::Result<Lsn> {
    psql(db, "SELECT pg_current_wal_insert_lsn()")?.parse().context("an LSN")
}

/// A statement of the load; whether it vacuums.
fn statement(random: &mut SeededRng) -> (String, bool) {
    let name = format!("t{}", random.below(TABLES));
    let part = random.between(2, 5);
    match random.below(100) {
        0..30 => {
            let (rows, bytes) = (random.between(200, 3000), random.between(20, 600));
            (format!("INSERT INTO {name} SELECT i, repeat('x', {bytes}) FROM generate_series(1, {rows}) i"), false)
        }
        30..45 => (format!("UPDATE {name} SET a = a || 'longer than it was' WHERE i % {part} = 0"), false),
        45..60 => (format!("DELETE FROM {name} WHERE i % {part} = 1"), false),
        60..85 => (format!("VACUUM {name}"), true),
        85..92 => (format!("DELETE FROM {name} WHERE ctid > '({},0)'", random.below(60)), false),
        92..96 => (format!("TRUNCATE {name}"), false),
        _ => (format!("DROP TABLE {name}; CREATE TABLE {name} (i int, a text)"), false),
    }
}

fn loaded(major: Major, random: &mut SeededRng) -> anyhow::Result<Loaded> {
    let mut dev = Dev::start_for(VARVE, major, &[])?;
    let compute = start(&dev, major, &[("autovacuum", "off")])?;
    let db = compute["conninfo"].as_str().context("a compute has a conninfo")?;
    psql(db, "CREATE EXTENSION pg_freespacemap; CREATE EXTENSION pageinspect")?;
    let private = Private::of(&compute)?;
    let base = private.base_backup(&[])?;
    let begin = position(db)?;
    for table in 0..TABLES {
        psql(db, &format!("CREATE TABLE t{table} (i int, a text); INSERT INTO t{table} SELECT i, 'x' FROM generate_series(1, 2000) i"))?;
    }
    let mut behind_vacuum = Vec::new();
    for number in 0..STATEMENTS {
        let (statement, vacuums) = statement(random);
        psql(db, &statement)?;
        if vacuums {
            behind_vacuum.push(position(db)?);
        }
        if number == STATEMENTS / 2 {
            dev.kill()?;
            dev.run()?;
        }
    }
    let end: Lsn = psql(db, "SELECT pg_switch_wal()")?.parse().context("an LSN")?;
    let archive = private.archive()?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(Loaded { dev, base, archive, begin, end, behind_vacuum })
}

fn check(loaded: &Loaded, name: &str, lsn: Lsn) -> anyhow::Result<()> {
    let branch = format!("acme/{name}");
    let made = loaded.dev.json(&["branch", "create", &branch, "--lsn", &lsn.to_string()])?;
    let boundary: Lsn = made["branch_lsn"].as_str().context("a branch has an LSN")?.parse()?;
    let theirs = recovered(&loaded.base, &loaded.archive, &Target::Lsn(boundary), &PLAIN)?;
    let ours = loaded.dev.compute(&branch, &[])?;
    let theirs = theirs.conninfo("postgres");
    let (names, expected) = (tables(&ours)?, tables(&theirs)?);
    ensure!(names == expected, "the tables are {names}, expected {expected}");
    for name in names.split_whitespace() {
        compare(&ours, &theirs, name)?;
    }
    loaded.dev.json(&["compute", "stop", &branch])?;
    Ok(())
}

fn branches_know_what_is_free(major: Major, behind_vacuum: usize, anywhere: usize) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let seed = u64::from(std::process::id());
    let mut random = SeededRng::new(seed);
    let loaded = loaded(major, &mut random)?;
    ensure!(loaded.behind_vacuum.len() > behind_vacuum, "the load vacuumed");
    let mut lsns = BTreeSet::new();
    while lsns.len() < behind_vacuum {
        lsns.insert(loaded.behind_vacuum[random.below(loaded.behind_vacuum.len() as u64) as usize]);
    }
    while lsns.len() < behind_vacuum + anywhere {
        lsns.insert(Lsn(random.between(loaded.begin.0, loaded.end.0)));
    }
    println!("seed {seed}: {lsns:?}");
    for (number, lsn) in lsns.into_iter().enumerate() {
        check(&loaded, &format!("b{number}"), lsn).with_context(|| format!("a branch at {lsn}, seed {seed}"))?;
    }
    Ok(())
}

#[test]
fn at_any_lsn_on_15() -> anyhow::Result<()> {
    branches_know_what_is_free(Major::V15, LSNS_BEHIND_VACUUM, LSNS_ANYWHERE)
}

#[test]
fn at_any_lsn_on_14() -> anyhow::Result<()> {
    branches_know_what_is_free(Major::V14, LSNS_OF_OTHERS, LSNS_OF_OTHERS)
}

#[test]
fn at_any_lsn_on_16() -> anyhow::Result<()> {
    branches_know_what_is_free(Major::V16, LSNS_OF_OTHERS, LSNS_OF_OTHERS)
}

#[test]
fn at_any_lsn_on_17() -> anyhow::Result<()> {
    branches_know_what_is_free(Major::V17, LSNS_OF_OTHERS, LSNS_OF_OTHERS)
}

#[test]
fn at_any_lsn_on_18() -> anyhow::Result<()> {
    branches_know_what_is_free(Major::V18, LSNS_OF_OTHERS, LSNS_OF_OTHERS)
}

/// The server is killed as soon as the `VACUUM` is over, so its ingest is lost with all that it had in memory.
#[test]
fn right_behind_a_vacuum_the_space_that_it_freed_is_used() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT i, repeat('x', 250) AS a FROM generate_series(1, 40000) i")?;
    psql(&db, "DELETE FROM t WHERE i % 2 = 0")?;
    psql(&db, "VACUUM t")?;
    dev.json(&["branch", "create", "acme/before"])?;
    dev.kill()?;
    dev.run()?;
    dev.json(&["branch", "create", "acme/after"])?;
    let size = format!("SELECT pg_relation_size('t') / {BLCKSZ}");
    for branch in ["acme/before", "acme/after"] {
        let db = dev.compute(branch, &[])?;
        let before: i64 = psql(&db, &size)?.parse()?;
        psql(&db, "INSERT INTO t SELECT i, repeat('y', 250) FROM generate_series(1, 18000) i")?;
        let after: i64 = psql(&db, &size)?.parse()?;
        ensure!(before > 1000 && after <= before + LONGER_MAX, "{branch}: 18,000 rows where 20,000 were: {before} blocks became {after}");
    }
    Ok(())
}
