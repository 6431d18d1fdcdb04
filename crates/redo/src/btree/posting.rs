//! Leaf tuples with a posting list: one key and the heap pointers of all its rows (`access/nbtree/nbtdedup.c`).
//!
//! Layout: an index tuple whose `t_info` has the reserved bit; its `t_tid` holds, as block, where the list begins, and
//! as offset number the list's length in bits 0 to 11 and the posting flag. The key comes first, padded to a multiple
//! of 8 bytes, then 6 bytes for each heap pointer, ascending.

use crate::Fault;
use crate::index_tuple::{self, AM_RESERVED_BIT, INDEX_TUPLE_HEADER_SIZE, ITEM_POINTER_SIZE as TID_SIZE, ItemPointer};
use crate::item::max_align;

/// `BT_OFFSET_MASK`: the bits of an offset number that hold the list's length.
const LEN_MASK: u16 = 0x0FFF;
/// `BT_IS_POSTING`.
const IS_POSTING: u16 = 0x2000;
/// `BTMaxItemSize`: a third of a page, less what a pivot needs for a heap pointer.
pub(super) const MAX_ITEM_SIZE: usize = 2704;

/// A heap pointer in its stored form.
pub(super) type Tid = [u8; TID_SIZE];

/// A leaf tuple taken apart.
pub(super) struct LeafTuple<'a> {
    /// Header and key, without the list. The header is still the whole tuple's.
    key: &'a [u8],
    /// The heap pointers, at least one.
    pub(super) tids: &'a [Tid],
    /// Whether they are a posting list.
    is_posting: bool,
}

