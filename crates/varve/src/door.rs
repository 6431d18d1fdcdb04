//! The pageserver behind the control plane's door, where both are one process: calls are handed on, errors become words
//! with a code.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use varve_api::admin::{ScrubFinding, ScrubPass, ScrubStatus, ShippedWal, StoreAcknowledgement};
use varve_api::host::BlockName;
use varve_api::{Code, Refusal};
use varve_control::ports::{
    self, AttachWriter, EpochStart, LeftoverOf, Live, Lost, Moment, OrphanedWal, Places, PortResult, Resolved, Template, WalRange,
};
use varve_engine::EngineError;
use varve_engine::moments::MomentError;
use varve_engine::shipping::Figures;
use varve_engine::timeline::Flushed;
use varve_pageserver::scrubbing::{Found, Pass, Scrubber};
use varve_pageserver::server::LeftoverWal;
use varve_pageserver::writers::{Walsender, Writer};
use varve_pageserver::{Pageserver, ServerError};
use varve_postgres::{Lsn, Major, Timestamp};
use varve_storage::edit_log::EditLogError;
use varve_storage::ids::{BranchName, TenantId, TimelineId, WriterEpoch};
use varve_storage::shared_wal::SharedWalError;
use varve_storage::tenant_log::{FileContents, TenantError, TenantLog, names::NameError};
use varve_storage::timeline::WaitError;
use varve_storage::wal_log::WalLogError;

/// See the module's doc.
#[derive(Debug)]
pub(crate) struct Door {
    pageserver: Arc<Pageserver>,
    scrubber: Arc<Scrubber>,
    /// Address of the page service.
    page_service: String,
}

impl Door {
    pub(crate) fn new(pageserver: Arc<Pageserver>, scrubber: Arc<Scrubber>, page_service: String) -> Door {
        Door { pageserver, scrubber, page_service }
    }
}

/// The code that an error has in the API.
fn code(error: &ServerError) -> Code {
    match error {
        ServerError::Engine(error) => engine_code(error),
        ServerError::UnknownTenant(_) | ServerError::UnknownTenantName(_) => Code::UnknownTenant,
        ServerError::NotOwner { .. } => Code::NotOwner,
        ServerError::Name(NameError::Taken { .. }) => Code::NameTaken,
        ServerError::Name(NameError::Store(_)) => Code::Unavailable,
        ServerError::File { error, .. } if error.kind() == std::io::ErrorKind::StorageFull => Code::Unavailable,
        ServerError::Archive(_) | ServerError::UnsupportedMajor(_) | ServerError::LeftoverGap { .. } => Code::InvalidArgument,
        ServerError::Name(_) | ServerError::Thread(_) | ServerError::File { .. } | ServerError::WalLogId(_) => Code::Internal,
    }
}

fn engine_code(error: &EngineError) -> Code {
    match error {
        EngineError::Tenant(TenantError::UnknownBranch(_) | TenantError::UnknownTimeline(_)) => Code::UnknownBranch,
        EngineError::Tenant(TenantError::Removed) => Code::UnknownTenant,
        EngineError::Log(EditLogError::Fenced { .. }) | EngineError::NotOwner { .. } => Code::NotOwner,
        EngineError::Log(EditLogError::Unconfirmed { .. } | EditLogError::Stopped { .. } | EditLogError::Store(_))
        | EngineError::Store(_) => Code::Unavailable,
        EngineError::SharedWal(SharedWalError::Store(_)) => Code::Unavailable,
        // A full disk, for one: space may come back.
        EngineError::WalLog(WalLogError::Io { .. }) => Code::Unavailable,
        EngineError::Wait(WaitError::Deadline { .. } | WaitError::Closing { .. })
        | EngineError::NotCollected { .. }
        | EngineError::CheckpointMissing { .. } => Code::Unavailable,
        EngineError::TailUnknown { .. } => Code::TailUnknown,
        EngineError::EpochOver { .. } | EngineError::BranchMoved { .. } | EngineError::StreamOver { .. } => Code::Fenced,
        EngineError::LeftoverWal { .. } => Code::InvalidArgument,
        EngineError::Moment(MomentError::Future { .. }) => Code::InTheFuture,
        EngineError::Moment(MomentError::BeforeHistory { .. } | MomentError::BeforeTime { .. } | MomentError::Collected { .. })
        | EngineError::Tenant(TenantError::Collected { .. })
        | EngineError::WalNotKept { .. } => Code::NotRetained,
        EngineError::Template(_) => Code::HostUnfit,
        _ => Code::Internal,
    }
}

