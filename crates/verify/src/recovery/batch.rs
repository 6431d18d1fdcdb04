//! What records of one slice of WAL do, sorted by partition.

use varve_postgres::slru::CLOG_XACTS_PER_PAGE;
use varve_postgres::wal::records::RecordError;
use varve_postgres::wal::records::storage::{self, StorageRecord};
use varve_postgres::wal::records::xact::{self, Completion, XactRecord};
use varve_postgres::wal::{PlainRecord, Record, WalError, rmgr};
use varve_postgres::{Fork, Lsn, Major, RelFork, RelNode};
use varve_redo::change::{Change, Xids};
use varve_redo::visibility_map::{HEAP_BLOCKS_PER_PAGE, clears_visibility, visibility_map_clears};

use super::page_table::PageKey;
use super::partitioning::Partitioning;
use super::task::{BlockTask, RareTask, Task};
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

/// What is to be done in each partition, in the order of the WAL.
pub(super) type Tasks<'a> = Vec<Vec<Task<'a>>>;

/// What a slice's records do, or the latest of them, by partition.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    pub(super) major: Major,
    partitioning: Partitioning,
    /// Where the slice's records begin.
    pub(super) from: Lsn,
    pub(super) tasks: Tasks<'a>,
    pub(super) rare: Vec<RareTask<'a>>,
    /// Transactions that ended, and how, for [`Batch::put_down_transactions`].
    transactions: Vec<(u32, u8)>,
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

/// Whether nothing but redo of its block has to do with a record.
#[inline(always)]
fn changes_only_its_block(record: &PlainRecord<'_>) -> bool {
    !matches!(record.header.rmid, rmgr::XLOG | rmgr::XACT | rmgr::SMGR) && !clears_visibility(record)
}

/// No tasks, in the memory of these.
pub(super) fn emptied<'b>(tasks: Tasks<'_>) -> Tasks<'b> {
    // Collecting keeps the memory of what it takes from.
    tasks.into_iter().map(|tasks| tasks.into_iter().map_while(|_| None).collect()).collect()
}

