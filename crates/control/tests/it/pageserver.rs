//! A pageserver without pages: it owns tenants, begins and ends epochs in their logs, and remembers what it was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use varve_api::admin::StoreAcknowledgement;
use varve_api::host::BlockName;
use varve_api::{Code, Refusal};
use varve_control::ports::{
    AttachWriter, EpochStart, LeftoverOf, Live, Lost, Moment, OrphanedWal, Pageserver, Places, PortResult, Resolved, Template, WalRange,
};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::edit_log::CommitError;
use varve_storage::ids::{BranchName, TenantId, TimelineId, WalLogId, WriterEpoch};
use varve_storage::store::Store;
use varve_storage::tenant_log::{FileContents, TenantEdit, TenantLog, TenantState, take_over};

/// Where templates end.
pub(crate) const TEMPLATE_END: Lsn = Lsn(0x100_0000);

/// See the module's doc.
pub(crate) struct FakePageserver {
    store: Store,
    name: String,
    url: String,
    owned: Mutex<BTreeMap<TenantId, TenantLog>>,
    lost: Mutex<Vec<Lost>>,
    templates: Mutex<BTreeSet<u32>>,
    /// Streams that run: timeline, epoch.
    streams: Mutex<BTreeMap<TimelineId, WriterEpoch>>,
    /// What it was asked to do, in order.
    pub(crate) asked: Mutex<Vec<String>>,
    /// What each timeline's head is beyond its start.
    pub(crate) written: Mutex<BTreeMap<TimelineId, u64>>,
    /// Epochs cannot be closed: not everything arrived.
    pub(crate) cannot_close: AtomicBool,
    /// `end_stream` never answers, as if the process died.
    pub(crate) dies_in_end_stream: AtomicBool,
}

fn refused(code: Code, what: &str) -> Refusal {
    Refusal::new(code, what)
}

impl FakePageserver {
    pub(crate) fn new(store: Store, name: &str) -> Arc<FakePageserver> {
        Arc::new(FakePageserver {
            store,
            name: name.to_owned(),
            url: format!("http://{name}:9898"),
            owned: Mutex::default(),
            lost: Mutex::default(),
            templates: Mutex::new(BTreeSet::from([15])),
            streams: Mutex::default(),
            asked: Mutex::default(),
            written: Mutex::default(),
            cannot_close: AtomicBool::new(false),
            dies_in_end_stream: AtomicBool::new(false),
        })
    }

    fn note(&self, what: String) {
        self.asked.lock().push(what);
    }

    /// How often it was asked for something that begins so.
    pub(crate) fn times(&self, what: &str) -> usize {
        self.asked.lock().iter().filter(|asked| asked.starts_with(what)).count()
    }

    /// The epoch whose stream runs on a timeline.
    pub(crate) fn stream(&self, timeline: TimelineId) -> Option<WriterEpoch> {
        self.streams.lock().get(&timeline).copied()
    }

    /// It learns that another server has the tenant.
    pub(crate) fn loses(&self, tenant: TenantId, to: &FakePageserver) {
        self.owned.lock().remove(&tenant);
        self.lost.lock().push(Lost { tenant, name: None, owner: to.name.clone(), url: Some(to.url.clone()) });
    }

    fn log(&self, tenant: TenantId) -> PortResult<TenantLog> {
        self.owned(tenant).ok_or_else(|| refused(Code::NotOwner, "it is not owned here"))
    }

    fn head(&self, state: &TenantState, timeline: TimelineId) -> PortResult<Lsn> {
        let facts = &state.timeline(timeline).map_err(|_| refused(Code::UnknownBranch, "no such timeline"))?.facts;
        Ok(Lsn(facts.start.0 + self.written.lock().get(&timeline).copied().unwrap_or(0)))
    }
}

impl Pageserver for FakePageserver {
    async fn own(&self, tenant: TenantId, why: &'static str) -> PortResult<TenantLog> {
        if let Some(log) = self.owned(tenant) {
            return Ok(log);
        }
        self.note(format!("own {tenant}: {why}"));
        let taken = take_over(&self.store, tenant, &self.name, &self.url).await.map_err(Refusal::unavailable)?;
        let log = taken.filter(|log| !log.state().is_removed()).ok_or_else(|| refused(Code::UnknownTenant, "no such tenant"))?;
        self.owned.lock().insert(tenant, log.clone());
        self.lost.lock().retain(|lost| lost.tenant != tenant);
        Ok(log)
    }

