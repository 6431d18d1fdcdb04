//! Pages of the SLRU areas: transaction status, multixacts, commit times (`access/clog.h`, `access/multixact.h`,
//! `access/commit_ts.h`).

use varve_postgres::slru::{CLOG_XACTS_PER_PAGE, COMMIT_TS_XACTS_PER_PAGE, MULTIXACT_MEMBERS_PER_PAGE, MULTIXACT_OFFSETS_PER_PAGE};
use varve_postgres::{BlockNumber, Page};

use crate::change::Change;

/// Bytes in a group of four multixact members: four status bytes, then four transaction ids.
const MEMBER_GROUP_SIZE: usize = 20;

/// Makes one of the SLRU changes to page `pageno` of its area.
pub(crate) fn apply(page: &mut Page, pageno: BlockNumber, change: &Change<'_>) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use smallvec::smallvec;
    use varve_postgres::page::ZERO_PAGE;

    use super::*;

    #[test]
    fn a_transaction_has_two_bits_of_pg_xact() {
        let mut page = ZERO_PAGE;
        let base = CLOG_XACTS_PER_PAGE * 3;
        apply(&mut page, 3, &Change::ClogStatus { status: 3, xids: smallvec![base + 4, base + 5, base + 6, base + 7] }).unwrap();
        apply(&mut page, 3, &Change::ClogStatus { status: 1, xids: smallvec![base + 5] }).unwrap();
        apply(&mut page, 3, &Change::ClogStatus { status: 2, xids: smallvec![base + 6, base + CLOG_XACTS_PER_PAGE - 1] }).unwrap();
        assert_eq!((page[0], page[1], page[8191]), (0, 0b11_10_01_11, 0b10_00_00_00));
        let elsewhere = Change::ClogStatus { status: 1, xids: smallvec![base - 1] };
        assert!(apply(&mut page, 3, &elsewhere).is_err(), "a transaction of page 2 must be refused on page 3");
    }

    #[test]
    fn multixact_members_stand_in_groups_of_four() {
        let mut page = ZERO_PAGE;
        let first = MULTIXACT_MEMBERS_PER_PAGE * 2 + 3;
        apply(&mut page, 2, &Change::MultiXactMembers { first, members: vec![(700, 4), (701, 5)] }).unwrap();
        assert_eq!(page[..8], [0, 0, 0, 4, 0, 0, 0, 0], "the status bytes of the first group, its first transaction");
        assert_eq!(
            (page[16..20].to_vec(), page[20], page[24..28].to_vec()),
            (700u32.to_le_bytes().to_vec(), 5, 701u32.to_le_bytes().to_vec())
        );
        let across = Change::MultiXactMembers { first: MULTIXACT_MEMBERS_PER_PAGE * 3 - 1, members: vec![(1, 1), (2, 2)] };
        assert!(apply(&mut page, 2, &across).is_err(), "members of the next page must be refused");
        apply(&mut page, 0, &Change::MultiXactOffset { multi: 5, offset: 0x0102_0304 }).unwrap();
        assert_eq!(page[20..24], [4, 3, 2, 1]);
    }

    #[test]
    fn commit_times_take_ten_bytes() {
        let mut page = ZERO_PAGE;
        apply(
            &mut page,
            1,
            &Change::CommitTs { time: -2, origin: 7, xids: smallvec![COMMIT_TS_XACTS_PER_PAGE, COMMIT_TS_XACTS_PER_PAGE * 2 - 1] },
        )
        .unwrap();
        let entry = [0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 7, 0];
        assert_eq!((&page[..10], &page[8180..8190]), (&entry[..], &entry[..]));
    }
}
