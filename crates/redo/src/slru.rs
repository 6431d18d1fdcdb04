//! Pages of the SLRU areas: transaction status, multixacts, commit times (`access/clog.h`, `access/multixact.h`, `access/commit_ts.h`).

use varve_postgres::slru::{CLOG_XACTS_PER_PAGE, COMMIT_TS_XACTS_PER_PAGE, MULTIXACT_MEMBERS_PER_PAGE, MULTIXACT_OFFSETS_PER_PAGE};
use varve_postgres::{BlockNumber, Page};

use crate::change::Change;

/// Bytes in a group of four multixact members: four status bytes, then four transaction ids.
const MEMBER_GROUP_SIZE: usize = 20;

/// Makes one of the SLRU changes to page `pageno` of its area.
pub(crate) fn apply(page: &mut Page, pageno: BlockNumber, change: &Change) -> Result<(), String> {
    let on_page = |what: &str, number: u32, per_page: u32| {
        if number / per_page == pageno { Ok((number % per_page) as usize) } else { Err(format!("{what} {number} is not on page {pageno}")) }
    };
    match change {
        Change::ClogStatus { status, xids } => {
            for xid in xids {
                let index = on_page("transaction", *xid, CLOG_XACTS_PER_PAGE)?;
                let shift = index % 4 * 2;
                let byte = &mut page[index / 4];
                *byte = *byte & !(3 << shift) | (status & 3) << shift;
            }
        }
        Change::MultiXactOffset { multi, offset } => {
            let at = on_page("multixact", *multi, MULTIXACT_OFFSETS_PER_PAGE)? * 4;
            page[at..at + 4].copy_from_slice(&offset.to_le_bytes());
        }
        Change::MultiXactMembers { first, members } => {
            for (i, (xid, status)) in members.iter().enumerate() {
                let index = on_page("multixact member", first.wrapping_add(i as u32), MULTIXACT_MEMBERS_PER_PAGE)?;
                let (group, member) = (index / 4 * MEMBER_GROUP_SIZE, index % 4);
                page[group + member] = *status;
                let at = group + 4 + member * 4;
                page[at..at + 4].copy_from_slice(&xid.to_le_bytes());
            }
        }
        Change::CommitTs { time, origin, xids } => {
            for xid in xids {
                let at = on_page("transaction", *xid, COMMIT_TS_XACTS_PER_PAGE)? * 10;
                page[at..at + 8].copy_from_slice(&time.to_le_bytes());
                page[at + 8..at + 10].copy_from_slice(&origin.to_le_bytes());
            }
        }
        Change::Record(_) | Change::ClearVisibility { .. } | Change::TruncateVisibility { .. } => {
            return Err("not a change of an SLRU page".to_owned());
        }
    }
    Ok(())
}
