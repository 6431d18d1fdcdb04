//! Hosts: the machines that run computes. They say hello with what they have, poll for orders, and report.
//!
//! Orders name the whole of what should run or end on a host, so that a message that is lost is healed by the next.
//! Nothing of this outlives the process: a host says hello again to each new one, and what it names is settled with the
//! tenants' logs, without taking any tenant over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use varve_api::admin::EventKind;
use varve_api::host::{ComputeOrder, ComputeReport, Desired, Hello, HostAction, HostOrders, HostedCompute, TemplateOrder, Welcome};
use varve_api::size::Size;
use varve_api::{Code, Refusal};
use varve_postgres::Timestamp;
use varve_storage::ids::{EndpointId, HostId, TenantId};

use crate::Control;
use crate::arguments;
use crate::environment::Environment;
use crate::error::Error;
use crate::ports::Pageserver;
use crate::registry::{Entry, Phase, Process, host_of, is_expendable};
use crate::sizes::size_of;
use crate::watched::Watched;

/// How long a poll for orders waits.
pub(crate) const ORDERS_WAIT: Duration = Duration::from_secs(20);
/// How long after its last word a host counts as there.
const HERE_MAX: Duration = Duration::from_secs(45);
/// How long a start waits for the first host to say hello.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether one has.
const HELLO_INTERVAL: Duration = Duration::from_millis(20);
/// How long the end of a process, or of a folder, is waited for.
const FINISH_MAX: Duration = Duration::from_secs(10);
/// Most computes that a host may name.
const COMPUTES_MAX: usize = 100_000;

/// What is ordered of a host.
#[derive(Clone, Debug, Default)]
struct Orders {
    revision: u64,
    computes: BTreeMap<EndpointId, ComputeOrder>,
    template: Option<TemplateOrder>,
}

/// One host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) id: HostId,
    hello: RwLock<Arc<Hello>>,
    heard: Mutex<Timestamp>,
    orders: Watched<Orders>,
    /// Computes that it named and that are not settled with their tenants' logs yet.
    unsettled: Mutex<BTreeMap<EndpointId, HostedCompute>>,
    /// Held while a template is made there.
    pub(crate) template_turn: tokio::sync::Mutex<()>,
    /// What became of the order for a template, until who waits takes it.
    pub(crate) template_outcome: Mutex<Option<Result<(), Refusal>>>,
}

impl Host {
    /// Whether it can give a compute this size.
    pub(crate) fn gives(&self, size: &Size) -> Result<(), Error> {
        match self.hello().capacity {
            _ if size.is_empty() => Ok(()),
            Some(capacity) => Ok(size.fits(&capacity)?),
            None => {
                let name = &self.hello().name;
                Err(Error::argument("size", format!("host {name} cannot limit what a compute takes (--sandbox none)")))
            }
        }
    }

    /// What it said of itself.
    pub(crate) fn hello(&self) -> Arc<Hello> {
        self.hello.read().clone()
    }

    /// Whether it was heard of lately.
    pub(crate) fn is_here(&self, now: Timestamp) -> bool {
        now.unix_micros() - self.heard.lock().unix_micros() <= HERE_MAX.as_micros() as i64
    }

    fn has(&self, pg_version: u32) -> bool {
        self.hello().postgres.iter().any(|(major, _)| *major == pg_version)
    }

    fn change(&self, change: impl FnOnce(&mut Orders)) {
        self.orders.change(|orders| {
            change(orders);
            orders.revision += 1;
        });
    }

    /// Orders something about a compute, in the place of what was ordered before.
    pub(crate) fn order(&self, id: EndpointId, order: ComputeOrder) {
        self.change(|orders| drop(orders.computes.insert(id, order)));
    }

    /// Orders something about a compute unless something is ordered already.
    fn order_first(&self, id: EndpointId, order: ComputeOrder) {
        self.change(|orders| {
            orders.computes.entry(id).or_insert(order);
        });
    }

    /// Orders nothing about a compute any more.
    pub(crate) fn withdraw(&self, id: EndpointId) {
        self.change(|orders| drop(orders.computes.remove(&id)));
    }

    /// Orders a template, or none.
    pub(crate) fn order_template(&self, template: Option<TemplateOrder>) {
        self.change(|orders| orders.template = template);
    }

    /// Which template is ordered.
    pub(crate) fn template_ordered(&self) -> Option<TemplateOrder> {
        self.orders.with(|orders| orders.template.clone())
    }

    fn action(&self, id: EndpointId) -> Option<HostAction> {
        self.orders.with(|orders| orders.computes.get(&id).map(|order| order.action))
    }
}

