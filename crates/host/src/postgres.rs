//! One run of stock Postgres on a mounted data directory: start it, wait until it answers, stop it.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use varve_api::host::Begin;

use crate::asked::Asked;
use crate::cgroup::{CgroupError, Group, Limits};
use crate::config;
use crate::dirs::{Dirs, Isolation, User};
use crate::identity::ProcessId;
use crate::log::Log;
use crate::passage::Passage;
use crate::ports::{self, PortError};
use crate::record::RecordError;
use crate::sandbox::{Dialer, NetworkAccess, Running, SandboxError, Spec};
use crate::sessions::{PrivateSocket, Sessions};

/// How long Postgres may take until it answers.
const START_MAX: Duration = Duration::from_secs(120);
/// How often a starting Postgres is asked.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a fast shutdown may take (it writes a checkpoint and sends all WAL) before Postgres is killed.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Bytes of the server's log that an error quotes.
const LOG_TAIL: usize = 2000;
/// This program, whatever has become of its file.
const OURSELVES: &str = "/proc/self/exe";
/// What a sandbox gets. Processes and open files are far beyond what Postgres takes by default; shared memory is for
/// parallel queries.
const SHM_BYTES_MAX: u64 = 1 << 30;
const TMP_BYTES: u64 = 64 << 20;
const FILES_MAX: u64 = 4096;
/// Where util-linux has `setpriv`, which asks the kernel to end a program with its parent.
const SETPRIV: &str = "/usr/bin/setpriv";

