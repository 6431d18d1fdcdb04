//! Pages from full-page images.

use varve_postgres::{Page, page, wal, wal::rmgr};

use crate::{Fault, RedoError, gist};

/// Makes `page` what `record` leaves of `block`, which comes with an image that is to be applied; what it was before
/// does not matter.
///
/// Postgres takes images before it writes the record, and a few changes are made to the page only afterwards: redo
/// makes them to a restored page too (what `XLogReadBufferForRedo` calls `BLK_RESTORED`). So a restored image alone may
/// not be the page. (`hash_xlog_split_allocate_page` and `hash_xlog_split_complete` do so as well, but what they write
/// is already in their images.)
///
/// # Errors
/// [`RedoError::Inconsistent`] when there is no image, or it cannot be decompressed or is not of such a page.
pub fn restore_image(record: &wal::Record<'_>, block: &wal::Block<'_>, page: &mut Page) -> Result<(), RedoError> {
    restore(record, block, page).map_err(|what| RedoError::Inconsistent {
        rmid: record.header.rmid,
        info: record.kind(),
        lsn: record.end,
        blkno: block.blkno,
        block_id: block.id,
        what,
    })
}

fn restore(record: &wal::Record<'_>, block: &wal::Block<'_>, page: &mut Page) -> Result<(), String> {
    block.image.as_ref().ok_or("the record has no image of the block")?.restore(page)?;
    if record.header.rmid == rmgr::GIST {
        gist::after_image(record.kind(), block.id, record.end, page).map_err(|fault| match fault {
            Fault::Unsupported => "the record type is not supported".to_owned(),
            Fault::Inconsistent(what) => what,
        })?;
    }
    if !page::is_new(page) {
        page::set_lsn(page, record.end);
    }
    Ok(())
}
