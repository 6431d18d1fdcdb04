//! Flushing: the oldest frozen memtable becomes layers.
//!
//! Written, checked, uploaded, published, and only then dropped from memory. A crash before the publishing leaves
//! objects that nothing refers to; after it, the layers. What was written is remembered, so trying again after a failed
//! upload or publishing does not write again.

use std::collections::HashSet;
use std::sync::Arc;

use varve_postgres::Lsn;

use super::layer_file::{LayerFiles, WriteError, WrittenLayer, upload};
use super::{Frozen, Position, Timeline, View, open_layer};
use crate::chain::{ChainLength, Version, image, page_number};
use crate::edit_log::EditLogError;
use crate::envelope::Codec;
use crate::history::HistoryError;
use crate::ids::LayerId;
use crate::kept_wal::KeptWalError;
use crate::key::Key;
use crate::manifest::{LayerRow, ManifestEdit};
use crate::retained::Retained;

/// A change of a timeline's layers, to be published as one edit of its manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerChange {
    /// Layers that come.
    pub add: Vec<LayerRow>,
    /// Layers that go.
    pub remove: Vec<LayerId>,
    /// Everything up to here is in layers, once this is published. Of two changes that are published at the same time
    /// the greater counts.
    pub layered: Lsn,
    /// What the layers were reduced to, if this is a collection.
    pub collected: Option<Retained>,
}

impl LayerChange {
    /// The change as edits of a manifest.
    pub fn edits(&self) -> Vec<ManifestEdit> {
        let add = self.add.iter().cloned().map(ManifestEdit::add);
        let remove = self.remove.iter().map(|id| ManifestEdit::RemoveLayer { id: *id });
        let collected = self.collected.iter().cloned().map(ManifestEdit::Collected);
        add.chain(remove).chain([ManifestEdit::Layered { lsn: self.layered }]).chain(collected).collect()
    }
}

/// Why a change could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Another server has the tenant: this one publishes nothing more.
    #[error(transparent)]
    Fenced(EditLogError),
    /// The manifest could not be written.
    #[error(transparent)]
    Log(EditLogError),
    /// WAL that is to be kept could not be uploaded before.
    #[error("the WAL below them is to be kept: {0}")]
    KeptWal(#[from] KeptWalError),
}

impl From<EditLogError> for PublishError {
    fn from(error: EditLogError) -> PublishError {
        match error {
            EditLogError::Fenced { .. } => PublishError::Fenced(error),
            error => PublishError::Log(error),
        }
    }
}

/// Publishes a change of layers: when it returns well, the change is durable. After an error it may be repeated, with
/// the same change.
pub type Publish<'a> = dyn FnMut(&LayerChange) -> Result<(), PublishError> + 'a;

/// A flush that failed. The memtable stays, nothing is lost.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The layers could not be written or uploaded.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// What was to be written could not be read.
    #[error(transparent)]
    Read(#[from] HistoryError),
    /// The manifest could not be written.
    #[error("the layers could not be published: {0}")]
    Publish(#[from] PublishError),
}

/// Layers that are written and wait to be published.
pub(super) struct WrittenLayers {
    end: Lsn,
    layers: Vec<WrittenLayer>,
}

impl Timeline {
    /// Turns the oldest frozen memtable into layers and publishes them. What was published; `None` if nothing is
    /// frozen. May block for long.
    ///
    /// # Errors
    /// When the layers cannot be written, uploaded or published; to be called again later.
    pub fn flush(&self, publish: &mut Publish<'_>) -> Result<Option<LayerChange>, FlushError> {
        let mut written = self.flush.lock();
        let Some(frozen) = self.view.load().frozen.last().cloned() else { return Ok(None) };
        let layers = match written.take() {
            Some(layers) if layers.end == frozen.end => layers.layers,
            _ => self.write_memtable(&frozen)?,
        };
        let WrittenLayers { layers, .. } = written.insert(WrittenLayers { end: frozen.end, layers });
        upload(&self.resources, layers)?;
        let add = layers.iter().map(|layer| layer.row.clone()).collect();
        let change = LayerChange { add, remove: Vec::new(), layered: frozen.end, collected: None };
        publish(&change)?;
        *written = None;
        self.install(&change);
        let (count, bytes) = (change.add.len(), change.add.iter().map(|layer| layer.length).sum::<u64>());
        tracing::debug!(tenant = %self.spec.tenant, timeline = %self.spec.id, layered = %change.layered, layers = count, bytes, "a memtable was flushed");
        Ok(Some(change))
    }

    fn write_memtable(&self, frozen: &Frozen) -> Result<Vec<WrittenLayer>, FlushError> {
        let memtable = &frozen.memtable;
        let range = (memtable.start(), frozen.end);
        let mut files = LayerFiles::new(&self.spec, &self.resources, range, Codec::Lz4);
        for key in memtable.sorted_keys() {
            let versions = self.bound_chain(key, live_versions(memtable.versions_of(&key)))?;
            for version in &versions {
                files.push(&key, version)?;
            }
        }
        Ok(files.finish()?)
    }

    /// Gives a page's chain images where it is too long without. Most have them already; this is for those that could
    /// not be made in time.
    fn bound_chain(&self, key: Key, versions: Vec<Version>) -> Result<Vec<Version>, HistoryError> {
        let mut length = ChainLength::default();
        let mut wanted = Vec::new();
        for (i, version) in versions.iter().enumerate().rev() {
            length.add(&version.value);
            if length.wants_image() {
                wanted.push(i);
                length = ChainLength::default();
            }
        }
        if wanted.is_empty() || page_number(key).is_none() {
            return Ok(versions);
        }
        let mut bounded = versions;
        // From the newest to the oldest, each before the version that it is made of.
        for i in wanted.into_iter().rev() {
            let Some(lsn) = bounded.get(i).map(|version| version.lsn) else { continue };
            let Some(floor) = self.floor_of_page(key, lsn)? else { continue };
            match self.pages(&[(key, floor)], lsn) {
                Ok(mut pages) => {
                    if let Some(page) = pages.pop().flatten() {
                        bounded.insert(i, Version { lsn, value: image(page.page()) });
                    }
                }
                // Readers will hear it, too. The chain is what there is.
                Err(error) => tracing::warn!(tenant = %self.spec.tenant, timeline = %self.spec.id, %key, %error, "a long chain stays long"),
            }
        }
        Ok(live_versions(bounded))
    }

    /// Makes a published change visible to readers, and drops the memtable that it has made superfluous.
    pub(super) fn install(&self, change: &LayerChange) {
        let add: Vec<_> = change.add.iter().map(|row| Arc::new(open_layer(&self.resources, &self.spec, row))).collect();
        let remove: HashSet<LayerId> = change.remove.iter().copied().collect();
        let _changing = self.view_lock.lock();
        let view = self.view.load_full();
        let layers = view.layers.with(&add, &remove);
        let frozen = view.frozen.iter().filter(|frozen| frozen.end > change.layered).cloned().collect();
        let layered = view.layered.max(change.layered);
        self.view.store(Arc::new(View { active: Arc::clone(&view.active), frozen, layers: Arc::new(layers), layered }));
        self.positions.raise(Position::Layered, layered);
    }
}

/// Leaves out, of versions newest first, what a later one at the same LSN has made superfluous.
fn live_versions(versions: Vec<Version>) -> Vec<Version> {
    let mut live: Vec<Version> = Vec::with_capacity(versions.len());
    for version in versions {
        if live.last().is_none_or(|newer| newer.lsn != version.lsn || !newer.value.is_base()) {
            live.push(version);
        }
    }
    live
}
