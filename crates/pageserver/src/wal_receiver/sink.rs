//! Where received WAL goes.

use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::wal::FramedRecord;

/// WAL that could not be kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SinkError {
    /// The stream has ended, or what keeps the WAL refuses everything: the receiver ends.
    #[error("{0}")]
    Over(Arc<dyn Error + Send + Sync>),
    /// Not now, for want of space perhaps: the receiver comes again, from the last whole record on.
    #[error("{0}")]
    NotNow(Arc<dyn Error + Send + Sync>),
}

/// Keeps the WAL of one timeline. Its methods are called by one thread, and may block it: then the socket is not read,
/// and the primary waits.
pub trait WalSink: Send + 'static {
    /// Takes WAL bytes, the first of which is the one at `start`. They join on to what was appended before. Only the
    /// first append of a connection may begin earlier, at the end of the last whole record: what is there from `start`
    /// on was the beginning of a record, and these bytes replace it.
    ///
    /// # Errors
    /// [`SinkError::Over`] ends the receiver. An epoch that is over must be one: nothing of it may be kept.
    fn append(&mut self, start: Lsn, bytes: Bytes) -> Result<(), SinkError>;

    /// Takes the records that became whole with the last append, in order. They are not durable before the next sync.
    /// What the sink does not take out of `records` is discarded.
    ///
    /// # Errors
    /// Ends the receiver.
    fn records(&mut self, records: &mut Vec<FramedRecord>) -> Result<(), SinkError>;

    /// Makes all that was appended durable, and says up to where it is: to be acknowledged at once.
    ///
    /// # Errors
    /// Ends the receiver. After a sync that failed nothing more may be acknowledged.
    fn sync(&mut self) -> Result<Lsn, SinkError>;

    /// How far the object store has the WAL, or layers made of it. Cheap; asked after each sync and several times a
    /// second besides.
    fn store_durable(&self) -> Lsn;

    /// The end of the last commit that waits for the store, or waited for it. Cheap.
    fn awaited(&self) -> Lsn;

    /// WAL before this is safe without the primary's: it need not keep it. Cheap.
    fn not_needed_before(&self) -> Lsn;
}
