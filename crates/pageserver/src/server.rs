//! The pageserver put together: what the control plane can ask of it.
//!
//! [`Pageserver`] holds what all tenants share (store, WAL log, caches, work queue, templates), the tenants that it
//! owns ([`crate::tenants`]), and the receivers of their computes' WAL ([`crate::writers`]). At start and from then on
//! it opens what its WAL log holds WAL of, so that this gets into the store, and lets go of what the tenants' logs say
//! is not needed. WAL of a tenant or timeline that no log in the store knows is kept, and told of: it is evidence that
//! the store lost something.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::{Stream, StreamExt as _, stream};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use varve_engine::resolve::{Moment, Resolved, resolve, time_at};
use varve_engine::shipping::{self, Figures, Shipping};
use varve_engine::template::{StartupBlock, Template, Templates};
use varve_engine::timeline::KeptRange;
use varve_engine::work_queue::Places;
use varve_engine::{Context, EngineError, EpochStart, LiveTimeline, StreamEnd, Tenant, WorkQueue, catalog, histories};
use varve_postgres::{Lsn, Major, Timestamp};
use varve_storage::ids::{BranchName, TenantId, TimelineId, WalLogId, WriterEpoch};
use varve_storage::kept_wal::KeptWalError;
use varve_storage::shared_wal::Archive;
use varve_storage::store::Store;
use varve_storage::threads::{RuntimeThreads, Threads};
use varve_storage::wal_log::WalLog;

use crate::ending;
use crate::error::ServerError;
use crate::held_wal::OrphanedWal;
use crate::ship_wal::ShipWal;
use crate::tenants::{Identity, Tenants};
use crate::wall_clock;
use crate::writers::{Writer, Writers};

/// How often it is looked for tenants that others took over, and for timelines and tenants that nobody has use for.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_secs(2);
/// How long a compute's first read waits for ingest.
const PLACES_WAIT_MAX: Duration = Duration::from_secs(120);
/// How long the list of kept WAL waits for ingest, which knows which records carry their pages.
const KEPT_WAL_WAIT_MAX: Duration = Duration::from_secs(60);
/// Largest data directory that a host may send, uncompressed.
const TEMPLATE_BYTES_MAX: u64 = 1 << 30;
/// How long a server that stops tries to write down figures.
const FIGURES_MAX: Duration = Duration::from_secs(5);
/// Ranges that an error names at most.
const RANGES_NAMED_MAX: usize = 8;

/// What a pageserver is started with.
#[derive(Clone, Debug)]
pub struct PageserverConfig {
    /// Its own folder: WAL log and caches.
    pub data: PathBuf,
    /// The store.
    pub store: Store,
    /// Address of the admin API, which the logs of the tenants that it owns name.
    pub url: String,
    /// Bytes that the WAL log may hold.
    pub wal_log_limit_bytes: u64,
    /// When WAL goes to the store before layers do.
    pub ship_wal: ShipWal,
    /// Bytes for caches of pages and blocks.
    pub cache_bytes: u64,
    /// Bytes for what is not in layers yet, of all timelines.
    pub memtable_bytes: u64,
    /// After so long without use timelines are closed, and tenants put to sleep.
    pub idle: Duration,
}

/// What is left in the `pg_wal` of a compute whose processes were killed.
#[derive(Clone, Debug)]
pub struct LeftoverWal {
    /// The compute's branch.
    pub branch: BranchName,
    /// The timeline that it wrote.
    pub timeline: TimelineId,
    /// Its epoch.
    pub epoch: WriterEpoch,
    /// Where the bytes begin.
    pub start: Lsn,
    /// Where the last whole record ends.
    pub end: Lsn,
}

/// What a mount must know of a data directory before it has read any of it.
#[derive(Clone, Debug)]
pub struct DirectoryFacts {
    /// Databases, each (tablespace, database).
    pub databases: Vec<(u32, u32)>,
    /// Tablespaces but for the two default ones.
    pub tablespaces: Vec<(u32, String)>,
    /// Postgres's catalog version.
    pub catalog_version: u32,
    /// Blocks that a start reads.
    pub startup_blocks: Vec<StartupBlock>,
}

