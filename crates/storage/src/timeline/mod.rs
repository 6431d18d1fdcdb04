//! A timeline: one history, read at any LSN and written at its end.
//!
//! What it has, newest first: the memtable that is being written, frozen ones that wait to become layers, and layers.
//! What it does not have itself, its ancestor has, up to the branch point. All of that is one immutable [`View`],
//! swapped when a memtable is frozen, flushed, or when layers are merged; a read takes the view once and is done with
//! locks, except a memtable's own.
//!
//! - [`read`]: pages and values at an LSN; [`scan`]: keys in order;
//! - [`write`]: puts, and what they lead to: images in long chains, freezing;
//! - [`flush`]: a frozen memtable becomes layers, is uploaded, published, and dropped;
//! - [`merge`]: neighbouring runs of layers become one;
//! - [`collect`]: the oldest of them are reduced to what is retained.
//!
//! Invariants: readers ask for LSNs that are applied; everything at or below [`Timeline::layered_lsn`] is in layers
//! that are published; memtables and layers tile the LSNs above the branch point without gap or overlap, but for the
//! inputs of a merge that is being published.

mod collect;
mod flush;
mod layer_file;
mod merge;
mod positions;
mod read;
mod scan;
mod write;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use varve_postgres::{Lsn, Major};

use crate::block_cache::BlockCache;
use crate::budget::MemoryBudget;
use crate::ids::{Generation, TenantId, TimelineId};
use crate::layer::Layer;
use crate::layer::blob::{LayerBlob, LocalBlob, OpenFiles, RemoteBlob};
use crate::layer::range_cache::RangeCache;
use crate::layer_map::LayerMap;
use crate::manifest::{LayerOwner, LayerRow};
use crate::memtable::Memtable;
use crate::page_cache::PageCache;
use crate::retained::Retained;
use crate::size_cache::SizeCache;
use crate::store::BlockingStore;
use crate::threads::Clock;

pub use flush::{FlushError, LayerChange, Publish, PublishError};
pub use layer_file::WriteError;
pub use positions::{Position, Positions, Stopped, WaitError};
pub use read::{PageRef, ReadError};

use collect::{Failure, Unpublished};
use flush::WrittenLayers;
use write::Writer;

/// Memory of a memtable at which it is frozen, unless told otherwise.
pub const MEMTABLE_BYTES_MAX: usize = 64 << 20;

/// Bytes of a layer after which the next key begins another one, unless told otherwise.
pub const LAYER_BYTES_TARGET: u64 = 64 << 20;

/// Bytes that a collection must be expected to free, unless told otherwise.
pub const GARBAGE_BYTES_MIN: u64 = 64 << 10;

/// Bytes of layers in a bucket that are kept on local disk after they were read by ranges, unless told otherwise.
pub const RANGE_CACHE_BYTES_MAX: u64 = 2 << 30;

/// What all timelines of a pageserver share.
pub struct Resources {
    /// Contents of layer blocks.
    pub block_cache: Arc<BlockCache>,
    /// Materialised pages.
    pub page_cache: Arc<PageCache>,
    /// Memory of all memtables.
    pub memtable_budget: Arc<MemoryBudget>,
    /// Memory of one memtable at which it is frozen.
    pub memtable_bytes_max: usize,
    /// Bytes of a layer after which the next key begins another one. An upload holds as much in memory.
    pub layer_bytes_target: u64,
    /// Bytes that a collection must be expected to free.
    pub garbage_bytes_min: u64,
    /// Layer files that are open.
    pub files: Arc<OpenFiles>,
    /// Parts of layers that were read from a bucket.
    pub ranges: Arc<RangeCache>,
    /// Where layers live.
    pub store: BlockingStore,
    /// Folder for local copies of layers whose store is a bucket. It must exist.
    pub cache_dir: PathBuf,
    /// Tells the time.
    pub clock: Clock,
}

/// What a timeline is, beside its layers.
#[derive(Clone)]
pub struct TimelineSpec {
    /// Its tenant.
    pub tenant: TenantId,
    /// Its id.
    pub id: TimelineId,
    /// The major whose WAL it is made of.
    pub major: Major,
    /// The pageserver's ownership, in the names of what it writes.
    pub generation: Generation,
    /// The timeline that this one branched off, and where.
    pub ancestor: Option<(Arc<Timeline>, Lsn)>,
    /// Where its own history begins: the branch point, or for a root the LSN before its first version.
    pub start: Lsn,
    /// Everything up to here is in the layers given.
    pub layered: Lsn,
    /// Where the layers can be read.
    pub collected: Retained,
}

impl TimelineSpec {
    /// Whose the layers are that it writes.
    fn owner(&self) -> LayerOwner {
        LayerOwner { tenant: self.tenant, timeline: self.id }
    }
}

/// A frozen memtable and the LSN up to which it has everything.
struct Frozen {
    memtable: Arc<Memtable>,
    end: Lsn,
}

/// What a timeline has of its own.
struct View {
    active: Arc<Memtable>,
    /// Newest first.
    frozen: Vec<Arc<Frozen>>,
    layers: Arc<LayerMap>,
    /// Everything up to here is in `layers`.
    layered: Lsn,
}

