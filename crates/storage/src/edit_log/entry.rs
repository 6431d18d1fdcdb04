//! The objects of an edit log as bytes.
//!
//! Names: `<prefix>/log/<generation, 8 hexadecimal digits>/<number, 12 hexadecimal digits>` for an entry, the same with
//! `.snapshot` for the state after that entry. Each is an [`crate::envelope`] around this, integers big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | kind: 1 claim, 2 edits, 3 seal, 4 snapshot |
//! | 1..17 | nonce: 16 bytes; a claim and a seal carry their owner's, so that an owner that tries again finds its own |
//! | 17..21 | generation u32, as in the name |
//! | 21..29 | number u64, as in the name |
//! | 29..33 | a seal: generation u32 of who sealed; else 0 |
//! | 33..37 | count of rows u32 |
//! | 37.. | rows: length u32, then the edit: its kind as a varint, its fields in the postcard format |
//!
//! Kinds of edits are numbered in the order of their enum; new ones come at its end, and a kind is never changed. A row
//! of an unknown kind was written by a newer release, and is refused.

use bytes::{Buf, BufMut, Bytes};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{EditLogError, LogFormat};
use crate::envelope::{self, Codec, EnvelopeError, Format};
use crate::ids::Generation;
use crate::store::{ObjectName, ParseObjectNameError};

/// Bytes before the rows.
const HEAD_SIZE: usize = 37;

/// Position of an entry in its log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct EntryId {
    /// Generation of its writer.
    pub generation: Generation,
    /// Its number within the generation; 0 is the claim.
    pub number: u64,
}

impl std::fmt::Display for EntryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.generation, self.number)
    }
}

impl std::fmt::Debug for EntryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Random bytes by which a writer knows its own objects again.
pub(super) type Nonce = [u8; 16];

/// What an object of a log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// First entry of a generation: who takes the log over.
    Claim,
    /// Edits.
    Edits,
    /// Last entry of a generation, by the one that took over.
    Seal {
        /// The newer generation.
        by: Generation,
    },
    /// The state after an entry, as the edits that make it.
    Snapshot,
}

/// An object of a log, decoded but for its rows.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) kind: EntryKind,
    pub(super) nonce: Nonce,
    pub(super) id: EntryId,
    pub(super) row_count: u32,
    /// Lengths and edits, as they stand in the object.
    pub(super) rows: Bytes,
}

/// Names of a log's objects.
#[derive(Clone, Debug)]
pub(super) struct LogNames {
    folder: ObjectName,
}

/// What a name in the log's folder stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NamedEntry {
    pub(super) id: EntryId,
    pub(super) is_snapshot: bool,
}

impl LogNames {
    pub(super) fn new(prefix: &ObjectName) -> Result<LogNames, ParseObjectNameError> {
        // The longest name that can come up, so that later ones cannot fail.
        prefix.join("log/00000000/000000000000.snapshot")?;
        Ok(LogNames { folder: prefix.join("log")? })
    }

    pub(super) fn folder(&self) -> &ObjectName {
        &self.folder
    }

    pub(super) fn entry(&self, id: EntryId) -> Result<ObjectName, ParseObjectNameError> {
        self.folder.join(&format!("{:08x}/{:012x}", id.generation.0, id.number))
    }

    pub(super) fn snapshot(&self, id: EntryId) -> Result<ObjectName, ParseObjectNameError> {
        self.folder.join(&format!("{:08x}/{:012x}.snapshot", id.generation.0, id.number))
    }

    pub(super) fn parse(&self, name: &ObjectName) -> Option<NamedEntry> {
        let (generation, number) = self.folder.relative(name)?.split_once('/')?;
        let (number, is_snapshot) = number.strip_suffix(".snapshot").map_or((number, false), |number| (number, true));
        let hex = |text: &str, digits: usize| (text.len() == digits).then(|| u64::from_str_radix(text, 16).ok()).flatten();
        let generation = Generation(u32::try_from(hex(generation, 8)?).ok()?);
        Some(NamedEntry { id: EntryId { generation, number: hex(number, 12)? }, is_snapshot })
    }
}

