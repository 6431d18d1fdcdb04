//! Records that put new tuples on a page: insert and multi-insert.

use std::ops::Range;

use varve_postgres::{Page, page};

use super::layout::HeapLayout;
use super::record::{Insert, MultiInsert, TupleHeader, opcode};
use super::{set_all_visible, tuple};
use crate::cursor::Cursor;
use crate::item::OffsetNumber;
use crate::{Fault, Redo};

/// `heap_xlog_insert`.
pub(super) fn insert(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    let insert = Insert::decode(redo.record.main_data)?;
    init_if_told(redo, page, layout);
    let mut data = Cursor::new(redo.record.data);
    let header = TupleHeader::decode(&mut data)?;
    add_tuple(redo, page, layout, insert.offset, header, data.rest())?;
    if insert.all_visible_cleared() {
        set_all_visible(page, false);
    }
    Ok(())
}

/// `heap_xlog_multi_insert`.
pub(super) fn multi_insert(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    let init = redo.record.info & opcode::INIT_PAGE != 0;
    let multi = MultiInsert::decode(redo.record.main_data, init)?;
    init_if_told(redo, page, layout);
    let mut data = Cursor::new(redo.record.data);
    for i in 0..multi.tuples {
        if !(redo.record.data.len() - data.len()).is_multiple_of(2) {
            data.u8()?; // each tuple begins aligned to 2 bytes
        }
        let len = usize::from(data.u16()?);
        let header = TupleHeader::decode(&mut data)?;
        add_tuple(redo, page, layout, multi.offset(i), header, data.take(len)?)?;
    }
    if !data.is_empty() {
        return Err(format!("{} bytes follow the last of {} tuples", data.len(), multi.tuples).into());
    }
    if multi.all_visible_cleared() {
        set_all_visible(page, false);
    }
    if multi.all_frozen_set() {
        set_all_visible(page, true);
    }
    Ok(())
}

/// Initialises the page if the record says so.
pub(super) fn init_if_told(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) {
    if redo.record.info & opcode::INIT_PAGE != 0 {
        page::init(page, 0);
        *layout = HeapLayout::default();
    }
}

/// Puts a tuple of a new transaction on the page: `header`, then `body` (null bitmap and values).
fn add_tuple(
    redo: &Redo<'_>,
    page: &mut Page,
    layout: &mut HeapLayout,
    offset: OffsetNumber,
    header: TupleHeader,
    body: &[u8],
) -> Result<(), Fault> {
    let range = reserve_tuple(redo, page, layout, offset, header, 0, body.len())?;
    page[range].copy_from_slice(body);
    Ok(())
}

/// Makes room for a tuple of the record's transaction and fills in its header; gives the range of `body_len` bytes that
/// follow it, to be filled.
pub(super) fn reserve_tuple(
    redo: &Redo<'_>,
    page: &mut Page,
    layout: &mut HeapLayout,
    offset: OffsetNumber,
    header: TupleHeader,
    xmax: u32,
    body_len: usize,
) -> Result<Range<usize>, Fault> {
    if offset == 0 {
        return Err("a tuple for line pointer 0".into());
    }
    let len = tuple::HEADER_SIZE + body_len;
    if body_len == 0 || len > tuple::TUPLE_SIZE_MAX {
        return Err(format!("a tuple of {len} bytes").into());
    }
    let range = layout.reserve(page, len, offset)?;
    let new = tuple::header_mut(&mut page[range.clone()])?;
    *new = [0; tuple::HEADER_SIZE];
    tuple::set_xmin(new, redo.record.xid);
    tuple::set_xmax(new, xmax);
    tuple::set_ctid(new, redo.record.blkno, offset);
    tuple::set_infomask2(new, header.infomask2);
    tuple::set_infomask(new, header.infomask & !tuple::COMBOCID);
    tuple::set_hoff(new, header.hoff);
    Ok(range.start + tuple::HEADER_SIZE..range.end)
}
