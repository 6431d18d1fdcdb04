//! Collection: the oldest layers are reduced to what is retained.
//!
//! A collection reads the base run and what lies above it up to the cutoff, key by key, and keeps of each key the
//! state at each retained point: between two of them the newest version and what it rests on, or an image instead
//! where that is long. Blocks that were cut off or dropped by then go wholly. See [`crate::compaction`] for when.
//!
//! **Why nothing that is retained changes.** A read at a point, or above the cutoff, takes the newest version at or
//! below it, and what that rests on. The newest one below each point stays, or an image of the page as it is at that
//! point takes its place, and all above the cutoff stays. What a floor hides at a point it hides ever after.
//!
//! Everything is published at once, inputs out and outputs in: there is never a time at which reduced layers stand
//! beside some of what they were made of. A reader who took the layers before has them until he is done; one who
//! takes them afterwards is told where they can be read ([`Timeline::collected`]), before they are put in.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use varve_postgres::{Lsn, RelFork};

use super::flush::{FlushError, LayerChange, Publish};
use super::layer_file::{LayerFiles, WrittenLayer, upload};
use super::merge::{ChainWriter, RunVersions};
use super::{Timeline, TimelineSpec, WriteError};
use crate::chain::{Version, image, page_number};
use crate::compaction::{CollectInputs, collect_inputs, is_worth_it};
use crate::envelope::Codec;
use crate::history::HistoryError;
use crate::key::{Key, KeyKind};
use crate::layer::Layer;
use crate::layer_map::{LayerMap, Run};
use crate::relation::{self, LiveSize};
use crate::retained::Retained;
use crate::value::Value;
use crate::wal_index::page_of;

/// Changes above a version that needs nothing older that are worth an image instead.
const CHANGES_MAX: usize = 16;
/// Bytes of changes that are worth an image instead: about what it takes compressed.
const BYTES_MAX: usize = 3 << 10;
/// Pause after a collection that failed; it doubles with each further one.
const PAUSE_FIRST: Duration = Duration::from_secs(10);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// Layers that one collection takes at most: their rows are published together.
const LAYERS_MAX: usize = 10_000;
/// Keys after which somebody may say that it is to be given up.
const KEYS_BETWEEN_QUESTIONS: usize = 1024;

/// A collection to be done.
struct CollectPlan {
    /// Up to where.
    cut: Lsn,
    /// Of the block runs, and of the others.
    inputs: [Option<CollectInputs>; 2],
}

/// A collection that failed.
pub(super) struct Failure {
    /// Why.
    problem: String,
    /// When it is tried again, and how long that is since it failed.
    again: Instant,
    pause: Duration,
}

/// A collection that is done and whose publishing failed. Whether it came about is not known, so nothing else is
/// merged before it is repeated.
pub(super) struct Unpublished {
    change: LayerChange,
    gone: Vec<Arc<Layer>>,
}

/// Floors of one fork, at the points where somebody has asked for them.
struct ForkFloors {
    rel: RelFork,
    at: BTreeMap<usize, Floors>,
}

/// What is dead of a fork.
enum Floors {
    /// As its size says.
    OfSize(LiveSize),
    /// Its database is gone, or it is not there yet: as of its database.
    OfDatabase(Lsn),
}

/// Picks the versions of a key that are retained.
struct Sieve<'a> {
    timeline: &'a Timeline,
    cut: Lsn,
    /// Ascending.
    points: &'a [Lsn],
    floors: Option<ForkFloors>,
}

impl Sieve<'_> {
    /// Whether somebody may look for a record on a page of WAL.
    fn needs_index(&self, page: u64) -> bool {
        page >= page_of(self.cut) || self.points.iter().any(|point| page_of(*point) == page)
    }

    /// The floor of a key at the point with this number.
    fn floor(&mut self, key: Key, number: usize) -> Result<Lsn, HistoryError> {
        let Some(KeyKind::Block { rel, block }) = key.kind() else { return Ok(Lsn::INVALID) };
        let mut floors = self.floors.take().filter(|floors| floors.rel == rel).unwrap_or(ForkFloors { rel, at: BTreeMap::new() });
        let point = self.points.get(number).copied().unwrap_or(self.cut);
        let at_point = match floors.at.entry(number) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(self.floors_at(rel, point)?),
        };
        let floor = match at_point {
            Floors::OfSize(size) => size.floor(block),
            Floors::OfDatabase(floor) => *floor,
        };
        self.floors = Some(floors);
        Ok(floor)
    }

    fn floors_at(&self, rel: RelFork, point: Lsn) -> Result<Floors, HistoryError> {
        Ok(match relation::live_size(self.timeline, rel, point)? {
            Some(size) => Floors::OfSize(size),
            None => Floors::OfDatabase(relation::database_floor(self.timeline, rel.node.spc, rel.node.db, point)?),
        })
    }
}

