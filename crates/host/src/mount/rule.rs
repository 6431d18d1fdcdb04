//! Which written blocks are the base's again: the rule, read off the page itself.
//!
//! What redo makes of a page is what crash recovery would go on with, and Postgres is right on such pages. A page of
//! ours that was not written since before the redo point of a finished checkpoint differs from it by unlogged state
//! only. That hurts where a process that still runs remembers something about the page that is not in WAL. So a page
//! stays that may be remembered, that was never logged, or that is of no kind that is known here. The caller sees to
//! the rest: when the page was written last, and that it is of the main fork of a relation that is logged.
//!
//! | a page stays | because of |
//! |---|---|
//! | of zeros | extension is not logged, so the base may not reach that far |
//! | of the heap, with an xmin or xmax that may still run, or a multixact | command ids, combo command ids, speculative tokens: redo makes others |
//! | of a btree, with a cycle id | a `VACUUM` that runs knows by it which pages were split under it |
//! | with an LSN of 0 or 1 | an index is built: its pages are logged in the end |
//! | with an LSN behind the redo point | it was changed since; then the caller is wrong about when |
//! | of a sequence, or of an access method that is not known | prelogged values; what processes remember of it is not known |

use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE, ZERO_PAGE};
use varve_postgres::{Lsn, Page};

/// What is known of the server when blocks are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Redo point of a checkpoint that has completed. The base is there.
    pub redo: Lsn,
    /// The oldest transaction that may still run, prepared ones left out, as known after the last write of any block
    /// that is handed over.
    pub oldest_running: u32,
}

/// What becomes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The base has it.
    Goes,
    /// It stays.
    Stays(Why),
}

/// Why a page stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It holds nothing.
    Zeros,
    /// A transaction that may still run, or a multixact, is on it.
    Transactions,
    /// It was split while a `VACUUM` ran.
    Vacuum,
    /// It is not in WAL, or not as it is here.
    NotLogged,
    /// Nothing here knows what kind of page it is.
    Unknown,
}

/// Size of a line pointer.
const LINE_POINTER_BYTES: usize = 4;
/// `LP_NORMAL`.
const LINE_POINTER_NORMAL: u32 = 1;
/// `SizeofHeapTupleHeader`.
const TUPLE_HEADER_BYTES: usize = 23;
/// Where a tuple's header has `t_infomask`.
const INFOMASK: usize = 20;
/// `HEAP_XMIN_FROZEN`: both bits.
const XMIN_FROZEN: u16 = 0x0300;
/// `HEAP_XMAX_INVALID`.
const XMAX_INVALID: u16 = 0x0800;
/// `HEAP_XMAX_IS_MULTI`.
const XMAX_IS_MULTI: u16 = 0x1000;
/// `HEAP_MOVED`: by a `VACUUM FULL` before 9.0.
const MOVED: u16 = 0xC000;
/// `FirstNormalTransactionId`.
const FIRST_NORMAL_XID: u32 = 3;
/// `MAX_BT_CYCLE_ID`: what a btree's page ends with is at most this.
const BTREE_CYCLE_ID_MAX: u16 = 0xFF7F;
/// What a page of a hash index ends with.
const HASH_PAGE_ID: u16 = 0xFF80;
/// What a page of a GiST index ends with.
const GIST_PAGE_ID: u16 = 0xFF81;
/// What a page of an SP-GiST index ends with.
const SPGIST_PAGE_ID: u16 = 0xFF82;
/// What a page of a bloom index ends with.
const BLOOM_PAGE_ID: u16 = 0xFF83;
/// What a page of a BRIN index ends with.
const BRIN_PAGE_TYPES: std::ops::RangeInclusive<u16> = 0xF091..=0xF093;
/// What a page of a GIN index ends with: flags, of which this is the largest sum.
const GIN_FLAGS_MAX: u16 = 0x00FF;
/// `SEQ_MAGIC`.
const SEQUENCE_MAGIC: u32 = 0x1717;
/// LSN of pages of an index that is built (`GistBuildLSN`); none has a smaller one but 0.
const BUILD_LSN: Lsn = Lsn(1);

/// What becomes of a page that was written last before `terms.redo` was fixed.
pub(super) fn verdict(page: &Page, terms: &Terms) -> Verdict {
    match why_stays(page, terms) {
        Some(why) => Verdict::Stays(why),
        None => Verdict::Goes,
    }
}

