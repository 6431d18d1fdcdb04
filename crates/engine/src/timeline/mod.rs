//! A timeline that this pageserver serves: its positions, its ingest, its writer.
//!
//! ```text
//! compute ── WAL ──> wal_receiver ──> WAL log (fsync, acknowledge) ──> head
//!                                        │
//!                                        └── ingest (a thread) ──> history ──> applied ── flush ──> layers ──> layered
//! ```
//! **Positions.** *head* is the end of the last whole record that is durable in the WAL log: it is raised before a commit is acknowledged, so
//! that "head" of a branch holds every acknowledged commit. *applied* is what reads may see; it follows. *layered* is what the store has.
//! All three are derived anew from tenant log, manifest and WAL log when the timeline is opened.
//!
//! **Writer.** At most one compute writes; see [`writer`]. **Ingest** reads the WAL log up to *head* only: what lies behind may be void
//! tomorrow; see [`ingest_worker`].

mod compaction;
mod flush;
mod ingest_worker;
mod kept_wal;
mod open;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use varve_postgres::{Lsn, Major};
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::manifest::Manifest;
use varve_storage::tenant_log::TimelineFacts;
use varve_storage::timeline::Timeline;
use varve_storage::wal_log::WalLog;

pub(crate) use kept_wal::WalRange;
pub use open::OpenContext;
pub(crate) use open::OpenTimeline;
pub use writer::{ComputeAddress, EpochStart, Tail};

/// How long a timeline that stops waits for a flush that has begun to give up.
const FLUSH_END_MAX: Duration = Duration::from_secs(10);

/// Where a timeline stands.
#[derive(Clone, Debug)]
struct Positions {
    /// End of the last whole, durable record.
    head: Lsn,
    /// Everything up to here can be read.
    applied: Lsn,
    /// Everything up to here is in uploaded layers.
    layered: Lsn,
    /// How many wait to read what is not applied yet.
    readers_waiting: u32,
    /// Ingest sleeps until there is WAL.
    ingest_sleeps: bool,
    /// Why ingest stopped, if it did.
    stopped: Option<String>,
}

/// See the module's doc.
#[derive(Debug)]
pub struct ServedTimeline {
    tenant: TenantId,
    /// `tenant/timeline id`, for logs.
    name: String,
    facts: TimelineFacts,
    major: Major,
    system_identifier: u64,
    history: Arc<Timeline>,
    /// The ancestor, and up to where its history counts here.
    ancestor: Option<(Arc<ServedTimeline>, Lsn)>,
    wal: Arc<WalLog>,
    context: Arc<OpenContext>,
    positions: Mutex<Positions>,
    changed: Condvar,
    /// Where ingest waits.
    ingest_wakes: Condvar,
    stopping: AtomicBool,
    worker: Mutex<Option<std::thread::JoinHandle<()>>>,
    writer: tokio::sync::Mutex<writer::Writer>,
    /// Held by a compute that begins.
    pub(crate) beginning: tokio::sync::Mutex<()>,
    /// End of the newest record that carries its pages (an [`Lsn`]), or of the WAL that was kept for such before this was opened; see [`kept_wal`].
    check_images: std::sync::atomic::AtomicU64,
    /// The store is to have everything up to here soon (an [`Lsn`]): a commit waits for it.
    awaited: std::sync::atomic::AtomicU64,
    /// Whether a flush runs.
    flushing: AtomicBool,
    /// Whether layers are being merged.
    compacting: AtomicBool,
    manifest: Manifest,
}

impl ServedTimeline {
    /// Its id.
    pub fn id(&self) -> TimelineId {
        self.facts.id
    }

    /// What it is from its first day.
    pub fn facts(&self) -> &TimelineFacts {
        &self.facts
    }

    /// The major of its Postgres.
    pub fn major(&self) -> Major {
        self.major
    }

    /// Its history, readable up to [`ServedTimeline::applied`].
    pub fn history(&self) -> &Arc<Timeline> {
        &self.history
    }

    /// End of the last whole record that is durable.
    pub fn head(&self) -> Lsn {
        self.positions.lock().head
    }

