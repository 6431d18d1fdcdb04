//! Ingest of a pgbench run's WAL by a stock Postgres, into a history that keeps nothing: what a record costs before it
//! reaches the memtable. As on a compute, full-page writes are off.
//!
//! `INGEST_BENCH_SCALE` and `INGEST_BENCH_TRANSACTIONS` set how much WAL there is.

#![allow(clippy::disallowed_methods, reason = "real servers take real time")]
#![allow(missing_docs, reason = "a bench")]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use parking_lot::RwLock;
use varve_engine::ingest::Ingest;
use varve_engine::template::import_data_directory;
use varve_postgres::wal::{FramedRecord, Framer};
use varve_postgres::{Lsn, Major, Page};
use varve_storage::history::{History, HistoryError, HistoryWriter, Visit};
use varve_storage::key::Key;
use varve_storage::value::Value;
use varve_testbed::postgres::{Postgres, wal_segments};
use varve_testing::naive_history::NaiveHistory;

/// Answers as the history before the run, takes everything and keeps nothing.
struct Discard {
    before: Arc<NaiveHistory>,
    start: Lsn,
    puts: AtomicU64,
    bytes: AtomicU64,
    last: RwLock<Option<Bytes>>,
}

impl History for Discard {
    fn major(&self) -> Major {
        self.before.major()
    }
    fn get_above(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<(Lsn, Bytes)>, HistoryError> {
        self.before.get_above(key, floor, lsn.min(self.start))
    }
    fn page(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<Box<Page>>, HistoryError> {
        self.before.page(key, floor, lsn.min(self.start))
    }
    fn scan_above(&self, from: Key, to: Key, floor: Lsn, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError> {
        self.before.scan_above(from, to, floor, lsn.min(self.start), visit)
    }
}

impl HistoryWriter for Discard {
    fn put(&self, _key: Key, _lsn: Lsn, value: Value) -> Result<(), HistoryError> {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(value.len() as u64, Ordering::Relaxed);
        if let Value::Image(bytes) = value {
            *self.last.write() = Some(bytes);
        }
        Ok(())
    }
    fn advance(&self, _lsn: Lsn) {}
}

fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// The history before a pgbench run, and the run's records.
fn pgbench_wal() -> (Arc<NaiveHistory>, Lsn, Vec<FramedRecord>) {
    let settings = [("wal_keep_size", "'16GB'"), ("max_wal_size", "'8GB'"), ("full_page_writes", "off"), ("shared_buffers", "'256MB'")];
    let mut postgres = Postgres::init(Major::V15, &[], &settings).expect("a Postgres 15");
    postgres.start().expect("it starts");
    let pgbench = |args: &[&str]| {
        let mut command = Command::new("/usr/lib/postgresql/15/bin/pgbench");
        let status = command.args(args).arg("-h").arg(postgres.dir()).args(["-U", "postgres", "postgres"]).output().expect("pgbench runs");
        assert!(status.status.success(), "pgbench: {}", String::from_utf8_lossy(&status.stderr));
    };
    pgbench(&["-i", "-q", "-s", &number("INGEST_BENCH_SCALE", 5).to_string()]);
    postgres.stop("fast").expect("it stops");
    let history = Arc::new(NaiveHistory::new(Major::V15, Lsn(8)));
    let start = import_data_directory(&postgres.data_dir(), &*history, &mut |_| {}).expect("an import").end.end;
    postgres.start().expect("it starts again");
    let transactions = number("INGEST_BENCH_TRANSACTIONS", 10_000) / 4;
    let run = Command::new("/usr/lib/postgresql/15/bin/pgbench")
        .args(["-n", "-c", "4", "-t", &transactions.to_string(), "-h"])
        .arg(postgres.dir())
        .args(["-U", "postgres", "postgres"])
        .output()
        .expect("pgbench runs");
    assert!(run.status.success(), "pgbench: {}", String::from_utf8_lossy(&run.stderr));
    postgres.stop("fast").expect("it stops");
    let mut framer = Framer::new(Major::V15, None, start, None);
    let mut records = Vec::new();
    for path in wal_segments(&postgres.data_dir().join("pg_wal")).expect("its WAL") {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a segment's name");
        let number = u64::from_str_radix(&name[8..16], 16).expect("a name") * 256 + u64::from_str_radix(&name[16..24], 16).expect("a name");
        if number != framer.position().segment_number() {
            continue;
        }
        let mut input = Bytes::from(std::fs::read(&path).expect("a segment")).slice(framer.position().segment_offset() as usize..);
        while let Ok(Some(record)) = framer.next_record(&mut input) {
            records.push(record);
        }
    }
    (history, start, records)
}

fn ingest(criterion: &mut Criterion) {
    let (before, start, records) = pgbench_wal();
    let bytes: u64 = records.iter().map(|record| record.bytes.len() as u64).sum();
    let run = || {
        let history =
            Arc::new(Discard { before: before.clone(), start, puts: AtomicU64::new(0), bytes: AtomicU64::new(0), last: RwLock::new(None) });
        let mut ingest = Ingest::open(history.clone(), start).expect("an ingest");
        let begun = Instant::now();
        for (i, record) in records.iter().enumerate() {
            ingest.record(record).expect("a record");
            if i % 256 == 255 {
                ingest.advance().expect("to go on");
            }
        }
        (begun.elapsed(), history)
    };
    let (elapsed, history) = run();
    let puts = history.puts.load(Ordering::Relaxed);
    println!(
        "{} records of {bytes} bytes become {puts} versions of {} bytes; {} ns a record",
        records.len(),
        history.bytes.load(Ordering::Relaxed),
        elapsed.as_nanos() / records.len() as u128
    );
    let mut group = criterion.benchmark_group("ingest");
    group.throughput(Throughput::Elements(records.len() as u64)).sample_size(10);
    group.bench_function("pgbench_records", |bencher| {
        bencher.iter_custom(|rounds| (0..rounds).map(|_| run().0).sum::<Duration>());
    });
    group.finish();
}

criterion_group!(benches, ingest);
criterion_main!(benches);
