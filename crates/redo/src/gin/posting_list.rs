//! Posting lists: ascending heap pointers, compressed (`gin/ginpostinglist.c`).
//!
//! Layout of a segment, 2-aligned: first item pointer, 6 bytes; number of bytes that follow `u16`; for each further
//! pointer its distance from the one before as a varbyte number (7 bits a byte, low ones first, high bit set but in the
//! last byte); a zero byte if their number is odd. The distance is that of 43-bit numbers: block number, then 11 bits
//! of offset number.

use varve_postgres::page::BLCKSZ;

use crate::Fault;
use crate::cursor::Cursor;
use crate::index_tuple::{ITEM_POINTER_SIZE, ItemPointer};

/// Bytes before a segment's varbyte numbers.
const SEGMENT_HEADER_SIZE: usize = ITEM_POINTER_SIZE + 2;
/// `MaxHeapTuplesPerPageBits`: bits of an offset number.
const OFFSET_BITS: u32 = 11;
/// Bits of a heap pointer as a number.
const POINTER_BITS: u32 = 32 + OFFSET_BITS;
/// `MaxBytesPerInteger`: bytes of a varbyte number at most.
const VARBYTE_SIZE_MAX: u32 = 7;

/// A heap pointer as the number that is compressed; these sort as the pointers do.
type Pointer = u64;

fn pack(pointer: ItemPointer) -> Result<Pointer, Fault> {
    if pointer.offset == 0 || pointer.offset >> OFFSET_BITS != 0 {
        return Err(format!("({}, {}) cannot be a heap pointer of a posting list", pointer.block, pointer.offset).into());
    }
    Ok(u64::from(pointer.block) << OFFSET_BITS | u64::from(pointer.offset))
}

fn unpack(pointer: Pointer) -> ItemPointer {
    ItemPointer { block: (pointer >> OFFSET_BITS) as u32, offset: (pointer & ((1 << OFFSET_BITS) - 1)) as u16 }
}

/// Reads `n` uncompressed heap pointers.
pub(super) fn read_pointers(cursor: &mut Cursor<'_>, n: usize) -> Result<Vec<Pointer>, Fault> {
    let mut cursor = Cursor::new(cursor.take(n * ITEM_POINTER_SIZE)?);
    (0..n).map(|_| pack(ItemPointer::read(&mut cursor)?)).collect()
}

/// Bytes of the segment at the start of `bytes` (`SizeOfGinPostingList`), which `bytes` has.
pub(super) fn segment_size(bytes: &[u8]) -> Result<usize, Fault> {
    let mut cursor = Cursor::new(bytes);
    cursor.take(ITEM_POINTER_SIZE)?;
    let size = SEGMENT_HEADER_SIZE + usize::from(cursor.u16()?).next_multiple_of(2);
    if size > bytes.len() {
        return Err(format!("a posting list of {size} bytes is cut off after {}", bytes.len()).into());
    }
    Ok(size)
}

/// `ginPostingListDecode`: the heap pointers of `segment`.
pub(super) fn decode(segment: &[u8]) -> Result<Vec<Pointer>, Fault> {
    let mut cursor = Cursor::new(segment);
    let mut pointer = pack(ItemPointer::read(&mut cursor)?)?;
    let len = usize::from(cursor.u16()?);
    let mut bytes = Cursor::new(cursor.take(len)?);
    let mut pointers = Vec::with_capacity(1 + len);
    pointers.push(pointer);
    while !bytes.is_empty() {
        pointer += decode_varbyte(&mut bytes)?;
        if pointer >> POINTER_BITS != 0 {
            return Err("a posting list runs beyond the last heap block".into());
        }
        pointers.push(pointer);
    }
    Ok(pointers)
}

