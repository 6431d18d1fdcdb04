//! Removal of leaf tuples whose heap tuples are gone, and of redirections and placeholders that nobody needs any more.

use varve_postgres::{Major, Page};

use super::page::{DeadTuple, Opaque, State, Writer, forget_redirection, replace_all_by_dead, set_next};
use crate::Fault;
use crate::change::BlockRecord;
use crate::cursor::Cursor;
use crate::item::{index_multi_delete, item, item_id, max_offset, set_item_id};

/// `spgRedoVacuumLeaf`. Main data (`spgxlogVacuumLeaf`): numbers of tuples that become dead `u16`, placeholders `u16`,
/// that move within the page `u16`, whose chain changes `u16`, writer; offsets of the first two, from which and to
/// which tuples move, of those with a changed chain and what follows each.
pub(super) fn vacuum_leaf(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (dead, placeholders) = (usize::from(main.u16()?), usize::from(main.u16()?));
    let (moved, chained) = (usize::from(main.u16()?), usize::from(main.u16()?));
    Writer::read(&mut main)?;
    let dead = main.u16s(dead)?;
    let placeholders = main.u16s(placeholders)?;
    let (from, to) = (main.u16s(moved)?, main.u16s(moved)?);
    let (chained, next) = (main.u16s(chained)?, main.u16s(chained)?);

    replace_all_by_dead(page, &dead, DeadTuple::Dead, DeadTuple::Dead)?;
    replace_all_by_dead(page, &placeholders, DeadTuple::Placeholder, DeadTuple::Placeholder)?;
    // A tuple moves by taking over the line pointer; what was there, dead, becomes a placeholder with the old one.
    for (from, to) in from.iter().zip(&to) {
        let (id_from, id_to) = (item_id(page, *from)?, item_id(page, *to)?);
        set_item_id(page, *from, id_to)?;
        set_item_id(page, *to, id_from)?;
    }
    replace_all_by_dead(page, &from, DeadTuple::Placeholder, DeadTuple::Placeholder)?;
    for (offset, next) in chained.iter().zip(&next) {
        let state = State::of(item(page, *offset)?)?;
        if state != State::Live {
            return Err(format!("tuple {offset} is {state:?}, only live ones are in a chain").into());
        }
        set_next(page, *offset, *next)?;
    }
    Ok(())
}

/// `spgRedoVacuumRoot`, of a root that is a leaf, whose tuples form no chain. Main data (`spgxlogVacuumRoot`): number
/// of offsets `u16`, padding, writer; the offsets.
pub(super) fn vacuum_root(record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let n = main.u16()?;
    let _padding = main.u16()?;
    Writer::read(&mut main)?;
    index_multi_delete(page, &main.u16s(usize::from(n))?)
}

/// `spgRedoVacuumRedirect`. Main data (`spgxlogVacuumRedirect`): number of redirections that become placeholders `u16`,
/// first of the placeholders at the page's end that go `u16` or 0, newest transaction of these redirections `u32`, from
/// 16 on whether it is a catalog `u8` and padding; offsets of the redirections.
pub(super) fn vacuum_redirect(major: Major, record: &BlockRecord<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let redirections = main.u16()?;
    let first_placeholder = main.u16()?;
    let _conflict_horizon = main.u32()?;
    if major >= Major::V16 {
        let _is_catalog_and_padding = main.u16()?;
    }
    let mut opaque = Opaque::read(page)?;
    for offset in main.u16s(usize::from(redirections))? {
        forget_redirection(page, offset)?;
    }
    opaque.add_redirections(-(redirections as isize))?;
    opaque.add_placeholders(redirections as isize)?;
    if first_placeholder != 0 {
        let doomed: Vec<_> = (first_placeholder..=max_offset(page)).collect();
        opaque.add_placeholders(-(doomed.len() as isize))?;
        index_multi_delete(page, &doomed)?;
    }
    opaque.write(page)
}
