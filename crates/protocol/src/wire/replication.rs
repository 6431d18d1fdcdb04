//! The messages inside the COPY of physical replication, in both directions. Integers are big-endian; times are
//! microseconds since 2000-01-01.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, BytesMut};
use varve_postgres::Lsn;

/// Seconds from 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// A message from a walsender.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalSenderMessage<'a> {
    /// `w`: WAL bytes.
    XLogData {
        /// Where the first byte belongs.
        start: Lsn,
        /// The bytes.
        data: &'a [u8],
    },
    /// `k`: still there.
    Keepalive {
        /// Whether the server wants a status at once.
        reply_requested: bool,
    },
}

impl<'a> WalSenderMessage<'a> {
    /// The message in a `CopyData`'s body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(mut body: &'a [u8]) -> Result<WalSenderMessage<'a>, String> {
        const XLOG_DATA_HEADER: usize = 24;
        const KEEPALIVE: usize = 17;
        match body.split_first() {
            Some((b'w', rest)) if rest.len() >= XLOG_DATA_HEADER => {
                let (mut header, data) = rest.split_at(XLOG_DATA_HEADER);
                Ok(WalSenderMessage::XLogData { start: Lsn(header.get_u64()), data })
            }
            Some((b'k', rest)) if rest.len() == KEEPALIVE => {
                body.advance(1 + 16);
                Ok(WalSenderMessage::Keepalive { reply_requested: body.get_u8() != 0 })
            }
            Some((tag, rest)) => Err(format!("replication message with tag {tag} and {} bytes: expected 'w' or 'k'", rest.len())),
            None => Err("empty replication message".to_owned()),
        }
    }
}

/// How far a standby is, for the server that sends to it. An invalid position says nothing: a standby whose flush
/// position is invalid is never one that commits wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StandbyStatus {
    /// What it has.
    pub written: Lsn,
    /// What is durable.
    pub flushed: Lsn,
    /// What it has applied.
    pub applied: Lsn,
}

impl StandbyStatus {
    /// Appends the body of a standby status update.
    pub fn encode(&self, reply_requested: bool, out: &mut BytesMut) {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = u64::try_from(since_1970.saturating_sub(POSTGRES_EPOCH).as_micros()).unwrap_or_default();
        out.put_u8(b'r');
        out.put_u64(self.written.0);
        out.put_u64(self.flushed.0);
        out.put_u64(self.applied.0);
        out.put_u64(micros);
        out.put_u8(u8::from(reply_requested));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_walsender_sends_is_understood() {
        let mut data = vec![b'w'];
        data.extend_from_slice(&0x16B_3748u64.to_be_bytes());
        data.extend_from_slice(&[9; 16]);
        data.extend_from_slice(b"wal");
        assert_eq!(WalSenderMessage::decode(&data), Ok(WalSenderMessage::XLogData { start: Lsn(0x16B_3748), data: b"wal" }));
        let mut keepalive = vec![b'k'];
        keepalive.extend_from_slice(&[0; 16]);
        keepalive.push(1);
        assert_eq!(WalSenderMessage::decode(&keepalive), Ok(WalSenderMessage::Keepalive { reply_requested: true }));
        for bad in [&data[..20], &keepalive[..17], b"", b"x"] {
            assert!(WalSenderMessage::decode(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn a_status_has_postgres_layout() {
        let mut out = BytesMut::new();
        StandbyStatus { written: Lsn(7), flushed: Lsn(6), applied: Lsn(5) }.encode(true, &mut out);
        assert_eq!(out.len(), 34);
        assert_eq!(out[..25], [b'r', 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(out[33], 1);
        let micros = u64::from_be_bytes(*out[25..].first_chunk().expect("a time"));
        assert!((20..200).contains(&(micros / 1_000_000 / 86_400 / 365)), "{micros} us since 2000 is not now");
    }
}
