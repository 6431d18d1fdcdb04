//! Ingest: WAL log in, versions out, a step of bounded size at a time.
//!
//! It reads the WAL log, so that a restart and the live stream are one path, and so that memory is bounded by a read's
//! size. It frames anew, with CRCs: what comes back from disk is checked like what came from the network.
//!
//! WAL may gather for a moment while nobody waits to read it ([`GATHER_MAX`]): to run for each group of commits costs
//! more than to ingest it, and comes at the very moment when they wait for their acknowledgement.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_postgres::wal::{Framer, WalError};
use varve_postgres::{Lsn, Major};
use varve_storage::history::HistoryError;
use varve_storage::timeline::Position;
use varve_storage::wal_log::WalLogError;

use super::LiveTimeline;
use crate::ingest::{Ingest, IngestError};
use crate::work_queue::{Kind, Next};

/// Bytes of WAL that one step reads.
const READ_SIZE: usize = 1024 * 1024;
/// Records between two moments at which readers may see more.
const RECORDS_BETWEEN_ADVANCES: usize = 256;
/// How long WAL may gather while nobody waits to read it.
const GATHER_MAX: Duration = Duration::from_millis(2);
/// So much WAL is ingested at once.
const GATHER_SIZE: u64 = 64 * 1024;
/// Pause while ancestors have not applied what this timeline shows of them: after a restart all ingest at the same
/// time.
const ANCESTOR_WAIT: Duration = Duration::from_millis(20);
/// Pause after the first failed attempt to begin; it doubles with each, up to [`BEGIN_PAUSE_MAX`].
const BEGIN_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between two attempts to begin.
const BEGIN_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Attempts to begin, over more than ten minutes: a store may be away for a while, and what is damaged stays so.
const BEGIN_ATTEMPTS_MAX: u32 = 25;
/// Pause while memory is over its budget and flushes catch up.
const MEMORY_WAIT: Duration = Duration::from_millis(5);

/// Why ingest stops for good. What came before stays readable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StopReason {
    /// WAL that is not as Postgres writes it.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// A record that is not supported.
    #[error(transparent)]
    Record(#[from] IngestError),
    /// The history could not be read or written.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The WAL log could not be read.
    #[error(transparent)]
    WalLog(#[from] WalLogError),
    /// The WAL log lacks what it should hold.
    #[error("the WAL log holds no bytes at {at}, and its records end at {head}")]
    Missing {
        /// Where bytes are missing.
        at: Lsn,
        /// Where its records should end.
        head: Lsn,
    },
    /// An ancestor stopped before what this timeline shows of it.
    #[error("its ancestor stopped: {0}")]
    Ancestor(Arc<dyn std::error::Error + Send + Sync>),
}

/// What ingest carries from step to step.
pub(super) struct IngestState {
    framer: Framer,
    /// Opened at the first record, so that a timeline without news reads nothing.
    ingest: Option<Ingest>,
    /// Attempts to open it that failed.
    begin_failed: u32,
}

impl std::fmt::Debug for IngestState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IngestState(at {})", self.framer.position())
    }
}

impl IngestState {
    pub(super) fn new(major: Major, system_identifier: u64, start: Lsn) -> IngestState {
        IngestState { framer: Framer::new(major, Some(system_identifier), start, None), ingest: None, begin_failed: 0 }
    }
}

impl LiveTimeline {
    /// Says that WAL up to `head` is durable, and sees to it that it is ingested soon.
    pub(super) fn raise_head(self: &Arc<Self>, head: Lsn) {
        let before = self.positions().head();
        self.positions().raise(Position::Head, head);
        if self.context.shipping.is_on() {
            self.context.shipping.add(self, head.distance_from(before));
        } else {
            // The WAL log is on the store's own disk.
            self.positions().raise(Position::Stored, head);
        }
        if !self.ingest_scheduled.swap(true, Ordering::SeqCst) {
            self.schedule(Kind::Ingest, if self.positions().is_awaited() { Duration::ZERO } else { GATHER_MAX });
        } else if head.distance_from(self.positions().applied()) >= GATHER_SIZE || self.positions().is_awaited() {
            self.hurry_ingest();
        }
    }

