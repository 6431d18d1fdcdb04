//! Ingest: takes WAL records, in order, and writes what each changes into a timeline's history.
//!
//! A record becomes versions of keys, all at the LSN where the record ends:
//!
//! | what the record does | versions | module |
//! |---|---|---|
//! | names relation blocks | an image or a trimmed record for each; clears of visibility maps that it does not name | [`blocks`] |
//! | touches, creates, cuts or drops a fork | the fork's size, with its floors | [`sizes`] |
//! | ends or prepares a transaction | `pg_xact` and `pg_commit_ts` pages, two-phase files, dropped relations, replication origins | [`transactions`] |
//! | changes an SLRU area | its pages and which of them exist | [`slru`] |
//! | creates, copies or drops a database or tablespace, or maps catalogs | their entries, copies of every relation | [`databases`] |
//! | moves a counter or setting that a server finds at start | the checkpoint fields | [`counters`] |
//! | anything | its boundary, transaction counter and time in the WAL index | [`index`] |
//!
//! Free-space maps have no WAL; [`free_space`] notes which heap records say something of them, and writes them now and
//! then.
//!
//! Invariants:
//! - A record is handled whole or not at all as far as readers can tell: they see it only after [`Ingest::advance`].
//! - A record that is not understood is never skipped: it is an [`IngestError`], and the ingest stays stopped. What
//!   came before stays readable.
//! - Counters never fall behind: every transaction id that a record names is below the next one.
//! - One [`Ingest`] writes a timeline; it keeps in memory what it would otherwise have to read back for each record
//!   (sizes at the newest LSN, SLRU extents, checkpoint fields), and [`Ingest::open`] reads all of it from the history,
//!   so it may be dropped at any time.

mod blocks;
mod counters;
mod databases;
mod error;
mod free_space;
mod index;
mod sizes;
mod slru;
mod transactions;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::wal::records::{self, RecordError};
use varve_postgres::wal::{FramedRecord, Record, rmgr};
use varve_postgres::{Lsn, Major, Oid, Timestamp};
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::history::{HistoryError, HistoryWriter};
use varve_storage::key::Key;
use varve_storage::value::Value;

pub use error::IngestError;

use free_space::FreeSpaceUpkeep;
use index::IndexWriter;
use sizes::IngestSizes;
use slru::SlruAreas;
use transactions::OriginProgress;

/// Directories of databases that are remembered; beyond it the memory starts anew.
const DIRECTORIES_MAX: usize = 10_000;

/// See the module's doc.
pub struct Ingest {
    history: Arc<dyn HistoryWriter>,
    major: Major,
    /// Readers see everything up to here.
    applied: Lsn,
    /// End of the last record; what lies between `applied` and here is written but not yet to be seen.
    end: Lsn,
    sizes: IngestSizes,
    /// Directories of databases that the history is known to have, applied or not.
    known_directories: HashSet<(Oid, Oid)>,
    slru: SlruAreas,
    fields: CheckpointFields,
    fields_changed: bool,
    origins: OriginProgress,
    index: IndexWriter,
    free_space: FreeSpaceUpkeep,
    stopped: Option<IngestError>,
}

impl Ingest {
    /// An ingest that goes on at `at`, the boundary up to which `history` is applied.
    ///
    /// # Errors
    /// When the history cannot be read, or has no checkpoint or WAL index at `at`.
    pub fn open(history: Arc<dyn HistoryWriter>, at: Lsn) -> Result<Ingest, IngestError> {
        let index = IndexWriter::open(&*history, at)?;
        let fields = history.get(Key::checkpoint(), at)?;
        let fields = fields.and_then(|bytes| CheckpointFields::decode(&bytes));
        let mut fields = fields.ok_or_else(|| HistoryError(format!("the history at {at} has no checkpoint fields")))?;
        fields.next_xid = index.last().next_xid;
        Ok(Ingest {
            major: history.major(),
            applied: at,
            end: at,
            sizes: IngestSizes::default(),
            known_directories: HashSet::new(),
            slru: SlruAreas::open(&*history, at)?,
            fields,
            fields_changed: false,
            origins: OriginProgress::open(&*history, at)?,
            index,
            free_space: FreeSpaceUpkeep::open(&*history, at)?,
            stopped: None,
            history,
        })
    }

    /// Writes what `record` changes. Readers see it after the next [`Self::advance`].
    ///
    /// # Errors
    /// The first thing that cannot be ingested; the same again for every record after it.
    pub fn record(&mut self, record: &FramedRecord) -> Result<(), IngestError> {
        if let Some(error) = &self.stopped {
            return Err(error.clone());
        }
        self.ingest(record).inspect_err(|error| self.stopped = Some(error.clone()))
    }

