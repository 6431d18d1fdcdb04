//! Fetching blocks before they are needed, in batches over many files.
//!
//! Readers have the blocks as soon as they have landed; that is all that the caller waits for. Keeping them, which
//! makes cache files and takes longer than the fetch, goes on behind his back.

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use bytes::Bytes;
use fuser::Errno;
use varve_postgres::{
    Major, RelFork,
    paths::{BLOCKS_PER_FILE, relation_file},
};

use super::{
    base::{Base, concatenate, read_scattered},
    file::Flight,
    node::{Content, Node},
    tree::Tree,
};

/// Blocks that one call of the source brings at most.
const BATCH_BLOCKS: usize = 512;
/// Blocks that are held in memory at most, until they are kept: 64 MiB.
const LANDED_BLOCKS_MAX: usize = 8192;

/// A file, and the runs of its blocks that are wanted.
type WantedFile = (Arc<Node>, Vec<Range<u32>>);

/// Fetches those of `blocks` that are not here and that nobody fetches yet. Calls `landed` when all can be read, and
/// returns when all are kept.
pub(super) fn prefetch(tree: &Tree, version: (Major, u32), blocks: &[(RelFork, u32)], landed: impl FnOnce(io::Result<()>)) {
    let mut parts = blocks.chunks(LANDED_BLOCKS_MAX).peekable();
    let mut landed = Some(landed);
    while let Some(part) = parts.next() {
        let nodes = match find_all(tree, version, part) {
            Ok(nodes) => nodes,
            Err(error) => return tell(&mut landed, Err(error)),
        };
        let flights = match fetch(tree, &nodes) {
            Ok(flights) => flights,
            Err(error) => return tell(&mut landed, Err(error)),
        };
        if parts.peek().is_none() {
            tell(&mut landed, Ok(()));
        }
        for flight in flights {
            if let Err(error) = flight.keep_within_budget(&tree.files) {
                tracing::warn!("cannot keep blocks fetched ahead in the cache, they will be fetched again: {error}");
            }
        }
    }
    tell(&mut landed, Ok(()));
}

fn tell(landed: &mut Option<impl FnOnce(io::Result<()>)>, result: io::Result<()>) {
    if let Some(landed) = landed.take() {
        landed(result);
    }
}

/// The files of the blocks, with the blocks of each as runs.
fn find_all(tree: &Tree, version: (Major, u32), blocks: &[(RelFork, u32)]) -> io::Result<Vec<WantedFile>> {
    let mut files: BTreeMap<(RelFork, u32), Vec<u32>> = BTreeMap::new();
    for &(fork, block) in blocks {
        files.entry((fork, block / BLOCKS_PER_FILE)).or_default().push(block % BLOCKS_PER_FILE);
    }
    let mut nodes = Vec::new();
    for ((fork, segment), mut wanted) in files {
        let Some(node) = find(tree, version, fork, segment)? else { continue };
        wanted.sort_unstable();
        wanted.dedup();
        nodes.push((node, wanted.into_iter().map(|block| block..block + 1).collect()));
    }
    Ok(nodes)
}

/// Fetches what is absent of the files' blocks.
fn fetch<'a>(tree: &Tree, nodes: &'a [WantedFile]) -> io::Result<Vec<Flight<'a>>> {
    let mut flights: Vec<(Flight<'a>, Vec<(RelFork, u32)>)> = Vec::new();
    for (node, runs) in nodes {
        let Content::File(file) = &node.content else { continue };
        for runs in runs.chunks(BATCH_BLOCKS) {
            let Some(flight) = file.claim(runs) else { continue };
            let blocks = flight.runs().iter().cloned().flatten().filter_map(|block| file.base().relation_block(block)).collect();
            flights.push((flight, blocks));
        }
    }
    let mut landed = Vec::with_capacity(flights.len());
    let mut flights = flights.into_iter().peekable();
    while flights.peek().is_some() {
        let mut batch = Vec::new();
        let mut asked: Vec<(RelFork, u32)> = Vec::new();
        while let Some((flight, blocks)) = flights.next_if(|(_, blocks)| asked.is_empty() || asked.len() + blocks.len() <= BATCH_BLOCKS) {
            asked.extend(blocks);
            batch.push(flight);
        }
        let mut pages = read_scattered(&tree.files.source, &asked)?.into_iter();
        tree.files.counters.count_fetch(asked.len());
        for mut flight in batch {
            let contents: Vec<Bytes> = flight.runs().iter().map(|run| concatenate(pages.by_ref().take(run.len()))).collect();
            flight.land(contents);
            landed.push(flight);
        }
    }
    Ok(landed)
}

/// The file of the base that holds this part of a fork, if it is still there.
fn find(tree: &Tree, (major, catalog_version): (Major, u32), fork: RelFork, segment: u32) -> io::Result<Option<Arc<Node>>> {
    let found = match tree.find(&tree.places.resolve(&relation_file(fork, segment, major, catalog_version))) {
        Ok(found) => found,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
        Err(error) => return Err(io::Error::from_raw_os_error(error.code())),
    };
    // A file of that name may have been created here since.
    let same = matches!(&found.content, Content::File(file) if matches!(file.base(), Base::Relation { fork: base, .. } if *base == fork));
    Ok(same.then_some(found))
}
