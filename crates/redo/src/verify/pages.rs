//! The pages that a [`Verifier`](super::Verifier) knows, and what records do to them without naming blocks.

use std::collections::{BTreeMap, HashMap, HashSet};

use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::database::{self, DatabaseRecord};
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, XactRecord};
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, page};

use crate::change::Change;
use crate::free_space_map;
use crate::visibility_map::HEAP_BLOCKS_PER_PAGE;

/// A page, and the resource manager that changed it last; none if the WAL did not yet change it.
#[derive(Debug, Clone)]
struct Known {
    page: Box<Page>,
    rmid: Option<u8>,
}

type Blocks = BTreeMap<(Fork, BlockNumber), Known>;

/// The pages that WAL has made known.
#[derive(Debug, Default)]
pub struct Pages {
    relations: HashMap<RelNode, Blocks>,
    /// Relations that the WAL created, or truncated: what is not known of them is zeros.
    created: HashSet<RelNode>,
    /// Whether what is not known of any relation is zeros.
    pub(super) complete_base: bool,
    /// Visibility maps whose images left out their bits.
    hollow_maps: HashSet<RelFork>,
}

impl Pages {
    /// What a change of this block begins with, if that can be known.
    pub(super) fn base(&self, rel: RelFork, blkno: BlockNumber) -> Option<Page> {
        match self.get(rel, blkno) {
            Some((page, _)) => Some(*page),
            None => (self.complete_base || self.created.contains(&rel.node)).then_some(page::ZERO_PAGE),
        }
    }

    /// The block's page, and the resource manager that changed it last.
    pub fn get(&self, rel: RelFork, blkno: BlockNumber) -> Option<(&Page, Option<u8>)> {
        let known = self.relations.get(&rel.node)?.get(&(rel.fork, blkno))?;
        Some((&known.page, known.rmid))
    }

    /// All known pages, and the resource manager that changed each last; none if the WAL did not change it.
    pub fn iter(&self) -> impl Iterator<Item = (RelFork, BlockNumber, &Page, Option<u8>)> {
        self.relations
            .iter()
            .flat_map(|(node, blocks)| blocks.iter().map(|((fork, blkno), known)| (node.fork(*fork), *blkno, &*known.page, known.rmid)))
    }

    pub(super) fn know(&mut self, rel: RelFork, blkno: BlockNumber, page: &Page) {
        self.relations.entry(rel.node).or_default().insert((rel.fork, blkno), Known { page: Box::new(*page), rmid: None });
    }

    /// Whether the images of this visibility map left out its bits. Postgres logs the maps of a database that it copies block by block
    /// as if they were ordinary pages, whose bytes between `pd_lower` and `pd_upper` do not count; but in a map these are all. So redo
    /// has fewer bits than the server that wrote the WAL, which is safe.
    pub fn is_hollow_map(&self, rel: RelFork) -> bool {
        self.hollow_maps.contains(&rel)
    }

    pub(super) fn note_hollow_map(&mut self, rel: RelFork) {
        self.hollow_maps.insert(rel);
    }

    pub(super) fn put(&mut self, rel: RelFork, blkno: BlockNumber, page: Page, rmid: u8) {
        self.relations.entry(rel.node).or_default().insert((rel.fork, blkno), Known { page: Box::new(page), rmid: Some(rmid) });
    }

    pub(super) fn forget(&mut self, rel: RelFork, blkno: BlockNumber) {
        if let Some(blocks) = self.relations.get_mut(&rel.node) {
            blocks.remove(&(rel.fork, blkno));
        }
    }

