//! Upkeep of free-space maps, which have no WAL.
//!
//! Without it a server that starts anew finds no free space in its tables and extends them. Postgres's redo notes the
//! free space of heap pages that it fills, prunes or marks all-visible; ingest has no pages, so it writes down which
//! blocks such a record was about ([`varve_storage::free_space`]: whoever reads the map looks at those). Now and then
//! it looks at them itself and writes the map's pages, with what follows on the pages above: at each checkpoint (so
//! also at a clean shutdown), each report of running transactions, and when there are many.
//!
//! What is noted at a record depends on the records up to it and on nothing else: not on batches, and not on where an
//! ingest began, since it reads what its predecessor, or the ancestor, had noted.

use std::collections::{BTreeMap, HashMap};

use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, Page, RelFork, RelNode};
use varve_redo::free_space_map::{self, SLOTS_PER_PAGE};
use varve_storage::free_space::{self, Notes, Slots};
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::key_hash::BuildKeyHasher;
use varve_storage::relation;
use varve_storage::value::Value;

use super::{Ingest, IngestError};

/// Blocks that are noted before they are looked at. It bounds what a reader of a map has to look at, too.
const BLOCKS_MAX: usize = 4096;
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

/// Blocks whose free space may have changed since the maps were brought up to date.
#[derive(Debug, Default)]
pub(super) struct FreeSpaceUpkeep {
    /// By their keys.
    notes: HashMap<Key, NotesInHand, BuildKeyHasher>,
    /// Keys of those that are to be written when the batch ends.
    unwritten: Vec<Key>,
    /// Blocks in all of them.
    blocks: usize,
    /// The block that was noted last: most records are about the same one as the record before.
    last: Option<(RelNode, BlockNumber)>,
}

#[derive(Debug, Default)]
struct NotesInHand {
    notes: Notes,
    /// End of the first record since the last batch that changed them, if one did.
    write_at: Option<Lsn>,
}

impl FreeSpaceUpkeep {
    /// What is noted at `at`.
    pub(super) fn open(history: &(impl History + ?Sized), at: Lsn) -> Result<FreeSpaceUpkeep, HistoryError> {
        let noted = free_space::all_notes(history, at)?;
        let blocks = noted.iter().map(|(_, slots)| slots.len()).sum();
        let notes = noted.into_iter().map(|(key, slots)| (key, NotesInHand { notes: slots.into(), write_at: None })).collect();
        Ok(FreeSpaceUpkeep { notes, unwritten: Vec::new(), blocks, last: None })
    }

    /// Notes a block, by the record that ends at `lsn`. Whether it was not noted yet.
    fn note(&mut self, node: RelNode, block: BlockNumber, lsn: Lsn) -> bool {
        self.last = Some((node, block));
        let key = Key::free_space_notes(node, block / SLOTS_PER_PAGE);
        let in_hand = self.notes.entry(key).or_default();
        if !in_hand.notes.note(block % SLOTS_PER_PAGE, lsn) {
            return false;
        }
        self.blocks += 1;
        if in_hand.write_at.is_none() {
            in_hand.write_at = Some(lsn);
            self.unwritten.push(key);
        }
        true
    }

    /// Forgets, by the record that ends at `lsn`, the slots of each page of notes from the one on that `from` says. All
    /// that was noted is written.
    fn forget(&mut self, lsn: Lsn, from: impl Fn(RelNode, u32) -> Option<u32>) {
        self.last = None;
        for (key, in_hand) in &mut self.notes {
            let Some(KeyKind::FreeSpaceNotes { node, map_page }) = key.kind() else { continue };
            let Some(gone) = from(node, map_page).map(|slot| in_hand.notes.cut(slot)).filter(|gone| *gone > 0) else { continue };
            self.blocks -= gone;
            in_hand.write_at = Some(lsn);
            self.unwritten.push(*key);
        }
    }

