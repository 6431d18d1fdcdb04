//! Resource manager Transaction (`access/xact.h`, `access/rmgrdesc/xactdesc.c`).

use super::RecordError;
use crate::fields::{Fields, u32s};
use crate::wal::{Record, RecordHeader, rmgr};
use crate::{Lsn, Major, RelNode, Timestamp};

/// `XLOG_XACT_HAS_INFO`.
const HAS_INFO: u8 = 0x80;
/// `XLOG_XACT_OPMASK`.
const OPMASK: u8 = 0x70;

const HAS_DBINFO: u32 = 1 << 0;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALS: u32 = 1 << 3;
const HAS_TWOPHASE: u32 = 1 << 4;
const HAS_ORIGIN: u32 = 1 << 5;
const HAS_GID: u32 = 1 << 7;
const HAS_DROPPED_STATS: u32 = 1 << 8;
/// `XACT_COMPLETION_APPLY_FEEDBACK`.
const APPLY_FEEDBACK: u32 = 1 << 29;
/// `sizeof(SharedInvalidationMessage)`.
const INVALIDATION_SIZE: usize = 16;

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Completion {
    /// When, by the server's clock; what `recovery_target_time` is compared with.
    pub time: Timestamp,
    /// Its committed (or aborted) subtransactions.
    pub subxids: Vec<u32>,
    /// Relations whose files are dropped.
    pub dropped: Vec<RelNode>,
    /// The transaction, where the record's own is not it: of a prepared one.
    pub two_phase_xid: Option<u32>,
    /// Position and time at the replication origin.
    pub origin: Option<(Lsn, Timestamp)>,
    /// Whoever committed waits until a standby has applied it (`synchronous_commit = remote_apply`).
    pub awaits_apply: bool,
}

/// A record about transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XactRecord {
    /// The record's transaction committed.
    Commit(Completion),
    /// The record's transaction was prepared; the main data is the state that goes into its file.
    Prepare,
    /// The record's transaction, perhaps a subtransaction, was aborted.
    Abort(Completion),
    /// A prepared transaction committed.
    CommitPrepared(Completion),
    /// A prepared transaction was aborted.
    AbortPrepared(Completion),
    /// Subtransactions of a running transaction.
    Assignment {
        /// The transaction.
        top: u32,
        /// Subtransactions.
        subxids: Vec<u32>,
    },
    /// Cache invalidations, for logical decoding.
    Invalidations,
}

/// Whether a record of this type is a commit that tells nothing but its time: no subtransactions, nothing dropped.
#[inline]
pub fn is_plain_commit(info: u8) -> bool {
    info & (OPMASK | HAS_INFO) == 0
}

