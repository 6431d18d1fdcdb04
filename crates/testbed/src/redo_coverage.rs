//! The record types that Postgres 14 to 18 have, and how often the corpus of `tests/sql/redo/` makes Postgres emit
//! each.

use std::fmt::Write;

use anyhow::{Context, Result};
use varve_postgres::Major;
use varve_postgres::wal::rmgr;
use varve_redo::verify::Report;

use crate::redo::{Ending, redo_sql_file, sql_path};

/// A record type.
#[derive(Clone, Copy)]
struct RecordType {
    rmid: u8,
    info: u8,
    name: &'static str,
    /// First and last major that have it.
    majors: (Major, Major),
    /// Why the corpus does not exercise it; empty if it does.
    why_not: &'static str,
}

impl RecordType {
    fn is_in(&self, major: Major) -> bool {
        (self.majors.0..=self.majors.1).contains(&major)
    }
}

const ALL: (Major, Major) = (Major::V14, Major::V18);
const SINCE_15: (Major, Major) = (Major::V15, Major::V18);
const SINCE_17: (Major, Major) = (Major::V17, Major::V18);

const fn new(rmid: u8, info: u8, name: &'static str) -> RecordType {
    RecordType { rmid, info, name, majors: ALL, why_not: "" }
}

const fn only(majors: (Major, Major), record_type: RecordType) -> RecordType {
    RecordType { majors, ..record_type }
}

const fn but(why_not: &'static str, record_type: RecordType) -> RecordType {
    RecordType { why_not, ..record_type }
}

const PROMOTION: &str = "written when a standby is promoted";
const MILLIONS: &str =
    "written when a whole segment of the area is older than every row: after a million transactions, or 65,536 multixacts and more";

