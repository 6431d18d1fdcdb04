//! The metapage: `HashMetaPageData` of `access/hash.h`.
//!
//! Layout, from byte 24: magic `u32`, version `u32`, tuples `f64`, fill factor, page size, bitmap bytes and the
//! logarithm of its bits (`u16` each), largest bucket, high mask, low mask, split point, first free overflow page,
//! number of bitmap pages, hash function (`u32` each), then 98 counts of spare pages and 1024 bitmap pages (`u32`
//! each); padded to a multiple of 8.

use varve_postgres::Page;
use varve_postgres::page::{PAGE_HEADER_SIZE, set_lower, special};

use super::page::{META_PAGE, Opaque, init as init_page};
use crate::cursor::Cursor;
use crate::{Fault, Redo};

/// `HASH_MAGIC`.
const MAGIC: u32 = 0x0644_0640;
/// `HASH_VERSION`.
const VERSION: u32 = 4;
/// `HASH_SPLITPOINT_GROUPS_WITH_ONE_PHASE`.
const ONE_PHASE_GROUPS: u32 = 10;
/// `HASH_SPLITPOINT_PHASE_BITS`.
const PHASE_BITS: u32 = 2;
/// `HASH_SPLITPOINT_PHASE_MASK`.
const PHASE_MASK: u32 = (1 << PHASE_BITS) - 1;
/// `HASH_MAX_SPLITPOINTS`.
const SPLIT_POINTS_MAX: u32 = ((32 - ONE_PHASE_GROUPS) << PHASE_BITS) + ONE_PHASE_GROUPS;
/// `HASH_MAX_BITMAPS`.
const BITMAPS_MAX: u32 = 1024;
/// The most buckets that an index begins with.
const INITIAL_BUCKETS_MAX: u32 = 0x4000_0000;

const MAGIC_AT: usize = PAGE_HEADER_SIZE;
const VERSION_AT: usize = MAGIC_AT + 4;
const TUPLES_AT: usize = MAGIC_AT + 8;
const FILL_FACTOR_AT: usize = MAGIC_AT + 16;
const PAGE_SIZE_AT: usize = MAGIC_AT + 18;
const BITMAP_SIZE_AT: usize = MAGIC_AT + 20;
const BITMAP_SHIFT_AT: usize = MAGIC_AT + 22;
const MAX_BUCKET_AT: usize = MAGIC_AT + 24;
const HIGH_MASK_AT: usize = MAGIC_AT + 28;
const LOW_MASK_AT: usize = MAGIC_AT + 32;
const SPLIT_POINT_AT: usize = MAGIC_AT + 36;
const FIRST_FREE_AT: usize = MAGIC_AT + 40;
const BITMAPS_LEN_AT: usize = MAGIC_AT + 44;
const FUNCTION_AT: usize = MAGIC_AT + 48;
const SPARES_AT: usize = MAGIC_AT + 52;
const BITMAPS_AT: usize = SPARES_AT + 4 * SPLIT_POINTS_MAX as usize;
/// End of the metadata, `sizeof(HashMetaPageData)` behind its start.
const END: usize = (BITMAPS_AT + 4 * BITMAPS_MAX as usize).next_multiple_of(8);

/// A metapage's data, to be changed.
pub(super) struct Meta<'a>(&'a mut Page);

impl<'a> Meta<'a> {
    /// That of `page`, which must be a metapage.
    pub(super) fn of(page: &'a mut Page) -> Result<Meta<'a>, Fault> {
        if Opaque::read(page)?.flags & META_PAGE == 0 {
            return Err("not the metapage of a hash index".into());
        }
        Ok(Meta(page))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn put_u16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    fn tuples(&self) -> f64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[TUPLES_AT..TUPLES_AT + 8]);
        f64::from_le_bytes(bytes)
    }

    /// `hashm_maxbucket`.
    pub(super) fn set_max_bucket(&mut self, bucket: u32) {
        self.put_u32(MAX_BUCKET_AT, bucket);
    }

    /// `hashm_lowmask` and `hashm_highmask`.
    pub(super) fn set_masks(&mut self, low: u32, high: u32) {
        self.put_u32(LOW_MASK_AT, low);
        self.put_u32(HIGH_MASK_AT, high);
    }

    /// `hashm_ovflpoint`, and how many overflow pages there are before it.
    pub(super) fn set_split_point(&mut self, point: u32, spares: u32) -> Result<(), Fault> {
        self.put_u32(spares_at(point)?, spares);
        self.put_u32(SPLIT_POINT_AT, point);
        Ok(())
    }

    /// One more page before the current split point.
    fn add_spare(&mut self) -> Result<(), Fault> {
        let at = spares_at(self.u32(SPLIT_POINT_AT))?;
        self.put_u32(at, self.u32(at).wrapping_add(1));
        Ok(())
    }

