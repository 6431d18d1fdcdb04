//! Redo of GIN, GiST, SP-GiST and BRIN records against Postgres, and that the corpus has every record type that can be
//! provoked.

use varve_postgres::Major;
use varve_postgres::wal::rmgr;
use varve_redo::verify::Report;
use varve_testbed::redo::assert_redone;

/// A resource manager's record types: info and Postgres's name.
type RecordTypes = [(u8, &'static str)];

const GIN: &RecordTypes = &[
    (0x10, "CREATE_PTREE"),
    (0x20, "INSERT"),
    (0x30, "SPLIT"),
    (0x40, "VACUUM_PAGE"),
    (0x50, "DELETE_PAGE"),
    (0x60, "UPDATE_META_PAGE"),
    (0x70, "INSERT_LISTPAGE"),
    (0x80, "DELETE_LISTPAGE"),
    (0x90, "VACUUM_DATA_LEAF_PAGE"),
];

/// Without ASSIGN_LSN (70), which has no block: it is written only for an index that is created under
/// `wal_level = minimal`, with which there is no streaming replication, and so no Varve.
const GIST: &RecordTypes = &[(0x00, "PAGE_UPDATE"), (0x10, "DELETE"), (0x20, "PAGE_REUSE"), (0x30, "PAGE_SPLIT"), (0x60, "PAGE_DELETE")];

const SPGIST: &RecordTypes = &[
    (0x10, "ADD_LEAF"),
    (0x20, "MOVE_LEAFS"),
    (0x30, "ADD_NODE"),
    (0x40, "SPLIT_TUPLE"),
    (0x50, "PICKSPLIT"),
    (0x60, "VACUUM_LEAF"),
    (0x70, "VACUUM_ROOT"),
    (0x80, "VACUUM_REDIRECT"),
];

const BRIN: &RecordTypes = &[
    (0x00, "CREATE_INDEX"),
    (0x10, "INSERT"),
    (0x90, "INSERT+INIT"),
    (0x20, "UPDATE"),
    (0xA0, "UPDATE+INIT"),
    (0x30, "SAMEPAGE_UPDATE"),
    (0x40, "REVMAP_EXTEND"),
    (0x50, "DESUMMARIZE"),
];

/// Redoes the corpus `files` on `major`; then each of the types must have been seen.
fn assert_all_redone(major: Major, files: &[&str], rmid: u8, types: &RecordTypes) {
    let mut report = Report::default();
    for file in files {
        report.merge(assert_redone(major, file));
    }
    let name = rmgr::name(rmid);
    for (info, of_type) in types {
        let stats = report.types.get(&(rmid, *info)).copied().unwrap_or_default();
        let nanos = stats.nanos / stats.pages.max(1);
        println!("{major:?} {name:<6} {of_type:<22} {:>7} records, {:>7} pages compared, {nanos:>6} ns/page", stats.count, stats.compared);
    }
    let unseen: Vec<_> = types.iter().filter(|(info, _)| report.count(rmid, *info) == 0).map(|(_, of_type)| of_type).collect();
    assert!(unseen.is_empty(), "{files:?} on {major:?} should have every record type of {name}, {unseen:?} not seen");
    let unknown: Vec<_> =
        report.types.keys().filter(|(rmid_seen, info)| *rmid_seen == rmid && types.iter().all(|(known, _)| known != info)).collect();
    assert!(unknown.is_empty(), "{files:?} on {major:?} have records of {name} that this test does not expect: {unknown:?}");
}

/// A module with a test for each major: see [`assert_all_redone`].
macro_rules! index_method {
    ($name:ident, $files:expr, $rmid:expr, $types:expr) => {
        mod $name {
            index_method!(@major postgres_14, V14, $files, $rmid, $types);
            index_method!(@major postgres_15, V15, $files, $rmid, $types);
            index_method!(@major postgres_16, V16, $files, $rmid, $types);
            index_method!(@major postgres_17, V17, $files, $rmid, $types);
            index_method!(@major postgres_18, V18, $files, $rmid, $types);
        }
    };
    (@major $test:ident, $major:ident, $files:expr, $rmid:expr, $types:expr) => {
        #[test]
        fn $test() {
            use super::*;
            assert_all_redone(Major::$major, $files, $rmid, $types);
        }
    };
}

index_method!(gin, &["gin_entry_tree", "gin_posting_tree", "gin_pending_list"], rmgr::GIN, GIN);
index_method!(gist, &["gist"], rmgr::GIST, GIST);
index_method!(spgist, &["spgist"], rmgr::SPGIST, SPGIST);
index_method!(brin, &["brin"], rmgr::BRIN, BRIN);
