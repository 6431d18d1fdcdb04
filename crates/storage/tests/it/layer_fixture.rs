//! Layers that earlier releases wrote stay readable. A new format version adds a fixture; none is ever changed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::slru::SlruKind;
use varve_postgres::{Fork, Lsn, RelNode};
use varve_storage::chain::Version;
use varve_storage::envelope::Codec;
use varve_storage::ids::LayerId;
use varve_storage::key::Key;
use varve_storage::layer::{Layer, LayerInfo, LayerWriter};
use varve_storage::value::Value;

/// What the fixtures of version 1 hold, which was written in three ways.
const FIXTURES: [(&str, Codec, u32); 3] =
    [("layer-v1-none", Codec::None, 0x2EA3_3ECE), ("layer-v1-lz4", Codec::Lz4, 0xAA52_0F6E), ("layer-v1-zstd", Codec::Zstd, 0xD6BB_9E7B)];

const ID: LayerId = LayerId([0x5A; 16]);
const LSNS: (Lsn, Lsn) = (Lsn(0x16B_3748), Lsn(0x1_0000_0028));

/// Versions of each kind: short and long keys' differences, values from none to more than a block.
fn versions() -> Vec<(Key, Version)> {
    let mut versions = Vec::new();
    let mut push = |key: Key, lsn: u64, value: Value| versions.push((key, Version { lsn: Lsn(LSNS.0.0 + lsn), value }));
    for block in 0..60u32 {
        let key = Key::block(RelNode { spc: 1663, db: 5, rel: 16384 + block / 7 }.fork(Fork::Main), block);
        let bytes = |len: u32| Bytes::from((0..len).map(|i| (i.wrapping_mul(2_654_435_761 + block) >> 21) as u8).collect::<Vec<_>>());
        push(key, 900 + u64::from(block), Value::Change { will_init: false, bytes: bytes(block * 3) });
        push(key, 900, Value::Change { will_init: false, bytes: bytes(5) });
        push(key, 100, if block % 2 == 0 { Value::Image(bytes(600)) } else { Value::Change { will_init: true, bytes: bytes(40) } });
    }
    push(Key::slru_page(SlruKind::Clog, 3), LSNS.1.0 - LSNS.0.0, Value::Image(Bytes::from(vec![7; 20_000])));
    push(Key::two_phase(1 << 40), 8, Value::Absent);
    versions
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn info(codec: Codec, bytes: &[u8], checksum: u32) -> LayerInfo {
    let versions = versions();
    LayerInfo {
        id: ID,
        first_key: versions.first().unwrap().0,
        last_key: versions.last().unwrap().0,
        lsn_start: LSNS.0,
        lsn_end: LSNS.1,
        versions: versions.len() as u64,
        length: bytes.len() as u64,
        codec,
        checksum,
    }
}

#[test]
fn layers_of_version_1_are_read() {
    for (name, codec, checksum) in FIXTURES {
        let bytes = Bytes::from(std::fs::read(folder().join(name)).unwrap());
        let layer = Arc::new(Layer::new(info(codec, &bytes, checksum), name.to_owned(), 0, Box::new(bytes)));
        layer.verify().unwrap();
        let (mut iter, mut found) = (layer.iter(), Vec::new());
        while let Some(version) = iter.next().unwrap() {
            found.push(version);
        }
        assert!(found == versions(), "{name} holds other versions than it did");
    }
}

#[test]
#[ignore = "writes the fixtures; only for a new version"]
fn write_fixtures() {
    for (name, codec, _) in FIXTURES {
        let mut writer = LayerWriter::new(name.to_owned(), ID, LSNS.0, LSNS.1, codec, Vec::new());
        versions().iter().for_each(|(key, version)| writer.push(key, version).unwrap());
        let (info, bytes) = writer.finish().unwrap();
        std::fs::write(folder().join(name), bytes).unwrap();
        println!("{name}: {:#010X}", info.checksum);
    }
}
