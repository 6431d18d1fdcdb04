//! The engine answers what the naive model answers: on branches, across freezes, flushes, failed publishings, merges,
//! also interrupted ones, collections down to a window and
//! pins, and reopening from the store, with truncations, drops of relations and of databases.

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
use varve_storage::retained::Retained;
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
    /// The window begins later, and what that leaves behind is collected.
    Collect {
        timeline: usize,
        back: u64,
        publishing: Publishing,
    },
    /// Something holds a position, or nothing does any more.
    Pin {
        timeline: usize,
        back: u64,
    },
    Unpin {
        timeline: usize,
    },
    /// Nobody goes on with a timeline that others have left.
    LoseName {
        timeline: usize,
    },
}

/// What becomes of the publishing of a collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publishing {
    Works,
    Fails,
    /// It works, and nobody hears of it.
    IsNotHeardOf,
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
        4 => (timeline.clone(), 0u64..4000).prop_map(|(timeline, back)| Op::Check { timeline, back }),
        5 => (timeline.clone(), 0u64..2000, publishing()).prop_map(|(timeline, back, publishing)| Op::Collect { timeline, back, publishing }),
        2 => (timeline.clone(), 0u64..3000).prop_map(|(timeline, back)| Op::Pin { timeline, back }),
        1 => timeline.clone().prop_map(|timeline| Op::Unpin { timeline }),
        1 => timeline.prop_map(|timeline| Op::LoseName { timeline }),
    ]
}

fn publishing() -> impl Strategy<Value = Publishing> {
    prop_oneof![8 => Just(Publishing::Works), 1 => Just(Publishing::Fails), 1 => Just(Publishing::IsNotHeardOf)]
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
    manifest: Published,
    cutoff: Lsn,
    pins: Vec<Lsn>,
    has_name: bool,
}

/// What a timeline's manifest says.
struct Published {
    layers: BTreeMap<LayerId, Arc<LayerRow>>,
    layered: Lsn,
    collected: Retained,
}

