//! Sizes of relation forks at the newest LSN, and the records that make, cut and drop forks.

use std::collections::HashMap;

use varve_postgres::wal::Record;
use varve_postgres::wal::records::storage::StorageRecord;
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, RelFork, RelNode};
use varve_redo::change::Change;
use varve_redo::visibility_map::HEAP_BLOCKS_PER_PAGE;
use varve_storage::history::{History, HistoryError};
use varve_storage::key::Key;
use varve_storage::key_hash::BuildKeyHasher;
use varve_storage::relation::live_size;
use varve_storage::relation_size::RelationSize;
use varve_storage::value::Value;

use super::{Ingest, IngestError};

/// Forks whose sizes are kept; beyond it the cache starts anew.
const FORKS_MAX: usize = 200_000;

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct IngestSizes {
    /// By the fork's size key; written or not.
    forks: HashMap<Key, RelationSize, BuildKeyHasher>,
}

impl IngestSizes {
    /// The fork's size. Nothing that is written and not yet applied is ever missing here, so what is missing can be
    /// read at `applied`.
    pub(super) fn get(&mut self, history: &(impl History + ?Sized), rel: RelFork, applied: Lsn) -> Result<&mut RelationSize, HistoryError> {
        match self.forks.entry(Key::relation_size(rel)) {
            std::collections::hash_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let size = live_size(history, rel, applied)?.map(|live| live.size).unwrap_or_default();
                Ok(entry.insert(size))
            }
        }
    }

    /// Forgets a database's forks in a tablespace: their sizes changed behind the cache.
    pub(super) fn forget(&mut self, spc: Oid, db: Oid) {
        let (from, to) = Key::relation_sizes_of(spc, db);
        self.forks.retain(|key, _| *key < from || *key >= to);
    }

    /// Keeps the cache within its bound; called when everything is applied.
    pub(super) fn shrink(&mut self) {
        if self.forks.len() > FORKS_MAX {
            self.forks = HashMap::default();
        }
    }
}

impl Ingest {
    /// The fork's size at the newest LSN.
    pub(super) fn size(&mut self, rel: RelFork) -> Result<&mut RelationSize, HistoryError> {
        self.sizes.get(&*self.history, rel, self.applied)
    }

    /// Makes sure that the fork has `blocks` blocks.
    pub(super) fn extend(&mut self, rel: RelFork, blocks: u32, lsn: Lsn) -> Result<(), HistoryError> {
        let size = self.sizes.get(&*self.history, rel, self.applied)?;
        let existed = size.exists;
        if size.extend(blocks) {
            self.history.put(Key::relation_size(rel), lsn, Value::Image(size.encode()))?;
            if !existed {
                self.note_directory(rel.node, lsn)?;
            }
        }
        Ok(())
    }

    /// Cuts the fork to `blocks` blocks, if it has more.
    fn cut(&mut self, rel: RelFork, blocks: u32, lsn: Lsn) -> Result<(), HistoryError> {
        let size = self.sizes.get(&*self.history, rel, self.applied)?;
        if size.exists && size.blocks > blocks {
            size.truncate(lsn, blocks);
            self.history.put(Key::relation_size(rel), lsn, Value::Image(size.encode()))?;
        }
        Ok(())
    }

    /// Drops all forks of a relation.
    pub(super) fn drop_relation(&mut self, node: RelNode, lsn: Lsn) -> Result<(), HistoryError> {
        self.forget_free_space(node, lsn)?;
        for fork in Fork::ALL {
            let rel = node.fork(fork);
            let size = self.sizes.get(&*self.history, rel, self.applied)?;
            if size.exists {
                size.remove(lsn);
                self.history.put(Key::relation_size(rel), lsn, Value::Image(size.encode()))?;
            }
        }
        Ok(())
    }

    pub(super) fn ingest_storage(&mut self, record: &Record<'_>, parsed: StorageRecord) -> Result<(), IngestError> {
        let lsn = record.end;
        match parsed {
            StorageRecord::Create { rel } => self.extend(rel, 0, lsn)?,
            StorageRecord::Truncate { node, blocks, main, visibility_map, free_space_map } => {
                if main {
                    // Redo makes the relation if need be, so that it can be cut.
                    self.extend(node.fork(Fork::Main), 0, lsn)?;
                    self.cut(node.fork(Fork::Main), blocks, lsn)?;
                }
                if visibility_map {
                    self.cut_visibility_map(node, blocks, lsn)?;
                }
                if free_space_map {
                    let map = node.fork(Fork::FreeSpaceMap);
                    if let Some(map_blocks) = self.cut_free_space_map(node, blocks, lsn)? {
                        self.cut(map, map_blocks, lsn)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// `visibilitymap_prepare_truncate`.
    fn cut_visibility_map(&mut self, node: RelNode, heap_blocks: BlockNumber, lsn: Lsn) -> Result<(), HistoryError> {
        let map = node.fork(Fork::VisibilityMap);
        let size = self.size(map)?;
        let (page, is_whole) = (heap_blocks / HEAP_BLOCKS_PER_PAGE, heap_blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE));
        if !size.exists || size.blocks <= page {
            return Ok(());
        }
        if is_whole {
            return self.cut(map, page, lsn);
        }
        let change = Change::TruncateVisibility { heap_blocks };
        self.put(Key::block(map, page), lsn, Value::Change { will_init: false, bytes: change.encode() })?;
        self.cut(map, page + 1, lsn)
    }
}
