//! What is true: every record that any compute ever wrote, which of them were acknowledged, and what histories must
//! hold because of it.
//!
//! It learns of timelines and epochs from the tenant's log as it stands in the store, which is where truth is, and of
//! records and acknowledgements from the computes. A history is compared with a [`NaiveHistory`] that the same records
//! were put into, one by one, in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use varve_engine::ingest::Ingest;
use varve_postgres::Lsn;
use varve_postgres::wal::FramedRecord;
use varve_storage::ids::TimelineId;
use varve_storage::key::Key;
use varve_storage::tenant_log::{TenantState, TimelineFacts};
use varve_testing::naive_history::NaiveHistory;

use crate::template;
use crate::wal::{BLOCKS, RELATION, START, Written};

/// Something that must never be so.
pub type Violation = String;

/// A record, and what became of it.
#[derive(Clone, Debug)]
struct Told {
    record: Written,
    epoch: u32,
    acknowledged: bool,
}

/// A timeline as it must be.
struct Line {
    facts: TimelineFacts,
    records: Vec<Told>,
    /// The newest epoch, as far as the log was read.
    epoch: u32,
    naive: Arc<NaiveHistory>,
    ingest: Ingest,
}

/// See the module's doc.
#[derive(Default)]
pub struct Ledger {
    lines: BTreeMap<TimelineId, Line>,
    voided: u64,
    /// Up to where a server told a compute that the store has its timeline.
    stored: BTreeMap<TimelineId, Lsn>,
}

impl Ledger {
    /// Takes in what the tenant's log says of timelines and epochs.
    ///
    /// # Errors
    /// An acknowledged commit that an epoch voids; a branch or an epoch that begins inside a record.
    pub fn learn(&mut self, state: &TenantState) -> Result<(), Violation> {
        let mut timelines: Vec<_> = state.timelines().collect();
        // An ancestor has the lower TLI.
        timelines.sort_by_key(|timeline| timeline.facts.tli);
        for timeline in timelines {
            let id = timeline.facts.id;
            for epoch in &timeline.epochs {
                self.begin_epoch(id, epoch.epoch.0, epoch.lsn)?;
            }
            if self.lines.contains_key(&id) {
                continue;
            }
            let naive = match timeline.facts.ancestor {
                None => Arc::new(template::naive_start()),
                Some(at) => {
                    self.feed(at.timeline, at.lsn)?;
                    let parent = self.lines.get(&at.timeline).ok_or("an ancestor that nobody told of")?;
                    Arc::new(parent.naive.branch(at.lsn).map_err(|error| error.to_string())?)
                }
            };
            let ingest = Ingest::open(naive.clone(), timeline.facts.start)
                .map_err(|error| format!("branch point {} of {id} is no boundary: {error}", timeline.facts.start))?;
            let line = Line { facts: timeline.facts.clone(), records: Vec::new(), epoch: 0, naive, ingest };
            self.lines.insert(id, line);
            for epoch in &timeline.epochs {
                self.begin_epoch(id, epoch.epoch.0, epoch.lsn)?;
            }
        }
        Ok(())
    }

    fn begin_epoch(&mut self, id: TimelineId, epoch: u32, lsn: Lsn) -> Result<(), Violation> {
        let Some(line) = self.lines.get_mut(&id).filter(|line| line.epoch < epoch) else { return Ok(()) };
        line.epoch = epoch;
        if let Some(stored) = self.stored.get(&id).filter(|stored| **stored > lsn) {
            return Err(format!("epoch {epoch} of {id} begins at {lsn}, and the store was said to have it up to {stored}"));
        }
        let older = |told: &&Told| told.epoch < epoch;
        if let Some(lost) = line.records.iter().filter(older).find(|told| told.record.end > lsn && told.acknowledged) {
            let (end, of) = (lost.record.end, lost.epoch);
            return Err(format!("epoch {epoch} of {id} begins at {lsn} and voids what epoch {of} had acknowledged up to {end}"));
        }
        let ends = line.records.iter().filter(older).map(|told| told.record.end);
        if lsn != line.facts.start && !ends.clone().any(|end| end == lsn) {
            return Err(format!("epoch {epoch} of {id} begins at {lsn}, where no record ends"));
        }
        let before = line.records.len();
        line.records.retain(|told| told.epoch >= epoch || told.record.end <= lsn);
        self.voided += (before - line.records.len()) as u64;
        if line.naive.applied() > lsn {
            return Err(format!("{id} was read at {}, and epoch {epoch} begins at {lsn}", line.naive.applied()));
        }
        Ok(())
    }

