//! Pages of the free-space map (`storage/freespace/`): a binary tree of categories, one byte each, in which a parent
//! has the greater of its children. Leaves of the map's bottom pages stand for heap blocks, leaves of upper pages for
//! pages below.
//!
//! Layout behind the page header: `fp_next_slot` `i32`, then [`NODES`] bytes of nodes, the root first. The map is not
//! logged; pages that were never written count as all zeros, so no free space.

use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::{BLCKSZ, BlockNumber, Page};

/// Where the nodes begin.
const NODES_START: usize = PAGE_HEADER_SIZE + 4;
/// `NodesPerPage`.
const NODES: usize = BLCKSZ - NODES_START;
/// `NonLeafNodesPerPage`.
const UPPER_NODES: usize = BLCKSZ / 2 - 1;
/// `SlotsPerFSMPage`: leaves of a page.
pub const SLOTS_PER_PAGE: u32 = (NODES - UPPER_NODES) as u32;
/// `FSM_TREE_DEPTH`: levels of pages.
const LEVELS: u32 = 3;
/// `MaxFSMRequestSize`, which is `MaxHeapTupleSize`.
const REQUEST_SIZE_MAX: usize = BLCKSZ - 32;
/// `FSM_CAT_STEP`: bytes a category.
const CATEGORY_STEP: usize = BLCKSZ / 256;

/// `fsm_space_avail_to_cat`: the category of a page with `bytes` of free space.
pub fn category(bytes: usize) -> u8 {
    if bytes >= REQUEST_SIZE_MAX { u8::MAX } else { (bytes / CATEGORY_STEP).min(254) as u8 }
}

/// The map's block, and the slot there, that stand for heap block `heap_block` (`fsm_get_location`,
/// `fsm_logical_to_physical`).
pub fn location(heap_block: BlockNumber) -> (BlockNumber, u32) {
    let mut page = heap_block / SLOTS_PER_PAGE;
    let mut block = 0;
    for _ in 0..LEVELS {
        block += page + 1;
        page /= SLOTS_PER_PAGE;
    }
    (block - 1, heap_block % SLOTS_PER_PAGE)
}

/// What a block of the map is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapPage {
    /// The root: its slots stand for middle pages.
    Root,
    /// The middle page with this number: its slots stand for bottom pages.
    Middle(u32),
    /// The bottom page with this number: its slots stand for heap blocks.
    Bottom(u32),
}

impl MapPage {
    /// What block `block` of the map is.
    pub fn at(block: BlockNumber) -> MapPage {
        // A middle page stands right before the bottom pages that it stands for.
        let Some(behind_root) = block.checked_sub(1) else { return MapPage::Root };
        let (middle, behind_middle) = (behind_root / (SLOTS_PER_PAGE + 1), behind_root % (SLOTS_PER_PAGE + 1));
        match behind_middle.checked_sub(1) {
            None => MapPage::Middle(middle),
            Some(bottom) => MapPage::Bottom(middle * SLOTS_PER_PAGE + bottom),
        }
    }

    /// The map's block that this is.
    pub fn block(self) -> BlockNumber {
        match self {
            MapPage::Root => block_of(2, 0),
            MapPage::Middle(number) => block_of(1, number),
            MapPage::Bottom(number) => block_of(0, number),
        }
    }
}

/// The map's length in blocks after its heap was cut to `heap_blocks`, and the slot of the last map page from which on
/// there is no free space any more; no such slot if the page before is the last one and stays as it is
/// (`FreeSpaceMapPrepareTruncateRel`).
pub fn length_after_truncation(heap_blocks: BlockNumber) -> (BlockNumber, Option<u32>) {
    let (block, slot) = location(heap_blocks);
    if slot > 0 { (block + 1, Some(slot)) } else { (block, None) }
}

fn node(page: &Page, node: usize) -> u8 {
    if node < NODES { page[NODES_START + node] } else { 0 }
}

/// The greater of the children of `parent`.
fn of_children(page: &Page, parent: usize) -> u8 {
    node(page, 2 * parent + 1).max(node(page, 2 * parent + 2))
}

/// `fsm_get_avail`: the category in `slot`.
pub fn get(page: &Page, slot: u32) -> u8 {
    node(page, UPPER_NODES.saturating_add(slot as usize))
}

/// `fsm_get_max_avail`: the greatest category on the page.
pub fn greatest(page: &Page) -> u8 {
    node(page, 0)
}

/// `fsm_set_avail`: sets the category in `slot` and what follows from it above. Gives whether the page changed; a slot
/// that does not exist changes nothing.
pub fn set(page: &mut Page, slot: u32, category: u8) -> bool {
    if slot >= SLOTS_PER_PAGE {
        return false;
    }
    if page::is_new(page) {
        page::init(page, 0);
    }
    let mut at = UPPER_NODES + slot as usize;
    if node(page, at) == category && category <= node(page, 0) {
        return false;
    }
    page[NODES_START + at] = category;
    while at > 0 {
        at = (at - 1) / 2;
        let value = of_children(page, at);
        if node(page, at) == value {
            break;
        }
        page[NODES_START + at] = value;
    }
    if category > node(page, 0) {
        rebuild(page);
    }
    true
}

/// `fsm_truncate_avail`: no free space from `slot` on. Gives whether the page changed.
pub fn truncate(page: &mut Page, slot: u32) -> bool {
    let start = NODES_START + UPPER_NODES + slot.min(SLOTS_PER_PAGE) as usize;
    let changed = page[start..].iter().any(|value| *value != 0);
    page[start..].fill(0);
    if changed {
        rebuild(page);
    }
    changed
}

