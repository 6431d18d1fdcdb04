//! The records that come most often, taken apart at fixed places.

use super::record::{BLOCK_FORK_MASK, BLOCK_HAS_DATA, BLOCK_HAS_IMAGE, BLOCK_SAME_REL, BLOCK_WILL_INIT, ID_DATA_SHORT, MAX_BLOCK_ID};
use super::{RECORD_HEADER_SIZE, RecordHeader};
use crate::{BlockNumber, Fork, RelFork, RelNode};

/// Bytes before the data: the header, the block's header with relation and number, and the header of at most 255 bytes
/// of main data.
const HEADERS_SIZE: usize = RECORD_HEADER_SIZE + 20 + 2;

/// A record with one block, which has no image, with main data, and with nothing else: a view of its bytes, with what
/// [`super::Record::decode`] would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainRecord<'a> {
    /// The fixed header.
    pub header: RecordHeader,
    /// Id of the block.
    pub block_id: u8,
    /// The relation fork.
    pub rel: RelFork,
    /// The block.
    pub blkno: BlockNumber,
    /// See [`super::Block::will_init`].
    pub will_init: bool,
    /// The block's own data.
    pub data: &'a [u8],
    /// Data that belongs to no block.
    pub main_data: &'a [u8],
}

impl<'a> PlainRecord<'a> {
    /// Takes the whole record `bytes` apart; `None` if it is not of this kind, or malformed.
    #[inline(always)]
    pub fn decode(bytes: &'a [u8]) -> Option<PlainRecord<'a>> {
        let header = RecordHeader::decode(bytes)?;
        let b: &[u8; HEADERS_SIZE] = bytes.first_chunk()?;
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let (block_id, flags, data_len) = (b[24], b[25], usize::from(u16::from_le_bytes([b[26], b[27]])));
        let main_len = usize::from(b[45]);
        let fork = Fork::from_number(flags & BLOCK_FORK_MASK)?;
        let is_plain = block_id <= MAX_BLOCK_ID
            && flags & (BLOCK_HAS_IMAGE | BLOCK_SAME_REL) == 0
            && (flags & BLOCK_HAS_DATA != 0) == (data_len != 0)
            && b[44] == ID_DATA_SHORT
            && bytes.len() == HEADERS_SIZE + data_len + main_len
            && header.total_len as usize == bytes.len();
        let (data, main_data) = bytes[HEADERS_SIZE..].split_at_checked(data_len).filter(|_| is_plain)?;
        let rel = RelNode { spc: u32_at(28), db: u32_at(32), rel: u32_at(36) }.fork(fork);
        Some(PlainRecord { header, block_id, rel, blkno: u32_at(40), will_init: flags & BLOCK_WILL_INIT != 0, data, main_data })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::wal::{Block, Record};
    use crate::{Lsn, Major};

    fn bytes(block: [u8; 4], fields: [u32; 4], main: [u8; 2], rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![7; RECORD_HEADER_SIZE];
        bytes.extend_from_slice(&block);
        fields.iter().for_each(|field| bytes.extend_from_slice(&field.to_le_bytes()));
        bytes.extend_from_slice(&main);
        bytes.extend_from_slice(rest);
        let total_len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&total_len.to_le_bytes());
        bytes
    }

    #[test]
    fn most_records_are_plain() {
        let bytes = bytes([3, BLOCK_HAS_DATA | BLOCK_WILL_INIT | 2, 2, 0], [1663, 5, 16384, 9], [ID_DATA_SHORT, 1], b"ddm");
        let plain = PlainRecord::decode(&bytes).expect("one block without an image");
        assert_eq!((plain.block_id, plain.will_init, plain.data, plain.main_data), (3, true, &b"dd"[..], &b"m"[..]));
        assert_eq!(plain.rel, RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::VisibilityMap));
        assert_eq!(PlainRecord::decode(&bytes[..bytes.len() - 1]), None, "a record that is cut");
    }

    proptest! {
        #[test]
        fn a_plain_record_is_what_every_record_is(
            id in prop_oneof![4 => 0..4u8, 1 => any::<u8>()],
            flags in prop_oneof![2 => (0..4u8).prop_map(|fork| fork | BLOCK_HAS_DATA), 2 => 0..4u8, 1 => any::<u8>()],
            data_len in prop_oneof![3 => 0..4u16, 1 => any::<u16>()],
            fields in any::<[u32; 4]>(),
            main_id in prop_oneof![4 => Just(ID_DATA_SHORT), 1 => any::<u8>()],
            main_len in prop_oneof![4 => 0..4u8, 1 => any::<u8>()],
            rest in vec(any::<u8>(), 0..8),
            cut in prop_oneof![4 => Just(0usize), 1 => 0..60usize]) {
            let [low, high] = data_len.to_le_bytes();
            let bytes = bytes([id, flags, low, high], fields, [main_id, main_len], &rest);
            let bytes = &bytes[..bytes.len().saturating_sub(cut)];
            let record = Record::decode(bytes, Lsn(8), Lsn(16), Major::V15);
            let Some(plain) = PlainRecord::decode(bytes) else {
                let is_plain = |record: &Record<'_>| {
                    matches!(&record.blocks[..], [Block { image: None, .. }])
                        && !record.main_data.is_empty()
                        && main_id == ID_DATA_SHORT
                        && (record.origin, record.toplevel_xid) == (None, None)
                };
                prop_assert!(!record.as_ref().is_ok_and(is_plain), "it is plain: {:?}", record);
                return Ok(());
            };
            let record = record.expect("what is plain is well-formed");
            prop_assert_eq!((record.header, record.main_data, record.origin, record.toplevel_xid), (plain.header, plain.main_data, None, None));
            let [block] = &record.blocks[..] else { panic!("one block, found {:?}", record.blocks) };
            prop_assert!(block.image.is_none());
            prop_assert_eq!(
                (block.id, block.rel, block.blkno, block.will_init, block.has_data, block.data),
                (plain.block_id, plain.rel, plain.blkno, plain.will_init, !plain.data.is_empty(), plain.data)
            );
        }
    }
}
