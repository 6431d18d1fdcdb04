//! Resource manager CommitTs (`access/commit_ts.h`). Times themselves are set by commit records.

use super::{RecordError, slru_page};
use crate::Major;
use crate::fields::Fields;

const ZEROPAGE: u8 = 0x00;
const TRUNCATE: u8 = 0x10;

/// A record of the commit-timestamp area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitTsRecord {
    /// A new page.
    ZeroPage {
        /// Its number.
        page: u32,
    },
    /// Old timestamps are gone.
    Truncate {
        /// First page that is still needed.
        page: u32,
        /// Oldest transaction that may be asked for.
        oldest_xid: u32,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<CommitTsRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        ZEROPAGE => Ok(CommitTsRecord::ZeroPage { page: slru_page(&mut f, major)? }),
        TRUNCATE => Ok(CommitTsRecord::Truncate { page: slru_page(&mut f, major)?, oldest_xid: f.u32()? }),
        _ => Err(RecordError::UnknownType),
    }
}
