//! Pages from full-page images.

use varve_postgres::{Page, page, wal, wal::rmgr};

use crate::{Fault, RedoError, gist};

/// The page that `record` leaves of `block`, which comes with an image that is to be applied.
///
/// Postgres takes images before it writes the record, and a few changes are made to the page only afterwards: redo makes them to a
/// restored page too (what `XLogReadBufferForRedo` calls `BLK_RESTORED`). So a restored image alone may not be the page.
/// (`hash_xlog_split_allocate_page` and `hash_xlog_split_complete` do so as well, but what they write is already in their images.)
///
/// # Errors
/// [`RedoError::Inconsistent`] when there is no image, or it cannot be decompressed or is not of such a page.
pub fn restore_image(record: &wal::Record, block: &wal::Block) -> Result<Page, RedoError> {
    restore(record, block).map_err(|what| RedoError::Inconsistent {
        rmid: record.header.rmid,
        info: record.kind(),
        lsn: record.end,
        blkno: block.blkno,
        block_id: block.id,
        what,
    })
}

fn restore(record: &wal::Record, block: &wal::Block) -> Result<Page, String> {
    let mut page = block.image.as_ref().ok_or("the record has no image of the block")?.restore()?;
    if record.header.rmid == rmgr::GIST {
        gist::after_image(record.kind(), block.id, record.end, &mut page).map_err(|fault| match fault {
            Fault::Unsupported => "the record type is not supported".to_owned(),
            Fault::Inconsistent(what) => what,
        })?;
    }
    if !page::is_new(&page) {
        page::set_lsn(&mut page, record.end);
    }
    Ok(page)
}
