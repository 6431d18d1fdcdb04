//! Pages of one partition, and redo of what is done to them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use varve_postgres::wal::rmgr;
use varve_postgres::{BlockNumber, Fork, Major, Page, RelFork, page};
use varve_redo::change::{BlockRecord, Change};
use varve_redo::verify::BasePages;
use varve_redo::{apply, free_space_effect, free_space_map, restore_image};

use super::batch::{Batch, TRANSACTION_STATUS, Task, partition_of};
use super::page_table::{Notes, PageKey, PageTable, Place};
use crate::{DataDirectory, VerifyError};

/// Pages that are brought to the processor together, before they are changed.
const TOGETHER: usize = 32;

/// The pages of one partition.
#[derive(Debug)]
pub(super) struct Partition {
    pages: PageTable,
    /// Forks that were cut: what the base has behind that is no more.
    cut: HashMap<RelFork, BlockNumber>,
    base: Arc<DataDirectory>,
    pub(super) changes: u64,
}

impl Partition {
    pub(super) fn new(base: Arc<DataDirectory>, pages_max: usize) -> Partition {
        Partition { pages: PageTable::new(pages_max), cut: HashMap::new(), base, changes: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Pages of relations, free-space maps left out: those that the server kept before lie in its files, too.
    pub(super) fn pages(&self) -> impl Iterator<Item = (PageKey, &Page, u8)> {
        let of_relations = self.pages.iter().filter(|(key, ..)| key.rel != TRANSACTION_STATUS && key.rel.fork != Fork::FreeSpaceMap);
        of_relations.map(|(key, page, notes)| (key, page, notes.rmid))
    }

    /// Does what `batches`, which follow each other, have for partition `index`.
    pub(super) fn redo(&mut self, batches: &[Batch<'_>], index: usize) -> Result<(), VerifyError> {
        let mut queue = Queue::default();
        for batch in batches {
            for task in &batch.tasks[index] {
                match task {
                    Task::Change { block, change, .. } => self.enqueue(&mut queue, *block, !change.will_init(), task)?,
                    Task::Image { block, .. } => self.enqueue(&mut queue, *block, false, task)?,
                    Task::Cut { rel, blocks } => {
                        self.work_off(batch.major, &mut queue)?;
                        self.cut(*rel, *blocks);
                    }
                    Task::Reset { node } => {
                        self.work_off(batch.major, &mut queue)?;
                        Fork::ALL.into_iter().for_each(|fork| self.cut(node.fork(fork), 0));
                    }
                }
            }
        }
        self.work_off(self.base.major(), &mut queue)
    }

    /// Adds a task to those of its page.
    fn enqueue<'a, 'w>(&mut self, queue: &mut Queue<'a, 'w>, block: PageKey, of_base: bool, task: &'a Task<'w>) -> Result<(), VerifyError> {
        let place = self.place(block, of_base)?;
        let number = queue.tasks.len() as u32;
        queue.tasks.push((task, None));
        match self.pages.notes(place)?.last_task.replace(number) {
            Some(before) => queue.tasks[before as usize].1 = Some(number),
            None => queue.pages.push((place, number)),
        }
        Ok(())
    }

    /// Does what is queued, page by page: most of the time of redo goes into bringing pages to the processor, and so each comes once.
    fn work_off(&mut self, major: Major, queue: &mut Queue<'_, '_>) -> Result<(), VerifyError> {
        for pages in queue.pages.chunks(TOGETHER) {
            self.pages.touch(pages.iter().map(|(place, _)| *place));
            for (place, first) in pages {
                let (page, notes) = self.pages.at(*place)?;
                notes.last_task = None;
                let mut next = Some(*first);
                while let Some((task, then)) = next.and_then(|number| queue.tasks.get(number as usize)) {
                    redo_task(major, task, page, notes)?;
                    next = *then;
                }
            }
        }
        self.changes += queue.tasks.len() as u64;
        queue.tasks.clear();
        queue.pages.clear();
        Ok(())
    }

    /// The place of a block's page. If it is not known yet, it is as in the base, or anything if what it was does not matter.
    fn place(&mut self, key: PageKey, of_base: bool) -> Result<Place, VerifyError> {
        if let Some(place) = self.pages.place(key) {
            return Ok(place);
        }
        let PageKey { rel, blkno } = key;
        let is_kept = of_base && rel != TRANSACTION_STATUS && self.cut.get(&rel).is_none_or(|blocks| blkno < *blocks);
        let before = if is_kept { self.base.page(rel, blkno)? } else { None };
        let place = self.pages.insert(key)?;
        if of_base {
            *self.pages.at(place)?.0 = before.unwrap_or(page::ZERO_PAGE);
        }
        Ok(place)
    }

    fn cut(&mut self, rel: RelFork, blocks: BlockNumber) {
        self.pages.cut(rel, blocks);
        let known = self.cut.entry(rel).or_insert(blocks);
        *known = blocks.min(*known);
    }
}

/// Tasks by page.
#[derive(Default)]
struct Queue<'a, 'w> {
    /// Each with the next one of its page.
    tasks: Vec<(&'a Task<'w>, Option<u32>)>,
    /// Pages, each with its first task.
    pages: Vec<(Place, u32)>,
}

fn redo_task(major: Major, task: &Task<'_>, page: &mut Page, notes: &mut Notes) -> Result<(), VerifyError> {
    let space = match task {
        Task::Change { lsn, block, change } => {
            apply(major, *lsn, block.blkno, change, page)?;
            let Change::Record(record) = change else {
                notes.rmid = rmgr::HEAP2;
                return Ok(());
            };
            notes.rmid = record.rmid;
            free_space_effect(major, record, page, false)
        }
        Task::Image { record, index, .. } => {
            let block = record.blocks.get(*index).ok_or(VerifyError::Internal("an image is of a block"))?;
            restore_image(record, block, page)?;
            notes.rmid = record.header.rmid;
            free_space_effect(major, &BlockRecord::trim(record, block), page, true)
        }
        Task::Cut { .. } | Task::Reset { .. } => return Err(VerifyError::Internal("a page's task changes the page")),
    };
    if let Some(space) = space {
        notes.free_space = Some(free_space_map::category(space));
    }
    Ok(())
}

/// Puts what redo told of free space into the maps.
pub(super) fn record_free_space(partitions: &[Mutex<Partition>]) -> Result<(), VerifyError> {
    for partition in partitions {
        let known: Vec<(PageKey, u8)> =
            partition.lock().pages.iter().filter_map(|(key, _, notes)| Some((key, notes.free_space?))).collect();
        for (PageKey { rel, blkno }, category) in known {
            let (map_block, slot) = free_space_map::location(blkno);
            let map = PageKey { rel: rel.node.fork(Fork::FreeSpaceMap), blkno: map_block };
            let mut of_map = partitions[partition_of(map)].lock();
            let place = of_map.place(map, true)?;
            let (page, _) = of_map.pages.at(place)?;
            free_space_map::set(page, slot, category);
        }
    }
    Ok(())
}
