//! Insertion without a page split: `xl_btree_insert`, and `xl_btree_newroot`, which begins a tree or a level.

use varve_postgres::Page;

use super::page::{self, LEAF, NONE, Opaque, ROOT};
use super::posting;
use crate::cursor::Cursor;
use crate::{Fault, Redo, item};

/// `btree_xlog_insert`, block 0: the tuple goes in at its place.
pub(super) fn retail(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = Cursor::new(redo.record.main_data).u16()?;
    insert_at(page, redo.record.data, offset)
}

/// The same where the new heap pointer falls into the posting list of the tuple before it (`XLOG_BTREE_INSERT_POST`).
/// The record has the tuple as it was before it changed pointers with the list.
pub(super) fn posting_split(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = Cursor::new(redo.record.main_data).u16()?;
    let mut data = Cursor::new(redo.record.data);
    let at = data.u16()?;
    let mut new = data.rest().to_vec();
    posting::swap(&mut new, item::item_mut(page, offset.wrapping_sub(1))?, at)?;
    insert_at(page, &new, offset)
}

fn insert_at(page: &mut Page, tuple: &[u8], offset: item::OffsetNumber) -> Result<(), Fault> {
    if offset == 0 {
        return Err("a tuple for line pointer 0".into());
    }
    Opaque::read(page)?;
    item::add_item(page, tuple, offset, false, false)?;
    Ok(())
}

/// `btree_xlog_newroot`, block 0: an empty leaf, or an upper page with the two halves of the old root.
pub(super) fn new_root(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    let block = main.u32()?;
    let level = main.u32()?;
    if block != redo.record.blkno {
        return Err(format!("the record says that the root is block {block}").into());
    }
    let flags = if level == 0 { ROOT | LEAF } else { ROOT };
    page::init(page, Opaque { prev: NONE, next: NONE, level, flags, cycle_id: 0 })?;
    if level > 0 { page::restore(page, redo.record.data) } else { Ok(()) }
}
