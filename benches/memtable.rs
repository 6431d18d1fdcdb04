//! How long a put into the memtable takes, and a read of what is there.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use varve_postgres::{Fork, Lsn, RelNode};
use varve_storage::budget::MemoryBudget;
use varve_storage::chain::Lookup;
use varve_storage::key::Key;
use varve_storage::memtable::Memtable;
use varve_storage::value::Value;

/// Pages that a load touches at random: 1.6 GB of them.
const PAGES: u32 = 200_000;
/// Records in one memtable.
const RECORDS: u64 = 400_000;

fn key(i: u64) -> Key {
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
    Key::block(rel, (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32 % PAGES)
}

fn filled() -> Memtable {
    let memtable = Memtable::new(Lsn(0), Arc::new(Instant::now), MemoryBudget::new(1 << 30));
    for i in 0..RECORDS {
        let value = Value::Change { will_init: false, bytes: Bytes::from_static(&[7; 100]) };
        memtable.put(key(i), Lsn(i * 128), &value).expect("a memtable of 400,000 records is not full");
    }
    memtable
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("memtable");
    group.sample_size(10).measurement_time(Duration::from_secs(5)).throughput(Throughput::Elements(RECORDS));
    group.bench_function("put of 100 bytes, 400,000 on 200,000 pages", |b| {
        b.iter_batched(|| (), |()| filled(), BatchSize::PerIteration);
    });
    let memtable = filled();
    group.bench_function("keys sorted for a flush", |b| b.iter(|| black_box(memtable.sorted_keys()).len()));
    group.throughput(Throughput::Elements(1));
    let mut i = 0;
    group.bench_function("read of a chain", |b| {
        b.iter(|| {
            i += 1;
            let mut lookup = Lookup::new(key(i), Lsn(0), Lsn(u64::MAX));
            memtable.read(&mut lookup);
            lookup.versions().len()
        });
    });
    group.bench_function("newest LSN of a page", |b| {
        b.iter(|| {
            i += 1;
            memtable.newest_lsn(&key(i), Lsn(u64::MAX))
        });
    });
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