    /// One more bitmap page.
    fn add_bitmap(&mut self, block: u32) -> Result<(), Fault> {
        let len = self.u32(BITMAPS_LEN_AT);
        if len >= BITMAPS_MAX {
            return Err(format!("the metapage has {len} bitmap pages, there can be at most {BITMAPS_MAX}").into());
        }
        self.put_u32(BITMAPS_AT + 4 * len as usize, block);
        self.put_u32(BITMAPS_LEN_AT, len + 1);
        Ok(())
    }
}

fn spares_at(point: u32) -> Result<usize, Fault> {
    if point >= SPLIT_POINTS_MAX {
        return Err(format!("split point {point}, there can be at most {SPLIT_POINTS_MAX}").into());
    }
    Ok(SPARES_AT + 4 * point as usize)
}

/// `_hash_spareindex`: the split point at which an index has this many buckets.
fn split_point(buckets: u32) -> u32 {
    let group = buckets.max(1).checked_next_power_of_two().map_or(32, u32::ilog2);
    if group < ONE_PHASE_GROUPS {
        return group;
    }
    ONE_PHASE_GROUPS + ((group - ONE_PHASE_GROUPS) << PHASE_BITS) + (((buckets - 1) >> (group - (PHASE_BITS + 1))) & PHASE_MASK)
}

/// `_hash_get_totalbuckets`: how many buckets an index has at a split point.
fn buckets_at(point: u32) -> u32 {
    if point < ONE_PHASE_GROUPS {
        return 1 << point;
    }
    let before = 1u32 << (ONE_PHASE_GROUPS + ((point - ONE_PHASE_GROUPS) >> PHASE_BITS) - 1);
    before + (before >> PHASE_BITS) * (((point - ONE_PHASE_GROUPS) & PHASE_MASK) + 1)
}

/// `xl_hash_init_meta_page`: the metapage of a new index (`_hash_init_metabuffer`).
pub(super) fn init(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    let tuples = f64::from_bits(main.u64()?);
    let function = main.u32()?;
    let fill_factor = main.u16()?;
    if !tuples.is_finite() || fill_factor == 0 {
        return Err(format!("a new index for {tuples} tuples, {fill_factor} to a bucket").into());
    }
    // As many buckets as the expected tuples need, rounded up to all of their split point.
    let wanted = tuples / f64::from(fill_factor);
    let buckets = if wanted <= 2.0 {
        2
    } else if wanted >= f64::from(INITIAL_BUCKETS_MAX) {
        INITIAL_BUCKETS_MAX
    } else {
        buckets_at(split_point(wanted as u32))
    };
    let point = split_point(buckets);

    init_page(page, Opaque::single(META_PAGE))?;
    let page_size = special(page) - PAGE_HEADER_SIZE as u16;
    let shift = page_size.ilog2() as u16;
    let high_mask = (buckets + 1).next_power_of_two() - 1;
    let mut meta = Meta(page);
    meta.put_u32(MAGIC_AT, MAGIC);
    meta.put_u32(VERSION_AT, VERSION);
    meta.put_u16(FILL_FACTOR_AT, fill_factor);
    meta.put_u16(PAGE_SIZE_AT, page_size);
    meta.put_u16(BITMAP_SIZE_AT, 1 << shift);
    meta.put_u16(BITMAP_SHIFT_AT, shift + u8::BITS.ilog2() as u16);
    meta.put_u32(FUNCTION_AT, function);
    meta.set_max_bucket(buckets - 1);
    meta.set_masks(high_mask >> 1, high_mask);
    meta.set_split_point(point, 1)?;
    set_lower(page, END as u16);
    Ok(())
}

/// `xl_hash_init_bitmap_page`, block 1: the first bitmap page stands behind the buckets.
pub(super) fn first_bitmap(page: &mut Page) -> Result<(), Fault> {
    let mut meta = Meta::of(page)?;
    let buckets = meta.u32(MAX_BUCKET_AT).wrapping_add(1);
    meta.add_bitmap(buckets.wrapping_add(1))
}

/// Counts tuples that came, or, where `more` is negative, went.
pub(super) fn add_tuples(page: &mut Page, more: f64) -> Result<(), Fault> {
    let mut meta = Meta::of(page)?;
    let tuples = meta.tuples() + more;
    meta.put(TUPLES_AT, &tuples.to_le_bytes());
    Ok(())
}

/// `xl_hash_update_meta_page`: how many tuples VACUUM found.
pub(super) fn set_tuples(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let tuples = Cursor::new(redo.record.main_data).take(8)?;
    Meta::of(page)?.put(TUPLES_AT, tuples);
    Ok(())
}

/// `xl_hash_squeeze_page`, block 6: the overflow page that was given up is now the first free one.
pub(super) fn set_first_free(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let first_free = Cursor::new(redo.record.data).u32()?;
    Meta::of(page)?.put_u32(FIRST_FREE_AT, first_free);
    Ok(())
}