/// `fsm_rebuild_page`: makes every parent the greater of its children.
fn rebuild(page: &mut Page) {
    for at in (0..UPPER_NODES).rev() {
        page[NODES_START + at] = of_children(page, at);
    }
}

/// `FreeSpaceMapVacuumRange` to the map's end: tells upper pages what pages below have, for heap blocks from
/// `heap_block` on. `read` gives a page of the map, nothing beyond its end; `write` is given those that changed.
pub fn update_upper_pages(
    heap_block: BlockNumber,
    mut read: impl FnMut(BlockNumber) -> Option<Page>,
    mut write: impl FnMut(BlockNumber, &Page),
) {
    update_page(LEVELS - 1, 0, heap_block, &mut read, &mut write);
}

/// Block of the page with number `page` among those of `level` (0 at the bottom) (`fsm_logical_to_physical`).
fn block_of(level: u32, page: u32) -> BlockNumber {
    let first_leaf = u64::from(page) * u64::from(SLOTS_PER_PAGE).pow(level);
    let before: u64 = (0..LEVELS).map(|above| first_leaf / u64::from(SLOTS_PER_PAGE).pow(above) + 1).sum();
    (before - u64::from(level) - 1) as BlockNumber
}

/// `fsm_vacuum_page`: gives the greatest category on the page; nothing beyond the map's end. Recurses [`LEVELS`] deep.
fn update_page(
    level: u32,
    page_number: u32,
    heap_block: BlockNumber,
    read: &mut dyn FnMut(BlockNumber) -> Option<Page>,
    write: &mut dyn FnMut(BlockNumber, &Page),
) -> Option<u8> {
    let block = block_of(level, page_number);
    let mut page = read(block)?;
    if level > 0 {
        let span = SLOTS_PER_PAGE.pow(level);
        let (first_page, first_slot) = (heap_block / span / SLOTS_PER_PAGE, heap_block / span % SLOTS_PER_PAGE);
        let mut at_end = false;
        let mut changed = false;
        for slot in if first_page == page_number { first_slot } else { 0 }..SLOTS_PER_PAGE {
            let below = if at_end { None } else { update_page(level - 1, page_number * SLOTS_PER_PAGE + slot, heap_block, read, write) };
            at_end |= below.is_none();
            let value = below.unwrap_or(0);
            if get(&page, slot) != value {
                changed |= set(&mut page, slot, value);
            }
        }
        if changed {
            write(block, &page);
        }
    }
    Some(greatest(&page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_postgres_s() {
        assert_eq!(SLOTS_PER_PAGE, 4069, "SlotsPerFSMPage");
        assert_eq!(location(0), (2, 0), "the first bottom page follows root and middle page");
        assert_eq!(location(4068), (2, 4068));
        assert_eq!(location(4069), (3, 0));
        assert_eq!(location(4069 * 4069), (4069 + 3, 0), "another middle page comes before it");
        assert_eq!((category(0), category(31), category(32), category(8159), category(8160)), (0, 0, 1, 254, 255));
    }

    #[test]
    fn blocks_of_the_map_are_what_they_are() {
        let s = SLOTS_PER_PAGE;
        let places =
            [MapPage::Root, MapPage::Middle(0), MapPage::Bottom(0), MapPage::Bottom(1), MapPage::Bottom(s - 1), MapPage::Middle(1)];
        for place in places.into_iter().chain([MapPage::Bottom(s), MapPage::Bottom(5 * s + 3), MapPage::Middle(7)]) {
            assert_eq!(MapPage::at(place.block()), place);
        }
        assert_eq!(MapPage::Bottom(0).block(), location(0).0);
        assert_eq!(MapPage::Bottom(s).block(), location(s * s).0);
    }

    #[test]
    fn upper_pages_learn_of_a_truncation() {
        assert_eq!((block_of(2, 0), block_of(1, 0), block_of(1, 1), block_of(0, 4069)), (0, 1, 4069 + 2, 4069 + 3));
        let mut map = vec![page::ZERO_PAGE; 4];
        set(&mut map[2], 5, 100);
        set(&mut map[3], 0, 50);
        let update = |map: &mut Vec<Page>, from| {
            let before = map.clone();
            update_upper_pages(from, |block| before.get(block as usize).copied(), |block, page| map[block as usize] = *page);
        };
        update(&mut map, 0);
        assert_eq!((greatest(&map[0]), get(&map[1], 0), get(&map[1], 1)), (100, 100, 50));
        assert_eq!(length_after_truncation(4069), (3, None));
        map.truncate(3);
        update(&mut map, 4069);
        assert_eq!((greatest(&map[0]), get(&map[1], 0), get(&map[1], 1)), (100, 100, 0));
    }

    #[test]
    fn a_parent_is_the_greater_of_its_children() {
        let mut page = page::ZERO_PAGE;
        assert!(set(&mut page, 7, 9));
        assert!(set(&mut page, 4068, 200));
        assert!(!set(&mut page, 4068, 200), "nothing changes the second time");
        assert_eq!((greatest(&page), get(&page, 7), get(&page, 8)), (200, 9, 0));
        assert!(truncate(&mut page, 8));
        assert_eq!((greatest(&page), get(&page, 7), get(&page, 4068)), (9, 9, 0));
        assert!(!set(&mut page, SLOTS_PER_PAGE, 1), "no such slot");
    }
}
