//! Data blocks: versions one after the other, each written as what differs from the one before.
//!
//! Content of a block (inside its envelope): base LSN `u64` big-endian, which is below every LSN in the block, then
//! versions, each:
//! - a byte: in its low five bits how many bytes of the key are those of the version before (0 in the first), in the
//!   next two the kind (0 image, 1 change, 2 change that initialises, 3 absent), the highest bit zero;
//! - the rest of the key;
//! - the LSN as a varint: less than that of the version before by so much, if the key is the same; else above the base
//!   LSN by so much;
//! - unless absent, the value's length as a varint and its bytes.
//!
//! Varints are those of [`crate::varint`].

use bytes::{BufMut, Bytes};
use varve_postgres::Lsn;

use crate::chain::Version;
use crate::key::{KEY_SIZE, Key};
use crate::value::Value;
use crate::varint::{put_varint, take_varint};

/// Bytes of content after which a block is closed. Two pages fit in.
pub const BLOCK_BYTES_TARGET: usize = 16 << 10;

const SHARED_MASK: u8 = 0x1F;

/// Number of a value's kind.
fn kind_number(value: &Value) -> u8 {
    match value {
        Value::Image(_) => 0,
        Value::Change { will_init: false, .. } => 1,
        Value::Change { will_init: true, .. } => 2,
        Value::Absent => 3,
    }
}

/// Bytes that two keys have in common at their beginning.
pub(super) fn shared_prefix(a: &Key, b: &Key) -> usize {
    a.0.iter().zip(&b.0).take_while(|(a, b)| a == b).count()
}

/// Collects the versions of a block.
pub(super) struct BlockBuilder {
    base: Lsn,
    content: Vec<u8>,
    first: Option<(Key, Lsn)>,
    last: (Key, Lsn),
}

impl BlockBuilder {
    /// An empty block for versions above `base`.
    pub(super) fn new(base: Lsn) -> BlockBuilder {
        let mut builder = BlockBuilder { base, content: Vec::with_capacity(2 * BLOCK_BYTES_TARGET), first: None, last: (Key::MIN, base) };
        builder.clear();
        builder
    }

    /// Makes it empty again.
    pub(super) fn clear(&mut self) {
        self.content.clear();
        self.content.put_u64(self.base.0);
        self.first = None;
    }

    /// Key and LSN of the first version; `None` if the block is empty.
    pub(super) fn first(&self) -> Option<(Key, Lsn)> {
        self.first
    }

    /// The block's content.
    pub(super) fn content(&self) -> &[u8] {
        &self.content
    }

    /// Adds a version. In order, and above the base: that is the caller's to check.
    pub(super) fn push(&mut self, key: &Key, version: &Version) {
        let shared = if self.first.is_some() { shared_prefix(&self.last.0, key) } else { 0 };
        self.content.push(shared as u8 | kind_number(&version.value) << 5);
        self.content.extend_from_slice(&key.0[shared..]);
        let delta = if shared == KEY_SIZE { self.last.1.0 - version.lsn.0 } else { version.lsn.0 - self.base.0 };
        put_varint(&mut self.content, delta);
        if let Value::Image(bytes) | Value::Change { bytes, .. } = &version.value {
            put_varint(&mut self.content, bytes.len() as u64);
            self.content.extend_from_slice(bytes);
        }
        self.last = (*key, version.lsn);
        self.first.get_or_insert(self.last);
    }
}

/// A version in a block, its value still inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) key: Key,
    pub(super) lsn: Lsn,
    kind: u8,
    start: usize,
    end: usize,
}

impl Item {
    /// The version, its value a view into `content`.
    pub(super) fn version(&self, content: &Bytes) -> Version {
        let bytes = content.slice(self.start..self.end);
        let value = match self.kind {
            0 => Value::Image(bytes),
            1 => Value::Change { will_init: false, bytes },
            2 => Value::Change { will_init: true, bytes },
            _ => Value::Absent,
        };
        Version { lsn: self.lsn, value }
    }
}

/// Walks over a block's versions. `C` is the content, or a view of it.
pub(super) struct BlockIter<C> {
    content: C,
    at: usize,
    base: u64,
    last: Option<(Key, u64)>,
}

/// What is wrong with a block whose checksum is right: it was written wrong.
pub(super) const MALFORMED: &str = "a block's content is malformed";

impl<C: AsRef<[u8]>> BlockIter<C> {
    /// `None` if this is too short to be a block.
    pub(super) fn new(content: C) -> Option<BlockIter<C>> {
        let base = u64::from_be_bytes(*content.as_ref().first_chunk()?);
        Some(BlockIter { content, at: 8, base, last: None })
    }

    /// The content that was given.
    pub(super) fn content(&self) -> &C {
        &self.content
    }

    /// The next version; `None` at the end.
    ///
    /// # Errors
    /// [`MALFORMED`].
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<Item>, &'static str> {
        if self.at == self.content.as_ref().len() {
            return Ok(None);
        }
        self.parse().map(Some).ok_or(MALFORMED)
    }

    #[inline]
    fn parse(&mut self) -> Option<Item> {
        let content = self.content.as_ref();
        let mut at = self.at;
        let head = *content.get(at)?;
        at += 1;
        let (shared, kind) = (usize::from(head & SHARED_MASK), head >> 5);
        if shared > KEY_SIZE || kind > 3 {
            return None;
        }
        let (mut key, last_lsn) = match self.last {
            Some(last) => last,
            None if shared == 0 => (Key::MIN, 0),
            None => return None,
        };
        key.0[shared..].copy_from_slice(content.get(at..at + KEY_SIZE - shared)?);
        at += KEY_SIZE - shared;
        let delta = take_varint(content, &mut at)?;
        let lsn = if shared == KEY_SIZE { last_lsn.checked_sub(delta)? } else { self.base.checked_add(delta)? };
        let len = if kind == 3 { 0 } else { usize::try_from(take_varint(content, &mut at)?).ok()? };
        let start = at;
        let end = start.checked_add(len).filter(|end| *end <= content.len())?;
        self.at = end;
        self.last = Some((key, lsn));
        Some(Item { key, lsn: Lsn(lsn), kind, start, end })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn garbage_is_an_error_or_some_versions_but_never_a_panic(content in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(content);
            if let Some(mut iter) = BlockIter::new(bytes.clone()) {
                while let Ok(Some(item)) = iter.next() {
                    let _ = item.version(&bytes);
                }
            }
        }
    }
}
