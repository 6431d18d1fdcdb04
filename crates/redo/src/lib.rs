//! Redo: pure functions `(page, change) -> page`, one module a resource manager.
//!
//! [`change::Change`] is what ingest cut out of a WAL record for one page: for a relation block a
//! [`change::BlockRecord`], the record trimmed to that block; for pages that Postgres changes without naming them in
//! the record (visibility maps, transaction status) a change of our own. [`apply`] makes the page what Postgres's own
//! redo would have made of it, byte for byte, apart from what Postgres masks in its consistency check ([`mask`]).
//!
//! No I/O, no `unsafe`, no panic and no unbounded allocation on any input: a record that contradicts its page is a
//! [`RedoError`]. Full-page images never come to [`apply`]: ingest stores them as images, which [`restore_image`]
//! gives.
//!
//! How a page function is written: `docs/redo.md`.

pub mod change;
pub mod free_space_map;
pub mod mask;
pub mod verify;
pub mod visibility_map;

mod brin;
mod btree;
mod cursor;
mod generic;
mod gin;
mod gist;
mod hash;
mod heap;
mod image;
mod index_tuple;
mod item;
mod sequence;
mod slru;
mod spgist;
mod supported;
mod xlog;

use varve_postgres::{BlockNumber, Lsn, Major, Page, page, wal::rmgr};

pub use heap::free_space::free_space_effect;
pub use heap::layout::HeapLayout;
pub use heap::named::NamedTuples;
pub use image::restore_image;
pub use item::heap_free_space;
pub use supported::is_supported;

use change::{BlockRecord, Change};

/// A change that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedoError {
    /// No page function for this record type.
    #[error("{} record with info {info:02X} is not supported", rmgr::name(*rmid))]
    Unsupported {
        /// Resource manager.
        rmid: u8,
        /// Its record type.
        info: u8,
    },
    /// The record and the page contradict each other, or the record itself is malformed.
    #[error("{} record with info {info:02X}, ending at {lsn}, block {blkno} (id {block_id}): {what}", rmgr::name(*rmid))]
    Inconsistent {
        /// Resource manager.
        rmid: u8,
        /// Its record type.
        info: u8,
        /// End of the record.
        lsn: Lsn,
        /// The block being redone.
        blkno: BlockNumber,
        /// The block's id in the record.
        block_id: u8,
        /// What is wrong.
        what: String,
    },
    /// A change whose stored bytes cannot be decoded, or one of ours that does not fit its page.
    #[error("change ending at {lsn}, page {blkno}: {what}")]
    BadChange {
        /// End of the record that it came from.
        lsn: Lsn,
        /// The page.
        blkno: BlockNumber,
        /// What is wrong.
        what: String,
    },
}

/// What a page function is given besides the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Redo<'a> {
    /// The major that wrote the record.
    pub(crate) major: Major,
    /// End of the record: the page's LSN afterwards.
    pub(crate) lsn: Lsn,
    /// The record, trimmed to the block.
    pub(crate) record: &'a BlockRecord<'a>,
}

impl Redo<'_> {
    /// The fault of a record that has a block which its type does not know.
    pub(crate) fn no_such_block(&self) -> Fault {
        Fault::Inconsistent(format!("records of this type have no block {}", self.record.block_id))
    }
}

/// What a page function says is wrong; [`apply`] adds which record and block.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// No such record type.
    #[error("no such record type")]
    Unsupported,
    /// What contradicts what.
    #[error("{0}")]
    Inconsistent(String),
}

impl From<String> for Fault {
    fn from(what: String) -> Fault {
        Fault::Inconsistent(what)
    }
}

impl From<&str> for Fault {
    fn from(what: &str) -> Fault {
        Fault::Inconsistent(what.to_owned())
    }
}

/// Makes `change`, from a record that ends at `lsn`, to `page`, which is block `blkno` of its fork (or page `blkno` of
/// its SLRU). The base of a change with [`Change::will_init`] may be anything.
///
/// # Errors
/// [`RedoError`]; the page is then not to be used.
pub fn apply(major: Major, lsn: Lsn, blkno: BlockNumber, change: &Change<'_>, page: &mut Page) -> Result<(), RedoError> {
    let mut layout = HeapLayout::default();
    apply_loosely(major, lsn, blkno, change, page, &mut layout)?;
    layout.settle(page, blkno)
}

/// The same as one of a series of changes to the page, whose `layout` is kept from one to the next and
/// [settled](HeapLayout::settle) before the page is used. Heap pages then are compacted once instead of at each prune.
///
/// # Errors
/// [`RedoError`]; page and layout are then not to be used.
pub fn apply_loosely(
    major: Major,
    lsn: Lsn,
    blkno: BlockNumber,
    change: &Change<'_>,
    page: &mut Page,
    layout: &mut HeapLayout,
) -> Result<(), RedoError> {
    let bad_change = |what| RedoError::BadChange { lsn, blkno, what };
    if let Change::Record(record) = change {
        return apply_record_loosely(major, lsn, blkno, record, page, layout);
    }
    layout.end(page).map_err(|fault| bad_change(fault.to_string()))?;
    match change {
        Change::ClearVisibility { heap_blocks, flags } => visibility_map::clear(page, blkno, heap_blocks, *flags),
        Change::TruncateVisibility { heap_blocks } => visibility_map::truncate(page, blkno, *heap_blocks),
        other => slru::apply(page, blkno, other),
    }
    .map_err(bad_change)
}

/// [`apply_loosely`] of a [`Change::Record`].
///
/// # Errors
/// As there.
pub fn apply_record_loosely(
    major: Major,
    lsn: Lsn,
    blkno: BlockNumber,
    record: &BlockRecord<'_>,
    page: &mut Page,
    layout: &mut HeapLayout,
) -> Result<(), RedoError> {
    if !matches!(record.rmid, rmgr::HEAP | rmgr::HEAP2) {
        layout.end(page).map_err(|fault| RedoError::BadChange { lsn, blkno, what: fault.to_string() })?;
    }
    let redo = Redo { major, lsn, record };
    let done = match record.rmid {
        rmgr::XLOG => xlog::redo(&redo, page),
        rmgr::HEAP => heap::redo(&redo, page, layout),
        rmgr::HEAP2 => heap::redo_heap2(&redo, page, layout),
        rmgr::BTREE => btree::redo(&redo, page),
        rmgr::HASH => hash::redo(&redo, page),
        rmgr::GIN => gin::redo(&redo, page),
        rmgr::GIST => gist::redo(&redo, page),
        rmgr::SEQ => sequence::redo(&redo, page),
        rmgr::SPGIST => spgist::redo(&redo, page),
        rmgr::BRIN => brin::redo(&redo, page),
        rmgr::GENERIC => generic::redo(&redo, page),
        _ => Err(Fault::Unsupported),
    };
    match done {
        Ok(()) => {
            page::set_lsn(page, lsn);
            Ok(())
        }
        Err(Fault::Unsupported) => Err(RedoError::Unsupported { rmid: record.rmid, info: record.info }),
        Err(Fault::Inconsistent(what)) => {
            Err(RedoError::Inconsistent { rmid: record.rmid, info: record.info, lsn, blkno, block_id: record.block_id, what })
        }
    }
}
