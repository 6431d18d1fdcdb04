//! Where histories come from: the shared resources of the engine, a timeline's layers, a template's.

use std::sync::Arc;
use std::time::Duration;

use varve_postgres::{Lsn, Major};
use varve_storage::block_cache::BlockCache;
use varve_storage::budget::MemoryBudget;
use varve_storage::edit_log::Ownership;
use varve_storage::ids::{Generation, TenantId, TimelineId};
use varve_storage::layer::blob::OpenFiles;
use varve_storage::layer::range_cache::RangeCache;
use varve_storage::manifest::{LayerRow, Manifest};
use varve_storage::page_cache::PageCache;
use varve_storage::retained::Retained;
use varve_storage::store::Store;
use varve_storage::tenant_log::TimelineState;
use varve_storage::threads::Threads;
use varve_storage::timeline::{
    GARBAGE_BYTES_MIN, LAYER_BYTES_TARGET, LayerChange, MEMTABLE_BYTES_MAX, RANGE_CACHE_BYTES_MAX, Resources, Timeline, TimelineSpec,
};

use crate::context::Context;
use crate::error::EngineError;
use crate::template::Template;

/// Layer files that are open at a time.
const OPEN_FILES_MAX: usize = 512;
/// Part of the cache that holds blocks of layers; the rest holds pages.
const BLOCK_CACHE_SHARE: u64 = 4;

/// The engine's shared parts on `threads`, with caches of `cache_bytes` and memtables of at most `memtable_bytes`
/// together.
///
/// The folder for copies of layers, `cache_dir`, must exist.
pub fn resources(
    store: &Store,
    threads: &Arc<dyn Threads>,
    cache_dir: std::path::PathBuf,
    cache_bytes: u64,
    memtable_bytes: u64,
) -> Resources {
    Resources {
        block_cache: BlockCache::new((cache_bytes / BLOCK_CACHE_SHARE) as usize),
        page_cache: PageCache::new((cache_bytes - cache_bytes / BLOCK_CACHE_SHARE) as usize),
        memtable_budget: MemoryBudget::new(memtable_bytes as usize),
        memtable_bytes_max: MEMTABLE_BYTES_MAX,
        garbage_bytes_min: GARBAGE_BYTES_MIN,
        layer_bytes_target: LAYER_BYTES_TARGET,
        files: OpenFiles::new(OPEN_FILES_MAX),
        ranges: RangeCache::new(cache_dir.clone(), RANGE_CACHE_BYTES_MAX),
        store: store.blocking(threads.clone()),
        cache_dir,
        clock: threads.clock(),
    }
}

/// A timeline's history, and what writes its manifest if there is one.
pub(crate) struct OpenedHistory {
    pub(crate) history: Arc<Timeline>,
    pub(crate) layered: Lsn,
    pub(crate) manifest: Manifest,
}

/// Opens the history of a timeline: its manifest's layers, the template's where it has no ancestor.
pub(crate) async fn open_history(
    context: &Context,
    tenant: TenantId,
    major: Major,
    state: &TimelineState,
    ancestor: Option<(Arc<Timeline>, Lsn)>,
    template: &Template,
    ownership: Ownership,
) -> Result<OpenedHistory, EngineError> {
    let manifest = Manifest::open(&context.store, tenant, state.facts.id, ownership).await?;
    let (mut layers, mut layered) = (Vec::new(), state.facts.start);
    if ancestor.is_none() {
        layers.extend(template.facts().layers.iter().cloned().map(Arc::new));
    }
    let published = manifest.state();
    layers.extend(published.layers().cloned());
    layered = layered.max(published.layered());
    let spec = TimelineSpec {
        tenant,
        id: state.facts.id,
        major,
        generation: ownership.generation,
        ancestor,
        start: if layers_begin_at_zero(state) { Lsn::INVALID } else { state.facts.start },
        layered,
        collected: published.collected().clone(),
    };
    Ok(OpenedHistory { history: Timeline::open(spec, context.resources.clone(), layers), layered, manifest })
}

/// A tenant's first timeline has the template's versions, which lie at its very start, as its own.
fn layers_begin_at_zero(state: &TimelineState) -> bool {
    state.facts.ancestor.is_none()
}

/// A history that becomes a template.
pub(crate) struct TemplateHistory {
    timeline: Arc<Timeline>,
}

impl TemplateHistory {
    /// An empty history of `major`.
    pub(crate) fn new(context: &Context, major: Major) -> Result<TemplateHistory, EngineError> {
        let spec = TimelineSpec {
            tenant: TEMPLATE_TENANT,
            id: TimelineId::random()?,
            major,
            generation: Generation(1),
            ancestor: None,
            start: Lsn::INVALID,
            layered: Lsn::INVALID,
            collected: Retained::default(),
        };
        Ok(TemplateHistory { timeline: Timeline::open(spec, context.resources.clone(), Vec::new()) })
    }

    /// Where the import writes.
    pub(crate) fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Everything as uploaded layers. Blocks.
    pub(crate) fn into_layers(self) -> Result<Vec<LayerRow>, EngineError> {
        let mut rows = Vec::new();
        self.timeline.freeze_if(0, Duration::ZERO);
        loop {
            let mut publish = |change: &LayerChange| {
                rows.extend(change.add.iter().cloned());
                Ok(())
            };
            if self.timeline.flush(&mut publish)?.is_none() {
                return Ok(rows);
            }
        }
    }
}

/// Templates are kept as if they were those of one tenant that nobody can name or delete.
pub(crate) const TEMPLATE_TENANT: TenantId = TenantId([0; 16]);
