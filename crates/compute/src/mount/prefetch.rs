//! Fetching blocks before they are needed, in one batch over many files.

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use bytes::Bytes;
use fuser::Errno;
use varve_postgres::{
    Major, RelFork,
    paths::{BLOCKS_PER_FILE, relation_file},
};

use super::{
    base::{Base, concatenate, read_scattered},
    node::{Content, Node},
    tree::Tree,
};

/// Blocks that one call of the source brings at most.
const BATCH_BLOCKS: usize = 512;

/// Fetches those of `blocks` that are not here and that nobody fetches yet.
pub(super) fn prefetch(tree: &Tree, version: (Major, u32), blocks: &[(RelFork, u32)]) -> io::Result<()> {
    for batch in blocks.chunks(BATCH_BLOCKS) {
        prefetch_batch(tree, version, batch)?;
    }
    Ok(())
}

fn prefetch_batch(tree: &Tree, version: (Major, u32), blocks: &[(RelFork, u32)]) -> io::Result<()> {
    let t0 = std::time::Instant::now();
    let mut files: BTreeMap<(RelFork, u32), Vec<u32>> = BTreeMap::new();
    for &(fork, block) in blocks {
        files.entry((fork, block / BLOCKS_PER_FILE)).or_default().push(block % BLOCKS_PER_FILE);
    }
    let mut nodes = Vec::new();
    for ((fork, segment), mut wanted) in files {
        let Some(node) = find(tree, version, fork, segment)? else { continue };
        wanted.sort_unstable();
        wanted.dedup();
        let runs: Vec<Range<u32>> = wanted.into_iter().map(|block| block..block + 1).collect();
        nodes.push((node, runs));
    }
    eprintln!("found {:?}", t0.elapsed());
    let mut flights = Vec::new();
    let mut asked = Vec::new();
    for (node, runs) in &nodes {
        let Content::File(file) = &node.content else { continue };
        let Some(flight) = file.claim(runs) else { continue };
        asked.extend(flight.runs().iter().cloned().flatten().filter_map(|block| file.base().relation_block(block)));
        flights.push(flight);
    }
    if asked.is_empty() {
        return Ok(());
    }
    eprintln!("claimed {:?}", t0.elapsed());
    let mut pages = read_scattered(&tree.files.source, &asked)?.into_iter();
    tree.files.counters.count_fetch(asked.len());
    eprintln!("read {:?}", t0.elapsed());
    for flight in flights {
        let contents: Vec<Bytes> = flight.runs().iter().map(|run| concatenate(pages.by_ref().take(run.len()))).collect();
        flight.install(&tree.files, &contents)?;
    }
    eprintln!("installed {:?}", t0.elapsed());
    Ok(())
}

/// The file of the base that holds this part of a fork, if it is still there.
fn find(tree: &Tree, (major, catalog_version): (Major, u32), fork: RelFork, segment: u32) -> io::Result<Option<Arc<Node>>> {
    let found = match tree.find(&relation_file(fork, segment, major, catalog_version)) {
        Ok(found) => found,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
        Err(error) => return Err(io::Error::from_raw_os_error(error.code())),
    };
    // A file of that name may have been created here since.
    let same = matches!(&found.content, Content::File(file) if matches!(file.base(), Base::Relation { fork: base, .. } if *base == fork));
    Ok(same.then_some(found))
}
