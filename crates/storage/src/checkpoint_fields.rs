//! The value of the checkpoint key: the counters and settings that a server finds in its last checkpoint when it
//! starts.
//!
//! They are kept as Postgres's own redo keeps them, from every record that moves them. The next transaction id moves
//! with nearly every transaction, so it is exact only in the WAL index ([`crate::wal_index`]); here it is what it was
//! when another field changed.
//!
//! Layout, little-endian: version `u8`, then the fields in the order of [`CheckpointFields`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use varve_postgres::Oid;
use varve_postgres::control::{CheckPoint, Parameters};

const VERSION: u8 = 1;

/// See the module's doc.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckpointFields {
    /// Next transaction, with its epoch; see the module's doc.
    pub next_xid: u64,
    /// Next object identifier.
    pub next_oid: Oid,
    /// Next multixact.
    pub next_multi: u32,
    /// Next multixact member offset.
    pub next_multi_offset: u32,
    /// Oldest transaction that may be found in a table.
    pub oldest_xid: u32,
    /// The database that holds it back.
    pub oldest_xid_db: Oid,
    /// Oldest multixact that may be found in a table.
    pub oldest_multi: u32,
    /// The database that holds it back.
    pub oldest_multi_db: Oid,
    /// Oldest transaction with a commit timestamp, or 0.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction with a commit timestamp, or 0.
    pub newest_commit_ts_xid: u32,
    /// Whether full-page writes are on.
    pub full_page_writes: bool,
    /// Settings that standbys need to know.
    pub parameters: Parameters,
}

impl CheckpointFields {
    /// The fields that `checkpoint` and `pg_control`'s parameters give.
    pub fn of_checkpoint(checkpoint: &CheckPoint, parameters: Parameters) -> CheckpointFields {
        CheckpointFields {
            next_xid: checkpoint.next_xid,
            next_oid: checkpoint.next_oid,
            next_multi: checkpoint.next_multi,
            next_multi_offset: checkpoint.next_multi_offset,
            oldest_xid: checkpoint.oldest_xid,
            oldest_xid_db: checkpoint.oldest_xid_db,
            oldest_multi: checkpoint.oldest_multi,
            oldest_multi_db: checkpoint.oldest_multi_db,
            oldest_commit_ts_xid: checkpoint.oldest_commit_ts_xid,
            newest_commit_ts_xid: checkpoint.newest_commit_ts_xid,
            full_page_writes: checkpoint.full_page_writes,
            parameters,
        }
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(80);
        out.put_u8(VERSION);
        out.put_u64_le(self.next_xid);
        for value in [
            self.next_oid,
            self.next_multi,
            self.next_multi_offset,
            self.oldest_xid,
            self.oldest_xid_db,
            self.oldest_multi,
            self.oldest_multi_db,
            self.oldest_commit_ts_xid,
            self.newest_commit_ts_xid,
        ] {
            out.put_u32_le(value);
        }
        out.put_u8(u8::from(self.full_page_writes));
        let p = &self.parameters;
        for value in [
            p.max_connections,
            p.max_worker_processes,
            p.max_wal_senders,
            p.max_prepared_transactions,
            p.max_locks_per_transaction,
            p.wal_level,
        ] {
            out.put_i32_le(value);
        }
        out.put_u8(u8::from(p.wal_log_hints));
        out.put_u8(u8::from(p.track_commit_timestamp));
        out.freeze()
    }

    /// Reads the stored form; `None` if it is not one.
    pub fn decode(mut bytes: &[u8]) -> Option<CheckpointFields> {
        if bytes.try_get_u8().ok()? != VERSION {
            return None;
        }
        let u32 = |bytes: &mut &[u8]| bytes.try_get_u32_le().ok();
        let fields = CheckpointFields {
            next_xid: bytes.try_get_u64_le().ok()?,
            next_oid: u32(&mut bytes)?,
            next_multi: u32(&mut bytes)?,
            next_multi_offset: u32(&mut bytes)?,
            oldest_xid: u32(&mut bytes)?,
            oldest_xid_db: u32(&mut bytes)?,
            oldest_multi: u32(&mut bytes)?,
            oldest_multi_db: u32(&mut bytes)?,
            oldest_commit_ts_xid: u32(&mut bytes)?,
            newest_commit_ts_xid: u32(&mut bytes)?,
            full_page_writes: bytes.try_get_u8().ok()? != 0,
            parameters: Parameters {
                max_connections: bytes.try_get_i32_le().ok()?,
                max_worker_processes: bytes.try_get_i32_le().ok()?,
                max_wal_senders: bytes.try_get_i32_le().ok()?,
                max_prepared_transactions: bytes.try_get_i32_le().ok()?,
                max_locks_per_transaction: bytes.try_get_i32_le().ok()?,
                wal_level: bytes.try_get_i32_le().ok()?,
                wal_log_hints: bytes.try_get_u8().ok()? != 0,
                track_commit_timestamp: bytes.try_get_u8().ok()? != 0,
            },
        };
        bytes.is_empty().then_some(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_round_trip_and_garbage_is_refused() {
        let fields = CheckpointFields {
            next_xid: 1 << 32 | 5,
            next_oid: 2,
            next_multi: 3,
            next_multi_offset: 4,
            oldest_xid: 5,
            oldest_xid_db: 6,
            oldest_multi: 7,
            oldest_multi_db: 8,
            oldest_commit_ts_xid: 9,
            newest_commit_ts_xid: 10,
            full_page_writes: true,
            parameters: Parameters { track_commit_timestamp: true, max_connections: 33, ..Parameters::default() },
        };
        let bytes = fields.encode();
        assert_eq!(CheckpointFields::decode(&bytes), Some(fields));
        for len in 0..bytes.len() {
            assert_eq!(CheckpointFields::decode(&bytes[..len]), None, "cut to {len} bytes");
        }
    }
}
