//! A server that starts on a base backup finds the free space that its tables have, and so does not extend them,
//! wherever in the history that is.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::oracle::{Loaded, each_record, ingest_opened_every, servers};
use anyhow::{Context, Result, ensure};
use varve_postgres::page::{self, Page};
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, RelNode};
use varve_redo::change::BlockRecord;
use varve_redo::free_space_map::{self, MapPage, SLOTS_PER_PAGE};
use varve_redo::{free_space_effect, heap_free_space};
use varve_storage::relation;
use varve_testbed::postgres::Postgres;
use varve_testing::naive_history::NaiveHistory;

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
    crate::oracle::ingest(&postgres, &mut loaded)?;

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

/// Records between two at which maps are looked at.
const RECORDS_BETWEEN_LOOKS: usize = 499;
/// Rows that come and go, in tables of one page and of more than a bottom page of the map stands for.
const LOAD: &str = "
    CREATE TABLE small (i int, a text); INSERT INTO small VALUES (1, 'x'); VACUUM small;
    CREATE TABLE filled (i int, a text); INSERT INTO filled SELECT i, repeat('x', 100) FROM generate_series(1, 3000) i;
    CREATE TABLE t (i int, a text) WITH (fillfactor = 10);
    INSERT INTO t SELECT i, repeat('x', 700) FROM generate_series(1, 4400) i;
    DELETE FROM t WHERE i % 3 = 0; VACUUM t;
    UPDATE t SET a = repeat('y', 900) WHERE i % 5 = 0;
    DELETE FROM t WHERE i > 4200; VACUUM t;
    DELETE FROM filled WHERE i % 2 = 0; VACUUM filled; INSERT INTO filled SELECT i, repeat('z', 90) FROM generate_series(1, 900) i;
    CREATE TABLE gone AS SELECT * FROM filled; DELETE FROM gone WHERE i % 2 = 1; VACUUM gone; TRUNCATE gone;
    INSERT INTO gone SELECT * FROM filled; DELETE FROM gone; VACUUM gone; DROP TABLE gone;
    CREATE DATABASE copied TEMPLATE template1 STRATEGY file_copy";

/// What Postgres's own redo would have in its maps.
#[derive(Default)]
struct Redo {
    categories: BTreeMap<(RelNode, BlockNumber), u8>,
}

impl Redo {
    fn take(&mut self, record: &Record<'_>, history: &NaiveHistory) -> Result<()> {
        for block in record.blocks.iter().filter(|block| block.rel.fork == Fork::Main) {
            let restored = block.image.as_ref().is_some_and(|image| image.apply);
            let page = relation::block(history, block.rel, block.blkno, record.end);
            // It is not a page of a heap, or was cut off by the same record.
            let Ok(page) = page else { continue };
            if let Some(space) = free_space_effect(history_major(), &BlockRecord::trim(record, block), &page, restored) {
                self.categories.insert((block.rel.node, block.blkno), free_space_map::category(space));
            }
        }
        if record.header.rmid == rmgr::SMGR
            && let StorageRecord::Truncate { node, blocks, .. } = storage::parse(record.kind(), record.main_data, history_major())?
        {
            self.categories.retain(|(have, block), _| *have != node || *block < blocks);
        }
        Ok(())
    }
}

fn history_major() -> Major {
    Major::V15
}

