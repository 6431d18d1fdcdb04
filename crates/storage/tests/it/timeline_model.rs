//! The engine answers what the naive model answers: on branches, across freezes, flushes, failed publishings, merges,
//! also interrupted ones, and reopening from the store, with truncations, drops of relations and of databases.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::runtime::Runtime;
use varve_postgres::slru::SlruKind;
use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, Page, RelFork, RelNode, page};
use varve_redo::change::{BlockRecord, Change, Others};
use varve_storage::block_cache::BlockCache;
use varve_storage::budget::MemoryBudget;
use varve_storage::database::DatabaseEntry;
use varve_storage::edit_log::EditLogError;
use varve_storage::history::{History, HistoryWriter};
use varve_storage::ids::{Generation, LayerId, TenantId, TimelineId};
use varve_storage::key::Key;
use varve_storage::layer::blob::OpenFiles;
use varve_storage::layer::range_cache::RangeCache;
use varve_storage::manifest::LayerRow;
use varve_storage::page_cache::PageCache;
use varve_storage::relation::{self, RelationError};
use varve_storage::relation_size::RelationSize;
use varve_storage::store::Store;
use varve_storage::threads::RuntimeThreads;
use varve_storage::timeline::{LayerChange, PublishError, Resources, Timeline, TimelineSpec};
use varve_storage::value::Value;
use varve_testing::naive_history::NaiveHistory;
use varve_testing::sim_store::SimStore;

const MAJOR: Major = Major::V15;
const START: Lsn = Lsn(0x100_0000);
const TENANT: TenantId = TenantId([7; 16]);
/// Timelines at most.
const TIMELINES_MAX: usize = 4;
/// Relations and blocks that the tests use.
const RELS: u32 = 4;
const BLOCKS: u32 = 6;

