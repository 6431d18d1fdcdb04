//! Writes the WAL index ([`varve_storage::wal_index`]) as records come.
//!
//! A page's value grows with each record that ends on it, so it is written once for each batch and not for each record.
//! It is written at the end of the *first* record of the batch that is on it: whatever LSN somebody reads at, the value
//! found there names all records up to that LSN, and perhaps later ones, which readers leave out.

use bytes::Bytes;
use varve_postgres::{Lsn, Timestamp};
use varve_storage::history::{History, HistoryError};
use varve_storage::key::Key;
use varve_storage::wal_index::{Boundary, WalIndexBuilder, page_of};

use crate::moments;

/// Pages that may wait for the end of the batch (512 KiB of WAL); then the batch ends by itself.
const PENDING_PAGES_MAX: usize = 64;

/// See the module's doc.
pub(super) struct IndexWriter {
    builder: WalIndexBuilder,
    /// Where the builder's page is to be written; nothing is new on it if there is none.
    write_at: Option<Lsn>,
    pending: Vec<(Key, Lsn, Bytes)>,
    /// The page was read from what may be an ancestor's value, which names records that are not ours: it must be
    /// written with the next record.
    inherited: bool,
}

impl IndexWriter {
    /// Goes on at the boundary `at`.
    pub(super) fn open(history: &(impl History + ?Sized), at: Lsn) -> Result<IndexWriter, HistoryError> {
        let page = page_of(at);
        let read = moments::index_page(history, page, at)?;
        let read = read.filter(|read| read.boundaries.iter().any(|boundary| boundary.end == at));
        let read = read.ok_or_else(|| HistoryError(format!("the WAL index has no record that ends at {at}: it is no record boundary")))?;
        Ok(IndexWriter { builder: WalIndexBuilder::resume(page, &read, at), write_at: None, pending: Vec::new(), inherited: true })
    }

    pub(super) fn last(&self) -> Boundary {
        self.builder.last()
    }

    pub(super) fn push(&mut self, end: Lsn, start: Lsn, next_xid: u64, time: Option<Timestamp>) {
        if std::mem::take(&mut self.inherited) {
            self.write_at = Some(end);
        }
        if page_of(end) != self.builder.page() {
            self.finish_page();
            self.builder = WalIndexBuilder::new(page_of(end), self.builder.last());
        }
        self.write_at.get_or_insert(end);
        let added = self.builder.push(end, start, next_xid, time);
        debug_assert!(added, "the record's end {end} is on the page and later than the last");
    }

    /// Whether the batch should end.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= PENDING_PAGES_MAX
    }

    /// What is to be written at the end of a batch.
    pub(super) fn take_pending(&mut self) -> Vec<(Key, Lsn, Bytes)> {
        self.finish_page();
        std::mem::take(&mut self.pending)
    }

    fn finish_page(&mut self) {
        if let Some(lsn) = self.write_at.take() {
            self.pending.push((Key::wal_index(self.builder.page()), lsn, self.builder.encode()));
        }
    }
}
