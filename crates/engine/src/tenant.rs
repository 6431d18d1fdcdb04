//! A tenant that this pageserver owns: its log, and those of its timelines that are open.
//!
//! Nothing of a tenant is in memory until somebody asks for it; a timeline is opened at its first use, its ancestors
//! before it. Each has a cell of its own in which it is opened once, so a slow opening delays nobody who wants another
//! one, and the map is locked for look-ups only. Timelines that nobody has use for are closed by
//! [`Tenant::close_idle`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use varve_postgres::{Lsn, Major};
use varve_storage::envelope::{self, Format};
use varve_storage::ids::{TenantId, TenantName, TimelineId, WalLogId, random_bytes};
use varve_storage::manifest::timeline_folder;
use varve_storage::shared_wal::Stored;
use varve_storage::store::ObjectName;
use varve_storage::tenant_log::{Ancestor, FileContents, TenantEdit, TenantError, TenantFacts, TenantLog, TenantState, TimelineState};

use crate::catalog;
use crate::context::Context;
use crate::error::EngineError;
use crate::histories::open_history;
use crate::template::Template;
use crate::timeline::{LiveTimeline, OpenTimeline, StreamEnd, tail_elsewhere};

/// Files of data directories that are objects of their own.
pub(crate) const FILE_FORMAT: Format =
    Format { magic: *b"VFIL", version: 1, what: "a file of a data directory", content_bytes_max: 64 << 20 };
/// Largest file that stands in the tenant log itself.
const INLINE_FILE_MAX: usize = 64 * 1024;

/// Branches that nobody has written and whose size is not noted, with where they left their ancestors.
fn unmeasured_branches(state: &TenantState) -> Vec<(TimelineId, Ancestor)> {
    let is_unmeasured = |timeline: &&TimelineState| timeline.epochs.is_empty() && timeline.figures.is_none();
    let of_ancestor = |timeline: &TimelineState| Some((timeline.facts.id, timeline.facts.ancestor?));
    state.timelines().filter(is_unmeasured).filter_map(of_ancestor).take(MEASURED_AT_ONCE).collect()
}

fn is_of_known(state: &TenantState, edit: &TenantEdit) -> bool {
    matches!(edit, TenantEdit::Figures { timeline, .. } if state.timeline(*timeline).is_ok())
}

/// Branches without a size that one round looks at.
const MEASURED_AT_ONCE: usize = 256;

type Cell = Arc<OnceCell<Arc<LiveTimeline>>>;

/// See the module's doc.
#[derive(Debug)]
pub struct Tenant {
    facts: Arc<TenantFacts>,
    major: Major,
    log: TenantLog,
    template: Arc<Template>,
    context: Arc<Context>,
    timelines: Mutex<BTreeMap<TimelineId, Cell>>,
    lost: AtomicBool,
    used_at: Mutex<Instant>,
}

impl Tenant {
    /// A tenant whose log is ours.
    ///
    /// # Errors
    /// When the log says nothing of a tenant, or one of a Postgres that is not supported.
    pub fn new(id: TenantId, log: TenantLog, template: Arc<Template>, context: Arc<Context>) -> Result<Tenant, EngineError> {
        let facts = log.state().facts().cloned().ok_or(EngineError::EmptyLog { tenant: id })?;
        let pg_version = facts.pg_version;
        let major = Major::from_number(pg_version).ok_or(EngineError::UnsupportedMajor { tenant: id, pg_version })?;
        let used_at = Mutex::new((context.resources.clock)());
        Ok(Tenant { facts, major, log, template, context, timelines: Mutex::default(), lost: AtomicBool::new(false), used_at })
    }

    /// Its id.
    pub fn id(&self) -> TenantId {
        self.facts.id
    }

    /// Its name.
    pub fn name(&self) -> &TenantName {
        &self.facts.name
    }

    /// What it is from its first day.
    pub fn facts(&self) -> &TenantFacts {
        &self.facts
    }

    /// Its log.
    pub fn log(&self) -> &TenantLog {
        &self.log
    }

    /// The template that its first timeline began with.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// What the pageserver's timelines share.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Says that somebody has use for it: it is not put to sleep for a while.
    pub fn touch(&self) {
        *self.used_at.lock() = (self.context.resources.clock)();
    }

    /// Whether nobody had use for it for `unused`, and nobody else holds its log: then it can be dropped, and opened
    /// again by the same right.
    pub fn may_sleep(&self, unused: Duration) -> bool {
        let now = (self.context.resources.clock)();
        now.duration_since(*self.used_at.lock()) >= unused && self.log.is_idle() && self.timelines.lock().is_empty()
    }

    /// Whether a compute writes one of its timelines here.
    pub fn is_written(&self) -> bool {
        self.all_opened().iter().any(|live| live.has_stream())
    }

    fn check_owned(&self) -> Result<(), EngineError> {
        if self.lost.load(Ordering::SeqCst) { Err(EngineError::NotOwner { tenant: self.id() }) } else { Ok(()) }
    }

