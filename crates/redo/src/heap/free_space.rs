//! What the redo of heap records makes known to the free-space map (the calls of `XLogRecordPageWithFreeSpace`).

use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, Major, Page};

use super::prune::{self, part};
use super::record::{Visible, opcode};
use crate::change::BlockRecord;
use crate::item;
use crate::visibility_map::VALID_BITS;

/// Pages with more free space than a fifth are not worth an update when they are filled.
const LOW_FREE_SPACE: usize = BLCKSZ / 5;

/// The free space that Postgres's redo of `record` records in the free-space map for the record's block, `page` being
/// that block after redo; `None` if it records nothing. `restored` says whether the record brought the page as a
/// full-page image.
pub fn free_space_effect(major: Major, record: &BlockRecord<'_>, page: &Page, restored: bool) -> Option<usize> {
    let kind = record.info & opcode::MASK;
    let filled = || Some(item::heap_free_space(page)).filter(|space| !restored && *space < LOW_FREE_SPACE);
    match (record.rmid, kind) {
        (rmgr::HEAP, opcode::INSERT | opcode::UPDATE) | (rmgr::HEAP2, opcode::MULTI_INSERT) if record.block_id == 0 => filled(),
        (rmgr::HEAP2, kind) if prune::is_prune(kind) => {
            let freed = if major.has_one_prune_record() {
                let freeing = part::REDIRECTIONS | part::DEAD_ITEMS | part::UNUSED_ITEMS;
                prune::prune_flags(record.main_data).is_ok_and(|flags| flags & freeing != 0)
            } else {
                kind != opcode::FREEZE_PAGE
            };
            freed.then(|| item::heap_free_space(page))
        }
        (rmgr::HEAP2, opcode::VISIBLE) if record.block_id == 1 => {
            let visible = Visible::decode(record.main_data).ok()?;
            (visible.flags & VALID_BITS != 0).then(|| item::free_space(page))
        }
        _ => None,
    }
}
