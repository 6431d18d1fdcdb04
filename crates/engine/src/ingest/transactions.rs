//! Ends of transactions, prepared transactions, and the progress of replication origins.

use std::collections::HashMap;

use bytes::Bytes;
use varve_postgres::two_phase::Prepared;
use varve_postgres::wal::Record;
use varve_postgres::wal::records::replication_origin::OriginRecord;
use varve_postgres::wal::records::xact::{Completion, XactRecord};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::replication_origin;
use varve_storage::value::Value;

use super::{Ingest, IngestError};

/// `TRANSACTION_STATUS_COMMITTED`.
const COMMITTED: u8 = 1;
/// `TRANSACTION_STATUS_ABORTED`.
const ABORTED: u8 = 2;
/// `DoNotReplicateId`, an origin without progress.
const DO_NOT_REPLICATE: u16 = u16::MAX;

/// How far each replication origin was replayed, at the newest LSN. There are at most 65,535.
#[derive(Debug)]
pub(super) struct OriginProgress {
    remote: HashMap<u16, Lsn>,
}

impl OriginProgress {
    pub(super) fn open(history: &(impl History + ?Sized), at: Lsn) -> Result<OriginProgress, HistoryError> {
        let (from, to) = Key::all_of_kind(Key::replication_origin(0));
        let mut remote = HashMap::new();
        history.scan(from, to, at, &mut |key, value| {
            let Some(KeyKind::ReplicationOrigin { origin }) = key.kind() else { return Ok(()) };
            let position = replication_origin::decode(&value);
            remote.insert(origin, position.ok_or_else(|| HistoryError(format!("the value of the {key} at {at} is malformed")))?);
            Ok(())
        })?;
        Ok(OriginProgress { remote })
    }
}

impl Ingest {
    pub(super) fn ingest_transaction(&mut self, record: &Record<'_>, parsed: XactRecord) -> Result<Option<Timestamp>, IngestError> {
        match parsed {
            XactRecord::Commit(done) => self.end_transaction(record, record.header.xid, &done, COMMITTED).map(Some),
            XactRecord::Abort(done) => self.end_transaction(record, record.header.xid, &done, ABORTED).map(Some),
            XactRecord::CommitPrepared(done) => self.end_prepared(record, &done, COMMITTED).map(Some),
            XactRecord::AbortPrepared(done) => self.end_prepared(record, &done, ABORTED).map(Some),
            XactRecord::Prepare => {
                let prepared = Prepared::decode(record.main_data, self.major).map_err(|what| IngestError::malformed(record, what))?;
                self.advance_next_xid(prepared.xid);
                for xid in &prepared.subxids {
                    self.advance_next_xid(*xid);
                }
                let key = Key::two_phase(self.full_xid(prepared.xid));
                self.put(key, record.end, Value::Image(Bytes::copy_from_slice(record.main_data)))?;
                Ok(None)
            }
            XactRecord::Assignment { top, subxids } => {
                self.advance_next_xid(top);
                for xid in subxids {
                    self.advance_next_xid(xid);
                }
                Ok(None)
            }
            XactRecord::Invalidations => Ok(None),
        }
    }

    fn end_prepared(&mut self, record: &Record<'_>, done: &Completion, status: u8) -> Result<Timestamp, IngestError> {
        let xid = done.two_phase_xid.unwrap_or_default();
        let time = self.end_transaction(record, xid, done, status)?;
        self.put(Key::two_phase(self.full_xid(xid)), record.end, Value::Absent)?;
        Ok(time)
    }

    /// `xact_redo_commit` and `xact_redo_abort`.
    fn end_transaction(&mut self, record: &Record<'_>, xid: u32, done: &Completion, status: u8) -> Result<Timestamp, IngestError> {
        if xid == 0 {
            return Err(IngestError::malformed(record, "the end of a transaction without an id"));
        }
        let lsn = record.end;
        self.advance_next_xid(xid);
        for xid in &done.subxids {
            self.advance_next_xid(*xid);
        }
        let origin = record.origin.unwrap_or_default();
        if status == COMMITTED {
            let time = done.origin.map_or(done.time, |(_, time)| time);
            self.set_commit_ts(time, origin, xid, &done.subxids, lsn)?;
        }
        self.set_clog_status(status, xid, &done.subxids, lsn)?;
        if let Some((remote, _)) = done.origin {
            self.advance_origin(origin, remote, false, lsn)?;
        }
        for node in &done.dropped {
            self.drop_relation(*node, lsn)?;
        }
        Ok(done.time)
    }

    /// `replorigin_advance`.
    fn advance_origin(&mut self, origin: u16, remote: Lsn, backwards: bool, lsn: Lsn) -> Result<(), IngestError> {
        if origin == DO_NOT_REPLICATE || origin == 0 {
            return Ok(());
        }
        let known = self.origins.remote.entry(origin).or_default();
        if backwards || *known < remote {
            *known = remote;
            self.put(Key::replication_origin(origin), lsn, Value::Image(replication_origin::encode(remote)))?;
        }
        Ok(())
    }

    pub(super) fn ingest_origin(&mut self, record: &Record<'_>, parsed: OriginRecord) -> Result<(), IngestError> {
        match parsed {
            OriginRecord::Set { origin, remote, force } => self.advance_origin(origin, remote, force, record.end),
            OriginRecord::Drop { origin } => {
                if self.origins.remote.remove(&origin).is_some() {
                    self.put(Key::replication_origin(origin), record.end, Value::Absent)?;
                }
                Ok(())
            }
        }
    }
}
