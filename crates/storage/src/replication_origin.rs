//! The value of a replication-origin key: the position in the origin's WAL up to which it was replayed, `u64`
//! little-endian.

use bytes::Bytes;
use varve_postgres::Lsn;

/// The stored form.
pub fn encode(remote: Lsn) -> Bytes {
    Bytes::copy_from_slice(&remote.0.to_le_bytes())
}

/// Reads the stored form; `None` if it is not one.
pub fn decode(bytes: &[u8]) -> Option<Lsn> {
    Some(Lsn(u64::from_le_bytes(bytes.try_into().ok()?)))
}
