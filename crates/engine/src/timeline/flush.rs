//! From memory to the store: when a memtable is frozen, and who turns it into layers.
//!
//! One flush of a timeline runs at a time, on a thread that may block. A memtable is frozen when it is large, when it is old (so that the
//! compute need not keep its WAL for long), when a commit waits for the store (`remote_apply`) or somebody else does, or when all memtables
//! together have used up their budget: ingest pauses until that is over, so nothing may then wait to grow large or old.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use varve_postgres::Lsn;
use varve_storage::timeline::{LayerChange, MEMTABLE_BYTES_MAX, PublishError};

use super::ServedTimeline;
use crate::error::ServerError;

/// Age at which even a small memtable is flushed.
const MEMTABLE_AGE_MAX: Duration = Duration::from_secs(10);
/// Size from which a memtable is flushed when memory is short. Those below it would make too many layers, and free too little.
const MEMTABLE_BYTES_MAX_SHORT_OF_MEMORY: usize = 256 << 10;
/// How long somebody who needs everything in the store waits for it.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(240);

impl ServedTimeline {
    /// Whether a flush has something to do, or a memtable is to be frozen.
    pub(super) fn flush_is_due(&self) -> bool {
        self.history.frozen_memtables() > 0 || self.history.memtable_bytes() > 0
    }

    /// Freezes a memtable that is large or old, and sees to it that what is frozen is flushed. Never blocks for long.
    pub(super) fn flush_if_due(self: &Arc<Self>, runtime: &tokio::runtime::Handle) {
        let short = self.history.memory_over_budget();
        let bytes_max = if short { MEMTABLE_BYTES_MAX_SHORT_OF_MEMORY } else { MEMTABLE_BYTES_MAX };
        self.history.freeze_if(bytes_max, MEMTABLE_AGE_MAX);
        self.spawn_flush(runtime);
    }

    /// Sees to it that the store soon has everything up to `lsn`, which is applied: a commit waits for it. Those that come while a flush runs share the next.
    pub(super) fn flush_awaited(self: &Arc<Self>, lsn: Lsn) {
        // In one order with the end of a flush: either it sees this, or we see that it is over.
        self.awaited.fetch_max(lsn.0, Ordering::SeqCst);
        self.flush_what_is_awaited();
    }

    fn flush_what_is_awaited(self: &Arc<Self>) {
        let awaited = Lsn(self.awaited.load(Ordering::SeqCst));
        if awaited > self.layered() && !self.flushing.load(Ordering::SeqCst) && !self.stopping.load(Ordering::Acquire) {
            self.flush_soon();
        }
    }

    /// Puts what is in memory into the store soon, without waiting for it.
    pub fn flush_soon(self: &Arc<Self>) {
        self.history.freeze_if(0, Duration::ZERO);
        self.spawn_flush(&self.context.runtime);
    }

    fn spawn_flush(self: &Arc<Self>, runtime: &tokio::runtime::Handle) {
        if self.history.frozen_memtables() == 0 || self.flushing.swap(true, Ordering::AcqRel) {
            return;
        }
        let timeline = self.clone();
        runtime.spawn_blocking(move || {
            timeline.flush_frozen();
            timeline.flushing.store(false, Ordering::SeqCst);
            timeline.flush_what_is_awaited();
            timeline.spawn_compaction();
        });
    }

    /// Flushes what is frozen, and tries again what fails until the timeline stops.
    fn flush_frozen(&self) {
        let mut publish = |change: &LayerChange| self.publish(change);
        let give_up = || self.stopping.load(Ordering::Acquire);
        self.history.flush_all(&mut publish, &give_up);
    }

    /// Makes a change of layers durable, and lets go of the WAL that the layers cover. What of that is to be kept is uploaded before.
    pub(super) fn publish(&self, change: &LayerChange) -> Result<(), PublishError> {
        let kept = self.keep_wal(change.layered).map_err(|error| PublishError(format!("the WAL below them is to be kept: {error}")))?;
        let edits = kept.into_iter().chain(change.edits()).collect();
        self.context.runtime.block_on(self.manifest.publish(edits)).map_err(|error| PublishError(error.to_string()))?;
        self.update(|positions| positions.layered = positions.layered.max(change.layered));
        self.wal.release(self.tenant, self.facts.id, change.layered);
        self.free_wal_log();
        Ok(())
    }

    /// Who fills the WAL log also moves out of its way what timelines that lag behind hold of its oldest segments.
    fn free_wal_log(&self) {
        loop {
            match self.wal.copy_laggards() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(timeline = self.name, %error, "what holds old segments of the WAL log could not be copied");
                    return;
                }
            }
        }
    }

    /// Puts everything up to `lsn`, which is durable, into the store.
    ///
    /// # Errors
    /// When ingest has stopped before, or the store does not take it in time.
    pub async fn flush_up_to(self: &Arc<Self>, lsn: Lsn) -> Result<(), ServerError> {
        let timeline = self.clone();
        tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + FLUSH_WAIT_MAX;
            timeline.wait_own_applied(lsn, FLUSH_WAIT_MAX).map_err(ServerError::unavailable)?;
            let mut positions = timeline.positions.lock();
            while positions.layered < lsn {
                drop(positions);
                timeline.flush_soon();
                positions = timeline.positions.lock();
                if positions.layered >= lsn {
                    break;
                }
                if Instant::now() > deadline || timeline.stopping.load(Ordering::Acquire) {
                    return Err(ServerError::unavailable(format!(
                        "the store has timeline {} up to {} only, not up to {lsn}: is it reachable?",
                        timeline.name, positions.layered
                    )));
                }
                timeline.changed.wait_for(&mut positions, Duration::from_millis(20));
            }
            Ok(())
        })
        .await
        .map_err(ServerError::internal)?
    }

    /// Puts everything that is durable here into the store.
    ///
    /// # Errors
    /// As [`ServedTimeline::flush_up_to`].
    pub async fn flush_all(self: &Arc<Self>) -> Result<(), ServerError> {
        self.flush_up_to(self.head()).await
    }
}
