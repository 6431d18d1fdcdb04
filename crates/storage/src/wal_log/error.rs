//! What can go wrong in the WAL log, told so that an operator knows what to do.

use std::io;
use std::sync::Arc;

use varve_postgres::Lsn;

use crate::ids::{TenantId, TimelineId};

/// What can go wrong in the WAL log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WalLogError {
    /// The file system failed; what was to be done may be tried again.
    #[error("WAL log in {folder}: cannot {action}: {error}; nothing of it was acknowledged: free space or mend the disk")]
    Io {
        /// The log's folder.
        folder: String,
        /// What was tried.
        action: String,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// An fsync failed: nothing that this process wrote since the one before can be trusted to be on disk.
    #[error(
        "WAL log in {folder}: fsync failed: {error}; nothing is acknowledged any more: mend the disk, or free space, then restart the server"
    )]
    SyncFailed {
        /// The log's folder.
        folder: String,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// Another process uses the folder.
    #[error("{folder} is in use by another varve process: stop it, or name another folder with --data")]
    InUse {
        /// The folder.
        folder: String,
    },
    /// A chunk that had been made durable is no longer whole.
    #[error(
        "WAL log in {folder}: file {file} is damaged at byte {offset}: acknowledged WAL stood there. Restore the file from a copy; or move \
         the folder away and start without it: computes that still run then send again what the store lacks"
    )]
    Damaged {
        /// The folder.
        folder: String,
        /// The segment file.
        file: String,
        /// Where no whole chunk stands.
        offset: u64,
    },
    /// A segment file is not there.
    #[error(
        "WAL log in {folder}: file {file} is missing: acknowledged WAL may have stood there. Restore it from a copy; or move the folder away \
         and start without it: computes that still run then send again what the store lacks"
    )]
    MissingSegment {
        /// The folder.
        folder: String,
        /// The segment file.
        file: String,
    },
    /// The log knows more than the tenant log does.
    #[error(
        "WAL log in {folder} holds WAL of writer epoch {found} of timeline {timeline}, and the log of tenant {tenant} knows epochs up to \
         {known}: the newest objects of tenants/{tenant}/log are missing from the store. Restore them from a copy of the store; or move the \
         folder away to go on with what the store has, and lose what was acknowledged since"
    )]
    UnknownEpoch {
        /// The folder.
        folder: String,
        /// The tenant.
        tenant: TenantId,
        /// The timeline.
        timeline: TimelineId,
        /// The newest epoch of which the log has bytes.
        found: u32,
        /// The newest epoch that the tenant log knows; 0: none.
        known: u32,
    },
    /// A chunk of a newer version.
    #[error(
        "WAL log in {folder}: file {file}, byte {offset}: a chunk that this version cannot read ({what}): use the newer varve that wrote it"
    )]
    Unsupported {
        /// The folder.
        folder: String,
        /// The segment file.
        file: String,
        /// Where the chunk stands.
        offset: u64,
        /// What is not known.
        what: String,
    },
    /// Bytes that do not join on.
    #[error("WAL of timeline {timeline} ends at {end}: bytes from {start} of epoch {epoch} do not join on")]
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that appends.
        epoch: u32,
        /// End of what there is.
        end: Lsn,
        /// Start of what was to be appended.
        start: Lsn,
    },
    /// A writer whose epoch is over.
    #[error("writer epoch {epoch} of timeline {timeline} is over: epoch {current} writes now")]
    Fenced {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that tried.
        epoch: u32,
        /// The epoch that may.
        current: u32,
    },
    /// Bytes that begin before their writer's epoch does, or below what layers cover: what is there was acknowledged.
    #[error("WAL of timeline {timeline} below {floor} is settled: bytes from {start} of epoch {epoch} cannot replace it")]
    Settled {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that appends.
        epoch: u32,
        /// Where the epoch may write.
        floor: Lsn,
        /// Start of what was to be appended.
        start: Lsn,
    },
    /// A timeline that was not attached.
    #[error("timeline {timeline} is not attached to the WAL log")]
    NotAttached {
        /// The timeline.
        timeline: TimelineId,
    },
    /// Bytes that were released or never there.
    #[error("the WAL log does not hold WAL of timeline {timeline} at {lsn}")]
    NotHeld {
        /// The timeline.
        timeline: TimelineId,
        /// The first byte that was asked for.
        lsn: Lsn,
    },
}
