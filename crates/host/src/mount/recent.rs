//! Which blocks of a file were written since the last *mark*, a moment that is the same for all files of a mount.
//!
//! What is not among them was written last before the mark. The mark is a number that grows; a file forgets what it
//! noted under a former one when it notes something under a newer. So a mark costs nothing, however many files there
//! are. Takes 16 KiB for a file of 1 GiB that is written.

use std::ops::Range;

use super::cells::mask_of;

/// See the module. Changed with the file's lock held, under which the mark is read as well: then what is noted never
/// belongs to an older mark than what was noted before.
#[derive(Debug, Default)]
pub(super) struct RecentWrites {
    mark: u64,
    words: Vec<u64>,
}

impl RecentWrites {
    /// Blocks are written, or will be before the lock for writers is given back.
    pub(super) fn note(&mut self, mark: u64, blocks: Range<u32>) {
        if blocks.is_empty() {
            return;
        }
        if self.mark != mark {
            self.mark = mark;
            self.words.fill(0);
        }
        let words = blocks.end.div_ceil(u64::BITS) as usize;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for word in blocks.start / u64::BITS..blocks.end.div_ceil(u64::BITS) {
            self.words[word as usize] |= mask_of(word, &blocks);
        }
    }

    /// Whether a block was written since `mark`, the newest there is.
    pub(super) fn has(&self, mark: u64, block: u32) -> bool {
        let word = self.words.get((block / u64::BITS) as usize).copied().unwrap_or(0);
        self.mark == mark && word >> (block % u64::BITS) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_mark_forgets_what_was_written_before() {
        let mut recent = RecentWrites::default();
        recent.note(1, 60..70);
        recent.note(1, 3..4);
        recent.note(1, 9..9);
        let noted = |recent: &RecentWrites, mark| (0..200).filter(|block| recent.has(mark, *block)).collect::<Vec<_>>();
        assert_eq!(noted(&recent, 1), [vec![3], (60..70).collect()].concat());
        assert_eq!(noted(&recent, 2), Vec::<u32>::new());
        recent.note(2, 61..62);
        assert_eq!(noted(&recent, 2), [61]);
        assert_eq!(noted(&recent, 1), Vec::<u32>::new());
    }
}
