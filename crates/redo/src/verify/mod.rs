//! Checks the page functions against Postgres: redoes WAL that was written with `wal_consistency_checking = all`, in
//! which each record carries its pages as they must be afterwards, and compares after masking as Postgres masks
//! ([`crate::mask`]).
//!
//! [`Verifier`] keeps the pages that the WAL touched, as many as it may in memory, the others in an [`Overflow`]. What
//! a block was before the WAL begins it is told ([`Verifier::know`]) or asks for ([`BasePages`]); a block of a relation
//! that the WAL created or truncated begins as zeros; a page that it cannot know is *adopted* from the record's image.
//! Each change goes through its stored form, [`Change::encode`] and [`Change::decode`], so that this is tested too.
//!
//! After a mismatch the record's image replaces the page, so that one fault is reported once.

mod loose;
mod page_buffer;
mod page_diff;
mod pages;
mod report;

use std::time::Instant;

use varve_postgres::wal::image::Image;
use varve_postgres::wal::{Block, Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Major, Page, RelFork, page};

pub use page_buffer::Overflow;
pub use page_diff::PageDiff;
pub use pages::{BasePages, Pages};
pub use report::{Difference, Mismatch, Report, TypeStats};

use loose::LoosePages;
use pages::FollowError;

use crate::change::{BlockRecord, Change};
use crate::{apply, free_space_effect, free_space_map, mask, restore_image, visibility_map};

/// Pages could not be read from where they are, or put there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// Redoes records and compares their pages. See the [module](self).
#[derive(Debug)]
pub struct Verifier {
    major: Major,
    strict_visibility_map: bool,
    free_space_maps: bool,
    loose: Option<LoosePages>,
    pages: Pages,
    report: Report,
}

impl Verifier {
    /// A verifier for WAL of `major`.
    pub fn new(major: Major) -> Verifier {
        Verifier {
            major,
            strict_visibility_map: false,
            free_space_maps: false,
            loose: None,
            pages: Pages::default(),
            report: Report::default(),
        }
    }

    /// Compares visibility-map pages too, of which Postgres's masking leaves nothing to compare. Only for WAL that one
    /// session wrote: another may set a bit between a record and its image.
    #[must_use]
    pub fn with_strict_visibility_map(mut self) -> Verifier {
        self.strict_visibility_map = true;
        self
    }

    /// Keeps free-space maps too, as Postgres's own redo keeps them. Records have no images of them: compare them with
    /// those that recovery left.
    #[must_use]
    pub fn with_free_space_maps(mut self) -> Verifier {
        self.free_space_maps = true;
        self
    }

    /// Redoes heap pages a second time, with [compaction put off](crate::apply_loosely), and compares after each
    /// record. All of them are kept in memory.
    #[must_use]
    pub fn with_loose_pages(mut self) -> Verifier {
        self.loose = Some(LoosePages::default());
        self
    }

    /// All pages that existed before the WAL begins are told by [`Verifier::know`]: others are zeros.
    #[must_use]
    pub fn with_complete_base(mut self) -> Verifier {
        self.pages.complete_base = true;
        self
    }

    /// Takes what blocks were before the WAL begins from `base`.
    #[must_use]
    pub fn with_base(mut self, base: Box<dyn BasePages>) -> Verifier {
        self.pages.set_base(base);
        self
    }

    /// Keeps at most `pages_max` pages in memory, the others in `overflow`. To be called before the first page is
    /// known.
    #[must_use]
    pub fn with_limit(mut self, pages_max: usize, overflow: Box<dyn Overflow>) -> Verifier {
        self.pages.set_limit(pages_max, overflow);
        self
    }

    /// Tells what a block was before the WAL begins.
    ///
    /// # Errors
    /// When there is no room for the page.
    pub fn know(&mut self, rel: RelFork, blkno: BlockNumber, page: &Page) -> Result<(), StoreError> {
        self.pages.put(rel, blkno, page, None)
    }

    /// Tells that WAL is missing here: what any page is now is not known.
    pub fn forget_pages(&mut self) {
        self.pages.forget_all();
    }

    /// What was found so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The pages as they are after the last record.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Redoes the next record. What is wrong with it is a mismatch in the report.
    ///
    /// # Errors
    /// When pages cannot be read or kept; the verifier is then not to be used.
    pub fn record(&mut self, record: &Record<'_>) -> Result<(), StoreError> {
        let stats = self.report.types.entry((record.header.rmid, record.kind())).or_default();
        stats.count += 1;
        stats.bytes += u64::from(record.header.total_len);
        for (rel, blkno, change) in visibility_map::visibility_map_clears(record) {
            // Postgres makes a map page that is not there when it pins it.
            if let Some(mut page) = self.pages.before(rel, blkno)? {
                match self.redo(record, blkno, &change, &mut page) {
                    Ok(()) => self.pages.put(rel, blkno, &page, Some(record.header.rmid))?,
                    Err(what) => self.mismatch(record, rel, blkno, Difference::Failed(what)),
                }
            }
        }
        for block in &record.blocks {
            self.block(record, block)?;
        }
        match self.pages.follow(record, self.major, self.free_space_maps) {
            Ok(()) => Ok(()),
            Err(FollowError::Store(error)) => Err(error),
            Err(FollowError::Bad(what)) => {
                let nowhere = RelFork { node: varve_postgres::RelNode { spc: 0, db: 0, rel: 0 }, fork: Fork::Main };
                self.mismatch(record, nowhere, 0, Difference::Failed(what));
                Ok(())
            }
        }
    }

