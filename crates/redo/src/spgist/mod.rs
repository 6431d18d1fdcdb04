//! SP-GiST (`access/spgxlog.h`, `access/spgist_private.h`): inner tuples whose nodes point down, and chains of leaf
//! tuples.
//!
//! - [`page`]: what a page consists of, and what records have in common.
//! - [`insert`]: a new leaf tuple, and the changes to the tree that make room for it; [`picksplit`] is the largest of
//!   them.
//! - [`vacuum`]: removal of tuples and of what insertions left behind.
//!
//! Tuples refer to one another by page and offset number, so what must go away leaves a dead tuple in its place.

mod insert;
mod page;
mod picksplit;
mod vacuum;

use varve_postgres::Page;

use crate::{Fault, Redo};

const ADD_LEAF: u8 = 0x10;
const MOVE_LEAFS: u8 = 0x20;
const ADD_NODE: u8 = 0x30;
const SPLIT_TUPLE: u8 = 0x40;
const PICKSPLIT: u8 = 0x50;
const VACUUM_LEAF: u8 = 0x60;
const VACUUM_ROOT: u8 = 0x70;
const VACUUM_REDIRECT: u8 = 0x80;

pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = redo.record;
    match (record.info, record.block_id) {
        (ADD_LEAF, 0..=1) => insert::add_leaf(record, page),
        (MOVE_LEAFS, 0..=2) => insert::move_leafs(record, page),
        (ADD_NODE, 0..=2) => insert::add_node(record, page),
        (SPLIT_TUPLE, 0..=1) => insert::split_tuple(record, page),
        (PICKSPLIT, 0..=3) => picksplit::picksplit(record, page),
        (VACUUM_LEAF, 0) => vacuum::vacuum_leaf(record, page),
        (VACUUM_ROOT, 0) => vacuum::vacuum_root(record, page),
        (VACUUM_REDIRECT, 0) => vacuum::vacuum_redirect(redo.major, record, page),
        (ADD_LEAF | MOVE_LEAFS | ADD_NODE | SPLIT_TUPLE | PICKSPLIT | VACUUM_LEAF | VACUUM_ROOT | VACUUM_REDIRECT, _) => {
            Err(redo.no_such_block())
        }
        _ => Err(Fault::Unsupported),
    }
}