    /// Ends the batch: calls `put` for all that is to be written.
    pub(super) fn end_batch(&mut self, mut put: impl FnMut(Key, Lsn, Value) -> Result<(), HistoryError>) -> Result<(), HistoryError> {
        for key in self.unwritten.drain(..) {
            let Some(in_hand) = self.notes.get_mut(&key) else { continue };
            let Some(lsn) = in_hand.write_at.take() else { continue };
            if in_hand.notes.noted().is_empty() {
                self.notes.remove(&key);
                put(key, lsn, Value::Absent)?;
            } else {
                put(key, lsn, Value::Image(in_hand.notes.encode()))?;
                in_hand.notes.end_batch();
            }
        }
        Ok(())
    }
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
            std::collections::btree_map::Entry::Vacant(entry) => {
                let page = free_space::written(&*ingest.history, self.rel.node, block, ingest.applied)?;
                entry.insert((page, false))
            }
        };
        *changed |= change(page);
        Ok(free_space_map::greatest(page))
    }

    /// Looks at heap blocks that stand on the bottom page `number`, as of what is applied; sets their categories and
    /// what follows from them above.
    fn look_at_heap(&mut self, ingest: &mut Ingest, number: u32, slots: &Slots) -> Result<(), HistoryError> {
        let (history, at, node) = (ingest.history.clone(), ingest.applied, self.rel.node);
        let Some(heap) = relation::live_size(&*history, node.fork(Fork::Main), at)?.filter(|live| live.size.exists) else { return Ok(()) };
        let mut looked = Ok(false);
        let first = number * SLOTS_PER_PAGE;
        let greatest = self.change(ingest, free_space_map::location(first).0, |page| {
            looked = free_space::look_at_heap(&*history, node, &heap, number, slots, at, page);
            looked.as_ref().is_ok_and(|changed| *changed)
        })?;
        if looked? { self.set_upper(ingest, first, greatest) } else { Ok(()) }
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
    /// Notes the block of a heap record whose free space it may have changed.
    pub(super) fn note_free_space(&mut self, record: &Record<'_>) -> Result<(), IngestError> {
        let kind = record.kind() & OPMASK;
        let (block_id, is_freed) = match record.header.rmid {
            rmgr::HEAP if kind == HEAP_INSERT || kind == HEAP_UPDATE => (0, false),
            rmgr::HEAP2 if kind == HEAP2_MULTI_INSERT => (0, false),
            rmgr::HEAP2 if HEAP2_PRUNES.contains(&kind) => (0, true),
            rmgr::HEAP2 if kind == HEAP2_VISIBLE => (1, true),
            _ => return Ok(()),
        };
        let Some(block) = record.block(block_id).filter(|block| block.rel.fork == Fork::Main) else { return Ok(()) };
        let (node, number) = (block.rel.node, block.blkno);
        // A table of one page that was only filled needs no map.
        let needs_map = is_freed || number > 0;
        if self.free_space.last == Some((node, number)) && (number > 0 || !is_freed) {
            return Ok(());
        }
        if self.free_space.blocks >= BLOCKS_MAX {
            self.upkeep_free_space(record.end)?;
        }
        let is_new = self.free_space.note(node, number, record.end);
        if needs_map && (is_new || number == 0) {
            self.extend(node.fork(Fork::FreeSpaceMap), free_space_map::location(number).0.saturating_add(1), record.end)?;
        }
        Ok(())
    }

    /// Looks at the blocks that were noted and brings their maps up to date, with versions at `lsn`, the end of the
    /// record in hand, which has noted nothing yet.
    pub(super) fn upkeep_free_space(&mut self, lsn: Lsn) -> Result<(), IngestError> {
        if self.free_space.blocks == 0 {
            return Ok(());
        }
        self.publish()?;
        let mut noted: BTreeMap<RelNode, Vec<(u32, Slots)>> = BTreeMap::new();
        for (key, in_hand) in &self.free_space.notes {
            if let Some(KeyKind::FreeSpaceNotes { node, map_page }) = key.kind() {
                noted.entry(node).or_default().push((map_page, in_hand.notes.noted().clone()));
            }
        }
        for (node, pages) in noted {
            if !self.size(node.fork(Fork::FreeSpaceMap))?.exists {
                continue;
            }
            let mut map = MapPages::new(node);
            for (number, slots) in pages {
                map.look_at_heap(self, number, &slots)?;
            }
            map.write(self, lsn)?;
        }
        Ok(self.forget_notes(lsn, |_, _| Some(0))?)
    }

    /// Writes what was noted since it was written last. Readers see it with the records that noted it.
    pub(super) fn write_free_space_notes(&mut self) -> Result<(), HistoryError> {
        let history = &self.history;
        self.free_space.end_batch(|key, lsn, value| history.put(key, lsn, value))
    }

    /// Forgets what was noted of a relation that is dropped by the record that ends at `lsn`.
    pub(super) fn forget_free_space(&mut self, node: RelNode, lsn: Lsn) -> Result<(), HistoryError> {
        self.forget_notes(lsn, |have, _| (have == node).then_some(0))
    }

    /// Forgets what was noted of a database's relations in a tablespace, which go by the record that ends at `lsn`.
    pub(super) fn forget_free_space_of(&mut self, spc: Oid, db: Oid, lsn: Lsn) -> Result<(), HistoryError> {
        self.forget_notes(lsn, |have, _| ((have.spc, have.db) == (spc, db)).then_some(0))
    }

    fn forget_notes(&mut self, lsn: Lsn, from: impl Fn(RelNode, u32) -> Option<u32>) -> Result<(), HistoryError> {
        if self.free_space.blocks > 0 {
            // What was noted before is so for whoever reads before.
            self.write_free_space_notes()?;
            self.free_space.forget(lsn, from);
        }
        Ok(())
    }

    /// `FreeSpaceMapPrepareTruncateRel` and the vacuuming of the map after it: forgets heap blocks from `heap_blocks`
    /// on. Gives the blocks that the map is to be cut to, if it has more.
    pub(super) fn cut_free_space_map(&mut self, node: RelNode, heap_blocks: BlockNumber, lsn: Lsn) -> Result<Option<u32>, IngestError> {
        self.forget_notes(lsn, |have, map_page| {
            let kept = heap_blocks.saturating_sub(map_page.saturating_mul(SLOTS_PER_PAGE));
            (have == node).then_some(kept.min(SLOTS_PER_PAGE))
        })?;
        let rel = node.fork(Fork::FreeSpaceMap);
        let size = self.size(rel)?;
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
