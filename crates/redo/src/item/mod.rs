//! Line pointers and the tuples behind them: what page functions of all access methods do to a page
//! (`storage/itemid.h`, `page/bufpage.c`).
//!
//! Same results as Postgres's functions of these names, tuple placement included: a tuple goes to `pd_upper`, and
//! compaction keeps the order that Postgres keeps. Unlike there, nothing is trusted: a page whose header or line
//! pointers contradict themselves is a [`Fault`], and then the page is not to be used.
//!
//! Layout: 4 bytes a line pointer from [`PAGE_HEADER_SIZE`] to `pd_lower`; as a little-endian word, offset in bits 0 to
//! 14, state in bits 15 and 16, length in bits 17 to 31. Line pointers are numbered from 1.

use std::ops::Range;

use arrayvec::ArrayVec;
use varve_postgres::Page;
use varve_postgres::page::{
    self, BLCKSZ, PAGE_HEADER_SIZE, PD_HAS_FREE_LINES, flags, lower, set_flags, set_lower, set_upper, special, upper,
};

use crate::Fault;

/// Number of a line pointer; the first is 1, and 0 (`InvalidOffsetNumber`) is none.
pub(crate) type OffsetNumber = u16;

/// Bytes in a line pointer.
pub(crate) const ITEM_ID_SIZE: usize = 4;
/// `MaxHeapTuplesPerPage`: a heap page has no more line pointers.
pub(crate) const MAX_HEAP_TUPLES: usize = (BLCKSZ - PAGE_HEADER_SIZE) / (24 + ITEM_ID_SIZE);
/// `MaxIndexTuplesPerPage`: no page has more tuples with storage.
pub(crate) const MAX_INDEX_TUPLES: usize = (BLCKSZ - PAGE_HEADER_SIZE) / (16 + ITEM_ID_SIZE);

/// State of a line pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ItemState {
    /// `LP_UNUSED`: free to be used.
    Unused = 0,
    /// `LP_NORMAL`.
    Normal = 1,
    /// `LP_REDIRECT`: its offset is another line pointer's number.
    Redirect = 2,
    /// `LP_DEAD`, with or without storage.
    Dead = 3,
}

/// A line pointer (`ItemIdData`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ItemId(u32);

impl ItemId {
    /// `ItemIdSetUnused`.
    pub(crate) const UNUSED: ItemId = ItemId(0);
    /// `ItemIdSetDead`: dead, without storage.
    pub(crate) const DEAD: ItemId = ItemId((ItemState::Dead as u32) << 15);

    /// A line pointer of these three parts, of which offset and length keep 15 bits.
    pub(crate) fn new(off: u16, state: ItemState, len: u16) -> ItemId {
        ItemId(u32::from(off & 0x7FFF) | (state as u32) << 15 | u32::from(len & 0x7FFF) << 17)
    }

    /// `ItemIdSetNormal`.
    pub(crate) fn normal(off: u16, len: u16) -> ItemId {
        ItemId::new(off, ItemState::Normal, len)
    }

    /// `ItemIdSetRedirect`.
    pub(crate) fn redirect(to: OffsetNumber) -> ItemId {
        ItemId::new(to, ItemState::Redirect, 0)
    }

    /// The line pointer with this stored form.
    pub(crate) fn from_bytes(bytes: [u8; ITEM_ID_SIZE]) -> ItemId {
        ItemId(u32::from_le_bytes(bytes))
    }

    /// The stored form.
    pub(crate) fn to_bytes(self) -> [u8; ITEM_ID_SIZE] {
        self.0.to_le_bytes()
    }

    /// `lp_off`: where the tuple begins; of a redirection, the number of the line pointer that it leads to.
    pub(crate) fn off(self) -> u16 {
        (self.0 & 0x7FFF) as u16
    }

    /// `lp_len`: the tuple's bytes; 0 without storage.
    pub(crate) fn len(self) -> u16 {
        (self.0 >> 17) as u16
    }

