//! Page functions of the resource manager XLOG (`catalog/pg_control.h`). Its records with blocks are full-page images,
//! which ingest takes as such, so hardly anything is left.

use varve_postgres::Page;

use crate::{Fault, Redo};

/// `XLOG_FPI_FOR_HINT`: an image taken because hint bits changed.
const FPI_FOR_HINT: u8 = 0xA0;
/// `XLOG_FPI`.
const FPI: u8 = 0xB0;

/// `xlog_redo`, of a block without an image.
pub(crate) fn redo(redo: &Redo<'_>, _page: &mut Page) -> Result<(), Fault> {
    match redo.record.info {
        // With full_page_writes off the image may be missing: hints need not be redone.
        FPI_FOR_HINT => Ok(()),
        FPI => Err("a record of full-page images has none for the block".into()),
        _ => Err(Fault::Unsupported),
    }
}
