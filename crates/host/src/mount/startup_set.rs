//! Which blocks of the base a start reads: nearly the same ones each time, so that the next start can have them in one
//! batch.

use std::{
    collections::HashSet,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use varve_postgres::RelFork;

use super::{base::Base, cells::BLOCK_BYTES};

/// Blocks remembered at most: a start reads about a hundred, and a set that is much larger is no set of a start.
const BLOCKS_MAX: usize = 8192;

/// Notes the blocks that are read in the first seconds of a mount, in the order of their first read.
pub(super) struct StartupSet {
    recording: AtomicBool,
    end: Instant,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    order: Vec<(RelFork, u32)>,
    set: HashSet<(RelFork, u32)>,
}

impl StartupSet {
    /// Records from now on for `duration`.
    pub(super) fn record_for(duration: Duration) -> StartupSet {
        StartupSet { recording: AtomicBool::new(true), end: Instant::now() + duration, seen: Mutex::default() }
    }

    /// Blocks `blocks` of a file are read.
    pub(super) fn note(&self, base: &Base, blocks: Range<u32>) {
        if !self.recording.load(Relaxed) || !matches!(base, Base::Relation { .. }) {
            return;
        }
        let mut seen = self.seen.lock();
        if Instant::now() >= self.end {
            self.recording.store(false, Relaxed);
            return;
        }
        let of_the_base = u32::try_from(base.bytes() / BLOCK_BYTES).unwrap_or(u32::MAX);
        for block in (blocks.start..blocks.end.min(of_the_base)).filter_map(|block| base.relation_block(block)) {
            if seen.set.insert(block) {
                seen.order.push(block);
            }
        }
        if seen.order.len() >= BLOCKS_MAX {
            self.recording.store(false, Relaxed);
        }
    }

    /// What was noted so far.
    pub(super) fn blocks(&self) -> Vec<(RelFork, u32)> {
        self.seen.lock().order.clone()
    }
}
