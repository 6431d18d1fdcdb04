//! Page functions.
//!
//! An input is a [`Seed`]: a major, a stored change and the page before it.

use varve_postgres::page::{self, PAGE_HEADER_SIZE, ZERO_PAGE};
use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, Major, Page};
use varve_redo::change::Change;
use varve_redo::{HeapLayout, apply, apply_loosely, free_space_effect, mask};

use crate::input::Input;

/// End of every record.
const LSN: Lsn = Lsn(0x1234_5678);

/// A change and the page that it is made to.
///
/// Layout: major `u8`, block number `u32`, length of the stored change `u16` and the change, length of the page's head
/// `u16` and the head, the page's tail; what lies between head and tail is zeros. Little-endian.
#[derive(Debug, Clone)]
pub struct Seed {
    /// The major that wrote the record.
    pub major: Major,
    /// The page's number.
    pub blkno: BlockNumber,
    /// The stored form of the change.
    pub change: Vec<u8>,
    /// The page before.
    pub page: Box<Page>,
}

impl Seed {
    /// The input that means this.
    pub fn encode(&self) -> Vec<u8> {
        let major = Major::ALL.iter().position(|major| *major == self.major).unwrap_or_default() as u8;
        let mut out = vec![major];
        out.extend_from_slice(&self.blkno.to_le_bytes());
        out.extend_from_slice(&(self.change.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.change);
        let (head, tail) = ends(&self.page);
        out.extend_from_slice(&(head.len() as u16).to_le_bytes());
        out.extend_from_slice(head);
        out.extend_from_slice(tail);
        out
    }

    fn decode(data: &[u8]) -> Seed {
        let mut input = Input::new(data);
        let (major, blkno, change) = (input.major(), input.u32(), input.piece().to_vec());
        let mut page = Box::new(ZERO_PAGE);
        let head = input.piece();
        let head = &head[..head.len().min(BLCKSZ)];
        page[..head.len()].copy_from_slice(head);
        let tail = input.take(BLCKSZ - head.len());
        page[BLCKSZ - tail.len()..].copy_from_slice(tail);
        Seed { major, blkno, change, page }
    }
}

/// Changes that are made one after the other to a heap page.
///
/// Layout: major `u8`, block number `u32`, length of the page's head `u16` and the head, length of its tail `u16` and
/// the tail, then each change in its stored form behind its length `u16`. Little-endian.
#[derive(Debug, Clone)]
pub struct Series {
    /// The major that wrote the records.
    pub major: Major,
    /// The page's number.
    pub blkno: BlockNumber,
    /// The page before.
    pub page: Box<Page>,
    /// The stored forms of the changes.
    pub changes: Vec<Vec<u8>>,
}

impl Series {
    /// The input that means this.
    pub fn encode(&self) -> Vec<u8> {
        let major = Major::ALL.iter().position(|major| *major == self.major).unwrap_or_default() as u8;
        let mut out = vec![major];
        out.extend_from_slice(&self.blkno.to_le_bytes());
        let (head, tail) = ends(&self.page);
        for piece in [head, tail].into_iter().chain(self.changes.iter().map(Vec::as_slice)) {
            out.extend_from_slice(&(piece.len() as u16).to_le_bytes());
            out.extend_from_slice(piece);
        }
        out
    }

