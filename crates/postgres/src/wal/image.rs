//! Full-page images in WAL records: holes and the three compressions.

use crate::{BLCKSZ, Major, Page};

const HAS_HOLE: u8 = 0x01;

/// How an image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// Postgres's own.
    Pglz,
    /// LZ4 block (15+).
    Lz4,
    /// Zstandard frame (15+).
    Zstd,
}

/// A full-page image as a record carries it.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    /// The bytes, perhaps compressed, the hole left out.
    pub bytes: &'a [u8],
    /// Where the hole begins.
    pub hole_offset: u16,
    /// Bytes in the hole of zeros.
    pub hole_len: u16,
    /// How `bytes` is compressed.
    pub compression: Compression,
    /// Whether redo takes the image for the page. It does not for images that are there to be compared
    /// (`wal_consistency_checking`).
    pub apply: bool,
}

fn compression_of(info: u8, major: Major) -> Result<Compression, String> {
    if major == Major::V14 {
        return Ok(if info & 0x02 != 0 { Compression::Pglz } else { Compression::None });
    }
    match info & 0x1C {
        0 => Ok(Compression::None),
        0x04 => Ok(Compression::Pglz),
        0x08 => Ok(Compression::Lz4),
        0x10 => Ok(Compression::Zstd),
        bits => Err(format!("page image with unknown compression bits {bits:02X}")),
    }
}

impl Image<'_> {
    pub(super) fn needs_hole_len(info: u8, major: Major) -> bool {
        let compressed = if major == Major::V14 { info & 0x02 != 0 } else { info & 0x1C != 0 };
        compressed && info & HAS_HOLE != 0
    }

    pub(super) fn new(info: u8, major: Major, len: usize, hole_offset: u16, hole_len: Option<u16>) -> Result<Self, String> {
        let compression = compression_of(info, major)?;
        let apply = info & if major == Major::V14 { 0x04 } else { 0x02 } != 0;
        if len > BLCKSZ {
            return Err(format!("page image of {len} bytes is larger than a page"));
        }
        let has_hole = info & HAS_HOLE != 0;
        let hole_len = match hole_len {
            Some(hole_len) => hole_len,
            None if has_hole && compression == Compression::None => (BLCKSZ - len) as u16,
            None => 0,
        };
        let hole_end = usize::from(hole_offset) + usize::from(hole_len);
        if has_hole && (hole_offset == 0 || hole_len == 0 || hole_end > BLCKSZ) {
            return Err(format!("page image with a hole of {hole_len} bytes at {hole_offset}"));
        }
        if !has_hole && (hole_offset != 0 || hole_len != 0 || (compression == Compression::None && len != BLCKSZ)) {
            return Err(format!("page image of {len} bytes without a hole that names one at {hole_offset}"));
        }
        Ok(Image { bytes: &[], hole_offset, hole_len, compression, apply })
    }

    /// Makes `page` the whole page (`RestoreBlockImage`).
    ///
    /// # Errors
    /// What is wrong, in words, when the compressed bytes are not those of a page; `page` is then anything.
    pub fn restore(&self, page: &mut Page) -> Result<(), String> {
        let mut decompressed = [0; BLCKSZ];
        let target = &mut decompressed[..BLCKSZ - usize::from(self.hole_len)];
        let stored = target.len();
        let (is_page, plain) = match self.compression {
            Compression::None => (self.bytes.len() == stored, self.bytes),
            Compression::Pglz => (pglz_decompress(self.bytes, target), &*target),
            Compression::Lz4 => (lz4_flex::block::decompress_into(self.bytes, target).is_ok_and(|n| n == stored), &*target),
            Compression::Zstd => (zstd::bulk::decompress_to_buffer(self.bytes, target).is_ok_and(|n| n == stored), &*target),
        };
        if !is_page {
            return Err(format!("page image of {} bytes ({:?}) does not decompress to {stored}", self.bytes.len(), self.compression));
        }
        let (before, behind) = plain.split_at(usize::from(self.hole_offset).min(stored));
        let hole_end = BLCKSZ - behind.len();
        page[..before.len()].copy_from_slice(before);
        page[before.len()..hole_end].fill(0);
        page[hole_end..].copy_from_slice(behind);
        Ok(())
    }
}

/// `pglz_decompress` with `check_complete`: whether `source` decompressed to exactly the whole of `target`.
fn pglz_decompress(source: &[u8], target: &mut [u8]) -> bool {
    let (mut at, mut out) = (0, 0);
    while at < source.len() && out < target.len() {
        let control = source[at];
        at += 1;
        for bit in 0..8 {
            if at >= source.len() || out >= target.len() {
                break;
            }
            if control >> bit & 1 == 0 {
                target[out] = source[at];
                at += 1;
                out += 1;
                continue;
            }
            let Some(&[first, second]) = source.get(at..).and_then(|rest| rest.first_chunk::<2>()) else { return false };
            at += 2;
            let mut len = usize::from(first & 0x0F) + 3;
            let offset = usize::from(first & 0xF0) << 4 | usize::from(second);
            if len == 18 {
                let Some(&more) = source.get(at) else { return false };
                at += 1;
                len += usize::from(more);
            }
            if offset == 0 || offset > out {
                return false;
            }
            let len = len.min(target.len() - out);
            for i in out..out + len {
                target[i] = target[i - offset];
            }
            out += len;
        }
    }
    at == source.len() && out == target.len()
}
