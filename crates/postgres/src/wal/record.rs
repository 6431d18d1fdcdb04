//! One WAL record taken apart: `access/xlogrecord.h`, decoded as `DecodeXLogRecord` does.

use crc_fast::{CrcAlgorithm, Digest};
use smallvec::SmallVec;

use super::{WalError, image::Image};
use crate::{BlockNumber, Fork, Lsn, Major, Oid, RelFork, RelNode};

/// Bytes in a record's header (`SizeOfXLogRecord`).
pub const RECORD_HEADER_SIZE: usize = 24;
/// `XLR_MAX_BLOCK_ID`.
pub(super) const MAX_BLOCK_ID: u8 = 32;
/// `XLR_CHECK_CONSISTENCY`.
const CHECK_CONSISTENCY: u8 = 0x02;
pub(super) const ID_DATA_SHORT: u8 = 255;
const ID_DATA_LONG: u8 = 254;
const ID_ORIGIN: u8 = 253;
const ID_TOPLEVEL_XID: u8 = 252;

pub(super) const BLOCK_FORK_MASK: u8 = 0x0F;
pub(super) const BLOCK_HAS_IMAGE: u8 = 0x10;
pub(super) const BLOCK_HAS_DATA: u8 = 0x20;
pub(super) const BLOCK_WILL_INIT: u8 = 0x40;
pub(super) const BLOCK_SAME_REL: u8 = 0x80;

/// `XLogRecord`: the fixed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of the whole record, header included.
    pub total_len: u32,
    /// Transaction that wrote it, or 0.
    pub xid: u32,
    /// Start of the record before.
    pub prev: Lsn,
    /// Type within the resource manager (high four bits) and flags (low four).
    pub info: u8,
    /// Resource manager, see [`super::rmgr`].
    pub rmid: u8,
    /// CRC-32C of the record.
    pub crc: u32,
}

impl RecordHeader {
    /// Decodes the first 24 bytes of a record; `None` if there are fewer.
    pub fn decode(bytes: &[u8]) -> Option<RecordHeader> {
        let b: &[u8; RECORD_HEADER_SIZE] = bytes.first_chunk()?;
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        Some(RecordHeader {
            total_len: u32_at(0),
            xid: u32_at(4),
            prev: Lsn(u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32),
            info: b[16],
            rmid: b[17],
            crc: u32_at(20),
        })
    }

    /// The record's type within its resource manager: `info` without the flags that belong to the WAL machinery
    /// (`~XLR_INFO_MASK`).
    pub fn kind(&self) -> u8 {
        self.info & 0xF0
    }

    /// Whether the record carries its pages as they must be after it (`wal_consistency_checking`).
    pub fn has_check_images(&self) -> bool {
        self.info & CHECK_CONSISTENCY != 0
    }
}

/// The CRC that a record with these bytes must carry: over what follows the header, then the header without the CRC
/// itself. `record` has at least [`RECORD_HEADER_SIZE`] bytes.
pub fn record_crc(record: &[u8]) -> u32 {
    RecordCrc::new().of(record)
}

/// [`record_crc`] for many records: what it works with is made once.
#[derive(Clone, Debug)]
pub(super) struct RecordCrc {
    digest: Digest,
}

impl RecordCrc {
    pub(super) fn new() -> RecordCrc {
        RecordCrc { digest: Digest::new(CrcAlgorithm::Crc32Iscsi) }
    }

    #[inline]
    pub(super) fn of(&mut self, record: &[u8]) -> u32 {
        let (header, rest) = record.split_at(RECORD_HEADER_SIZE.min(record.len()));
        self.digest.reset();
        self.digest.update(rest);
        self.digest.update(header.get(..20).unwrap_or(header));
        self.digest.finalize() as u32
    }
}

/// A block that a record touches.
#[derive(Clone, Debug)]
pub struct Block<'a> {
    /// The number by which redo functions know it.
    pub id: u8,
    /// The relation fork.
    pub rel: RelFork,
    /// The block.
    pub blkno: BlockNumber,
    /// `BKPBLOCK_WILL_INIT`: redo initialises the page, whatever was there.
    pub will_init: bool,
    /// `BKPBLOCK_HAS_DATA`, which may be set with no data.
    pub has_data: bool,
    /// Full-page image.
    pub image: Option<Image<'a>>,
    /// The block's own data.
    pub data: &'a [u8],
}

