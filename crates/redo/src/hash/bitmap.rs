//! Bitmap pages: a bit for each overflow page, set while it is in use. The bits begin at byte 24, in words of 32.

use varve_postgres::page::{PAGE_HEADER_SIZE, set_lower};
use varve_postgres::{BLCKSZ, Page};

use super::page::{self, BITMAP_PAGE, Opaque};
use crate::cursor::Cursor;
use crate::{Fault, Redo};

/// A bitmap page on which all is in use (`_hash_initbitmapbuffer`), of as many bytes as the main data begins with.
pub(super) fn init(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let size = usize::from(Cursor::new(redo.record.main_data).u16()?);
    page::init(page, Opaque::single(BITMAP_PAGE))?;
    let end = PAGE_HEADER_SIZE + size;
    if end > bits_end(page) {
        return Err(format!("a bitmap of {size} bytes does not fit on its page").into());
    }
    page[PAGE_HEADER_SIZE..end].fill(0xFF);
    set_lower(page, end as u16);
    Ok(())
}

/// Where the special space begins, at most.
fn bits_end(page: &Page) -> usize {
    usize::from(varve_postgres::page::special(page)).min(BLCKSZ)
}

/// `xl_hash_add_ovfl_page`, block 2: an overflow page is in use again.
pub(super) fn set(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let (byte, mask) = bit(redo, page)?;
    page[byte] |= mask;
    Ok(())
}

/// `xl_hash_squeeze_page`, block 5: an overflow page was given up.
pub(super) fn clear(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let (byte, mask) = bit(redo, page)?;
    page[byte] &= !mask;
    Ok(())
}

/// The byte and, within it, the bit that the record names.
fn bit(redo: &Redo<'_>, page: &Page) -> Result<(usize, u8), Fault> {
    let bit = Cursor::new(redo.record.data).u32()?;
    if Opaque::read(page)?.flags & BITMAP_PAGE == 0 {
        return Err("not a bitmap page".into());
    }
    // Words are little-endian, so bits go on from byte to byte.
    let byte = PAGE_HEADER_SIZE + (bit / u8::BITS) as usize;
    if byte >= bits_end(page) {
        return Err(format!("bit {bit} does not exist on the bitmap page").into());
    }
    Ok((byte, 1 << (bit % u8::BITS)))
}