    /// `lp_flags`.
    pub(crate) fn state(self) -> ItemState {
        match self.0 >> 15 & 3 {
            0 => ItemState::Unused,
            1 => ItemState::Normal,
            2 => ItemState::Redirect,
            _ => ItemState::Dead,
        }
    }

    /// `ItemIdIsUsed`.
    pub(crate) fn is_used(self) -> bool {
        self.0 >> 15 & 3 != 0
    }

    /// `ItemIdIsNormal`.
    pub(crate) fn is_normal(self) -> bool {
        self.state() == ItemState::Normal
    }

    /// `ItemIdHasStorage`.
    pub(crate) fn has_storage(self) -> bool {
        self.len() != 0
    }

    /// The same with another state (`ItemIdMarkDead`).
    pub(crate) fn with_state(self, state: ItemState) -> ItemId {
        ItemId::new(self.off(), state, self.len())
    }

    /// The same with another offset.
    pub(crate) fn with_off(self, off: u16) -> ItemId {
        ItemId(self.0 & !0x7FFF | u32::from(off & 0x7FFF))
    }
}

impl std::fmt::Debug for ItemId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}({}, {})", self.state(), self.off(), self.len())
    }
}

/// `MAXALIGN`: `len` rounded up to a multiple of 8.
pub(crate) fn max_align(len: usize) -> usize {
    len.next_multiple_of(8)
}

/// Checks `pd_lower`, `pd_upper` and `pd_special`; after it, 24 <= lower <= upper <= special <= 8192, and special is a
/// multiple of 8.
#[inline]
pub(crate) fn check_header(page: &Page) -> Result<(), Fault> {
    let (lower, upper, special) = (lower(page), upper(page), special(page));
    if usize::from(lower) < PAGE_HEADER_SIZE || lower > upper || upper > special || usize::from(special) > BLCKSZ || special % 8 != 0 {
        return Err(corrupt_header(page));
    }
    Ok(())
}

#[cold]
#[inline(never)]
fn corrupt_header(page: &Page) -> Fault {
    format!("the page's pointers are corrupt: lower {}, upper {}, special {}", lower(page), upper(page), special(page)).into()
}

/// Sets `pd_lower` of a page whose content is not behind line pointers: it ends at `end`, at the most at `pd_upper`.
pub(crate) fn set_content_end(page: &mut Page, end: usize) -> Result<(), Fault> {
    if end > usize::from(upper(page)) {
        return Err(format!("the page's content would end at {end}, behind its upper pointer {}", upper(page)).into());
    }
    set_lower(page, end as u16);
    Ok(())
}

/// `PageGetMaxOffsetNumber`: the number of line pointers.
pub(crate) fn max_offset(page: &Page) -> OffsetNumber {
    let end = usize::from(lower(page)).min(BLCKSZ);
    (end.saturating_sub(PAGE_HEADER_SIZE) / ITEM_ID_SIZE) as OffsetNumber
}

/// The line pointers, from the first to the last that [`max_offset`] counts: for loops over all of them.
pub(crate) fn line_pointers(page: &Page) -> &[[u8; ITEM_ID_SIZE]] {
    page[line_pointer_range(page)].as_chunks().0
}

/// The same, to be changed.
pub(crate) fn line_pointers_mut(page: &mut Page) -> &mut [[u8; ITEM_ID_SIZE]] {
    let range = line_pointer_range(page);
    page[range].as_chunks_mut().0
}

fn line_pointer_range(page: &Page) -> Range<usize> {
    PAGE_HEADER_SIZE..usize::from(lower(page)).clamp(PAGE_HEADER_SIZE, BLCKSZ)
}

/// Where line pointer `offset` (from 1) stands.
fn item_id_at(offset: OffsetNumber) -> usize {
    PAGE_HEADER_SIZE + (usize::from(offset) - 1) * ITEM_ID_SIZE
}

