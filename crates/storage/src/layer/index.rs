//! The two levels of a layer's index.
//!
//! A **partition** covers up to [`PARTITION_BLOCKS_MAX`] neighbouring data blocks: a filter of their keys, and where
//! each block is. The **top** lists the partitions and says what the layer is. A lookup in a layer that is not in
//! memory thus reads top, one partition and one data block, whatever the layer's size.
//!
//! Both refer to what they point to by [`Handle`]s, 43 bytes: first key (18) and LSN `u64` of its first version, a byte
//! that is 1 if versions of that key are also at the end of what comes before, offset in the object `u64` and length
//! `u32` with envelope, and the CRC-32C `u32` that ends the envelope, so that a sound block in the wrong place is
//! noticed.
//!
//! Content of a partition: filter's length `u32`, the filter, then a handle for each data block. Content of the top:
//! layer id (16 bytes), LSN range start and end `u64`, versions `u64`, last key (18), then a handle for each partition.
//! Integers are big-endian.

use bytes::{Buf, BufMut};
use varve_postgres::Lsn;

use super::filter;
use crate::ids::LayerId;
use crate::key::{KEY_SIZE, Key};

/// Data blocks in a partition at most.
pub const PARTITION_BLOCKS_MAX: usize = 512;
/// Keys in a partition's filter after which it is closed.
pub const PARTITION_KEYS_TARGET: usize = 32_768;

/// Bytes of a handle.
const HANDLE_SIZE: usize = KEY_SIZE + 8 + 1 + 8 + 4 + 4;
/// Bytes of the top before its handles.
const TOP_HEAD_SIZE: usize = 16 + 3 * 8 + KEY_SIZE;

/// Where a data block or a partition is, and where its versions begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    /// Key of its first version.
    pub key: Key,
    /// LSN of its first version.
    pub lsn: Lsn,
    /// Whether newer versions of the key are in what comes before.
    pub continues: bool,
    /// Where its envelope begins in the object.
    pub offset: u64,
    /// Length of the envelope.
    pub length: u32,
    /// Last four bytes of the envelope.
    pub checksum: u32,
}

impl Handle {
    /// End of the envelope in the object.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_slice(&self.key.0);
        out.put_u64(self.lsn.0);
        out.put_u8(u8::from(self.continues));
        out.put_u64(self.offset);
        out.put_u32(self.length);
        out.put_u32(self.checksum);
    }

    fn take(bytes: &mut &[u8]) -> Handle {
        let key = take_key(bytes);
        let lsn = Lsn(bytes.get_u64());
        let continues = bytes.get_u8() != 0;
        Handle { key, lsn, continues, offset: bytes.get_u64(), length: bytes.get_u32(), checksum: bytes.get_u32() }
    }
}

fn take_key(bytes: &mut &[u8]) -> Key {
    let mut key = Key::MIN;
    bytes.copy_to_slice(&mut key.0);
    key
}

/// Reads all of `bytes` as handles, which must be in order and lie one behind the other.
fn take_handles(mut bytes: &[u8]) -> Option<Box<[Handle]>> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(HANDLE_SIZE) {
        return None;
    }
    let handles: Box<[Handle]> = (0..bytes.len() / HANDLE_SIZE).map(|_| Handle::take(&mut bytes)).collect();
    let in_order = |a: &Handle, b: &Handle| (a.key < b.key || a.key == b.key && a.lsn >= b.lsn) && a.end() <= b.offset;
    handles.windows(2).all(|pair| in_order(&pair[0], &pair[1])).then_some(handles)
}

/// Number of the handle at which to begin looking for versions of `key` at or below `upto`; `None` if there are none.
/// They may go on in the next ones, as long as these begin with the same key.
pub(super) fn seek(handles: &[Handle], key: &Key, upto: Lsn) -> Option<usize> {
    let next = handles.partition_point(|handle| handle.key < *key || handle.key == *key && handle.lsn > upto);
    match handles.get(next) {
        Some(handle) if handle.key == *key && !handle.continues => Some(next),
        _ => next.checked_sub(1),
    }
}

/// See the module's doc.
#[derive(Debug, PartialEq, Eq)]
pub struct Partition {
    filter: Box<[u8]>,
    /// The data blocks, in order.
    pub blocks: Box<[Handle]>,
}

