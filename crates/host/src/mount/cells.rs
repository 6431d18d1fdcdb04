//! Which parts of a file are still to be had from the base.
//!
//! A file is cut into *cells* of 4 KiB, the kernel's page: a write-back of the kernel then always covers whole cells,
//! so writing never has to fetch, even where the kernel writes back one half of a Postgres block. A cell is *absent*
//! (its contents are those of the base and not here) or *present* (written here, fetched, or zero: the cache file says
//! what it holds). What the base has as well may become absent again (see [`super::fetched`]): what was fetched, and
//! what was written once it was handed over to the base (see [`super::rule`]). Anything else that was written,
//! truncated or punched is present. That is what keeps a late fetch from overwriting anything newer, and what keeps a
//! truncated, punched or unlinked range from falling through to the base again.

use std::ops::Range;

/// Bytes in a cell.
pub(super) const CELL_BYTES: u64 = 4096;
/// Cells in a Postgres block, the unit in which the base is asked.
pub(super) const CELLS_PER_BLOCK: u32 = 2;
/// Bytes in a block.
pub(super) const BLOCK_BYTES: u64 = CELL_BYTES * CELLS_PER_BLOCK as u64;

/// The absent cells of one file. Takes memory only while some cells are absent and others are not: 32 KiB for a file of
/// 1 GiB.
#[derive(Debug)]
pub(super) struct AbsentCells {
    cells: u32,
    absent: u32,
    /// Bit set: absent. `None` while all are absent or none is.
    bits: Option<Box<[u64]>>,
}

impl AbsentCells {
    /// All cells of a file of `bytes` bytes are absent.
    pub(super) fn all(bytes: u64) -> AbsentCells {
        let cells = u32::try_from(bytes.div_ceil(CELL_BYTES)).unwrap_or(u32::MAX);
        AbsentCells { cells, absent: cells, bits: None }
    }

    /// Number of absent cells.
    pub(super) fn count(&self) -> u32 {
        self.absent
    }

    /// Where the last cell ends that can be absent.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.cells) * CELL_BYTES
    }

    /// Cells of a file of `bytes` bytes can be absent; none of those that come with it is.
    pub(super) fn grow(&mut self, bytes: u64) {
        let cells = u32::try_from(bytes.div_ceil(CELL_BYTES)).unwrap_or(u32::MAX);
        if cells <= self.cells {
            return;
        }
        if self.absent > 0 {
            let mut bits = self.bits_of_all().into_vec();
            bits.resize((cells as usize).div_ceil(64), 0);
            self.bits = Some(bits.into());
        }
        self.cells = cells;
    }

    /// The bits, which are made where all are alike.
    fn bits_of_all(&mut self) -> Box<[u64]> {
        let (cells, absent) = (self.cells, self.absent > 0);
        self.bits.take().unwrap_or_else(|| {
            let mut bits = vec![if absent { u64::MAX } else { 0 }; (cells as usize).div_ceil(64)].into_boxed_slice();
            if let (Some(last), rest @ 1.., true) = (bits.last_mut(), cells % 64, absent) {
                *last = (1 << rest) - 1;
            }
            bits
        })
    }

    fn clip(&self, range: Range<u64>) -> Range<u32> {
        let clip = |cell: u64| u32::try_from(cell).unwrap_or(u32::MAX).min(self.cells);
        clip(range.start)..clip(range.end)
    }

    fn is_absent(&self, cell: u32) -> bool {
        match &self.bits {
            Some(bits) => cell < self.cells && bits[cell as usize / 64] >> (cell % 64) & 1 == 1,
            None => cell < self.cells && self.absent > 0,
        }
    }

    /// Whether any cell of `range` is absent.
    pub(super) fn any(&self, range: Range<u64>) -> bool {
        self.next_absent(self.clip(range)).is_some()
    }

    /// The first absent cell of `range`.
    fn next_absent(&self, range: Range<u32>) -> Option<u32> {
        if range.is_empty() || self.absent == 0 {
            return None;
        }
        let Some(bits) = &self.bits else { return Some(range.start) };
        let mut word = range.start as usize / 64;
        let mut rest = bits[word] & (u64::MAX << (range.start % 64));
        loop {
            if rest != 0 {
                let cell = (word * 64) as u32 + rest.trailing_zeros();
                return (cell < range.end).then_some(cell);
            }
            word += 1;
            if word * 64 >= range.end as usize {
                return None;
            }
            rest = bits[word];
        }
    }

    /// The runs of absent cells within `range`.
    pub(super) fn runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let Range { mut start, end } = self.clip(range);
        let mut runs = Vec::new();
        while let Some(first) = self.next_absent(start..end) {
            let mut last = first + 1;
            while last < end && self.is_absent(last) {
                last += 1;
            }
            runs.push(u64::from(first)..u64::from(last));
            start = last;
        }
        runs
    }

    /// The blocks to which the absent cells of `range` belong, as runs.
    pub(super) fn blocks(&self, range: Range<u64>) -> Vec<Range<u32>> {
        let cells_per_block = u64::from(CELLS_PER_BLOCK);
        let mut blocks: Vec<Range<u32>> = Vec::new();
        for run in self.runs(range) {
            let start = (run.start / cells_per_block) as u32;
            let end = run.end.div_ceil(cells_per_block) as u32;
            match blocks.last_mut() {
                Some(last) if start <= last.end => last.end = end,
                _ => blocks.push(start..end),
            }
        }
        blocks
    }

    /// The cells of `range` are present from now on.
    pub(super) fn clear(&mut self, range: Range<u64>) {
        self.change(range, false);
    }

    /// The cells of `range` are absent again.
    pub(super) fn set(&mut self, range: Range<u64>) {
        self.change(range, true);
    }

    fn change(&mut self, range: Range<u64>, absent: bool) {
        let range = self.clip(range);
        let (none, all) = (0, self.cells);
        if range.is_empty() || self.absent == if absent { all } else { none } {
            return;
        }
        if range == (0..self.cells) {
            self.absent = if absent { all } else { none };
            self.bits = None;
            return;
        }
        let mut bits = self.bits_of_all();
        for word in range.start / 64..range.end.div_ceil(64) {
            let mask = mask_of(word, &range);
            let old = bits[word as usize];
            bits[word as usize] = if absent { old | mask } else { old & !mask };
            self.absent = self.absent + bits[word as usize].count_ones() - old.count_ones();
        }
        self.bits = (self.absent != none && self.absent != all).then_some(bits);
    }
}

