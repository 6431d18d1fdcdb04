//! Page functions of sequences (`commands/sequence.h`): a sequence is one page with one tuple, rewritten whole.

use varve_postgres::{Page, page};

use crate::cursor::Cursor;
use crate::{Fault, Redo, item};

/// `XLOG_SEQ_LOG`.
const LOG: u8 = 0x00;
/// `SEQ_MAGIC`: what a sequence's special space holds.
const MAGIC: u32 = 0x1717;

/// `seq_redo`: `xl_seq_rec` is the relation's name (12 bytes), then the tuple.
pub(crate) fn redo(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    if redo.record.info != LOG {
        return Err(Fault::Unsupported);
    }
    let mut main = Cursor::new(redo.record.main_data);
    main.take(12)?;
    page::init(page, 4);
    item::special_space_mut(page, 8)?[..4].copy_from_slice(&MAGIC.to_le_bytes());
    item::add_item(page, main.rest(), 1, false, false)?;
    Ok(())
}
