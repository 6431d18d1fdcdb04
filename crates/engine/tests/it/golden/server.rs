//! A machine with a pageserver's process: the real engine on simulated threads, disk and store.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use varve_engine::context::LostTenants;
use varve_engine::shipping::{self, Shipping};
use varve_engine::template::Templates;
use varve_engine::work_queue::Places;
use varve_engine::{Context, EngineError, Tenant, WorkQueue, histories};
use varve_simulation::threads::{Life, Pool, SimThreads};
use varve_storage::ids::{TenantId, WalLogId};
use varve_storage::shared_wal::Archive;
use varve_storage::tenant_log;
use varve_storage::threads::Threads;
use varve_storage::wal_log::{WalLog, WalLogOptions};
use varve_testing::sim_disk::SimDisk;
use varve_testing::sim_store::{Faults, Link, SimClient, SimStore};

use super::SEED;
use super::world::Said;

const WAL_LOG: WalLogOptions = WalLogOptions { limit_bytes: 1 << 20, segment_bytes: 16 << 10, make_spares: false };
const PLACES: Places = Places { ingest: 1, flush: 1, merge: 1 };
const CACHE_BYTES: u64 = 1 << 20;
const MEMTABLE_BYTES: u64 = 64 << 20;

/// What a crash loses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Crash {
    /// What the process has in memory.
    #[default]
    Process,
    /// Also what was not fsynced.
    Power,
    /// Also the disk.
    Disk,
}

impl FromStr for Crash {
    type Err = String;

    fn from_str(text: &str) -> Result<Crash, String> {
        match text {
            "process" => Ok(Crash::Process),
            "power" => Ok(Crash::Power),
            "disk" => Ok(Crash::Disk),
            _ => Err(format!("a crash is one of process, power, disk, not {text}")),
        }
    }
}

/// What stays when a process ends.
pub(super) struct Machine {
    number: usize,
    disk: SimDisk,
    wal_log: WalLogId,
    process: Option<Arc<Process>>,
    /// Local copies of layers.
    copies: tempfile::TempDir,
}

impl Machine {
    pub(super) fn new(number: usize) -> Said<Machine> {
        let copies = tempfile::tempdir()?;
        Ok(Machine { number, disk: SimDisk::new(SEED), wal_log: WalLogId::random()?, process: None, copies })
    }

    /// Identity of its WAL log.
    pub(super) fn wal_log(&self) -> WalLogId {
        self.wal_log
    }

    /// Its process.
    pub(super) fn process(&self) -> Said<&Arc<Process>> {
        Ok(self.process.as_ref().ok_or_else(|| format!("server {} does not run", self.number))?)
    }

    /// Whether a process runs.
    pub(super) fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the process.
    pub(super) async fn start(&mut self, pool: &Arc<Pool>, store: &SimStore) -> Said<()> {
        let life = Life::default();
        let threads = SimThreads::new(pool.clone(), life.clone(), Arc::<AtomicU64>::default());
        let threads: Arc<dyn Threads> = Arc::new(threads);
        let client = store.client(SEED, Faults::default());
        let (store, disk) = (client.store(), self.disk.clone());
        let wal = threads.call(move || WalLog::open_on(Arc::new(disk), WAL_LOG)).await??;
        let copies = self.copies.path().to_owned();
        let resources = histories::resources(&store, &threads, copies, CACHE_BYTES, MEMTABLE_BYTES);
        let queue = WorkQueue::new(PLACES, threads.clone());
        let context = Arc::new(Context {
            wal: Arc::new(wal),
            wal_log: self.wal_log,
            archive: Archive::new(store.clone()),
            store,
            resources: Arc::new(resources),
            threads,
            queue,
            shipping: Shipping::new(true),
            lost: LostTenants::default(),
        });
        let templates = Templates::new(context.store.clone());
        let (number, owned) = (self.number, Mutex::default());
        let process = Arc::new(Process { number, life, client, context, templates, owned });
        process.spawn(WorkQueue::run_timer(Arc::downgrade(&process.context.queue)));
        process.spawn(shipping::run(process.context.clone()));
        process.spawn(process.clone().let_go_of_what_is_lost());
        self.process = Some(process);
        Ok(())
    }

    /// The process ends, whatever it is doing.
    pub(super) async fn crash(&mut self, how: Crash) -> Said<()> {
        self.process()?;
        self.end().await;
        self.disk = match how {
            Crash::Process => self.disk.crash_process(),
            Crash::Power => self.disk.cut_power(),
            Crash::Disk => {
                self.wal_log = WalLogId::random()?;
                SimDisk::new(SEED)
            }
        };
        Ok(())
    }

    /// The process ends; returns when its threads are gone.
    pub(super) async fn end(&mut self) {
        if let Some(process) = self.process.take() {
            process.client.set_link(Link::Frozen);
            process.life.end();
        }
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
    }
}

/// A pageserver's process.
pub(super) struct Process {
    number: usize,
    life: Life,
    client: Arc<SimClient>,
    context: Arc<Context>,
    templates: Templates,
    owned: Mutex<Option<Arc<Tenant>>>,
}

impl Process {
    /// Its life.
    pub(super) fn life(&self) -> &Life {
        &self.life
    }

    /// What its timelines share.
    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The tenant, if it has it as far as it knows.
    pub(super) fn owned(&self) -> Option<Arc<Tenant>> {
        self.owned.lock().clone()
    }

    /// Takes the tenant over.
    pub(super) async fn take_over(&self, id: TenantId) -> Result<Arc<Tenant>, EngineError> {
        let name = format!("server {}", self.number);
        let log = tenant_log::take_over(&self.context.store, id, &name, "").await?;
        let log = log.ok_or(EngineError::EmptyLog { tenant: id })?;
        let template = log.state().facts().map(|facts| facts.template.clone()).unwrap_or_default();
        let template = self.templates.by_name(&template).await?;
        let tenant = Arc::new(Tenant::new(id, log, template, self.context.clone())?);
        *self.owned.lock() = Some(tenant.clone());
        Ok(tenant)
    }

    async fn let_go_of_what_is_lost(self: Arc<Self>) {
        loop {
            self.context.lost.take().await;
            let lost = self.owned.lock().clone();
            if let Some(tenant) = lost {
                tenant.lose().await;
                *self.owned.lock() = None;
            }
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let life = self.life.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = life.ended() => {}
                () = task => {}
            }
        });
    }
}