impl<'a> Batch<'a> {
    /// Nothing yet, of the slice at `from`, in the memory of `tasks`.
    pub(super) fn new(major: Major, partitioning: Partitioning, from: Lsn, tasks: Tasks<'_>) -> Batch<'a> {
        let mut tasks = emptied(tasks);
        tasks.resize_with(partitioning.count(), Vec::new);
        let (rare, transactions) = (Vec::new(), Vec::new());
        Batch { major, partitioning, from, tasks, rare, transactions, records: 0, first: from, end: from, ended: false, switched: false }
    }

    /// Forgets all records, as if none had been there.
    pub(super) fn clear(&mut self) {
        self.tasks.iter_mut().for_each(Vec::clear);
        self.rare.clear();
        self.transactions.clear();
        (self.records, self.ended, self.switched) = (0, false, false);
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

    /// Adds what the record with these bytes does, which is decoded in `place`.
    pub(super) fn add(&mut self, bytes: &'a [u8], start: Lsn, end: Lsn, place: &mut Record<'a>) -> Result<(), VerifyError> {
        match PlainRecord::decode(bytes) {
            Some(record) if changes_only_its_block(&record) => {
                let block = PageKey { rel: record.rel, blkno: record.blkno };
                self.tasks[self.partitioning.partition_of(block)].push(Task::Block(BlockTask::plain(bytes, end, &record)));
            }
            _ => self.add_record(bytes, start, end, place)?,
        }
        if self.records == 0 {
            self.first = start;
        }
        self.end = end;
        self.records += 1;
        Ok(())
    }

    #[cold]
    fn push_rare(&mut self, block: PageKey, task: RareTask<'a>) {
        self.tasks[self.partitioning.partition_of(block)].push(Task::Rare(self.rare.len() as u32));
        self.rare.push(task);
    }

    #[cold]
    fn push_unnamed(&mut self, lsn: Lsn, block: PageKey, change: Change<'static>) {
        self.push_rare(block, RareTask::Unnamed { lsn, block, change });
    }

    #[cold]
    fn push_to_all(&mut self, task: RareTask<'a>) {
        let number = self.rare.len() as u32;
        self.tasks.iter_mut().for_each(|tasks| tasks.push(Task::Rare(number)));
        self.rare.push(task);
    }

    #[inline(never)]
    fn add_record(&mut self, bytes: &'a [u8], start: Lsn, end: Lsn, record: &mut Record<'a>) -> Result<(), VerifyError> {
        record.decode_here(bytes, start, end, self.major).map_err(|source| VerifyError::Wal { of: DECODED.to_owned(), source })?;
        for (rel, blkno, change) in visibility_map_clears(record) {
            self.push_unnamed(record.end, PageKey { rel, blkno }, change);
        }
        let (lsn, kind) = (record.end, record.kind());
        let malformed = |error: RecordError| VerifyError::Wal {
            of: DECODED.to_owned(),
            source: WalError::Record { lsn: record.start, what: error.to_string() },
        };
        match record.header.rmid {
            rmgr::XLOG => self.switched = kind == SWITCH,
            rmgr::XACT if xact::is_plain_commit(kind) && record.header.xid != 0 => self.transactions.push((record.header.xid, COMMITTED)),
            rmgr::XACT => match xact::parse(kind, record.main_data, self.major).map_err(malformed)? {
                XactRecord::Commit(done) | XactRecord::CommitPrepared(done) => self.completion(record, done, COMMITTED),
                XactRecord::Abort(done) | XactRecord::AbortPrepared(done) => self.completion(record, done, ABORTED),
                XactRecord::Prepare | XactRecord::Assignment { .. } | XactRecord::Invalidations => {}
            },
            rmgr::SMGR => match storage::parse(kind, record.main_data, self.major).map_err(malformed)? {
                StorageRecord::Create { rel } => self.push_to_all(RareTask::Cut { rel, blocks: 0 }),
                StorageRecord::Truncate { node, blocks, visibility_map, .. } => {
                    self.push_to_all(RareTask::Cut { rel: node.fork(Fork::Main), blocks });
                    let (map, last) = (node.fork(Fork::VisibilityMap), blocks / HEAP_BLOCKS_PER_PAGE);
                    if visibility_map {
                        self.push_to_all(RareTask::Cut { rel: map, blocks: blocks.div_ceil(HEAP_BLOCKS_PER_PAGE) });
                    }
                    if visibility_map && !blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE) {
                        let change = Change::TruncateVisibility { heap_blocks: blocks };
                        self.push_unnamed(lsn, PageKey { rel: map, blkno: last }, change);
                    }
                }
            },
            _ => {}
        }
        for (index, block) in record.blocks.iter().enumerate() {
            let key = PageKey { rel: block.rel, blkno: block.blkno };
            if block.image.as_ref().is_some_and(|image| image.apply) {
                self.push_rare(key, RareTask::Image { block: key, record: Box::new(record.clone()), index });
            } else {
                let tasks = &mut self.tasks[self.partitioning.partition_of(key)];
                tasks.push(Task::Block(BlockTask::new(bytes, record, block)));
            }
        }
        Ok(())
    }

    fn completion(&mut self, record: &Record<'a>, done: Completion, status: u8) {
        let xid = done.two_phase_xid.unwrap_or(record.header.xid);
        self.transactions.extend(std::iter::once(xid).filter(|xid| *xid != 0).chain(done.subxids).map(|xid| (xid, status)));
        done.dropped.into_iter().for_each(|node| self.push_to_all(RareTask::Reset { node }));
    }

    /// When all records are added: makes tasks of the transactions that ended, one for each page of `pg_xact` and
    /// status. No transaction ends twice, so their order does not matter.
    pub(super) fn put_down_transactions(&mut self) {
        let mut transactions = std::mem::take(&mut self.transactions);
        transactions.sort_unstable_by_key(|(xid, status)| (xid / CLOG_XACTS_PER_PAGE, *status));
        for here in
            transactions.chunk_by(|(a, status_a), (b, status_b)| (a / CLOG_XACTS_PER_PAGE, status_a) == (b / CLOG_XACTS_PER_PAGE, status_b))
        {
            let Some((first, status)) = here.first() else { continue };
            let xids: Xids = here.iter().map(|(xid, _)| *xid).collect();
            let block = PageKey { rel: TRANSACTION_STATUS, blkno: first / CLOG_XACTS_PER_PAGE };
            self.push_unnamed(self.end, block, Change::ClogStatus { status: *status, xids });
        }
        transactions.clear();
        self.transactions = transactions; // its memory serves the next portion
    }
}
