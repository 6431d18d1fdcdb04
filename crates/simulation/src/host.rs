//! A host: what stays when its process ends (an id, a record of each compute, the compute processes themselves), and
//! its process, the [`Agent`], which does what the control plane orders.
//!
//! The order of steps is that of `varve_host::agent`: hello with what it has, orders by long poll, a keeper for each
//! compute. A record is written before the process of which it tells may do anything; a process that is gone is started
//! again only by orders that were asked for afterwards; a record goes only on [`HostAction::Remove`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use varve_api::host::{ComputeOrder, ComputeReport, Hello, HostAction, HostOrders, HostedCompute};
use varve_api::{Code, Refusal};
use varve_storage::ids::HostId;

use crate::kinds::Kind;
use crate::network::{About, PLAIN, call};
use crate::process::Process;
use crate::threads::Life;
use crate::wal::MAJOR;
use crate::world::World;

/// Wait between tries to reach a control plane that is away.
const RETRY_WAIT: Duration = Duration::from_millis(200);
/// Shortest and longest wait before a process that failed is started again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A process that ran for so long did not fail at its start.
const RAN_WELL: Duration = Duration::from_secs(10);
/// What a slow host adds to each message at most.
const SLOW: Duration = Duration::from_millis(1500);
/// Ports of computes begin here.
const FIRST_PORT: u16 = 5000;

#[derive(Clone)]
struct Record {
    tenant: String,
    port: u16,
    process: Option<Arc<Process>>,
}

/// See the module's doc.
pub struct Host {
    /// Its id, made once.
    pub id: HostId,
    index: usize,
    records: Mutex<BTreeMap<String, Record>>,
    /// The life of its process, if one runs.
    agent: Mutex<Option<Life>>,
    runs: AtomicU64,
    slow_until: Mutex<Option<Instant>>,
}

impl Host {
    /// Host number `index`, without computes. Its process does not run.
    pub fn new(index: usize) -> Arc<Host> {
        let id = HostId([index as u8 + 1; 16]);
        let (records, agent, slow_until) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Host { id, index, records, agent, runs: AtomicU64::new(0), slow_until })
    }

    /// Starts its process, unless it runs.
    pub fn start(self: &Arc<Self>, world: &Arc<World>) {
        let mut running = self.agent.lock();
        if running.is_some() {
            return;
        }
        let life = Life::default();
        *running = Some(life.clone());
        let shared = Shared { world: world.clone(), host: self.clone(), round: AtomicU64::new(0), refresh: Notify::new() };
        let run = self.runs.fetch_add(1, Ordering::SeqCst);
        life.spawn(Agent { shared: Arc::new(shared), run }.serve());
    }

    /// Its process ends, whatever it is doing; its computes go on. Whether one ran.
    pub fn crash(&self, world: &World) -> bool {
        let Some(life) = self.agent.lock().take() else { return false };
        world.say(format_args!("host {} crashes", self.index));
        life.end();
        true
    }

    /// Its messages are slow until then.
    pub fn slow_down(&self, until: Option<Instant>) {
        *self.slow_until.lock() = until;
    }

    /// What each message takes at most beyond what is usual.
    pub fn slow(&self) -> Duration {
        let until = *self.slow_until.lock();
        if until.is_some_and(|until| Instant::now() < until) { SLOW } else { Duration::ZERO }
    }

    /// The processes that run here.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let records = self.records.lock();
        records.values().filter_map(|record| record.process.clone()).filter(|process| !process.is_over()).collect()
    }
}

struct Shared {
    world: Arc<World>,
    host: Arc<Host>,
    /// Number of the newest poll that was begun.
    round: AtomicU64,
    /// Somebody needs orders that are newer than those of the poll that waits.
    refresh: Notify,
}

impl Shared {
    fn about(&self, lost: Kind) -> About {
        About { lost, slow: self.host.slow(), ..PLAIN }
    }

    /// Reports, however long the control plane is away. False where it does not want to know.
    async fn report(&self, compute: &str, report: &ComputeReport) -> bool {
        loop {
            let (host, id, told) = (self.host.id.to_string(), compute.to_owned(), report.clone());
            let about = self.about(Kind::ReportLost);
            match call(&self.world, about, |plane| async move { plane.report(&host, &id, told).await }).await {
                Ok(()) => return true,
                Err(refusal) if refusal.code == Code::Unavailable => tokio::time::sleep(RETRY_WAIT).await,
                Err(_) => return false,
            }
        }
    }
}