    fn block<'a>(&mut self, record: &Record<'a>, block: &Block<'a>) -> Result<(), StoreError> {
        let (rel, blkno, rmid) = (block.rel, block.blkno, record.header.rmid);
        let truth = match &block.image {
            None => None,
            Some(image) if image.apply => return self.restore(record, block, image),
            Some(image) => {
                let mut page = page::ZERO_PAGE;
                if let Err(what) = image.restore(&mut page) {
                    self.mismatch(record, rel, blkno, Difference::Failed(what));
                    return Ok(());
                }
                page::set_lsn(&mut page, record.end);
                Some(page)
            }
        };
        let before = if block.will_init { Some(page::ZERO_PAGE) } else { self.pages.before(rel, blkno)? };
        let Some(before) = before else {
            if let Some(truth) = truth {
                self.stats(record).adopted += 1;
                self.pages.put(rel, blkno, &truth, Some(rmid))?;
            }
            return Ok(());
        };
        let mut page = before;
        let change = Change::Record(BlockRecord::trim(record, block));
        let redone = self.redo(record, blkno, &change, &mut page).and_then(|()| {
            let Some(loose) = &mut self.loose else { return Ok(()) };
            loose.redo(self.major, record.end, (rel, blkno), &change, (&before, &page))
        });
        match (redone, truth) {
            (Err(what), truth) => {
                self.mismatch(record, rel, blkno, Difference::Failed(what));
                match truth {
                    Some(truth) => self.pages.put(rel, blkno, &truth, Some(rmid))?,
                    None => self.pages.forget(rel, blkno),
                }
                return Ok(());
            }
            (Ok(()), Some(truth)) => match self.compare(rmid, rel, blkno, &before, &page, &truth) {
                None => self.stats(record).compared += 1,
                Some(Difference::Bytes { at, .. }) if is_postgress_own(record, &page, &truth, &at) => {
                    self.stats(record).postgres_own += 1;
                    page = truth;
                    if let Some(loose) = &mut self.loose {
                        loose.forget(rel, blkno);
                    }
                }
                Some(difference) => {
                    self.mismatch(record, rel, blkno, difference);
                    page = truth;
                }
            },
            (Ok(()), None) => {}
        }
        self.record_free_space(record, block, &page, false)?;
        self.pages.put(rel, blkno, &page, Some(rmid))
    }

    /// Takes the record's image for the page.
    fn restore<'a>(&mut self, record: &Record<'a>, block: &Block<'a>, image: &Image<'a>) -> Result<(), StoreError> {
        let start = Instant::now();
        let mut page = page::ZERO_PAGE;
        let restored = restore_image(record, block, &mut page);
        let nanos = start.elapsed().as_nanos() as u64;
        match restored {
            Ok(()) => {
                let stats = self.stats(record);
                stats.images += 1;
                stats.nanos += nanos;
                if block.rel.fork == Fork::VisibilityMap && image.hole_len > 0 {
                    self.pages.note_hollow_map(block.rel);
                }
                self.record_free_space(record, block, &page, true)?;
                self.pages.put(block.rel, block.blkno, &page, Some(record.header.rmid))
            }
            Err(error) => {
                self.mismatch(record, block.rel, block.blkno, Difference::Failed(error.to_string()));
                Ok(())
            }
        }
    }

    /// Does to the free-space map what Postgres's redo of this block does.
    fn record_free_space<'a>(&mut self, record: &Record<'a>, block: &Block<'a>, page: &Page, restored: bool) -> Result<(), StoreError> {
        if !self.free_space_maps {
            return Ok(());
        }
        let Some(space) = free_space_effect(self.major, &BlockRecord::trim(record, block), page, restored) else { return Ok(()) };
        let map = block.rel.node.fork(Fork::FreeSpaceMap);
        let (blkno, slot) = free_space_map::location(block.blkno);
        let mut page = self.pages.before(map, blkno)?.unwrap_or(page::ZERO_PAGE);
        free_space_map::set(&mut page, slot, free_space_map::category(space));
        self.pages.put(map, blkno, &page, Some(record.header.rmid))
    }

    fn redo(&mut self, record: &Record<'_>, blkno: BlockNumber, change: &Change<'_>, page: &mut Page) -> Result<(), String> {
        let stored = change.encode();
        let decoded = Change::decode(&stored)?;
        if decoded != *change {
            return Err(format!("the change is another after storing: {decoded:?}, expected {change:?}"));
        }
        let start = Instant::now();
        let done = apply(self.major, record.end, blkno, &decoded, page);
        let nanos = start.elapsed().as_nanos() as u64;
        let stats = self.stats(record);
        stats.pages += 1;
        stats.nanos += nanos;
        done.map_err(|error| error.to_string())
    }

    fn compare(&self, rmid: u8, rel: RelFork, blkno: BlockNumber, before: &Page, ours: &Page, truth: &Page) -> Option<Difference> {
        let strict_maps = self.strict_visibility_map && !self.pages.is_hollow_map(rel);
        match differences(self.major, rmid, rel.fork, blkno, ours, truth, strict_maps) {
            Ok(at) if at.is_empty() => None,
            Ok(at) => Some(Difference::Bytes { at, before: Box::new(*before), ours: Box::new(*ours), truth: Box::new(*truth) }),
            Err(what) => Some(Difference::Failed(what)),
        }
    }

    fn stats(&mut self, record: &Record<'_>) -> &mut TypeStats {
        self.report.types.entry((record.header.rmid, record.kind())).or_default()
    }

    fn mismatch(&mut self, record: &Record<'_>, rel: RelFork, blkno: BlockNumber, difference: Difference) {
        self.stats(record).mismatches += 1;
        self.report.add(Mismatch {
            rmid: record.header.rmid,
            info: record.kind(),
            start: record.start,
            end: record.end,
            rel,
            blkno,
            difference,
        });
    }
}

