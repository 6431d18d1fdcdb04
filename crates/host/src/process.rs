//! The life of one compute process.
//!
//! An incarnation is one fresh start: *begin* (the server fences whoever wrote the branch before and names timeline and
//! base LSN), mount, start Postgres, *attach* (the server connects its WAL receiver), then follow orders. A clean stop
//! ends the process. Anything else that ends Postgres discards the cache and begins anew; nothing that was acknowledged
//! is in it alone.
//!
//! A restore is one commit in the tenant's log and knows nothing of us. We learn of it from a newer incarnation in the
//! orders, or from an attach that is refused as *fenced*, as after a restart of the server. Then we begin anew, and get
//! the branch's timeline of then.
//!
//! The server may die and come back under us: orders then fail for a while, and the answer to the first that succeeds
//! names another server run, to which we attach again. Our folder stays when we end; the host removes it when it is
//! told to.

use std::borrow::Cow;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use varve_api::Code;
use varve_api::admin::EventKind;
use varve_api::client::ClientError;
use varve_api::host::{Attach, Begin, Desired, Ended, Orders, OrdersQuery, size_text};
use varve_api::size::Size;
use varve_api::token::Token;
use varve_postgres::control::{ClusterState, ControlFile};
use varve_postgres::{Lsn, Major};

use crate::bin_dirs::{BinDirError, BinDirs};
use crate::cache_report::{self, Reporter};
use crate::check::Checks;
use crate::dirs::{Dirs, Isolation};
use crate::events::Events;
use crate::files::Uploader;
use crate::handover::{Handover, HandoverError};
use crate::kept_pages::Taken;
use crate::leftover::LeftoverError;
use crate::password;
use crate::postgres::{self, EmptySandbox, Postgres, PostgresError};
use crate::rebase;
use crate::record::{Record as _, RecordError, WriterRecord};
use crate::reserve;
use crate::server::{Server, is_fenced, is_transient};
use crate::sessions::SessionError;
use crate::sizing;
use crate::start::{self, MountError};
use crate::task::AbortOnDrop;
use crate::waiters;
use crate::wal_gate::WalGate;
use crate::{beneath, config};

/// Wait between tries to reach a server that is away.
const RETRY_WAIT: Duration = Duration::from_millis(100);
/// Longest wait between incarnations that fail to start.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Incarnations that may fail in a row before they ever ran; then the compute gives up and says why.
const FAILED_STARTS_MAX: u32 = 5;
/// Bytes of a control file (`PG_CONTROL_FILE_SIZE`).
const CONTROL_FILE_MAX: u64 = 8192;
/// How long the server may take until it takes the end of a compute.
const END_MAX: Duration = Duration::from_secs(60);

/// Said of a compute whose role was brought back.
const REPAIRED: &str = "the role 'varve' was gone or could not log in, and was brought back: Varve needs it to run this compute";

/// What a compute process is told when it starts.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Address of the control plane.
    pub server_url: String,
    /// The compute's id.
    pub id: String,
    /// Id of the host that started it.
    pub host: String,
    /// The compute's folder.
    pub home: PathBuf,
    /// Folder of sockets.
    pub run_dir: PathBuf,
    /// What it shows to the control plane.
    pub token: Token,
    /// Where the host puts another token.
    pub token_file: PathBuf,
    /// The Postgres installations.
    pub bin_dirs: BinDirs,
    /// How Postgres is kept apart.
    pub isolation: Isolation,
    /// How many bytes the mount's cache may take; none: whatever there is.
    pub cache_bytes: Option<u64>,
    /// How many bytes `pg_wal` may take; none: whatever there is.
    pub wal_bytes: Option<u64>,
}