/// A host's process.
struct Agent {
    shared: Arc<Shared>,
    run: u64,
}

struct Running {
    told: watch::Sender<Told>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    async fn serve(self) {
        let mut keepers = BTreeMap::new();
        let found: Vec<String> = self.shared.host.records.lock().keys().cloned().collect();
        for id in found {
            keepers.insert(id.clone(), self.keeper(id));
        }
        let mut server_run = self.hello().await;
        let mut known = None;
        loop {
            let round = self.shared.round.fetch_add(1, Ordering::SeqCst) + 1;
            let answer = tokio::select! {
                biased;
                answer = self.orders(known) => answer,
                () = self.shared.refresh.notified() => {
                    known = None;
                    continue;
                }
            };
            match answer {
                Ok(orders) if orders.server_run != server_run => {
                    // Orders that the control plane gave before it knew what runs here.
                    server_run = self.hello().await;
                    known = None;
                }
                Ok(orders) => {
                    known = Some(orders.revision);
                    self.deliver(&mut keepers, orders, round);
                }
                Err(refusal) => {
                    known = None;
                    tokio::time::sleep(RETRY_WAIT).await;
                    if refusal.code == Code::UnknownHost {
                        server_run = self.hello().await;
                    }
                }
            }
        }
    }

    async fn orders(&self, known: Option<u64>) -> Result<HostOrders, Refusal> {
        let id = self.shared.host.id.to_string();
        let about = self.shared.about(Kind::MessageLost);
        call(&self.shared.world, about, |plane| async move { plane.host_orders(&id, known).await }).await
    }

    /// Says hello until it is heard.
    async fn hello(&self) -> String {
        loop {
            let records = self.shared.host.records.lock().clone();
            let computes = records.into_iter().map(|(id, record)| HostedCompute {
                id,
                tenant_id: record.tenant,
                runs: record.process.is_some_and(|process| !process.is_over()),
            });
            let hello = Hello {
                name: format!("host-{}", self.shared.host.index),
                version: "simulated".to_owned(),
                run: self.run.to_string(),
                postgres: vec![(MAJOR.number(), MAJOR.number().to_string())],
                lacks: Vec::new(),
                problems: Vec::new(),
                capacity: None,
                computes: computes.collect(),
            };
            let id = self.shared.host.id.to_string();
            let about = self.shared.about(Kind::MessageLost);
            match call(&self.shared.world, about, |plane| async move { plane.hello(&id, hello).await }).await {
                Ok(welcome) => return welcome.server_run,
                Err(_) => tokio::time::sleep(RETRY_WAIT).await,
            }
        }
    }

    fn keeper(&self, id: String) -> Running {
        let (told, orders) = watch::channel(Told::default());
        let keeper = Keeper {
            shared: self.shared.clone(),
            id,
            orders,
            started: Instant::now(),
            failures: 0,
            not_before: None,
            stale_round: 0,
            reported: None,
        };
        Running { told, task: tokio::spawn(keeper.run()) }
    }

    /// Tells each keeper its order, and starts keepers for computes that are new here.
    fn deliver(&self, keepers: &mut BTreeMap<String, Running>, orders: HostOrders, round: u64) {
        let mut ordered: BTreeMap<String, ComputeOrder> = orders.computes.into_iter().map(|order| (order.id.clone(), order)).collect();
        {
            let records = self.shared.host.records.lock();
            keepers.retain(|id, _| ordered.contains_key(id) || records.contains_key(id));
        }
        for id in ordered.keys() {
            keepers.entry(id.clone()).or_insert_with(|| self.keeper(id.clone()));
        }
        for (id, keeper) in keepers.iter() {
            let told = Told { order: ordered.remove(id), round, server_run: orders.server_run.clone() };
            keeper.told.send_replace(told);
        }
    }
}

/// What a keeper is told by each answer to a poll.
#[derive(Clone, Default)]
struct Told {
    order: Option<ComputeOrder>,
    round: u64,
    server_run: String,
}

