//! Block-by-block comparison of what a server has on disk with the same cluster from somewhere else: the page service,
//! a base backup, a standby.
//!
//! What may differ without either being wrong, and is therefore left out, by name:
//! - free-space maps: hints, which every server keeps in its own way;
//! - what an unlogged relation holds: only its init fork is logged. Temporary relations are nobody else's;
//! - pages at a fork's end that were never used: Postgres extends files without WAL;
//! - the position of a sequence: its WAL runs ahead of its page ([`sequence_differs`] says what must still hold);
//! - visibility maps of databases that were made by copying block by block ([`Comparison::lossy_maps_in`]): Postgres
//!   logs these map pages as pages with a hole, so that what is in them is lost wherever the WAL is redone. A bit may
//!   be missing there, and never be set in excess;
//! - what Postgres masks in its own check of redone pages, by resource manager ([`varve_redo::mask`]), hint bits first
//!   of all, and the last used pages that an SP-GiST metapage caches.

mod data_directory;
mod page_service;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_postgres::page::{self, PAGE_HEADER_SIZE, ZERO_PAGE};
use varve_postgres::slru::SlruKind;
use varve_postgres::wal::rmgr;
use varve_postgres::{BlockNumber, Fork, Major, Oid, Page, RelFork};
use varve_redo::mask::rmgr_of_page;
use varve_redo::verify::file_differences;

pub use data_directory::DataDirectory;
pub use page_service::PageService;

/// Differences that are told one by one.
const TOLD_MAX: usize = 20;
/// Offsets of a page that are told.
const OFFSETS_TOLD_MAX: usize = 8;

/// A cluster's blocks, from wherever they are had.
pub trait Cluster {
    /// What to call it in messages.
    fn name(&self) -> String;

    /// All forks of permanent relations in a database's directory of a tablespace, with their sizes.
    ///
    /// # Errors
    /// When they cannot be had.
    fn forks(&self, spc: Oid, db: Oid) -> Result<BTreeMap<RelFork, BlockNumber>>;

    /// The first `blocks` pages of a fork.
    ///
    /// # Errors
    /// When they cannot be had.
    fn pages(&self, rel: RelFork, blocks: BlockNumber) -> Result<Vec<Page>>;

    /// The segments of an SLRU area, each with its pages.
    ///
    /// # Errors
    /// When they cannot be had.
    fn slru(&self, area: SlruKind) -> Result<BTreeMap<u32, Vec<Page>>>;
}

/// A comparison of a cluster with a server's own files. See the [module](self).
pub struct Comparison<'a> {
    truth: &'a DataDirectory,
    ours: &'a dyn Cluster,
    lossy_maps: BTreeSet<Oid>,
    compared: u64,
    differences: Vec<String>,
    count: usize,
}

