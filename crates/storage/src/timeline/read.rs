//! Reads: pages and values at an LSN.
//!
//! A batch of pages is one walk down: page cache, memtables, layers, newest first; then the same on the ancestor, up to
//! the branch point. A key leaves the walk when it has what it needs: a version that rests on nothing older, or a
//! cached page up to which it has all newer versions. Then redo goes forward.

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Page, RelFork};

use super::Timeline;
use crate::chain::{ChainError, Lookup, page_number};
use crate::free_space;
use crate::history::{History, HistoryError, Visit};
use crate::ids::TimelineId;
use crate::key::Key;
use crate::layer::LayerError;
use crate::page_cache::{CachedPage, Known};
use crate::relation::{self, LiveSize, RelationError, floor_of_block};
use crate::value::Value;

/// Ancestors of a timeline at most: a longer line means that two name each other.
const ANCESTORS_MAX: usize = 10_000;

/// A read that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The LSN is not there yet.
    #[error("timeline {timeline} is applied up to {applied}, it cannot be read at {lsn}")]
    NotApplied {
        /// The timeline.
        timeline: TimelineId,
        /// Where it was to be read.
        lsn: Lsn,
        /// What is applied.
        applied: Lsn,
    },
    /// The history is collected there.
    #[error("timeline {timeline} cannot be read at {lsn} any more: its history is kept from {cutoff} on")]
    Collected {
        /// The timeline.
        timeline: TimelineId,
        /// Where it was to be read.
        lsn: Lsn,
        /// From where on all of it can be read.
        cutoff: Lsn,
    },
    /// A layer could not be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A page could not be made of its versions.
    #[error("timeline {timeline}: {source}")]
    Chain {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        source: ChainError,
    },
    /// A key is not of the kind that was asked for.
    #[error("timeline {timeline}: {key} was asked for as {what}, which it is not")]
    WrongKind {
        /// The timeline.
        timeline: TimelineId,
        /// The key.
        key: Key,
        /// What it was taken for.
        what: &'static str,
    },
}

impl From<ReadError> for HistoryError {
    fn from(error: ReadError) -> HistoryError {
        HistoryError(error.to_string())
    }
}

/// A page, shared with the page cache where it is there.
#[derive(Clone)]
pub enum PageRef {
    /// Nothing was ever written to it.
    Zero,
    /// Its newest version.
    Cached(Arc<CachedPage>),
    /// A page of a free-space map, made for this read.
    Made(Box<Page>),
}

impl Deref for PageRef {
    type Target = Page;
    fn deref(&self) -> &Page {
        match self {
            PageRef::Zero => &ZERO_PAGE,
            PageRef::Cached(page) => page.page(),
            PageRef::Made(page) => page,
        }
    }
}

/// A page on its way.
struct PageWalk {
    /// Its place in the answer.
    index: usize,
    lookup: Lookup,
    /// A cached page that the versions in `lookup` go on top of.
    base: Option<Arc<CachedPage>>,
    /// The timeline that has the newest version, and up to where it is known to have no newer.
    owner: Option<(TimelineId, Lsn)>,
    done: bool,
}

impl PageWalk {
    /// Looks whether the page cache says something of `timeline` up to `upto`.
    fn start_from_cache(&mut self, timeline: &Timeline, upto: Lsn) {
        let above = self.lookup.above;
        match timeline.resources.page_cache.get(timeline.spec.id, self.lookup.key) {
            Some(Known::Page(page)) if page.version() <= upto && page.version() > above => {
                self.lookup.above = page.known();
                self.base = Some(page);
                // What is learnt about this page is learnt about this timeline's, unless there is something newer
                // above.
                if self.lookup.newest().is_none() {
                    self.owner = Some((timeline.spec.id, upto));
                }
            }
            // A page at or below the floor is dead, but it says up to where there is no newer one.
            Some(Known::Page(page)) if page.version() <= upto => self.lookup.above = above.max(page.known()),
            _ => {}
        }
        self.done = self.lookup.above >= upto;
    }
}

