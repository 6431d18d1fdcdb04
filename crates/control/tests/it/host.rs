//! A host with compute processes that run no Postgres: they begin, attach and follow orders, by the same calls as real
//! ones.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use varve_api::host::{
    Attach, BeginRequest, ComputeOrder, ComputeReport, Desired, Ended, Hello, HostAction, HostedCompute, OrdersQuery, Walsender,
};
use varve_api::kept_pages::KeptPages;
use varve_api::size::Capacity;
use varve_api::{Code, Refusal};
use varve_control::{Control, Error};

use crate::pageserver::FakePageserver;

type Plane = Arc<Control<FakePageserver>>;

/// How a host behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manners {
    /// Ports that cannot be used.
    pub(crate) taken: Vec<u16>,
    /// Computes end uncleanly when they are told to stop.
    pub(crate) unclean: bool,
    /// Postgres does not start.
    pub(crate) broken: bool,
}

/// What a host has of a compute.
#[derive(Debug)]
struct Record {
    tenant: String,
    port: u16,
    process: Option<JoinHandle<()>>,
}

impl Record {
    fn runs(&self) -> bool {
        self.process.as_ref().is_some_and(|process| !process.is_finished())
    }
}

#[derive(Debug, Default)]
struct State {
    manners: Manners,
    records: BTreeMap<String, Record>,
    /// What was done, in order.
    did: Vec<String>,
    /// What each compute serves right now: timeline, incarnation.
    serves: BTreeMap<String, (String, u64)>,
}

/// See the module's doc. It outlives the control plane: [`FakeHost::connect`] says hello to another one.
#[derive(Clone, Debug)]
pub(crate) struct FakeHost {
    id: String,
    state: Arc<Mutex<State>>,
    plane: Arc<Mutex<Option<Plane>>>,
    agent: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl FakeHost {
    pub(crate) fn new(number: u8) -> FakeHost {
        let id = format!("{number:02x}").repeat(16);
        FakeHost { id, state: Arc::default(), plane: Arc::default(), agent: Arc::default() }
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.state.lock().manners);
    }

    /// How often it did what begins so.
    pub(crate) fn did(&self, what: &str) -> usize {
        self.state.lock().did.iter().filter(|did| did.starts_with(what)).count()
    }

    /// The timeline and incarnation that a compute serves.
    pub(crate) fn serves(&self, compute: &str) -> Option<(String, u64)> {
        self.state.lock().serves.get(compute).cloned()
    }

    /// Whether it has a record of a compute.
    pub(crate) fn has(&self, compute: &str) -> bool {
        self.state.lock().records.contains_key(compute)
    }

    /// The control plane is gone.
    pub(crate) fn disconnect(&self) {
        *self.plane.lock() = None;
        if let Some(agent) = self.agent.lock().take() {
            agent.abort();
        }
    }

    /// The machine is started anew: its processes are gone, its records are not.
    pub(crate) fn kill_processes(&self) {
        let mut state = self.state.lock();
        state.serves.clear();
        state.records.values_mut().filter_map(|record| record.process.take()).for_each(|process| process.abort());
    }

    /// Its processes reach a control plane to which it has not said hello yet.
    pub(crate) fn meet(&self, plane: &Plane) {
        *self.plane.lock() = Some(plane.clone());
    }

    /// Says hello to a control plane and does what it orders.
    pub(crate) async fn connect(&self, plane: &Plane) {
        self.disconnect();
        self.meet(plane);
        plane.hello(&self.id, self.hello()).await.unwrap();
        let (me, plane) = (self.clone(), plane.clone());
        *self.agent.lock() = Some(tokio::spawn(async move { me.agent(plane).await }));
    }

    fn hello(&self) -> Hello {
        let state = self.state.lock();
        let computes = state.records.iter();
        let computes = computes.map(|(id, record)| HostedCompute { id: id.clone(), tenant_id: record.tenant.clone(), runs: record.runs() });
        Hello {
            name: "machine".to_owned(),
            version: "0".to_owned(),
            run: "1".to_owned(),
            postgres: vec![(15, "15.20".to_owned()), (14, "14.23".to_owned())],
            lacks: vec![],
            problems: vec![],
            capacity: Some(Capacity { cpu_milli: 2000, memory_bytes: 4 << 30 }),
            computes: computes.collect(),
        }
    }

    async fn agent(&self, plane: Plane) {
        let mut known = None;
        loop {
            let orders = plane.host_orders(&self.id, known).await.unwrap();
            known = Some(orders.revision);
            for order in orders.computes {
                self.follow(&plane, order).await;
            }
            if let Some(template) = orders.template {
                let broken = self.state.lock().manners.broken;
                let failed = || Refusal::new(Code::HostUnfit, "initdb: no space left");
                let made = if broken { Err(failed()) } else { Ok(Bytes::from_static(b"an archive")) };
                let _ = plane.template_made(&self.id, &template.order, made).await;
            }
        }
    }

    async fn report(&self, plane: &Plane, id: &str, report: ComputeReport) {
        plane.report(&self.id, id, report).await.unwrap();
    }

