//! How much of the disk a mount's cache may take, and what goes when it is too much, or when the disk has too little
//! room ([`super::room`]).
//!
//! Only blocks that the base has as well can go (see [`super::fetched`]). What was written counts, but stays until the
//! base moves on ([`super::rebase`]), which is asked for when it takes half of a budget that is used up. When what is
//! written alone fills the budget, that is logged, and of what is fetched only a small part stays.
//!
//! Whoever fetched makes room before he keeps what he has, after the reader has his answer; what others are about to
//! keep counts as well. Whoever writes makes room afterwards. A hand goes around all files that have fetched blocks and
//! drops cold ones, those that were read once. So a scan of a large table drops what it brought itself, and the hot set
//! stays. A block that is missed before as much was dropped as the budget holds would have stayed in a cache that drops
//! the oldest: it comes back hot. While fewer than a share of the fetched blocks are cold, hot ones that the hand
//! passes become cold: so what is not read any more goes in the end.

use std::{
    collections::VecDeque,
    sync::{
        Weak,
        atomic::{
            AtomicBool, AtomicI64, AtomicU64,
            Ordering::{AcqRel, Relaxed},
        },
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    cells::{BLOCK_BYTES, CELL_BYTES},
    fetched::Change,
    file::{FileContext, FileData},
    room::Room,
};

/// What is dropped at a time beyond what has to go, so that not every fetch has to drop: this share of the budget,
const SLACK_SHARE: u64 = 16;
/// but no more than this.
const SLACK_BYTES_MAX: u64 = 1024 * 1024;
/// The share of the budget that fetched blocks keep when what is written fills it.
const FLOOR_SHARE: u64 = 16;
/// The share of the budget that what is written may take before the base is asked to move on,
const WRITTEN_SHARE: u64 = 2;
/// once all but this share of the budget is used.
const UNUSED_SHARE: u64 = 8;
/// The share of fetched blocks that should be cold: how long a new block stays that is not read again.
const COLD_SHARE: u64 = 8;
/// Rounds of the hand at most, for one thread that makes room. In two, hot blocks have become cold and gone.
const ROUNDS_MAX: usize = 3;

/// What the cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// Bytes that can go at any time.
    pub(super) fetched: u64,
    /// Bytes that cannot. Holes in files count as well.
    pub(super) written: u64,
}

/// See the module.
pub(super) struct CacheBudget {
    limit: Option<u64>,
    /// Blocks.
    fetched: AtomicI64,
    /// About how many of them are hot.
    hot: AtomicI64,
    /// Cells.
    written: AtomicI64,
    /// Bytes that threads are about to keep.
    reserved: AtomicI64,
    evicted: AtomicU64,
    /// The file system of the cache cannot make holes, or failed to.
    cannot: AtomicBool,
    /// It was said that what is written fills the budget.
    told: AtomicBool,
    /// Blocks that were handed over to the base.
    handed_over: AtomicU64,
    /// Notified when the base should move on.
    crowded: Notify,
    hand: Mutex<Hand>,
    /// Files that have fetched blocks since a moment ago.
    newcomers: Mutex<Vec<Weak<FileData>>>,
}

#[derive(Default)]
struct Hand {
    files: VecDeque<Weak<FileData>>,
    /// Where in the first of them.
    word: u32,
}

impl CacheBudget {
    /// At most `limit` bytes; none: whatever there is.
    pub(super) fn new(limit: Option<u64>) -> CacheBudget {
        CacheBudget {
            limit,
            fetched: AtomicI64::new(0),
            hot: AtomicI64::new(0),
            written: AtomicI64::new(0),
            reserved: AtomicI64::new(0),
            evicted: AtomicU64::new(0),
            cannot: AtomicBool::new(false),
            told: AtomicBool::new(false),
            handed_over: AtomicU64::new(0),
            crowded: Notify::new(),
            hand: Mutex::default(),
            newcomers: Mutex::default(),
        }
    }

    /// The budget in bytes.
    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// What the cache holds. The numbers are changed one by one, so they may be apart by what is under way.
    pub(super) fn held(&self) -> Held {
        let bytes = |count: &AtomicI64, unit: u64| u64::try_from(count.load(Relaxed)).unwrap_or(0) * unit;
        Held { fetched: bytes(&self.fetched, BLOCK_BYTES), written: bytes(&self.written, CELL_BYTES) }
    }

