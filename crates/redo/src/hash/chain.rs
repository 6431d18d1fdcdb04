//! A bucket's chain of overflow pages: it grows at its end (`xl_hash_add_ovfl_page`), and is squeezed from its end
//! (`xl_hash_squeeze_page`).

use varve_postgres::{BlockNumber, Page};

use super::bucket;
use super::page::{self, OVERFLOW_PAGE, Opaque};
use crate::cursor::Cursor;
use crate::index_tuple::INVALID_BLOCK;
use crate::{Fault, Redo};

fn number_of(redo: &Redo<'_>, id: u8) -> Result<BlockNumber, Fault> {
    redo.record.block_number(id).ok_or_else(|| format!("the record has no block with id {id}").into())
}

/// `xl_hash_add_ovfl_page`, block 0: the new overflow page, last of its bucket.
pub(super) fn new_page(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let bucket = Cursor::new(redo.record.data).u32()?;
    let prev = number_of(redo, 1)?;
    page::init(page, Opaque { prev, next: INVALID_BLOCK, bucket, flags: OVERFLOW_PAGE })
}

/// The same, block 1: the page that was last.
pub(super) fn link_new_page(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let next = number_of(redo, 0)?;
    page::change(page, |opaque| opaque.next = next)
}

/// `xl_hash_squeeze_page`.
struct Squeeze {
    prev: BlockNumber,
    next: BlockNumber,
    tuples_len: u16,
    /// Whether the page that takes the tuples is also the one before that which goes.
    into_prev: bool,
}

impl Squeeze {
    fn read(redo: &Redo<'_>) -> Result<Squeeze, Fault> {
        let mut main = Cursor::new(redo.record.main_data);
        let (prev, next, tuples_len) = (main.u32()?, main.u32()?, main.u16()?);
        main.take(1)?; // whether the first page of the bucket takes the tuples
        Ok(Squeeze { prev, next, tuples_len, into_prev: main.u8()? != 0 })
    }
}

/// `xl_hash_squeeze_page`, block 1: the page that takes the tuples of the one that goes. There may be none: then block
/// 1 is in the record for its link, or for its lock alone.
pub(super) fn squeeze_into(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let squeeze = Squeeze::read(redo)?;
    if squeeze.tuples_len > 0 {
        bucket::add_all(redo, page, squeeze.tuples_len)?;
    }
    if squeeze.into_prev {
        page::change(page, |opaque| opaque.next = squeeze.next)?;
    }
    Ok(())
}

/// The same, blocks 3 and 4: the pages before and after the one that goes.
pub(super) fn unlink_page(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let squeeze = Squeeze::read(redo)?;
    match redo.record.block_id {
        3 if squeeze.into_prev => Err("the page before is block 1, and there is a block 3".into()),
        3 => page::change(page, |opaque| opaque.next = squeeze.next),
        _ => page::change(page, |opaque| opaque.prev = squeeze.prev),
    }
}
