//! Pruning without moving tuples: a heap page's compaction is put off until somebody looks at the page.
//!
//! Most of what pruning costs is closing the gaps between tuples, and the next prune of the page makes the work vain.
//! Where tuples lie after a compaction follows from their line pointers alone: from the page's end downwards, in order
//! of the line pointers. So it is enough to know, beside the page, which tuples came after the last compaction
//! ([`HeapLayout`]). Meanwhile a page is *loose*: its header and the states and lengths of its line pointers are
//! already as they have to be, and each line pointer's offset is where its tuple lies for now; a new tuple goes where
//! there is room. [`HeapLayout::settle`] moves all to where Postgres has them.
//!
//! Only records that reach tuples through line pointers, and make tuples through [`HeapLayout::reserve`], may see a
//! loose page; before all others it is settled.

use std::ops::Range;

use arrayvec::ArrayVec;
use varve_postgres::page::{lower, set_upper, special, upper};
use varve_postgres::{BlockNumber, Page, page};

use super::prune::Pruned;
use crate::item::{self, ITEM_ID_SIZE, ItemId, ItemState, OffsetNumber, max_align};
use crate::{Fault, RedoError};

/// Tuples made between two prunes; with more, pages that are filled rather than updated, the next prune is done at
/// once.
const ADDED_MAX: usize = 8;
/// Gaps that are remembered to put tuples into; others are found again when the page is settled.
const GAPS_MAX: usize = 4;

/// Bytes that no tuple has.
#[derive(Clone, Copy, Debug)]
struct Gap {
    start: u16,
    len: u16,
}

/// Where a heap page's tuples lie while closing the gaps between them is put off. See the [module](self).
///
/// To be kept beside the page, and to be begun anew ([`HeapLayout::default`]) when the page becomes another without
/// redo.
#[derive(Clone, Debug, Default)]
pub struct HeapLayout {
    /// Whether the order of tuples is known: since the page was last compacted only what is noted here happened to it.
    known: bool,
    /// Whether tuples lie elsewhere than Postgres has them.
    loose: bool,
    /// Unused line pointers.
    unused: OffsetNumber,
    /// No tuple lies below.
    bottom: u16,
    /// Room between tuples, on a loose page.
    gaps: ArrayVec<Gap, GAPS_MAX>,
    /// Tuples made since the last compaction, oldest first.
    added: ArrayVec<OffsetNumber, ADDED_MAX>,
}

impl HeapLayout {
    /// Where the next tuple is likely to be put, if that is not the usual place: so that memory can be waited for
    /// ahead.
    pub fn next_place(&self) -> Option<u16> {
        self.gaps.last().map(|gap| gap.start)
    }

    /// Moves the tuples of `page`, which is block `blkno`, to where Postgres has them.
    ///
    /// # Errors
    /// When they contradict the page's header; the page is then not to be used.
    #[inline]
    pub fn settle(&mut self, page: &mut Page, blkno: BlockNumber) -> Result<(), RedoError> {
        self.close_gaps(page).map_err(|fault| RedoError::BadChange { lsn: page::lsn(page), blkno, what: fault.to_string() })
    }

    /// Settles a page that is about to see a change which does not keep to the rules, and forgets its layout.
    #[inline]
    pub(crate) fn end(&mut self, page: &mut Page) -> Result<(), Fault> {
        if self.known {
            self.close_gaps(page)?;
            *self = HeapLayout::default();
        }
        Ok(())
    }

    #[inline]
    fn close_gaps(&mut self, page: &mut Page) -> Result<(), Fault> {
        if self.loose {
            item::close_gaps(page, self.bottom, &self.added)?;
            self.gaps.clear();
            self.bottom = upper(page);
            self.loose = false;
        }
        Ok(())
    }

    /// Prunes the page, as `heap_page_prune_execute` does.
    pub(super) fn prune(&mut self, page: &mut Page, pruned: &Pruned<'_>, truncate: bool) -> Result<(), Fault> {
        if self.known {
            if self.prune_loosely(page, pruned, truncate)? {
                return Ok(());
            }
            self.close_gaps(page)?;
        }
        pruned.set_line_pointers(page)?;
        let unused = item::repair_fragmentation(page, truncate)?;
        *self = HeapLayout { known: true, unused, bottom: upper(page), ..HeapLayout::default() };
        Ok(())
    }