/// All of them. Where majors give a number to different types, 15's name stands first.
const TYPES: &[RecordType] = &[
    new(rmgr::XLOG, 0x00, "CHECKPOINT_SHUTDOWN"),
    new(rmgr::XLOG, 0x10, "CHECKPOINT_ONLINE"),
    but("no code of Postgres writes it", new(rmgr::XLOG, 0x20, "NOOP")),
    new(rmgr::XLOG, 0x30, "NEXTOID"),
    new(rmgr::XLOG, 0x40, "SWITCH"),
    new(rmgr::XLOG, 0x50, "BACKUP_END"),
    new(rmgr::XLOG, 0x60, "PARAMETER_CHANGE"),
    new(rmgr::XLOG, 0x70, "RESTORE_POINT"),
    new(rmgr::XLOG, 0x80, "FPW_CHANGE"),
    but(PROMOTION, new(rmgr::XLOG, 0x90, "END_OF_RECOVERY")),
    new(rmgr::XLOG, 0xA0, "FPI_FOR_HINT"),
    new(rmgr::XLOG, 0xB0, "FPI"),
    but("written after a crash in the middle of a record", new(rmgr::XLOG, 0xD0, "OVERWRITE_CONTRECORD")),
    only(SINCE_17, new(rmgr::XLOG, 0xE0, "CHECKPOINT_REDO")),
    new(rmgr::XACT, 0x00, "COMMIT"),
    new(rmgr::XACT, 0x80, "COMMIT with info"),
    new(rmgr::XACT, 0x10, "PREPARE"),
    new(rmgr::XACT, 0x20, "ABORT"),
    new(rmgr::XACT, 0xA0, "ABORT with info"),
    new(rmgr::XACT, 0xB0, "COMMIT_PREPARED"),
    new(rmgr::XACT, 0xC0, "ABORT_PREPARED"),
    new(rmgr::XACT, 0x50, "ASSIGNMENT"),
    new(rmgr::XACT, 0x60, "INVALIDATIONS"),
    new(rmgr::SMGR, 0x10, "CREATE"),
    new(rmgr::SMGR, 0x20, "TRUNCATE"),
    new(rmgr::CLOG, 0x00, "ZEROPAGE"),
    but(MILLIONS, new(rmgr::CLOG, 0x10, "TRUNCATE")),
    only(SINCE_15, new(rmgr::DBASE, 0x00, "CREATE_FILE_COPY")),
    only((Major::V14, Major::V14), new(rmgr::DBASE, 0x00, "CREATE")),
    only(SINCE_15, new(rmgr::DBASE, 0x10, "CREATE_WAL_LOG")),
    only((Major::V14, Major::V14), new(rmgr::DBASE, 0x10, "DROP")),
    only(SINCE_15, new(rmgr::DBASE, 0x20, "DROP")),
    new(rmgr::TBLSPC, 0x00, "CREATE"),
    new(rmgr::TBLSPC, 0x10, "DROP"),
    new(rmgr::MULTIXACT, 0x00, "ZERO_OFF_PAGE"),
    new(rmgr::MULTIXACT, 0x10, "ZERO_MEM_PAGE"),
    new(rmgr::MULTIXACT, 0x20, "CREATE_ID"),
    but(MILLIONS, new(rmgr::MULTIXACT, 0x30, "TRUNCATE_ID")),
    new(rmgr::RELMAP, 0x00, "UPDATE"),
    new(rmgr::STANDBY, 0x00, "LOCK"),
    new(rmgr::STANDBY, 0x10, "RUNNING_XACTS"),
    new(rmgr::STANDBY, 0x20, "INVALIDATIONS"),
    new(rmgr::HEAP2, 0x00, "REWRITE"),
    new(rmgr::HEAP2, 0x10, "PRUNE / PRUNE_ON_ACCESS"),
    new(rmgr::HEAP2, 0x20, "VACUUM / PRUNE_VACUUM_SCAN"),
    new(rmgr::HEAP2, 0x30, "FREEZE_PAGE / PRUNE_VACUUM_CLEANUP"),
    new(rmgr::HEAP2, 0x40, "VISIBLE"),
    new(rmgr::HEAP2, 0x50, "MULTI_INSERT"),
    new(rmgr::HEAP2, 0xD0, "MULTI_INSERT+INIT"),
    new(rmgr::HEAP2, 0x60, "LOCK_UPDATED"),
    new(rmgr::HEAP2, 0x70, "NEW_CID"),
    new(rmgr::HEAP, 0x00, "INSERT"),
    new(rmgr::HEAP, 0x80, "INSERT+INIT"),
    new(rmgr::HEAP, 0x10, "DELETE"),
    new(rmgr::HEAP, 0x20, "UPDATE"),
    new(rmgr::HEAP, 0xA0, "UPDATE+INIT"),
    new(rmgr::HEAP, 0x30, "TRUNCATE"),
    new(rmgr::HEAP, 0x40, "HOT_UPDATE"),
    but("the old tuple is on the page, so it is not initialised", new(rmgr::HEAP, 0xC0, "HOT_UPDATE+INIT")),
    new(rmgr::HEAP, 0x50, "CONFIRM"),
    new(rmgr::HEAP, 0x60, "LOCK"),
    new(rmgr::HEAP, 0x70, "INPLACE"),
    new(rmgr::BTREE, 0x00, "INSERT_LEAF"),
    new(rmgr::BTREE, 0x10, "INSERT_UPPER"),
    new(rmgr::BTREE, 0x20, "INSERT_META"),
    new(rmgr::BTREE, 0x30, "SPLIT_L"),
    new(rmgr::BTREE, 0x40, "SPLIT_R"),
    new(rmgr::BTREE, 0x50, "INSERT_POST"),
    new(rmgr::BTREE, 0x60, "DEDUP"),
    new(rmgr::BTREE, 0x70, "DELETE"),
    new(rmgr::BTREE, 0x80, "UNLINK_PAGE"),
    new(rmgr::BTREE, 0x90, "UNLINK_PAGE_META"),
    new(rmgr::BTREE, 0xA0, "NEWROOT"),
    new(rmgr::BTREE, 0xB0, "MARK_PAGE_HALFDEAD"),
    new(rmgr::BTREE, 0xC0, "VACUUM"),
    new(rmgr::BTREE, 0xD0, "REUSE_PAGE"),
    new(rmgr::BTREE, 0xE0, "META_CLEANUP"),
    new(rmgr::HASH, 0x00, "INIT_META_PAGE"),
    new(rmgr::HASH, 0x10, "INIT_BITMAP_PAGE"),
    new(rmgr::HASH, 0x20, "INSERT"),
    new(rmgr::HASH, 0x30, "ADD_OVFL_PAGE"),
    new(rmgr::HASH, 0x40, "SPLIT_ALLOCATE_PAGE"),
    new(rmgr::HASH, 0x50, "SPLIT_PAGE"),
    new(rmgr::HASH, 0x60, "SPLIT_COMPLETE"),
    new(rmgr::HASH, 0x70, "MOVE_PAGE_CONTENTS"),
    new(rmgr::HASH, 0x80, "SQUEEZE_PAGE"),
    new(rmgr::HASH, 0x90, "DELETE"),
    new(rmgr::HASH, 0xA0, "SPLIT_CLEANUP"),
    new(rmgr::HASH, 0xB0, "UPDATE_META_PAGE"),
    new(rmgr::HASH, 0xC0, "VACUUM_ONE_PAGE"),
    new(rmgr::GIN, 0x10, "CREATE_PTREE"),
    new(rmgr::GIN, 0x20, "INSERT"),
    new(rmgr::GIN, 0x30, "SPLIT"),
    new(rmgr::GIN, 0x40, "VACUUM_PAGE"),
    new(rmgr::GIN, 0x50, "DELETE_PAGE"),
    new(rmgr::GIN, 0x60, "UPDATE_META_PAGE"),
    new(rmgr::GIN, 0x70, "INSERT_LISTPAGE"),
    new(rmgr::GIN, 0x80, "DELETE_LISTPAGE"),
    new(rmgr::GIN, 0x90, "VACUUM_DATA_LEAF_PAGE"),
    new(rmgr::GIST, 0x00, "PAGE_UPDATE"),
    new(rmgr::GIST, 0x10, "DELETE"),
    new(rmgr::GIST, 0x20, "PAGE_REUSE"),
    new(rmgr::GIST, 0x30, "PAGE_SPLIT"),
    new(rmgr::GIST, 0x60, "PAGE_DELETE"),
    but("written with wal_level = minimal only", new(rmgr::GIST, 0x70, "ASSIGN_LSN")),
    new(rmgr::SEQ, 0x00, "LOG"),
    new(rmgr::SPGIST, 0x10, "ADD_LEAF"),
    new(rmgr::SPGIST, 0x20, "MOVE_LEAFS"),
    new(rmgr::SPGIST, 0x30, "ADD_NODE"),
    new(rmgr::SPGIST, 0x40, "SPLIT_TUPLE"),
    new(rmgr::SPGIST, 0x50, "PICKSPLIT"),
    new(rmgr::SPGIST, 0x60, "VACUUM_LEAF"),
    new(rmgr::SPGIST, 0x70, "VACUUM_ROOT"),
    new(rmgr::SPGIST, 0x80, "VACUUM_REDIRECT"),
    new(rmgr::BRIN, 0x00, "CREATE_INDEX"),
    new(rmgr::BRIN, 0x10, "INSERT"),
    new(rmgr::BRIN, 0x90, "INSERT+INIT"),
    new(rmgr::BRIN, 0x20, "UPDATE"),
    new(rmgr::BRIN, 0xA0, "UPDATE+INIT"),
    new(rmgr::BRIN, 0x30, "SAMEPAGE_UPDATE"),
    new(rmgr::BRIN, 0x40, "REVMAP_EXTEND"),
    new(rmgr::BRIN, 0x50, "DESUMMARIZE"),
    new(rmgr::COMMIT_TS, 0x00, "ZEROPAGE"),
    but(MILLIONS, new(rmgr::COMMIT_TS, 0x10, "TRUNCATE")),
    new(rmgr::REPLORIGIN, 0x00, "SET"),
    new(rmgr::REPLORIGIN, 0x10, "DROP"),
    new(rmgr::GENERIC, 0x00, "generic"),
    new(rmgr::LOGICALMSG, 0x00, "MESSAGE"),
];