impl<'a> LeafTuple<'a> {
    /// Takes the tuple at the start of `bytes` apart.
    pub(super) fn read(bytes: &'a [u8]) -> Result<LeafTuple<'a>, Fault> {
        let tuple = index_tuple::exact(bytes)?;
        let Some(list) = PostingList::of(tuple)? else {
            let (tids, _) = tuple[..TID_SIZE].as_chunks();
            return Ok(LeafTuple { key: tuple, tids, is_posting: false });
        };
        let (tids, _) = tuple[list.start..list.start + list.len * TID_SIZE].as_chunks();
        Ok(LeafTuple { key: &tuple[..list.start], tids, is_posting: true })
    }

    /// The same, which must have a posting list.
    pub(super) fn read_posting(bytes: &'a [u8]) -> Result<LeafTuple<'a>, Fault> {
        let tuple = LeafTuple::read(bytes)?;
        if tuple.is_posting { Ok(tuple) } else { Err("a tuple with a posting list expected, found one without".into()) }
    }

    /// `_bt_form_posting`: a tuple with this one's key and these heap pointers. Of one, it is an ordinary tuple.
    pub(super) fn with_tids(&self, tids: &[Tid]) -> Result<Vec<u8>, Fault> {
        let key_size = self.key.len();
        let size = match tids.len() {
            0 => return Err("a leaf tuple without heap pointers".into()),
            1 => key_size,
            _ if !key_size.is_multiple_of(8) => return Err(format!("a posting list behind a key that ends at byte {key_size}").into()),
            len => max_align(key_size + len * TID_SIZE),
        };
        let info = index_tuple::info_with_size(index_tuple::info(self.key)?, size)?;
        let mut tuple = vec![0; size];
        tuple[..key_size].copy_from_slice(self.key);
        if let [tid] = tids {
            index_tuple::set_info(&mut tuple, info & !AM_RESERVED_BIT)?;
            index_tuple::set_pointer(&mut tuple, ItemPointer::from_bytes(*tid))?;
        } else {
            // An index tuple of at most 8191 bytes has no more than 1363 heap pointers, so the length fits.
            index_tuple::set_info(&mut tuple, info | AM_RESERVED_BIT)?;
            index_tuple::set_pointer(&mut tuple, ItemPointer { block: key_size as u32, offset: tids.len() as u16 | IS_POSTING })?;
            tuple[key_size..key_size + tids.len() * TID_SIZE].copy_from_slice(tids.as_flattened());
        }
        Ok(tuple)
    }

    /// `_bt_update_posting`: the tuple without the heap pointers at these places, ascending, of which it keeps at least
    /// one.
    pub(super) fn without(&self, places: &[u16]) -> Result<Vec<u8>, Fault> {
        let mut doomed = places.iter().peekable();
        let kept: Vec<Tid> =
            (0u16..).zip(self.tids).filter(|(place, _)| doomed.next_if_eq(&place).is_none()).map(|(_, tid)| *tid).collect();
        if let Some(place) = doomed.next() {
            return Err(format!("heap pointer {place} of {} is out of order or does not exist", self.tids.len()).into());
        }
        self.with_tids(&kept)
    }

    /// Bytes that a tuple with this one's key and `len` heap pointers would have.
    pub(super) fn size_with(&self, len: usize) -> usize {
        max_align(self.key.len() + len * TID_SIZE)
    }
}

/// Where a tuple's posting list lies.
struct PostingList {
    start: usize,
    len: usize,
}

impl PostingList {
    /// That of `tuple`, within its bounds; none if it has no posting list.
    fn of(tuple: &[u8]) -> Result<Option<PostingList>, Fault> {
        let ItemPointer { block, offset } = index_tuple::pointer(tuple)?;
        if index_tuple::info(tuple)? & AM_RESERVED_BIT == 0 || offset & IS_POSTING == 0 {
            return Ok(None);
        }
        let (start, len) = (block as usize, usize::from(offset & LEN_MASK));
        if start < INDEX_TUPLE_HEADER_SIZE || start % 8 != 0 || start > tuple.len() || len < 2 || len * TID_SIZE > tuple.len() - start {
            return Err(format!("a posting list of {len} heap pointers from byte {start} in a tuple of {} bytes", tuple.len()).into());
        }
        Ok(Some(PostingList { start, len }))
    }
}

/// `_bt_swap_posting`: the new tuple's heap pointer falls into the list of `posting`. It takes place `at` there, and
/// the list's last one becomes the new tuple's.
pub(super) fn swap(new: &mut [u8], posting: &mut [u8], at: u16) -> Result<(), Fault> {
    let size = index_tuple::exact(posting)?.len();
    let tuple = &mut posting[..size];
    let list = PostingList::of(tuple)?.ok_or("the tuple before the new one has no posting list to split")?;
    let at = usize::from(at);
    if at == 0 || at >= list.len {
        return Err(format!("a posting list of {} heap pointers cannot be split at {at}", list.len).into());
    }
    let (tids, _) = tuple[list.start..list.start + list.len * TID_SIZE].as_chunks_mut();
    let last = tids[list.len - 1];
    tids.copy_within(at..list.len - 1, at + 1);
    tids[at] = index_tuple::pointer(new)?.to_bytes();
    index_tuple::set_pointer(new, ItemPointer::from_bytes(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tid(n: u16) -> Tid {
        ItemPointer { block: 1, offset: n }.to_bytes()
    }

    fn plain(n: u16) -> Vec<u8> {
        let mut tuple = [&tid(n)[..], &0x4010_u16.to_le_bytes(), b"the key."].concat();
        index_tuple::set_info(&mut tuple, 0x4010).unwrap();
        tuple
    }

    fn posting(tids: &[u16]) -> Vec<u8> {
        let tids: Vec<Tid> = tids.iter().copied().map(tid).collect();
        LeafTuple::read(&plain(1)).unwrap().with_tids(&tids).unwrap()
    }

    fn offsets(tuple: &[u8]) -> Vec<u16> {
        LeafTuple::read(tuple).unwrap().tids.iter().map(|tid| ItemPointer::from_bytes(*tid).offset).collect()
    }

    #[test]
    fn a_posting_list_stands_behind_the_key() {
        let tuple = posting(&[2, 5, 9]);
        assert_eq!(tuple.len(), 40, "16 bytes of header and key, 18 of heap pointers, padding");
        assert_eq!(index_tuple::info(&tuple).unwrap(), 0x4000 | AM_RESERVED_BIT | 40);
        assert_eq!(index_tuple::pointer(&tuple).unwrap(), ItemPointer { block: 16, offset: IS_POSTING | 3 });
        assert_eq!(offsets(&tuple), [2, 5, 9]);
    }

    #[test]
    fn a_list_of_one_is_a_plain_tuple_again() {
        let tuple = LeafTuple::read_posting(&posting(&[2, 5, 9])).unwrap().without(&[0, 2]).unwrap();
        assert_eq!(tuple, plain(5));
    }

    #[test]
    fn places_must_be_ascending_and_there() {
        let tuple = posting(&[2, 5, 9]);
        let tuple = LeafTuple::read_posting(&tuple).unwrap();
        for places in [&[1, 0][..], &[3], &[0, 1, 2]] {
            assert!(tuple.without(places).is_err(), "{places:?} of three heap pointers");
        }
        assert!(LeafTuple::read_posting(&plain(1)).is_err());
    }

    #[test]
    fn a_new_pointer_in_the_list_drives_out_the_last() {
        let (mut new, mut old) = (plain(6), posting(&[2, 5, 9]));
        swap(&mut new, &mut old, 2).unwrap();
        assert_eq!((offsets(&old), offsets(&new)), (vec![2, 5, 6], vec![9]));
        for at in [0, 3, u16::MAX] {
            assert!(swap(&mut new, &mut old, at).is_err(), "place {at} of three");
        }
        assert!(swap(&mut plain(6), &mut plain(5), 1).is_err());
    }
}
