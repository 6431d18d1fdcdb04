//! Resource manager XLOG (`catalog/pg_control.h`, `access/xlog_internal.h`).

use super::RecordError;
use crate::control::{CheckPoint, Parameters};
use crate::fields::Fields;
use crate::{Lsn, Major, Oid};

/// `XLOG_CHECKPOINT_SHUTDOWN`.
pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
/// `XLOG_CHECKPOINT_ONLINE`.
pub const CHECKPOINT_ONLINE: u8 = 0x10;
/// `XLOG_SWITCH`.
pub const SWITCH: u8 = 0x40;
/// `XLOG_FPI_FOR_HINT`.
pub const FPI_FOR_HINT: u8 = 0xA0;
/// `XLOG_FPI`.
pub const FPI: u8 = 0xB0;

/// A record of the WAL machinery itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XlogRecord {
    /// A clean shutdown's checkpoint: nothing ran.
    CheckpointShutdown(CheckPoint),
    /// A checkpoint under load.
    CheckpointOnline(CheckPoint),
    /// Does nothing.
    Noop,
    /// Object identifiers below this one may have been given out.
    NextOid(Oid),
    /// The rest of the segment is empty.
    Switch,
    /// An online base backup, begun at this position, ended.
    BackupEnd(Lsn),
    /// Settings that matter to standbys changed.
    ParameterChange(Parameters),
    /// A named restore point.
    RestorePoint,
    /// `full_page_writes` changed.
    FullPageWritesChange(bool),
    /// A server was promoted.
    EndOfRecovery {
        /// The new timeline.
        tli: u32,
        /// The timeline it left.
        prev_tli: u32,
        /// `wal_level`, from 17 on.
        wal_level: Option<i32>,
    },
    /// Full-page images for hint bits, which may be missing.
    FullPageImagesForHint,
    /// Full-page images.
    FullPageImages,
    /// A record that a crash left unfinished is given up.
    OverwriteContrecord {
        /// Where it began.
        overwritten: Lsn,
    },
    /// The redo point of a checkpoint (17).
    CheckpointRedo {
        /// `wal_level`.
        wal_level: i32,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<XlogRecord, RecordError> {
    let mut f = Fields::new(data);
    Ok(match info {
        CHECKPOINT_SHUTDOWN => XlogRecord::CheckpointShutdown(CheckPoint::decode(data, major)?),
        CHECKPOINT_ONLINE => XlogRecord::CheckpointOnline(CheckPoint::decode(data, major)?),
        0x20 => XlogRecord::Noop,
        0x30 => XlogRecord::NextOid(f.u32()?),
        SWITCH => XlogRecord::Switch,
        0x50 => XlogRecord::BackupEnd(Lsn(f.u64()?)),
        0x60 => XlogRecord::ParameterChange(Parameters {
            max_connections: f.i32()?,
            max_worker_processes: f.i32()?,
            max_wal_senders: f.i32()?,
            max_prepared_transactions: f.i32()?,
            max_locks_per_transaction: f.i32()?,
            wal_level: f.i32()?,
            wal_log_hints: f.bool()?,
            track_commit_timestamp: f.bool()?,
        }),
        0x70 => XlogRecord::RestorePoint,
        0x80 => XlogRecord::FullPageWritesChange(f.bool()?),
        0x90 => {
            f.take(8)?; // time
            XlogRecord::EndOfRecovery {
                tli: f.u32()?,
                prev_tli: f.u32()?,
                wal_level: if major.checkpoint_has_wal_level() { Some(f.i32()?) } else { None },
            }
        }
        FPI_FOR_HINT => XlogRecord::FullPageImagesForHint,
        FPI => XlogRecord::FullPageImages,
        0xD0 => XlogRecord::OverwriteContrecord { overwritten: Lsn(f.u64()?) },
        0xE0 if major.checkpoint_has_wal_level() => XlogRecord::CheckpointRedo { wal_level: f.i32()? },
        _ => return Err(RecordError::UnknownType),
    })
}
