//! Relations and SLRU areas, as Postgres knows them, on top of keys and values: sizes, blocks, lists.
//!
//! Here is where the rule that nothing deleted may come back is kept for reads: a relation size at or below its
//! database's floor counts as absent, and a version of a block at or below the floor of its relation or of its database
//! does not count ([`RelationSize`], [`DatabaseEntry`]).

use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, Page, RelFork};

use crate::database::DatabaseEntry;
use crate::free_space;
use crate::history::{History, HistoryError};
use crate::key::{Key, KeyKind};
use crate::relation_size::RelationSize;
use crate::slru_extent::SlruExtent;

/// A relation or a page that could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RelationError {
    /// No such relation fork.
    #[error("relation {rel} does not exist at {lsn}")]
    NoRelation {
        /// The fork.
        rel: RelFork,
        /// Where it was looked for.
        lsn: Lsn,
    },
    /// The relation fork is shorter.
    #[error("block {block} of relation {rel} does not exist at {lsn}: it has {blocks} blocks")]
    BeyondEnd {
        /// The fork.
        rel: RelFork,
        /// The block.
        block: BlockNumber,
        /// Blocks that the fork has.
        blocks: u32,
        /// Where it was looked for.
        lsn: Lsn,
    },
    /// No such SLRU page.
    #[error("page {page} of {area} does not exist at {lsn}")]
    NoSlruPage {
        /// The area.
        area: SlruKind,
        /// The page.
        page: u32,
        /// Where it was looked for.
        lsn: Lsn,
    },
    /// The history could not be read.
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// A relation fork's size and floors at an LSN.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LiveSize {
    /// LSN of the version.
    pub version: Lsn,
    /// Size and the relation's own floors; it may say that the fork does not exist.
    pub size: RelationSize,
    /// The database's floor.
    pub database_floor: Lsn,
}

impl LiveSize {
    /// LSN at or below which versions of `block` are dead.
    pub fn floor(&self, block: BlockNumber) -> Lsn {
        self.size.floor(block).max(self.database_floor)
    }
}

fn malformed(key: Key, lsn: Lsn) -> HistoryError {
    HistoryError(format!("the value of the {key}, read at {lsn}, is malformed"))
}

/// A database's entry in a tablespace; `None` if it never had a directory there.
///
/// # Errors
/// When the history cannot be read.
pub fn database(history: &(impl History + ?Sized), spc: Oid, db: Oid, lsn: Lsn) -> Result<Option<DatabaseEntry>, HistoryError> {
    let key = Key::database(spc, db);
    let Some(value) = history.get(key, lsn)? else { return Ok(None) };
    DatabaseEntry::decode(&value).map(Some).ok_or_else(|| malformed(key, lsn))
}

/// The floor of a database in a tablespace; shared relations have none.
///
/// # Errors
/// When the history cannot be read.
pub fn database_floor(history: &(impl History + ?Sized), spc: Oid, db: Oid, lsn: Lsn) -> Result<Lsn, HistoryError> {
    if spc == GLOBAL_TABLESPACE {
        return Ok(Lsn::INVALID);
    }
    Ok(database(history, spc, db, lsn)?.map_or(Lsn::INVALID, |entry| entry.floor))
}

/// What is known of a fork's size at `lsn`; `None` if it has no version above its database's floor.
///
/// # Errors
/// When the history cannot be read.
pub fn live_size(history: &(impl History + ?Sized), rel: RelFork, lsn: Lsn) -> Result<Option<LiveSize>, HistoryError> {
    let database_floor = database_floor(history, rel.node.spc, rel.node.db, lsn)?;
    let key = Key::relation_size(rel);
    let Some((version, value)) = history.get_above(key, database_floor, lsn)? else { return Ok(None) };
    let size = RelationSize::decode(&value).ok_or_else(|| malformed(key, lsn))?;
    Ok(Some(LiveSize { version, size, database_floor }))
}

