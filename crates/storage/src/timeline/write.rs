//! Writes: what ingest puts, and what follows from it.

use std::sync::Arc;
use std::time::Duration;

use varve_postgres::{Lsn, RelFork};

use super::{Frozen, Position, Timeline, View};
use crate::chain::page_number;
use crate::history::{HistoryError, HistoryWriter};
use crate::key::{Key, KeyKind};
use crate::memtable::Memtable;
use crate::value::Value;

/// Pages that wait for an image at most; what is over gets one when its chain has grown as much again.
const WANT_IMAGES_MAX: usize = 4096;

/// What the one writer of a timeline has at hand.
pub(super) struct Writer {
    memtable: Arc<Memtable>,
    /// Pages whose chains have become long.
    want_images: Vec<Key>,
}

impl Writer {
    pub(super) fn new(memtable: Arc<Memtable>) -> Writer {
        Writer { memtable, want_images: Vec::new() }
    }
}

impl Timeline {
    /// Freezes the memtable if it takes at least `bytes_min`, or if something was put into it, or its LSN moved on, at
    /// least `age_min` ago. Whether it was frozen; it then waits for [`Self::flush`].
    pub fn freeze_if(&self, bytes_min: usize, age_min: Duration) -> bool {
        let mut writer = self.writer.lock();
        let memtable = &writer.memtable;
        let now = (self.resources.clock)();
        let is_old = match memtable.first_put() {
            Some(first_put) => now.duration_since(first_put) >= age_min,
            // Nothing was put, but WAL has passed: the log may forget it.
            None => age_min.is_zero() && self.applied() > memtable.start(),
        };
        let is_due = is_old || !memtable.is_empty() && memtable.memory_bytes() >= bytes_min;
        is_due && self.freeze(&mut writer)
    }

    /// Freezes the memtable, unless it holds something that is not applied yet. Whether it did.
    fn freeze(&self, writer: &mut Writer) -> bool {
        let end = self.applied();
        if writer.memtable.newest() > end || writer.memtable.start() >= end {
            return false;
        }
        let resources = &self.resources;
        let fresh = Arc::new(Memtable::new(end, resources.clock.clone(), Arc::clone(&resources.memtable_budget)));
        let frozen = Arc::new(Frozen { memtable: std::mem::replace(&mut writer.memtable, Arc::clone(&fresh)), end });
        writer.want_images.clear();
        let _changing = self.view_lock.lock();
        let view = self.view.load_full();
        let all_frozen = std::iter::once(frozen).chain(view.frozen.iter().cloned()).collect();
        self.view.store(Arc::new(View { active: fresh, frozen: all_frozen, layers: Arc::clone(&view.layers), layered: view.layered }));
        true
    }

    /// Whether nothing was put since the last memtable was frozen, and none waits to be flushed.
    pub fn memtable_is_empty(&self) -> bool {
        let view = self.view.load();
        view.active.is_empty() && view.frozen.is_empty()
    }

    /// How long ago something was first put into the memtable that is being written.
    pub fn memtable_age(&self) -> Option<Duration> {
        let first_put = self.view.load().active.first_put()?;
        Some((self.resources.clock)().duration_since(first_put))
    }

    /// Memtables that wait to be flushed.
    pub fn frozen_memtables(&self) -> usize {
        self.view.load().frozen.len()
    }

    /// The floor of a page at `lsn`; `None` if it does not exist there.
    pub(super) fn floor_of_page(&self, key: Key, lsn: Lsn) -> Result<Option<Lsn>, HistoryError> {
        let (rel, block): (RelFork, u32) = match key.kind() {
            Some(KeyKind::Block { rel, block }) => (rel, block),
            _ => return Ok(page_number(key).map(|_| Lsn::INVALID)),
        };
        let size = self.live_size(rel, lsn)?.filter(|size| size.size.exists && block < size.size.blocks);
        Ok(size.map(|size| size.floor(block)))
    }

    /// Gives the pages whose chains have become long an image at what is applied. A page that cannot be made is left as
    /// it is: readers will hear why.
    fn put_images(&self, writer: &mut Writer) {
        let applied = self.applied();
        writer.want_images.sort_unstable();
        writer.want_images.dedup();
        for key in writer.want_images.drain(..) {
            let page = self.floor_of_page(key, applied).and_then(|floor| match floor {
                Some(floor) => Ok(self.pages(&[(key, floor)], applied)?.pop().flatten()),
                None => Ok(None),
            });
            let put = match page {
                Ok(Some(page)) => writer.memtable.insert_image(key, applied, page.page()).map_err(|error| HistoryError(error.to_string())),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = put {
                tracing::warn!(tenant = %self.spec.tenant, timeline = %self.spec.id, %key, %error, "a page with a long chain gets no image");
            }
        }
    }
}

impl HistoryWriter for Timeline {
    fn put(&self, key: Key, lsn: Lsn, value: Value) -> Result<(), HistoryError> {
        let mut writer = self.writer.lock();
        if let Some(stopped) = self.positions.stopped() {
            return Err(HistoryError(format!("timeline {} stopped at {}: {}", self.spec.id, stopped.at, stopped.reason)));
        }
        let applied = self.applied();
        if lsn <= applied {
            return Err(HistoryError(format!("timeline {}: {key} is put at {lsn}, everything up to {applied} is applied", self.spec.id)));
        }
        let wants_image = writer.memtable.put(key, lsn, &value);
        let wants_image = wants_image.map_err(|error| HistoryError(format!("timeline {}: {key} at {lsn}: {error}", self.spec.id)))?;
        if !key.is_block() {
            self.sizes.note_put(&key, lsn);
        }
        if wants_image && writer.want_images.len() < WANT_IMAGES_MAX {
            writer.want_images.push(key);
        }
        Ok(())
    }

    fn advance(&self, lsn: Lsn) {
        let mut writer = self.writer.lock();
        self.positions.raise(Position::Head, lsn);
        self.positions.raise(Position::Applied, lsn);
        if !writer.want_images.is_empty() {
            self.put_images(&mut writer);
        }
        if writer.memtable.memory_bytes() >= self.resources.memtable_bytes_max {
            self.freeze(&mut writer);
        }
    }
}
