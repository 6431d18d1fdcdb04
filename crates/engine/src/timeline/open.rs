//! Opening a timeline: its positions are derived from what tenant log, manifest and WAL log hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use parking_lot::Mutex;
use varve_postgres::wal::Framer;
use varve_postgres::{Lsn, Major};
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{TenantLog, TimelineState};
use varve_storage::timeline::Position;
use varve_storage::wal_log::WalLog;

use super::epochs::{Tail, Writer};
use super::flush::FlushState;
use super::ingest::IngestState;
use super::{LiveTimeline, Looks, Noted};
use crate::context::Context;
use crate::error::EngineError;
use crate::histories::OpenedHistory;
use crate::work_queue::Kind;

/// Bytes of WAL that one read brings while the log's tail is framed.
const READ_SIZE: usize = 4 * 1024 * 1024;

/// What a timeline is opened with.
pub(crate) struct OpenTimeline {
    /// Tenant.
    pub(crate) tenant: TenantId,
    /// Major of its Postgres.
    pub(crate) major: Major,
    /// Its system identifier.
    pub(crate) system_identifier: u64,
    /// What the tenant log says.
    pub(crate) state: TimelineState,
    /// That log, for what it will say.
    pub(crate) log: TenantLog,
    /// The history, with the manifest's layers.
    pub(crate) history: OpenedHistory,
    /// The ancestor, opened.
    pub(crate) ancestor: Option<(Arc<LiveTimeline>, Lsn)>,
    /// What is shared.
    pub(crate) context: Arc<Context>,
}

/// The timeline's place in the WAL log, as long as it is open.
#[derive(Debug)]
pub(super) struct Attached {
    wal: Arc<WalLog>,
    tenant: TenantId,
    timeline: TimelineId,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.wal.detach(self.tenant, self.timeline);
    }
}

impl LiveTimeline {
    /// Opens a timeline; ingest goes on where layers end. Blocks: it frames what the WAL log holds of it.
    ///
    /// # Errors
    /// When the WAL log is damaged or lacks what it should hold.
    pub(crate) fn open(open: OpenTimeline) -> Result<Arc<LiveTimeline>, EngineError> {
        let facts = open.state.facts.clone();
        let OpenedHistory { history, layered, manifest } = open.history;
        let (tenant, timeline) = (open.tenant, facts.id);
        let epochs: Vec<(WriterEpoch, Lsn)> = open.state.epochs.iter().map(|epoch| (epoch.epoch, epoch.lsn)).collect();
        let wal = &open.context.wal;
        wal.attach(tenant, timeline, &epochs, layered)?;
        let attached = Attached { wal: wal.clone(), tenant, timeline };
        let mut framer = Framer::new(open.major, Some(open.system_identifier), layered, None);
        loop {
            let mut bytes = wal.read(tenant, timeline, framer.position(), READ_SIZE)?;
            if bytes.is_empty() {
                break;
            }
            while framer.next_record(&mut bytes).map_err(|error| EngineError::DamagedWal { timeline, error })?.is_some() {}
        }
        let head = framer.framed();
        let tail = match open.state.epochs.last() {
            None => Tail::Known,
            Some(last) if last.wal_log == open.context.wal_log => Tail::Known,
            Some(last) if last.closed.is_some_and(|end| layered >= end) => Tail::Known,
            Some(_) => Tail::Unknown,
        };
        let check_images = manifest.state().kept_wal_end();
        let name = format!("{tenant}/{timeline}");
        tracing::info!(timeline = name, %head, layered = %layered, ?tail, "opened");
        let epoch = open.state.epochs.last().map_or(WriterEpoch(0), |last| last.epoch);
        let used_at = (open.context.resources.clock)();
        let looks = Looks::new(open.context.resources.clock.clone());
        let noted = open.state.figures.map(|figures| Noted { head: figures.head, size_bytes: figures.size_bytes, at: used_at });
        let live = Arc::new(LiveTimeline {
            tenant,
            name,
            log: open.log,
            facts,
            major: open.major,
            system_identifier: open.system_identifier,
            history,
            ancestor: open.ancestor,
            context: open.context,
            manifest,
            writer: tokio::sync::Mutex::new(Writer::new(epoch, tail)),
            tail_in: open.state.epochs.last().map_or_else(String::new, |last| last.wal_log.to_string()),
            ingest: Mutex::new(IngestState::new(open.major, open.system_identifier, layered)),
            ingest_scheduled: AtomicBool::new(false),
            ingest_hurried: AtomicBool::new(false),
            check_images: AtomicU64::new(check_images.0),
            awaited: AtomicU64::new(0),
            flush_fails: AtomicBool::new(false),
            flush: Mutex::new(FlushState::default()),
            used_at: Mutex::new(used_at),
            noted: Mutex::new(noted),
            looks,
            _attached: attached,
        });
        live.positions().raise(Position::Head, head);
        if head > layered {
            live.hurry_ingest();
        }
        // Layers that an earlier run did not merge.
        live.schedule(Kind::Merge, Duration::ZERO);
        Ok(live)
    }
}
