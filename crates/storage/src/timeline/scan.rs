//! Scans: the keys in a range that have a value at an LSN, in order.
//!
//! Every place that may have keys (memtables and runs of layers, of the timeline and its ancestors) gives its keys in
//! order; the merge of them is looked up in batches, as any other read. Memory is bounded whatever the range.

use std::collections::VecDeque;
use std::sync::Arc;

use varve_postgres::Lsn;

use super::{ReadError, Timeline};
use crate::block_cache::BlockCache;
use crate::chain::page_number;
use crate::history::{HistoryError, Visit};
use crate::key::Key;
use crate::layer::{Layer, LayerError, LayerIter};
use crate::memtable::Memtable;

/// Keys that are looked up together.
const BATCH_KEYS: usize = 1024;

/// Keys of one memtable in a range, a batch at a time.
struct MemtableKeys {
    memtable: Arc<Memtable>,
    batch: VecDeque<Key>,
    from: Key,
}

impl MemtableKeys {
    fn next(&mut self, to: Key) -> Option<Key> {
        if self.batch.is_empty() {
            self.batch = self.memtable.ordered_keys(self.from, to, BATCH_KEYS).into();
            self.from = self.batch.back()?.next();
        }
        self.batch.pop_front()
    }
}

/// Keys of one run of layers in a range; a key comes once for each version.
struct RunKeys {
    /// Those that are not yet begun.
    layers: VecDeque<Arc<Layer>>,
    iter: Option<LayerIter>,
    from: Key,
    cache: Arc<BlockCache>,
}

impl RunKeys {
    fn next(&mut self, to: Key) -> Result<Option<Key>, LayerError> {
        loop {
            if let Some(iter) = &mut self.iter
                && let Some((key, _)) = iter.next()?
            {
                return Ok((key < to).then_some(key));
            }
            match self.layers.pop_front() {
                Some(layer) => self.iter = Some(layer.iter_from(self.from, Arc::clone(&self.cache))),
                None => return Ok(None),
            }
        }
    }
}

enum Keys {
    Memtable(MemtableKeys),
    Run(RunKeys),
}

/// A place that has keys, and its next one.
struct Source {
    next: Key,
    keys: Keys,
}

impl Source {
    fn advance(&mut self, to: Key) -> Result<bool, LayerError> {
        let next = match &mut self.keys {
            Keys::Memtable(keys) => keys.next(to),
            Keys::Run(keys) => keys.next(to)?,
        };
        self.next = next.unwrap_or(Key::MAX);
        Ok(next.is_some())
    }
}

impl Timeline {
    pub(super) fn scan_values(&self, from: Key, to: Key, floor: Lsn, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError> {
        let mut sources = self.sources(from, to, lsn)?;
        loop {
            let batch = next_keys(&mut sources, to).map_err(|error| HistoryError(error.to_string()))?;
            if batch.is_empty() {
                // Where keys came from may have been reduced since, or before.
                return Ok(self.check_kept(lsn)?);
            }
            let values = self.values(&batch, floor, lsn)?;
            for (key, value) in batch.into_iter().zip(values) {
                if let Some((_, value)) = value {
                    visit(key, value)?;
                }
            }
        }
    }

    /// Every place that may have keys in `from..to` with a version at or below `lsn`.
    fn sources(&self, from: Key, to: Key, lsn: Lsn) -> Result<Vec<Source>, ReadError> {
        let mut sources = Vec::new();
        let (mut timeline, mut upto) = (self, lsn);
        loop {
            timeline.check_applied(upto)?;
            let view = timeline.view.load_full();
            let memtables = std::iter::once(&view.active).chain(view.frozen.iter().map(|frozen| &frozen.memtable));
            for memtable in memtables.filter(|memtable| memtable.start() < upto) {
                sources.push(Keys::Memtable(MemtableKeys { memtable: Arc::clone(memtable), batch: VecDeque::new(), from }));
            }
            for run in view.layers.runs(false).iter().filter(|run| run.lsn_start < upto) {
                let overlaps = |layer: &&Arc<Layer>| from <= layer.info().last_key && layer.info().first_key < to;
                let layers: VecDeque<_> = run.layers().iter().filter(overlaps).cloned().collect();
                if !layers.is_empty() {
                    let cache = Arc::clone(&timeline.resources.block_cache);
                    sources.push(Keys::Run(RunKeys { layers, iter: None, from, cache }));
                }
            }
            let Some((ancestor, branch_lsn)) = &timeline.spec.ancestor else { break };
            timeline = ancestor;
            upto = upto.min(*branch_lsn);
        }
        let mut ready = Vec::with_capacity(sources.len());
        for keys in sources {
            let mut source = Source { next: from, keys };
            if source.advance(to)? {
                ready.push(source);
            }
        }
        Ok(ready)
    }
}

/// The next keys of all sources that are no pages, ascending, each once, [`BATCH_KEYS`] at most.
fn next_keys(sources: &mut Vec<Source>, to: Key) -> Result<Vec<Key>, LayerError> {
    let mut batch = Vec::new();
    while batch.len() < BATCH_KEYS {
        let Some(key) = sources.iter().map(|source| source.next).min() else { break };
        for source in sources.iter_mut() {
            while source.next == key && source.advance(to)? {}
        }
        sources.retain(|source| source.next != Key::MAX);
        if page_number(key).is_none() {
            batch.push(key);
        }
    }
    Ok(batch)
}
