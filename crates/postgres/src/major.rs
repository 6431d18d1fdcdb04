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

    /// The letters and numbers under which a server of this major keeps its directories in a tablespace: with the
    /// catalog version, `PG_15_202209061` (`TABLESPACE_VERSION_DIRECTORY`).
    pub fn tablespace_directory(self, catalog_version: u32) -> String {
        format!("PG_{self}_{catalog_version}")
    }

    /// Whether checkpoints, `XLOG_CHECKPOINT_REDO` and `XLOG_END_OF_RECOVERY` carry the server's `wal_level`.
    pub fn checkpoint_has_wal_level(self) -> bool {
        self >= Major::V17
    }

    /// Whether `pg_control` carries `default_char_signedness`.
    pub fn control_has_char_signedness(self) -> bool {
        self >= Major::V18
    }

    /// Bytes in the page numbers of SLRU records: 4, from 17 on 8.
    pub fn slru_page_number_size(self) -> usize {
        if self >= Major::V17 { 8 } else { 4 }
    }

    /// Whether the names of two-phase files are 16 hexadecimal digits with the epoch, and not 8 without.
    pub fn two_phase_name_has_epoch(self) -> bool {
        self >= Major::V17
    }

    /// Bytes of an entry of dropped statistics in a commit record (`xl_xact_stats_item`), zero where there are none.
    pub fn dropped_stats_item_size(self) -> usize {
        match self {
            Major::V14 => 0,
            Major::V15 | Major::V16 | Major::V17 => 12,
            Major::V18 => 16,
        }
    }

    /// Whether a database may be created block by block in WAL (`XLOG_DBASE_CREATE_WAL_LOG`), which also moved the
    /// number of the drop record.
    pub fn has_wal_log_database_strategy(self) -> bool {
        self >= Major::V15
    }

    /// Bytes in `pg_filenode.map` (`sizeof(RelMapFile)`).
    pub fn relation_map_size(self) -> usize {
        if self >= Major::V16 { 524 } else { 512 }
    }

    /// `SLOT_VERSION` of a replication slot's state file.
    pub fn slot_version(self) -> u32 {
        match self {
            Major::V14 | Major::V15 => 2,
            Major::V16 => 3,
            Major::V17 | Major::V18 => 5,
        }
    }

    /// Whether pruning cuts unused line pointers off the end of a heap page's array.
    pub fn prune_truncates_line_pointers(self) -> bool {
        self >= Major::V15
    }

    /// Whether tuples are frozen by plans that many share, and not each by its own.
    pub fn has_freeze_plans(self) -> bool {
        self >= Major::V16
    }

    /// Whether one heap record (`xl_heap_prune` with flags) prunes, vacuums and freezes.
    pub fn has_one_prune_record(self) -> bool {
        self >= Major::V17
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
