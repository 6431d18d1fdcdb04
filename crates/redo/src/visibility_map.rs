//! The visibility map: two bits a heap block (`access/visibilitymap.h`).
//!
//! Heap records clear bits on map pages that they do not name; [`visibility_map_clears`] says which. Setting bits has a record of its
//! own, which names the map page ([`set`]). Postgres keeps no LSN of clearings and none of truncations.

use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Major, Page, RelFork};

use crate::change::Change;
use crate::heap::record::{self, opcode};

/// Heap blocks whose bits one byte holds.
const HEAP_BLOCKS_PER_BYTE: u32 = 4;
/// Heap blocks that one map page covers (`HEAPBLOCKS_PER_PAGE`).
pub const HEAP_BLOCKS_PER_PAGE: u32 = (BLCKSZ - PAGE_HEADER_SIZE) as u32 * HEAP_BLOCKS_PER_BYTE;

/// `VISIBILITYMAP_ALL_FROZEN`.
const ALL_FROZEN: u8 = 2;
/// `VISIBILITYMAP_VALID_BITS`: all-visible and all-frozen.
pub(crate) const VALID_BITS: u8 = 3;

/// Byte and shift of the bits of `heap_block`, which map page `blkno` must cover.
fn place(blkno: BlockNumber, heap_block: BlockNumber) -> Result<(usize, u32), String> {
    if heap_block / HEAP_BLOCKS_PER_PAGE != blkno {
        return Err(format!("heap block {heap_block} is not on visibility-map page {blkno}"));
    }
    let index = heap_block % HEAP_BLOCKS_PER_PAGE;
    Ok((PAGE_HEADER_SIZE + (index / HEAP_BLOCKS_PER_BYTE) as usize, index % HEAP_BLOCKS_PER_BYTE * 2))
}

/// `visibilitymap_clear`: clears `flags` of each of `heap_blocks` on map page `blkno`.
pub(crate) fn clear(page: &mut Page, blkno: BlockNumber, heap_blocks: &[BlockNumber], flags: u8) -> Result<(), String> {
    init_if_new(page);
    for heap_block in heap_blocks {
        let (byte, shift) = place(blkno, *heap_block)?;
        page[byte] &= !((flags & VALID_BITS) << shift);
    }
    Ok(())
}

/// `visibilitymap_set`: sets `flags` of `heap_block` on map page `blkno`.
pub(crate) fn set(page: &mut Page, blkno: BlockNumber, heap_block: BlockNumber, flags: u8) -> Result<(), String> {
    init_if_new(page);
    let (byte, shift) = place(blkno, heap_block)?;
    page[byte] |= (flags & VALID_BITS) << shift;
    Ok(())
}

/// `visibilitymap_prepare_truncate`: clears the bits of heap blocks from `heap_blocks` on, the heap's new length.
pub(crate) fn truncate(page: &mut Page, blkno: BlockNumber, heap_blocks: BlockNumber) -> Result<(), String> {
    init_if_new(page);
    let (byte, shift) = place(blkno, heap_blocks)?;
    page[byte] &= (1 << shift) - 1;
    page[byte + 1..].fill(0);
    Ok(())
}

fn init_if_new(page: &mut Page) {
    if page::is_new(page) {
        page::init(page, 0);
    }
}

/// The bits that a record clears on visibility-map pages, which it does not name: map page by map page.
///
/// A malformed record clears nothing here; redo of its blocks finds out.
pub fn visibility_map_clears(record: &Record, _major: Major) -> Vec<(RelFork, BlockNumber, Change)> {
    let (cleared, flags) = match record.header.rmid {
        rmgr::HEAP | rmgr::HEAP2 => match cleared_heap_blocks(record) {
            Some(cleared) => cleared,
            None => return Vec::new(),
        },
        _ => return Vec::new(),
    };
    let mut clears: Vec<(RelFork, BlockNumber, Vec<BlockNumber>)> = Vec::new();
    for id in cleared.into_iter().flatten() {
        let Some(block) = record.block(id) else { continue };
        let map = block.rel.node.fork(Fork::VisibilityMap);
        let map_page = block.blkno / HEAP_BLOCKS_PER_PAGE;
        match clears.iter_mut().find(|(_, page, _)| *page == map_page) {
            Some((_, _, heap_blocks)) => heap_blocks.push(block.blkno),
            None => clears.push((map, map_page, vec![block.blkno])),
        }
    }
    clears.into_iter().map(|(map, page, heap_blocks)| (map, page, Change::ClearVisibility { heap_blocks, flags })).collect()
}

