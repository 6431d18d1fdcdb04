//! Keys: what has versions in a timeline.
//!
//! 18 bytes, big-endian, so that byte order is the order of ranges and a relation fork's blocks are neighbours. The
//! first byte is the kind; the rest, padded with zeros:
//!
//! | kind | what | bytes after the kind |
//! |---|---|---|
//! | 1 | relation block | tablespace u32, database u32, relation u32, fork u8, block u32 |
//! | 2 | relation size ([`crate::relation_size`]) | tablespace u32, database u32, relation u32, fork u8 |
//! | 3 | SLRU page | area u8, page u32 |
//! | 4 | SLRU extent: which pages exist | area u8 |
//! | 5 | relation map file | tablespace u32, database u32 |
//! | 6 | database directory | tablespace u32, database u32 |
//! | 7 | two-phase file | transaction with epoch u64 |
//! | 8 | checkpoint fields | |
//! | 9 | WAL index: record starts and commit times of one WAL page | page number u64 |
//! | 10 | tablespace | tablespace u32 |
//! | 11 | replication origin | origin u16 |
//! | 12 | free-space notes ([`crate::free_space`]) | tablespace u32, database u32, relation u32, 0 u8, map page u32 |
//!
//! Only kind 1 goes into block layers; all else goes into metadata layers, so that a base backup reads no block layer.

use std::fmt;

use varve_postgres::slru::SlruKind;
use varve_postgres::{BlockNumber, Fork, Oid, RelFork, RelNode};

/// Bytes in a key.
pub const KEY_SIZE: usize = 18;

/// See the module's doc.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; KEY_SIZE]);

/// A key taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the module's table says what they are")]
pub enum KeyKind {
    Block { rel: RelFork, block: BlockNumber },
    RelationSize { rel: RelFork },
    SlruPage { area: SlruKind, page: u32 },
    SlruExtent { area: SlruKind },
    RelationMap { spc: Oid, db: Oid },
    Database { spc: Oid, db: Oid },
    TwoPhase { xid: u64 },
    Checkpoint,
    WalIndex { page: u64 },
    Tablespace { spc: Oid },
    ReplicationOrigin { origin: u16 },
    FreeSpaceNotes { node: RelNode, map_page: u32 },
}

impl Key {
    /// Before every key.
    pub const MIN: Key = Key([0; KEY_SIZE]);
    /// After every key.
    pub const MAX: Key = Key([0xFF; KEY_SIZE]);
    /// First key that is a relation block.
    pub const FIRST_BLOCK: Key = Self::first_of_kind(1);
    /// First key that is no relation block, after all that are.
    pub const FIRST_METADATA: Key = Self::first_of_kind(2);

    const fn first_of_kind(kind: u8) -> Key {
        let mut key = [0; KEY_SIZE];
        key[0] = kind;
        Key(key)
    }

