//! A page source in memory, with moods.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use varve_pageserver::page_service::{Arrival, BackupOptions, PageSource, SourceError, TimelinePages};
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Oid, Page, RelFork};
use varve_protocol::{ReadLsn, RelationSize, SlruSegmentSize};
use varve_storage::ids::TenantId;

/// Blocks in every fork.
pub(crate) const BLOCKS: u32 = 10_000;
/// What is applied at first.
const APPLIED: Lsn = Lsn(0x10_0000);

/// The page at a block.
pub(crate) fn page(rel: RelFork, blkno: u32, lsn: Lsn) -> Box<Page> {
    let mut page = Box::new([blkno as u8; BLCKSZ]);
    page[..4].copy_from_slice(&blkno.to_be_bytes());
    page[4..8].copy_from_slice(&rel.node.rel.to_be_bytes());
    page[8..16].copy_from_slice(&lsn.0.to_be_bytes());
    page
}

/// How many of something are there right now.
#[derive(Default, Clone)]
pub(crate) struct Gauge(Arc<AtomicUsize>);

/// One of them.
struct Counted(Gauge);

impl Gauge {
    fn count(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(self.clone())
    }

    pub(crate) fn now(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// Waits until there are `wanted`.
    pub(crate) async fn reaches(&self, wanted: usize, what: &str) {
        let limit = std::time::Instant::now() + Duration::from_secs(30);
        while self.now() != wanted {
            assert!(std::time::Instant::now() < limit, "{what}: waited for {wanted} of them, there are {}", self.now());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A tenant's only timeline. Block numbers that end in 7 are cold and take their time, those above [`BLOCKS`] do not
/// exist, relation 666 panics, relation 667 is not ready.
pub(crate) struct MemoryPages {
    tenant: TenantId,
    /// What is applied.
    pub(crate) applied: watch::Sender<Lsn>,
    pub(crate) pages_read: AtomicU64,
    /// Waits for what is not applied.
    pub(crate) waiting: Gauge,
    /// Base backups that are being made.
    pub(crate) backups_running: Gauge,
    /// Base backups that were made.
    pub(crate) backups_made: AtomicUsize,
}

impl MemoryPages {
    fn new(tenant: u8) -> Arc<MemoryPages> {
        Arc::new(MemoryPages {
            tenant: TenantId([tenant; 16]),
            applied: watch::Sender::new(APPLIED),
            pages_read: AtomicU64::default(),
            waiting: Gauge::default(),
            backups_running: Gauge::default(),
            backups_made: AtomicUsize::default(),
        })
    }

    fn has_arrived(&self, at: ReadLsn) -> bool {
        at.lsn == Lsn::MAX || at.lsn <= *self.applied.borrow()
    }

    fn assert_arrived(&self, at: ReadLsn) {
        assert!(self.has_arrived(at), "{} has not arrived: the service must wait before it takes a thread", at.lsn);
    }
}

pub(crate) fn is_cold(blkno: u32) -> bool {
    blkno % 10 == 7
}

/// Timelines `acme/main`, `beta/main`, `acme/attaching` (not ready), `acme/hanging` (never found, nor not), and none
/// else.
pub(crate) struct MemorySource {
    pub(crate) acme: Arc<MemoryPages>,
    pub(crate) beta: Arc<MemoryPages>,
    /// Searches that hang.
    pub(crate) hanging: Gauge,
}

impl Default for MemorySource {
    fn default() -> MemorySource {
        MemorySource { acme: MemoryPages::new(1), beta: MemoryPages::new(2), hanging: Gauge::default() }
    }
}

impl PageSource for MemorySource {
    fn resolve(&self, tenant: &str, timeline: &str) -> BoxFuture<'_, Result<Arc<dyn TimelinePages>, SourceError>> {
        let found: Result<Arc<dyn TimelinePages>, SourceError> = match (tenant, timeline) {
            ("acme", "main") => Ok(self.acme.clone()),
            ("beta", "main") => Ok(self.beta.clone()),
            ("acme", "attaching") => Err(SourceError::NotReady("tenant acme is being attached".to_owned())),
            ("acme", "panic") => panic!("as the test wants it"),
            ("acme", "hanging") => {
                let counted = self.hanging.count();
                return async move {
                    let _counted = counted;
                    std::future::pending().await
                }
                .boxed();
            }
            _ => Err(SourceError::NotFound(format!("there is no timeline {tenant}/{timeline}"))),
        };
        std::future::ready(found).boxed()
    }
}

impl TimelinePages for MemoryPages {
    fn tenant(&self) -> TenantId {
        self.tenant
    }

    fn arrival(&self, at: ReadLsn) -> Option<Arrival> {
        if self.has_arrived(at) {
            return None;
        }
        let (mut applied, counted) = (self.applied.subscribe(), self.waiting.count());
        let arrival = async move {
            let _counted = counted;
            let _ = applied.wait_for(|applied| at.lsn <= *applied).await;
            Ok(())
        };
        Some(arrival.boxed())
    }

    fn try_get_page_cached(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool {
        if is_cold(blkno) || blkno >= BLOCKS || rel.node.rel == 666 || rel.node.rel == 667 || !self.has_arrived(at) {
            return false;
        }
        self.pages_read.fetch_add(1, Ordering::Relaxed);
        take(&page(rel, blkno, at.lsn));
        true
    }

    fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn) -> Result<Box<Page>, SourceError> {
        self.pages_read.fetch_add(1, Ordering::Relaxed);
        self.assert_arrived(at);
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
        self.assert_arrived(lsn.map_or(ReadLsn::newest(), ReadLsn::at));
        let _running = self.backups_running.count();
        let gone = |error: std::io::Error| SourceError::Failed(format!("the client is gone: {error}"));
        writeln!(sink, "{lsn:?} {options:?}").map_err(gone)?;
        for i in 0..1000u32 {
            sink.write_all(&[i as u8; 10_000]).map_err(gone)?;
            if i == 500 && lsn == Some(Lsn(0xBAD)) {
                return Err(SourceError::Failed("layer 17 is corrupt".to_owned()));
            }
        }
        self.backups_made.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn lease(&self, lsn: Lsn) -> BoxFuture<'static, Result<String, SourceError>> {
        async move { if lsn <= APPLIED { Ok("2030-01-01T00:00:00Z".to_owned()) } else { Err(SourceError::NotFound(lsn.to_string())) } }
            .boxed()
    }
}
