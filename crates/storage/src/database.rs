//! The value of a database key: whether the database has a directory in the tablespace, and below which LSN everything
//! in it is dead.
//!
//! DROP DATABASE names no relation, so it does not touch their sizes. It raises the database's floor instead: a
//! relation size at or below the floor counts as absent, and so does a block. An object id that is used again for a new
//! database thus begins empty.
//!
//! Layout, little-endian: exists `u8`, floor `u64`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use varve_postgres::Lsn;

/// See the module's doc.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DatabaseEntry {
    /// Whether the directory exists; a dropped one keeps its floor.
    pub exists: bool,
    /// LSN at or below which relation sizes and blocks in it are dead.
    pub floor: Lsn,
}

impl DatabaseEntry {
    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(9);
        out.put_u8(u8::from(self.exists));
        out.put_u64_le(self.floor.0);
        out.freeze()
    }

    /// Reads the stored form; `None` if it is not one.
    pub fn decode(mut bytes: &[u8]) -> Option<DatabaseEntry> {
        let exists = match bytes.try_get_u8().ok()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let floor = Lsn(bytes.try_get_u64_le().ok()?);
        bytes.is_empty().then_some(DatabaseEntry { exists, floor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip_and_garbage_is_refused() {
        let entry = DatabaseEntry { exists: true, floor: Lsn(0x1_0000_0028) };
        assert_eq!(DatabaseEntry::decode(&entry.encode()), Some(entry));
        for bad in [&[][..], &[1; 8], &[1; 10], &[2, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(DatabaseEntry::decode(bad), None, "{bad:?} is no entry");
        }
    }
}