    /// A server told a compute that the store has its timeline up to `lsn`.
    pub fn note_stored(&mut self, timeline: TimelineId, lsn: Lsn) {
        let stored = self.stored.entry(timeline).or_default();
        *stored = lsn.max(*stored);
    }

    /// Up to where the store was said to have a timeline.
    pub fn stored(&self, timeline: TimelineId) -> Lsn {
        self.stored.get(&timeline).copied().unwrap_or_default()
    }

    /// Records that epochs have voided.
    pub fn voided(&self) -> u64 {
        self.voided
    }

    /// A compute wrote a record. What a fenced one writes is void at once.
    pub fn wrote(&mut self, timeline: TimelineId, epoch: u32, record: Written) {
        if let Some(line) = self.lines.get_mut(&timeline) {
            if line.epoch > epoch {
                self.voided += 1;
            } else {
                line.records.push(Told { record, epoch, acknowledged: false });
            }
        }
    }

    /// A compute got everything up to `lsn` acknowledged.
    ///
    /// # Errors
    /// When a later epoch has begun below it.
    pub fn acknowledged(&mut self, timeline: TimelineId, epoch: u32, from: Lsn, lsn: Lsn) -> Result<(), Violation> {
        // A timeline that was deleted keeps nothing.
        let Some(line) = self.lines.get_mut(&timeline) else { return Ok(()) };
        let mut is_there = from == lsn;
        for told in line.records.iter_mut().rev().filter(|told| told.epoch == epoch).take_while(|told| told.record.end > from) {
            if told.record.end <= lsn {
                told.acknowledged = true;
                is_there |= told.record.end == lsn;
            }
        }
        if is_there {
            return Ok(());
        }
        let current = line.epoch;
        Err(format!("epoch {epoch} of {timeline} got {lsn} acknowledged, which is void: epoch {current} writes now"))
    }

    /// Up to where a timeline's own history was acknowledged, or its start.
    pub fn acknowledged_end(&self, timeline: TimelineId) -> Lsn {
        let Some(line) = self.lines.get(&timeline) else { return Lsn::INVALID };
        line.records.iter().rev().find(|told| told.acknowledged).map_or(line.facts.start, |told| told.record.end)
    }

    /// A record boundary at or below `limit`: the `choice`th of those there are.
    pub fn boundary(&self, timeline: TimelineId, limit: Lsn, choice: u64) -> Option<Lsn> {
        let line = self.lines.get(&timeline)?;
        let ends: Vec<Lsn> = std::iter::once(line.facts.start)
            .chain(line.records.iter().map(|told| told.record.end))
            .take_while(|end| *end <= limit)
            .collect();
        ends.get((choice % ends.len().max(1) as u64) as usize).copied()
    }

    /// Start of the record that ends at `lsn`, here or in an ancestor.
    pub fn record_before(&self, timeline: TimelineId, lsn: Lsn) -> Lsn {
        let Some(line) = self.lines.get(&timeline) else { return Lsn(START.0 - 0x28) };
        match (line.records.iter().rev().find(|told| told.record.end <= lsn), line.facts.ancestor) {
            (Some(told), _) => told.record.start,
            (None, Some(at)) => self.record_before(at.timeline, at.lsn),
            (None, None) => Lsn(START.0 - 0x28),
        }
    }

