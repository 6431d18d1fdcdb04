//! What Postgres masks before it compares a redone page with the primary's (`access/bufmask.c` and each resource
//! manager's `rm_mask`).
//!
//! Some bytes of a page change on the primary without a record (hint bits, flags that are hints, what lies between
//! `pd_lower` and `pd_upper`), so redo cannot and need not know them. After masking, two pages that are equal in all
//! that counts are equal in all bytes. The rules are the same in all supported majors. One is not Postgres's: GiST's
//! "tuples deleted", in which minors differ ([`varve_postgres::minor`]), is masked, too.

use varve_postgres::minor::GIST_TUPLES_DELETED;
use varve_postgres::page::{self, PAGE_HEADER_SIZE, PD_ALL_VISIBLE, PD_HAS_FREE_LINES, PD_PAGE_FULL};
use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, Major, Page};

use crate::Fault;
use crate::heap::tuple;
use crate::item::{self, ItemState};

/// Masks `page`, which is block `blkno`, as resource manager `rmid` of `major` does. A resource manager without a
/// masking function masks nothing.
///
/// # Errors
/// What is wrong, in words, when the page's structure contradicts itself, so that there is no telling what to mask.
pub fn mask_page(_major: Major, rmid: u8, page: &mut Page, blkno: BlockNumber) -> Result<(), String> {
    let done = match rmid {
        rmgr::HEAP | rmgr::HEAP2 => mask_heap(page, blkno),
        rmgr::BTREE => mask_btree(page),
        rmgr::HASH => mask_hash(page),
        rmgr::GIN => mask_gin(page),
        rmgr::GIST => mask_gist(page),
        rmgr::SPGIST => mask_spgist(page),
        rmgr::BRIN => mask_brin(page),
        rmgr::SEQ | rmgr::GENERIC => {
            mask_lsn_and_checksum(page);
            mask_unused_space(page)
        }
        _ => Ok(()),
    };
    done.map_err(|fault| match fault {
        Fault::Inconsistent(what) => what,
        Fault::Unsupported => "the page cannot be masked".to_owned(),
    })
}

/// The resource manager to which a page of a main fork belongs by its looks, for pages of which only an image is known.
/// Access methods tell their pages apart by the size of the special space and its last two bytes. `None` for a page
/// never initialised.
pub fn rmgr_of_page(page: &Page) -> Option<u8> {
    /// `SEQ_MAGIC`, at the start of a sequence's special space.
    const SEQUENCE: u32 = 0x1717;
    const HASH: u16 = 0xFF80;
    const GIST: u16 = 0xFF81;
    const SPGIST: u16 = 0xFF82;
    /// `BLOOM_PAGE_ID` of the bloom extension, which logs by generic WAL.
    const BLOOM: u16 = 0xFF83;
    /// `BRIN_PAGETYPE_META` to `BRIN_PAGETYPE_REGULAR`.
    const BRIN: std::ops::RangeInclusive<u16> = 0xF091..=0xF093;
    if page::is_new(page) {
        return None;
    }
    let id = u16::from_le_bytes([page[BLCKSZ - 2], page[BLCKSZ - 1]]);
    let special = page.get(usize::from(page::special(page))..)?;
    Some(match (special.len(), id) {
        (0, _) => rmgr::HEAP,
        (16, HASH) => rmgr::HASH,
        (16, GIST) => rmgr::GIST,
        (16, _) => rmgr::BTREE,
        (8, _) if special[..4] == SEQUENCE.to_le_bytes() && id == 0 => rmgr::SEQ,
        (8, SPGIST) => rmgr::SPGIST,
        (8, id) if BRIN.contains(&id) => rmgr::BRIN,
        (8, BLOOM) => rmgr::GENERIC,
        (8, _) => rmgr::GIN,
        _ => rmgr::GENERIC,
    })
}

/// `mask_page_lsn_and_checksum`.
pub fn mask_lsn_and_checksum(page: &mut Page) {
    page::set_lsn(page, Lsn::INVALID);
    page::set_checksum(page, 0);
}

/// `mask_page_hint_bits`.
fn mask_hint_bits(page: &mut Page) {
    page::set_prune_xid(page, 0);
    let flags = page::flags(page) & !(PD_PAGE_FULL | PD_HAS_FREE_LINES | PD_ALL_VISIBLE);
    page::set_flags(page, flags);
}

/// `mask_unused_space`: what lies between line pointers and tuples.
fn mask_unused_space(page: &mut Page) -> Result<(), Fault> {
    item::check_header(page)?;
    let (lower, upper) = (usize::from(page::lower(page)), usize::from(page::upper(page)));
    page[lower..upper].fill(0);
    Ok(())
}

/// `mask_lp_flags`: the state of line pointers that are in use.
fn mask_line_pointer_states(page: &mut Page) -> Result<(), Fault> {
    for offset in 1..=item::max_offset(page) {
        let id = item::item_id(page, offset)?;
        item::set_item_id(page, offset, id.with_state(ItemState::Unused))?;
    }
    Ok(())
}

