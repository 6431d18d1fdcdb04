//! The page service's view of a timeline: waits as futures until what is asked for has arrived, and says clearly when
//! it never will.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use varve_engine::backup::{self, BackupOptions};
use varve_engine::{EngineError, LiveTimeline, Tenant, catalog};
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::slru::{PAGES_PER_SEGMENT, SlruKind};
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, Page, RelFork};
use varve_protocol::{ReadLsn, RelationSize, SlruSegmentSize};
use varve_storage::history::HistoryError;
use varve_storage::ids::TenantId;
use varve_storage::relation::{self, RelationError};
use varve_storage::timeline::Timeline;

use crate::page_service::{Arrival, SourceError, TimelinePages};
use crate::wall_clock;

/// How long a position stays that somebody asks to keep; he asks again before that.
const LEASE: Duration = Duration::from_secs(600);

/// How long a read waits for an LSN that has not arrived.
const ARRIVAL_WAIT_MAX: Duration = Duration::from_secs(60);

impl From<RelationError> for SourceError {
    fn from(error: RelationError) -> SourceError {
        match error {
            RelationError::History(error) => error.into(),
            other => SourceError::NotFound(other.to_string()),
        }
    }
}

impl From<HistoryError> for SourceError {
    fn from(error: HistoryError) -> SourceError {
        tracing::error!(%error, "a history cannot be read; nothing of it is served");
        SourceError::Failed(error.to_string())
    }
}

/// A timeline as the page service reads it.
#[derive(Debug)]
pub struct Pages {
    tenant: Arc<Tenant>,
    live: Arc<LiveTimeline>,
}

impl Pages {
    /// The page service's view of `live`.
    pub fn new(tenant: Arc<Tenant>, live: Arc<LiveTimeline>) -> Pages {
        Pages { tenant, live }
    }

    /// The LSN that must have been applied before `at` can be answered.
    fn wanted(&self, at: ReadLsn) -> Lsn {
        if at.lsn == Lsn::MAX { self.live.positions().head().max(at.not_modified_since) } else { at.lsn.min(at.not_modified_since) }
    }

    /// The LSN to read at, now that the wait for it is over.
    fn arrived(&self, at: ReadLsn) -> Result<Lsn, SourceError> {
        let positions = self.live.positions();
        let newest = at.lsn == Lsn::MAX;
        // Of what is newest only what was asked for must be there; more may have come since. What did not change since
        // an earlier moment can be read as soon as that is there.
        let wanted = if newest { at.not_modified_since } else { at.lsn.min(at.not_modified_since) };
        if !newest && at.lsn < self.live.first_lsn() {
            return Err(SourceError::NotFound(format!(
                "{} is before the history of timeline {}, which begins at {}",
                at.lsn,
                self.live.id(),
                self.live.first_lsn()
            )));
        }
        if !newest && let Err(error) = self.history().check_kept(at.lsn) {
            return Err(SourceError::NotFound(error.to_string()));
        }
        if self.live.is_applied(wanted) {
            return Ok(if newest {
                positions.applied()
            } else if self.live.is_applied(at.lsn) {
                at.lsn
            } else {
                positions.applied().min(at.lsn)
            });
        }
        Err(not_there(&self.live, wanted))
    }

    fn history(&self) -> &Arc<Timeline> {
        self.live.history()
    }
}

/// Why `wanted` cannot be read now.
fn not_there(live: &LiveTimeline, wanted: Lsn) -> SourceError {
    let positions = live.positions();
    let (head, applied) = (positions.head(), positions.applied());
    let what = format!("timeline {} has no WAL up to {wanted}: it ends at {head}, of which {applied} is applied", live.id());
    // What has arrived and is not applied yet is worth another try. Waiting again does not help where ingest has
    // stopped, or for what nobody wrote.
    match live.stopped() {
        Some(stopped) => SourceError::Failed(format!("{what}; ingest stopped at {}: {}", stopped.at, stopped.reason)),
        None if positions.is_closing() => SourceError::NotReady(format!("timeline {} is being closed by this server", live.id())),
        None if wanted > head => SourceError::NotFound(what),
        None => SourceError::NotReady(what),
    }
}

