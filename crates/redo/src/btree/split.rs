//! Page splits: `xl_btree_split`.
//!
//! The new right page is in the record as a whole. The left one keeps its tuples up to the split point, gets a new high
//! key, and the new tuple if that went left; when the new tuple split a posting list, the list's tuple is replaced too.

use varve_postgres::Page;

use super::page::{self, HIGH_KEY, INCOMPLETE_SPLIT, LEAF, NONE, Opaque};
use super::posting;
use crate::cursor::Cursor;
use crate::item::{self, OffsetNumber};
use crate::{Fault, Redo, index_tuple};

/// `xl_btree_split`.
struct Split {
    level: u32,
    /// The first of the original page's tuples that went right.
    first_right: OffsetNumber,
    /// Where the new tuple would stand on the original page.
    new_offset: OffsetNumber,
    /// Place in the posting list of the tuple before the new one at which that was split, 0 if it was not.
    posting_at: u16,
}

impl Split {
    fn read(redo: &Redo<'_>) -> Result<Split, Fault> {
        let mut main = Cursor::new(redo.record.main_data);
        Ok(Split { level: main.u32()?, first_right: main.u16()?, new_offset: main.u16()?, posting_at: main.u16()? })
    }

    fn leaf_flag(&self) -> u16 {
        if self.level == 0 { LEAF } else { 0 }
    }
}

/// The number of the record's block `id`, without which the record is malformed.
fn number_of(redo: &Redo<'_>, id: u8) -> Result<u32, Fault> {
    redo.record.block_number(id).ok_or_else(|| format!("the record has no block with id {id}").into())
}

/// Block 1: the new right page.
pub(super) fn right(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let split = Split::read(redo)?;
    let next = redo.record.block_number(2).unwrap_or(NONE);
    let prev = number_of(redo, 0)?;
    page::init(page, Opaque { prev, next, level: split.level, flags: split.leaf_flag(), cycle_id: 0 })?;
    page::restore(page, redo.record.data)
}

/// Block 2: the page that was right of the original.
pub(super) fn neighbour(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let prev = number_of(redo, 1)?;
    page::change(page, |opaque| opaque.prev = prev)
}

/// Block 0: the original page. Its tuples are added to an empty page in order, as the primary did: so they end up in
/// the same places.
pub(super) fn left(redo: &Redo<'_>, page: &mut Page, new_on_left: bool) -> Result<(), Fault> {
    let split = Split::read(redo)?;
    let next = number_of(redo, 1)?;
    let mut opaque = Opaque::read(page)?;

    let mut data = Cursor::new(redo.record.data);
    let mut new = Vec::new();
    if new_on_left || split.posting_at != 0 {
        new.extend_from_slice(index_tuple::take_aligned(&mut data)?);
    }
    let high_key = index_tuple::take_aligned(&mut data)?;
    if !data.is_empty() {
        return Err("data behind the left page's high key".into());
    }
    // The tuple before the new one, and what comes in its stead.
    let mut replaced = None;
    if split.posting_at != 0 {
        let offset = split.new_offset.wrapping_sub(1);
        let mut posting = index_tuple::exact(item::item(page, offset)?)?.to_vec();
        posting::swap(&mut new, &mut posting, split.posting_at)?;
        replaced = Some((offset, posting));
    }

    let mut left = item::empty_like(page)?;
    item::add_item(&mut left, high_key, HIGH_KEY, false, false)?;
    for offset in opaque.first_data_key()..split.first_right {
        if let Some((_, posting)) = replaced.as_ref().filter(|(at, _)| *at == offset) {
            page::append(&mut left, posting)?;
            continue;
        }
        if new_on_left && offset == split.new_offset {
            page::append(&mut left, &new)?;
        }
        page::append(&mut left, item::item(page, offset)?)?;
    }
    if new_on_left && split.first_right == split.new_offset {
        page::append(&mut left, &new)?;
    }

    opaque.flags = INCOMPLETE_SPLIT | split.leaf_flag();
    opaque.next = next;
    opaque.cycle_id = 0;
    opaque.write(&mut left)?;
    *page = left;
    Ok(())
}