#[derive(Clone, Debug)]
enum Op {
    /// Some bytes of a block change, `times` times.
    Write {
        timeline: usize,
        rel: u32,
        block: u32,
        offset: u16,
        times: u16,
        advance_each: bool,
    },
    Status {
        timeline: usize,
        page: u32,
        xid: u32,
        status: u8,
    },
    Map {
        timeline: usize,
        number: u32,
        present: bool,
    },
    Truncate {
        timeline: usize,
        rel: u32,
        blocks: u32,
    },
    Drop {
        timeline: usize,
        rel: u32,
    },
    DropDatabase {
        timeline: usize,
        db: u32,
    },
    Freeze {
        timeline: usize,
    },
    Flush {
        timeline: usize,
        publish_fails: bool,
    },
    /// Freezes and flushes some times, with a few bytes written in between.
    Flushes {
        timeline: usize,
        rel: u32,
        times: u16,
    },
    Compact {
        timeline: usize,
        gives_up: bool,
    },
    Reopen,
    Branch {
        timeline: usize,
        back: u64,
    },
    Check {
        timeline: usize,
        back: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let timeline = 0usize..TIMELINES_MAX;
    prop_oneof![
        12 => (timeline.clone(), 0..RELS, 0..BLOCKS, any::<u16>(), any::<bool>()).prop_map(|(timeline, rel, block, offset, advance_each)| {
            Op::Write { timeline, rel, block, offset, times: 1 + offset % 3, advance_each }
        }),
        1 => (timeline.clone(), 0..RELS, 0..BLOCKS, any::<u16>(), any::<bool>()).prop_map(|(timeline, rel, block, offset, advance_each)| {
            Op::Write { timeline, rel, block, offset, times: 130 + offset % 300, advance_each }
        }),
        3 => (timeline.clone(), 0u32..2, 0u32..9, 1u8..4).prop_map(|(timeline, page, xid, status)| Op::Status { timeline, page, xid, status }),
        2 => (timeline.clone(), 0u32..4, any::<bool>()).prop_map(|(timeline, number, present)| Op::Map { timeline, number, present }),
        2 => (timeline.clone(), 0..RELS, 0..BLOCKS).prop_map(|(timeline, rel, blocks)| Op::Truncate { timeline, rel, blocks }),
        1 => (timeline.clone(), 0..RELS).prop_map(|(timeline, rel)| Op::Drop { timeline, rel }),
        1 => (timeline.clone(), 0u32..2).prop_map(|(timeline, db)| Op::DropDatabase { timeline, db }),
        3 => timeline.clone().prop_map(|timeline| Op::Freeze { timeline }),
        3 => (timeline.clone(), any::<bool>()).prop_map(|(timeline, publish_fails)| Op::Flush { timeline, publish_fails }),
        2 => (timeline.clone(), 0..RELS, 1u16..6).prop_map(|(timeline, rel, times)| Op::Flushes { timeline, rel, times }),
        3 => (timeline.clone(), any::<bool>()).prop_map(|(timeline, gives_up)| Op::Compact { timeline, gives_up }),
        1 => Just(Op::Reopen),
        1 => (timeline.clone(), 0u64..3000).prop_map(|(timeline, back)| Op::Branch { timeline, back }),
        4 => (timeline, 0u64..4000).prop_map(|(timeline, back)| Op::Check { timeline, back }),
    ]
}

fn rel(number: u32) -> RelFork {
    // Two relations in each of two databases.
    RelNode { spc: 1663, db: 5 + number % 2, rel: 16384 + number }.fork(Fork::Main)
}

/// A timeline of the engine, its model, and what its manifest says.
struct Both {
    id: TimelineId,
    ancestor: Option<(usize, Lsn)>,
    engine: Arc<Timeline>,
    model: Arc<NaiveHistory>,
    published: BTreeMap<LayerId, Arc<LayerRow>>,
    layered: Lsn,
}

struct World {
    _runtime: Runtime,
    _folder: tempfile::TempDir,
    resources: Arc<Resources>,
    timelines: Vec<Both>,
    lsn: Lsn,
}

fn resources(store: &Store, runtime: &Runtime, folder: &tempfile::TempDir) -> Arc<Resources> {
    Arc::new(Resources {
        block_cache: BlockCache::new(1 << 20),
        page_cache: PageCache::new(40 * BLCKSZ),
        memtable_budget: MemoryBudget::new(1 << 30),
        memtable_bytes_max: 1 << 20,
        layer_bytes_target: 2 << 10,
        files: OpenFiles::new(4),
        ranges: RangeCache::new(folder.path().join("cache"), 1 << 20),
        store: store.blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone()))),
        cache_dir: folder.path().join("cache"),
        clock: Arc::new(Instant::now),
    })
}

impl World {
    fn new(bucket: bool) -> World {
        let runtime = Runtime::new().unwrap();
        // In memory, where fsync costs nothing, if there is such a folder.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        std::fs::create_dir(folder.path().join("cache")).unwrap();
        let store = if bucket { SimStore::new().reliable() } else { Store::open_folder(&folder.path().join("store")).unwrap() };
        let resources = resources(&store, &runtime, &folder);
        let mut world = World { _runtime: runtime, _folder: folder, resources, timelines: Vec::new(), lsn: START };
        world.add(None, Arc::new(NaiveHistory::new(MAJOR, START)));
        world
    }

    fn add(&mut self, ancestor: Option<(usize, Lsn)>, model: Arc<NaiveHistory>) {
        let id = TimelineId([self.timelines.len() as u8 + 1; 16]);
        let start = ancestor.map_or(START, |(_, lsn)| lsn);
        let engine = self.open(id, ancestor, start, Vec::new());
        self.timelines.push(Both { id, ancestor, engine, model, published: BTreeMap::new(), layered: start });
    }

    fn open(&self, id: TimelineId, ancestor: Option<(usize, Lsn)>, layered: Lsn, layers: Vec<Arc<LayerRow>>) -> Arc<Timeline> {
        let start = ancestor.map_or(START, |(_, lsn)| lsn);
        let ancestor = ancestor.map(|(number, lsn)| (Arc::clone(&self.timelines[number].engine), lsn));
        let spec = TimelineSpec { tenant: TENANT, id, major: MAJOR, generation: Generation(1), ancestor, start, layered };
        Timeline::open(spec, Arc::clone(&self.resources), layers)
    }