#[inline]
fn existing(page: &Page, offset: OffsetNumber) -> Result<usize, Fault> {
    let max = max_offset(page);
    if offset == 0 || offset > max { Err(does_not_exist(offset, max)) } else { Ok(item_id_at(offset)) }
}

#[cold]
#[inline(never)]
fn does_not_exist(offset: OffsetNumber, max: OffsetNumber) -> Fault {
    format!("line pointer {offset} does not exist: the page has {max}").into()
}

/// Line pointer `offset`; a [`Fault`] if there is none with this number.
#[inline]
pub(crate) fn item_id(page: &Page, offset: OffsetNumber) -> Result<ItemId, Fault> {
    match line_pointers(page).get(usize::from(offset).wrapping_sub(1)) {
        Some(bytes) => Ok(ItemId::from_bytes(*bytes)),
        None => Err(does_not_exist(offset, max_offset(page))),
    }
}

/// Sets line pointer `offset`, which exists.
#[inline]
pub(crate) fn set_item_id(page: &mut Page, offset: OffsetNumber, id: ItemId) -> Result<(), Fault> {
    let at = existing(page, offset)?;
    page[at..at + ITEM_ID_SIZE].copy_from_slice(&id.to_bytes());
    Ok(())
}

/// Line pointer `offset` of all [`line_pointers_mut`].
#[inline]
pub(crate) fn at_mut(line_pointers: &mut [[u8; ITEM_ID_SIZE]], offset: OffsetNumber) -> Result<&mut [u8; ITEM_ID_SIZE], Fault> {
    let max = line_pointers.len() as OffsetNumber;
    line_pointers.get_mut(usize::from(offset.wrapping_sub(1))).ok_or_else(|| does_not_exist(offset, max))
}

/// [`set_item_id`] for one after the other, given all [`line_pointers_mut`].
pub(crate) fn set(line_pointers: &mut [[u8; ITEM_ID_SIZE]], offset: OffsetNumber, id: ItemId) -> Result<(), Fault> {
    *at_mut(line_pointers, offset)? = id.to_bytes();
    Ok(())
}

/// Where the tuple behind line pointer `offset` lies: within the page, behind the header, not empty.
#[inline]
pub(crate) fn item_range(page: &Page, offset: OffsetNumber) -> Result<Range<usize>, Fault> {
    let id = item_id(page, offset)?;
    let range = usize::from(id.off())..usize::from(id.off()) + usize::from(id.len());
    if !id.has_storage() || range.start < PAGE_HEADER_SIZE || range.end > BLCKSZ {
        return Err(no_tuple(offset, id));
    }
    Ok(range)
}

#[cold]
#[inline(never)]
fn no_tuple(offset: OffsetNumber, id: ItemId) -> Fault {
    format!("line pointer {offset} has no tuple: {id:?}").into()
}

/// The tuple behind line pointer `offset`.
#[inline]
pub(crate) fn item(page: &Page, offset: OffsetNumber) -> Result<&[u8], Fault> {
    let range = item_range(page, offset)?;
    Ok(&page[range])
}

/// The tuple behind line pointer `offset`, to be changed in place.
#[inline]
pub(crate) fn item_mut(page: &mut Page, offset: OffsetNumber) -> Result<&mut [u8], Fault> {
    let range = item_range(page, offset)?;
    Ok(&mut page[range])
}

/// The page's special space, which must have `len` bytes (`PageGetSpecialPointer`).
pub(crate) fn special_space(page: &Page, len: usize) -> Result<&[u8], Fault> {
    let start = special_start(page, len)?;
    Ok(&page[start..])
}

/// The page's special space, which must have `len` bytes, to be changed in place.
pub(crate) fn special_space_mut(page: &mut Page, len: usize) -> Result<&mut [u8], Fault> {
    let start = special_start(page, len)?;
    Ok(&mut page[start..])
}