/// See the module's doc.
#[derive(Debug)]
pub struct Pageserver {
    config: PageserverConfig,
    pub(crate) context: Arc<Context>,
    templates: Arc<Templates>,
    pub(crate) tenants: Tenants,
    writers: Writers,
    pub(crate) orphans: Mutex<Vec<OrphanedWal>>,
    stopping: CancellationToken,
}

impl Pageserver {
    /// Opens everything: probes the store, opens the WAL log, opens what that holds.
    ///
    /// # Errors
    /// [`ServerError`] with what is wrong and what to do.
    pub async fn open(config: PageserverConfig) -> Result<Arc<Pageserver>, ServerError> {
        let threads: Arc<dyn Threads> = Arc::new(RuntimeThreads::new(tokio::runtime::Handle::current()));
        let (wal, wal_log, cache_dir, ships) = {
            let (folder, limit) = (config.data.join("wal"), config.wal_log_limit_bytes);
            let (cache_dir, store, ship_wal) = (config.data.join("layers"), config.store.clone(), config.ship_wal);
            let open = move || -> Result<(WalLog, WalLogId, PathBuf, bool), ServerError> {
                let wal = WalLog::open(&folder, limit)?;
                std::fs::create_dir_all(&cache_dir).map_err(ServerError::file(&cache_dir))?;
                let ships = ship_wal.applies(&folder, &store).map_err(ServerError::file(&folder))?;
                Ok((wal, wal_log_id(&folder)?, cache_dir, ships))
            };
            threads.call(open).await??
        };
        config.store.probe().await?;
        let resources = histories::resources(&config.store, &threads, cache_dir, config.cache_bytes, config.memtable_bytes);
        let queue = WorkQueue::new(Places::default(), threads.clone());
        let store = config.store.clone();
        let context = Arc::new(Context {
            wal: Arc::new(wal),
            wal_log,
            archive: Archive::new(store.clone()),
            store,
            resources: Arc::new(resources),
            threads,
            queue,
            shipping: Shipping::new(ships),
            lost: Default::default(),
        });
        let templates = Arc::new(Templates::new(config.store.clone()));
        let identity = Identity { server: wal_log.to_string(), url: config.url.clone() };
        let tenants = Tenants::new(context.clone(), templates.clone(), identity);
        let stopping = CancellationToken::new();
        let (writers, orphans) = (Writers::default(), Mutex::default());
        let pageserver = Arc::new(Pageserver { config, context, templates, tenants, writers, orphans, stopping });
        pageserver.settle_held().await;
        Ok(pageserver)
    }

    /// Runs what goes on beside requests, until [`Pageserver::stop`].
    pub async fn run(&self) {
        let timer = WorkQueue::run_timer(Arc::downgrade(&self.context.queue));
        let ship = shipping::run(self.context.clone());
        tokio::pin!(timer, ship);
        // None waits for another one, least of all the timer.
        let others = async { tokio::join!(self.keep_lost_out(), self.keep_swept(), self.keep_settled(), self.tenants.keep_collected()) };
        tokio::select! {
            biased;
            () = self.stopping.cancelled() => {}
            () = &mut timer => {}
            () = &mut ship => {}
            _ = others => {}
        }
        // Flushes still need the timer until all is in the store, and commits what ships.
        tokio::join!(timer, ship);
    }

    /// Lets go of tenants whose logs or manifests said that they are another server's.
    async fn keep_lost_out(&self) {
        loop {
            let lost = self.context.lost.take().await;
            let lose = |(tenant, generation)| self.tenants.lose_generation(tenant, generation);
            stream::iter(lost).for_each_concurrent(None, lose).await;
        }
    }

