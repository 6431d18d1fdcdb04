//! Pages leave the tree: `xl_btree_mark_page_halfdead` takes an empty leaf's downlink (or that of the subtree of which
//! it is the only leaf) away, `xl_btree_unlink_page` takes one page after the other out of its siblings' chain, from
//! the subtree's top down to the leaf.

use varve_postgres::page::{PAGE_HEADER_SIZE, set_lower};
use varve_postgres::{BlockNumber, Page};

use super::page::{self, DELETED, HALF_DEAD, HAS_FULLXID, HIGH_KEY, LEAF, NONE, Opaque};
use crate::cursor::Cursor;
use crate::index_tuple::{self, AM_RESERVED_BIT, INDEX_TUPLE_HEADER_SIZE, ItemPointer};
use crate::item::{self, OffsetNumber};
use crate::{Fault, Redo};

/// `xl_btree_mark_page_halfdead`.
struct HalfDead {
    /// The downlink to the subtree, on its parent.
    parent_offset: OffsetNumber,
    left: BlockNumber,
    right: BlockNumber,
    /// The subtree's topmost page; `InvalidBlockNumber` when that is the leaf itself.
    top_parent: BlockNumber,
}

impl HalfDead {
    fn read(redo: &Redo<'_>) -> Result<HalfDead, Fault> {
        let mut main = Cursor::new(redo.record.main_data);
        let parent_offset = main.u16()?;
        main.take(2 + 4)?; // padding, and the leaf's own number
        Ok(HalfDead { parent_offset, left: main.u32()?, right: main.u32()?, top_parent: main.u32()? })
    }
}

/// `btree_xlog_mark_page_halfdead`, block 1: the downlink goes. Since keys must stay, its tuple takes over the next
/// one's downlink, and that one's tuple goes.
pub(super) fn halfdead_parent(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let offset = HalfDead::read(redo)?.parent_offset;
    Opaque::read(page)?;
    let next = offset.checked_add(1).ok_or("the downlink's offset number is the largest possible")?;
    let right = index_tuple::pointer(item::item(page, next)?)?.block;
    let tuple = item::item_mut(page, offset)?;
    let offset = index_tuple::pointer(tuple)?.offset;
    index_tuple::set_pointer(tuple, ItemPointer { block: right, offset })?;
    item::index_tuple_delete(page, next)
}

/// The same, block 0: the leaf.
pub(super) fn halfdead_leaf(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = HalfDead::read(redo)?;
    init_halfdead(page, record.left, record.right, record.top_parent)
}

/// A half-dead leaf anew. Its only tuple is a high key without a key, which leads to the top of the subtree that is
/// still to be unlinked.
fn init_halfdead(page: &mut Page, prev: BlockNumber, next: BlockNumber, top_parent: BlockNumber) -> Result<(), Fault> {
    page::init(page, Opaque { prev, next, level: 0, flags: HALF_DEAD | LEAF, cycle_id: 0 })?;
    let mut tuple = [0; INDEX_TUPLE_HEADER_SIZE];
    index_tuple::set_pointer(&mut tuple, ItemPointer { block: top_parent, offset: 0 })?;
    index_tuple::set_info(&mut tuple, index_tuple::info_with_size(AM_RESERVED_BIT, INDEX_TUPLE_HEADER_SIZE)?)?;
    item::add_item(page, &tuple, HIGH_KEY, false, false)?;
    Ok(())
}

/// `xl_btree_unlink_page`.
struct Unlink {
    left: BlockNumber,
    right: BlockNumber,
    level: u32,
    /// `safexid`: the page can be used again once no transaction before this one runs.
    safe_xid: u64,
    /// The subtree's leaf, when the target is not the leaf itself.
    leaf_left: BlockNumber,
    leaf_right: BlockNumber,
    /// What is now the subtree's topmost page.
    leaf_top_parent: BlockNumber,
}

impl Unlink {
    fn read(redo: &Redo<'_>) -> Result<Unlink, Fault> {
        let mut main = Cursor::new(redo.record.main_data);
        let (left, right, level) = (main.u32()?, main.u32()?, main.u32()?);
        main.take(4)?; // padding
        Ok(Unlink {
            left,
            right,
            level,
            safe_xid: main.u64()?,
            leaf_left: main.u32()?,
            leaf_right: main.u32()?,
            leaf_top_parent: main.u32()?,
        })
    }
}

/// `btree_xlog_unlink_page` but for the metapage: block 0 the page that goes, 1 and 2 its siblings, 3 the subtree's
/// leaf.
pub(super) fn unlink(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = Unlink::read(redo)?;
    match redo.record.block_id {
        0 => init_deleted(page, &record),
        1 if record.left == NONE => Err("a left sibling's block, but the record says that there is none".into()),
        1 => page::change(page, |opaque| opaque.next = record.right),
        2 => page::change(page, |opaque| opaque.prev = record.left),
        _ => init_halfdead(page, record.leaf_left, record.leaf_right, record.leaf_top_parent),
    }
}

/// The deleted page anew: all it holds is the transaction id that says when it can be used again (`BTPageSetDeleted`).
fn init_deleted(page: &mut Page, record: &Unlink) -> Result<(), Fault> {
    let leaf = if record.level == 0 { LEAF } else { 0 };
    let flags = DELETED | HAS_FULLXID | leaf;
    page::init(page, Opaque { prev: record.left, next: record.right, level: record.level, flags, cycle_id: 0 })?;
    let end = PAGE_HEADER_SIZE + size_of::<u64>();
    page[PAGE_HEADER_SIZE..end].copy_from_slice(&record.safe_xid.to_le_bytes());
    set_lower(page, end as u16);
    Ok(())
}
