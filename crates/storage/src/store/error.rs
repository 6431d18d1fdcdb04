//! What can go wrong with an object store, told so that an operator knows what to do.

use super::ObjectName;

/// Kinds of failure that callers and operators must tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// There is no such object.
    NotFound,
    /// A conditional create found the name taken.
    AlreadyExists,
    /// Credentials are missing, wrong, or lack the right.
    AccessDenied,
    /// The folder or bucket takes no writes.
    ReadOnly,
    /// There is no such bucket, or the root folder is gone.
    StoreMissing,
    /// The disk or quota is full.
    NoSpace,
    /// Nobody answers at the store's address.
    Unreachable,
    /// The store does not know conditional creates.
    Unsupported,
    /// Anything else: time-outs, 5xx answers, broken connections.
    Other,
}

impl Failure {
    /// Whether an operation that failed so was certainly not carried out. Of all others one cannot know.
    pub fn is_definite(self) -> bool {
        match self {
            Failure::NotFound | Failure::AlreadyExists | Failure::AccessDenied => true,
            Failure::ReadOnly | Failure::StoreMissing | Failure::Unsupported => true,
            Failure::NoSpace | Failure::Unreachable | Failure::Other => false,
        }
    }

    /// Whether trying again, soon, may succeed.
    pub fn is_transient(self) -> bool {
        matches!(self, Failure::Unreachable | Failure::Other)
    }

    fn advice(self) -> &'static str {
        match self {
            Failure::NotFound => "there is no such object; if it was deleted by hand, restore it from a copy",
            Failure::AlreadyExists => "the object exists already",
            Failure::AccessDenied => {
                "access was denied; check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the folder's owner and mode"
            }
            Failure::ReadOnly => "the store is read-only; give Varve the right to write to it, or mount the file system read-write",
            Failure::StoreMissing => "the bucket or root folder does not exist; create it, or correct the store's URL",
            Failure::NoSpace => "no space is left; free some, or raise the quota",
            Failure::Unreachable => {
                "the store cannot be reached; check its address (AWS_ENDPOINT_URL), that it runs, and the network between"
            }
            Failure::Unsupported => {
                "the store does not support conditional creates (If-None-Match), on which Varve's safety rests; use another store"
            }
            Failure::Other => "it failed for a reason that Varve does not know; see the store's own message",
        }
    }
}

/// One failed request, as an [`super::ObjectClient`] reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientError {
    /// What kind of failure.
    pub failure: Failure,
    /// The store's own words.
    pub message: String,
}

/// What a [`super::Store`] operation failed with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The URL or the settings make no sense.
    #[error("store '{store}' cannot be opened: {problem}")]
    Config {
        /// The URL given.
        store: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// An operation on an object failed.
    #[error("could not {action} '{object}' in store {store}: {} ({message})", failure.advice())]
    Operation {
        /// What was tried: "read", "create".
        action: &'static str,
        /// The object.
        object: ObjectName,
        /// The store.
        store: String,
        /// What kind of failure.
        failure: Failure,
        /// The store's own words.
        message: String,
        /// Whether it may have been carried out all the same, now or later.
        uncertain: bool,
    },
    /// Fewer bytes than the range asked for.
    #[error("object '{object}' in store {store} is too short: bytes {start}..{end} were asked for, {got} came; restore it from a copy")]
    Short {
        /// The object.
        object: ObjectName,
        /// The store.
        store: String,
        /// Start of the range.
        start: u64,
        /// End of the range.
        end: u64,
        /// Bytes that came.
        got: u64,
    },
    /// Two racing creates of one name both succeeded, or none did.
    #[error(
        "store {store} must not be used: of two racing conditional creates of one name {winners} succeeded instead of one, so two servers could overwrite each other's data; use a store with If-None-Match support, such as S3 or MinIO"
    )]
    NotConditional {
        /// The store.
        store: String,
        /// How many succeeded.
        winners: usize,
    },
    /// What was written is not what was read.
    #[error("store {store} must not be used: '{object}' was just written, and reading it gave something else")]
    NotConsistent {
        /// The store.
        store: String,
        /// The object.
        object: ObjectName,
    },
}

impl StoreError {
    /// The kind of failure, where a request failed.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            StoreError::Operation { failure, .. } => Some(*failure),
            _ => None,
        }
    }

    /// Whether the operation may have been carried out all the same, now or later.
    pub fn is_uncertain(&self) -> bool {
        matches!(self, StoreError::Operation { uncertain: true, .. })
    }

    /// Whether this says that an object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.failure() == Some(Failure::NotFound)
    }
}
