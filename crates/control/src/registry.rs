//! The computes that are known right now: where each runs, what it does and what it is told. Only in memory: what
//! should run stands in the tenants' logs, and what does is told by hosts and by the computes themselves, again after
//! each restart of the control plane.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::OwnedMutexGuard;
use varve_api::Refusal;
use varve_api::admin::CacheUse;
use varve_api::host::{ComputeOrder, Desired, HostAction};
use varve_api::size::{CurrentLimits, Size};
use varve_api::verification::CheckReport;
use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::{BranchName, EndpointId, HostId, TenantId, TenantName, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{EndpointRow, TenantState};

use crate::environment::Environment;
use crate::error::Error;
use crate::sizes::size_of;
use crate::watched::Watched;

/// Keys of which [`Turns`] keeps a lock that nobody holds.
const IDLE_TURNS_MAX: usize = 64;

/// Where a compute stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It should run, and nobody has said yet that it does.
    Unknown,
    /// It was ordered and has not attached yet.
    Starting,
    /// Postgres takes connections.
    Running,
    /// It was told to end.
    Stopping,
    /// It gave up.
    Failed(String),
    /// It ended as it was told.
    Ended {
        /// Whether Postgres shut down cleanly and its epoch was closed.
        clean: bool,
        /// Why it ended, as it said.
        reason: String,
    },
}

/// What the host said last of a compute's process, since it was last ordered something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// Nothing yet.
    Unsaid,
    /// It was started, or could be.
    Started,
    /// It cannot be started so.
    Refused(Refusal),
    /// It is gone.
    Gone,
    /// Its folder is gone, too.
    Removed,
}

/// What changes about a compute.
#[derive(Clone, Debug)]
pub(crate) struct Status {
    pub(crate) phase: Phase,
    /// What it is told.
    pub(crate) desired: Desired,
    /// The incarnation that should run; 0: it has not been heard of since the control plane started.
    pub(crate) incarnation: u64,
    /// Writer epoch of that incarnation.
    pub(crate) epoch: Option<WriterEpoch>,
    /// Timeline of that incarnation.
    pub(crate) timeline: Option<TimelineId>,
    /// How often it was told to attach again.
    pub(crate) attach_again: u64,
    /// Postmaster.
    pub(crate) pid: Option<u32>,
    /// Mount and supervisor.
    pub(crate) mount_pid: Option<u32>,
    /// Why the incarnation that is to begin has to wait, as it was told last.
    pub(crate) waits_for: Option<Refusal>,
    /// What its process says that its owner should know.
    pub(crate) warnings: Vec<String>,
    /// What the incarnation told of its block cache last.
    pub(crate) cache: Option<CacheUse>,
    /// The LSNs at which its mount reads, or is about to, as it told last.
    pub(crate) bases: Vec<String>,
    /// When the tenant's log was told of the lowest of them last, and which that was.
    pub(crate) bases_kept: Option<(Timestamp, Lsn)>,
    /// What it may take, as the tenant's log has it.
    pub(crate) size: Size,
    /// What it may take right now, as the incarnation told last.
    pub(crate) limits: Option<CurrentLimits>,
    /// The check that it is to make.
    pub(crate) check: Option<u64>,
    /// What it told of that last.
    pub(crate) checked: Option<CheckReport>,
    /// What the host said.
    pub(crate) process: Process,
    /// The port that the host said.
    pub(crate) port: u16,
    /// It is known from its row alone: its host has not been ordered anything about it.
    pub(crate) noted: bool,
}

/// A compute.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: EndpointId,
    pub(crate) tenant: TenantId,
    pub(crate) tenant_name: TenantName,
    row: Mutex<Arc<EndpointRow>>,
    /// Settings that hold for the start that was asked for, as long as it lasts.
    settings: Mutex<Vec<(String, String)>>,
    status: Watched<Status>,
    /// Held while one of begin, attach, start, restore or stop decides about it.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

impl Entry {
    /// A compute of which only its row and size are known.
    pub(crate) fn new(tenant: TenantId, tenant_name: TenantName, row: &Arc<EndpointRow>, size: Size, phase: Phase) -> Entry {
        let status = Status {
            phase,
            desired: Desired::Run,
            incarnation: 0,
            epoch: None,
            timeline: None,
            attach_again: 0,
            pid: None,
            mount_pid: None,
            waits_for: None,
            warnings: Vec::new(),
            cache: None,
            bases: Vec::new(),
            bases_kept: None,
            size,
            limits: None,
            check: None,
            checked: None,
            process: Process::Unsaid,
            port: row.port,
            noted: false,
        };
        let (row, id) = (Mutex::new(row.clone()), row.id);
        Entry { id, tenant, tenant_name, row, settings: Mutex::default(), status: Watched::new(status), turn: tokio::sync::Mutex::new(()) }
    }

    /// Its endpoint, as last read or written.
    pub(crate) fn row(&self) -> Arc<EndpointRow> {
        self.row.lock().clone()
    }

    /// Its endpoint was read or written.
    pub(crate) fn set_row(&self, row: Arc<EndpointRow>) {
        *self.row.lock() = row;
    }

    /// Its size was read or written.
    pub(crate) fn set_size(&self, size: Size) {
        self.update(|status| status.size = size);
    }

