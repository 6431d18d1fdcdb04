//! The entry tree: ordinary index tuples behind line pointers.

use varve_postgres::{BlockNumber, Page};

use super::{DATA, Opaque};
use crate::Fault;
use crate::cursor::Cursor;
use crate::index_tuple::{self, ItemPointer};
use crate::item::{add_item, index_tuple_delete, item_mut};

/// `ginRedoInsertEntry`. Block data (`ginxlogInsertEntry`): offset number `u16`, whether the tuple there is replaced
/// `u8`, padding `u8`, the tuple.
pub(super) fn insert(page: &mut Page, data: &[u8], right_child: Option<BlockNumber>) -> Result<(), Fault> {
    Opaque::expect(page, DATA, 0)?;
    let mut data = Cursor::new(data);
    let offset = data.u16()?;
    let replaces = data.u8()? != 0;
    let _padding = data.u8()?;
    let tuple = index_tuple::take(&mut data)?;
    if let Some(right_child) = right_child {
        index_tuple::set_pointer(item_mut(page, offset)?, ItemPointer { block: right_child, offset: 0 })?;
    }
    if replaces {
        index_tuple_delete(page, offset)?;
    }
    add_item(page, tuple, offset, false, false)?;
    Ok(())
}
