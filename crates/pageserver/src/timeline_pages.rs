//! The page service's view of a timeline: it waits until what is asked for has arrived, and says clearly when it never will.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_postgres::slru::{PAGES_PER_SEGMENT, SlruKind};
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, Page, RelFork};
use varve_protocol::{ReadLsn, RelationSize, SlruSegmentSize};
use varve_storage::database::DatabaseEntry;
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::relation::{self, RelationError};
use varve_storage::timeline::Timeline;

use crate::base_backup::{ExtraFile, Options, TimelineFacts, write_base_backup};
use crate::page_service::{BackupOptions, SourceError, TimelinePages};
use crate::tenant::Tenant;
use crate::time;
use crate::timeline::ServedTimeline;

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
    timeline: Arc<ServedTimeline>,
}

impl Pages {
    /// The page service's view of `timeline`.
    pub fn new(tenant: Arc<Tenant>, timeline: Arc<ServedTimeline>) -> Pages {
        Pages { tenant, timeline }
    }

    /// The LSN to read at, once everything up to it is applied.
    fn arrived(&self, at: ReadLsn) -> Result<Lsn, SourceError> {
        let newest = at.lsn == Lsn::MAX;
        let wanted = if newest { self.timeline.head().max(at.not_modified_since) } else { at.lsn };
        if wanted < self.timeline.first_lsn() {
            return Err(SourceError::NotFound(format!(
                "{wanted} is before the history of timeline {}, which begins at {}",
                self.timeline.id(),
                self.timeline.first_lsn()
            )));
        }
        self.timeline.wait_applied(wanted, ARRIVAL_WAIT_MAX).map_err(|what| {
            // What has arrived and is not applied yet is worth another try. Waiting again does not help where ingest has stopped, or for what
            // nobody wrote.
            if self.timeline.stopped().is_some() {
                SourceError::Failed(what)
            } else if wanted > self.timeline.head() {
                SourceError::NotFound(what)
            } else {
                SourceError::NotReady(what)
            }
        })?;
        Ok(if newest { self.timeline.applied() } else { wanted })
    }

    fn history(&self) -> &Arc<Timeline> {
        self.timeline.history()
    }
}

impl TimelinePages for Pages {
    fn try_get_page_cached(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool {
        let lsn = if at.lsn == Lsn::MAX {
            let (applied, head) = self.timeline.applied_and_head();
            if applied < head || applied < at.not_modified_since {
                return false;
            }
            applied
        } else if at.lsn > self.timeline.applied() || at.lsn < self.timeline.first_lsn() {
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
                        Err(error) => each(index, Err(error.into())),
                    }
                }
            }
            Err(error) => (0..blocks.len()).for_each(|index| each(index, Err(error.clone()))),
        }
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
        for (spc, found) in databases(&**self.history(), lsn)? {
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

    fn base_backup(&self, lsn: Option<Lsn>, options: BackupOptions, sink: &mut dyn Write) -> Result<(), SourceError> {
        let at = match lsn {
            Some(lsn) => ReadLsn::at(lsn),
            None => ReadLsn::newest(),
        };
        let lsn = self.arrived(at)?;
        self.write_base_backup(lsn, options, sink)
    }
}

impl Pages {
    fn write_base_backup(&self, lsn: Lsn, options: BackupOptions, sink: &mut dyn Write) -> Result<(), SourceError> {
        let failed = |error: &dyn std::fmt::Display| SourceError::Failed(error.to_string());
        let state = self.tenant.log().state();
        let chain = state.ancestry(self.timeline.id()).map_err(|error| failed(&error))?;
        let applied = self.timeline.applied();
        let base = time::round_down(&**self.history(), lsn, self.timeline.first_lsn(), applied).map_err(|error| failed(&error))?;
        let mut ancestors: Vec<AncestorTimeline> = chain
            .iter()
            .filter_map(|(timeline, _)| timeline.facts.ancestor)
            .filter_map(|ancestor| {
                let tli = state.timeline(ancestor.timeline).ok()?.facts.tli;
                Some(AncestorTimeline { tli, switch: ancestor.lsn })
            })
            .collect();
        ancestors.reverse();
        let mut extra_files = Vec::new();
        for (path, contents) in state.files_at(self.timeline.id(), lsn).map_err(|error| failed(&error))? {
            if let Some(bytes) = self.tenant.file_contents(&contents).map_err(|error| failed(&error))? {
                extra_files.push(ExtraFile { path, bytes });
            }
        }
        let mut nonce = [0; 32];
        nonce[..16].copy_from_slice(&self.tenant.id().0);
        nonce[16..].copy_from_slice(&self.timeline.id().0);
        let facts = TimelineFacts {
            system_identifier: self.tenant.facts().system_identifier,
            tli: self.timeline.facts().tli,
            ancestors,
            base,
            mock_authentication_nonce: nonce,
        };
        let time_unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
        let options = Options {
            slru: options.full || !options.no_slru,
            relations: options.full,
            gzip: false,
            // So that WAL is kept from the first moment on, until the store has it.
            slot: (!options.full).then(|| "varve".to_owned()),
            extra_files,
            time_unix,
        };
        let cluster = &self.tenant.template().facts().cluster;
        write_base_backup(&**self.history(), cluster, &facts, &options, sink).map_err(|error| failed(&error))
    }
}

/// Pages of segment `segno`: up to the last that exists; `None` if it has none.
fn segment_pages(intervals: &[std::ops::Range<u32>], segno: u32) -> Option<u32> {
    let base = segno.saturating_mul(PAGES_PER_SEGMENT);
    let end = base.saturating_add(PAGES_PER_SEGMENT);
    let last = intervals.iter().filter(|i| i.start < end && i.end > base).map(|i| i.end.min(end)).max()?;
    Some(last - base)
}

