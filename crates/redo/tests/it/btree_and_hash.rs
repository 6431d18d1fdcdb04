//! B-tree and hash records are redone as Postgres redoes them, whatever their type.

use varve_postgres::Major;
use varve_postgres::wal::rmgr;
use varve_redo::verify::Report;
use varve_testbed::redo::assert_redone;

/// Types of B-tree records that change pages (`access/nbtxlog.h`): all but `XLOG_BTREE_REUSE_PAGE`, which is looked for
/// too.
const BTREE: [(u8, &str); 15] = [
    (0x00, "INSERT_LEAF"),
    (0x10, "INSERT_UPPER"),
    (0x20, "INSERT_META"),
    (0x30, "SPLIT_L"),
    (0x40, "SPLIT_R"),
    (0x50, "INSERT_POST"),
    (0x60, "DEDUP"),
    (0x70, "DELETE"),
    (0x80, "UNLINK_PAGE"),
    (0x90, "UNLINK_PAGE_META"),
    (0xA0, "NEWROOT"),
    (0xB0, "MARK_PAGE_HALFDEAD"),
    (0xC0, "VACUUM"),
    (0xD0, "REUSE_PAGE"),
    (0xE0, "META_CLEANUP"),
];

/// Types of hash records (`access/hash_xlog.h`).
const HASH: [(u8, &str); 13] = [
    (0x00, "INIT_META_PAGE"),
    (0x10, "INIT_BITMAP_PAGE"),
    (0x20, "INSERT"),
    (0x30, "ADD_OVFL_PAGE"),
    (0x40, "SPLIT_ALLOCATE_PAGE"),
    (0x50, "SPLIT_PAGE"),
    (0x60, "SPLIT_COMPLETE"),
    (0x70, "MOVE_PAGE_CONTENTS"),
    (0x80, "SQUEEZE_PAGE"),
    (0x90, "DELETE"),
    (0xA0, "SPLIT_CLEANUP"),
    (0xB0, "UPDATE_META_PAGE"),
    (0xC0, "VACUUM_ONE_PAGE"),
];

#[track_caller]
fn assert_seen(reports: &[Report], rmid: u8, types: &[(u8, &str)]) {
    for (info, name) in types {
        let seen: u64 = reports.iter().filter_map(|report| report.types.get(&(rmid, *info))).map(|stats| stats.count).sum();
        println!("{:>8} {}/{name}", seen, rmgr::name(rmid));
        assert!(seen > 0, "the corpus is to contain {}/{name} records, and has none", rmgr::name(rmid));
    }
}

fn btree(major: Major) {
    let reports = ["btree_splits", "btree_posting", "btree_delete", "btree_vacuum"].map(|name| assert_redone(major, name));
    assert_seen(&reports, rmgr::BTREE, &BTREE);
}

fn hash(major: Major) {
    let reports = [assert_redone(major, "hash")];
    assert_seen(&reports, rmgr::HASH, &HASH);
}

/// A test of each corpus for each major.
macro_rules! for_majors {
    ($($corpus:ident { $($test:ident $major:ident)* })*) => {
        $(mod $corpus {
            $(#[test]
            fn $test() {
                super::$corpus(varve_postgres::Major::$major);
            })*
        })*
    };
}

for_majors! {
    btree { postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18 }
    hash { postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18 }
}