    async fn follow(&self, plane: &Plane, order: ComputeOrder) {
        match order.action {
            HostAction::Run => self.start(plane, order).await,
            HostAction::End | HostAction::Remove => {
                let id = order.id;
                {
                    let mut state = self.state.lock();
                    state.serves.remove(&id);
                    if let Some(process) = state.records.get_mut(&id).and_then(|record| record.process.take()) {
                        process.abort();
                    }
                    state.did.push(format!("{:?} {id}", order.action));
                    if order.action == HostAction::Remove {
                        state.records.remove(&id);
                    }
                }
                let report = if order.action == HostAction::Remove { ComputeReport::Removed } else { ComputeReport::Gone };
                self.report(plane, &id, report).await;
            }
        }
    }

    async fn start(&self, plane: &Plane, order: ComputeOrder) {
        let id = order.id;
        if self.state.lock().manners.taken.contains(&order.port) {
            let detail = format!("port {} cannot be used", order.port);
            return self.report(plane, &id, ComputeReport::Refused { code: "port_in_use".to_owned(), detail }).await;
        }
        let (runs, port) = {
            let mut state = self.state.lock();
            let port = 5000 + state.records.len() as u16;
            let record = state.records.entry(id.clone()).or_insert(Record { tenant: order.tenant_id, port, process: None });
            record.port = if order.port == 0 { record.port } else { order.port };
            (record.runs(), record.port)
        };
        self.report(plane, &id, ComputeReport::Started { port }).await;
        if !runs {
            let (me, compute) = (self.clone(), id.clone());
            let process = tokio::spawn(async move { me.process(&compute).await });
            let mut state = self.state.lock();
            state.did.push(format!("start {id}"));
            if let Some(record) = state.records.get_mut(&id) {
                record.process = Some(process);
            }
        }
    }

    /// The control plane as it is now; waits while there is none.
    async fn plane(&self) -> Plane {
        loop {
            if let Some(plane) = self.plane.lock().clone() {
                return plane;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Calls until there is an answer that is not "later". A control plane that went away meanwhile answers nothing.
    async fn call<T, F: Future<Output = Result<T, Error>>>(&self, call: impl Fn(Plane) -> F) -> Result<T, Error> {
        loop {
            let plane = self.plane().await;
            let answer = call(plane.clone()).await;
            let is_there = self.plane.lock().as_ref().is_some_and(|now| Arc::ptr_eq(now, &plane));
            match answer {
                _ if !is_there => {}
                Err(error) if error.code() == Code::Unavailable => {}
                other => return other,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A compute process, from its start to its end.
    async fn process(&self, id: &str) {
        'incarnations: loop {
            let request = &BeginRequest { host: Some(self.id.clone()) };
            let Ok(begin) = self.call(|plane| async move { plane.begin(id, request).await }).await else { return };
            let Manners { broken, unclean, .. } = self.state.lock().manners.clone();
            let reason = "Postgres does not start".to_owned();
            let mut ended = Ended {
                incarnation: begin.incarnation,
                timeline_id: None,
                epoch: None,
                clean: false,
                checkpoint: None,
                pages: KeptPages::default(),
                warnings: Vec::new(),
                reason,
            };
            if broken {
                let ended = &ended;
                let _ = self.call(|plane| async move { plane.ended(id, ended).await }).await;
                return;
            }
            let mut run = String::new();
            loop {
                let query = &OrdersQuery { incarnation: begin.incarnation, server_run: run.clone(), size: None, check: None };
                let orders = self.call(|plane| async move { plane.orders(id, query).await }).await;
                let Ok(orders) = orders else { return };
                if orders.desired != Desired::Run {
                    self.state.lock().serves.remove(id);
                    let unclean = unclean || self.state.lock().manners.unclean;
                    ended.clean = orders.desired == Desired::Stop && !unclean;
                    ended.reason = "it was told to".to_owned();
                    let ended = &ended;
                    let _ = self.call(|plane| async move { plane.ended(id, ended).await }).await;
                    return;
                }
                if orders.incarnation != begin.incarnation {
                    continue 'incarnations;
                }
                if orders.server_run == run {
                    continue;
                }
                let attach = &Attach {
                    timeline_id: begin.timeline_id.clone(),
                    epoch: begin.epoch,
                    incarnation: begin.incarnation,
                    pid: 7,
                    mount_pid: 8,
                    walsender: Walsender { socket: "/run/x".to_owned(), credential: "c".to_owned() },
                    flushed: begin.base_lsn.clone(),
                    waits_for: None,
                    warnings: Vec::new(),
                };
                match self.call(|plane| async move { plane.attach(id, attach.clone()).await }).await {
                    Ok(_) => {
                        run = orders.server_run;
                        self.state.lock().serves.insert(id.to_owned(), (begin.timeline_id.clone(), begin.incarnation));
                    }
                    // As a real one: whatever it was that it served, it begins anew.
                    Err(_) => continue 'incarnations,
                }
            }
        }
    }
}