    /// Makes everything up to the last record that was ingested visible to readers, also when the one after it has
    /// stopped the ingest.
    ///
    /// # Errors
    /// When the history cannot be written, or could not be.
    pub fn advance(&mut self) -> Result<(), IngestError> {
        match &self.stopped {
            Some(error @ IngestError::History(_)) => Err(error.clone()),
            _ => self.publish(),
        }
    }

    /// End of the last record.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Why it stopped, if it did.
    pub fn stopped(&self) -> Option<&IngestError> {
        self.stopped.as_ref()
    }

    fn ingest(&mut self, framed: &FramedRecord) -> Result<(), IngestError> {
        if framed.end <= self.end || framed.start < self.end {
            return Err(IngestError::OutOfOrder { start: framed.start, end: framed.end, expected: self.end });
        }
        if self.applied == self.end {
            self.sizes.shrink();
            if self.known_directories.len() > DIRECTORIES_MAX {
                self.known_directories.clear();
            }
        }
        let record = Record::decode(&framed.bytes, framed.start, framed.end, self.major)?;
        self.advance_next_xid(record.header.xid);
        let time = self.dispatch(&record)?;
        self.ingest_blocks(&record)?;
        if std::mem::take(&mut self.fields_changed) {
            self.put(Key::checkpoint(), record.end, Value::Image(self.fields.encode()))?;
        }
        self.index.push(record.end, record.start, self.fields.next_xid, time);
        self.end = record.end;
        if self.index.is_full() {
            self.publish()?;
        }
        Ok(())
    }

    /// What the record changes besides blocks. Gives when a transaction ended, if the record says so.
    fn dispatch(&mut self, record: &Record<'_>) -> Result<Option<Timestamp>, IngestError> {
        let (info, data, major) = (record.kind(), record.main_data, self.major);
        let refuse = |error: RecordError| IngestError::of_record(record, error);
        match record.header.rmid {
            rmgr::XLOG => self.ingest_xlog(record, &records::xlog::parse(info, data, major).map_err(refuse)?)?,
            rmgr::XACT => return self.ingest_transaction(record, records::xact::parse(info, data, major).map_err(refuse)?),
            rmgr::SMGR => self.ingest_storage(record, records::storage::parse(info, data, major).map_err(refuse)?)?,
            rmgr::CLOG => self.ingest_clog(record, records::clog::parse(info, data, major).map_err(refuse)?)?,
            rmgr::DBASE => self.ingest_database(record, records::database::parse(info, data, major).map_err(refuse)?)?,
            rmgr::TBLSPC => self.ingest_tablespace(record, records::tablespace::parse(info, data, major).map_err(refuse)?)?,
            rmgr::MULTIXACT => self.ingest_multixact(record, records::multixact::parse(info, data, major).map_err(refuse)?)?,
            rmgr::RELMAP => {
                let update = records::relation_map::parse(info, data, major).map_err(refuse)?;
                let file = Bytes::copy_from_slice(update.file);
                self.put(Key::relation_map(update.spc, update.db), record.end, Value::Image(file))?;
            }
            rmgr::STANDBY => self.ingest_standby(record, records::standby::parse(info, data, major).map_err(refuse)?)?,
            rmgr::COMMIT_TS => self.ingest_commit_ts(record, records::commit_ts::parse(info, data, major).map_err(refuse)?)?,
            rmgr::REPLORIGIN => self.ingest_origin(record, records::replication_origin::parse(info, data, major).map_err(refuse)?)?,
            // Only logical decoding reads these.
            rmgr::LOGICALMSG if info == 0 => {}
            rmid if varve_redo::is_supported(major, rmid, info) => {}
            _ => return Err(refuse(RecordError::UnknownType)),
        }
        Ok(None)
    }

    fn put(&self, key: Key, lsn: Lsn, value: Value) -> Result<(), HistoryError> {
        self.history.put(key, lsn, value)
    }

    fn put_page(&self, key: Key, lsn: Lsn, page: &varve_postgres::Page) -> Result<(), HistoryError> {
        self.put(key, lsn, Value::Image(Bytes::copy_from_slice(page)))
    }

    fn publish(&mut self) -> Result<(), IngestError> {
        if self.applied == self.end {
            return Ok(());
        }
        for (key, lsn, value) in self.index.take_pending() {
            self.history.put(key, lsn, Value::Image(value))?;
        }
        self.write_free_space_notes()?;
        self.history.advance(self.end);
        self.applied = self.end;
        Ok(())
    }
}