/// Why Postgres did not start.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// There is no such program.
    #[error("there is no PostgreSQL {version} here: {path} does not exist; install it, or name its folder with --pg-bin-dir", path = .path.display())]
    Missing {
        /// The major.
        version: u32,
        /// Where it was expected.
        path: PathBuf,
    },
    /// It ended.
    #[error("postgres did not start ({status}); {log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// It ran, and took no connection.
    #[error("postgres did not answer within {limit:?}; {log}", limit = START_MAX)]
    Silent {
        /// The end of its log.
        log: String,
    },
    /// Its process could not be started or looked at.
    #[error("postgres cannot be started: {0}")]
    Io(#[from] io::Error),
    /// It could not be noted which process it is.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It has no sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Its control groups cannot be made.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Clients cannot reach it.
    #[error(transparent)]
    Port(#[from] PortError),
}

impl PostgresError {
    /// Whether it may go well another time: somebody or something killed it (an operator, want of memory), or it waited
    /// for a pageserver that was away. What Postgres itself says no to (a port that is taken) stays.
    pub fn is_transient(&self) -> bool {
        match self {
            PostgresError::Ended { status, .. } => status.signal().is_some(),
            PostgresError::Silent { .. } => true,
            PostgresError::Missing { .. }
            | PostgresError::Io(_)
            | PostgresError::Record(_)
            | PostgresError::Sandbox(_)
            | PostgresError::Cgroup(_)
            | PostgresError::Port(_) => false,
        }
    }
}

/// The processes of a Postgres.
#[derive(Debug)]
enum Processes {
    /// In a sandbox, with its log and, where it has a network of its own, the way in.
    Sandboxed { running: Running, log: Log, group: Group, passage: Option<Passage> },
    /// As they are.
    Plain(Child),
}

/// A running Postgres.
#[derive(Debug)]
pub struct Postgres {
    processes: Processes,
    pid: u32,
    sessions: Sessions,
}

impl Postgres {
    /// Starts the `postgres` in `bin_dir` and waits until it answers.
    ///
    /// # Errors
    /// When the binary is missing, or Postgres ends before it answers: the error quotes its log.
    pub async fn start(bin_dir: &Path, begin: &Begin, dirs: &Dirs, asked: &Asked) -> Result<Postgres, PostgresError> {
        let binary = bin_dir.join("postgres");
        if !binary.exists() {
            return Err(PostgresError::Missing { version: begin.pg_version, path: binary });
        }
        let mut postgres = match dirs.isolation() {
            Isolation::Sandbox { uid, network, limits } => {
                let group = dirs.group()?;
                group.make(&limits)?;
                let spec = Spec { cgroups: group.folders(), ..spec(bin_dir, dirs, uid, network, &limits)? };
                Self::sandboxed(spec, begin, dirs, asked).await?
            }
            Isolation::None(user) => Self::plain(&binary, begin, dirs, user, asked)?,
        };
        if let Err(error) = postgres.remember(dirs) {
            postgres.kill().await; // nobody could end it after us
            return Err(error.into());
        }
        postgres.answers(dirs).await?;
        if let Err(error) = postgres.let_clients_in(begin).await {
            postgres.kill().await;
            return Err(error);
        }
        Ok(postgres)
    }

    async fn sandboxed(spec: Spec, begin: &Begin, dirs: &Dirs, asked: &Asked) -> Result<Postgres, PostgresError> {
        let listen = begin.listen.clone();
        // Inside nobody knows names.
        let addresses = tokio::task::spawn_blocking(move || ports::numeric(&listen)).await.map_err(io::Error::other)??;
        let spec = Spec { arguments: config::arguments(begin, &addresses, dirs, asked), ..spec };
        let (running, pipe) = Running::start(Path::new(OURSELVES), &spec).await?;
        let pid = running.processes().map_or(0, |(_, postmaster)| postmaster);
        let processes = Processes::Sandboxed { running, log: Log::start(&dirs.log(), pipe), group: dirs.group()?, passage: None };
        Ok(Postgres { processes, pid, sessions: Sessions::new(PrivateSocket::new(dirs.socket(), begin.port, dirs.user().uid)) })
    }

    fn plain(binary: &Path, begin: &Begin, dirs: &Dirs, user: User, asked: &Asked) -> Result<Postgres, PostgresError> {
        let log = File::options().create(true).append(true).open(dirs.log())?;
        let mut command = bound_to_us(binary);
        command
            .args(config::arguments(begin, &begin.listen, dirs, asked))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .env_clear()
            .envs(environment());
        if rustix::process::geteuid().is_root() {
            command.uid(user.uid).gid(user.gid);
        }
        let child = command.spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("it ended as it started"))?;
        let sessions = Sessions::new(PrivateSocket::new(dirs.socket(), begin.port, dirs.user().uid));
        Ok(Postgres { processes: Processes::Plain(child), pid, sessions })
    }

    /// Notes what to end if we cannot: init of the sandbox, with which all of it ends, or the postmaster.
    fn remember(&self, dirs: &Dirs) -> Result<(), RecordError> {
        match &self.processes {
            Processes::Sandboxed { running, .. } => running.processes().map_or(Ok(()), |(init, _)| dirs.remember_postmaster(init.pid)),
            Processes::Plain(_) => dirs.remember_postmaster(self.pid),
        }
    }

    /// Waits until it answers.
    async fn answers(&mut self, dirs: &Dirs) -> Result<(), PostgresError> {
        let deadline = Instant::now() + START_MAX;
        loop {
            if self.sessions.socket().exists() && self.sessions.flushed().await.is_ok() {
                return Ok(());
            }
            if let Some(status) = self.try_wait()? {
                self.log_is_whole().await;
                return Err(PostgresError::Ended { status, log: log_tail(&dirs.log()) });
            }
            if Instant::now() > deadline {
                self.kill().await;
                return Err(PostgresError::Silent { log: log_tail(&dirs.log()) });
            }
            tokio::time::sleep(START_POLL).await;
        }
    }

    /// Opens the compute's port, where Postgres does not do that itself.
    async fn let_clients_in(&mut self, begin: &Begin) -> Result<(), PostgresError> {
        let Processes::Sandboxed { running, passage, .. } = &mut self.processes else { return Ok(()) };
        if let Some(namespace) = running.network()? {
            *passage = Some(Passage::open(&begin.listen, begin.port, Dialer::start(namespace)?)?);
        }
        Ok(())
    }

    /// The postmaster's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sessions of ours in it.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Makes Postgres read its configuration again.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        match &self.processes {
            Processes::Sandboxed { running, .. } => running.signal(signal),
            Processes::Plain(_) => {
                if let Some(pid) = Pid::from_raw(self.pid as i32) {
                    let _ = kill_process(pid, signal);
                }
            }
        }
    }

    /// Waits until Postgres ends by itself. May be dropped and called again.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.processes {
            Processes::Sandboxed { running, group, .. } => {
                let status = running.wait().await?;
                let kills = group.out_of_memory_kills();
                if kills > 0 {
                    tracing::warn!(kills, "the compute was out of memory: the kernel has killed processes of it");
                }
                Ok(status)
            }
            Processes::Plain(child) => child.wait().await,
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.processes {
            Processes::Sandboxed { running, .. } => running.try_wait(),
            Processes::Plain(child) => child.try_wait(),
        }
    }

    async fn log_is_whole(&mut self) {
        if let Processes::Sandboxed { log, .. } = &mut self.processes {
            log.rest().await;
        }
    }

    /// Fast shutdown: sessions end, a checkpoint is written, all WAL is sent. Whether it was clean.
    pub async fn stop(&mut self) -> bool {
        self.signal(Signal::INT);
        match tokio::time::timeout(STOP_MAX, self.wait()).await {
            Ok(Ok(status)) => status.success(),
            _ => {
                self.kill().await;
                false
            }
        }
    }

    /// Kills Postgres, its backends and, in a sandbox, whatever else they started, at once.
    pub async fn kill(&mut self) {
        match &mut self.processes {
            Processes::Sandboxed { running, .. } => running.kill().await,
            Processes::Plain(child) => {
                // Nobody has waited for it yet, so the number is still its own.
                if let Ok(Some(process)) = ProcessId::of(self.pid) {
                    let _ = tokio::task::spawn_blocking(move || process.kill_tree()).await;
                }
                let _ = child.kill().await;
            }
        }
    }
}

