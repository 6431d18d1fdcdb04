//! The pages that a [`Verifier`](super::Verifier) knows, and what records do to them without naming blocks.
//!
//! A block that no record changed yet is what it was before the WAL begins ([`Origin`]): a page of [`BasePages`], zeros
//! where the WAL created or truncated the relation, or unknown. What records changed is in a [`PageBuffer`].

use std::collections::{BTreeMap, HashMap, HashSet};

use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::database::{self, DatabaseRecord};
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, XactRecord};
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, page};

use super::StoreError;
use super::page_buffer::{Overflow, PageBuffer, Place};
use crate::change::Change;
use crate::free_space_map;
use crate::visibility_map::HEAP_BLOCKS_PER_PAGE;

/// The pages as they were before the WAL begins, each read when it is first needed.
pub trait BasePages: std::fmt::Debug + Send {
    /// The page, or nothing where the fork does not reach.
    ///
    /// # Errors
    /// When it cannot be read.
    fn page(&self, rel: RelFork, blkno: BlockNumber) -> Result<Option<Page>, StoreError>;
}

/// Where a page is, and the resource manager that changed it last; none if the WAL did not yet change it.
#[derive(Debug, Clone, Copy)]
struct Known {
    place: Place,
    rmid: Option<u8>,
}

/// What the blocks of a relation are that no record changed.
#[derive(Debug, Clone, Copy)]
struct Origin {
    /// The relation in the base whose blocks they are: itself, or the one that a copied database had them from.
    base: RelNode,
    /// Blocks of each fork, by its number, that the base has at most. What lies behind them is zeros.
    blocks: [BlockNumber; Fork::ALL.len()],
}

impl Origin {
    fn zeros(node: RelNode) -> Origin {
        Origin { base: node, blocks: [0; Fork::ALL.len()] }
    }

    fn base(node: RelNode) -> Origin {
        Origin { base: node, blocks: [BlockNumber::MAX; Fork::ALL.len()] }
    }

    fn cut(&mut self, fork: Fork, blocks: BlockNumber) {
        let limit = &mut self.blocks[usize::from(fork.number())];
        *limit = blocks.min(*limit);
    }
}

#[derive(Debug)]
struct Relation {
    origin: Origin,
    blocks: BTreeMap<(Fork, BlockNumber), Known>,
}

/// A database's directory in a tablespace.
type Directory = (Oid, Oid);

/// The pages that WAL has made known.
#[derive(Debug)]
pub struct Pages {
    relations: HashMap<RelNode, Relation>,
    buffer: PageBuffer,
    base: Option<Box<dyn BasePages>>,
    /// Directories whose relations are those of another in the base, or none.
    directories: HashMap<Directory, Option<Directory>>,
    /// Whether what is not known of any relation is zeros.
    pub(super) complete_base: bool,
    /// Visibility maps whose images left out their bits.
    hollow_maps: HashSet<RelFork>,
}

impl Default for Pages {
    fn default() -> Pages {
        Pages {
            relations: HashMap::new(),
            buffer: PageBuffer::unlimited(),
            base: None,
            directories: HashMap::new(),
            complete_base: false,
            hollow_maps: HashSet::new(),
        }
    }
}

impl Pages {
    pub(super) fn set_base(&mut self, base: Box<dyn BasePages>) {
        self.base = Some(base);
    }

    pub(super) fn set_limit(&mut self, pages_max: usize, overflow: Box<dyn Overflow>) {
        self.buffer = PageBuffer::limited(pages_max, overflow);
    }

    /// Bytes of pages that there was no room for in memory.
    pub fn overflow_bytes(&self) -> u64 {
        self.buffer.overflow_bytes()
    }

    /// What a change of this block begins with, if that can be known.
    pub(super) fn before(&self, rel: RelFork, blkno: BlockNumber) -> Result<Option<Page>, StoreError> {
        if let Some((page, _)) = self.get(rel, blkno)? {
            return Ok(Some(page));
        }
        let origin = self.relations.get(&rel.node).map_or_else(|| self.origin(rel.node), |relation| relation.origin);
        if blkno >= origin.blocks[usize::from(rel.fork.number())] {
            return Ok(Some(page::ZERO_PAGE));
        }
        let Some(base) = &self.base else { return Ok(None) };
        Ok(Some(base.page(origin.base.fork(rel.fork), blkno)?.unwrap_or(page::ZERO_PAGE)))
    }

