//! What the page service serves from.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use futures::future::BoxFuture;
pub use varve_engine::backup::BackupOptions;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, Oid, Page, RelFork};
use varve_protocol::wire::backend::sqlstate;
use varve_protocol::{ReadLsn, RelationSize, SlruSegmentSize};
use varve_storage::ids::TenantId;

/// Why something cannot be served.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// There is no such tenant, timeline, relation, block or moment. The message says which, and what there is.
    #[error("{0}")]
    NotFound(String),
    /// Not now, but perhaps later or elsewhere: the timeline is being attached, is stopping, or has gone to another
    /// pageserver. Ends the connection, so that clients look for it again.
    #[error("{0}")]
    NotReady(String),
    /// It should be there and could not be had: a corrupt layer, an unreachable store, a record that could not be
    /// redone.
    #[error("{0}")]
    Failed(String),
}

impl SourceError {
    pub(super) fn sqlstate(&self) -> &'static str {
        match self {
            SourceError::NotFound(_) => sqlstate::UNDEFINED_OBJECT,
            SourceError::NotReady(_) => sqlstate::CANNOT_CONNECT_NOW,
            SourceError::Failed(_) => sqlstate::INTERNAL_ERROR,
        }
    }
}

/// The wait for a moment.
pub type Arrival = BoxFuture<'static, Result<(), SourceError>>;

/// Finds timelines.
pub trait PageSource: Send + Sync + 'static {
    /// The timeline that two words of a command name: ids of 32 hexadecimal digits, or a tenant's and a branch's name.
    ///
    /// The future runs on the connection's task, with no place in any pool: it must not block. It is dropped with its
    /// client.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when there is none, [`SourceError::NotReady`] when it may be there later.
    fn resolve(&self, tenant: &str, timeline: &str) -> BoxFuture<'_, Result<Arc<dyn TimelinePages>, SourceError>>;
}

/// Reads a timeline.
///
/// [`TimelinePages::tenant`], [`TimelinePages::arrival`] and [`TimelinePages::try_get_page_cached`] are called on a
/// runtime's worker and never block. All other methods may wait for disk and store, and are called on threads that may.
/// They **never wait for WAL**: the service calls them when the arrival of their moment is over. If it is not there
/// then, they answer at once with the error that fits.
///
/// Where a [`ReadLsn`] is [`Lsn::MAX`], the newest is meant, and at least what `not_modified_since` says. What the
/// newest is at least, the arrival fixes: reads after it answer from whatever is applied by then, also when WAL that
/// came meanwhile is not applied yet.
pub trait TimelinePages: Send + Sync + 'static {
    /// Whose it is: tenants take turns.
    fn tenant(&self) -> TenantId;

    /// `None` if everything that `at` asks for is applied; told from a few atomics, in much less than a microsecond.
    ///
    /// Else a future that ends when it has arrived, or with an error when it is clear that it never will, or a deadline
    /// of the source is over: then nothing is read, not even what is older. It holds no thread, and is dropped with its
    /// client.
    fn arrival(&self, at: ReadLsn) -> Option<Arrival>;

    /// Hands the page to `take` if it is at hand, and says whether it was. Takes a microsecond. A page that has not
    /// arrived is not at hand.
    fn try_get_page_cached(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool;

    /// One page.
    ///
    /// # Errors
    /// [`SourceError`] says why not.
    fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn) -> Result<Box<Page>, SourceError>;

    /// Many pages in one walk: for each, in order, its index in `blocks` and the page go to `each`.
    fn get_pages(&self, blocks: &[(RelFork, BlockNumber)], at: ReadLsn, each: &mut dyn FnMut(usize, Result<&Page, SourceError>)) {
        for (index, &(rel, blkno)) in blocks.iter().enumerate() {
            match self.get_page(rel, blkno, at) {
                Ok(page) => each(index, Ok(&page)),
                Err(error) => each(index, Err(error)),
            }
        }
    }

    /// The pages of `count` blocks from `first` on, appended to `out`; fewer where the fork ends.
    ///
    /// # Errors
    /// [`SourceError`] says why not.
    fn page_range(&self, rel: RelFork, first: BlockNumber, count: u32, at: ReadLsn, out: &mut Vec<u8>) -> Result<(), SourceError> {
        let blocks: Vec<_> = self.range(rel, first, count, at)?.map(|blkno| (rel, blkno)).collect();
        out.reserve(blocks.len() * BLCKSZ);
        let mut result = Ok(());
        self.get_pages(&blocks, at, &mut |_, page| match page {
            Ok(page) => out.extend_from_slice(page),
            Err(error) => result = Err(error),
        });
        result
    }

    /// Those of the `count` blocks from `first` on that can be read.
    ///
    /// # Errors
    /// As [`TimelinePages::nblocks`].
    fn range(&self, rel: RelFork, first: BlockNumber, count: u32, at: ReadLsn) -> Result<Range<BlockNumber>, SourceError> {
        Ok(first..self.nblocks(rel, at)?.min(first.saturating_add(count)))
    }

    /// Whether the fork exists.
    ///
    /// # Errors
    /// [`SourceError`] when that cannot be told.
    fn exists(&self, rel: RelFork, at: ReadLsn) -> Result<bool, SourceError>;

    /// Blocks in the fork.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when there is no such fork.
    fn nblocks(&self, rel: RelFork, at: ReadLsn) -> Result<BlockNumber, SourceError>;

    /// Bytes in all main forks of a database.
    ///
    /// # Errors
    /// [`SourceError`] says why not.
    fn db_size(&self, db: Oid, at: ReadLsn) -> Result<i64, SourceError>;

    /// All forks in a database's directory of a tablespace.
    ///
    /// # Errors
    /// [`SourceError`] says why not.
    fn list_relations(&self, spc: Oid, db: Oid, at: ReadLsn) -> Result<Vec<RelationSize>, SourceError>;

    /// All pages of an SLRU segment, appended to `out`.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when there is no such segment.
    fn slru_segment(&self, kind: SlruKind, segno: u32, at: ReadLsn, out: &mut Vec<u8>) -> Result<(), SourceError> {
        self.slru_range(kind, segno, 0, varve_postgres::slru::PAGES_PER_SEGMENT, at, out)
    }

    /// `count` pages of an SLRU segment from its page `first` on, appended to `out`; fewer where the segment ends.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when there is no such segment.
    fn slru_range(&self, kind: SlruKind, segno: u32, first: u32, count: u32, at: ReadLsn, out: &mut Vec<u8>) -> Result<(), SourceError>;

    /// All segments of an SLRU area.
    ///
    /// # Errors
    /// [`SourceError`] says why not.
    fn list_slru(&self, kind: SlruKind, at: ReadLsn) -> Result<Vec<SlruSegmentSize>, SourceError>;

    /// Keeps `lsn` readable for a while, whatever the tenant's window is. Gives until when, RFC 3339. Must not block.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when it is not kept any more.
    fn lease(&self, lsn: Lsn) -> BoxFuture<'static, Result<String, SourceError>>;

    /// Writes a base backup as a tar archive into `sink`, at `lsn` or else at the newest LSN. A `sink` that fails has
    /// lost its client, or has no more room: an ordinary end, and nothing for a log.
    ///
    /// # Errors
    /// [`SourceError`] says why there is none, or no whole one.
    fn base_backup(&self, lsn: Option<Lsn>, options: BackupOptions, sink: &mut dyn Write) -> Result<(), SourceError>;
}