/// Those of the 64 bits of word `word` that `range` covers.
pub(super) fn mask_of(word: u32, range: &Range<u32>) -> u64 {
    let from = range.start.max(word * 64) - word * 64;
    let to = range.end.min((word + 1) * 64) - word * 64;
    if to - from == 64 { u64::MAX } else { ((1 << (to - from)) - 1) << from }
}

/// The cells that bytes `start..end` touch.
pub(super) fn cells_of(start: u64, end: u64) -> Range<u64> {
    start / CELL_BYTES..end.div_ceil(CELL_BYTES)
}

/// The blocks that bytes `start..end` touch.
pub(super) fn blocks_of(start: u64, end: u64) -> Range<u32> {
    let clip = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
    clip(start / BLOCK_BYTES)..clip(end.div_ceil(BLOCK_BYTES))
}

/// The cells of blocks.
pub(super) fn cells_of_blocks(blocks: &Range<u32>) -> Range<u64> {
    u64::from(blocks.start) * u64::from(CELLS_PER_BLOCK)..u64::from(blocks.end) * u64::from(CELLS_PER_BLOCK)
}

/// The blocks that cells belong to.
pub(super) fn blocks_of_cells(cells: &Range<u64>) -> Range<u32> {
    blocks_of(cells.start.saturating_mul(CELL_BYTES), cells.end.saturating_mul(CELL_BYTES))
}

/// The blocks all of whose cells are among `cells`.
pub(super) fn whole_blocks(cells: &Range<u64>) -> Range<u32> {
    let per_block = u64::from(CELLS_PER_BLOCK);
    let (start, end) = (cells.start.div_ceil(per_block) as u32, (cells.end / per_block) as u32);
    start..end.max(start)
}

/// The cells of a file of `bytes` bytes.
pub(super) fn cells_in(bytes: u64) -> i64 {
    i64::try_from(bytes.div_ceil(CELL_BYTES)).unwrap_or(i64::MAX)
}

/// The parts of the runs `left` that are not in `taken`.
pub(super) fn without(left: Vec<Range<u32>>, taken: &Range<u32>) -> Vec<Range<u32>> {
    let cut = |run: Range<u32>| [run.start..run.end.min(taken.start), run.start.max(taken.end)..run.end];
    left.into_iter().flat_map(cut).filter(|run| !run.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_set_of_cells(cells in 1u64..300, changes in prop::collection::vec((0u64..320, 0u64..90, any::<bool>()), 0..20)) {
            let mut absent = AbsentCells::all(cells * CELL_BYTES - 7);
            let mut model: Vec<bool> = vec![true; cells as usize];
            let mut cells = cells;
            for (number, (start, length, again)) in changes.into_iter().enumerate() {
                if number % 4 == 3 {
                    cells += length / 3;
                    absent.grow(cells * CELL_BYTES - 7);
                    model.resize(cells as usize, false);
                }
                absent.change(start..start + length, again);
                for cell in start..(start + length).min(cells) {
                    model[cell as usize] = again;
                }
                prop_assert_eq!(absent.count() as usize, model.iter().filter(|absent| **absent).count());
                prop_assert_eq!(absent.any(start..start + 40), (start..(start + 40).min(cells)).any(|cell| model[cell as usize]));
                let runs: Vec<u64> = absent.runs(0..cells).into_iter().flatten().collect();
                let expected: Vec<u64> = (0..cells).filter(|cell| model[*cell as usize]).collect();
                prop_assert_eq!(runs, expected);
                let blocks: Vec<u32> = absent.blocks(0..400).into_iter().flatten().collect();
                let expected: Vec<u32> = (0..cells.div_ceil(2) as u32)
                    .filter(|block| [block * 2, block * 2 + 1].iter().any(|cell| model.get(*cell as usize) == Some(&true)))
                    .collect();
                prop_assert_eq!(blocks, expected);
            }
        }
    }

    #[test]
    fn takes_no_bitmap_when_all_cells_are_alike() {
        let mut absent = AbsentCells::all(1 << 30);
        assert!(absent.bits.is_none());
        absent.clear(5..6);
        assert!(absent.bits.is_some());
        absent.clear(0..1 << 18);
        assert!(absent.bits.is_none() && absent.count() == 0);
        absent.set(7..9);
        assert!(absent.bits.is_some() && absent.count() == 2);
        absent.set(0..1 << 18);
        assert!(absent.bits.is_none() && absent.count() == 1 << 18);
    }
}
