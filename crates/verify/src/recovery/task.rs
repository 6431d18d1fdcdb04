//! What there is to do in a partition.

use prefetch_index::prefetch_index;
use varve_postgres::wal::{Block, Record, RecordHeader};
use varve_postgres::{BlockNumber, Lsn, Major, RelFork, RelNode};
use varve_redo::change::{BlockRecord, Change, Others};

use super::page_table::PageKey;
use crate::VerifyError;

/// Something to do to a page, or to a relation. There is one for each record, so it is small, and there is nothing to drop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task<'a> {
    /// A record changes a block.
    Block(BlockTask<'a>),
    /// Anything else: the number of a [`RareTask`] of the batch.
    Rare(u32),
}

/// What a record does to one of its blocks: the record's bytes, and what is known of where in them that stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockTask<'a> {
    /// End of the record.
    pub(super) lsn: Lsn,
    pub(super) block: PageKey,
    record: &'a [u8],
    main_len: u32,
    data_len: u16,
    block_id: u8,
    pub(super) will_init: bool,
    /// It is the record's only block, and has no image: its data and the record's are all that follows the headers.
    is_alone: bool,
}

#[cold]
fn not_as_before() -> VerifyError {
    VerifyError::Internal("a record is decoded a second time as it was the first time")
}

impl<'a> BlockTask<'a> {
    /// What `record`, which is `bytes`, does to its block `block`.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], record: &Record<'a>, block: &Block<'a>) -> BlockTask<'a> {
        BlockTask {
            lsn: record.end,
            block: PageKey { rel: block.rel, blkno: block.blkno },
            record: bytes,
            main_len: record.main_data.len() as u32,
            data_len: block.data.len() as u16,
            block_id: block.id,
            will_init: block.will_init,
            is_alone: record.blocks.len() == 1 && block.image.is_none(),
        }
    }

    /// The record's own data.
    #[inline(always)]
    pub(super) fn main_data(&self) -> &'a [u8] {
        self.record.get(self.record.len().saturating_sub(self.main_len as usize)..).unwrap_or_default()
    }

    /// Has the record brought to the processor, without waiting for it.
    #[inline(always)]
    pub(super) fn prefetch(&self) {
        prefetch_index(self.record, 0);
        prefetch_index(self.main_data(), 0);
    }

    /// Resource manager and type.
    #[inline(always)]
    pub(super) fn record_type(&self) -> (u8, u8) {
        RecordHeader::decode(self.record).map_or((0, 0), |header| (header.rmid, header.kind()))
    }

    /// Calls `work` with the change that page functions are given. It is made where it is used: to move what was just
    /// written makes a processor wait.
    #[inline(always)]
    pub(super) fn with_change(&self, major: Major, work: impl FnOnce(&Change<'a>) -> Result<(), VerifyError>) -> Result<(), VerifyError> {
        if !self.is_alone {
            return work(&Change::Record(self.block_record_of_many(major)?));
        }
        let header = RecordHeader::decode(self.record).ok_or_else(not_as_before)?;
        let main_at = self.record.len().checked_sub(self.main_len as usize).ok_or_else(not_as_before)?;
        let (before, main_data) = self.record.split_at(main_at);
        let data_at = main_at.checked_sub(usize::from(self.data_len)).ok_or_else(not_as_before)?;
        work(&Change::Record(BlockRecord {
            rmid: header.rmid,
            info: header.kind(),
            xid: header.xid,
            main_data,
            block_id: self.block_id,
            fork: self.block.rel.fork,
            blkno: self.block.blkno,
            will_init: self.will_init,
            has_data: self.data_len > 0,
            data: &before[data_at..],
            others: Others::new(),
        }))
    }

    #[inline(never)]
    fn block_record_of_many(&self, major: Major) -> Result<BlockRecord<'a>, VerifyError> {
        let record = Record::decode(self.record, self.lsn, self.lsn, major).map_err(|_| not_as_before())?;
        Ok(BlockRecord::trim(&record, record.block(self.block_id).ok_or_else(not_as_before)?))
    }
}

/// What is rarely to be done.
#[derive(Debug)]
pub(super) enum RareTask<'a> {
    /// A change of a page that records do not name.
    Unnamed { lsn: Lsn, block: PageKey, change: Change<'static> },
    /// The block with this index comes with an image, which the page becomes.
    Image { block: PageKey, record: Box<Record<'a>>, index: usize },
    /// A fork is cut.
    Cut { rel: RelFork, blocks: BlockNumber },
    /// A relation is new, or gone.
    Reset { node: RelNode },
}
