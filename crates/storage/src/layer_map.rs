//! The layer map: which layers to search for a key, newest first. Immutable: a change makes a new one, which is swapped
//! in.
//!
//! Layers of one LSN range whose keys do not overlap form a **run**; a flush makes one, a merge replaces neighbouring
//! ones. Runs stand in the order in which they are searched: the one that ends later first; of two that end together,
//! the one that begins earlier, which is a merge whose inputs are still there for the keys that it has not reached yet.
//! A layer has everything in its LSN range for the keys that it spans, so once it was searched, what other layers have
//! of that range is not looked at: see [`LayerMap::read`].
//!
//! Block layers and metadata layers have runs of their own: a base backup, which reads metadata, touches no block
//! layer.

use std::collections::HashSet;
use std::sync::Arc;

use varve_postgres::Lsn;

use crate::block_cache::BlockCache;
use crate::chain::Lookup;
use crate::ids::LayerId;
use crate::key::Key;
use crate::layer::{Layer, LayerError};

/// Layers of one LSN range, by key, none overlapping another.
pub struct Run {
    /// Their versions are above this.
    pub lsn_start: Lsn,
    /// Their versions are at or below this.
    pub lsn_end: Lsn,
    layers: Vec<Arc<Layer>>,
}

impl Run {
    /// The layers, by key.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The layer that spans `key`, and else the first behind it.
    fn position(&self, key: &Key) -> usize {
        self.layers.partition_point(|layer| layer.info().last_key < *key)
    }

    /// Bytes of the layers.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.info().length).sum()
    }
}

/// See the module's doc.
#[derive(Default)]
pub struct LayerMap {
    blocks: Vec<Run>,
    metadata: Vec<Run>,
}

impl LayerMap {
    /// A map of these layers.
    pub fn new(layers: Vec<Arc<Layer>>) -> LayerMap {
        let (blocks, metadata) = layers.into_iter().partition(|layer| layer.info().is_blocks());
        LayerMap { blocks: runs(blocks), metadata: runs(metadata) }
    }

    /// This map, less the layers `remove`, and with `add`.
    pub fn with(&self, add: &[Arc<Layer>], remove: &HashSet<LayerId>) -> LayerMap {
        let kept = self.layers().filter(|layer| !remove.contains(&layer.info().id)).cloned();
        Self::new(kept.chain(add.iter().cloned()).collect())
    }

    /// All layers.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<Layer>> {
        self.blocks.iter().chain(&self.metadata).flat_map(|run| &run.layers)
    }

    /// The runs to search for relation blocks, or for everything else, in the order of the search.
    pub fn runs(&self, blocks: bool) -> &[Run] {
        if blocks { &self.blocks } else { &self.metadata }
    }

    /// Adds to each of `lookups`, whose keys ascend and are all of one kind, what the layers have for it, and lowers
    /// what it still looks for to what lies below the layers that were searched.
    ///
    /// # Errors
    /// When a layer cannot be read.
    pub fn read(&self, cache: &BlockCache, lookups: &mut [&mut Lookup]) -> Result<(), LayerError> {
        let Some(first) = lookups.first() else { return Ok(()) };
        for run in self.runs(first.key.is_block()) {
            let mut rest = lookups.iter_mut().peekable();
            while let Some(lookup) = rest.next() {
                if !wants(run, lookup) {
                    continue;
                }
                let Some(layer) = run.layers.get(run.position(&lookup.key)) else { break };
                if !layer.info().spans(&lookup.key) {
                    continue;
                }
                let mut together: Vec<&mut Lookup> = vec![lookup];
                while let Some(next) = rest.next_if(|next| next.key <= layer.info().last_key) {
                    if wants(run, next) {
                        together.push(next);
                    }
                }
                layer.read(cache, &mut together)?;
                for lookup in together {
                    lookup.upto = lookup.upto.min(run.lsn_start);
                }
            }
        }
        Ok(())
    }
}

/// Whether `lookup` still looks for what `run` may have.
fn wants(run: &Run, lookup: &Lookup) -> bool {
    !lookup.is_complete() && run.lsn_start < lookup.upto && lookup.above < run.lsn_end && lookup.above < lookup.upto
}