    /// The same without moving tuples. Where that cannot be, part of it may be done, and the answer is `false`.
    fn prune_loosely(&mut self, page: &mut Page, pruned: &Pruned<'_>, truncate: bool) -> Result<bool, Fault> {
        let line_pointers = item::line_pointers_mut(page);
        let last = line_pointers.len() as OffsetNumber;
        let mut freed = 0_u32;
        let mut becomes = |offset: OffsetNumber, id: ItemId| {
            let bytes = item::at_mut(line_pointers, offset)?;
            let was = ItemId::from_bytes(std::mem::replace(bytes, id.to_bytes()));
            if was.has_storage() {
                let len = max_align(was.len().into()) as u16;
                freed += u32::from(len);
                self.add_gap(Gap { start: was.off(), len });
            }
            Ok::<ItemState, Fault>(was.state())
        };
        let mut is_usual = true;
        for (from, to) in pruned.redirections() {
            is_usual &= matches!(becomes(from, ItemId::redirect(to))?, ItemState::Normal | ItemState::Redirect);
        }
        for offset in pruned.dead.iter() {
            is_usual &= matches!(becomes(offset, ItemId::DEAD)?, ItemState::Normal | ItemState::Redirect);
        }
        let mut unused = 0;
        for offset in pruned.unused.iter() {
            is_usual &= becomes(offset, ItemId::UNUSED)? != ItemState::Unused && !(truncate && offset == last);
            unused += 1;
        }
        if !is_usual {
            return Ok(false);
        }
        let new_upper = u32::from(upper(page)) + freed;
        if new_upper > special(page).into() {
            return Err(format!("tuples of {freed} bytes are pruned from a page with upper {}", upper(page)).into());
        }
        set_upper(page, new_upper as u16);
        self.unused += unused;
        item::set_has_free_lines(page, self.unused > 0);
        self.loose |= freed > 0 || !self.added.is_empty();
        self.added.clear();
        Ok(true)
    }

    fn add_gap(&mut self, gap: Gap) {
        if let Err(full) = self.gaps.try_push(gap) {
            self.gaps[0] = full.element();
        }
    }

    /// Makes room for a tuple of `len` bytes behind line pointer `offset`, which is unused or one past the last
    /// ([`item::reserve_item`]).
    pub(super) fn reserve(&mut self, page: &mut Page, len: usize, offset: OffsetNumber) -> Result<Range<usize>, Fault> {
        let place = if self.loose { self.place(page, len, offset) } else { None };
        if self.known && (self.added.is_full() || self.loose && place.is_none()) {
            self.close_gaps(page)?;
            self.known &= !self.added.is_full();
        }
        let lines = item::max_offset(page);
        let (offset, mut range) = item::reserve_item(page, len, offset, true, true)?;
        if !self.known {
            return Ok(range);
        }
        self.added.push(offset);
        self.unused = self.unused.saturating_sub(u16::from(item::max_offset(page) == lines));
        if let Some(start) = place.filter(|_| self.loose) {
            self.take(start, max_align(len) as u16);
            item::set_item_id(page, offset, ItemId::normal(start, len as u16))?;
            range = start.into()..usize::from(start) + len;
        } else {
            self.bottom = range.start as u16;
        }
        Ok(range)
    }

    /// Where on a loose page there is room for a tuple, beside line pointer `offset`.
    fn place(&self, page: &Page, len: usize, offset: OffsetNumber) -> Option<u16> {
        let aligned_len = max_align(len);
        let grows = if offset > item::max_offset(page) { ITEM_ID_SIZE } else { 0 };
        let room = usize::from(self.bottom).checked_sub(usize::from(lower(page)) + grows)?;
        let gap = self.gaps.iter().rev().find(|gap| usize::from(gap.len) >= aligned_len);
        match gap {
            Some(gap) => Some(gap.start),
            None if room >= aligned_len => Some(self.bottom - aligned_len as u16),
            None => None,
        }
    }

    /// Takes `len` bytes at the place that [`HeapLayout::place`] gave.
    fn take(&mut self, start: u16, len: u16) {
        match self.gaps.iter().rposition(|gap| gap.start == start && gap.len >= len) {
            Some(at) if self.gaps[at].len == len => drop(self.gaps.remove(at)),
            Some(at) => {
                self.gaps[at].start += len;
                self.gaps[at].len -= len;
            }
            None => self.bottom = start,
        }
    }
}
