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

use crate::config;
use crate::dirs::Dirs;
use crate::identity::ProcessId;
use crate::record::RecordError;
use crate::sessions::Sessions;

/// How long Postgres may take until it answers.
const START_MAX: Duration = Duration::from_secs(120);
/// How often a starting Postgres is asked.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a fast shutdown may take (it writes a checkpoint and sends all WAL) before Postgres is killed.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Bytes of the server's log that an error quotes.
const LOG_TAIL: usize = 2000;
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
}

impl PostgresError {
    /// Whether it may go well another time: somebody or something killed it (an operator, want of memory), or it waited
    /// for a pageserver that was away. What Postgres itself says no to (a port that is taken) stays.
    pub fn is_transient(&self) -> bool {
        match self {
            PostgresError::Ended { status, .. } => status.signal().is_some(),
            PostgresError::Silent { .. } => true,
            PostgresError::Missing { .. } | PostgresError::Io(_) | PostgresError::Record(_) => false,
        }
    }
}

/// A running Postgres.
#[derive(Debug)]
pub struct Postgres {
    child: Child,
    pid: u32,
    /// The socket, as a sign that asking is worth while.
    socket: PathBuf,
    sessions: Sessions,
}

impl Postgres {
    /// Starts the `postgres` in `bin_dir` and waits until it answers.
    ///
    /// # Errors
    /// When the binary is missing, or Postgres ends before it answers: the error quotes its log.
    pub async fn start(bin_dir: &Path, begin: &Begin, dirs: &Dirs) -> Result<Postgres, PostgresError> {
        let binary = bin_dir.join("postgres");
        if !binary.exists() {
            return Err(PostgresError::Missing { version: begin.pg_version, path: binary });
        }
        let log_path = dirs.file("postgres.log");
        let log = File::options().create(true).append(true).open(&log_path)?;
        let user = dirs.user();
        let mut command = bound_to_us(&binary);
        command
            .args(config::arguments(begin, dirs))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("PGUSER", config::INTERNAL_ROLE);
        if rustix::process::geteuid().is_root() {
            command.uid(user.uid).gid(user.gid);
        }
        let child = command.spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("it ended as it started"))?;
        let (socket, sessions) = (dirs.postgres_socket(begin.port), Sessions::new(dirs.socket(), begin.port));
        let mut postgres = Postgres { child, pid, socket, sessions };
        if let Err(error) = dirs.remember_postmaster(pid) {
            postgres.kill().await; // nobody could end it after us
            return Err(error.into());
        }
        let deadline = Instant::now() + START_MAX;
        loop {
            if postgres.socket.exists() && postgres.sessions.flushed().await.is_ok() {
                return Ok(postgres);
            }
            if let Some(status) = postgres.child.try_wait()? {
                return Err(PostgresError::Ended { status, log: log_tail(&log_path) });
            }
            if Instant::now() > deadline {
                postgres.kill().await;
                return Err(PostgresError::Silent { log: log_tail(&log_path) });
            }
            tokio::time::sleep(START_POLL).await;
        }
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
        if let Some(pid) = Pid::from_raw(self.pid as i32) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits until Postgres ends by itself. May be dropped and called again.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub async fn wait(&mut self) -> io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Fast shutdown: sessions end, a checkpoint is written, all WAL is sent. Whether it was clean.
    pub async fn stop(&mut self) -> bool {
        self.signal(Signal::INT);
        match tokio::time::timeout(STOP_MAX, self.child.wait()).await {
            Ok(Ok(status)) => status.success(),
            _ => {
                self.kill().await;
                false
            }
        }
    }

    /// Kills Postgres and its backends at once.
    pub async fn kill(&mut self) {
        // Nobody has waited for it yet, so the number is still its own.
        if let Ok(Some(process)) = ProcessId::of(self.pid) {
            let _ = tokio::task::spawn_blocking(move || process.kill_tree()).await;
        }
        let _ = self.child.kill().await;
    }
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
