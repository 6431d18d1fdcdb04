//! The memtable answers what an ordered map answers, to readers beside its writer, and knows what memory it has.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::{BLCKSZ, Fork, RelNode};

use super::*;
use crate::chain::CHAIN_CHANGES_MAX;

const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };

fn block(number: u32) -> Key {
    Key::block(REL.fork(Fork::Main), number)
}

fn memtable() -> Memtable {
    Memtable::new(Lsn(0), Arc::new(Instant::now), MemoryBudget::new(1 << 30))
}

fn change(bytes: &'static [u8]) -> Value {
    Value::Change { will_init: false, bytes: Bytes::from_static(bytes) }
}

fn read(memtable: &Memtable, key: Key, above: u64, upto: u64) -> Vec<Version> {
    let mut lookup = Lookup::new(key, Lsn(above), Lsn(upto));
    memtable.read(&mut lookup);
    lookup.versions().to_vec()
}

#[derive(Clone, Debug)]
enum Step {
    Put { key: u32, lsn_step: u64, kind: u8, len: usize },
    Image { key: u32, back: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0u32..6, 0u64..3, 0u8..12, 0usize..40).prop_map(|(key, lsn_step, kind, len)| Step::Put { key, lsn_step, kind, len }),
        1 => (0u32..6, 0u64..40).prop_map(|(key, back)| Step::Image { key, back }),
    ]
}

proptest! {
    #[test]
    fn reads_what_an_ordered_map_reads(steps in proptest::collection::vec(step(), 1..500)) {
        let memtable = memtable();
        // By key, newest last, with images where they were inserted.
        let mut model: BTreeMap<Key, Vec<Version>> = BTreeMap::new();
        let mut lsn = 1;
        for (i, step) in steps.iter().enumerate() {
            match *step {
                Step::Put { key, lsn_step, kind, len } => {
                    lsn += lsn_step;
                    let bytes = Bytes::from(vec![i as u8; len]);
                    let value = match kind {
                        0 => Value::Image(bytes),
                        1 => Value::Absent,
                        2 => Value::Change { will_init: true, bytes },
                        _ => Value::Change { will_init: false, bytes },
                    };
                    memtable.put(block(key), Lsn(lsn), &value).unwrap();
                    model.entry(block(key)).or_default().push(Version { lsn: Lsn(lsn), value });
                }
                Step::Image { key, back } => {
                    let at = Lsn(lsn.saturating_sub(back));
                    memtable.insert_image(block(key), at, &[i as u8; BLCKSZ]).unwrap();
                    let versions = model.entry(block(key)).or_default();
                    let place = versions.partition_point(|version| version.lsn <= at);
                    if place > 0 {
                        let value = Value::Image(Bytes::from(vec![i as u8; BLCKSZ]));
                        versions.insert(place, Version { lsn: versions[place - 1].lsn, value });
                    }
                }
            }
        }
        for (key, versions) in &model {
            for upto in 0..=lsn {
                let above = upto.saturating_sub(7);
                let mut expected = Vec::new();
                for version in versions.iter().rev().filter(|version| version.lsn <= Lsn(upto) && version.lsn > Lsn(above)) {
                    expected.push(version.clone());
                    if version.value.is_base() {
                        break;
                    }
                }
                prop_assert_eq!(read(&memtable, *key, above, upto), expected, "{} in {}..{}", key, above, upto);
                let newest = versions.iter().rev().map(|version| version.lsn).find(|at| *at <= Lsn(upto));
                prop_assert_eq!(memtable.newest_lsn(key, Lsn(upto)), newest);
            }
            let all: Vec<Version> = versions.iter().rev().cloned().collect();
            prop_assert_eq!(memtable.versions_of(key), all);
        }
        model.retain(|_, versions| !versions.is_empty());
        prop_assert_eq!(memtable.sorted_keys(), model.keys().copied().collect::<Vec<_>>());
        prop_assert_eq!(memtable.versions(), model.values().map(Vec::len).sum::<usize>());
    }
}

