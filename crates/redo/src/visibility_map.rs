//! The visibility map: two bits a heap block (`access/visibilitymap.h`).

use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, Page};

/// Heap blocks whose bits one byte holds.
const HEAP_BLOCKS_PER_BYTE: u32 = 4;
/// Heap blocks that one map page covers (`HEAPBLOCKS_PER_PAGE`).
pub(crate) const HEAP_BLOCKS_PER_PAGE: u32 = (BLCKSZ - PAGE_HEADER_SIZE) as u32 * HEAP_BLOCKS_PER_BYTE;

/// `visibilitymap_clear`: clears `flags` of each of `heap_blocks` on map page `blkno`. Postgres sets no LSN when it clears.
pub(crate) fn clear(page: &mut Page, blkno: BlockNumber, _lsn: Lsn, heap_blocks: &[BlockNumber], flags: u8) -> Result<(), String> {
    if page::is_new(page) {
        page::init(page, 0);
    }
    for heap_block in heap_blocks {
        if heap_block / HEAP_BLOCKS_PER_PAGE != blkno {
            return Err(format!("heap block {heap_block} is not on visibility-map page {blkno}"));
        }
        let index = heap_block % HEAP_BLOCKS_PER_PAGE;
        let byte = PAGE_HEADER_SIZE + (index / HEAP_BLOCKS_PER_BYTE) as usize;
        page[byte] &= !(flags << (index % HEAP_BLOCKS_PER_BYTE * 2));
    }
    Ok(())
}
