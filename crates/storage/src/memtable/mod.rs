//! The memtable: the newest versions of a timeline, in memory.
//!
//! One writer puts, in order of LSN; many read at the same time. A hash table gives for each key its newest version,
//! from there a chain leads to older ones. Values are copied into arenas when they are put: what a memtable costs is
//! exactly what it has allocated, and a small value never pins the WAL buffer that it came in. Keys are spread over
//! shards, each with its table, arenas and lock, so that readers hold up the writer only while they copy a chain of the
//! same shard, and tables grow in small steps.
//!
//! Chains: each entry points to the next older one, and to the last *milestone* before it, which is every 64th entry; a
//! read far in the past goes from milestone to milestone. [`Memtable::put`] tells when a page's chain has become so
//! long that it should get an image ([`crate::chain::CHAIN_CHANGES_MAX`]); [`Memtable::insert_image`] puts it where it
//! belongs.
//!
//! Keys that are no relation blocks stand in an ordered set besides, for scans: a base backup reads all relation sizes
//! of a database.
//!
//! A memtable covers the LSNs `start..`; readers ask for LSNs that are applied, so they never see half a record.

mod arena;
mod shard;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::RwLock;
use varve_postgres::{Lsn, Page};

use self::arena::{Entry, Kind};
use self::shard::Shard;
use crate::budget::{MemoryBudget, Share};
use crate::chain::{Lookup, Version};
use crate::key::Key;
use crate::key_hash::key_hash;
use crate::threads::Clock;
use crate::value::Value;

/// Shards of a memtable.
const SHARDS: usize = 16;
/// Memory of a key in the ordered set.
const ORDERED_KEY_BYTES: usize = size_of::<Key>() * 3 / 2;

/// A memtable that can hold no more, or a value that is too large for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memtable has no room for this value: it must be frozen before more is put")]
pub struct MemtableFull;

/// See the module's doc.
pub struct Memtable {
    start: Lsn,
    clock: Clock,
    first_put: OnceLock<Instant>,
    /// None until the first put: most timelines are idle.
    shards: OnceLock<Box<[RwLock<Shard>; SHARDS]>>,
    ordered_keys: RwLock<BTreeSet<Key>>,
    share: Share,
    versions: AtomicUsize,
    newest: AtomicU64,
}

impl Memtable {
    /// An empty memtable for what comes after `start`; its memory counts in `budget`, `clock` tells the time.
    pub fn new(start: Lsn, clock: Clock, budget: Arc<MemoryBudget>) -> Memtable {
        Memtable {
            start,
            clock,
            first_put: OnceLock::new(),
            shards: OnceLock::new(),
            ordered_keys: RwLock::default(),
            share: Share::new(budget),
            versions: AtomicUsize::new(0),
            newest: AtomicU64::new(start.0),
        }
    }

    /// What it begins after.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// When something was put for the first time.
    pub fn first_put(&self) -> Option<Instant> {
        self.first_put.get().copied()
    }

    /// The newest LSN at which something was put, or the start.
    pub fn newest(&self) -> Lsn {
        Lsn(self.newest.load(Ordering::Acquire))
    }

    /// Versions in it.
    pub fn versions(&self) -> usize {
        self.versions.load(Ordering::Relaxed)
    }

    /// Whether nothing was put.
    pub fn is_empty(&self) -> bool {
        self.shards.get().is_none()
    }

    /// Memory in use.
    pub fn memory_bytes(&self) -> usize {
        self.share.bytes()
    }

    fn shard_number(key: &Key) -> usize {
        // A table in a shard uses the lowest and the highest bits.
        (key_hash(key) >> 40) as usize % SHARDS
    }

    fn shard(&self, key: &Key) -> Option<&RwLock<Shard>> {
        self.shards.get().map(|shards| &shards[Self::shard_number(key)])
    }

    /// Adds a version of `key`; for the one writer. Whether the page's chain should get an image once this is applied.
    ///
    /// # Errors
    /// When there is no room.
    pub fn put(&self, key: Key, lsn: Lsn, value: &Value) -> Result<bool, MemtableFull> {
        let (kind, bytes) = match value {
            Value::Image(bytes) => (Kind::Image, &bytes[..]),
            Value::Change { will_init: false, bytes } => (Kind::Change, &bytes[..]),
            Value::Change { will_init: true, bytes } => (Kind::Init, &bytes[..]),
            Value::Absent => (Kind::Absent, &[][..]),
        };
        if bytes.len() > Entry::VALUE_BYTES_MAX {
            return Err(MemtableFull);
        }
        let shards = self.shards.get_or_init(|| {
            self.share.add(SHARDS * size_of::<RwLock<Shard>>());
            self.first_put.get_or_init(|| (self.clock)());
            Box::new(std::array::from_fn(|_| RwLock::default()))
        });
        let put = shards[Self::shard_number(&key)].write().put(key, lsn, kind, bytes)?;
        let mut grown_bytes = put.grown_bytes;
        if put.is_new && !key.is_block() {
            self.ordered_keys.write().insert(key);
            grown_bytes += ORDERED_KEY_BYTES;
        }
        if grown_bytes > 0 {
            self.share.add(grown_bytes);
        }
        // There is one writer, so this needs no atomic addition.
        self.versions.store(self.versions() + 1, Ordering::Relaxed);
        self.newest.store(lsn.0.max(self.newest.load(Ordering::Relaxed)), Ordering::Release);
        Ok(put.wants_image)
    }

    /// Gives the chain of `key` an image: what the page is after its newest version at or below `lsn`. For the one
    /// writer.
    ///
    /// # Errors
    /// When there is no room.
    pub fn insert_image(&self, key: Key, lsn: Lsn, page: &Page) -> Result<(), MemtableFull> {
        let Some(shard) = self.shard(&key) else { return Ok(()) };
        if let Some(grown_bytes) = shard.write().insert_image(&key, lsn, page)? {
            self.share.add(grown_bytes);
            self.versions.store(self.versions() + 1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// LSN of the newest version of `key` at or below `lsn`.
    pub fn newest_lsn(&self, key: &Key, lsn: Lsn) -> Option<Lsn> {
        self.shard(key)?.read().newest_lsn(key, lsn)
    }

    /// Adds what is here to `lookup`.
    pub fn read(&self, lookup: &mut Lookup) {
        if let Some(shard) = self.shard(&lookup.key) {
            shard.read().read(lookup);
        }
    }

    /// The keys in `from..to` that are no relation blocks, ascending, `limit` at most.
    pub fn ordered_keys(&self, from: Key, to: Key, limit: usize) -> Vec<Key> {
        if from >= to {
            return Vec::new();
        }
        self.ordered_keys.read().range(from..to).take(limit).copied().collect()
    }

    /// All keys, ascending. For a memtable that nobody writes any more.
    pub fn sorted_keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = Vec::new();
        for shard in self.shards.get().iter().flat_map(|shards| shards.iter()) {
            keys.extend(shard.read().keys());
        }
        keys.sort_unstable();
        keys
    }

    /// All versions of `key`, newest first.
    pub fn versions_of(&self, key: &Key) -> Vec<Version> {
        self.shard(key).map(|shard| shard.read().versions(key)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
