//! GiST (`access/gistxlog.h`, `access/gist.h`).
//!
//! A page split does not change the parent: its left pages say "follow right" until the downlinks are inserted, and
//! that insertion clears the flag on the left one and gives it the record's LSN as its node sequence number. Postgres
//! does this to the page after it took the page's full image, so an image alone lacks it: see [`after_image`].
//!
//! The page flag "tuples deleted" is left as it is: minors differ in when they set it
//! ([`varve_postgres::minor::GIST_TUPLES_DELETED`]).
//!
//! Special space, 16 bytes: node sequence number as two `u32`, high one first; right link `u32`; flags `u16`; page id
//! `u16`.

use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::{BlockNumber, Lsn, Major, Page};

use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::{self, INVALID_BLOCK};
use crate::item::{
    add_item, index_multi_delete, index_tuple_delete, index_tuple_overwrite, max_offset, set_content_end, special_space, special_space_mut,
};
use crate::{Fault, Redo};

const PAGE_UPDATE: u8 = 0x00;
const DELETE: u8 = 0x10;
const PAGE_SPLIT: u8 = 0x30;
const PAGE_DELETE: u8 = 0x60;

/// Page flags.
const LEAF: u16 = 1 << 0;
const DELETED: u16 = 1 << 1;
const FOLLOW_RIGHT: u16 = 1 << 3;
const HAS_GARBAGE: u16 = 1 << 4;

/// Bytes of special space.
const SPECIAL_SIZE: usize = 16;
/// `GIST_PAGE_ID`.
const PAGE_ID: u16 = 0xFF81;
/// `GIST_ROOT_BLKNO`.
const ROOT: BlockNumber = 0;

/// What the special space holds (`GISTPageOpaqueData`).
#[derive(Clone, Copy, Debug)]
struct Opaque {
    sequence_number: u64,
    right_link: BlockNumber,
    flags: u16,
}

impl Opaque {
    fn read(page: &Page) -> Result<Opaque, Fault> {
        let mut cursor = Cursor::new(special_space(page, SPECIAL_SIZE)?);
        let (high, low) = (cursor.u32()?, cursor.u32()?);
        let opaque = Opaque { sequence_number: u64::from(high) << 32 | u64::from(low), right_link: cursor.u32()?, flags: cursor.u16()? };
        match cursor.u16()? {
            PAGE_ID => Ok(opaque),
            id => Err(format!("the page has id {id:#06x}, expected GiST's {PAGE_ID:#06x}").into()),
        }
    }

    fn write(self, page: &mut Page) -> Result<(), Fault> {
        let space = special_space_mut(page, SPECIAL_SIZE)?;
        space[..4].copy_from_slice(&((self.sequence_number >> 32) as u32).to_le_bytes());
        space[4..8].copy_from_slice(&(self.sequence_number as u32).to_le_bytes());
        space[8..12].copy_from_slice(&self.right_link.to_le_bytes());
        space[12..14].copy_from_slice(&self.flags.to_le_bytes());
        space[14..].copy_from_slice(&PAGE_ID.to_le_bytes());
        Ok(())
    }
}

pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = redo.record;
    match (record.info, record.block_id) {
        (PAGE_UPDATE, 0) => update(record, page),
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => clear_follow_right(redo.lsn, page),
        (PAGE_SPLIT, _) => split(record, page),
        (DELETE, 0) => delete(redo.major, record, page),
        (PAGE_DELETE, 0..=1) => delete_page(record, page),
        // PAGE_REUSE and ASSIGN_LSN, the other two types, have no blocks.
        (PAGE_UPDATE | DELETE | PAGE_DELETE, _) => Err(redo.no_such_block()),
        _ => Err(Fault::Unsupported),
    }
}

/// What redo does to block `block_id` of a record of type `info` even when the record has the block's image.
pub(crate) fn after_image(info: u8, block_id: u8, lsn: Lsn, page: &mut Page) -> Result<(), Fault> {
    match (info, block_id) {
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => clear_follow_right(lsn, page),
        _ => Ok(()),
    }
}

