//! The block cache: contents of layer blocks, decompressed, and partitions of layer indexes, shared by all tenants,
//! bounded in bytes.
//!
//! A block is known by its layer and its offset. Layers never change, so nothing in the cache is ever wrong; what
//! belongs to a layer that is gone ages out.

use std::sync::Arc;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::ids::LayerId;
use crate::layer::index::Partition;

/// Bytes that an entry costs beside what is in it.
const ENTRY_BYTES: usize = 96;
/// Bytes of a usual entry: tells the cache how many to expect.
const USUAL_ENTRY_BYTES: usize = 16 << 10;

#[derive(Clone)]
enum Entry {
    Content(Bytes),
    Partition(Arc<Partition>),
}

#[derive(Clone)]
struct EntryWeighter;

impl Weighter<(LayerId, u64), Entry> for EntryWeighter {
    fn weight(&self, _key: &(LayerId, u64), entry: &Entry) -> u64 {
        let bytes = match entry {
            Entry::Content(content) => content.len(),
            Entry::Partition(partition) => partition.memory_bytes(),
        };
        (ENTRY_BYTES + bytes) as u64
    }
}

/// See the module's doc.
pub struct BlockCache {
    entries: Cache<(LayerId, u64), Entry, EntryWeighter>,
}

impl BlockCache {
    /// A cache of at most `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Arc<BlockCache> {
        let expected = (limit_bytes / USUAL_ENTRY_BYTES).max(16);
        Arc::new(BlockCache { entries: Cache::with_weighter(expected, limit_bytes as u64, EntryWeighter) })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.entries.weight()
    }

    /// Content of the data block of `layer` at `offset`.
    pub fn content(&self, layer: LayerId, offset: u64) -> Option<Bytes> {
        match self.entries.get(&(layer, offset))? {
            Entry::Content(content) => Some(content),
            Entry::Partition(_) => None,
        }
    }

    /// Keeps the content of a data block. It must not be a view into something much larger.
    pub fn put_content(&self, layer: LayerId, offset: u64, content: Bytes) {
        self.entries.insert((layer, offset), Entry::Content(content));
    }

    /// The index partition of `layer` at `offset`.
    pub fn partition(&self, layer: LayerId, offset: u64) -> Option<Arc<Partition>> {
        match self.entries.get(&(layer, offset))? {
            Entry::Partition(partition) => Some(partition),
            Entry::Content(_) => None,
        }
    }

    /// Keeps an index partition.
    pub fn put_partition(&self, layer: LayerId, offset: u64, partition: Arc<Partition>) {
        self.entries.insert((layer, offset), Entry::Partition(partition));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_its_bytes() {
        let cache = BlockCache::new(1 << 20);
        for offset in 0..1000 {
            cache.put_content(LayerId([1; 16]), offset, Bytes::from(vec![0; 16 << 10]));
        }
        assert!(cache.used_bytes() <= 1 << 20, "{} bytes", cache.used_bytes());
        assert!((0..1000).filter(|offset| cache.content(LayerId([1; 16]), *offset).is_some()).count() > 40, "most of the room is used");
        assert!(cache.partition(LayerId([1; 16]), 999).is_none());
    }
}
