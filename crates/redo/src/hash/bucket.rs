//! The tuples of bucket and overflow pages: they come one by one, move towards the bucket's first page, and go.

use varve_postgres::{Major, Page};

use super::meta;
use super::page::{HAS_DEAD_TUPLES, Opaque, change};
use crate::cursor::Cursor;
use crate::{Fault, Redo, index_tuple, item};

/// `xl_hash_insert`, block 0.
pub(super) fn insert(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = Cursor::new(redo.record.main_data).u16()?;
    add(page, redo.record.data, offset)
}

fn add(page: &mut Page, tuple: &[u8], offset: item::OffsetNumber) -> Result<(), Fault> {
    if offset == 0 {
        return Err("a tuple for line pointer 0".into());
    }
    Opaque::read(page)?;
    item::add_item(page, tuple, offset, false, false)?;
    Ok(())
}

/// `xl_hash_move_page_contents`, block 1: tuples come from a page further down the bucket.
pub(super) fn receive(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let len = Cursor::new(redo.record.main_data).u16()?;
    add_all(redo, page, len)
}

/// Puts the block's `len` tuples on the page. Its data: their offset numbers, each as of when its turn comes, then the
/// tuples.
pub(super) fn add_all(redo: &Redo<'_>, page: &mut Page, len: u16) -> Result<(), Fault> {
    let mut data = Cursor::new(redo.record.data);
    for offset in data.u16s(usize::from(len))? {
        add(page, index_tuple::take_aligned(&mut data)?, offset)?;
    }
    if !data.is_empty() {
        return Err(format!("data behind the {len} tuples").into());
    }
    Ok(())
}

/// `xl_hash_move_page_contents`, block 2: the tuples with the offset numbers in the block's data have moved away.
pub(super) fn delete(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let data = redo.record.data;
    Opaque::read(page)?;
    item::index_multi_delete(page, &Cursor::new(data).u16s(data.len() / 2)?)
}

/// `xl_hash_delete`, block 1: VACUUM, or the clean-up after a split, takes tuples away.
pub(super) fn vacuum(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let clear_dead_mark = Cursor::new(redo.record.main_data).u8()? != 0;
    delete(redo, page)?;
    if clear_dead_mark { clear_has_dead(page) } else { Ok(()) }
}

fn clear_has_dead(page: &mut Page) -> Result<(), Fault> {
    change(page, |opaque| opaque.flags &= !HAS_DEAD_TUPLES)
}

/// `xl_hash_vacuum_one_page`: how many tuples an insertion that needed room took away, and the main data behind it.
/// Since 16 the count is shorter, and a flag for recovery conflicts takes the other half of its place.
fn dead<'a>(redo: &Redo<'a>) -> Result<(u16, Cursor<'a>), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.take(4)?; // transaction id for recovery conflicts
    let len = if redo.major < Major::V16 {
        let len = main.u32()?;
        u16::try_from(len).map_err(|_| format!("{} dead tuples on a page", len as i32))?
    } else {
        let len = main.u16()?;
        main.take(2)?; // the flag, and padding
        len
    };
    Ok((len, main))
}

/// Block 0 of it: the page.
pub(super) fn delete_dead(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let (len, mut offsets) = dead(redo)?;
    Opaque::read(page)?;
    if !offsets.is_empty() {
        item::index_multi_delete(page, &offsets.u16s(usize::from(len))?)?;
    }
    clear_has_dead(page)
}

/// Block 1 of it: the metapage.
pub(super) fn count_dead(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let (len, _) = dead(redo)?;
    meta::add_tuples(page, -f64::from(len))
}