#[test]
fn a_long_chain_asks_for_an_image_once_for_each_so_many_changes() {
    let memtable = memtable();
    let asked: Vec<u64> =
        (1..=3 * CHAIN_CHANGES_MAX as u64).filter(|lsn| memtable.put(block(1), Lsn(*lsn), &change(b"x")).unwrap()).collect();
    assert_eq!(asked, [128, 256, 384], "an image is asked for after each {CHAIN_CHANGES_MAX} changes");
    memtable.insert_image(block(1), Lsn(256), &ZERO_PAGE).unwrap();
    assert_eq!(read(&memtable, block(1), 0, 300).len(), 45, "44 changes and the image");
    assert_eq!(read(&memtable, block(1), 0, 255).len(), 255, "an older read finds no image");

    let large = Value::Change { will_init: false, bytes: Bytes::from(vec![0; 6000]) };
    let asked: Vec<u64> = (1..=6).filter(|lsn| memtable.put(block(2), Lsn(*lsn), &large).unwrap()).collect();
    assert_eq!(asked, [3, 6], "large changes ask earlier");
}

#[test]
fn metadata_keys_are_scanned_in_order_and_blocks_are_not() {
    let memtable = memtable();
    let keys: Vec<Key> = (0..100).rev().map(|rel| Key::relation_size(RelNode { rel, ..REL }.fork(Fork::Main))).collect();
    for key in &keys {
        memtable.put(*key, Lsn(5), &Value::Absent).unwrap();
        memtable.put(*key, Lsn(6), &Value::Absent).unwrap();
    }
    memtable.put(block(1), Lsn(7), &Value::Absent).unwrap();
    let found = memtable.ordered_keys(Key::MIN, Key::MAX, usize::MAX);
    assert_eq!(found, keys.iter().rev().copied().collect::<Vec<_>>());
    assert_eq!(memtable.ordered_keys(found[3], found[90], 2), found[3..5]);
    assert_eq!(memtable.newest(), Lsn(7));
}

#[test]
fn memory_is_accounted_and_an_empty_memtable_has_none() {
    let budget = MemoryBudget::new(1 << 30);
    let memtable = Memtable::new(Lsn(0), Arc::new(Instant::now), Arc::clone(&budget));
    assert_eq!((memtable.memory_bytes(), memtable.is_empty()), (0, true));
    let value = Value::Change { will_init: false, bytes: Bytes::from(vec![0; 100]) };
    for i in 0..100_000u32 {
        memtable.put(block(i / 4), Lsn(u64::from(i)), &value).unwrap();
    }
    let payload = 100_000 * (100 + 24) + 25_000 * HEAD_PAYLOAD_BYTES;
    let used = memtable.memory_bytes();
    assert!(used > payload && used < payload * 2, "{used} bytes for a payload of {payload}");
    assert_eq!(budget.used_bytes(), used);
    drop(memtable);
    assert_eq!(budget.used_bytes(), 0);
}

/// Key and head of a chain.
const HEAD_PAYLOAD_BYTES: usize = 34;

#[test]
fn readers_see_whole_chains_while_the_writer_puts() {
    let memtable = memtable();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let upto = memtable.newest();
                        let versions = read(&memtable, block(0), 0, upto.0);
                        let expected: Vec<u64> = (1..=upto.0).rev().collect();
                        let found: Vec<u64> = versions.iter().map(|version| version.lsn.0).collect();
                        assert_eq!(found, expected, "a reader at {upto} sees each version up to it");
                        if upto.0 == 2000 {
                            break;
                        }
                    }
                })
            })
            .collect();
        for lsn in 1..=2000 {
            memtable.put(block(0), Lsn(lsn), &change(b"abc")).unwrap();
        }
        for reader in readers {
            reader.join().unwrap();
        }
    });
}
