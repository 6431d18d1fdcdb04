//! Records that change tuples which are there: update, delete, lock, confirm, in-place update.

use varve_postgres::{BlockNumber, Page, page};

use super::insert::{init_if_told, reserve_tuple};
use super::layout::HeapLayout;
use super::record::{Delete, Lock, TupleHeader, Update};
use super::set_all_visible;
use super::tuple::{self, Header};
use crate::cursor::Cursor;
use crate::item::{self, ItemId, OffsetNumber};
use crate::{Fault, Redo};

/// The header of the tuple behind line pointer `offset`, which must be a normal one.
#[inline]
fn normal_tuple(page: &mut Page, offset: OffsetNumber) -> Result<&mut Header, Fault> {
    let id = item::item_id(page, offset)?;
    if !id.is_normal() {
        return Err(not_normal(offset, id));
    }
    tuple::header_mut(item::item_mut(page, offset)?)
}

#[cold]
#[inline(never)]
fn not_normal(offset: OffsetNumber, id: ItemId) -> Fault {
    format!("line pointer {offset} is not normal: {id:?}").into()
}

/// `fix_infomask_from_infobits`, after clearing all that tells of xmax.
fn set_xmax_bits(header: &mut Header, infobits: u8) {
    /// Bits of a record's infobits (`XLHL_*`), and what each sets in infomask.
    const INFOMASK: [(u8, u16); 4] =
        [(0x01, tuple::XMAX_IS_MULTI), (0x02, tuple::XMAX_LOCK_ONLY), (0x04, tuple::XMAX_EXCL_LOCK), (0x08, tuple::XMAX_KEYSHR_LOCK)];
    const KEYS_UPDATED: u8 = 0x10;
    let mut infomask = tuple::infomask(header) & !(tuple::XMAX_BITS | tuple::MOVED);
    for (bit, flag) in INFOMASK {
        if infobits & bit != 0 {
            infomask |= flag;
        }
    }
    tuple::set_infomask(header, infomask);
    let infomask2 = tuple::infomask2(header) & !tuple::KEYS_UPDATED;
    tuple::set_infomask2(header, if infobits & KEYS_UPDATED != 0 { infomask2 | tuple::KEYS_UPDATED } else { infomask2 });
}

fn set_hot_updated(header: &mut Header, hot: bool) {
    let others = tuple::infomask2(header) & !tuple::HOT_UPDATED;
    tuple::set_infomask2(header, if hot { others | tuple::HOT_UPDATED } else { others });
}

/// `HeapTupleHeaderSetCmax` with the first command, as redo always has it.
fn set_first_cmax(header: &mut Header) {
    tuple::set_command(header, 0);
    tuple::set_infomask(header, tuple::infomask(header) & !tuple::COMBOCID);
}

/// `HEAP_XMAX_IS_LOCKED_ONLY`.
fn is_locked_only(infomask: u16) -> bool {
    let locks = tuple::XMAX_IS_MULTI | tuple::XMAX_EXCL_LOCK | tuple::XMAX_KEYSHR_LOCK;
    infomask & tuple::XMAX_LOCK_ONLY != 0 || infomask & locks == tuple::XMAX_EXCL_LOCK
}

/// `PageSetPrunable`: the oldest transaction whose tuples may be pruned.
fn set_prunable(page: &mut Page, xid: u32) {
    const FIRST_NORMAL_XID: u32 = 3;
    let prune_xid = page::prune_xid(page);
    let precedes =
        if xid < FIRST_NORMAL_XID || prune_xid < FIRST_NORMAL_XID { xid < prune_xid } else { (xid.wrapping_sub(prune_xid) as i32) < 0 };
    if prune_xid == 0 || precedes {
        page::set_prune_xid(page, xid);
    }
}

/// `heap_xlog_delete`.
pub(super) fn delete(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let delete = Delete::decode(redo.record.main_data)?;
    let header = normal_tuple(page, delete.offset)?;
    set_xmax_bits(header, delete.infobits);
    set_hot_updated(header, false);
    if delete.is_super() {
        tuple::set_xmin(header, 0);
    } else {
        tuple::set_xmax(header, delete.xmax);
    }
    set_first_cmax(header);
    if delete.is_partition_move() {
        tuple::set_ctid(header, tuple::MOVED_PARTITIONS_BLOCK, tuple::MOVED_PARTITIONS_OFFSET);
    } else {
        tuple::set_ctid(header, redo.record.blkno, delete.offset);
    }
    set_prunable(page, redo.record.xid);
    if delete.all_visible_cleared() {
        set_all_visible(page, false);
    }
    Ok(())
}