    fn owned(&self, tenant: TenantId) -> Option<TenantLog> {
        self.owned.lock().get(&tenant).cloned()
    }

    async fn adopt(&self, log: TenantLog) -> PortResult<()> {
        let tenant = log.state().facts().map(|facts| facts.id);
        self.owned.lock().insert(tenant.ok_or_else(|| refused(Code::Internal, "a tenant without facts"))?, log);
        Ok(())
    }

    async fn forget(&self, tenant: TenantId) {
        self.owned.lock().remove(&tenant);
    }

    async fn remove_timelines(&self, _tenant: TenantId, timelines: Vec<TimelineId>) {
        timelines.iter().for_each(|timeline| self.note(format!("remove {timeline}")));
    }

    async fn collect(&self, tenant: TenantId) -> PortResult<()> {
        self.note(format!("collect {tenant}"));
        Ok(())
    }

    fn live(&self, tenant: TenantId, timeline: TimelineId) -> Option<Live> {
        self.stream(timeline)?;
        let head = self.head(&self.owned(tenant)?.state(), timeline).ok()?;
        Some(Live { head, applied: head, layered: head, size_bytes: Some(8192), stopped: None })
    }

    async fn resolve(&self, tenant: TenantId, timeline: TimelineId, moment: Moment) -> PortResult<Resolved> {
        let state = self.log(tenant)?.state();
        let head = self.head(&state, timeline)?;
        match moment {
            Moment::Head => Ok(Resolved { timeline, lsn: head }),
            Moment::Lsn(lsn) if lsn > head => Err(refused(Code::InTheFuture, "in the future")),
            Moment::Lsn(lsn) => {
                let ancestry = state.ancestry(timeline).map_err(Refusal::internal)?;
                let own = ancestry.iter().find(|(state, _)| state.facts.start <= lsn);
                let found = own.ok_or_else(|| refused(Code::NotRetained, "before history"))?;
                Ok(Resolved { timeline: found.0.facts.id, lsn })
            }
            Moment::Time(_) => Err(refused(Code::NotRetained, "no transaction is that old")),
        }
    }

    async fn time_at(&self, _tenant: TenantId, _at: Resolved) -> PortResult<Option<Timestamp>> {
        Ok(None)
    }

    async fn begin_epoch(&self, tenant: TenantId, branch: &BranchName, timeline: TimelineId) -> PortResult<EpochStart> {
        let log = self.log(tenant)?;
        let lsn = self.head(&log.state(), timeline)?;
        let begun = log.commit(|state| {
            let known = state.branch(branch.as_str()).ok().filter(|known| known.facts.id == timeline);
            let known = known.ok_or_else(|| refused(Code::Fenced, "the branch points elsewhere"))?;
            let epoch = WriterEpoch(known.epochs.last().map_or(1, |last| last.epoch.0 + 1));
            let edit = TenantEdit::Epoch { timeline, epoch, lsn, wal_log: WalLogId([1; 16]) };
            Ok::<_, Refusal>((vec![edit], epoch))
        });
        let epoch = begun.await.map_err(|error| match error {
            CommitError::Refused(refusal) => refusal,
            CommitError::Log(error) => Refusal::unavailable(error),
        })?;
        self.note(format!("begin {branch} {timeline} {epoch}"));
        self.streams.lock().remove(&timeline);
        Ok(EpochStart { epoch, lsn, standby_name: format!("standby_{epoch}") })
    }

