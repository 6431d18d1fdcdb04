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

use std::sync::Arc;

use varve_postgres::{Lsn, RelFork};

use super::flush::{FlushError, LayerChange, Publish};
use super::layer_file::{LayerFiles, WrittenLayer, upload};
use super::merge::{ChainWriter, RunVersions};
use super::{Timeline, WriteError};
use crate::chain::{Version, image, page_number};
use crate::compaction::{CollectInputs, collect_inputs, is_worth_it};
use crate::envelope::Codec;
use crate::history::HistoryError;
use crate::key::{Key, KeyKind};
use crate::layer::Layer;
use crate::layer_map::{LayerMap, Run};
use crate::relation::{self, LiveSize};
use crate::retained::Retained;
use crate::wal_index::page_of;

/// Changes above a version that needs nothing older that are worth an image instead.
const CHANGES_MAX: usize = 16;
/// Bytes of changes that are worth an image instead: about what it takes compressed.
const BYTES_MAX: usize = 3 << 10;
/// Keys after which somebody may say that it is to be given up.
const KEYS_BETWEEN_QUESTIONS: usize = 1024;

/// A collection to be done.
struct CollectPlan {
    /// Up to where.
    cut: Lsn,
    /// Of the block runs, and of the others.
    inputs: [Option<CollectInputs>; 2],
}

/// A collection that is done and whose publishing failed. Whether it came about is not known, so nothing else is
/// merged before it is repeated.
pub(super) struct Unpublished {
    change: LayerChange,
    gone: Vec<Arc<Layer>>,
}

/// Floors of one fork at each point.
struct ForkFloors {
    rel: RelFork,
    at: Vec<Floors>,
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
    /// What is kept of a key's versions up to the cut, which come newest first.
    fn keep(&mut self, key: Key, versions: Vec<Version>) -> Result<Vec<Version>, HistoryError> {
        let is_page = page_number(key).is_some();
        if let Some(KeyKind::WalIndex { page }) = key.kind()
            && !self.needs_index(page)
        {
            return Ok(Vec::new());
        }
        let mut kept = Vec::new();
        // Since the last version that needs nothing older.
        let (mut changes, mut bytes) = (0, 0);
        let mut versions = versions.into_iter().peekable();
        for (number, point) in self.points.iter().enumerate().rev() {
            let above = number.checked_sub(1).and_then(|below| self.points.get(below)).copied().unwrap_or(Lsn::INVALID);
            let floor = self.floor(key, number)?;
            let mut group: Vec<Version> = Vec::new();
            let mut is_complete = false;
            while let Some(version) = versions.next_if(|version| version.lsn > above) {
                // What lies above the last point is shown by none.
                if !is_complete && version.lsn > floor && version.lsn <= *point {
                    is_complete = version.value.is_base();
                    group.push(version);
                }
            }
            let Some(newest) = group.first().map(|newest| newest.lsn) else { continue };
            let own_changes = group.iter().filter(|version| !version.value.is_base());
            let (more, more_bytes) = own_changes.fold((0, 0), |(count, bytes), version| (count + 1, bytes + version.value.len()));
            (changes, bytes) = (changes + more, bytes + more_bytes);
            if is_page
                && more > 0
                && (changes > CHANGES_MAX || bytes > BYTES_MAX)
                && let Some(page) = self.timeline.pages(&[(key, floor)], *point)?.pop().flatten()
            {
                kept.push(Version { lsn: newest, value: image(page.page()) });
                (changes, bytes) = (0, 0);
                continue;
            }
            if is_complete {
                (changes, bytes) = (0, 0);
            }
            kept.append(&mut group);
        }
        Ok(kept)
    }

    /// Whether somebody may look for a record on a page of WAL.
    fn needs_index(&self, page: u64) -> bool {
        page >= page_of(self.cut) || self.points.iter().any(|point| page_of(*point) == page)
    }

    /// The floor of a key at the point with this number.
    fn floor(&mut self, key: Key, number: usize) -> Result<Lsn, HistoryError> {
        let Some(KeyKind::Block { rel, block }) = key.kind() else { return Ok(Lsn::INVALID) };
        let floors = match self.floors.take().filter(|floors| floors.rel == rel) {
            Some(floors) => floors,
            None => ForkFloors { rel, at: self.points.iter().map(|point| self.floors_at(rel, *point)).collect::<Result<_, _>>()? },
        };
        let floor = floors.at.get(number).map_or(Lsn::INVALID, |floors| match floors {
            Floors::OfSize(size) => size.floor(block),
            Floors::OfDatabase(floor) => *floor,
        });
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

    /// Does a collection if one is due. Whether one was done. May block for long; when `give_up` says so it ends
    /// without having done anything.
    pub(super) fn collect(
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
        let (mut written, mut gone): (Vec<WrittenLayer>, Vec<Arc<Layer>>) = (Vec::new(), Vec::new());
        for (inputs, blocks) in inputs.iter().zip([true, false]) {
            let Some(inputs) = inputs else { continue };
            let runs = layers.runs(blocks).get(inputs.inputs.clone()).unwrap_or_default();
            let mut sieve = Sieve { timeline: self, cut: *cut, points: &points, floors: None };
            let Some(layers) = self.sift(runs, inputs.range, &mut sieve, give_up)? else {
                written.iter().for_each(WrittenLayer::discard);
                return Ok(false);
            };
            written.extend(layers);
            gone.extend(runs.iter().flat_map(|run| run.layers().iter().cloned()));
        }
        let (before, after) = (gone.len(), written.len());
        if let Err(error) = upload(&self.resources, &mut written) {
            written.iter().for_each(WrittenLayer::discard);
            return Err(error.into());
        }
        let top = if retained.cutoff > retained.top { retained.top } else { self.collected().top };
        let collected = Retained::new(*cut, top, retained.pins().to_vec());
        self.replace(written, gone, collected, unpublished, publish)?;
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
            let mut old = Vec::new();
            let mut chain = ChainWriter::new(self, &mut rest, key);
            for source in &mut sources {
                while let Some((_, version)) = source.next.take_if(|(next, _)| *next == key) {
                    if version.lsn > cut {
                        chain.push(version)?;
                    } else {
                        old.push(version);
                    }
                    source.advance().map_err(WriteError::from)?;
                }
            }
            chain.finish()?;
            for version in sieve.keep(key, old)? {
                base.push(&key, &version)?;
            }
        }
        let mut written = base.finish()?;
        match rest.finish() {
            Ok(rest) => written.extend(rest),
            Err(error) => {
                written.iter().for_each(WrittenLayer::discard);
                return Err(error.into());
            }
        }
        Ok(Some(written))
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