/// `mask_page_content`: all but the header's other fields.
fn mask_content(page: &mut Page) {
    page[PAGE_HEADER_SIZE..].fill(0);
    page::set_lower(page, 0);
    page::set_upper(page, 0);
}

fn mask_heap(page: &mut Page, blkno: BlockNumber) -> Result<(), Fault> {
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    mask_unused_space(page)?;
    for offset in 1..=item::max_offset(page) {
        let id = item::item_id(page, offset)?;
        if !id.has_storage() {
            continue;
        }
        let range = item::item_range(page, offset)?;
        if id.is_normal() {
            let header = tuple::header_mut(&mut page[range.clone()])?;
            let infomask = tuple::infomask(header);
            let mask = if infomask & tuple::XMIN_FROZEN == tuple::XMIN_FROZEN {
                tuple::XMAX_INVALID | tuple::XMAX_COMMITTED
            } else {
                tuple::XACT_MASK
            };
            tuple::set_infomask(header, infomask & !mask);
            tuple::set_command(header, 0);
            // An insertion under way carries a token in place of its own address, which is not logged.
            if tuple::ctid_offset(header) == tuple::SPECULATIVE_TOKEN {
                tuple::set_ctid(header, blkno, offset);
            }
        }
        let padded = item::max_align(range.len()).min(BLCKSZ - range.start);
        page[range.end..range.start + padded].fill(0);
    }
    Ok(())
}

fn flags_at(special: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([special[at], special[at + 1]])
}

fn set_flags_at(special: &mut [u8], at: usize, flags: u16) {
    special[at..at + 2].copy_from_slice(&flags.to_le_bytes());
}

fn mask_btree(page: &mut Page) -> Result<(), Fault> {
    /// `BTPageOpaqueData`: previous and next block, level, flags at 12, cycle id at 14.
    const OPAQUE_SIZE: usize = 16;
    const LEAF: u16 = 1 << 0;
    const SPLIT_END: u16 = 1 << 5;
    const HAS_GARBAGE: u16 = 1 << 6;
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    mask_unused_space(page)?;
    let flags = flags_at(item::special_space(page, OPAQUE_SIZE)?, 12);
    if flags & LEAF != 0 {
        mask_line_pointer_states(page)?;
    }
    let opaque = item::special_space_mut(page, OPAQUE_SIZE)?;
    set_flags_at(opaque, 12, flags & !(HAS_GARBAGE | SPLIT_END));
    set_flags_at(opaque, 14, 0);
    Ok(())
}

fn mask_hash(page: &mut Page) -> Result<(), Fault> {
    /// `HashPageOpaqueData`: previous and next block, bucket, flags at 12, page id.
    const OPAQUE_SIZE: usize = 16;
    const TYPE_MASK: u16 = 0xF;
    const TYPE_UNUSED: u16 = 0;
    const TYPE_OVERFLOW: u16 = 1;
    const TYPE_BUCKET: u16 = 2;
    const HAS_DEAD_TUPLES: u16 = 1 << 7;
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    mask_unused_space(page)?;
    let flags = flags_at(item::special_space(page, OPAQUE_SIZE)?, 12);
    match flags & TYPE_MASK {
        TYPE_UNUSED => mask_content(page),
        TYPE_OVERFLOW | TYPE_BUCKET => {
            mask_line_pointer_states(page)?;
            set_flags_at(item::special_space_mut(page, OPAQUE_SIZE)?, 12, flags & !HAS_DEAD_TUPLES);
        }
        _ => set_flags_at(item::special_space_mut(page, OPAQUE_SIZE)?, 12, flags & !HAS_DEAD_TUPLES),
    }
    Ok(())
}

fn mask_gin(page: &mut Page) -> Result<(), Fault> {
    /// `GinPageOpaqueData`: right link, number of tuples, flags at 6.
    const OPAQUE_SIZE: usize = 8;
    const DELETED: u16 = 1 << 2;
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    if flags_at(item::special_space(page, OPAQUE_SIZE)?, 6) & DELETED != 0 {
        mask_content(page);
    } else if usize::from(page::lower(page)) > PAGE_HEADER_SIZE {
        mask_unused_space(page)?;
    }
    Ok(())
}

fn mask_gist(page: &mut Page) -> Result<(), Fault> {
    /// `GISTPageOpaqueData`: NSN in bytes 0 to 7, right link, flags at 12, page id.
    const OPAQUE_SIZE: usize = 16;
    const LEAF: u16 = 1 << 0;
    const FOLLOW_RIGHT: u16 = 1 << 3;
    const HAS_GARBAGE: u16 = 1 << 4;
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    mask_unused_space(page)?;
    let opaque = item::special_space_mut(page, OPAQUE_SIZE)?;
    opaque[..8].fill(0);
    let flags = flags_at(opaque, 12);
    set_flags_at(opaque, 12, (flags | FOLLOW_RIGHT) & !(HAS_GARBAGE | GIST_TUPLES_DELETED));
    if flags & LEAF != 0 {
        mask_line_pointer_states(page)?;
    }
    Ok(())
}