/// See the module's doc.
pub struct Timeline {
    spec: TimelineSpec,
    resources: Arc<Resources>,
    view: ArcSwap<View>,
    /// Whoever changes the view holds this, or `writer`, which comes first.
    view_lock: Mutex<()>,
    positions: Positions,
    writer: Mutex<Writer>,
    sizes: SizeCache,
    /// Whoever flushes holds this; within, what was written and is not yet published.
    flush: Mutex<Option<WrittenLayers>>,
    /// Whoever merges layers holds this; within, a collection that was not published.
    merge: Mutex<Option<Unpublished>>,
    /// Where the layers can be read. It is changed before layers of which it is true are put in, so who asks after
    /// having read learns in time that what he read does not count.
    collected: ArcSwap<Retained>,
    /// The last collection, if it failed.
    collect_failure: Mutex<Option<Failure>>,
    /// Merged layers, no longer in the view, whose objects are to be deleted once nobody reads them.
    retired: Mutex<Vec<Arc<Layer>>>,
}

impl Timeline {
    /// The timeline `spec` with the layers that its manifest names. Reads nothing.
    pub fn open(spec: TimelineSpec, resources: Arc<Resources>, layers: impl IntoIterator<Item = Arc<LayerRow>>) -> Arc<Timeline> {
        let layers = layers.into_iter().map(|row| Arc::new(open_layer(&resources, &spec, &row))).collect();
        let applied = spec.layered.max(spec.start);
        let active = Arc::new(Memtable::new(applied, resources.clock.clone(), Arc::clone(&resources.memtable_budget)));
        let view = View { active: Arc::clone(&active), frozen: Vec::new(), layers: Arc::new(LayerMap::new(layers)), layered: applied };
        Arc::new(Timeline {
            positions: Positions::new(spec.id, applied),
            collected: ArcSwap::from_pointee(spec.collected.clone()),
            spec,
            resources,
            view: ArcSwap::from_pointee(view),
            view_lock: Mutex::new(()),
            writer: Mutex::new(Writer::new(active)),
            sizes: SizeCache::new(applied),
            flush: Mutex::new(None),
            merge: Mutex::new(None),
            collect_failure: Mutex::new(None),
            retired: Mutex::default(),
        })
    }

    /// Its tenant.
    pub fn tenant(&self) -> TenantId {
        self.spec.tenant
    }

    /// Its id.
    pub fn id(&self) -> TimelineId {
        self.spec.id
    }

    /// The timeline that it branched off, and where.
    pub fn ancestor(&self) -> Option<(&Arc<Timeline>, Lsn)> {
        self.spec.ancestor.as_ref().map(|(ancestor, lsn)| (ancestor, *lsn))
    }

    /// Where its own history begins.
    pub fn start(&self) -> Lsn {
        self.spec.start
    }

    /// Where it stands.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The newest LSN that can be read.
    pub fn applied(&self) -> Lsn {
        self.positions.applied()
    }

    /// Everything up to here is in published layers.
    pub fn layered_lsn(&self) -> Lsn {
        self.view.load().layered
    }

    /// Memory of its memtables.
    pub fn memtable_bytes(&self) -> usize {
        let view = self.view.load();
        view.active.memory_bytes() + view.frozen.iter().map(|frozen| frozen.memtable.memory_bytes()).sum::<usize>()
    }

    /// Whether the memtables of all timelines together take more memory than they should: then ingest pauses until
    /// flushes have caught up.
    pub fn memory_over_budget(&self) -> bool {
        self.resources.memtable_budget.is_over()
    }

    /// Number and bytes of its own layers.
    pub fn layer_stats(&self) -> (usize, u64) {
        let layers = Arc::clone(&self.view.load().layers);
        layers.layers().fold((0, 0), |(count, bytes), layer| (count + 1, bytes + layer.info().length))
    }

    /// Where the layers can be read.
    pub fn collected(&self) -> Arc<Retained> {
        self.collected.load_full()
    }

    /// Gives back what an idle timeline need not hold.
    pub fn shrink(&self) {
        self.sizes.clear();
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeline {} of tenant {}", self.spec.id, self.spec.tenant)
    }
}

/// A layer of the timeline `spec` to be read: in place where the store is a folder; else from the local copy if there
/// is one, and from the bucket.
fn open_layer(resources: &Resources, spec: &TimelineSpec, row: &LayerRow) -> Layer {
    let files = Arc::clone(&resources.files);
    let blob: Box<dyn LayerBlob> = match resources.store.store().local_path(&row.object) {
        Some(path) => Box::new(LocalBlob::new(path, files)),
        None => {
            let copy = LocalBlob::new(resources.cache_dir.join(row.object.as_str()), files);
            let end = row.offset.saturating_add(row.length);
            Box::new(RemoteBlob::new(resources.store.clone(), row.object.clone(), end, copy, Arc::clone(&resources.ranges)))
        }
    };
    let layer = Layer::new(row.info(), row.object.to_string(), row.offset, blob);
    if row.owner == Some(spec.owner()) { layer.into_own() } else { layer }
}
