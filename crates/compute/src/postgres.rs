//! One run of stock Postgres on a mounted data directory: start it, wait until it answers, stop it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use varve_protocol::control::Begin;

use crate::config;
use crate::dirs::{Dirs, kill_tree};
use crate::sessions::Sessions;

/// How long Postgres may take until it answers.
const START_MAX: Duration = Duration::from_secs(120);
/// How often a starting Postgres is asked.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a fast shutdown may take (it writes a checkpoint and sends all WAL) before Postgres is killed.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Bytes of the server's log that an error quotes.
const LOG_TAIL: usize = 2000;

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
    /// Starts `postgres` and waits until it answers.
    ///
    /// # Errors
    /// When the binary is missing, or Postgres ends before it answers: the error quotes its log.
    pub async fn start(begin: &Begin, dirs: &Dirs) -> io::Result<Postgres> {
        let binary = Path::new(&begin.pg_bin_dir).join("postgres");
        if !binary.exists() {
            return Err(io::Error::other(format!(
                "there is no PostgreSQL {} here: {} does not exist; install it, or name its folder with --pg-bin-dir",
                begin.pg_version,
                binary.display()
            )));
        }
        let log_path = dirs.file("postgres.log");
        let log = File::options().create(true).append(true).open(&log_path)?;
        let user = dirs.user();
        let mut command = Command::new(&binary);
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
        let pid = child.id().ok_or_else(|| io::Error::other("postgres ended as it started"))?;
        dirs.remember_postmaster(pid)?;
        let mut postgres = Postgres {
            child,
            pid,
            socket: dirs.socket().join(format!(".s.PGSQL.{}", begin.port)),
            sessions: Sessions::new(dirs.socket(), begin.port),
        };
        let deadline = Instant::now() + START_MAX;
        loop {
            if postgres.socket.exists() && postgres.sessions.flushed().await.is_ok() {
                return Ok(postgres);
            }
            if let Some(status) = postgres.child.try_wait()? {
                return Err(io::Error::other(format!("postgres did not start ({status}); {}", log_tail(&log_path))));
            }
            if Instant::now() > deadline {
                postgres.kill().await;
                return Err(io::Error::other(format!("postgres did not answer within {START_MAX:?}; {}", log_tail(&log_path))));
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
        let pid = self.pid;
        let _ = tokio::task::spawn_blocking(move || kill_tree(pid)).await;
        let _ = self.child.wait().await;
    }
}

/// The end of a server's log, for an error.
fn log_tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
    format!("the end of {}:\n{}", path.display(), String::from_utf8_lossy(tail))
}
