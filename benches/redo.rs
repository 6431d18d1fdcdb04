//! What decoding of WAL and redo cost, on the WAL of a real server, which the bench lets write it first.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use varve_postgres::wal::record_type::record_type;
use varve_postgres::wal::{Framer, Record, rmgr};
use varve_postgres::{BlockNumber, Lsn, Major, Page, RelFork, page};
use varve_redo::apply;
use varve_redo::change::{BlockRecord, Change};
use varve_testbed::postgres::Postgres;
use varve_testbed::redo;
use varve_verify::WalDirectory;
use varve_verify::wal::{Next, WalSource as _};

const MAJOR: Major = Major::V15;
/// Changes of a kind that are measured together: their pages take 2 MB.
const SAMPLES_MAX: usize = 256;
/// Fewer say nothing.
const SAMPLES_MIN: usize = 16;
/// Files of the SQL corpus, one or more for each resource manager.
const FILES: [&str; 9] = ["heap_rows", "heap_vacuum", "btree_splits", "hash", "gin_posting_tree", "gist", "spgist", "brin", "sequences"];

/// A change, and the page that it is made to.
struct Sample {
    lsn: Lsn,
    blkno: BlockNumber,
    /// In its stored form.
    change: Bytes,
    before: Box<Page>,
}

fn pgbench(postgres: &Postgres, args: &[&str]) -> Result<()> {
    let output = postgres
        .command("pgbench")?
        .args(args)
        .args(["-h", &postgres.dir().display().to_string(), "-U", "postgres", "postgres"])
        .output()?;
    ensure!(output.status.success(), "pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// One segment of the WAL that pgbench makes a server write, without page images, and where it begins.
fn plain_wal() -> Result<(Lsn, Bytes)> {
    let mut postgres =
        Postgres::init(MAJOR, &[], &[("full_page_writes", "off"), ("wal_keep_size", "'1GB'"), ("synchronous_commit", "off")])?;
    postgres.start()?;
    pgbench(&postgres, &["-iq", "-s", "5"])?;
    pgbench(&postgres, &["-c", "4", "-t", "20000"])?;
    let current = postgres.psql("postgres", "SELECT pg_walfile_name(pg_current_wal_lsn())")?;
    postgres.stop("fast")?;
    // The one before the current is whole, and of the load's end; behind it lie those that are made ready or used
    // again.
    let segments = postgres.wal_segments()?;
    let at = segments.iter().position(|path| path.ends_with(current.trim())).context("the current segment")?;
    let path = &segments[at.checked_sub(1).context("a segment before the current one")?];
    Ok((start_of(path)?, std::fs::read(path)?.into()))
}

fn start_of(segment: &Path) -> Result<Lsn> {
    let name = segment.file_name().and_then(|name| name.to_str()).context("a segment's name")?;
    Ok(Lsn(u64::from_str_radix(&name[8..16], 16)? << 32 | u64::from_str_radix(&name[16..24], 16)? << 24))
}

/// Changes of each record type, with the pages before them, which the records before brought.
fn samples() -> Result<BTreeMap<(u8, u8), Vec<Sample>>> {
    let mut samples: BTreeMap<(u8, u8), Vec<Sample>> = BTreeMap::new();
    for file in FILES {
        let mut postgres = redo::init(MAJOR, &[], &[])?;
        postgres.start()?;
        postgres.psql_file("postgres", &redo::sql_path(file))?;
        postgres.stop("fast")?;
        let mut pages: HashMap<(RelFork, BlockNumber), Box<Page>> = HashMap::new();
        let mut wal = WalDirectory::open(&postgres.data_dir())?;
        while let Next::Record(framed) = wal.next()? {
            let record = Record::decode(&framed.bytes, framed.start, framed.end, MAJOR)?;
            for block in &record.blocks {
                let before = match block.will_init {
                    true => Some(Box::new(page::ZERO_PAGE)),
                    false => pages.remove(&(block.rel, block.blkno)),
                };
                let mut after = Box::new(page::ZERO_PAGE);
                if block.image.as_ref().is_none_or(|image| image.restore(&mut after).is_err()) {
                    continue;
                }
                let kind = samples.entry((record.header.rmid, record.kind())).or_default();
                if let Some(before) = before.filter(|_| kind.len() < SAMPLES_MAX) {
                    let change = Change::Record(BlockRecord::trim(&record, block));
                    let mut page = before.clone();
                    if apply(MAJOR, record.end, block.blkno, &change, &mut page).is_ok() {
                        kind.push(Sample { lsn: record.end, blkno: block.blkno, change: change.encode(), before });
                    }
                }
                page::set_lsn(&mut after, record.end);
                pages.insert((block.rel, block.blkno), after);
            }
        }
    }
    Ok(samples)
}

fn decode(start: Lsn, bytes: &Bytes) -> usize {
    let mut framer = Framer::from_page(MAJOR, None, start);
    let mut input = bytes.clone();
    let mut records = 0;
    while let Ok(Some(framed)) = framer.next_record(&mut input) {
        let record = Record::decode(&framed.bytes, framed.start, framed.end, MAJOR);
        records += usize::from(black_box(record).is_ok());
    }
    records
}

fn benches(c: &mut Criterion) {
    let (start, bytes) = plain_wal().expect("a server that writes WAL");
    let records = decode(start, &bytes);
    assert!(records > 1000, "a segment of pgbench's WAL has many records, it has {records}");
    let mut group = c.benchmark_group("WAL");
    group.sample_size(10).measurement_time(Duration::from_secs(3)).throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("frame, check CRC and decode, bytes", |b| b.iter(|| decode(start, &bytes)));
    group.throughput(Throughput::Elements(records as u64));
    group.bench_function("frame, check CRC and decode, records", |b| b.iter(|| decode(start, &bytes)));
    group.finish();

    let mut group = c.benchmark_group("redo");
    group.sample_size(10).measurement_time(Duration::from_millis(500)).warm_up_time(Duration::from_millis(100));
    for ((rmid, info), samples) in samples().expect("a server that writes WAL") {
        if samples.len() < SAMPLES_MIN {
            continue;
        }
        group.throughput(Throughput::Elements(samples.len() as u64));
        group.bench_function(format!("{} {}", rmgr::name(rmid), record_type(MAJOR, rmid, info)), |b| {
            let changes: Vec<Change<'_>> = samples.iter().filter_map(|sample| Change::decode(&sample.change).ok()).collect();
            let pages = || samples.iter().map(|sample| sample.before.clone()).collect::<Vec<_>>();
            b.iter_batched_ref(
                pages,
                |pages| {
                    for ((sample, change), page) in samples.iter().zip(&changes).zip(pages) {
                        let _ = black_box(apply(MAJOR, sample.lsn, sample.blkno, change, page));
                    }
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(redo_benches, benches);
criterion_main!(redo_benches);
