//! Pages of one partition, and redo of what is done to them.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use prefetch_index::prefetch_index;
use varve_postgres::wal::rmgr;
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Page, RelFork, page};
use varve_redo::change::BlockRecord;
use varve_redo::verify::BasePages;
use varve_redo::{HeapLayout, NamedTuples, apply_loosely, apply_record_loosely, free_space_effect, free_space_map, restore_image};

use super::batch::{Batch, TRANSACTION_STATUS};
use super::page_table::{CACHE_LINE, Notes, PageKey, PageTable, Place};
use super::partitioning::Partitioning;
use super::task::{BlockTask, RareTask, Task};
use crate::{DataDirectory, VerifyError};

/// Pages that are brought to the processor together, before they are changed.
const TOGETHER: usize = 32;

/// So many tasks ahead it is looked up where the pages are.
const ENTRIES_AHEAD: usize = 8;
/// Lines of a tuple that are read ahead: of longer ones, the processor itself reads ahead.
const TUPLE_LINES_MAX: usize = 4;

/// Of so many tasks of a page are the tuples read ahead: with more, the page is at hand before long.
const TUPLES_AHEAD: usize = 8;

#[cold]
fn no_task() -> VerifyError {
    VerifyError::Internal("a rare task is there")
}
#[cold]
fn no_page() -> VerifyError {
    VerifyError::Internal("a page that tasks wait for is there")
}

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
    pub(super) fn new(partitioning: Partitioning, base: Arc<DataDirectory>, pages_max: usize) -> Partition {
        Partition { pages: PageTable::new(partitioning, pages_max), cut: HashMap::new(), base, changes: 0 }
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
            let tasks = &batch.tasks[index];
            for (number, task) in tasks.iter().enumerate() {
                if let Some(Task::Block(BlockTask { block, .. })) = tasks.get(number + ENTRIES_AHEAD) {
                    self.pages.prefetch_entry(*block);
                }
                let rare = match task {
                    Task::Block(task) => {
                        self.enqueue(&mut queue, task.block, !task.will_init, PageTask::Block(task))?;
                        task.prefetch();
                        continue;
                    }
                    Task::Rare(number) => batch.rare.get(*number as usize).ok_or_else(no_task)?,
                };
                match rare {
                    RareTask::Unnamed { block, .. } => self.enqueue(&mut queue, *block, true, PageTask::Rare(rare))?,
                    RareTask::Image { block, .. } => self.enqueue(&mut queue, *block, false, PageTask::Rare(rare))?,
                    RareTask::Cut { rel, blocks } => {
                        self.work_off(batch.major, &mut queue)?;
                        self.cut(*rel, *blocks);
                    }
                    RareTask::Reset { node } => {
                        self.work_off(batch.major, &mut queue)?;
                        Fork::ALL.into_iter().for_each(|fork| self.cut(node.fork(fork), 0));
                    }
                }
            }
        }
        self.work_off(self.base.major(), &mut queue)
    }

    /// Adds a task to those of its page.
    #[inline(always)]
    fn enqueue<'a, 'w>(
        &mut self,
        queue: &mut Queue<'a, 'w>,
        block: PageKey,
        of_base: bool,
        task: PageTask<'a, 'w>,
    ) -> Result<(), VerifyError> {
        queue.tasks.push((task, None));
        let number = NonZeroU32::new(queue.tasks.len() as u32);
        let entry = self.pages.entry(block);
        let before = std::mem::replace(&mut entry.last_task, number);
        let place = match entry.place() {
            Some(place) => place,
            None => self.take_in(block, of_base)?,
        };
        match before {
            Some(before) => queue.tasks[before.get() as usize - 1].1 = number,
            None => {
                queue.pages.push((block, number));
                self.pages.prefetch(place, task.tuples());
            }
        }
        Ok(())
    }

    /// Does what is queued, page by page: most of the time of redo goes into bringing pages to the processor, and so
    /// each comes once.
    fn work_off(&mut self, major: Major, queue: &mut Queue<'_, '_>) -> Result<(), VerifyError> {
        let mut together: Vec<(Place, TaskNumber)> = Vec::with_capacity(TOGETHER);
        for pages in queue.pages.chunks(TOGETHER) {
            together.clear();
            for (block, first) in pages {
                let entry = self.pages.entry(*block);
                entry.last_task = None;
                together.push((entry.place().ok_or_else(no_page)?, *first));
            }
            for (place, first) in &together {
                self.prefetch_tuples(*place, queue.of_page(*first));
            }
            for (place, first) in &together {
                let (page, notes) = self.pages.at(*place)?;
                for task in queue.of_page(*first) {
                    match task {
                        PageTask::Block(task) => {
                            let (lsn, blkno) = (task.lsn, task.block.blkno);
                            task.with_record(major, |record| redo(major, lsn, blkno, record, page, notes))?;
                        }
                        PageTask::Rare(task) => redo_rare(major, task, page, notes)?,
                    }
                }
            }
        }
        self.changes += queue.tasks.len() as u64;
        queue.tasks.clear();
        queue.pages.clear();
        Ok(())
    }

    /// Has the tuples that tasks of a page begin with brought to the processor, without waiting for them.
    fn prefetch_tuples<'t, 'w: 't>(&self, place: Place, tasks: impl Iterator<Item = PageTask<'t, 'w>>) {
        let Some((page, notes)) = self.pages.peek(place) else { return };
        let mut len = CACHE_LINE;
        for task in tasks.take(TUPLES_AHEAD) {
            if let PageTask::Block(task) = task
                && let Some(tuple) = task.tuples.changed(page)
            {
                len = tuple.len();
                prefetch_range(page, tuple);
            }
        }
        // The next tuple is likely to be as long as the one before.
        let next = notes.layout.next_place().map_or_else(|| usize::from(page::upper(page)).saturating_sub(len), usize::from);
        prefetch_range(page, next..next + len);
    }

    /// Makes each page what it is for others to see.
    pub(super) fn settle(&mut self) -> Result<(), VerifyError> {
        Ok(self.pages.settle()?)
    }

    /// Takes in the page of a block that is not there yet: it is as in the base, or anything if what it was does not
    /// matter.
    #[cold]
    fn take_in(&mut self, key: PageKey, of_base: bool) -> Result<Place, VerifyError> {
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
    tasks: Vec<(PageTask<'a, 'w>, TaskNumber)>,
    /// Blocks, each with its first task.
    pages: Vec<(PageKey, TaskNumber)>,
}

