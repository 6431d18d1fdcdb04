//! Page functions of generic WAL (`access/generic_xlog.h`), which extensions write: bytes that changed, page by page.

use varve_postgres::{Page, page};

use crate::cursor::Cursor;
use crate::{Fault, Redo, item};

/// `generic_redo`: the block's data is a list of offset `u16`, length `u16`, bytes. What lies between line pointers and
/// tuples becomes zeros.
pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut data = Cursor::new(redo.record.data);
    while !data.is_empty() {
        let (offset, len) = (usize::from(data.u16()?), usize::from(data.u16()?));
        let bytes = data.take(len)?;
        page.get_mut(offset..offset + len).ok_or_else(|| format!("{len} bytes at {offset} are not on the page"))?.copy_from_slice(bytes);
    }
    item::check_header(page)?;
    let (lower, upper) = (usize::from(page::lower(page)), usize::from(page::upper(page)));
    page[lower..upper].fill(0);
    Ok(())
}
