//! A pageserver's machine, and the process on it: the real engine, on simulated threads, disk and store.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use varve_engine::context::LostTenants;
use varve_engine::held::{Claim, claim};
use varve_engine::shipping::{self, Shipping};
use varve_engine::template::Templates;
use varve_engine::timeline::{Flushed, StreamEnd, StreamError, WalStream};
use varve_engine::work_queue::Places;
use varve_engine::{Context, EngineError, LiveTimeline, Tenant, WorkQueue, histories};
use varve_postgres::Lsn;
use varve_postgres::wal::Framer;
use varve_storage::ids::{BranchName, TimelineId, WalLogId};
use varve_storage::shared_wal::Archive;
use varve_storage::tenant_log::{TenantLog, tenant_folder};
use varve_storage::threads::Threads;
use varve_storage::wal_log::{WalLog, WalLogError, WalLogOptions};
use varve_testing::sim_disk::SimDisk;
use varve_testing::sim_store::{Faults, Link, SimClient};

use crate::compute::Compute;
use crate::door::{self, Plane};
use crate::kinds::Kind;
use crate::threads::{Life, SimThreads};
use crate::wal::{MAJOR, SYSTEM_IDENTIFIER};
use crate::world::World;

/// The WAL log of a simulated machine is small, so that its limit is reached.
const WAL_LOG: WalLogOptions = WalLogOptions { limit_bytes: 96 << 10, segment_bytes: 8 << 10, make_spares: false };
/// So large that nothing is ever put out: what is, depends on hashes, which differ from run to run.
const CACHE_BYTES: u64 = 16 << 20;
/// How often a server looks whether branches have moved, timelines are idle, the tenant is still its own.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A timeline that nobody uses for so long is closed.
const UNUSED_MAX: Duration = Duration::from_secs(4);
/// The most that one read of a socket gives, in units of what records are aligned to: no walsender cuts within those.
const SOCKET_READ_WORDS_MAX: u64 = 400;

/// A machine: what stays when its process ends.
pub struct Machine {
    index: usize,
    disk: Mutex<SimDisk>,
    wal_log: Mutex<WalLogId>,
    clock_ahead_us: Arc<AtomicU64>,
    node: Mutex<Option<Arc<Node>>>,
    disk_seed: u64,
}

impl Machine {
    /// Machine number `index`, with an empty disk, off.
    ///
    /// # Errors
    /// None in practice.
    pub fn new(index: usize, disk_seed: u64) -> anyhow::Result<Machine> {
        Ok(Machine {
            index,
            disk: Mutex::new(SimDisk::new(disk_seed)),
            wal_log: Mutex::new(WalLogId::random()?),
            clock_ahead_us: Arc::default(),
            node: Mutex::default(),
            disk_seed,
        })
    }

    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its process, if one runs.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.node.lock().clone()
    }

    /// Identity of its WAL log.
    pub fn wal_log(&self) -> WalLogId {
        *self.wal_log.lock()
    }

    /// Its disk, as it is now.
    pub fn disk(&self) -> SimDisk {
        self.disk.lock().clone()
    }

    /// Its clock jumps ahead.
    pub fn jump_clock(&self, by_us: u64) {
        self.clock_ahead_us.fetch_add(by_us, Ordering::SeqCst);
    }

    /// The process ends, whatever it is doing, and loses what `how` says.
    pub fn end(&self, world: &World, how: Crash) {
        let Some(node) = self.node.lock().take() else { return };
        node.end();
        let struck = node.client.struck();
        world.counts.add_all(Kind::StoreSaidNo, struck.before);
        world.counts.add_all(Kind::StoreSaidNoToWhatItDid, struck.after);
        world.counts.add_all(Kind::StoreDidItLate, struck.late);
        for kind in world.all_under_way(self.index) {
            world.counts.add(kind);
        }
        let mut disk = self.disk.lock();
        let after = match how {
            Crash::Process => disk.crash_process(),
            Crash::Power => disk.cut_power(),
            Crash::DiskLost => {
                // Without a random id the machine would take another disk's WAL for its own.
                match WalLogId::random() {
                    Ok(id) => *self.wal_log.lock() = id,
                    Err(error) => world.violate(error.to_string()),
                }
                SimDisk::new(self.disk_seed ^ 0x55)
            }
        };
        *disk = after;
    }

    /// The process starts.
    ///
    /// # Errors
    /// What the WAL log says.
    pub async fn start(&self, world: &Arc<World>, faults: Faults) -> Result<Arc<Node>, EngineError> {
        let life = Life::default();
        let threads: Arc<dyn Threads> = Arc::new(SimThreads::new(world.pool.clone(), life.clone(), self.clock_ahead_us.clone()));
        let client = world.store.client(world.seed(), faults);
        let store = client.store();
        let disk = self.disk();
        let wal = threads.call(move || WalLog::open_on(Arc::new(disk), WAL_LOG)).await??;
        let folder = world.folder.join(self.index.to_string());
        // A folder of its own for the copies of layers: it is there already after the first start.
        let _there = std::fs::create_dir(&folder);
        let mut resources = histories::resources(&store, &threads, folder, CACHE_BYTES, 64 << 20);
        // Histories are short here.
        resources.garbage_bytes_min = 0;
        let queue = WorkQueue::new(Places { ingest: 2, flush: 2, merge: 1 }, threads.clone());
        let context = Arc::new(Context {
            wal: Arc::new(wal),
            wal_log: self.wal_log(),
            archive: Archive::new(store.clone()),
            store,
            resources: Arc::new(resources),
            threads,
            queue,
            shipping: Shipping::new(true),
            lost: LostTenants::default(),
        });
        let node = Arc::new(Node {
            machine: self.index,
            life,
            client,
            templates: Templates::new(context.store.clone()),
            context,
            tenant: tokio::sync::Mutex::default(),
            owned: Mutex::default(),
            has_lost: AtomicBool::new(false),
            streams: Mutex::default(),
            plane: OnceLock::new(),
            stopping: CancellationToken::new(),
        });
        match door::control(world, &node) {
            Ok(plane) => {
                let plane = node.plane.get_or_init(|| plane).clone();
                let stopping = node.stopping.clone();
                node.spawn(async move { plane.watch(&stopping).await });
            }
            Err(error) => world.violate(format!("server {} has no control plane: {error}", self.index)),
        }
        *self.node.lock() = Some(node.clone());
        node.spawn(WorkQueue::run_timer(Arc::downgrade(&node.context.queue)));
        node.spawn(shipping::run(node.context.clone()));
        node.spawn(node.clone().keep_lost_out(world.clone()));
        node.spawn(node.clone().watch(world.clone()));
        Ok(node)
    }
}