fn decode_varbyte(bytes: &mut Cursor<'_>) -> Result<u64, Fault> {
    let mut value = 0;
    for i in 0..VARBYTE_SIZE_MAX {
        let byte = bytes.u8()?;
        value |= u64::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(format!("a number in a posting list has more than {VARBYTE_SIZE_MAX} bytes").into())
}

/// `ginCompressPostingList`: a segment of all of `pointers`, which ascend.
pub(super) fn encode(pointers: &[Pointer]) -> Result<Vec<u8>, Fault> {
    let (first, rest) = pointers.split_first().ok_or("a posting list without heap pointers")?;
    let mut segment = Vec::with_capacity(SEGMENT_HEADER_SIZE + rest.len() * 2 + 1);
    segment.extend(unpack(*first).to_bytes());
    segment.extend([0, 0]);
    let mut before = *first;
    for pointer in rest {
        let mut distance =
            pointer.checked_sub(before).filter(|distance| *distance > 0).ok_or("heap pointers of a posting list do not ascend")?;
        while distance > 0x7F {
            segment.push(0x80 | (distance & 0x7F) as u8);
            distance >>= 7;
        }
        segment.push(distance as u8);
        before = *pointer;
    }
    if segment.len() > BLCKSZ {
        return Err(format!("{} heap pointers do not fit into a posting list", pointers.len()).into());
    }
    let len = (segment.len() - SEGMENT_HEADER_SIZE) as u16;
    segment[ITEM_POINTER_SIZE..SEGMENT_HEADER_SIZE].copy_from_slice(&len.to_le_bytes());
    if segment.len() % 2 != 0 {
        segment.push(0);
    }
    Ok(segment)
}

/// `ginMergeItemPointers`: both lists in order, what is in both once.
pub(super) fn merge(a: &[Pointer], b: &[Pointer]) -> Vec<Pointer> {
    let mut merged = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.iter().copied().peekable(), b.iter().copied().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        match x.cmp(y) {
            std::cmp::Ordering::Less => merged.extend(a.next()),
            std::cmp::Ordering::Greater => merged.extend(b.next()),
            std::cmp::Ordering::Equal => {
                merged.extend(a.next());
                b.next();
            }
        }
    }
    merged.extend(a);
    merged.extend(b);
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pointers() -> impl Strategy<Value = Vec<Pointer>> {
        let pointer = (any::<u32>(), 1..1u16 << OFFSET_BITS).prop_map(|(block, offset)| pack(ItemPointer { block, offset }).unwrap());
        // Near one another, too, so that distances of one byte occur.
        let near = (0..40u32, 1..300u16).prop_map(|(block, offset)| pack(ItemPointer { block, offset }).unwrap());
        proptest::collection::btree_set(prop_oneof![pointer, near], 1..300).prop_map(|set| set.into_iter().collect())
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(pointers in pointers()) {
            let segment = encode(&pointers).unwrap();
            prop_assert_eq!(segment_size(&segment).unwrap(), segment.len());
            prop_assert_eq!(decode(&segment).unwrap(), pointers);
        }

        #[test]
        fn merging_is_the_union(a in pointers(), b in pointers()) {
            let union: std::collections::BTreeSet<_> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(merge(&a, &b), union.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(pointers) = decode(&bytes) {
                let _ = encode(&pointers);
            }
            let _ = segment_size(&bytes);
        }
    }

    #[test]
    fn the_worst_pointers_take_seven_bytes() {
        let pointers = [pack(ItemPointer { block: 0, offset: 1 }).unwrap(), pack(ItemPointer { block: u32::MAX, offset: 2047 }).unwrap()];
        let segment = encode(&pointers).unwrap();
        assert_eq!(segment.len(), SEGMENT_HEADER_SIZE + 8, "seven bytes and one of padding");
        assert_eq!(decode(&segment).unwrap(), pointers);
    }

    #[test]
    fn an_uncompressible_offset_is_refused() {
        assert!(pack(ItemPointer { block: 1, offset: 2048 }).is_err(), "12 bits of offset must not be cut to 11");
        assert!(pack(ItemPointer { block: 1, offset: 0 }).is_err(), "offset 0 is no heap pointer");
    }
}
