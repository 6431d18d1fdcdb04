//! Where pages are kept while WAL is redone: one partition's, by name, up to a number of pages, in memory that is given
//! again when a page is removed.

use std::collections::HashMap;
use std::num::NonZeroU32;

use memmap2::{Advice, MmapMut};
use prefetch_index::prefetch_index;
use varve_postgres::{BLCKSZ, BlockNumber, Page, RelFork};
use varve_redo::{HeapLayout, NamedTuples, RedoError};

use super::partitioning::Partitioning;
use crate::VerifyError;

/// Names a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageKey {
    pub(super) rel: RelFork,
    pub(super) blkno: BlockNumber,
}

/// What is known of a page. It lies in one line of a core's cache.
#[derive(Clone, Debug, Default)]
#[repr(align(64))]
pub(super) struct Notes {
    /// Where its tuples lie, for heap pages.
    pub(super) layout: HeapLayout,
    /// Resource manager of the last change.
    pub(super) rmid: u8,
    /// What redo told of its free space, in the map's categories; for heap pages.
    pub(super) free_space: Option<u8>,
}

#[cold]
fn no_place() -> VerifyError {
    VerifyError::Internal("a page's place exists")
}

/// Number of a page's place.
pub(super) type Place = u32;

/// Pages that memory is asked for at a time. Only what is touched is really taken.
const CHUNK_PAGES: usize = 8192;
/// Bytes that a processor reads from memory at once.
pub(super) const CACHE_LINE: usize = 64;
/// Up to here lie the header and the line pointers of most heap pages.
const LINE_POINTERS_SIZE: usize = 5 * CACHE_LINE;
/// Blocks of a fork whose places stand together.
const RUN_BLOCKS: usize = 1024;
/// Forks that are found without a hash.
const RECENT_FORKS: usize = 256;

/// Where the pages of one fork are.
#[derive(Debug)]
struct ForkPlaces {
    rel: RelFork,
    /// By [`Partitioning::slot_of`] the block.
    runs: Vec<Option<Run>>,
}

/// Entries of blocks that follow each other in a partition.
type Run = Box<[Entry; RUN_BLOCKS]>;

#[cold]
fn empty_run() -> Run {
    Box::new([Entry::default(); RUN_BLOCKS])
}

fn recent_fork_slot(rel: RelFork) -> usize {
    // Relations that are made together have numbers that follow each other.
    (rel.node.rel as usize + usize::from(rel.fork.number()) * (RECENT_FORKS / 4)) % RECENT_FORKS
}

impl ForkPlaces {
    #[inline]
    fn run(&mut self, number: usize) -> &mut Run {
        if self.runs.len() <= number {
            self.runs.resize_with(number + 1, || None);
        }
        self.runs[number].get_or_insert_with(empty_run)
    }
}

/// What is looked up of each block. It is small, so that many fit into a core's cache.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    /// Its page's place, plus one; none if it has no page.
    place: Option<NonZeroU32>,
    /// Number of the last task that waits for the page.
    pub(super) last_task: Option<NonZeroU32>,
}

impl Entry {
    /// Its page's place, if it has one.
    pub(super) fn place(self) -> Option<Place> {
        self.place.map(|number| number.get() - 1)
    }
}

/// Pages by name. A page's place stays the same until it is removed.
#[derive(Debug)]
pub(super) struct PageTable {
    partitioning: Partitioning,
    forks: Vec<ForkPlaces>,
    /// Where each fork stands in `forks`.
    fork_numbers: HashMap<RelFork, usize>,
    /// The same of some, by a few bits of their names.
    recent_forks: [usize; RECENT_FORKS],
    chunks: Vec<MmapMut>,
    /// The page at each place; none where it was removed.
    keys: Vec<Option<PageKey>>,
    notes: Vec<Notes>,
    free: Vec<Place>,
    pages_max: usize,
}