    /// Where a restore of `timeline` to `time` ends, if its history ends at `head`; none before all transactions.
    pub fn moment(&self, timeline: TimelineId, head: Lsn, time: i64) -> Option<(TimelineId, Lsn)> {
        let (mut chain, mut next, mut limit) = (Vec::new(), Some(timeline), head);
        while let Some(line) = next.and_then(|id| self.lines.get(&id)) {
            chain.push((line, limit));
            next = line.facts.ancestor.map(|at| at.timeline);
            limit = line.facts.ancestor.map_or(limit, |at| at.lsn.min(limit));
        }
        let mut at = None;
        for (line, limit) in chain.iter().rev() {
            let mut here = (line.facts.id, line.facts.start);
            for told in line.records.iter().take_while(|told| told.record.end <= *limit) {
                if told.record.time.is_some_and(|ended| ended > time) {
                    return Some(at.filter(|_| here.1 == line.facts.start).unwrap_or(here));
                }
                here = (line.facts.id, told.record.end);
            }
            at = Some(here);
        }
        at
    }

    /// Brings a naive history up to `lsn`.
    fn feed(&mut self, timeline: TimelineId, lsn: Lsn) -> Result<(), Violation> {
        let line = self.lines.get_mut(&timeline).ok_or_else(|| format!("nobody told of timeline {timeline}"))?;
        let Line { records, ingest, naive, .. } = line;
        let fed = ingest.end();
        let first = records.partition_point(|told| told.record.end <= fed);
        for told in records[first..].iter().take_while(|told| told.record.end <= lsn) {
            let Written { start, end, bytes, .. } = told.record.clone();
            ingest.record(&FramedRecord { start, end, bytes }).map_err(|error| format!("the model's own record: {error}"))?;
        }
        ingest.advance().map_err(|error| error.to_string())?;
        if naive.applied() < lsn {
            return Err(format!("{timeline} has a boundary {lsn} that no compute wrote; its records end at {}", naive.applied()));
        }
        Ok(())
    }

    /// What a history shows at `lsn`, which is one of its boundaries.
    ///
    /// # Errors
    /// When no record ends there.
    pub fn shown(&mut self, timeline: TimelineId, lsn: Lsn) -> Result<Shown, Violation> {
        self.feed(timeline, lsn)?;
        let naive = self.lines.get(&timeline).map(|line| line.naive.clone()).ok_or("no such timeline")?;
        Shown::of(&*naive, lsn).map_err(|error| error.to_string())
    }
}

/// What a history shows at a moment, to be compared.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown {
    pages: Vec<Option<Vec<u8>>>,
    values: Vec<(String, Vec<u8>)>,
}

impl Shown {
    /// Reads it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(history: &dyn varve_storage::history::History, lsn: Lsn) -> Result<Shown, varve_storage::history::HistoryError> {
        let mut pages = Vec::new();
        for block in 0..BLOCKS {
            let page = history.page(Key::block(RELATION, block), Lsn::INVALID, lsn)?;
            pages.push(page.map(|page| page.to_vec()));
        }
        let clog = Key::slru_page(varve_postgres::slru::SlruKind::Clog, 0);
        pages.push(history.page(clog, Lsn::INVALID, lsn)?.map(|page| page.to_vec()));
        let mut values = Vec::new();
        let (from, to) = Key::relation_sizes_of(RELATION.node.spc, RELATION.node.db);
        history.scan(from, to, lsn, &mut |key, value| {
            values.push((key.to_string(), value.to_vec()));
            Ok(())
        })?;
        if let Some(checkpoint) = history.get(Key::checkpoint(), lsn)? {
            values.push(("checkpoint".to_owned(), checkpoint.to_vec()));
        }
        Ok(Shown { pages, values })
    }

    /// How many tuples each block has.
    pub fn tuples(&self) -> Vec<u16> {
        let lower = |page: &Option<Vec<u8>>| page.as_ref().map_or(0, |page| u16::from_le_bytes([page[12], page[13]]));
        self.pages.iter().take(BLOCKS as usize).map(|page| lower(page).saturating_sub(24) / 4).collect()
    }

    /// Where it differs from another one.
    pub fn difference(&self, other: &Shown) -> String {
        for (block, (mine, others)) in self.pages.iter().zip(&other.pages).enumerate() {
            if mine != others {
                let size = |page: &Option<Vec<u8>>| page.as_ref().map(Vec::len);
                let tuples = (self.tuples().get(block).copied(), other.tuples().get(block).copied());
                return format!("page {block}: {:?} and {:?} bytes, {tuples:?} tuples", size(mine), size(others));
            }
        }
        format!("values: {:?} and {:?}", self.values, other.values)
    }
}
