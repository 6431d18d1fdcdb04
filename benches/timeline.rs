//! Reads of a timeline, hot and cold, and how fast memory becomes layers.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, RelFork, RelNode, page};
use varve_storage::block_cache::BlockCache;
use varve_storage::budget::MemoryBudget;
use varve_storage::history::HistoryWriter;
use varve_storage::ids::{Generation, TenantId, TimelineId};
use varve_storage::key::Key;
use varve_storage::layer::blob::OpenFiles;
use varve_storage::layer::range_cache::RangeCache;
use varve_storage::manifest::LayerRow;
use varve_storage::page_cache::PageCache;
use varve_storage::relation_size::RelationSize;
use varve_storage::store::Store;
use varve_storage::threads::RuntimeThreads;
use varve_storage::timeline::{LAYER_BYTES_TARGET, Resources, Timeline, TimelineSpec};
use varve_storage::value::Value;

/// Pages of the relation: 64 MiB.
const BLOCKS: u32 = 8192;
/// Pages that one request asks for where it asks for many.
const BATCH: u32 = 32;

fn rel() -> RelFork {
    RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main)
}

/// A page of rows as an application has them: it compresses to about a third.
fn image(block: u32) -> Bytes {
    let mut page = page::ZERO_PAGE;
    page::init(&mut page, 0);
    let mut random = u64::from(block) + 1;
    for row in page[1024..].chunks_mut(128) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        row[..8].copy_from_slice(&random.to_le_bytes());
        row[8..40].copy_from_slice(format!("name of customer {:015}", random >> 20).as_bytes().first_chunk::<32>().expect("it is as long"));
    }
    Bytes::copy_from_slice(&page)
}

fn resources(runtime: &Runtime, folder: &std::path::Path, cache_bytes: usize) -> Arc<Resources> {
    let store = Store::open_folder(&folder.join("store")).expect("the folder can be made");
    Arc::new(Resources {
        block_cache: BlockCache::new(cache_bytes),
        page_cache: PageCache::new(cache_bytes),
        memtable_budget: MemoryBudget::new(1 << 30),
        memtable_bytes_max: 1 << 30,
        garbage_bytes_min: 0,
        layer_bytes_target: LAYER_BYTES_TARGET,
        files: OpenFiles::new(64),
        ranges: RangeCache::new(folder.to_owned(), 1 << 30),
        store: store.blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone()))),
        cache_dir: folder.to_owned(),
        clock: Arc::new(Instant::now),
    })
}

fn open(resources: &Arc<Resources>, layered: Lsn, layers: &[Arc<LayerRow>]) -> Arc<Timeline> {
    let spec = TimelineSpec {
        tenant: TenantId([7; 16]),
        id: TimelineId([1; 16]),
        major: Major::V15,
        generation: Generation(1),
        ancestor: None,
        start: Lsn(0),
        layered,
        collected: varve_storage::retained::Retained::default(),
    };
    Timeline::open(spec, Arc::clone(resources), layers.iter().cloned())
}

/// A timeline with an image of each block in its memtable.
fn filled(resources: &Arc<Resources>) -> Arc<Timeline> {
    let timeline = open(resources, Lsn(0), &[]);
    let mut size = RelationSize::default();
    size.extend(BLOCKS);
    timeline.put(Key::relation_size(rel()), Lsn(8), Value::Image(size.encode())).expect("it can be put");
    for block in 0..BLOCKS {
        timeline.put(Key::block(rel(), block), Lsn(8 + u64::from(block)), Value::Image(image(block))).expect("it can be put");
    }
    timeline.advance(Lsn(8 + u64::from(BLOCKS)));
    timeline
}

fn flush(timeline: &Timeline) -> Vec<Arc<LayerRow>> {
    timeline.freeze_if(0, Duration::ZERO);
    let mut rows = Vec::new();
    let flushed = timeline.flush(&mut |change| {
        rows.extend(change.add.iter().cloned().map(Arc::new));
        Ok(())
    });
    flushed.expect("it can be flushed");
    rows
}

fn benches(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let mut group = c.benchmark_group("timeline");
    group.sample_size(10).measurement_time(Duration::from_secs(5));

    group.throughput(Throughput::Bytes(u64::from(BLOCKS) * BLCKSZ as u64));
    let large = resources(&runtime, folder.path(), 256 << 20);
    group.bench_function("flush of 64 MiB of images", |b| {
        b.iter_batched(|| filled(&large), |timeline| flush(&timeline), BatchSize::PerIteration);
    });

    let rows = flush(&filled(&large));
    let layered = Lsn(8 + u64::from(BLOCKS));
    let mut random = 1u64;
    let mut any_block = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as u32 % BLOCKS
    };
    group.throughput(Throughput::Elements(1));
    let cold = resources(&runtime, folder.path(), 0);
    let timeline = open(&cold, layered, &rows);
    group.bench_function("point read, nothing cached", |b| {
        b.iter(|| timeline.blocks(&[(rel(), any_block())], layered).expect("it can be read").len());
    });
    let timeline = open(&large, layered, &rows);
    (0..BLOCKS).for_each(|block| drop(timeline.blocks(&[(rel(), block)], layered)));
    group.bench_function("point read from the page cache", |b| {
        b.iter(|| timeline.blocks(&[(rel(), any_block())], layered).expect("it can be read").len());
    });
    group.bench_function("point read from the page cache, if it is warm", |b| {
        b.iter(|| timeline.block_if_warm(rel(), any_block(), layered).is_some_and(|page| page.is_ok_and(|page| page[0] == 0)));
    });
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    let timeline = open(&cold, layered, &rows);
    group.bench_function("32 neighbours, nothing cached", |b| {
        b.iter(|| {
            let first = any_block() / BATCH * BATCH;
            let wanted: Vec<_> = (first..first + BATCH).map(|block| (rel(), block)).collect();
            timeline.blocks(&wanted, layered).expect("they can be read").len()
        });
    });
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
