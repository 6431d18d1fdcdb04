//! Records that remove and freeze tuples: prune, vacuum, freeze.
//!
//! Up to 16 each has a record type of its own; 15 and earlier freeze tuple by tuple, 16 by plans that many tuples
//! share. From 17 on one record does it all: its flags say which parts the block's data has, in this order: freeze
//! plans, redirections, dead items, unused items, and last the numbers of the tuples that the plans freeze.

use varve_postgres::Page;

use super::layout::HeapLayout;
use super::record::opcode;
use super::tuple::{self, Header};
use crate::cursor::Cursor;
use crate::item::{self, ItemId, OffsetNumber};
use crate::{Fault, Redo};

/// Array of line pointer numbers as records have it.
#[derive(Clone, Copy, Default)]
pub(super) struct Offsets<'a>(&'a [u8]);

impl<'a> Offsets<'a> {
    fn take(data: &mut Cursor<'a>, count: usize) -> Result<Offsets<'a>, Fault> {
        Ok(Offsets(data.take(count.saturating_mul(2))?))
    }

    pub(super) fn iter(self) -> impl Iterator<Item = OffsetNumber> + 'a {
        self.0.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
    }
}

/// What pruning does to line pointers.
#[derive(Clone, Copy, Default)]
pub(super) struct Pruned<'a> {
    /// Pairs: from, to.
    redirected: Offsets<'a>,
    pub(super) dead: Offsets<'a>,
    pub(super) unused: Offsets<'a>,
}

impl<'a> Pruned<'a> {
    fn is_empty(&self) -> bool {
        self.redirected.0.is_empty() && self.dead.0.is_empty() && self.unused.0.is_empty()
    }

    /// Line pointers that lead to another now: from, to.
    pub(super) fn redirections(&self) -> impl Iterator<Item = (OffsetNumber, OffsetNumber)> + use<'a> {
        let pairs = self.redirected.0.as_chunks().0.iter();
        pairs.map(|[a, b, c, d]| (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])))
    }

    /// The line pointers' part of `heap_page_prune_execute`.
    pub(super) fn set_line_pointers(&self, page: &mut Page) -> Result<(), Fault> {
        let line_pointers = item::line_pointers_mut(page);
        for (from, to) in self.redirections() {
            item::set(line_pointers, from, ItemId::redirect(to))?;
        }
        for offset in self.dead.iter() {
            item::set(line_pointers, offset, ItemId::DEAD)?;
        }
        for offset in self.unused.iter() {
            item::set(line_pointers, offset, ItemId::UNUSED)?;
        }
        Ok(())
    }
}

/// `heap_xlog_prune` (up to 16).
pub(super) fn prune(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.u32()?; // snapshot conflict horizon, for standbys
    let (redirected, dead) = (usize::from(main.u16()?), usize::from(main.u16()?));
    let mut data = Cursor::new(redo.record.data);
    let pruned = Pruned {
        redirected: Offsets::take(&mut data, redirected * 2)?,
        dead: Offsets::take(&mut data, dead)?,
        unused: Offsets(data.rest()),
    };
    layout.prune(page, &pruned, redo.major.prune_truncates_line_pointers())
}

/// `heap_xlog_vacuum` (up to 16).
pub(super) fn vacuum(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    layout.end(page)?;
    let count = usize::from(Cursor::new(redo.record.main_data).u16()?);
    let unused = Offsets::take(&mut Cursor::new(redo.record.data), count)?;
    Pruned { unused, ..Pruned::default() }.set_line_pointers(page)?;
    item::truncate_line_pointers(page)
}

/// How a tuple is frozen: `xl_heap_freeze_tuple` less its line pointer, `xl_heap_freeze_plan` less its count.
#[derive(Clone, Copy)]
struct Freeze {
    xmax: u32,
    infomask2: u16,
    infomask: u16,
    flags: u8,
}

impl Freeze {
    /// `heap_execute_freeze_tuple`.
    fn execute(self, page: &mut Page, offset: OffsetNumber) -> Result<(), Fault> {
        /// `XLH_FREEZE_XVAC`.
        const FREEZE_XVAC: u8 = 0x02;
        /// `XLH_INVALID_XVAC`.
        const INVALID_XVAC: u8 = 0x04;
        /// `FrozenTransactionId`.
        const FROZEN: u32 = 2;
        let header: &mut Header = tuple::header_mut(item::item_mut(page, offset)?)?;
        tuple::set_xmax(header, self.xmax);
        if self.flags & FREEZE_XVAC != 0 {
            tuple::set_command(header, FROZEN);
        }
        if self.flags & INVALID_XVAC != 0 {
            tuple::set_command(header, 0);
        }
        tuple::set_infomask(header, self.infomask);
        tuple::set_infomask2(header, self.infomask2);
        Ok(())
    }
}

