//! The records that begin in one segment, and what they do, sorted by partition.

use varve_postgres::control::ControlFile;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_postgres::slru::CLOG_XACTS_PER_PAGE;
use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, Completion, XactRecord};
use varve_postgres::wal::{Framer, Record, WalError, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, RelFork, RelNode};
use varve_redo::change::Change;
use varve_redo::visibility_map::{HEAP_BLOCKS_PER_PAGE, visibility_map_clears};

use super::PARTITIONS;
use crate::VerifyError;
use crate::wal_directory::Segments;

/// Bytes of the next segment that are read at a time to complete a segment's last record.
const NEXT_READ_SIZE: usize = 64 * 1024;
/// What an error is about when a record is malformed although its CRC is right.
const DECODED: &str = "a record with the right CRC";
/// Status of a committed transaction.
const COMMITTED: u8 = 1;
/// Status of an aborted transaction.
const ABORTED: u8 = 2;
/// Under this name pages of `pg_xact` are kept: no relation has it.
pub(super) const TRANSACTION_STATUS: RelFork = RelFork { node: RelNode { spc: 0, db: 0, rel: 1 }, fork: Fork::Main };

/// Something to do to a page, or to a relation.
#[derive(Debug)]
pub(super) enum Task {
    /// A block of the record with this number: redo it or take its image.
    Block { record: u32, index: u8 },
    /// A change of a page that no record names.
    Change { lsn: Lsn, rel: RelFork, blkno: BlockNumber, change: Box<Change> },
    /// A fork is cut.
    Cut { rel: RelFork, blocks: BlockNumber },
    /// A relation is new, or gone.
    Reset { node: RelNode },
}

#[derive(Debug)]
pub(super) struct Batch {
    pub(super) major: Major,
    pub(super) records: Vec<Record>,
    pub(super) tasks: [Vec<Task>; PARTITIONS],
    start: Lsn,
    pub(super) end: Lsn,
    /// The WAL ends in this segment.
    pub(super) ended: bool,
}

/// The partition of a block.
pub(super) fn partition_of(rel: RelFork, blkno: BlockNumber) -> usize {
    // Neighbouring blocks stay together, for the sake of caches; heap and map pages of a relation are apart.
    let hash =
        (u64::from(rel.node.rel) << 32 | u64::from(blkno >> 3) << 2 | u64::from(rel.fork.number())).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 32) as usize % PARTITIONS
}

impl Batch {
    /// Reads the records that begin at or behind `from` in its segment; nothing if the segment is not there.
    pub(super) fn read(segments: &Segments, control: &ControlFile, from: Lsn) -> Result<Option<Batch>, VerifyError> {
        let number = from.segment_number();
        let Some(mut input) = segments.read(number, from.segment_offset(), WAL_SEGMENT_SIZE as usize)? else { return Ok(None) };
        let segment_end = Lsn((number + 1) * WAL_SEGMENT_SIZE);
        let mut framer = if from.segment_offset() == 0 {
            Framer::from_page(control.major, Some(control.system_identifier), from)
        } else {
            Framer::new(control.major, Some(control.system_identifier), from, None)
        };
        let mut batch =
            Batch { major: control.major, records: Vec::new(), tasks: Default::default(), start: from, end: from, ended: false };
        batch.records.reserve(input.len() / 128);
        let mut next_offset = 0;
        loop {
            match framer.next_record(&mut input) {
                Ok(Some(framed)) if framed.start >= segment_end => break,
                Ok(Some(framed)) => {
                    let record = Record::decode(&framed.bytes, framed.start, framed.end, control.major);
                    let record = record.map_err(|source| VerifyError::Wal { of: DECODED.to_owned(), source })?;
                    batch.add(record)?;
                }
                Ok(None) if framer.framed() >= segment_end => break,
                Ok(None) => {
                    // The segment's last record goes on in the next.
                    let offset = next_offset;
                    next_offset += NEXT_READ_SIZE as u64;
                    match segments.read(number + 1 + offset / WAL_SEGMENT_SIZE, offset % WAL_SEGMENT_SIZE, NEXT_READ_SIZE)? {
                        Some(bytes) => input = bytes,
                        None => {
                            batch.ended = true;
                            break;
                        }
                    }
                }
                Err(_) => {
                    batch.ended = true;
                    break;
                }
            }
        }
        Ok(Some(batch))
    }

