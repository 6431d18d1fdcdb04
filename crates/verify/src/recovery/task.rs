//! What there is to do in a partition.

use prefetch_index::prefetch_index;
use varve_postgres::wal::{Block, PlainRecord, Record};
use varve_postgres::{BlockNumber, Lsn, Major, RelFork, RelNode};
use varve_redo::NamedTuples;
use varve_redo::change::{BlockRecord, Change, Others};

use super::page_table::PageKey;
use crate::VerifyError;

/// Something to do to a page, or to a relation. There is one for each record, so it is small, and there is nothing to
/// drop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task<'a> {
    /// A record changes a block.
    Block(BlockTask<'a>),
    /// Anything else: the number of a [`RareTask`] of the batch.
    Rare(u32),
}

/// What a record does to one of its blocks: the record's bytes, and what must be known before they are at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockTask<'a> {
    /// End of the record.
    pub(super) lsn: Lsn,
    pub(super) block: PageKey,
    record: &'a [u8],
    block_id: u8,
    pub(super) will_init: bool,
    /// To be brought to the processor ahead.
    pub(super) tuples: NamedTuples,
}

#[cold]
fn not_as_before() -> VerifyError {
    VerifyError::Internal("a record is decoded a second time as it was the first time")
}

impl<'a> BlockTask<'a> {
    /// What `record`, which is `bytes`, does to its block `block`.
    pub(super) fn new(bytes: &'a [u8], record: &Record<'a>, block: &Block<'a>) -> BlockTask<'a> {
        BlockTask {
            lsn: record.end,
            block: PageKey { rel: block.rel, blkno: block.blkno },
            record: bytes,
            block_id: block.id,
            will_init: block.will_init,
            tuples: NamedTuples::of(record.header.rmid, record.kind(), record.main_data),
        }
    }

    /// What `record`, which is `bytes` and ends at `lsn`, does to its block.
    #[inline(always)]
    pub(super) fn plain(bytes: &'a [u8], lsn: Lsn, record: &PlainRecord<'a>) -> BlockTask<'a> {
        let PlainRecord { header, block_id, rel, blkno, will_init, main_data, .. } = *record;
        let tuples = NamedTuples::of(header.rmid, header.kind(), main_data);
        BlockTask { lsn, block: PageKey { rel, blkno }, record: bytes, block_id, will_init, tuples }
    }

    /// Has the record, both ends of it, brought to the processor, without waiting for it.
    #[inline(always)]
    pub(super) fn prefetch(&self) {
        prefetch_index(self.record, 0);
        prefetch_index(self.record, self.record.len().saturating_sub(1));
    }

    /// Calls `work` with what page functions are given of the record. It is made where it is used: to move what was
    /// just written makes a processor wait.
    #[inline(always)]
    pub(super) fn with_record(
        &self,
        major: Major,
        work: impl FnOnce(&BlockRecord<'a>) -> Result<(), VerifyError>,
    ) -> Result<(), VerifyError> {
        let Some(PlainRecord { header, block_id, rel, blkno, will_init, data, main_data }) = PlainRecord::decode(self.record) else {
            return work(&self.block_record_of_any(major)?);
        };
        work(&BlockRecord {
            rmid: header.rmid,
            info: header.kind(),
            xid: header.xid,
            main_data,
            block_id,
            fork: rel.fork,
            blkno,
            will_init,
            has_data: !data.is_empty(),
            data,
            others: Others::new(),
        })
    }

    #[inline(never)]
    fn block_record_of_any(&self, major: Major) -> Result<BlockRecord<'a>, VerifyError> {
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
