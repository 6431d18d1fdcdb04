//! Tuples leave a leaf: `xl_btree_vacuum` (by VACUUM) and `xl_btree_delete` (by an insertion that needs room).
//!
//! The block's data: offset numbers of tuples that go, then of tuples whose posting lists lose some heap pointers, then
//! for each of the latter a count and the places in its list. Both count fields are in the main data.

use varve_postgres::Page;

use super::page::{self, HAS_GARBAGE};
use super::posting::LeafTuple;
use crate::cursor::Cursor;
use crate::{Fault, Redo, item};

/// `btree_xlog_vacuum` and `btree_xlog_delete`. The counts stand at byte `counts_at` of the main data.
pub(super) fn redo(redo: &Redo<'_>, page: &mut Page, counts_at: usize) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.take(counts_at)?;
    let deleted_len = usize::from(main.u16()?);
    let updated_len = usize::from(main.u16()?);
    let mut data = Cursor::new(redo.record.data);
    let deleted = data.u16s(deleted_len)?;
    let updated = data.u16s(updated_len)?;
    // Updates first: deletion renumbers.
    for offset in updated {
        let places_len = usize::from(data.u16()?);
        let places = data.u16s(places_len)?;
        let tuple = LeafTuple::read_posting(item::item(page, offset)?)?.without(&places)?;
        item::index_tuple_overwrite(page, offset, &tuple)?;
    }
    if !deleted.is_empty() {
        item::index_multi_delete(page, &deleted)?;
    }
    page::change(page, |opaque| opaque.flags &= !HAS_GARBAGE)
}
