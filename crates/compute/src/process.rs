//! The life of one compute process.
//!
//! An incarnation is one fresh start: *begin* (the pageserver fences whoever wrote the branch before and names the base LSN), mount,
//! start Postgres, *attach* (the pageserver connects its WAL receiver), then follow orders. A clean stop ends the process. Anything
//! else that ends Postgres discards cache and pg_wal and begins anew; nothing that was acknowledged is in them alone.
//!
//! The pageserver may die and come back under us: orders then fail for a while, and the answer to the first that succeeds names
//! another server run, to which we attach again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use varve_protocol::control::{Attach, Begin, Desired, Ended, Orders};

use crate::config;
use crate::dirs::{Dirs, User};
use crate::files::Uploader;
use crate::postgres::Postgres;
use crate::server::{Server, ServerError};
use crate::sessions::Sessions;
use crate::start;
use crate::waiters;

/// Wait between tries to reach a server that is away.
const RETRY_WAIT: Duration = Duration::from_millis(100);
/// Longest wait between incarnations that fail to start.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Incarnations that may fail in a row before they ever ran; then the compute gives up and says why.
const FAILED_STARTS_MAX: u32 = 5;

/// How long a start waits for the tenant's password to be set. Whoever connects should find it set; whoever commits already waits for us to attach.
const PASSWORD_WAIT: Duration = Duration::from_secs(2);
/// How long setting it may take behind locks of the tenant's, once the compute is attached.
const PASSWORD_MAX: Duration = Duration::from_secs(600);
/// How often that is tried. Each try that is given up may hold a walsender's place for as long as the lock is there.
const PASSWORD_TRIES: u32 = 3;

/// What a compute process is told on its command line.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Address of the admin HTTP API.
    pub server_url: String,
    /// The compute's id.
    pub id: String,
    /// The compute's folder.
    pub home: PathBuf,
}

