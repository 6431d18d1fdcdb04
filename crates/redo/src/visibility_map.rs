//! The visibility map: two bits a heap block (`access/visibilitymap.h`).
//!
//! Heap records clear bits. Up to the minors of summer 2026 they did not name the map pages ([`visibility_map_clears`]
//! says which they are), and those got no LSN; since then they name each page on which bits were set ([`clear_named`]),
//! and no others are touched. Which of the two a record is, only its blocks say, whatever its major. Setting bits has a
//! record of its own, which names the map page ([`set`]). Truncations get no LSN.

use smallvec::{SmallVec, smallvec};
use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::wal::{PlainRecord, Record, rmgr};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Page, RelFork};

use crate::Fault;
use crate::change::{BlockRecord, Change};
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

/// The bits that a record clears on visibility-map pages that it does not name: map page by map page.
///
/// A malformed record clears nothing here; redo of its blocks finds out.
#[inline]
pub fn visibility_map_clears(record: &Record<'_>) -> Vec<(RelFork, BlockNumber, Change<'static>)> {
    if !matches!(record.header.rmid, rmgr::HEAP | rmgr::HEAP2) {
        return Vec::new();
    }
    let has_old_block = record.block(OLD_BLOCK).is_some();
    match Cleared::of(record.header.rmid, record.kind(), record.main_data, has_old_block) {
        Ok(cleared) if cleared.blocks != [None; 2] => unnamed_clears(record, &cleared),
        _ => Vec::new(), // as most records
    }
}

/// Whether [`visibility_map_clears`] of the record may be something.
#[inline(always)]
pub fn clears_visibility(record: &PlainRecord<'_>) -> bool {
    record::clears_visibility(record.header.rmid, record.header.kind(), record.main_data)
}

fn unnamed_clears(record: &Record<'_>, cleared: &Cleared) -> Vec<(RelFork, BlockNumber, Change<'static>)> {
    // A record that names a map page names all that it changes.
    if record.blocks.iter().any(|block| block.rel.fork == Fork::VisibilityMap) {
        return Vec::new();
    }
    let mut clears: Vec<(RelFork, BlockNumber, SmallVec<[BlockNumber; 2]>)> = Vec::new();
    for id in cleared.blocks.into_iter().flatten() {
        let Some(block) = record.block(id) else { continue };
        let map = block.rel.node.fork(Fork::VisibilityMap);
        let map_page = block.blkno / HEAP_BLOCKS_PER_PAGE;
        match clears.iter_mut().find(|(_, page, _)| *page == map_page) {
            Some((_, _, heap_blocks)) => heap_blocks.push(block.blkno),
            None => clears.push((map, map_page, smallvec![block.blkno])),
        }
    }
    let flags = cleared.flags;
    clears.into_iter().map(|(map, page, heap_blocks)| (map, page, Change::ClearVisibility { heap_blocks, flags })).collect()
}

/// Redo of a map page that a heap record names (`heap_xlog_vm_clear`, and its like in `heap_xlog_update`): clears what
/// the record clears of the heap blocks that the page covers.
pub(crate) fn clear_named(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let has_old_block = record.others.iter().any(|other| other.id == OLD_BLOCK && other.fork == Fork::Main);
    let cleared = Cleared::of(record.rmid, record.info, record.main_data, has_old_block)?;
    let heap_blocks = cleared.blocks.into_iter().flatten().filter_map(|id| record.block_number(id));
    let covered: Vec<BlockNumber> = heap_blocks.filter(|heap_block| heap_block / HEAP_BLOCKS_PER_PAGE == record.blkno).collect();
    clear(page, record.blkno, &covered, cleared.flags)?;
    Ok(())
}

/// Id of the block with the old version in an update that puts the new one on another page.
const OLD_BLOCK: u8 = 1;

/// What a record clears.
struct Cleared {
    /// Ids of the heap blocks whose bits it clears.
    blocks: [Option<u8>; 2],
    /// Which bits.
    flags: u8,
}