    /// The block's page, and the resource manager that changed it last.
    ///
    /// # Errors
    /// When it is not in memory and cannot be read.
    pub fn get(&self, rel: RelFork, blkno: BlockNumber) -> Result<Option<(Page, Option<u8>)>, StoreError> {
        match self.relations.get(&rel.node).and_then(|relation| relation.blocks.get(&(rel.fork, blkno))) {
            Some(known) => Ok(Some((self.buffer.get(known.place)?, known.rmid))),
            None => Ok(None),
        }
    }

    /// All known pages, and the resource manager that changed each last; none if the WAL did not change it.
    pub fn iter(&self) -> impl Iterator<Item = Result<(RelFork, BlockNumber, Page, Option<u8>), StoreError>> {
        self.relations.iter().flat_map(|(node, relation)| {
            let blocks = relation.blocks.iter();
            blocks.map(|((fork, blkno), known)| Ok((node.fork(*fork), *blkno, self.buffer.get(known.place)?, known.rmid)))
        })
    }

    /// Whether the images of this visibility map left out its bits. Postgres logs the maps of a database that it copies
    /// block by block as if they were ordinary pages, whose bytes between `pd_lower` and `pd_upper` do not count; but
    /// in a map these are all. So redo has fewer bits than the server that wrote the WAL, which is safe.
    pub fn is_hollow_map(&self, rel: RelFork) -> bool {
        self.hollow_maps.contains(&rel)
    }

    pub(super) fn note_hollow_map(&mut self, rel: RelFork) {
        self.hollow_maps.insert(rel);
    }

    pub(super) fn put(&mut self, rel: RelFork, blkno: BlockNumber, page: &Page, rmid: Option<u8>) -> Result<(), StoreError> {
        let known = self.relation(rel.node).blocks.get(&(rel.fork, blkno)).copied();
        let (place, moved) = match known {
            Some(known) => self.buffer.replace(known.place, (rel, blkno), page)?,
            None => self.buffer.put((rel, blkno), page)?,
        };
        if let Some(((rel, blkno), place)) = moved
            && let Some(known) = self.relation(rel.node).blocks.get_mut(&(rel.fork, blkno))
        {
            known.place = place;
        }
        self.relation(rel.node).blocks.insert((rel.fork, blkno), Known { place, rmid });
        Ok(())
    }

    /// Makes the block unknown.
    pub(super) fn forget(&mut self, rel: RelFork, blkno: BlockNumber) {
        self.forget_blocks(rel.node, |fork, other| (fork, other) == (rel.fork, blkno));
    }

    /// Makes everything unknown, the base and what the WAL said of relations included.
    pub(super) fn forget_all(&mut self) {
        for known in self.relations.drain().flat_map(|(_, relation)| relation.blocks.into_values()) {
            self.buffer.free(known.place);
        }
        self.base = None;
        self.directories.clear();
        self.complete_base = false;
        self.hollow_maps.clear();
    }

    fn forget_blocks(&mut self, node: RelNode, gone: impl Fn(Fork, BlockNumber) -> bool) {
        let Some(relation) = self.relations.get_mut(&node) else { return };
        relation.blocks.retain(|(fork, blkno), known| {
            let gone = gone(*fork, *blkno);
            if gone {
                self.buffer.free(known.place);
            }
            !gone
        });
    }

    fn relation(&mut self, node: RelNode) -> &mut Relation {
        let origin = self.origin(node);
        self.relations.entry(node).or_insert_with(|| Relation { origin, blocks: BTreeMap::new() })
    }

    /// What the blocks are of a relation that no record named yet.
    fn origin(&self, node: RelNode) -> Origin {
        match self.directories.get(&(node.spc, node.db)) {
            Some(None) => Origin::zeros(node),
            Some(Some((spc, db))) => Origin::base(RelNode { spc: *spc, db: *db, rel: node.rel }),
            None if self.complete_base => Origin::zeros(node),
            None => Origin::base(node),
        }
    }

