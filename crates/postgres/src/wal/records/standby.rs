//! Resource manager Standby (`storage/standbydefs.h`).

use super::RecordError;
use crate::Major;
use crate::fields::{Fields, u32s};

/// A record for standbys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandbyRecord {
    /// Access-exclusive locks were taken.
    Locks,
    /// Which transactions run.
    RunningXacts {
        /// Next transaction.
        next_xid: u32,
        /// Those that run, subtransactions included unless there were too many.
        xids: Vec<u32>,
    },
    /// Cache invalidations of a transaction without an id.
    Invalidations,
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], _major: Major) -> Result<StandbyRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        0x00 => Ok(StandbyRecord::Locks),
        0x10 => {
            let (count, subcount) = (f.i32()?, f.i32()?);
            let _overflowed = f.bool()?;
            f.align(4)?;
            let next_xid = f.u32()?;
            let _oldest_running_and_latest_completed = f.take(8)?;
            let mut xids = u32s(f.items(count, 4)?);
            xids.extend(u32s(f.items(subcount, 4)?));
            Ok(StandbyRecord::RunningXacts { next_xid, xids })
        }
        0x20 => Ok(StandbyRecord::Invalidations),
        _ => Err(RecordError::UnknownType),
    }
}
