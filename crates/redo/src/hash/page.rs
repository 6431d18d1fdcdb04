//! The special space of a hash page (`HashPageOpaqueData` of `access/hash.h`), and how pages are initialised.
//!
//! Layout, from byte 8176: previous page `u32`, next page `u32`, bucket `u32`, flags `u16`, page id `u16`.

use varve_postgres::{BlockNumber, Page, page};

use crate::cursor::Cursor;
use crate::index_tuple::INVALID_BLOCK;
use crate::{Fault, item};

/// Bytes in the special space.
const OPAQUE_SIZE: usize = 16;
/// `HASHO_PAGE_ID`.
const PAGE_ID: u16 = 0xFF80;

/// `InvalidBucket`: the page belongs to none.
const NO_BUCKET: u32 = u32::MAX;

/// `LH_UNUSED_PAGE`.
const UNUSED_PAGE: u16 = 0;
/// `LH_OVERFLOW_PAGE`.
pub(super) const OVERFLOW_PAGE: u16 = 1 << 0;
/// `LH_BITMAP_PAGE`.
pub(super) const BITMAP_PAGE: u16 = 1 << 2;
/// `LH_META_PAGE`.
pub(super) const META_PAGE: u16 = 1 << 3;
/// `LH_BUCKET_NEEDS_SPLIT_CLEANUP`.
pub(super) const NEEDS_SPLIT_CLEANUP: u16 = 1 << 6;
/// `LH_PAGE_HAS_DEAD_TUPLES`.
pub(super) const HAS_DEAD_TUPLES: u16 = 1 << 7;

/// A page's role and its place in a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opaque {
    /// `hasho_prevblkno`: the page before in the bucket; on a bucket's first page, the largest bucket when it was last
    /// split.
    pub(super) prev: BlockNumber,
    /// `hasho_nextblkno`: the next page in the bucket.
    pub(super) next: BlockNumber,
    /// `hasho_bucket`.
    pub(super) bucket: u32,
    /// `hasho_flag`: the page's type, and passing states.
    pub(super) flags: u16,
}

impl Opaque {
    /// That of an overflow page that was given up.
    pub(super) const UNUSED: Opaque = Opaque::single(UNUSED_PAGE);

    /// That of a page which belongs to no bucket.
    pub(super) const fn single(flags: u16) -> Opaque {
        Opaque { prev: INVALID_BLOCK, next: INVALID_BLOCK, bucket: NO_BUCKET, flags }
    }

    /// That of `page`, which must be a hash page.
    pub(super) fn read(page: &Page) -> Result<Opaque, Fault> {
        let mut at = Cursor::new(item::special_space(page, OPAQUE_SIZE)?);
        let opaque = Opaque { prev: at.u32()?, next: at.u32()?, bucket: at.u32()?, flags: at.u16()? };
        match at.u16()? {
            PAGE_ID => Ok(opaque),
            other => Err(format!("not a page of a hash index: page id {other:04X}, expected {PAGE_ID:04X}").into()),
        }
    }

    /// Makes it `page`'s.
    fn write(self, page: &mut Page) -> Result<(), Fault> {
        let space = item::special_space_mut(page, OPAQUE_SIZE)?;
        space[0..4].copy_from_slice(&self.prev.to_le_bytes());
        space[4..8].copy_from_slice(&self.next.to_le_bytes());
        space[8..12].copy_from_slice(&self.bucket.to_le_bytes());
        space[12..14].copy_from_slice(&self.flags.to_le_bytes());
        space[14..16].copy_from_slice(&PAGE_ID.to_le_bytes());
        Ok(())
    }
}

/// Changes a page's special space.
pub(super) fn change(page: &mut Page, change: impl FnOnce(&mut Opaque)) -> Result<(), Fault> {
    let mut opaque = Opaque::read(page)?;
    change(&mut opaque);
    opaque.write(page)
}

/// `_hash_pageinit`, and its special space.
pub(super) fn init(page: &mut Page, opaque: Opaque) -> Result<(), Fault> {
    page::init(page, OPAQUE_SIZE);
    opaque.write(page)
}
