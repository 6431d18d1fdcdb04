//! A page source in memory, with moods.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use varve_pageserver::page_service::{BackupOptions, PageSource, SourceError, TimelinePages};
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Oid, Page, RelFork};
use varve_protocol::{ReadLsn, RelationSize, SlruSegmentSize};

/// Blocks in every fork.
pub(crate) const BLOCKS: u32 = 10_000;

/// The page at a block.
pub(crate) fn page(rel: RelFork, blkno: u32, lsn: Lsn) -> Box<Page> {
    let mut page = Box::new([blkno as u8; BLCKSZ]);
    page[..4].copy_from_slice(&blkno.to_be_bytes());
    page[4..8].copy_from_slice(&rel.node.rel.to_be_bytes());
    page[8..16].copy_from_slice(&lsn.0.to_be_bytes());
    page
}

/// Timelines `acme/main`, `acme/attaching` (not ready), and none else. In them: block numbers that end in 7 are cold and take their time, those
/// above [`BLOCKS`] do not exist, relation 666 panics, relation 667 is not ready.
#[derive(Default)]
pub(crate) struct MemoryPages {
    pub(crate) pages_read: AtomicU64,
}

pub(crate) fn is_cold(blkno: u32) -> bool {
    blkno % 10 == 7
}

impl PageSource for MemorySource {
    fn resolve(&self, tenant: &str, timeline: &str) -> Result<Arc<dyn TimelinePages>, SourceError> {
        match (tenant, timeline) {
            ("acme", "main") => Ok(self.0.clone()),
            ("acme", "attaching") => Err(SourceError::NotReady("tenant acme is being attached".to_owned())),
            _ => Err(SourceError::NotFound(format!("there is no timeline {tenant}/{timeline}"))),
        }
    }
}

/// Finds [`MemoryPages`].
pub(crate) struct MemorySource(pub(crate) Arc<MemoryPages>);

impl TimelinePages for MemoryPages {
    fn try_get_page_cached(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool {
        if is_cold(blkno) || blkno >= BLOCKS || rel.node.rel == 666 || rel.node.rel == 667 {
            return false;
        }
        self.pages_read.fetch_add(1, Ordering::Relaxed);
        take(&page(rel, blkno, at.lsn));
        true
    }

    fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn) -> Result<Box<Page>, SourceError> {
        self.pages_read.fetch_add(1, Ordering::Relaxed);
        assert_ne!(rel.node.rel, 666, "the number of the beast");
        if rel.node.rel == 667 {
            return Err(SourceError::NotReady("the timeline has gone to another pageserver".to_owned()));
        }
        if blkno >= BLOCKS {
            return Err(SourceError::NotFound(format!("block {blkno} of {rel} does not exist")));
        }
        if is_cold(blkno) {
            std::thread::sleep(Duration::from_micros(u64::from(blkno * 7919 % 2000)));
        }
        Ok(page(rel, blkno, at.lsn))
    }

    fn exists(&self, rel: RelFork, _at: ReadLsn) -> Result<bool, SourceError> {
        Ok(rel.node.rel < 100_000)
    }

    fn nblocks(&self, rel: RelFork, at: ReadLsn) -> Result<BlockNumber, SourceError> {
        if self.exists(rel, at)? { Ok(BLOCKS) } else { Err(SourceError::NotFound(format!("relation {rel} does not exist"))) }
    }

    fn db_size(&self, _db: Oid, _at: ReadLsn) -> Result<i64, SourceError> {
        Ok(1 << 40)
    }

    fn list_relations(&self, _spc: Oid, _db: Oid, _at: ReadLsn) -> Result<Vec<RelationSize>, SourceError> {
        Ok((0..100_000).map(|rel| RelationSize { rel, fork: Fork::Main, blocks: BLOCKS }).collect())
    }

    fn slru_range(&self, _kind: SlruKind, segno: u32, first: u32, count: u32, _at: ReadLsn, out: &mut Vec<u8>) -> Result<(), SourceError> {
        if segno > 3 {
            return Err(SourceError::NotFound(format!("segment {segno} does not exist")));
        }
        for blkno in first..(first + count).min(32) {
            out.extend_from_slice(&[blkno as u8; BLCKSZ]);
        }
        Ok(())
    }

    fn list_slru(&self, _kind: SlruKind, _at: ReadLsn) -> Result<Vec<SlruSegmentSize>, SourceError> {
        Ok((0..4).map(|segno| SlruSegmentSize { segno, pages: 32 }).collect())
    }

    fn base_backup(&self, lsn: Option<Lsn>, options: BackupOptions, sink: &mut dyn Write) -> Result<(), SourceError> {
        let gone = |error: std::io::Error| SourceError::Failed(format!("the client is gone: {error}"));
        writeln!(sink, "{lsn:?} {options:?}").map_err(gone)?;
        for i in 0..1000u32 {
            sink.write_all(&[i as u8; 10_000]).map_err(gone)?;
            if i == 500 && lsn == Some(Lsn(0xBAD)) {
                return Err(SourceError::Failed("layer 17 is corrupt".to_owned()));
            }
        }
        Ok(())
    }
}