impl Timeline {
    /// That `lsn` is applied. To be asked of each ancestor, too: a branch can be made of WAL that its ancestor has not
    /// ingested yet, and what is not applied must not be taken for absent.
    pub(super) fn check_applied(&self, lsn: Lsn) -> Result<(), ReadError> {
        let applied = self.applied();
        if lsn <= applied { Ok(()) } else { Err(ReadError::NotApplied { timeline: self.spec.id, lsn, applied }) }
    }

    /// That what was just read of the layers as they are at `lsn` was all there. To be asked afterwards: layers that
    /// lack something are put in after this says so.
    fn check_collected(&self, lsn: Lsn) -> Result<(), ReadError> {
        let collected = self.collected.load();
        // What lies before its own beginning, or at it, is its ancestor's.
        if collected.holds(lsn) || lsn <= self.spec.start && self.spec.ancestor.is_some() {
            return Ok(());
        }
        Err(ReadError::Collected { timeline: self.spec.id, lsn, cutoff: collected.cutoff })
    }

    /// That nothing was collected that a read at `lsn` needs, here or on the ancestors. It may be the next moment.
    ///
    /// # Errors
    /// [`ReadError::Collected`].
    pub fn check_kept(&self, lsn: Lsn) -> Result<(), ReadError> {
        let (mut timeline, mut upto) = (self, lsn);
        for _ in 0..ANCESTORS_MAX {
            timeline.check_collected(upto)?;
            let Some((ancestor, branch_lsn)) = &timeline.spec.ancestor else { break };
            timeline = ancestor;
            upto = upto.min(*branch_lsn);
        }
        Ok(())
    }

    /// Adds what this timeline itself has for each of `lookups`, whose keys ascend and are all of one kind, as of
    /// `upto`.
    fn gather(&self, lookups: &mut [&mut Lookup], upto: Lsn) -> Result<(), ReadError> {
        self.gather_unchecked(lookups)?;
        self.check_collected(upto)
    }

    fn gather_unchecked(&self, lookups: &mut [&mut Lookup]) -> Result<(), LayerError> {
        let view = self.view.load();
        let memtables = std::iter::once(&view.active).chain(view.frozen.iter().map(|frozen| &frozen.memtable));
        for memtable in memtables.filter(|memtable| !memtable.is_empty()) {
            let newest = memtable.newest();
            for lookup in lookups.iter_mut().filter(|lookup| !lookup.is_complete()) {
                if lookup.above < newest && memtable.start() < lookup.upto {
                    memtable.read(lookup);
                    lookup.upto = lookup.upto.min(memtable.start());
                }
            }
        }
        let layers = Arc::clone(&view.layers);
        drop(view);
        layers.read(&self.resources.block_cache, lookups)
    }

    /// The pages that `wanted` names, each with the floor at or below which versions do not count, as they are at
    /// `lsn`. `None` for those that have no version.
    ///
    /// # Errors
    /// When `lsn` is not applied, a layer cannot be read, or redo fails.
    pub fn pages(&self, wanted: &[(Key, Lsn)], lsn: Lsn) -> Result<Vec<Option<Arc<CachedPage>>>, ReadError> {
        self.check_applied(lsn)?;
        let mut walks = Vec::with_capacity(wanted.len());
        for (index, (key, floor)) in wanted.iter().enumerate() {
            if page_number(*key).is_none() {
                return Err(ReadError::WrongKind { timeline: self.spec.id, key: *key, what: "a page" });
            }
            walks.push(PageWalk { index, lookup: Lookup::new(*key, *floor, lsn), base: None, owner: None, done: false });
        }
        walks.sort_by_key(|walk| walk.lookup.key);
        // Blocks and SLRU pages have layers of their own; blocks come first.
        let blocks = walks.partition_point(|walk| walk.lookup.key.is_block());
        let (blocks, others) = walks.split_at_mut(blocks);
        self.walk_pages(blocks, lsn)?;
        self.walk_pages(others, lsn)?;
        let mut pages = vec![None; wanted.len()];
        for walk in walks {
            let index = walk.index;
            if let Some(page) = pages.get_mut(index) {
                *page = self.finish_page(walk, lsn)?;
            }
        }
        Ok(pages)
    }

