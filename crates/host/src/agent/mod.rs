//! A host: one process that runs computes on this machine, as the control plane orders.
//!
//! It has a folder of its own with a durable id, a record of each compute ([`crate::record`]), and each compute's
//! files. It says hello, polls orders, and has a [`keeper`] for each compute that sees to it. Compute processes outlive
//! us: what runs already is adopted by its record.
//!
//! What holds:
//! - A compute process runs only once its record is durable: a host that is killed in between leaves nothing unknown
//!   behind. The process waits for a line on its standard input, and ends where that closes without one.
//! - A process counts as gone when the kernel says so. It is started again only by orders that were asked for
//!   afterwards: the control plane may have told it to end.
//! - A folder goes only on [`varve_api::host::HostAction::Remove`]. A record that cannot be read is reported and left
//!   alone, and so is its compute.

mod control;
mod keeper;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use varve_api::client::{Client, ClientError};
use varve_api::host::{Hello, HostOrders, HostedCompute, TemplateOrder};
use varve_api::size::Capacity;
use varve_api::{Code, Refusal};

use crate::bin_dirs::BinDirs;
use crate::cgroup::{self, Limits};
use crate::dirs::{Dirs, Isolation, User};
use crate::initdb;
use crate::record::{ComputeRecord, HostRecord, Record as _, RecordError, write_file};
use crate::reserve;
use crate::sandbox::{self, NetworkAccess};
use crate::uids::{UidError, Uids};
use control::{Control, worth_another_try};
use keeper::{Keeper, Told};

pub use control::{TokenSource, TokenSourceError};

/// Wait between tries to reach a control plane that is away.
const RETRY_WAIT: Duration = Duration::from_millis(200);
/// Wait after a token was refused.
const TOKEN_WAIT: Duration = Duration::from_secs(1);
/// A control plane that is away for so long is worth a line in the log; so is each further minute.
const AWAY_TOLD: Duration = Duration::from_secs(3);
const AWAY_TOLD_AGAIN: Duration = Duration::from_secs(60);
/// How long the lock of a host that has just ended may stay: a process that it was starting has it until it becomes
/// another program.
const LOCK_MAX: Duration = Duration::from_secs(2);
/// How often the lock is tried.
const LOCK_WAIT: Duration = Duration::from_millis(20);
/// Where sockets are when we are root.
const RUN_OF_ROOT: &str = "/run/varve";

/// How a host is set up.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its own folder: id, records, computes.
    pub data: PathBuf,
    /// Address of the control plane.
    pub control_url: String,
    /// What it shows there.
    pub token: TokenSource,
    /// Its name, for people.
    pub name: String,
    /// Where the programs of Postgres majors are, beside Debian's places.
    pub pg_bin_dirs: Vec<(u32, PathBuf)>,
    /// How many bytes the cache of each compute's mount may take; none: whatever there is.
    pub cache_bytes: Option<u64>,
    /// How many bytes the `pg_wal` of each may take; none: whatever there is.
    pub wal_bytes: Option<u64>,
    /// Folder of sockets, with a short name; by default `/run/varve` for root, else `run` in `data`.
    pub run_dir: Option<PathBuf>,
    /// The `varve` program, which is run as `compute-process`.
    pub program: PathBuf,
    /// How computes are kept apart.
    pub sandboxing: Sandboxing,
}

/// How a host keeps its computes apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sandboxing {
    /// Each has a sandbox, with a user id from this range. Only root can make one.
    Full {
        /// The user ids, which nobody else uses on this machine.
        uids: Range<u32>,
        /// What computes see of networks.
        network: NetworkAccess,
        /// What each may take of the machine.
        limits: Limits,
    },
    /// Not at all. Then only one tenant's computes run here.
    None,
}