#[allow(clippy::needless_pass_by_value, reason = "so that it fits map_err")]
fn refusal(error: ServerError) -> Refusal {
    // What was asked for and what there is, in the words of branches.
    let detail = match &error {
        ServerError::Engine(EngineError::Moment(MomentError::Future { lsn, end })) => {
            format!("{lsn} is in the future of this branch: its history goes to {end}")
        }
        ServerError::Engine(EngineError::Moment(MomentError::BeforeHistory { lsn, start })) => {
            format!("{lsn} is before what this branch keeps: its history begins at {start}")
        }
        ServerError::Engine(EngineError::Moment(MomentError::BeforeTime { at })) => {
            format!("{} is before the history of this branch", rfc3339(*at))
        }
        error => error.to_string(),
    };
    Refusal::new(code(&error), detail)
}

/// A time of Postgres's in RFC 3339, UTC.
fn rfc3339(at: Timestamp) -> String {
    /// Microseconds from 1970-01-01 to 2000-01-01 UTC, where Postgres's clock begins.
    const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;
    let time = jiff::Timestamp::from_microsecond(at.0.saturating_add(POSTGRES_EPOCH_MICROS));
    time.map_or_else(|_| "that time".to_owned(), |time| time.to_string())
}

fn pass(pass: Pass) -> ScrubPass {
    let Pass { begun, ended, tenants, bytes, findings, found } = pass;
    let finding = |Found { tenant, object, problem }: Found| ScrubFinding { tenant, object, problem };
    ScrubPass {
        begun_at: rfc3339(Timestamp(begun)),
        ended_at: ended.map(|ended| rfc3339(Timestamp(ended))),
        tenants,
        bytes,
        findings,
        found: found.into_iter().map(finding).collect(),
    }
}

fn template(found: &varve_engine::template::Template) -> Template {
    let facts = found.facts();
    Template { name: found.name().to_owned(), pg_version: facts.cluster.major.number(), end: facts.end }
}

impl ports::Pageserver for Door {
    async fn own(&self, tenant: TenantId, why: &'static str) -> PortResult<TenantLog> {
        Ok(self.pageserver.tenants().own(tenant, why).await.map_err(refusal)?.log().clone())
    }

    fn owned(&self, tenant: TenantId) -> Option<TenantLog> {
        Some(self.pageserver.tenants().awake(tenant)?.log().clone())
    }

    async fn adopt(&self, log: TenantLog) -> PortResult<()> {
        self.pageserver.tenants().adopt(log).await.map(drop).map_err(refusal)
    }

    async fn forget(&self, tenant: TenantId) {
        let log = self.pageserver.tenants().awake(tenant).map(|tenant| tenant.log().state());
        let timelines = log.map(|state| state.timelines().map(|timeline| timeline.facts.id).collect()).unwrap_or_default();
        self.pageserver.forget(tenant, timelines).await;
    }

    async fn remove_timelines(&self, tenant: TenantId, timelines: Vec<TimelineId>) {
        self.pageserver.remove_timelines(tenant, timelines).await;
    }

    async fn collect(&self, tenant: TenantId) -> PortResult<()> {
        self.pageserver.collect(tenant).await.map_err(refusal)
    }

    async fn scrub(&self, tenant: TenantId) -> PortResult<Vec<String>> {
        let found = self.pageserver.scrub(tenant).await.map_err(refusal)?;
        Ok(found.found.into_iter().map(|finding| format!("{}: {}", finding.object, finding.problem)).collect())
    }

