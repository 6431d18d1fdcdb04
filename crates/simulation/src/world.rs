//! The world of one run: a store, two machines with a pageserver each, hosts with computes, what is true, and what the
//! seed decides.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use varve_postgres::Timestamp;
use varve_storage::chance;
use varve_storage::ids::{BranchName, TenantId, TimelineId};
use varve_storage::tenant_log::{self, HistoryRow, TenantEdit, TenantFacts, TenantState, TimelineFacts, TimelineState};
use varve_testing::random::SeededRng;
use varve_testing::sim_store::SimStore;

use crate::compute::Compute;
use crate::host::Host;
use crate::kinds::{Counts, Kind};
use crate::ledger::{Ledger, Violation};
use crate::node::{Machine, Node};
use crate::template;
use crate::threads::{Pool, Watchdog};
use crate::trace::Trace;
use crate::wal::{FIRST_XID, MAJOR, START, SYSTEM_IDENTIFIER};

/// Machines with a pageserver.
pub const MACHINES: usize = 2;
/// Hosts.
pub const HOSTS: usize = 2;
/// How far back a tenant can go where history is short: about the time of a run.
const HISTORY_SECONDS: u64 = 20;
/// A server may go on so long with a stream after it knows that its branch moved.
const MOVE_NOTICED_MAX: Duration = Duration::from_secs(8);

/// A fault that is planted in the model, to show that it is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// The old order (found.md, case 18): a restore commits, and then a host's own record is written that says which
    /// timeline the compute serves. That can fail.
    HostRecordAfterCommit,
}

/// An operation that is under way, for whoever ends the process that does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnderWay {
    /// The machine whose server does it.
    pub machine: usize,
    /// What a crash during it counts as.
    pub kind: Kind,
}

/// See the module's doc.
pub struct World {
    /// The objects.
    pub store: SimStore,
    /// What happened.
    pub trace: Trace,
    /// How often what happened.
    pub counts: Counts,
    /// What is true.
    pub ledger: Mutex<Ledger>,
    /// All threads.
    pub pool: Arc<Pool>,
    /// Told that something moves.
    pub watchdog: Arc<Watchdog>,
    /// The machines.
    pub machines: Vec<Machine>,
    /// The hosts.
    pub hosts: Vec<Arc<Host>>,
    /// The machine whose server should have the tenant: to that leads the one address that all know.
    active: AtomicUsize,
    address: Notify,
    /// Where hosts hand out connections to computes.
    walsenders: Mutex<BTreeMap<String, Arc<Compute>>>,
    next_socket: AtomicU64,
    /// The tenant.
    pub tenant: TenantId,
    /// What is planted.
    pub plant: Plant,
    /// Whether computes write nothing by themselves.
    pub quiet: std::sync::atomic::AtomicBool,
    /// Folder for local copies of layers.
    pub folder: std::path::PathBuf,
    /// The newest compute of each branch.
    computes: Mutex<BTreeMap<BranchName, Arc<Compute>>>,
    /// When a server's log showed it that a branch had left a timeline.
    moved: Mutex<BTreeMap<(usize, BranchName, TimelineId), tokio::time::Instant>>,
    /// The WAL log that had a timeline's newest epoch when the tenant's log was last read.
    wal_logs: Mutex<BTreeMap<(TimelineId, u32), varve_storage::ids::WalLogId>>,
    under_way: Mutex<Vec<UnderWay>>,
    random: Mutex<SeededRng>,
    began: tokio::time::Instant,
    wall_ahead_us: AtomicI64,
    next_xid: AtomicU32,
    next_marker: AtomicU64,
    violation: Mutex<Option<Violation>>,
    violated: Notify,
}

/// A seeded source of random bytes.
pub struct SeededSource(Mutex<SeededRng>);

impl SeededSource {
    /// The source that `seed` begins.
    pub fn new(seed: u64) -> SeededSource {
        SeededSource(Mutex::new(SeededRng::new(seed)))
    }
}

impl fmt::Debug for SeededSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeededSource")
    }
}

impl chance::Source for SeededSource {
    fn fill(&self, bytes: &mut [u8]) {
        let drawn = self.0.lock().bytes(bytes.len());
        bytes.copy_from_slice(&drawn);
    }
}

