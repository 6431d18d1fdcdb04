//! WAL that is left in the `pg_wal` of a compute whose processes were killed.
//!
//! Postgres flushed it there, and others may have heard of it: asynchronous commits, what a subscriber reported. Stock
//! Postgres has all of it after a crash of its processes. So before the next epoch begins, what joins on to head comes
//! in on a stream of the epoch that wrote it, and is checked record by record.

use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::wal::Framer;
use varve_storage::ids::{BranchName, WriterEpoch};
use varve_storage::tenant_log::TenantLog;

use super::epochs::{Flushed, check_branch};
use super::{LiveTimeline, StreamError, WalStream};
use crate::error::EngineError;

/// A stream of leftover WAL. It counts as far as [`Leftover::push`] made it durable.
pub struct Leftover {
    live: Arc<LiveTimeline>,
    stream: WalStream,
    framer: Framer,
}

impl LiveTimeline {
    /// Where the leftover WAL of `epoch` would go on; none when nothing of it counts any more: a later epoch writes, it
    /// ended cleanly, or `branch` points elsewhere.
    ///
    /// # Errors
    /// What the tenant's log says.
    pub fn leftover_start(&self, log: &TenantLog, branch: &BranchName, epoch: WriterEpoch) -> Result<Option<Lsn>, EngineError> {
        let state = log.state();
        match check_branch(&state, branch, self) {
            Ok(()) => {}
            Err(EngineError::BranchMoved { .. } | EngineError::Tenant(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
        let newest = state.timeline(self.id())?.epochs.last().copied();
        let counts = newest.is_some_and(|newest| newest.epoch == epoch && newest.closed.is_none());
        Ok(counts.then(|| self.positions().head()))
    }

    /// Takes leftover WAL of `epoch`, of which there are whole records up to `end`.
    ///
    /// # Errors
    /// As [`LiveTimeline::open_stream`].
    pub async fn take_leftover(
        self: &Arc<Self>,
        log: &TenantLog,
        branch: &BranchName,
        epoch: WriterEpoch,
        end: Lsn,
    ) -> Result<Leftover, EngineError> {
        // Nobody acknowledges to a compute that is dead: what it has is all there is.
        let flushed = Flushed { lsn: end, waits_for: None };
        let (stream, _) = self.open_stream(log, branch, epoch, flushed, |_| {}).await?;
        let framer = Framer::new(self.major, Some(self.system_identifier), stream.start(), None);
        Ok(Leftover { live: self.clone(), stream, framer })
    }
}

impl Leftover {
    /// Where the next bytes begin.
    pub fn position(&self) -> Lsn {
        self.framer.position()
    }

    /// The end of the last whole record that came.
    pub fn framed(&self) -> Lsn {
        self.framer.framed()
    }

    /// Takes the next bytes. What is no WAL is refused, and nothing from there on counts.
    ///
    /// # Errors
    /// [`EngineError::LeftoverWal`], [`EngineError::StreamOver`], what the WAL log says.
    pub async fn push(self, bytes: Bytes) -> Result<Leftover, EngineError> {
        let Leftover { live, mut stream, mut framer } = self;
        let timeline = live.id();
        let work = move || {
            let start = framer.position();
            let mut input = bytes.clone();
            loop {
                match framer.next_record(&mut input) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => return Err(EngineError::LeftoverWal { timeline, error }),
                }
            }
            let over = |error| match error {
                StreamError::Over(end) => EngineError::StreamOver { timeline, end },
                StreamError::WalLog(error) => error.into(),
            };
            stream.append(start, &bytes).map_err(over)?;
            stream.framed(framer.framed());
            stream.sync().map_err(over)?;
            Ok((stream, framer))
        };
        let (stream, framer) = live.threads().call(work).await??;
        Ok(Leftover { live, stream, framer })
    }
}
