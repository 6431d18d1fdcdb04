//! What can go wrong with a timeline. Words are made of it once, at the edge.

use varve_postgres::Lsn;
use varve_postgres::wal::WalError;
use varve_storage::edit_log::{CommitError, EditLogError};
use varve_storage::envelope::EnvelopeError;
use varve_storage::history::HistoryError;
use varve_storage::ids::{BranchName, RandomError, TenantId, TimelineId};
use varve_storage::kept_wal::KeptWalError;
use varve_storage::relation::RelationError;
use varve_storage::shared_wal::SharedWalError;
use varve_storage::store::{ParseObjectNameError, StoreError};
use varve_storage::tenant_log::TenantError;
use varve_storage::tenant_log::names::NameError;
use varve_storage::threads::Panicked;
use varve_storage::timeline::{FlushError, WaitError};
use varve_storage::wal_log::WalLogError;

use crate::base_backup::BaseBackupError;
use crate::moments::MomentError;
use crate::template::TemplateError;
use crate::timeline::StreamEnd;

/// See the module's doc.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The tenant's log does not have it, or does not allow it.
    #[error(transparent)]
    Tenant(#[from] TenantError),
    /// A tenant log or manifest could not be read or written.
    #[error(transparent)]
    Log(#[from] EditLogError),
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The names of tenants could not be read.
    #[error(transparent)]
    Names(#[from] NameError),
    /// The WAL log failed, or lacks what it should hold.
    #[error(transparent)]
    WalLog(#[from] WalLogError),
    /// WAL in the store could not be written or read.
    #[error(transparent)]
    SharedWal(#[from] SharedWalError),
    /// A position was not reached.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// A history could not be read.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// A relation or page could not be read.
    #[error(transparent)]
    Relation(#[from] RelationError),
    /// A position or time is not in the history.
    #[error(transparent)]
    Moment(#[from] MomentError),
    /// A base backup could not be made.
    #[error(transparent)]
    BaseBackup(#[from] BaseBackupError),
    /// A template could not be made or read.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Layers could not be written or published.
    #[error(transparent)]
    Flush(#[from] FlushError),
    /// WAL that was kept could not be read or written.
    #[error(transparent)]
    KeptWal(#[from] KeptWalError),
    /// Something stored is damaged, or was written by a newer release.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// A name that no store takes.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// Work on a thread panicked.
    #[error(transparent)]
    Panicked(#[from] Panicked),
    /// WAL that was acknowledged cannot be framed any more.
    #[error("the WAL log's bytes of timeline {timeline} are damaged: {error}")]
    DamagedWal {
        /// The timeline.
        timeline: TimelineId,
        /// What is wrong, and where.
        error: WalError,
    },
    /// What is left in a compute's `pg_wal` is no WAL of the timeline.
    #[error("what is left in the pg_wal of timeline {timeline}'s compute is no WAL of it: {error}")]
    LeftoverWal {
        /// The timeline.
        timeline: TimelineId,
        /// What is wrong, and where.
        error: WalError,
    },
    /// A stream has ended while it was used.
    #[error("timeline {timeline}: the stream has ended: {end}")]
    StreamOver {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        end: StreamEnd,
    },
    /// A compute ended cleanly, and not all of its WAL is here.
    #[error("timeline {timeline} ends at {head}: its compute's WAL up to the shutdown checkpoint at {checkpoint} is not all here yet")]
    CheckpointMissing {
        /// The timeline.
        timeline: TimelineId,
        /// What is here.
        head: Lsn,
        /// Where the checkpoint's record begins.
        checkpoint: Lsn,
    },
    /// A later compute writes.
    #[error("writer epoch {epoch} of timeline {timeline} is over: epoch {current} writes now")]
    EpochOver {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that is over.
        epoch: u32,
        /// The newest one.
        current: u32,
    },
    /// The branch that a compute belongs to points to another history by now.
    #[error("branch {branch} does not point to timeline {timeline} any more: it was restored or deleted")]
    BranchMoved {
        /// The branch.
        branch: BranchName,
        /// The timeline that the compute was started on.
        timeline: TimelineId,
    },
    /// A timeline has used all of its writer epochs.
    #[error("timeline {timeline} has used all of its writer epochs: restore the branch to get a new timeline")]
    EpochsUsedUp {
        /// The timeline.
        timeline: TimelineId,
    },
    /// What was acknowledged last is only in a compute's `pg_wal`.
    #[error(
        "timeline {timeline}: what the compute of epoch {epoch} wrote after {head} is not here: it is in the WAL log of server {wal_log}, and in the \
         pg_wal of that compute. If that server is there, run 'varve tenant take TENANT' on it, stop the compute there cleanly, and try again here. If its \
         disk is lost, let the compute run and reach this server. Only if both are lost for good, go on with what \
         the store has: 'varve branch restore TENANT/BRANCH --lsn {head}'"
    )]
    TailUnknown {
        /// The timeline.
        timeline: TimelineId,
        /// The newest epoch.
        epoch: u32,
        /// What is known.
        head: Lsn,
        /// The WAL log that has the rest, which is its server's name.
        wal_log: String,
    },
    /// Another server has taken the tenant over.
    #[error("tenant {tenant} was taken over by another server: nothing of it is served or acknowledged here")]
    NotOwner {
        /// The tenant.
        tenant: TenantId,
    },
    /// The tenant's log says nothing of a tenant.
    #[error("the log of tenant {tenant} says nothing of a tenant")]
    EmptyLog {
        /// The tenant.
        tenant: TenantId,
    },
    /// A tenant of a major that this release does not know.
    #[error("tenant {tenant} is of PostgreSQL {pg_version}, which is not supported: 14 to 18 are")]
    UnsupportedMajor {
        /// The tenant.
        tenant: TenantId,
        /// Its major.
        pg_version: u32,
    },
    /// What is not retained any more could not be collected.
    #[error("the history of timeline {timeline} is not collected yet, and is tried again by itself: {problem}")]
    NotCollected {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        problem: String,
    },
    /// A list of kept pages that cannot be read.
    #[error("the list of kept pages {path} cannot be read: {problem}")]
    KeptPages {
        /// Its name.
        path: String,
        /// Why.
        problem: String,
    },
    /// WAL that is neither kept nor in the WAL log.
    #[error("the WAL at {lsn} is not kept: {what_there_is}")]
    WalNotKept {
        /// Where it was asked for.
        lsn: Lsn,
        /// Ranges, in words.
        what_there_is: String,
    },
}

impl<E: Into<EngineError>> From<CommitError<E>> for EngineError {
    fn from(error: CommitError<E>) -> EngineError {
        match error {
            CommitError::Refused(error) => error.into(),
            CommitError::Log(error) => error.into(),
        }
    }
}

impl EngineError {
    /// Whether it says that another server owns the tenant.
    pub fn is_fenced(&self) -> bool {
        matches!(self, EngineError::Log(EditLogError::Fenced { .. }) | EngineError::NotOwner { .. })
    }
}