impl World {
    /// A world with one tenant that has one branch, `main`. Its machines are off.
    ///
    /// # Errors
    /// None in practice.
    pub async fn new(
        seed: u64,
        plant: Plant,
        prints: bool,
        pool: Arc<Pool>,
        watchdog: Arc<Watchdog>,
        folder: &std::path::Path,
    ) -> anyhow::Result<Arc<World>> {
        let mut random = SeededRng::new(seed);
        let store = SimStore::new();
        template::put_into(&store);
        let tenant = TenantId::random()?;
        let facts = TenantFacts {
            id: tenant,
            name: "acme".parse()?,
            pg_version: MAJOR.number(),
            system_identifier: SYSTEM_IDENTIFIER,
            created: 0,
            template: template::NAME.to_owned(),
            password: String::new(),
            password_verifier: String::new(),
        };
        let timeline = TimelineId::random()?;
        let first = TimelineFacts { id: timeline, ancestor: None, tli: 2, start: START, created: 0 };
        let branch = TenantEdit::Branch { name: "main".parse()?, timeline };
        let mut edits = vec![TenantEdit::Timeline(first), branch];
        // In half of the worlds history is short, in the other half nothing of it goes.
        if random.bits().is_multiple_of(2) {
            edits.push(TenantEdit::History(HistoryRow { seconds: Some(HISTORY_SECONDS), wal_bytes: None }));
        }
        tenant_log::create_tenant(&store.reliable(), facts, edits).await?;
        let mut machines = Vec::new();
        for index in 0..MACHINES {
            machines.push(Machine::new(index, random.bits())?);
        }
        let world = World {
            store,
            trace: Trace::new(prints),
            counts: Counts::default(),
            ledger: Mutex::default(),
            pool,
            watchdog,
            machines,
            hosts: (0..HOSTS).map(Host::new).collect(),
            active: AtomicUsize::new(0),
            address: Notify::new(),
            walsenders: Mutex::default(),
            next_socket: AtomicU64::new(1),
            tenant,
            plant,
            quiet: Default::default(),
            folder: folder.to_owned(),
            computes: Mutex::default(),
            moved: Mutex::default(),
            wal_logs: Mutex::default(),
            under_way: Mutex::default(),
            random: Mutex::new(random),
            began: tokio::time::Instant::now(),
            wall_ahead_us: AtomicI64::new(0),
            next_xid: AtomicU32::new(FIRST_XID),
            next_marker: AtomicU64::new(1),
            violation: Mutex::default(),
            violated: Notify::new(),
        };
        let world = Arc::new(world);
        world.learn().await;
        Ok(world)
    }

    /// Adds an event to the trace.
    pub fn say(&self, what: fmt::Arguments<'_>) {
        self.watchdog.step();
        self.trace.say(what);
    }

    /// Something that must never be so is so: the run ends.
    pub fn violate(&self, violation: Violation) {
        self.say(format_args!("VIOLATION {violation}"));
        self.violation.lock().get_or_insert(violation);
        self.violated.notify_waiters();
    }

    /// What was violated, if anything was.
    pub fn violation(&self) -> Option<Violation> {
        self.violation.lock().clone()
    }

    /// Waits until something is violated.
    pub async fn violated(&self) {
        let violated = self.violated.notified();
        if self.violation.lock().is_none() {
            violated.await;
        }
    }

    /// Violates what is wrong with `result`.
    pub fn check<T>(&self, result: Result<T, Violation>) -> Option<T> {
        result.map_err(|violation| self.violate(violation)).ok()
    }

    /// A number below `bound`.
    pub fn below(&self, bound: u64) -> u64 {
        self.random.lock().below(bound)
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&self, per_mille: u32) -> bool {
        self.random.lock().chance(per_mille)
    }

    /// A seed for a part.
    pub fn seed(&self) -> u64 {
        self.random.lock().bits()
    }

    /// Waits for a random time of at most `limit`.
    pub async fn pause(&self, limit: Duration) {
        let micros = self.below(limit.as_micros() as u64 + 1);
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }

    /// What a compute's wall clock says.
    pub fn wall_clock(&self) -> Timestamp {
        let elapsed = self.began.elapsed().as_micros() as i64;
        Timestamp(700_000_000_000_000 + elapsed + self.wall_ahead_us.load(Ordering::SeqCst))
    }

    /// The wall clocks jump.
    pub fn jump_wall_clock(&self, by_us: i64) {
        self.wall_ahead_us.fetch_add(by_us, Ordering::SeqCst);
    }

    /// A transaction id.
    pub fn next_xid(&self) -> u32 {
        self.next_xid.fetch_add(1, Ordering::SeqCst)
    }

    /// A number that no other tuple has.
    pub fn next_marker(&self) -> u64 {
        self.next_marker.fetch_add(1, Ordering::SeqCst)
    }

    /// The tenant's log as it stands in the store; the ledger takes in what is new.
    pub async fn learn(&self) -> Arc<TenantState> {
        loop {
            match tenant_log::read(&self.store.reliable(), self.tenant).await {
                Ok(Some(state)) => {
                    let learnt = self.ledger.lock().learn(&state);
                    self.check(learnt);
                    self.learn_tails(&state);
                    return Arc::new(state);
                }
                Ok(None) => self.violate("the tenant's log is gone".to_owned()),
                Err(error) => self.violate(format!("the tenant's log cannot be read: {error}")),
            }
            std::future::pending::<()>().await;
        }
    }

