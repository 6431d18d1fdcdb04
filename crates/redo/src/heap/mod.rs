//! Page functions of the heap: resource managers Heap and Heap2 (`access/heapam_xlog.h`).
//!
//! [`record`] takes records apart, [`tuple`] knows a tuple's header; [`insert`] makes tuples, [`update`] changes them,
//! [`prune`] removes and freezes them, [`layout`] says where they lie until gaps are closed. Which bits of
//! visibility-map pages a record clears says [`crate::visibility_map`], what it makes known about free space
//! [`free_space`], which tuples it names [`named`].

pub(crate) mod free_space;
mod insert;
pub(crate) mod layout;
pub(crate) mod named;
mod prune;
pub(crate) mod record;
pub(crate) mod tuple;
mod update;

use varve_postgres::page::{self, PD_ALL_VISIBLE};
use varve_postgres::{Fork, Page};

use crate::visibility_map;
use crate::{Fault, Redo};
use layout::HeapLayout;
use record::{Visible, opcode};

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
