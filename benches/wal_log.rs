//! The WAL log on the disk that holds the temporary folder: what a commit waits for, alone and among others; what
//! appending, reading and opening cost.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench that cannot go on must panic; criterion's macros write undocumented items")]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use varve_postgres::Lsn;
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::wal_log::WalLog;

const TENANT: TenantId = TenantId([1; 16]);
const EPOCH: WriterEpoch = WriterEpoch(1);
/// WAL of a TPC-B transaction without full-page images.
const COMMIT_BYTES: usize = 430;
/// Released in steps of this many bytes, as flushes do.
const RELEASE_BYTES: u64 = 8 << 20;

/// A timeline that appends and, now and then, is covered by layers.
struct Writer<'a> {
    log: &'a WalLog,
    timeline: TimelineId,
    end: Lsn,
    released: Lsn,
}

impl<'a> Writer<'a> {
    fn new(log: &'a WalLog, number: u8) -> Writer<'a> {
        let timeline = TimelineId([number; 16]);
        let end = log.attach(TENANT, timeline, &[(EPOCH, Lsn(8))], Lsn(8)).unwrap();
        Writer { log, timeline, end, released: Lsn(8) }
    }

    fn append(&mut self, bytes: &[u8], sync: bool) {
        let position = self.log.append(TENANT, self.timeline, EPOCH, self.end, bytes).unwrap();
        if sync {
            self.log.sync(position).unwrap();
        }
        self.end += bytes.len() as u64;
        if self.end.0 - self.released.0 > RELEASE_BYTES {
            self.log.sync(position).unwrap();
            self.log.release(TENANT, self.timeline, self.end);
            self.released = self.end;
        }
    }
}

/// A commit of each of some timelines at once.
fn commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("wal_log/commit");
    for threads in [1u8, 4, 16] {
        let folder = tempfile::tempdir().unwrap();
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        // One iteration is one commit of somebody.
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            b.iter_custom(|commits| {
                let began = Instant::now();
                std::thread::scope(|scope| {
                    for number in 0..threads {
                        let log = &log;
                        scope.spawn(move || {
                            let mut writer = Writer::new(log, number);
                            let share = commits / u64::from(threads) + u64::from(u64::from(number) < commits % u64::from(threads));
                            for _ in 0..share {
                                writer.append(&[7; COMMIT_BYTES], true);
                            }
                        });
                    }
                });
                began.elapsed()
            });
        });
    }
    group.finish();
}

/// What an append costs beside the fsync.
fn append(c: &mut Criterion) {
    let mut group = c.benchmark_group("wal_log/append");
    for bytes in [COMMIT_BYTES, 8 << 10, 128 << 10] {
        let folder = tempfile::tempdir().unwrap();
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        let mut writer = Writer::new(&log, 1);
        let bytes = vec![7; bytes];
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes.len()), |b| b.iter(|| writer.append(&bytes, false)));
    }
    group.finish();
}

/// Reading the newest bytes back, as ingest does, and opening what a crash left.
fn read_and_open(c: &mut Criterion) {
    const TAIL_BYTES: usize = 64 << 10;
    const LOG_BYTES: u64 = 64 << 20;
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    let timeline = TimelineId([1; 16]);
    log.attach(TENANT, timeline, &[(EPOCH, Lsn(8))], Lsn(8)).unwrap();
    let mut end = Lsn(8);
    while end.0 < LOG_BYTES {
        log.append(TENANT, timeline, EPOCH, end, &[7; COMMIT_BYTES]).unwrap();
        end += COMMIT_BYTES as u64;
    }
    log.sync_all().unwrap();
    let mut group = c.benchmark_group("wal_log");
    group.throughput(Throughput::Bytes(TAIL_BYTES as u64));
    let from = Lsn(end.0 - TAIL_BYTES as u64);
    group.bench_function("read the tail", |b| b.iter(|| log.read(TENANT, timeline, from, TAIL_BYTES).unwrap()));
    drop(log);
    group.throughput(Throughput::Bytes(LOG_BYTES));
    group.sample_size(10);
    group.bench_function("open", |b| {
        b.iter(|| {
            let log = WalLog::open(folder.path(), u64::MAX).unwrap();
            assert_eq!(log.attach(TENANT, timeline, &[(EPOCH, Lsn(8))], Lsn(8)).unwrap(), end);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500)).sample_size(20);
    targets = commit, append, read_and_open
}
criterion_main!(benches);
