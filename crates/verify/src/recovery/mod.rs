//! Redoes WAL from a data directory on, as fast as it can: what Postgres does in crash recovery, to be measured beside
//! it.
//!
//! A window of slices is worked on at a time, in two steps. First the records of each slice are found, checked and
//! decoded, slices side by side ([`mod@slice`]); what they do is sorted into partitions by the page that it is done to
//! ([`batch`], [`partitioning`]). Then each partition's pages are redone, in the order of the WAL, partitions side by
//! side ([`partition`], [`page_table`]). A page belongs to one partition, so no page is ever shared between threads,
//! and the outcome is the same whatever their number.
//!
//! All that Postgres's recovery does to pages is done: blocks, images, visibility maps, free-space maps, transaction
//! status. Pages stay in memory, up to a limit; nothing is written.

mod batch;
mod page_table;
mod partition;
mod partitioning;
mod slice;
mod task;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use varve_postgres::wal::SegmentSize;
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, RelFork, page};
use varve_redo::verify::file_differences;

use crate::wal_directory::Segments;
use crate::{DataDirectory, VerifyError};
use batch::{Batch, Tasks, emptied};
use page_table::PageKey;
use partition::Partition;
use partitioning::Partitioning;
use slice::{SLICE_SIZE, Slice, Source};

/// Slices that are in memory at a time with several threads, and what is made of them: so much stays in a core's cache
/// until it is done.
const WINDOW_SLICES: usize = 4;
/// Records that a single thread decodes before it redoes them: enough to bring their pages to the processor together,
/// so few that all of it stays in a core's cache.
const PORTION_RECORDS: u64 = 1024;

/// What to redo, and how.
#[derive(Debug, Clone)]
pub struct RecoveryConfig {
    /// The data directory to begin with, which was shut down.
    pub base: PathBuf,
    /// The `pg_wal` folder (or data directory) with the WAL written since.
    pub wal: PathBuf,
    /// Threads.
    pub threads: usize,
    /// Most pages to hold.
    pub pages_max: usize,
}

/// Pages as they are at the end of WAL.
#[derive(Debug)]
pub struct Recovered {
    /// Where redo began.
    pub start: Lsn,
    /// End of the last record.
    pub end: Lsn,
    /// Records.
    pub records: u64,
    /// Changes of pages and images taken.
    pub changes: u64,
    /// Wall time.
    pub elapsed: Duration,
    partitions: Vec<Partition>,
    base: Arc<DataDirectory>,
}

/// Redoes all WAL behind the last checkpoint of the base.
///
/// # Errors
/// When files cannot be read, a record cannot be redone, or the pages are too many.
pub fn recover(config: &RecoveryConfig) -> Result<Recovered, VerifyError> {
    let base = Arc::new(DataDirectory::open(&config.base)?);
    let segments = Segments::list(&config.wal)?;
    let start = base.checkpoint();
    let alone = config.threads <= 1;
    let (partitioning, window_slices, portion) =
        if alone { (Partitioning::NONE, 1, PORTION_RECORDS) } else { (Partitioning::MANY, WINDOW_SLICES, u64::MAX) };
    let pages_max = config.pages_max.div_ceil(partitioning.count());
    let new_partition = |_| Mutex::new(Partition::new(partitioning, base.clone(), pages_max));
    let partitions: Vec<Mutex<Partition>> = (0..partitioning.count()).map(new_partition).collect();
    let source = Source { segments: &segments, control: base.control(), partitioning, portion };
    let began = Instant::now();
    let mut progress =
        Progress { wal: &config.wal, segments: segments.size(), end: start, records: 0, empty_to: Lsn::INVALID, ended: false };
    let mut window: Vec<Slice> = (0..window_slices).map(|_| Slice::new()).collect();
    let mut from = start;
    while !progress.ended {
        let start = |index: usize| from.max(Lsn((from.0 / SLICE_SIZE + index as u64) * SLICE_SIZE));
        let mut batches: Vec<Batch<'_>> = match &mut window[..] {
            [slice] => {
                let work = |batch: &Batch<'_>| {
                    if progress.accept(batch)? { partitions[0].lock().redo(std::slice::from_ref(batch), 0) } else { Ok(()) }
                };
                vec![slice.fill(&source, start(0), work)?]
            }
            slices => {
                let slices: Vec<Mutex<Option<&mut Slice>>> = slices.iter_mut().map(|slice| Mutex::new(Some(slice))).collect();
                let batches: Vec<Mutex<Option<Batch<'_>>>> = slices.iter().map(|_| Mutex::default()).collect();
                each(config.threads, slices.len(), |index| {
                    if let Some(slice) = slices[index].lock().take() {
                        *batches[index].lock() = Some(slice.fill(&source, start(index), |_| Ok(()))?);
                    }
                    Ok(())
                })?;
                batches.into_iter().filter_map(Mutex::into_inner).collect()
            }
        };
        let mut used = 0;
        while used < batches.len() && !progress.ended {
            if !progress.accept(&batches[used])? {
                batches[used].clear();
            }
            used += 1;
        }
        each(config.threads, partitions.len(), |index| partitions[index].lock().redo(&batches[..used], index))?;
        let empty_tasks: Vec<Tasks<'static>> = batches.into_iter().map(|batch| emptied(batch.tasks)).collect();
        for (slice, tasks) in window.iter_mut().zip(empty_tasks) {
            slice.empty_tasks = tasks;
        }
        from = Lsn((from.0 / SLICE_SIZE + window.len() as u64) * SLICE_SIZE);
    }
    each(config.threads, partitions.len(), |index| partitions[index].lock().settle())?;
    partition::record_free_space(partitioning, &partitions)?;
    let Progress { end, records, .. } = progress;
    let mut recovered = Recovered { start, end, records, changes: 0, elapsed: Duration::ZERO, partitions: Vec::new(), base };
    recovered.partitions = partitions.into_iter().map(Mutex::into_inner).collect();
    recovered.changes = recovered.partitions.iter().map(|partition| partition.changes).sum();
    recovered.elapsed = began.elapsed();
    Ok(recovered)
}

