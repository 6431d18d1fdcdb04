//! What a tenant's log does not take.

use crate::ids::{BranchName, EndpointId, TimelineId};

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
