//! Resource manager ReplicationOrigin (`replication/origin.h`).

use super::RecordError;
use crate::fields::Fields;
use crate::{Lsn, Major};

/// A record about the progress of a replication origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginRecord {
    /// Progress was set.
    Set {
        /// The origin.
        origin: u16,
        /// Replayed up to this position of the origin's WAL.
        remote: Lsn,
        /// Whether it may go back.
        force: bool,
    },
    /// The origin is gone.
    Drop {
        /// The origin.
        origin: u16,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], _major: Major) -> Result<OriginRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        0x00 => Ok(OriginRecord::Set { remote: Lsn(f.u64()?), origin: f.u16()?, force: f.bool()? }),
        0x10 => Ok(OriginRecord::Drop { origin: f.u16()? }),
        _ => Err(RecordError::UnknownType),
    }
}