fn why_stays(page: &Page, terms: &Terms) -> Option<Why> {
    if *page == ZERO_PAGE {
        return Some(Why::Zeros);
    }
    let lsn = page::lsn(page);
    if lsn <= BUILD_LSN || lsn > terms.redo {
        return Some(Why::NotLogged);
    }
    let (lower, upper, special) = (page::lower(page).into(), page::upper(page).into(), page::special(page).into());
    if lower < PAGE_HEADER_SIZE || lower > upper || upper > special || special > BLCKSZ {
        return Some(Why::Unknown);
    }
    let last = u16_at(page, BLCKSZ - 2);
    match BLCKSZ - special {
        0 => heap_stays(page, lower, upper, terms.oldest_running),
        16 if last <= BTREE_CYCLE_ID_MAX => (last != 0).then_some(Why::Vacuum),
        16 if [HASH_PAGE_ID, GIST_PAGE_ID].contains(&last) => None,
        8 if u32_at(page, special) == SEQUENCE_MAGIC => Some(Why::Unknown),
        8 if last <= GIN_FLAGS_MAX || [SPGIST_PAGE_ID, BLOOM_PAGE_ID].contains(&last) || BRIN_PAGE_TYPES.contains(&last) => None,
        _ => Some(Why::Unknown),
    }
}

/// Whether a page of the heap stays.
fn heap_stays(page: &Page, lower: usize, upper: usize, oldest_running: u32) -> Option<Why> {
    let pointers = page[PAGE_HEADER_SIZE..lower].chunks(LINE_POINTER_BYTES);
    for pointer in pointers {
        let Some(pointer) = pointer.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) else { return Some(Why::Unknown) };
        let (offset, flags, length) = ((pointer & 0x7FFF) as usize, pointer >> 15 & 3, (pointer >> 17) as usize);
        if flags != LINE_POINTER_NORMAL {
            continue;
        }
        if offset < upper || length < TUPLE_HEADER_BYTES || offset + length > BLCKSZ {
            return Some(Why::Unknown);
        }
        let tuple = &page[offset..offset + TUPLE_HEADER_BYTES];
        let infomask = u16::from_le_bytes([tuple[INFOMASK], tuple[INFOMASK + 1]]);
        let xid = |at: usize| u32::from_le_bytes([tuple[at], tuple[at + 1], tuple[at + 2], tuple[at + 3]]);
        let (has_xmin, has_xmax) = (infomask & XMIN_FROZEN != XMIN_FROZEN, infomask & XMAX_INVALID == 0);
        let counts = infomask & MOVED != 0
            || has_xmin && may_run(xid(0), oldest_running)
            || has_xmax && (infomask & XMAX_IS_MULTI != 0 || may_run(xid(4), oldest_running));
        if counts {
            return Some(Why::Transactions);
        }
    }
    None
}

/// Whether a transaction is at or behind the oldest that runs, as Postgres compares (`TransactionIdPrecedes`).
fn may_run(xid: u32, oldest_running: u32) -> bool {
    xid >= FIRST_NORMAL_XID && xid.wrapping_sub(oldest_running) as i32 >= 0
}