    fn scrub_status(&self) -> Option<ScrubStatus> {
        let status = self.scrubber.status();
        let rate_bytes = self.scrubber.bytes_per_second();
        if rate_bytes == 0 && status.current.is_none() && status.last.is_none() {
            return None;
        }
        Some(ScrubStatus { rate_bytes, after: status.after, current: status.current.map(pass), last: status.last.map(pass) })
    }

    fn live(&self, tenant: TenantId, timeline: TimelineId) -> Option<Live> {
        let live = self.pageserver.opened(tenant, timeline)?;
        let positions = live.positions();
        Some(Live {
            head: positions.head(),
            applied: positions.applied(),
            layered: positions.layered(),
            size_bytes: live.noted_size(),
            stopped: live.stopped().map(|stopped| stopped.reason.to_string()),
        })
    }

    async fn resolve(&self, tenant: TenantId, timeline: TimelineId, moment: Moment) -> PortResult<Resolved> {
        self.pageserver.resolve(tenant, timeline, moment).await.map_err(refusal)
    }

    async fn time_at(&self, tenant: TenantId, at: Resolved) -> PortResult<Option<Timestamp>> {
        self.pageserver.time_at(tenant, at).await.map_err(refusal)
    }

    async fn begin_epoch(&self, tenant: TenantId, branch: &BranchName, timeline: TimelineId) -> PortResult<EpochStart> {
        let start = self.pageserver.begin_epoch(tenant, branch, timeline).await.map_err(refusal)?;
        Ok(EpochStart { epoch: start.epoch, lsn: start.lsn, standby_name: start.standby_name })
    }

    async fn end_stream(&self, tenant: TenantId, timeline: TimelineId) -> PortResult<()> {
        self.pageserver.end_stream(tenant, timeline).await.map_err(refusal)
    }

    async fn attach_writer(&self, writer: AttachWriter) -> PortResult<String> {
        let AttachWriter { tenant, branch, timeline, epoch, walsender, flushed, waits_for } = writer;
        let walsender = Walsender { socket: walsender.socket.into(), credential: walsender.credential };
        let flushed = Flushed { lsn: flushed, waits_for };
        let writer = Writer { branch, epoch, walsender, flushed };
        self.pageserver.attach_writer(tenant, timeline, writer).await.map_err(refusal)
    }

    async fn leftover_start(&self, of: LeftoverOf) -> PortResult<Option<Lsn>> {
        let LeftoverOf { tenant, branch, timeline, epoch } = of;
        self.pageserver.leftover_start(tenant, &branch, timeline, epoch).await.map_err(refusal)
    }

    async fn take_leftover(&self, of: LeftoverOf, start: Lsn, end: Lsn, bytes: BoxStream<'static, PortResult<Bytes>>) -> PortResult<Lsn> {
        let LeftoverOf { tenant, branch, timeline, epoch } = of;
        let leftover = LeftoverWal { branch, timeline, epoch, start, end };
        self.pageserver.take_leftover(tenant, leftover, bytes, refusal).await
    }

    async fn close_epoch(&self, tenant: TenantId, timeline: TimelineId, epoch: WriterEpoch, checkpoint: Option<Lsn>) -> PortResult<()> {
        self.pageserver.close_epoch(tenant, timeline, epoch, checkpoint).await.map_err(refusal)
    }

    async fn places(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) -> PortResult<Places> {
        let facts = self.pageserver.directory_facts(tenant, timeline, lsn).await.map_err(refusal)?;
        let varve_pageserver::server::DirectoryFacts { databases, tablespaces, catalog_version, startup_blocks } = facts;
        Ok(Places { databases, tablespaces, catalog_version, startup_blocks })
    }

    async fn put_file(&self, tenant: TenantId, bytes: Vec<u8>) -> PortResult<FileContents> {
        let tenant = self.pageserver.tenants().own(tenant, "a file of it is kept").await.map_err(refusal)?;
        tenant.put_file(bytes).await.map_err(|error| refusal(error.into()))
    }