/// Appends an edit as a row.
pub(super) fn push_row<E: Serialize>(rows: &mut Vec<u8>, edit: &E) -> Result<(), EditLogError> {
    let length_at = rows.len();
    rows.put_u32(0);
    let failed = |error: postcard::Error| EditLogError::Encode(error.to_string());
    *rows = postcard::to_extend(edit, std::mem::take(rows)).map_err(failed)?;
    let length = u32::try_from(rows.len() - length_at - 4).map_err(|error| EditLogError::Encode(error.to_string()))?;
    rows[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

impl Entry {
    /// An entry without rows.
    pub(super) fn bare(kind: EntryKind, nonce: Nonce, id: EntryId) -> Entry {
        Entry { kind, nonce, id, row_count: 0, rows: Bytes::new() }
    }

    fn format<'f>(&self, format: &'f LogFormat) -> (&'f Format, Codec) {
        if self.kind == EntryKind::Snapshot { (&format.snapshot, Codec::Zstd) } else { (&format.entry, Codec::Lz4) }
    }

    pub(super) fn encode(&self, format: &LogFormat, object: &ObjectName) -> Result<Bytes, EnvelopeError> {
        let (kind, by) = match self.kind {
            EntryKind::Claim => (1, 0),
            EntryKind::Edits => (2, 0),
            EntryKind::Seal { by } => (3, by.0),
            EntryKind::Snapshot => (4, 0),
        };
        let mut content = Vec::with_capacity(HEAD_SIZE + self.rows.len());
        content.put_u8(kind);
        content.put_slice(&self.nonce);
        content.put_u32(self.id.generation.0);
        content.put_u64(self.id.number);
        content.put_u32(by);
        content.put_u32(self.row_count);
        content.put_slice(&self.rows);
        let (format, codec) = self.format(format);
        envelope::encode(format, codec, object.as_str(), &content)
    }

    /// Decodes what stands at `object`, which by its name is `named`.
    pub(super) fn decode(format: &LogFormat, object: &ObjectName, named: NamedEntry, bytes: &Bytes) -> Result<Entry, EditLogError> {
        let envelope = if named.is_snapshot { &format.snapshot } else { &format.entry };
        let mut content = envelope::decode(envelope, object.as_str(), bytes)?.content;
        let damaged = |problem: &str| EditLogError::Damaged { object: object.clone(), problem: problem.to_owned() };
        if content.len() < HEAD_SIZE {
            return Err(damaged("it is shorter than its head"));
        }
        let kind = content.get_u8();
        let mut nonce = [0; 16];
        content.copy_to_slice(&mut nonce);
        let id = EntryId { generation: Generation(content.get_u32()), number: content.get_u64() };
        let by = Generation(content.get_u32());
        let row_count = content.get_u32();
        let kind = match (kind, named.is_snapshot) {
            (1, false) => EntryKind::Claim,
            (2, false) => EntryKind::Edits,
            (3, false) => EntryKind::Seal { by },
            (4, true) => EntryKind::Snapshot,
            (kind, _) => return Err(damaged(&format!("it is of kind {kind}, which its name does not allow"))),
        };
        if id != named.id {
            return Err(damaged(&format!("it says that it is entry {id}")));
        }
        Ok(Entry { kind, nonce, id, row_count, rows: content })
    }

    /// The edits. `kinds` is how many kinds of edits this release knows.
    pub(super) fn edits<E: DeserializeOwned>(&self, kinds: u32, object: &ObjectName) -> Result<Vec<E>, EditLogError> {
        let damaged = |problem: String| EditLogError::Damaged { object: object.clone(), problem };
        let mut rest = &self.rows[..];
        // Rows have at least five bytes: a wrong count cannot make us allocate much.
        let mut edits = Vec::with_capacity((self.row_count as usize).min(rest.len() / 5));
        for row in 0..self.row_count {
            let Some(length) = rest.try_get_u32().ok().filter(|length| *length as usize <= rest.len()) else {
                return Err(damaged(format!("row {row} of {} is cut off", self.row_count)));
            };
            let (bytes, after) = rest.split_at(length as usize);
            let (kind, _) = postcard::take_from_bytes::<u32>(bytes).map_err(|_| damaged(format!("row {row} has no kind")))?;
            if kind >= kinds {
                return Err(EditLogError::NewerEdit { object: object.clone(), kind, known: kinds });
            }
            match postcard::take_from_bytes(bytes) {
                Ok((edit, [])) => edits.push(edit),
                Ok((_, extra)) => return Err(damaged(format!("row {row} has {} bytes too many", extra.len()))),
                Err(error) => return Err(damaged(format!("row {row}, an edit of kind {kind}, cannot be read ({error})"))),
            }
            rest = after;
        }
        if rest.is_empty() { Ok(edits) } else { Err(damaged(format!("{} bytes follow its last row", rest.len()))) }
    }
}
