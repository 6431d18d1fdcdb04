//! What a tenant's log does not take.

use varve_postgres::Lsn;

use crate::ids::{BranchName, EndpointId, SnapshotName, TimelineId};

/// An edit that contradicts the state, or a request that the state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TenantError {
    /// No such branch.
    #[error("there is no branch '{0}'")]
    UnknownBranch(String),
    /// No such timeline.
    #[error("there is no timeline {0}")]
    UnknownTimeline(TimelineId),
    /// No such endpoint.
    #[error("there is no endpoint {0}")]
    UnknownEndpoint(EndpointId),
    /// The name is taken.
    #[error("there is a branch '{0}' already: choose another name")]
    BranchExists(BranchName),
    /// The branch is the only one.
    #[error("branch '{0}' is the last of its tenant: create another first, or delete the tenant")]
    LastBranch(BranchName),
    /// No such snapshot.
    #[error("there is no snapshot '{0}'")]
    UnknownSnapshot(String),
    /// The name is taken.
    #[error("there is a snapshot '{0}' already: choose another name, or delete it")]
    SnapshotExists(SnapshotName),
    /// The moment is not retained.
    #[error("{lsn} is not kept any more: the history of timeline {timeline} can be read from {earliest} on")]
    Collected {
        /// The timeline whose history it was.
        timeline: TimelineId,
        /// The position.
        lsn: Lsn,
        /// Where what is readable without a gap begins.
        earliest: Lsn,
    },
    /// All Postgres timelines are used up.
    #[error("this tenant has used all of Postgres's 2147483647 timelines: copy it into a new tenant")]
    NoTliLeft,
    /// The tenant is gone.
    #[error("the tenant is deleted")]
    Removed,
    /// The log contradicts itself.
    #[error("the tenant's log contradicts itself: {0}")]
    Contradiction(String),
}
