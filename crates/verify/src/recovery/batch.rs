//! What the records do that begin in one slice of WAL, sorted by partition.

use varve_postgres::control::ControlFile;
use varve_postgres::slru::CLOG_XACTS_PER_PAGE;
use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, Completion, XactRecord};
use varve_postgres::wal::{Framer, Record, WalError, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, RelFork, RelNode};
use varve_redo::change::{BlockRecord, Change};
use varve_redo::visibility_map::{HEAP_BLOCKS_PER_PAGE, visibility_map_clears};

use super::PARTITIONS;
use crate::VerifyError;
use crate::wal_directory::Segments;

/// Bytes of WAL in a slice: what is made of them stays in a core's cache until it is done. A segment is whole slices.
pub(super) const SLICE_SIZE: u64 = 512 * 1024;
/// Bytes of the next slice that are read at a time to complete a slice's last record.
const NEXT_READ_SIZE: usize = 16 * 1024;
/// What an error is about when a record is malformed although its CRC is right.
const DECODED: &str = "a record with the right CRC";
/// `XLOG_SWITCH`.
const SWITCH: u8 = 0x40;
/// Status of a committed transaction.
const COMMITTED: u8 = 1;
/// Status of an aborted transaction.
const ABORTED: u8 = 2;
/// Under this name pages of `pg_xact` are kept: no relation has it.
pub(super) const TRANSACTION_STATUS: RelFork = RelFork { node: RelNode { spc: 0, db: 0, rel: 1 }, fork: Fork::Main };

/// Something to do to a page, or to a relation.
#[derive(Debug)]
pub(super) enum Task {
    /// A change of a page.
    Change { lsn: Lsn, rel: RelFork, blkno: BlockNumber, change: Change },
    /// The block with this index comes with an image, which the page becomes.
    Image { record: Box<Record>, index: usize },
    /// A fork is cut.
    Cut { rel: RelFork, blocks: BlockNumber },
    /// A relation is new, or gone.
    Reset { node: RelNode },
}

/// One slice's records. It is filled again and again, so that its memory stays.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) major: Major,
    pub(super) tasks: [Vec<Task>; PARTITIONS],
    pub(super) records: u64,
    /// Where the first record begins.
    first: Lsn,
    pub(super) end: Lsn,
    /// The WAL ends in this slice.
    pub(super) ended: bool,
    /// The last record is a switch: the rest of the segment is empty.
    pub(super) switched: bool,
}

/// The partition of a block.
pub(super) fn partition_of(rel: RelFork, blkno: BlockNumber) -> usize {
    // Neighbouring blocks stay together, for the sake of caches; heap and map pages of a relation are apart.
    let hash =
        (u64::from(rel.node.rel) << 32 | u64::from(blkno >> 3) << 2 | u64::from(rel.fork.number())).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 32) as usize % PARTITIONS
}

impl Batch {
    pub(super) fn new(major: Major) -> Batch {
        Batch { major, tasks: Default::default(), records: 0, first: Lsn::INVALID, end: Lsn::INVALID, ended: false, switched: false }
    }

    /// Forgets what was there, as if there were no records from `from` on.
    pub(super) fn clear(&mut self, from: Lsn) {
        self.tasks.iter_mut().for_each(Vec::clear);
        (self.records, self.first, self.end, self.ended, self.switched) = (0, from, from, false, false);
    }

    /// Forgets what was there and reads the records that begin at or behind `from` in its slice.
    pub(super) fn fill(&mut self, segments: &Segments, control: &ControlFile, from: Lsn) -> Result<(), VerifyError> {
        self.clear(from);
        let slice_end = Lsn((from.0 / SLICE_SIZE + 1) * SLICE_SIZE);
        let mut framer = if from.page_offset() == 0 {
            Framer::from_page(control.major, Some(control.system_identifier), from)
        } else {
            Framer::new(control.major, Some(control.system_identifier), from, None)
        };
        let mut read_to = from;
        loop {
            // The slice's last record may go on in the next.
            let max = if read_to < slice_end { slice_end.distance_from(read_to) as usize } else { NEXT_READ_SIZE };
            let Some(mut input) = segments.read(read_to.segment_number(), read_to.segment_offset(), max)? else {
                self.ended = true;
                return Ok(());
            };
            read_to += input.len() as u64;
            loop {
                match framer.next_record(&mut input) {
                    Ok(Some(framed)) if framed.start >= slice_end => return Ok(()),
                    Ok(Some(framed)) => {
                        let record = Record::decode(&framed.bytes, framed.start, framed.end, control.major);
                        self.add(&record.map_err(|source| VerifyError::Wal { of: DECODED.to_owned(), source })?)?;
                        if self.switched {
                            return Ok(());
                        }
                    }
                    Ok(None) if framer.framed() >= slice_end => return Ok(()),
                    Ok(None) => break,
                    Err(_) => {
                        self.ended = true;
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Whether WAL is missing between `end` and the first record.
    pub(super) fn begins_behind(&self, end: Lsn) -> bool {
        // A record begins right behind the one before, or behind the header of the page that follows it.
        self.records > 0 && self.first > end + 64
    }

    fn push(&mut self, rel: RelFork, blkno: BlockNumber, task: Task) {
        self.tasks[partition_of(rel, blkno)].push(task);
    }

    fn push_to_all(&mut self, task: impl Fn() -> Task) {
        self.tasks.iter_mut().for_each(|tasks| tasks.push(task()));
    }

    fn add(&mut self, record: &Record) -> Result<(), VerifyError> {
        if self.records == 0 {
            self.first = record.start;
        }
        for (rel, blkno, change) in visibility_map_clears(record, self.major) {
            self.push(rel, blkno, Task::Change { lsn: record.end, rel, blkno, change });
        }
        let (lsn, kind) = (record.end, record.kind());
        let malformed = |error: RecordError| VerifyError::Wal {
            of: DECODED.to_owned(),
            source: WalError::Record { lsn: record.start, what: error.to_string() },
        };
        match record.header.rmid {
            rmgr::XLOG => self.switched = kind == SWITCH,
            rmgr::XACT => match xact::parse(kind, &record.main_data, self.major).map_err(malformed)? {
                XactRecord::Commit(done) | XactRecord::CommitPrepared(done) => self.completion(record, done, COMMITTED),
                XactRecord::Abort(done) | XactRecord::AbortPrepared(done) => self.completion(record, done, ABORTED),
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
                        let change = Change::TruncateVisibility { heap_blocks: blocks };
                        self.push(map, last, Task::Change { lsn, rel: map, blkno: last, change });
                    }
                }
            },
            _ => {}
        }
        self.end = lsn;
        self.records += 1;
        self.blocks(record);
        Ok(())
    }

    fn blocks(&mut self, record: &Record) {
        for (index, block) in record.blocks.iter().enumerate() {
            let (rel, blkno) = (block.rel, block.blkno);
            let task = if block.image.as_ref().is_some_and(|image| image.apply) {
                Task::Image { record: Box::new(record.clone()), index }
            } else {
                Task::Change { lsn: record.end, rel, blkno, change: Change::Record(BlockRecord::trim(record, block)) }
            };
            self.push(rel, blkno, task);
        }
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
            let change = Change::ClogStatus { status, xids: here };
            self.push(TRANSACTION_STATUS, page, Task::Change { lsn, rel: TRANSACTION_STATUS, blkno: page, change });
        }
    }
}
