//! What can go wrong with an edit log.

use super::EntryId;
use crate::envelope::EnvelopeError;
use crate::ids::{Generation, RandomError};
use crate::store::{ObjectName, ParseObjectNameError, StoreError};

/// An edit that does not fit the state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ApplyError(pub String);

/// What can go wrong with an edit log. Messages name the log or the object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditLogError {
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object is damaged or of a newer version.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// A name that no store takes.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
    /// No randomness for a nonce.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// An object's content makes no sense.
    #[error("{object} is damaged: {problem}; restore it from a copy")]
    Damaged {
        /// The object.
        object: ObjectName,
        /// What is wrong.
        problem: String,
    },
    /// An entry between others is not there.
    #[error("{object} is missing, though later entries of its log exist; restore it from a copy")]
    Missing {
        /// The object.
        object: ObjectName,
    },
    /// An edit that only a newer release knows.
    #[error("{object} holds an edit of kind {kind}, this release knows kinds up to {}: upgrade Varve to read it", known.saturating_sub(1))]
    NewerEdit {
        /// The object.
        object: ObjectName,
        /// The edit's kind.
        kind: u32,
        /// How many kinds this release knows.
        known: u32,
    },
    /// An edit that was committed does not fit the state.
    #[error("{object} holds an edit that contradicts the ones before it: {problem}; restore it from a copy")]
    Contradiction {
        /// The object.
        object: ObjectName,
        /// What does not fit.
        problem: ApplyError,
    },
    /// An edit that the planner made does not fit the state.
    #[error("log {log}: an edit does not fit the state, nothing was written: {problem}")]
    Invalid {
        /// The log's folder.
        log: ObjectName,
        /// What does not fit.
        problem: ApplyError,
    },
    /// An edit that cannot be encoded.
    #[error("an edit cannot be encoded: {0}")]
    Encode(String),
    /// Edits that are too long for one entry.
    #[error("log {log}: edits of {bytes} bytes in one commit are over the limit of {limit_bytes}")]
    TooLong {
        /// The log's folder.
        log: ObjectName,
        /// Their length.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// Somebody else has taken the log over.
    #[error(
        "log {log}: generation {own} was fenced by generation {by}: another pageserver has taken over, this one must stop serving the tenant"
    )]
    Fenced {
        /// The log's folder.
        log: ObjectName,
        /// Our generation.
        own: Generation,
        /// The newer one.
        by: Generation,
    },
    /// Somebody wrote into our generation.
    #[error(
        "{object} was written by somebody else in our own generation: is the same store served by a copied or restored folder? Stop one of the two"
    )]
    Conflict {
        /// The object.
        object: ObjectName,
    },
    /// Other takers were always faster.
    #[error("log {log}: {attempts} generations were taken by others while this server tried to take over; find out who competes for it")]
    Contended {
        /// The log's folder.
        log: ObjectName,
        /// How often we tried.
        attempts: u32,
    },
    /// The write takes longer than a caller should wait; it goes on.
    #[error(
        "log {log}: entry {entry} could not be confirmed within {waited_s} s and is still being tried ({last}); it is not known whether it was written: look before trying again"
    )]
    Unconfirmed {
        /// The log's folder.
        log: ObjectName,
        /// The entry that is being written.
        entry: EntryId,
        /// How long the caller waited.
        waited_s: u64,
        /// The store's last error, or that there was none.
        last: String,
    },
    /// The runtime ended.
    #[error("log {log}: the server is shutting down; it is not known whether the last edits were written")]
    Stopped {
        /// The log's folder.
        log: ObjectName,
    },
}

/// How [`super::EditLog::commit`] can fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError<E> {
    /// The caller's own check said no; nothing was written.
    #[error("{0}")]
    Refused(E),
    /// The log failed.
    #[error(transparent)]
    Log(EditLogError),
}

impl<E> From<EditLogError> for CommitError<E> {
    fn from(error: EditLogError) -> Self {
        CommitError::Log(error)
    }
}
