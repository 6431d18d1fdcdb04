//! A server that starts on a base backup finds the free space that its tables have, and so does not extend them.

use std::sync::Arc;

use crate::oracle::servers;
use anyhow::{Context, Result, ensure};
use varve_postgres::Major;
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_testbed::postgres::Postgres;

const SETTINGS: [(&str, &str); 3] = [("autovacuum", "off"), ("wal_keep_size", "'16GB'"), ("shared_buffers", "'32MB'")];

fn number(postgres: &Postgres, sql: &str) -> Result<i64> {
    let text = postgres.psql("postgres", sql)?;
    text.trim().parse().with_context(|| format!("{sql} gives {text}"))
}

#[test]
fn rows_go_into_the_space_that_vacuum_freed() {
    run().unwrap();
}

fn run() -> Result<()> {
    let mut postgres = Postgres::init(Major::V15, &[], &SETTINGS)?;
    let mut loaded = crate::oracle::import(&postgres)?;
    postgres.start()?;
    postgres.psql("postgres", "CREATE TABLE t AS SELECT i, repeat('x', 100) AS a FROM generate_series(1, 60000) i")?;
    postgres.psql("postgres", "CREATE TABLE cut AS SELECT i, repeat('x', 100) AS a FROM generate_series(1, 60000) i")?;
    postgres.psql("postgres", "DELETE FROM t WHERE i % 2 = 0")?;
    postgres.psql("postgres", "DELETE FROM cut WHERE i > 30000 OR i % 3 = 0")?;
    postgres.psql("postgres", "VACUUM t")?;
    postgres.psql("postgres", "VACUUM cut")?;
    let blocks_before = number(&postgres, "SELECT pg_relation_size('t') / 8192")?;
    let cut_before = number(&postgres, "SELECT pg_relation_size('cut') / 8192")?;
    postgres.stop("fast")?;
    crate::oracle::ingest_in_one_go(&postgres, &mut loaded)?;

    let (end, range) = (loaded.end(), (loaded.imported.end.end, loaded.end()));
    let branch = Arc::new(loaded.history.branch(end)?);
    let ancestors = vec![AncestorTimeline { tli: 1, switch: end }];
    let timeline = servers::timeline(&*loaded.history, loaded.imported.system_identifier, 2, ancestors, end, range)?;
    let mut ours = servers::from_backup(&*branch, &loaded, &timeline, &SETTINGS)?;
    ours.start()?;
    ours.psql("postgres", "CREATE EXTENSION pg_freespacemap")?;
    let free = number(&ours, "SELECT sum(avail) FROM pg_freespace('t')")?;
    ensure!(
        free > blocks_before * 2000,
        "the map knows of the space that VACUUM freed; it knows of {free} bytes in {blocks_before} blocks"
    );
    let beyond = number(&ours, "SELECT count(*) FROM pg_freespace('cut') WHERE avail > 0")?;
    ensure!(beyond > cut_before / 2, "the map of a table that was cut knows of the space that is left: {beyond} blocks of {cut_before}");
    ours.psql("postgres", "INSERT INTO t SELECT i, repeat('y', 100) FROM generate_series(1, 25000) i")?;
    ours.psql("postgres", "INSERT INTO cut SELECT i, repeat('y', 100) FROM generate_series(1, 8000) i")?;
    let blocks_after = number(&ours, "SELECT pg_relation_size('t') / 8192")?;
    ensure!(blocks_after <= blocks_before + 8, "25,000 rows fit where 30,000 were deleted: {blocks_before} blocks became {blocks_after}");
    let cut_after = number(&ours, "SELECT pg_relation_size('cut') / 8192")?;
    ensure!(cut_after <= cut_before + 8, "8,000 rows fit where 10,000 were deleted: {cut_before} blocks became {cut_after}");
    servers::check(&ours)?;
    ours.stop("fast")
}