    async fn get_file(&self, tenant: TenantId, contents: FileContents) -> PortResult<Vec<u8>> {
        let tenant = self.pageserver.tenants().own(tenant, "a file of it is read").await.map_err(refusal)?;
        let read = tokio::task::spawn_blocking(move || tenant.file_contents(&contents)).await.map_err(Refusal::internal)?;
        read.map(Option::unwrap_or_default).map_err(|error| refusal(error.into()))
    }

    async fn kept_wal(&self, tenant: TenantId, timeline: TimelineId) -> PortResult<(Lsn, Vec<WalRange>)> {
        let (head, ranges) = self.pageserver.kept_wal(tenant, timeline).await.map_err(refusal)?;
        let range = |(timeline, range): (TimelineId, varve_engine::timeline::KeptRange)| WalRange {
            timeline,
            start: range.start,
            end: range.end,
            in_store: range.in_store,
        };
        Ok((head, ranges.into_iter().map(range).collect()))
    }

    async fn kept_wal_bytes(&self, tenant: TenantId, timeline: TimelineId, from: Lsn) -> PortResult<Bytes> {
        self.pageserver.kept_wal_bytes(tenant, timeline, from).await.map_err(refusal)
    }

    async fn template_of(&self, pg_version: u32) -> PortResult<Option<Template>> {
        let major = Major::from_number(pg_version).ok_or(ServerError::UnsupportedMajor(pg_version)).map_err(refusal)?;
        let found = self.pageserver.templates().current(major).await.map_err(|error| refusal(error.into()))?;
        Ok(found.as_deref().map(template))
    }

    async fn import_template(&self, pg_version: u32, archive: Bytes) -> PortResult<Template> {
        Ok(template(&*self.pageserver.import_template(pg_version, archive).await.map_err(refusal)?))
    }

    async fn learn_startup_blocks(&self, tenant: TenantId, blocks: Vec<BlockName>) -> PortResult<()> {
        self.pageserver.learn_startup_blocks(tenant, blocks).await.map_err(refusal)
    }

    fn page_service(&self) -> String {
        self.page_service.clone()
    }

    fn store_acknowledgement(&self) -> StoreAcknowledgement {
        let objects = |figures: Figures| {
            let Figures { objects, wal_bytes, stored_bytes, held_objects, deleted_objects, found_bytes, is_failing } = figures;
            let shipped = ShippedWal { objects, wal_bytes, stored_bytes, held_objects, deleted_objects, found_bytes, is_failing };
            StoreAcknowledgement::Objects(shipped)
        };
        self.pageserver.shipped().map_or(StoreAcknowledgement::WalLog, objects)
    }

    fn orphans(&self) -> Vec<OrphanedWal> {
        let orphan = |orphan: varve_pageserver::held_wal::OrphanedWal| {
            let varve_pageserver::held_wal::OrphanedWal { tenant, timeline, problem, .. } = orphan;
            OrphanedWal { tenant, timeline, problem }
        };
        self.pageserver.orphans().into_iter().map(orphan).collect()
    }

    async fn forget_orphans(&self, tenant: TenantId, timeline: Option<TimelineId>) -> usize {
        self.pageserver.forget_orphans(tenant, timeline).await
    }

    async fn forgive(&self, tenant: TenantId) {
        self.pageserver.tenants().forgive(tenant).await;
    }

    fn wal_trouble(&self, tenant: TenantId, timeline: TimelineId) -> Option<String> {
        self.pageserver.wal_trouble(tenant, timeline)
    }

    fn not_kept(&self) -> Option<String> {
        self.pageserver.not_kept()
    }

    fn lost(&self) -> Vec<Lost> {
        let lost = self.pageserver.tenants().lost().into_iter();
        lost.map(|(tenant, owner)| Lost { tenant, name: None, owner: owner.server, url: owner.url }).collect()
    }
}