    /// Looks from time to time for tenants that others took over, and for what nobody has use for.
    async fn keep_swept(&self) {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            self.tenants.find_lost().await;
            self.tenants.sweep(self.config.idle).await;
        }
    }

    /// What was shipped to the store, if WAL is.
    pub fn shipped(&self) -> Option<Figures> {
        Some(self.context.shipping.figures()).filter(|_| self.context.shipping.is_on())
    }

    /// Puts everything into the store and ends all work. Computes go on without us.
    pub async fn stop(&self) {
        for tenant in self.tenants.all_awake() {
            for live in tenant.all_opened() {
                ending::put_away(&live).await;
            }
            // They are worth a moment only.
            if tokio::time::timeout(FIGURES_MAX, tenant.note_figures(Duration::ZERO)).await.is_err() {
                tracing::warn!("figures of a tenant's size are not in the store");
            }
        }
        self.stopping.cancel();
        self.tenants.close().await;
    }

    /// Which tenants it owns.
    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// Its templates.
    pub fn templates(&self) -> &Templates {
        &self.templates
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.context.store
    }

    /// The id of its WAL log, which is its name among servers.
    pub fn id(&self) -> WalLogId {
        self.context.wal_log
    }

    /// Bytes of the WAL log.
    pub fn wal_log_bytes(&self) -> u64 {
        self.context.wal.bytes()
    }

    /// Why the WAL of a timeline's compute does not come in, if there is something to tell.
    pub fn wal_trouble(&self, tenant: TenantId, timeline: TimelineId) -> Option<String> {
        self.writers.trouble(tenant, timeline)
    }

    /// Why WAL that came cannot be kept here: a full disk, mostly.
    pub fn not_kept(&self) -> Option<String> {
        self.writers.not_kept()
    }

    /// Computes whose WAL is received.
    pub fn writer_count(&self) -> usize {
        self.writers.count()
    }

    async fn live(&self, tenant: TenantId, timeline: TimelineId, why: &str) -> Result<(Arc<Tenant>, Arc<LiveTimeline>), ServerError> {
        let tenant = self.tenants.own(tenant, why).await?;
        let live = tenant.timeline(timeline).await?;
        Ok((tenant, live))
    }

    /// The same to read: another server's tenant is not taken for that.
    async fn live_to_read(&self, tenant: TenantId, timeline: TimelineId, why: &str) -> Result<Arc<LiveTimeline>, ServerError> {
        Ok(self.tenants.own_if_ours(tenant, why).await?.timeline(timeline).await?)
    }

    /// A timeline if it is open.
    pub fn opened(&self, tenant: TenantId, timeline: TimelineId) -> Option<Arc<LiveTimeline>> {
        self.tenants.awake(tenant)?.opened(timeline)
    }

    /// Stops timelines that the log no longer has, and removes what is stored of them.
    pub async fn remove_timelines(&self, tenant: TenantId, timelines: Vec<TimelineId>) {
        let Some(tenant) = self.tenants.awake(tenant) else { return };
        for timeline in timelines {
            tenant.remove_timeline(timeline).await;
        }
    }

    /// Stops a tenant's timelines and forgets it and its WAL: it was deleted. `timelines` are all that its log had.
    pub async fn forget(&self, tenant: TenantId, timelines: Vec<TimelineId>) {
        self.tenants.forget(tenant).await;
        self.context.forget_wal(tenant, timelines).await;
    }

    /// Collects what a tenant need not keep any more, and waits until that is done.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn collect(&self, tenant: TenantId) -> Result<(), ServerError> {
        let tenant = self.tenants.own(tenant, "its history is collected").await?;
        Ok(tenant.collect_everything(wall_clock::now()).await?)
    }

    /// The boundary that a moment of a timeline is.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn resolve(&self, tenant: TenantId, timeline: TimelineId, moment: Moment) -> Result<Resolved, ServerError> {
        let tenant = self.tenants.own_if_ours(tenant, "a moment of it is asked for").await?;
        // A time before the tenant was there is before history, even where no transaction says so.
        if let Moment::Time(at) = moment
            && at.0 < tenant.facts().created
        {
            return Err(EngineError::from(varve_engine::moments::MomentError::BeforeTime { at }).into());
        }
        let live = tenant.timeline(timeline).await?;
        Ok(resolve(&live, moment).await?)
    }

    /// When the last transaction before a boundary ended.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn time_at(&self, tenant: TenantId, at: Resolved) -> Result<Option<Timestamp>, ServerError> {
        let live = self.live_to_read(tenant, at.timeline, "a moment of it is asked for").await?;
        Ok(time_at(&live, at.lsn).await?)
    }

    /// Begins the next writer epoch at head, if `branch` still points to `timeline`.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn begin_epoch(&self, tenant: TenantId, branch: &BranchName, timeline: TimelineId) -> Result<EpochStart, ServerError> {
        let (tenant, live) = self.live(tenant, timeline, "a compute begins").await?;
        if let Some(stopped) = live.stopped() {
            let wait = varve_storage::timeline::WaitError::Stopped { timeline, lsn: live.positions().head(), stopped };
            return Err(EngineError::Wait(wait).into()); // waiting will not help
        }
        let start = live.begin_epoch(tenant.log(), branch).await?;
        // What this timeline did not put into the store yet is only here: see to it that this does not stay so.
        live.flush_soon();
        Ok(start)
    }

    /// Ends the newest epoch's stream without beginning another.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn end_stream(&self, tenant: TenantId, timeline: TimelineId) -> Result<(), ServerError> {
        let (_, live) = self.live(tenant, timeline, "its compute is to write no more").await?;
        live.end_stream(StreamEnd::Ended).await?;
        Ok(())
    }

    /// Takes WAL from a compute. Gives the standby name that it must wait for.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn attach_writer(&self, tenant: TenantId, timeline: TimelineId, writer: Writer) -> Result<String, ServerError> {
        let (tenant, live) = self.live(tenant, timeline, "a compute attaches").await?;
        self.writers.attach(&tenant, &live, writer).await
    }

    /// Where what is left in the `pg_wal` of epoch `epoch`'s compute would go on; none when it does not count any more.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn leftover_start(
        &self,
        tenant: TenantId,
        branch: &BranchName,
        timeline: TimelineId,
        epoch: WriterEpoch,
    ) -> Result<Option<Lsn>, ServerError> {
        let tenant = self.tenants.own(tenant, "a compute has WAL left").await?;
        if tenant.log().state().timeline(timeline).is_err() {
            return Ok(None); // it was deleted
        }
        let live = tenant.timeline(timeline).await?;
        Ok(live.leftover_start(tenant.log(), branch, epoch)?)
    }

    /// Takes what is left in a compute's `pg_wal`. The returned position is durable.
    ///
    /// # Errors
    /// What `failed` makes of a [`ServerError`]; what the sender's bytes end with. What came before counts.
    pub async fn take_leftover<E>(
        &self,
        tenant: TenantId,
        leftover: LeftoverWal,
        bytes: impl Stream<Item = Result<Bytes, E>> + Send,
        failed: impl Fn(ServerError) -> E + Copy,
    ) -> Result<Lsn, E> {
        let LeftoverWal { branch, timeline, epoch, start, end } = leftover;
        let (tenant, live) = self.live(tenant, timeline, "a compute has WAL left").await.map_err(failed)?;
        let stream = live.take_leftover(tenant.log(), &branch, epoch, end).await;
        let mut stream = stream.map_err(|error| failed(error.into()))?;
        let mut at = start;
        let mut bytes = std::pin::pin!(bytes);
        while let Some(next) = bytes.next().await {
            let mut next = next?;
            // What is here already is not needed again.
            let known = stream.position().0.saturating_sub(at.0).min(next.len() as u64);
            at += next.len() as u64;
            next.advance(known as usize);
            if !next.is_empty() {
                if at.0 - next.len() as u64 > stream.position().0 {
                    return Err(failed(ServerError::LeftoverGap { timeline, start, head: stream.position() }));
                }
                stream = stream.push(next).await.map_err(|error| failed(error.into()))?;
            }
        }
        let framed = stream.framed();
        // Only then may its host forget it.
        live.wait_tail().await.map_err(|error| failed(error.into()))?;
        tracing::info!(timeline = live.name(), %framed, "what a compute that was killed had in its pg_wal is here");
        Ok(framed)
    }

    /// The compute of epoch `epoch` ended cleanly after it sent all its WAL.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn close_epoch(
        &self,
        tenant: TenantId,
        timeline: TimelineId,
        epoch: WriterEpoch,
        checkpoint: Option<Lsn>,
    ) -> Result<(), ServerError> {
        let (tenant, live) = self.live(tenant, timeline, "a compute ended").await?;
        live.close_epoch(tenant.log(), epoch, checkpoint).await?;
        tenant.note_figures(Duration::ZERO).await;
        Ok(())
    }

    /// What a mount of a timeline at `lsn` must know.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn directory_facts(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) -> Result<DirectoryFacts, ServerError> {
        let (tenant, live) = self.live(tenant, timeline, "a compute begins").await?;
        live.wait_applied(lsn, PLACES_WAIT_MAX).await.map_err(EngineError::from)?;
        let read = {
            let live = live.clone();
            move || {
                let history = &**live.history();
                Ok::<_, EngineError>((catalog::databases(history, lsn)?, catalog::tablespaces(history, lsn)?))
            }
        };
        let (databases, tablespaces) = self.context.threads.call(read).await??;
        let template = tenant.template();
        let catalog_version = template.facts().cluster.catalog_version;
        Ok(DirectoryFacts { databases, tablespaces, catalog_version, startup_blocks: template.startup_blocks() })
    }

    /// Where there is WAL of a timeline and its ancestors of which redo can be checked, ascending, each with its
    /// timeline; and its head.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn kept_wal(&self, tenant: TenantId, timeline: TimelineId) -> Result<(Lsn, Vec<(TimelineId, KeptRange)>), ServerError> {
        let live = self.live_to_read(tenant, timeline, "its WAL is asked for").await?;
        let head = live.positions().head();
        match live.wait_applied(head, KEPT_WAL_WAIT_MAX).await {
            // What stopped ingest may be the very thing that is looked for.
            Err(error) if live.stopped().is_none() => return Err(EngineError::from(error).into()),
            _ => {}
        }
        let ranges = self.wal_ranges(&live, head).await?;
        Ok((head, ranges))
    }

    /// That WAL from `from` on: at least a byte.
    ///
    /// # Errors
    /// [`EngineError::WalNotKept`] where it is not kept, [`varve_engine::moments::MomentError::Future`] where there is
    /// none yet.
    pub async fn kept_wal_bytes(&self, tenant: TenantId, timeline: TimelineId, from: Lsn) -> Result<Bytes, ServerError> {
        let live = self.live_to_read(tenant, timeline, "its WAL is asked for").await?;
        let head = live.positions().head();
        if from >= head {
            return Err(EngineError::from(varve_engine::moments::MomentError::Future { lsn: from, end: head }).into());
        }
        if let Some((owner, limit)) = live.owners(head).into_iter().find(|(owner, _)| owner.facts().start <= from) {
            let bytes = self.context.threads.call(move || owner.wal_bytes(from, limit)).await?.map_err(EngineError::from)?;
            if let Some(bytes) = bytes {
                return Ok(bytes);
            }
        }
        Err(EngineError::WalNotKept { lsn: from, what_there_is: named(&self.wal_ranges(&live, head).await?) }.into())
    }

    /// Where there is kept WAL below `head` on a timeline and its ancestors, ascending.
    async fn wal_ranges(&self, live: &Arc<LiveTimeline>, head: Lsn) -> Result<Vec<(TimelineId, KeptRange)>, ServerError> {
        let owners = live.owners(head);
        let look = move || {
            let mut all = Vec::new();
            for (owner, limit) in owners.iter().rev() {
                all.extend(owner.wal_ranges(*limit)?.into_iter().map(|range| (owner.id(), range)));
            }
            Ok::<_, KeptWalError>(all)
        };
        Ok(self.context.threads.call(look).await?.map_err(EngineError::from)?)
    }

    /// Takes what a host's `initdb` made, a tar of the data directory compressed with zstd, as the template of its
    /// major.
    ///
    /// # Errors
    /// When it is not what it should be, or the store does not take it.
    pub async fn import_template(&self, pg_version: u32, archive: Bytes) -> Result<Arc<Template>, ServerError> {
        let major = Major::from_number(pg_version).ok_or(ServerError::UnsupportedMajor(pg_version))?;
        let folder = self.config.data.clone();
        let unpacked = self.context.threads.call(move || unpack(&folder, &archive)).await??;
        let template = self.templates.import(&self.context, major, unpacked.path()).await?;
        tracing::info!(pg_version, template = template.name(), "template made");
        // Deleting takes a while, too.
        self.context.threads.run(Box::new(move || drop(unpacked)));
        Ok(template)
    }

    /// Keeps which blocks a start of a tenant's Postgres read.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn learn_startup_blocks(&self, tenant: TenantId, blocks: Vec<StartupBlock>) -> Result<(), ServerError> {
        let Some(tenant) = self.tenants.awake(tenant) else { return Ok(()) };
        Ok(self.templates.learn_startup_blocks(tenant.template(), blocks).await?)
    }
}