/// Sees to one compute.
struct Keeper {
    shared: Arc<Shared>,
    id: String,
    orders: watch::Receiver<Told>,
    started: Instant,
    /// Starts that failed in a row.
    failures: u32,
    not_before: Option<Instant>,
    /// Not to be started by orders of this poll or an earlier one.
    stale_round: u64,
    /// The last thing reported on an order of this run of the control plane.
    reported: Option<(String, ComputeOrder, ComputeReport)>,
}

impl Keeper {
    fn process(&self) -> Option<Arc<Process>> {
        self.shared.host.records.lock().get(&self.id).and_then(|record| record.process.clone())
    }

    async fn run(mut self) {
        loop {
            let told = self.orders.borrow_and_update().clone();
            let again = self.act(&told).await;
            let process = self.process();
            tokio::select! {
                biased;
                changed = self.orders.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = gone(process) => self.is_gone().await,
                () = until(again) => {}
            }
        }
    }

    /// Does what an order says. Gives when it is to be tried again, if nothing else happens.
    async fn act(&mut self, told: &Told) -> Option<Instant> {
        let order = told.order.as_ref()?;
        match (order.action, self.process()) {
            (HostAction::Run, Some(_)) => {
                let port = self.shared.host.records.lock().get(&self.id).map_or(0, |record| record.port);
                self.report(told, order, ComputeReport::Started { port }).await;
            }
            (HostAction::Run, None) => {
                if told.round <= self.stale_round {
                    return None; // newer ones are on their way
                }
                let not_before = self.not_before.filter(|not_before| *not_before > Instant::now());
                if not_before.is_some() {
                    return not_before;
                }
                self.start(order).await;
            }
            (HostAction::End, process) => {
                if process.as_ref().is_some_and(|process| process.is_deaf()) {
                    return None; // planted
                }
                self.end(process).await;
                self.report(told, order, ComputeReport::Gone).await;
            }
            (HostAction::Remove, process) => {
                self.end(process).await;
                self.shared.host.records.lock().remove(&self.id);
                self.report(told, order, ComputeReport::Removed).await;
            }
        }
        None
    }

    async fn report(&mut self, told: &Told, order: &ComputeOrder, report: ComputeReport) {
        let now = Some((told.server_run.clone(), order.clone(), report.clone()));
        if self.reported != now && self.shared.report(&self.id, &report).await {
            self.reported = now;
        }
    }

    async fn start(&mut self, order: &ComputeOrder) {
        let port = {
            let mut records = self.shared.host.records.lock();
            let taken = records.len() as u16;
            let free = if order.port == 0 { FIRST_PORT + taken } else { order.port };
            let record = records.entry(self.id.clone()).or_insert(Record { tenant: order.tenant_id.clone(), port: free, process: None });
            if order.port != 0 {
                record.port = order.port;
            }
            record.port
        };
        self.started = Instant::now();
        self.reported = None;
        // The process waits until the control plane has taken this; where it does not, it ends without having done
        // anything.
        if self.shared.report(&self.id, &ComputeReport::Started { port }).await {
            let process = Process::start(&self.shared.world, &self.shared.host, &self.id);
            if let Some(record) = self.shared.host.records.lock().get_mut(&self.id) {
                record.process = Some(process);
            }
        } else {
            self.is_gone().await;
        }
    }

    /// The process is gone.
    async fn is_gone(&mut self) {
        if let Some(record) = self.shared.host.records.lock().get_mut(&self.id) {
            record.process = None;
        }
        if self.started.elapsed() > RAN_WELL {
            self.failures = 0;
            self.not_before = None;
        } else {
            let wait = (BACKOFF.0 * 2u32.pow(self.failures.min(16))).min(BACKOFF.1);
            self.failures += 1;
            self.not_before = Some(Instant::now() + wait);
        }
        self.stale_round = self.shared.round.load(Ordering::SeqCst);
        self.shared.report(&self.id, &ComputeReport::Gone).await;
        self.reported = None;
        self.shared.refresh.notify_one();
    }

    async fn end(&mut self, process: Option<Arc<Process>>) {
        if let Some(process) = process {
            process.kill(&self.shared.world, "its host ends it");
            self.is_gone().await;
        }
    }
}

async fn gone(process: Option<Arc<Process>>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
