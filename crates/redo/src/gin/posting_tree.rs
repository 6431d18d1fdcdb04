//! Posting trees: creation, inner pages, page deletion.
//!
//! Page layout: the right bound (an item pointer, padded to 8 bytes) behind the page header; then, on inner pages,
//! maxoff posting items of 10 bytes (child block, item pointer), on leaves compressed posting lists; `pd_lower` is the
//! end of either. No line pointers.

use std::ops::Range;

use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE};
use varve_postgres::{BlockNumber, Page};

use super::{COMPRESSED, DATA, DELETED, LEAF, Opaque, SPECIAL_SIZE};
use crate::Fault;
use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::block_id;
use crate::item::set_content_end;

/// Where posting items or posting lists begin (`GinDataPageGetData`).
pub(super) const DATA_START: usize = PAGE_HEADER_SIZE + 8;
/// Where they end at the latest.
pub(super) const DATA_END: usize = BLCKSZ - SPECIAL_SIZE;
/// Bytes in a posting item.
const POSTING_ITEM_SIZE: usize = 10;

/// `ginRedoCreatePTree`. Main data: size `u32`, posting lists of so many bytes.
pub(super) fn create(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let len = main.u32()? as usize;
    let lists = main.take(len)?;
    super::init(page, DATA | LEAF | COMPRESSED)?;
    let end = DATA_START + len;
    if end > DATA_END {
        return Err(format!("a posting tree begins with {len} bytes, a page has {}", DATA_END - DATA_START).into());
    }
    page[DATA_START..end].copy_from_slice(lists);
    set_content_end(page, end)
}

/// The insertion of a downlink. Block data (`ginxlogInsertDataInternal`): offset `u16`, the new posting item, which
/// goes before the one that is there; that one gets the child `right_child`.
pub(super) fn insert_inner(page: &mut Page, data: &[u8], right_child: BlockNumber) -> Result<(), Fault> {
    let mut data = Cursor::new(data);
    let offset = data.u16()?;
    let new = data.take(POSTING_ITEM_SIZE)?;
    let mut opaque = Opaque::expect(page, DATA | LEAF, DATA)?;
    let at = posting_item(opaque, offset)?;
    let end = DATA_START + usize::from(opaque.max_off) * POSTING_ITEM_SIZE;
    if end + POSTING_ITEM_SIZE > DATA_END {
        return Err(format!("the page is full: it has {} posting items", opaque.max_off).into());
    }
    page[at.start..at.start + 4].copy_from_slice(&block_id(right_child));
    page.copy_within(at.start..end, at.end);
    page[at].copy_from_slice(new);
    opaque.max_off += 1;
    opaque.write(page)?;
    set_content_end(page, end + POSTING_ITEM_SIZE)
}

/// `ginRedoDeletePage`. Main data (`ginxlogDeletePage`): offset of the downlink in the parent `u16`, padding, the
/// deleted page's right link `u32`, last transaction that may still see the page `u32`. Block 0 is deleted, 1 its
/// parent, 2 its left sibling.
pub(super) fn delete_page(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let parent_offset = main.u16()?;
    let _padding = main.u16()?;
    let right_link = main.u32()?;
    let delete_xid = main.u32()?;
    match record.block_id {
        0 => {
            let mut opaque = Opaque::expect(page, DATA, DATA)?;
            opaque.flags |= DELETED;
            opaque.write(page)?;
            page::set_prune_xid(page, delete_xid);
            Ok(())
        }
        1 => delete_posting_item(page, parent_offset),
        _ => {
            let mut opaque = Opaque::expect(page, DATA, DATA)?;
            opaque.right_link = right_link;
            opaque.write(page)
        }
    }
}

/// `GinPageDeletePostingItem`.
fn delete_posting_item(page: &mut Page, offset: u16) -> Result<(), Fault> {
    let mut opaque = Opaque::expect(page, DATA | LEAF, DATA)?;
    let at = posting_item(opaque, offset)?;
    let end = DATA_START + usize::from(opaque.max_off) * POSTING_ITEM_SIZE;
    page.copy_within(at.end..end, at.start);
    opaque.max_off -= 1;
    opaque.write(page)?;
    set_content_end(page, end - POSTING_ITEM_SIZE)
}

/// Where posting item `offset`, from 1, lies; also makes sure that all of the page's items lie on it.
fn posting_item(opaque: Opaque, offset: u16) -> Result<Range<usize>, Fault> {
    if usize::from(opaque.max_off) * POSTING_ITEM_SIZE > DATA_END - DATA_START {
        return Err(format!("the page cannot have {} posting items", opaque.max_off).into());
    }
    if offset == 0 || offset > opaque.max_off {
        return Err(format!("posting item {offset} does not exist: the page has {}", opaque.max_off).into());
    }
    let start = DATA_START + (usize::from(offset) - 1) * POSTING_ITEM_SIZE;
    Ok(start..start + POSTING_ITEM_SIZE)
}