    /// Everything in memory is lost; what the store lacks comes from the log again.
    fn reopen(&mut self) {
        let store = self.resources.store.store().clone();
        self.resources = resources(&store, &self._runtime, &self._folder);
        for number in 0..self.timelines.len() {
            let both = &self.timelines[number];
            let engine = self.open(both.id, both.ancestor, both.layered, both.published.values().cloned().collect());
            let mut versions = both.model.versions();
            versions.retain(|(_, lsn, _)| *lsn > both.layered);
            versions.sort_by_key(|(_, lsn, _)| *lsn);
            for (key, lsn, value) in versions {
                engine.put(key, lsn, value).unwrap();
            }
            engine.advance(both.model.applied());
            self.timelines[number].engine = engine;
        }
    }

    fn next_lsn(&mut self, step: u64) -> Lsn {
        self.lsn += 8 * step;
        self.lsn
    }

    fn put(&self, timeline: usize, key: Key, lsn: Lsn, value: Value) {
        self.timelines[timeline].model.put(key, lsn, value.clone()).unwrap();
        self.timelines[timeline].engine.put(key, lsn, value).unwrap();
    }

    fn advance(&self, timeline: usize, lsn: Lsn) {
        self.timelines[timeline].model.advance(lsn);
        self.timelines[timeline].engine.advance(lsn);
    }

    fn size(&self, timeline: usize, rel: RelFork) -> RelationSize {
        let model = &*self.timelines[timeline].model;
        relation::live_size(model, rel, model.applied()).unwrap().map(|live| live.size).unwrap_or_default()
    }

    fn write(&mut self, timeline: usize, rel: RelFork, block: u32, offset: u16, times: u16, advance_each: bool) {
        let mut size = self.size(timeline, rel);
        let is_new = !size.exists || size.blocks <= block || {
            let model = &*self.timelines[timeline].model;
            page::is_new(&relation::block(model, rel, block, model.applied()).unwrap())
        };
        let lsn = self.next_lsn(1);
        if size.extend(block + 1) {
            self.put(timeline, Key::relation_size(rel), lsn, Value::Image(size.encode()));
        }
        let key = Key::block(rel, block);
        if is_new {
            let mut fresh: Page = page::ZERO_PAGE;
            page::init(&mut fresh, 4000);
            fresh[BLCKSZ - 1] = offset as u8;
            self.put(timeline, key, lsn, Value::Image(Bytes::copy_from_slice(&fresh)));
        }
        for i in 0..times {
            let lsn = if i % 2 == 0 { self.next_lsn(1) } else { self.lsn };
            self.put(timeline, key, lsn, generic(rel, block, offset.wrapping_add(i), i as u8));
            if advance_each && i % 2 == 1 {
                self.advance(timeline, lsn);
            }
        }
        self.advance(timeline, self.lsn);
    }

    fn flush(&mut self, timeline: usize, publish_fails: bool) {
        let both = &mut self.timelines[timeline];
        let (published, layered) = (&mut both.published, &mut both.layered);
        let mut publish = |change: &LayerChange| {
            if publish_fails {
                return Err(not_published());
            }
            record(published, layered, change);
            Ok(())
        };
        // After a failure all stays as it was, for the next flush, or until everything is reopened.
        let fails = publish_fails && both.engine.frozen_memtables() > 0;
        assert_eq!(both.engine.flush(&mut publish).is_err(), fails);
        assert_eq!(both.engine.layered_lsn(), both.layered);
    }

    /// Merges what is due; if it gives up, after the first step of each merge.
    fn compact(&mut self, timeline: usize, gives_up: bool) {
        let both = &mut self.timelines[timeline];
        let (published, layered) = (&mut both.published, &mut both.layered);
        let mut publish = |change: &LayerChange| {
            record(published, layered, change);
            Ok(())
        };
        while both.engine.compact(&mut publish, &|| gives_up).unwrap() && !gives_up {}
        both.engine.delete_retired(&mut || Ok(())).unwrap();
        if !gives_up {
            let (blocks, others) = both.engine.run_counts();
            assert!(blocks < 12 && others < 12, "{blocks} runs of blocks and {others} others are left after merging");
        }
    }

