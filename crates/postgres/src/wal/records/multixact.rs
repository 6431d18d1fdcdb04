//! Resource manager MultiXact (`access/multixact.h`).

use super::{RecordError, slru_page};
use crate::fields::Fields;
use crate::{Major, Oid};

const ZERO_OFF_PAGE: u8 = 0x00;
const ZERO_MEM_PAGE: u8 = 0x10;
const CREATE_ID: u8 = 0x20;
const TRUNCATE_ID: u8 = 0x30;

/// A record of the multixact areas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MultiXactRecord {
    /// A new page of offsets.
    ZeroOffsetsPage {
        /// Its number.
        page: u32,
    },
    /// A new page of members.
    ZeroMembersPage {
        /// Its number.
        page: u32,
    },
    /// A new multixact.
    Create {
        /// The multixact.
        multi: u32,
        /// Offset of its first member.
        offset: u32,
        /// Its members: transaction and status.
        members: Vec<(u32, u8)>,
    },
    /// Old multixacts are gone.
    Truncate {
        /// Database that holds back the oldest.
        oldest_multi_db: Oid,
        /// First multixact of those that are gone.
        multis_from: u32,
        /// First multixact that is still needed.
        multis_to: u32,
        /// First member offset of those that are gone.
        members_from: u32,
        /// First member offset that is still needed.
        members_to: u32,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<MultiXactRecord, RecordError> {
    let mut f = Fields::new(data);
    Ok(match info {
        ZERO_OFF_PAGE => MultiXactRecord::ZeroOffsetsPage { page: slru_page(&mut f, major)? },
        ZERO_MEM_PAGE => MultiXactRecord::ZeroMembersPage { page: slru_page(&mut f, major)? },
        CREATE_ID => {
            let (multi, offset, count) = (f.u32()?, f.u32()?, f.i32()?);
            let words = crate::fields::u32s(f.items(count, 8)?);
            let members = words.as_chunks::<2>().0.iter().map(|[xid, status]| (*xid, *status as u8)).collect();
            MultiXactRecord::Create { multi, offset, members }
        }
        TRUNCATE_ID => MultiXactRecord::Truncate {
            oldest_multi_db: f.u32()?,
            multis_from: f.u32()?,
            multis_to: f.u32()?,
            members_from: f.u32()?,
            members_to: f.u32()?,
        },
        _ => return Err(RecordError::UnknownType),
    })
}