impl Cleared {
    /// Of a record of Heap or Heap2; `has_old_block` says whether an update has one.
    #[inline(always)]
    fn of(rmid: u8, info: u8, data: &[u8], has_old_block: bool) -> Result<Cleared, Fault> {
        let first = |clears: bool, flags| Cleared { blocks: [clears.then_some(0), None], flags };
        Ok(match (rmid, info & opcode::MASK) {
            (rmgr::HEAP, opcode::INSERT) => first(record::Insert::decode(data)?.all_visible_cleared(), VALID_BITS),
            (rmgr::HEAP, opcode::DELETE) => first(record::Delete::decode(data)?.all_visible_cleared(), VALID_BITS),
            (rmgr::HEAP, opcode::UPDATE | opcode::HOT_UPDATE) => {
                let update = record::Update::decode(data)?;
                let old = if has_old_block { OLD_BLOCK } else { 0 };
                let (old_cleared, new_cleared) = (update.old_all_visible_cleared(), update.new_all_visible_cleared());
                let new_too = new_cleared && !(old_cleared && old == 0);
                Cleared { blocks: [old_cleared.then_some(old), new_too.then_some(0)], flags: VALID_BITS }
            }
            (rmgr::HEAP, opcode::LOCK) | (rmgr::HEAP2, opcode::LOCK_UPDATED) => {
                first(record::Lock::decode(data)?.all_frozen_cleared(), ALL_FROZEN)
            }
            (rmgr::HEAP2, opcode::MULTI_INSERT) => first(record::MultiInsert::decode(data, true)?.all_visible_cleared(), VALID_BITS),
            _ => first(false, 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use varve_postgres::Major;
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

    /// A heap record's part for the visibility-map page `blkno`, which it names as `id`; `heap` are its heap blocks.
    fn naming<'a>(rmid: u8, info: u8, main_data: &'a [u8], (id, blkno): (u8, BlockNumber), heap: &[(u8, BlockNumber)]) -> BlockRecord<'a> {
        let others = heap.iter().map(|(id, blkno)| crate::change::OtherBlock { id: *id, fork: Fork::Main, blkno: *blkno });
        BlockRecord {
            rmid,
            info,
            xid: 700,
            main_data,
            block_id: id,
            fork: Fork::VisibilityMap,
            blkno,
            will_init: false,
            has_data: false,
            data: &[],
            others: others.collect(),
        }
    }

    /// A map page with all bits set.
    fn full() -> Page {
        let mut page = ZERO_PAGE;
        page::init(&mut page, 0);
        page[PAGE_HEADER_SIZE..].fill(0xFF);
        page
    }

    /// The heap blocks whose bits redo of `record` changed, and what they became.
    fn cleared(record: BlockRecord<'_>) -> Vec<(BlockNumber, u8)> {
        let (mut page, blkno) = (full(), record.blkno);
        crate::apply(Major::V18, varve_postgres::Lsn(0x5000), blkno, &Change::Record(record), &mut page).unwrap();
        assert_eq!(page::lsn(&page), varve_postgres::Lsn(0x5000), "a named page gets the record's LSN");
        let blocks = (blkno * HEAP_BLOCKS_PER_PAGE..).take(HEAP_BLOCKS_PER_PAGE as usize);
        blocks.map(|block| (block, bits(&page, block))).filter(|(_, bits)| *bits != VALID_BITS).collect()
    }

    #[test]
    fn records_that_name_map_pages_clear_them() {
        let block = HEAP_BLOCKS_PER_PAGE + 7;
        let insert = |main_data| naming(rmgr::HEAP, opcode::INSERT | opcode::INIT_PAGE, main_data, (1, 1), &[(0, block)]);
        assert_eq!(cleared(insert(&[1, 0, 1])), [(block, 0)]);
        assert_eq!(cleared(insert(&[1, 0, 0])), [], "a record that clears nothing leaves the page");
        let delete = naming(rmgr::HEAP, opcode::DELETE, &[0, 0, 0, 0, 1, 0, 0, 1], (1, 1), &[(0, block)]);
        assert_eq!(cleared(delete), [(block, 0)]);
        let multi_insert = naming(rmgr::HEAP2, opcode::MULTI_INSERT, &[1, 0, 2, 0, 1, 0, 2, 0], (1, 1), &[(0, block)]);
        assert_eq!(cleared(multi_insert), [(block, 0)]);
        for (rmid, kind) in [(rmgr::HEAP, opcode::LOCK), (rmgr::HEAP2, opcode::LOCK_UPDATED)] {
            let lock = naming(rmid, kind, &[0, 0, 0, 0, 1, 0, 0, 1], (1, 1), &[(0, block)]);
            assert_eq!(cleared(lock), [(block, 1)], "a lock leaves the page all-visible");
        }
        let short = naming(rmgr::HEAP, opcode::INSERT, &[1], (1, 1), &[(0, block)]);
        assert!(clear_named(&short, &mut full()).is_err(), "a record that ends early must be refused");
    }

    #[test]
    fn updates_name_the_map_page_of_each_heap_block() {
        const OLD_CLEARED: u8 = 1;
        const NEW_CLEARED: u8 = 2;
        let update = |flags, named, heap: &[(u8, BlockNumber)]| {
            cleared(naming(rmgr::HEAP, opcode::UPDATE, &[0, 0, 0, 0, 1, 0, 0, flags, 0, 0, 0, 0, 2, 0], named, heap))
        };
        let (old, new, far) = (3, 9, HEAP_BLOCKS_PER_PAGE * 2);
        assert_eq!(update(OLD_CLEARED | NEW_CLEARED, (2, 0), &[(0, new), (1, old)]), [(old, 0), (new, 0)], "one page for both");
        assert_eq!(update(OLD_CLEARED | NEW_CLEARED, (2, 2), &[(0, far), (1, old), (3, 0)]), [(far, 0)], "the page of the new one");
        assert_eq!(update(OLD_CLEARED | NEW_CLEARED, (3, 0), &[(0, far), (1, old), (2, 2)]), [(old, 0)], "the page of the old one");
        assert_eq!(update(OLD_CLEARED, (3, 0), &[(0, new), (1, old)]), [(old, 0)]);
        assert_eq!(update(OLD_CLEARED | NEW_CLEARED, (2, 0), &[(0, new)]), [(new, 0)], "both on one heap page");
    }

    #[test]
    fn what_a_record_names_is_not_cleared_a_second_time() {
        let block = |id, fork, blkno| varve_postgres::wal::Block {
            id,
            rel: varve_postgres::RelNode { spc: 1663, db: 5, rel: 16384 }.fork(fork),
            blkno,
            will_init: false,
            has_data: false,
            data: &[],
            image: None,
        };
        let mut record = Record {
            header: varve_postgres::wal::RecordHeader {
                total_len: 0,
                xid: 700,
                prev: varve_postgres::Lsn(0x3000),
                info: opcode::INSERT,
                rmid: rmgr::HEAP,
                crc: 0,
            },
            start: varve_postgres::Lsn(0x4000),
            end: varve_postgres::Lsn(0x5000),
            blocks: smallvec![block(0, Fork::Main, 7)],
            main_data: &[1, 0, 1],
            origin: None,
            toplevel_xid: None,
        };
        let clears = visibility_map_clears(&record);
        assert!(
            matches!(&clears[..], [(map, 0, Change::ClearVisibility { heap_blocks, flags: 3 })] if map.fork == Fork::VisibilityMap && heap_blocks[..] == [7])
        );
        record.blocks.push(block(1, Fork::VisibilityMap, 0));
        assert_eq!(visibility_map_clears(&record), []);
    }

    proptest! {
        #[test]
        fn that_a_record_clears_bits_is_seen_at_a_glance(
            rmid in prop::sample::select(vec![rmgr::HEAP, rmgr::HEAP2, rmgr::BTREE]), info: u8, has_old_block: bool,
            data in vec(prop_oneof![Just(0u8), any::<u8>()], 0..16)) {
            let glance = record::clears_visibility(rmid, info, &data);
            // A malformed one clears nothing: see visibility_map_clears.
            if let Ok(cleared) = Cleared::of(rmid, info, &data, has_old_block) {
                prop_assert_eq!(glance, cleared.blocks != [None; 2]);
            }
        }
    }
}
