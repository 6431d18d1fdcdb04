//! The checkpoint fields: counters and settings that a server finds when it starts, kept from every record that moves
//! them as Postgres's own redo does (`xlog_redo` and its callees).

use varve_postgres::control::{CheckPoint, WalLevel};
use varve_postgres::wal::Record;
use varve_postgres::wal::records::standby::StandbyRecord;
use varve_postgres::wal::records::xlog::XlogRecord;

use super::{Ingest, IngestError};

/// `FirstNormalTransactionId`: the ids below it are never given out.
pub(super) const FIRST_NORMAL_XID: u32 = 3;
/// `FirstMultiXactId`.
pub(super) const FIRST_MULTI: u32 = 1;

/// Whether `a` comes before `b` in a space of 32-bit numbers that wraps around.
pub(super) fn precedes(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// `TransactionIdPrecedes`: the special ids come before all others.
fn xid_precedes(a: u32, b: u32) -> bool {
    if a < FIRST_NORMAL_XID || b < FIRST_NORMAL_XID { a < b } else { precedes(a, b) }
}

/// The multixact after `multi`.
pub(super) fn next_multi(multi: u32) -> u32 {
    multi.wrapping_add(1).max(FIRST_MULTI)
}

/// The transaction `xid` with its epoch, given the next one: it is at most that one, and within half of the number
/// space.
fn full_xid(xid: u32, next: u64) -> u64 {
    let epoch = next >> 32;
    let epoch = if xid > next as u32 { epoch.saturating_sub(1) } else { epoch };
    epoch << 32 | u64::from(xid)
}

impl Ingest {
    /// `AdvanceNextFullTransactionIdPastXid`.
    pub(super) fn advance_next_xid(&mut self, xid: u32) {
        let next = self.fields.next_xid;
        if xid < FIRST_NORMAL_XID || precedes(xid, next as u32) {
            return;
        }
        let after = xid.wrapping_add(1);
        let after = if after < FIRST_NORMAL_XID { FIRST_NORMAL_XID } else { after };
        let epoch = (next >> 32) + u64::from(after < next as u32);
        // That it moved is told by the WAL index, not by a new version of the fields.
        self.fields.next_xid = epoch << 32 | u64::from(after);
    }

    /// The transaction `xid` with its epoch.
    pub(super) fn full_xid(&self, xid: u32) -> u64 {
        full_xid(xid, self.fields.next_xid)
    }

    /// `MultiXactAdvanceNextMXact`.
    pub(super) fn advance_next_multi(&mut self, multi: u32, offset: u32) {
        if precedes(self.fields.next_multi, multi) {
            self.fields.next_multi = multi;
            self.fields_changed = true;
        }
        if precedes(self.fields.next_multi_offset, offset) {
            self.fields.next_multi_offset = offset;
            self.fields_changed = true;
        }
    }

    pub(super) fn ingest_xlog(&mut self, record: &Record<'_>, parsed: &XlogRecord) -> Result<(), IngestError> {
        match parsed {
            XlogRecord::CheckpointShutdown(checkpoint) => {
                self.refuse_minimal(record, checkpoint.wal_level)?;
                self.upkeep_free_space(record.end)?;
                // Nothing ran, so the counters are exact.
                let fields = &mut self.fields;
                fields.next_xid = checkpoint.next_xid;
                fields.next_oid = checkpoint.next_oid;
                (fields.next_multi, fields.next_multi_offset) = (checkpoint.next_multi, checkpoint.next_multi_offset);
                (fields.oldest_xid, fields.oldest_xid_db) = (checkpoint.oldest_xid, checkpoint.oldest_xid_db);
                self.take_from_any_checkpoint(checkpoint);
            }
            XlogRecord::CheckpointOnline(checkpoint) => {
                self.refuse_minimal(record, checkpoint.wal_level)?;
                self.upkeep_free_space(record.end)?;
                // The counters are those of when it began, so they are minima; object ids are told by records of their
                // own.
                self.fields.next_xid = self.fields.next_xid.max(checkpoint.next_xid);
                self.advance_next_multi(checkpoint.next_multi, checkpoint.next_multi_offset);
                if !xid_precedes(checkpoint.oldest_xid, self.fields.oldest_xid) {
                    (self.fields.oldest_xid, self.fields.oldest_xid_db) = (checkpoint.oldest_xid, checkpoint.oldest_xid_db);
                }
                self.take_from_any_checkpoint(checkpoint);
            }
            XlogRecord::NextOid(next_oid) => {
                self.fields.next_oid = *next_oid;
                self.fields_changed = true;
            }
            XlogRecord::ParameterChange(parameters) => {
                if parameters.wal_level == WalLevel::Minimal as i32 {
                    return Err(IngestError::MinimalWal { lsn: record.start });
                }
                self.track_commit_timestamps(parameters.track_commit_timestamp, record.end)?;
                self.fields.parameters = *parameters;
                self.fields_changed = true;
            }
            XlogRecord::FullPageWritesChange(on) => {
                self.fields.full_page_writes = *on;
                self.fields_changed = true;
            }
            XlogRecord::EndOfRecovery { wal_level: Some(wal_level), .. } | XlogRecord::CheckpointRedo { wal_level } => {
                self.refuse_minimal(record, *wal_level)?;
            }
            XlogRecord::EndOfRecovery { wal_level: None, .. }
            | XlogRecord::Noop
            | XlogRecord::Switch
            | XlogRecord::BackupEnd(_)
            | XlogRecord::RestorePoint
            | XlogRecord::OverwriteContrecord { .. }
            // Their blocks are images.
            | XlogRecord::FullPageImages
            | XlogRecord::FullPageImagesForHint => {}
        }
        Ok(())
    }

    fn take_from_any_checkpoint(&mut self, checkpoint: &CheckPoint) {
        // Where they are the same, the database may still be another.
        if !precedes(checkpoint.oldest_multi, self.fields.oldest_multi) {
            (self.fields.oldest_multi, self.fields.oldest_multi_db) = (checkpoint.oldest_multi, checkpoint.oldest_multi_db);
        }
        // Redo only follows truncations here, but the primary forgets old timestamps before it truncates.
        let (known, oldest) = (self.fields.oldest_commit_ts_xid, checkpoint.oldest_commit_ts_xid);
        if known != 0 && oldest != 0 && precedes(known, oldest) {
            self.fields.oldest_commit_ts_xid = oldest;
        }
        self.fields.full_page_writes = checkpoint.full_page_writes;
        self.fields_changed = true;
    }

    fn refuse_minimal(&self, record: &Record<'_>, wal_level: i32) -> Result<(), IngestError> {
        if self.major.checkpoint_has_wal_level() && wal_level == WalLevel::Minimal as i32 {
            return Err(IngestError::MinimalWal { lsn: record.start });
        }
        Ok(())
    }

    pub(super) fn ingest_standby(&mut self, record: &Record<'_>, parsed: StandbyRecord) -> Result<(), IngestError> {
        if let StandbyRecord::RunningXacts { next_xid, xids } = parsed {
            // Ids that were given out and have written nothing yet must not be given out again.
            let last = if next_xid == FIRST_NORMAL_XID { u32::MAX } else { next_xid.wrapping_sub(1) };
            self.advance_next_xid(last);
            for xid in xids {
                self.advance_next_xid(xid);
            }
            self.upkeep_free_space(record.end)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_follow_the_next_transaction() {
        assert_eq!(full_xid(5, 1 << 32 | 10), 1 << 32 | 5);
        assert_eq!(full_xid(4_000_000_000, 1 << 32 | 10), 4_000_000_000, "of the epoch before");
        assert_eq!(full_xid(4_000_000_000, 10), 4_000_000_000, "never below zero");
    }

    #[test]
    fn special_transactions_come_first() {
        assert!(xid_precedes(2, 4_000_000_000));
        assert!(precedes(4_000_000_000, 5));
        assert_eq!(next_multi(u32::MAX), 1);
    }
}