    /// What `record` does beyond its blocks: creates, truncates and drops relations, copies and drops databases.
    pub(super) fn follow(&mut self, record: &Record, major: Major, free_space_maps: bool) -> Result<(), String> {
        let (kind, data) = (record.kind(), &record.main_data[..]);
        let wrong = |error: RecordError| error.to_string();
        match record.header.rmid {
            rmgr::SMGR => match storage::parse(kind, data, major).map_err(wrong)? {
                StorageRecord::Create { rel } if rel.fork == Fork::Main => {
                    self.created.insert(rel.node);
                }
                StorageRecord::Create { .. } => {}
                StorageRecord::Truncate { node, blocks, main, visibility_map, free_space_map } => {
                    if main {
                        self.created.insert(node);
                    }
                    if let Some(known) = self.relations.get_mut(&node) {
                        known.retain(|(fork, blkno), _| !(main && *fork == Fork::Main && *blkno >= blocks));
                        if free_space_map && free_space_maps {
                            truncate_free_space_map(known, blocks, record.header.rmid);
                        } else if free_space_map {
                            known.retain(|(fork, _), _| *fork != Fork::FreeSpaceMap);
                        }
                        if visibility_map {
                            truncate_visibility_map(known, blocks, record.end, major)?;
                        }
                    }
                }
            },
            rmgr::XACT => match xact::parse(kind, data, major).map_err(wrong)? {
                XactRecord::Commit(done) | XactRecord::Abort(done) | XactRecord::CommitPrepared(done) | XactRecord::AbortPrepared(done) => {
                    for node in done.dropped {
                        self.relations.remove(&node);
                        self.created.remove(&node);
                    }
                }
                XactRecord::Prepare | XactRecord::Assignment { .. } | XactRecord::Invalidations => {}
            },
            rmgr::DBASE => match database::parse(kind, data, major).map_err(wrong)? {
                DatabaseRecord::CreateFileCopy { db, spc, source_db, source_spc } => {
                    self.drop_database(db, spc);
                    let copied = |node: &RelNode| node.db == source_db && node.spc == source_spc;
                    let copy = |node: &RelNode| RelNode { spc, db, rel: node.rel };
                    let relations: Vec<_> =
                        self.relations.iter().filter(|(node, _)| copied(node)).map(|(node, blocks)| (copy(node), blocks.clone())).collect();
                    self.relations.extend(relations);
                }
                DatabaseRecord::CreateWalLog { .. } => {}
                DatabaseRecord::Drop { db, spcs } => spcs.into_iter().for_each(|spc| self.drop_database(db, spc)),
            },
            _ => {}
        }
        Ok(())
    }

    fn drop_database(&mut self, db: Oid, spc: Oid) {
        let gone = |node: &RelNode| node.db == db && node.spc == spc;
        self.relations.retain(|node, _| !gone(node));
        self.created.retain(|node| !gone(node));
    }
}

/// Cuts a visibility map to a heap of `blocks` blocks, the bits of blocks beyond it included.
fn truncate_visibility_map(known: &mut Blocks, blocks: BlockNumber, lsn: Lsn, major: Major) -> Result<(), String> {
    let last = blocks / HEAP_BLOCKS_PER_PAGE;
    known.retain(|(fork, blkno), _| *fork != Fork::VisibilityMap || *blkno < blocks.div_ceil(HEAP_BLOCKS_PER_PAGE));
    let Some(known) = known.get_mut(&(Fork::VisibilityMap, last)) else { return Ok(()) };
    let change = Change::TruncateVisibility { heap_blocks: blocks };
    crate::apply(major, lsn, last, &change, &mut known.page).map_err(|error| error.to_string())
}

/// Cuts a free-space map to a heap of `blocks` blocks.
fn truncate_free_space_map(known: &mut Blocks, blocks: BlockNumber, rmid: u8) {
    let (length, slot) = free_space_map::length_after_truncation(blocks);
    let key = |blkno| (Fork::FreeSpaceMap, blkno);
    if let (Some(slot), Some(last)) = (slot, known.get_mut(&key(length.saturating_sub(1)))) {
        free_space_map::truncate(&mut last.page, slot);
        last.rmid = Some(rmid);
    }
    known.retain(|(fork, blkno), _| *fork != Fork::FreeSpaceMap || *blkno < length);
    let end = known.range(key(0)..=key(BlockNumber::MAX)).next_back().map_or(0, |((_, blkno), _)| blkno + 1);
    let before: Vec<Page> = (0..end).map(|blkno| known.get(&key(blkno)).map_or(page::ZERO_PAGE, |known| *known.page)).collect();
    free_space_map::update_upper_pages(
        blocks,
        |blkno| before.get(blkno as usize).copied(),
        |blkno, page| {
            known.insert(key(blkno), Known { page: Box::new(*page), rmid: Some(rmid) });
        },
    );
}