/// How far the WAL was read, in order.
struct Progress<'a> {
    wal: &'a Path,
    segments: SegmentSize,
    /// End of the last record.
    end: Lsn,
    records: u64,
    /// What lies before this is the empty rest of a segment.
    empty_to: Lsn,
    /// The WAL ends here: whatever lies behind was written earlier.
    ended: bool,
}

impl Progress<'_> {
    /// Goes on behind the records of `batch`, which come next; `false` if they are none, but lie in the empty rest of a
    /// segment.
    fn accept(&mut self, batch: &Batch<'_>) -> Result<bool, VerifyError> {
        if batch.from < self.empty_to {
            return Ok(false);
        }
        if batch.begins_behind(self.end) {
            return Err(VerifyError::not_usable(self.wal, format!("the record at {} does not follow the one before", self.end)));
        }
        self.end = self.end.max(batch.end);
        self.records += batch.records;
        if batch.switched {
            self.empty_to = self.segments.start(self.segments.number(batch.from) + 1);
            self.end = self.empty_to;
        }
        self.ended = batch.ended;
        Ok(true)
    }
}

/// Calls `work` for each number below `count`, on so many threads; gives the first error.
fn each(threads: usize, count: usize, work: impl Fn(usize) -> Result<(), VerifyError> + Sync) -> Result<(), VerifyError> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<VerifyError>> = Mutex::default();
    let worker = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count || failed.lock().is_some() {
                return;
            }
            if let Err(error) = work(index) {
                failed.lock().get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.clamp(1, count.max(1)) {
            scope.spawn(worker);
        }
        worker();
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// How many pages were compared with a recovered server's files, and which are not as they should be.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differ, and how.
    pub differences: Vec<(RelFork, BlockNumber, String)>,
}

impl Recovered {
    /// Pages in memory.
    pub fn pages(&self) -> usize {
        self.partitions.iter().map(Partition::len).sum()
    }

    /// Compares with the files of a server that did the same recovery and was shut down then, without doing anything
    /// else that matters.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn compare(&self, dir: &Path) -> Result<Comparison, VerifyError> {
        let theirs = DataDirectory::open(dir)?;
        let mut comparison = Comparison::default();
        let pages = self.partitions.iter().flat_map(Partition::pages);
        for (PageKey { rel, blkno }, ours, rmid) in pages {
            let mut file = [page::ZERO_PAGE];
            theirs.read(rel, blkno, &mut file)?;
            comparison.pages += 1;
            let what = match file_differences(self.base.major(), rmid, rel.fork, blkno, ours, &file[0]) {
                Ok(at) if at.is_empty() => continue,
                Ok(at) => format!("differs at {:?}", &at[..at.len().min(16)]),
                Err(what) => what,
            };
            comparison.differences.push((rel, blkno, what));
        }
        Ok(comparison)
    }

    /// Bytes of WAL that were redone.
    pub fn bytes(&self) -> u64 {
        self.end.distance_from(self.start)
    }

    /// Bytes of the pages in memory.
    pub fn page_bytes(&self) -> u64 {
        (self.pages() * BLCKSZ) as u64
    }
}
