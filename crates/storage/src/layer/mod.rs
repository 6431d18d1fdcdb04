//! Layers: immutable, sorted runs of versions, for a range of keys and a range of LSNs.
//!
//! One format for fresh and compacted ones. An object is, in this order:
//!
//! 1. **data blocks** ([`block`]): versions sorted by key, then LSN, newest first; versions at one LSN stand latest
//!    first. About 16 KiB of content each, more if a single value is larger;
//! 2. **partitions** ([`index`]): for up to 512 data blocks a filter of the keys and where each block is;
//! 3. the **top**: what the layer is, and where the partitions are;
//! 4. a footer of [`FOOTER_SIZE`] bytes, big-endian: `VARVELYR`, version `u16`, zero `u16`, the top's offset `u64`, its
//!    length `u32`, its checksum `u32`, and the CRC-32C `u32` of all that.
//!
//! Blocks, partitions and top are each in an envelope ([`crate::envelope`]), with magic `VLDB`, `VLPT` and `VLTP`.
//! Whatever points to one of them gives its checksum, too. So each byte that is read is covered by a checksum, and
//! sound bytes in the wrong place, or of another layer, are noticed: a [`LayerError`] names the object, the offset and
//! the key; nothing unsound is served.
//!
//! Absence of a key in a layer proves nothing; the layers below have it or not. What one layer holds is *everything* in
//! its LSN range for the keys from its first to its last.

pub mod blob;
pub mod block;
mod filter;
pub mod index;
pub mod range_cache;
mod reader;
mod writer;

use bytes::{BufMut, Bytes};
use varve_postgres::Lsn;

use crate::envelope::{self, Codec, EnvelopeError, Format};
use crate::ids::LayerId;
use crate::key::Key;

pub use reader::{Layer, LayerIter};
pub use writer::LayerWriter;

/// Version of the format.
pub const LAYER_VERSION: u16 = 1;
/// Bytes at an object's end that say where its top is.
pub const FOOTER_SIZE: usize = 32;
const FOOTER_MAGIC: [u8; 8] = *b"VARVELYR";
/// Longest content of a block, partition or top. The longest value is a little shorter.
const CONTENT_BYTES_MAX: u64 = 1 << 30;

const DATA_BLOCK: Format =
    Format { magic: *b"VLDB", version: LAYER_VERSION, what: "a data block of a layer", content_bytes_max: CONTENT_BYTES_MAX };
const PARTITION: Format =
    Format { magic: *b"VLPT", version: LAYER_VERSION, what: "an index partition of a layer", content_bytes_max: CONTENT_BYTES_MAX };
const TOP: Format = Format { magic: *b"VLTP", version: LAYER_VERSION, what: "the top of a layer", content_bytes_max: CONTENT_BYTES_MAX };

/// What is known of a layer without reading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerInfo {
    /// Identity within the tenant.
    pub id: LayerId,
    /// Key of its first version.
    pub first_key: Key,
    /// Key of its last version.
    pub last_key: Key,
    /// Its versions are above this.
    pub lsn_start: Lsn,
    /// Its versions are at or below this.
    pub lsn_end: Lsn,
    /// Number of its versions.
    pub versions: u64,
    /// Bytes of the object.
    pub length: u64,
    /// How its blocks are compressed, where that makes them smaller.
    pub codec: Codec,
    /// CRC-32C of the object.
    pub checksum: u32,
}

impl LayerInfo {
    /// Whether it holds relation blocks; else it holds everything but.
    pub fn is_blocks(&self) -> bool {
        self.first_key.is_block()
    }

    /// Whether `key` lies between its first and last.
    pub fn spans(&self, key: &Key) -> bool {
        self.first_key <= *key && *key <= self.last_key
    }
}

/// A layer that could not be read, or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// The bytes could not be had.
    #[error("layer {object} cannot be read at offset {offset}{}: {problem}", for_key(key))]
    Read {
        /// The object.
        object: String,
        /// Where in it.
        offset: u64,
        /// What was looked for.
        key: Option<Key>,
        /// Why.
        problem: String,
    },
    /// The bytes are not what was written.
    #[error(
        "layer {object} is corrupt at offset {offset}{}: {problem}; nothing of it is served: restore the object from a copy",
        for_key(key)
    )]
    Corrupt {
        /// The object.
        object: String,
        /// Where in it.
        offset: u64,
        /// What was looked for.
        key: Option<Key>,
        /// What is wrong.
        problem: String,
    },
    /// It could not be written.
    #[error("layer {object} cannot be written: {problem}")]
    Write {
        /// The object.
        object: String,
        /// Why.
        problem: String,
    },
}

fn for_key(key: &Option<Key>) -> String {
    key.map(|key| format!(", where {key} was looked for")).unwrap_or_default()
}

/// The end of a layer's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Footer {
    top_offset: u64,
    top_length: u32,
    top_checksum: u32,
}

impl Footer {
    fn encode(&self) -> [u8; FOOTER_SIZE] {
        let mut out = Vec::with_capacity(FOOTER_SIZE);
        out.put_slice(&FOOTER_MAGIC);
        out.put_u16(LAYER_VERSION);
        out.put_u16(0);
        out.put_u64(self.top_offset);
        out.put_u32(self.top_length);
        out.put_u32(self.top_checksum);
        out.put_u32(crc_fast::crc32_iscsi(&out));
        let mut bytes = [0; FOOTER_SIZE];
        bytes.copy_from_slice(&out);
        bytes
    }

    fn decode(bytes: &[u8; FOOTER_SIZE]) -> Result<Footer, String> {
        let u32_at = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..8] != FOOTER_MAGIC {
            return Err("it does not end as a layer does".to_owned());
        }
        let crc = crc_fast::crc32_iscsi(&bytes[..FOOTER_SIZE - 4]);
        if crc != u32_at(28) {
            return Err(format!("its footer's CRC-32C is {crc:08x}, it says {:08x}", u32_at(28)));
        }
        let version = u16::from_be_bytes([bytes[8], bytes[9]]);
        if version > LAYER_VERSION {
            return Err(format!(
                "it has format version {version}, this release reads layers up to {LAYER_VERSION}: upgrade Varve to read it"
            ));
        }
        let top_offset = u64::from(u32_at(12)) << 32 | u64::from(u32_at(16));
        Ok(Footer { top_offset, top_length: u32_at(20), top_checksum: u32_at(24) })
    }
}

/// The last four bytes of an envelope: its checksum.
fn envelope_checksum(bytes: &[u8]) -> u32 {
    bytes.last_chunk().map_or(0, |chunk| u32::from_be_bytes(*chunk))
}

/// Takes content out of its envelope, whose checksum must be `checksum`.
fn open_envelope(format: &Format, object: &str, checksum: u32, bytes: &Bytes) -> Result<Bytes, String> {
    if envelope_checksum(bytes) != checksum {
        let found = envelope_checksum(bytes);
        return Err(format!("{} with checksum {checksum:08x} should be there; what is there has {found:08x}", format.what));
    }
    envelope::decode(format, object, bytes).map(|opened| opened.content).map_err(|error| problem_of(&error))
}

/// The error without the object's name, which whoever reports it adds.
fn problem_of(error: &EnvelopeError) -> String {
    match error {
        EnvelopeError::Damaged { problem, .. } => problem.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