/// Takes one key's versions up to the cut, newest first, and keeps those that are retained. Holds little more than what
/// it keeps, however many come.
struct KeySieve<'s, 'a> {
    sieve: &'s mut Sieve<'a>,
    key: Key,
    /// Whether any are wanted at all.
    is_wanted: bool,
    /// The point that shows what is in the group, by number, and the floor there.
    point: Option<(usize, Lsn)>,
    /// The newest version between the point and the one below, and what it rests on.
    group: Vec<Version>,
    /// Whether the group needs nothing older.
    is_complete: bool,
    kept: Vec<Version>,
    /// Changes, and their bytes, since the last version kept that needs nothing older.
    changes: usize,
    bytes: usize,
}

impl<'s, 'a> KeySieve<'s, 'a> {
    fn new(sieve: &'s mut Sieve<'a>, key: Key) -> KeySieve<'s, 'a> {
        let is_wanted = !matches!(key.kind(), Some(KeyKind::WalIndex { page }) if !sieve.needs_index(page));
        let (group, kept) = (Vec::new(), Vec::new());
        KeySieve { sieve, key, is_wanted, point: None, group, is_complete: false, kept, changes: 0, bytes: 0 }
    }

    fn push(&mut self, version: Version) -> Result<(), HistoryError> {
        let number = self.sieve.points.partition_point(|point| *point < version.lsn);
        // What lies above the last point is shown by none.
        if !self.is_wanted || number == self.sieve.points.len() {
            return Ok(());
        }
        if self.point.is_none_or(|(current, _)| current != number) {
            self.close_group();
            self.point = Some((number, self.sieve.floor(self.key, number)?));
            self.is_complete = false;
        }
        let floor = self.point.map_or(Lsn::INVALID, |(_, floor)| floor);
        if !self.is_complete && version.lsn > floor {
            self.is_complete = version.value.is_base();
            self.group.push(version);
        }
        Ok(())
    }

    fn close_group(&mut self) {
        let (Some((number, floor)), Some(newest)) = (self.point, self.group.first().map(|newest| newest.lsn)) else { return };
        let changes = self.group.iter().filter(|version| !version.value.is_base());
        let (more, more_bytes) = changes.fold((0, 0), |(count, bytes), version| (count + 1, bytes + version.value.len()));
        (self.changes, self.bytes) = (self.changes + more, self.bytes + more_bytes);
        let is_long = self.changes > CHANGES_MAX || self.bytes > BYTES_MAX;
        let is_page = page_number(self.key).is_some();
        let point = self.sieve.points.get(number).copied().unwrap_or(self.sieve.cut);
        if is_page
            && more > 0
            && is_long
            && let Some(image) = self.sieve.timeline.image_at(self.key, floor, point)
        {
            self.kept.push(Version { lsn: newest, value: image });
            self.group.clear();
            (self.changes, self.bytes) = (0, 0);
            return;
        }
        if self.is_complete {
            (self.changes, self.bytes) = (0, 0);
        }
        self.kept.append(&mut self.group);
    }

    fn finish(mut self) -> Vec<Version> {
        self.close_group();
        self.kept
    }
}

/// Layers that were written and are not published: they are removed again unless they are taken out.
#[derive(Default)]
struct Written(Vec<WrittenLayer>);

impl Drop for Written {
    fn drop(&mut self) {
        self.0.iter().for_each(WrittenLayer::discard);
    }
}

/// Layers that lie wholly behind the last position that anybody holds of a timeline that nobody goes on with.
fn behind_the_top(layers: &LayerMap, retained: &Retained) -> Vec<Arc<Layer>> {
    layers.layers().filter(|layer| layer.is_own() && layer.info().lsn_start >= retained.top).cloned().collect()
}

impl Timeline {
    /// Whether a collection up to `retained`'s cutoff would be worth its work.
    pub fn wants_collection(&self, retained: &Retained) -> bool {
        let (layers, retained) = (Arc::clone(&self.view.load().layers), self.collectable(retained));
        self.collection(&layers, &retained).is_some() || !behind_the_top(&layers, &retained).is_empty()
    }

