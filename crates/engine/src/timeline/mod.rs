//! A timeline that this pageserver has open: its positions, its writer, its background work.
//!
//! ```text
//! compute ── WAL ──> WalStream ──> WAL log (fsync, acknowledge) ──> head
//!                                     │
//!                                     ├── ingest ──> history ──> applied ── flush ──> layers ──> layered ── merge
//!                                     └── shipping ──> shared WAL in the store ──> stored
//! ```
//! **Positions** ([`varve_storage::timeline::Positions`]) are one set of atomics, kept by the history: *head* is raised
//! before a commit is acknowledged, so "head" of a branch holds every acknowledged commit; *applied* and *layered*
//! follow, and *stored*, up to where WAL or layers in the store reach. All are derived anew from tenant log, manifest
//! and WAL log when the timeline is opened.
//!
//! **Writer.** At most one compute writes, through one [`WalStream`]; see [`epochs`].
//!
//! **Background work** is steps of the [`crate::work_queue::WorkQueue`]: [`ingest`] reads the WAL log up to *head* only
//! (what lies behind may be void tomorrow), [`flush`] turns memory into layers, [`merge`] layers into fewer. A timeline
//! without news has no work, no thread and no wake-up, and is closed after a while ([`LiveTimeline::is_idle`]).

mod epochs;
mod flush;
mod ingest;
mod kept_wal;
mod leftover;
mod looks;
mod merge;
mod open;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use varve_postgres::{Lsn, Major};
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::manifest::Manifest;
use varve_storage::tenant_log::{TenantLog, TimelineFacts};
use varve_storage::threads::Threads;
use varve_storage::timeline::{Position, Positions, Stopped, Timeline, WaitError};

pub use epochs::{EpochStart, Flushed, Standby, StreamEnd, StreamError, Tail, WalStream};
pub use kept_wal::KeptRange;
pub use leftover::Leftover;
pub(crate) use looks::Looks;
pub(crate) use open::{OpenTimeline, tail_elsewhere};

use crate::context::Context;
use crate::error::EngineError;
use crate::work_queue::{Kind, Next, Work, WorkId};

/// See the module's doc.
#[derive(Debug)]
pub struct LiveTimeline {
    tenant: TenantId,
    /// `tenant/timeline id`, for logs.
    name: String,
    facts: TimelineFacts,
    /// What its tenant has, slots among it.
    log: TenantLog,
    major: Major,
    system_identifier: u64,
    history: Arc<Timeline>,
    /// The ancestor, and up to where its history counts here.
    ancestor: Option<(Arc<LiveTimeline>, Lsn)>,
    context: Arc<Context>,
    manifest: Manifest,
    writer: tokio::sync::Mutex<epochs::Writer>,
    /// The WAL log that had the newest epoch's bytes when this was opened, in words.
    tail_in: String,
    ingest: Mutex<ingest::IngestState>,
    /// Whether ingest is scheduled for what is at head, so that a commit need not look at the queue.
    ingest_scheduled: AtomicBool,
    /// Whether it is scheduled without delay.
    ingest_hurried: AtomicBool,
    /// End of the newest record that carries its pages (an [`Lsn`]), or of the WAL that was kept for such before this
    /// was opened; see [`kept_wal`].
    check_images: AtomicU64,
    /// Layers are to have everything up to here soon (an [`Lsn`]): somebody waits for it.
    awaited: AtomicU64,
    /// Whether its WAL is noted as waiting to go to the store.
    ship_scheduled: AtomicBool,
    /// Whether the tenant's log names our WAL log as the one that has its newest WAL.
    is_named: AtomicBool,
    /// Up to where its WAL was found in the store when it was opened (an [`Lsn`]), if that is beyond its layers: nobody
    /// else may be told to have it before it is there as ours.
    found_up_to: Lsn,
    /// Whether the newest flush failed.
    flush_fails: AtomicBool,
    flush: Mutex<flush::FlushState>,
    used_at: Mutex<Instant>,
    /// What its tenant's log was told of it last.
    noted: Mutex<Option<Noted>>,
    looks: Looks,
    _attached: open::Attached,
}

/// What a tenant's log was told of a timeline, for lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Noted {
    /// The end of its history then.
    pub(crate) head: Lsn,
    /// Bytes of all its relations then.
    pub(crate) size_bytes: u64,
    /// When.
    pub(crate) at: Instant,
}

impl LiveTimeline {
    /// Its id.
    pub fn id(&self) -> TimelineId {
        self.facts.id
    }

    /// Its tenant's.
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// What it is from its first day.
    pub fn facts(&self) -> &TimelineFacts {
        &self.facts
    }

