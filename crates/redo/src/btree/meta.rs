//! The metapage: `BTMetaPageData` of `access/nbtree.h`.
//!
//! Layout, from byte 24: magic, version, root, its level, fast root, its level, deleted pages at the last cleanup
//! (`u32` each), 4 bytes unused, heap tuples at the last cleanup (`f64`, no longer kept, -1), whether equal keys look
//! equal (`u8`); padded to 48 bytes.

use varve_postgres::page::{PAGE_HEADER_SIZE, set_lower};
use varve_postgres::{BlockNumber, Page};

use super::page::{META, Opaque, init};
use crate::cursor::Cursor;
use crate::{Fault, Redo};

/// `BTREE_METAPAGE`.
const META_BLOCK: BlockNumber = 0;
/// `BTREE_MAGIC`.
const MAGIC: u32 = 0x05_3162;
/// `BTREE_NOVAC_VERSION`: the lowest that records can carry.
const VERSION_MIN: u32 = 3;
/// `sizeof(BTMetaPageData)`.
const META_SIZE: usize = 48;
/// Offset of the heap tuples within the metadata.
const HEAP_TUPLES_AT: usize = 32;
/// Offset of `btm_allequalimage` within the metadata.
const ALL_EQUAL_IMAGE_AT: usize = 40;

/// `_bt_restore_meta`: the metapage anew, from an `xl_btree_metadata`.
pub(super) fn restore(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    if redo.record.blkno != META_BLOCK {
        return Err(format!("metadata for block {}, but the metapage is block {META_BLOCK}", redo.record.blkno).into());
    }
    let mut data = Cursor::new(redo.record.data);
    let fields = data.take(6 * size_of::<u32>())?;
    let all_equal_image = data.u8()?;
    let version = Cursor::new(fields).u32()?;
    if version < VERSION_MIN {
        return Err(format!("metadata of version {version}, the lowest possible is {VERSION_MIN}").into());
    }
    init(page, Opaque { flags: META, ..Opaque::default() })?;
    let meta = &mut page[PAGE_HEADER_SIZE..PAGE_HEADER_SIZE + META_SIZE];
    meta[..4].copy_from_slice(&MAGIC.to_le_bytes());
    meta[4..4 + fields.len()].copy_from_slice(fields);
    meta[HEAP_TUPLES_AT..HEAP_TUPLES_AT + 8].copy_from_slice(&(-1.0_f64).to_le_bytes());
    meta[ALL_EQUAL_IMAGE_AT] = all_equal_image;
    set_lower(page, (PAGE_HEADER_SIZE + META_SIZE) as u16);
    Ok(())
}