    fn run(&mut self, op: &Op) {
        let count = self.timelines.len();
        match *op {
            Op::Write { timeline, rel: number, block, offset, times, advance_each } => {
                self.write(timeline % count, rel(number), block, offset, times, advance_each);
            }
            Op::Status { timeline, page, xid, status } => {
                let xids = vec![page * 32768 + xid];
                let lsn = self.next_lsn(2);
                let value = Value::Change { will_init: false, bytes: Change::ClogStatus { status, xids: xids.into() }.encode() };
                self.put(timeline % count, Key::slru_page(SlruKind::Clog, page), lsn, value);
                self.advance(timeline % count, lsn);
            }
            Op::Map { timeline, number, present } => {
                let lsn = self.next_lsn(3);
                let value = if present { Value::Image(Bytes::from(lsn.to_string())) } else { Value::Absent };
                self.put(timeline % count, Key::relation_map(1663, number), lsn, value);
                self.advance(timeline % count, lsn);
            }
            Op::Truncate { timeline, rel: number, blocks } => {
                let mut size = self.size(timeline % count, rel(number));
                if size.exists && blocks < size.blocks {
                    let lsn = self.next_lsn(4);
                    size.truncate(lsn, blocks);
                    self.put(timeline % count, Key::relation_size(rel(number)), lsn, Value::Image(size.encode()));
                    self.advance(timeline % count, lsn);
                }
            }
            Op::Drop { timeline, rel: number } => {
                let mut size = self.size(timeline % count, rel(number));
                let lsn = self.next_lsn(5);
                size.remove(lsn);
                self.put(timeline % count, Key::relation_size(rel(number)), lsn, Value::Image(size.encode()));
                self.advance(timeline % count, lsn);
            }
            Op::DropDatabase { timeline, db } => {
                let lsn = self.next_lsn(6);
                let entry = DatabaseEntry { exists: lsn.0.is_multiple_of(16), floor: lsn };
                self.put(timeline % count, Key::database(1663, 5 + db), lsn, Value::Image(entry.encode()));
                self.advance(timeline % count, lsn);
            }
            Op::Freeze { timeline } => {
                self.timelines[timeline % count].engine.freeze_if(0, Duration::ZERO);
            }
            Op::Flush { timeline, publish_fails } => self.flush(timeline % count, publish_fails),
            Op::Flushes { timeline, rel: number, times } => {
                for i in 0..times {
                    self.write(timeline % count, rel(number), u32::from(i) % BLOCKS, i * 7, 1 + i % 3, false);
                    self.timelines[timeline % count].engine.freeze_if(0, Duration::ZERO);
                    self.flush(timeline % count, false);
                }
            }
            Op::Compact { timeline, gives_up } => self.compact(timeline % count, gives_up),
            Op::Reopen => self.reopen(),
            Op::Branch { timeline, back } => {
                if count < TIMELINES_MAX {
                    let parent = timeline % count;
                    let model = &self.timelines[parent].model;
                    let lsn = Lsn(model.applied().0.saturating_sub(back)).max(START);
                    let branch = Arc::new(model.branch(lsn).unwrap());
                    self.add(Some((parent, lsn)), branch);
                }
            }
            Op::Check { timeline, back } => {
                let applied = self.timelines[timeline % count].model.applied();
                self.check(timeline % count, Lsn(applied.0.saturating_sub(back)).max(START));
                self.check(timeline % count, applied);
            }
        }
    }

