//! GIN: an entry tree over keys, for frequent keys a posting tree of heap pointers each, and a pending list of what was
//! not yet sorted in (`access/ginxlog.h`, `access/ginblock.h`).
//!
//! - [`entry`]: insertion into the entry tree.
//! - [`posting_tree`]: creation, inner pages and page deletion of posting trees; [`recompress`] for their leaves, whose
//!   heap pointers are compressed as [`posting_list`] says.
//! - [`pending`]: metapage and pending list.
//!
//! Page splits and the vacuuming of entry pages come with images of all pages; only a split's child, whose
//! incomplete-split flag is cleared, is ours.
//!
//! Special space, 8 bytes: right link `u32`, maxoff `u16` (posting items on an inner page of a posting tree; heap rows
//! on a page of the pending list), flags `u16`.

mod entry;
mod pending;
mod posting_list;
mod posting_tree;
mod recompress;

use varve_postgres::{BlockNumber, Page, page};

use crate::cursor::Cursor;
use crate::index_tuple::{INVALID_BLOCK, read_block_id};
use crate::item::{special_space, special_space_mut};
use crate::{Fault, Redo};

const CREATE_POSTING_TREE: u8 = 0x10;
const INSERT: u8 = 0x20;
const SPLIT: u8 = 0x30;
const VACUUM_PAGE: u8 = 0x40;
const DELETE_PAGE: u8 = 0x50;
const UPDATE_META_PAGE: u8 = 0x60;
const INSERT_LIST_PAGE: u8 = 0x70;
const DELETE_LIST_PAGES: u8 = 0x80;
const VACUUM_DATA_LEAF_PAGE: u8 = 0x90;

/// Flags of insertion and split records: the target is in a posting tree; it is a leaf.
const INSERT_IS_DATA: u16 = 1;
const INSERT_IS_LEAF: u16 = 2;

/// Page flags.
const DATA: u16 = 1 << 0;
const LEAF: u16 = 1 << 1;
const DELETED: u16 = 1 << 2;
const META: u16 = 1 << 3;
const LIST: u16 = 1 << 4;
const LIST_FULL_ROW: u16 = 1 << 5;
const INCOMPLETE_SPLIT: u16 = 1 << 6;
const COMPRESSED: u16 = 1 << 7;

/// Bytes of special space.
const SPECIAL_SIZE: usize = 8;

/// What the special space holds (`GinPageOpaqueData`).
#[derive(Clone, Copy, Debug)]
struct Opaque {
    right_link: BlockNumber,
    max_off: u16,
    flags: u16,
}

impl Opaque {
    fn read(page: &Page) -> Result<Opaque, Fault> {
        let mut cursor = Cursor::new(special_space(page, SPECIAL_SIZE)?);
        Ok(Opaque { right_link: cursor.u32()?, max_off: cursor.u16()?, flags: cursor.u16()? })
    }

    fn write(self, page: &mut Page) -> Result<(), Fault> {
        let space = special_space_mut(page, SPECIAL_SIZE)?;
        space[..4].copy_from_slice(&self.right_link.to_le_bytes());
        space[4..6].copy_from_slice(&self.max_off.to_le_bytes());
        space[6..].copy_from_slice(&self.flags.to_le_bytes());
        Ok(())
    }

    /// Reads that of a page whose flags must be `expected` among those of `mask`.
    fn expect(page: &Page, mask: u16, expected: u16) -> Result<Opaque, Fault> {
        let opaque = Opaque::read(page)?;
        if opaque.flags & mask != expected {
            return Err(format!("the page has GIN flags {:#x}, expected {expected:#x} among {mask:#x}", opaque.flags).into());
        }
        Ok(opaque)
    }
}

/// `GinInitPage`.
fn init(page: &mut Page, flags: u16) -> Result<(), Fault> {
    page::init(page, SPECIAL_SIZE);
    Opaque { right_link: INVALID_BLOCK, max_off: 0, flags }.write(page)
}

pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = redo.record;
    match (record.info, record.block_id) {
        (CREATE_POSTING_TREE, 0) => posting_tree::create(record, page),
        (INSERT, _) => insert(redo, page),
        (SPLIT, 3) => clear_incomplete_split(page),
        (SPLIT, 0..=2) | (VACUUM_PAGE, 0) => Err("the block must come with a full-page image, and has none".into()),
        (VACUUM_DATA_LEAF_PAGE, 0) => recompress::recompress(page, record.data),
        (DELETE_PAGE, 0..=2) => posting_tree::delete_page(record, page),
        (UPDATE_META_PAGE, 0..=1) => pending::update_meta_page(record, page),
        (INSERT_LIST_PAGE, 0) => pending::insert_list_page(record, page),
        (DELETE_LIST_PAGES, _) => pending::delete_list_pages(record, page),
        (CREATE_POSTING_TREE | SPLIT | VACUUM_PAGE | DELETE_PAGE | UPDATE_META_PAGE | INSERT_LIST_PAGE | VACUUM_DATA_LEAF_PAGE, _) => {
            Err(redo.no_such_block())
        }
        _ => Err(Fault::Unsupported),
    }
}

/// `ginRedoInsert`. Block 0 is the target; above the leaves the insertion finishes the split of a child, block 1, whose
/// right half takes the place of the downlink before which the new one goes.
fn insert(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    let flags = main.u16()?;
    let is_leaf = flags & INSERT_IS_LEAF != 0;
    let right_child = if is_leaf {
        None
    } else {
        let _left_child = read_block_id(&mut main)?;
        Some(read_block_id(&mut main)?)
    };
    let data = redo.record.data;
    match (redo.record.block_id, flags & INSERT_IS_DATA != 0, right_child) {
        (0, false, _) => entry::insert(page, data, right_child),
        (0, true, None) => recompress::recompress(page, data),
        (0, true, Some(right_child)) => posting_tree::insert_inner(page, data, right_child),
        (1, _, Some(_)) => clear_incomplete_split(page),
        _ => Err(redo.no_such_block()),
    }
}

fn clear_incomplete_split(page: &mut Page) -> Result<(), Fault> {
    let mut opaque = Opaque::read(page)?;
    opaque.flags &= !INCOMPLETE_SPLIT;
    opaque.write(page)
}
