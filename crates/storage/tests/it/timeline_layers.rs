//! What becomes of a timeline's layers when things go wrong: a merge that is interrupted, a damaged object, a cache
//! folder that is wiped, a bucket that cannot be reached; and that reads stay cheap.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, RelFork, RelNode, page};
use varve_redo::change::Change;
use varve_storage::block_cache::BlockCache;
use varve_storage::budget::MemoryBudget;
use varve_storage::chain::CHAIN_CHANGES_MAX;
use varve_storage::edit_log::EditLogError;
use varve_storage::history::{History, HistoryWriter};
use varve_storage::ids::{Generation, LayerId, TenantId, TimelineId};
use varve_storage::key::Key;
use varve_storage::layer::Layer;
use varve_storage::layer::blob::{LocalBlob, OpenFiles};
use varve_storage::layer::range_cache::RangeCache;
use varve_storage::manifest::{LayerOwner, LayerRow};
use varve_storage::page_cache::PageCache;
use varve_storage::relation_size::RelationSize;
use varve_storage::retained::Retained;
use varve_storage::store::{Failure, Store};
use varve_storage::threads::RuntimeThreads;
use varve_storage::timeline::{LayerChange, PublishError, Resources, Timeline, TimelineSpec};
use varve_storage::value::Value;
use varve_testing::sim_store::{Faults, Link, SimStore};

const START: Lsn = Lsn(1000);
const BLOCKS: u32 = 40;

fn rel() -> RelFork {
    RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main)
}

/// Layers, and up to where they cover the history.
type Published = (BTreeMap<LayerId, Arc<LayerRow>>, Lsn);

/// A timeline, and a manifest that survives it.
struct Bench {
    runtime: Runtime,
    folder: tempfile::TempDir,
    store: Store,
    resources: Arc<Resources>,
    timeline: Arc<Timeline>,
    manifest: Arc<Mutex<Published>>,
    lsn: Lsn,
}

impl Bench {
    fn new(bucket: Option<Store>) -> Bench {
        let runtime = Runtime::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("cache")).unwrap();
        let store = bucket.unwrap_or_else(|| Store::open_folder(&folder.path().join("store")).unwrap());
        let resources = resources(&runtime, &folder, &store);
        let manifest = Arc::new(Mutex::new((BTreeMap::new(), START)));
        let timeline = open(&resources, &manifest.lock());
        Bench { runtime, folder, store, resources, timeline, manifest, lsn: START }
    }

    fn reopen(&mut self) {
        self.resources = resources(&self.runtime, &self.folder, &self.store);
        self.timeline = open(&self.resources, &self.manifest.lock());
    }

    /// A branch of the timeline that begins at `lsn`.
    fn branch(&self, lsn: Lsn) -> Arc<Timeline> {
        let spec = TimelineSpec {
            tenant: self.timeline.tenant(),
            id: TimelineId([2; 16]),
            major: Major::V15,
            generation: Generation(1),
            ancestor: Some((Arc::clone(&self.timeline), lsn)),
            start: lsn,
            layered: lsn,
            collected: Retained::default(),
        };
        Timeline::open(spec, Arc::clone(&self.resources), [])
    }

    fn next_lsn(&mut self) -> Lsn {
        self.lsn += 8;
        self.lsn
    }

    /// Gives each block a new version that says `number`.
    fn write_blocks(&mut self, number: u8) {
        let lsn = self.next_lsn();
        let mut size = RelationSize::default();
        size.extend(BLOCKS);
        self.timeline.put(Key::relation_size(rel()), lsn, Value::Image(size.encode())).unwrap();
        for block in 0..BLOCKS {
            self.timeline.put(Key::block(rel(), block), lsn, Value::Image(image(block, number))).unwrap();
        }
        self.timeline.advance(lsn);
    }

    fn publish(&self) -> impl FnMut(&LayerChange) -> Result<(), PublishError> + use<> {
        let manifest = Arc::clone(&self.manifest);
        move |change| {
            let mut manifest = manifest.lock();
            manifest.0.extend(change.add.iter().map(|row| (row.id, Arc::new(row.clone()))));
            change.remove.iter().for_each(|id| drop(manifest.0.remove(id).unwrap()));
            manifest.1 = manifest.1.max(change.layered);
            Ok(())
        }
    }

    fn flush(&self) {
        assert!(self.timeline.freeze_if(0, Duration::ZERO), "there is something to freeze");
        self.timeline.flush(&mut self.publish()).unwrap();
    }

    fn check_blocks(&self, lsn: Lsn, number: u8) {
        let wanted: Vec<_> = (0..BLOCKS).map(|block| (rel(), block)).collect();
        for (block, page) in self.timeline.blocks(&wanted, lsn).unwrap().into_iter().enumerate() {
            assert_eq!(page.unwrap()[..], image(block as u32, number), "block {block} at {lsn}");
        }
    }
}