/// Why a compute process cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The server refused.
    #[error(transparent)]
    Server(#[from] ClientError),
    /// There is no such Postgres here.
    #[error(transparent)]
    NoPostgres(#[from] BinDirError),
    /// The data directory could not be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Postgres did not start.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// The socket of the walsender could not be made.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// It could not be noted who writes here.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Something on this host.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Why Postgres runs no more, or must not.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("Postgres ended by itself ({0})")]
    PostgresEnded(std::process::ExitStatus),
    #[error("Postgres cannot be waited for: {0}")]
    Wait(std::io::Error),
    #[error("synchronous_standby_names was set by ALTER SYSTEM and could not be taken back")]
    StandbyNames,
    #[error("the server does not take us: {0}")]
    Refused(ClientError),
    #[error("Postgres does not take our role any more: {0}")]
    LockedOut(SessionError),
}

/// How an incarnation ended.
enum End {
    /// As ordered or signalled; nothing more is to be done.
    Stopped { clean: bool, reason: Cow<'static, str> },
    /// The server wants another incarnation, or the branch has another history.
    Replaced,
    /// Postgres or the mount failed.
    Failed(Failure),
}

/// How Postgres ended, where it did so cleanly.
struct CleanEnd {
    /// Its shutdown checkpoint.
    checkpoint: Lsn,
    /// What WAL does not give back.
    taken: Taken,
}

/// How a beginning ended.
enum Begun {
    Begin(Arc<Begin>),
    /// A signal says to end.
    Signalled,
    /// The server says that we are not to run.
    Unwanted(ClientError),
}

/// Runs compute `config.id` until it is stopped or fenced.
///
/// # Errors
/// When it cannot be started, after some tries, or the server refuses it.
pub async fn run(config: ProcessConfig) -> Result<(), ProcessError> {
    let server = Server::new(&config.server_url, &config.id, &config.host, config.token.clone(), config.token_file.clone())?;
    let dirs = Dirs::existing(&config.home, &config.run_dir, &config.id, config.isolation).with_wal_limit(config.wal_bytes);
    let events = Events::start(server.clone());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut failed_starts = 0;
    // Whether our role is to be brought back before Postgres starts.
    let mut repair = false;
    // Whether its Postgres ever ran in this process.
    let mut has_run = false;
    loop {
        let leftovers = dirs.clone();
        // Nobody may write there any more.
        if let Err(error) = tokio::task::spawn_blocking(move || leftovers.end_leftovers()).await {
            tracing::error!(%error, "what an earlier incarnation left was not ended");
        }
        let empty = matches!(config.isolation, Isolation::Sandbox { .. }).then(|| {
            let dirs = dirs.clone();
            AbortOnDrop(tokio::spawn(async move { EmptySandbox::make(&dirs).await }))
        });
        // What a predecessor was killed with belongs to the history that the next epoch begins with.
        if !send_leftover(&server, &dirs, &mut terminate).await {
            return Ok(());
        }
        let begin = match begin(&server, &mut terminate).await? {
            Begun::Begin(begin) => begin,
            Begun::Signalled => return Ok(()),
            Begun::Unwanted(error) => {
                tracing::info!(%error, "not wanted any more");
                return Ok(());
            }
        };
        tracing::info!(
            tenant = begin.tenant,
            branch = begin.branch,
            timeline = begin.timeline_id,
            base_lsn = begin.base_lsn,
            epoch = begin.epoch,
            incarnation = begin.incarnation,
            "beginning"
        );
        let preparing = dirs.clone();
        let prepared = tokio::task::spawn_blocking(move || preparing.prepare()).await.map_err(std::io::Error::other)?;
        let (mut ran, mut stopped) = (false, None);
        let end = match prepared {
            Ok(()) => {
                let (config, ends) = ((&config, &events), (&mut ran, &mut stopped));
                incarnation(&server, &begin, &dirs, config, &mut terminate, ends, (repair, empty)).await
            }
            Err(error) => Err(error.into()),
        };
        let repaired = std::mem::take(&mut repair);
        has_run |= ran;
        match end {
            Ok(End::Stopped { clean, reason }) => {
                tracing::info!(clean, reason = &*reason, "stopped");
                let end = stopped.take().filter(|_| clean);
                tell_end(&server, &begin, &dirs, end, &reason).await?;
                return Ok(());
            }
            Ok(End::Replaced) => {
                tracing::info!("another incarnation is wanted; beginning anew");
                failed_starts = 0;
            }
            Ok(End::Failed(failure)) => {
                tracing::warn!(%failure, "beginning anew from the pageserver");
                repair = matches!(failure, Failure::LockedOut(_)) && !repaired;
                failed_starts = if ran { 0 } else { failed_starts + 1 };
            }
            Err(ProcessError::Server(error)) if is_transient(&error) => {
                tracing::warn!(%error, "the server is away; beginning anew");
            }
            Err(ProcessError::Postgres(error)) if error.is_locked_out() && !repaired => {
                tracing::warn!(%error, "the role is to be repaired; beginning anew");
                repair = true;
            }
            Err(error) => {
                tracing::warn!(%error, "could not start");
                failed_starts += 1;
                let (mut reason, is_full) = (error.to_string(), reserve::comes_of_a_full_disk(&error));
                if is_full {
                    reason = format!("the disk of {} is full, make room there: {reason}", config.home.display());
                }
                let gives_up = failed_starts >= FAILED_STARTS_MAX || !(is_full || is_worth_another_try(&error));
                if is_full && has_run {
                    // Space comes back without anybody who starts it again.
                    if failed_starts == 1 {
                        events.tell(EventKind::DiskFull, reason);
                    }
                } else if gives_up {
                    tell_end(&server, &begin, &dirs, None, &reason).await?;
                    return Err(error);
                }
            }
        }
        if failed_starts > 0 {
            tokio::time::sleep((RETRY_WAIT * 2u32.pow(failed_starts.min(10))).min(BACKOFF_MAX)).await;
        }
    }
}

/// A first failure of the host or of Postgres itself (no binary, port taken, no /dev/fuse) is told at once; all else
/// may pass.
fn is_worth_another_try(error: &ProcessError) -> bool {
    match error {
        ProcessError::Server(error) => is_transient(error),
        ProcessError::Mount(error) => error.is_transient(),
        ProcessError::Postgres(error) => error.is_transient(),
        ProcessError::NoPostgres(_) | ProcessError::Handover(_) | ProcessError::Record(_) | ProcessError::Io(_) => false,
    }
}

/// Sends what is left in `pg_wal`, waiting as long as the server is away. False when a signal says to end.
async fn send_leftover(server: &Server, dirs: &Dirs, terminate: &mut Signal) -> bool {
    loop {
        match dirs.leftover().send(server).await {
            Ok(()) => return true,
            Err(LeftoverError::Server(error)) if is_transient(&error) => tracing::info!(%error, "waiting for the server"),
            Err(error) => {
                // What was acknowledged is not in question, and whoever begins is told more.
                tracing::warn!(%error, "what is left in pg_wal was not taken");
                return true;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_WAIT) => {}
            _ = terminate.recv() => return false,
        }
    }
}

/// Tells how it ended: cleanly, with the shutdown checkpoint that Postgres wrote, or otherwise. A clean end counts once
/// all of its WAL is durable, which may take several tries; when that takes too long, the end is not clean, and the
/// host keeps `pg_wal`. A server that does not want to know has made up its mind already.
async fn tell_end(server: &Server, begin: &Begin, dirs: &Dirs, stopped: Option<CleanEnd>, reason: &str) -> Result<(), ClientError> {
    let clean = stopped.is_some();
    let (checkpoint, taken) = stopped.map_or_else(Default::default, |end| (Some(end.checkpoint.to_string()), end.taken));
    let mut ended = Ended {
        incarnation: begin.incarnation,
        timeline_id: Some(begin.timeline_id.clone()),
        epoch: begin.epoch,
        clean,
        checkpoint,
        pages: taken.pages,
        warnings: taken.left_out,
        reason: reason.to_owned(),
    };
    let deadline = tokio::time::Instant::now() + END_MAX;
    loop {
        // Postgres sends all before it ends, unless nobody took it.
        if ended.clean
            && let Ok(Err(error)) = tokio::time::timeout_at(deadline, dirs.leftover().send(server)).await
        {
            tracing::info!(%error, "the rest of pg_wal is not taken yet");
        }
        match server.ended(&ended).await {
            Err(error) if is_unwanted(&error) => {
                tracing::info!(%error, "the server does not want to know of the end");
                return Ok(());
            }
            Err(error) if is_transient(&error) && tokio::time::Instant::now() < deadline => {
                tracing::info!(%error, "the end is told again");
                tokio::time::sleep(RETRY_WAIT).await;
            }
            Err(error) if ended.clean => {
                tracing::error!(%error, "whether all of its WAL is durable is not known");
                ended = Ended { clean: false, reason: error.to_string(), ..ended };
            }
            told => return told,
        }
    }
}

/// Whether the server says that it has nothing to do with us.
fn is_unwanted(error: &ClientError) -> bool {
    matches!(error.code(), Some(Code::UnknownCompute | Code::NotOwner | Code::Fenced))
}

/// Begins, waiting as long as the server is away.
async fn begin(server: &Server, terminate: &mut Signal) -> Result<Begun, ClientError> {
    loop {
        match server.begin().await {
            Ok(begin) => return Ok(Begun::Begin(Arc::new(begin))),
            Err(error) if is_transient(&error) => tracing::info!(%error, "waiting for the server"),
            // The branch moved while we began, or we are to end: the orders say which.
            Err(error) if is_fenced(&error) => match server.orders(&OrdersQuery::default()).await {
                Ok(Orders { desired: Desired::Run, .. }) => tracing::info!(%error, "beginning anew"),
                Ok(Orders { desired: Desired::Stop | Desired::Fenced, .. }) => return Ok(Begun::Unwanted(error)),
                Err(error) if is_transient(&error) => tracing::info!(%error, "waiting for the server"),
                Err(error) if is_unwanted(&error) => return Ok(Begun::Unwanted(error)),
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_WAIT) => {}
            _ = terminate.recv() => return Ok(Begun::Signalled),
        }
    }
}

async fn incarnation(
    server: &Server,
    begin: &Arc<Begin>,
    dirs: &Dirs,
    (config, events): (&ProcessConfig, &Events),
    terminate: &mut Signal,
    (ran, stopped): (&mut bool, &mut Option<CleanEnd>),
    (repair, empty): (bool, Option<AbortOnDrop<Result<EmptySandbox, PostgresError>>>),
) -> Result<End, ProcessError> {
    let bin_dir = config.bin_dirs.path(begin.pg_version);
    let uploader = Arc::new(Uploader::start(server.clone(), begin.incarnation, begin.epoch.is_some()));
    let (mount, brought, base) = start::mount(server, begin, dirs, &uploader, (config.cache_bytes, events)).await?;
    uploader.watch_access(dirs);
    if let Some(epoch) = begin.epoch {
        let writer = WriterRecord { timeline_id: begin.timeline_id.clone(), epoch, pg_version: begin.pg_version };
        writer.write(&dirs.leftover().record)?;
    }
    let gate = wal_gate(begin, dirs, events);
    let started = async {
        dirs.write("postgresql.conf", &config::postgresql_conf(dirs, begin.standby_name.as_deref(), &begin.size))?;
        if repair {
            postgres::repair(&bin_dir, begin, dirs, &brought).await?;
            tracing::warn!("{REPAIRED}");
        }
        let empty = match empty {
            Some(mut empty) => Some((&mut empty.0).await.map_err(std::io::Error::other)??),
            None => None,
        };
        Ok::<_, ProcessError>(Postgres::start(&bin_dir, begin, dirs, &brought, empty).await?)
    };
    let started = started.await;
    let mut postgres = match started {
        Ok(postgres) => postgres,
        Err(error) => {
            start::unmount(mount, dirs).await;
            return Err(error);
        }
    };
    *ran = true;
    let slot = gate.as_ref().filter(|_| begin.epoch.is_some()).map(|gate| AbortOnDrop(tokio::spawn(gate.follow(postgres.sessions()))));
    let waiters = AbortOnDrop(tokio::spawn(waiters::watch(postgres.pid(), brought.asked.tenants_wal_senders())));
    // The first orders take a way to the server and back, meanwhile.
    let orders = poll(server, known(begin, "", begin.size, None));
    let password = password::set(postgres.sessions(), &begin.password()).await;
    if begin.startup_blocks.is_empty() {
        start::tell_startup_blocks(server, &mount);
    }
    uploader.reload_with(postgres.pid());
    let (sizes, limits) = (watch::Sender::new(begin.size), watch::Sender::new(None));
    let of_us = (server.clone(), begin.incarnation);
    let reporter = Arc::new(Reporter::new(of_us, mount.statistics_of(), base.clone(), limits.subscribe()));
    let reports = AbortOnDrop(tokio::spawn(cache_report::tell(reporter.clone())));
    let rebases = rebase::keep(mount.rebaser(), postgres.sessions().clone(), base, reporter);
    // Without an epoch nobody takes what is written.
    let rebases = begin.epoch.map(|_| AbortOnDrop(tokio::spawn(rebases)));
    let kills = postgres.kills().cloned();
    let sizing = match (&kills, dirs.isolation()) {
        (Some(kills), Isolation::Sandbox { limits: host, .. }) => {
            let keep = sizing::keep(kills.clone(), host, sizes.subscribe(), limits, events.clone());
            Some(AbortOnDrop(tokio::spawn(keep)))
        }
        _ => None,
    };
    let mut warnings = brought.warnings;
    warnings.extend(repair.then(|| REPAIRED.to_owned()));
    let served = match password {
        Ok(password) => {
            let running = (&mut postgres, &*uploader);
            serve(server, begin, (dirs, &sizes), running, terminate, (warnings, password), orders).await
        }
        Err(error) => Ok(End::Failed(Failure::LockedOut(error))),
    };
    drop(rebases);
    let end = match served {
        Ok(End::Stopped { clean: true, reason }) => {
            let mut mount = mount;
            if let Some(gate) = &gate {
                gate.give_way();
            }
            if postgres.stop().await
                && let Some(checkpoint) = shutdown_checkpoint(begin, dirs).await
            {
                let mut taken = Taken::default();
                if begin.epoch.is_some() {
                    (mount, taken) = start::take_pages(mount, server, begin).await?;
                }
                *stopped = Some(CleanEnd { checkpoint, taken });
            }
            // Unmounting tells of the last changes to files, among them the statistics that Postgres has just written.
            start::unmount(mount, dirs).await;
            return Ok(match uploader.flush().await {
                Ok(()) => End::Stopped { clean: stopped.is_some(), reason },
                Err(error) => {
                    tracing::error!(%error, "not everything of this compute is kept");
                    End::Stopped { clean: false, reason: error.to_string().into() }
                }
            });
        }
        other => {
            // Its processes cannot be killed while they wait for a pageserver that is away.
            mount.stop_waiting();
            postgres.kill().await;
            other
        }
    };
    drop((waiters, reports, sizing, slot, gate));
    // Where that ended Postgres, it is told here.
    if let Some(kills) = &kills {
        kills.tell(events);
    }
    start::unmount(mount, dirs).await;
    // As after a crash of a stock server its files are what its processes had written, states of slots among them.
    if matches!(end, Ok(End::Failed(_)))
        && let Err(error) = uploader.flush().await
    {
        tracing::error!(%error, "not everything of this compute is kept");
    }
    end
}

/// Keeps the gate of `pg_wal`, where the kernel lets us.
fn wal_gate(begin: &Begin, dirs: &Dirs, events: &Events) -> Option<WalGate> {
    let events = events.clone();
    let told = Box::new(move |kind, words| events.tell(kind, words));
    let gate = WalGate::keep((&dirs.pg_wal(), dirs.wal_spare()), dirs.wal_cap(), begin.epoch.is_some(), told);
    if let Err(error) = &gate {
        tracing::warn!(%error, "pg_wal has no cap: only root can keep one");
    }
    gate.ok()
}

/// Where the shutdown checkpoint is with which Postgres ended, as its control file says; none if there is none.
async fn shutdown_checkpoint(begin: &Begin, dirs: &Dirs) -> Option<Lsn> {
    let (folder, major) = (dirs.pgdata(), Major::from_number(begin.pg_version)?);
    let read = move || {
        let mut bytes = Vec::new();
        beneath::file(&folder, "global/pg_control")?.take(CONTROL_FILE_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let read = tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other).flatten();
    let control = match read {
        Ok(bytes) => ControlFile::decode(&bytes, major),
        Err(error) => {
            tracing::error!(%error, "pg_control cannot be read");
            return None;
        }
    };
    match control {
        Ok(control) if control.state == ClusterState::ShutDown => Some(control.checkpoint),
        Ok(control) => {
            tracing::error!(state = control.state.name(), "Postgres ended without a shutdown checkpoint");
            None
        }
        Err(error) => {
            tracing::error!(%error, "pg_control cannot be read");
            None
        }
    }
}

async fn serve(
    server: &Server,
    begin: &Begin,
    (dirs, sizes): (&Dirs, &watch::Sender<Size>),
    (postgres, uploader): (&mut Postgres, &Uploader),
    terminate: &mut Signal,
    (warnings, mut setting_password): (Vec<String>, Option<AbortOnDrop>),
    mut orders: JoinHandle<Result<Orders, ClientError>>,
) -> Result<End, ProcessError> {
    // Open as long as the incarnation is attached or may be.
    let handover = Handover::open(&dirs.walsender(), postgres.sessions().socket())?;
    let mut attach = Attach {
        timeline_id: begin.timeline_id.clone(),
        epoch: begin.epoch,
        incarnation: begin.incarnation,
        pid: postgres.pid(),
        mount_pid: std::process::id(),
        walsender: handover.walsender(),
        flushed: String::new(),
        waits_for: None,
        warnings,
    };
    let mut standby_name = begin.standby_name.clone();
    let mut password_number = begin.password_number;
    let mut checks = Checks::new(server.clone(), begin.incarnation, postgres.sessions().clone());
    let mut server_run = String::new();
    // Nobody can have received WAL, and so acknowledged any, before the first attach.
    let mut flushed_at_start = Some(postgres.flushed_at_start());
    loop {
        let answer = tokio::select! {
            status = postgres.wait() => {
                orders.abort();
                return Ok(End::Failed(status.map_or_else(Failure::Wait, Failure::PostgresEnded)));
            }
            _ = terminate.recv() => {
                orders.abort();
                return Ok(End::Stopped { clean: true, reason: "told to end by a signal".into() });
            }
            () = uploader.standby_names_taken() => {
                tracing::error!("synchronous_standby_names is varve's: what ALTER SYSTEM set it to is taken back");
                if let Err(error) = postgres.sessions().take_back_standby_names().await {
                    tracing::error!(%error, "commits may not wait for the pageserver");
                    return Ok(End::Failed(Failure::StandbyNames));
                }
                postgres.reload();
                continue;
            }
            answer = &mut orders => answer.map_err(std::io::Error::other)?,
        };
        if let Ok(Orders { size: Some(size), .. }) = &answer {
            sizes.send_if_modified(|known| std::mem::replace(known, *size) != *size);
        }
        if let Ok(Orders { check: Some(check), .. }) = &answer {
            checks.follow(*check);
        }
        match answer {
            Ok(Orders { desired: Desired::Stop, .. }) => return Ok(End::Stopped { clean: true, reason: "stopped".into() }),
            Ok(Orders { desired: Desired::Fenced, .. }) => {
                return Ok(End::Stopped { clean: false, reason: "another compute writes the branch".into() });
            }
            Ok(Orders { incarnation, .. }) if incarnation > begin.incarnation => return Ok(End::Replaced),
            Ok(Orders { server_run: run, .. }) if run != server_run => {
                let flushed = match flushed_at_start.take() {
                    Some(flushed) => Ok(flushed),
                    None => postgres.sessions().flushed().await,
                };
                match flushed {
                    Ok(flushed) => {
                        attach.flushed = flushed.to_string();
                        attach.waits_for.clone_from(&standby_name);
                    }
                    Err(error) if error.is_locked_out() => {
                        return Ok(End::Failed(Failure::LockedOut(error)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "Postgres does not say how far its WAL is");
                        orders = poll(server, known(begin, &server_run, *sizes.borrow(), Some(&checks)));
                        tokio::time::sleep(RETRY_WAIT).await;
                        continue;
                    }
                }
                match server.attach(&attach).await {
                    Ok(attached) => {
                        if let Some(rotated) = attached.password.filter(|rotated| rotated.number > password_number) {
                            password_number = rotated.number;
                            drop(setting_password.take());
                            match password::set(postgres.sessions(), &rotated).await {
                                Ok(task) => setting_password = task,
                                Err(error) => return Ok(End::Failed(Failure::LockedOut(error))),
                            }
                        }
                        if attached.standby_name == standby_name {
                            server_run = run;
                        } else {
                            // A former server that still lives may have acknowledged more by now than we said is
                            // flushed. From here on it cannot, so we attach once more.
                            standby_name = attached.standby_name;
                            dirs.write("postgresql.conf", &config::postgresql_conf(dirs, standby_name.as_deref(), &begin.size))?;
                            postgres.reload();
                        }
                    }
                    Err(error) if is_transient(&error) => {
                        tracing::warn!(%error, "could not attach yet");
                        tokio::time::sleep(RETRY_WAIT).await;
                    }
                    Err(error) if is_fenced(&error) => {
                        tracing::info!(%error, "this history is not the branch's any more");
                        return Ok(End::Replaced);
                    }
                    Err(error) if error.code() == Some(Code::NotOwner) => {
                        tracing::error!(%error, "stopping; pg_wal is kept");
                        return Ok(End::Stopped { clean: false, reason: "another server owns the tenant".into() });
                    }
                    Err(error) => return Ok(End::Failed(Failure::Refused(error))),
                }
            }
            Ok(_) => {}
            Err(error) if is_transient(&error) => tokio::time::sleep(RETRY_WAIT).await,
            Err(error) => {
                tracing::warn!(%error, "no orders");
                return Ok(End::Stopped { clean: false, reason: "the server does not know this compute".into() });
            }
        }
        orders = poll(server, known(begin, &server_run, *sizes.borrow(), Some(&checks)));
    }
}

/// What we know of our orders.
fn known(begin: &Begin, server_run: &str, size: Size, checks: Option<&Checks>) -> OrdersQuery {
    OrdersQuery {
        incarnation: begin.incarnation,
        server_run: server_run.to_owned(),
        size: Some(size_text(&size)),
        check: Some(checks.map_or(0, Checks::number)),
    }
}

fn poll(server: &Server, known: OrdersQuery) -> JoinHandle<Result<Orders, ClientError>> {
    let server = server.clone();
    tokio::spawn(async move { server.orders(&known).await })
}