fn special_start(page: &Page, len: usize) -> Result<usize, Fault> {
    let start = usize::from(special(page));
    if !(PAGE_HEADER_SIZE..=BLCKSZ).contains(&start) || BLCKSZ - start != len {
        return Err(format!("the page's special space begins at {start}, expected {len} bytes of it").into());
    }
    Ok(start)
}

/// Sets the hint that a line pointer is unused.
pub(crate) fn set_has_free_lines(page: &mut Page, has: bool) {
    let others = flags(page) & !PD_HAS_FREE_LINES;
    set_flags(page, if has { others | PD_HAS_FREE_LINES } else { others });
}

/// `PageAddItemExtended`, but for the copying: gives the new tuple its line pointer and its place, to be filled by the
/// caller.
///
/// At line pointer `offset`, or the first free one if that is 0. With `overwrite`, `offset` is an unused line pointer
/// or one past the last; without, line pointers from `offset` on move up by one. `is_heap` refuses line pointers beyond
/// [`MAX_HEAP_TUPLES`].
pub(crate) fn reserve_item(
    page: &mut Page,
    len: usize,
    offset: OffsetNumber,
    overwrite: bool,
    is_heap: bool,
) -> Result<(OffsetNumber, Range<usize>), Fault> {
    check_header(page)?;
    let limit = max_offset(page) + 1;
    let mut shift = false;
    let mut offset = offset;
    if offset != 0 {
        if offset < limit {
            if overwrite {
                let id = item_id(page, offset)?;
                if id.is_used() || id.has_storage() {
                    return Err(format!("line pointer {offset} is in use: {id:?}").into());
                }
            } else {
                shift = true;
            }
        }
    } else if flags(page) & PD_HAS_FREE_LINES != 0 {
        offset = first_free_line(page, limit);
        if offset == limit {
            set_has_free_lines(page, false); // the hint was wrong
        }
    } else {
        offset = limit;
    }
    if offset > limit {
        return Err(format!("a tuple for line pointer {offset}: the page has {}", limit - 1).into());
    }
    if is_heap && usize::from(offset) > MAX_HEAP_TUPLES {
        return Err(format!("a tuple for line pointer {offset}: a heap page has at most {MAX_HEAP_TUPLES}").into());
    }
    let old_lower = usize::from(lower(page));
    let new_lower = if offset == limit || shift { old_lower + ITEM_ID_SIZE } else { old_lower };
    let new_upper = usize::from(upper(page))
        .checked_sub(max_align(len))
        .filter(|new_upper| new_lower <= *new_upper)
        .ok_or_else(|| format!("a tuple of {len} bytes does not fit: lower {old_lower}, upper {}", upper(page)))?;
    let at = item_id_at(offset);
    if shift {
        page.copy_within(at..item_id_at(limit), at + ITEM_ID_SIZE);
    }
    page[at..at + ITEM_ID_SIZE].copy_from_slice(&ItemId::normal(new_upper as u16, len as u16).to_bytes());
    set_lower(page, new_lower as u16);
    set_upper(page, new_upper as u16);
    Ok((offset, new_upper..new_upper + len))
}

/// The first line pointer without use and storage, or `limit`.
fn first_free_line(page: &Page, limit: OffsetNumber) -> OffsetNumber {
    let free = |bytes: &[u8; ITEM_ID_SIZE]| {
        let id = ItemId::from_bytes(*bytes);
        !id.is_used() && !id.has_storage()
    };
    line_pointers(page).iter().position(free).map_or(limit, |index| index as OffsetNumber + 1)
}

/// `PageAddItemExtended`: puts `item` on the page, gives its number. See [`reserve_item`].
pub(crate) fn add_item(page: &mut Page, item: &[u8], offset: OffsetNumber, overwrite: bool, is_heap: bool) -> Result<OffsetNumber, Fault> {
    let (offset, range) = reserve_item(page, item.len(), offset, overwrite, is_heap)?;
    page[range].copy_from_slice(item);
    Ok(offset)
}

