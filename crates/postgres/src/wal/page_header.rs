//! `XLogPageHeaderData` and `XLogLongPageHeaderData` of `access/xlog_internal.h`.

use super::{SegmentSize, WalError};
use crate::lsn::WAL_PAGE_SIZE;
use crate::{Lsn, Major};

/// Bytes in the header of an ordinary WAL page (`SizeOfXLogShortPHD`).
pub const SHORT_HEADER_SIZE: usize = 24;
/// Bytes in the header of a segment's first page (`SizeOfXLogLongPHD`).
pub const LONG_HEADER_SIZE: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
const ALL_FLAGS: u16 = 0x000F;

/// The header of a WAL page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// The major whose magic the page has.
    pub major: Major,
    /// Postgres timeline of the page's first record.
    pub tli: u32,
    /// Where the page begins.
    pub lsn: Lsn,
    /// Bytes of the record that began on an earlier page, zero if the page begins with a record.
    pub remaining_len: u32,
    /// Whether the record that began on an earlier page was given up, and this page begins anew
    /// (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub overwrites_contrecord: bool,
    /// The cluster's identifier; on the first page of a segment.
    pub system_identifier: Option<u64>,
}

impl PageHeader {
    /// Bytes of the header of the page that begins at `lsn`: only a segment's first page has a long one.
    pub fn size_at(lsn: Lsn) -> usize {
        Self::size_in(SegmentSize::VARVE, lsn)
    }

    /// The same in WAL of any segment size.
    pub fn size_in(segments: SegmentSize, lsn: Lsn) -> usize {
        if segments.offset(lsn) == 0 { LONG_HEADER_SIZE } else { SHORT_HEADER_SIZE }
    }

    /// The segment size that the first page of a segment states.
    ///
    /// # Errors
    /// [`WalError::Page`] when the bytes are no such page's, or state a size that no Postgres has.
    pub fn segment_size(bytes: &[u8; LONG_HEADER_SIZE]) -> Result<SegmentSize, WalError> {
        let lsn = Lsn(u64::from_le_bytes(std::array::from_fn(|at| bytes[8 + at])));
        let wrong = |what: String| Err(WalError::Page { lsn, what });
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (magic, flags) = (u16_at(0), u16_at(2));
        if Major::from_wal_page_magic(magic).is_none() {
            return wrong(unknown_magic(magic));
        }
        if flags & LONG_HEADER == 0 {
            return wrong(format!("flags {flags:04X}: the first page of a segment has a long header"));
        }
        match SegmentSize::new(u64::from(u32_at(32))) {
            Some(size) if u64::from(u32_at(36)) == WAL_PAGE_SIZE => Ok(size),
            _ => wrong(format!(
                "segments of {} bytes and pages of {} bytes are not supported: segments are 1 MiB to 1 GiB, pages 8192 bytes",
                u32_at(32),
                u32_at(36)
            )),
        }
    }

    /// Decodes the header of the page that begins at `lsn`, in WAL of segments of 16 MiB.
    ///
    /// # Errors
    /// [`WalError::Page`] when the bytes are not a header that belongs at this position.
    pub fn decode(bytes: &[u8], lsn: Lsn) -> Result<PageHeader, WalError> {
        Self::decode_in(SegmentSize::VARVE, bytes, lsn)
    }

    /// The same in WAL of any segment size.
    ///
    /// # Errors
    /// [`WalError::Page`] when the bytes are not a header that belongs at this position.
    pub fn decode_in(segments: SegmentSize, bytes: &[u8], lsn: Lsn) -> Result<PageHeader, WalError> {
        let wrong = |what: String| WalError::Page { lsn, what };
        let size = Self::size_in(segments, lsn);
        if bytes.len() < size {
            return Err(wrong(format!("{} bytes are no header of {size} bytes", bytes.len())));
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let magic = u16_at(0);
        let major = Major::from_wal_page_magic(magic).ok_or_else(|| wrong(unknown_magic(magic)))?;
        let flags = u16_at(2);
        if flags & !ALL_FLAGS != 0 {
            return Err(wrong(format!("unknown flags {flags:04X}")));
        }
        let long = flags & LONG_HEADER != 0;
        if long != (segments.offset(lsn) == 0) {
            let size = segments.bytes() >> 20;
            return Err(wrong(format!("flags {flags:04X}: only the first page of a {size} MiB segment has a long header")));
        }
        let mut system_identifier = None;
        if long {
            system_identifier = Some(u64_at(24));
            // Before the position: with segments of another size, a file's name stands for another one.
            if u64::from(u32_at(32)) != segments.bytes() || u64::from(u32_at(36)) != WAL_PAGE_SIZE {
                return Err(wrong(format!(
                    "segments of {} bytes and pages of {} bytes, expected {} and {WAL_PAGE_SIZE}",
                    u32_at(32),
                    u32_at(36),
                    segments.bytes()
                )));
            }
        }
        let found = Lsn(u64_at(8));
        if found != lsn {
            return Err(wrong(format!("the page says that it is the one at {found}")));
        }
        let remaining_len = u32_at(16);
        if (flags & FIRST_IS_CONTRECORD != 0) != (remaining_len != 0) {
            return Err(wrong(format!("flags {flags:04X} and a continuation of {remaining_len} bytes contradict each other")));
        }
        Ok(PageHeader {
            major,
            tli: u32_at(4),
            lsn,
            remaining_len,
            overwrites_contrecord: flags & FIRST_IS_OVERWRITE_CONTRECORD != 0,
            system_identifier,
        })
    }

    /// The header's bytes, long if and only if [`PageHeader::lsn`] is the start of a segment.
    pub fn encode(&self) -> Vec<u8> {
        let long = self.lsn.segment_offset() == 0;
        let mut flags = 0;
        if self.remaining_len != 0 {
            flags |= FIRST_IS_CONTRECORD;
        }
        if long {
            flags |= LONG_HEADER;
        }
        if self.overwrites_contrecord {
            flags |= FIRST_IS_OVERWRITE_CONTRECORD;
        }
        let mut out = Vec::with_capacity(LONG_HEADER_SIZE);
        out.extend_from_slice(&self.major.wal_page_magic().to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.tli.to_le_bytes());
        out.extend_from_slice(&self.lsn.0.to_le_bytes());
        out.extend_from_slice(&self.remaining_len.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        if long {
            out.extend_from_slice(&self.system_identifier.unwrap_or(0).to_le_bytes());
            out.extend_from_slice(&(SegmentSize::VARVE.bytes() as u32).to_le_bytes());
            out.extend_from_slice(&(WAL_PAGE_SIZE as u32).to_le_bytes());
        }
        out
    }
}

fn unknown_magic(magic: u16) -> String {
    format!("magic {magic:04X} is not that of PostgreSQL 14 to 18")
}
