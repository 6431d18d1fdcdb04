//! What the control plane says no with. Causes keep their types; they become words once, in [`Error::refusal`], at the
//! HTTP edge.

use std::fmt::Display;

use varve_api::{Code, Refusal};
use varve_storage::edit_log::{CommitError, EditLogError};
use varve_storage::store::{ParseObjectNameError, StoreError};
use varve_storage::tenant_log::names::NameError;
use varve_storage::tenant_log::{CreateTenantError, TenantError};

use crate::environment::NoRandom;
use crate::ports::Lost;

/// Characters of bad input that an error repeats.
const QUOTED_CHARS: usize = 64;

/// First characters of what somebody sent.
pub(crate) fn quoted(text: &str) -> String {
    text.chars().take(QUOTED_CHARS).collect()
}

/// What went wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// An argument that cannot be read, or does not fit another one.
    #[error("{name}: {problem}")]
    Argument {
        /// The argument's name.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// No such tenant.
    #[error("there is no tenant '{0}'; 'varve tenant list' shows those there are")]
    UnknownTenant(String),
    /// No such branch.
    #[error("tenant {tenant} has no branch '{branch}'; 'varve branch list {tenant}' shows those there are")]
    UnknownBranch {
        /// The tenant.
        tenant: String,
        /// What was asked for.
        branch: String,
    },
    /// No such compute.
    #[error("there is no compute '{0}'; 'varve compute list' shows those there are")]
    UnknownCompute(String),
    /// No such host.
    #[error("there is no host '{0}': it has to say hello first")]
    UnknownHost(String),
    /// A compute that nobody has told of yet, such as after a restart of the control plane.
    #[error("compute {0} is not known here yet: its host says hello first; try again")]
    NotYetKnown(String),
    /// The branch's compute runs with other arguments.
    #[error(
        "{branch} runs with port {port} and listens on {listen} already, and was left alone. To end its sessions and begin anew with other \
         arguments: 'varve compute start {branch} --replace ...' (\"replace\": true)"
    )]
    AlreadyRunning {
        /// `tenant/branch`.
        branch: String,
        /// Its port.
        port: u16,
        /// Its addresses.
        listen: String,
    },
    /// A compute that was stopped and did not end cleanly.
    #[error("{branch} is stopped, but it did not end cleanly: {reason}. {kept}")]
    NotClean {
        /// `tenant/branch`.
        branch: String,
        /// What happened.
        reason: String,
        /// What became of its WAL.
        kept: &'static str,
    },
    /// A verification of a restore is under way.
    #[error("whether a restore of tenant {0} works is being verified already: 'varve tenant show {0}' tells how far that is")]
    Verifies(String),
    /// A compute runs on the branch whose settings are to change.
    #[error("a compute runs on {0}: change its settings there with ALTER SYSTEM, or stop it first ('varve compute stop {0}')")]
    ComputeRuns(String),
    /// A compute that did not start.
    #[error("{branch} did not start: {reason}")]
    NotStarted {
        /// `tenant/branch`.
        branch: String,
        /// Why, as its process said it.
        reason: String,
    },
    /// A restore that was done, and a compute that did not follow.
    #[error("{branch} is restored, but its compute did not come back: {reason}")]
    NotBack {
        /// `tenant/branch`.
        branch: String,
        /// What is known.
        reason: String,
    },
    /// A compute that may not go on.
    #[error("this compute may not go on: {0}")]
    Fenced(&'static str),
    /// Another server took the tenant over.
    #[error("tenant {} is served by {} now: {}", shown_tenant(.0), .0.owner, shown_url(.0))]
    NotOwner(Box<Lost>),
    /// The branch moved while something was done about it.
    #[error("branch {0} was moved by somebody else just now; look, and try again")]
    Moved(String),
    /// No host runs that.
    #[error("no host can run it: {0}")]
    NoHost(String),
    /// A host that did not answer.
    #[error("host {host} did not say within {seconds} s that it does what it was told; see its log, and try again")]
    HostSilent {
        /// The host.
        host: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// An idempotency key that was used for another request.
    #[error("the Idempotency-Key '{0}' was used for another request before: take a new one")]
    KeyReused(String),
    /// A time that is yet to come.
    #[error("{0} is in the future")]
    InTheFuture(String),
    /// A moment that was collected.
    #[error(
        "{what} is not kept any more: {of} can be read from {from} on. What is to stay longer needs a longer window \
         (varve tenant set --history), which counts from then on, or a snapshot"
    )]
    NotKept {
        /// What was asked for.
        what: String,
        /// Of which branch.
        of: String,
        /// The earliest moment that there is.
        from: String,
    },
    /// All names for what a restored branch was are taken.
    #[error("no free name is left for what was {0}")]
    NoNameLeft(String),
    /// An answer that was kept cannot be written or read.
    #[error("an answer cannot be kept: {0}")]
    Answer(String),
    /// The process ends.
    #[error("the server is shutting down; look whether it was done, and try again")]
    Stopping,
    /// The tenant's log does not allow it.
    #[error(transparent)]
    Tenant(#[from] TenantError),
    /// The tenant's log cannot be read or written.
    #[error(transparent)]
    Log(#[from] EditLogError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tenant's name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A tenant cannot be created.
    #[error(transparent)]
    Create(#[from] CreateTenantError),
    /// An id that no store takes as a name.
    #[error(transparent)]
    ObjectName(#[from] ParseObjectNameError),
    /// Another role said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No chance.
    #[error(transparent)]
    Random(#[from] NoRandom),
    /// A request that does not fit the address.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// What is wrong with a request before anybody looks at what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No such address.
    #[error("there is no such address in this API; /v1/openapi.json lists all")]
    NoSuchAddress,
    /// The address takes other methods.
    #[error("this address does not take this method; the header Allow, and /v1/openapi.json, say which it takes")]
    MethodNotAllowed,
    /// A body that came too slowly.
    #[error("the request's body did not arrive within {0} s")]
    TooSlow(u64),
    /// A body that is too large.
    #[error("the request's body is larger than the {0} bytes that this address takes")]
    TooLarge(usize),
    /// A body of another type.
    #[error("this address takes a body of type {0}: say so in Content-Type")]
    MediaType(&'static str),
    /// A body that broke off.
    #[error("the request's body broke off: {0}")]
    BrokeOff(String),
    /// A body that is not what the address takes.
    #[error("the request's body is not right: {0}")]
    Body(String),
    /// A header that cannot be read.
    #[error("header {name}: {problem}")]
    Header {
        /// Its name.
        name: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Part of the address that cannot be read.
    #[error("the address is not right: {0}")]
    Address(String),
    /// A `Host` that is not ours: a web page that pretends to be of this server.
    #[error("this server is not called '{0}': use its address, or one of its configured names")]
    ForeignHost(String),
    /// A web page.
    #[error("requests that come from a web page are not taken; its origin is '{0}'")]
    ForeignOrigin(String),
    /// No token, or another one.
    #[error("this address is for hosts and their computes: it needs the host's token")]
    NoToken,
    /// Too many connections.
    #[error("the server has as many connections as it takes; try again soon")]
    TooMany,
    /// Work that takes too long.
    #[error("this was not done within {0} s; look whether it was done later, and try again")]
    WorkTooSlow(u64),
}

fn shown_tenant(lost: &Lost) -> String {
    lost.name.clone().unwrap_or_else(|| lost.tenant.to_string())
}

fn shown_url(lost: &Lost) -> String {
    lost.url.as_ref().map_or_else(|| "it did not say where it is reached".to_owned(), |url| format!("go to {url}"))
}

impl Error {
    /// An argument that is not right.
    pub(crate) fn argument(name: &'static str, problem: impl Display) -> Error {
        Error::Argument { name, problem: problem.to_string() }
    }

    /// Its code.
    pub fn code(&self) -> Code {
        match self {
            Error::Argument { .. } => Code::InvalidArgument,
            Error::UnknownTenant(_) => Code::UnknownTenant,
            Error::UnknownBranch { .. } => Code::UnknownBranch,
            Error::UnknownCompute(_) => Code::UnknownCompute,
            Error::UnknownHost(_) => Code::UnknownHost,
            Error::AlreadyRunning { .. } | Error::ComputeRuns(_) | Error::Verifies(_) => Code::AlreadyRunning,
            Error::NotClean { .. } => Code::NotClean,
            Error::NotStarted { .. } | Error::NoHost(_) => Code::HostUnfit,
            Error::NotBack { .. } | Error::ObjectName(_) | Error::Answer(_) | Error::Random(_) => Code::Internal,
            Error::Fenced(_) => Code::Fenced,
            Error::NotOwner(_) => Code::NotOwner,
            Error::NotYetKnown(_) | Error::Moved(_) | Error::HostSilent { .. } | Error::Stopping | Error::Store(_) => Code::Unavailable,
            Error::KeyReused(_) => Code::KeyReused,
            Error::InTheFuture(_) => Code::InTheFuture,
            Error::NotKept { .. } => Code::NotRetained,
            Error::NoNameLeft(_) => Code::NameTaken,
            Error::Tenant(error) => tenant_code(error),
            Error::Log(error) => log_code(error),
            Error::Name(error) => name_code(error),
            Error::Create(CreateTenantError::NameTaken(_)) => Code::NameTaken,
            Error::Create(CreateTenantError::Name(error)) => name_code(error),
            Error::Create(CreateTenantError::Log(error)) => log_code(error),
            Error::Refused(refusal) => refusal.code,
            Error::Request(error) => request_code(error),
        }
    }

    /// Code and words.
    pub fn refusal(&self) -> Refusal {
        match self {
            Error::Refused(refusal) => refusal.clone(),
            other => Refusal::new(other.code(), other.to_string()),
        }
    }

    /// Whether the same request may succeed later without anybody doing something about it.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self.code(), Code::Unavailable | Code::TailUnknown)
    }
}

fn tenant_code(error: &TenantError) -> Code {
    match error {
        TenantError::UnknownBranch(_) | TenantError::UnknownTimeline(_) => Code::UnknownBranch,
        TenantError::UnknownEndpoint(_) => Code::UnknownCompute,
        TenantError::UnknownSnapshot(_) => Code::UnknownSnapshot,
        TenantError::BranchExists(_) | TenantError::SnapshotExists(_) => Code::NameTaken,
        TenantError::Collected { .. } => Code::NotRetained,
        TenantError::LastBranch(_) => Code::LastBranch,
        TenantError::Removed => Code::UnknownTenant,
        TenantError::NoTliLeft | TenantError::Contradiction(_) => Code::Internal,
    }
}

fn log_code(error: &EditLogError) -> Code {
    match error {
        EditLogError::Fenced { .. } => Code::NotOwner,
        EditLogError::Unconfirmed { .. } | EditLogError::Stopped { .. } | EditLogError::Store(_) => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn name_code(error: &NameError) -> Code {
    match error {
        NameError::Taken { .. } => Code::NameTaken,
        NameError::Store(_) => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn request_code(error: &RequestError) -> Code {
    match error {
        RequestError::NoSuchAddress => Code::NoSuchAddress,
        RequestError::MethodNotAllowed => Code::MethodNotAllowed,
        RequestError::TooSlow(_) => Code::RequestTimeout,
        RequestError::TooLarge(_) => Code::TooLarge,
        RequestError::MediaType(_) => Code::UnsupportedMediaType,
        RequestError::BrokeOff(_) | RequestError::Body(_) | RequestError::Header { .. } | RequestError::Address(_) => Code::InvalidArgument,
        RequestError::ForeignHost(_) | RequestError::ForeignOrigin(_) => Code::Forbidden,
        RequestError::NoToken => Code::Unauthorized,
        RequestError::TooMany | RequestError::WorkTooSlow(_) => Code::Unavailable,
    }
}

impl<E: Into<Error>> From<CommitError<E>> for Error {
    fn from(error: CommitError<E>) -> Error {
        match error {
            CommitError::Refused(error) => error.into(),
            CommitError::Log(error) => error.into(),
        }
    }
}
