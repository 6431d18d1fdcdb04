//! A host does what a control plane orders, through its own restarts. The control plane and the compute processes are
//! stand-ins.

use std::collections::BTreeMap;
use std::net::TcpListener as StdListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use varve_api::host::{ComputeOrder, ComputeReport, Hello, HostAction, HostOrders, TemplateOrder, Welcome};
use varve_api::token::Token;
use varve_host::agent::{self, HostConfig, HostError, Sandboxing, TokenSource};
use varve_host::identity::ProcessId;
use varve_host::record::{ComputeRecord, Record as _};

const LIMIT: Duration = Duration::from_secs(30);
const TOKEN: &str = "a token of the host";
const ID: &str = "0123456789abcdef0123456789abcdef";

#[derive(Default)]
struct Seen {
    hellos: Vec<Hello>,
    reports: Vec<ComputeReport>,
    templates: Vec<(String, Bytes)>,
    /// How many reports are refused.
    refuse: usize,
}

struct Control {
    orders: watch::Sender<HostOrders>,
    seen: Mutex<Seen>,
    token: Mutex<String>,
    url: String,
}

impl Control {
    async fn start() -> Arc<Control> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let orders = HostOrders { revision: 1, server_run: "run 1".to_owned(), computes: Vec::new(), template: None };
        let control = Arc::new(Control {
            orders: watch::channel(orders).0,
            seen: Mutex::default(),
            token: Mutex::new(TOKEN.replace(' ', "-")),
            url: format!("http://{}", listener.local_addr().unwrap()),
        });
        let app = Router::new()
            .route("/v1/hosts/{host}/hello", post(hello))
            .route("/v1/hosts/{host}/orders", get(orders_of))
            .route("/v1/hosts/{host}/computes/{compute}", post(report))
            .route("/v1/hosts/{host}/templates/{order}", post(template).layer(axum::extract::DefaultBodyLimit::max(64 << 20)))
            .with_state(control.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        control
    }

    fn order(&self, change: impl FnOnce(&mut HostOrders)) {
        self.orders.send_modify(|orders| {
            change(orders);
            orders.revision += 1;
        });
    }

    fn run(&self, id: &str, port: u16, action: HostAction) {
        let (id, text) = (id.to_owned(), |text: &str| text.to_owned());
        let order = ComputeOrder { id, tenant_id: text("t"), branch: text("acme/main"), listen: text("127.0.0.1"), port, action };
        self.order(|orders| orders.computes = vec![order]);
    }

    fn may(&self, headers: &HeaderMap) -> bool {
        headers["authorization"].to_str().unwrap() == format!("Bearer {}", self.token.lock())
    }

    /// Waits until `found` finds something in what was seen.
    async fn until<T>(&self, what: &str, mut found: impl FnMut(&Seen) -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = found(&self.seen.lock()) {
                return found;
            }
            let reports = self.seen.lock().reports.clone();
            assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}; reports: {reports:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The `n`th report, once it is there.
    async fn report(&self, n: usize) -> ComputeReport {
        self.until(&format!("report {n}"), |seen| seen.reports.get(n).cloned()).await
    }
}

async fn hello(State(control): State<Arc<Control>>, headers: HeaderMap, Json(hello): Json<Hello>) -> Result<Json<Welcome>, StatusCode> {
    if !control.may(&headers) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    control.seen.lock().hellos.push(hello);
    Ok(Json(Welcome { server_run: control.orders.borrow().server_run.clone() }))
}

async fn orders_of(State(control): State<Arc<Control>>, Query(query): Query<BTreeMap<String, u64>>) -> Json<HostOrders> {
    let known = query.get("known").copied();
    let mut orders = control.orders.subscribe();
    let _ = tokio::time::timeout(Duration::from_secs(5), orders.wait_for(|orders| Some(orders.revision) != known)).await;
    Json(orders.borrow().clone())
}

async fn report(State(control): State<Arc<Control>>, headers: HeaderMap, Json(report): Json<ComputeReport>) -> StatusCode {
    if !control.may(&headers) {
        return StatusCode::UNAUTHORIZED;
    }
    let mut seen = control.seen.lock();
    // That it runs may be said again, to each run of the host and of the control plane.
    if !matches!(report, ComputeReport::Started { .. }) || seen.reports.last() != Some(&report) {
        seen.reports.push(report);
    }
    if seen.refuse > 0 {
        seen.refuse -= 1;
        return StatusCode::CONFLICT;
    }
    StatusCode::OK
}

async fn template(
    State(control): State<Arc<Control>>,
    UrlPath((_, order)): UrlPath<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    assert_eq!(headers["content-type"], "application/zstd", "{order}: {}", String::from_utf8_lossy(&body));
    control.seen.lock().templates.push((order, body));
    StatusCode::OK
}

/// A machine: a folder for the host, and a program in the place of `varve`, which notes each start that got its line.
struct Machine {
    folder: tempfile::TempDir,
    control: Arc<Control>,
}

impl Machine {
    async fn new() -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("varve");
        let script = "#!/bin/sh\nread line || exit 7\n[ -d \"$9\" ] || mkdir \"$9\"\necho \"$$ $line\" >> \"$9.starts\"\nexec sleep 600\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Machine { control: Control::start().await, folder }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    fn config(&self) -> HostConfig {
        HostConfig {
            data: self.data(),
            control_url: self.control.url.clone(),
            token: TokenSource::Given(Token::parse(&TOKEN.replace(' ', "-")).unwrap()),
            name: "machine".to_owned(),
            pg_bin_dirs: Vec::new(),
            cache_bytes: None,
            wal_bytes: None,
            run_dir: Some(self.folder.path().join("run")),
            program: self.folder.path().join("varve"),
            sandboxing: Sandboxing::None,
        }
    }

