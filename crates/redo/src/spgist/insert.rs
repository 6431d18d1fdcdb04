//! A new leaf tuple, and what makes room for it: moving a chain to another page, adding a node to an inner tuple,
//! splitting an inner tuple's prefix.
//!
//! Each function is called for any of its record's blocks. A record that comes with several of them says in its main
//! data all that each block needs, but for the numbers of the others.

use varve_postgres::{BlockNumber, Page};

use super::page::{
    LEAF, Writer, add_or_replace, init, replace, replace_all_by_dead, replace_by_dead, set_downlink, set_next, take_inner, take_leaf,
};
use crate::Fault;
use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::ItemPointer;

/// The number of the record's block `id`, to which a tuple on another is to point.
pub(super) fn target(record: &BlockRecord<'_>, id: u8) -> Result<BlockNumber, Fault> {
    record.block_number(id).ok_or_else(|| format!("the record has no block {id}, to which a tuple should point").into())
}

/// `spgRedoAddLeaf`. Main data (`spgxlogAddLeaf`): whether the page is new `u8`, whether of nulls `u8`, the tuple's
/// offset `u16`, that of its chain's head `u16`, parent's `u16` and its node `u16`; the tuple. Block 0 gets the tuple;
/// block 1 is the parent's.
pub(super) fn add_leaf(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (new_page, stores_nulls) = (main.u8()? != 0, main.u8()? != 0);
    let (offset, head) = (main.u16()?, main.u16()?);
    let (parent, node) = (main.u16()?, main.u16()?);
    if record.block_id == 1 {
        return set_downlink(page, parent, node, ItemPointer { block: target(record, 0)?, offset });
    }
    let tuple = take_leaf(&mut main)?;
    if new_page {
        init(page, LEAF, stores_nulls)?;
    }
    if offset == head {
        return replace(page, offset, tuple); // of a dead tuple
    }
    add_or_replace(page, offset, tuple)?;
    if head != 0 {
        set_next(page, head, offset)?;
    }
    Ok(())
}

/// `spgRedoMoveLeafs`. Main data (`spgxlogMoveLeafs`): number of moved tuples `u16`, whether the page they go to is new
/// `u8`, whether the source is a dead tuple `u8`, whether of nulls `u8`, padding, parent `u16` and its node `u16`,
/// padding, writer; offsets from which they go; offsets to which they go and the tuples, one more than are moved for
/// the new tuple, or with a dead source that one alone. The last of them is their chain's head. Block 0 is the source,
/// 1 the destination, 2 the parent's.
pub(super) fn move_leafs(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let moved = usize::from(main.u16()?);
    let (new_page, replaces_dead, stores_nulls) = (main.u8()? != 0, main.u8()? != 0, main.u8()? != 0);
    let _padding = main.u8()?;
    let (parent, node) = (main.u16()?, main.u16()?);
    let _padding = main.u16()?;
    let writer = Writer::read(&mut main)?;
    let from = main.u16s(moved)?;
    let to = main.u16s(if replaces_dead { 1 } else { moved + 1 })?;
    let head = ItemPointer { block: target(record, 1)?, offset: to.last().copied().unwrap_or(0) };
    match record.block_id {
        0 => {
            let trace = writer.trace(head);
            replace_all_by_dead(page, &from, trace, super::page::DeadTuple::Placeholder)
        }
        1 => {
            if new_page {
                init(page, LEAF, stores_nulls)?;
            }
            to.iter().try_for_each(|offset| add_or_replace(page, *offset, take_leaf(&mut main)?))
        }
        _ => set_downlink(page, parent, node, head),
    }
}

/// `spgRedoAddNode`. Main data (`spgxlogAddNode`): offset of the inner tuple `u16`, of the new one on another page
/// `u16`, whether that page is new `u8`, block id of the parent `i8` or -1, parent `u16` and its node `u16`, padding,
/// writer; the new tuple. It goes in the old one's place on block 0, or on block 1 if there is one; block 2 is the
/// parent's if that is on neither.
pub(super) fn add_node(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (offset, new_offset) = (main.u16()?, main.u16()?);
    let (new_page, parent_block) = (main.u8()? != 0, main.u8()?);
    let (parent, node) = (main.u16()?, main.u16()?);
    let _padding = main.u16()?;
    let writer = Writer::read(&mut main)?;
    let tuple = take_inner(&mut main)?;
    let Some(new_block) = record.block_number(1) else {
        return replace(page, offset, tuple);
    };
    let moved_to = ItemPointer { block: new_block, offset: new_offset };
    match record.block_id {
        0 => replace_by_dead(page, offset, writer.trace(moved_to))?,
        1 => {
            if new_page {
                init(page, 0, false)?;
            }
            add_or_replace(page, new_offset, tuple)?;
        }
        _ => {}
    }
    if record.block_id == parent_block {
        set_downlink(page, parent, node, moved_to)?;
    }
    Ok(())
}

/// `spgRedoSplitTuple`. Main data (`spgxlogSplitTuple`): offset of the tuple with the prefix's first part `u16`, of
/// that with the rest `u16`, whether the latter's page is new `u8`, whether it is the former's `u8`; both inner tuples.
/// Block 0 is the page of the first, in whose place it goes; block 1 the page of the second, if that is another.
pub(super) fn split_tuple(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (prefix_offset, postfix_offset) = (main.u16()?, main.u16()?);
    let (new_page, same_page) = (main.u8()? != 0, main.u8()? != 0);
    let prefix = take_inner(&mut main)?;
    let postfix = take_inner(&mut main)?;
    if record.block_id == 0 {
        replace(page, prefix_offset, prefix)?;
        if !same_page {
            return Ok(());
        }
    } else if new_page {
        init(page, 0, false)?;
    }
    add_or_replace(page, postfix_offset, postfix)
}