/// Why a host cannot run.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Its folder cannot be used.
    #[error("{path}: {source}", path = .path.display())]
    Folder {
        /// What of it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another host has the folder.
    #[error("{path} is in use by another host", path = .0.display())]
    InUse(PathBuf),
    /// Its identity cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The user ids of its computes cannot be had.
    #[error(transparent)]
    Uid(#[from] UidError),
    /// It has no token.
    #[error(transparent)]
    Token(#[from] TokenSourceError),
    /// The control plane refuses it.
    #[error("the control plane at {url} does not take this host: {source}")]
    Refused {
        /// Its address.
        url: String,
        /// What it says.
        source: ClientError,
    },
    /// No HTTP client.
    #[error(transparent)]
    Client(ClientError),
}

/// Runs a host until `shutdown`. Its computes go on; the next run adopts them.
///
/// # Errors
/// When its folder cannot be used, or the control plane refuses it for good.
pub async fn run(config: HostConfig, shutdown: CancellationToken) -> Result<(), HostError> {
    let agent = tokio::task::spawn_blocking(move || Agent::open(config)).await;
    let agent = agent.map_err(|error| HostError::Folder { path: PathBuf::new(), source: io::Error::other(error) })??;
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        ended = agent.serve() => ended,
    }
}

/// What all keepers share.
#[derive(Debug)]
struct Shared {
    config: HostConfig,
    bin_dirs: BinDirs,
    run_dir: PathBuf,
    /// Whom `initdb` runs as, and Postgres where it has no sandbox; none where there is nobody.
    user: Option<User>,
    /// Why no sandbox can be made here, if none can.
    no_sandbox: Mutex<Option<String>>,
    /// The user ids of this host's sandboxes.
    uids: Option<Uids>,
    control: Control,
    /// The computes that have a record.
    known: Mutex<BTreeMap<String, Known>>,
    /// Number of the newest poll that was begun.
    round: AtomicU64,
    /// Somebody needs orders that are newer than those of the poll that waits.
    refresh: Notify,
}

/// What is told of a compute at hello.
#[derive(Clone, Debug)]
struct Known {
    tenant: String,
    runs: bool,
    port: u16,
}

impl Shared {
    fn home(&self, id: &str) -> PathBuf {
        self.config.data.join(id)
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.config.data.join(format!("{id}.compute"))
    }

    fn log_path(&self, id: &str) -> PathBuf {
        self.config.data.join(format!("{id}.log"))
    }

    /// The token for compute processes whose own is not taken any more.
    fn token_path(&self) -> PathBuf {
        token_path(&self.config.data)
    }

    /// The folders of a compute whose sandbox has user `uid`, if it has one.
    fn dirs(&self, id: &str, uid: Option<u32>) -> Option<Dirs> {
        let isolation = match (&self.config.sandboxing, uid) {
            (Sandboxing::Full { network, limits, .. }, Some(uid)) => Isolation::Sandbox { uid, network: *network, limits: *limits },
            _ => Isolation::None(self.user?),
        };
        Some(Dirs::existing(&self.home(id), &self.run_dir, id, isolation))
    }

    /// A user id for the sandbox of a new compute; none where there are no sandboxes. Blocks.
    fn take_uid(&self) -> Result<Option<u32>, UidError> {
        self.uids.as_ref().map(Uids::take).transpose()
    }

    /// Why a compute of `tenant` cannot run beside those that are here.
    fn is_crowded(&self, tenant: &str) -> Option<String> {
        let is_other = |known: &Known| known.tenant != tenant;
        (self.config.sandboxing == Sandboxing::None && self.known.lock().values().any(is_other)).then(|| {
            "this host runs computes without a sandbox (--sandbox none), so those of one tenant only; another tenant's are here already"
                .to_owned()
        })
    }

    /// What this machine lacks to run computes.
    fn lacks(&self) -> Vec<String> {
        let mut lacks = Vec::new();
        if !Path::new("/dev/fuse").exists() {
            lacks.push(
                "there is no /dev/fuse here, which a compute's data directory needs: 'modprobe fuse', or allow the device in this container"
                    .to_owned(),
            );
        }
        if let Err(error) = User::for_postgres() {
            lacks.push(error.to_string());
        }
        lacks.extend(self.no_sandbox.lock().clone());
        lacks
    }

    /// The most that a compute gets here; none where there are no limits.
    fn capacity(&self) -> Option<Capacity> {
        let Sandboxing::Full { limits, .. } = &self.config.sandboxing else { return None };
        let (machine, processors) = (rustix::system::sysinfo(), std::thread::available_parallelism());
        let memory = machine.totalram.saturating_mul(machine.mem_unit.into());
        Some(Capacity {
            cpu_milli: limits.cpu_milli.unwrap_or_else(|| processors.map_or(1, |count| count.get() as u64) * 1000),
            memory_bytes: limits.memory_bytes.unwrap_or(memory),
        })
    }

    /// Tries whether sandboxes can be made.
    async fn try_sandbox(&self) {
        let Sandboxing::Full { uids, network, limits } = &self.config.sandboxing else {
            tracing::warn!(
                "--sandbox none: computes run as a user of this machine, unsandboxed. Whoever is superuser in one can read and change \
                 what that user can. For one tenant whom you trust"
            );
            return;
        };
        let why = if rustix::process::geteuid().is_root() {
            match sandbox::probe(&self.config.program, &self.run_dir, uids.start, *network, limits).await {
                Ok(()) => None,
                Err(error) => Some(error.to_string()),
            }
        } else {
            Some(
                "computes run in sandboxes, which only root can make: run varve as root, or, for one tenant whom you trust, with \
                 --sandbox none"
                    .to_owned(),
            )
        };
        *self.no_sandbox.lock() = why;
    }
}

fn token_path(data: &Path) -> PathBuf {
    data.join("token")
}

/// Whether an id may be part of file names here.
fn is_plain(id: &str) -> bool {
    (8..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

struct Running {
    told: watch::Sender<Told>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A host that has its folder.
struct Agent {
    shared: Arc<Shared>,
    id: String,
    /// Differs between our runs.
    run: String,
    /// Records found at start, each with what is known of its process.
    found: Vec<ComputeRecord>,
    /// Computes whose records cannot be read: nothing is done about them.
    unreadable: Vec<String>,
    /// Since when the control plane is away, and when the log is to be told next.
    away: Mutex<Option<(Instant, Instant)>>,
    /// Held as long as we run.
    _lock: File,
}

impl Agent {
    /// Takes the folder and reads the records. Blocks.
    fn open(config: HostConfig) -> Result<Agent, HostError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| HostError::Folder { path, source }
        };
        let mut config = config;
        std::fs::create_dir_all(&config.data).map_err(at(&config.data))?;
        std::fs::set_permissions(&config.data, std::fs::Permissions::from_mode(0o700)).map_err(at(&config.data))?;
        config.data = config.data.canonicalize().map_err(at(&config.data))?;
        let lock_path = config.data.join("lock");
        let lock = File::options().create(true).write(true).truncate(false).open(&lock_path).map_err(at(&lock_path))?;
        let deadline = Instant::now() + LOCK_MAX;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_WAIT),
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(HostError::InUse(config.data)),
                Err(error) => return Err(at(&lock_path)(error.into())),
            }
        }
        if let Err(error) = reserve::fill(&config.data) {
            tracing::warn!(folder = %config.data.display(), %error, "no space is set apart for this host's records");
        }
        let identity = config.data.join("host");
        let id = match HostRecord::read(&identity)? {
            Some(record) => record.id,
            None => {
                let record = HostRecord { id: uuid::Uuid::new_v4().simple().to_string() };
                record.write(&identity)?;
                record.id
            }
        };
        let token = config.token.token()?;
        write_file(&token_path(&config.data), token.reveal().as_bytes()).map_err(at(&token_path(&config.data)))?;
        let run_dir = config
            .run_dir
            .clone()
            .unwrap_or_else(|| if rustix::process::geteuid().is_root() { RUN_OF_ROOT.into() } else { config.data.join("run") });
        Dirs::make_run(&run_dir).map_err(at(&run_dir))?;
        let (found, unreadable) = read_records(&config.data).map_err(at(&config.data))?;
        let known = found.iter().map(|record| {
            let runs = record.process.as_ref().is_some_and(|process| process.runs().unwrap_or(true));
            (record.endpoint.clone(), Known { tenant: record.tenant.clone(), runs, port: record.port })
        });
        let known = Mutex::new(known.collect());
        let owner = |id: &String| std::fs::symlink_metadata(config.data.join(id).join("pg_wal")).ok().map(|found| found.uid());
        let uids = match &config.sandboxing {
            Sandboxing::Full { uids, .. } => Some(Uids::new(uids.clone(), &config.data)),
            Sandboxing::None => None,
        };
        if let Some(uids) = uids.as_ref().filter(|_| rustix::process::geteuid().is_root()) {
            if let Err(error) = cgroup::join_service() {
                tracing::warn!(%error, "this process has no control group of its own: computes that work hard may slow it down");
            }
            // Where a record cannot be read, the folder says whose it is.
            let recorded = found.iter().filter_map(|record| record.uid).chain(unreadable.iter().filter_map(owner));
            uids.begin(&recorded.collect::<Vec<_>>())?;
        }
        let client = Client::new(&config.control_url, Some(token)).map_err(HostError::Client)?;
        let shared = Arc::new(Shared {
            bin_dirs: BinDirs::new(config.pg_bin_dirs.clone()),
            run_dir,
            user: User::for_postgres().ok(),
            no_sandbox: Mutex::default(),
            uids,
            control: Control::new(client, config.token.clone(), &id),
            known,
            round: AtomicU64::new(0),
            refresh: Notify::new(),
            config,
        });
        let run = uuid::Uuid::new_v4().simple().to_string();
        Ok(Agent { shared, id, run, found, unreadable, away: Mutex::default(), _lock: lock })
    }

    async fn serve(mut self) -> Result<(), HostError> {
        let mut keepers: HashMap<String, Running> = HashMap::new();
        for record in std::mem::take(&mut self.found) {
            let id = record.endpoint.clone();
            keepers.insert(id.clone(), start_keeper(&self.shared, id, Some(record)));
        }
        tracing::info!(host = self.id, name = self.shared.config.name, computes = keepers.len(), "the host is there");
        let mut server_run = self.hello().await?;
        let mut template: Option<(String, JoinHandle<()>)> = None;
        let mut known = None;
        loop {
            let round = self.shared.round.fetch_add(1, Ordering::SeqCst) + 1;
            let answer = tokio::select! {
                answer = self.shared.control.orders(known) => answer,
                () = self.shared.refresh.notified() => {
                    known = None;
                    continue;
                }
            };
            match answer {
                Ok(orders) => {
                    self.is_reached();
                    if orders.server_run != server_run {
                        server_run = self.hello().await?;
                        known = None;
                        continue; // orders that the control plane gave before it knew what runs here
                    }
                    known = Some(orders.revision);
                    if let Some(order) = &orders.template
                        && template.as_ref().is_none_or(|(made, _)| *made != order.order)
                    {
                        template = Some((order.order.clone(), tokio::spawn(make_template(self.shared.clone(), order.clone()))));
                    }
                    self.deliver(&mut keepers, orders, round);
                }
                Err(error) => {
                    known = None;
                    let forgotten = error.code() == Some(Code::UnknownHost);
                    self.after(error).await?;
                    if forgotten {
                        server_run = self.hello().await?;
                    }
                }
            }
        }
    }

    /// Tells each keeper its order, and starts keepers for computes that are new here.
    fn deliver(&self, keepers: &mut HashMap<String, Running>, orders: HostOrders, round: u64) {
        let mut ordered: HashMap<String, _> = orders.computes.into_iter().map(|order| (order.id.clone(), order)).collect();
        for id in &self.unreadable {
            if ordered.remove(id).is_some() {
                tracing::error!(compute = id, "its record cannot be read, so nothing is done about it");
            }
        }
        ordered.retain(|id, _| {
            is_plain(id) || {
                tracing::error!(compute = id, "an order for an id that is none");
                false
            }
        });
        // Whose record is gone and who has no order any more is over.
        let known = self.shared.known.lock().clone();
        keepers.retain(|id, _| ordered.contains_key(id) || known.contains_key(id));
        for id in ordered.keys() {
            if !keepers.contains_key(id) {
                keepers.insert(id.clone(), start_keeper(&self.shared, id.clone(), None));
            }
        }
        for (id, keeper) in keepers.iter() {
            let told = Told { order: ordered.remove(id), round, server_run: orders.server_run.clone() };
            keeper.told.send_replace(told);
        }
    }

    /// Says hello until it is heard.
    async fn hello(&self) -> Result<String, HostError> {
        self.shared.try_sandbox().await;
        let shared = self.shared.clone();
        let facts = tokio::task::spawn_blocking(move || (shared.lacks(), shared.bin_dirs.installed(), shared.bin_dirs.problems())).await;
        let (lacks, installed, problems) = facts.unwrap_or_default();
        for problem in lacks.iter().chain(&problems) {
            tracing::warn!(problem, "this host cannot do everything");
        }
        loop {
            let known = self.shared.known.lock().clone();
            let computes = known.into_iter().map(|(id, known)| HostedCompute { id, tenant_id: known.tenant, runs: known.runs });
            let hello = Hello {
                name: self.shared.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                run: self.run.clone(),
                postgres: installed.iter().map(|found| (found.major.number(), found.version.clone())).collect(),
                lacks: lacks.clone(),
                problems: problems.clone(),
                capacity: self.shared.capacity(),
                computes: computes.collect(),
            };
            match self.shared.control.hello(&hello).await {
                Ok(welcome) => {
                    self.is_reached();
                    return Ok(welcome.server_run);
                }
                Err(error) => self.after(error).await?,
            }
        }
    }

    fn is_reached(&self) {
        if let Some((since, _)) = self.away.lock().take()
            && since.elapsed() >= AWAY_TOLD
        {
            tracing::info!(seconds = since.elapsed().as_secs(), "the control plane is there again");
        }
    }

    fn is_away(&self, error: &ClientError) {
        let now = Instant::now();
        let mut away = self.away.lock();
        let (since, tell) = away.get_or_insert((now, now + AWAY_TOLD));
        if now >= *tell {
            *tell = now + AWAY_TOLD_AGAIN;
            let (url, seconds) = (&self.shared.config.control_url, since.elapsed().as_secs());
            tracing::warn!(url, seconds, %error, "the control plane does not answer; computes that run go on, it is tried again");
        }
    }

    /// What a failed call means: wait and try again, or give up.
    async fn after(&self, error: ClientError) -> Result<(), HostError> {
        match error.code() {
            Some(Code::Unauthorized) => {
                tracing::warn!(%error, "the control plane does not take this host's token");
                if let Some(token) = self.shared.control.renew_token()
                    && let Err(error) = write_file(&self.shared.token_path(), token.reveal().as_bytes())
                {
                    tracing::warn!(%error, "compute processes do not get the new token");
                }
                tokio::time::sleep(TOKEN_WAIT).await;
            }
            // It forgot us; who calls says hello next.
            Some(Code::UnknownHost) => tokio::time::sleep(RETRY_WAIT).await,
            _ if worth_another_try(&error) => {
                self.is_away(&error);
                tokio::time::sleep(RETRY_WAIT).await;
            }
            _ => return Err(HostError::Refused { url: self.shared.config.control_url.clone(), source: error }),
        }
        Ok(())
    }
}

