//! A second way to each heap page: with compaction put off ([`apply_loosely`]), from one record to the next. What it
//! comes to must be what redo record by record comes to.

use std::collections::HashMap;

use varve_postgres::{BlockNumber, Fork, Lsn, Major, Page, RelFork, page, wal::rmgr};

use super::differences;
use crate::change::Change;
use crate::{HeapLayout, apply_loosely};

/// Heap pages, most of them loose.
#[derive(Debug, Default)]
pub(super) struct LoosePages {
    pages: HashMap<(RelFork, BlockNumber), (Box<Page>, HeapLayout)>,
}

impl LoosePages {
    /// The page became another than redo makes it.
    pub(super) fn forget(&mut self, rel: RelFork, blkno: BlockNumber) {
        self.pages.remove(&(rel, blkno));
    }

    /// Makes `change`, which made `after` of `before`, to the loose page; gives what is wrong with what that comes to.
    pub(super) fn redo(
        &mut self,
        major: Major,
        lsn: Lsn,
        (rel, blkno): (RelFork, BlockNumber),
        change: &Change<'_>,
        (before, after): (&Page, &Page),
    ) -> Result<(), String> {
        let Change::Record(record) = change else { return Ok(()) };
        if rel.fork != Fork::Main || !matches!(record.rmid, rmgr::HEAP | rmgr::HEAP2) {
            self.pages.remove(&(rel, blkno));
            return Ok(());
        }
        let (page, layout) = self.pages.entry((rel, blkno)).or_insert_with(|| (Box::new(*before), HeapLayout::default()));
        // Meanwhile an image may have become the page, or the relation another.
        if page::lsn(page) != page::lsn(before) {
            (**page, *layout) = (*before, HeapLayout::default());
        }
        let failed = |error| format!("with compaction put off: {error}");
        apply_loosely(major, lsn, blkno, change, page, layout).map_err(|error| failed(error.to_string()))?;
        let mut settled = **page;
        layout.clone().settle(&mut settled, blkno).map_err(|error| failed(error.to_string()))?;
        let at = differences(major, record.rmid, rel.fork, blkno, &settled, after, true).map_err(failed)?;
        if at.is_empty() { Ok(()) } else { Err(failed(format!("the page differs at {:?}", &at[..at.len().min(16)]))) }
    }
}
