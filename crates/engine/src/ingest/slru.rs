//! SLRU areas: `pg_xact`, multixact offsets and members, `pg_commit_ts`.

use bytes::Bytes;
use smallvec::{SmallVec, smallvec};
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::slru::{
    CLOG_XACTS_PER_PAGE, COMMIT_TS_XACTS_PER_PAGE, MULTIXACT_MEMBERS_PER_PAGE, MULTIXACT_OFFSETS_PER_PAGE, PAGES_PER_SEGMENT, SlruKind,
};
use varve_postgres::wal::Record;
use varve_postgres::wal::records::clog::ClogRecord;
use varve_postgres::wal::records::commit_ts::CommitTsRecord;
use varve_postgres::wal::records::multixact::MultiXactRecord;
use varve_postgres::{BLCKSZ, Lsn, Timestamp};
use varve_redo::change::{Change, Xids};
use varve_storage::history::{History, HistoryError};
use varve_storage::key::Key;
use varve_storage::relation;
use varve_storage::slru_extent::SlruExtent;
use varve_storage::value::Value;

use super::counters::{FIRST_MULTI, FIRST_NORMAL_XID, next_multi, precedes};
use super::{Ingest, IngestError};

static ZEROS: [u8; BLCKSZ] = ZERO_PAGE;
/// Pages in the area of multixact members, which has as many members as there are 32-bit numbers.
const MEMBER_PAGES: u32 = u32::MAX / MULTIXACT_MEMBERS_PER_PAGE + 1;

/// Which pages of each area exist at the newest LSN.
#[derive(Debug)]
pub(super) struct SlruAreas {
    extents: [SlruExtent; SlruKind::ALL.len()],
}

impl SlruAreas {
    pub(super) fn open(history: &(impl History + ?Sized), at: Lsn) -> Result<SlruAreas, HistoryError> {
        let mut extents: [SlruExtent; SlruKind::ALL.len()] = Default::default();
        for (area, extent) in SlruKind::ALL.into_iter().zip(&mut extents) {
            *extent = relation::slru_extent(history, area, at)?;
        }
        Ok(SlruAreas { extents })
    }

    fn extent(&mut self, area: SlruKind) -> &mut SlruExtent {
        &mut self.extents[usize::from(area.number())]
    }
}

/// Whether `a` comes before `b` in an area that wraps around with its 32-bit numbers (`CLOGPagePrecedes` and its like).
fn page_precedes(area: SlruKind, a: u32, b: u32) -> bool {
    let per_page = match area {
        SlruKind::Clog => CLOG_XACTS_PER_PAGE,
        SlruKind::CommitTs => COMMIT_TS_XACTS_PER_PAGE,
        SlruKind::MultiXactOffsets => MULTIXACT_OFFSETS_PER_PAGE,
        SlruKind::MultiXactMembers => MULTIXACT_MEMBERS_PER_PAGE,
    };
    let first = |page: u32| page.wrapping_mul(per_page).wrapping_add(FIRST_NORMAL_XID + 1);
    precedes(first(a), first(b)) && precedes(first(a), first(b).wrapping_add(per_page - 1))
}

/// Pairs of a page and the ids on it, in order of first appearance.
fn by_page(ids: impl Iterator<Item = u32>, per_page: u32) -> SmallVec<[(u32, Xids); 1]> {
    let mut pages: SmallVec<[(u32, Xids); 1]> = SmallVec::new();
    for id in ids {
        let page = id / per_page;
        match pages.iter_mut().rev().find(|(have, _)| *have == page) {
            Some((_, ids)) => ids.push(id),
            None => pages.push((page, smallvec![id])),
        }
    }
    pages
}

impl Ingest {
    /// Makes page `page` all zeros, and existing.
    fn zero_slru_page(&mut self, area: SlruKind, page: u32, lsn: Lsn) -> Result<(), IngestError> {
        let end = page.checked_add(1).ok_or_else(|| HistoryError(format!("page {page} of {area} cannot exist")))?;
        self.put(Key::slru_page(area, page), lsn, Value::Image(Bytes::from_static(&ZEROS)))?;
        let extent = self.slru.extent(area);
        if extent.insert(page..end) {
            let value = extent.encode();
            self.put(Key::slru_extent(area), lsn, Value::Image(value))?;
        }
        Ok(())
    }

    fn change_slru_page(&mut self, area: SlruKind, page: u32, change: &Change<'_>, lsn: Lsn) -> Result<(), IngestError> {
        // Redo takes a page that is not there for zeros (`SlruPhysicalReadPage` in recovery).
        if !self.slru.extent(area).contains(page) {
            self.zero_slru_page(area, page, lsn)?;
        }
        self.put(Key::slru_page(area, page), lsn, Value::Change { will_init: false, bytes: change.encode() })?;
        Ok(())
    }