    /// The relation is new, or is no more.
    fn reset(&mut self, node: RelNode) {
        self.forget_blocks(node, |_, _| true);
        self.relation(node).origin = Origin::zeros(node);
    }

    /// What `record` does beyond its blocks: creates, truncates and drops relations, copies and drops databases.
    pub(super) fn follow(&mut self, record: &Record<'_>, major: Major, free_space_maps: bool) -> Result<(), FollowError> {
        let (kind, data) = (record.kind(), record.main_data);
        match record.header.rmid {
            rmgr::SMGR => match storage::parse(kind, data, major)? {
                StorageRecord::Create { rel } if rel.fork == Fork::Main => self.relation(rel.node).origin = Origin::zeros(rel.node),
                StorageRecord::Create { rel } => self.relation(rel.node).origin.cut(rel.fork, 0),
                StorageRecord::Truncate { node, blocks, main, visibility_map, free_space_map } => {
                    if main {
                        self.cut(node, Fork::Main, blocks);
                    }
                    if free_space_map {
                        self.truncate_free_space_map(node, blocks, record.header.rmid, free_space_maps)?;
                    }
                    if visibility_map {
                        self.truncate_visibility_map(node, blocks, record.end, major)?;
                    }
                }
            },
            rmgr::XACT => match xact::parse(kind, data, major)? {
                XactRecord::Commit(done) | XactRecord::Abort(done) | XactRecord::CommitPrepared(done) | XactRecord::AbortPrepared(done) => {
                    done.dropped.into_iter().for_each(|node| self.reset(node));
                }
                XactRecord::Prepare | XactRecord::Assignment { .. } | XactRecord::Invalidations => {}
            },
            rmgr::DBASE => match database::parse(kind, data, major)? {
                DatabaseRecord::CreateFileCopy { db, spc, source_db, source_spc } => {
                    self.copy_directory((source_spc, source_db), (spc, db))?;
                }
                DatabaseRecord::CreateWalLog { db, spc } => self.reset_directory((spc, db), None),
                DatabaseRecord::Drop { db, spcs } => spcs.into_iter().for_each(|spc| self.reset_directory((spc, db), None)),
            },
            _ => {}
        }
        Ok(())
    }

    fn cut(&mut self, node: RelNode, fork: Fork, blocks: BlockNumber) {
        self.forget_blocks(node, |other, blkno| other == fork && blkno >= blocks);
        self.relation(node).origin.cut(fork, blocks);
    }

    /// Forgets all relations of a directory; what they are from now on is what the base has in `origin`, or zeros.
    fn reset_directory(&mut self, directory: Directory, origin: Option<Directory>) {
        let gone: Vec<RelNode> = self.relations.keys().filter(|node| (node.spc, node.db) == directory).copied().collect();
        for node in gone {
            self.forget_blocks(node, |_, _| true);
            self.relations.remove(&node);
        }
        self.directories.insert(directory, origin);
    }

    fn copy_directory(&mut self, source: Directory, target: Directory) -> Result<(), StoreError> {
        let origin = self.directories.get(&source).copied().unwrap_or(Some(source)).filter(|_| !self.complete_base);
        self.reset_directory(target, origin);
        let copied: Vec<RelNode> = self.relations.keys().filter(|node| (node.spc, node.db) == source).copied().collect();
        for node in copied {
            let copy = RelNode { spc: target.0, db: target.1, rel: node.rel };
            let blocks: Vec<((Fork, BlockNumber), Known)> = match self.relations.get(&node) {
                Some(relation) => relation.blocks.iter().map(|(block, known)| (*block, *known)).collect(),
                None => continue,
            };
            self.relation(copy).origin = self.relation(node).origin;
            for ((fork, blkno), known) in blocks {
                // Copying may move pages, so the place of each is looked up when its turn comes.
                if let Some((page, _)) = self.get(node.fork(fork), blkno)? {
                    self.put(copy.fork(fork), blkno, &page, known.rmid)?;
                }
            }
        }
        Ok(())
    }

