//! Where in the log the bytes of one timeline are.

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
}

/// The runs of one timeline, ascending and without gaps once the epochs are known.
#[derive(Clone, Debug, Default)]
pub(super) struct TimelineIndex {
    /// In LSN order.
    runs: Vec<Run>,
    /// Runs before this index were released; they are drained now and then.
    first: usize,
    /// Everything below is covered by layers.
    pub(super) released: Lsn,
    /// The epoch that may append.
    pub(super) epoch: WriterEpoch,
    /// End of what was appended.
    pub(super) end: Lsn,
    /// Whether the epochs are known, so that runs are what counts and not merely what was found.
    pub(super) settled: bool,
}

impl TimelineIndex {
    /// Adds a run that was found in the log, in log order.
    pub(super) fn found(&mut self, run: Run) {
        self.runs.push(run);
    }

    /// Now that the epochs (ascending, each with the LSN at which it began) are known: keeps of each run what its epoch may hold,
    /// and what joins on to `base`, below which layers cover everything.
    ///
    /// Returns the position in the WAL where bytes are missing that later runs would need, if there is a gap.
    pub(super) fn settle(&mut self, epochs: &[(WriterEpoch, Lsn)], base: Lsn) -> Option<Lsn> {
        let mut kept = TimelineIndex { end: base, ..TimelineIndex::default() };
        let mut gap = None;
        for run in std::mem::take(&mut self.runs) {
            let void_from = epochs.iter().filter(|(epoch, _)| *epoch > run.epoch).map(|(_, lsn)| *lsn).min();
            let end = void_from.map_or(run.end, |lsn| lsn.min(run.end));
            if end <= base || run.start >= end {
                continue; // below the layers, or void
            }
            if run.start > kept.end {
                gap = Some(kept.end);
                break;
            }
            // Later bytes replace those of a record that was never whole.
            let start = run.start.max(base);
            kept.cut(start);
            kept.push(Run { start, end, at: run.at + (start.0 - run.start.0), ..run });
        }
        let TimelineIndex { runs: kept, end, .. } = kept;
        self.runs = kept;
        self.first = 0;
        self.released = base;
        self.end = end;
        self.epoch = epochs.last().map_or(WriterEpoch(0), |(epoch, _)| *epoch);
        self.settled = true;
        gap
    }

    /// Adds a run that was appended at the end.
    pub(super) fn push(&mut self, run: Run) {
        self.end = run.end;
        self.runs.push(run);
    }

    /// Makes everything at or beyond `lsn` void.
    pub(super) fn cut(&mut self, lsn: Lsn) {
        while let Some(last) = self.runs.last_mut().filter(|last| last.end > lsn) {
            if last.start < lsn {
                last.end = lsn;
                break;
            }
            self.runs.pop();
        }
        self.first = self.first.min(self.runs.len());
        self.end = self.end.min(lsn);
    }

    /// Says that layers cover everything below `lsn`.
    pub(super) fn release(&mut self, lsn: Lsn) {
        self.released = self.released.max(lsn);
        self.end = self.end.max(self.released);
        while self.runs.get(self.first).is_some_and(|run| run.end <= self.released) {
            self.first += 1;
        }
        if self.first > 1024 && self.first * 2 > self.runs.len() {
            self.runs.drain(..self.first);
            self.first = 0;
        }
    }

    /// The runs that hold `from..`, in order; `None` if the byte at `from` is not there.
    pub(super) fn from(&self, from: Lsn) -> Option<&[Run]> {
        let live = self.runs.get(self.first..)?;
        let i = live.partition_point(|run| run.end <= from);
        live.get(i).filter(|run| run.start <= from)?;
        live.get(i..)
    }

    /// Lowest log position that is still needed; `None` when nothing is.
    pub(super) fn oldest_needed(&self) -> Option<u64> {
        if !self.settled {
            return self.runs.iter().map(|run| run.at).min();
        }
        self.runs.get(self.first..)?.iter().map(|run| run.at).min()
    }
}
