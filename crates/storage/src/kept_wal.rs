//! WAL that stays in the store: that of which redo can be checked, and that of which replication slots may want more.
//!
//! Layers have what WAL did to pages, not WAL. Records written with `wal_consistency_checking` carry each page as it
//! must be after them, and that is worth nothing once it is in a layer. Whoever reads WAL through a slot wants what
//! lies before a compute's start, too. So such WAL is kept as it came, in pieces of at most [`PIECE_BYTES_MAX`] bytes,
//! each an object: `tenants/<tenant>/timelines/<timeline>/wal/<generation>-<start>-<end>`, LSNs as 16 hexadecimal
//! digits, the bytes in an envelope `VWAL`.
//!
//! A piece is uploaded before the manifest's edit that makes it count, which is the edit that lets the WAL log forget
//! those bytes. Pieces of one flush join on to each other, and are cut wherever that is: within a record, or a page.
//! Where a flush begins or ends, a record does. Which flushes are kept is for the timeline's owner to say; a flush is
//! kept whole, so there may be some records without pages before and behind those with.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use varve_postgres::Lsn;

use crate::envelope::{self, Codec, EnvelopeError, Format};
use crate::history::HistoryError;
use crate::ids::{Generation, TenantId, TimelineId};
use crate::manifest::timeline_folder;
use crate::store::{BlockingStore, ObjectName, ParseObjectNameError, StoreError};
use crate::wal_log::WalLogError;

/// Bytes of WAL in an object at most; an upload or a read has as many in memory.
pub const PIECE_BYTES_MAX: usize = 16 << 20;

const FORMAT: Format = Format { magic: *b"VWAL", version: 1, what: "a piece of WAL", content_bytes_max: PIECE_BYTES_MAX as u64 };

/// A piece of kept WAL, as its timeline's manifest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptWal {
    /// The object that holds it.
    pub object: ObjectName,
    /// Bytes of the object.
    pub length: u64,
    /// Its first byte.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn_start: Lsn,
    /// The byte behind its last.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn_end: Lsn,
    /// Generation that wrote it.
    pub generation: Generation,
    /// CRC-32C of the object.
    pub checksum: u32,
}

/// WAL that could not be kept, or not be read again.
#[derive(Debug, thiserror::Error)]
pub enum KeptWalError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The WAL log, from which it is taken.
    #[error(transparent)]
    WalLog(#[from] WalLogError),
    /// What is in the object.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The object is not the one that the manifest means.
    #[error("{object} is not the piece of WAL that its timeline's manifest names: {problem}; restore it from a copy")]
    Other {
        /// The object.
        object: ObjectName,
        /// What differs.
        problem: String,
    },
    /// The WAL log ended too early.
    #[error("the WAL log of timeline {timeline} holds no bytes at {lsn}, and its records end at {end}")]
    Short {
        /// The timeline.
        timeline: TimelineId,
        /// Where bytes are missing.
        lsn: Lsn,
        /// The end of what was to be kept.
        end: Lsn,
    },
    /// Whether it is to be kept cannot be found out.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// No name could be made.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
}

/// Whose WAL is kept, and by whom.
#[derive(Clone, Copy, Debug)]
pub struct Keeper<'a> {
    /// The tenant.
    pub tenant: TenantId,
    /// The timeline.
    pub timeline: TimelineId,
    /// Generation of the pageserver's ownership.
    pub generation: Generation,
    /// Where it is put.
    pub store: &'a BlockingStore,
}

impl Keeper<'_> {
    /// Uploads the bytes of `start..end`, which `read` gives from a position on, up to a number of them. To be repeated
    /// after an error: the objects are the same then. Blocks.
    ///
    /// # Errors
    /// When they cannot be read or uploaded.
    pub fn keep(
        &self,
        (start, end): (Lsn, Lsn),
        read: &mut dyn FnMut(Lsn, usize) -> Result<Bytes, WalLogError>,
    ) -> Result<Vec<KeptWal>, KeptWalError> {
        let (mut pieces, mut at) = (Vec::new(), start);
        while at < end {
            let left = usize::try_from(end.distance_from(at)).unwrap_or(usize::MAX);
            let bytes = read(at, left.min(PIECE_BYTES_MAX))?;
            if bytes.is_empty() {
                return Err(KeptWalError::Short { timeline: self.timeline, lsn: at, end });
            }
            let piece_end = at + bytes.len() as u64;
            pieces.push(self.upload((at, piece_end), &bytes)?);
            at = piece_end;
        }
        Ok(pieces)
    }

    fn upload(&self, (lsn_start, lsn_end): (Lsn, Lsn), bytes: &[u8]) -> Result<KeptWal, KeptWalError> {
        let name = format!("wal/{:08x}-{:016x}-{:016x}", self.generation.0, lsn_start.0, lsn_end.0);
        let object = timeline_folder(self.tenant, self.timeline)?.join(&name)?;
        let encoded = envelope::encode(&FORMAT, Codec::Zstd, object.as_str(), bytes)?;
        let (length, checksum) = (encoded.len() as u64, crc_fast::crc32_iscsi(&encoded));
        self.store.put(&object, encoded)?;
        Ok(KeptWal { object, length, lsn_start, lsn_end, generation: self.generation, checksum })
    }
}

impl KeptWal {
    /// Its bytes from `from` on, which lies within it. Blocks.
    ///
    /// # Errors
    /// When the object cannot be read, or is damaged.
    pub fn read(&self, store: &BlockingStore, from: Lsn) -> Result<Bytes, KeptWalError> {
        let encoded = store.get(&self.object)?;
        let other = |problem: String| KeptWalError::Other { object: self.object.clone(), problem };
        let found = (encoded.len() as u64, crc_fast::crc32_iscsi(&encoded));
        if found != (self.length, self.checksum) {
            let (length, checksum) = found;
            return Err(other(format!("{length} bytes with CRC-32C {checksum:08x}, expected {} with {:08x}", self.length, self.checksum)));
        }
        let content = envelope::decode(&FORMAT, self.object.as_str(), &encoded)?.content;
        let expected = self.lsn_end.distance_from(self.lsn_start);
        if content.len() as u64 != expected {
            return Err(other(format!("{} bytes of WAL, expected {expected}", content.len())));
        }
        let skip = from.distance_from(self.lsn_start).min(expected);
        Ok(content.slice(skip as usize..))
    }
}
