//! Where pages are kept while WAL is redone: one partition's, by name, up to a number of pages, in memory that is given again when a page is
//! removed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::hint::black_box;

use memmap2::{Advice, MmapMut};
use varve_postgres::{BLCKSZ, BlockNumber, Page, RelFork, page};

use crate::VerifyError;

/// Names a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageKey {
    pub(super) rel: RelFork,
    pub(super) blkno: BlockNumber,
}

impl Hash for PageKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let node = self.rel.node;
        state.write_u64(u64::from(node.rel) << 32 | u64::from(self.blkno));
        state.write_u64(u64::from(node.db) << 32 | u64::from(node.spc) << 2 ^ u64::from(self.rel.fork.number()));
    }
}

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

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9E37_79B9_7F4A_7C15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Notes {
    /// Resource manager of the last change.
    pub(super) rmid: u8,
    /// What redo told of its free space, in the map's categories; for heap pages.
    pub(super) free_space: Option<u8>,
    /// Number of the last task that waits for it.
    pub(super) last_task: Option<u32>,
}

const NO_PLACE: VerifyError = VerifyError::Internal("a page's place exists");

/// Number of a page's place.
pub(super) type Place = u32;

/// Pages by name. A page's place stays the same until it is removed.
#[derive(Debug)]
pub(super) struct PageTable {
    places: HashMap<PageKey, Place, BuildHasherDefault<NumberHasher>>,
    /// How many pages of each fork there are.
    forks: HashMap<RelFork, usize>,
    chunks: Vec<MmapMut>,
    notes: Vec<Notes>,
    free: Vec<Place>,
    pages_max: usize,
}

/// Pages that memory is asked for at a time. Only what is touched is really taken.
const CHUNK_PAGES: usize = 8192;

impl PageTable {
    pub(super) fn new(pages_max: usize) -> PageTable {
        PageTable { places: HashMap::default(), forks: HashMap::new(), chunks: Vec::new(), notes: Vec::new(), free: Vec::new(), pages_max }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn place(&self, key: PageKey) -> Option<Place> {
        self.places.get(&key).copied()
    }

    /// A place for a page that has none; what is there is anything.
    pub(super) fn insert(&mut self, key: PageKey) -> Result<Place, VerifyError> {
        let place = match self.free.pop() {
            Some(place) => {
                *self.notes(place)? = Notes::default();
                place
            }
            None if self.notes.len() >= self.pages_max => {
                let what =
                    format!("the WAL changes more than {} MB of pages: allow more", (self.pages_max * super::PARTITIONS * BLCKSZ) >> 20);
                return Err(VerifyError::Store(varve_redo::verify::StoreError(what)));
            }
            None => {
                let place = self.notes.len();
                if place.is_multiple_of(CHUNK_PAGES) {
                    self.chunks.push(chunk()?);
                }
                self.notes.push(Notes::default());
                place as Place
            }
        };
        self.places.insert(key, place);
        *self.forks.entry(key.rel).or_default() += 1;
        Ok(place)
    }

    /// The page at a place that [`PageTable::place`] or [`PageTable::insert`] gave, and what is known of it.
    pub(super) fn at(&mut self, place: Place) -> Result<(&mut Page, &mut Notes), VerifyError> {
        let place = place as usize;
        let chunk = self.chunks.get_mut(place / CHUNK_PAGES).ok_or(NO_PLACE)?;
        let page = chunk.get_mut(place % CHUNK_PAGES * BLCKSZ..).and_then(<[u8]>::first_chunk_mut).ok_or(NO_PLACE)?;
        Ok((page, self.notes.get_mut(place).ok_or(NO_PLACE)?))
    }

    /// What is known of the page at a place.
    pub(super) fn notes(&mut self, place: Place) -> Result<&mut Notes, VerifyError> {
        self.notes.get_mut(place as usize).ok_or(NO_PLACE)
    }

    /// Reads the parts of pages that most changes begin with: so memory is waited for once, and not for each page.
    pub(super) fn touch(&self, places: impl Iterator<Item = Place> + Clone) {
        let pages = places.filter_map(|place| self.peek(place));
        for (page, _) in pages.clone() {
            black_box(page[0]);
        }
        for (page, _) in pages {
            black_box(page.get(usize::from(page::upper(page)).wrapping_sub(64)));
        }
    }

    fn peek(&self, place: Place) -> Option<(&Page, &Notes)> {
        let place = place as usize;
        let page = self.chunks.get(place / CHUNK_PAGES)?.get(place % CHUNK_PAGES * BLCKSZ..)?.first_chunk()?;
        Some((page, self.notes.get(place)?))
    }

    /// Removes pages of `rel` from `blocks` on.
    pub(super) fn cut(&mut self, rel: RelFork, blocks: BlockNumber) {
        let Some(left) = self.forks.get_mut(&rel) else { return };
        let free = &mut self.free;
        self.places.retain(|key, place| {
            let stays = key.rel != rel || key.blkno < blocks;
            if !stays {
                free.push(*place);
                *left -= 1;
            }
            stays
        });
        if *left == 0 {
            self.forks.remove(&rel);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PageKey, &Page, &Notes)> {
        self.places.iter().filter_map(|(key, place)| self.peek(*place).map(|(page, notes)| (*key, page, notes)))
    }
}

fn chunk() -> Result<MmapMut, VerifyError> {
    let no_memory = |error: std::io::Error| {
        let what = format!("no memory for {} MB of pages: {error}", (CHUNK_PAGES * BLCKSZ) >> 20);
        VerifyError::Store(varve_redo::verify::StoreError(what))
    };
    let chunk = MmapMut::map_anon(CHUNK_PAGES * BLCKSZ).map_err(no_memory)?;
    // Records jump between pages: with small memory pages, most of the time goes into finding them. A system that has no large ones says so.
    let _ = chunk.advise(Advice::HugePage);
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use varve_postgres::{Fork, RelNode};

    use super::*;

    #[test]
    fn a_removed_page_s_place_is_given_again_and_others_stay() {
        let fork = |rel| RelNode { spc: 1663, db: 5, rel }.fork(Fork::Main);
        let key = |rel, blkno| PageKey { rel: fork(rel), blkno };
        let mut table = PageTable::new(4);
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
        assert_eq!((table.len(), table.place(key(7, 1))), (3, None), "one page is removed");
        let place = table.insert(key(9, 0)).expect("the place of the one that was removed");
        assert_eq!(table.notes(place).expect("notes").free_space, None, "what was known is of the page before");
        for (fill, key) in [(1, key(7, 0)), (3, key(8, 0)), (4, key(8, 1))] {
            let place = table.place(key).expect("it stays");
            assert_eq!(table.at(place).expect("the page").0[..], [fill; BLCKSZ], "{key:?}");
        }
    }
}
