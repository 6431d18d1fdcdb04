//! Merging runs of layers as [`crate::compaction`] plans it, in bounded memory.
//!
//! The runs are read in step, key by key; what comes out is written into layers, compressed with zstd, and each of
//! these is published as soon as it is written. Pages whose newest chain has become long get an image on its top, so
//! that a read of the newest version stops there, and no chain stays longer than redo is allowed to take
//! ([`CHAIN_CHANGES_MAX`]).
//!
//! A merged layer's object is deleted when nobody can read it any more: neither a reader in this process, nor, since
//! its removal was published, any other.

use std::collections::VecDeque;
use std::fs;
use std::sync::Arc;

use varve_postgres::Lsn;

use super::flush::{FlushError, LayerChange, Publish, PublishError};
use super::layer_file::{LayerFiles, upload};
use super::{Timeline, WriteError};
use crate::chain::{CHAIN_BYTES_MAX, CHAIN_CHANGES_MAX, Version, image, page_number};
use crate::compaction::{MergePlan, plan, plan_unfinished};
use crate::envelope::Codec;
use crate::ids::LayerId;
use crate::key::Key;
use crate::layer::{Layer, LayerError, LayerIter};
use crate::layer_map::{LayerMap, Run};
use crate::retained::Retained;

/// Changes on top of a page's chain that are worth an image.
const TOP_CHANGES: usize = 16;
/// Bytes of changes on top of a page's chain that are worth an image: about what it takes compressed.
const TOP_BYTES: usize = 3 << 10;

/// The versions of one run, in order.
pub(super) struct RunVersions {
    /// Layers that are not yet begun.
    layers: VecDeque<Arc<Layer>>,
    iter: Option<LayerIter>,
    pub(super) next: Option<(Key, Version)>,
}

impl RunVersions {
    pub(super) fn new(run: &Run, after: Option<Key>) -> RunVersions {
        let is_left = |layer: &&Arc<Layer>| after.is_none_or(|after| layer.info().last_key > after);
        RunVersions { layers: run.layers().iter().filter(is_left).cloned().collect(), iter: None, next: None }
    }

    pub(super) fn advance(&mut self) -> Result<(), LayerError> {
        loop {
            if let Some(iter) = &mut self.iter {
                self.next = iter.next()?;
                if self.next.is_some() {
                    return Ok(());
                }
            }
            match self.layers.pop_front() {
                Some(layer) => self.iter = Some(layer.iter()),
                None => {
                    self.iter = None;
                    return Ok(());
                }
            }
        }
    }
}

/// Writes one key's versions, newest first, with images where its chain needs them.
pub(super) struct ChainWriter<'a, 'b> {
    timeline: &'a Timeline,
    files: &'b mut LayerFiles<'a>,
    key: Key,
    is_page: bool,
    /// The newest versions, held back until it is known whether they get an image. `None` once that is decided.
    top: Option<Vec<Version>>,
    top_bytes: usize,
    /// Changes, and their bytes, since the last version written that needs nothing older.
    changes: usize,
    bytes: usize,
    last_base: Option<Lsn>,
}

impl<'a, 'b> ChainWriter<'a, 'b> {
    pub(super) fn new(timeline: &'a Timeline, files: &'b mut LayerFiles<'a>, key: Key) -> ChainWriter<'a, 'b> {
        let is_page = page_number(key).is_some();
        let top = is_page.then(Vec::new);
        ChainWriter { timeline, files, key, is_page, top, top_bytes: 0, changes: 0, bytes: 0, last_base: None }
    }

    pub(super) fn push(&mut self, version: Version) -> Result<(), FlushError> {
        let Some(top) = &mut self.top else { return self.write(&version) };
        let is_change = !version.value.is_base();
        self.top_bytes += version.value.len();
        top.push(version);
        let is_long = top.len() >= TOP_CHANGES || self.top_bytes >= TOP_BYTES;
        if is_change && !is_long {
            return Ok(());
        }
        if is_change
            && let Some(newest) = top.first().map(|newest| newest.lsn)
            && let Some(image) = self.image(newest)
        {
            self.write(&image)?;
        }
        self.finish()
    }