/// A decoded record: a view of its bytes.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    /// The fixed header.
    pub header: RecordHeader,
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends, which is the LSN of pages after it.
    pub end: Lsn,
    /// Blocks, ids ascending.
    pub blocks: SmallVec<[Block<'a>; 2]>,
    /// Data that belongs to no block.
    pub main_data: &'a [u8],
    /// Replication origin, if given.
    pub origin: Option<u16>,
    /// Top-level transaction of a subtransaction, if given.
    pub toplevel_xid: Option<u32>,
}

struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) =
            self.rest.split_at_checked(len).ok_or_else(|| format!("{len} bytes are missing of which {} are there", self.rest.len()))?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline(always)]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or("the headers end too early")?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline(always)]
    fn u8(&mut self) -> Result<u8, &'static str> {
        Ok(self.array::<1>()?[0])
    }

    #[inline(always)]
    fn u16(&mut self) -> Result<u16, &'static str> {
        self.array().map(u16::from_le_bytes)
    }

    #[inline(always)]
    fn u32(&mut self) -> Result<u32, &'static str> {
        self.array().map(u32::from_le_bytes)
    }
}

impl<'a> Record<'a> {
    /// Takes the whole record `bytes` apart, which begins at `start` and ends at `end`.
    ///
    /// # Errors
    /// [`WalError::Record`] when headers and lengths contradict each other.
    pub fn decode(bytes: &'a [u8], start: Lsn, end: Lsn, major: Major) -> Result<Record<'a>, WalError> {
        let mut record = Record::empty();
        record.decode_here(bytes, start, end, major).map(|()| record)
    }

    /// Nothing yet: a place for [`Record::decode_here`].
    pub fn empty() -> Record<'a> {
        let header = RecordHeader { total_len: 0, xid: 0, prev: Lsn::INVALID, info: 0, rmid: 0, crc: 0 };
        let (start, end) = (Lsn::INVALID, Lsn::INVALID);
        Record { header, start, end, blocks: SmallVec::new(), main_data: &[], origin: None, toplevel_xid: None }
    }

    /// The same as [`Record::decode`] in the place of another record, of which nothing is left: a record is large, and
    /// so it need not be moved.
    ///
    /// # Errors
    /// As there; what is here is then no record.
    #[inline]
    pub fn decode_here(&mut self, bytes: &'a [u8], start: Lsn, end: Lsn, major: Major) -> Result<(), WalError> {
        let malformed = |what: String| WalError::Record { lsn: start, what };
        self.header = RecordHeader::decode(bytes).ok_or_else(|| malformed("shorter than a record header".to_owned()))?;
        (self.start, self.end) = (start, end);
        self.fill(bytes, major).map_err(malformed)
    }