    /// What may be collected by now: what is not in layers yet is still read by who brings it there, so up to then all
    /// that leads to it stays.
    fn collectable(&self, retained: &Retained) -> Retained {
        let is_at_rest = self.memtable_is_empty() && self.positions.head() <= self.layered_lsn();
        if is_at_rest { retained.clone() } else { retained.up_to(Lsn::MAX) }
    }

    /// As [`Timeline::collect`], but not soon after one that failed.
    pub(super) fn collect_or_pause(
        &self,
        retained: &Retained,
        unpublished: &mut Option<Unpublished>,
        publish: &mut Publish<'_>,
        give_up: &dyn Fn() -> bool,
    ) -> Result<bool, FlushError> {
        let now = (self.resources.clock)();
        let pause = self.collect_failure.lock().as_ref().map(|failure| (failure.again, failure.pause));
        if pause.is_some_and(|(again, _)| now < again) {
            return Ok(false);
        }
        let done = self.collect(retained, unpublished, publish, give_up);
        *self.collect_failure.lock() = done.as_ref().err().map(|error| {
            let pause = pause.map_or(PAUSE_FIRST, |(_, pause)| (pause * 2).min(PAUSE_MAX));
            Failure { problem: error.to_string(), again: now + pause, pause }
        });
        done
    }

    /// Why the last collection failed, if it did.
    pub fn collect_problem(&self) -> Option<String> {
        self.collect_failure.lock().as_ref().map(|failure| failure.problem.clone())
    }

    /// Objects of layers that are in no manifest any more, and that somebody may still read.
    pub fn retired_objects(&self) -> Vec<String> {
        self.retired.lock().iter().map(|layer| layer.object().to_owned()).collect()
    }

    /// Does a collection if one is due. Whether one was done. May block for long; when `give_up` says so it ends
    /// without having done anything.
    fn collect(
        &self,
        retained: &Retained,
        unpublished: &mut Option<Unpublished>,
        publish: &mut Publish<'_>,
        give_up: &dyn Fn() -> bool,
    ) -> Result<bool, FlushError> {
        let retained = &self.collectable(retained);
        let layers = Arc::clone(&self.view.load().layers);
        let behind = behind_the_top(&layers, retained);
        if !behind.is_empty() {
            let collected = self.collected();
            let collected = collected.up_to(retained.top);
            self.replace(Vec::new(), behind, collected, unpublished, publish)?;
            return Ok(true);
        }
        match self.collection(&layers, retained) {
            Some(plan) => self.run_collection(&layers, &plan, retained, unpublished, publish, give_up),
            None => Ok(false),
        }
    }

    fn collection(&self, layers: &LayerMap, retained: &Retained) -> Option<CollectPlan> {
        let collected = self.collected();
        // Layers reach as far as what is published; a timeline that nobody goes on with is reduced as a whole.
        let layered = self.layered_lsn();
        let cut = if retained.cutoff > retained.top { layered } else { retained.cutoff.min(layered) };
        // Each collection goes on where the last one ended.
        let cut = cut.max(collected.cutoff);
        if cut == Lsn::INVALID {
            return None;
        }
        let inputs = [true, false].map(|blocks| collect_inputs(layers.runs(blocks), cut, retained, &collected));
        let layer_count: usize = inputs.iter().flatten().map(|inputs| inputs.layers).sum();
        if layer_count > LAYERS_MAX {
            let TimelineSpec { tenant, id, .. } = &self.spec;
            tracing::debug!(%tenant, timeline = %id, layer_count, "too many layers for one collection: their history stays");
            return None;
        }
        is_worth_it(inputs.iter().flatten(), self.resources.garbage_bytes_min).then_some(CollectPlan { cut, inputs })
    }

