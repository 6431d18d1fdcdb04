//! Upkeep of free-space maps, which have no WAL.
//!
//! Without it a server that starts anew finds no free space in its tables and extends them. Postgres's redo notes the
//! free space of heap pages that it fills, prunes or marks all-visible; ingest has no pages, so it collects the blocks
//! whose records may say something, and looks at the pages now and then: at each checkpoint (so also at a clean
//! shutdown), each report of running transactions, and when there are many. Then it sets the blocks' categories and,
//! unlike redo, what follows from them on the pages above, without which a search from the root finds nothing.
//!
//! The map is a hint: a block that is forgotten (the collection is bounded, and lost with the ingest) costs space,
//! never correctness.

use std::collections::{BTreeMap, BTreeSet};

use varve_postgres::page::ZERO_PAGE;
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Page, RelFork, RelNode, page};
use varve_redo::free_space_map::{self, SLOTS_PER_PAGE};
use varve_storage::history::HistoryError;
use varve_storage::key::Key;

use super::{Ingest, IngestError};

/// Blocks that are collected before they are looked at.
const BLOCKS_MAX: usize = 4096;
/// Pages with more free space than a fifth are not noted when they are filled.
const LOW_FREE_SPACE: usize = varve_postgres::BLCKSZ / 5;
/// Levels of map pages above the bottom.
const UPPER_LEVELS: u32 = 2;

/// Types (`XLOG_HEAP_OPMASK`) whose block 0 gets a tuple.
const HEAP_INSERT: u8 = 0x00;
const HEAP_UPDATE: u8 = 0x20;
const HEAP2_MULTI_INSERT: u8 = 0x50;
/// `XLOG_HEAP2_PRUNE`, `_VACUUM` and `_FREEZE_PAGE`, from 17 on all three of pruning.
const HEAP2_PRUNES: [u8; 3] = [0x10, 0x20, 0x30];
const HEAP2_VISIBLE: u8 = 0x40;
const OPMASK: u8 = 0x70;

/// Blocks whose free space may have changed.
#[derive(Debug, Default)]
pub(super) struct FreeSpaceUpkeep {
    /// Pages that tuples were removed from: noted whatever is free on them.
    freed: BTreeSet<(RelNode, BlockNumber)>,
    /// Pages that were filled: noted only when little is free.
    filled: BTreeSet<(RelNode, BlockNumber)>,
}

/// Where page `index` of those `level` levels above the bottom stands: right before the first page below it.
fn page_above(level: u32, index: u32) -> BlockNumber {
    let first_heap_block = SLOTS_PER_PAGE.pow(level).saturating_mul(SLOTS_PER_PAGE).saturating_mul(index);
    free_space_map::location(first_heap_block).0.saturating_sub(level)
}

/// The map's page `level` levels above that of heap block `heap_block`, and the slot there for the page below.
fn upper(heap_block: BlockNumber, level: u32) -> (BlockNumber, u32) {
    let below = heap_block / SLOTS_PER_PAGE.pow(level);
    (page_above(level, below / SLOTS_PER_PAGE), below % SLOTS_PER_PAGE)
}

/// Map pages of one relation as they are being changed.
struct MapPages {
    rel: RelFork,
    pages: BTreeMap<BlockNumber, (Box<Page>, bool)>,
}

impl MapPages {
    fn new(node: RelNode) -> MapPages {
        MapPages { rel: node.fork(Fork::FreeSpaceMap), pages: BTreeMap::new() }
    }

    fn change(&mut self, ingest: &mut Ingest, block: BlockNumber, change: impl FnOnce(&mut Page) -> bool) -> Result<u8, HistoryError> {
        let (page, changed) = match self.pages.entry(block) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert((ingest.applied_page(self.rel, block)?, false)),
        };
        *changed |= change(page);
        Ok(free_space_map::greatest(page))
    }

    /// Sets the category of a heap block and what follows from it above.
    fn set(&mut self, ingest: &mut Ingest, heap_block: BlockNumber, category: u8) -> Result<(), HistoryError> {
        let (block, slot) = free_space_map::location(heap_block);
        let greatest = self.change(ingest, block, |page| free_space_map::set(page, slot, category))?;
        self.set_upper(ingest, heap_block, greatest)
    }

    fn set_upper(&mut self, ingest: &mut Ingest, heap_block: BlockNumber, mut greatest: u8) -> Result<(), HistoryError> {
        for level in 1..=UPPER_LEVELS {
            let (block, slot) = upper(heap_block, level);
            greatest = self.change(ingest, block, |page| free_space_map::set(page, slot, greatest))?;
        }
        Ok(())
    }

    fn write(self, ingest: &mut Ingest, lsn: Lsn) -> Result<(), HistoryError> {
        for (block, (page, _)) in self.pages.iter().filter(|(_, (_, changed))| *changed) {
            ingest.extend(self.rel, block.saturating_add(1), lsn)?;
            ingest.put_page(Key::block(self.rel, *block), lsn, page)?;
        }
        Ok(())
    }
}

impl Ingest {
    /// Notes blocks of a heap record whose free space is to be looked at.
    pub(super) fn note_free_space(&mut self, record: &Record<'_>) -> Result<(), IngestError> {
        let kind = record.kind() & OPMASK;
        match record.header.rmid {
            rmgr::HEAP if kind == HEAP_INSERT || kind == HEAP_UPDATE => self.note_insert(record)?,
            rmgr::HEAP2 if kind == HEAP2_MULTI_INSERT => self.note_insert(record)?,
            rmgr::HEAP2 if HEAP2_PRUNES.contains(&kind) => self.note_freed(record, 0),
            rmgr::HEAP2 if kind == HEAP2_VISIBLE => self.note_freed(record, 1),
            _ => {}
        }
        if self.free_space.freed.len() + self.free_space.filled.len() >= BLOCKS_MAX {
            self.upkeep_free_space(record.end)?;
        }
        Ok(())
    }

