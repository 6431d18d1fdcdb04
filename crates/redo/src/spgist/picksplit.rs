//! A chain of leaf tuples that grew too long becomes an inner tuple with shorter chains (`spgRedoPickSplit`).

use varve_postgres::Page;

use super::insert::target;
use super::page::{DeadTuple, LEAF, Writer, add_or_replace, init, replace_all_by_dead, set_downlink, take_inner, take_leaf};
use crate::Fault;
use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::index_tuple::ItemPointer;

/// Main data (`spgxlogPickSplit`): whether the root splits `u8`, padding, numbers of leaf tuples deleted `u16` and
/// inserted `u16`, whether source `u8` and destination `u8` are initialised, offset of the inner tuple `u16`, whether
/// its page is initialised `u8`, whether of nulls `u8`, whether the parent is on the inner tuple's page `u8`, padding,
/// parent `u16` and its node `u16`, padding, writer; offsets of the deleted, offsets of the inserted, for each of these
/// whether it goes to the destination `u8`; the inner tuple; the leaf tuples.
///
/// Block 0 is the source (not of a root, which only becomes the inner page), 1 the destination if there is one, 2 the
/// inner tuple's, 3 the parent's if that is another.
pub(super) fn picksplit(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    main.take(2)?; // root split and padding: that there is no block 0 says the same
    let (deleted, inserted) = (usize::from(main.u16()?), usize::from(main.u16()?));
    let (init_source, init_destination) = (main.u8()? != 0, main.u8()? != 0);
    let inner_offset = main.u16()?;
    let (init_inner, stores_nulls) = (main.u8()? != 0, main.u8()? != 0);
    let inner_is_parent = main.u8()? != 0;
    let _padding = main.u8()?;
    let (parent, node) = (main.u16()?, main.u16()?);
    let _padding = main.u16()?;
    let writer = Writer::read(&mut main)?;
    let deleted = main.u16s(deleted)?;
    let inserted = main.u16s(inserted)?;
    let to_destination = main.take(inserted.len())?;
    let inner_tuple = take_inner(&mut main)?;
    let inner = ItemPointer { block: target(record, 2)?, offset: inner_offset };

    match record.block_id {
        2 => {
            if init_inner {
                init(page, 0, stores_nulls)?;
            }
            add_or_replace(page, inner_offset, inner_tuple)?;
            if inner_is_parent {
                set_downlink(page, parent, node, inner)?;
            }
            return Ok(());
        }
        3 => return set_downlink(page, parent, node, inner),
        0 if init_source => init(page, LEAF, stores_nulls)?,
        0 => replace_all_by_dead(page, &deleted, writer.trace(inner), DeadTuple::Placeholder)?,
        _ if init_destination => init(page, LEAF, stores_nulls)?,
        _ => {}
    }
    for (offset, to_destination) in inserted.iter().zip(to_destination) {
        let tuple = take_leaf(&mut main)?;
        if (*to_destination != 0) == (record.block_id == 1) {
            add_or_replace(page, *offset, tuple)?;
        }
    }
    Ok(())
}
