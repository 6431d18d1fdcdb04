//! Names of record types, as `pg_waldump` prints them (`rm_identify`).

use super::rmgr;
use crate::Major;

/// Flag of a transaction record that more than the opcode is in it.
const XACT_HAS_INFO: u8 = 0x80;
/// Flag of a heap or BRIN record that the page is initialised.
const INIT_PAGE: u8 = 0x80;

/// The name of the type `info` (without the flags of the WAL machinery) of resource manager `rmid`, as `major` has it:
/// `HOT_UPDATE`, `INSERT+INIT`. A type that does not exist is its number.
pub fn record_type(major: Major, rmid: u8, info: u8) -> String {
    let (kind, suffix) = match rmid {
        rmgr::XACT => (info & !XACT_HAS_INFO, ""),
        rmgr::HEAP | rmgr::HEAP2 | rmgr::BRIN if info & INIT_PAGE != 0 => (info & !INIT_PAGE, "+INIT"),
        _ => (info, ""),
    };
    let names = names(major, rmid);
    match names.get(usize::from(kind >> 4)).copied().filter(|name| !name.is_empty()) {
        Some(name) => format!("{name}{suffix}"),
        None => format!("UNKNOWN ({info:02X})"),
    }
}

/// Names of a resource manager's types in the order of their numbers; empty where there is none.
fn names(major: Major, rmid: u8) -> &'static [&'static str] {
    match rmid {
        rmgr::XLOG => &[
            "CHECKPOINT_SHUTDOWN",
            "CHECKPOINT_ONLINE",
            "NOOP",
            "NEXTOID",
            "SWITCH",
            "BACKUP_END",
            "PARAMETER_CHANGE",
            "RESTORE_POINT",
            "FPW_CHANGE",
            "END_OF_RECOVERY",
            "FPI_FOR_HINT",
            "FPI",
            "",
            "OVERWRITE_CONTRECORD",
            "CHECKPOINT_REDO",
        ],
        rmgr::XACT => &["COMMIT", "PREPARE", "ABORT", "COMMIT_PREPARED", "ABORT_PREPARED", "ASSIGNMENT", "INVALIDATION"],
        rmgr::SMGR => &["", "CREATE", "TRUNCATE"],
        rmgr::CLOG | rmgr::COMMIT_TS => &["ZEROPAGE", "TRUNCATE"],
        rmgr::DBASE if major.has_wal_log_database_strategy() => &["CREATE_FILE_COPY", "CREATE_WAL_LOG", "DROP"],
        rmgr::DBASE => &["CREATE", "DROP"],
        rmgr::TBLSPC => &["CREATE", "DROP"],
        rmgr::MULTIXACT => &["ZERO_OFF_PAGE", "ZERO_MEM_PAGE", "CREATE_ID", "TRUNCATE_ID"],
        rmgr::RELMAP => &["UPDATE"],
        rmgr::STANDBY => &["LOCK", "RUNNING_XACTS", "INVALIDATIONS"],
        rmgr::HEAP2 if major.has_one_prune_record() => &[
            "REWRITE",
            "PRUNE_ON_ACCESS",
            "PRUNE_VACUUM_SCAN",
            "PRUNE_VACUUM_CLEANUP",
            "VISIBLE",
            "MULTI_INSERT",
            "LOCK_UPDATED",
            "NEW_CID",
        ],
        rmgr::HEAP2 => &["REWRITE", "PRUNE", "VACUUM", "FREEZE_PAGE", "VISIBLE", "MULTI_INSERT", "LOCK_UPDATED", "NEW_CID"],
        rmgr::HEAP => &["INSERT", "DELETE", "UPDATE", "TRUNCATE", "HOT_UPDATE", "HEAP_CONFIRM", "LOCK", "INPLACE"],
        rmgr::BTREE => &[
            "INSERT_LEAF",
            "INSERT_UPPER",
            "INSERT_META",
            "SPLIT_L",
            "SPLIT_R",
            "INSERT_POST",
            "DEDUP",
            "DELETE",
            "UNLINK_PAGE",
            "UNLINK_PAGE_META",
            "NEWROOT",
            "MARK_PAGE_HALFDEAD",
            "VACUUM",
            "REUSE_PAGE",
            "META_CLEANUP",
        ],
        rmgr::HASH => &[
            "INIT_META_PAGE",
            "INIT_BITMAP_PAGE",
            "INSERT",
            "ADD_OVFL_PAGE",
            "SPLIT_ALLOCATE_PAGE",
            "SPLIT_PAGE",
            "SPLIT_COMPLETE",
            "MOVE_PAGE_CONTENTS",
            "SQUEEZE_PAGE",
            "DELETE",
            "SPLIT_CLEANUP",
            "UPDATE_META_PAGE",
            "VACUUM_ONE_PAGE",
        ],
        rmgr::GIN => &[
            "",
            "CREATE_PTREE",
            "INSERT",
            "SPLIT",
            "VACUUM_PAGE",
            "DELETE_PAGE",
            "UPDATE_META_PAGE",
            "INSERT_LISTPAGE",
            "DELETE_LISTPAGE",
            "VACUUM_DATA_LEAF_PAGE",
        ],
        rmgr::GIST => &["PAGE_UPDATE", "DELETE", "PAGE_REUSE", "PAGE_SPLIT", "", "", "PAGE_DELETE", "ASSIGN_LSN"],
        rmgr::SEQ => &["LOG"],
        rmgr::SPGIST => {
            &["", "ADD_LEAF", "MOVE_LEAFS", "ADD_NODE", "SPLIT_TUPLE", "PICKSPLIT", "VACUUM_LEAF", "VACUUM_ROOT", "VACUUM_REDIRECT"]
        }
        rmgr::BRIN => &["CREATE_INDEX", "INSERT", "UPDATE", "SAMEPAGE_UPDATE", "REVMAP_EXTEND", "DESUMMARIZE"],
        rmgr::REPLORIGIN => &["SET", "DROP"],
        rmgr::GENERIC => &["Generic"],
        rmgr::LOGICALMSG => &["MESSAGE"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_pg_waldump() {
        for (major, rmid, info, name) in [
            (Major::V15, rmgr::HEAP, 0x40, "HOT_UPDATE"),
            (Major::V15, rmgr::HEAP, 0x80, "INSERT+INIT"),
            (Major::V15, rmgr::HEAP2, 0xD0, "MULTI_INSERT+INIT"),
            (Major::V16, rmgr::HEAP2, 0x10, "PRUNE"),
            (Major::V17, rmgr::HEAP2, 0x10, "PRUNE_ON_ACCESS"),
            (Major::V14, rmgr::DBASE, 0x10, "DROP"),
            (Major::V15, rmgr::DBASE, 0x20, "DROP"),
            (Major::V15, rmgr::XACT, 0x80, "COMMIT"),
            (Major::V15, rmgr::BTREE, 0xE0, "META_CLEANUP"),
            (Major::V15, rmgr::GIN, 0x00, "UNKNOWN (00)"),
            (Major::V15, 130, 0x20, "UNKNOWN (20)"),
        ] {
            assert_eq!(record_type(major, rmid, info), name);
        }
    }
}
