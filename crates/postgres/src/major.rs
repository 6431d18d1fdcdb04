//! What differs between the majors of Postgres. One place says it; the rest asks here.

use std::fmt;

/// A supported major version of Postgres.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say all")]
pub enum Major {
    V14,
    V15,
    V16,
    V17,
    V18,
}

impl Major {
    /// All supported majors, oldest first.
    pub const ALL: [Major; 5] = [Major::V14, Major::V15, Major::V16, Major::V17, Major::V18];

    /// The number people say: 14 to 18.
    pub fn number(self) -> u32 {
        match self {
            Major::V14 => 14,
            Major::V15 => 15,
            Major::V16 => 16,
            Major::V17 => 17,
            Major::V18 => 18,
        }
    }

    /// The major with this number, if supported.
    pub fn from_number(number: u32) -> Option<Major> {
        Self::ALL.into_iter().find(|major| major.number() == number)
    }

    /// `XLOG_PAGE_MAGIC`: the first two bytes of each WAL page.
    pub fn wal_page_magic(self) -> u16 {
        match self {
            Major::V14 => 0xD10D,
            Major::V15 => 0xD110,
            Major::V16 => 0xD113,
            Major::V17 => 0xD116,
            Major::V18 => 0xD118,
        }
    }

    /// The major that writes WAL pages with this magic.
    pub fn from_wal_page_magic(magic: u16) -> Option<Major> {
        Self::ALL.into_iter().find(|major| major.wal_page_magic() == magic)
    }

    /// `PG_CONTROL_VERSION`.
    pub fn control_version(self) -> u32 {
        match self {
            Major::V14 | Major::V15 | Major::V16 => 1300,
            Major::V17 => 1700,
            Major::V18 => 1800,
        }
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number())
    }
}

impl fmt::Debug for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL {}", self.number())
    }
}