    /// Everything up to here can be read.
    pub fn applied(&self) -> Lsn {
        self.positions.lock().applied
    }

    /// Both of the above at one moment.
    pub fn applied_and_head(&self) -> (Lsn, Lsn) {
        let positions = self.positions.lock();
        (positions.applied, positions.head)
    }

    /// Everything up to here is in the store.
    pub fn layered(&self) -> Lsn {
        self.positions.lock().layered
    }

    /// Why ingest stopped, if it did, here or on an ancestor before what this timeline shows of it: a record that is not supported, or damaged
    /// layers.
    pub fn stopped(&self) -> Option<String> {
        self.stopped_before(Lsn::MAX)
    }

    /// The same for what this timeline shows up to `lsn`.
    fn stopped_before(&self, lsn: Lsn) -> Option<String> {
        let own = {
            let positions = self.positions.lock();
            positions.stopped.clone().filter(|_| positions.applied < lsn)
        };
        own.or_else(|| {
            let (ancestor, branch_lsn) = self.ancestor.as_ref()?;
            ancestor.stopped_before(lsn.min(*branch_lsn))
        })
    }

    /// Where the oldest history that this timeline can show begins.
    pub fn first_lsn(&self) -> Lsn {
        self.ancestor.as_ref().map_or(self.facts.start, |(ancestor, _)| ancestor.first_lsn())
    }

    /// Waits until everything up to `lsn` can be read, here and on the ancestors.
    ///
    /// # Errors
    /// In words: ingest has stopped before it, or it did not arrive in time.
    pub fn wait_applied(&self, lsn: Lsn, limit: Duration) -> Result<(), String> {
        if let Some((ancestor, branch_lsn)) = &self.ancestor {
            ancestor.wait_applied(lsn.min(*branch_lsn), limit)?;
        }
        self.wait_own_applied(lsn, limit)
    }

    /// The same, without the ancestors.
    fn wait_own_applied(&self, lsn: Lsn, limit: Duration) -> Result<(), String> {
        let mut positions = self.positions.lock();
        if positions.applied >= lsn {
            return Ok(());
        }
        positions.readers_waiting += 1;
        self.ingest_wakes.notify_one();
        let result = self.wait_own_applied_locked(&mut positions, lsn, Instant::now() + limit);
        positions.readers_waiting -= 1;
        result
    }

    fn wait_own_applied_locked(&self, positions: &mut MutexGuard<'_, Positions>, lsn: Lsn, deadline: Instant) -> Result<(), String> {
        while positions.applied < lsn {
            if let Some(reason) = &positions.stopped {
                return Err(format!("ingest of timeline {} stopped at {}: {reason}", self.name, positions.applied));
            }
            if self.stopping.load(Ordering::Acquire) {
                return Err("the pageserver is stopping".to_owned());
            }
            if self.changed.wait_until(positions, deadline).timed_out() && positions.applied < lsn {
                return Err(format!(
                    "timeline {} has no WAL up to {lsn}: it ends at {}, of which {} is applied",
                    self.name, positions.head, positions.applied
                ));
            }
        }
        Ok(())
    }

    /// Ends the ingest and the WAL receiver. Blocks until both have ended.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        {
            // Under the lock, so that nobody who has just looked misses it.
            let _positions = self.positions.lock();
            self.changed.notify_all();
            self.ingest_wakes.notify_all();
        }
        self.writer.lock().await.end_stream().await;
        let deadline = Instant::now() + FLUSH_END_MAX;
        while self.flushing.load(Ordering::Acquire) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let worker = self.worker.lock().take();
        if let Some(worker) = worker {
            let _ = tokio::task::spawn_blocking(move || worker.join()).await;
        }
    }

    /// Says that WAL up to `head` is durable.
    fn raise_head(&self, head: Lsn) {
        let mut positions = self.positions.lock();
        positions.head = positions.head.max(head);
        if positions.ingest_sleeps {
            positions.ingest_sleeps = false;
            self.ingest_wakes.notify_one();
        }
    }

    fn update(&self, change: impl FnOnce(&mut Positions)) {
        change(&mut self.positions.lock());
        self.changed.notify_all();
    }
}