    /// Removes the segments of which `is_removed` says so, given their first and last page.
    fn remove_segments(&mut self, area: SlruKind, lsn: Lsn, is_removed: impl Fn(u32, u32) -> bool) -> Result<(), IngestError> {
        let extent = self.slru.extent(area);
        let segments: Vec<u32> =
            extent.intervals().iter().flat_map(|pages| pages.start / PAGES_PER_SEGMENT..=(pages.end - 1) / PAGES_PER_SEGMENT).collect();
        let mut changed = false;
        for first in segments.into_iter().map(|segment| segment * PAGES_PER_SEGMENT) {
            let last = first.saturating_add(PAGES_PER_SEGMENT - 1);
            if is_removed(first, last) {
                changed |= extent.remove(first..last.saturating_add(1));
            }
        }
        if changed {
            let value = extent.encode();
            self.put(Key::slru_extent(area), lsn, Value::Image(value))?;
        }
        Ok(())
    }

    /// `SimpleLruTruncate`: removes segments that lie wholly before the page `cutoff`. `newest` is the page in use.
    fn truncate_slru(&mut self, area: SlruKind, cutoff: u32, newest: u32, lsn: Lsn) -> Result<(), IngestError> {
        if page_precedes(area, newest, cutoff) {
            return Ok(()); // "apparent wraparound"
        }
        self.remove_segments(area, lsn, |first, last| page_precedes(area, first, cutoff) && page_precedes(area, last, cutoff))
    }

    /// `TransactionIdSetTreeStatus`: 1 committed, 2 aborted.
    pub(super) fn set_clog_status(&mut self, status: u8, xid: u32, subxids: &[u32], lsn: Lsn) -> Result<(), IngestError> {
        for (page, xids) in by_page(std::iter::once(xid).chain(subxids.iter().copied()), CLOG_XACTS_PER_PAGE) {
            self.change_slru_page(SlruKind::Clog, page, &Change::ClogStatus { status, xids }, lsn)?;
        }
        Ok(())
    }

    /// `TransactionTreeSetCommitTsData`.
    pub(super) fn set_commit_ts(&mut self, time: Timestamp, origin: u16, xid: u32, subxids: &[u32], lsn: Lsn) -> Result<(), IngestError> {
        if !self.fields.parameters.track_commit_timestamp {
            return Ok(());
        }
        let mut newest = self.fields.newest_commit_ts_xid;
        for (page, xids) in by_page(std::iter::once(xid).chain(subxids.iter().copied()), COMMIT_TS_XACTS_PER_PAGE) {
            newest = xids.iter().fold(newest, |newest, xid| if newest == 0 || precedes(newest, *xid) { *xid } else { newest });
            self.change_slru_page(SlruKind::CommitTs, page, &Change::CommitTs { time: time.0, origin, xids }, lsn)?;
        }
        self.fields.newest_commit_ts_xid = newest;
        self.fields_changed = true;
        Ok(())
    }

    /// `CommitTsParameterChange`.
    pub(super) fn track_commit_timestamps(&mut self, on: bool, lsn: Lsn) -> Result<(), IngestError> {
        let was_on = self.fields.parameters.track_commit_timestamp;
        if on && !was_on {
            let next = self.fields.next_xid as u32;
            if self.fields.oldest_commit_ts_xid == 0 {
                (self.fields.oldest_commit_ts_xid, self.fields.newest_commit_ts_xid) = (next, next);
            }
            let page = next / COMMIT_TS_XACTS_PER_PAGE;
            if !self.slru.extent(SlruKind::CommitTs).contains(page) {
                self.zero_slru_page(SlruKind::CommitTs, page, lsn)?;
            }
        } else if !on && was_on {
            (self.fields.oldest_commit_ts_xid, self.fields.newest_commit_ts_xid) = (0, 0);
            self.remove_segments(SlruKind::CommitTs, lsn, |_, _| true)?;
        }
        Ok(())
    }

    pub(super) fn ingest_clog(&mut self, record: &Record<'_>, parsed: ClogRecord) -> Result<(), IngestError> {
        match parsed {
            ClogRecord::ZeroPage { page } => self.zero_slru_page(SlruKind::Clog, page, record.end),
            ClogRecord::Truncate { page, oldest_xid, oldest_xid_db } => {
                // The status of older transactions is gone, so no start may take an older one for the oldest.
                if precedes(self.fields.oldest_xid, oldest_xid) {
                    (self.fields.oldest_xid, self.fields.oldest_xid_db) = (oldest_xid, oldest_xid_db);
                    self.fields_changed = true;
                }
                let newest = self.fields.next_xid as u32 / CLOG_XACTS_PER_PAGE;
                self.truncate_slru(SlruKind::Clog, page, newest, record.end)
            }
        }
    }

