//! Layers: damage is noticed wherever it is.

use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::{Fork, Lsn, RelNode};
use varve_storage::block_cache::BlockCache;
use varve_storage::chain::{Lookup, Version};
use varve_storage::envelope::Codec;
use varve_storage::ids::LayerId;
use varve_storage::key::Key;
use varve_storage::layer::{Layer, LayerWriter};
use varve_storage::value::Value;

use crate::input::Input;

/// Versions in a layer.
const VERSIONS_MAX: usize = 64;
const START: Lsn = Lsn(1000);
/// Bytes of the block cache.
const CACHE_BYTES: usize = 1 << 20;

/// A layer of any versions reads as it was written; when it is damaged, reading gives what was written or an error.
///
/// Input: codec, number of damages and the damages (offset and a mask); then the versions (block, LSN step, kind,
/// bytes).
pub(crate) fn layer(data: &[u8]) {
    let mut input = Input::new(data);
    let codec = Codec::from_number(input.u8() % 3).unwrap_or(Codec::None);
    let damages: Vec<(u16, u8)> = (0..input.u8() % 8).map(|_| (input.u16(), input.u8())).collect();
    let versions = versions(&mut input);
    if versions.is_empty() {
        return;
    }
    let end = versions.iter().map(|(_, version)| version.lsn).max().unwrap_or(START);
    let mut writer = LayerWriter::new("layer".to_owned(), LayerId([7; 16]), START, end, codec, Vec::new());
    for (key, version) in &versions {
        if let Err(error) = writer.push(key, version) {
            panic!("versions in order must be taken: {error}");
        }
    }
    let (info, mut bytes) = match writer.finish() {
        Ok(finished) => finished,
        Err(error) => panic!("a layer of sound versions must be written: {error}"),
    };
    let mut damaged = false;
    for (at, mask) in damages {
        let at = usize::from(at) % bytes.len();
        bytes[at] ^= mask;
        damaged |= mask != 0;
    }
    let layer = Arc::new(Layer::new(info, "layer".to_owned(), 0, Box::new(Bytes::from(bytes))));
    let verified = layer.verify();
    assert!(damaged || verified.is_ok(), "a layer as it was written must be sound: {verified:?}");
    let mut iter = layer.iter();
    let mut read = Vec::new();
    let whole = loop {
        match iter.next() {
            Ok(Some(version)) => read.push(version),
            Ok(None) => break true,
            Err(error) => {
                assert!(damaged, "an undamaged layer must be read: {error}");
                break false;
            }
        }
    };
    assert!(versions.starts_with(&read), "what is read must be what was written");
    assert!(!whole || read.len() == versions.len(), "a layer that reads to its end must be whole");
    look_up(&layer, &versions, damaged);
}

fn look_up(layer: &Layer, versions: &[(Key, Version)], damaged: bool) {
    let cache = BlockCache::new(CACHE_BYTES);
    for (key, newest) in versions {
        let mut lookup = Lookup::new(*key, START, newest.lsn);
        match layer.read(&cache, &mut [&mut lookup]) {
            Ok(()) => {
                let found = lookup.versions().first();
                assert_eq!(found, Some(newest), "a version must be found, or reading be an error");
            }
            Err(error) => assert!(damaged, "an undamaged layer must be read: {error}"),
        }
    }
}

/// Versions in the order of layers: by key, then newest first.
fn versions(input: &mut Input<'_>) -> Vec<(Key, Version)> {
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
    let mut versions = Vec::new();
    while !input.is_empty() && versions.len() < VERSIONS_MAX {
        let (block, lsn, kind) = (u32::from(input.u8() % 16), START + 1 + u64::from(input.u16()), input.u8());
        let bytes = Bytes::copy_from_slice(input.piece());
        let value = match kind % 4 {
            0 => Value::Absent,
            1 => Value::Image(bytes),
            _ => Value::Change { will_init: kind % 4 == 2, bytes },
        };
        versions.push((Key::block(rel, block), Version { lsn, value }));
    }
    versions.sort_by(|(a, x), (b, y)| a.cmp(b).then(y.lsn.cmp(&x.lsn)));
    versions.dedup_by(|(a, x), (b, y)| (a, x.lsn) == (b, y.lsn));
    versions
}