    fn host(&self) -> Host {
        let shutdown = CancellationToken::new();
        Host { task: tokio::spawn(agent::run(self.config(), shutdown.clone())), shutdown }
    }

    /// Process ids of the starts that got their line, with it.
    async fn starts(&self, n: usize) -> Vec<(u32, String)> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = std::fs::read_to_string(self.data().join(format!("{ID}.starts"))).unwrap_or_default();
            let starts: Vec<(u32, String)> =
                text.lines().map(|line| line.split_once(' ').unwrap()).map(|(pid, line)| (pid.parse().unwrap(), line.to_owned())).collect();
            if starts.len() >= n {
                assert_eq!(starts.len(), n, "{starts:?}");
                return starts;
            }
            assert!(Instant::now() < deadline, "waited {LIMIT:?} for start {n}: {starts:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn record(&self) -> Option<ComputeRecord> {
        ComputeRecord::read(&self.data().join(format!("{ID}.compute"))).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(text) = std::fs::read_to_string(self.data().join(format!("{ID}.starts"))) {
            text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).for_each(kill);
        }
    }
}

struct Host {
    task: JoinHandle<Result<(), HostError>>,
    shutdown: CancellationToken,
}

impl Host {
    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task).await.expect("the host ends when it is told to").unwrap().unwrap();
    }
}

fn runs(pid: u32) -> bool {
    ProcessId::of(pid).unwrap().is_some()
}