/// What a crash loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process's memory.
    Process,
    /// Also what was not fsynced.
    Power,
    /// Also the disk.
    DiskLost,
}

/// A stream that is open.
struct Open {
    branch: BranchName,
    timeline: TimelineId,
    ended: Arc<Ended>,
}

#[derive(Default)]
struct Ended {
    why: Mutex<Option<StreamEnd>>,
    told: Notify,
}

/// A pageserver's process.
pub struct Node {
    machine: usize,
    life: Life,
    client: Arc<SimClient>,
    context: Arc<Context>,
    templates: Templates,
    /// Held while the tenant is taken over.
    tenant: tokio::sync::Mutex<()>,
    owned: Mutex<Option<Arc<Tenant>>>,
    /// Whether another server took the tenant from this one, and no operator has given it back.
    has_lost: AtomicBool,
    /// Its control plane, which ends with it.
    plane: OnceLock<Arc<Plane>>,
    stopping: CancellationToken,
    streams: Mutex<Vec<Open>>,
}

impl Node {
    /// The machine that it runs on.
    pub fn machine(&self) -> usize {
        self.machine
    }

    /// Its life.
    pub fn life(&self) -> &Life {
        &self.life
    }

    /// Its way to the store.
    pub fn client(&self) -> &SimClient {
        &self.client
    }

