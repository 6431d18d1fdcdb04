//! B-tree indexes: the page functions of `access/nbtree/nbtxlog.c`.
//!
//! Record data is that of `access/nbtxlog.h`. What a record does to one of its blocks never depends on the other
//! blocks' contents, only on their numbers, so each block is redone alone. The layouts of 14 to 18 differ only in
//! fields for recovery conflicts, which stand behind what redo needs.
//!
//! - [`page`]: the special space, and building pages; [`meta`]: the metapage; [`posting`]: tuples with a list of heap
//!   pointers
//! - [`insert`], [`split`]: what insertion does, to the root too; [`dedup`]: merging of equal keys
//! - [`delete`]: tuples leave a leaf; [`unlink`]: pages leave the tree

mod dedup;
mod delete;
mod insert;
mod meta;
mod page;
mod posting;
mod split;
mod unlink;

use varve_postgres::Page;

use crate::{Fault, Redo};

const INSERT_LEAF: u8 = 0x00;
const INSERT_UPPER: u8 = 0x10;
const INSERT_META: u8 = 0x20;
const SPLIT_L: u8 = 0x30;
const SPLIT_R: u8 = 0x40;
const INSERT_POST: u8 = 0x50;
const DEDUP: u8 = 0x60;
const DELETE: u8 = 0x70;
const UNLINK_PAGE: u8 = 0x80;
const UNLINK_PAGE_META: u8 = 0x90;
const NEWROOT: u8 = 0xA0;
const MARK_PAGE_HALFDEAD: u8 = 0xB0;
const VACUUM: u8 = 0xC0;
const META_CLEANUP: u8 = 0xE0;

/// Bytes in front of the counts in `xl_btree_delete`: the transaction id for recovery conflicts.
const DELETE_HORIZON_SIZE: usize = 4;

/// `btree_redo`. `XLOG_BTREE_REUSE_PAGE` is not here: it names no block.
pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    match (redo.record.info, redo.record.block_id) {
        (INSERT_LEAF | INSERT_UPPER | INSERT_META, 0) => insert::retail(redo, page),
        (INSERT_POST, 0) => insert::posting_split(redo, page),
        (INSERT_UPPER | INSERT_META, 1) | (SPLIT_L | SPLIT_R, 3) | (NEWROOT, 1) => page::clear_incomplete_split(page),
        (SPLIT_L, 0) => split::left(redo, page, true),
        (SPLIT_R, 0) => split::left(redo, page, false),
        (SPLIT_L | SPLIT_R, 1) => split::right(redo, page),
        (SPLIT_L | SPLIT_R, 2) => split::neighbour(redo, page),
        (DEDUP, 0) => dedup::redo(redo, page),
        (VACUUM, 0) => delete::redo(redo, page, 0),
        (DELETE, 0) => delete::redo(redo, page, DELETE_HORIZON_SIZE),
        (MARK_PAGE_HALFDEAD, 0) => unlink::halfdead_leaf(redo, page),
        (MARK_PAGE_HALFDEAD, 1) => unlink::halfdead_parent(redo, page),
        (UNLINK_PAGE | UNLINK_PAGE_META, 0..=3) => unlink::unlink(redo, page),
        (NEWROOT, 0) => insert::new_root(redo, page),
        (INSERT_META | NEWROOT, 2) | (UNLINK_PAGE_META, 4) | (META_CLEANUP, 0) => meta::restore(redo, page),
        (
            INSERT_LEAF | INSERT_UPPER | INSERT_META | INSERT_POST | SPLIT_L | SPLIT_R | DEDUP | VACUUM | DELETE | MARK_PAGE_HALFDEAD
            | UNLINK_PAGE | UNLINK_PAGE_META | NEWROOT | META_CLEANUP,
            _,
        ) => Err("a record of this type has no block with this id".into()),
        _ => Err(Fault::Unsupported),
    }
}