fn resources(runtime: &Runtime, folder: &tempfile::TempDir, store: &Store) -> Arc<Resources> {
    Arc::new(Resources {
        block_cache: BlockCache::new(1 << 20),
        page_cache: PageCache::new(1 << 20),
        memtable_budget: MemoryBudget::new(1 << 20),
        memtable_bytes_max: 16 << 20,
        garbage_bytes_min: 0,
        layer_bytes_target: 8 << 10,
        files: OpenFiles::new(8),
        ranges: RangeCache::new(folder.path().join("cache"), 1 << 20),
        store: store.blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone()))),
        cache_dir: folder.path().join("cache"),
        clock: Arc::new(Instant::now),
    })
}

fn open(resources: &Arc<Resources>, manifest: &Published) -> Arc<Timeline> {
    let spec = TimelineSpec {
        tenant: TenantId([7; 16]),
        id: TimelineId([1; 16]),
        major: Major::V15,
        generation: Generation(1),
        ancestor: None,
        start: START,
        layered: manifest.1,
        collected: Retained::default(),
    };
    Timeline::open(spec, Arc::clone(resources), manifest.0.values().cloned())
}

/// Bytes that do not compress well.
fn image(block: u32, number: u8) -> Bytes {
    let mut page = page::ZERO_PAGE;
    page::init(&mut page, 0);
    let mut random = u64::from(block) << 8 | u64::from(number);
    for byte in &mut page[2000..4000] {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (random >> 56) as u8;
    }
    Bytes::copy_from_slice(&page)
}

#[test]
fn an_interrupted_merge_is_finished_after_a_restart_and_its_inputs_go() {
    let mut bench = Bench::new(None);
    for number in 1..=5 {
        bench.write_blocks(number);
        bench.flush();
    }
    assert_eq!(bench.timeline.run_counts(), (5, 5));
    let files = |bench: &Bench| bench.runtime.block_on(bench.store.list(&"tenants".parse().unwrap())).unwrap().len();
    let before = files(&bench);
    // Metadata are one small merge; of the blocks one step is done.
    bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| false).unwrap();
    bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| true).unwrap();
    let (runs, _) = bench.timeline.run_counts();
    assert!(runs > 5, "the first layer of the merge is there, and all inputs: {runs} runs");
    for _ in 0..2 {
        for number in 1..=5u8 {
            bench.check_blocks(START + 8 * u64::from(number), number);
        }
        bench.reopen();
    }
    while bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| false).unwrap() {}
    assert_eq!(bench.timeline.run_counts(), (1, 1));
    assert!(files(&bench) > before, "inputs are deleted only when told");
    let refused = bench.timeline.delete_retired(&mut || Err(not_published()));
    assert!(refused.is_err() && files(&bench) > before, "nothing is deleted by who may not");
    // One input was taken away by the first step already, before the restart; that file is left for the garbage
    // collector.
    assert!(bench.timeline.delete_retired(&mut || Ok(())).unwrap() > 0);
    assert_eq!(bench.timeline.delete_retired(&mut || Ok(())).unwrap(), 0);
    for number in 1..=5u8 {
        bench.check_blocks(START + 8 * u64::from(number), number);
    }
    bench.reopen();
    bench.check_blocks(bench.lsn, 5);
}