    /// Cuts a visibility map to a heap of `blocks` blocks, the bits of blocks beyond it included.
    fn truncate_visibility_map(&mut self, node: RelNode, blocks: BlockNumber, lsn: Lsn, major: Major) -> Result<(), FollowError> {
        let map = node.fork(Fork::VisibilityMap);
        let last = blocks / HEAP_BLOCKS_PER_PAGE;
        let before = match self.get(map, last)? {
            None if self.base.is_some() => self.before(map, last)?.filter(|page| !page::is_new(page)).map(|page| (page, None)),
            known => known,
        };
        self.cut(node, Fork::VisibilityMap, blocks.div_ceil(HEAP_BLOCKS_PER_PAGE));
        let (Some((mut page, rmid)), true) = (before, !blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE)) else { return Ok(()) };
        let change = Change::TruncateVisibility { heap_blocks: blocks };
        crate::apply(major, lsn, last, &change, &mut page).map_err(|error| FollowError::Bad(error.to_string()))?;
        Ok(self.put(map, last, &page, rmid)?)
    }

    /// Cuts a free-space map to a heap of `blocks` blocks; if such maps are not kept, forgets what is known of it.
    fn truncate_free_space_map(&mut self, node: RelNode, blocks: BlockNumber, rmid: u8, keep: bool) -> Result<(), StoreError> {
        let map = node.fork(Fork::FreeSpaceMap);
        if !keep {
            self.cut(node, Fork::FreeSpaceMap, 0);
            return Ok(());
        }
        let (length, slot) = free_space_map::length_after_truncation(blocks);
        let last = length.saturating_sub(1);
        if let Some(slot) = slot
            && let Some((mut page, _)) = self.get(map, last)?
        {
            free_space_map::truncate(&mut page, slot);
            self.put(map, last, &page, Some(rmid))?;
        }
        self.cut(node, Fork::FreeSpaceMap, length);
        let known = self.relation(node).blocks.range((Fork::FreeSpaceMap, 0)..=(Fork::FreeSpaceMap, BlockNumber::MAX)).next_back();
        let end = known.map_or(0, |((_, blkno), _)| blkno + 1);
        let mut before = Vec::new();
        for blkno in 0..end {
            before.push(self.get(map, blkno)?.map_or(page::ZERO_PAGE, |(page, _)| page));
        }
        let mut after = Vec::new();
        free_space_map::update_upper_pages(blocks, |blkno| before.get(blkno as usize).copied(), |blkno, page| after.push((blkno, *page)));
        for (blkno, page) in after {
            self.put(map, blkno, &page, Some(rmid))?;
        }
        Ok(())
    }
}

/// Why the effects of a record could not be followed.
#[derive(Debug, thiserror::Error)]
pub(super) enum FollowError {
    /// Something is wrong with the record.
    #[error("{0}")]
    Bad(String),
    /// Something is wrong with where pages are.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<RecordError> for FollowError {
    fn from(error: RecordError) -> FollowError {
        FollowError::Bad(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every block is full of ones.
    #[derive(Debug)]
    struct Ones;

    impl BasePages for Ones {
        fn page(&self, _: RelFork, _: BlockNumber) -> Result<Option<Page>, StoreError> {
            Ok(Some([1; varve_postgres::BLCKSZ]))
        }
    }

    #[test]
    fn nothing_is_known_after_all_is_forgotten() {
        let node = |rel| RelNode { spc: 1663, db: 5, rel }.fork(Fork::Main);
        let (changed, created, of_base) = (node(1), node(2), node(3));
        let mut pages = Pages::default();
        pages.set_base(Box::new(Ones));
        pages.put(changed, 0, &[2; varve_postgres::BLCKSZ], None).unwrap();
        pages.reset(created.node);
        let known = |pages: &Pages| [changed, created, of_base].map(|rel| pages.before(rel, 0).unwrap().map(|page| page[100]));
        assert_eq!(known(&pages), [Some(2), Some(0), Some(1)], "changed, created, of the base");
        pages.forget_all();
        assert_eq!(known(&pages), [None; 3], "the base is out of date, too");
        pages.put(created, 7, &[3; varve_postgres::BLCKSZ], None).unwrap();
        assert_eq!(pages.before(created, 7).unwrap().map(|page| page[100]), Some(3), "and it goes on");
    }
}
