//! Deduplication of a leaf: `xl_btree_dedup`. Runs of tuples with equal keys become one tuple with a posting list each.

use varve_postgres::Page;

use super::page::{self, HAS_GARBAGE, HIGH_KEY, Opaque};
use super::posting::{LeafTuple, MAX_ITEM_SIZE, Tid};
use crate::cursor::Cursor;
use crate::index_tuple;
use crate::item::{self, OffsetNumber};
use crate::{Fault, Redo};

/// `BTDedupInterval`: a run of tuples that are merged.
#[derive(Clone, Copy)]
struct Interval {
    /// The first of them.
    base: OffsetNumber,
    /// How many.
    len: u16,
}

fn next_interval(data: &mut Cursor<'_>, left: &mut u16) -> Result<Option<Interval>, Fault> {
    if *left == 0 {
        return Ok(None);
    }
    *left -= 1;
    Ok(Some(Interval { base: data.u16()?, len: data.u16()? }))
}

/// `btree_xlog_dedup`.
pub(super) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut left = Cursor::new(redo.record.main_data).u16()?;
    let mut data = Cursor::new(redo.record.data);
    let mut opaque = Opaque::read(page)?;
    let mut new = item::empty_like(page)?;
    if !opaque.is_rightmost() {
        item::add_item(&mut new, item::item(page, HIGH_KEY)?, HIGH_KEY, false, false)?;
    }

    let mut interval = next_interval(&mut data, &mut left)?;
    let mut tids: Vec<Tid> = Vec::new();
    let last = item::max_offset(page);
    let mut offset = opaque.first_data_key();
    while offset <= last {
        let Some(run) = interval.filter(|run| run.base == offset) else {
            page::append(&mut new, index_tuple::exact(item::item(page, offset)?)?)?;
            offset += 1;
            continue;
        };
        if run.len < 2 || run.len - 1 > last - offset {
            return Err(format!("{} tuples from {offset} are to be merged, the page has {last}", run.len).into());
        }
        let base = LeafTuple::read(item::item(page, offset)?)?;
        tids.clear();
        for merged in offset..offset + run.len {
            tids.extend_from_slice(LeafTuple::read(item::item(page, merged)?)?.tids);
            if base.size_with(tids.len()) > MAX_ITEM_SIZE {
                return Err(format!("the tuple merged from {} from {offset} would be larger than {MAX_ITEM_SIZE} bytes", run.len).into());
            }
        }
        page::append(&mut new, &base.with_tids(&tids)?)?;
        offset += run.len;
        interval = next_interval(&mut data, &mut left)?;
    }
    if let Some(run) = interval {
        return Err(format!("the run of tuples from {} that are to be merged is out of order or not on the page", run.base).into());
    }

    opaque.flags &= !HAS_GARBAGE;
    opaque.write(&mut new)?;
    *page = new;
    Ok(())
}
