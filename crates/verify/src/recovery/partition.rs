//! Pages of one partition, and redo of what is done to them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use parking_lot::Mutex;
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Major, Page, RelFork, page};
use varve_redo::change::{BlockRecord, Change};
use varve_redo::verify::BasePages;
use varve_redo::{apply, free_space_effect, free_space_map, restore_image};

use super::batch::{Batch, TRANSACTION_STATUS, Task, partition_of};
use crate::{DataDirectory, VerifyError};

/// Hashes small keys of numbers fast; nobody chooses these keys to make it slow.
#[derive(Debug, Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
}

#[derive(Debug)]
struct Kept {
    page: Box<Page>,
    rmid: u8,
}

/// Free space to record in a map, which another partition may have.
#[derive(Debug)]
struct FreeSpace {
    lsn: Lsn,
    rel: RelFork,
    heap_block: BlockNumber,
    category: u8,
}

/// The pages of one partition.
#[derive(Debug)]
pub(super) struct Partition {
    pages: HashMap<(RelFork, BlockNumber), Kept, BuildHasherDefault<NumberHasher>>,
    /// Forks that were cut: what the base has behind that is no more.
    cut: HashMap<RelFork, BlockNumber>,
    base: Arc<DataDirectory>,
    pages_max: usize,
    free_space: Vec<FreeSpace>,
    pub(super) changes: u64,
}

impl Partition {
    pub(super) fn new(base: Arc<DataDirectory>, pages_max: usize) -> Partition {
        Partition { pages: HashMap::default(), cut: HashMap::new(), base, pages_max, free_space: Vec::new(), changes: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Pages of relations, free-space maps left out: those that the server kept before lie in its files, too.
    pub(super) fn pages(&self) -> impl Iterator<Item = (RelFork, BlockNumber, &Page, u8)> {
        let of_relations = self.pages.iter().filter(|((rel, _), _)| *rel != TRANSACTION_STATUS && rel.fork != Fork::FreeSpaceMap);
        of_relations.map(|((rel, blkno), kept)| (*rel, *blkno, &*kept.page, kept.rmid))
    }

    /// Does what `batch` has for partition `index`.
    pub(super) fn redo(&mut self, batch: &Batch, index: usize) -> Result<(), VerifyError> {
        for task in &batch.tasks[index] {
            match task {
                Task::Change { lsn, rel, blkno, change } => self.change(batch.major, *lsn, *rel, *blkno, change)?,
                Task::Image { record, index } => self.image(batch.major, record, *index)?,
                Task::Cut { rel, blocks } => self.cut(*rel, *blocks),
                Task::Reset { node } => Fork::ALL.into_iter().for_each(|fork| self.cut(node.fork(fork), 0)),
            }
        }
        Ok(())
    }

    fn change(&mut self, major: Major, lsn: Lsn, rel: RelFork, blkno: BlockNumber, change: &Change) -> Result<(), VerifyError> {
        let kept = self.page(rel, blkno, !change.will_init())?;
        apply(major, lsn, blkno, change, &mut kept.page)?;
        kept.rmid = match change {
            Change::Record(record) => record.rmid,
            _ => rmgr::HEAP2,
        };
        let space = match change {
            Change::Record(record) => free_space_effect(major, record, &kept.page, false),
            _ => None,
        };
        self.changes += 1;
        if let Some(space) = space {
            self.learn_free_space(lsn, rel, blkno, space);
        }
        Ok(())
    }

    fn image(&mut self, major: Major, record: &Record, index: usize) -> Result<(), VerifyError> {
        let Some(block) = record.blocks.get(index) else { return Err(VerifyError::Internal("an image is of a block")) };
        let page = restore_image(record, block)?;
        let space = free_space_effect(major, &BlockRecord::trim(record, block), &page, true);
        let kept = self.page(block.rel, block.blkno, false)?;
        *kept.page = page;
        kept.rmid = record.header.rmid;
        self.changes += 1;
        if let Some(space) = space {
            self.learn_free_space(record.end, block.rel, block.blkno, space);
        }
        Ok(())
    }

    fn learn_free_space(&mut self, lsn: Lsn, rel: RelFork, heap_block: BlockNumber, space: usize) {
        let category = free_space_map::category(space);
        self.free_space.push(FreeSpace { lsn, rel: rel.node.fork(Fork::FreeSpaceMap), heap_block, category });
    }

    /// The block's page; if it is not known yet, as it is in the base, or empty if what it was does not matter.
    fn page(&mut self, rel: RelFork, blkno: BlockNumber, of_base: bool) -> Result<&mut Kept, VerifyError> {
        let full = self.pages.len() >= self.pages_max;
        match self.pages.entry((rel, blkno)) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(_) if full => {
                let what =
                    format!("the WAL changes more than {} MB of pages: allow more", (self.pages_max * super::PARTITIONS * BLCKSZ) >> 20);
                Err(VerifyError::Store(varve_redo::verify::StoreError(what)))
            }
            Entry::Vacant(entry) => {
                let mut page = Box::new(page::ZERO_PAGE);
                if of_base
                    && rel != TRANSACTION_STATUS
                    && self.cut.get(&rel).is_none_or(|blocks| blkno < *blocks)
                    && let Some(before) = self.base.page(rel, blkno)?
                {
                    *page = before;
                }
                Ok(entry.insert(Kept { page, rmid: rmgr::XLOG }))
            }
        }
    }

    fn cut(&mut self, rel: RelFork, blocks: BlockNumber) {
        self.pages.retain(|(other, blkno), _| *other != rel || *blkno < blocks);
        let known = self.cut.entry(rel).or_insert(blocks);
        *known = blocks.min(*known);
    }

    fn set_free_space(&mut self, rel: RelFork, blkno: BlockNumber, slot: u32, category: u8) -> Result<(), VerifyError> {
        let kept = self.page(rel, blkno, true)?;
        free_space_map::set(&mut kept.page, slot, category);
        Ok(())
    }
}

/// Puts what all partitions learned of free space into the maps, in the order of the WAL.
pub(super) fn record_free_space(partitions: &[Mutex<Partition>]) -> Result<(), VerifyError> {
    let mut learned: Vec<FreeSpace> = partitions.iter().flat_map(|partition| std::mem::take(&mut partition.lock().free_space)).collect();
    learned.sort_by_key(|free_space| free_space.lsn);
    for FreeSpace { rel, heap_block, category, .. } in learned {
        let (blkno, slot) = free_space_map::location(heap_block);
        partitions[partition_of(rel, blkno)].lock().set_free_space(rel, blkno, slot, category)?;
    }
    Ok(())
}