/// Names of the corpus's files, sorted.
///
/// # Errors
/// When its folder cannot be read.
pub fn corpus() -> Result<Vec<String>> {
    let path = sql_path("any");
    let dir = path.parent().context("the corpus has no folder")?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".sql").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Runs the whole corpus on `major` and gives what was seen, mismatches too.
///
/// # Errors
/// When Postgres cannot be run, its WAL cannot be read, or pages differ from the stopped server's files.
pub fn run_corpus(major: Major) -> Result<Report> {
    let mut seen = Report::default();
    for name in corpus()? {
        seen.merge(redo_sql_file(major, &name, Ending::Shutdown).with_context(|| format!("{name}.sql on {major:?}"))?);
    }
    Ok(seen)
}

/// A table of all record types against the counts in `seen`, and how many were not exercised without a known reason (or
/// are unknown).
pub fn table(seen: &[(Major, Report)]) -> (String, usize) {
    let mut table = String::new();
    let mut missing = 0;
    let mut row = |name: &str, kind: &str, counts: Vec<String>, note: &str| {
        let _ = writeln!(table, "{name:<18} {kind:<36} {} {note}", counts.iter().map(|count| format!("{count:>8}")).collect::<String>());
    };
    row("rmgr", "record type", seen.iter().map(|(major, _)| major.to_string()).collect(), "");
    for record_type in TYPES {
        let mut note = record_type.why_not.to_owned();
        let count = |(major, report): &(Major, Report)| {
            let count = report.count(record_type.rmid, record_type.info);
            if !record_type.is_in(*major) {
                return "-".to_owned();
            }
            if count == 0 && record_type.why_not.is_empty() {
                missing += 1;
                note = "NOT EXERCISED".to_owned();
            }
            count.to_string()
        };
        let counts = seen.iter().map(count).collect();
        row(&rmgr::name(record_type.rmid), &format!("{:02X} {}", record_type.info, record_type.name), counts, &note);
    }
    for (major, report) in seen {
        for (rmid, info) in report.types.keys() {
            if !TYPES.iter().any(|known| (known.rmid, known.info) == (*rmid, *info) && known.is_in(*major)) {
                missing += 1;
                let _ = writeln!(table, "{} record {info:02X} of {major:?} is not in the table", rmgr::name(*rmid));
            }
        }
    }
    (table, missing)
}