    /// Everything that can be read of a timeline at an LSN is what the model says.
    fn check(&self, timeline: usize, lsn: Lsn) {
        let Both { engine, model, .. } = &self.timelines[timeline];
        assert_eq!(engine.applied(), model.applied());
        let wanted: Vec<_> = (0..RELS).flat_map(|number| (0..BLOCKS + 1).map(move |block| (rel(number), block))).collect();
        // Twice: the second time pages come from the cache.
        for round in 0..2 {
            let answers = engine.blocks(&wanted, lsn).unwrap();
            for ((rel, block), answer) in wanted.iter().zip(answers) {
                let expected = relation::block(&**model, *rel, *block, lsn);
                same_block(answer.map(|page| Box::new(*page)), &expected, &format!("block {block} of {rel} at {lsn}, round {round}"));
                if let Some(warm) = engine.block_if_warm(*rel, *block, lsn) {
                    same_block(warm.map(|page| Box::new(*page)), &expected, &format!("warm block {block} of {rel} at {lsn}"));
                }
                let alone = relation::block(&**engine, *rel, *block, lsn);
                same_block(alone, &expected, &format!("block {block} of {rel} alone at {lsn}"));
            }
        }
        for page in 0..2 {
            let key = Key::slru_page(SlruKind::Clog, page);
            let (found, expected) = (engine.page(key, Lsn::INVALID, lsn).unwrap(), model.page(key, Lsn::INVALID, lsn).unwrap());
            assert!(found == expected, "page {page} of pg_xact at {lsn}");
        }
        for number in 0..5 {
            let key = Key::relation_map(1663, number);
            assert_eq!(engine.get(key, lsn).unwrap(), model.get(key, lsn).unwrap(), "{key} at {lsn}");
        }
        for db in [5, 6, 7] {
            let list = |history: &dyn History| {
                let mut found = Vec::new();
                relation::list(history, 1663, db, lsn, &mut |rel, blocks| {
                    found.push((rel, blocks));
                    Ok(())
                })
                .unwrap();
                found
            };
            assert_eq!(list(&**engine), list(&**model), "relations of database {db} at {lsn}");
        }
        let scan = |history: &dyn History, range: Range<Key>| {
            let mut found = Vec::new();
            history
                .scan(range.start, range.end, lsn, &mut |key, value| {
                    found.push((key, value));
                    Ok(())
                })
                .unwrap();
            found
        };
        let all = Key::FIRST_METADATA..Key::MAX;
        assert_eq!(scan(&**engine, all.clone()), scan(&**model, all), "all values at {lsn}");
    }
}

/// What a manifest does.
fn record(published: &mut BTreeMap<LayerId, Arc<LayerRow>>, layered: &mut Lsn, change: &LayerChange) {
    published.extend(change.add.iter().map(|row| (row.id, Arc::new(row.clone()))));
    change.remove.iter().for_each(|id| drop(published.remove(id).expect("a layer that is removed was there")));
    *layered = change.layered.max(*layered);
}

fn same_block(found: Result<Box<Page>, RelationError>, expected: &Result<Box<Page>, RelationError>, what: &str) {
    match (found, expected) {
        (Ok(found), Ok(expected)) => {
            assert!(
                found == *expected,
                "{what}: the page of LSN {} was expected, that of {} was read",
                page::lsn(expected),
                page::lsn(&found)
            );
        }
        (found, expected) => {
            let words = |result: &Result<Box<Page>, RelationError>| result.as_ref().map(drop).map_err(ToString::to_string);
            assert_eq!(words(&found), words(expected), "{what}");
        }
    }
}

/// A record of an extension that changes one byte.
fn generic(rel: RelFork, block: u32, offset: u16, byte: u8) -> Value {
    let offset = BLCKSZ as u16 - 1 - offset % 4000;
    let data = [&offset.to_le_bytes()[..], &1u16.to_le_bytes(), &[byte]].concat();
    let record = BlockRecord {
        rmid: rmgr::GENERIC,
        info: 0,
        xid: 3,
        main_data: &[],
        block_id: 0,
        fork: rel.fork,
        blkno: block,
        will_init: false,
        has_data: true,
        data: &data,
        others: Others::new(),
    };
    Value::Change { will_init: false, bytes: Change::Record(record).encode() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_is_the_model(ops in proptest::collection::vec(op(), 1..120), bucket in any::<bool>()) {
        let mut world = World::new(bucket);
        for op in &ops {
            world.run(op);
        }
        for timeline in 0..world.timelines.len() {
            let applied = world.timelines[timeline].model.applied();
            for back in [0, 8, 100, 1000, 3000] {
                world.check(timeline, Lsn(applied.0.saturating_sub(back)).max(START));
            }
        }
    }
}

/// As if the manifest's log was claimed again and again.
fn not_published() -> PublishError {
    EditLogError::Contended { log: "log".parse().unwrap(), attempts: 1 }.into()
}