/// A task of one page.
#[derive(Clone, Copy)]
enum PageTask<'a, 'w> {
    Block(&'a BlockTask<'w>),
    Rare(&'a RareTask<'w>),
}

impl PageTask<'_, '_> {
    fn tuples(self) -> NamedTuples {
        if let PageTask::Block(task) = self { task.tuples } else { NamedTuples::default() }
    }
}

/// Number of a task in a queue, from 1; or that there is none.
type TaskNumber = Option<NonZeroU32>;

impl<'a, 'w> Queue<'a, 'w> {
    /// The tasks of the page whose first one this is.
    fn of_page(&self, first: TaskNumber) -> impl Iterator<Item = PageTask<'a, 'w>> {
        let numbered = |number: TaskNumber| number.and_then(|number| self.tasks.get(number.get() as usize - 1));
        std::iter::successors(numbered(first), move |(_, next)| numbered(*next)).map(|(task, _)| *task)
    }
}

/// Has a tuple's lines brought to the processor.
fn prefetch_range(page: &Page, range: Range<usize>) {
    range.step_by(CACHE_LINE).take(TUPLE_LINES_MAX).for_each(|at| prefetch_index(page, at));
}

#[inline(never)]
fn redo(
    major: Major,
    lsn: Lsn,
    blkno: BlockNumber,
    record: &BlockRecord<'_>,
    page: &mut Page,
    notes: &mut Notes,
) -> Result<(), VerifyError> {
    apply_record_loosely(major, lsn, blkno, record, page, &mut notes.layout)?;
    notes.rmid = record.rmid;
    note_free_space(notes, free_space_effect(major, record, page, false));
    Ok(())
}

#[cold]
fn redo_rare(major: Major, task: &RareTask<'_>, page: &mut Page, notes: &mut Notes) -> Result<(), VerifyError> {
    match task {
        RareTask::Unnamed { lsn, block, change } => {
            notes.rmid = rmgr::HEAP2;
            Ok(apply_loosely(major, *lsn, block.blkno, change, page, &mut notes.layout)?)
        }
        RareTask::Image { record, index, .. } => {
            let block = record.blocks.get(*index).ok_or(VerifyError::Internal("an image is of a block"))?;
            notes.layout = HeapLayout::default();
            restore_image(record, block, page)?;
            notes.rmid = record.header.rmid;
            note_free_space(notes, free_space_effect(major, &BlockRecord::trim(record, block), page, true));
            Ok(())
        }
        RareTask::Cut { .. } | RareTask::Reset { .. } => Err(VerifyError::Internal("a page's task changes the page")),
    }
}

fn note_free_space(notes: &mut Notes, space: Option<usize>) {
    if let Some(space) = space {
        notes.free_space = Some(free_space_map::category(space));
    }
}

/// Puts what redo told of free space into the maps.
pub(super) fn record_free_space(partitioning: Partitioning, partitions: &[Mutex<Partition>]) -> Result<(), VerifyError> {
    for partition in partitions {
        let known: Vec<(PageKey, u8)> =
            partition.lock().pages.iter().filter_map(|(key, _, notes)| Some((key, notes.free_space?))).collect();
        for (PageKey { rel, blkno }, category) in known {
            let (map_block, slot) = free_space_map::location(blkno);
            let map = PageKey { rel: rel.node.fork(Fork::FreeSpaceMap), blkno: map_block };
            let mut of_map = partitions[partitioning.partition_of(map)].lock();
            let place = match of_map.pages.entry(map).place() {
                Some(place) => place,
                None => of_map.take_in(map, true)?,
            };
            let (page, _) = of_map.pages.at(place)?;
            free_space_map::set(page, slot, category);
        }
    }
    Ok(())
}