/// All hosts that have said hello to this process.
#[derive(Debug, Default)]
pub(crate) struct Hosts {
    hosts: RwLock<BTreeMap<HostId, Arc<Host>>>,
}

impl Hosts {
    /// A host.
    pub(crate) fn get(&self, id: HostId) -> Option<Arc<Host>> {
        self.hosts.read().get(&id).cloned()
    }

    /// All, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Host>> {
        self.hosts.read().values().cloned().collect()
    }

    /// Those that were heard of lately; right after a start the first is waited for.
    pub(crate) async fn here(&self, environment: &Environment) -> Vec<Arc<Host>> {
        let found = environment.within(HELLO_MAX, async {
            loop {
                let now = environment.now();
                let here: Vec<Arc<Host>> = self.all().into_iter().filter(|host| host.is_here(now)).collect();
                if !here.is_empty() {
                    return here;
                }
                environment.sleep(HELLO_INTERVAL).await;
            }
        });
        found.await.unwrap_or_default()
    }

    /// A host that can run a compute of a major and size: the one that had it before, or the one with the fewest
    /// orders.
    pub(crate) async fn choose(
        &self,
        environment: &Environment,
        pg_version: u32,
        before: Option<HostId>,
        size: &Size,
    ) -> Result<Arc<Host>, Error> {
        let here = self.here(environment).await;
        let fit: Vec<&Arc<Host>> = here.iter().filter(|host| host.has(pg_version) && host.hello().lacks.is_empty()).collect();
        let large_enough: Vec<&Arc<Host>> = fit.iter().copied().filter(|host| host.gives(size).is_ok()).collect();
        if let (Some(host), true) = (fit.first(), large_enough.is_empty()) {
            host.gives(size)?;
        }
        let best = large_enough.into_iter().min_by_key(|host| (before != Some(host.id), host.orders.with(|orders| orders.computes.len())));
        best.cloned().ok_or_else(|| Error::NoHost(unfit(&here, pg_version)))
    }

    /// A host that has the binaries of a major.
    pub(crate) async fn with_postgres(&self, environment: &Environment, pg_version: u32) -> Result<Arc<Host>, Error> {
        let here = self.here(environment).await;
        let found = here.iter().find(|host| host.has(pg_version)).cloned();
        found.ok_or_else(|| Error::NoHost(unfit(&here, pg_version)))
    }
}

/// Why none of these hosts can run a major.
fn unfit(hosts: &[Arc<Host>], pg_version: u32) -> String {
    if hosts.is_empty() {
        return "no host has said hello; start one ('varve dev' has one in it), and see its log".to_owned();
    }
    let of_host = |host: &Arc<Host>| {
        let hello = host.hello();
        let has: Vec<String> = hello.postgres.iter().map(|(major, full)| format!("{major} ({full})")).collect();
        let binaries = if has.is_empty() { "no Postgres binaries".to_owned() } else { format!("PostgreSQL {}", has.join(", ")) };
        let lacks: String = hello.lacks.iter().chain(&hello.problems).map(|what| format!("; {what}")).collect();
        format!("{} has {binaries}{lacks}", hello.name)
    };
    let hosts: Vec<String> = hosts.iter().map(of_host).collect();
    format!(
        "PostgreSQL {pg_version} is needed: {}. Install it there, or name its folder with --pg-bin-dir {pg_version}=FOLDER",
        hosts.join(", and ")
    )
}

