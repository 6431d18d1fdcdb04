//! A server's control plane: the real one, over this server's engine, in surroundings of which the seed decides.
//!
//! [`Door`] does over a [`Node`] what `varve`'s door does over a pageserver.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use varve_api::admin::StoreAcknowledgement;
use varve_api::host::BlockName;
use varve_api::{Code, Refusal};
use varve_control::ports::{
    AttachWriter, EpochStart, LeftoverOf, Live, Lost, Moment, OrphanedWal, Pageserver, Places, PortResult, Resolved, Template, WalRange,
};
use varve_control::{Config, Control, Environment, NoRandom, Surroundings};
use varve_engine::moments::MomentError;
use varve_engine::timeline::{Flushed, StreamEnd};
use varve_engine::{EngineError, LiveTimeline, Tenant, resolve};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::chance;
use varve_storage::edit_log::EditLogError;
use varve_storage::ids::{BranchName, TenantId, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{FileContents, TenantError, TenantLog};
use varve_storage::timeline::WaitError;

use crate::judge;
use crate::node::Node;
use crate::threads::Life;
use crate::world::{Plant, World};

/// How long a beginning waits until its base can be read.
const PLACES_WAIT_MAX: Duration = Duration::from_secs(30);

/// The control plane of a simulated server.
pub type Plane = Control<Door>;

/// A server's engine, as its control plane sees it.
pub struct Door {
    world: Arc<World>,
    node: Weak<Node>,
}

/// A control plane for a server that has just started. It ends with the server.
///
/// # Errors
/// None in practice.
pub fn control(world: &Arc<World>, node: &Arc<Node>) -> Result<Arc<Plane>, varve_control::Error> {
    let name = format!("server-{}", node.machine());
    let config = Config { url: format!("http://{name}"), server: name, version: "simulated".to_owned() };
    let door = Door { world: world.clone(), node: Arc::downgrade(node) };
    let surroundings = Given { world: world.clone(), life: node.life().clone() };
    Control::new(Arc::new(door), node.context().store.clone(), config, Environment::new(surroundings))
}

/// What the simulation gives a control plane.
struct Given {
    world: Arc<World>,
    life: Life,
}

impl Surroundings for Given {
    fn now(&self) -> Timestamp {
        self.world.wall_clock()
    }

    fn fill(&self, bytes: &mut [u8]) -> Result<(), NoRandom> {
        chance::fill(bytes).map_err(|error| NoRandom(error.to_string()))
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.life.spawn(task);
    }
}

fn code(error: &EngineError) -> Code {
    match error {
        EngineError::Tenant(TenantError::UnknownBranch(_) | TenantError::UnknownTimeline(_)) => Code::UnknownBranch,
        EngineError::Tenant(TenantError::Removed) => Code::UnknownTenant,
        EngineError::Log(EditLogError::Fenced { .. }) | EngineError::NotOwner { .. } => Code::NotOwner,
        EngineError::Log(EditLogError::Unconfirmed { .. } | EditLogError::Stopped { .. } | EditLogError::Store(_))
        | EngineError::Store(_) => Code::Unavailable,
        EngineError::Wait(WaitError::Deadline { .. } | WaitError::Closing { .. }) | EngineError::TailUnknown { .. } => Code::Unavailable,
        EngineError::EpochOver { .. } | EngineError::BranchMoved { .. } => Code::Fenced,
        EngineError::Moment(MomentError::Future { .. }) => Code::InTheFuture,
        EngineError::Moment(MomentError::BeforeHistory { .. } | MomentError::BeforeTime { .. }) | EngineError::WalNotKept { .. } => {
            Code::NotRetained
        }
        _ => Code::Internal,
    }
}

impl Door {
    fn node(&self) -> PortResult<Arc<Node>> {
        self.node.upgrade().ok_or_else(|| Refusal::unavailable("the server has ended"))
    }

    async fn said<T>(&self, node: &Node, result: Result<T, EngineError>) -> PortResult<T> {
        if let Err(error) = &result {
            judge::engine_error(&self.world, node, error).await;
        }
        result.map_err(|error| Refusal::new(code(&error), error.to_string()))
    }

    async fn tenant(&self) -> PortResult<(Arc<Node>, Arc<Tenant>)> {
        let node = self.node()?;
        let owned = node.own(&self.world).await;
        let tenant = self.said(&node, owned).await?;
        Ok((node, tenant))
    }

    async fn live(&self, timeline: TimelineId) -> PortResult<(Arc<Node>, Arc<Tenant>, Arc<LiveTimeline>)> {
        let (node, tenant) = self.tenant().await?;
        let opened = tenant.timeline(timeline).await;
        let live = self.said(&node, opened).await?;
        Ok((node, tenant, live))
    }
}

impl Pageserver for Door {
    async fn own(&self, _tenant: TenantId, _why: &'static str) -> PortResult<TenantLog> {
        Ok(self.tenant().await?.1.log().clone())
    }

    fn owned(&self, _tenant: TenantId) -> Option<TenantLog> {
        Some(self.node.upgrade()?.owned()?.log().clone())
    }

    async fn adopt(&self, _log: TenantLog) -> PortResult<()> {
        Err(Refusal::unavailable("tenants are not created here"))
    }

    async fn forget(&self, _tenant: TenantId) {}

    async fn remove_timelines(&self, _tenant: TenantId, timelines: Vec<TimelineId>) {
        let Some(tenant) = self.node.upgrade().and_then(|node| node.owned()) else { return };
        for timeline in timelines {
            tenant.remove_timeline(timeline).await;
        }
    }

    async fn collect(&self, _tenant: TenantId) -> PortResult<()> {
        let Some(tenant) = self.node.upgrade().and_then(|node| node.owned()) else { return Ok(()) };
        tenant.collect_everything(self.world.wall_clock()).await.map_err(|error| Refusal::new(code(&error), error.to_string()))
    }

    fn live(&self, _tenant: TenantId, timeline: TimelineId) -> Option<Live> {
        let live = self.node.upgrade()?.owned()?.opened(timeline)?;
        let positions = live.positions();
        Some(Live {
            head: positions.head(),
            applied: positions.applied(),
            layered: positions.layered(),
            size_bytes: live.noted_size(),
            stopped: live.stopped().map(|stopped| stopped.reason.to_string()),
        })
    }

    async fn resolve(&self, _tenant: TenantId, timeline: TimelineId, moment: Moment) -> PortResult<Resolved> {
        let (node, tenant, live) = self.live(timeline).await?;
        let before = (self.world.ledger.lock().acknowledged_end(timeline), live.positions().head());
        let found = resolve::resolve(&live, moment).await;
        let found = self.said(&node, found).await?;
        judge::moment(&self.world, tenant.log(), &live, (moment, before), found).await;
        Ok(found)
    }

    async fn time_at(&self, _tenant: TenantId, at: Resolved) -> PortResult<Option<Timestamp>> {
        let (node, _, live) = self.live(at.timeline).await?;
        let time = resolve::time_at(&live, at.lsn).await;
        self.said(&node, time).await
    }

    async fn begin_epoch(&self, _tenant: TenantId, branch: &BranchName, timeline: TimelineId) -> PortResult<EpochStart> {
        let (node, tenant, live) = self.live(timeline).await?;
        let begun = live.begin_epoch(tenant.log(), branch).await;
        let start = self.said(&node, begun).await?;
        live.flush_soon();
        Ok(EpochStart { epoch: start.epoch, lsn: start.lsn, standby_name: start.standby_name })
    }

    async fn end_stream(&self, _tenant: TenantId, timeline: TimelineId) -> PortResult<()> {
        if self.world.plant == Plant::HostRecordAfterCommit {
            return Ok(()); // in the old order nobody did before the commit
        }
        let (node, _, live) = self.live(timeline).await?;
        let ended = live.end_stream(StreamEnd::Ended).await;
        self.said(&node, ended).await.map(drop)
    }

    async fn attach_writer(&self, writer: AttachWriter) -> PortResult<String> {
        let AttachWriter { branch, timeline, epoch, walsender, flushed, waits_for, .. } = writer;
        let node = self.node()?;
        let Some(compute) = self.world.walsender(&walsender.socket) else {
            return Err(Refusal::unavailable("nobody hands out connections there"));
        };
        if (compute.timeline, compute.epoch) != (timeline, epoch.0) {
            self.world.violate(format!("{} is attached as epoch {} of {timeline}", compute.name(), epoch.0));
        }
        let attached = node.attach(&self.world, &compute, &branch, Flushed { lsn: flushed, waits_for }).await;
        self.said(&node, attached).await
    }

    async fn leftover_start(&self, of: LeftoverOf) -> PortResult<Option<Lsn>> {
        let (node, tenant, live) = self.live(of.timeline).await?;
        let start = live.leftover_start(tenant.log(), &of.branch, of.epoch);
        self.said(&node, start).await
    }

    async fn take_leftover(&self, of: LeftoverOf, start: Lsn, end: Lsn, bytes: BoxStream<'static, PortResult<Bytes>>) -> PortResult<Lsn> {
        let (node, tenant, live) = self.live(of.timeline).await?;
        let taken = async {
            let mut leftover = live.take_leftover(tenant.log(), &of.branch, of.epoch, end).await?;
            let bytes: Vec<Bytes> = bytes.filter_map(|bytes| async { bytes.ok() }).collect().await;
            for mut bytes in bytes {
                bytes.advance(leftover.position().0.saturating_sub(start.0).min(bytes.len() as u64) as usize);
                leftover = leftover.push(bytes).await?;
            }
            Ok(leftover.framed())
        };
        let taken = taken.await;
        self.said(&node, taken).await
    }

    async fn close_epoch(&self, _tenant: TenantId, timeline: TimelineId, epoch: WriterEpoch, checkpoint: Option<Lsn>) -> PortResult<()> {
        let (node, tenant, live) = self.live(timeline).await?;
        let closed = live.close_epoch(tenant.log(), epoch, checkpoint).await;
        self.said(&node, closed).await
    }

    async fn places(&self, _tenant: TenantId, timeline: TimelineId, lsn: Lsn) -> PortResult<Places> {
        let (node, tenant, live) = self.live(timeline).await?;
        let applied = live.wait_applied(lsn, PLACES_WAIT_MAX).await.map_err(EngineError::from);
        self.said(&node, applied).await?;
        let catalog_version = tenant.template().facts().cluster.catalog_version;
        Ok(Places { databases: Vec::new(), tablespaces: Vec::new(), catalog_version, startup_blocks: Vec::new() })
    }

    async fn put_file(&self, _tenant: TenantId, bytes: Vec<u8>) -> PortResult<FileContents> {
        let (node, tenant) = self.tenant().await?;
        let put = tenant.put_file(bytes).await;
        self.said(&node, put).await
    }

    async fn get_file(&self, _tenant: TenantId, contents: FileContents) -> PortResult<Vec<u8>> {
        let (node, tenant) = self.tenant().await?;
        let got = tenant.file_contents(&contents).map(Option::unwrap_or_default);
        self.said(&node, got).await
    }

    async fn kept_wal(&self, _tenant: TenantId, _timeline: TimelineId) -> PortResult<(Lsn, Vec<WalRange>)> {
        Err(Refusal::new(Code::NotRetained, "simulated WAL carries no pages"))
    }

    async fn kept_wal_bytes(&self, _tenant: TenantId, _timeline: TimelineId, _from: Lsn) -> PortResult<Bytes> {
        Err(Refusal::new(Code::NotRetained, "simulated WAL carries no pages"))
    }

    async fn template_of(&self, _pg_version: u32) -> PortResult<Option<Template>> {
        Ok(None)
    }

    async fn import_template(&self, _pg_version: u32, _archive: Bytes) -> PortResult<Template> {
        Err(Refusal::new(Code::HostUnfit, "simulated hosts have no initdb"))
    }

    async fn learn_startup_blocks(&self, _tenant: TenantId, _blocks: Vec<BlockName>) -> PortResult<()> {
        Ok(())
    }

    fn page_service(&self) -> String {
        "simulated:1".to_owned()
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

    async fn forgive(&self, _tenant: TenantId) {
        if let Some(node) = self.node.upgrade() {
            node.forgive();
        }
    }

    fn lost(&self) -> Vec<Lost> {
        let is_lost = self.node.upgrade().is_some_and(|node| node.has_lost());
        let lost = Lost { tenant: self.world.tenant, name: None, owner: "the other server".to_owned(), url: None };
        is_lost.then_some(lost).into_iter().collect()
    }
}
