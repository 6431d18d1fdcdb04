//! What the records of one slice of WAL do, sorted by partition.

use varve_postgres::slru::CLOG_XACTS_PER_PAGE;
use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, Completion, XactRecord};
use varve_postgres::wal::{Record, WalError, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, RelFork, RelNode};
use varve_redo::change::{BlockRecord, Change, Xids};
use varve_redo::visibility_map::{HEAP_BLOCKS_PER_PAGE, visibility_map_clears};

use super::PARTITIONS;
use super::page_table::PageKey;
use crate::VerifyError;

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
pub(super) enum Task<'a> {
    /// A change of a page.
    Change { lsn: Lsn, block: PageKey, change: Change<'a> },
    /// The block with this index comes with an image, which the page becomes.
    Image { block: PageKey, record: Box<Record<'a>>, index: usize },
    /// A fork is cut.
    Cut { rel: RelFork, blocks: BlockNumber },
    /// A relation is new, or gone.
    Reset { node: RelNode },
}

/// What is to be done in each partition, in the order of the WAL.
pub(super) type Tasks<'a> = [Vec<Task<'a>>; PARTITIONS];

/// What one slice's records do, by partition.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    pub(super) major: Major,
    pub(super) tasks: Tasks<'a>,
    pub(super) records: u64,
    /// Where the first record begins.
    first: Lsn,
    /// End of the last record.
    pub(super) end: Lsn,
    /// The WAL ends in this slice.
    pub(super) ended: bool,
    /// The last record is a switch: the rest of the segment is empty.
    pub(super) switched: bool,
}

/// No tasks, in the memory of these.
pub(super) fn emptied<'b>(tasks: Tasks<'_>) -> Tasks<'b> {
    tasks.map(|mut tasks| {
        tasks.clear();
        tasks.into_iter().map_while(|_| None).collect() // collecting keeps the memory of what it takes from
    })
}

/// Blocks that follow each other and are in one partition, for the sake of caches.
const NEIGHBOURS: u32 = 8;

/// The partition of a block: neighbours are dealt out in turn, beginning with another partition for each fork.
pub(super) fn partition_of(PageKey { rel, blkno }: PageKey) -> usize {
    (blkno / NEIGHBOURS).wrapping_add(rel.node.rel.wrapping_mul(7)).wrapping_add(u32::from(rel.fork.number()) * 5) as usize % PARTITIONS
}

/// The number of a block among those of its fork that are in the same partition.
pub(super) fn slot_of(blkno: BlockNumber) -> usize {
    (blkno / NEIGHBOURS) as usize / PARTITIONS * NEIGHBOURS as usize + (blkno % NEIGHBOURS) as usize
}

