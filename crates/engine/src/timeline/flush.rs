//! From memory to the store: when a memtable is frozen, and who turns it into layers.
//!
//! One flush of a timeline runs at a time. A memtable is frozen when it is large, when it is old (so that the WAL log
//! need not keep its WAL for long), when somebody waits for its layers, or when all memtables together have used up
//! their budget: ingest pauses until that is over, so nothing may then wait to grow large or old. A flush that fails is
//! tried again with growing pauses.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_postgres::Lsn;
use varve_storage::timeline::{FlushError, LayerChange, MEMTABLE_BYTES_MAX, Position, PublishError};

use super::LiveTimeline;
use crate::error::EngineError;
use crate::work_queue::{Kind, Next};

/// Age at which even a small memtable is flushed.
const MEMTABLE_AGE_MAX: Duration = Duration::from_secs(10);
/// Size from which a memtable is flushed when memory is short. Those below it would make too many layers, and free too
/// little.
const MEMTABLE_BYTES_MAX_SHORT_OF_MEMORY: usize = 256 << 10;
/// Pause while ingest is within a batch, so that the memtable cannot be frozen.
const BATCH_WAIT: Duration = Duration::from_millis(2);
/// How long somebody who needs everything in the store waits for it.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(240);
/// Pause after a flush that failed; it doubles with each further failure.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What flushing carries from step to step.
#[derive(Debug, Default)]
pub(super) struct FlushState {
    /// Pause after the last failure, if the last flush failed.
    pause: Option<Duration>,
}

impl LiveTimeline {
    /// After versions were put: sees to it that they do not stay in memory for long.
    pub(super) fn note_unflushed(self: &Arc<Self>) {
        if self.history.frozen_memtables() > 0 {
            self.schedule(Kind::Flush, Duration::ZERO);
        } else if !self.history.memtable_is_empty() {
            self.schedule(Kind::Flush, MEMTABLE_AGE_MAX);
        }
    }

    /// Sees to it that layers soon have everything up to `lsn`, which is applied: somebody waits for it. Those that
    /// come while a flush runs share the next.
    pub(super) fn flush_awaited(self: &Arc<Self>, lsn: Lsn) {
        self.awaited.fetch_max(lsn.0, Ordering::SeqCst);
        self.schedule(Kind::Flush, Duration::ZERO);
    }

    /// Puts what is applied into the store soon, without waiting for it.
    pub fn flush_soon(self: &Arc<Self>) {
        self.flush_awaited(self.positions().applied());
    }

    /// Whether the newest flush failed.
    pub fn flush_fails(&self) -> bool {
        self.flush_fails.load(Ordering::SeqCst)
    }

    /// One step: freezes what is due, and flushes the oldest frozen memtable.
    pub(super) fn flush_step(self: &Arc<Self>) -> Next {
        let mut state = self.flush.lock();
        if Lsn(self.awaited.load(Ordering::SeqCst)) > self.positions().layered() {
            self.history.freeze_if(0, Duration::ZERO);
        } else {
            let short = self.history.memory_over_budget();
            let bytes_max = if short { MEMTABLE_BYTES_MAX_SHORT_OF_MEMORY } else { MEMTABLE_BYTES_MAX };
            self.history.freeze_if(bytes_max, MEMTABLE_AGE_MAX);
        }
        let mut publish = |change: &LayerChange| self.publish(change);
        match self.history.flush(&mut publish) {
            Ok(flushed) => {
                state.pause = None;
                self.flush_fails.store(false, Ordering::SeqCst);
                if flushed.is_some() {
                    self.schedule(Kind::Merge, Duration::ZERO);
                }
                if self.history.frozen_memtables() > 0 {
                    Next::More
                } else if Lsn(self.awaited.load(Ordering::SeqCst)) > self.positions().layered() {
                    Next::After(BATCH_WAIT)
                } else if !self.history.memtable_is_empty() {
                    let age = self.history.memtable_age().unwrap_or_default();
                    Next::After(MEMTABLE_AGE_MAX.saturating_sub(age).max(BATCH_WAIT))
                } else {
                    Next::Done
                }
            }
            Err(error) => {
                let pause = state.pause.map_or(PAUSE_FIRST, |pause| (pause * 2).min(PAUSE_MAX));
                state.pause = Some(pause);
                self.flush_fails.store(true, Ordering::SeqCst);
                if self.is_lost(&error) {
                    tracing::warn!(timeline = self.name, %error, "the tenant is another server's by now: nothing more is put into the store");
                    return Next::Done;
                }
                tracing::warn!(timeline = self.name, %error, ?pause, "a flush failed, it is tried again");
                Next::After(pause)
            }
        }
    }

    /// Whether an error says that another server has the tenant; then the timeline is told.
    pub(super) fn is_lost(&self, error: &FlushError) -> bool {
        let lost = matches!(error, FlushError::Publish(PublishError::Fenced(_)));
        if lost {
            self.context.lost.note(self.tenant, self.manifest.generation());
        }
        lost
    }

    /// Makes a change of layers durable, and lets go of the WAL that the layers cover. What of that is to be kept is
    /// uploaded before.
    pub(super) fn publish(&self, change: &LayerChange) -> Result<(), PublishError> {
        let kept = self.keep_wal(change.layered)?;
        let edits = kept.into_iter().chain(change.edits()).collect();
        self.context.threads.wait(self.manifest.publish(edits)).map_err(PublishError::from)?;
        self.context.wal.release(self.tenant, self.facts.id, change.layered);
        self.context.shipping.cover(self.tenant, self.facts.id, change.layered);
        // Who fills the WAL log also frees it.
        self.context.free_wal_log();
        Ok(())
    }

    /// Puts everything up to `lsn`, which is durable, into the store.
    ///
    /// # Errors
    /// When ingest has stopped before, or the store does not take it in time.
    pub async fn flush_up_to(self: &Arc<Self>, lsn: Lsn) -> Result<(), EngineError> {
        self.hurry_ingest();
        self.positions().wait(Position::Applied, lsn, FLUSH_WAIT_MAX).await?;
        if self.positions().layered() < lsn {
            self.flush_awaited(lsn);
            self.positions().wait(Position::Layered, lsn, FLUSH_WAIT_MAX).await?;
        }
        Ok(())
    }

    /// Puts everything that is durable here into the store.
    ///
    /// # Errors
    /// As [`LiveTimeline::flush_up_to`].
    pub async fn flush_all(self: &Arc<Self>) -> Result<(), EngineError> {
        self.flush_up_to(self.positions().head()).await
    }
}
