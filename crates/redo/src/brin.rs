//! BRIN: metapage, reverse range map, and regular pages with one summary tuple a range (`access/brin_xlog.h`,
//! `access/brin_page.h`).
//!
//! Special space, 8 bytes: two unused `u16`, flags `u16`, page type `u16`. A page of the range map holds, behind the
//! page header, an item pointer for each of its ranges; its `pd_lower` does not say so.

use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE};
use varve_postgres::{BlockNumber, Page};

use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::{ITEM_POINTER_SIZE, ItemPointer};
use crate::item::{
    OffsetNumber, add_item, index_tuple_delete_no_compact, index_tuple_overwrite, set_content_end, special_space, special_space_mut,
};
use crate::{Fault, Redo};

const CREATE_INDEX: u8 = 0x00;
const INSERT: u8 = 0x10;
const UPDATE: u8 = 0x20;
const SAME_PAGE_UPDATE: u8 = 0x30;
const REVMAP_EXTEND: u8 = 0x40;
const DESUMMARIZE: u8 = 0x50;
/// `XLOG_BRIN_OPMASK`.
const TYPE_MASK: u8 = 0x70;
/// `XLOG_BRIN_INIT_PAGE`: the tuple is the first on its page, which is initialised.
const INIT_PAGE: u8 = 0x80;

/// Page types.
const TYPE_META: u16 = 0xF091;
const TYPE_REVMAP: u16 = 0xF092;
const TYPE_REGULAR: u16 = 0xF093;

/// Bytes of special space.
const SPECIAL_SIZE: usize = 8;
/// Bytes of `BrinMetaPageData`: magic, version, pages a range, last page of the range map, `u32` each.
const META_SIZE: usize = 16;
/// `BRIN_META_MAGIC`.
const META_MAGIC: u32 = 0xA810_9CFA;
/// `REVMAP_PAGE_MAXITEMS`: ranges that one page of the range map covers.
const REVMAP_RANGES: u32 = ((BLCKSZ - PAGE_HEADER_SIZE - SPECIAL_SIZE) / ITEM_POINTER_SIZE) as u32;

pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = redo.record;
    let mut main = Cursor::new(record.main_data);
    match (record.info & TYPE_MASK, record.block_id) {
        (CREATE_INDEX, 0) => {
            let (pages_per_range, version) = (main.u32()?, main.u16()?);
            create_meta(page, pages_per_range, version)
        }
        (INSERT, 0..=1) => insert(record, &Insertion::read(&mut main)?, page),
        (UPDATE, 0..=2) => {
            // xl_brin_update: offset of the old tuple, padding, the insertion. Block 2 is the old tuple's page.
            let old_offset = main.u16()?;
            let _padding = main.u16()?;
            let insertion = Insertion::read(&mut main)?;
            match record.block_id {
                2 => index_tuple_delete_no_compact(page, old_offset),
                _ => insert(record, &insertion, page),
            }
        }
        (SAME_PAGE_UPDATE, 0) => index_tuple_overwrite(page, main.u16()?, record.data),
        (REVMAP_EXTEND, 0) => set_last_revmap_page(page, main.u32()?),
        (REVMAP_EXTEND, 1) => init(page, TYPE_REVMAP),
        (DESUMMARIZE, id @ 0..=1) => {
            // xl_brin_desummarize. Block 0 is the range map's page, block 1 the tuple's.
            let (pages_per_range, heap_block, offset) = (main.u32()?, main.u32()?, main.u16()?);
            match id {
                0 => set_range(page, pages_per_range, heap_block, ItemPointer::INVALID),
                _ => index_tuple_delete_no_compact(page, offset),
            }
        }
        (CREATE_INDEX | INSERT | UPDATE | SAME_PAGE_UPDATE | REVMAP_EXTEND | DESUMMARIZE, _) => Err(redo.no_such_block()),
        _ => Err(Fault::Unsupported),
    }
}

/// `xl_brin_insert`: a range's first heap block `u32`, pages a range `u32`, offset of the new tuple `u16`.
struct Insertion {
    heap_block: BlockNumber,
    pages_per_range: u32,
    offset: OffsetNumber,
}

impl Insertion {
    fn read(main: &mut Cursor<'_>) -> Result<Insertion, Fault> {
        Ok(Insertion { heap_block: main.u32()?, pages_per_range: main.u32()?, offset: main.u16()? })
    }
}

/// `brin_xlog_insert_update`: block 0 gets the tuple in its data, block 1, of the range map, points to it.
fn insert(record: &BlockRecord<'_>, insertion: &Insertion, page: &mut Page) -> Result<(), Fault> {
    if record.block_id == 0 {
        if record.info & INIT_PAGE != 0 {
            init(page, TYPE_REGULAR)?;
        }
        expect(page, TYPE_REGULAR)?;
        add_item(page, record.data, insertion.offset, true, false)?;
        return Ok(());
    }
    let block = record.block_number(0).ok_or("the record has no block 0, to which the range map should point")?;
    set_range(page, insertion.pages_per_range, insertion.heap_block, ItemPointer { block, offset: insertion.offset })
}

/// `brin_page_init`.
fn init(page: &mut Page, page_type: u16) -> Result<(), Fault> {
    page::init(page, SPECIAL_SIZE);
    special_space_mut(page, SPECIAL_SIZE)?[6..].copy_from_slice(&page_type.to_le_bytes());
    Ok(())
}

/// Makes sure that the page is of type `expected`.
fn expect(page: &Page, expected: u16) -> Result<(), Fault> {
    let mut space = Cursor::new(special_space(page, SPECIAL_SIZE)?);
    space.take(6)?;
    match space.u16()? {
        actual if actual == expected => Ok(()),
        actual => Err(format!("the page has BRIN page type {actual:#06x}, expected {expected:#06x}").into()),
    }
}

/// `brin_metapage_init`. The last page of the range map is 0, which is none.
fn create_meta(page: &mut Page, pages_per_range: u32, version: u16) -> Result<(), Fault> {
    init(page, TYPE_META)?;
    let fields = [META_MAGIC, u32::from(version), pages_per_range, 0];
    for (field, at) in fields.iter().zip((PAGE_HEADER_SIZE..).step_by(4)) {
        page[at..at + 4].copy_from_slice(&field.to_le_bytes());
    }
    set_content_end(page, PAGE_HEADER_SIZE + META_SIZE)
}

fn set_last_revmap_page(page: &mut Page, block: BlockNumber) -> Result<(), Fault> {
    expect(page, TYPE_META)?;
    let end = PAGE_HEADER_SIZE + META_SIZE;
    page[end - 4..end].copy_from_slice(&block.to_le_bytes());
    set_content_end(page, end)
}

/// `brinSetHeapBlockItemptr`: where the range map's page says that the tuple of `heap_block`'s range is.
fn set_range(page: &mut Page, pages_per_range: u32, heap_block: BlockNumber, pointer: ItemPointer) -> Result<(), Fault> {
    expect(page, TYPE_REVMAP)?;
    let range = heap_block.checked_div(pages_per_range).ok_or("a range has 0 pages")?;
    let at = PAGE_HEADER_SIZE + (range % REVMAP_RANGES) as usize * ITEM_POINTER_SIZE;
    page[at..at + ITEM_POINTER_SIZE].copy_from_slice(&pointer.to_bytes());
    Ok(())
}