/// `gistRedoClearFollowRight`.
fn clear_follow_right(lsn: Lsn, page: &mut Page) -> Result<(), Fault> {
    let mut opaque = Opaque::read(page)?;
    opaque.sequence_number = lsn.0;
    opaque.flags &= !FOLLOW_RIGHT;
    opaque.write(page)
}

/// Adds index tuples behind the page's others until `tuples` is empty; their number.
fn add_tuples(page: &mut Page, tuples: &mut Cursor<'_>) -> Result<usize, Fault> {
    let mut added = 0;
    while !tuples.is_empty() {
        let offset = max_offset(page) + 1;
        add_item(page, index_tuple::take(tuples)?, offset, false, false)?;
        added += 1;
    }
    Ok(added)
}

/// `gistRedoPageUpdateRecord`. Main data (`gistxlogPageUpdate`): number of tuples to delete `u16`, to insert `u16`.
/// Block data: offsets to delete, tuples to insert.
fn update(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (to_delete, to_insert) = (main.u16()?, main.u16()?);
    let mut data = Cursor::new(record.data);
    let offsets = data.u16s(usize::from(to_delete))?;
    let inserted = if let ([offset], 1) = (offsets.as_slice(), to_insert) {
        // One for one keeps its place, as in gistplacetopage.
        index_tuple_overwrite(page, *offset, index_tuple::take(&mut data)?)?;
        1 + add_tuples(page, &mut data)?
    } else {
        if !offsets.is_empty() {
            index_multi_delete(page, &offsets)?;
        }
        add_tuples(page, &mut data)?
    };
    if inserted != usize::from(to_insert) {
        return Err(format!("the record has {inserted} tuples and says that it has {to_insert}").into());
    }
    Ok(())
}

/// `gistRedoDeleteRecord`.
///
/// Main data (`gistxlogDelete`): newest transaction among the deleted `u32`, number of offsets `u16`, from 16 on
/// whether it is a catalog `u8` and padding; the offsets.
fn delete(major: Major, record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let _conflict_horizon = main.u32()?;
    let n = main.u16()?;
    if major >= Major::V16 {
        let _is_catalog_and_padding = main.u16()?;
    }
    index_multi_delete(page, &main.u16s(usize::from(n))?)?;
    let mut opaque = Opaque::read(page)?;
    opaque.flags &= !HAS_GARBAGE;
    opaque.write(page)
}

/// `gistRedoPageSplitRecord`. Main data (`gistxlogPageSplit`): right link before the split `u32`, padding, node
/// sequence number before it `u64`, whether the page was a leaf `u8`, padding, number of pages `u16`, whether to set
/// follow-right `u8`. Blocks 1 to that number are the pages from left to right, each with the number of its tuples
/// `u32` and the tuples; when the root splits, it is the first of them and holds the downlinks.
fn split(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let right_link_before = main.u32()?;
    let _padding = main.u32()?;
    let sequence_number = main.u64()?;
    let is_leaf = main.u8()? != 0;
    let _padding = main.u8()?;
    let pages = main.u16()?;
    let mark_follow_right = main.u8()? != 0;
    let id = record.block_id;
    if u16::from(id) > pages {
        return Err(format!("block {id} is one more than the {pages} pages of the split").into());
    }

    let is_root = record.blkno == ROOT;
    page::init(page, SPECIAL_SIZE);
    let mut opaque = Opaque { sequence_number, right_link: INVALID_BLOCK, flags: 0 };
    if !is_root {
        if is_leaf {
            opaque.flags |= LEAF;
        }
        if u16::from(id) == pages {
            opaque.right_link = right_link_before;
        } else {
            let next = id.checked_add(1).and_then(|next| record.block_number(next));
            opaque.right_link = next.ok_or_else(|| format!("the split has {pages} pages and no block behind {id}"))?;
            if mark_follow_right && record.block_number(1) != Some(ROOT) {
                opaque.flags |= FOLLOW_RIGHT;
            }
        }
    }
    opaque.write(page)?;
    let mut data = Cursor::new(record.data);
    let tuples = data.u32()?;
    let added = add_tuples(page, &mut data)?;
    if added as u64 != u64::from(tuples) {
        return Err(format!("the block has {added} tuples and says that it has {tuples}").into());
    }
    Ok(())
}

