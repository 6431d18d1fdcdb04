//! Why an ingest stops.

use varve_postgres::Lsn;
use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::{Record, WalError, rmgr};
use varve_redo::RedoError;
use varve_storage::history::HistoryError;

/// What stops a timeline's ingest. Everything before the record stays readable.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IngestError {
    /// A record type that this version does not know: of an extension's resource manager, or of a newer Postgres.
    #[error(
        "the {} record with info {info:02X} at {lsn} is of a type that this version of Varve does not support; the timeline's ingest stops \
         here, and everything before it stays readable: create a branch from {lsn}, or restore to it",
        rmgr::name(*rmid)
    )]
    Unsupported {
        /// Resource manager.
        rmid: u8,
        /// Record type.
        info: u8,
        /// Where the record begins.
        lsn: Lsn,
    },
    /// A record whose contents contradict each other.
    #[error("the {} record with info {info:02X} at {lsn} cannot be ingested: {what}", rmgr::name(*rmid))]
    Malformed {
        /// Resource manager.
        rmid: u8,
        /// Record type.
        info: u8,
        /// Where the record begins.
        lsn: Lsn,
        /// What is wrong.
        what: String,
    },
    /// A server that writes too little WAL.
    #[error(
        "from {lsn} on the server runs with wal_level = minimal, which leaves changes out of WAL; set wal_level to replica or logical and \
         take the database in anew"
    )]
    MinimalWal {
        /// Where the record begins.
        lsn: Lsn,
    },
    /// A record that does not follow the one before.
    #[error("a record from {start} to {end} does not follow what was ingested up to {expected}")]
    OutOfOrder {
        /// Where it begins.
        start: Lsn,
        /// Where it ends.
        end: Lsn,
        /// The end of the record before.
        expected: Lsn,
    },
    /// A record that cannot be taken apart.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// A full-page image that cannot be restored.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// The history could not be read or written.
    #[error(transparent)]
    History(#[from] HistoryError),
}

impl IngestError {
    pub(super) fn of_record(record: &Record<'_>, error: RecordError) -> IngestError {
        let (rmid, info, lsn) = (record.header.rmid, record.kind(), record.start);
        match error {
            RecordError::UnknownType => IngestError::Unsupported { rmid, info, lsn },
            RecordError::Malformed(what) => IngestError::Malformed { rmid, info, lsn, what },
        }
    }

    pub(super) fn malformed(record: &Record<'_>, what: impl Into<String>) -> IngestError {
        Self::of_record(record, RecordError::Malformed(what.into()))
    }
}