    fn walk_pages(&self, walks: &mut [PageWalk], lsn: Lsn) -> Result<(), ReadError> {
        let (mut timeline, mut upto) = (self, lsn);
        for _ in 0..ANCESTORS_MAX {
            let mut open = false;
            for walk in walks.iter_mut().filter(|walk| !walk.done) {
                walk.lookup.upto = upto;
                walk.start_from_cache(timeline, upto);
                open |= !walk.done;
            }
            if !open {
                return Ok(());
            }
            timeline.check_applied(upto)?;
            let above: Vec<Lsn> = walks.iter().map(|walk| walk.lookup.above).collect();
            let mut lookups: Vec<&mut Lookup> = walks.iter_mut().filter(|walk| !walk.done).map(|walk| &mut walk.lookup).collect();
            timeline.gather(&mut lookups, upto)?;
            for (walk, above) in walks.iter_mut().zip(above).filter(|(walk, _)| !walk.done) {
                let found = walk.base.is_some() || walk.lookup.newest().is_some();
                if found {
                    walk.owner.get_or_insert((timeline.spec.id, upto));
                }
                // A page that a branch keeps may be known only up to somewhere before the branch point.
                let is_based = walk.base.is_some() && above >= timeline.spec.start;
                walk.done = is_based || walk.lookup.is_complete();
                if !found && timeline.spec.ancestor.is_some() && above <= timeline.spec.start {
                    timeline.resources.page_cache.put_nothing(timeline.spec.id, walk.lookup.key, upto);
                }
            }
            let Some((ancestor, branch_lsn)) = &timeline.spec.ancestor else { return Ok(()) };
            timeline = ancestor;
            upto = upto.min(*branch_lsn);
            for walk in walks.iter_mut() {
                walk.done |= walk.lookup.above >= upto;
            }
        }
        Ok(())
    }

    /// Makes the page of what was found for it, and keeps it.
    fn finish_page(&self, walk: PageWalk, lsn: Lsn) -> Result<Option<Arc<CachedPage>>, ReadError> {
        let PageWalk { lookup, base, owner, .. } = walk;
        let Some((owner, known)) = owner else { return Ok(None) };
        let Some(newest) = lookup.newest() else {
            if let Some(base) = &base {
                base.extend_known(known);
            }
            return Ok(base);
        };
        if newest.value == Value::Absent {
            return Ok(None);
        }
        let page = lookup
            .materialise(self.spec.major, base.as_ref().map(|base| base.page()))
            .map_err(|source| ReadError::Chain { timeline: self.spec.id, source })?;
        let cache = &self.resources.page_cache;
        let cached = Arc::new(CachedPage::new(newest.lsn, known, *page));
        if !cache.put(owner, lookup.key, &cached) && owner != self.spec.id {
            // The ancestor has moved on since the branch point, and keeps its newest: this one is kept for the branch.
            cache.put(self.spec.id, lookup.key, &Arc::new(CachedPage::new(newest.lsn, lsn, *page)));
        }
        Ok(Some(cached))
    }