    /// Writes what was held back.
    pub(super) fn finish(&mut self) -> Result<(), FlushError> {
        self.top.take().into_iter().flatten().try_for_each(|version| self.write(&version))
    }

    fn write(&mut self, version: &Version) -> Result<(), FlushError> {
        // A version that needs nothing older has made others at its LSN superfluous.
        if self.last_base == Some(version.lsn) {
            return Ok(());
        }
        let is_base = version.value.is_base();
        if self.is_page && !is_base && (self.changes >= CHAIN_CHANGES_MAX || self.bytes >= CHAIN_BYTES_MAX) {
            (self.changes, self.bytes) = (0, 0);
            if let Some(image) = self.image(version.lsn) {
                return self.write(&image);
            }
        }
        if is_base {
            (self.changes, self.bytes, self.last_base) = (0, 0, Some(version.lsn));
        } else {
            self.changes += 1;
            self.bytes += version.value.len();
        }
        Ok(self.files.push(&self.key, version)?)
    }

    /// The page at `lsn` as a version; `None` if it cannot be made, or is not there: then the chain is what it is.
    fn image(&self, lsn: Lsn) -> Option<Version> {
        let key = self.key;
        let page = self.timeline.floor_of_page(key, lsn).and_then(|floor| match floor {
            Some(floor) => Ok(self.timeline.pages(&[(key, floor)], lsn)?.pop().flatten()),
            None => Ok(None),
        });
        match page {
            Ok(page) => page.map(|page| Version { lsn, value: image(page.page()) }),
            Err(error) => {
                let Timeline { spec, .. } = self.timeline;
                tracing::warn!(tenant = %spec.tenant, timeline = %spec.id, %key, %error, "a page with a long chain gets no image");
                None
            }
        }
    }
}

impl Timeline {
    /// Does one merge if one is due, step by step, each published, or one collection down to what is `retained`.
    /// Whether one was done. Reads go on meanwhile, and so do flushes. May block for long; when `give_up` says so it
    /// ends after the next step, and what is left is done another time.
    ///
    /// # Errors
    /// When layers cannot be read, written, uploaded or published; to be called again later.
    pub fn compact(&self, retained: &Retained, publish: &mut Publish<'_>, give_up: &dyn Fn() -> bool) -> Result<bool, FlushError> {
        let mut unpublished = self.merge.lock();
        self.publish_collection(&mut unpublished, publish)?;
        let layers = Arc::clone(&self.view.load().layers);
        // A collection takes whole runs.
        for runs in [layers.runs(false), layers.runs(true)] {
            if let Some(plan) = plan_unfinished(runs) {
                self.run_merge(runs, &plan, publish, give_up)?;
                return Ok(true);
            }
        }
        // One that fails keeps nobody from merging.
        let failed = match self.collect_or_pause(retained, &mut unpublished, publish, give_up) {
            Ok(true) => return Ok(true),
            Ok(false) => None,
            Err(error) if unpublished.is_some() => return Err(error),
            Err(error) => Some(error),
        };
        for runs in [layers.runs(false), layers.runs(true)] {
            if let Some(plan) = plan(runs, self.collected().cutoff) {
                self.run_merge(runs, &plan, publish, give_up)?;
                return Ok(true);
            }
        }
        failed.map_or(Ok(false), Err)
    }

    fn run_merge(&self, runs: &[Run], plan: &MergePlan, publish: &mut Publish<'_>, give_up: &dyn Fn() -> bool) -> Result<(), FlushError> {
        let inputs: Vec<&Run> = plan.inputs.iter().filter_map(|number| runs.get(*number)).collect();
        let mut sources: Vec<RunVersions> = inputs.iter().map(|run| RunVersions::new(run, plan.done_to)).collect();
        let mut left: Vec<Arc<Layer>> = inputs.iter().flat_map(|run| run.layers().iter().cloned()).collect();
        for source in &mut sources {
            source.advance().map_err(WriteError::from)?;
        }
        let mut files = LayerFiles::new(&self.spec, &self.resources, plan.range, Codec::Zstd);
        while let Some(key) = sources.iter().filter_map(|source| source.next.as_ref()).map(|(key, _)| *key).min() {
            let is_done = plan.done_to.is_some_and(|done_to| key <= done_to);
            let mut chain = ChainWriter::new(self, &mut files, key);
            // Newer runs come first, and all that they have of a key is newer.
            for source in &mut sources {
                while let Some((_, version)) = source.next.take_if(|(next, _)| *next == key) {
                    if !is_done {
                        chain.push(version)?;
                    }
                    source.advance().map_err(WriteError::from)?;
                }
            }
            chain.finish()?;
            if files.has_written() {
                // A layer was finished because this key begins another one.
                self.publish_step(&mut files, &mut left, Some(key), publish)?;
                if give_up() {
                    return Ok(());
                }
            }
        }
        files.finish_layer()?;
        self.publish_step(&mut files, &mut left, None, publish)
    }