/// `PageGetTempPageCopySpecial`: an empty page with `page`'s special space, to be filled and put in `page`'s place.
pub(crate) fn empty_like(page: &Page) -> Result<Page, Fault> {
    let start = usize::from(special(page));
    if !(PAGE_HEADER_SIZE..=BLCKSZ).contains(&start) || start % 8 != 0 {
        return Err(format!("the page's special space begins at {start}").into());
    }
    let mut empty = page::ZERO_PAGE;
    page::init(&mut empty, BLCKSZ - start);
    empty[start..].copy_from_slice(&page[start..]);
    Ok(empty)
}

/// `PageGetExactFreeSpace`: bytes between line pointers and tuples.
pub(crate) fn exact_free_space(page: &Page) -> usize {
    usize::from(upper(page)).saturating_sub(usize::from(lower(page)))
}

/// `PageGetFreeSpace`: the same less a line pointer.
pub(crate) fn free_space(page: &Page) -> usize {
    exact_free_space(page).saturating_sub(ITEM_ID_SIZE)
}

/// `PageGetHeapFreeSpace`: the same, but nothing when the page can have no more line pointers and none is free.
pub fn heap_free_space(page: &Page) -> usize {
    let lines = max_offset(page);
    if usize::from(lines) < MAX_HEAP_TUPLES {
        return free_space(page);
    }
    let hint = flags(page) & PD_HAS_FREE_LINES != 0;
    let free = hint && line_pointers(page).iter().any(|bytes| !ItemId::from_bytes(*bytes).is_used());
    if free { free_space(page) } else { 0 }
}

/// A tuple that compaction keeps.
#[derive(Clone, Copy)]
struct Kept {
    /// Its line pointer after compaction.
    offset: OffsetNumber,
    start: u16,
    aligned_len: u16,
}

/// Room for the tuples that compaction keeps, and one place more: what is too much goes there.
type KeptTuples = [Kept; MAX_INDEX_TUPLES + 1];

const NONE_KEPT: KeptTuples = [Kept { offset: 0, start: 0, aligned_len: 0 }; MAX_INDEX_TUPLES + 1];

/// What is known of the tuples that compaction keeps, which are listed in order of their line pointers.
#[derive(Clone, Copy)]
struct Compaction {
    len: usize,
    bytes: u32,
    upper: u32,
    special: u32,
    last_start: u32,
    /// The top bit says that the tuples do not lie on the page in their order, from its end downwards. If they do, they
    /// can be moved without a copy.
    unsorted: u32,
    /// The top bit says that a tuple does not lie between upper and special.
    misplaced: u32,
}

impl Compaction {
    fn new(page: &Page) -> Compaction {
        let (upper, special) = (u32::from(upper(page)), u32::from(special(page)));
        Compaction { len: 0, bytes: 0, upper, special, last_start: special, unsorted: 0, misplaced: 0 }
    }

    /// Lists the tuple behind `id`, which becomes line pointer `offset`, if `is_kept`.
    ///
    /// Which line pointers are kept no processor can guess, and to guess wrong is what takes time: so there is no
    /// branch here, and what is wrong is found out by [`Compaction::check`].
    #[inline(always)]
    fn push_if(&mut self, tuples: &mut KeptTuples, is_kept: bool, id: ItemId, offset: OffsetNumber) {
        let (start, aligned_len) = (id.0 & 0x7FFF, ((id.0 >> 17) + 7) & !7);
        let mask = u32::from(is_kept).wrapping_neg();
        tuples[self.len.min(MAX_INDEX_TUPLES)] = Kept { offset, start: start as u16, aligned_len: aligned_len as u16 };
        self.len += usize::from(is_kept);
        self.bytes += aligned_len & mask;
        self.misplaced |= (start.wrapping_sub(self.upper) | self.special.wrapping_sub(start + aligned_len)) & mask;
        self.unsorted |= !start.wrapping_sub(self.last_start) & mask;
        self.last_start = start & mask | self.last_start & !mask;
    }