/// Whether the whole record `bytes` is a commit whose session waits until a standby has applied it
/// (`synchronous_commit = remote_apply`). Cheap for all others.
pub fn awaits_apply(bytes: &[u8], major: Major) -> bool {
    let may = |header: &RecordHeader| header.rmid == rmgr::XACT && header.info & HAS_INFO != 0;
    if !RecordHeader::decode(bytes).is_some_and(|header| may(&header)) {
        return false;
    }
    let Ok(record) = Record::decode(bytes, Lsn::INVALID, Lsn::INVALID, major) else { return false };
    match parse(record.header.info, record.main_data, major) {
        Ok(XactRecord::Commit(done) | XactRecord::CommitPrepared(done)) => done.awaits_apply,
        _ => false,
    }
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<XactRecord, RecordError> {
    match info & OPMASK {
        0x00 => Ok(XactRecord::Commit(completion(info, data, major, true)?)),
        0x10 => Ok(XactRecord::Prepare),
        0x20 => Ok(XactRecord::Abort(completion(info, data, major, false)?)),
        0x30 => Ok(XactRecord::CommitPrepared(prepared_completion(info, data, major, true)?)),
        0x40 => Ok(XactRecord::AbortPrepared(prepared_completion(info, data, major, false)?)),
        0x50 => {
            let mut f = Fields::new(data);
            let (top, count) = (f.u32()?, f.i32()?);
            Ok(XactRecord::Assignment { top, subxids: u32s(f.items(count, 4)?) })
        }
        0x60 => Ok(XactRecord::Invalidations),
        _ => Err(RecordError::UnknownType),
    }
}

fn prepared_completion(info: u8, data: &[u8], major: Major, commit: bool) -> Result<Completion, RecordError> {
    let completion = completion(info, data, major, commit)?;
    if completion.two_phase_xid.is_none() {
        return Err(RecordError::Malformed("the end of a prepared transaction that does not say which".to_owned()));
    }
    Ok(completion)
}

fn completion(info: u8, data: &[u8], major: Major, commit: bool) -> Result<Completion, String> {
    let mut f = Fields::new(data);
    let mut done = Completion { time: Timestamp(f.i64()?), ..Completion::default() };
    let parts = if info & HAS_INFO != 0 { f.u32()? } else { 0 };
    done.awaits_apply = parts & APPLY_FEEDBACK != 0;
    if parts & HAS_DBINFO != 0 {
        f.take(8)?;
    }
    if parts & HAS_SUBXACTS != 0 {
        let count = f.i32()?;
        done.subxids = u32s(f.items(count, 4)?);
    }
    if parts & HAS_RELATIONS != 0 {
        let count = f.i32()?;
        let words = u32s(f.items(count, 12)?);
        done.dropped = words.as_chunks::<3>().0.iter().map(|[spc, db, rel]| RelNode { spc: *spc, db: *db, rel: *rel }).collect();
    }
    if parts & HAS_DROPPED_STATS != 0 && major.dropped_stats_item_size() > 0 {
        let count = f.i32()?;
        f.items(count, major.dropped_stats_item_size())?;
    }
    if parts & HAS_INVALS != 0 && commit {
        let count = f.i32()?;
        f.items(count, INVALIDATION_SIZE)?;
    }
    if parts & HAS_TWOPHASE != 0 {
        done.two_phase_xid = Some(f.u32()?);
        if parts & HAS_GID != 0 {
            while f.take(1)? != [0] {}
        }
    }
    if parts & HAS_ORIGIN != 0 {
        done.origin = Some((Lsn(f.u64()?), Timestamp(f.i64()?)));
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_with_every_part_is_read_by_each_major() {
        for major in Major::ALL {
            let mut data = Vec::new();
            data.extend_from_slice(&77i64.to_le_bytes());
            let mut parts = HAS_DBINFO | HAS_SUBXACTS | HAS_RELATIONS | HAS_INVALS | HAS_TWOPHASE | HAS_GID | HAS_ORIGIN | APPLY_FEEDBACK;
            let stats = major.dropped_stats_item_size();
            if stats > 0 {
                parts |= HAS_DROPPED_STATS;
            }
            data.extend_from_slice(&parts.to_le_bytes());
            let mut words = vec![5u32, 1663, 2, 11, 12, 1, 1663, 5, 16384];
            if stats > 0 {
                words.push(1);
                words.extend(vec![9; stats / 4]);
            }
            words.extend([1, 0, 0, 0, 0, 740]);
            words.iter().for_each(|word| data.extend_from_slice(&word.to_le_bytes()));
            data.extend_from_slice(b"gid\0");
            data.extend_from_slice(&8u64.to_le_bytes());
            data.extend_from_slice(&9i64.to_le_bytes());
            let expected = Completion {
                time: Timestamp(77),
                subxids: vec![11, 12],
                dropped: vec![RelNode { spc: 1663, db: 5, rel: 16384 }],
                two_phase_xid: Some(740),
                origin: Some((Lsn(8), Timestamp(9))),
                awaits_apply: true,
            };
            assert_eq!(parse(0x30 | HAS_INFO, &data, major), Ok(XactRecord::CommitPrepared(expected)), "{major:?}");
            for len in 0..data.len() {
                assert!(parse(0x30 | HAS_INFO, &data[..len], major).is_err(), "cut to {len} bytes must be refused");
            }
        }
    }

    #[test]
    fn a_plain_commit_is_only_a_time() {
        let done = Completion { time: Timestamp(5), ..Completion::default() };
        assert_eq!(parse(0x00, &5i64.to_le_bytes(), Major::V15), Ok(XactRecord::Commit(done)));
        assert!(is_plain_commit(0x00), "a commit without flags");
        for other in [HAS_INFO, 0x20, 0x30] {
            assert!(!is_plain_commit(other), "{other:02X} may say more, or is no commit");
        }
        assert!(matches!(parse(0x30, &5i64.to_le_bytes(), Major::V15), Err(RecordError::Malformed(_))));
    }
}