/// Whether Postgres's own recovery comes to a page that differs so, too: its own check of this record complains.
fn is_postgress_own(record: &Record<'_>, ours: &Page, truth: &Page, at: &[u16]) -> bool {
    /// `XLOG_HEAP_LOCK`.
    const HEAP_LOCK: u8 = 0x60;
    (record.header.rmid, record.kind()) == (rmgr::HEAP, HEAP_LOCK) && mask::is_combo_command_of_locked(ours, truth, at)
}

/// Offsets at which `ours` differs from the page that a stopped server has in a file, as [`differences`] gives them;
/// `rmid` changed it last. A file also has what Postgres does to a page after it took the page's image for a record, so
/// more can be compared.
///
/// # Errors
/// What is wrong, in words, when one of the pages cannot be masked.
pub fn file_differences(major: Major, rmid: u8, fork: Fork, blkno: BlockNumber, ours: &Page, file: &Page) -> Result<Vec<u16>, String> {
    let rmid = match rmid {
        rmgr::XLOG if fork == Fork::Main => mask::rmgr_of_page(ours).unwrap_or(rmid),
        rmid => rmid,
    };
    let mut at = differences(major, rmid, fork, blkno, ours, file, true)?;
    match (rmid, blkno) {
        (rmgr::GIST, _) => at.extend(mask::gist_split_state_differences(ours, file)),
        // What a standby has as we have it.
        (rmgr::HEAP | rmgr::HEAP2, _) if mask::is_combo_command_of_locked(ours, file, &at) => at.clear(),
        // The metapage caches which pages were used last, and no record says so.
        (rmgr::SPGIST, 0) => at.retain(|at| !mask::SPGIST_LAST_USED_PAGES.contains(&usize::from(*at))),
        _ => {}
    }
    Ok(at)
}

/// Offsets at which two versions of block `blkno` differ after masking as resource manager `rmid` does (if a bare image
/// made the page, the one whose page it looks like). Pages of maps, of which that masking leaves nothing, are compared
/// in all but LSN and checksum if `strict_maps`.
///
/// # Errors
/// What is wrong, in words, when one of the pages cannot be masked.
pub fn differences(
    major: Major,
    rmid: u8,
    fork: Fork,
    blkno: BlockNumber,
    ours: &Page,
    truth: &Page,
    strict_maps: bool,
) -> Result<Vec<u16>, String> {
    let rmid = match rmid {
        rmgr::XLOG => mask::rmgr_of_page(truth).unwrap_or(rmid),
        rmid => rmid,
    };
    let masked = |page: &Page, whose: &str| {
        let mut page = *page;
        if matches!(fork, Fork::VisibilityMap | Fork::FreeSpaceMap) && strict_maps {
            mask::mask_lsn_and_checksum(&mut page);
        } else {
            mask::mask_page(major, rmid, &mut page, blkno).map_err(|what| format!("{whose} page cannot be masked: {what}"))?;
        }
        Ok::<Page, String>(page)
    };
    let (ours, truth) = (masked(ours, "our")?, masked(truth, "Postgres's")?);
    if ours == truth {
        return Ok(Vec::new());
    }
    Ok(ours.iter().zip(&truth).enumerate().filter(|(_, (a, b))| a != b).map(|(at, _)| at as u16).collect())
}