    /// Whether all lie where tuples lie, and fit above the line pointers: so that moving them stays within the page.
    fn check(&self, page: &Page) -> Result<(), Fault> {
        if self.len > MAX_INDEX_TUPLES {
            return Err(format!("the page has more than {MAX_INDEX_TUPLES} tuples").into());
        }
        if self.misplaced >> 31 != 0 {
            let (upper, special) = (self.upper, self.special);
            return Err(format!("a tuple does not lie between upper {upper} and special {special}").into());
        }
        let space = self.special.saturating_sub(u32::from(lower(page)));
        if self.bytes > space {
            return Err(format!("the tuples' lengths are corrupt: {} bytes in {space}", self.bytes).into());
        }
        Ok(())
    }

    /// `compactify_tuples`: moves them to the page's end in order, without gaps, and sets line pointers and `pd_upper`.
    /// They were [checked](Self::check), and the page has their line pointers.
    fn compact(&self, tuples: &KeptTuples, page: &mut Page) {
        let tuples = &tuples[..self.len];
        let mut target = self.special as u16;
        let stay = tuples.iter().take_while(|kept| {
            let stays = kept.start + kept.aligned_len == target;
            target -= if stays { kept.aligned_len } else { 0 };
            stays
        });
        let moved = &tuples[stay.count()..];
        // Tuples in order all go up, so none is overwritten before it was moved. Otherwise they come from a copy: of
        // all, because on a corrupt page one may lie where others stay.
        let upper = self.upper as usize;
        let mut copy: ArrayVec<u8, BLCKSZ> = ArrayVec::new();
        if self.unsorted >> 31 != 0 {
            let _ = copy.try_extend_from_slice(&page[upper..self.special as usize]); // a page has room for its part
        }
        let move_run = |page: &mut Page, from: Range<usize>, to: usize| {
            if copy.is_empty() {
                page.copy_within(from, to);
            } else {
                page[to..to + from.len()].copy_from_slice(&copy[from.start - upper..from.end - upper]);
            }
        };
        // Neighbours move together.
        let mut run = upper..upper;
        for kept in moved {
            let (start, end) = (usize::from(kept.start), usize::from(kept.start + kept.aligned_len));
            if end != run.start {
                move_run(page, run, usize::from(target));
                run = end..end;
            }
            run.start = start;
            target -= kept.aligned_len;
            let at = item_id_at(kept.offset);
            let id = ItemId::from_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
            page[at..at + ITEM_ID_SIZE].copy_from_slice(&id.with_off(target).to_bytes());
        }
        move_run(page, run, usize::from(target));
        set_upper(page, target);
    }
}

#[cold]
fn misplaced(offset: OffsetNumber, id: ItemId, upper: u16, special: u16) -> Fault {
    format!("line pointer {offset} is corrupt: {id:?}, upper {upper}, special {special}").into()
}

/// `PageRepairFragmentation`: closes gaps between a heap page's tuples, cuts unused line pointers off the end if told
/// (from 15 on Postgres does), sets the free-lines hint. Returns how many unused line pointers are left.
pub(crate) fn repair_fragmentation(page: &mut Page, truncate: bool) -> Result<OffsetNumber, Fault> {
    check_header(page)?;
    let lines = max_offset(page);
    let (mut tuples, mut kept) = (NONE_KEPT, Compaction::new(page));
    let (mut unused, mut last_used) = (0, 0);
    for (bytes, offset) in line_pointers_mut(page).iter_mut().zip(1..) {
        let id = ItemId::from_bytes(*bytes);
        let is_used = id.is_used();
        kept.push_if(&mut tuples, is_used & id.has_storage(), id, offset);
        let mask = u16::from(is_used).wrapping_neg();
        unused += OffsetNumber::from(!is_used);
        last_used = offset & mask | last_used & !mask;
        *bytes = (id.0 & u32::from(is_used).wrapping_neg()).to_le_bytes();
    }
    kept.check(page)?;
    kept.compact(&tuples, page);
    let cut = if truncate { lines - last_used } else { 0 };
    set_lower(page, lower(page) - cut * ITEM_ID_SIZE as u16);
    set_has_free_lines(page, unused > cut);
    Ok(unused - cut)
}

