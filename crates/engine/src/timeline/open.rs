//! Opening a timeline: its positions are derived from what tenant log, manifest and WAL log hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use parking_lot::Mutex;
use varve_postgres::wal::Framer;
use varve_postgres::{Lsn, Major};
use varve_storage::ids::{TenantId, TimelineId, WalLogId, WriterEpoch};
use varve_storage::shared_wal::Stored;
use varve_storage::tenant_log::{TenantLog, TimelineState};
use varve_storage::wal_log::{WalLog, WalLogError};

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
    /// WAL beyond its layers that another server had put into the store, without a gap.
    pub(crate) found: Vec<Stored>,
    /// The ancestor, opened.
    pub(crate) ancestor: Option<(Arc<LiveTimeline>, Lsn)>,
    /// What is shared.
    pub(crate) context: Arc<Context>,
}

/// The WAL log, not ours, that has what may be missing here: of the newest epoch, unless layers have all of it.
pub(crate) fn tail_elsewhere(state: &TimelineState, mine: WalLogId, layered: Lsn) -> Option<WalLogId> {
    let last = state.epochs.last().filter(|last| last.wal_log != mine)?;
    let is_layered = last.closed.is_some_and(|end| layered >= end);
    (!is_layered).then_some(last.wal_log)
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

/// What of the WAL that was found in the store is whole, sound records: the WAL log would keep anything else for good.
fn whole_records(open: &OpenTimeline, layered: Lsn) -> Vec<Stored> {
    let mut framer = Framer::new(open.major, Some(open.system_identifier), layered, None);
    for part in &open.found {
        let mut bytes = part.bytes.clone();
        let framed = loop {
            match framer.next_record(&mut bytes) {
                Ok(Some(_)) => {}
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = framed {
            let (tenant, timeline, at) = (open.tenant, open.state.facts.id, framer.framed());
            tracing::error!(%tenant, %timeline, %error, %at, "WAL in the store is no WAL from here on; it is left out");
            break;
        }
    }
    let end = framer.framed();
    let cut = |part: &Stored| Stored {
        start: part.start,
        bytes: part.bytes.slice(..(end.distance_from(part.start) as usize).min(part.bytes.len())),
    };
    open.found.iter().filter(|part| part.start < end).map(cut).collect()
}

/// Puts WAL that was found in the store into the WAL log, each byte as of the epoch that wrote it.
fn import(
    wal: &WalLog,
    (tenant, timeline): (TenantId, TimelineId),
    epochs: &[(WriterEpoch, Lsn)],
    found: &[Stored],
) -> Result<(), WalLogError> {
    let mut position = None;
    for Stored { start, bytes } in found {
        let end = *start + bytes.len() as u64;
        let mut at = *start;
        while at < end {
            let epoch = epochs.iter().rev().find(|(_, lsn)| *lsn <= at).map_or(WriterEpoch(0), |(epoch, _)| *epoch);
            let next = epochs.iter().map(|(_, lsn)| *lsn).find(|lsn| *lsn > at).map_or(end, |lsn| lsn.min(end));
            let part = bytes.slice(at.distance_from(*start) as usize..next.distance_from(*start) as usize);
            position = Some(wal.import(tenant, timeline, epoch, at, &part)?);
            at = next;
        }
    }
    position.map_or(Ok(()), |position| wal.sync(position))
}

impl LiveTimeline {
    /// Opens a timeline; ingest goes on where layers end. Blocks: it frames what the WAL log holds of it.
    ///
    /// # Errors
    /// When the WAL log is damaged or lacks what it should hold.
    pub(crate) fn open(open: OpenTimeline) -> Result<Arc<LiveTimeline>, EngineError> {
        let facts = open.state.facts.clone();
        let found = whole_records(&open, open.history.layered);
        let OpenedHistory { history, layered, manifest } = open.history;
        let (tenant, timeline) = (open.tenant, facts.id);
        let epochs: Vec<(WriterEpoch, Lsn)> = open.state.epochs.iter().map(|epoch| (epoch.epoch, epoch.lsn)).collect();
        let wal = &open.context.wal;
        wal.attach(tenant, timeline, &epochs, layered)?;
        let attached = Attached { wal: wal.clone(), tenant, timeline };
        let found_up_to = found.last().map_or(layered, |last| last.start + last.bytes.len() as u64);
        import(wal, (tenant, timeline), &epochs, &found)?;
        let mut framer = Framer::new(open.major, Some(open.system_identifier), layered, None);
        loop {
            let mut bytes = wal.read(tenant, timeline, framer.position(), READ_SIZE)?;
            if bytes.is_empty() {
                break;
            }
            while framer.next_record(&mut bytes).map_err(|error| EngineError::DamagedWal { timeline, error })?.is_some() {}
        }
        let head = framer.framed();
        let tail = if tail_elsewhere(&open.state, open.context.wal_log, layered).is_some() { Tail::Unknown } else { Tail::Known };
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
            ship_scheduled: AtomicBool::new(false),
            is_named: AtomicBool::new(tail == Tail::Known),
            found_up_to: found_up_to.min(head),
            flush_fails: AtomicBool::new(false),
            flush: Mutex::new(FlushState::default()),
            used_at: Mutex::new(used_at),
            noted: Mutex::new(noted),
            looks,
            _attached: attached,
        });
        if head > layered {
            live.raise_head(head);
            live.hurry_ingest();
        }
        // Layers that an earlier run did not merge.
        live.schedule(Kind::Merge, Duration::ZERO);
        Ok(live)
    }
}