    fn cell(&self, id: TimelineId) -> Cell {
        self.timelines.lock().entry(id).or_default().clone()
    }

    /// A timeline, opened if need be.
    ///
    /// # Errors
    /// When there is no such timeline, it cannot be opened, or the tenant is another server's by now.
    pub async fn timeline(&self, id: TimelineId) -> Result<Arc<LiveTimeline>, EngineError> {
        self.check_owned()?;
        self.touch();
        if let Some(open) = self.opened(id) {
            open.touch();
            return Ok(open);
        }
        let state = self.log.state();
        let chain: Vec<TimelineId> = state.ancestry(id)?.into_iter().map(|(state, _)| state.facts.id).collect();
        let mut below: Option<Arc<LiveTimeline>> = None;
        for id in chain.into_iter().rev() {
            let cell = self.cell(id);
            let ancestor = below.take();
            let opened = cell.get_or_try_init(|| self.open(id, ancestor)).await?.clone();
            below = Some(opened);
        }
        self.check_owned()?;
        let live = below.ok_or(TenantError::UnknownTimeline(id))?;
        live.touch();
        Ok(live)
    }

    async fn open(&self, id: TimelineId, ancestor: Option<Arc<LiveTimeline>>) -> Result<Arc<LiveTimeline>, EngineError> {
        let state = self.log.state().timeline(id)?.clone();
        let ancestor = match (ancestor, state.facts.ancestor) {
            (Some(ancestor), Some(at)) => Some((ancestor, at.lsn)),
            _ => None,
        };
        let (tenant, major, system_identifier) = (self.id(), self.major, self.facts.system_identifier);
        let below = ancestor.as_ref().map(|(ancestor, lsn)| (ancestor.history().clone(), *lsn));
        let history = open_history(&self.context, tenant, major, &state, below, &self.template, self.log.ownership()).await?;
        let found = match tail_elsewhere(&state, self.context.wal_log, history.layered) {
            Some(wal_log) => self.stored_wal(wal_log, id, history.layered).await?,
            None => Vec::new(),
        };
        let context = self.context.clone();
        let open = OpenTimeline { tenant, major, system_identifier, state, log: self.log.clone(), history, found, ancestor, context };
        self.context.threads.call(move || LiveTimeline::open(open)).await?
    }

    /// What another server's WAL log had of a timeline beyond its layers, and put into the store. That server is kept
    /// from adding to it.
    async fn stored_wal(&self, wal_log: WalLogId, timeline: TimelineId, layered: Lsn) -> Result<Vec<Stored>, EngineError> {
        let archive = &self.context.archive;
        archive.seal(wal_log, self.context.wal_log).await?;
        let found = archive.find(wal_log, self.id(), timeline, layered).await?;
        for error in &found.damaged {
            tracing::error!(tenant = %self.name(), %timeline, %error, "WAL in the store is damaged; what lies behind it is not known here");
        }
        if let Some(end) = found.end() {
            self.context.shipping.note_found(end.distance_from(layered));
            tracing::info!(tenant = %self.name(), %timeline, %wal_log, %layered, %end, "the store has WAL of another server, which goes on here");
        }
        Ok(found.parts)
    }

    /// A timeline if it is open.
    pub fn opened(&self, id: TimelineId) -> Option<Arc<LiveTimeline>> {
        self.timelines.lock().get(&id)?.get().cloned()
    }

    /// All timelines that are open.
    pub fn all_opened(&self) -> Vec<Arc<LiveTimeline>> {
        self.timelines.lock().values().filter_map(|cell| cell.get().cloned()).collect()
    }

    /// Tells the log how far its open timelines are and how large they are, for lists: of each that has news, and not
    /// more often than every `pause`; also of branches that nobody has written yet and whose ancestor is open. Failing
    /// costs nothing but a list that is behind.
    pub async fn note_figures(&self, pause: Duration) {
        let mut found = Vec::new();
        for live in self.all_opened() {
            if let Some(head) = live.to_note(pause)
                && let Some(size_bytes) = self.size_at(&live, head).await
            {
                live.note(head, size_bytes);
                found.push(TenantEdit::Figures { timeline: live.id(), head, size_bytes });
            }
        }
        // Branches are often made at one moment: each is measured once.
        let mut sizes = BTreeMap::new();
        for (timeline, at) in unmeasured_branches(&self.log.state()) {
            let Some(ancestor) = self.opened(at.timeline).filter(|ancestor| ancestor.positions().applied() >= at.lsn) else { continue };
            let size = match sizes.get(&(at.timeline, at.lsn)) {
                Some(size) => *size,
                None => *sizes.entry((at.timeline, at.lsn)).or_insert(self.size_at(&ancestor, at.lsn).await),
            };
            if let Some(size_bytes) = size {
                found.push(TenantEdit::Figures { timeline, head: at.lsn, size_bytes });
            }
        }
        if found.is_empty() {
            return;
        }
        // A timeline that was deleted meanwhile has no figures.
        let known = |state: &TenantState| found.into_iter().filter(|edit| is_of_known(state, edit)).collect::<Vec<_>>();
        if let Err(error) = self.log.commit(|state| Ok::<_, EngineError>((known(state), ()))).await.map_err(EngineError::from) {
            tracing::warn!(tenant = %self.name(), %error, "sizes of branches were not noted");
        }
    }