    /// Blocks dropped so far.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted.load(Relaxed)
    }

    /// A file has fetched blocks. Called with the file's lock held.
    pub(super) fn enrol(&self, file: Weak<FileData>) {
        self.newcomers.lock().push(file);
    }

    /// On the clock of [`CacheBudget::evicted`]: what was dropped since then was dropped lately.
    pub(super) fn lately(&self) -> u64 {
        self.evicted().saturating_sub(self.limit.unwrap_or(0) / BLOCK_BYTES)
    }

    /// Blocks were fetched and kept.
    pub(super) fn count_fetched(&self, added: Change) {
        self.fetched.fetch_add(added.blocks.into(), Relaxed);
        self.count_hot(added.hot);
    }

    /// Blocks became hot.
    pub(super) fn count_hot(&self, blocks: u32) {
        if blocks > 0 {
            self.hot.fetch_add(blocks.into(), Relaxed);
        }
    }

    /// Blocks are not among the fetched any more.
    pub(super) fn count_removed(&self, removed: Change) {
        self.fetched.fetch_sub(removed.blocks.into(), Relaxed);
        self.hot.fetch_sub(removed.hot.into(), Relaxed);
    }

    /// So many cells more, or fewer, are written.
    pub(super) fn count_written(&self, cells: i64) {
        if cells != 0 {
            self.written.fetch_add(cells, Relaxed);
        }
    }

    /// Blocks that were written were handed over to the base.
    pub(super) fn count_handed_over(&self, blocks: u32) {
        self.handed_over.fetch_add(blocks.into(), Relaxed);
    }

    /// Blocks handed over so far.
    pub(super) fn handed_over(&self) -> u64 {
        self.handed_over.load(Relaxed)
    }

    /// Whether what is written takes so much that the base should move on.
    pub(super) fn is_crowded(&self) -> bool {
        let Some(limit) = self.limit else { return false };
        let held = self.held();
        held.written > limit / WRITTEN_SHARE && held.written + held.fetched > limit - limit / UNUSED_SHARE
    }

    /// Waits until [`CacheBudget::is_crowded`].
    pub(super) async fn crowded(&self) {
        while !self.is_crowded() {
            self.crowded.notified().await;
        }
    }

    /// Whoever kept something asks for the base to move on where that is due.
    fn look_for_a_crowd(&self) {
        if self.is_crowded() {
            self.crowded.notify_one();
        }
    }

    /// So many bytes more, or fewer, are about to be kept.
    pub(super) fn reserve(&self, bytes: i64) {
        self.reserved.fetch_add(bytes, Relaxed);
    }

    /// The bytes that should go, for the budget or for the disk; 0 while all is well.
    fn excess(&self, room: &Room) -> u64 {
        if self.cannot.load(Relaxed) {
            return 0;
        }
        let held = self.held();
        self.limit.map_or(0, |limit| self.above(limit, held)).max(room.shortage().min(held.fetched))
    }

    /// The bytes that should go to keep to a limit.
    fn above(&self, limit: u64, held: Held) -> u64 {
        if held.written > limit {
            if !self.told.swap(true, AcqRel) {
                tracing::warn!(
                    written_bytes = held.written,
                    limit_bytes = limit,
                    "what was written lately fills the cache's budget: the cache grows beyond it until the base has that, too"
                );
            }
        } else if held.written < limit / WRITTEN_SHARE && self.told.load(Relaxed) {
            self.told.store(false, Relaxed);
        }
        let wished = held.fetched + held.written + u64::try_from(self.reserved.load(Relaxed)).unwrap_or(0);
        if wished <= limit {
            return 0;
        }
        let wanted = wished - limit + (limit / SLACK_SHARE).min(SLACK_BYTES_MAX);
        wanted.min(held.fetched.saturating_sub(limit / FLOOR_SHARE))
    }

    /// Whether hot blocks that the hand passes are to become cold.
    fn cold_are_few(&self) -> bool {
        let (fetched, hot) = (self.fetched.load(Relaxed), self.hot.load(Relaxed));
        (fetched - hot) * (COLD_SHARE as i64) < fetched
    }

    /// Drops what is too much. One thread does it at a time; another waits for it if it `waits`, and otherwise leaves
    /// it to that one.
    pub(super) fn make_room(&self, context: &FileContext, waits: bool) {
        self.look_for_a_crowd();
        if self.excess(&context.room) == 0 {
            return;
        }
        let Some(mut hand) = (if waits { Some(self.hand.lock()) } else { self.hand.try_lock() }) else { return };
        // The thread before may have made enough.
        let mut wanted = self.excess(&context.room).div_ceil(BLOCK_BYTES);
        if wanted == 0 {
            return;
        }
        hand.files.extend(self.newcomers.lock().drain(..));
        for _ in 0..hand.files.len() * ROUNDS_MAX {
            let Some(file) = hand.files.front().and_then(Weak::upgrade) else {
                hand.files.pop_front();
                hand.word = 0;
                continue;
            };
            while hand.word < file.words() && wanted > 0 {
                let limit = u32::try_from(wanted).unwrap_or(u32::MAX);
                match file.evict(context, hand.word, limit) {
                    Ok(dropped) => {
                        self.evicted.fetch_add(dropped.into(), Relaxed);
                        context.room.give_back(u64::from(dropped) * BLOCK_BYTES);
                        wanted -= u64::from(dropped);
                    }
                    Err(error) => {
                        tracing::warn!("the cache cannot be kept within its budget, for no hole can be made in its files: {error}");
                        self.cannot.store(true, Relaxed);
                        return;
                    }
                }
                if self.cold_are_few() {
                    self.hot.fetch_sub(file.cool(hand.word).into(), Relaxed);
                }
                hand.word += 1;
            }
            if hand.word < file.words() {
                return;
            }
            hand.word = 0;
            let swept = hand.files.pop_front();
            if !file.leaves() {
                hand.files.extend(swept);
            }
            if wanted == 0 {
                return;
            }
        }
    }
}
