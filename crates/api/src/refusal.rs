//! Why something was not done: a stable code, an HTTP status, and a sentence that says what to do.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A refusal or failure, ready for the edge.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// What kind.
    pub code: Code,
    /// What happened and what to do.
    pub detail: String,
}

/// Declares the codes once, with their text and their HTTP status.
macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $status:literal $title:literal;)*) => {
        /// Kinds of refusals. The names are part of the API and stay.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])* $variant,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            /// The stable text.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// HTTP status and its usual text.
            pub fn status(self) -> (u16, &'static str) {
                match self { $(Code::$variant => ($status, $title),)* }
            }
        }
    };
}

codes! {
    /// A name, number, LSN or time that cannot be read, or two that exclude each other.
    InvalidArgument "invalid_argument" 400 "Bad Request";
    /// No valid credential for this address.
    Unauthorized "unauthorized" 401 "Unauthorized";
    /// The request came from where none may come from, such as a web page.
    Forbidden "forbidden" 403 "Forbidden";
    /// No such address in the API.
    NoSuchAddress "no_such_address" 404 "Not Found";
    /// No such tenant.
    UnknownTenant "unknown_tenant" 404 "Not Found";
    /// No such branch.
    UnknownBranch "unknown_branch" 404 "Not Found";
    /// No such snapshot.
    UnknownSnapshot "unknown_snapshot" 404 "Not Found";
    /// No such compute.
    UnknownCompute "unknown_compute" 404 "Not Found";
    /// No such host.
    UnknownHost "unknown_host" 404 "Not Found";
    /// The address does not take this method.
    MethodNotAllowed "method_not_allowed" 405 "Method Not Allowed";
    /// The client sent its request too slowly.
    RequestTimeout "request_timeout" 408 "Request Timeout";
    /// The name is taken.
    NameTaken "name_taken" 409 "Conflict";
    /// The branch has children.
    HasChildren "has_children" 409 "Conflict";
    /// It is the tenant's last branch.
    LastBranch "last_branch" 409 "Conflict";
    /// The port is in use.
    PortInUse "port_in_use" 409 "Conflict";
    /// The branch's compute runs already, with other arguments.
    AlreadyRunning "already_running" 409 "Conflict";
    /// The compute is stopped, and how it ended does not prove that all its WAL arrived.
    NotClean "not_clean" 409 "Conflict";
    /// A compute was replaced by a later one, or its branch moved to another history.
    Fenced "fenced" 409 "Conflict";
    /// Another server owns the tenant.
    NotOwner "not_owner" 409 "Conflict";
    /// An idempotency key was used for another request before.
    KeyReused "key_reused" 409 "Conflict";
    /// The body is larger than this address takes.
    TooLarge "too_large" 413 "Content Too Large";
    /// The body is not JSON, or does not say so.
    UnsupportedMediaType "unsupported_media_type" 415 "Unsupported Media Type";
    /// The LSN or time lies after the branch's head.
    InTheFuture "in_the_future" 422 "Unprocessable Content";
    /// The LSN or time lies before what is kept.
    NotRetained "not_retained" 422 "Unprocessable Content";
    /// No host can do it: a Postgres version, `/dev/fuse` or a user is missing.
    HostUnfit "host_unfit" 422 "Unprocessable Content";
    /// Something stored is damaged, or a bug; nothing wrong was served.
    Internal "internal" 500 "Internal Server Error";
    /// What was acknowledged last is on another server's disk, and in the compute that wrote it, which does not come.
    TailUnknown "tail_unknown" 503 "Service Unavailable";
    /// Not possible right now; try again.
    Unavailable "unavailable" 503 "Service Unavailable";
}

impl Code {
    /// The code with this text.
    pub fn from_name(name: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.name() == name)
    }
}

impl Refusal {
    /// An error of kind `code`.
    pub fn new(code: Code, detail: impl Into<String>) -> Refusal {
        Refusal { code, detail: detail.into() }
    }

    /// Something that should not happen, or a damaged store.
    pub fn internal(detail: impl std::fmt::Display) -> Refusal {
        Refusal::new(Code::Internal, detail.to_string())
    }

    /// Worth another try soon.
    pub fn unavailable(detail: impl std::fmt::Display) -> Refusal {
        Refusal::new(Code::Unavailable, detail.to_string())
    }

    /// The body of the HTTP answer.
    pub fn problem(&self) -> Problem {
        let (status, title) = self.code.status();
        Problem { code: self.code.name().to_owned(), status, title: title.to_owned(), detail: self.detail.clone() }
    }
}

/// An `application/problem+json` answer (RFC 9457).
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Stable name of the kind of error.
    pub code: String,
    /// HTTP status.
    pub status: u16,
    /// Short text for the status.
    pub title: String,
    /// What happened and what to do.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_a_name_of_its_own() {
        for code in Code::ALL {
            assert_eq!(Code::from_name(code.name()), Some(*code));
            assert!((400..600).contains(&code.status().0), "{code:?}");
        }
    }
}