    /// Bytes of all relations of a timeline; `None` if that cannot be told now.
    async fn size_at(&self, live: &Arc<LiveTimeline>, lsn: Lsn) -> Option<u64> {
        let measured = {
            let live = live.clone();
            self.context.threads.call(move || catalog::total_size(&**live.history(), lsn)).await
        };
        match measured {
            Ok(Ok(size_bytes)) => Some(size_bytes),
            Ok(Err(error)) => {
                tracing::warn!(timeline = live.name(), %error, "its size is not known");
                None
            }
            Err(error) => {
                tracing::error!(timeline = live.name(), %error, "its size is not known");
                None
            }
        }
    }

    /// Closes timelines that nobody had use for since `unused`, children before their ancestors. What they have in
    /// memory is put into the store before, by background work that this only asks for. Whether none is left open.
    pub async fn close_idle(&self, unused: Duration) -> bool {
        let left = {
            let mut timelines = self.timelines.lock();
            timelines.retain(|_, cell| Arc::strong_count(cell) > 1 || cell.get().is_some());
            loop {
                let idle: Vec<TimelineId> = timelines
                    .iter()
                    // Nobody else holds it: no child, no client, no work.
                    .filter(|(_, cell)| Arc::strong_count(cell) == 1)
                    .filter(|(_, cell)| cell.get().is_some_and(|live| Arc::strong_count(live) == 1 && live.is_idle(unused)))
                    .map(|(id, _)| *id)
                    .collect();
                if idle.is_empty() {
                    break;
                }
                // Dropping a child gives its ancestor free, which the next round then finds.
                idle.iter().for_each(|id| drop(timelines.remove(id)));
            }
            timelines.len()
        };
        if left > 0 {
            for live in self.all_opened() {
                live.flush_if_unused(unused);
            }
        }
        left == 0
    }

    /// Closes all timelines.
    pub async fn close(&self) {
        let timelines = std::mem::take(&mut *self.timelines.lock());
        for live in timelines.values().filter_map(|cell| cell.get()) {
            live.close().await;
        }
    }

    /// Another server has the tenant: nothing is acknowledged, opened or served any more. What the WAL log holds stays
    /// there.
    pub async fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        for live in self.all_opened() {
            if let Err(error) = live.end_stream(StreamEnd::NotOwner).await {
                tracing::warn!(timeline = live.name(), %error, "the stream of a tenant that moved was not ended in good order");
            }
        }
        self.close().await;
    }

    /// Closes a timeline that the log no longer has, and removes what is stored of it.
    pub async fn remove_timeline(&self, id: TimelineId) {
        let cell = self.timelines.lock().remove(&id);
        if let Some(live) = cell.as_ref().and_then(|cell| cell.get()) {
            live.close().await;
        }
        self.context.forget_wal(self.id(), vec![id]).await;
        if let Err(error) = self.remove_objects(id).await {
            tracing::warn!(tenant = %self.facts.name, timeline = %id, %error, "objects of a deleted branch stay behind");
        }
    }

    async fn remove_objects(&self, timeline: TimelineId) -> Result<(), EngineError> {
        let store = &self.context.store;
        let folder = timeline_folder(self.facts.id, timeline)?;
        let objects: Vec<ObjectName> = store.list(&folder).await?.into_iter().map(|listed| listed.name).collect();
        Ok(store.delete_all(&objects).await?)
    }

    /// Keeps a file of a data directory: in a row of the log where it is small, as an object of its own elsewhere.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn put_file(&self, bytes: Vec<u8>) -> Result<FileContents, EngineError> {
        if bytes.len() <= INLINE_FILE_MAX {
            return Ok(FileContents::Inline(bytes));
        }
        let name = format!("tenants/{}/files/{:032x}", self.facts.id, u128::from_be_bytes(random_bytes()?));
        let len = bytes.len() as u64;
        let object: ObjectName = name.parse()?;
        let encoded = envelope::encode(&FILE_FORMAT, envelope::Codec::Zstd, &name, &bytes)?;
        self.context.store.put(&object, encoded).await?;
        Ok(FileContents::Object { name, len })
    }

    /// Contents of a file version. Blocks on the store where it is an object.
    ///
    /// # Errors
    /// When the object cannot be read, or is damaged.
    pub fn file_contents(&self, contents: &FileContents) -> Result<Option<Vec<u8>>, EngineError> {
        match contents {
            FileContents::Inline(bytes) => Ok(Some(bytes.clone())),
            FileContents::Removed => Ok(None),
            FileContents::Object { name, .. } => {
                let object: ObjectName = name.parse()?;
                let bytes = self.context.resources.store.get(&object)?;
                Ok(Some(envelope::decode(&FILE_FORMAT, name, &bytes)?.content.to_vec()))
            }
        }
    }
}