/// Why a compute process cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The pageserver refused.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The HTTP client could not be made.
    #[error("no HTTP client: {0}")]
    Http(#[from] reqwest::Error),
    /// Something on this host.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// How an incarnation ended.
enum End {
    /// As ordered or signalled; nothing more is to be done.
    Stopped { clean: bool, reason: &'static str },
    /// The pageserver wants another incarnation.
    Replaced,
    /// Postgres or the mount failed.
    Failed(String),
}

/// Runs compute `config.id` until it is stopped or fenced.
///
/// # Errors
/// When it cannot be started, after some tries, or the pageserver refuses it.
pub async fn run(config: &ProcessConfig) -> Result<(), ProcessError> {
    let server = Server::new(&config.server_url, &config.id)?;
    let user = User::for_postgres()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut failed_starts = 0;
    loop {
        let begin = begin(&server, &mut terminate).await?;
        let Some(begin) = begin else { return Ok(()) };
        tracing::info!(
            tenant = begin.tenant,
            branch = begin.branch,
            timeline = begin.timeline_id,
            base_lsn = begin.base_lsn,
            epoch = begin.epoch,
            incarnation = begin.incarnation,
            "beginning"
        );
        let home = config.home.clone();
        let id = config.id.clone();
        let dirs = tokio::task::spawn_blocking(move || Dirs::prepare(&home, &id, user)).await.map_err(std::io::Error::other)??;
        let mut ran = false;
        let end = incarnation(&server, &begin, &dirs, &mut terminate, &mut ran).await;
        match end {
            Ok(End::Stopped { clean, reason }) => {
                tracing::info!(clean, reason, "stopped");
                let ended = Ended { incarnation: begin.incarnation, clean, reason: reason.to_owned() };
                server.ended(&ended).await?;
                tokio::task::spawn_blocking(move || dirs.remove()).await.map_err(std::io::Error::other)?;
                return Ok(());
            }
            Ok(End::Replaced) => {
                failed_starts = 0;
            }
            Ok(End::Failed(reason)) => {
                tracing::warn!(reason, "Postgres ended; beginning anew from the pageserver");
                failed_starts = if ran { 0 } else { failed_starts + 1 };
            }
            Err(ProcessError::Server(error)) if error.is_transient() => {
                tracing::warn!(%error, "the pageserver is away; beginning anew");
            }
            Err(error) => {
                tracing::warn!(%error, "could not start");
                failed_starts += 1;
                if failed_starts >= FAILED_STARTS_MAX || !is_worth_another_try(&error) {
                    let ended = Ended { incarnation: begin.incarnation, clean: false, reason: error.to_string() };
                    server.ended(&ended).await?;
                    return Err(error);
                }
            }
        }
        if failed_starts > 0 {
            tokio::time::sleep((RETRY_WAIT * 2u32.pow(failed_starts.min(10))).min(BACKOFF_MAX)).await;
        }
    }
}

fn is_worth_another_try(error: &ProcessError) -> bool {
    match error {
        ProcessError::Server(error) => error.is_transient(),
        ProcessError::Http(_) => false,
        // A first failure of the host or of Postgres itself (no binary, port taken, no /dev/fuse) is told at once.
        ProcessError::Io(_) => false,
    }
}

/// Begins, waiting as long as the server is away; `None` when told to end meanwhile.
async fn begin(server: &Server, terminate: &mut Signal) -> Result<Option<Begin>, ServerError> {
    loop {
        match server.begin().await {
            Ok(begin) => return Ok(Some(begin)),
            Err(error) if error.is_transient() => tracing::info!(%error, "waiting for the pageserver"),
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_WAIT) => {}
            _ = terminate.recv() => return Ok(None),
        }
    }
}

async fn incarnation(server: &Server, begin: &Begin, dirs: &Dirs, terminate: &mut Signal, ran: &mut bool) -> Result<End, ProcessError> {
    let uploader = Arc::new(Uploader::start(server.clone(), begin.incarnation, begin.epoch.is_some()));
    let mount = start::mount(begin, dirs, &uploader).await?;
    uploader.watch_hba(dirs);
    dirs.write("postgresql.conf", &config::postgresql_conf(dirs, begin.standby_name.as_deref()))?;
    let mut postgres = match Postgres::start(begin, dirs).await {
        Ok(postgres) => postgres,
        Err(error) => {
            start::unmount(mount, dirs).await;
            return Err(error.into());
        }
    };
    *ran = true;
    let waiters = AbortOnDrop(tokio::spawn(waiters::watch(postgres.pid())));
    let password = set_password(postgres.sessions(), &begin.password_verifier).await;
    if begin.startup_blocks.is_empty() {
        start::tell_startup_blocks(server, &mount);
    }
    uploader.reload_with(postgres.pid());
    let end = match serve(server, begin, dirs, (&mut postgres, &uploader), terminate).await {
        Ok(End::Stopped { clean: true, reason }) => {
            let clean = postgres.stop().await;
            // Unmounting tells of the last changes to files, among them the statistics that Postgres has just written.
            start::unmount(mount, dirs).await;
            uploader.flush().await;
            return Ok(End::Stopped { clean, reason });
        }
        other => {
            // Its processes cannot be killed while they wait for a pageserver that is away.
            mount.stop_waiting();
            postgres.kill().await;
            other
        }
    };
    drop((waiters, password));
    start::unmount(mount, dirs).await;
    end
}

/// A task that ends with what it serves.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Gives the superuser the tenant's password: now, or where locks or faults of the tenant's are in the way, later, by the task that this gives.
async fn set_password(sessions: &Sessions, verifier: &str) -> Option<AbortOnDrop> {
    let error = sessions.set_password(verifier, PASSWORD_WAIT).await.err()?;
    tracing::warn!(%error, "the tenant's password could not be set yet");
    let (sessions, verifier) = (sessions.clone(), verifier.to_owned());
    Some(AbortOnDrop(tokio::spawn(async move {
        for _ in 0..PASSWORD_TRIES {
            match sessions.set_password(&verifier, PASSWORD_MAX).await {
                Ok(()) => return tracing::info!("the tenant's password is set"),
                Err(error) => tracing::warn!(%error, "the tenant's password could not be set"),
            }
            tokio::time::sleep(BACKOFF_MAX).await;
        }
    })))
}

async fn serve(
    server: &Server,
    begin: &Begin,
    dirs: &Dirs,
    (postgres, uploader): (&mut Postgres, &Uploader),
    terminate: &mut Signal,
) -> Result<End, ProcessError> {
    let mut attach = Attach {
        timeline_id: begin.timeline_id.clone(),
        epoch: begin.epoch,
        incarnation: begin.incarnation,
        pid: postgres.pid(),
        mount_pid: std::process::id(),
        socket_dir: dirs.socket().display().to_string(),
        port: begin.port,
        flushed: String::new(),
    };
    let mut standby_name = begin.standby_name.clone();
    let mut server_run = String::new();
    let mut orders = poll(server, begin, &server_run);
    loop {
        let answer = tokio::select! {
            status = postgres.wait() => {
                orders.abort();
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                return Ok(End::Failed(format!("postgres ended by itself ({status})")));
            }
            _ = terminate.recv() => {
                orders.abort();
                return Ok(End::Stopped { clean: true, reason: "told to end by a signal" });
            }
            () = uploader.standby_names_taken() => {
                tracing::error!("synchronous_standby_names is varve's: what ALTER SYSTEM set it to is taken back");
                if let Err(error) = postgres.sessions().take_back_standby_names().await {
                    tracing::error!(%error, "commits may not wait for the pageserver");
                    return Ok(End::Failed("synchronous_standby_names was set by ALTER SYSTEM and could not be taken back".to_owned()));
                }
                postgres.reload();
                continue;
            }
            answer = &mut orders => answer.map_err(std::io::Error::other)?,
        };
        match answer {
            Ok(Orders { desired: Desired::Stop, .. }) => return Ok(End::Stopped { clean: true, reason: "stopped" }),
            Ok(Orders { desired: Desired::Fenced, .. }) => {
                return Ok(End::Stopped { clean: false, reason: "another compute writes the branch" });
            }
            Ok(Orders { incarnation, .. }) if incarnation != begin.incarnation => return Ok(End::Replaced),
            Ok(Orders { server_run: run, .. }) if run != server_run => {
                match postgres.sessions().flushed().await {
                    Ok(flushed) => attach.flushed = flushed.to_string(),
                    Err(error) => {
                        tracing::warn!(%error, "Postgres does not say how far its WAL is");
                        orders = poll(server, begin, &server_run);
                        tokio::time::sleep(RETRY_WAIT).await;
                        continue;
                    }
                }
                match server.attach(&attach).await {
                    Ok(attached) => {
                        server_run = run;
                        if attached.standby_name != standby_name {
                            standby_name = attached.standby_name;
                            dirs.write("postgresql.conf", &config::postgresql_conf(dirs, standby_name.as_deref()))?;
                            postgres.reload();
                        }
                    }
                    Err(error) if error.is_transient() => {
                        tracing::warn!(%error, "could not attach yet");
                        tokio::time::sleep(RETRY_WAIT).await;
                    }
                    Err(error) => return Ok(End::Failed(format!("the pageserver does not take us: {error}"))),
                }
            }
            Ok(_) => {}
            Err(error) if error.is_transient() => tokio::time::sleep(RETRY_WAIT).await,
            Err(error) => {
                tracing::warn!(%error, "no orders");
                return Ok(End::Stopped { clean: false, reason: "the pageserver does not know this compute" });
            }
        }
        orders = poll(server, begin, &server_run);
    }
}

fn poll(server: &Server, begin: &Begin, server_run: &str) -> JoinHandle<Result<Orders, ServerError>> {
    let (server, incarnation, server_run) = (server.clone(), begin.incarnation, server_run.to_owned());
    tokio::spawn(async move { server.orders(incarnation, &server_run).await })
}