    fn note_freed(&mut self, record: &Record<'_>, block_id: u8) {
        if let Some(block) = record.block(block_id).filter(|block| block.rel.fork == Fork::Main) {
            self.free_space.freed.insert((block.rel.node, block.blkno));
        }
    }

    /// Inserts fill one page after the other, so it is enough to look at a page when the next one is begun.
    fn note_insert(&mut self, record: &Record<'_>) -> Result<(), HistoryError> {
        let Some(block) = record.block(0).filter(|block| block.rel.fork == Fork::Main) else { return Ok(()) };
        let target = &mut self.size(block.rel)?.insert_target;
        let before = target.replace(block.blkno);
        if let Some(before) = before.filter(|before| *before != block.blkno) {
            self.free_space.filled.insert((block.rel.node, before));
        }
        Ok(())
    }

    /// Looks at the blocks that were collected and brings their maps up to date, with versions at `lsn`, the end of the
    /// record in hand.
    pub(super) fn upkeep_free_space(&mut self, lsn: Lsn) -> Result<(), IngestError> {
        let FreeSpaceUpkeep { freed, mut filled } = std::mem::take(&mut self.free_space);
        if freed.is_empty() && filled.is_empty() {
            return Ok(());
        }
        self.publish()?;
        filled.retain(|block| !freed.contains(block));
        let mut blocks: BTreeMap<RelNode, Vec<(BlockNumber, bool)>> = BTreeMap::new();
        for (node, block) in freed {
            blocks.entry(node).or_default().push((block, true));
        }
        for (node, block) in filled {
            blocks.entry(node).or_default().push((block, false));
        }
        for (node, blocks) in blocks {
            let mut map = MapPages::new(node);
            for (block, was_freed) in blocks {
                let size = &self.size(node.fork(Fork::Main))?.size;
                if !size.exists || block >= size.blocks {
                    continue; // dropped or cut meanwhile
                }
                let heap_page = self.applied_page(node.fork(Fork::Main), block)?;
                if page::is_new(&heap_page) {
                    continue;
                }
                let free = varve_redo::heap_free_space(&heap_page);
                if was_freed || free < LOW_FREE_SPACE {
                    map.set(self, block, free_space_map::category(free))?;
                }
            }
            map.write(self, lsn)?;
        }
        Ok(())
    }

    /// `FreeSpaceMapPrepareTruncateRel` and the vacuuming of the map after it: forgets heap blocks from `heap_blocks`
    /// on. Gives the blocks that the map is to be cut to, if it has more.
    pub(super) fn cut_free_space_map(&mut self, node: RelNode, heap_blocks: BlockNumber, lsn: Lsn) -> Result<Option<u32>, IngestError> {
        self.free_space.freed.retain(|(have, block)| *have != node || *block < heap_blocks);
        self.free_space.filled.retain(|(have, block)| *have != node || *block < heap_blocks);
        let rel = node.fork(Fork::FreeSpaceMap);
        let size = &self.size(rel)?.size;
        let (page, slot) = free_space_map::location(heap_blocks);
        let keep = if slot == 0 { page } else { page + 1 };
        if !size.exists || size.blocks <= page {
            return Ok(None);
        }
        self.publish()?;
        let mut map = MapPages::new(node);
        if slot > 0 {
            let greatest = map.change(self, page, |page| free_space_map::truncate(page, slot))?;
            map.set_upper(self, heap_blocks, greatest)?;
        }
        // Slots above that stand for pages which are gone.
        let mut kept = heap_blocks;
        for level in 1..=UPPER_LEVELS {
            kept = kept.div_ceil(SLOTS_PER_PAGE);
            let (index, slot) = (kept / SLOTS_PER_PAGE, kept % SLOTS_PER_PAGE);
            if slot == 0 && kept > 0 {
                continue; // a page that stays whole, and behind it only pages that are cut off
            }
            let greatest = map.change(self, page_above(level, index), |page| free_space_map::truncate(page, slot))?;
            if level < UPPER_LEVELS {
                map.change(self, page_above(level + 1, index / SLOTS_PER_PAGE), |page| {
                    free_space_map::set(page, index % SLOTS_PER_PAGE, greatest)
                })?;
            }
        }
        map.write(self, lsn)?;
        Ok(Some(keep))
    }

    /// A block as of what is applied, zeros if it has never been written.
    fn applied_page(&mut self, rel: RelFork, block: BlockNumber) -> Result<Box<Page>, HistoryError> {
        let at = self.applied;
        let live = varve_storage::relation::live_size(&*self.history, rel, at)?.filter(|live| live.size.exists && block < live.size.blocks);
        let page = match live {
            Some(live) => self.history.page(Key::block(rel, block), live.floor(block), at)?,
            None => None,
        };
        Ok(page.unwrap_or_else(|| Box::new(ZERO_PAGE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_above_are_where_postgres_puts_them() {
        let s = SLOTS_PER_PAGE;
        assert_eq!((upper(0, 1), upper(0, 2)), ((1, 0), (0, 0)));
        assert_eq!(upper(s, 1), (1, 1), "the second bottom page's slot");
        assert_eq!(upper(s * s, 1), (s + 2, 0), "the second middle page comes after the first one's bottom pages");
        assert_eq!(upper(s * s, 2), (0, 1));
    }
}