/// The sandbox of a compute: its own folders, and the installation of Postgres.
fn spec(bin_dir: &Path, dirs: &Dirs, uid: u32, network: NetworkAccess, limits: &Limits) -> io::Result<Spec> {
    // Programs find their libraries and files beside their folder.
    let installation = |bin_dir: &Path| bin_dir.parent().filter(|parent| parent.parent().is_some()).map(Path::to_owned);
    let mut read_only: Vec<PathBuf> = [bin_dir, &bin_dir.canonicalize()?].into_iter().filter_map(installation).collect();
    read_only.dedup();
    read_only.push(dirs.conf());
    Ok(Spec {
        uid,
        root: dirs.sandbox_root(),
        read_only,
        writable: vec![dirs.pgdata(), dirs.pg_wal(), dirs.socket()],
        network,
        shm_bytes: limits.memory_bytes.map_or(SHM_BYTES_MAX, |bytes| (bytes / 2).min(SHM_BYTES_MAX)),
        tmp_bytes: TMP_BYTES,
        files_max: FILES_MAX,
        cgroups: Vec::new(),
        program: bin_dir.join("postgres"),
        arguments: Vec::new(),
        environment: environment().into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
    })
}

fn environment() -> [(&'static str, &'static str); 3] {
    [("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LC_ALL", "C.UTF-8"), ("PGUSER", config::INTERNAL_ROLE)]
}

/// The program, to be ended at once (`SIGQUIT`, which a postmaster passes on to its backends) when we die, however that
/// comes. What has no `setpriv` has the record of the postmaster only, by which a successor ends it. The process stays
/// the same: `setpriv` becomes the program.
fn bound_to_us(binary: &Path) -> Command {
    if !Path::new(SETPRIV).exists() {
        tracing::warn!("there is no {SETPRIV}: if this process is killed, Postgres goes on until the host notices");
        return Command::new(binary);
    }
    let mut command = Command::new(SETPRIV);
    command.args(["--pdeathsig", "QUIT", "--"]).arg(binary);
    command
}

/// The end of a server's log, for an error.
fn log_tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
    format!("the end of {}:\n{}", path.display(), String::from_utf8_lossy(tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_killed_as_it_started_is_started_again() {
        let ended = |status| PostgresError::Ended { status: ExitStatus::from_raw(status), log: String::new() };
        assert!(ended(9).is_transient(), "kill -9 says nothing about its next start");
        assert!(!ended(1 << 8).is_transient(), "it says itself that it cannot start");
    }
}
