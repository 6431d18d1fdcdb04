//! The header of a heap tuple (`access/htup_details.h`).
//!
//! Layout, little-endian: xmin `u32`, xmax `u32`, command ids or xvac `u32`, ctid (block high `u16`, block low `u16`,
//! offset `u16`), infomask2 `u16`, infomask `u16`, length of header with null bitmap `u8`; the bitmap and the values
//! follow at 23.

use varve_postgres::BlockNumber;

use crate::Fault;
use crate::item::OffsetNumber;

/// Bytes in the fixed header (`SizeofHeapTupleHeader`).
pub(crate) const HEADER_SIZE: usize = 23;
/// `MaxHeapTupleSize`: no tuple on a page is longer.
pub(crate) const TUPLE_SIZE_MAX: usize = 8192 - 32;

/// `HEAP_XMAX_KEYSHR_LOCK`.
pub(crate) const XMAX_KEYSHR_LOCK: u16 = 0x0010;
/// `HEAP_COMBOCID`.
pub(crate) const COMBOCID: u16 = 0x0020;
/// `HEAP_XMAX_EXCL_LOCK`.
pub(crate) const XMAX_EXCL_LOCK: u16 = 0x0040;
/// `HEAP_XMAX_LOCK_ONLY`.
pub(crate) const XMAX_LOCK_ONLY: u16 = 0x0080;
/// `HEAP_XMIN_COMMITTED | HEAP_XMIN_INVALID`: both together mean frozen.
pub(crate) const XMIN_FROZEN: u16 = 0x0300;
/// `HEAP_XMAX_COMMITTED`.
pub(crate) const XMAX_COMMITTED: u16 = 0x0400;
/// `HEAP_XMAX_INVALID`.
pub(crate) const XMAX_INVALID: u16 = 0x0800;
/// `HEAP_XMAX_IS_MULTI`.
pub(crate) const XMAX_IS_MULTI: u16 = 0x1000;
/// `HEAP_MOVED`: moved by the `VACUUM FULL` of before 9.0.
pub(crate) const MOVED: u16 = 0xC000;
/// `HEAP_XACT_MASK`: all bits that tell of transactions.
pub(crate) const XACT_MASK: u16 = 0xFFF0;
/// `HEAP_XMAX_BITS`.
pub(crate) const XMAX_BITS: u16 = XMAX_COMMITTED | XMAX_INVALID | XMAX_IS_MULTI | XMAX_KEYSHR_LOCK | XMAX_EXCL_LOCK | XMAX_LOCK_ONLY;

/// `HEAP_KEYS_UPDATED`, of infomask2.
pub(crate) const KEYS_UPDATED: u16 = 0x2000;
/// `HEAP_HOT_UPDATED`, of infomask2.
pub(crate) const HOT_UPDATED: u16 = 0x4000;

/// `SpecTokenOffsetNumber`: ctid holds a speculative insertion's token.
pub(crate) const SPECULATIVE_TOKEN: OffsetNumber = 0xFFFE;
/// `MovedPartitionsOffsetNumber`, with [`MOVED_PARTITIONS_BLOCK`]: the row moved to another partition.
pub(crate) const MOVED_PARTITIONS_OFFSET: OffsetNumber = 0xFFFD;
/// `MovedPartitionsBlockNumber`.
pub(crate) const MOVED_PARTITIONS_BLOCK: BlockNumber = BlockNumber::MAX;

/// A tuple's fixed header.
pub(crate) type Header = [u8; HEADER_SIZE];

/// The header of `tuple`.
#[inline]
pub(crate) fn header_mut(tuple: &mut [u8]) -> Result<&mut Header, Fault> {
    let len = tuple.len();
    tuple.first_chunk_mut().ok_or_else(|| no_header(len))
}

#[cold]
#[inline(never)]
fn no_header(len: usize) -> Fault {
    format!("a tuple of {len} bytes has no header").into()
}

fn u16_at(header: &Header, at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

fn put_u16(header: &mut Header, at: usize, value: u16) {
    header[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put_u32(header: &mut Header, at: usize, value: u32) {
    header[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// `HeapTupleHeaderSetXmin`.
pub(crate) fn set_xmin(header: &mut Header, xid: u32) {
    put_u32(header, 0, xid);
}

/// `HeapTupleHeaderSetXmax`.
pub(crate) fn set_xmax(header: &mut Header, xid: u32) {
    put_u32(header, 4, xid);
}

/// Sets the command id, or xvac, which shares its place.
pub(crate) fn set_command(header: &mut Header, value: u32) {
    put_u32(header, 8, value);
}

/// Sets ctid.
pub(crate) fn set_ctid(header: &mut Header, blkno: BlockNumber, offset: OffsetNumber) {
    put_u16(header, 12, (blkno >> 16) as u16);
    put_u16(header, 14, blkno as u16);
    put_u16(header, 16, offset);
}

/// The line pointer that ctid names.
pub(crate) fn ctid_offset(header: &Header) -> OffsetNumber {
    u16_at(header, 16)
}

/// `t_infomask2`.
pub(crate) fn infomask2(header: &Header) -> u16 {
    u16_at(header, 18)
}

/// Sets `t_infomask2`.
pub(crate) fn set_infomask2(header: &mut Header, value: u16) {
    put_u16(header, 18, value);
}

/// `t_infomask`.
pub(crate) fn infomask(header: &Header) -> u16 {
    u16_at(header, 20)
}

/// Sets `t_infomask`.
pub(crate) fn set_infomask(header: &mut Header, value: u16) {
    put_u16(header, 20, value);
}

/// `t_hoff`: where the values begin.
pub(crate) fn hoff(header: &Header) -> u8 {
    header[22]
}

/// Sets `t_hoff`.
pub(crate) fn set_hoff(header: &mut Header, value: u8) {
    header[22] = value;
}