    fn build(kind: u8, parts: &[&[u8]]) -> Key {
        let mut key = [0; KEY_SIZE];
        key[0] = kind;
        let mut at = 1;
        for part in parts {
            key[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        Key(key)
    }

    fn relation(kind: u8, rel: RelFork, block: BlockNumber) -> Key {
        let RelNode { spc, db, rel: number } = rel.node;
        let parts: [&[u8]; 5] = [&spc.to_be_bytes(), &db.to_be_bytes(), &number.to_be_bytes(), &[rel.fork.number()], &block.to_be_bytes()];
        Self::build(kind, &parts)
    }

    /// Block `block` of `rel`.
    pub fn block(rel: RelFork, block: BlockNumber) -> Key {
        Self::relation(1, rel, block)
    }

    /// Size of `rel`.
    pub fn relation_size(rel: RelFork) -> Key {
        Self::relation(2, rel, 0)
    }

    /// Range (from, to) of the size keys of all relations of a database in a tablespace.
    pub fn relation_sizes_of(spc: Oid, db: Oid) -> (Key, Key) {
        let from = Self::build(2, &[&spc.to_be_bytes(), &db.to_be_bytes()]);
        let mut to = from;
        to.0[9..].fill(0xFF);
        (from, to)
    }

    /// Page `page` of an SLRU area.
    pub fn slru_page(area: SlruKind, page: u32) -> Key {
        Self::build(3, &[&[area.number()], &page.to_be_bytes()])
    }

    /// Which pages of an SLRU area exist.
    pub fn slru_extent(area: SlruKind) -> Key {
        Self::build(4, &[&[area.number()]])
    }

    /// `pg_filenode.map` of a database (0 and the global tablespace: the shared one).
    pub fn relation_map(spc: Oid, db: Oid) -> Key {
        Self::build(5, &[&spc.to_be_bytes(), &db.to_be_bytes()])
    }

    /// A database's directory in a tablespace.
    pub fn database(spc: Oid, db: Oid) -> Key {
        Self::build(6, &[&spc.to_be_bytes(), &db.to_be_bytes()])
    }

    /// Two-phase file of a prepared transaction.
    pub fn two_phase(xid: u64) -> Key {
        Self::build(7, &[&xid.to_be_bytes()])
    }

    /// Checkpoint fields.
    pub fn checkpoint() -> Key {
        Self::first_of_kind(8)
    }

    /// Index of the WAL page with this number (LSN / 8192).
    pub fn wal_index(page: u64) -> Key {
        Self::build(9, &[&page.to_be_bytes()])
    }

    /// A tablespace.
    pub fn tablespace(spc: Oid) -> Key {
        Self::build(10, &[&spc.to_be_bytes()])
    }

    /// Progress of a replication origin.
    pub fn replication_origin(origin: u16) -> Key {
        Self::build(11, &[&origin.to_be_bytes()])
    }

    /// Notes for the bottom page with number `map_page` of the relation's free-space map.
    pub fn free_space_notes(node: RelNode, map_page: u32) -> Key {
        Self::relation(12, node.fork(Fork::Main), map_page)
    }

    /// Range (from, to) of all keys of the kind of `of`.
    pub fn all_of_kind(of: Key) -> (Key, Key) {
        (Self::first_of_kind(of.0[0]), Self::first_of_kind(of.0[0] + 1))
    }

    /// Whether this is a relation block, which lives in block layers.
    pub fn is_block(&self) -> bool {
        self.0[0] == 1
    }

    /// The next key in order, or [`Key::MAX`].
    pub fn next(mut self) -> Key {
        for byte in self.0.iter_mut().rev() {
            let (value, overflow) = byte.overflowing_add(1);
            *byte = value;
            if !overflow {
                return self;
            }
        }
        Self::MAX
    }

    /// Takes the key apart; `None` if it is none that [`Key`]'s constructors make.
    pub fn kind(&self) -> Option<KeyKind> {
        let k = &self.0;
        let u32_at = |at: usize| u32::from_be_bytes([k[at], k[at + 1], k[at + 2], k[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let node = || RelNode { spc: u32_at(1), db: u32_at(5), rel: u32_at(9) };
        let rel = || Fork::from_number(k[13]).map(|fork| node().fork(fork));
        let kind = match k[0] {
            1 => KeyKind::Block { rel: rel()?, block: u32_at(14) },
            2 => KeyKind::RelationSize { rel: rel()? },
            3 => KeyKind::SlruPage { area: SlruKind::from_number(k[1])?, page: u32_at(2) },
            4 => KeyKind::SlruExtent { area: SlruKind::from_number(k[1])? },
            5 => KeyKind::RelationMap { spc: u32_at(1), db: u32_at(5) },
            6 => KeyKind::Database { spc: u32_at(1), db: u32_at(5) },
            7 => KeyKind::TwoPhase { xid: u64_at(1) },
            8 => KeyKind::Checkpoint,
            9 => KeyKind::WalIndex { page: u64_at(1) },
            10 => KeyKind::Tablespace { spc: u32_at(1) },
            11 => KeyKind::ReplicationOrigin { origin: u16::from_be_bytes([k[1], k[2]]) },
            12 => KeyKind::FreeSpaceNotes { node: node(), map_page: u32_at(14) },
            _ => return None,
        };
        Some(kind)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            Some(KeyKind::Block { rel, block }) => write!(f, "block {block} of {rel}"),
            Some(KeyKind::RelationSize { rel }) => write!(f, "size of {rel}"),
            Some(KeyKind::SlruPage { area, page }) => write!(f, "page {page} of {area}"),
            Some(KeyKind::SlruExtent { area }) => write!(f, "extent of {area}"),
            Some(KeyKind::RelationMap { spc, db }) => write!(f, "relation map of {spc}/{db}"),
            Some(KeyKind::Database { spc, db }) => write!(f, "database {spc}/{db}"),
            Some(KeyKind::TwoPhase { xid }) => write!(f, "two-phase file {xid}"),
            Some(KeyKind::Checkpoint) => write!(f, "checkpoint fields"),
            Some(KeyKind::WalIndex { page }) => write!(f, "index of WAL page {page}"),
            Some(KeyKind::Tablespace { spc }) => write!(f, "tablespace {spc}"),
            Some(KeyKind::ReplicationOrigin { origin }) => write!(f, "replication origin {origin}"),
            Some(KeyKind::FreeSpaceNotes { node, map_page }) => {
                write!(f, "free-space notes for bottom page {map_page} of {}", node.fork(Fork::FreeSpaceMap))
            }
            None => {
                f.write_str("key ")?;
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip_and_order_blocks_within_a_fork() {
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::VisibilityMap);
        let key = Key::block(rel, 7);
        assert_eq!(key.kind(), Some(KeyKind::Block { rel, block: 7 }));
        assert!(key < Key::block(rel, 256), "blocks of a fork are in order");
        assert_eq!(key.next(), Key::block(rel, 8));
        assert_eq!(Key::relation_size(rel).kind(), Some(KeyKind::RelationSize { rel }));
        let (from, to) = Key::relation_sizes_of(1663, 5);
        assert!(from <= Key::relation_size(rel) && Key::relation_size(rel) < to);
        assert_eq!(Key::free_space_notes(rel.node, 9).kind(), Some(KeyKind::FreeSpaceNotes { node: rel.node, map_page: 9 }));
        assert_eq!(Key::two_phase(1 << 40).kind(), Some(KeyKind::TwoPhase { xid: 1 << 40 }));
    }
}
