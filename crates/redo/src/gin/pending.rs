//! The metapage and the pending list, in which fast updates leave index tuples for a later cleanup.

use varve_postgres::Page;
use varve_postgres::page::PAGE_HEADER_SIZE;

use super::{DELETED, LIST, LIST_FULL_ROW, META, Opaque};
use crate::Fault;
use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::{self, INVALID_BLOCK};
use crate::item::{add_item, max_offset, set_content_end};

/// Bytes of `GinMetaPageData`, padding included.
const META_SIZE: usize = 56;
/// Bytes of `RelFileNode`, and the padding behind it in `ginxlogUpdateMeta`.
const RELATION_SIZE: usize = 12 + 4;

/// `ginRedoUpdateMetapage`. Main data (`ginxlogUpdateMeta`): relation, metapage, the list's tail before `u32`, its new
/// right link `u32`, number of tuples `i32`. Block 0 is the metapage; block 1 the tail, which gets either the tuples in
/// its data or the right link.
pub(super) fn update_meta_page(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    main.take(RELATION_SIZE)?;
    let meta = main.take(META_SIZE)?;
    let tail_before = main.u32()?;
    let new_right_link = main.u32()?;
    let tuples = main.u32()?.cast_signed();
    if record.block_id == 0 {
        return set_meta(page, meta);
    }
    if tuples > 0 {
        Opaque::expect(page, LIST, LIST)?;
        add_tuples(page, record.data, tuples)?;
        let mut opaque = Opaque::read(page)?;
        opaque.max_off = opaque.max_off.wrapping_add(1);
        opaque.write(page)
    } else if tail_before != INVALID_BLOCK {
        let mut opaque = Opaque::expect(page, LIST, LIST)?;
        opaque.right_link = new_right_link;
        opaque.write(page)
    } else {
        Err("the record has a block for the list's tail, and says that there was none".into())
    }
}

/// `ginRedoInsertListPage`. Main data (`ginxlogInsertListPage`): right link `u32`, number of tuples `i32`; block data:
/// the tuples.
pub(super) fn insert_list_page(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let right_link = main.u32()?;
    let tuples = main.u32()?.cast_signed();
    let is_tail = right_link == INVALID_BLOCK;
    super::init(page, LIST)?;
    let (max_off, flags) = if is_tail { (1, LIST | LIST_FULL_ROW) } else { (0, LIST) };
    Opaque { right_link, max_off, flags }.write(page)?;
    add_tuples(page, record.data, tuples)
}

/// `ginRedoDeleteListPages`. Main data (`ginxlogDeleteListPages`): metapage, number of pages `i32`. Block 0 is the
/// metapage, the others are deleted.
pub(super) fn delete_list_pages(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let meta = main.take(META_SIZE)?;
    let pages = main.u32()?;
    match record.block_id {
        0 => set_meta(page, meta),
        id if u32::from(id) <= pages => super::init(page, DELETED),
        id => Err(format!("block {id} is one more than the {pages} pages to be deleted").into()),
    }
}

/// Makes `page` a metapage.
fn set_meta(page: &mut Page, meta: &[u8]) -> Result<(), Fault> {
    super::init(page, META)?;
    let end = PAGE_HEADER_SIZE + META_SIZE;
    page[PAGE_HEADER_SIZE..end].copy_from_slice(meta);
    set_content_end(page, end)
}

/// Puts `n` tuples behind the page's others.
fn add_tuples(page: &mut Page, tuples: &[u8], n: i32) -> Result<(), Fault> {
    let mut tuples = Cursor::new(tuples);
    for _ in 0..n {
        let offset = max_offset(page) + 1;
        add_item(page, index_tuple::take(&mut tuples)?, offset, false, false)?;
    }
    if !tuples.is_empty() {
        return Err(format!("{} bytes are left behind {n} tuples", tuples.rest().len()).into());
    }
    Ok(())
}
