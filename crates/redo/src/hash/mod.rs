//! Hash indexes: the page functions of `access/hash/hash_xlog.c`.
//!
//! Record data is that of `access/hash_xlog.h`. What a record does to one of its blocks never depends on the other
//! blocks' contents, only on their numbers, so each block is redone alone. Several records name the primary bucket
//! page, block 0, only so that Postgres locks it; it stays as it is.
//!
//! - [`page`]: the special space, and building pages; [`meta`]: the metapage; [`bitmap`]: which overflow pages are in
//!   use
//! - [`bucket`]: tuples of bucket and overflow pages; [`chain`]: overflow pages come and go; [`split`]: a bucket is
//!   divided

mod bitmap;
mod bucket;
mod chain;
mod meta;
mod page;
mod split;

use varve_postgres::Page;

use crate::{Fault, Redo};

const INIT_META_PAGE: u8 = 0x00;
const INIT_BITMAP_PAGE: u8 = 0x10;
const INSERT: u8 = 0x20;
const ADD_OVFL_PAGE: u8 = 0x30;
const SPLIT_ALLOCATE_PAGE: u8 = 0x40;
const SPLIT_PAGE: u8 = 0x50;
const SPLIT_COMPLETE: u8 = 0x60;
const MOVE_PAGE_CONTENTS: u8 = 0x70;
const SQUEEZE_PAGE: u8 = 0x80;
const DELETE: u8 = 0x90;
const SPLIT_CLEANUP: u8 = 0xA0;
const UPDATE_META_PAGE: u8 = 0xB0;
const VACUUM_ONE_PAGE: u8 = 0xC0;

/// `hash_redo`.
pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    match (redo.record.info, redo.record.block_id) {
        (INIT_META_PAGE, 0) => meta::init(redo, page),
        (INIT_BITMAP_PAGE, 0) => bitmap::init(redo, page),
        (INIT_BITMAP_PAGE, 1) => meta::first_bitmap(page),
        (INSERT, 0) => bucket::insert(redo, page),
        (INSERT, 1) => meta::add_tuples(page, 1.0),
        (ADD_OVFL_PAGE, 0) => chain::new_page(redo, page),
        (ADD_OVFL_PAGE, 1) => chain::link_new_page(redo, page),
        (ADD_OVFL_PAGE, 2) => bitmap::set(redo, page),
        (ADD_OVFL_PAGE, 3) => bitmap::init(redo, page),
        (ADD_OVFL_PAGE, 4) => meta::add_overflow_page(redo, page),
        (SPLIT_ALLOCATE_PAGE, 0) => split::allocate_old(redo, page),
        (SPLIT_ALLOCATE_PAGE, 1) => split::allocate_new(redo, page),
        (SPLIT_ALLOCATE_PAGE, 2) => split::allocate_meta(redo, page),
        (SPLIT_PAGE, 0) => Err("a bucket's new page must come as a full-page image, and the record has none".into()),
        (SPLIT_COMPLETE, 0 | 1) => split::complete(redo, page),
        (MOVE_PAGE_CONTENTS | SQUEEZE_PAGE | DELETE, 0) => Ok(()),
        (MOVE_PAGE_CONTENTS, 1) => bucket::receive(redo, page),
        (MOVE_PAGE_CONTENTS, 2) => bucket::delete(redo, page),
        (SQUEEZE_PAGE, 1) => chain::squeeze_into(redo, page),
        (SQUEEZE_PAGE, 2) => page::init(page, page::Opaque::UNUSED),
        (SQUEEZE_PAGE, 3 | 4) => chain::unlink_page(redo, page),
        (SQUEEZE_PAGE, 5) => bitmap::clear(redo, page),
        (SQUEEZE_PAGE, 6) => meta::set_first_free(redo, page),
        (DELETE, 1) => bucket::vacuum(redo, page),
        (SPLIT_CLEANUP, 0) => split::cleanup(page),
        (UPDATE_META_PAGE, 0) => meta::set_tuples(redo, page),
        (VACUUM_ONE_PAGE, 0) => bucket::delete_dead(redo, page),
        (VACUUM_ONE_PAGE, 1) => bucket::count_dead(redo, page),
        (INIT_META_PAGE..=VACUUM_ONE_PAGE, _) => Err("a record of this type has no block with this id".into()),
        _ => Err(Fault::Unsupported),
    }
}