impl<'a> Comparison<'a> {
    /// Of `ours` with the server's files in `truth`.
    pub fn new(truth: &'a DataDirectory, ours: &'a dyn Cluster) -> Comparison<'a> {
        Comparison { truth, ours, lossy_maps: BTreeSet::new(), compared: 0, differences: Vec::new(), count: 0 }
    }

    /// Allows for visibility maps that were lost in these databases: see the [module](self).
    #[must_use]
    pub fn lossy_maps_in(mut self, databases: &BTreeSet<Oid>) -> Comparison<'a> {
        self.lossy_maps = databases.clone();
        self
    }

    /// Compares every fork of every relation and every SLRU page; gives the number of pages that were compared.
    ///
    /// # Errors
    /// When something differs: what, up to a limit.
    pub fn run(mut self) -> Result<u64> {
        for (spc, db) in self.truth.databases()? {
            self.directory(spc, db)?;
        }
        for area in SlruKind::ALL {
            self.slru(area)?;
        }
        if self.count > 0 {
            bail!(
                "{} differences between {} and {}, of {} pages compared:\n{}",
                self.count,
                self.ours.name(),
                self.truth.name(),
                self.compared,
                self.differences.join("\n")
            );
        }
        Ok(self.compared)
    }

    fn differs(&mut self, what: String) {
        self.count += 1;
        if self.differences.len() < TOLD_MAX {
            self.differences.push(what);
        }
    }

    fn directory(&mut self, spc: Oid, db: Oid) -> Result<()> {
        let (truth, ours) = (self.truth.forks(spc, db)?, self.ours.forks(spc, db)?);
        let unlogged = |rel: &RelFork| rel.fork != Fork::Init && truth.contains_key(&rel.node.fork(Fork::Init));
        let is_compared = |rel: &RelFork| rel.fork != Fork::FreeSpaceMap && !unlogged(rel);
        for (rel, blocks) in &ours {
            if is_compared(rel) && !truth.contains_key(rel) {
                self.differs(format!("{rel} is in {} with {blocks} blocks and not in {}", self.ours.name(), self.truth.name()));
            }
        }
        for (rel, blocks) in truth.iter().filter(|(rel, _)| is_compared(rel)) {
            let pages = self.truth.pages(*rel, *blocks)?;
            let used = pages.iter().rposition(|page| !is_unused(page)).map_or(0, |last| last + 1);
            match ours.get(rel) {
                // A file that was only ever extended.
                None if used == 0 && rel.fork != Fork::Init => {}
                None => self.differs(format!("{rel} has {blocks} blocks and is not in {}", self.ours.name())),
                Some(n) if (*n as usize) < used || n > blocks => {
                    self.differs(format!("{rel} has {n} blocks in {}, expected {used} to {blocks}", self.ours.name()));
                }
                Some(n) => self.fork(*rel, &pages[..*n as usize])?,
            }
        }
        Ok(())
    }

    fn fork(&mut self, rel: RelFork, truth: &[Page]) -> Result<()> {
        let ours = self.ours.pages(rel, truth.len() as BlockNumber)?;
        if ours.len() != truth.len() {
            self.differs(format!("{} gave {} of {} blocks of {rel}", self.ours.name(), ours.len(), truth.len()));
        }
        for (block, (ours, truth)) in (0..).zip(ours.iter().zip(truth)) {
            self.compared += 1;
            if ours == truth {
                continue;
            }
            if let Some(what) = self.page_differs(rel, block, ours, truth) {
                let rmid = rmgr_of_page(truth).unwrap_or(rmgr::HEAP);
                let (our_lsn, lsn) = (page::lsn(ours), page::lsn(truth));
                self.differs(format!("{rel} block {block} ({}, LSN {our_lsn}, expected {lsn}): {what}", rmgr::name(rmid)));
            }
        }
        Ok(())
    }

    /// How a page is not as it must be.
    fn page_differs(&self, rel: RelFork, block: BlockNumber, ours: &Page, truth: &Page) -> Option<String> {
        let rmid = rmgr_of_page(truth).unwrap_or(rmgr::HEAP);
        if rel.fork == Fork::VisibilityMap && self.lossy_maps.contains(&rel.node.db) {
            let excess = ours[PAGE_HEADER_SIZE..].iter().zip(&truth[PAGE_HEADER_SIZE..]).any(|(ours, truth)| ours & !truth != 0);
            return excess.then(|| "bits are set that are not set there".to_owned());
        }
        if rmid == rmgr::SEQ {
            return sequence_differs(self.truth.major(), ours, truth);
        }
        match file_differences(self.truth.major(), rmid, rel.fork, block, ours, truth) {
            Ok(at) if at.is_empty() => None,
            Ok(at) => {
                let told = at.iter().take(OFFSETS_TOLD_MAX).map(|&at| {
                    let at = usize::from(at);
                    format!("{at}: {:02X} {:02X}", ours[at], truth[at])
                });
                Some(format!("{} bytes differ (offset: found, expected): {}", at.len(), told.collect::<Vec<_>>().join(", ")))
            }
            Err(what) => Some(what),
        }
    }

    fn slru(&mut self, area: SlruKind) -> Result<()> {
        let (truth, ours) = (self.truth.slru(area)?, self.ours.slru(area)?);
        let sizes = |segments: &BTreeMap<u32, Vec<Page>>| segments.iter().map(|(segno, pages)| (*segno, pages.len())).collect::<Vec<_>>();
        if sizes(&truth) != sizes(&ours) {
            let (ours, truth) = (sizes(&ours), sizes(&truth));
            self.differs(format!("{area} has segments (number, pages) {ours:?} in {}, expected {truth:?}", self.ours.name()));
        }
        for (segno, pages) in &truth {
            for (at, (ours, truth)) in ours.get(segno).into_iter().flatten().zip(pages).enumerate() {
                self.compared += 1;
                if let Some(byte) = ours.iter().zip(truth).position(|(a, b)| a != b) {
                    self.differs(format!(
                        "{area} segment {segno:04X} page {at} differs from offset {byte} on: {:02X}, expected {:02X}",
                        ours[byte], truth[byte]
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Whether nothing was ever put on the page. Pages of a visibility map are initialised when it is extended, without
/// WAL.
fn is_unused(page: &Page) -> bool {
    let mut empty = ZERO_PAGE;
    page::init(&mut empty, 0);
    *page == ZERO_PAGE || *page == empty
}

/// A sequence's page holds one tuple: last value, how many values are logged ahead of it, whether it was called. What
/// is redone has the last value that was logged, nothing ahead of it, and was called; all else must be equal.
fn sequence_differs(major: Major, ours: &Page, truth: &Page) -> Option<String> {
    /// `FormData_pg_sequence_data`: `last_value` i64, `log_cnt` i64, `is_called` bool.
    const LOG_COUNT: std::ops::Range<usize> = 8..16;
    const IS_CALLED: usize = 16;
    let row = |page: &Page| {
        let tuple = usize::from(u16::from_le_bytes([page[PAGE_HEADER_SIZE], page[PAGE_HEADER_SIZE + 1]]) & 0x7FFF);
        let at = tuple + usize::from(*page.get(tuple + 22)?);
        Some(at..at + IS_CALLED + 1)
    };
    let (Some(our_row), Some(row)) = (row(ours), row(truth)) else { return Some("it has no tuple".to_owned()) };
    let (Some(our_data), Some(data)) = (ours.get(our_row.clone()), truth.get(row.clone())) else {
        return Some("its tuple lies outside".to_owned());
    };
    let logged_ahead = data[LOG_COUNT] != [0; 8];
    if our_data != data && !(logged_ahead && our_data[LOG_COUNT] == [0; 8] && our_data[IS_CALLED] == 1) {
        return Some(format!("the sequence is {our_data:02X?}, expected {data:02X?} or what was logged ahead of it"));
    }
    let mut same = *ours;
    same[our_row].copy_from_slice(data);
    match file_differences(major, rmgr::SEQ, Fork::Main, 0, &same, truth) {
        Ok(at) if at.is_empty() => None,
        Ok(at) => Some(format!("bytes at {at:?} differ")),
        Err(what) => Some(what),
    }
}

/// The directory of shared relations, as [`Cluster::forks`] names it.
pub const SHARED: (Oid, Oid) = (GLOBAL_TABLESPACE, 0);