impl TimelinePages for Pages {
    fn tenant(&self) -> TenantId {
        self.tenant.id()
    }

    fn arrival(&self, at: ReadLsn) -> Option<Arrival> {
        let wanted = self.wanted(at);
        if self.live.is_applied(wanted) {
            return None;
        }
        let live = self.live.clone();
        Some(async move { live.wait_applied(wanted, ARRIVAL_WAIT_MAX).await.map_err(|_| not_there(&live, wanted)) }.boxed())
    }

    fn try_get_page_cached(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool {
        let lsn = if at.lsn == Lsn::MAX {
            let (head, applied) = (self.live.positions().head(), self.live.positions().applied());
            if applied < head || applied < at.not_modified_since {
                return false;
            }
            applied
        } else if !self.live.is_applied(at.lsn) || at.lsn < self.live.first_lsn() {
            return false;
        } else {
            at.lsn
        };
        match self.history().block_if_warm(rel, blkno, lsn) {
            Some(Ok(page)) => {
                take(&page);
                true
            }
            _ => false,
        }
    }

    fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn) -> Result<Box<Page>, SourceError> {
        let mut found = Err(SourceError::Failed("no answer".to_owned()));
        self.get_pages(&[(rel, blkno)], at, &mut |_, page| found = page.map(|page| Box::new(*page)));
        found
    }

    fn get_pages(&self, blocks: &[(RelFork, BlockNumber)], at: ReadLsn, each: &mut dyn FnMut(usize, Result<&Page, SourceError>)) {
        let pages = self.arrived(at).and_then(|lsn| Ok(self.history().blocks(blocks, lsn)?));
        match pages {
            Ok(pages) => {
                for (index, page) in pages.into_iter().enumerate() {
                    match page {
                        Ok(page) => each(index, Ok(&page)),
                        // A hint that was kept before a restart may not be kept after it: a page without one says that
                        // no space is free.
                        Err(RelationError::NoRelation { .. } | RelationError::BeyondEnd { .. })
                            if blocks[index].0.fork == Fork::FreeSpaceMap =>
                        {
                            each(index, Ok(&ZERO_PAGE));
                        }
                        // Others ask for pages in whole batches, of which the last are behind the end.
                        Err(RelationError::BeyondEnd { .. }) => each(index, Ok(&ZERO_PAGE)),
                        Err(error) => each(index, Err(error.into())),
                    }
                }
            }
            Err(error) => (0..blocks.len()).for_each(|index| each(index, Err(error.clone()))),
        }
    }

    /// What `get_pages` says of maps of free space holds for ranges of them, too: whoever was told of a longer one
    /// before a restart gets empty pages.
    fn range(&self, rel: RelFork, first: BlockNumber, count: u32, at: ReadLsn) -> Result<Range<BlockNumber>, SourceError> {
        let asked = first..first.saturating_add(count);
        if rel.fork == Fork::FreeSpaceMap {
            return Ok(asked);
        }
        Ok(first..self.nblocks(rel, at)?.min(asked.end))
    }

    fn exists(&self, rel: RelFork, at: ReadLsn) -> Result<bool, SourceError> {
        let lsn = self.arrived(at)?;
        Ok(relation::blocks(&**self.history(), rel, lsn)?.is_some())
    }

    fn nblocks(&self, rel: RelFork, at: ReadLsn) -> Result<BlockNumber, SourceError> {
        let lsn = self.arrived(at)?;
        relation::blocks(&**self.history(), rel, lsn)?.ok_or_else(|| RelationError::NoRelation { rel, lsn }.into())
    }

    fn db_size(&self, db: Oid, at: ReadLsn) -> Result<i64, SourceError> {
        let lsn = self.arrived(at)?;
        let mut blocks = 0u64;
        for (spc, found) in catalog::databases(&**self.history(), lsn)? {
            if found == db {
                relation::list(&**self.history(), spc, db, lsn, &mut |rel, size| {
                    if rel.fork == Fork::Main {
                        blocks += u64::from(size);
                    }
                    Ok(())
                })?;
            }
        }
        Ok((blocks * varve_postgres::BLCKSZ as u64) as i64)
    }