    fn run_collection(
        &self,
        layers: &LayerMap,
        plan: &CollectPlan,
        retained: &Retained,
        unpublished: &mut Option<Unpublished>,
        publish: &mut Publish<'_>,
        give_up: &dyn Fn() -> bool,
    ) -> Result<bool, FlushError> {
        let CollectPlan { cut, inputs } = plan;
        let points = retained.points_upto(*cut);
        let (mut written, mut gone): (Written, Vec<Arc<Layer>>) = (Written::default(), Vec::new());
        for (inputs, blocks) in inputs.iter().zip([true, false]) {
            let Some(inputs) = inputs else { continue };
            let runs = layers.runs(blocks).get(inputs.inputs.clone()).unwrap_or_default();
            let mut sieve = Sieve { timeline: self, cut: *cut, points: &points, floors: None };
            let Some(layers) = self.sift(runs, inputs.range, &mut sieve, give_up)? else { return Ok(false) };
            written.0.extend(layers);
            gone.extend(runs.iter().flat_map(|run| run.layers().iter().cloned()));
        }
        let (before, after) = (gone.len(), written.0.len());
        upload(&self.resources, &mut written.0)?;
        let top = if retained.cutoff > retained.top { retained.top } else { self.collected().top };
        let collected = Retained::new(*cut, top, retained.pins().to_vec());
        self.replace(std::mem::take(&mut written.0), gone, collected, unpublished, publish)?;
        tracing::info!(
            tenant = %self.spec.tenant, timeline = %self.spec.id, cutoff = %cut, pins = retained.pins().len(), before, after,
            "history was collected"
        );
        Ok(true)
    }

    /// Writes what is retained of `runs`, and what of them lies behind the cut. `None` if it was given up.
    fn sift(
        &self,
        runs: &[Run],
        range: (Lsn, Lsn),
        sieve: &mut Sieve<'_>,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<WrittenLayer>>, FlushError> {
        let cut = sieve.cut;
        let mut sources: Vec<RunVersions> = runs.iter().map(|run| RunVersions::new(run, None)).collect();
        for source in &mut sources {
            source.advance().map_err(WriteError::from)?;
        }
        let mut base = LayerFiles::new(&self.spec, &self.resources, (range.0, cut.min(range.1)), Codec::Zstd);
        let mut rest = LayerFiles::new(&self.spec, &self.resources, (cut.max(range.0), range.1), Codec::Zstd);
        let mut keys = 0;
        while let Some(key) = sources.iter().filter_map(|source| source.next.as_ref()).map(|(key, _)| *key).min() {
            keys += 1;
            if keys % KEYS_BETWEEN_QUESTIONS == 0 && give_up() {
                return Ok(None);
            }
            let mut old = KeySieve::new(sieve, key);
            let mut chain = ChainWriter::new(self, &mut rest, key);
            for source in &mut sources {
                while let Some((_, version)) = source.next.take_if(|(next, _)| *next == key) {
                    if version.lsn > cut {
                        chain.push(version)?;
                    } else {
                        old.push(version)?;
                    }
                    source.advance().map_err(WriteError::from)?;
                }
            }
            chain.finish()?;
            for version in old.finish() {
                base.push(&key, &version)?;
            }
        }
        let mut written = Written(base.finish()?);
        written.0.extend(rest.finish()?);
        Ok(Some(std::mem::take(&mut written.0)))
    }

    /// The page as it is at a point, as a value; `None` if it cannot be made, or is not there: then the chain is kept.
    fn image_at(&self, key: Key, floor: Lsn, point: Lsn) -> Option<Value> {
        match self.pages(&[(key, floor)], point) {
            Ok(mut pages) => pages.pop().flatten().map(|page| image(page.page())),
            Err(error) => {
                let TimelineSpec { tenant, id, .. } = &self.spec;
                tracing::warn!(%tenant, timeline = %id, %key, %error, "a page that history is collected of gets no image");
                None
            }
        }
    }

    /// Publishes all layers of a collection at once, and puts them in.
    fn replace(
        &self,
        written: Vec<WrittenLayer>,
        gone: Vec<Arc<Layer>>,
        collected: Retained,
        unpublished: &mut Option<Unpublished>,
        publish: &mut Publish<'_>,
    ) -> Result<(), FlushError> {
        let add = written.into_iter().map(|layer| layer.row).collect();
        let remove = gone.iter().map(|layer| layer.info().id).collect();
        // Said before it is true: who reads meanwhile may be refused, never told something else.
        self.collected.store(Arc::new(collected.clone()));
        let change = LayerChange { add, remove, layered: self.layered_lsn(), collected: Some(collected) };
        *unpublished = Some(Unpublished { change, gone });
        self.publish_collection(unpublished, publish)
    }

    /// Publishes a collection that is done, if there is one, and puts its layers in.
    pub(super) fn publish_collection(&self, unpublished: &mut Option<Unpublished>, publish: &mut Publish<'_>) -> Result<(), FlushError> {
        let Some(Unpublished { change, .. }) = unpublished else { return Ok(()) };
        publish(change)?;
        if let Some(Unpublished { change, gone }) = unpublished.take() {
            self.install(&change);
            self.retired.lock().extend(gone);
        }
        Ok(())
    }
}