/// `heap_xlog_update`: block 0 has the new tuple, block 1, if there is one, the old.
pub(super) fn update(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout, hot: bool) -> Result<(), Fault> {
    let update = Update::decode(redo.record.main_data)?;
    let new_block = redo.record.block_number(0).ok_or("the record has no block 0")?;
    let same_page = redo.record.block_number(1).is_none();
    if redo.record.block_id == 1 || same_page {
        update_old(redo, page, &update, new_block, hot)?;
    }
    if redo.record.block_id == 0 {
        if !same_page {
            init_if_told(redo, page, layout);
        }
        update_new(redo, page, layout, &update, same_page)?;
    }
    Ok(())
}

fn update_old(redo: &Redo<'_>, page: &mut Page, update: &Update, new_block: BlockNumber, hot: bool) -> Result<(), Fault> {
    let header = normal_tuple(page, update.old_offset)?;
    set_xmax_bits(header, update.old_infobits);
    set_hot_updated(header, hot);
    tuple::set_xmax(header, update.old_xmax);
    set_first_cmax(header);
    tuple::set_ctid(header, new_block, update.new_offset);
    set_prunable(page, redo.record.xid);
    if update.old_all_visible_cleared() {
        set_all_visible(page, false);
    }
    Ok(())
}

fn update_new(redo: &Redo<'_>, page: &mut Page, layout: &mut HeapLayout, update: &Update, same_page: bool) -> Result<(), Fault> {
    let mut data = Cursor::new(redo.record.data);
    let prefix_len = if update.prefix_from_old() { usize::from(data.u16()?) } else { 0 };
    let suffix_len = if update.suffix_from_old() { usize::from(data.u16()?) } else { 0 };
    let header = TupleHeader::decode(&mut data)?;
    if prefix_len + suffix_len == 0 {
        let body = data.rest();
        let range = reserve_tuple(redo, page, layout, update.new_offset, header, update.new_xmax, body.len())?;
        page[range].copy_from_slice(body);
    } else {
        if !same_page {
            return Err("the new tuple takes bytes of an old one that is on another page".into());
        }
        let old = item::item_range(page, update.old_offset)?;
        let hoff = usize::from(tuple::hoff(tuple::header_mut(&mut page[old.clone()])?));
        if hoff + prefix_len > old.len() || suffix_len > old.len() {
            return Err(format!("the new tuple takes {prefix_len} and {suffix_len} bytes of an old one of {}", old.len()).into());
        }
        // With a prefix, the null bitmap comes before it, and the rest of the record's bytes after.
        let bitmap = if prefix_len > 0 { data.take(usize::from(header.hoff).saturating_sub(tuple::HEADER_SIZE))? } else { &[] };
        let middle = data.rest();
        let body_len = bitmap.len() + prefix_len + middle.len() + suffix_len;
        let range = reserve_tuple(redo, page, layout, update.new_offset, header, update.new_xmax, body_len)?;
        // Room may have been made by moving tuples.
        let old = item::item_range(page, update.old_offset)?;
        let mut at = range.start;
        page[at..at + bitmap.len()].copy_from_slice(bitmap);
        at += bitmap.len();
        page.copy_within(old.start + hoff..old.start + hoff + prefix_len, at);
        at += prefix_len;
        page[at..at + middle.len()].copy_from_slice(middle);
        at += middle.len();
        page.copy_within(old.end - suffix_len..old.end, at);
    }
    if update.new_all_visible_cleared() {
        set_all_visible(page, false);
    }
    Ok(())
}

/// `heap_xlog_confirm`: a speculative insertion becomes an ordinary one.
pub(super) fn confirm(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = Cursor::new(redo.record.main_data).u16()?;
    tuple::set_ctid(normal_tuple(page, offset)?, redo.record.blkno, offset);
    Ok(())
}

/// `heap_xlog_lock`.
pub(super) fn lock(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let lock = Lock::decode(redo.record.main_data)?;
    let header = normal_tuple(page, lock.offset)?;
    set_xmax_bits(header, lock.infobits);
    if is_locked_only(tuple::infomask(header)) {
        set_hot_updated(header, false);
        tuple::set_ctid(header, redo.record.blkno, lock.offset);
    }
    tuple::set_xmax(header, lock.xmax);
    set_first_cmax(header);
    Ok(())
}

/// `heap_xlog_lock_updated`.
pub(super) fn lock_updated(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let lock = Lock::decode(redo.record.main_data)?;
    let header = normal_tuple(page, lock.offset)?;
    set_xmax_bits(header, lock.infobits);
    tuple::set_xmax(header, lock.xmax);
    Ok(())
}

/// `heap_xlog_inplace`: new values of the same length in place of the old.
pub(super) fn inplace(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = Cursor::new(redo.record.main_data).u16()?;
    let hoff = usize::from(tuple::hoff(normal_tuple(page, offset)?));
    let old = item::item_mut(page, offset)?;
    let len = old.len();
    let values = old.get_mut(hoff..).filter(|values| values.len() == redo.record.data.len());
    let values = values.ok_or_else(|| format!("{} bytes for a tuple of {len} with a header of {hoff}", redo.record.data.len()))?;
    values.copy_from_slice(redo.record.data);
    Ok(())
}