/// Blocks in a fork at `lsn`; `None` if it does not exist.
///
/// # Errors
/// When the history cannot be read.
pub fn blocks(history: &(impl History + ?Sized), rel: RelFork, lsn: Lsn) -> Result<Option<u32>, HistoryError> {
    Ok(live_size(history, rel, lsn)?.filter(|live| live.size.exists).map(|live| live.size.blocks))
}

/// Checks that `block` is within the fork and gives its floor.
///
/// # Errors
/// When the fork does not exist, or is shorter.
pub fn floor_of_block(live: Option<&LiveSize>, rel: RelFork, block: BlockNumber, lsn: Lsn) -> Result<Lsn, RelationError> {
    let live = live.filter(|live| live.size.exists).ok_or(RelationError::NoRelation { rel, lsn })?;
    let blocks = live.size.blocks;
    if block >= blocks {
        return Err(RelationError::BeyondEnd { rel, block, blocks, lsn });
    }
    Ok(live.floor(block))
}

/// Block `block` of `rel` at `lsn`: zeros if nothing was written to it since the fork got it.
///
/// # Errors
/// When there is no such block, or the history cannot be read.
pub fn block(history: &(impl History + ?Sized), rel: RelFork, block: BlockNumber, lsn: Lsn) -> Result<Box<Page>, RelationError> {
    let live = live_size(history, rel, lsn)?;
    let floor = floor_of_block(live.as_ref(), rel, block, lsn)?;
    Ok(block_above(history, rel, block, floor, lsn)?)
}

/// Likewise where the fork's size is known, and the block is within it; `floor` is the block's.
///
/// # Errors
/// When the history cannot be read.
pub fn block_above(
    history: &(impl History + ?Sized),
    rel: RelFork,
    block: BlockNumber,
    floor: Lsn,
    lsn: Lsn,
) -> Result<Box<Page>, HistoryError> {
    let mut page = history.page(Key::block(rel, block), floor, lsn)?.unwrap_or_else(|| Box::new(ZERO_PAGE));
    if rel.fork == Fork::FreeSpaceMap {
        free_space::fold(history, rel, block, lsn, &mut page)?;
    }
    Ok(page)
}

/// Calls `visit` for each fork that exists in a database and tablespace at `lsn`, in order of keys, with its number of
/// blocks.
///
/// # Errors
/// When the history cannot be read, or what `visit` returns.
pub fn list(
    history: &(impl History + ?Sized),
    spc: Oid,
    db: Oid,
    lsn: Lsn,
    visit: &mut dyn FnMut(RelFork, u32) -> Result<(), HistoryError>,
) -> Result<(), HistoryError> {
    let floor = database_floor(history, spc, db, lsn)?;
    let (from, to) = Key::relation_sizes_of(spc, db);
    history.scan_above(from, to, floor, lsn, &mut |key, value| {
        let Some(KeyKind::RelationSize { rel }) = key.kind() else { return Err(malformed(key, lsn)) };
        let size = RelationSize::decode(&value).ok_or_else(|| malformed(key, lsn))?;
        if size.exists { visit(rel, size.blocks) } else { Ok(()) }
    })
}

/// Which pages of an SLRU area exist at `lsn`.
///
/// # Errors
/// When the history cannot be read.
pub fn slru_extent(history: &(impl History + ?Sized), area: SlruKind, lsn: Lsn) -> Result<SlruExtent, HistoryError> {
    let key = Key::slru_extent(area);
    match history.get(key, lsn)? {
        None => Ok(SlruExtent::default()),
        Some(value) => SlruExtent::decode(&value).ok_or_else(|| malformed(key, lsn)),
    }
}

/// Page `page` of an SLRU area at `lsn`: zeros if nothing was written to it.
///
/// # Errors
/// When there is no such page, or the history cannot be read.
pub fn slru_page(history: &(impl History + ?Sized), area: SlruKind, page: u32, lsn: Lsn) -> Result<Box<Page>, RelationError> {
    if !slru_extent(history, area, lsn)?.contains(page) {
        return Err(RelationError::NoSlruPage { area, page, lsn });
    }
    let found = history.page(Key::slru_page(area, page), Lsn::INVALID, lsn)?;
    Ok(found.unwrap_or_else(|| Box::new(ZERO_PAGE)))
}