/// `heap_xlog_freeze_page` of 14 and 15: one `xl_heap_freeze_tuple` a tuple.
pub(super) fn freeze_tuples(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.u32()?; // cutoff, for standbys
    let count = main.u16()?;
    let mut data = Cursor::new(redo.record.data);
    for _ in 0..count {
        let xmax = data.u32()?;
        let offset = data.u16()?;
        let freeze = Freeze { xmax, infomask2: data.u16()?, infomask: data.u16()?, flags: data.u8()? };
        data.u8()?; // padding
        freeze.execute(page, offset)?;
    }
    Ok(())
}

/// `heap_xlog_freeze_page` of 16.
pub(super) fn freeze_plans(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.u32()?; // snapshot conflict horizon, for standbys
    let count = usize::from(main.u16()?);
    let mut data = Cursor::new(redo.record.data);
    let plans = data.take(count * FREEZE_PLAN_SIZE)?;
    execute_plans(page, plans, &mut data)
}

/// Bytes in a freeze plan: [`Freeze`], padding `u8`, number of tuples `u16`.
const FREEZE_PLAN_SIZE: usize = 12;

/// Freezes by each of `plans` as many tuples as it says; their numbers come next in `offsets`.
fn execute_plans(page: &mut Page, plans: &[u8], offsets: &mut Cursor<'_>) -> Result<(), Fault> {
    let mut plans = Cursor::new(plans);
    while !plans.is_empty() {
        let freeze = Freeze { xmax: plans.u32()?, infomask2: plans.u16()?, infomask: plans.u16()?, flags: plans.u8()? };
        plans.u8()?; // padding
        let count = plans.u16()?;
        for _ in 0..count {
            freeze.execute(page, offsets.u16()?)?;
        }
    }
    Ok(())
}

/// What a prune record of 17 and later says of itself (`XLHP_*`).
pub(super) mod part {
    /// Taken with a cleanup lock: tuples may be moved.
    pub(in crate::heap) const CLEANUP_LOCK: u8 = 1 << 2;
    pub(in crate::heap) const FREEZE_PLANS: u8 = 1 << 4;
    pub(in crate::heap) const REDIRECTIONS: u8 = 1 << 5;
    pub(in crate::heap) const DEAD_ITEMS: u8 = 1 << 6;
    pub(in crate::heap) const UNUSED_ITEMS: u8 = 1 << 7;
}

/// `heap_xlog_prune_freeze` (from 17 on).
pub(super) fn prune_and_freeze(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout) -> Result<(), Fault> {
    let flags = prune_flags(redo.record.main_data)?;
    let mut data = Cursor::new(redo.record.data);
    let mut plans: &[u8] = &[];
    if flags & part::FREEZE_PLANS != 0 {
        let count = usize::from(data.u16()?);
        data.u16()?; // padding
        plans = data.take(count * FREEZE_PLAN_SIZE)?;
    }
    let mut items = |part: u8, size: usize| {
        if flags & part == 0 {
            return Ok(Offsets::default());
        }
        let count = usize::from(data.u16()?);
        Offsets::take(&mut data, count * size)
    };
    let pruned =
        Pruned { redirected: items(part::REDIRECTIONS, 2)?, dead: items(part::DEAD_ITEMS, 1)?, unused: items(part::UNUSED_ITEMS, 1)? };
    if !pruned.is_empty() {
        if flags & part::CLEANUP_LOCK == 0 {
            layout.end(page)?;
            pruned.set_line_pointers(page)?;
            item::truncate_line_pointers(page)?;
        } else {
            layout.prune(page, &pruned, redo.major.prune_truncates_line_pointers())?;
        }
    }
    execute_plans(page, plans, &mut data)?;
    if !data.is_empty() {
        return Err(format!("{} bytes follow the last tuple to be frozen", data.len()).into());
    }
    Ok(())
}

/// The flags of a prune record of 17 and later: see [`part`].
pub(super) fn prune_flags(main_data: &[u8]) -> Result<u8, Fault> {
    let mut main = Cursor::new(main_data);
    main.u8()?; // reason
    main.u8()
}

/// Whether a record of this type is one of the three that prune, vacuum or freeze.
pub(super) fn is_prune(kind: u8) -> bool {
    matches!(kind, opcode::PRUNE | opcode::VACUUM | opcode::FREEZE_PAGE)
}