impl Partition {
    pub(super) fn encode(filter: &[u8], blocks: &[Handle]) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + filter.len() + blocks.len() * HANDLE_SIZE);
        out.put_u32(filter.len() as u32);
        out.put_slice(filter);
        blocks.iter().for_each(|block| block.put(&mut out));
        out
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Option<Partition> {
        let filter_len = bytes.try_get_u32().ok()? as usize;
        let (filter, blocks) = bytes.split_at_checked(filter_len)?;
        Some(Partition { filter: filter.into(), blocks: take_handles(blocks)? })
    }

    /// Whether it may have versions of `key`.
    pub fn may_contain(&self, key: &Key) -> bool {
        filter::may_contain(&self.filter, key)
    }

    /// Memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.filter.len() + size_of_val::<[Handle]>(&self.blocks)
    }
}

/// See the module's doc.
#[derive(Debug, PartialEq, Eq)]
pub struct Top {
    /// The layer.
    pub id: LayerId,
    /// Its versions are above this.
    pub lsn_start: Lsn,
    /// Its versions are at or below this.
    pub lsn_end: Lsn,
    /// Number of its versions.
    pub versions: u64,
    /// Key of its last version.
    pub last_key: Key,
    /// The partitions, in order.
    pub partitions: Box<[Handle]>,
}

impl Top {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(TOP_HEAD_SIZE + self.partitions.len() * HANDLE_SIZE);
        out.put_slice(&self.id.0);
        out.put_u64(self.lsn_start.0);
        out.put_u64(self.lsn_end.0);
        out.put_u64(self.versions);
        out.put_slice(&self.last_key.0);
        self.partitions.iter().for_each(|partition| partition.put(&mut out));
        out
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Option<Top> {
        if bytes.len() < TOP_HEAD_SIZE {
            return None;
        }
        let mut id = LayerId([0; 16]);
        bytes.copy_to_slice(&mut id.0);
        let (lsn_start, lsn_end, versions) = (Lsn(bytes.get_u64()), Lsn(bytes.get_u64()), bytes.get_u64());
        let last_key = take_key(&mut bytes);
        Some(Top { id, lsn_start, lsn_end, versions, last_key, partitions: take_handles(bytes)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(key: u8, lsn: u64, continues: bool) -> Handle {
        let mut handle = Handle { key: Key::MIN, lsn: Lsn(lsn), continues, offset: 0, length: 10, checksum: 7 };
        handle.key.0[0] = key;
        handle
    }

    #[test]
    fn seek_finds_where_versions_of_a_key_begin() {
        // Block 0 has keys 1 to 3, the versions of 3 go on in block 1; key 5 begins in block 2 and fills block 3.
        let handles = [handle(1, 90, false), handle(3, 50, true), handle(5, 80, false), handle(5, 40, true)];
        let seek = |key: u8, upto: u64| seek(&handles, &handle(key, 0, false).key, Lsn(upto));
        assert_eq!(seek(0, 100), None);
        assert_eq!(seek(1, 100), Some(0), "the first key needs no block before it");
        assert_eq!(seek(1, 80), Some(0));
        assert_eq!(seek(2, 80), Some(0));
        assert_eq!(seek(3, 80), Some(0), "newer versions are at the end of block 0");
        assert_eq!(seek(3, 50), Some(0), "there may be two versions at one LSN");
        assert_eq!(seek(3, 49), Some(1));
        assert_eq!(seek(4, 49), Some(1));
        assert_eq!(seek(5, 100), Some(2), "the key begins with the block: the one before is not read");
        assert_eq!(seek(5, 60), Some(2));
        assert_eq!(seek(5, 39), Some(3));
        assert_eq!(seek(6, 39), Some(3));
    }

    #[test]
    fn indexes_round_trip_and_those_out_of_order_are_refused() {
        let mut blocks = [handle(1, 90, false), handle(3, 50, true)];
        blocks[1].offset = 10;
        let encoded = Partition::encode(&[1, 2, 3], &blocks);
        let partition = Partition::decode(&encoded).unwrap();
        assert_eq!((&partition.filter[..], &partition.blocks[..]), (&[1, 2, 3][..], &blocks[..]));
        let top =
            Top { id: LayerId([9; 16]), lsn_start: Lsn(1), lsn_end: Lsn(100), versions: 12, last_key: Key::MAX, partitions: blocks.into() };
        assert_eq!(Top::decode(&top.encode()), Some(top));
        blocks.swap(0, 1);
        assert_eq!(Partition::decode(&Partition::encode(&[], &blocks)), None);
        assert_eq!(Partition::decode(&encoded[..encoded.len() - 1]), None);
        assert_eq!(Partition::decode(&[]), None);
        assert_eq!(Top::decode(&[]), None);
    }
}