impl Published {
    /// Takes a change in; one that it has already once more.
    fn record(&mut self, change: &LayerChange) {
        self.layers.extend(change.add.iter().map(|row| (row.id, Arc::new(row.clone()))));
        let is_repeated = change.collected.as_ref() == Some(&self.collected);
        for id in &change.remove {
            assert!(self.layers.remove(id).is_some() || is_repeated, "a layer that is removed was there");
        }
        self.layered = change.layered.max(self.layered);
        if let Some(collected) = &change.collected {
            self.collected = collected.clone();
        }
    }
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
        garbage_bytes_min: 0,
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
        let manifest = Published { layers: BTreeMap::new(), layered: start, collected: Retained::default() };
        let engine = self.open(id, ancestor, &manifest);
        self.timelines.push(Both { id, ancestor, engine, model, manifest, cutoff: Lsn::INVALID, pins: Vec::new(), has_name: true });
    }

    fn open(&self, id: TimelineId, ancestor: Option<(usize, Lsn)>, manifest: &Published) -> Arc<Timeline> {
        let start = ancestor.map_or(START, |(_, lsn)| lsn);
        let ancestor = ancestor.map(|(number, lsn)| (Arc::clone(&self.timelines[number].engine), lsn));
        let (generation, layered, collected) = (Generation(1), manifest.layered, manifest.collected.clone());
        let spec = TimelineSpec { tenant: TENANT, id, major: MAJOR, generation, ancestor, start, layered, collected };
        Timeline::open(spec, Arc::clone(&self.resources), manifest.layers.values().cloned())
    }

    /// The timeline in whose own history a position of another one lies.
    fn owner(&self, mut timeline: usize, lsn: Lsn) -> usize {
        while let Some((ancestor, _)) = self.timelines[timeline].ancestor.filter(|(_, start)| lsn <= *start) {
            timeline = ancestor;
        }
        timeline
    }

    /// What must stay readable of a timeline's own history.
    fn retained(&self, timeline: usize) -> Retained {
        let both = &self.timelines[timeline];
        let children = self.timelines.iter().filter_map(|child| child.ancestor);
        let points = children.filter(|(parent, lsn)| self.owner(*parent, *lsn) == timeline).map(|(_, lsn)| lsn);
        let pins: Vec<Lsn> = points.chain(both.pins.iter().copied()).collect();
        let top = if both.has_name { Lsn::MAX } else { pins.iter().copied().max().unwrap_or(Lsn::INVALID) };
        Retained::new(both.cutoff, top, pins)
    }

    fn holds(&self, timeline: usize, lsn: Lsn) -> bool {
        self.retained(self.owner(timeline, lsn)).holds(lsn)
    }

    /// A position of a timeline so far back, if it is retained.
    fn position(&self, timeline: usize, back: u64) -> Option<Lsn> {
        let lsn = Lsn(self.timelines[timeline].model.applied().0.saturating_sub(back)).max(START);
        self.holds(timeline, lsn).then_some(lsn)
    }

    fn collect(&mut self, timeline: usize, back: u64, publishing: Publishing) {
        let both = &mut self.timelines[timeline];
        let applied = both.model.applied();
        both.cutoff = both.cutoff.max(Lsn(applied.0.saturating_sub(back)));
        let retained = self.retained(timeline);
        let both = &mut self.timelines[timeline];
        let mut outcomes = vec![Publishing::Works, publishing];
        let mut publish = |change: &LayerChange| {
            let outcome = if change.collected.is_some() { outcomes.pop().unwrap_or(Publishing::Works) } else { Publishing::Works };
            if outcome != Publishing::Fails {
                both.manifest.record(change);
            }
            if outcome == Publishing::Works { Ok(()) } else { Err(not_published()) }
        };
        for _ in 0..100 {
            match both.engine.compact(&retained, &mut publish, &|| false) {
                Ok(false) => break,
                Ok(true) => {}
                // Half of the time it is tried again, and the other half all stays as it is until it is reopened.
                Err(_) if back.is_multiple_of(2) => {}
                Err(_) => break,
            }
        }
        both.engine.delete_retired(&mut || Ok(())).unwrap();
    }

    /// Everything in memory is lost; what the store lacks comes from the log again.
    fn reopen(&mut self) {
        let store = self.resources.store.store().clone();
        self.resources = resources(&store, &self._runtime, &self._folder);
        for number in 0..self.timelines.len() {
            let both = &self.timelines[number];
            let engine = self.open(both.id, both.ancestor, &both.manifest);
            let mut versions = both.model.versions();
            versions.retain(|(_, lsn, _)| *lsn > both.manifest.layered);
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
        let manifest = &mut both.manifest;
        let mut publish = |change: &LayerChange| {
            if publish_fails {
                return Err(not_published());
            }
            manifest.record(change);
            Ok(())
        };
        // After a failure all stays as it was, for the next flush, or until everything is reopened.
        let fails = publish_fails && both.engine.frozen_memtables() > 0;
        assert_eq!(both.engine.flush(&mut publish).is_err(), fails);
        assert_eq!(both.engine.layered_lsn(), both.manifest.layered);
    }

    /// Merges what is due; if it gives up, after the first step of each merge.
    fn compact(&mut self, timeline: usize, gives_up: bool) {
        let retained = self.retained(timeline);
        let both = &mut self.timelines[timeline];
        let mut publish = |change: &LayerChange| {
            both.manifest.record(change);
            Ok(())
        };
        while both.engine.compact(&retained, &mut publish, &|| gives_up).unwrap() && !gives_up {}
        both.engine.delete_retired(&mut || Ok(())).unwrap();
        if !gives_up {
            let (blocks, others) = both.engine.run_counts();
            assert!(blocks < 12 && others < 12, "{blocks} runs of blocks and {others} others are left after merging");
        }
    }

    /// The timeline that an operation writes to, if it writes.
    fn written(&self, op: &Op) -> Option<usize> {
        match op {
            Op::Write { timeline, .. }
            | Op::Status { timeline, .. }
            | Op::Map { timeline, .. }
            | Op::Truncate { timeline, .. }
            | Op::Drop { timeline, .. }
            | Op::DropDatabase { timeline, .. }
            | Op::Flushes { timeline, .. } => Some(timeline % self.timelines.len()),
            _ => None,
        }
    }

    fn run(&mut self, op: &Op) {
        let count = self.timelines.len();
        if self.written(op).is_some_and(|timeline| !self.timelines[timeline].has_name) {
            return;
        }
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
                    let Some(lsn) = self.position(parent, back) else { return };
                    let branch = Arc::new(self.timelines[parent].model.branch(lsn).unwrap());
                    self.add(Some((parent, lsn)), branch);
                }
            }
            Op::Check { timeline, back } => {
                let applied = self.timelines[timeline % count].model.applied();
                self.check(timeline % count, Lsn(applied.0.saturating_sub(back)).max(START));
                self.check(timeline % count, applied);
                for pin in self.retained(timeline % count).pins().to_vec() {
                    self.check(timeline % count, pin);
                }
            }
            Op::Collect { timeline, back, publishing } => self.collect(timeline % count, back, publishing),
            Op::Pin { timeline, back } => {
                if let Some(lsn) = self.position(timeline % count, back) {
                    let owner = self.owner(timeline % count, lsn);
                    self.timelines[owner].pins.push(lsn);
                }
            }
            Op::Unpin { timeline } => drop(self.timelines[timeline % count].pins.pop()),
            Op::LoseName { timeline } => {
                let has_children = self.timelines.iter().any(|child| child.ancestor.is_some_and(|(parent, _)| parent == timeline % count));
                self.timelines[timeline % count].has_name &= !has_children;
            }
        }
    }

    /// Everything that can be read of a timeline at an LSN is what the model says; where the history is collected it
    /// may be refused.
    fn check(&self, timeline: usize, lsn: Lsn) {
        let Both { engine, model, .. } = &self.timelines[timeline];
        let may_be_refused = !self.holds(timeline, lsn);
        let refused = |error: &dyn std::fmt::Display| may_be_refused && error.to_string().contains("its history is kept from");
        assert_eq!(engine.applied(), model.applied());
        let wanted: Vec<_> = (0..RELS).flat_map(|number| (0..BLOCKS + 1).map(move |block| (rel(number), block))).collect();
        // Twice: the second time pages come from the cache.
        for round in 0..2 {
            let answers = match engine.blocks(&wanted, lsn) {
                Ok(answers) => answers,
                Err(error) if refused(&error) => Vec::new(),
                Err(error) => panic!("blocks at {lsn}: {error}"),
            };
            for ((rel, block), answer) in wanted.iter().zip(answers) {
                let expected = relation::block(&**model, *rel, *block, lsn);
                same_block(answer.map(|page| Box::new(*page)), &expected, &format!("block {block} of {rel} at {lsn}, round {round}"));
                if let Some(warm) = engine.block_if_warm(*rel, *block, lsn) {
                    same_block(warm.map(|page| Box::new(*page)), &expected, &format!("warm block {block} of {rel} at {lsn}"));
                }
                let alone = relation::block(&**engine, *rel, *block, lsn);
                if !alone.as_ref().is_err_and(|error| refused(error)) {
                    same_block(alone, &expected, &format!("block {block} of {rel} alone at {lsn}"));
                }
            }
        }
        for page in 0..2 {
            let key = Key::slru_page(SlruKind::Clog, page);
            let expected = model.page(key, Lsn::INVALID, lsn).unwrap();
            match engine.page(key, Lsn::INVALID, lsn) {
                Ok(found) => assert!(found == expected, "page {page} of pg_xact at {lsn}"),
                Err(error) => assert!(refused(&error), "page {page} of pg_xact at {lsn}: {error}"),
            }
        }
        for number in 0..5 {
            let key = Key::relation_map(1663, number);
            match engine.get(key, lsn) {
                Ok(found) => assert_eq!(found, model.get(key, lsn).unwrap(), "{key} at {lsn}"),
                Err(error) => assert!(refused(&error), "{key} at {lsn}: {error}"),
            }
        }
        for db in [5, 6, 7] {
            let list = |history: &dyn History| {
                let mut found = Vec::new();
                let listed = relation::list(history, 1663, db, lsn, &mut |rel, blocks| {
                    found.push((rel, blocks));
                    Ok(())
                });
                listed.map(|()| found)
            };
            match list(&**engine) {
                Ok(found) => assert_eq!(found, list(&**model).unwrap(), "relations of database {db} at {lsn}"),
                Err(error) => assert!(refused(&error), "relations of database {db} at {lsn}: {error}"),
            }
        }
        let scan = |history: &dyn History, range: Range<Key>| {
            let mut found = Vec::new();
            let scanned = history.scan(range.start, range.end, lsn, &mut |key, value| {
                found.push((key, value));
                Ok(())
            });
            scanned.map(|()| found)
        };
        let all = Key::FIRST_METADATA..Key::MAX;
        match scan(&**engine, all.clone()) {
            Ok(found) => assert_eq!(found, scan(&**model, all).unwrap(), "all values at {lsn}"),
            Err(error) => assert!(refused(&error), "all values at {lsn}: {error}"),
        }
    }
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
            for pin in world.retained(timeline).pins().to_vec() {
                world.check(timeline, pin);
            }
        }
    }
}

/// As if the manifest's log was claimed again and again.
fn not_published() -> PublishError {
    EditLogError::Contended { log: "log".parse().unwrap(), attempts: 1 }.into()
}