/// `xl_hash_add_ovfl_page`, block 4. Unless a free page was found in the bitmaps, the index has grown by one, or by two
/// when it needed another bitmap page, block 3, as well.
pub(super) fn add_overflow_page(redo: &Redo<'_>, page: &mut Page) -> Result<(), Fault> {
    let mut main = Cursor::new(redo.record.main_data);
    main.take(2)?; // the bitmap page's size
    let found_free = main.u8()? != 0;
    set_first_free(redo, page)?;
    if found_free {
        return Ok(());
    }
    let mut meta = Meta::of(page)?;
    meta.add_spare()?;
    if let Some(block) = redo.record.block_number(3) {
        meta.add_bitmap(block)?;
        meta.add_spare()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use varve_postgres::{Fork, Lsn, Major, page::ZERO_PAGE, wal::rmgr};

    use super::*;
    use crate::change::{BlockRecord, OtherBlock};

    /// A record of which only data and blocks count.
    fn record<'a>(main_data: &'a [u8], data: &'a [u8], bitmap_block: Option<u32>) -> BlockRecord<'a> {
        BlockRecord {
            rmid: rmgr::HASH,
            info: 0,
            xid: 0,
            main_data,
            block_id: 4,
            fork: Fork::Main,
            blkno: 0,
            will_init: false,
            has_data: true,
            data,
            others: bitmap_block.iter().map(|blkno| OtherBlock { id: 3, fork: Fork::Main, blkno: *blkno }).collect(),
        }
    }

    fn redo<'a>(record: &'a BlockRecord<'a>) -> Redo<'a> {
        Redo { major: Major::V15, lsn: Lsn(1), record }
    }

    fn new_meta_page(tuples: f64, fill_factor: u16) -> Page {
        let main = [&tuples.to_le_bytes()[..], &450_u32.to_le_bytes(), &fill_factor.to_le_bytes()].concat();
        let mut page = ZERO_PAGE;
        init(&redo(&record(&main, &[], None)), &mut page).unwrap();
        page
    }

    #[test]
    fn split_points_and_buckets_agree() {
        // As `_hash_spareindex` and `_hash_get_totalbuckets` have them.
        let known = [(1, 0), (2, 1), (3, 2), (4, 2), (512, 9), (513, 10), (640, 10), (641, 11), (1024, 13), (1025, 14), (0x4000_0000, 93)];
        for (buckets, point) in known {
            assert_eq!(split_point(buckets), point, "split point of {buckets} buckets");
        }
        for point in 0..=93 {
            assert_eq!(split_point(buckets_at(point)), point, "{} buckets", buckets_at(point));
        }
    }

    #[test]
    fn a_new_index_has_the_buckets_of_a_whole_split_point() {
        for (tuples, buckets) in [(-1.0, 2), (0.0, 2), (600.0, 2), (1000.0, 4), (307.0 * 600.0, 640), (1e300, INITIAL_BUCKETS_MAX)] {
            let mut page = new_meta_page(tuples, 307);
            assert_eq!(Meta::of(&mut page).unwrap().u32(MAX_BUCKET_AT) + 1, buckets, "for {tuples} tuples");
        }
        let main = [&f64::NAN.to_le_bytes()[..], &[0; 4], &307_u16.to_le_bytes()].concat();
        assert!(init(&redo(&record(&main, &[], None)), &mut ZERO_PAGE.clone()).is_err());
    }

    #[test]
    fn an_overflow_page_may_need_a_bitmap_page() {
        let mut page = new_meta_page(0.0, 307);
        first_bitmap(&mut page).unwrap();
        let main = [&4096_u16.to_le_bytes()[..], &[0]].concat();
        add_overflow_page(&redo(&record(&main, &7_u32.to_le_bytes(), None)), &mut page).unwrap();
        add_overflow_page(&redo(&record(&main, &8_u32.to_le_bytes(), Some(99))), &mut page).unwrap();
        let meta = Meta::of(&mut page).unwrap();
        assert_eq!(meta.u32(FIRST_FREE_AT), 8);
        assert_eq!(meta.u32(BITMAPS_LEN_AT), 2);
        assert_eq!((meta.u32(BITMAPS_AT), meta.u32(BITMAPS_AT + 4)), (3, 99));
        assert_eq!(meta.u32(SPARES_AT + 4), 1 + 1 + 2, "spare pages of split point 1: at first, overflow page, both");
    }

    #[test]
    fn counts_beyond_their_arrays_are_refused() {
        let mut page = new_meta_page(0.0, 307);
        Meta::of(&mut page).unwrap().put_u32(BITMAPS_LEN_AT, BITMAPS_MAX);
        assert!(first_bitmap(&mut page).is_err());
        Meta::of(&mut page).unwrap().put_u32(SPLIT_POINT_AT, SPLIT_POINTS_MAX);
        let main = [&4096_u16.to_le_bytes()[..], &[0]].concat();
        assert!(add_overflow_page(&redo(&record(&main, &[0; 4], None)), &mut page).is_err());
    }
}