    /// The page of `key` at `lsn`, if that can be told from memory, without waiting for anything; `None` if not. An
    /// `Ok(None)` within: it has no version.
    ///
    /// # Errors
    /// When redo fails.
    pub fn page_if_warm(&self, key: Key, floor: Lsn, lsn: Lsn) -> Option<Result<Option<Arc<CachedPage>>, ReadError>> {
        let (mut timeline, mut upto) = (self, lsn);
        let mut lookup = Lookup::new(key, floor, lsn);
        for _ in 0..ANCESTORS_MAX {
            let known = timeline.resources.page_cache.get(timeline.spec.id, key)?;
            if timeline.check_applied(upto).is_err() {
                return None;
            }
            let view = timeline.view.load();
            let base = match &known {
                Known::Page(page) if page.version() > upto => return None,
                Known::Page(page) => (page.known(), (page.version() > floor).then_some(page)),
                Known::Nothing(known) => (*known, None),
            };
            let (known_lsn, base) = base;
            // What came since may be in layers, and these may be anywhere.
            if known_lsn < upto && known_lsn < view.layered {
                return None;
            }
            lookup.above = known_lsn.max(floor);
            lookup.upto = upto;
            if lookup.above < upto {
                for memtable in std::iter::once(&view.active).chain(view.frozen.iter().map(|frozen| &frozen.memtable)) {
                    if !lookup.is_complete() && lookup.above < memtable.newest() && memtable.start() < lookup.upto {
                        memtable.read(&mut lookup);
                        lookup.upto = lookup.upto.min(memtable.start());
                    }
                }
            }
            let found = base.is_some() || lookup.is_complete();
            if found || lookup.newest().is_some() || matches!(known, Known::Page(_)) {
                // Changes whose base is further down are the long way's business.
                if !found && lookup.newest().is_some() {
                    return None;
                }
                let owner = found.then_some((timeline.spec.id, upto));
                let walk = PageWalk { index: 0, lookup, base: base.cloned(), owner, done: true };
                return Some(self.finish_page(walk, lsn));
            }
            let (ancestor, branch_lsn) = timeline.spec.ancestor.as_ref()?;
            timeline = ancestor;
            upto = upto.min(*branch_lsn);
            if floor >= upto {
                return Some(Ok(None));
            }
        }
        None
    }

    /// LSN and newest value of each of `keys`, which ascend and are no pages, at `lsn` and above `floor`.
    pub(super) fn values(&self, keys: &[Key], floor: Lsn, lsn: Lsn) -> Result<Vec<Option<(Lsn, Bytes)>>, ReadError> {
        self.check_applied(lsn)?;
        let mut lookups: Vec<Lookup> = keys.iter().map(|key| Lookup::new(*key, floor, lsn)).collect();
        let (mut timeline, mut upto) = (self, lsn);
        for _ in 0..ANCESTORS_MAX {
            let mut open: Vec<&mut Lookup> = lookups.iter_mut().filter(|lookup| lookup.newest().is_none()).collect();
            if open.is_empty() || floor >= upto {
                break;
            }
            timeline.check_applied(upto)?;
            open.iter_mut().for_each(|lookup| lookup.upto = upto);
            timeline.gather(&mut open, upto)?;
            let Some((ancestor, branch_lsn)) = &timeline.spec.ancestor else { break };
            timeline = ancestor;
            upto = upto.min(*branch_lsn);
        }
        let value = |lookup: &Lookup| match lookup.newest().map(|version| (version.lsn, &version.value)) {
            None | Some((_, Value::Absent)) => Ok(None),
            Some((lsn, Value::Image(bytes))) => Ok(Some((lsn, bytes.clone()))),
            Some((_, Value::Change { .. })) => Err(ReadError::WrongKind { timeline: self.spec.id, key: lookup.key, what: "a value" }),
        };
        lookups.iter().map(value).collect()
    }

    /// What is known of a fork's size at `lsn`. A size at the newest LSN is one hash lookup, once it was read.
    ///
    /// # Errors
    /// When `lsn` is not applied, or a layer cannot be read.
    pub fn live_size(&self, rel: RelFork, lsn: Lsn) -> Result<Option<Arc<LiveSize>>, HistoryError> {
        self.check_applied(lsn)?;
        if let Some(size) = self.sizes.get(rel, lsn) {
            return Ok(size);
        }
        let size = relation::live_size(self, rel, lsn)?.map(Arc::new);
        self.sizes.put(rel, lsn, size.clone());
        Ok(size)
    }

