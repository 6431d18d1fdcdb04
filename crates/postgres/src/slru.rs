//! The "simple least recently used" areas: transaction status and its relatives, which Postgres keeps outside relations
//! in files of 32 pages.

use std::fmt;

/// Pages in one SLRU segment file (`SLRU_PAGES_PER_SEGMENT`).
pub const PAGES_PER_SEGMENT: u32 = 32;
/// Transactions on one page of `pg_xact` (`CLOG_XACTS_PER_PAGE`).
pub const CLOG_XACTS_PER_PAGE: u32 = 8192 * 4;
/// Multixacts on one page of `pg_multixact/offsets` (`MULTIXACT_OFFSETS_PER_PAGE`).
pub const MULTIXACT_OFFSETS_PER_PAGE: u32 = 8192 / 4;
/// Members on one page of `pg_multixact/members` (`MULTIXACT_MEMBERS_PER_PAGE`): 409 groups of 4 flag bytes and 4
/// transaction ids.
pub const MULTIXACT_MEMBERS_PER_PAGE: u32 = 409 * 4;
/// Transactions on one page of `pg_commit_ts` (`COMMIT_TS_XACTS_PER_PAGE`): 10 bytes each.
pub const COMMIT_TS_XACTS_PER_PAGE: u32 = 8192 / 10;

/// Which SLRU area. The numbers are those of the page service's `slru segment` request, where it names them (0 to 2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum SlruKind {
    /// `pg_xact`.
    Clog = 0,
    /// `pg_multixact/members`.
    MultiXactMembers = 1,
    /// `pg_multixact/offsets`.
    MultiXactOffsets = 2,
    /// `pg_commit_ts`.
    CommitTs = 3,
}

impl SlruKind {
    /// All areas.
    pub const ALL: [SlruKind; 4] = [SlruKind::Clog, SlruKind::MultiXactMembers, SlruKind::MultiXactOffsets, SlruKind::CommitTs];

    /// The area with this number.
    pub fn from_number(number: u8) -> Option<SlruKind> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The area's number.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Directory of the segment files, relative to the data directory.
    pub fn directory(self) -> &'static str {
        match self {
            SlruKind::Clog => "pg_xact",
            SlruKind::MultiXactMembers => "pg_multixact/members",
            SlruKind::MultiXactOffsets => "pg_multixact/offsets",
            SlruKind::CommitTs => "pg_commit_ts",
        }
    }
}

impl fmt::Display for SlruKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.directory())
    }
}

/// Name of segment file `segno` (`SlruFileName` with short names, as all four areas have up to 18).
pub fn segment_name(segno: u32) -> String {
    format!("{segno:04X}")
}
