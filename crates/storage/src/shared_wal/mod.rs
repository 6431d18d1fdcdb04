//! WAL in the store: what the WAL log of a server has and layers do not yet, in objects that all its timelines share.
//!
//! **Runs.** A server writes `wal/<WAL log>/<run>/<number>`: a *run* is a sequence of objects, begun by each process,
//! and anew whenever another server has sealed it. Its first object, number 0, says only that it has begun. Each number
//! is created with *put if absent*, one after the other, so exactly one writer's object stands under each.
//!
//! **Sealing.** Who takes over a timeline whose newest WAL is another server's creates the next number of that server's
//! runs ([`Archive::seal`]). From then on nothing is added to them: the sleeper's next object finds its name taken, and
//! it learns that it must begin a new run. What it was told is stored stands before the seal, and is found by whoever
//! sealed. Before a run takes its first WAL of a tenant, its writer asks the store whether the tenant is still its own,
//! *after* the run has begun: so either the newcomer's seal closes that run, or the writer learns that it has lost the
//! tenant. A seal is never deleted; nor is the newest object of a run, unless by its writer's next process: it says
//! where the seal belongs.
//!
//! **What an object holds.** A directory, and behind it chunks, each the bytes of one timeline from one LSN to another,
//! all of them below its *head*: of whole records, durable in the WAL log. No such byte ever changes, for the next
//! writer epoch begins at head. So chunks that overlap hold the same, and no epoch need be told.
//!
//! Layout: an envelope `VSWD` with the directory ([`Directory`], in postcard), then for each of its rows an envelope
//! `VSWC` with the bytes. So each tenant's bytes have their own compression, checksum and key, and the directory can be
//! read alone.

mod archive;
mod run;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use varve_postgres::Lsn;

pub use archive::{Archive, Found, Stored};
pub use run::{Encoded, Put, Run};

use crate::envelope::{self, Codec, EnvelopeError, Format};
use crate::ids::{RandomError, TenantId, TimelineId, WalLogId};
use crate::store::{ObjectName, ParseObjectNameError, StoreError};

/// Folder of all these objects.
pub const FOLDER: &str = "wal";
/// Bytes of WAL that an object takes.
pub const OBJECT_BYTES_MAX: usize = 4 << 20;
/// Bytes of WAL in one chunk at most.
const CHUNK_BYTES_MAX: u64 = 2 * OBJECT_BYTES_MAX as u64;
/// Rows of a directory at most.
pub const ROWS_MAX: usize = 16 * 1024;

const DIRECTORY: Format = Format { magic: *b"VSWD", version: 1, what: "an object of shared WAL", content_bytes_max: ROWS_MAX as u64 * 128 };
const CHUNK: Format = Format { magic: *b"VSWC", version: 1, what: "a chunk of shared WAL", content_bytes_max: CHUNK_BYTES_MAX };

/// Bytes of one timeline's WAL, of whole records, though it may be cut within one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its tenant.
    pub tenant: TenantId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first byte.
    pub start: Lsn,
    /// The bytes.
    pub bytes: Bytes,
}

impl Chunk {
    /// The byte behind the last.
    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }
}

/// Where a chunk of an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its tenant.
    pub tenant: TenantId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first byte of WAL.
    #[serde(with = "crate::row_fields::lsn")]
    pub start: Lsn,
    /// The byte of WAL behind the last.
    #[serde(with = "crate::row_fields::lsn")]
    pub end: Lsn,
    /// Bytes of its envelope.
    pub stored_bytes: u64,
}

/// What an object says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Of the process that wrote it: an object with the same one, and the same contents, is our own.
    pub nonce: [u8; 16],
    /// What it is.
    pub kind: Kind,
}

/// What an object is. Written as its number: kinds are only ever added at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The run begins.
    Begin,
    /// WAL; the chunks stand behind the directory in this order.
    Wal(Vec<Row>),
    /// The run takes nothing more.
    Seal {
        /// Who wants the timelines' WAL: the WAL log of another server.
        by: WalLogId,
    },
}

/// Shared WAL that cannot be written or read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SharedWalError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What an object holds.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// No name could be made.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
    /// No random bytes.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// An object's directory and the object do not fit together.
    #[error("{object} is damaged: {problem}; restore it from a copy")]
    Damaged {
        /// The object.
        object: ObjectName,
        /// What is wrong.
        problem: String,
    },
    /// Somebody else writes objects of our WAL log.
    #[error(
        "{object} was written by another process that has the same WAL log: two servers must not run on copies of one data folder; stop one of them"
    )]
    Foreign {
        /// The object.
        object: ObjectName,
    },
}

impl SharedWalError {
    /// Whether the object that was to be read is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, SharedWalError::Store(error) if error.is_not_found())
    }

    /// The error, unless it says that the store did not answer: an object that is damaged stays so.
    ///
    /// # Errors
    /// When the store did not answer.
    pub fn unless_unanswered(self) -> Result<SharedWalError, SharedWalError> {
        match self {
            SharedWalError::Envelope(_) | SharedWalError::Damaged { .. } => Ok(self),
            SharedWalError::Store(StoreError::Short { .. }) => Ok(self),
            error if error.is_not_found() => Ok(error),
            error => Err(error),
        }
    }

    fn damaged(object: &ObjectName, problem: impl Into<String>) -> SharedWalError {
        SharedWalError::Damaged { object: object.clone(), problem: problem.into() }
    }
}

/// Folder of the runs of a WAL log.
///
/// # Errors
/// Never, for such names are well formed.
fn log_folder(wal_log: WalLogId) -> Result<ObjectName, ParseObjectNameError> {
    format!("{FOLDER}/{wal_log}").parse()
}

/// An object's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The run.
    pub run: u32,
    /// The number within it.
    pub number: u64,
}

impl Place {
    fn object(self, folder: &ObjectName) -> Result<ObjectName, ParseObjectNameError> {
        folder.join(&format!("{:08x}/{:012x}", self.run, self.number))
    }

    /// The place of an object in the folder of a WAL log's runs.
    fn of(folder: &ObjectName, object: &ObjectName) -> Option<Place> {
        let (run, number) = folder.relative(object)?.split_once('/')?;
        let hex = |text: &str, digits: usize| (text.len() == digits).then(|| u64::from_str_radix(text, 16).ok()).flatten();
        Some(Place { run: u32::try_from(hex(run, 8)?).ok()?, number: hex(number, 12)? })
    }
}

impl Directory {
    fn encode(&self, object: &ObjectName) -> Result<Bytes, SharedWalError> {
        let content = postcard::to_stdvec(self).map_err(|error| SharedWalError::damaged(object, error.to_string()))?;
        Ok(envelope::encode(&DIRECTORY, Codec::Zstd, object.as_str(), &content)?)
    }

    fn decode(object: &ObjectName, bytes: &Bytes) -> Result<Directory, SharedWalError> {
        let content = envelope::decode(&DIRECTORY, object.as_str(), bytes)?.content;
        match postcard::take_from_bytes(&content) {
            Ok((directory, [])) => Ok(directory),
            Ok(_) => Err(SharedWalError::damaged(object, "bytes follow its directory's last row")),
            Err(error) => Err(SharedWalError::damaged(object, format!("its directory cannot be read ({error})"))),
        }
    }

    /// Its rows; none of an object without WAL.
    pub fn rows(&self) -> &[Row] {
        match &self.kind {
            Kind::Wal(rows) => rows,
            Kind::Begin | Kind::Seal { .. } => &[],
        }
    }
}
