//! Resource managers: numbers and names of `access/rmgrlist.h`.

#![allow(missing_docs, reason = "the names are Postgres's own")]

pub const XLOG: u8 = 0;
pub const XACT: u8 = 1;
pub const SMGR: u8 = 2;
pub const CLOG: u8 = 3;
pub const DBASE: u8 = 4;
pub const TBLSPC: u8 = 5;
pub const MULTIXACT: u8 = 6;
pub const RELMAP: u8 = 7;
pub const STANDBY: u8 = 8;
pub const HEAP2: u8 = 9;
pub const HEAP: u8 = 10;
pub const BTREE: u8 = 11;
pub const HASH: u8 = 12;
pub const GIN: u8 = 13;
pub const GIST: u8 = 14;
pub const SEQ: u8 = 15;
pub const SPGIST: u8 = 16;
pub const BRIN: u8 = 17;
pub const COMMIT_TS: u8 = 18;
pub const REPLORIGIN: u8 = 19;
pub const GENERIC: u8 = 20;
pub const LOGICALMSG: u8 = 21;

const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// First number that an extension may register (`RM_MIN_CUSTOM_ID`).
pub const MIN_CUSTOM: u8 = 128;

/// The resource manager's name, as `pg_waldump` prints it.
pub fn name(rmid: u8) -> String {
    match NAMES.get(usize::from(rmid)) {
        Some(name) => (*name).to_owned(),
        None => format!("custom{rmid:03}"),
    }
}