    /// Publishes the layers that are finished, and takes away the inputs whose keys they have passed: all before
    /// `open_from`, or simply all.
    fn publish_step(
        &self,
        files: &mut LayerFiles<'_>,
        left: &mut Vec<Arc<Layer>>,
        open_from: Option<Key>,
        publish: &mut Publish<'_>,
    ) -> Result<(), FlushError> {
        upload(&self.resources, files.written_mut())?;
        let done = |layer: &Arc<Layer>| open_from.is_none_or(|open_from| layer.info().last_key < open_from);
        let (gone, stay): (Vec<_>, Vec<_>) = left.drain(..).partition(done);
        *left = stay;
        let add = files.written_mut().iter().map(|layer| layer.row.clone()).collect();
        let remove: Vec<LayerId> = gone.iter().map(|layer| layer.info().id).collect();
        let change = LayerChange { add, remove, layered: self.layered_lsn(), collected: None };
        let published = publish(&change);
        // Whether they were published may not be known after an error: they are never taken back, but left for the
        // garbage collector.
        drop(files.take_written());
        published?;
        self.install(&change);
        self.retired.lock().extend(gone);
        let (added, removed) = (change.add.len(), change.remove.len());
        let (start, end) = change.add.first().map_or((Lsn::INVALID, Lsn::INVALID), |row| (row.lsn_start, row.lsn_end));
        tracing::debug!(tenant = %self.spec.tenant, timeline = %self.spec.id, %start, %end, added, removed, "layers were merged");
        Ok(())
    }

    /// Deletes the objects of merged layers that nobody reads any more. `check` is asked before: whether this server
    /// still owns the timeline. How many were deleted.
    ///
    /// # Errors
    /// What `check` says, or when an object cannot be deleted.
    pub fn delete_retired(&self, check: &mut dyn FnMut() -> Result<(), PublishError>) -> Result<usize, FlushError> {
        let mut retired = self.retired.lock();
        // Nobody new can get at them: they are in no view.
        let (unread, read): (Vec<_>, Vec<_>) = retired.drain(..).partition(|layer| Arc::strong_count(layer) == 1);
        *retired = read;
        drop(retired);
        if unread.is_empty() {
            return Ok(0);
        }
        let mut deleted = 0;
        let mut left = unread.into_iter();
        let result = check().map_err(FlushError::from).and_then(|()| {
            for layer in left.by_ref() {
                self.delete_object(&layer)?;
                deleted += 1;
            }
            Ok(deleted)
        });
        // After an error they are tried again; one that was being deleted is the garbage collector's.
        self.retired.lock().extend(left);
        result
    }

    fn delete_object(&self, layer: &Layer) -> Result<(), FlushError> {
        let object = layer.object().parse().map_err(WriteError::from)?;
        self.resources.store.delete(&object).map_err(WriteError::from)?;
        if self.resources.store.store().local_path(&object).is_none() {
            // There may be a local copy, or not.
            let _ = fs::remove_file(self.resources.cache_dir.join(object.as_str()));
        }
        Ok(())
    }

    /// Runs of layers that a read of a block may have to search, and the same for everything else.
    pub fn run_counts(&self) -> (usize, usize) {
        let layers: Arc<LayerMap> = Arc::clone(&self.view.load().layers);
        (layers.runs(true).len(), layers.runs(false).len())
    }
}
