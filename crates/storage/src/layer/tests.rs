//! A layer reads as it was written, and a damaged one is named and never believed.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use varve_postgres::{Fork, RelNode};

use super::*;
use crate::block_cache::BlockCache;
use crate::chain::{Lookup, Version};
use crate::value::Value;

type Model = BTreeMap<Key, Vec<Version>>;

const START: Lsn = Lsn(1000);
const END: Lsn = Lsn(2000);

fn key(number: u32) -> Key {
    Key::block(RelNode { spc: 1663, db: 5, rel: 16384 + number / 7 }.fork(Fork::Main), number)
}

fn write(model: &Model, codec: Codec, tiny: bool) -> (LayerInfo, Bytes) {
    let writer = LayerWriter::new("a/layer".to_owned(), LayerId([3; 16]), START, END, codec, Vec::new());
    let mut writer = if tiny { writer.tiny() } else { writer };
    for (key, versions) in model {
        versions.iter().for_each(|version| writer.push(key, version).unwrap());
    }
    let (info, bytes) = writer.finish().unwrap();
    assert_eq!(info.length, bytes.len() as u64);
    (info, Bytes::from(bytes))
}

fn open(info: &LayerInfo, bytes: &Bytes) -> Arc<Layer> {
    Arc::new(Layer::new(info.clone(), "a/layer".to_owned(), 0, Box::new(bytes.clone())))
}

fn expected(model: &Model, key: Key, above: Lsn, upto: Lsn) -> Vec<Version> {
    let mut found = Vec::new();
    for version in model.get(&key).into_iter().flatten().filter(|version| above < version.lsn && version.lsn <= upto) {
        found.push(version.clone());
        if version.value.is_base() {
            break;
        }
    }
    found
}

fn all(iter: &mut LayerIter) -> Result<Vec<(Key, Version)>, LayerError> {
    let mut found = Vec::new();
    while let Some(version) = iter.next()? {
        found.push(version);
    }
    Ok(found)
}

fn flat(model: &Model) -> Vec<(Key, Version)> {
    model.iter().flat_map(|(key, versions)| versions.iter().map(|version| (*key, version.clone()))).collect()
}

/// Versions of some of 40 keys, newest first.
fn model() -> impl Strategy<Value = Model> {
    let value = (0u8..12, 0usize..60, any::<u8>()).prop_map(|(kind, len, fill)| {
        let bytes = Bytes::from(vec![fill; len]);
        match kind {
            0 => Value::Image(bytes),
            1 => Value::Absent,
            2 => Value::Change { will_init: true, bytes },
            _ => Value::Change { will_init: false, bytes },
        }
    });
    let version = (START.0 + 1..=END.0, value).prop_map(|(lsn, value)| Version { lsn: Lsn(lsn), value });
    let versions = proptest::collection::vec(version, 1..30).prop_map(|mut versions| {
        versions.sort_by_key(|version| std::cmp::Reverse(version.lsn));
        versions
    });
    proptest::collection::btree_map((0u32..40).prop_map(key), versions, 1..40)
}

proptest! {
    #[test]
    fn what_is_written_is_read(model in model(), codec in 0u8..3, tiny in any::<bool>()) {
        let codec = Codec::from_number(codec).unwrap();
        let (info, bytes) = write(&model, codec, tiny);
        let layer = open(&info, &bytes);
        layer.verify().unwrap();
        let cache = BlockCache::new(1 << 20);
        for upto in (START.0 - 1..=END.0 + 1).step_by(83) {
            let above = Lsn(upto.saturating_sub(500));
            let mut lookups: Vec<Lookup> = (0..42).map(|number| Lookup::new(key(number), above, Lsn(upto))).collect();
            layer.read(&cache, &mut lookups.iter_mut().collect::<Vec<_>>()).unwrap();
            for lookup in &lookups {
                let expected = expected(&model, lookup.key, above, Lsn(upto));
                prop_assert_eq!(lookup.versions(), &expected[..], "{} in {}..{}", lookup.key, above, upto);
                let mut alone = Lookup::new(lookup.key, above, Lsn(upto));
                layer.read(&BlockCache::new(0), &mut [&mut alone]).unwrap();
                prop_assert_eq!(alone.versions(), &expected[..], "without a cache");
            }
        }
        prop_assert_eq!(all(&mut layer.iter()).unwrap(), flat(&model));
        for number in 0..42 {
            let from: Vec<_> = flat(&model).into_iter().filter(|(found, _)| *found >= key(number)).collect();
            prop_assert_eq!(all(&mut layer.iter_from(key(number), Arc::clone(&cache))).unwrap(), from);
        }
    }
}