    /// Whether WAL is missing between `end` and the first record.
    pub(super) fn begins_behind(&self, end: Lsn) -> bool {
        let first = self.records.first().map_or(self.start, |record| record.start);
        // A record begins right behind the one before, or behind the header of the page that follows it.
        first > end + 64
    }

    fn push(&mut self, rel: RelFork, blkno: BlockNumber, task: Task) {
        self.tasks[partition_of(rel, blkno)].push(task);
    }

    fn push_to_all(&mut self, task: impl Fn() -> Task) {
        self.tasks.iter_mut().for_each(|tasks| tasks.push(task()));
    }

    fn add(&mut self, record: Record) -> Result<(), VerifyError> {
        let number = self.records.len() as u32;
        for (rel, blkno, change) in visibility_map_clears(&record, self.major) {
            self.push(rel, blkno, Task::Change { lsn: record.end, rel, blkno, change: Box::new(change) });
        }
        for (index, block) in record.blocks.iter().enumerate() {
            self.push(block.rel, block.blkno, Task::Block { record: number, index: index as u8 });
        }
        let (lsn, kind) = (record.end, record.kind());
        let malformed = |error: RecordError| VerifyError::Wal {
            of: DECODED.to_owned(),
            source: WalError::Record { lsn: record.start, what: error.to_string() },
        };
        match record.header.rmid {
            rmgr::XACT => match xact::parse(kind, &record.main_data, self.major).map_err(malformed)? {
                XactRecord::Commit(done) | XactRecord::CommitPrepared(done) => self.completion(&record, done, COMMITTED),
                XactRecord::Abort(done) | XactRecord::AbortPrepared(done) => self.completion(&record, done, ABORTED),
                XactRecord::Prepare | XactRecord::Assignment { .. } | XactRecord::Invalidations => {}
            },
            rmgr::SMGR => match storage::parse(kind, &record.main_data, self.major).map_err(malformed)? {
                StorageRecord::Create { rel } => self.push_to_all(|| Task::Cut { rel, blocks: 0 }),
                StorageRecord::Truncate { node, blocks, visibility_map, .. } => {
                    self.push_to_all(|| Task::Cut { rel: node.fork(Fork::Main), blocks });
                    let (map, last) = (node.fork(Fork::VisibilityMap), blocks / HEAP_BLOCKS_PER_PAGE);
                    if visibility_map {
                        self.push_to_all(|| Task::Cut { rel: map, blocks: blocks.div_ceil(HEAP_BLOCKS_PER_PAGE) });
                    }
                    if visibility_map && !blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE) {
                        let change = Box::new(Change::TruncateVisibility { heap_blocks: blocks });
                        self.push(map, last, Task::Change { lsn, rel: map, blkno: last, change });
                    }
                }
            },
            _ => {}
        }
        self.end = lsn;
        self.records.push(record);
        Ok(())
    }

    fn completion(&mut self, record: &Record, done: Completion, status: u8) {
        let xid = done.two_phase_xid.unwrap_or(record.header.xid);
        self.transaction(record.end, xid, &done.subxids, status);
        done.dropped.into_iter().for_each(|node| self.push_to_all(|| Task::Reset { node }));
    }

    fn transaction(&mut self, lsn: Lsn, xid: u32, subxacts: &[u32], status: u8) {
        let mut xids: Vec<u32> = std::iter::once(xid).filter(|xid| *xid != 0).chain(subxacts.iter().copied()).collect();
        while let Some(page) = xids.first().map(|xid| xid / CLOG_XACTS_PER_PAGE) {
            let (here, rest) = xids.into_iter().partition(|xid| xid / CLOG_XACTS_PER_PAGE == page);
            xids = rest;
            let change = Box::new(Change::ClogStatus { status, xids: here });
            self.push(TRANSACTION_STATUS, page, Task::Change { lsn, rel: TRANSACTION_STATUS, blkno: page, change });
        }
    }
}