/// Ids of the record's blocks whose bits it clears, and which bits.
fn cleared_heap_blocks(record: &Record) -> Option<([Option<u8>; 2], u8)> {
    let data = &record.main_data[..];
    let kind = record.kind() & opcode::MASK;
    let one = |clears: bool| clears.then_some(([Some(0), None], VALID_BITS));
    match (record.header.rmid, kind) {
        (rmgr::HEAP, opcode::INSERT) => one(record::Insert::decode(data).ok()?.all_visible_cleared()),
        (rmgr::HEAP, opcode::DELETE) => one(record::Delete::decode(data).ok()?.all_visible_cleared()),
        (rmgr::HEAP, opcode::UPDATE | opcode::HOT_UPDATE) => {
            let update = record::Update::decode(data).ok()?;
            let old = if record.block(1).is_some() { 1 } else { 0 };
            let blocks = [
                update.old_all_visible_cleared().then_some(old),
                update.new_all_visible_cleared().then_some(0).filter(|new| !(update.old_all_visible_cleared() && *new == old)),
            ];
            Some((blocks, VALID_BITS))
        }
        (rmgr::HEAP, opcode::LOCK) | (rmgr::HEAP2, opcode::LOCK_UPDATED) => {
            record::Lock::decode(data).ok()?.all_frozen_cleared().then_some(([Some(0), None], ALL_FROZEN))
        }
        (rmgr::HEAP2, opcode::MULTI_INSERT) => one(record::MultiInsert::decode(data, true).ok()?.all_visible_cleared()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::page::ZERO_PAGE;

    use super::*;

    fn bits(page: &Page, heap_block: BlockNumber) -> u8 {
        let (byte, shift) = place(heap_block / HEAP_BLOCKS_PER_PAGE, heap_block).unwrap();
        page[byte] >> shift & VALID_BITS
    }

    #[test]
    fn bits_are_set_and_cleared_block_by_block() {
        let base = HEAP_BLOCKS_PER_PAGE * 5;
        let mut page = ZERO_PAGE;
        for heap_block in [base, base + 1, base + 6, base + HEAP_BLOCKS_PER_PAGE - 1] {
            set(&mut page, 5, heap_block, 0xFF).unwrap();
        }
        assert_eq!((page::lower(&page), page::upper(&page)), (24, 8192), "a map page that was zeros is initialised");
        assert_eq!((page[24], page[25], page[8191]), (0b0000_1111, 0b0011_0000, 0b1100_0000));
        clear(&mut page, 5, &[base + 1], ALL_FROZEN).unwrap();
        clear(&mut page, 5, &[base + 6, base + 7], VALID_BITS).unwrap();
        assert_eq!((bits(&page, base), bits(&page, base + 1), bits(&page, base + 6)), (3, 1, 0));
        assert!(set(&mut page, 5, base - 1, 1).is_err(), "a heap block of map page 4 must be refused on 5");
    }

    #[test]
    fn a_truncation_clears_what_lies_behind_it() {
        for heap_blocks in [0, 1, 3, 4, 5, 1000, HEAP_BLOCKS_PER_PAGE - 1] {
            let mut page = [0xFF; BLCKSZ];
            page::init(&mut page, 0);
            page[24..].fill(0xFF);
            truncate(&mut page, 0, heap_blocks).unwrap();
            for heap_block in 0..HEAP_BLOCKS_PER_PAGE {
                let expected = if heap_block < heap_blocks { 3 } else { 0 };
                assert_eq!(bits(&page, heap_block), expected, "block {heap_block} of a heap cut to {heap_blocks}");
            }
        }
    }
}