    /// The blocks that `wanted` names, as they are at `lsn`: one walk for all. An answer for each.
    ///
    /// # Errors
    /// When `lsn` is not applied, a layer cannot be read, or redo fails; that a block does not exist is an answer.
    pub fn blocks(&self, wanted: &[(RelFork, BlockNumber)], lsn: Lsn) -> Result<Vec<Result<PageRef, RelationError>>, HistoryError> {
        let mut answers = Vec::with_capacity(wanted.len());
        let mut keys = Vec::with_capacity(wanted.len());
        let mut last: Option<(RelFork, Option<Arc<LiveSize>>)> = None;
        for (rel, block) in wanted {
            let size = match &last {
                Some((known, size)) if known == rel => size.clone(),
                _ => self.live_size(*rel, lsn)?,
            };
            match floor_of_block(size.as_deref(), *rel, *block, lsn) {
                Ok(floor) => {
                    keys.push((Key::block(*rel, *block), floor));
                    answers.push(Ok(PageRef::Zero));
                }
                Err(error) => answers.push(Err(error)),
            }
            last = Some((*rel, size));
        }
        let pages = self.pages(&keys, lsn)?;
        for (answer, page) in answers.iter_mut().filter(|answer| answer.is_ok()).zip(pages) {
            if let Some(page) = page {
                *answer = Ok(PageRef::Cached(page));
            }
        }
        for ((rel, block), answer) in wanted.iter().zip(&mut answers).filter(|((rel, _), _)| rel.fork == Fork::FreeSpaceMap) {
            if let Ok(written) = answer {
                let mut page = Box::new(**written);
                free_space::fold(self, *rel, *block, lsn, &mut page)?;
                *answer = Ok(PageRef::Made(page));
            }
        }
        Ok(answers)
    }

    /// Block `block` of `rel` at `lsn`, if it can be had from memory, without waiting for anything. What a free-space
    /// map says may rest on many pages, so it never can.
    pub fn block_if_warm(&self, rel: RelFork, block: BlockNumber, lsn: Lsn) -> Option<Result<PageRef, RelationError>> {
        if lsn > self.applied() || rel.fork == Fork::FreeSpaceMap {
            return None;
        }
        let size = self.sizes.get(rel, lsn)?;
        let floor = match floor_of_block(size.as_deref(), rel, block, lsn) {
            Ok(floor) => floor,
            Err(error) => return Some(Err(error)),
        };
        let page = self.page_if_warm(Key::block(rel, block), floor, lsn)?;
        Some(page.map(|page| page.map_or(PageRef::Zero, PageRef::Cached)).map_err(|error| HistoryError::from(error).into()))
    }
}

impl History for Timeline {
    fn major(&self) -> Major {
        self.spec.major
    }

    fn get_above(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<(Lsn, Bytes)>, HistoryError> {
        if page_number(key).is_some() {
            return Err(ReadError::WrongKind { timeline: self.spec.id, key, what: "a value" }.into());
        }
        Ok(self.values(&[key], floor, lsn)?.pop().flatten())
    }

    fn page(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<Box<Page>>, HistoryError> {
        let page = self.pages(&[(key, floor)], lsn)?.pop().flatten();
        Ok(page.map(|page| Box::new(*page.page())))
    }

    fn each_page(&self, wanted: &[(Key, Lsn)], lsn: Lsn, visit: &mut dyn FnMut(usize, Option<&Page>)) -> Result<(), HistoryError> {
        for (index, page) in self.pages(wanted, lsn)?.iter().enumerate() {
            visit(index, page.as_ref().map(|page| page.page()));
        }
        Ok(())
    }

    fn scan_above(&self, from: Key, to: Key, floor: Lsn, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError> {
        self.scan_values(from, to, floor, lsn, visit)
    }
}
