//! Which blocks of a file can go at any time: those that were fetched and not written since, which the base still has.
//!
//! A block is *fetched* from the moment it is kept until it is written, cut off or dropped. It is *hot* once it was
//! read again through the mount, or fetched again soon after it was dropped. Since the kernel keeps pages itself, that
//! says: Postgres needs it more often than the kernel could remember. Takes 64 KiB for a file of 1 GiB that is fetched,
//! in parts that come with the first block of 32 MiB.
//!
//! A written block that the base has as well is taken for a fetched one from then on (see [`super::rule`]).
//!
//! Whether a block is fetched changes under the lock of its file only. That it is hot may be noted without: it decides
//! what goes first, and nothing else.

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
};

use super::cells::mask_of;

/// Blocks in a word.
pub(super) const WORD_BLOCKS: u32 = u64::BITS;

/// Words in a part.
const PART_WORDS: u32 = 64;

/// Words that come together.
type Part = OnceLock<Box<[Word]>>;

/// See the module.
pub(super) struct FetchedBlocks {
    blocks: u32,
    count: AtomicU32,
    /// One behind the last word that ever had a fetched block.
    words: AtomicU32,
    parts: OnceLock<Box<[Part]>>,
}

#[derive(Default)]
struct Word {
    fetched: AtomicU64,
    hot: AtomicU64,
    /// Blocks that were dropped lately.
    missed: AtomicU64,
    /// When the last of them was, on the clock that counts what is dropped.
    dropped_at: AtomicU64,
}

/// Blocks that are fetched from now on, or no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// How many.
    pub(super) blocks: u32,
    /// How many of them are, or were, hot.
    pub(super) hot: u32,
}

impl FetchedBlocks {
    /// None of `blocks` blocks is.
    pub(super) fn none(blocks: u32) -> FetchedBlocks {
        FetchedBlocks { blocks, count: AtomicU32::new(0), words: AtomicU32::new(0), parts: OnceLock::new() }
    }

    /// How many can be.
    pub(super) fn capacity(&self) -> u32 {
        self.blocks
    }

    /// How many are.
    pub(super) fn count(&self) -> u32 {
        self.count.load(Acquire)
    }

    /// A word, where it is there.
    fn word(&self, word: u32) -> Option<&Word> {
        let part = self.parts.get()?.get((word / PART_WORDS) as usize)?;
        part.get()?.get((word % PART_WORDS) as usize)
    }

    /// The words that hold bits of `range`, each with its number and a mask of them.
    fn words_of(&self, range: &Range<u32>) -> impl Iterator<Item = (u32, &Word, u64)> {
        let range = range.start..range.end.min(self.blocks);
        let end = range.end.div_ceil(WORD_BLOCKS).min(self.words());
        let numbers = if range.is_empty() { 0..0 } else { range.start / WORD_BLOCKS..end };
        numbers.filter_map(move |word| Some((word, self.word(word)?, mask_of(word, &range))))
    }

    /// Makes the words that hold bits of `range`.
    fn make(&self, range: &Range<u32>) {
        let words = range.start / WORD_BLOCKS..range.end.min(self.blocks).div_ceil(WORD_BLOCKS);
        let parts = self.parts.get_or_init(|| (0..self.blocks.div_ceil(WORD_BLOCKS * PART_WORDS)).map(|_| Part::new()).collect());
        for part in parts.iter().take(words.end.div_ceil(PART_WORDS) as usize).skip((words.start / PART_WORDS) as usize) {
            part.get_or_init(|| (0..PART_WORDS).map(|_| Word::default()).collect());
        }
        self.words.fetch_max(words.end, AcqRel);
    }

    /// Blocks were fetched and kept; which of them are new. Those are hot that were dropped since `soon`. With the
    /// file's lock held.
    pub(super) fn add(&self, blocks: &Range<u32>, soon: u64) -> Change {
        self.make(blocks);
        let mut added = Change::default();
        for (_, word, mask) in self.words_of(blocks) {
            let new = mask & !word.fetched.fetch_or(mask, AcqRel);
            let missed = new & word.missed.fetch_and(!new, AcqRel);
            let hot = if word.dropped_at.load(Acquire) >= soon { missed } else { 0 };
            // A reader that came late may have left its mark.
            word.hot.fetch_and(!new, AcqRel);
            word.hot.fetch_or(hot, AcqRel);
            added.blocks += new.count_ones();
            added.hot += hot.count_ones();
        }
        self.count.fetch_add(added.blocks, AcqRel);
        added
    }

    /// Blocks are dropped, at `now`; which were fetched. It is remembered until blocks beside them are dropped after
    /// `soon` has come. With the file's lock held.
    pub(super) fn drop(&self, blocks: &Range<u32>, soon: u64, now: u64) -> Change {
        for (_, word, mask) in self.words_of(blocks) {
            if word.dropped_at.swap(now, AcqRel) < soon {
                word.missed.store(0, Relaxed);
            }
            word.missed.fetch_or(word.fetched.load(Acquire) & mask, AcqRel);
        }
        self.remove(blocks)
    }

    /// Blocks are written or cut off; which were fetched. With the file's lock held.
    pub(super) fn remove(&self, blocks: &Range<u32>) -> Change {
        let mut removed = Change::default();
        if self.count() == 0 {
            return removed;
        }
        for (_, word, mask) in self.words_of(blocks) {
            removed.blocks += (word.fetched.fetch_and(!mask, AcqRel) & mask).count_ones();
            removed.hot += (word.hot.fetch_and(!mask, AcqRel) & mask).count_ones();
        }
        self.count.fetch_sub(removed.blocks, AcqRel);
        removed
    }

