//! Where a shard keeps what is put: bytes of values one after the other in chunks, and entries of chains in a list.
//! Both start small and never move what is large.

use varve_postgres::Lsn;

use super::MemtableFull;

/// Bytes in the first chunk of a shard.
const FIRST_CHUNK_BYTES: usize = 1 << 10;
/// Bytes in a chunk at most, but for one that holds a single larger value; an offset within it takes this many bits.
const CHUNK_BYTES_MAX: usize = 1 << CHUNK_BITS;
const CHUNK_BITS: u32 = 18;
/// Chunks in a shard at most: their number shares a `u32` with the offset.
const CHUNKS_MAX: usize = 1 << (32 - CHUNK_BITS);
/// Entries in a block of the entry list.
const ENTRY_BLOCK_LEN: usize = 1 << ENTRY_BLOCK_BITS;
const ENTRY_BLOCK_BITS: u32 = 12;

/// Where a value's bytes are: chunk and offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ValueAt(u32);

/// Bytes of values.
#[derive(Default)]
pub(super) struct ValueArena {
    chunks: Vec<Vec<u8>>,
}

impl ValueArena {
    /// Copies `bytes` into the arena; gives their place and by how much the arena's memory grew.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(ValueAt, usize), MemtableFull> {
        let fits = self.chunks.last().is_some_and(|chunk| chunk.capacity() - chunk.len() >= bytes.len() && chunk.len() < CHUNK_BYTES_MAX);
        let mut grown = 0;
        if !fits {
            if self.chunks.len() == CHUNKS_MAX {
                return Err(MemtableFull);
            }
            let doubled = FIRST_CHUNK_BYTES << self.chunks.len().min((CHUNK_BYTES_MAX / FIRST_CHUNK_BYTES).ilog2() as usize);
            self.chunks.push(Vec::with_capacity(doubled.max(bytes.len())));
            grown = doubled.max(bytes.len());
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let at = ValueAt((number as u32) << CHUNK_BITS | chunk.len() as u32);
        chunk.extend_from_slice(bytes);
        Ok((at, grown))
    }

    /// The `len` bytes at `at`, which `push` gave.
    pub(super) fn get(&self, at: ValueAt, len: usize) -> &[u8] {
        let offset = at.0 as usize & (CHUNK_BYTES_MAX - 1);
        &self.chunks[(at.0 >> CHUNK_BITS) as usize][offset..offset + len]
    }
}

/// Number of an entry in its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryAt(u32);

impl EntryAt {
    /// No entry: the end of a chain.
    pub(super) const NONE: EntryAt = EntryAt(u32::MAX);
}

/// What a version is; the bytes are elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Image = 0,
    Change = 1,
    Init = 2,
    Absent = 3,
}

/// A version in a chain.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) lsn: Lsn,
    /// The next older version.
    pub(super) older: EntryAt,
    /// A much older version, the last milestone before this one.
    pub(super) milestone: EntryAt,
    value: ValueAt,
    /// Length, and the kind in the lowest two bits.
    len_and_kind: u32,
}

impl Entry {
    /// Bytes in a value at most.
    pub(super) const VALUE_BYTES_MAX: usize = (u32::MAX >> 2) as usize;

    pub(super) fn new(lsn: Lsn, kind: Kind, value: ValueAt, len: usize) -> Entry {
        let len_and_kind = (len as u32) << 2 | kind as u32;
        Entry { lsn, older: EntryAt::NONE, milestone: EntryAt::NONE, value, len_and_kind }
    }

    pub(super) fn kind(&self) -> Kind {
        match self.len_and_kind & 3 {
            0 => Kind::Image,
            1 => Kind::Change,
            2 => Kind::Init,
            _ => Kind::Absent,
        }
    }

    /// Whether no older version is needed.
    pub(super) fn is_base(&self) -> bool {
        self.kind() != Kind::Change
    }

    pub(super) fn bytes<'a>(&self, values: &'a ValueArena) -> &'a [u8] {
        values.get(self.value, (self.len_and_kind >> 2) as usize)
    }
}

/// Entries, in the order in which they were put.
#[derive(Default)]
pub(super) struct Entries {
    blocks: Vec<Vec<Entry>>,
}

impl Entries {
    /// Adds an entry; gives its number and by how much the list's memory grew.
    pub(super) fn push(&mut self, entry: Entry) -> Result<(EntryAt, usize), MemtableFull> {
        if self.blocks.last().is_none_or(|block| block.len() == ENTRY_BLOCK_LEN) {
            // Only the first block starts small: a shard with a full block is a large one.
            self.blocks.push(if self.blocks.is_empty() { Vec::new() } else { Vec::with_capacity(ENTRY_BLOCK_LEN) });
        }
        let number = self.blocks.len() - 1;
        let block = &mut self.blocks[number];
        let at = number << ENTRY_BLOCK_BITS | block.len();
        let at = u32::try_from(at).ok().map(EntryAt).filter(|at| *at != EntryAt::NONE).ok_or(MemtableFull)?;
        let capacity_before = if block.is_empty() { 0 } else { block.capacity() };
        block.push(entry);
        Ok((at, (block.capacity() - capacity_before) * size_of::<Entry>()))
    }

    /// Entry `at`; `None` for [`EntryAt::NONE`].
    pub(super) fn get(&self, at: EntryAt) -> Option<&Entry> {
        self.blocks.get((at.0 >> ENTRY_BLOCK_BITS) as usize)?.get(at.0 as usize & (ENTRY_BLOCK_LEN - 1))
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, at: EntryAt) -> Option<&mut Entry> {
        self.blocks.get_mut((at.0 >> ENTRY_BLOCK_BITS) as usize)?.get_mut(at.0 as usize & (ENTRY_BLOCK_LEN - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_any_length_come_back_and_small_arenas_stay_small() {
        let mut arena = ValueArena::default();
        let mut bytes = 0;
        let lengths = [0, 1, 100, 1023, 1024, 8192, CHUNK_BYTES_MAX - 1, CHUNK_BYTES_MAX, 3 * CHUNK_BYTES_MAX, 5, 0, 8192];
        let places: Vec<ValueAt> = lengths
            .iter()
            .enumerate()
            .map(|(i, len)| {
                let (at, grown) = arena.push(&vec![i as u8; *len]).unwrap();
                bytes += grown;
                at
            })
            .collect();
        for (i, (at, len)) in places.iter().zip(lengths).enumerate() {
            assert_eq!(arena.get(*at, len), vec![i as u8; len], "value {i}");
        }
        assert_eq!(bytes, arena.chunks.iter().map(Vec::capacity).sum::<usize>());
        let mut small = ValueArena::default();
        assert_eq!(small.push(b"few").unwrap().1, FIRST_CHUNK_BYTES);
    }

    #[test]
    fn entries_are_24_bytes_and_keep_their_numbers() {
        assert_eq!(size_of::<Entry>(), 24);
        let mut entries = Entries::default();
        let mut bytes = 0;
        for i in 0..2 * ENTRY_BLOCK_LEN as u64 + 1 {
            let (at, grown) = entries.push(Entry::new(Lsn(i), Kind::Change, ValueAt(0), 0)).unwrap();
            bytes += grown;
            assert_eq!(at, EntryAt(i as u32));
        }
        assert_eq!(entries.get(EntryAt(5000)).unwrap().lsn, Lsn(5000));
        assert!(entries.get(EntryAt::NONE).is_none());
        assert_eq!(bytes, entries.blocks.iter().map(|block| block.capacity() * 24).sum::<usize>());
    }
}