    async fn end_stream(&self, _tenant: TenantId, timeline: TimelineId) -> PortResult<()> {
        self.note(format!("end_stream {timeline}"));
        self.streams.lock().remove(&timeline);
        if self.dies_in_end_stream.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn attach_writer(&self, writer: AttachWriter) -> PortResult<String> {
        let state = self.log(writer.tenant)?.state();
        let known = state.branch(writer.branch.as_str()).ok().filter(|known| known.facts.id == writer.timeline);
        let newest = known.and_then(|known| known.epochs.last()).filter(|last| last.epoch == writer.epoch);
        newest.ok_or_else(|| refused(Code::Fenced, "a later epoch has begun, or the branch moved"))?;
        self.note(format!("attach {} {} {}", writer.branch, writer.timeline, writer.epoch));
        self.streams.lock().insert(writer.timeline, writer.epoch);
        Ok(format!("standby_{}", writer.epoch))
    }

    async fn leftover_start(&self, _of: LeftoverOf) -> PortResult<Option<Lsn>> {
        Ok(None)
    }

    async fn take_leftover(
        &self,
        of: LeftoverOf,
        _start: Lsn,
        _end: Lsn,
        _bytes: BoxStream<'static, PortResult<Bytes>>,
    ) -> PortResult<Lsn> {
        Err(Refusal::new(Code::Fenced, format!("{of:?} has none")))
    }

    async fn close_epoch(&self, tenant: TenantId, timeline: TimelineId, epoch: WriterEpoch, _checkpoint: Option<Lsn>) -> PortResult<()> {
        if self.cannot_close.load(Ordering::SeqCst) {
            return Err(refused(Code::Internal, "the last WAL has not arrived"));
        }
        let log = self.log(tenant)?;
        let lsn = self.head(&log.state(), timeline)?;
        self.streams.lock().remove(&timeline);
        log.push(vec![TenantEdit::EpochClosed { timeline, epoch, lsn }]).await.map_err(Refusal::unavailable)
    }

    async fn places(&self, _tenant: TenantId, _timeline: TimelineId, _lsn: Lsn) -> PortResult<Places> {
        Ok(Places { databases: vec![(1663, 5)], tablespaces: vec![], catalog_version: 1, startup_blocks: vec![] })
    }

    async fn put_file(&self, _tenant: TenantId, bytes: Vec<u8>) -> PortResult<FileContents> {
        Ok(FileContents::Inline(bytes))
    }

    async fn get_file(&self, _tenant: TenantId, contents: FileContents) -> PortResult<Vec<u8>> {
        match contents {
            FileContents::Inline(bytes) => Ok(bytes),
            FileContents::Object { .. } | FileContents::Removed => Ok(Vec::new()),
        }
    }

    async fn kept_wal(&self, tenant: TenantId, timeline: TimelineId) -> PortResult<(Lsn, Vec<WalRange>)> {
        Ok((self.head(&self.log(tenant)?.state(), timeline)?, vec![]))
    }

    async fn kept_wal_bytes(&self, _tenant: TenantId, _timeline: TimelineId, _from: Lsn) -> PortResult<Bytes> {
        Err(refused(Code::NotRetained, "none is kept"))
    }

    async fn template_of(&self, pg_version: u32) -> PortResult<Option<Template>> {
        let found = self.templates.lock().contains(&pg_version);
        Ok(found.then(|| Template { name: format!("t{pg_version}"), pg_version, end: TEMPLATE_END }))
    }

    async fn import_template(&self, pg_version: u32, archive: Bytes) -> PortResult<Template> {
        self.note(format!("import {pg_version} {} bytes", archive.len()));
        self.templates.lock().insert(pg_version);
        Ok(Template { name: format!("t{pg_version}"), pg_version, end: TEMPLATE_END })
    }

    async fn learn_startup_blocks(&self, _tenant: TenantId, blocks: Vec<BlockName>) -> PortResult<()> {
        self.note(format!("learn {}", blocks.len()));
        Ok(())
    }

    fn page_service(&self) -> String {
        "127.0.0.1:6400".to_owned()
    }

    fn store_acknowledgement(&self) -> StoreAcknowledgement {
        StoreAcknowledgement::WalLog
    }

    fn orphans(&self) -> Vec<OrphanedWal> {
        Vec::new()
    }

    async fn forget_orphans(&self, _tenant: TenantId, _timeline: Option<TimelineId>) -> usize {
        0
    }

    async fn forgive(&self, _tenant: TenantId) {}

    fn lost(&self) -> Vec<Lost> {
        self.lost.lock().clone()
    }
}
