//! The special space of a B-tree page (`BTPageOpaqueData` of `access/nbtree.h`), and how pages are filled anew.
//!
//! Layout, from byte 8176: left sibling `u32`, right sibling `u32`, level `u32`, flags `u16`, vacuum cycle id `u16`.

use varve_postgres::{BlockNumber, Page, page};

use crate::cursor::Cursor;
use crate::item::{self, OffsetNumber};
use crate::{Fault, index_tuple};

/// Bytes in the special space.
const OPAQUE_SIZE: usize = 16;

/// `P_NONE`: no such sibling.
pub(super) const NONE: BlockNumber = 0;
/// `P_HIKEY`: the line pointer of the high key, on a page that has a right sibling.
pub(super) const HIGH_KEY: OffsetNumber = 1;

/// `BTP_LEAF`.
pub(super) const LEAF: u16 = 1 << 0;
/// `BTP_ROOT`.
pub(super) const ROOT: u16 = 1 << 1;
/// `BTP_DELETED`.
pub(super) const DELETED: u16 = 1 << 2;
/// `BTP_META`.
pub(super) const META: u16 = 1 << 3;
/// `BTP_HALF_DEAD`.
pub(super) const HALF_DEAD: u16 = 1 << 4;
/// `BTP_HAS_GARBAGE`.
pub(super) const HAS_GARBAGE: u16 = 1 << 6;
/// `BTP_INCOMPLETE_SPLIT`.
pub(super) const INCOMPLETE_SPLIT: u16 = 1 << 7;
/// `BTP_HAS_FULLXID`.
pub(super) const HAS_FULLXID: u16 = 1 << 8;

/// A page's place in the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Opaque {
    /// `btpo_prev`: the left sibling, or [`NONE`].
    pub(super) prev: BlockNumber,
    /// `btpo_next`: the right sibling, or [`NONE`].
    pub(super) next: BlockNumber,
    /// `btpo_level`: 0 on leaves.
    pub(super) level: u32,
    /// `btpo_flags`.
    pub(super) flags: u16,
    /// `btpo_cycleid`: of the VACUUM during which the page was last split. Redo always leaves 0.
    pub(super) cycle_id: u16,
}

impl Opaque {
    /// That of `page`, which must be a B-tree page by its special space's size.
    pub(super) fn read(page: &Page) -> Result<Opaque, Fault> {
        let mut at = Cursor::new(item::special_space(page, OPAQUE_SIZE)?);
        Ok(Opaque { prev: at.u32()?, next: at.u32()?, level: at.u32()?, flags: at.u16()?, cycle_id: at.u16()? })
    }

    /// Makes it `page`'s.
    pub(super) fn write(self, page: &mut Page) -> Result<(), Fault> {
        let space = item::special_space_mut(page, OPAQUE_SIZE)?;
        space[0..4].copy_from_slice(&self.prev.to_le_bytes());
        space[4..8].copy_from_slice(&self.next.to_le_bytes());
        space[8..12].copy_from_slice(&self.level.to_le_bytes());
        space[12..14].copy_from_slice(&self.flags.to_le_bytes());
        space[14..16].copy_from_slice(&self.cycle_id.to_le_bytes());
        Ok(())
    }

    /// `P_RIGHTMOST`: it has no right sibling, hence no high key.
    pub(super) fn is_rightmost(&self) -> bool {
        self.next == NONE
    }

    /// `P_FIRSTDATAKEY`: the first line pointer behind the high key, if there is one.
    pub(super) fn first_data_key(&self) -> OffsetNumber {
        if self.is_rightmost() { HIGH_KEY } else { HIGH_KEY + 1 }
    }
}

/// Changes a page's special space.
pub(super) fn change(page: &mut Page, change: impl FnOnce(&mut Opaque)) -> Result<(), Fault> {
    let mut opaque = Opaque::read(page)?;
    change(&mut opaque);
    opaque.write(page)
}

/// `_bt_pageinit`, and its special space.
pub(super) fn init(page: &mut Page, opaque: Opaque) -> Result<(), Fault> {
    page::init(page, OPAQUE_SIZE);
    opaque.write(page)
}

/// `_bt_clear_incomplete_split`: the page's right sibling has got its downlink.
pub(super) fn clear_incomplete_split(page: &mut Page) -> Result<(), Fault> {
    change(page, |opaque| opaque.flags &= !INCOMPLETE_SPLIT)
}

/// `_bt_restore_page`: fills an empty page from a copy of the upper part of the original, where the last tuple comes
/// first.
pub(super) fn restore(page: &mut Page, tuples: &[u8]) -> Result<(), Fault> {
    let mut rest = Cursor::new(tuples);
    let mut found: [&[u8]; item::MAX_INDEX_TUPLES] = [&[]; item::MAX_INDEX_TUPLES];
    let mut len = 0;
    while !rest.is_empty() {
        *found.get_mut(len).ok_or_else(|| format!("the record has more than {} tuples", item::MAX_INDEX_TUPLES))? =
            index_tuple::take_aligned(&mut rest)?;
        len += 1;
    }
    for tuple in found[..len].iter().rev() {
        append(page, tuple)?;
    }
    Ok(())
}

/// Puts a tuple behind the last one.
pub(super) fn append(page: &mut Page, tuple: &[u8]) -> Result<(), Fault> {
    let next = item::max_offset(page) + 1;
    item::add_item(page, tuple, next, false, false)?;
    Ok(())
}