#[test]
fn a_layer_is_merged_and_deleted_by_its_owner_only_wherever_it_stands() {
    let mut bench = Bench::new(None);
    for number in 1..=5 {
        bench.write_blocks(number);
        bench.flush();
    }
    let own: Vec<Arc<LayerRow>> = bench.manifest.lock().0.values().cloned().collect();
    let owner = own[0].owner.unwrap();
    assert_eq!((owner.tenant, owner.timeline), (bench.timeline.tenant(), TimelineId([1; 16])));
    // A parent's, another tenant's, a template's, though all of them stand in this timeline's folder.
    let parent = LayerOwner { timeline: TimelineId([2; 16]), ..owner };
    let template = LayerOwner { tenant: TenantId([0; 16]), ..owner };
    for other in [Some(parent), Some(template), None] {
        let rows = own.iter().map(|row| (row.id, Arc::new(LayerRow { owner: other, ..LayerRow::clone(row) })));
        bench.manifest.lock().0.extend(rows);
        bench.reopen();
        assert!(
            !bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| false).unwrap(),
            "a layer of {other:?} was merged away"
        );
        assert_eq!(bench.timeline.delete_retired(&mut || Ok(())).unwrap(), 0);
        bench.check_blocks(bench.lsn, 5);
    }
    bench.manifest.lock().0.extend(own.iter().map(|row| (row.id, Arc::clone(row))));
    bench.reopen();
    while bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| false).unwrap() {}
    assert!(bench.timeline.delete_retired(&mut || Ok(())).unwrap() > 0, "its own it merges and deletes");
    bench.check_blocks(bench.lsn, 5);
}

#[test]
fn a_damaged_object_is_named_and_not_served() {
    let mut bench = Bench::new(None);
    bench.write_blocks(1);
    bench.flush();
    let row = bench.manifest.lock().0.values().find(|row| row.first_key.is_block()).unwrap().clone();
    let path = bench.store.local_path(&row.object).unwrap();
    let sound = std::fs::read(&path).unwrap();
    for at in [40, sound.len() / 2, sound.len() - 40, sound.len() - 3] {
        let mut damaged = sound.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, damaged).unwrap();
        bench.reopen();
        let results: Vec<_> = (0..BLOCKS).map(|block| bench.timeline.blocks(&[(rel(), block)], bench.lsn)).collect();
        let mut errors = 0;
        for (block, result) in results.into_iter().enumerate() {
            match result {
                Ok(pages) => assert_eq!(pages.into_iter().next().unwrap().unwrap()[..], image(block as u32, 1)),
                Err(error) => {
                    assert!(
                        error.to_string().contains(row.object.as_str()) && error.to_string().contains("is corrupt at offset"),
                        "{error}"
                    );
                    errors += 1;
                }
            }
        }
        assert!(errors > 0, "byte {at} is damaged and nobody noticed");
    }
    std::fs::remove_file(&path).unwrap();
    bench.reopen();
    let all: Vec<_> = (0..BLOCKS).map(|block| (rel(), block)).collect();
    let error = bench.timeline.blocks(&all, bench.lsn).map(drop).unwrap_err();
    assert!(error.to_string().contains(row.object.as_str()), "a missing object is named: {error}");
}

#[test]
fn a_wiped_cache_folder_costs_time_and_nothing_else() {
    let bucket = SimStore::new();
    let mut bench = Bench::new(Some(bucket.reliable()));
    for number in 1..=3 {
        bench.write_blocks(number);
        bench.flush();
    }
    let copies = bench.folder.path().join("cache/tenants");
    assert!(copies.is_dir(), "a bucket's layers have local copies");
    for wipe_first in [true, false] {
        if wipe_first {
            std::fs::remove_dir_all(&copies).unwrap();
        }
        bench.reopen();
        bench.check_blocks(START + 16, 2);
        if !wipe_first {
            std::fs::remove_dir_all(&copies).unwrap_or_default();
        }
        bench.check_blocks(bench.lsn, 3);
    }
    assert!(bench.resources.ranges.used_bytes() > 0, "what was read of the bucket is kept");
    // A copy that was cut is not believed, and neither is one that was damaged.
    bench.write_blocks(4);
    bench.flush();
    let row = bench.manifest.lock().0.values().find(|row| row.first_key.is_block() && row.lsn_end == bench.lsn).unwrap().clone();
    std::fs::File::options().write(true).open(bench.folder.path().join("cache").join(row.object.as_str())).unwrap().set_len(100).unwrap();
    bench.reopen();
    bench.check_blocks(bench.lsn, 4);
    bench.write_blocks(5);
    bench.flush();
    for row in bench.manifest.lock().0.values().filter(|row| row.first_key.is_block() && row.lsn_end == bench.lsn) {
        let path = bench.folder.path().join("cache").join(row.object.as_str());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.iter_mut().step_by(500).for_each(|byte| *byte ^= 1);
        std::fs::write(&path, bytes).unwrap();
    }
    bench.reopen();
    bench.check_blocks(bench.lsn, 5);
    // In the bucket itself nothing is forgiven.
    for row in bench.manifest.lock().0.values().filter(|row| row.first_key.is_block() && row.lsn_end == bench.lsn) {
        let mut bytes = bucket.objects()[&row.object].to_vec();
        bytes.iter_mut().step_by(500).for_each(|byte| *byte ^= 1);
        bucket.set(&row.object, Some(bytes.into()));
    }
    bench.reopen();
    let error = bench.timeline.blocks(&[(rel(), 0)], bench.lsn).map(drop).unwrap_err();
    assert!(error.to_string().contains("is corrupt at offset"), "{error}");
}