/// Ranges in words.
fn named(ranges: &[(TimelineId, KeptRange)]) -> String {
    let why = "layers have what it did to pages, and only WAL written with wal_consistency_checking is kept besides; there is";
    let shown: Vec<String> = ranges.iter().take(RANGES_NAMED_MAX).map(|(_, range)| format!("{} to {}", range.start, range.end)).collect();
    match ranges.len().saturating_sub(RANGES_NAMED_MAX) {
        _ if ranges.is_empty() => format!("{why} none of that"),
        0 => format!("{why} {}", shown.join(", ")),
        more => format!("{why} {} and {more} more", shown.join(", ")),
    }
}

/// Takes a host's archive apart, in a temporary folder below `folder`.
fn unpack(folder: &Path, archive: &[u8]) -> Result<tempfile::TempDir, ServerError> {
    let wrong = |error: std::io::Error| ServerError::Archive(error.to_string());
    let target = tempfile::Builder::new().prefix("template-").tempdir_in(folder).map_err(ServerError::file(folder))?;
    let bytes = zstd::Decoder::new(archive).map_err(wrong)?.take(TEMPLATE_BYTES_MAX);
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().map_err(wrong)? {
        let mut entry = entry.map_err(wrong)?;
        let kind = entry.header().entry_type();
        if !kind.is_dir() && !kind.is_file() {
            let path = entry.path().map_err(wrong)?.display().to_string();
            return Err(ServerError::Archive(format!("{path} is neither a file nor a folder")));
        }
        // Refuses what would lie outside.
        if !entry.unpack_in(target.path()).map_err(wrong)? {
            return Err(ServerError::Archive("a path in it leads out of it".to_owned()));
        }
    }
    Ok(target)
}

/// The identity of the WAL log in a folder, made with the log.
fn wal_log_id(folder: &Path) -> Result<WalLogId, ServerError> {
    let path = folder.join("id");
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| ServerError::WalLogId(path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = WalLogId::random()?;
            let write = || -> std::io::Result<()> {
                use std::io::Write as _;
                let temporary = folder.join("id.new");
                let mut file = std::fs::File::create(&temporary)?;
                writeln!(file, "{id}")?;
                file.sync_all()?;
                std::fs::rename(&temporary, &path)?;
                std::fs::File::open(folder)?.sync_all()
            };
            write().map_err(ServerError::file(&path))?;
            Ok(id)
        }
        Err(error) => Err(ServerError::file(path)(error)),
    }
}
