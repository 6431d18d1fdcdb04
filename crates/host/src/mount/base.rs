//! What a file of the base is made of, and how its blocks are asked for.
//!
//! The base moves on ([`super::rebase`]). So a relation's file that was created here has a place in it as well, with no
//! blocks yet.

use std::{fmt, io, ops::Range};

use bytes::Bytes;
use varve_postgres::{
    BLCKSZ, Fork, RelFork, RelNode,
    ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE},
    paths::{BLOCKS_PER_FILE, RelationFileName},
    slru::SlruKind,
};

use super::{
    build::TABLESPACES,
    source::{PatientSource, wrong_length},
};

/// Where the contents of a file come from that nobody has written yet.
#[derive(Clone, Debug)]
pub(super) enum Base {
    /// Nowhere: the file was created here, and the base will never have it.
    None,
    /// A file of the base backup, in memory.
    Memory(Bytes),
    /// One file of a relation's fork. `fork` is where the contents are asked; for the main fork of an unlogged relation
    /// that is its init fork, which is how such a relation starts empty.
    Relation {
        /// The fork in the base.
        fork: RelFork,
        /// Number of this file within the fork.
        segment: u32,
        /// Blocks of this file when it was first seen here; none where it was created here.
        blocks: u32,
    },
    /// An SLRU's segment.
    Slru {
        /// Which area.
        kind: SlruKind,
        /// Which segment of it.
        segno: u32,
        /// Its pages.
        pages: u32,
    },
}

impl Base {
    /// Length of the file in the base.
    pub(super) fn bytes(&self) -> u64 {
        let blocks = match self {
            Base::None => 0,
            Base::Memory(contents) => return contents.len() as u64,
            Base::Relation { blocks, .. } => *blocks,
            Base::Slru { pages, .. } => *pages,
        };
        u64::from(blocks) * BLCKSZ as u64
    }

    /// Whether the contents are in memory: there is nothing to wait for.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self, Base::Memory(_))
    }

    /// The relation's block that stands at block `block` of the file, if the file is one of a relation.
    pub(super) fn relation_block(&self, block: u32) -> Option<(RelFork, u32)> {
        match self {
            Base::Relation { fork, segment, .. } if block < BLOCKS_PER_FILE => Some((*fork, segment * BLOCKS_PER_FILE + block)),
            _ => None,
        }
    }

    /// The base of a file that is created at `path` of the data directory.
    pub(super) fn of_new_file(path: &str) -> Base {
        match main_fork_at(path) {
            Some((node, segment)) => Base::Relation { fork: node.fork(Fork::Main), segment, blocks: 0 },
            None => Base::None,
        }
    }

    /// The relation and segment of a main fork's file, of which written blocks may be the base's again. Of an unlogged
    /// relation that is in the base that is none: its contents are those of its init fork.
    pub(super) fn main_fork(&self) -> Option<(RelNode, u32)> {
        match self {
            Base::Relation { fork: RelFork { node, fork: Fork::Main }, segment, .. } => Some((*node, *segment)),
            _ => None,
        }
    }

    /// Blocks of the file that can be fetched, or be the base's again.
    pub(super) fn blocks_max(&self) -> u32 {
        match self {
            // What is in memory is small, and not worth dropping.
            Base::None | Base::Memory(_) => 0,
            Base::Relation { fork: RelFork { fork: Fork::Main, .. }, .. } => BLOCKS_PER_FILE,
            Base::Relation { blocks, .. } => *blocks,
            Base::Slru { pages, .. } => *pages,
        }
    }

    /// Fetches runs of blocks; the answer has one buffer for each run. One call of the source whatever the runs are: a
    /// single range where they are dense enough that the waste is small, single blocks otherwise.
    pub(super) fn fetch(&self, source: &PatientSource, runs: &[Range<u32>]) -> io::Result<Vec<Bytes>> {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(Vec::new()) };
        let span = first.start..last.end;
        let wanted: u32 = runs.iter().map(|run| run.end - run.start).sum();
        match self {
            Base::Relation { fork, segment, .. } if wanted * 2 < span.end - span.start => {
                let to_fork = |block: u32| (*fork, segment * BLOCKS_PER_FILE + block);
                let blocks: Vec<(RelFork, u32)> = runs.iter().cloned().flatten().map(to_fork).collect();
                let pages = read_scattered(source, &blocks)?;
                let mut pages = pages.into_iter();
                Ok(runs.iter().map(|run| concatenate(pages.by_ref().take((run.end - run.start) as usize))).collect())
            }
            _ => {
                let bytes = self.fetch_span(source, span.clone())?;
                let offset = |block: u32| ((block - span.start) as usize * BLCKSZ).min(bytes.len());
                Ok(runs.iter().map(|run| bytes.slice(offset(run.start)..offset(run.end))).collect())
            }
        }
    }

    fn fetch_span(&self, source: &PatientSource, blocks: Range<u32>) -> io::Result<Bytes> {
        let count = blocks.end - blocks.start;
        let expected = count as usize * BLCKSZ;
        let bytes = match self {
            Base::None => return Err(io::Error::new(io::ErrorKind::InvalidInput, "a file created here has no base")),
            Base::Memory(contents) => {
                let offset = |block: u32| (block as usize * BLCKSZ).min(contents.len());
                return Ok(contents.slice(offset(blocks.start)..offset(blocks.end)));
            }
            Base::Relation { fork, segment, .. } => {
                let first = segment * BLOCKS_PER_FILE + blocks.start;
                source.call(Blocks { fork, first, count }, |source| source.read_blocks(*fork, first, count))?
            }
            Base::Slru { kind, segno, .. } => source
                .call(format_args!("{count} pages of {kind}/{segno:04X}"), |source| source.read_slru(*kind, *segno, blocks.start, count))?,
        };
        if bytes.len() == expected { Ok(bytes) } else { Err(wrong_length(expected, bytes.len())) }
    }
}

