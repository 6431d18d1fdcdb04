//! Page functions of the heap: resource managers Heap and Heap2 (`access/heapam_xlog.h`).
//!
//! [`record`] takes records apart, [`tuple`] knows a tuple's header; [`insert`] makes tuples, [`update`] changes them, [`prune`] removes
//! and freezes them, [`layout`] says where they lie until gaps are closed. Which bits of visibility-map pages a record clears says [`crate::visibility_map`], what it makes known about free
//! space [`free_space`].

pub(crate) mod free_space;
mod insert;
pub(crate) mod layout;
mod prune;
pub(crate) mod record;
pub(crate) mod tuple;
mod update;

use std::ops::Range;

use varve_postgres::page::{self, PAGE_HEADER_SIZE, PD_ALL_VISIBLE};
use varve_postgres::wal::rmgr;
use varve_postgres::{Fork, Page};

use crate::item::{self, ITEM_ID_SIZE, ItemId, OffsetNumber};
use crate::visibility_map;
use crate::{Fault, Redo};
use layout::HeapLayout;
use record::{Visible, opcode};

/// Tuples that a record names, as far as that can be told at a glance: so that memory can be waited for ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedTuples {
    /// Line pointer of the one that is changed, from 1; 0 if there is none.
    changed: OffsetNumber,
    /// Line pointer of the one that is made.
    made: OffsetNumber,
}

impl NamedTuples {
    /// Those of a record of type `info` of resource manager `rmid`.
    #[inline(always)]
    pub fn of(rmid: u8, info: u8, main_data: &[u8]) -> NamedTuples {
        let offset = |at: usize| main_data.get(at..at + 2).map_or(0, |bytes| OffsetNumber::from_le_bytes([bytes[0], bytes[1]]));
        match (rmid, info & opcode::MASK) {
            // They begin with a transaction, `xl_heap_update` has another one before the new tuple's number.
            (rmgr::HEAP, opcode::UPDATE | opcode::HOT_UPDATE) => NamedTuples { changed: offset(4), made: offset(12) },
            (rmgr::HEAP, opcode::DELETE | opcode::LOCK) => NamedTuples { changed: offset(4), made: 0 },
            (rmgr::HEAP, opcode::INSERT) => NamedTuples { changed: 0, made: offset(0) },
            _ => NamedTuples::default(),
        }
    }

    /// Where on their page the line pointers lie.
    pub fn line_pointers(self) -> impl Iterator<Item = usize> {
        let place = |offset| usize::from(offset).checked_sub(1).map(|index| PAGE_HEADER_SIZE + index * ITEM_ID_SIZE);
        [self.changed, self.made].into_iter().filter_map(place)
    }

    /// Where on `page` the tuple lies that is changed.
    pub fn changed(self, page: &Page) -> Option<Range<usize>> {
        let index = usize::from(self.changed).checked_sub(1)?;
        let id = ItemId::from_bytes(*item::line_pointers(page).get(index)?);
        Some(usize::from(id.off())..usize::from(id.off()) + usize::from(id.len()))
    }
}

/// `heap_redo`.
pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    if redo.record.fork == Fork::VisibilityMap {
        return visibility_map::clear_named(redo.record, page);
    }
    match redo.record.info & opcode::MASK {
        opcode::INSERT => insert::insert(redo, page, layout),
        opcode::DELETE => update::delete(redo, page),
        opcode::UPDATE => update::update(redo, page, layout, false),
        opcode::HOT_UPDATE => update::update(redo, page, layout, true),
        opcode::CONFIRM => update::confirm(redo, page),
        opcode::LOCK => update::lock(redo, page),
        opcode::INPLACE => update::inplace(redo, page),
        _ => Err(Fault::Unsupported), // XLOG_HEAP_TRUNCATE has no blocks
    }
}

/// `heap2_redo`.
pub(crate) fn redo_heap2(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    let kind = redo.record.info & opcode::MASK;
    if redo.record.fork == Fork::VisibilityMap && kind != opcode::VISIBLE {
        return visibility_map::clear_named(redo.record, page);
    }
    match kind {
        opcode::PRUNE | opcode::VACUUM | opcode::FREEZE_PAGE if redo.major.has_one_prune_record() => {
            prune::prune_and_freeze(redo, page, layout)
        }
        opcode::PRUNE => prune::prune(redo, page, layout),
        opcode::VACUUM => prune::vacuum(redo, page, layout),
        opcode::FREEZE_PAGE if redo.major.has_freeze_plans() => prune::freeze_plans(redo, page),
        opcode::FREEZE_PAGE => prune::freeze_tuples(redo, page),
        opcode::VISIBLE => visible(redo, page),
        opcode::MULTI_INSERT => insert::multi_insert(redo, page, layout),
        opcode::LOCK_UPDATED => update::lock_updated(redo, page),
        _ => Err(Fault::Unsupported), // XLOG_HEAP2_NEW_CID and XLOG_HEAP2_REWRITE have no blocks
    }
}

/// `heap_xlog_visible`: block 0 is the visibility map's, block 1 the heap's.
fn visible(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let visible = Visible::decode(redo.record.main_data)?;
    if redo.record.block_id != 0 {
        set_all_visible(page, true);
        return Ok(());
    }
    let heap_block = redo.record.block_number(1).ok_or("the record has no heap block")?;
    visibility_map::set(page, redo.record.blkno, heap_block, visible.flags)?;
    Ok(())
}

/// `PageSetAllVisible` and `PageClearAllVisible`.
fn set_all_visible(page: &mut Page, all_visible: bool) {
    let others = page::flags(page) & !PD_ALL_VISIBLE;
    page::set_flags(page, if all_visible { others | PD_ALL_VISIBLE } else { others });
}