    /// The major of its Postgres.
    pub fn major(&self) -> Major {
        self.major
    }

    /// Its system identifier.
    pub fn system_identifier(&self) -> u64 {
        self.system_identifier
    }

    /// `tenant/timeline id`, for logs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its blocking work runs.
    pub fn threads(&self) -> &Arc<dyn Threads> {
        &self.context.threads
    }

    /// Its history, readable up to *applied*.
    pub fn history(&self) -> &Arc<Timeline> {
        &self.history
    }

    /// Where it stands.
    pub fn positions(&self) -> &Positions {
        self.history.positions()
    }

    /// The ancestor, and up to where its history counts here.
    pub fn ancestor(&self) -> Option<(&Arc<LiveTimeline>, Lsn)> {
        self.ancestor.as_ref().map(|(ancestor, lsn)| (ancestor, *lsn))
    }

    /// This timeline and its ancestors, nearest first, each with the end of the part of its history that counts here,
    /// which is at most `limit`.
    pub fn owners(self: &Arc<Self>, limit: Lsn) -> Vec<(Arc<LiveTimeline>, Lsn)> {
        let mut owners = vec![(self.clone(), limit)];
        while let Some((ancestor, lsn)) =
            owners.last().and_then(|(last, limit)| last.ancestor().map(|(a, lsn)| (a.clone(), lsn.min(*limit))))
        {
            owners.push((ancestor, lsn));
        }
        owners
    }

    /// Why ingest stopped, if it did, here or on an ancestor before what this timeline shows of it.
    pub fn stopped(&self) -> Option<Stopped> {
        let (mut timeline, mut shown) = (self, Lsn::MAX);
        loop {
            let stopped = timeline.positions().stopped().filter(|_| timeline.positions().applied() < shown);
            if stopped.is_some() {
                return stopped.cloned();
            }
            let (ancestor, branch_lsn) = timeline.ancestor()?;
            (timeline, shown) = (ancestor, shown.min(branch_lsn));
        }
    }

    /// Where the oldest history that this timeline can show begins.
    pub fn first_lsn(&self) -> Lsn {
        let mut timeline = self;
        while let Some((ancestor, _)) = timeline.ancestor() {
            timeline = ancestor;
        }
        timeline.facts.start
    }

    /// Waits until everything up to `lsn` can be read, here and on the ancestors. Takes no thread; over when the future
    /// is dropped.
    ///
    /// # Errors
    /// [`WaitError`]: ingest has stopped before it, or it did not arrive within `limit`.
    pub async fn wait_applied(self: &Arc<Self>, lsn: Lsn, limit: Duration) -> Result<(), WaitError> {
        for (owner, lsn) in self.owners(lsn) {
            if owner.positions().applied() < lsn {
                owner.hurry_ingest();
                owner.positions().wait(Position::Applied, lsn, limit).await?;
            }
        }
        Ok(())
    }

    /// Whether everything up to `lsn` can be read right now, here and on the ancestors.
    pub fn is_applied(&self, lsn: Lsn) -> bool {
        let (mut timeline, mut lsn) = (self, lsn);
        loop {
            if timeline.positions().applied() < lsn {
                return false;
            }
            match timeline.ancestor() {
                Some((ancestor, branch_lsn)) => (timeline, lsn) = (ancestor, lsn.min(branch_lsn)),
                None => return true,
            }
        }
    }

    /// Bytes of all its relations, as its tenant's log was told last.
    pub fn noted_size(&self) -> Option<u64> {
        self.noted.lock().map(|noted| noted.size_bytes)
    }

    /// Up to where it is to be measured for its tenant's log: the first time as soon as there is something, afterwards
    /// when there is news in the store, and not more often than every `pause`; `None` if there is nothing to tell.
    pub(crate) fn to_note(&self, pause: Duration) -> Option<Lsn> {
        let now = (self.context.resources.clock)();
        let news = match *self.noted.lock() {
            None => Some(self.positions().applied()).filter(|applied| *applied > self.facts.start),
            Some(noted) => {
                let layered = self.positions().layered();
                (noted.head < layered && now.duration_since(noted.at) >= pause).then_some(layered)
            }
        };
        // The end of a timeline that nobody goes on with may be gone.
        news.filter(|lsn| self.history.collected().holds(*lsn))
    }

    /// Remembers what the tenant's log was told.
    pub(crate) fn note(&self, head: Lsn, size_bytes: u64) {
        let at = (self.context.resources.clock)();
        *self.noted.lock() = Some(Noted { head, size_bytes, at });
    }

