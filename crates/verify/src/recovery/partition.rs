//! Pages of one partition, and redo of what is done to them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use parking_lot::Mutex;
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Page, RelFork, page};
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
                Task::Block { record, index } => self.block(batch, &batch.records[*record as usize], *index)?,
                Task::Change { lsn, rel, blkno, change } => {
                    let kept = self.page(*rel, *blkno)?;
                    kept.rmid = rmgr::HEAP2;
                    apply(batch.major, *lsn, *blkno, change, &mut kept.page)?;
                    self.changes += 1;
                }
                Task::Cut { rel, blocks } => self.cut(*rel, *blocks),
                Task::Reset { node } => Fork::ALL.into_iter().for_each(|fork| self.cut(node.fork(fork), 0)),
            }
        }
        Ok(())
    }

    fn block(&mut self, batch: &Batch, record: &Record, index: u8) -> Result<(), VerifyError> {
        let block = &record.blocks[usize::from(index)];
        let restored = block.image.as_ref().is_some_and(|image| image.apply);
        let trimmed = BlockRecord::trim(record, block);
        let kept = if restored || block.will_init { self.room(block.rel, block.blkno)? } else { self.page(block.rel, block.blkno)? };
        kept.rmid = record.header.rmid;
        let change = Change::Record(trimmed);
        if restored {
            kept.page.copy_from_slice(&restore_image(record, block)?);
        } else {
            apply(batch.major, record.end, block.blkno, &change, &mut kept.page)?;
        }
        let Change::Record(trimmed) = change else { return Err(VerifyError::Internal("a record is a record")) };
        if let Some(space) = free_space_effect(batch.major, &trimmed, &kept.page, restored) {
            let rel = block.rel.node.fork(Fork::FreeSpaceMap);
            let category = free_space_map::category(space);
            self.free_space.push(FreeSpace { lsn: record.end, rel, heap_block: block.blkno, category });
        }
        self.changes += 1;
        Ok(())
    }

    /// The block's page, whatever it is before.
    fn room(&mut self, rel: RelFork, blkno: BlockNumber) -> Result<&mut Kept, VerifyError> {
        if self.pages.len() >= self.pages_max && !self.pages.contains_key(&(rel, blkno)) {
            let what = format!("the WAL changes more than {} MB of pages: allow more", (self.pages_max * super::PARTITIONS * BLCKSZ) >> 20);
            return Err(VerifyError::Store(varve_redo::verify::StoreError(what)));
        }
        Ok(self.pages.entry((rel, blkno)).or_insert_with(|| Kept { page: Box::new(page::ZERO_PAGE), rmid: rmgr::XLOG }))
    }

    /// The block's page as it is before a change.
    fn page(&mut self, rel: RelFork, blkno: BlockNumber) -> Result<&mut Kept, VerifyError> {
        if !self.pages.contains_key(&(rel, blkno)) {
            let there = rel != TRANSACTION_STATUS && self.cut.get(&rel).is_none_or(|blocks| blkno < *blocks);
            let before = if there { self.base.page(rel, blkno)? } else { None };
            *self.room(rel, blkno)?.page = before.unwrap_or(page::ZERO_PAGE);
        }
        self.room(rel, blkno)
    }

    fn cut(&mut self, rel: RelFork, blocks: BlockNumber) {
        self.pages.retain(|(other, blkno), _| *other != rel || *blkno < blocks);
        let known = self.cut.entry(rel).or_insert(blocks);
        *known = blocks.min(*known);
    }

    fn set_free_space(&mut self, rel: RelFork, blkno: BlockNumber, slot: u32, category: u8) -> Result<(), VerifyError> {
        let kept = self.page(rel, blkno)?;
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