    fn list_relations(&self, spc: Oid, db: Oid, at: ReadLsn) -> Result<Vec<RelationSize>, SourceError> {
        let lsn = self.arrived(at)?;
        let mut relations = Vec::new();
        relation::list(&**self.history(), spc, db, lsn, &mut |rel, blocks| {
            relations.push(RelationSize { rel: rel.node.rel, fork: rel.fork, blocks });
            Ok(())
        })?;
        Ok(relations)
    }

    fn slru_range(&self, kind: SlruKind, segno: u32, first: u32, count: u32, at: ReadLsn, out: &mut Vec<u8>) -> Result<(), SourceError> {
        let lsn = self.arrived(at)?;
        let extent = relation::slru_extent(&**self.history(), kind, lsn)?;
        let base = segno.saturating_mul(PAGES_PER_SEGMENT);
        let end = base
            + segment_pages(extent.intervals(), segno)
                .ok_or_else(|| SourceError::NotFound(format!("segment {segno:04X} of {kind} does not exist at {lsn}")))?;
        for page in base.saturating_add(first)..end.min(base.saturating_add(first).saturating_add(count)) {
            if extent.contains(page) {
                out.extend_from_slice(&*relation::slru_page(&**self.history(), kind, page, lsn)?);
            } else {
                out.resize(out.len() + varve_postgres::BLCKSZ, 0);
            }
        }
        Ok(())
    }

    fn list_slru(&self, kind: SlruKind, at: ReadLsn) -> Result<Vec<SlruSegmentSize>, SourceError> {
        let lsn = self.arrived(at)?;
        let extent = relation::slru_extent(&**self.history(), kind, lsn)?;
        let mut segments: Vec<u32> = Vec::new();
        for interval in extent.intervals() {
            let last = interval.end.saturating_sub(1) / PAGES_PER_SEGMENT;
            segments.extend((interval.start / PAGES_PER_SEGMENT..=last).filter(|segno| segments.last() != Some(segno)).collect::<Vec<_>>());
        }
        let size = |segno| segment_pages(extent.intervals(), segno).map(|pages| SlruSegmentSize { segno, pages });
        Ok(segments.into_iter().filter_map(size).collect())
    }

    fn lease(&self, lsn: Lsn) -> BoxFuture<'static, Result<String, SourceError>> {
        let (tenant, live) = (self.tenant.clone(), self.live.clone());
        async move {
            let now = wall_clock::now();
            let kept = tenant.lease(&live, lsn, now, LEASE).await.map_err(|error| match error {
                EngineError::Tenant(_) | EngineError::Moment(_) => SourceError::NotFound(error.to_string()),
                error => SourceError::NotReady(error.to_string()),
            });
            kept.map(wall_clock::rfc3339)
        }
        .boxed()
    }

    fn base_backup(&self, lsn: Option<Lsn>, options: BackupOptions, sink: &mut dyn Write) -> Result<(), SourceError> {
        let at = match lsn {
            Some(lsn) => ReadLsn::at(lsn),
            None => ReadLsn::newest(),
        };
        let options = BackupOptions { newest_files: options.newest_files || lsn.is_none(), ..options };
        let lsn = self.arrived(at)?;
        let time_unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
        backup::write(&self.tenant, &self.live, lsn, options, time_unix, sink).map_err(|error| match error {
            EngineError::Moment(error) => SourceError::NotFound(error.to_string()),
            error => SourceError::Failed(error.to_string()),
        })
    }
}

/// Pages of segment `segno`: up to the last that exists; `None` if it has none.
fn segment_pages(intervals: &[std::ops::Range<u32>], segno: u32) -> Option<u32> {
    let base = segno.saturating_mul(PAGES_PER_SEGMENT);
    let end = base.saturating_add(PAGES_PER_SEGMENT);
    let last = intervals.iter().filter(|i| i.start < end && i.end > base).map(|i| i.end.min(end)).max()?;
    Some(last - base)
}
