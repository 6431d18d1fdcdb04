//! Where in the log the bytes of one timeline are.

use std::collections::BTreeMap;

use varve_postgres::Lsn;

use crate::ids::WriterEpoch;

/// A run of a timeline's bytes in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First byte.
    pub(super) start: Lsn,
    /// Byte behind the last.
    pub(super) end: Lsn,
    /// Who wrote it.
    pub(super) epoch: WriterEpoch,
    /// Log position of the first byte.
    pub(super) at: u64,
    /// Log position that says what it replaces: everything of its timeline with a lower one, from its start on.
    pub(super) origin: u64,
}

/// How many runs that count stand in each segment. A segment without any is not needed.
#[derive(Debug)]
pub(super) struct LiveRuns {
    segment_bytes: u64,
    counts: BTreeMap<u64, u64>,
}

impl LiveRuns {
    pub(super) fn new(segment_bytes: u64) -> LiveRuns {
        LiveRuns { segment_bytes, counts: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, run: &Run) {
        *self.counts.entry(run.at / self.segment_bytes).or_default() += 1;
    }

    pub(super) fn remove(&mut self, run: &Run) {
        let number = run.at / self.segment_bytes;
        if let Some(count) = self.counts.get_mut(&number) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&number);
            }
        }
    }

    /// Number of the first segment that holds a run that counts.
    pub(super) fn first(&self) -> Option<u64> {
        self.counts.keys().next().copied()
    }
}

/// The runs of one timeline, ascending and without gaps once the epochs are known.
#[derive(Debug, Default)]
pub(super) struct TimelineIndex {
    /// In LSN order; before the timeline is settled, as they were found in the log.
    runs: Vec<Run>,
    /// Runs before this index were released; they are drained now and then.
    first: usize,
    /// Everything below is covered by layers.
    pub(super) released: Lsn,
    /// The epoch that may append.
    pub(super) epoch: WriterEpoch,
    /// Where it began: what lies below is not its to replace.
    pub(super) epoch_start: Lsn,
    /// End of what was appended.
    pub(super) end: Lsn,
    /// Whether the epochs are known, so that runs are what counts and not merely what was found.
    pub(super) settled: bool,
    /// How often it was attached, and not detached since.
    pub(super) attached: u32,
}

impl TimelineIndex {
    /// Adds a run that was found in the log, in log order.
    pub(super) fn found(&mut self, run: Run, live: &mut LiveRuns) {
        live.add(&run);
        self.runs.push(run);
    }

    /// The newest epoch of which there are bytes.
    pub(super) fn newest_epoch(&self) -> Option<WriterEpoch> {
        self.live().iter().map(|run| run.epoch).max()
    }

    /// Now that the epochs (ascending, each with the LSN at which it began) are known: keeps of each run what its
    /// epoch may hold, and what joins on to `base`, below which layers cover everything.
    ///
    /// Returns the position in the WAL where bytes are missing that later runs would need, if there is a gap; then
    /// nothing is changed.
    pub(super) fn settle(&mut self, epochs: &[(WriterEpoch, Lsn)], base: Lsn, live: &mut LiveRuns) -> Option<Lsn> {
        let mut in_order = self.runs.clone();
        in_order.sort_by_key(|run| (run.origin, run.at));
        let mut kept: Vec<Run> = Vec::with_capacity(in_order.len());
        let (mut end, mut gap) = (base, false);
        // A run and its copies, which may be cut differently, and of which some may be missing, have one origin, and
        // the same bytes.
        for same in in_order.chunk_by(|a, b| a.origin == b.origin) {
            let mut parts: Vec<Run> = same.iter().filter_map(|run| valid_part(run, epochs)).collect();
            parts.sort_by_key(|part| part.start);
            let Some(from) = parts.first().map(|part| part.start.max(base)) else { continue };
            if from > end {
                // What stood between was freed. That is well if this run was replaced itself, by one that comes yet.
                gap = true;
                continue;
            }
            // Later bytes replace those of a record that was never whole.
            (end, gap) = (from, false);
            cut(&mut kept, from, |_| ());
            for part in parts {
                let start = part.start.max(end);
                gap |= part.start > end;
                if start < part.end && !gap {
                    kept.push(Run { start, at: part.at + (start.0 - part.start.0), ..part });
                    end = part.end;
                }
            }
        }
        if gap {
            return Some(end);
        }
        // What was released before, if this was settled already, does not count any more.
        let released = self.first;
        for run in std::mem::replace(&mut self.runs, kept).iter().skip(released) {
            live.remove(run);
        }
        for run in &self.runs {
            live.add(run);
        }
        self.first = 0;
        self.released = base;
        self.end = end;
        (self.epoch, self.epoch_start) = epochs.last().copied().unwrap_or_default();
        self.settled = true;
        None
    }