    /// Blocks are read that were here already; how many are newly hot.
    pub(super) fn touch(&self, blocks: &Range<u32>) -> u32 {
        let mut heated = 0;
        for (_, word, mask) in self.words_of(blocks) {
            let fetched = word.fetched.load(Relaxed) & mask;
            // Mostly they are hot already, and nothing is written.
            if fetched & !word.hot.load(Relaxed) != 0 {
                heated += (fetched & !word.hot.fetch_or(fetched, AcqRel)).count_ones();
            }
        }
        heated
    }

    /// The number of words that ever had fetched blocks, with those before them.
    pub(super) fn words(&self) -> u32 {
        self.words.load(Acquire)
    }

    /// Whether a block is fetched.
    pub(super) fn has(&self, block: u32) -> bool {
        self.word(block / WORD_BLOCKS).is_some_and(|word| word.fetched.load(Acquire) >> (block % WORD_BLOCKS) & 1 == 1)
    }

    /// Runs of at most `limit` blocks of a word that are fetched and not hot.
    pub(super) fn cold(&self, word: u32, limit: u32) -> Vec<Range<u32>> {
        let Some(found) = self.word(word) else { return Vec::new() };
        let mut bits = found.fetched.load(Acquire) & !found.hot.load(Acquire);
        let (mut runs, mut left) = (Vec::new(), limit);
        while bits != 0 && left > 0 {
            let start = bits.trailing_zeros();
            let length = (!(bits >> start)).trailing_zeros().min(WORD_BLOCKS - start).min(left);
            let first = word * WORD_BLOCKS + start;
            runs.push(first..first + length);
            left -= length;
            bits &= !mask_of(0, &(start..start + length));
        }
        runs
    }

    /// Blocks of a word are hot no more, unless they are read again; how many were.
    pub(super) fn cool(&self, word: u32) -> u32 {
        self.word(word).map_or(0, |word| word.hot.swap(0, AcqRel).count_ones())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cold(fetched: &FetchedBlocks, word: u32, limit: u32) -> Vec<(u32, u32)> {
        fetched.cold(word, limit).into_iter().map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn what_is_read_again_is_hot_until_it_is_cooled() {
        let fetched = FetchedBlocks::none(200);
        assert_eq!(fetched.touch(&(0..200)), 0, "nothing is here yet");
        assert_eq!(fetched.add(&(60..140), 0), Change { blocks: 80, hot: 0 });
        assert_eq!(fetched.add(&(130..150), 0), Change { blocks: 10, hot: 0 });
        assert_eq!(fetched.touch(&(62..66)), 4);
        assert_eq!(fetched.touch(&(65..67)), 1);
        assert_eq!(cold(&fetched, 0, 99), [(60, 62)]);
        assert_eq!(cold(&fetched, 1, 99), [(67, 128)]);
        assert_eq!(cold(&fetched, 1, 5), [(67, 72)]);
        assert_eq!(cold(&fetched, 2, 99), [(128, 150)]);
        assert_eq!(fetched.cool(0), 2);
        assert_eq!(cold(&fetched, 0, 99), [(60, 64)]);
        assert_eq!(fetched.remove(&(0..66)), Change { blocks: 6, hot: 2 });
        assert_eq!(fetched.remove(&(64..1000)), Change { blocks: 84, hot: 1 });
        assert_eq!(fetched.count(), 0);
    }

    #[test]
    fn what_is_missed_soon_comes_back_hot() {
        let fetched = FetchedBlocks::none(64);
        fetched.add(&(0..10), 0);
        assert_eq!(fetched.drop(&(0..4), 0, 100), Change { blocks: 4, hot: 0 });
        assert_eq!(fetched.add(&(0..2), 100), Change { blocks: 2, hot: 2 });
        assert_eq!(fetched.add(&(2..4), 101), Change { blocks: 2, hot: 0 });
        fetched.drop(&(4..6), 101, 200);
        fetched.drop(&(6..8), 201, 300);
        assert_eq!(fetched.add(&(4..8), 250), Change { blocks: 4, hot: 2 });
    }

    #[test]
    fn blocks_far_apart_are_kept_apart() {
        let fetched = FetchedBlocks::none(131_072);
        assert_eq!(fetched.words(), 0);
        assert_eq!(fetched.add(&(100_000..100_070), 0), Change { blocks: 70, hot: 0 });
        assert_eq!(fetched.add(&(4_090..4_100), 0), Change { blocks: 10, hot: 0 });
        assert_eq!((fetched.words(), fetched.count()), (1_564, 80));
        assert!(fetched.has(4_095) && fetched.has(4_096) && fetched.has(100_069));
        assert!(!fetched.has(4_100) && !fetched.has(0) && !fetched.has(131_071));
        assert_eq!(cold(&fetched, 63, 99), [(4_090, 4_096)]);
        assert_eq!(cold(&fetched, 64, 99), [(4_096, 4_100)]);
        assert_eq!(fetched.remove(&(0..u32::MAX)), Change { blocks: 80, hot: 0 });
    }

    #[test]
    fn a_full_word_is_one_run() {
        let fetched = FetchedBlocks::none(64);
        fetched.add(&(0..64), 0);
        assert_eq!(cold(&fetched, 0, 64), [(0, 64)]);
        assert_eq!(cold(&fetched, 1, 64), []);
    }
}
