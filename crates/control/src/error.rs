//! What the pageserver says when it cannot do what it was asked: a stable code, an HTTP status, and a sentence that says what to do.

use varve_api::Problem;
use varve_storage::edit_log::{CommitError, EditLogError};
use varve_storage::store::StoreError;
use varve_storage::tenant_log::TenantError;
use varve_storage::tenant_log::names::NameError;

/// A refusal or failure, ready for the edge.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{detail}")]
pub struct ServerError {
    /// What kind.
    pub code: Code,
    /// What happened and what to do.
    pub detail: String,
}

/// Kinds of errors. The names are part of the API and stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A name, number, LSN or time that cannot be read, or two that exclude each other.
    InvalidArgument,
    /// No such tenant.
    UnknownTenant,
    /// No such branch.
    UnknownBranch,
    /// No such compute.
    UnknownCompute,
    /// The name is taken.
    NameTaken,
    /// The branch is the tenant's only one.
    LastBranch,
    /// The LSN or time lies after the branch's head.
    InTheFuture,
    /// The LSN or time lies before what is kept.
    NotRetained,
    /// The port is in use.
    PortInUse,
    /// This host lacks something: a Postgres version, `/dev/fuse`, a user.
    HostUnfit,
    /// A compute was replaced by a later one.
    Fenced,
    /// Another server took the tenant over.
    NotOwner,
    /// Not possible right now; try again.
    Unavailable,
    /// Something stored is damaged or a bug; nothing wrong was served.
    Internal,
}

impl Code {
    /// The stable text.
    pub fn name(self) -> &'static str {
        match self {
            Code::InvalidArgument => "invalid_argument",
            Code::UnknownTenant => "unknown_tenant",
            Code::UnknownBranch => "unknown_branch",
            Code::UnknownCompute => "unknown_compute",
            Code::NameTaken => "name_taken",
            Code::LastBranch => "last_branch",
            Code::InTheFuture => "in_the_future",
            Code::NotRetained => "not_retained",
            Code::PortInUse => "port_in_use",
            Code::HostUnfit => "host_unfit",
            Code::Fenced => "fenced",
            Code::NotOwner => "not_owner",
            Code::Unavailable => "unavailable",
            Code::Internal => "internal",
        }
    }

    /// HTTP status and its usual text.
    pub fn status(self) -> (u16, &'static str) {
        match self {
            Code::InvalidArgument => (400, "Bad Request"),
            Code::UnknownTenant | Code::UnknownBranch | Code::UnknownCompute => (404, "Not Found"),
            Code::NameTaken | Code::LastBranch | Code::PortInUse | Code::Fenced | Code::NotOwner => (409, "Conflict"),
            Code::InTheFuture | Code::NotRetained | Code::HostUnfit => (422, "Unprocessable Content"),
            Code::Unavailable => (503, "Service Unavailable"),
            Code::Internal => (500, "Internal Server Error"),
        }
    }
}

impl ServerError {
    /// An error of kind `code`.
    pub fn new(code: Code, detail: impl Into<String>) -> ServerError {
        ServerError { code, detail: detail.into() }
    }

    /// Something that should not happen, or a damaged store.
    pub fn internal(detail: impl std::fmt::Display) -> ServerError {
        ServerError::new(Code::Internal, detail.to_string())
    }

    /// Worth another try soon.
    pub fn unavailable(detail: impl std::fmt::Display) -> ServerError {
        ServerError::new(Code::Unavailable, detail.to_string())
    }

    /// The body of the HTTP answer.
    pub fn problem(&self) -> Problem {
        let (status, title) = self.code.status();
        Problem { code: self.code.name().to_owned(), status, title: title.to_owned(), detail: self.detail.clone() }
    }
}

impl From<TenantError> for ServerError {
    fn from(error: TenantError) -> ServerError {
        let code = match &error {
            TenantError::UnknownBranch(_) | TenantError::UnknownTimeline(_) => Code::UnknownBranch,
            TenantError::UnknownEndpoint(_) => Code::UnknownCompute,
            TenantError::BranchExists(_) => Code::NameTaken,
            TenantError::LastBranch(_) => Code::LastBranch,
            TenantError::Removed => Code::UnknownTenant,
            TenantError::NoTliLeft | TenantError::Contradiction(_) => Code::Internal,
        };
        ServerError::new(code, error.to_string())
    }
}

impl From<EditLogError> for ServerError {
    fn from(error: EditLogError) -> ServerError {
        let code = match &error {
            EditLogError::Fenced { .. } => Code::NotOwner,
            EditLogError::Unconfirmed { .. } | EditLogError::Stopped { .. } | EditLogError::Store(_) => Code::Unavailable,
            _ => Code::Internal,
        };
        ServerError::new(code, error.to_string())
    }
}

impl<E: Into<ServerError>> From<CommitError<E>> for ServerError {
    fn from(error: CommitError<E>) -> ServerError {
        match error {
            CommitError::Refused(error) => error.into(),
            CommitError::Log(error) => error.into(),
        }
    }
}

impl From<StoreError> for ServerError {
    fn from(error: StoreError) -> ServerError {
        ServerError::unavailable(error)
    }
}

impl From<NameError> for ServerError {
    fn from(error: NameError) -> ServerError {
        match error {
            NameError::Taken { .. } => ServerError::new(Code::NameTaken, error.to_string()),
            NameError::Store(error) => error.into(),
            other => ServerError::internal(other),
        }
    }
}