fn runs(mut layers: Vec<Arc<Layer>>) -> Vec<Run> {
    layers.sort_by_key(|layer| {
        let info = layer.info();
        (std::cmp::Reverse(info.lsn_end), info.lsn_start, info.first_key)
    });
    let mut runs: Vec<Run> = Vec::new();
    for layer in layers {
        let info = layer.info();
        let range = (info.lsn_start, info.lsn_end);
        let fits = |run: &&mut Run| {
            (run.lsn_start, run.lsn_end) == range && run.layers.last().is_some_and(|last| last.info().last_key < info.first_key)
        };
        match runs.last_mut().filter(fits) {
            Some(run) => run.layers.push(layer),
            None => runs.push(Run { lsn_start: range.0, lsn_end: range.1, layers: vec![layer] }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use varve_postgres::{Fork, RelNode};

    use super::*;
    use crate::chain::Version;
    use crate::envelope::Codec;
    use crate::layer::LayerWriter;
    use crate::value::Value;

    fn key(number: u32) -> Key {
        Key::block(RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main), number)
    }

    /// A layer with one change of each of `keys` at each of `lsns`.
    fn layer(id: u8, range: (u64, u64), keys: &[u32], lsns: &[u64]) -> Arc<Layer> {
        let id = LayerId([id; 16]);
        let mut writer = LayerWriter::new(id.to_string(), id, Lsn(range.0), Lsn(range.1), Codec::None, Vec::new());
        for number in keys {
            for lsn in lsns.iter().rev() {
                let value = Value::Change { will_init: false, bytes: Bytes::from(vec![id.0[0]]) };
                writer.push(&key(*number), &Version { lsn: Lsn(*lsn), value }).unwrap();
            }
        }
        let (info, bytes) = writer.finish().unwrap();
        Arc::new(Layer::new(info, id.to_string(), 0, Box::new(Bytes::from(bytes))))
    }

    fn read(map: &LayerMap, number: u32, above: u64, upto: u64) -> Vec<(u64, u8)> {
        // Others in the same walk must not matter.
        let mut lookups: Vec<Lookup> = (0..10).map(|i| Lookup::new(key(i), Lsn(above), Lsn(upto))).collect();
        map.read(&BlockCache::new(1 << 20), &mut lookups.iter_mut().collect::<Vec<_>>()).unwrap();
        let versions = lookups[number as usize].versions();
        versions
            .iter()
            .map(|version| (version.lsn.0, if let Value::Change { bytes, .. } = &version.value { bytes[0] } else { 0 }))
            .collect()
    }

    #[test]
    fn a_merge_hides_its_inputs_for_the_keys_that_it_spans() {
        let newer = layer(1, (20, 30), &[1, 2, 3, 4, 5], &[25]);
        let older = layer(2, (10, 20), &[1, 2, 4, 5, 6], &[15, 18]);
        let map = LayerMap::new(vec![Arc::clone(&older), Arc::clone(&newer)]);
        assert_eq!(read(&map, 2, 0, 30), [(25, 1), (18, 2), (15, 2)]);
        assert_eq!(read(&map, 2, 15, 18), [(18, 2)]);
        assert_eq!(read(&map, 6, 0, 30), [(18, 2), (15, 2)]);
        assert_eq!(read(&map, 9, 0, 30), []);

        // The merge has reached key 3; what it says of keys 1 to 3 counts, and only once.
        let merged = layer(3, (10, 30), &[1, 2, 3], &[15, 18, 25]);
        let map = map.with(&[merged], &HashSet::new());
        assert_eq!(read(&map, 2, 0, 30), [(25, 3), (18, 3), (15, 3)]);
        assert_eq!(read(&map, 4, 0, 30), [(25, 1), (18, 2), (15, 2)]);
        let rest = layer(4, (10, 30), &[4, 5, 6], &[15, 18, 25]);
        let map = map.with(&[rest], &HashSet::from([newer.info().id, older.info().id]));
        assert_eq!(map.runs(true).len(), 1, "both layers of the merge are one run");
        assert_eq!(read(&map, 6, 0, 30), [(25, 4), (18, 4), (15, 4)]);
        assert_eq!(map.layers().count(), 2);
    }
}