/// A layer with several partitions, blocks and kinds of value, and its model.
fn small() -> Model {
    let mut model = Model::new();
    for number in 0..20 {
        let change = |lsn| Version { lsn: Lsn(lsn), value: Value::Change { will_init: false, bytes: Bytes::from(vec![number as u8; 20]) } };
        let image = Version { lsn: Lsn(1100), value: Value::Image(Bytes::from(vec![b'x'; 30])) };
        model.insert(key(number), vec![change(1900), change(1500 + u64::from(number)), image]);
    }
    model
}

#[test]
fn every_flipped_bit_is_noticed_or_harmless() {
    let model = small();
    let upto = Lsn(1600);
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let (info, bytes) = write(&model, codec, true);
        let mut noticed = 0;
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1 << (at % 8);
            let layer = open(&info, &Bytes::from(flipped));
            let cache = BlockCache::new(1 << 20);
            let mut has_failed = false;
            for number in 0..20 {
                let mut lookup = Lookup::new(key(number), Lsn(0), upto);
                match layer.read(&cache, &mut [&mut lookup]) {
                    Ok(()) => assert_eq!(lookup.versions(), expected(&model, key(number), Lsn(0), upto), "byte {at} is flipped"),
                    Err(error) => {
                        let LayerError::Corrupt { object, key: Some(named), .. } = &error else { panic!("unexpected: {error}") };
                        assert_eq!((object.as_str(), *named), ("a/layer", key(number)), "the error names what it should");
                        has_failed = true;
                    }
                }
            }
            match all(&mut layer.iter()) {
                Ok(found) => assert_eq!(found, flat(&model), "byte {at} is flipped"),
                Err(_) => has_failed = true,
            }
            let error = layer.verify().expect_err("verify notices each flipped byte");
            assert!(error.to_string().contains("a/layer is corrupt at offset"), "{error}");
            noticed += usize::from(has_failed);
        }
        assert_eq!(noticed, bytes.len(), "each byte of the object is covered by a checksum that readers check");
    }
}

#[test]
fn a_layer_that_was_cut_or_is_another_is_refused() {
    let model = small();
    let (info, bytes) = write(&model, Codec::Lz4, true);
    let read = |info: &LayerInfo, bytes: &Bytes| {
        let mut lookup = Lookup::new(key(1), Lsn(0), Lsn(1600));
        open(info, bytes).read(&BlockCache::new(0), &mut [&mut lookup]).map(|()| lookup.versions().len())
    };
    assert_eq!(read(&info, &bytes), Ok(2));
    for length in 0..bytes.len() {
        assert!(read(&info, &bytes.slice(..length)).is_err(), "cut to {length} bytes");
    }
    for other in [
        LayerInfo { id: LayerId([4; 16]), ..info.clone() },
        LayerInfo { lsn_end: Lsn(1999), ..info.clone() },
        LayerInfo { versions: 7, ..info.clone() },
        LayerInfo { first_key: key(1), ..info.clone() },
    ] {
        let error = read(&other, &bytes).unwrap_err().to_string();
        assert!(error.contains("it should be layer"), "{error}");
    }
}

#[test]
fn values_larger_than_a_block_and_long_chains_are_read() {
    let mut model = Model::new();
    let large = Bytes::from((0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>());
    model.insert(key(1), vec![Version { lsn: Lsn(1500), value: Value::Image(large) }]);
    let change = |i: u64| Version { lsn: Lsn(2000 - i), value: Value::Change { will_init: false, bytes: Bytes::from(vec![i as u8; 300]) } };
    model.insert(key(2), (0..900).map(change).collect());
    model.insert(key(3), vec![Version { lsn: Lsn(1500), value: Value::Absent }]);
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let (info, bytes) = write(&model, codec, false);
        let layer = open(&info, &bytes);
        layer.verify().unwrap();
        for number in 1..=3 {
            let mut lookup = Lookup::new(key(number), Lsn(0), END);
            layer.read(&BlockCache::new(1 << 20), &mut [&mut lookup]).unwrap();
            assert_eq!(lookup.versions(), expected(&model, key(number), Lsn(0), END));
        }
    }
}

#[test]
fn versions_out_of_order_or_range_are_not_written() {
    let mut writer = LayerWriter::new("a/layer".to_owned(), LayerId([3; 16]), START, END, Codec::None, Vec::new());
    let version = |lsn| Version { lsn: Lsn(lsn), value: Value::Absent };
    writer.push(&key(2), &version(1500)).unwrap();
    for (number, lsn) in [(2, 1501), (1, 1400), (3, 1000), (3, 2001)] {
        let error = writer.push(&key(number), &version(lsn)).unwrap_err().to_string();
        assert!(error.contains("a/layer cannot be written"), "{error}");
    }
    let empty = LayerWriter::new("a/layer".to_owned(), LayerId([3; 16]), START, END, Codec::None, Vec::new());
    assert!(empty.finish().is_err(), "a layer without versions says nothing");
}