    /// Fills in what stands behind the header of the record `bytes`.
    fn fill(&mut self, bytes: &'a [u8], major: Major) -> Result<(), String> {
        let Record { header, blocks, main_data, origin, toplevel_xid, .. } = self;
        blocks.clear();
        (*origin, *toplevel_xid) = (None, None);
        if header.total_len as usize != bytes.len() {
            return Err(format!("has {} bytes and says that it has {}", bytes.len(), header.total_len));
        }
        let mut cursor = Cursor { rest: &bytes[RECORD_HEADER_SIZE..] };
        let mut main_len = 0usize;
        let mut payload = 0usize;
        let mut last_rel: Option<RelNode> = None;
        while cursor.rest.len() > payload {
            let id = cursor.u8()?;
            match id {
                ID_DATA_SHORT | ID_DATA_LONG => {
                    main_len = if id == ID_DATA_SHORT { usize::from(cursor.u8()?) } else { cursor.u32()? as usize };
                    payload = payload.saturating_add(main_len);
                    break; // by convention, the main data fragment is always last
                }
                ID_ORIGIN => *origin = Some(cursor.u16()?),
                ID_TOPLEVEL_XID => *toplevel_xid = Some(cursor.u32()?),
                0..=MAX_BLOCK_ID => {
                    if blocks.last().is_some_and(|last| last.id >= id) {
                        return Err(format!("block id {id} is out of order"));
                    }
                    let flags = cursor.u8()?;
                    let data_len = usize::from(cursor.u16()?);
                    let has_data = flags & BLOCK_HAS_DATA != 0;
                    if has_data == (data_len == 0) {
                        return Err(format!("block {id}: data flag {has_data} and {data_len} bytes of data contradict each other"));
                    }
                    let mut image_len = 0;
                    let mut image = None;
                    if flags & BLOCK_HAS_IMAGE != 0 {
                        image_len = usize::from(cursor.u16()?);
                        let hole_offset = cursor.u16()?;
                        let info = cursor.u8()?;
                        let hole_len = if Image::needs_hole_len(info, major) { Some(cursor.u16()?) } else { None };
                        image =
                            Some(Image::new(info, major, image_len, hole_offset, hole_len).map_err(|what| format!("block {id}: {what}"))?);
                    }
                    let node = if flags & BLOCK_SAME_REL != 0 {
                        last_rel.ok_or_else(|| format!("block {id} refers to the relation of a block before it, and there is none"))?
                    } else {
                        let (spc, db, rel): (Oid, Oid, Oid) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
                        RelNode { spc, db, rel }
                    };
                    last_rel = Some(node);
                    let fork = Fork::from_number(flags & BLOCK_FORK_MASK)
                        .ok_or_else(|| format!("block {id}: fork number {} does not exist", flags & BLOCK_FORK_MASK))?;
                    let blkno = cursor.u32()?;
                    payload += image_len + data_len;
                    // Images and data follow the headers: their places are known when these have ended, their lengths
                    // stand in for them.
                    let of_length = |len| bytes.get(..len).ok_or("the record is shorter than a block's image or data");
                    if let Some(image) = &mut image {
                        image.bytes = of_length(image_len)?;
                    }
                    let (rel, will_init, data) = (node.fork(fork), flags & BLOCK_WILL_INIT != 0, of_length(data_len)?);
                    blocks.push(Block { id, rel, blkno, will_init, has_data, image, data });
                }
                _ => return Err(format!("block id {id} is invalid")),
            }
        }
        if cursor.rest.len() != payload {
            return Err(format!("the headers announce {payload} bytes and {} follow", cursor.rest.len()));
        }
        for block in blocks {
            if let Some(image) = &mut block.image {
                image.bytes = cursor.take(image.bytes.len())?;
            }
            block.data = cursor.take(block.data.len())?;
        }
        *main_data = cursor.take(main_len)?;
        Ok(())
    }

    /// See [`RecordHeader::kind`].
    pub fn kind(&self) -> u8 {
        self.header.kind()
    }

    /// The block with id `id`, if the record has it.
    pub fn block(&self, id: u8) -> Option<&Block<'a>> {
        self.blocks.iter().find(|block| block.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record with these bytes behind its header.
    fn record(rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; RECORD_HEADER_SIZE];
        bytes.extend_from_slice(rest);
        let total_len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&total_len.to_le_bytes());
        bytes
    }

    #[test]
    fn nothing_is_left_of_the_record_before() {
        let mut full = vec![ID_ORIGIN, 7, 0, ID_TOPLEVEL_XID, 9, 0, 0, 0];
        full.extend_from_slice(&[0, BLOCK_HAS_DATA, 2, 0]);
        [1663u32, 5, 16384, 3].iter().for_each(|field| full.extend_from_slice(&field.to_le_bytes()));
        full.extend_from_slice(&[ID_DATA_SHORT, 1, b'd', b'd', b'm']);
        let (full, empty) = (record(&full), record(&[]));
        let decode = |bytes| Record::decode(bytes, Lsn(8), Lsn(16), Major::V15).expect("a whole record");
        let first = decode(&full);
        assert_eq!((first.origin, first.toplevel_xid, first.blocks.len(), first.main_data), (Some(7), Some(9), 1, &b"m"[..]));
        let mut place = first.clone();
        for bytes in [&empty, &full] {
            place.decode_here(bytes, Lsn(8), Lsn(16), Major::V15).expect("a whole record");
            assert_eq!(format!("{place:?}"), format!("{:?}", decode(bytes)), "it must be as if decoded by itself");
        }
    }
}