impl PageTable {
    pub(super) fn new(partitioning: Partitioning, pages_max: usize) -> PageTable {
        PageTable {
            partitioning,
            forks: Vec::new(),
            fork_numbers: HashMap::new(),
            recent_forks: [0; RECENT_FORKS],
            chunks: Vec::new(),
            keys: Vec::new(),
            notes: Vec::new(),
            free: Vec::new(),
            pages_max,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len() - self.free.len()
    }

    /// Where what is known of a fork stands, if it is among those that were asked for recently.
    #[inline]
    fn recent_fork(&self, rel: RelFork) -> Option<usize> {
        let recent = self.recent_forks[recent_fork_slot(rel)];
        self.forks.get(recent).is_some_and(|fork| fork.rel == rel).then_some(recent)
    }

    #[inline]
    fn fork(&mut self, rel: RelFork) -> &mut ForkPlaces {
        let number = self.recent_fork(rel).unwrap_or_else(|| self.find_fork(rel));
        &mut self.forks[number]
    }

    #[cold]
    fn find_fork(&mut self, rel: RelFork) -> usize {
        let number = *self.fork_numbers.entry(rel).or_insert(self.forks.len());
        if number == self.forks.len() {
            self.forks.push(ForkPlaces { rel, runs: Vec::new() });
        }
        self.recent_forks[recent_fork_slot(rel)] = number;
        number
    }

    /// The entry of a block, which may have no page.
    #[inline]
    pub(super) fn entry(&mut self, key: PageKey) -> &mut Entry {
        let slot = self.partitioning.slot_of(key.blkno);
        &mut self.fork(key.rel).run(slot / RUN_BLOCKS)[slot % RUN_BLOCKS]
    }

    /// Has the entry of a block brought to the processor, without waiting for it.
    #[inline]
    pub(super) fn prefetch_entry(&self, key: PageKey) {
        let slot = self.partitioning.slot_of(key.blkno);
        let run = self.recent_fork(key.rel).and_then(|fork| self.forks[fork].runs.get(slot / RUN_BLOCKS));
        if let Some(Some(run)) = run {
            prefetch_index(&run[..], slot % RUN_BLOCKS);
        }
    }

    /// A place for a page that has none; what is there is anything.
    pub(super) fn insert(&mut self, key: PageKey) -> Result<Place, VerifyError> {
        let place = match self.free.pop() {
            Some(place) => {
                *self.notes(place)? = Notes::default();
                place
            }
            None if self.notes.len() >= self.pages_max => {
                let what = format!(
                    "the WAL changes more than {} MB of pages: allow more",
                    (self.pages_max * self.partitioning.count() * BLCKSZ) >> 20
                );
                return Err(VerifyError::Store(varve_redo::verify::StoreError(what)));
            }
            None => {
                let place = self.notes.len();
                if place.is_multiple_of(CHUNK_PAGES) {
                    self.chunks.push(chunk()?);
                }
                self.keys.push(None);
                self.notes.push(Notes::default());
                place as Place
            }
        };
        self.keys[place as usize] = Some(key);
        self.entry(key).place = NonZeroU32::new(place + 1);
        Ok(place)
    }

    /// The page at a place that [`PageTable::place`] or [`PageTable::insert`] gave, and what is known of it.
    pub(super) fn at(&mut self, place: Place) -> Result<(&mut Page, &mut Notes), VerifyError> {
        let place = place as usize;
        let chunk = self.chunks.get_mut(place / CHUNK_PAGES).ok_or_else(no_place)?;
        let page = chunk.get_mut(place % CHUNK_PAGES * BLCKSZ..).and_then(<[u8]>::first_chunk_mut).ok_or_else(no_place)?;
        Ok((page, self.notes.get_mut(place).ok_or_else(no_place)?))
    }

    /// What is known of the page at a place.
    pub(super) fn notes(&mut self, place: Place) -> Result<&mut Notes, VerifyError> {
        self.notes.get_mut(place as usize).ok_or_else(no_place)
    }

    /// Has a page's header, what is known of it, and the line pointers of `tuples`, or most of them if none are named,
    /// brought to the processor, without waiting for them.
    #[inline]
    pub(super) fn prefetch(&self, place: Place, tuples: NamedTuples) {
        let place = place as usize;
        prefetch_index(&self.notes, place);
        if let Some(chunk) = self.chunks.get(place / CHUNK_PAGES) {
            let page = place % CHUNK_PAGES * BLCKSZ;
            prefetch_index(chunk, page);
            if tuples == NamedTuples::default() {
                (CACHE_LINE..LINE_POINTERS_SIZE).step_by(CACHE_LINE).for_each(|at| prefetch_index(chunk, page + at));
            } else {
                tuples.line_pointers().for_each(|at| prefetch_index(chunk, page + at));
            }
        }
    }

    /// A page, and what is known of it.
    pub(super) fn peek(&self, place: Place) -> Option<(&Page, &Notes)> {
        let place = place as usize;
        let page = self.chunks.get(place / CHUNK_PAGES)?.get(place % CHUNK_PAGES * BLCKSZ..)?.first_chunk()?;
        Some((page, self.notes.get(place)?))
    }

    /// Makes each page what it is for others to see.
    pub(super) fn settle(&mut self) -> Result<(), RedoError> {
        let pages = self.chunks.iter_mut().flat_map(|chunk| chunk.as_chunks_mut().0);
        for ((key, page), notes) in self.keys.iter().zip(pages).zip(&mut self.notes) {
            if let Some(key) = key {
                notes.layout.settle(page, key.blkno)?;
            }
        }
        Ok(())
    }

    /// Removes pages of `rel` from `blocks` on.
    pub(super) fn cut(&mut self, rel: RelFork, blocks: BlockNumber) {
        let mut runs = std::mem::take(&mut self.fork(rel).runs);
        for entry in runs.iter_mut().flatten().flat_map(|run| run.iter_mut()) {
            if let Some(place) = entry.place()
                && let Some(key) = self.keys.get_mut(place as usize)
                && key.is_none_or(|key| key.blkno >= blocks)
            {
                *key = None;
                *entry = Entry::default();
                self.free.push(place);
            }
        }
        for run in &mut runs {
            run.take_if(|run| run.iter().all(|entry| entry.place.is_none()));
        }
        self.fork(rel).runs = runs;
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PageKey, &Page, &Notes)> {
        self.keys.iter().zip(0..).filter_map(|(key, place)| {
            let (page, notes) = self.peek(place)?;
            Some(((*key)?, page, notes))
        })
    }
}

fn chunk() -> Result<MmapMut, VerifyError> {
    let no_memory = |error: std::io::Error| {
        let what = format!("no memory for {} MB of pages: {error}", (CHUNK_PAGES * BLCKSZ) >> 20);
        VerifyError::Store(varve_redo::verify::StoreError(what))
    };
    let chunk = MmapMut::map_anon(CHUNK_PAGES * BLCKSZ).map_err(no_memory)?;
    // Records jump between pages: with small memory pages, most of the time goes into finding them. A system that has
    // no large ones says so.
    let _ = chunk.advise(Advice::HugePage);
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use varve_postgres::{Fork, RelNode};

    use super::*;

    #[test]
    fn a_removed_page_s_place_is_given_again_and_others_stay() {
        let fork = |rel| RelNode { spc: 1663, db: 5, rel }.fork(Fork::Main);
        let key = |rel, blkno| PageKey { rel: fork(rel), blkno };
        let mut table = PageTable::new(Partitioning::MANY, 4);
        for (fill, key) in (1..).zip([key(7, 0), key(7, 1), key(8, 0), key(8, 1)]) {
            let place = table.insert(key).expect("a place");
            let (page, notes) = table.at(place).expect("the page");
            page.fill(fill);
            notes.free_space = Some(fill);
        }
        let told = table.insert(key(9, 0)).expect_err("more pages than are allowed").to_string();
        assert!(told.contains("allow more"), "{told}");

        table.cut(fork(9), 0);
        table.cut(fork(7), 1);
        assert_eq!((table.len(), table.entry(key(7, 1)).place()), (3, None), "one page is removed");
        let place = table.insert(key(9, 0)).expect("the place of the one that was removed");
        assert_eq!(table.notes(place).expect("notes").free_space, None, "what was known is of the page before");
        for (fill, key) in [(1, key(7, 0)), (3, key(8, 0)), (4, key(8, 1))] {
            let place = table.entry(key).place().expect("it stays");
            assert_eq!(table.at(place).expect("the page").0[..], [fill; BLCKSZ], "{key:?}");
        }
    }

    proptest! {
        #[test]
        fn pages_are_found_where_they_were_put(
            partitioning in prop::sample::select(vec![Partitioning::NONE, Partitioning::MANY]),
            steps in vec((0u32..40, prop_oneof![4 => 0u32..30, 1 => 0..u32::MAX / 16], prop::bool::weighted(0.1)), 1..300)) {
            let mut table = PageTable::new(partitioning, 1000);
            let mut model: HashMap<(u32, BlockNumber), Place> = HashMap::new();
            for (rel, number, is_cut) in steps {
                let fork = RelNode { spc: 1663, db: 5, rel }.fork(Fork::Main);
                // A table has the blocks of one partition.
                let partitioning = table.partitioning;
                let blkno = number / 8 * 8 * partitioning.count() as u32 + number % 8;
                let key = PageKey { rel: fork, blkno };
                let begin = PageKey { rel: fork, blkno: 0 };
                prop_assert_eq!((partitioning.partition_of(key), partitioning.slot_of(blkno)), (partitioning.partition_of(begin), number as usize));
                if is_cut {
                    table.cut(fork, blkno);
                    model.retain(|(other, block), _| *other != rel || *block < blkno);
                } else if let Some(place) = model.get(&(rel, blkno)) {
                    prop_assert_eq!(table.entry(key).place(), Some(*place));
                } else {
                    prop_assert_eq!(table.entry(key).place(), None);
                    let place = table.insert(key).expect("a place");
                    prop_assert!(model.values().all(|other| *other != place), "place {} is given twice", place);
                    model.insert((rel, blkno), place);
                }
                prop_assert_eq!(table.len(), model.len());
            }
            let mut found: Vec<(u32, BlockNumber)> = table.iter().map(|(key, ..)| (key.rel.node.rel, key.blkno)).collect();
            let mut expected: Vec<(u32, BlockNumber)> = model.keys().copied().collect();
            found.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
        }
    }
}
