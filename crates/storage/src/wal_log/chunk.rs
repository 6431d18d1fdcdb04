//! A chunk: a run of one timeline's WAL bytes in the log.
//!
//! Layout, little-endian, [`HEADER_SIZE`] bytes, then the payload, then zeros up to a multiple of 8:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | magic `VWLC` |
//! | 4 | 1 | format version, 1 |
//! | 5 | 1 | codec, 0: as it is |
//! | 6 | 2 | zero |
//! | 8 | 4 | key id, 0: not encrypted |
//! | 12 | 4 | payload bytes |
//! | 16 | 8 | the chunk's own position in the log, so that what a recycled file still holds is never taken for new |
//! | 24 | 8 | position up to which the log was known to be fsynced when the chunk was written |
//! | 32 | 16 | tenant |
//! | 48 | 16 | timeline |
//! | 64 | 8 | LSN of the first payload byte |
//! | 72 | 8 | origin: the chunk's own position, or that of the chunk which it is a copy of |
//! | 80 | 4 | writer epoch |
//! | 84 | 4 | CRC-32C of the 84 bytes before and the payload |
//!
//! A chunk without payload says that its timeline was deleted: what older chunks have of it counts for nothing.
//!
//! What a timeline that lags behind still needs of an old segment is copied to the log's head. A copy counts in the
//! place of its origin: bytes that were appended later than the origin, but earlier than the copy, replace those of the
//! copy.

use crc_fast::{CrcAlgorithm, Digest};
use varve_postgres::Lsn;

use crate::ids::{TenantId, TimelineId, WriterEpoch};

/// Bytes in a chunk's header.
pub(super) const HEADER_SIZE: usize = 88;
/// Most payload bytes in a chunk: what a scan must be able to hold.
pub(super) const PAYLOAD_SIZE_MAX: usize = 1024 * 1024;

const MAGIC: [u8; 4] = *b"VWLC";
const VERSION: u8 = 1;
const CRC_AT: usize = 84;

/// A chunk's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkHeader {
    pub(super) position: u64,
    pub(super) synced: u64,
    pub(super) tenant: TenantId,
    pub(super) timeline: TimelineId,
    pub(super) epoch: WriterEpoch,
    pub(super) start: Lsn,
    pub(super) origin: u64,
    pub(super) payload_len: u32,
}

/// What stands at a place where a chunk might begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A whole chunk.
    Chunk(ChunkHeader),
    /// Nothing that is a chunk of this place.
    Nothing,
    /// A whole chunk of a format that this build does not know.
    Unsupported(String),
}

/// Bytes that a chunk with this payload takes up in the log.
pub(super) fn chunk_size(payload_len: usize) -> usize {
    (HEADER_SIZE + payload_len).next_multiple_of(8)
}

/// CRC-32C of a header up to its own place, and a payload.
pub(super) fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(header);
    digest.update(payload);
    digest.finalize() as u32
}

impl ChunkHeader {
    /// The whole chunk's bytes, padding included.
    pub(super) fn encode(&self, payload: &[u8], out: &mut Vec<u8>) {
        let begin = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, 0, 0, 0]);
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&self.payload_len.to_le_bytes());
        out.extend_from_slice(&self.position.to_le_bytes());
        out.extend_from_slice(&self.synced.to_le_bytes());
        out.extend_from_slice(&self.tenant.0);
        out.extend_from_slice(&self.timeline.0);
        out.extend_from_slice(&self.start.0.to_le_bytes());
        out.extend_from_slice(&self.origin.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        let crc = checksum(&out[begin..], payload);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(payload);
        out.resize(begin + chunk_size(payload.len()), 0);
    }

    /// Looks at `bytes`, which begin at log position `position`.
    pub(super) fn find(bytes: &[u8], position: u64) -> Found {
        let Some(header) = bytes.get(..HEADER_SIZE) else { return Found::Nothing };
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let id_at = |at: usize| {
            let mut id = [0; 16];
            id.copy_from_slice(&header[at..at + 16]);
            id
        };
        if header[..4] != MAGIC || u64_at(16) != position {
            return Found::Nothing;
        }
        let payload_len = u32_at(12) as usize;
        let Some(payload) = bytes.get(HEADER_SIZE..HEADER_SIZE.saturating_add(payload_len)) else { return Found::Nothing };
        if checksum(&header[..CRC_AT], payload) != u32_at(CRC_AT) {
            return Found::Nothing;
        }
        if header[4] != VERSION || header[5] != 0 || u32_at(8) != 0 {
            return Found::Unsupported(format!("format version {}, codec {}, key id {}", header[4], header[5], u32_at(8)));
        }
        Found::Chunk(ChunkHeader {
            position,
            synced: u64_at(24),
            tenant: TenantId(id_at(32)),
            timeline: TimelineId(id_at(48)),
            start: Lsn(u64_at(64)),
            origin: u64_at(72),
            epoch: WriterEpoch(u32_at(80)),
            payload_len: payload_len as u32,
        })
    }
}