impl<P: Pageserver> Control<P> {
    /// A host is there, or there again.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub async fn hello(&self, id: &str, hello: Hello) -> Result<Welcome, Error> {
        let id = arguments::host_id(id)?;
        if hello.computes.len() > COMPUTES_MAX {
            return Err(Error::argument("computes", format!("at most {COMPUTES_MAX}")));
        }
        let mut named = BTreeMap::new();
        for compute in &hello.computes {
            named.insert(compute.id.parse().map_err(|error| Error::argument("computes", error))?, compute.clone());
        }
        tracing::info!(host = %id, name = hello.name, computes = named.len(), run = hello.run, "a host says hello");
        let now = self.environment.now();
        let hello = Arc::new(hello);
        let host = {
            let mut hosts = self.hosts.hosts.write();
            let host = hosts.entry(id).or_insert_with(|| {
                Arc::new(Host {
                    id,
                    hello: RwLock::new(hello.clone()),
                    heard: Mutex::new(now),
                    orders: Watched::new(Orders::default()),
                    unsettled: Mutex::default(),
                    template_turn: tokio::sync::Mutex::new(()),
                    template_outcome: Mutex::default(),
                })
            });
            host.clone()
        };
        *host.hello.write() = hello;
        *host.heard.lock() = now;
        // What it has no record of any more is gone with its folder: nobody need wait for that.
        for entry in self.computes.all() {
            let ends = matches!(host.action(entry.id), Some(HostAction::End | HostAction::Remove));
            if ends && host_of(&entry) == Some(id) && !named.contains_key(&entry.id) {
                host.withdraw(entry.id);
                entry.update(|status| status.process = Process::Removed);
            }
        }
        *host.unsettled.lock() = named;
        if let Some(me) = self.me.upgrade() {
            self.environment.spawn(async move { me.settle(&host).await });
        }
        Ok(Welcome { server_run: self.run.clone() })
    }

    /// Settles with all hosts what could not be settled before.
    pub(crate) async fn settle_all(&self) {
        for host in self.hosts.all() {
            self.settle(&host).await;
        }
    }

    /// Decides what is to become of the computes that a host named, by what their tenants' logs say. What cannot be
    /// read is left alone, and looked at again later.
    async fn settle(&self, host: &Arc<Host>) {
        let unsettled: Vec<(EndpointId, HostedCompute)> = host.unsettled.lock().iter().map(|(id, c)| (*id, c.clone())).collect();
        for (id, compute) in unsettled {
            match self.settle_one(host, id, &compute).await {
                Ok(()) => drop(host.unsettled.lock().remove(&id)),
                Err(error) => tracing::warn!(host = %host.id, compute = %id, %error, "it is left alone until that can be read"),
            }
        }
    }

    /// Whether a compute's orders to a host are somebody else's matter: it has some, or is about to get them.
    fn has_orders(&self, host: &Host, id: EndpointId) -> bool {
        let is_looked_after = |known: Arc<Entry>| {
            let status = known.status();
            host_of(&known) == Some(host.id) && !(status.noted && status.desired == Desired::Run)
        };
        host.action(id).is_some() || self.computes.get(id).is_some_and(is_looked_after)
    }

    async fn settle_one(&self, host: &Arc<Host>, id: EndpointId, compute: &HostedCompute) -> Result<(), Error> {
        if self.has_orders(host, id) {
            return Ok(());
        }
        let tenant: TenantId = compute.tenant_id.parse().map_err(|error| Error::argument("computes", error))?;
        let end = |why: &str| {
            tracing::warn!(host = %host.id, compute = %id, why, "its process is ended, its folder and pg_wal are kept");
            let (id_text, tenant_id) = (id.to_string(), compute.tenant_id.clone());
            let order =
                ComputeOrder { id: id_text, tenant_id, branch: String::new(), listen: String::new(), port: 0, action: HostAction::End };
            host.order_first(id, order);
        };
        let read = self.read(tenant).await;
        // Somebody may have started or stopped it while that was read: what was read is older, and says nothing then.
        if self.has_orders(host, id) {
            return Ok(());
        }
        let state = match read {
            Ok(state) => state,
            Err(Error::UnknownTenant(_)) => {
                end("there is no such tenant any more");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let Ok(row) = state.endpoint(id).cloned() else {
            // The branch was deleted, or the log lost its end: who cannot tell keeps.
            end("the tenant's log does not know it");
            return Ok(());
        };
        if row.host.is_some_and(|other| other != host.id) {
            end("it runs on another host by now");
            return Ok(());
        }
        let name = crate::logs::facts(&state, tenant)?.name.clone();
        if row.wanted {
            let size = size_of(&state, id);
            let entry = self.computes.note(Entry::new(tenant, name, &row, size, Phase::Starting));
            if entry.status().noted {
                entry.set_row(row);
                entry.set_size(size);
            } else if host_of(&entry).is_some_and(|other| other != host.id) {
                return Err(Error::Moved(entry.branch())); // it is being started there; what comes of it is known soon
            }
            entry.update(|status| {
                if status.phase == Phase::Unknown {
                    status.phase = Phase::Starting;
                }
            });
            self.order(&entry, HostAction::Run);
            return Ok(());
        }
        if compute.runs && row.moment.is_none() {
            // The last control plane died while it stopped: the compute is told again, and has its time.
            let entry = self.computes.note(Entry::new(tenant, name, &row, size_of(&state, id), Phase::Stopping));
            entry.tell_to_end(Desired::Stop);
            if let Some(me) = self.me.upgrade() {
                self.environment.spawn(async move {
                    if let Err(error) = me.finish_stop(&entry).await {
                        tracing::warn!(compute = %entry.id, %error, "stopped");
                    }
                });
            }
            return Ok(());
        }
        let action = if is_expendable(&state, &row) { HostAction::Remove } else { HostAction::End };
        host.order_first(id, Entry::new(tenant, name, &row, size_of(&state, id), Phase::Stopping).order(action));
        Ok(())
    }

    /// What a host is to do; waits while that is what it knows already.
    ///
    /// # Errors
    /// [`Error::UnknownHost`] of one that has to say hello first.
    pub async fn host_orders(&self, id: &str, known: Option<u64>) -> Result<HostOrders, Error> {
        let host = self.host(id)?;
        *host.heard.lock() = self.environment.now();
        let is_news = |orders: &Orders| known != Some(orders.revision);
        let news = self.environment.within(ORDERS_WAIT, host.orders.wait_for(is_news)).await;
        *host.heard.lock() = self.environment.now();
        let orders = news.unwrap_or_else(|| host.orders.with(Orders::clone));
        Ok(HostOrders {
            revision: orders.revision,
            server_run: self.run.clone(),
            computes: orders.computes.into_values().collect(),
            template: orders.template,
        })
    }

    /// The host with this id.
    pub(crate) fn host(&self, id: &str) -> Result<Arc<Host>, Error> {
        let host = arguments::host_id(id)?;
        self.hosts.get(host).ok_or_else(|| Error::UnknownHost(host.to_string()))
    }

    /// What became of an order.
    ///
    /// # Errors
    /// [`Error::UnknownHost`], [`Error::UnknownCompute`].
    pub async fn report(&self, host: &str, compute: &str, report: ComputeReport) -> Result<(), Error> {
        let (host, id) = (self.host(host)?, arguments::endpoint_id(compute)?);
        *host.heard.lock() = self.environment.now();
        tracing::debug!(host = %host.id, compute = %id, ?report, "a host reports");
        // Once it is done the order is off the list; that a process is gone is what an end was ordered for.
        let done = match (&report, host.action(id)) {
            (ComputeReport::Removed, Some(action)) => action != HostAction::Run,
            (ComputeReport::Gone, Some(action)) => action == HostAction::End,
            _ => false,
        };
        if done {
            host.withdraw(id);
        }
        let Some(entry) = self.computes.get(id).filter(|entry| host_of(entry).is_none_or(|on| on == host.id)) else {
            return Ok(()); // of a compute that is on another host by now, or nowhere
        };
        let now = self.environment.now();
        entry.update(|status| match report {
            ComputeReport::Started { port } => {
                status.process = Process::Started;
                status.port = port;
            }
            ComputeReport::Refused { code, detail } => {
                let refusal = Refusal::new(Code::from_name(&code).unwrap_or(Code::HostUnfit), detail);
                if matches!(status.phase, Phase::Starting | Phase::Unknown) {
                    self.events.add(id, now, EventKind::StartFailed, &refusal.detail);
                    status.phase = Phase::Failed(refusal.detail.clone());
                }
                status.process = Process::Refused(refusal);
            }
            ComputeReport::Gone => {
                status.process = Process::Gone;
                if status.desired == Desired::Run && status.phase == Phase::Running {
                    status.phase = Phase::Starting; // the host starts it again
                }
            }
            ComputeReport::Removed => status.process = Process::Removed,
        });
        Ok(())
    }

    /// Orders something about a compute of its host, if that is known.
    pub(crate) fn order(&self, entry: &Entry, action: HostAction) {
        if let Some(host) = host_of(entry).and_then(|host| self.hosts.get(host)) {
            let order = entry.order(action);
            // What was answered already is not answered again.
            let stands = host.orders.with(|orders| orders.computes.get(&entry.id) == Some(&order));
            entry.update(|status| {
                status.noted = false;
                let is_over = action == HostAction::End && matches!(status.process, Process::Gone | Process::Removed);
                if !stands && !is_over {
                    status.process = Process::Unsaid;
                }
            });
            host.order(entry.id, order);
        }
    }

    /// Orders the end of a compute, waits for it if its host is there, and forgets it.
    pub(crate) async fn finish(&self, entry: &Arc<Entry>, action: HostAction) {
        self.order(entry, action);
        let host = host_of(entry).and_then(|host| self.hosts.get(host));
        if host.is_some_and(|host| host.is_here(self.environment.now())) {
            let wanted = |process: &Process| match action {
                HostAction::Remove => *process == Process::Removed,
                _ => matches!(process, Process::Gone | Process::Removed),
            };
            if entry.wait(&self.environment, FINISH_MAX, |status| wanted(&status.process)).await.is_none() {
                tracing::warn!(compute = %entry.id, ?action, "its host has not said yet that this is done");
            }
        }
        self.computes.remove(entry);
    }
}
