//! Where a data directory keeps what: file names of relations and databases (`common/relpath.c`).

use crate::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use crate::{BlockNumber, Fork, Major, Oid, RelFork};

/// Blocks in one file of a relation fork (`RELSEG_SIZE`): 1 GiB.
pub const BLOCKS_PER_FILE: BlockNumber = 131_072;

/// Directory of database `db` in tablespace `spc`, relative to the data directory.
pub fn database_directory(spc: Oid, db: Oid, major: Major, catalog_version: u32) -> String {
    match spc {
        GLOBAL_TABLESPACE => "global".to_owned(),
        DEFAULT_TABLESPACE => format!("base/{db}"),
        _ => format!("pg_tblspc/{spc}/{}/{db}", major.tablespace_directory(catalog_version)),
    }
}

/// File `file_number` (1 GiB each) of a relation fork, relative to the data directory.
pub fn relation_file(rel: RelFork, file_number: u32, major: Major, catalog_version: u32) -> String {
    let directory = database_directory(rel.node.spc, rel.node.db, major, catalog_version);
    format!("{directory}/{}", relation_file_name(rel.node.rel, rel.fork, file_number))
}

/// Name of file `file_number` of a relation fork within its directory.
pub fn relation_file_name(rel: Oid, fork: Fork, file_number: u32) -> String {
    let suffix = fork.suffix();
    if file_number == 0 { format!("{rel}{suffix}") } else { format!("{rel}{suffix}.{file_number}") }
}

/// A relation file's name without its directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelationFileName {
    /// The relation's file number.
    pub rel: Oid,
    /// Which fork.
    pub fork: Fork,
    /// Which gigabyte of it.
    pub file_number: u32,
}

impl RelationFileName {
    /// Takes a file name such as `16384_vm.1` apart (`parse_filename_for_nontemp_relation`); `None` if it is not a
    /// permanent relation's.
    pub fn parse(name: &str) -> Option<RelationFileName> {
        let (stem, file_number) = match name.split_once('.') {
            Some((stem, number)) => (stem, decimal(number)?),
            None => (name, 0),
        };
        let (rel, fork) = match stem.split_once('_') {
            Some((rel, suffix)) => {
                let fork = Fork::ALL.into_iter().find(|fork| fork.suffix().strip_prefix('_') == Some(suffix))?;
                (rel, fork)
            }
            None => (stem, Fork::Main),
        };
        Some(RelationFileName { rel: decimal(rel)?, fork, file_number })
    }
}

fn decimal(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RelNode;

    #[test]
    fn paths_are_those_of_postgres() {
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 };
        assert_eq!(relation_file(rel.fork(Fork::Main), 0, Major::V15, 1), "base/5/16384");
        assert_eq!(relation_file(rel.fork(Fork::VisibilityMap), 2, Major::V15, 1), "base/5/16384_vm.2");
        let rel = RelNode { spc: 1664, db: 0, rel: 1262 };
        assert_eq!(relation_file(rel.fork(Fork::FreeSpaceMap), 0, Major::V15, 1), "global/1262_fsm");
        let rel = RelNode { spc: 16400, db: 5, rel: 9 };
        assert_eq!(relation_file(rel.fork(Fork::Init), 0, Major::V15, 202_209_061), "pg_tblspc/16400/PG_15_202209061/5/9_init");
    }

    #[test]
    fn file_names_are_taken_apart() {
        let parse = RelationFileName::parse;
        assert_eq!(parse("16384_fsm.3"), Some(RelationFileName { rel: 16384, fork: Fork::FreeSpaceMap, file_number: 3 }));
        assert_eq!(parse("1262"), Some(RelationFileName { rel: 1262, fork: Fork::Main, file_number: 0 }));
        for other in
            ["PG_VERSION", "pg_filenode.map", "t3_16384", "16384_", "16384_x", "16384.", "x.1", "", "012", "16384.01", "99999999999"]
        {
            assert_eq!(parse(other), None, "{other} is no permanent relation's file");
        }
    }
}