    /// The settings of its start.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        self.settings.lock().clone()
    }

    /// It is started with these.
    pub(crate) fn set_settings(&self, settings: Vec<(String, String)>) {
        *self.settings.lock() = settings;
    }

    /// `tenant/branch`.
    pub(crate) fn branch(&self) -> String {
        format!("{}/{}", self.tenant_name, self.row().branch)
    }

    /// Whether it follows its branch, and so writes it.
    pub(crate) fn writes(&self) -> bool {
        self.row().moment.is_none()
    }

    /// Where it stands now.
    pub(crate) fn status(&self) -> Status {
        self.status.with(Status::clone)
    }

    /// Changes where it stands, and wakes who waits for that.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.change(change);
    }

    /// Waits until `done` says so of its status; nothing if that takes longer than `limit`.
    pub(crate) async fn wait(&self, environment: &Environment, limit: Duration, done: impl FnMut(&Status) -> bool) -> Option<Status> {
        environment.within(limit, self.status.wait_for(done)).await
    }

    /// Tells it to end.
    pub(crate) fn tell_to_end(&self, desired: Desired) {
        self.update(|status| {
            status.desired = desired;
            if matches!(status.phase, Phase::Unknown | Phase::Starting | Phase::Running) {
                status.phase = Phase::Stopping;
            }
        });
    }

    /// The order to its host to do `action`.
    pub(crate) fn order(&self, action: HostAction) -> ComputeOrder {
        let row = self.row();
        ComputeOrder {
            id: self.id.to_string(),
            tenant_id: self.tenant.to_string(),
            branch: self.branch(),
            listen: row.listen.clone(),
            port: row.port,
            action,
        }
    }
}

/// Whether nothing can be lost with a compute's folder: its writer epoch was closed, or it never wrote the branch.
pub(crate) fn is_expendable(state: &TenantState, row: &EndpointRow) -> bool {
    let closed = |timeline: &varve_storage::tenant_log::TimelineState| timeline.epochs.last().is_some_and(|epoch| epoch.closed.is_some());
    row.moment.is_some() || state.branch(row.branch.as_str()).is_ok_and(closed)
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: RwLock<BTreeMap<EndpointId, Arc<Entry>>>,
}

impl Registry {
    /// Adds a compute, in the place of what was known of it. Who does so gives its host an order next.
    pub(crate) fn add(&self, entry: Entry) -> Arc<Entry> {
        let entry = Arc::new(entry);
        let mut entries = self.entries.write();
        if let Some(before) = entries.get(&entry.id).map(|before| before.status()) {
            // A number that a process knows already must not come again.
            entry.update(|status| {
                status.incarnation = before.incarnation;
                status.attach_again = before.attach_again + 1;
                // Where the same order stands, its answer does, too.
                if before.desired == Desired::Run && before.process == Process::Started {
                    status.process = Process::Started;
                }
            });
        }
        entries.insert(entry.id, entry.clone());
        entry
    }

    /// Adds a compute unless it is known. That alone orders nothing.
    pub(crate) fn note(&self, entry: Entry) -> Arc<Entry> {
        entry.update(|status| status.noted = true);
        self.entries.write().entry(entry.id).or_insert_with(|| Arc::new(entry)).clone()
    }

    /// Forgets a compute; not if another entry has taken its place.
    pub(crate) fn remove(&self, entry: &Arc<Entry>) {
        let mut entries = self.entries.write();
        if entries.get(&entry.id).is_some_and(|known| Arc::ptr_eq(known, entry)) {
            entries.remove(&entry.id);
        }
    }

    /// A compute.
    pub(crate) fn get(&self, id: EndpointId) -> Option<Arc<Entry>> {
        self.entries.read().get(&id).cloned()
    }

    /// All computes, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries.read().values().cloned().collect()
    }

    /// The computes of a tenant.
    pub(crate) fn of_tenant(&self, tenant: TenantId) -> Vec<Arc<Entry>> {
        self.entries.read().values().filter(|entry| entry.tenant == tenant).cloned().collect()
    }

    /// The computes of a branch, throw-away ones included.
    pub(crate) fn of_branch(&self, tenant: TenantId, branch: &BranchName) -> Vec<Arc<Entry>> {
        self.of_tenant(tenant).into_iter().filter(|entry| entry.row().branch == *branch).collect()
    }

    /// Takes over what a tenant's log says of the endpoints of its computes.
    pub(crate) fn refresh(&self, tenant: TenantId, state: &TenantState) {
        for entry in self.of_tenant(tenant) {
            if let Ok(row) = state.endpoint(entry.id) {
                entry.set_row(row.clone());
                entry.set_size(size_of(state, entry.id));
            }
        }
    }
}

/// Locks by key, so that one decides about something at a time and others about other things.
#[derive(Debug)]
pub(crate) struct Turns<K: Ord> {
    locks: Mutex<BTreeMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K: Ord> Default for Turns<K> {
    fn default() -> Self {
        Turns { locks: Mutex::default() }
    }
}

impl<K: Ord> Turns<K> {
    /// Waits until nobody else has the turn of `key`, and takes it.
    pub(crate) async fn take(&self, key: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock();
            if locks.len() > IDLE_TURNS_MAX {
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            locks.entry(key).or_default().clone()
        };
        lock.lock_owned().await
    }
}

/// The host that a compute is on.
pub(crate) fn host_of(entry: &Entry) -> Option<HostId> {
    entry.row().host
}

/// What to say of a compute that did not get where it should, from where it is.
pub(crate) fn not_there(entry: &Entry, limit: Duration) -> Error {
    let status = entry.status();
    let reason = match (&status.phase, &status.process) {
        (Phase::Failed(reason), _) => reason.clone(),
        (_, Process::Refused(refusal)) => return refusal.clone().into(),
        (_, Process::Gone) => "its process ended without a word; see its log on its host".to_owned(),
        _ if status.desired != Desired::Run => return Error::Fenced("it was stopped or replaced at the same time"),
        _ if let Some(refusal) = &status.waits_for => return refusal.clone().into(),
        _ => format!("it does not take connections after {} s; see its log on its host", limit.as_secs()),
    };
    Error::NotStarted { branch: entry.branch(), reason }
}
