//! Handing written blocks of a main fork over to the base, which has them as well by now: they count as fetched from
//! then on, and go like those.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::super::cells::{BLOCK_BYTES, CELLS_PER_BLOCK, cells_of_blocks};
use super::super::fetched::Change;
use super::super::rule::{Terms, Verdict, Why, verdict};
use super::{Blocks, FileContext, FileData};

/// Blocks that are looked at in one go. Nobody writes to the file meanwhile.
const AT_ONCE: u32 = 64;
/// How long those who write are waited for. Beyond that the blocks stay, for this time.
const WRITERS_WAIT: Duration = Duration::from_millis(100);

/// What became of written blocks when the base moved on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// They are the base's.
    pub handed_over: u64,
    /// They were written since the mark.
    pub recent: u64,
    /// They are zeros, which take no room.
    pub zeros: u64,
    /// A transaction that may still run, or a multixact, is on them.
    pub transactions: u64,
    /// They were split while a `VACUUM` ran.
    pub vacuum: u64,
    /// They are not in WAL, or not as they are here.
    pub not_logged: u64,
    /// They are of a kind that is not known.
    pub unknown: u64,
    /// Somebody wrote or fetched.
    pub busy: u64,
}

impl Tally {
    fn count(&mut self, why: Why) {
        *match why {
            Why::Zeros => &mut self.zeros,
            Why::Transactions => &mut self.transactions,
            Why::Vacuum => &mut self.vacuum,
            Why::NotLogged => &mut self.not_logged,
            Why::Unknown => &mut self.unknown,
        } += 1;
    }
}

impl FileData {
    /// Hands over what the rule lets go, of a file of which the base has `blocks_in_base` blocks.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub(in super::super) fn hand_over(
        &self,
        context: &FileContext,
        terms: &Terms,
        blocks_in_base: u32,
        tally: &mut Tally,
    ) -> io::Result<()> {
        let here = u32::try_from(self.size() / BLOCK_BYTES).unwrap_or(u32::MAX);
        let end = blocks_in_base.min(here).min(self.fetched.capacity());
        for start in (0..end).step_by(AT_ONCE as usize) {
            self.hand_over_some(context, terms, start..(start + AT_ONCE).min(end), tally)?;
        }
        Ok(())
    }

    fn hand_over_some(&self, context: &FileContext, terms: &Terms, range: Range<u32>, tally: &mut Tally) -> io::Result<()> {
        let mark = context.mark.load(SeqCst);
        if self.written(&self.blocks.lock(), range.clone()).next().is_none() {
            return Ok(());
        }
        let Some(alone) = self.writers.try_write_for(WRITERS_WAIT) else {
            tally.busy += self.written(&self.blocks.lock(), range).count() as u64;
            return Ok(());
        };
        // Nobody writes from here on, so these stay as they are, and nobody begins to fetch one.
        let (old, recent): (Vec<u32>, Vec<u32>) = {
            let blocks = self.blocks.lock();
            self.written(&blocks, range.clone()).partition(|block| !blocks.recent.has(mark, *block))
        };
        tally.recent += recent.len() as u64;
        if old.is_empty() || u64::from(range.end) * BLOCK_BYTES > self.size() {
            return Ok(());
        }
        let mut pages = vec![0; (range.end - range.start) as usize * BLOCK_BYTES as usize];
        self.read_cache(context, u64::from(range.start) * BLOCK_BYTES, &mut pages)?;
        let mut going = Vec::with_capacity(old.len());
        let pages = pages.as_chunks().0;
        for block in old {
            match pages.get((block - range.start) as usize).map(|page| verdict(page, terms)) {
                Some(Verdict::Goes) => going.push(block),
                Some(Verdict::Stays(why)) => tally.count(why),
                None => {}
            }
        }
        let mut blocks = self.blocks.lock();
        if blocks.gone {
            return Ok(());
        }
        let (mut added, was_going) = (Change::default(), going.len());
        // What somebody fetched from an older base must not land where a block was dropped meanwhile.
        going.retain(|block| !blocks.in_flight.iter().any(|leg| leg.run.contains(block)));
        tally.busy += (was_going - going.len()) as u64;
        for block in going {
            let Change { blocks, hot } = self.fetched.add(&(block..block + 1), context.budget.lately());
            (added.blocks, added.hot) = (added.blocks + blocks, added.hot + hot);
        }
        blocks.absent.grow(self.size());
        self.unsettled.store(blocks.absent.count() + self.fetched.count() * CELLS_PER_BLOCK, SeqCst);
        context.budget.count_fetched(added);
        context.budget.count_written(-i64::from(added.blocks * CELLS_PER_BLOCK));
        context.budget.count_handed_over(added.blocks);
        tally.handed_over += u64::from(added.blocks);
        if added.blocks > 0 && !blocks.enrolled {
            blocks.enrolled = true;
            context.budget.enrol(self.me.clone());
        }
        drop(blocks);
        drop(alone);
        Ok(())
    }

    /// The blocks of a range that are wholly here and not the base's.
    fn written<'a>(&'a self, blocks: &'a Blocks, range: Range<u32>) -> impl Iterator<Item = u32> + 'a {
        range.filter(|block| !self.fetched.has(*block) && !blocks.absent.any(cells_of_blocks(&(*block..block + 1))))
    }
}