fn start_keeper(shared: &Arc<Shared>, id: String, record: Option<ComputeRecord>) -> Running {
    let (told, orders) = watch::channel(Told::default());
    let keeper = Keeper::new(shared.clone(), id, record, orders);
    Running { told, task: tokio::spawn(keeper.run()) }
}

/// The records in a folder, and the ids of those that cannot be read.
fn read_records(folder: &Path) -> io::Result<(Vec<ComputeRecord>, Vec<String>)> {
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_none_or(|extension| extension != "compute") {
            continue;
        }
        let id = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        match ComputeRecord::read(&path) {
            Ok(Some(record)) if record.endpoint == id && is_plain(&id) => found.push(record),
            Ok(None) => {}
            Ok(Some(_)) => {
                tracing::error!(path = %path.display(), "the record of another compute; it is left alone");
                unreadable.push(id);
            }
            Err(error) => {
                tracing::error!(%error, "a compute's record cannot be read");
                unreadable.push(id);
            }
        }
    }
    Ok((found, unreadable))
}

/// Runs `initdb` and sends what it made, or why it failed.
async fn make_template(shared: Arc<Shared>, order: TemplateOrder) {
    let started = Instant::now();
    let maker = shared.clone();
    let made = tokio::task::spawn_blocking(move || {
        let unfit = |detail: String| Refusal::new(Code::HostUnfit, detail);
        let postgres = maker.bin_dirs.find(order.pg_version).map_err(|error| unfit(error.to_string()))?;
        let user = User::for_postgres().map_err(|error| unfit(error.to_string()))?;
        initdb::template_archive(&postgres, user).map_err(|error| unfit(error.to_string()))
    });
    let made = made.await.unwrap_or_else(|error| Err(Refusal::internal(error)));
    match &made {
        Ok(archive) => tracing::info!(
            version = order.pg_version,
            bytes = archive.len(),
            elapsed_ms = started.elapsed().as_millis(),
            "a template is made"
        ),
        Err(refusal) => tracing::error!(version = order.pg_version, error = refusal.detail, "no template could be made"),
    }
    let made = made.map(bytes::Bytes::from).map_err(|refusal| refusal.problem());
    loop {
        match shared.control.template(&order.order, made.clone()).await {
            Ok(()) => return,
            Err(error) if worth_another_try(&error) => tokio::time::sleep(RETRY_WAIT).await,
            Err(error) => {
                tracing::error!(version = order.pg_version, %error, "the template was not taken");
                return;
            }
        }
    }
}
