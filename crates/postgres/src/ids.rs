//! Names of relations, forks and blocks.

use std::fmt;

/// A Postgres object identifier.
pub type Oid = u32;
/// Number of an 8 KiB block within a relation fork.
pub type BlockNumber = u32;

/// `DEFAULTTABLESPACE_OID`: `base/`.
pub const DEFAULT_TABLESPACE: Oid = 1663;
/// `GLOBALTABLESPACE_OID`: `global/`.
pub const GLOBAL_TABLESPACE: Oid = 1664;

/// One file tree of a relation (`ForkNumber`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Fork {
    /// The relation's data.
    Main = 0,
    /// Free-space map, suffix `_fsm`.
    FreeSpaceMap = 1,
    /// Visibility map, suffix `_vm`.
    VisibilityMap = 2,
    /// What an unlogged relation is reset to, suffix `_init`.
    Init = 3,
}

impl Fork {
    /// All forks, in Postgres's order.
    pub const ALL: [Fork; 4] = [Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init];

    /// The fork with Postgres's number `number`.
    pub fn from_number(number: u8) -> Option<Fork> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Postgres's number of this fork.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Suffix of this fork's file names, empty for the main fork.
    pub fn suffix(self) -> &'static str {
        match self {
            Fork::Main => "",
            Fork::FreeSpaceMap => "_fsm",
            Fork::VisibilityMap => "_vm",
            Fork::Init => "_init",
        }
    }
}

impl fmt::Debug for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fork::Main => "main",
            Fork::FreeSpaceMap => "fsm",
            Fork::VisibilityMap => "vm",
            Fork::Init => "init",
        })
    }
}

/// A relation's physical name (`RelFileNode`, from 16 on `RelFileLocator`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelNode {
    /// Tablespace.
    pub spc: Oid,
    /// Database; 0 for shared relations.
    pub db: Oid,
    /// The relation's file number.
    pub rel: Oid,
}

impl RelNode {
    /// This relation's fork `fork`.
    pub fn fork(self, fork: Fork) -> RelFork {
        RelFork { node: self, fork }
    }
}

impl fmt::Display for RelNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.spc, self.db, self.rel)
    }
}

impl fmt::Debug for RelNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A fork of a relation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelFork {
    /// The relation.
    pub node: RelNode,
    /// Which of its forks.
    pub fork: Fork,
}

impl fmt::Display for RelFork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.node, self.fork.suffix())
    }
}

impl fmt::Debug for RelFork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
