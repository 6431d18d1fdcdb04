//! Resource manager CLOG (`access/clog.h`).

use super::{RecordError, slru_page};
use crate::fields::Fields;
use crate::{Major, Oid};

const ZEROPAGE: u8 = 0x00;
const TRUNCATE: u8 = 0x10;

/// A record of the transaction-status area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClogRecord {
    /// A new page.
    ZeroPage {
        /// Its number.
        page: u32,
    },
    /// Status of old transactions is gone.
    Truncate {
        /// First page that is still needed.
        page: u32,
        /// Oldest transaction that may be asked for.
        oldest_xid: u32,
        /// The database that holds it back.
        oldest_xid_db: Oid,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<ClogRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        ZEROPAGE => Ok(ClogRecord::ZeroPage { page: slru_page(&mut f, major)? }),
        TRUNCATE => Ok(ClogRecord::Truncate { page: slru_page(&mut f, major)?, oldest_xid: f.u32()?, oldest_xid_db: f.u32()? }),
        _ => Err(RecordError::UnknownType),
    }
}