/// Whether all that differs of two heap pages (at these offsets, after masking) is what Postgres's own recovery makes
/// otherwise than the primary: locking clears a tuple's mark of a combined command id in `heap_xlog_lock` and not in
/// `heap_lock_tuple`. The mark of a frozen tuple means nothing and is not masked, so Postgres's own check complains.
pub(crate) fn is_combo_command_of_locked(ours: &Page, truth: &Page, at: &[u16]) -> bool {
    /// Where infomask's lower byte stands in a tuple, and the mark in it.
    const INFOMASK_AT: usize = 20;
    const MARK: u8 = tuple::COMBOCID as u8;
    let marks = (1..=item::max_offset(truth)).filter_map(|offset| {
        let (id, range) = (item::item_id(truth, offset).ok()?, item::item_range(truth, offset).ok()?);
        let mut header = *truth.get(range.clone())?.first_chunk::<{ tuple::HEADER_SIZE }>()?;
        let infomask = tuple::infomask(tuple::header_mut(&mut header).ok()?);
        (id.is_normal() && infomask & tuple::XMIN_FROZEN == tuple::XMIN_FROZEN).then_some(range.start + INFOMASK_AT)
    });
    let marks: Vec<usize> = marks.collect();
    !at.is_empty() && at.iter().map(|at| usize::from(*at)).all(|at| marks.contains(&at) && truth[at] & MARK != 0 && ours[at] & MARK == 0)
}

/// Offsets at which two GiST pages differ in what a page split leaves and [`mask_page`] masks: node sequence number and
/// "follow right".
pub(crate) fn gist_split_state_differences(a: &Page, b: &Page) -> Vec<u16> {
    const SEQUENCE_NUMBER_AT: usize = BLCKSZ - 16;
    const FLAGS_AT: usize = BLCKSZ - 4;
    const FOLLOW_RIGHT: u8 = 1 << 3;
    let sequence_number = (SEQUENCE_NUMBER_AT..SEQUENCE_NUMBER_AT + 8).filter(|at| a[*at] != b[*at]);
    let flags = (FLAGS_AT..FLAGS_AT + 1).filter(|at| (a[*at] ^ b[*at]) & FOLLOW_RIGHT != 0);
    sequence_number.chain(flags).map(|at| at as u16).collect()
}

/// `lastUsedPages` of an SP-GiST metapage: behind the page header and a magic number, 8 of block number and free space.
pub(crate) const SPGIST_LAST_USED_PAGES: std::ops::Range<usize> = PAGE_HEADER_SIZE + 4..PAGE_HEADER_SIZE + 4 + 8 * 8;

fn mask_spgist(page: &mut Page) -> Result<(), Fault> {
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    if usize::from(page::lower(page)) >= PAGE_HEADER_SIZE {
        mask_unused_space(page)?;
    }
    Ok(())
}

fn mask_brin(page: &mut Page) -> Result<(), Fault> {
    /// `BrinSpecialSpace`: flags at 4, page type at 6.
    const OPAQUE_SIZE: usize = 8;
    const TYPE_META: u16 = 0xF091;
    const TYPE_REGULAR: u16 = 0xF093;
    const EVACUATE: u16 = 1 << 0;
    mask_lsn_and_checksum(page);
    mask_hint_bits(page);
    let opaque = item::special_space(page, OPAQUE_SIZE)?;
    let (flags, kind) = (flags_at(opaque, 4), flags_at(opaque, 6));
    if kind == TYPE_REGULAR || (kind == TYPE_META && usize::from(page::lower(page)) > PAGE_HEADER_SIZE) {
        mask_unused_space(page)?;
    }
    set_flags_at(item::special_space_mut(page, OPAQUE_SIZE)?, 4, flags & !EVACUATE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use varve_postgres::Fork;

    use super::*;
    use crate::verify::{differences, file_differences};

    const FLAGS_AT: usize = BLCKSZ - 4;

    fn gist_page(flags: u16) -> Page {
        let mut page = page::ZERO_PAGE;
        page::init(&mut page, 16);
        page[FLAGS_AT..][..2].copy_from_slice(&flags.to_le_bytes());
        page[BLCKSZ - 2..].copy_from_slice(&0xFF81u16.to_le_bytes());
        page
    }

    #[test]
    fn minors_that_set_gists_tuples_deleted_equal_those_that_do_not() {
        const LEAF: u16 = 1;
        const DELETED: u16 = 2;
        for (major, kind) in Major::ALL.into_iter().flat_map(|major| [(major, 0), (major, LEAF)]) {
            let (with, without) = (gist_page(kind | GIST_TUPLES_DELETED), gist_page(kind));
            for (ours, truth) in [(&with, &without), (&without, &with)] {
                for rmid in [rmgr::GIST, rmgr::XLOG] {
                    assert_eq!(differences(major, rmid, Fork::Main, 3, ours, truth, false), Ok(vec![]), "{major:?}");
                    assert_eq!(file_differences(major, rmid, Fork::Main, 3, ours, truth), Ok(vec![]), "{major:?}");
                }
            }
            let deleted = gist_page(kind | DELETED);
            assert_eq!(file_differences(major, rmgr::GIST, Fork::Main, 3, &with, &deleted), Ok(vec![FLAGS_AT as u16]), "{major:?}");
        }
    }
}