fn u16_at(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn u32_at(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { redo: Lsn(0x2000), oldest_running: 1000 };

    /// A page with this special space, as redo point and records leave it.
    fn page_with(special: &[u8]) -> Page {
        let mut page = ZERO_PAGE;
        page::init(&mut page, special.len());
        page[BLCKSZ - special.len()..].copy_from_slice(special);
        page::set_lsn(&mut page, Lsn(0x1000));
        page
    }

    /// Special space that ends so.
    fn ending<const N: usize>(last: u16) -> [u8; N] {
        let mut special = [0; N];
        special[N - 2..].copy_from_slice(&last.to_le_bytes());
        special
    }

    /// A page of the heap with a tuple for each of these.
    fn heap(tuples: &[(u32, u32, u16)]) -> Page {
        let mut page = page_with(&[]);
        for (number, (xmin, xmax, infomask)) in tuples.iter().enumerate() {
            let offset = BLCKSZ - (number + 1) * 32;
            let pointer = offset as u32 | 1 << 15 | 32 << 17;
            let at = PAGE_HEADER_SIZE + number * 4;
            page[at..at + 4].copy_from_slice(&pointer.to_le_bytes());
            page[offset..offset + 4].copy_from_slice(&xmin.to_le_bytes());
            page[offset + 4..offset + 8].copy_from_slice(&xmax.to_le_bytes());
            page[offset + INFOMASK..offset + INFOMASK + 2].copy_from_slice(&infomask.to_le_bytes());
            page::set_lower(&mut page, (at + 4) as u16);
            page::set_upper(&mut page, offset as u16);
        }
        page
    }

    fn of(page: &Page) -> Verdict {
        verdict(page, &TERMS)
    }

    #[test]
    fn a_page_of_the_heap_goes_when_nobody_who_is_on_it_may_run() {
        let stays = Verdict::Stays(Why::Transactions);
        for (tuple, expected, what) in [
            ((999, 0, 0), Verdict::Goes, "inserted by one that has ended"),
            ((1000, 0, 0), stays, "inserted by the oldest that runs"),
            ((1001, 0, 0x0100), stays, "hints count for nothing"),
            ((1001, 0, 0x0300), Verdict::Goes, "frozen"),
            ((1001, 0, 0x0200), stays, "of one that failed, and stays until all before have ended"),
            ((5, 1000, 0), stays, "deleted or locked by one that runs"),
            ((5, 999, 0), Verdict::Goes, "deleted by one that has ended"),
            ((5, 1000, XMAX_INVALID), Verdict::Goes, "nobody deletes it"),
            ((5, 7, XMAX_IS_MULTI), stays, "a multixact"),
            ((5, 7, XMAX_IS_MULTI | XMAX_INVALID), Verdict::Goes, "a multixact that is over"),
            ((2, 0, 0), Verdict::Goes, "frozen, as long ago"),
            ((5, 0, 0x4000), stays, "moved"),
        ] {
            assert_eq!(of(&heap(&[(5, 0, XMAX_INVALID), tuple])), expected, "{what}");
        }
    }

    #[test]
    fn transactions_are_compared_as_postgres_does() {
        let around = Terms { oldest_running: 10, ..TERMS };
        assert_eq!(verdict(&heap(&[(u32::MAX - 5, 0, 0)]), &around), Verdict::Goes, "before the numbers began anew");
        let before = Terms { oldest_running: u32::MAX - 5, ..TERMS };
        assert_eq!(verdict(&heap(&[(10, 0, 0)]), &before), Verdict::Stays(Why::Transactions), "after that");
    }

    #[test]
    fn line_pointers_without_a_tuple_do_not_count_and_bad_ones_stay() {
        let mut page = heap(&[(1001, 0, 0)]);
        for flags in [0, 2, 3] {
            page[PAGE_HEADER_SIZE..PAGE_HEADER_SIZE + 4].copy_from_slice(&(8160_u32 | flags << 15).to_le_bytes());
            assert_eq!(of(&page), Verdict::Goes, "flags {flags}");
        }
        for pointer in [8160 | 1 << 15 | 4 << 17, 100 | 1 << 15 | 32 << 17, 8188 | 1 << 15 | 32 << 17] {
            page[PAGE_HEADER_SIZE..PAGE_HEADER_SIZE + 4].copy_from_slice(&u32::to_le_bytes(pointer));
            assert_eq!(of(&page), Verdict::Stays(Why::Unknown), "{pointer:x}");
        }
        page::set_lower(&mut page, 26);
        assert_eq!(of(&page), Verdict::Stays(Why::Unknown), "half a line pointer");
    }

    #[test]
    fn a_page_of_a_btree_goes_without_a_cycle_id() {
        assert_eq!(of(&page_with(&ending::<16>(0))), Verdict::Goes);
        for id in [1, BTREE_CYCLE_ID_MAX] {
            assert_eq!(of(&page_with(&ending::<16>(id))), Verdict::Stays(Why::Vacuum), "{id}");
        }
    }

    #[test]
    fn what_is_not_in_wal_stays() {
        for lsn in [0, 1, 0x2001] {
            let mut page = page_with(&ending::<16>(GIST_PAGE_ID));
            page::set_lsn(&mut page, Lsn(lsn));
            assert_eq!(of(&page), Verdict::Stays(Why::NotLogged), "LSN {lsn:x}");
        }
        assert_eq!(of(&ZERO_PAGE), Verdict::Stays(Why::Zeros));
    }

    #[test]
    fn kinds_of_pages_are_known_by_their_ends() {
        for id in [HASH_PAGE_ID, GIST_PAGE_ID] {
            assert_eq!(of(&page_with(&ending::<16>(id))), Verdict::Goes, "{id:x}");
        }
        for id in [SPGIST_PAGE_ID, BLOOM_PAGE_ID, 0xF091, 0xF092, 0xF093, 0, 3, 0x83] {
            assert_eq!(of(&page_with(&ending::<8>(id))), Verdict::Goes, "{id:x}");
        }
        let unknown = Verdict::Stays(Why::Unknown);
        assert_eq!(of(&page_with(&[0x17, 0x17, 0, 0, 0, 0, 0, 0])), unknown, "a sequence");
        assert_eq!(of(&page_with(&ending::<8>(0xFF90))), unknown, "an extension's");
        assert_eq!(of(&page_with(&ending::<16>(0xFF82))), unknown);
        assert_eq!(of(&page_with(&ending::<24>(0))), unknown);
        let mut torn = page_with(&[]);
        page::set_upper(&mut torn, 0);
        assert_eq!(of(&torn), unknown, "no page of Postgres's");
    }
}