    /// Sees to it that what is durable is ingested at once: somebody waits for it.
    pub(super) fn hurry_ingest(self: &Arc<Self>) {
        if self.positions().applied() < self.positions().head() && !self.ingest_hurried.swap(true, Ordering::SeqCst) {
            self.ingest_scheduled.store(true, Ordering::SeqCst);
            self.schedule(Kind::Ingest, Duration::ZERO);
        }
    }

    /// One step: at most [`READ_SIZE`] of WAL.
    pub(super) fn ingest_step(self: &Arc<Self>) -> Next {
        // Before head is read: who raises it afterwards schedules again.
        self.ingest_scheduled.store(false, Ordering::SeqCst);
        self.ingest_hurried.store(false, Ordering::SeqCst);
        if self.positions().stopped().is_some() {
            return Next::Done;
        }
        // Nobody goes on with it, and its end is collected: what another server had of it beyond that counts for
        // nobody.
        if self.is_over() {
            return Next::Done;
        }
        let mut guard = self.ingest.lock();
        let state = &mut *guard;
        match self.ingest_some(state) {
            Ok(next) => next,
            Err(reason) => {
                // What was ingested before whatever went wrong is to be seen.
                if let Some(Err(error)) = state.ingest.as_mut().map(|ingest| self.advance(ingest)) {
                    tracing::error!(timeline = self.name, %error, "what was ingested last does not become visible");
                }
                tracing::error!(timeline = self.name, %reason, "ingest stopped; what came before stays readable");
                self.positions().stop(Arc::new(reason));
                Next::Done
            }
        }
    }

    fn ingest_some(self: &Arc<Self>, state: &mut IngestState) -> Result<Next, StopReason> {
        let head = self.positions().head();
        let at = state.framer.position();
        if head <= at {
            return Ok(Next::Done);
        }
        if self.history.memory_over_budget() {
            self.schedule(Kind::Flush, Duration::ZERO);
            return Ok(Next::After(MEMORY_WAIT));
        }
        let ingest = match &mut state.ingest {
            Some(ingest) => ingest,
            None => {
                let start = self.positions().applied();
                if !self.ancestors_have(start)? {
                    return Ok(Next::After(ANCESTOR_WAIT));
                }
                match Ingest::open(self.history.clone(), start) {
                    Ok(ingest) => state.ingest.insert(ingest),
                    // Nothing was written yet, so it may begin once more.
                    Err(IngestError::History(error)) if state.begin_failed < BEGIN_ATTEMPTS_MAX => {
                        let pause = BEGIN_PAUSE_FIRST.saturating_mul(1 << state.begin_failed.min(10)).min(BEGIN_PAUSE_MAX);
                        state.begin_failed += 1;
                        tracing::warn!(timeline = self.name, %error, ?pause, "ingest cannot begin, it is tried again");
                        return Ok(Next::After(pause));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let room = READ_SIZE.min(head.distance_from(at) as usize);
        let mut bytes = self.context.wal.read(self.tenant, self.facts.id, at, room)?;
        if bytes.is_empty() {
            return Err(StopReason::Missing { at, head });
        }
        let mut records = 0;
        while let Some(record) = state.framer.next_record(&mut bytes)? {
            if record.has_check_images() {
                self.note_check_images(record.end);
            }
            ingest.record(&record)?;
            records += 1;
            if records % RECORDS_BETWEEN_ADVANCES == 0 {
                self.advance(ingest)?;
            }
        }
        self.advance(ingest)?;
        self.note_unflushed();
        Ok(if self.positions().head() > state.framer.position() { Next::More } else { Next::Done })
    }

    /// Whether the ancestors have applied what this timeline shows of them; if not, they are hurried.
    fn ancestors_have(self: &Arc<Self>, start: Lsn) -> Result<bool, StopReason> {
        for (owner, shown) in self.owners(start).into_iter().skip(1) {
            if owner.positions().applied() >= shown {
                continue;
            }
            if let Some(stopped) = owner.positions().stopped() {
                return Err(StopReason::Ancestor(stopped.reason.clone()));
            }
            owner.hurry_ingest();
            return Ok(false);
        }
        Ok(true)
    }

    fn advance(self: &Arc<Self>, ingest: &mut Ingest) -> Result<(), IngestError> {
        ingest.advance()?;
        self.positions().raise(Position::Applied, ingest.end());
        Ok(())
    }
}
