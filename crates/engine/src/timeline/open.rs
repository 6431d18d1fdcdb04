//! Opening a timeline: its positions are derived from what tenant log, manifest and WAL log hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::{Condvar, Mutex};
use varve_postgres::wal::Framer;
use varve_postgres::{Lsn, Major};
use varve_storage::ids::{TenantId, WalLogId, WriterEpoch};
use varve_storage::store::Store;
use varve_storage::tenant_log::TimelineState;
use varve_storage::timeline::Resources;
use varve_storage::wal_log::WalLog;

use super::writer::{Tail, Writer};
use super::{Positions, ServedTimeline};
use crate::error::ServerError;
use crate::layers::OpenedHistory;

/// Bytes of WAL that one read brings while the log's tail is framed.
const READ_SIZE: usize = 4 * 1024 * 1024;

/// What all timelines of a pageserver share.
pub struct OpenContext {
    /// The WAL log.
    pub wal: Arc<WalLog>,
    /// Its identity.
    pub wal_log: WalLogId,
    /// For work that a timeline starts from its own threads.
    pub runtime: tokio::runtime::Handle,
    /// The store.
    pub store: Store,
    /// The engine's shared parts.
    pub resources: Arc<Resources>,
}

impl std::fmt::Debug for OpenContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenContext(WAL log {})", self.wal_log)
    }
}

/// What a timeline is opened with.
pub(crate) struct OpenTimeline<'a> {
    /// Tenant.
    pub(crate) tenant: TenantId,
    /// Major of its Postgres.
    pub(crate) major: Major,
    /// Its system identifier.
    pub(crate) system_identifier: u64,
    /// What the tenant log says.
    pub(crate) state: &'a TimelineState,
    /// The history, with the manifest's layers.
    pub(crate) history: OpenedHistory,
    /// The ancestor, opened.
    pub(crate) ancestor: Option<(Arc<ServedTimeline>, Lsn)>,
    /// What is shared.
    pub(crate) context: Arc<OpenContext>,
}

impl ServedTimeline {
    /// Opens a timeline and starts its ingest. Blocks: it frames what the WAL log holds of it.
    ///
    /// # Errors
    /// When the WAL log is damaged or lacks what it should hold.
    pub(crate) fn open(open: OpenTimeline<'_>) -> Result<Arc<ServedTimeline>, ServerError> {
        let facts = open.state.facts.clone();
        let OpenedHistory { history, layered, manifest } = open.history;
        let (tenant, timeline) = (open.tenant, facts.id);
        let epochs: Vec<(WriterEpoch, Lsn)> = open.state.epochs.iter().map(|epoch| (epoch.epoch, epoch.lsn)).collect();
        let wal = open.context.wal.clone();
        wal.attach(tenant, timeline, &epochs, layered).map_err(ServerError::internal)?;
        let mut framer = Framer::new(open.major, Some(open.system_identifier), layered, None);
        loop {
            let mut bytes = wal.read(tenant, timeline, framer.position(), READ_SIZE).map_err(ServerError::internal)?;
            if bytes.is_empty() {
                break;
            }
            while framer
                .next_record(&mut bytes)
                .map_err(|error| ServerError::internal(format!("the WAL log's bytes of timeline {timeline} are damaged: {error}")))?
                .is_some()
            {}
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
        let writer = Writer {
            epoch: open.state.epochs.last().map_or(WriterEpoch(0), |last| last.epoch),
            tail,
            standby_name: None,
            receiver: None,
            stream_over: Arc::default(),
        };
        let served = Arc::new(ServedTimeline {
            tenant,
            name,
            facts,
            major: open.major,
            system_identifier: open.system_identifier,
            history,
            ancestor: open.ancestor,
            wal,
            context: open.context,
            positions: Mutex::new(Positions { head, applied: layered, layered, readers_waiting: 0, ingest_sleeps: false, stopped: None }),
            changed: Condvar::new(),
            ingest_wakes: Condvar::new(),
            check_images: AtomicU64::new(check_images.0),
            awaited: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            worker: Mutex::new(None),
            writer: tokio::sync::Mutex::new(writer),
            beginning: tokio::sync::Mutex::new(()),
            flushing: AtomicBool::new(false),
            compacting: AtomicBool::new(false),
            manifest,
        });
        served.start_ingest().map_err(|error| ServerError::internal(format!("cannot start a thread: {error}")))?;
        Ok(served)
    }
}