    /// Adds a run that was appended at the end.
    pub(super) fn push(&mut self, run: Run, live: &mut LiveRuns) {
        live.add(&run);
        self.end = run.end;
        self.runs.push(run);
    }

    /// Makes everything at or beyond `lsn` void. Gives the runs that do not count any more, which may yet count in
    /// `live`.
    pub(super) fn cut(&mut self, lsn: Lsn) -> Vec<Run> {
        let mut gone = Vec::new();
        let released = self.first;
        // Runs that were released have not counted for long.
        let mut number = self.runs.len();
        cut(&mut self.runs, lsn, |run| {
            number -= 1;
            if number >= released {
                gone.push(*run);
            }
        });
        self.first = released.min(self.runs.len());
        self.end = self.end.min(lsn);
        gone
    }

    /// Says that layers cover everything below `lsn`.
    pub(super) fn release(&mut self, lsn: Lsn, live: &mut LiveRuns) {
        self.released = self.released.max(lsn);
        if !self.settled {
            return;
        }
        self.end = self.end.max(self.released);
        while let Some(run) = self.runs.get(self.first).filter(|run| run.end <= self.released) {
            live.remove(run);
            self.first += 1;
        }
        if self.first > 1024 && self.first * 2 > self.runs.len() {
            self.runs.drain(..self.first);
            self.first = 0;
        }
    }

    /// The timeline is gone: none of its runs counts.
    pub(super) fn forget(&mut self, live: &mut LiveRuns) {
        for run in self.live() {
            live.remove(run);
        }
        (self.runs, self.first) = (Vec::new(), 0);
    }

    /// The runs that count.
    pub(super) fn live(&self) -> &[Run] {
        self.runs.get(self.first..).unwrap_or_default()
    }

    /// The runs that hold `from..`, in order; `None` if the byte at `from` is not there.
    pub(super) fn from(&self, from: Lsn) -> Option<&[Run]> {
        let live = self.live();
        let i = live.partition_point(|run| run.end <= from);
        live.get(i).filter(|run| run.start <= from)?;
        live.get(i..)
    }

    /// What still counts of `run`.
    pub(super) fn still(&self, run: &Run) -> Option<Run> {
        self.live().iter().find(|mine| mine.at == run.at).copied()
    }

    /// The bytes of `run` have been copied: they now stand in `copies`, in order.
    pub(super) fn moved(&mut self, run: &Run, copies: &[Run], live: &mut LiveRuns) {
        let Some(i) = self.live().iter().position(|mine| mine.at == run.at).map(|i| i + self.first) else { return };
        // Its end may have been cut off meanwhile.
        let end = self.runs[i].end;
        let copies = copies.iter().filter(|copy| copy.start < end).map(|copy| Run { end: copy.end.min(end), ..*copy });
        let copies: Vec<Run> = copies.collect();
        copies.iter().for_each(|copy| live.add(copy));
        live.remove(&self.runs[i]);
        self.runs.splice(i..=i, copies);
    }
}

/// What of a run its epoch may hold.
fn valid_part(run: &Run, epochs: &[(WriterEpoch, Lsn)]) -> Option<Run> {
    // Epoch 0 is that of timelines which nobody ever began an epoch of. Any other that this history does not know,
    // though it knows newer ones, is not of this history: its bytes were never acknowledged to anybody in it.
    let own_start = match epochs.iter().find(|(epoch, _)| *epoch == run.epoch) {
        Some((_, lsn)) => *lsn,
        None => (run.epoch == WriterEpoch(0)).then_some(Lsn::INVALID)?,
    };
    let void_from = epochs.iter().filter(|(epoch, _)| *epoch > run.epoch).map(|(_, lsn)| *lsn).min();
    let (start, end) = (run.start.max(own_start), void_from.map_or(run.end, |lsn| lsn.min(run.end)));
    (start < end).then(|| Run { start, end, at: run.at + (start.0 - run.start.0), ..*run })
}

/// Takes everything at or beyond `lsn` out of `runs`, and gives the runs that are gone whole to `gone`, last first.
fn cut(runs: &mut Vec<Run>, lsn: Lsn, mut gone: impl FnMut(&Run)) {
    while let Some(last) = runs.last_mut().filter(|last| last.end > lsn) {
        if last.start < lsn {
            last.end = lsn;
            break;
        }
        gone(last);
        runs.pop();
    }
}
