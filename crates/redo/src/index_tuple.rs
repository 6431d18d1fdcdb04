//! Item pointers and the header of index tuples, which all access methods share (`storage/itemptr.h`, `access/itup.h`).
//!
//! Layout of an index tuple: item pointer, 6 bytes (block number as two `u16`, high one first, then offset number); `t_info` `u16`,
//! whose low 13 bits are the tuple's size in bytes; then the access method's data.

use varve_postgres::BlockNumber;

use crate::Fault;
use crate::cursor::Cursor;
use crate::item::OffsetNumber;

/// Bytes in an item pointer.
pub(crate) const ITEM_POINTER_SIZE: usize = 6;
/// Bytes in an index tuple's header (`IndexTupleData`).
pub(crate) const INDEX_TUPLE_HEADER_SIZE: usize = 8;
/// `INDEX_SIZE_MASK` of `t_info`.
const SIZE_MASK: u16 = 0x1FFF;
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

/// `IndexTupleSize` of the tuple at the start of `bytes`.
pub(crate) fn size(bytes: &[u8]) -> Result<usize, Fault> {
    match bytes.get(INFO_AT..INDEX_TUPLE_HEADER_SIZE) {
        Some([low, high]) => Ok(usize::from(u16::from_le_bytes([*low, *high]) & SIZE_MASK)),
        _ => Err(format!("an index tuple's header is cut off after {} bytes", bytes.len()).into()),
    }
}

/// Reads a whole index tuple.
pub(crate) fn take<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *cursor;
    let size = size(ahead.rest())?;
    if size < INDEX_TUPLE_HEADER_SIZE {
        return Err(format!("an index tuple says that it has {size} bytes").into());
    }
    cursor.take(size)
}

/// Sets the item pointer of the index tuple `tuple`.
pub(crate) fn set_pointer(tuple: &mut [u8], pointer: ItemPointer) -> Result<(), Fault> {
    let at = tuple.get_mut(..ITEM_POINTER_SIZE).ok_or("an index tuple is shorter than its item pointer")?;
    at.copy_from_slice(&pointer.to_bytes());
    Ok(())
}