impl<'a> Batch<'a> {
    /// Nothing yet, of the slice at `from`, in the memory of `tasks`.
    pub(super) fn new(major: Major, from: Lsn, tasks: Tasks<'_>) -> Batch<'a> {
        Batch { major, tasks: emptied(tasks), records: 0, first: from, end: from, ended: false, switched: false }
    }

    /// Forgets all records, as if there were none from `from` on.
    pub(super) fn clear(&mut self, from: Lsn) {
        self.tasks.iter_mut().for_each(Vec::clear);
        (self.records, self.first, self.end, self.ended, self.switched) = (0, from, from, false, false);
    }

    /// Whether no more records belong to it.
    pub(super) fn is_complete(&self) -> bool {
        self.ended || self.switched
    }

    /// Whether WAL is missing between `end` and the first record.
    pub(super) fn begins_behind(&self, end: Lsn) -> bool {
        // A record begins right behind the one before, or behind the header of the page that follows it.
        self.records > 0 && self.first > end + 64
    }

    /// Adds what the record with these bytes does.
    pub(super) fn add(&mut self, bytes: &'a [u8], start: Lsn, end: Lsn) -> Result<(), VerifyError> {
        match Record::decode(bytes, start, end, self.major) {
            Ok(ref record) => self.add_record(record)?,
            Err(source) => return Err(VerifyError::Wal { of: DECODED.to_owned(), source }),
        }
        if self.records == 0 {
            self.first = start;
        }
        self.end = end;
        self.records += 1;
        Ok(())
    }

    #[inline(always)]
    fn push(&mut self, lsn: Lsn, block: PageKey, change: Change<'a>) {
        self.tasks[partition_of(block)].push(Task::Change { lsn, block, change });
    }

    fn push_to_all(&mut self, task: impl Fn() -> Task<'a>) {
        self.tasks.iter_mut().for_each(|tasks| tasks.push(task()));
    }

    fn add_record(&mut self, record: &Record<'a>) -> Result<(), VerifyError> {
        for (rel, blkno, change) in visibility_map_clears(record) {
            self.push(record.end, PageKey { rel, blkno }, change);
        }
        let (lsn, kind) = (record.end, record.kind());
        let malformed = |error: RecordError| VerifyError::Wal {
            of: DECODED.to_owned(),
            source: WalError::Record { lsn: record.start, what: error.to_string() },
        };
        match record.header.rmid {
            rmgr::XLOG => self.switched = kind == SWITCH,
            rmgr::XACT => match xact::parse(kind, record.main_data, self.major).map_err(malformed)? {
                XactRecord::Commit(done) | XactRecord::CommitPrepared(done) => self.completion(record, done, COMMITTED),
                XactRecord::Abort(done) | XactRecord::AbortPrepared(done) => self.completion(record, done, ABORTED),
                XactRecord::Prepare | XactRecord::Assignment { .. } | XactRecord::Invalidations => {}
            },
            rmgr::SMGR => match storage::parse(kind, record.main_data, self.major).map_err(malformed)? {
                StorageRecord::Create { rel } => self.push_to_all(|| Task::Cut { rel, blocks: 0 }),
                StorageRecord::Truncate { node, blocks, visibility_map, .. } => {
                    self.push_to_all(|| Task::Cut { rel: node.fork(Fork::Main), blocks });
                    let (map, last) = (node.fork(Fork::VisibilityMap), blocks / HEAP_BLOCKS_PER_PAGE);
                    if visibility_map {
                        self.push_to_all(|| Task::Cut { rel: map, blocks: blocks.div_ceil(HEAP_BLOCKS_PER_PAGE) });
                    }
                    if visibility_map && !blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE) {
                        let change = Change::TruncateVisibility { heap_blocks: blocks };
                        self.push(lsn, PageKey { rel: map, blkno: last }, change);
                    }
                }
            },
            _ => {}
        }
        for (index, block) in record.blocks.iter().enumerate() {
            let key = PageKey { rel: block.rel, blkno: block.blkno };
            if block.image.as_ref().is_some_and(|image| image.apply) {
                self.tasks[partition_of(key)].push(Task::Image { block: key, record: Box::new(record.clone()), index });
            } else {
                self.push(lsn, key, Change::Record(BlockRecord::trim(record, block)));
            }
        }
        Ok(())
    }

    fn completion(&mut self, record: &Record<'a>, done: Completion, status: u8) {
        let xid = done.two_phase_xid.unwrap_or(record.header.xid);
        self.transaction(record.end, xid, &done.subxids, status);
        done.dropped.into_iter().for_each(|node| self.push_to_all(|| Task::Reset { node }));
    }

    fn transaction(&mut self, lsn: Lsn, xid: u32, subxacts: &[u32], status: u8) {
        let mut xids: Xids = std::iter::once(xid).filter(|xid| *xid != 0).chain(subxacts.iter().copied()).collect();
        while let Some(page) = xids.first().map(|xid| xid / CLOG_XACTS_PER_PAGE) {
            let (here, rest) = xids.into_iter().partition(|xid| xid / CLOG_XACTS_PER_PAGE == page);
            xids = rest;
            self.push(lsn, PageKey { rel: TRANSACTION_STATUS, blkno: page }, Change::ClogStatus { status, xids: here });
        }
    }
}