    fn learn_tails(&self, state: &TenantState) {
        let newest = state.timelines().filter_map(|timeline| timeline.epochs.last().map(|epoch| (timeline.facts.id, epoch)));
        for (timeline, epoch) in newest {
            let before = self.wal_logs.lock().insert((timeline, epoch.epoch.0), epoch.wal_log);
            if before.is_some_and(|before| before != epoch.wal_log) {
                self.counts.add(Kind::TailSentAgain);
            }
        }
    }

    /// A server's own log says that `branch` has left `timeline`, whose stream it still has.
    pub fn note_moved(&self, machine: usize, branch: &BranchName, timeline: TimelineId) {
        self.moved.lock().entry((machine, branch.clone(), timeline)).or_insert_with(tokio::time::Instant::now);
    }

    /// A commit of `branch`'s compute on `timeline`, which began at `submitted`, was acknowledged by a server: it must
    /// not be long since that server knew that the branch had left the timeline.
    pub fn check_serves(&self, machine: usize, branch: &BranchName, timeline: TimelineId, submitted: tokio::time::Instant) {
        let moved = self.moved.lock().get(&(machine, branch.clone(), timeline)).copied();
        if let Some(moved) = moved.filter(|moved| submitted > *moved + MOVE_NOTICED_MAX) {
            let since = submitted - moved;
            self.violate(format!("a commit is acknowledged to {branch}'s compute on {timeline}, which the branch left {since:?} before"));
        }
    }

    /// The newest compute of a branch.
    pub fn compute(&self, branch: &BranchName) -> Option<Arc<Compute>> {
        self.computes.lock().get(branch).cloned()
    }

    /// All newest computes.
    pub fn computes(&self) -> Vec<Arc<Compute>> {
        self.computes.lock().values().cloned().collect()
    }

    /// A branch has another compute now. The former one goes on until it learns of it.
    pub fn put_compute(&self, compute: &Arc<Compute>) {
        self.computes.lock().insert(compute.branch.clone(), compute.clone());
    }

    /// The server that should have the tenant, if its machine is on.
    pub fn active_node(&self) -> Option<Arc<Node>> {
        self.machines[self.active()].node()
    }

    /// The machine to which the address leads.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::SeqCst)
    }

    /// The address leads to the next machine from now on: connections to the former one break.
    pub fn move_address(&self) {
        self.active.store((self.active() + 1) % MACHINES, Ordering::SeqCst);
        self.address.notify_waiters();
    }

    /// Waits until the address leads to another machine.
    pub async fn address_leaves(&self, machine: usize) {
        loop {
            let moved = self.address.notified();
            if self.active() != machine {
                return;
            }
            moved.await;
        }
    }

    /// Whether faults have ended.
    pub fn is_calm(&self) -> bool {
        self.quiet.load(Ordering::SeqCst)
    }

    /// A host hands out connections to this Postgres from now on: where.
    pub fn open_walsender(&self, compute: &Arc<Compute>) -> String {
        let socket = format!("walsender-{}", self.next_socket.fetch_add(1, Ordering::SeqCst));
        self.walsenders.lock().insert(socket.clone(), compute.clone());
        socket
    }

    /// It does so no more.
    pub fn close_walsender(&self, socket: &str) {
        self.walsenders.lock().remove(socket);
    }

    /// The Postgres to which a socket leads.
    pub fn walsender(&self, socket: &str) -> Option<Arc<Compute>> {
        self.walsenders.lock().get(socket).cloned()
    }

    /// Notes that an operation is under way until the guard is dropped.
    pub fn under_way(self: &Arc<Self>, machine: usize, kind: Kind) -> UnderWayGuard {
        let under_way = UnderWay { machine, kind };
        self.under_way.lock().push(under_way);
        UnderWayGuard { world: self.clone(), under_way }
    }

    /// What is under way on a machine.
    pub fn all_under_way(&self, machine: usize) -> Vec<Kind> {
        self.under_way.lock().iter().filter(|under_way| under_way.machine == machine).map(|under_way| under_way.kind).collect()
    }
}

/// A tenant's timelines, in an order that does not depend on chance.
pub fn in_order(state: &TenantState) -> Vec<&TimelineState> {
    let mut timelines: Vec<_> = state.timelines().collect();
    timelines.sort_by_key(|timeline| timeline.facts.tli);
    timelines
}

/// See [`World::under_way`].
pub struct UnderWayGuard {
    world: Arc<World>,
    under_way: UnderWay,
}

impl Drop for UnderWayGuard {
    fn drop(&mut self) {
        let mut all = self.world.under_way.lock();
        if let Some(at) = all.iter().position(|other| *other == self.under_way) {
            all.remove(at);
        }
    }
}