/// Compares every map of the history at `lsn` with what redo has, and with the heap's pages. Gives how many slots say
/// what is on the heap's page and redo does not know.
fn compare(history: &NaiveHistory, lsn: Lsn, redo: &Redo) -> Result<usize> {
    let mut better = 0;
    // Each read of a map's page looks at the heap anew.
    let mut maps = BTreeMap::new();
    let mut greatest: BTreeMap<RelNode, u8> = BTreeMap::new();
    for ((node, block), known) in &redo.categories {
        let Some(blocks) = relation::blocks(history, node.fork(Fork::Main), lsn)? else { continue };
        if *block >= blocks {
            continue;
        }
        let heap: Box<Page> = relation::block(history, node.fork(Fork::Main), *block, lsn)?;
        let truth = if page::is_new(&heap) { 0 } else { free_space_map::category(heap_free_space(&heap)) };
        let (map_block, slot) = free_space_map::location(*block);
        let map = maps.entry((*node, map_block)).or_insert_with(|| relation::block(history, node.fork(Fork::FreeSpaceMap), map_block, lsn));
        let ours = match map {
            Ok(page) => free_space_map::get(page, slot),
            Err(relation::RelationError::NoRelation { .. }) if *block == 0 => continue,
            Err(error) => return Err(error.clone()).with_context(|| format!("the map of {node:?} at {lsn}")),
        };
        ensure!(ours == *known || ours == truth, "at {lsn} block {block} of {node:?} has {ours}, redo has {known}, it is {truth}");
        better += usize::from(ours != *known);
        let of_map = greatest.entry(*node).or_default();
        *of_map = ours.max(*of_map);
    }
    for (node, greatest) in greatest {
        let root = relation::block(history, node.fork(Fork::FreeSpaceMap), MapPage::Root.block(), lsn)?;
        ensure!(free_space_map::greatest(&root) >= greatest, "at {lsn} a search from the root of {node:?} finds {greatest}");
    }
    Ok(better)
}

/// What is in every map at every so many records, and at the end.
fn maps(loaded: &Loaded, step: usize) -> Result<Vec<(Lsn, RelNode, BlockNumber, u64)>> {
    let mut all = Vec::new();
    for lsn in loaded.boundaries.iter().step_by(step).chain(loaded.boundaries.last()) {
        for (spc, db) in varve_engine::catalog::databases(&*loaded.history, *lsn)? {
            let mut forks = Vec::new();
            relation::list(&*loaded.history, spc, db, *lsn, &mut |rel, blocks| {
                forks.push((rel, blocks));
                Ok(())
            })?;
            for (rel, blocks) in forks.into_iter().filter(|(rel, _)| rel.fork == Fork::FreeSpaceMap) {
                for block in 0..blocks {
                    let page = relation::block(&*loaded.history, rel, block, *lsn)?;
                    let digest = page.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
                    all.push((*lsn, rel.node, block, digest));
                }
            }
        }
    }
    Ok(all)
}

#[test]
fn at_every_lsn_they_are_at_least_what_redo_makes_of_them() {
    let run = || -> Result<()> {
        let mut postgres = Postgres::init(history_major(), &[], &SETTINGS)?;
        let mut loaded = crate::oracle::import(&postgres)?;
        let mut in_pieces = crate::oracle::import(&postgres)?;
        postgres.start()?;
        for statement in LOAD.split(';') {
            postgres.psql("postgres", statement)?;
        }
        postgres.stop("immediate")?;
        let start = loaded.end();
        ingest_opened_every(usize::MAX, &postgres, &mut loaded)?;
        let (mut redo, mut seen, mut better) = (Redo::default(), 0, 0);
        let end = loaded.end();
        each_record(history_major(), &postgres.data_dir().join("pg_wal"), start, &mut |framed| {
            if framed.end > end {
                return Ok(());
            }
            redo.take(&Record::decode(&framed.bytes, framed.start, framed.end, history_major())?, &loaded.history)?;
            seen += 1;
            if seen % RECORDS_BETWEEN_LOOKS == 0 || framed.end == end {
                better += compare(&loaded.history, framed.end, &redo)?;
            }
            Ok(())
        })?;
        ensure!(redo.categories.keys().any(|(_, block)| *block > SLOTS_PER_PAGE), "a heap has more than one bottom page of its map");
        println!("{seen} records; {better} times a slot said more than redo's");

        // Where ingests begin and batches end changes nothing.
        ingest_opened_every(500, &postgres, &mut in_pieces)?;
        ensure!(in_pieces.boundaries == loaded.boundaries, "both have all records");
        let step = RECORDS_BETWEEN_LOOKS * 5 + 1;
        ensure!(maps(&loaded, step)? == maps(&in_pieces, step)?, "maps are the same whoever ingested");
        Ok(())
    };
    run().unwrap();
}