/// Moves a heap page's tuples, which lie anywhere between `bottom` and the special space, to the page's end without
/// gaps: first those behind all other line pointers, in order of these, then those behind `last`, in that order.
pub(crate) fn close_gaps(page: &mut Page, bottom: u16, last: &[OffsetNumber]) -> Result<(), Fault> {
    let (mut tuples, mut kept) = (NONE_KEPT, Compaction { upper: u32::from(bottom), ..Compaction::new(page) });
    for (bytes, offset) in line_pointers(page).iter().zip(1..) {
        let id = ItemId::from_bytes(*bytes);
        kept.push_if(&mut tuples, id.is_used() & id.has_storage() & !last.contains(&offset), id, offset);
    }
    for offset in last {
        let id = item_id(page, *offset)?;
        kept.push_if(&mut tuples, id.is_used() & id.has_storage(), id, *offset);
    }
    kept.check(page)?;
    kept.compact(&tuples, page);
    Ok(())
}

/// `PageTruncateLinePointerArray`: cuts unused line pointers off the end, but the first, and sets the free-lines hint.
pub(crate) fn truncate_line_pointers(page: &mut Page) -> Result<(), Fault> {
    check_header(page)?;
    let lines = max_offset(page);
    let is_used = |bytes: &[u8; ITEM_ID_SIZE]| ItemId::from_bytes(*bytes).is_used();
    let line_pointers = line_pointers(page);
    let left = line_pointers.iter().rposition(is_used).map_or(1, |last| last as OffsetNumber + 1).min(lines);
    let has_free = !line_pointers[..usize::from(left)].iter().all(is_used);
    set_lower(page, lower(page) - (lines - left) * ITEM_ID_SIZE as u16);
    set_has_free_lines(page, has_free);
    Ok(())
}

/// Where the index tuple behind line pointer `offset` lies: above `pd_upper`, below the special space, aligned.
fn index_tuple(page: &Page, offset: OffsetNumber) -> Result<(ItemId, Range<usize>), Fault> {
    let id = item_id(page, offset)?;
    let range = usize::from(id.off())..usize::from(id.off()) + usize::from(id.len());
    if range.start < usize::from(upper(page)) || range.end > usize::from(special(page)) || range.start % 8 != 0 {
        return Err(misplaced(offset, id, upper(page), special(page)));
    }
    Ok((id, range))
}

/// Moves the tuple data before `end` up by `by` bytes, and what line pointers say with it. `by` is negative to move
/// down.
fn shift_tuples(page: &mut Page, end: usize, by: isize) -> Result<(), Fault> {
    let from = usize::from(upper(page));
    let to = from
        .checked_add_signed(by)
        .filter(|to| *to >= usize::from(lower(page)) && to + (end - from) <= usize::from(special(page)))
        .ok_or_else(|| format!("tuples from {from} to {end} cannot move by {by} bytes"))?;
    page.copy_within(from..end, to);
    set_upper(page, to as u16);
    for bytes in line_pointers_mut(page) {
        let id = ItemId::from_bytes(*bytes);
        if id.has_storage() && usize::from(id.off()) <= end {
            *bytes = id.with_off(id.off().wrapping_add_signed(by as i16)).to_bytes();
        }
    }
    Ok(())
}