    pub(super) fn ingest_commit_ts(&mut self, record: &Record<'_>, parsed: CommitTsRecord) -> Result<(), IngestError> {
        match parsed {
            CommitTsRecord::ZeroPage { page } => self.zero_slru_page(SlruKind::CommitTs, page, record.end),
            CommitTsRecord::Truncate { page, oldest_xid } => {
                // `AdvanceOldestCommitTsXid`.
                let oldest = self.fields.oldest_commit_ts_xid;
                if oldest != 0 && precedes(oldest, oldest_xid) {
                    self.fields.oldest_commit_ts_xid = oldest_xid;
                    self.fields_changed = true;
                }
                let newest = self.fields.next_xid as u32 / COMMIT_TS_XACTS_PER_PAGE;
                self.truncate_slru(SlruKind::CommitTs, page, newest, record.end)
            }
        }
    }

    pub(super) fn ingest_multixact(&mut self, record: &Record<'_>, parsed: MultiXactRecord) -> Result<(), IngestError> {
        let lsn = record.end;
        match parsed {
            MultiXactRecord::ZeroOffsetsPage { page } => {
                // A page that is there already was made with the multixact before its first one, and has that one's
                // offset.
                if self.slru.extent(SlruKind::MultiXactOffsets).contains(page) {
                    return Ok(());
                }
                self.zero_slru_page(SlruKind::MultiXactOffsets, page, lsn)
            }
            MultiXactRecord::ZeroMembersPage { page } => self.zero_slru_page(SlruKind::MultiXactMembers, page, lsn),
            MultiXactRecord::Create { multi, offset, members } => self.create_multixact(multi, offset, &members, lsn),
            MultiXactRecord::Truncate { oldest_multi_db, multis_to, members_from, members_to, .. } => {
                (self.fields.oldest_multi, self.fields.oldest_multi_db) = (multis_to, oldest_multi_db);
                self.fields_changed = true;
                let segment = |offset: u32| offset / MULTIXACT_MEMBERS_PER_PAGE / PAGES_PER_SEGMENT;
                let (from, to) = (segment(members_from), segment(members_to));
                self.remove_segments(SlruKind::MultiXactMembers, lsn, |first, _| {
                    let segment = first / PAGES_PER_SEGMENT;
                    if from <= to { (from..to).contains(&segment) } else { segment >= from || segment < to }
                })?;
                // `PerformOffsetsTruncation` steps one back, since the page of the next multixact may not exist.
                let previous = if multis_to <= FIRST_MULTI { u32::MAX } else { multis_to - 1 };
                let newest = self.fields.next_multi / MULTIXACT_OFFSETS_PER_PAGE;
                self.truncate_slru(SlruKind::MultiXactOffsets, previous / MULTIXACT_OFFSETS_PER_PAGE, newest, lsn)
            }
        }
    }

    /// `RecordNewMultiXact` of the newest minors, which also sets where the next multixact begins, whatever minor wrote
    /// the record: otherwise a reader of this multixact could wait for a next one that a crash made impossible.
    fn create_multixact(&mut self, multi: u32, offset: u32, members: &[(u32, u8)], lsn: Lsn) -> Result<(), IngestError> {
        let next = next_multi(multi);
        let end = match offset.wrapping_add(members.len() as u32) {
            0 => 1, // offset 0 means none
            end => end,
        };
        for (multi, offset) in [(multi, offset), (next, end)] {
            let page = multi / MULTIXACT_OFFSETS_PER_PAGE;
            self.change_slru_page(SlruKind::MultiXactOffsets, page, &Change::MultiXactOffset { multi, offset }, lsn)?;
        }
        let mut rest = members;
        let mut first = offset;
        while !rest.is_empty() {
            let page = first / MULTIXACT_MEMBERS_PER_PAGE;
            let left = if page + 1 == MEMBER_PAGES { u32::MAX - first + 1 } else { (page + 1) * MULTIXACT_MEMBERS_PER_PAGE - first };
            let (now, later) = rest.split_at(rest.len().min(left as usize));
            let change = Change::MultiXactMembers { first, members: now.to_vec() };
            self.change_slru_page(SlruKind::MultiXactMembers, page, &change, lsn)?;
            first = first.wrapping_add(now.len() as u32);
            rest = later;
        }
        self.advance_next_multi(next, end);
        for (xid, _) in members {
            self.advance_next_xid(*xid);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_an_area_wrap_around() {
        let clog_pages = u32::MAX / CLOG_XACTS_PER_PAGE + 1;
        assert!(page_precedes(SlruKind::Clog, 0, 1));
        assert!(!page_precedes(SlruKind::Clog, 1, 0));
        assert!(!page_precedes(SlruKind::Clog, 5, 5));
        assert!(page_precedes(SlruKind::Clog, clog_pages - 1, 0), "the last page comes before the first again");
        assert!(!page_precedes(SlruKind::Clog, 0, clog_pages - 1));
    }

    #[test]
    fn ids_are_grouped_by_page() {
        let ids = [10, 11, CLOG_XACTS_PER_PAGE, 12].into_iter();
        let expected: [(u32, Xids); 2] = [(0, smallvec![10, 11, 12]), (1, smallvec![CLOG_XACTS_PER_PAGE])];
        assert_eq!(by_page(ids, CLOG_XACTS_PER_PAGE)[..], expected);
    }
}