    fn decode(data: &[u8]) -> Series {
        let mut input = Input::new(data);
        let (major, blkno) = (input.major(), input.u32());
        let mut page = Box::new(ZERO_PAGE);
        let head = input.piece();
        let head = &head[..head.len().min(BLCKSZ)];
        page[..head.len()].copy_from_slice(head);
        let tail = input.piece();
        let tail = &tail[..tail.len().min(BLCKSZ - head.len())];
        page[BLCKSZ - tail.len()..].copy_from_slice(tail);
        let mut changes = Vec::new();
        while !input.is_empty() && changes.len() < SERIES_MAX {
            changes.push(input.piece().to_vec());
        }
        Series { major, blkno, page, changes }
    }
}

/// Changes of a series.
const SERIES_MAX: usize = 100;

/// A series of heap changes comes to the same whether compaction is put off or not.
pub(crate) fn heap_series(data: &[u8]) {
    let Series { major, blkno, page, changes } = Series::decode(data);
    let (mut at_once, mut loose, mut layout) = (page.clone(), page, HeapLayout::default());
    for (number, stored) in (1..).zip(&changes) {
        let Ok(Change::Record(record)) = Change::decode(stored) else { continue };
        if !matches!(record.rmid, rmgr::HEAP | rmgr::HEAP2) {
            continue;
        }
        let (lsn, change) = (LSN + number * 8, Change::Record(record));
        let done = apply(major, lsn, blkno, &change, &mut at_once);
        let done_loosely = apply_loosely(major, lsn, blkno, &change, &mut loose, &mut layout);
        // What is wrong may be told with where a tuple lies for now.
        let alike = done.is_ok() == done_loosely.is_ok();
        assert!(alike, "{change:?} must come to the same when compaction is put off: {done:?}, {done_loosely:?}");
        if done.is_err() {
            return;
        }
        let mut settled = loose.clone();
        layout.clone().settle(&mut settled, blkno).expect("a page that was redone can be settled");
        let mut expected = at_once.clone();
        let masked = mask::mask_page(major, rmgr::HEAP, &mut expected, blkno);
        assert_eq!(masked.is_ok(), mask::mask_page(major, rmgr::HEAP, &mut settled, blkno).is_ok());
        assert!(masked.is_err() || settled == expected, "after {change:?} the pages differ");
    }
}

/// The page without the longest run of zeros in it.
fn ends(page: &Page) -> (&[u8], &[u8]) {
    let (mut start, mut best) = (0, 0..0);
    for (at, byte) in page.iter().enumerate() {
        if *byte != 0 {
            start = at + 1;
        } else if at + 1 - start > best.len() {
            best = start..at + 1;
        }
    }
    (&page[..best.start], &page[best.end..])
}

/// A record of resource manager `rmid` is redone or refused; a page whose header was sound keeps a sound one.
pub(crate) fn redo(rmid: u8, data: &[u8]) {
    let Seed { major, blkno, change, page } = Seed::decode(data);
    let Ok(Change::Record(mut record)) = Change::decode(&change) else { return };
    record.rmid = rmid;
    let change = Change::Record(record);
    run(major, blkno, &change, *page);
}

/// The same for the two resource managers that have one record type each.
pub(crate) fn sequence_and_generic(data: &[u8]) {
    redo(rmgr::SEQ, data);
    redo(rmgr::GENERIC, data);
}

/// The same for changes that no record names, to maps and SLRU pages.
pub(crate) fn maps_and_slru(data: &[u8]) {
    let Seed { major, blkno, change, page } = Seed::decode(data);
    match Change::decode(&change) {
        Ok(change) if !matches!(change, Change::Record(_)) => run(major, blkno, &change, *page),
        _ => {}
    }
}

fn run(major: Major, blkno: BlockNumber, change: &Change<'_>, mut page: Page) {
    let stored = change.encode();
    assert_eq!(Change::decode(&stored).as_ref(), Ok(change), "a change must survive being stored");
    let sound = is_sound(&page);
    if apply(major, LSN, blkno, change, &mut page).is_err() {
        return;
    }
    let Change::Record(record) = change else { return };
    // Generic WAL may put anything anywhere.
    if sound && record.rmid != rmgr::GENERIC {
        assert!(is_sound(&page), "redo must leave a sound header: {record:?}");
    }
    assert_eq!(page::lsn(&page), LSN, "redo must set the page's LSN");
    let _ = free_space_effect(major, record, &page, false);
    let _ = mask::rmgr_of_page(&page);
    let _ = mask::mask_page(major, record.rmid, &mut page, blkno);
}

fn is_sound(page: &Page) -> bool {
    let (lower, upper, special) = (usize::from(page::lower(page)), usize::from(page::upper(page)), usize::from(page::special(page)));
    page::is_new(page) || PAGE_HEADER_SIZE <= lower && lower <= upper && upper <= special && special <= BLCKSZ
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_means_what_it_was_made_of() {
        let mut page = Box::new(ZERO_PAGE);
        page::init(&mut page, 0);
        page[8000] = 7;
        let series = Series { major: Major::V16, blkno: 5, page, changes: vec![vec![1, 2], vec![3; 300]] };
        let decoded = Series::decode(&series.encode());
        assert_eq!(
            (decoded.major, decoded.blkno, decoded.page, decoded.changes),
            (series.major, series.blkno, series.page, series.changes)
        );
    }

    #[test]
    fn a_seed_means_what_it_was_made_of() {
        let mut page = Box::new(ZERO_PAGE);
        page::init(&mut page, 16);
        page[8000] = 7;
        let change = Change::ClogStatus { status: 1, xids: vec![5].into() }.encode().to_vec();
        let seed = Seed { major: Major::V17, blkno: 9, change: change.clone(), page: page.clone() };
        let encoded = seed.encode();
        assert!(encoded.len() < 300, "zeros are left out: {} bytes", encoded.len());
        let decoded = Seed::decode(&encoded);
        assert_eq!((decoded.major, decoded.blkno, decoded.change, decoded.page), (Major::V17, 9, change, page));
    }
}
