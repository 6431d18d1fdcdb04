//! Sizes of relation forks at the newest LSN of a timeline: one hash lookup, where the long way is two walks.
//!
//! An entry is the *newest* version of a size, so it answers reads at its version's LSN and later. Whoever puts a new
//! version takes the entry out, whoever drops a database all of them. A reader who went the long way may have read just
//! before a put: so each shard remembers the newest LSN at which something was put, and takes only what was read at or
//! after that.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use varve_postgres::{Lsn, RelFork};

use crate::key::{Key, KeyKind};
use crate::key_hash::{BuildKeyHasher, key_hash};
use crate::relation::LiveSize;

const SHARDS: usize = 8;
/// Entries in a shard at most; a shard that is full is emptied.
const SHARD_ENTRIES_MAX: usize = 8192;

struct Shard {
    newest_put: Lsn,
    /// The newest size of each fork, and from which LSN on it holds.
    sizes: HashMap<Key, (Lsn, Option<Arc<LiveSize>>), BuildKeyHasher>,
}

/// See the module's doc. Empty, it takes next to no memory.
pub struct SizeCache {
    opened_at: Lsn,
    shards: OnceLock<Box<[Mutex<Shard>; SHARDS]>>,
}

impl SizeCache {
    /// An empty cache of a timeline that is at `applied`.
    pub fn new(applied: Lsn) -> SizeCache {
        SizeCache { opened_at: applied, shards: OnceLock::new() }
    }

    fn shards(&self) -> &[Mutex<Shard>; SHARDS] {
        // Sizes may have been put up to there before the cache was made.
        let shard = |_| Mutex::new(Shard { newest_put: self.opened_at, sizes: HashMap::default() });
        self.shards.get_or_init(|| Box::new(std::array::from_fn(shard)))
    }

    fn shard(&self, key: &Key) -> &Mutex<Shard> {
        &self.shards()[(key_hash(key) >> 40) as usize % SHARDS]
    }

    /// Takes note that a version of `key` was put at `lsn`. Before any reader can ask for that LSN.
    pub fn note_put(&self, key: &Key, lsn: Lsn) {
        match key.kind() {
            Some(KeyKind::RelationSize { .. }) => {
                let mut shard = self.shard(key).lock();
                shard.newest_put = shard.newest_put.max(lsn);
                shard.sizes.remove(key);
            }
            Some(KeyKind::Database { .. }) => {
                for shard in self.shards() {
                    let mut shard = shard.lock();
                    shard.newest_put = shard.newest_put.max(lsn);
                    shard.sizes.clear();
                }
            }
            _ => {}
        }
    }

    /// The size of `rel` at `lsn` (`None` within: it never had one), if it is known.
    pub fn get(&self, rel: RelFork, lsn: Lsn) -> Option<Option<Arc<LiveSize>>> {
        let key = Key::relation_size(rel);
        let shard = self.shards.get().map(|_| self.shard(&key))?.lock();
        let (since, size) = shard.sizes.get(&key)?;
        (*since <= lsn).then(|| size.clone())
    }

    /// Keeps what was read at `lsn`, if it is the newest. A size holds from its version on; absence, from where it was
    /// read.
    pub fn put(&self, rel: RelFork, lsn: Lsn, size: Option<Arc<LiveSize>>) {
        let key = Key::relation_size(rel);
        let mut shard = self.shard(&key).lock();
        if lsn < shard.newest_put {
            return;
        }
        if shard.sizes.len() >= SHARD_ENTRIES_MAX {
            shard.sizes.clear();
        }
        let since = size.as_ref().map_or(lsn, |size| size.version);
        shard.sizes.insert(key, (since, size));
    }

    /// Forgets everything, when the timeline is idle.
    pub fn clear(&self) {
        for shard in self.shards.get().into_iter().flat_map(|shards| shards.iter()) {
            shard.lock().sizes = HashMap::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::{Fork, RelNode};

    use super::*;
    use crate::relation_size::RelationSize;

    fn size(version: u64, blocks: u32) -> Option<Arc<LiveSize>> {
        let mut size = RelationSize::default();
        size.extend(blocks);
        Some(Arc::new(LiveSize { version: Lsn(version), size, database_floor: Lsn(0) }))
    }

    #[test]
    fn only_the_newest_size_is_kept_and_a_put_takes_it_out() {
        let cache = SizeCache::new(Lsn(40));
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
        let key = Key::relation_size(rel);
        assert_eq!(cache.get(rel, Lsn(100)), None);
        cache.put(rel, Lsn(39), size(30, 6));
        assert_eq!(cache.get(rel, Lsn(100)), None, "a read of what was the past already may not have seen the newest size");
        cache.put(rel, Lsn(100), size(50, 7));
        assert_eq!(cache.get(rel, Lsn(200)), Some(size(50, 7)));
        assert_eq!(cache.get(rel, Lsn(49)), None, "a read before the version goes the long way");
        cache.note_put(&key, Lsn(210));
        assert_eq!(cache.get(rel, Lsn(200)), None);
        cache.put(rel, Lsn(200), size(50, 7));
        assert_eq!(cache.get(rel, Lsn(210)), None, "what was read before a put is not kept");
        cache.put(rel, Lsn(210), size(210, 8));
        cache.note_put(&Key::database(1663, 5), Lsn(220));
        assert_eq!(cache.get(rel, Lsn(220)), None, "a dropped database takes all sizes with it");
        cache.put(rel, Lsn(220), None);
        assert_eq!(cache.get(rel, Lsn(230)), Some(None));
        assert_eq!(cache.get(rel, Lsn(219)), None, "absence holds from where it was read");
    }
}