/// `gistRedoPageDelete`. Main data (`gistxlogPageDelete`): last transaction that may still see the page, with its
/// epoch, `u64`, offset of the downlink `u16`. Block 0 is deleted, block 1 its parent.
fn delete_page(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let delete_xid = main.u64()?;
    let downlink = main.u16()?;
    if record.block_id == 1 {
        return index_tuple_delete(page, downlink);
    }
    let mut opaque = Opaque::read(page)?;
    opaque.flags |= DELETED;
    opaque.write(page)?;
    let end = PAGE_HEADER_SIZE + size_of_val(&delete_xid);
    page[PAGE_HEADER_SIZE..end].copy_from_slice(&delete_xid.to_le_bytes());
    set_content_end(page, end)
}

#[cfg(test)]
mod tests {
    use varve_postgres::page::BLCKSZ;

    use super::*;

    #[test]
    fn an_image_of_the_left_page_lacks_what_the_record_does_to_it() {
        let mut page = page::ZERO_PAGE;
        page::init(&mut page, SPECIAL_SIZE);
        Opaque { sequence_number: 5, right_link: 7, flags: LEAF | FOLLOW_RIGHT }.write(&mut page).unwrap();
        let before = page;

        after_image(PAGE_UPDATE, 0, Lsn(0x1_0000_0002), &mut page).unwrap();
        assert_eq!(page, before, "the parent's image is complete");

        for (info, block_id) in [(PAGE_UPDATE, 1), (PAGE_SPLIT, 0)] {
            page = before;
            after_image(info, block_id, Lsn(0x1_0000_0002), &mut page).unwrap();
            let opaque = Opaque::read(&page).unwrap();
            assert_eq!((opaque.sequence_number, opaque.right_link, opaque.flags), (0x1_0000_0002, 7, LEAF));
            assert_eq!(page[BLCKSZ - SPECIAL_SIZE..][..8], [1, 0, 0, 0, 2, 0, 0, 0], "the high half comes first");
        }
    }

    #[test]
    fn a_page_of_another_method_is_refused() {
        let mut page = page::ZERO_PAGE;
        page::init(&mut page, SPECIAL_SIZE);
        assert!(after_image(PAGE_UPDATE, 1, Lsn(1), &mut page).is_err(), "the page has no GiST page id");
    }
    /// What one minor's vacuum leaves, another's WAL goes on with.
    #[test]
    fn deleting_tuples_leaves_it_open_whether_some_were_deleted() {
        let main_data = [1, 0, 0, 0]; // one tuple to delete, none to insert
        let record = BlockRecord {
            rmid: varve_postgres::wal::rmgr::GIST,
            info: PAGE_UPDATE,
            xid: 0,
            main_data: &main_data,
            block_id: 0,
            fork: varve_postgres::Fork::Main,
            blkno: 3,
            will_init: false,
            has_data: true,
            data: &[1, 0],
            others: Default::default(),
        };
        for flags in [LEAF, LEAF | varve_postgres::minor::GIST_TUPLES_DELETED] {
            let mut page = page::ZERO_PAGE;
            page::init(&mut page, SPECIAL_SIZE);
            Opaque { sequence_number: 5, right_link: 7, flags }.write(&mut page).unwrap();
            add_item(&mut page, &[0; 16], 1, false, false).unwrap();
            update(&record, &mut page).unwrap();
            assert_eq!((max_offset(&page), Opaque::read(&page).unwrap().flags), (0, flags));
        }
    }
}