fn kill(pid: u32) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compute_outlives_its_host_is_adopted_started_again_ended_and_removed() {
    let machine = Machine::new().await;
    let control = machine.control.clone();
    let host = machine.host();
    control.run(ID, 0, HostAction::Run);
    let ComputeReport::Started { port } = control.report(0).await else { panic!("expected a start") };
    let (pid, line) = machine.starts(1).await.remove(0);
    assert_eq!(line, TOKEN.replace(' ', "-"), "the token comes on standard input");
    let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!arguments.contains("token-of"), "{arguments}");
    let record = machine.record().unwrap();
    assert_eq!((record.port, record.process.map(|process| process.pid)), (port, Some(pid)));
    assert!(matches!(agent::run(machine.config(), CancellationToken::new()).await, Err(HostError::InUse(_))), "one host a folder");

    host.stop().await;
    assert!(runs(pid), "a compute outlives its host");
    let host = machine.host();
    let hello = control.until("a second hello", |seen| seen.hellos.get(1).cloned()).await;
    assert_eq!((hello.computes[0].id.as_str(), hello.computes[0].runs), (ID, true));
    assert_eq!(control.seen.lock().hellos[0].computes, []);

    // Neither our child nor polled: the kernel tells.
    kill(pid);
    assert_eq!(control.report(1).await, ComputeReport::Gone);
    assert_eq!(control.report(2).await, ComputeReport::Started { port }, "it keeps its port");
    let pid = machine.starts(2).await[1].0;

    let kept = machine.data().join(ID).join("pg_wal");
    std::fs::create_dir(&kept).unwrap();
    control.run(ID, port, HostAction::End);
    assert_eq!(control.report(3).await, ComputeReport::Gone);
    assert!(!runs(pid) && kept.exists(), "what it wrote last is kept");
    host.stop().await;
    let host = machine.host();
    control.run(ID, port, HostAction::Remove);
    control.until("the removal", |seen| (seen.reports.last() == Some(&ComputeReport::Removed)).then_some(())).await;
    assert!(!machine.data().join(ID).exists() && machine.record().is_none());
    machine.starts(2).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_control_plane_does_not_know_of_does_not_begin() {
    let machine = Machine::new().await;
    let control = machine.control.clone();
    control.seen.lock().refuse = 1;
    control.run(ID, 0, HostAction::Run);
    let host = machine.host();
    assert!(matches!(control.report(0).await, ComputeReport::Started { .. }));
    assert_eq!(control.report(1).await, ComputeReport::Gone, "without its line the process ends");
    assert!(matches!(control.report(2).await, ComputeReport::Started { .. }));
    machine.starts(1).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_refused_and_had_once_it_is_free() {
    let machine = Machine::new().await;
    let taken = StdListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    machine.control.run(ID, port, HostAction::Run);
    let host = machine.host();
    let ComputeReport::Refused { code, detail } = machine.control.report(0).await else { panic!("expected a refusal") };
    assert!(code == "port_in_use" && detail.contains(&port.to_string()), "{code}: {detail}");
    assert!(machine.record().is_none());
    drop(taken);
    assert_eq!(machine.control.report(1).await, ComputeReport::Started { port }, "told once, tried again");
    machine.starts(1).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_record_is_left_alone_and_so_is_its_compute() {
    let machine = Machine::new().await;
    std::fs::create_dir_all(machine.data()).unwrap();
    let path = machine.data().join(format!("{ID}.compute"));
    std::fs::write(&path, b"VHCRnothing good").unwrap();
    let other = "fedcba9876543210fedcba9876543210";
    machine.control.run(ID, 0, HostAction::Remove);
    let host = machine.host();
    machine.control.until("a hello", |seen| seen.hellos.first().map(drop)).await;
    // What is done about another one comes after what would have been done about this one.
    machine.control.run(other, 0, HostAction::Remove);
    assert_eq!(machine.control.report(0).await, ComputeReport::Removed);
    assert_eq!(std::fs::read(&path).unwrap(), b"VHCRnothing good");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_comes_back_is_told_what_runs_and_a_new_token_is_read() {
    let machine = Machine::new().await;
    let control = machine.control.clone();
    let file = machine.folder.path().join("token-file");
    std::fs::write(&file, TOKEN.replace(' ', "-")).unwrap();
    let config = HostConfig { token: TokenSource::File(file.clone()), ..machine.config() };
    let shutdown = CancellationToken::new();
    let host = Host { task: tokio::spawn(agent::run(config, shutdown.clone())), shutdown };
    control.run(ID, 0, HostAction::Run);
    machine.starts(1).await;
    *control.token.lock() = "another-token-of-the-host".to_owned();
    std::fs::write(&file, "another-token-of-the-host\n").unwrap();
    control.order(|orders| orders.server_run = "run 2".to_owned());
    let hello = control.until("a second hello", |seen| seen.hellos.get(1).cloned()).await;
    assert!(hello.computes[0].runs && hello.run == control.seen.lock().hellos[0].run);
    let passed_on = std::fs::read_to_string(machine.data().join("token")).unwrap();
    assert_eq!(passed_on, "another-token-of-the-host", "compute processes find it there");
    machine.starts(1).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_is_made_and_sent() {
    let machine = Machine::new().await;
    let host = machine.host();
    let hello = machine.control.until("a hello", |seen| seen.hellos.first().cloned()).await;
    let (major, version) = hello.postgres.last().expect("this machine has a Postgres").clone();
    assert!(version.starts_with(&major.to_string()), "{version}");
    machine.control.order(|orders| orders.template = Some(TemplateOrder { order: "o1".to_owned(), pg_version: major }));
    let (order, archive) = machine.control.until("a template", |seen| seen.templates.first().cloned()).await;
    assert!(order == "o1" && archive.len() < 10 << 20, "{order}: {} bytes", archive.len());
    let mut names = Vec::new();
    let mut tar = tar::Archive::new(zstd::Decoder::new(&archive[..]).unwrap());
    for entry in tar.entries().unwrap() {
        names.push(entry.unwrap().path().unwrap().into_owned());
    }
    for name in ["PG_VERSION", "global/pg_control", "pg_wal"] {
        assert!(names.iter().any(|found| found == Path::new(name)), "{name} is in {names:?}");
    }
    assert!(!names.iter().any(|name| name == Path::new("postmaster.pid")), "it was stopped");
    host.stop().await;
}
