//! Item pointers and the header of index tuples, which all access methods share (`storage/itemptr.h`, `access/itup.h`).
//!
//! Layout of an index tuple: item pointer, 6 bytes (block number as two `u16`, high one first, then offset number);
//! `t_info` `u16`, whose low 13 bits are the tuple's size in bytes, bit 13 the access method's; then the access
//! method's data.

use varve_postgres::BlockNumber;

use crate::Fault;
use crate::cursor::Cursor;
use crate::item::{OffsetNumber, max_align};

/// Bytes in an item pointer.
pub(crate) const ITEM_POINTER_SIZE: usize = 6;
/// Bytes in an index tuple's header (`IndexTupleData`).
pub(crate) const INDEX_TUPLE_HEADER_SIZE: usize = 8;
/// `INDEX_SIZE_MASK` of `t_info`.
const SIZE_MASK: u16 = 0x1FFF;
/// `INDEX_AM_RESERVED_BIT` of `t_info`.
pub(crate) const AM_RESERVED_BIT: u16 = 0x2000;
/// Where `t_info` stands.
const INFO_AT: usize = ITEM_POINTER_SIZE;

/// `InvalidBlockNumber`.
pub(crate) const INVALID_BLOCK: BlockNumber = u32::MAX;

/// Where a tuple is (`ItemPointerData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ItemPointer {
    pub(crate) block: BlockNumber,
    pub(crate) offset: OffsetNumber,
}

impl ItemPointer {
    /// `ItemPointerSetInvalid`.
    pub(crate) const INVALID: ItemPointer = ItemPointer { block: INVALID_BLOCK, offset: 0 };

    /// The stored form.
    pub(crate) fn to_bytes(self) -> [u8; ITEM_POINTER_SIZE] {
        let [b0, b1, b2, b3] = block_id(self.block);
        let [o0, o1] = self.offset.to_le_bytes();
        [b0, b1, b2, b3, o0, o1]
    }

    /// The item pointer with this stored form.
    pub(crate) fn from_bytes(bytes: [u8; ITEM_POINTER_SIZE]) -> ItemPointer {
        let [h0, h1, l0, l1, o0, o1] = bytes;
        let block = u32::from(u16::from_le_bytes([h0, h1])) << 16 | u32::from(u16::from_le_bytes([l0, l1]));
        ItemPointer { block, offset: u16::from_le_bytes([o0, o1]) }
    }

    /// Reads one.
    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<ItemPointer, Fault> {
        let block = read_block_id(cursor)?;
        Ok(ItemPointer { block, offset: cursor.u16()? })
    }
}

/// `BlockIdData`: a block number's stored form where it is only 2-aligned.
pub(crate) fn block_id(block: BlockNumber) -> [u8; 4] {
    let ([h0, h1], [l0, l1]) = (((block >> 16) as u16).to_le_bytes(), (block as u16).to_le_bytes());
    [h0, h1, l0, l1]
}

/// Reads a `BlockIdData`.
pub(crate) fn read_block_id(cursor: &mut Cursor<'_>) -> Result<BlockNumber, Fault> {
    let (high, low) = (cursor.u16()?, cursor.u16()?);
    Ok(u32::from(high) << 16 | u32::from(low))
}

/// `t_info` of the tuple at the start of `bytes`.
pub(crate) fn info(bytes: &[u8]) -> Result<u16, Fault> {
    match bytes.get(INFO_AT..INDEX_TUPLE_HEADER_SIZE) {
        Some([low, high]) => Ok(u16::from_le_bytes([*low, *high])),
        _ => Err(format!("an index tuple's header is cut off after {} bytes", bytes.len()).into()),
    }
}

/// Sets `t_info` of the tuple `tuple`.
pub(crate) fn set_info(tuple: &mut [u8], info: u16) -> Result<(), Fault> {
    let at = tuple.get_mut(INFO_AT..INDEX_TUPLE_HEADER_SIZE).ok_or("an index tuple is shorter than its header")?;
    at.copy_from_slice(&info.to_le_bytes());
    Ok(())
}

/// `t_info` with another size in it.
pub(crate) fn info_with_size(info: u16, size: usize) -> Result<u16, Fault> {
    match u16::try_from(size) {
        Ok(size) if size <= SIZE_MASK => Ok(info & !SIZE_MASK | size),
        _ => Err(format!("an index tuple of {size} bytes: there can be at most {SIZE_MASK}").into()),
    }
}

/// `IndexTupleSize` of the tuple at the start of `bytes`.
pub(crate) fn size(bytes: &[u8]) -> Result<usize, Fault> {
    Ok(usize::from(info(bytes)? & SIZE_MASK))
}

/// Checked: a tuple is no smaller than its header.
fn whole_size(bytes: &[u8]) -> Result<usize, Fault> {
    match size(bytes)? {
        size if size < INDEX_TUPLE_HEADER_SIZE => Err(format!("an index tuple says that it has {size} bytes").into()),
        size => Ok(size),
    }
}

/// Reads a whole index tuple.
pub(crate) fn take<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *cursor;
    cursor.take(whole_size(ahead.rest())?)
}

/// Reads a whole index tuple of those that stand one behind the other, each padded to a multiple of 8 bytes. The
/// padding comes with it.
pub(crate) fn take_aligned<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *cursor;
    cursor.take(max_align(whole_size(ahead.rest())?))
}

/// The tuple at the start of `bytes`, cut to the size that it says it has.
pub(crate) fn exact(bytes: &[u8]) -> Result<&[u8], Fault> {
    Cursor::new(bytes).take(whole_size(bytes)?)
}

/// The item pointer of the index tuple `tuple`.
pub(crate) fn pointer(tuple: &[u8]) -> Result<ItemPointer, Fault> {
    let bytes = tuple.first_chunk().ok_or("an index tuple is shorter than its item pointer")?;
    Ok(ItemPointer::from_bytes(*bytes))
}

/// Sets the item pointer of the index tuple `tuple`.
pub(crate) fn set_pointer(tuple: &mut [u8], pointer: ItemPointer) -> Result<(), Fault> {
    let at = tuple.get_mut(..ITEM_POINTER_SIZE).ok_or("an index tuple is shorter than its item pointer")?;
    at.copy_from_slice(&pointer.to_bytes());
    Ok(())
}