#[test]
fn what_cannot_be_uploaded_stays_in_memory_and_is_uploaded_later() {
    let bucket = SimStore::new();
    let client = bucket.client(1, Faults::default());
    let mut bench = Bench::new(Some(client.store()));
    bench.write_blocks(1);
    assert!(!bench.timeline.memory_over_budget());
    client.set_link(Link::Failing(Failure::Unreachable));
    assert!(bench.timeline.freeze_if(0, Duration::ZERO));
    for _ in 0..2 {
        let error = bench.timeline.flush(&mut bench.publish()).map(drop).unwrap_err();
        assert!(error.to_string().contains("tenants/"), "the object is named: {error}");
        bench.check_blocks(bench.lsn, 1);
        assert_eq!((bench.timeline.layered_lsn(), bench.timeline.frozen_memtables()), (START, 1));
        assert!(bench.manifest.lock().0.is_empty(), "nothing is published that is not there");
    }
    for number in 2..=5 {
        bench.write_blocks(number);
    }
    assert!(bench.timeline.memory_over_budget(), "ingest hears that memory is used up");
    client.set_link(Link::Up);
    while bench.timeline.flush(&mut bench.publish()).unwrap().is_some() {}
    assert_eq!(bench.timeline.layered_lsn(), START + 8);
    bench.flush();
    assert!(!bench.timeline.memory_over_budget());
    assert_eq!(bench.resources.memtable_budget.used_bytes(), bench.timeline.memtable_bytes());
    bench.check_blocks(START + 8, 1);
    bench.check_blocks(bench.lsn, 5);
}

#[test]
fn a_page_that_changes_often_never_costs_a_read_much_redo() {
    let mut bench = Bench::new(None);
    let key = Key::slru_page(SlruKind::Clog, 0);
    let lsn = bench.next_lsn();
    bench.timeline.put(key, lsn, Value::Image(Bytes::from(vec![0; BLCKSZ]))).unwrap();
    bench.timeline.advance(lsn);
    for xid in 3..3000 {
        let lsn = bench.next_lsn();
        let change = Change::ClogStatus { status: 1, xids: vec![xid].into() };
        bench.timeline.put(key, lsn, Value::Change { will_init: false, bytes: change.encode() }).unwrap();
        bench.timeline.advance(lsn);
        if xid == 1500 {
            bench.flush();
        }
    }
    bench.flush();
    for compacted in [false, true] {
        let mut changes = 0;
        for row in bench.manifest.lock().0.values() {
            let blob = LocalBlob::new(bench.store.local_path(&row.object).unwrap(), OpenFiles::new(1));
            let layer = Arc::new(Layer::new(row.info(), row.object.to_string(), 0, Box::new(blob)));
            let (mut iter, mut without_image) = (layer.iter(), 0);
            while let Some((_, version)) = iter.next().unwrap() {
                without_image = if version.value.is_base() { 0 } else { without_image + 1 };
                changes += usize::from(!version.value.is_base());
                assert!(without_image <= CHAIN_CHANGES_MAX, "compacted: {compacted}");
            }
        }
        assert!(changes > 2900, "history is kept: {changes}");
        for _ in 0..3 {
            let lsn = bench.next_lsn();
            let change = Change::ClogStatus { status: 1, xids: vec![1].into() };
            bench.timeline.put(key, lsn, Value::Change { will_init: false, bytes: change.encode() }).unwrap();
            bench.timeline.advance(lsn);
            bench.flush();
        }
        while bench.timeline.compact(&Retained::default(), &mut bench.publish(), &|| false).unwrap() {}
        bench.reopen();
    }
    let page = bench.timeline.page(key, Lsn(0), bench.lsn).unwrap().unwrap();
    assert_eq!((page[1], page[700]), (0x55, 0x55), "transactions 4 to 7 and 2800 to 2803 are committed");
    let early = bench.timeline.page(key, Lsn(0), START + 8 * 100).unwrap().unwrap();
    assert_eq!((early[1], early[700]), (0x55, 0));
}