    /// What its timelines share.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn end(&self) {
        self.client.set_link(Link::Frozen);
        self.life.end();
        self.context.queue.forget_all();
    }

    /// Runs a task that ends with the process.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.life.spawn(task);
    }

    /// Its control plane.
    pub fn plane(&self) -> Option<Arc<Plane>> {
        self.plane.get().cloned()
    }

    /// Whether another server took the tenant from this one.
    pub fn has_lost(&self) -> bool {
        self.has_lost.load(Ordering::SeqCst)
    }

    /// The tenant's log, or something of it, says that it is another server's.
    pub fn note_lost(&self) {
        if let Some(tenant) = self.owned() {
            self.context.lost.note(tenant.id(), tenant.log().ownership().generation);
        }
    }

    /// It may take the tenant again.
    pub fn forgive(&self) {
        self.has_lost.store(false, Ordering::SeqCst);
    }

    /// The tenant, if this server owns it as far as it knows.
    pub fn owned(&self) -> Option<Arc<Tenant>> {
        self.owned.lock().clone()
    }

    /// The tenant; taken over if this server does not own it.
    ///
    /// # Errors
    /// When it cannot be taken over.
    pub async fn own(&self, world: &Arc<World>) -> Result<Arc<Tenant>, EngineError> {
        let _one = self.tenant.lock().await;
        if let Some(tenant) = self.owned() {
            return Ok(tenant);
        }
        if self.has_lost() {
            return Err(EngineError::NotOwner { tenant: world.tenant });
        }
        let _under_way = world.under_way(self.machine, Kind::CrashInTakeOver);
        let folder = tenant_folder(world.tenant)?;
        let log = TenantLog::take_over(&self.context.store, &folder).await?;
        let log = log.ok_or(EngineError::EmptyLog { tenant: world.tenant })?;
        let name = log.state().facts().map(|facts| facts.template.clone()).unwrap_or_default();
        let template = self.templates.by_name(&name).await?;
        let generation = log.ownership().generation;
        let tenant = Arc::new(Tenant::new(world.tenant, log, template, self.context.clone())?);
        *self.owned.lock() = Some(tenant.clone());
        world.say(format_args!("server {} owns the tenant, generation {generation}", self.machine));
        Ok(tenant)
    }

    /// Lets go of a tenant that is another server's.
    async fn keep_lost_out(self: Arc<Self>, world: Arc<World>) {
        loop {
            let lost = self.context.lost.take().await;
            // Who takes it again waits until all of it is closed.
            let _one = self.tenant.lock().await;
            let is_meant = |tenant: &mut Arc<Tenant>| lost.contains(&(tenant.id(), tenant.log().ownership().generation));
            let lost = self.owned.lock().take_if(is_meant);
            if let Some(tenant) = lost {
                self.has_lost.store(true, Ordering::SeqCst);
                world.counts.add(Kind::LostTenant);
                world.say(format_args!("server {} has lost the tenant", self.machine));
                tenant.lose().await;
            }
        }
    }

    /// Looks again and again at what changes by itself: branches that moved under a stream, timelines that are idle, an
    /// owner that is another one by now.
    async fn watch(self: Arc<Self>, world: Arc<World>) {
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let Some(tenant) = self.owned() else { continue };
            if tenant.log().ended().is_some()
                || world.chance(300) && tenant.log().check_ownership().await.is_err_and(|error| is_fenced(&error))
            {
                self.note_lost();
                continue;
            }
            self.note_moved(&world, &tenant);
            self.open_what_the_wal_log_holds(&world, &tenant).await;
            if let Err(error) = tenant.look_after_history(world.wall_clock(), world.chance(100)).await {
                world.say(format_args!("server {} does not know what can be collected: {error}", self.machine));
            }
            let is_collected = |live: &Arc<LiveTimeline>| live.history().collected().cutoff > Lsn::INVALID;
            if tenant.all_opened().iter().any(is_collected) {
                world.counts.add(Kind::Collected);
            }
            let shipped = self.context.shipping.figures();
            world.counts.add_all(Kind::ShippedWal, u64::from(shipped.objects > 0));
            world.counts.add_all(Kind::FoundShippedWal, u64::from(shipped.found_bytes > 0));
            for live in tenant.all_opened() {
                world.ledger.lock().note_stored(live.id(), live.positions().stored());
            }
            if tenant.close_idle(UNUSED_MAX).await {
                world.counts.add(Kind::IdleClosed);
            }
        }
    }

    /// What a former process left in the WAL log is put into the store, or the log would be full of it one day.
    async fn open_what_the_wal_log_holds(&self, world: &World, tenant: &Arc<Tenant>) {
        for held in self.context.wal.unattached() {
            match claim(&tenant.log().state(), &held, self.context.wal_log) {
                Claim::Needed => {
                    if let Err(error) = tenant.timeline(held.timeline).await {
                        world.say(format_args!("server {} cannot open {}: {error}", self.machine, held.timeline));
                    }
                }
                Claim::Void => self.context.forget_void(held).await,
                Claim::Unknown => world.violate(format!("the log has forgotten timeline {}", held.timeline)),
            }
        }
        if self.context.wal.is_over_limit() {
            let context = self.context.clone();
            if let Err(error) = self.context.threads.call(move || context.free_wal_log()).await {
                world.say(format_args!("server {}: {error}", self.machine));
            }
        }
    }

    /// From when on this server knows that branches have left timelines of which it still takes WAL.
    fn note_moved(&self, world: &World, tenant: &Arc<Tenant>) {
        let state = tenant.log().state();
        let points = |open: &Open| state.branch(open.branch.as_str()).is_ok_and(|timeline| timeline.facts.id == open.timeline);
        for open in self.streams.lock().iter().filter(|open| !points(open)) {
            world.note_moved(self.machine, &open.branch, open.timeline);
        }
    }

    /// Takes WAL from a compute; gives, when the connection is made, the standby name that it must wait for.
    ///
    /// # Errors
    /// When the tenant is not this server's, or the compute is fenced.
    pub async fn attach(
        self: &Arc<Self>,
        world: &Arc<World>,
        compute: &Arc<Compute>,
        branch: &BranchName,
        flushed: Flushed,
    ) -> Result<String, EngineError> {
        let stored = world.ledger.lock().stored(compute.timeline);
        let tenant = self.own(world).await?;
        let live = tenant.timeline(compute.timeline).await?;
        let ended = Arc::new(Ended::default());
        let on_close = {
            let ended = ended.clone();
            move |why: StreamEnd| {
                ended.why.lock().get_or_insert(why);
                ended.told.notify_one();
            }
        };
        let epoch = varve_storage::ids::WriterEpoch(compute.epoch);
        let (stream, names) = live.open_stream(tenant.log(), branch, epoch, flushed, on_close).await?;
        if stream.start() < stored {
            let (machine, start) = (self.machine, stream.start());
            world.violate(format!("server {machine} has {} up to {start}, and the store was said to have it up to {stored}", live.id()));
        }
        let open = Open { branch: branch.clone(), timeline: compute.timeline, ended: ended.clone() };
        self.streams.lock().push(open);
        let (node, world, compute, standby) = (self.clone(), world.clone(), compute.clone(), names.name.clone());
        let life = self.life.clone();
        tokio::spawn(async move {
            let why = tokio::select! {
                biased;
                () = life.ended() => "its server died".to_owned(),
                why = node.receive(&world, &compute, stream, &standby, &ended) => why,
            };
            node.streams.lock().retain(|open| !Arc::ptr_eq(&open.ended, &ended));
            world.say(format_args!("{} is not connected any more: {why}", compute.name()));
        });
        live.waits_for(names).await
    }

    /// The WAL receiver: what the socket has is framed, appended, made durable, acknowledged.
    async fn receive(&self, world: &Arc<World>, compute: &Arc<Compute>, mut stream: WalStream, name: &str, ended: &Ended) -> String {
        let mut at = stream.start();
        let mut framer = Framer::new(MAJOR, Some(SYSTEM_IDENTIFIER), at, None);
        loop {
            let max = 8 * (1 + world.below(SOCKET_READ_WORDS_MAX)) as usize;
            let bytes = tokio::select! {
                biased;
                () = ended.told.notified() => None,
                bytes = compute.read(at, max) => bytes,
            };
            if let Some(why) = *ended.why.lock() {
                world.counts.add(Kind::StreamEnded);
                return why.to_string();
            }
            let Some(bytes) = bytes else { return "the compute has no such WAL, or is gone".to_owned() };
            let mut input = bytes.clone();
            loop {
                match framer.next_record(&mut input) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        world.violate(format!("{}: what was sent is no WAL: {error}", compute.name()));
                        return error.to_string();
                    }
                }
            }
            let (framed, start, length, slow) = (framer.framed(), at, bytes.len() as u64, world.chance(100));
            let threads = self.context.threads.clone();
            if self.context.wal.is_over_limit() {
                world.counts.add(Kind::WalLogFull);
            }
            let appended = self.context.threads.call(move || {
                let appended = stream.append(start, &bytes);
                if slow {
                    threads.pause(Duration::from_millis(7));
                }
                stream.framed(framed);
                let synced = appended.and_then(|()| stream.sync());
                (stream, synced)
            });
            match appended.await {
                Ok((back, Ok(_))) => stream = back,
                Ok((_, Err(error))) => {
                    if let StreamError::WalLog(error) = &error {
                        self.wal_log_failed(world, error);
                    }
                    return error.to_string();
                }
                Err(error) => return error.to_string(),
            }
            at += length;
            if world.chance(300) {
                world.pause(Duration::from_millis(4)).await;
            }
            compute.acknowledge(world, self.machine, name, framed);
            world.ledger.lock().note_stored(compute.timeline, stream.store_durable());
        }
    }

    /// After a failed fsync the process ends: nothing that it wrote can be trusted.
    pub fn wal_log_failed(&self, world: &World, error: &WalLogError) {
        match error {
            WalLogError::SyncFailed { .. } => {
                world.counts.add(Kind::SyncFailed);
                world.say(format_args!("server {} ends itself: {error}", self.machine));
                world.machines[self.machine].end(world, Crash::Process);
            }
            WalLogError::Io { .. } | WalLogError::Fenced { .. } => {}
            error => world.violate(format!("server {}: {error}", self.machine)),
        }
    }
}

fn is_fenced(error: &varve_storage::edit_log::EditLogError) -> bool {
    matches!(error, varve_storage::edit_log::EditLogError::Fenced { .. })
}