/// `PageIndexTupleDelete`: takes an index tuple and its line pointer off the page.
pub(crate) fn index_tuple_delete(page: &mut Page, offset: OffsetNumber) -> Result<(), Fault> {
    check_header(page)?;
    let (_, range) = index_tuple(page, offset)?;
    let at = item_id_at(offset);
    let end = usize::from(lower(page));
    page.copy_within(at + ITEM_ID_SIZE..end, at);
    set_lower(page, (end - ITEM_ID_SIZE) as u16);
    shift_tuples(page, range.start, max_align(range.len()) as isize)
}

/// `PageIndexMultiDelete`: takes index tuples, named in ascending order, and their line pointers off the page.
pub(crate) fn index_multi_delete(page: &mut Page, offsets: &[OffsetNumber]) -> Result<(), Fault> {
    // As Postgres does: the two ways may leave tuples in a different order.
    if offsets.len() <= 2 {
        return offsets.iter().rev().try_for_each(|offset| index_tuple_delete(page, *offset));
    }
    check_header(page)?;
    let (mut tuples, mut kept) = (NONE_KEPT, Compaction::new(page));
    let mut ids: ArrayVec<ItemId, MAX_INDEX_TUPLES> = ArrayVec::new();
    let mut doomed = offsets.iter().peekable();
    for offset in 1..=max_offset(page) {
        let (id, _) = index_tuple(page, offset)?;
        if doomed.next_if_eq(&&offset).is_some() {
            continue;
        }
        kept.push_if(&mut tuples, true, id, kept.len as OffsetNumber + 1);
        ids.try_push(id).map_err(|_| format!("the page has more than {MAX_INDEX_TUPLES} tuples"))?;
    }
    if let Some(offset) = doomed.next() {
        return Err(format!("line pointer {offset} to be deleted does not exist, or is out of order").into());
    }
    kept.check(page)?;
    for (bytes, id) in line_pointers_mut(page).iter_mut().zip(&ids) {
        *bytes = id.to_bytes();
    }
    set_lower(page, (PAGE_HEADER_SIZE + ids.len() * ITEM_ID_SIZE) as u16);
    kept.compact(&tuples, page);
    Ok(())
}

/// `PageIndexTupleDeleteNoCompact`: takes an index tuple off the page and leaves its line pointer unused, unless it is
/// the last, which goes.
pub(crate) fn index_tuple_delete_no_compact(page: &mut Page, offset: OffsetNumber) -> Result<(), Fault> {
    check_header(page)?;
    let (_, range) = index_tuple(page, offset)?;
    if offset < max_offset(page) {
        set_item_id(page, offset, ItemId::UNUSED)?;
    } else {
        set_lower(page, lower(page) - ITEM_ID_SIZE as u16);
    }
    shift_tuples(page, range.start, max_align(range.len()) as isize)
}

/// `PageIndexTupleOverwrite`: replaces an index tuple where it stands, moving those before it as its size changes.
pub(crate) fn index_tuple_overwrite(page: &mut Page, offset: OffsetNumber, item: &[u8]) -> Result<(), Fault> {
    check_header(page)?;
    let (id, range) = index_tuple(page, offset)?;
    let (old_len, new_len) = (max_align(range.len()), max_align(item.len()));
    if new_len > old_len + exact_free_space(page) {
        return Err(format!("a tuple of {} bytes does not fit in place of one of {}", item.len(), range.len()).into());
    }
    let shrink = old_len as isize - new_len as isize;
    if shrink != 0 {
        shift_tuples(page, range.start, shrink)?;
    }
    let start = range.start.wrapping_add_signed(shrink);
    set_item_id(page, offset, ItemId::new(start as u16, id.state(), item.len() as u16))?;
    page.get_mut(start..start + item.len()).ok_or("the new tuple would end behind the page")?.copy_from_slice(item);
    Ok(())
}

#[cfg(test)]
mod tests;