    /// From where on all of its own history can be read.
    pub fn first_whole(&self) -> Lsn {
        self.facts.start.max(self.history.collected().cutoff)
    }

    /// Whether its end is collected: nobody goes on with it.
    pub(crate) fn is_over(&self) -> bool {
        !self.history.collected().holds(self.positions().applied())
    }

    /// The time, as its clock tells it.
    pub(crate) fn now(&self) -> Instant {
        (self.context.resources.clock)()
    }

    /// Whether its WAL is noted as waiting to go to the store.
    pub(crate) fn ship_scheduled(&self) -> &AtomicBool {
        &self.ship_scheduled
    }

    /// Up to where its history cannot become void any more. As long as the tenant's log names another WAL log than
    /// ours, that is what layers have, and what was found in the store when it was opened: should yet another server go
    /// on with it, nobody would look here for more.
    pub fn sure_end(&self) -> Lsn {
        if self.is_named.load(Ordering::SeqCst) { self.positions().head() } else { self.found_up_to.max(self.positions().layered()) }
    }

    /// The tenant's log names our WAL log from now on.
    fn is_named_now(self: &Arc<Self>) {
        self.is_named.store(true, Ordering::SeqCst);
        if self.context.shipping.is_on() {
            self.context.shipping.add(self, self.positions().head().distance_from(self.positions().stored()));
        }
    }

    /// Asks the store whether the tenant is still ours.
    pub(crate) async fn check_ownership(&self) -> Result<(), EngineError> {
        Ok(self.log.check_ownership().await?)
    }

    /// Its manifest, which is ours.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// When it was looked at for what could be collected.
    pub(crate) fn looks(&self) -> &Looks {
        &self.looks
    }

    /// Sees to it that its layers are merged or collected soon, if that is due.
    pub(crate) fn merge_soon(self: &Arc<Self>) {
        self.schedule(Kind::Merge, Duration::ZERO);
    }

    /// Whether a compute writes it here; also while it is just being decided.
    pub fn has_stream(&self) -> bool {
        self.writer.try_lock().map_or(true, |writer| writer.has_stream())
    }

    /// Says that somebody has use for it: it is not closed for a while.
    pub fn touch(&self) {
        *self.used_at.lock() = (self.context.resources.clock)();
    }

    /// Whether it can be closed without loss of anything but time: nobody writes it, all it has is in layers, nothing
    /// is scheduled on it, and nobody had use for it for `unused`. Who still holds it is for the caller to know.
    pub fn is_idle(&self, unused: Duration) -> bool {
        let positions = self.positions();
        let now = (self.context.resources.clock)();
        now.duration_since(*self.used_at.lock()) >= unused
            && !positions.is_awaited()
            && (positions.stopped().is_some()
                || self.is_over()
                || positions.layered() == positions.head() && self.to_note(Duration::ZERO).is_none())
            && self.history.memtable_is_empty()
            && self.context.queue.is_idle(self.tenant, self.facts.id)
            && self.writer.try_lock().is_ok_and(|writer| !writer.has_stream())
    }

    /// Sees to it that a timeline that nobody had use for since `unused` is soon wholly in the store, so that it can be
    /// closed.
    pub fn flush_if_unused(self: &Arc<Self>, unused: Duration) {
        let now = (self.context.resources.clock)();
        let is_unused = now.duration_since(*self.used_at.lock()) >= unused;
        if is_unused && self.positions().stopped().is_none() && self.positions().layered() < self.positions().head() {
            self.hurry_ingest();
            self.flush_soon();
        }
    }

    /// Ends the stream and the background work, and all waiting. Returns when no step runs any more.
    pub async fn close(&self) {
        self.positions().close();
        if let Err(error) = self.writer.lock().await.end_stream(StreamEnd::Closing, &self.context.threads).await {
            tracing::error!(timeline = self.name, %error, "the stream was not ended in good order");
        }
        self.context.queue.cancel(self.tenant, self.facts.id).await;
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.positions().is_closing()
    }

    fn schedule(self: &Arc<Self>, kind: Kind, delay: Duration) {
        if !self.is_closing() {
            self.context.queue.schedule(WorkId { kind, tenant: self.tenant, timeline: self.facts.id }, self, delay);
        }
    }
}

impl Work for LiveTimeline {
    fn step(self: Arc<Self>, kind: Kind) -> Next {
        if self.is_closing() {
            return Next::Done;
        }
        match kind {
            Kind::Ingest => self.ingest_step(),
            Kind::Flush => self.flush_step(),
            Kind::Merge => self.merge_step(),
        }
    }
}