/// The relation whose main fork has a file at this path, and which file of it. A tablespace that was made since the
/// mount began and lies elsewhere is not found: its files stay as they are until the next start.
fn main_fork_at(path: &str) -> Option<(RelNode, u32)> {
    let parts: Vec<&str> = path.split('/').collect();
    let (spc, db, name) = match parts[..] {
        ["global", name] => (GLOBAL_TABLESPACE, 0, name),
        ["base", db, name] => (DEFAULT_TABLESPACE, db.parse().ok()?, name),
        [TABLESPACES | "pg_tblspc", spc, _, db, name] => (spc.parse().ok()?, db.parse().ok()?, name),
        _ => return None,
    };
    let name = RelationFileName::parse(name).filter(|name| name.fork == Fork::Main)?;
    Some((RelNode { spc, db, rel: name.rel }, name.file_number))
}

/// Reads scattered blocks of relations in one batch.
pub(super) fn read_scattered(source: &PatientSource, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
    let pages = source.call(format_args!("{} scattered blocks", blocks.len()), |source| source.read_scattered(blocks))?;
    if pages.len() != blocks.len() {
        return Err(wrong_length(blocks.len() * BLCKSZ, pages.len() * BLCKSZ));
    }
    match pages.iter().find(|page| page.len() != BLCKSZ) {
        Some(page) => Err(wrong_length(BLCKSZ, page.len())),
        None => Ok(pages),
    }
}

/// Pages one after the other, as one buffer.
pub(super) fn concatenate(pages: impl Iterator<Item = Bytes>) -> Bytes {
    let mut pages = pages.peekable();
    let first = pages.next().unwrap_or_default();
    if pages.peek().is_none() {
        return first;
    }
    let mut run = first.to_vec();
    for page in pages {
        run.extend_from_slice(&page);
    }
    run.into()
}

struct Blocks<'a> {
    fork: &'a RelFork,
    first: u32,
    count: u32,
}

impl fmt::Display for Blocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks of {} from {}", self.count, self.fork, self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_main_forks_have_a_place_in_the_base() {
        for (path, spc, db, rel, segment) in [
            ("base/5/16384", 1663, 5, 16384, 0),
            ("base/5/16384.7", 1663, 5, 16384, 7),
            ("global/1262", 1664, 0, 1262, 0),
            ("varve_tablespaces/16390/PG_15_202209061/5/17", 16390, 5, 17, 0),
            ("pg_tblspc/16390/PG_15_202209061/5/17", 16390, 5, 17, 0),
        ] {
            assert_eq!(Base::of_new_file(path).main_fork(), Some((RelNode { spc, db, rel }, segment)), "{path}");
        }
        for path in ["base/5/16384_vm", "base/5/t3_16384", "base/pgsql_tmp/1", "pg_xact/0000", "base/5/PG_VERSION", "base/5/1/2", "1", ""] {
            assert_eq!(Base::of_new_file(path).main_fork(), None, "{path}");
        }
        let unlogged = Base::Relation { fork: RelNode { spc: 1663, db: 5, rel: 9 }.fork(Fork::Init), segment: 0, blocks: 1 };
        assert_eq!(unlogged.main_fork(), None);
    }
}
