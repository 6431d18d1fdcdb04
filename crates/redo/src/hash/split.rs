//! A bucket is divided: allocation of the new bucket (`xl_hash_split_allocate_page`), then its pages as images, then
//! completion (`xl_hash_split_complete`), then, later, clean-up of the old bucket.

use varve_postgres::Page;

use super::meta::Meta;
use super::page::{self, NEEDS_SPLIT_CLEANUP, Opaque};
use crate::cursor::Cursor;
use crate::index_tuple::INVALID_BLOCK;
use crate::{Fault, Redo};

/// `XLH_SPLIT_META_UPDATE_MASKS`.
const UPDATE_MASKS: u8 = 1 << 0;
/// `XLH_SPLIT_META_UPDATE_SPLITPOINT`.
const UPDATE_SPLIT_POINT: u8 = 1 << 1;

/// `xl_hash_split_allocate_page`.
struct Allocate {
    new_bucket: u32,
    old_flags: u16,
    new_flags: u16,
    meta_updates: u8,
}

impl Allocate {
    fn read(redo: &Redo<'_>) -> Result<Allocate, Fault> {
        let mut main = Cursor::new(redo.record.main_data);
        Ok(Allocate { new_bucket: main.u32()?, old_flags: main.u16()?, new_flags: main.u16()?, meta_updates: main.u8()? })
    }
}

/// Block 0: the old bucket's first page.
pub(super) fn allocate_old(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = Allocate::read(redo)?;
    page::change(page, |opaque| {
        opaque.flags = record.old_flags;
        opaque.prev = record.new_bucket;
    })
}

/// Block 1: the new bucket's.
pub(super) fn allocate_new(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = Allocate::read(redo)?;
    page::init(page, Opaque { prev: record.new_bucket, next: INVALID_BLOCK, bucket: record.new_bucket, flags: record.new_flags })
}

/// Block 2: the metapage.
pub(super) fn allocate_meta(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let record = Allocate::read(redo)?;
    let mut data = Cursor::new(redo.record.data);
    let mut meta = Meta::of(page)?;
    meta.set_max_bucket(record.new_bucket);
    if record.meta_updates & UPDATE_MASKS != 0 {
        let (low, high) = (data.u32()?, data.u32()?);
        meta.set_masks(low, high);
    }
    if record.meta_updates & UPDATE_SPLIT_POINT != 0 {
        let (point, spares) = (data.u32()?, data.u32()?);
        meta.set_split_point(point, spares)?;
    }
    Ok(())
}

/// `xl_hash_split_complete`, blocks 0 and 1: the first pages of the old and the new bucket.
pub(super) fn complete(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    let (old_flags, new_flags) = (main.u16()?, main.u16()?);
    let flags = if redo.record.block_id == 0 { old_flags } else { new_flags };
    page::change(page, |opaque| opaque.flags = flags)
}

/// `XLOG_HASH_SPLIT_CLEANUP`: the old bucket no longer holds tuples of the new one.
pub(super) fn cleanup(page: &mut Page) -> Result<(), Fault> {
    page::change(page, |opaque| opaque.flags &= !NEEDS_SPLIT_CLEANUP)
}