#[test]
fn what_was_read_once_is_answered_from_memory_also_on_a_branch() {
    let mut bench = Bench::new(None);
    bench.write_blocks(1);
    bench.flush();
    let main = Arc::clone(&bench.timeline);
    let branch_lsn = bench.lsn;
    let branch = bench.branch(branch_lsn);
    let warm = |timeline: &Timeline, block: u32| {
        timeline.block_if_warm(rel(), block, timeline.applied()).map(|page| page.unwrap()[..] == image(block, 1)[..])
    };
    for timeline in [&main, &branch] {
        assert_eq!(warm(timeline, 3), None, "nothing was read yet");
        timeline.blocks(&[(rel(), 3)], timeline.applied()).unwrap();
        assert_eq!(warm(timeline, 3), Some(true));
        // WAL goes on, about other things.
        timeline.put(Key::relation_map(1663, 5), timeline.applied() + 8, Value::Absent).unwrap();
        timeline.advance(timeline.applied() + 8);
        assert_eq!(warm(timeline, 3), Some(true));
    }
    // The branch changes the page; main does not see it.
    branch.put(Key::block(rel(), 3), branch.applied() + 8, Value::Image(image(3, 9))).unwrap();
    branch.advance(branch.applied() + 8);
    assert_eq!((warm(&main, 3), warm(&branch, 3)), (Some(true), Some(false)));
    assert!(branch.block_if_warm(rel(), BLOCKS, branch.applied()).is_some_and(|answer| answer.is_err()), "there is no such block");
    // Main's copy changes; the branch keeps that of the branch point.
    main.put(Key::block(rel(), 4), main.applied() + 8, Value::Image(image(4, 9))).unwrap();
    main.advance(main.applied() + 8);
    main.blocks(&[(rel(), 4)], main.applied()).unwrap();
    branch.blocks(&[(rel(), 4)], branch.applied()).unwrap();
    assert_eq!((warm(&main, 4), warm(&branch, 4)), (Some(false), Some(true)));
    assert_eq!(branch.layer_stats(), (0, 0), "a branch that was not flushed has no layers");
}

#[test]
fn what_an_ancestor_has_not_applied_yet_is_not_taken_for_absent() {
    let mut bench = Bench::new(None);
    bench.write_blocks(1);
    // A branch of WAL that is durable, and not ingested yet.
    let branch_lsn = bench.lsn + 8;
    let branch = bench.branch(branch_lsn);
    let read = || branch.blocks(&[(rel(), 3)], branch_lsn).map(|pages| pages.into_iter().next().unwrap().unwrap()[..] == image(3, 2)[..]);
    let error = read().unwrap_err().to_string();
    assert!(error.contains("is applied up to"), "{error}");
    assert!(branch.scan(Key::FIRST_METADATA, Key::MAX, branch_lsn, &mut |_, _| Ok(())).is_err());
    assert!(branch.block_if_warm(rel(), 3, branch_lsn).is_none());
    bench.write_blocks(2);
    assert_eq!(bench.lsn, branch_lsn);
    assert!(read().unwrap(), "the version that came later is the branch's");
}

/// As if the manifest's log was claimed again and again.
fn not_published() -> PublishError {
    EditLogError::Contended { log: "log".parse().unwrap(), attempts: 1 }.into()
}
