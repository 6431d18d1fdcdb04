//! One run of stock Postgres on a mounted data directory: start it, wait until it answers, stop it.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use varve_api::host::Begin;

use crate::config;
use crate::dirs::Dirs;
use crate::identity::ProcessId;
use crate::record::RecordError;
use crate::sessions::{SessionError, Sessions};
use crate::start_failure::{Given, Said};

/// How long Postgres may take until it answers: as long as it says that it starts, or nothing at all.
const START_MAX: Duration = Duration::from_secs(120);
/// How long it may refuse our login for a reason that may pass.
const REFUSED_MAX: Duration = Duration::from_secs(3);
/// How often a starting Postgres is asked.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a fast shutdown may take (it writes a checkpoint and sends all WAL) before Postgres is killed.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Bytes of what a start logged that are looked at for an error.
const LOG_TAIL: u64 = 256 * 1024;
/// How long single-user mode may take.
const REPAIR_MAX: Duration = Duration::from_secs(60);
/// Databases that single-user mode is tried in: nobody gets rid of the first one without changing catalogues by hand.
const REPAIR_DATABASES: [&str; 3] = ["template0", "template1", "postgres"];
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
    #[error("postgres did not start ({status}); {said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Why, as its log has it.
        said: Box<Said>,
    },
    /// It ran, and took no connection.
    #[error("postgres did not answer within {limit:?}; {said}", limit = START_MAX)]
    Silent {
        /// What its log has.
        said: Box<Said>,
    },
    /// It runs, and does not let us in.
    #[error("postgres runs and refuses varve's own login: {error}; {said}")]
    Refused {
        /// In its words.
        error: SessionError,
        /// What its log has.
        said: Box<Said>,
    },
    /// Single-user mode did not bring the internal role back.
    #[error("the role '{role}' could not be repaired ({status}); {said}", role = config::INTERNAL_ROLE)]
    NotRepaired {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: Box<Said>,
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
    /// for a pageserver that was away. What Postgres itself says no to (a port that is taken) stays, and so does a
    /// fault of its own (of a library that is to be preloaded).
    pub fn is_transient(&self) -> bool {
        match self {
            PostgresError::Ended { status, .. } => {
                let killed = [Signal::KILL, Signal::TERM, Signal::INT, Signal::QUIT, Signal::HUP];
                status.signal().is_some_and(|signal| killed.iter().any(|killed| killed.as_raw() == signal))
            }
            PostgresError::Silent { .. } => true,
            PostgresError::Refused { .. }
            | PostgresError::NotRepaired { .. }
            | PostgresError::Missing { .. }
            | PostgresError::Io(_)
            | PostgresError::Record(_) => false,
        }
    }

    /// Whether our role is not there, or may not log in: what [`repair`] is for.
    pub fn is_locked_out(&self) -> bool {
        matches!(self, PostgresError::Refused { error, .. } if error.is_locked_out())
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
    /// Starts the `postgres` in `bin_dir` and waits until it answers. `settings` are those that its branch brings, to
    /// be named where one of them is why it does not start.
    ///
    /// # Errors
    /// When the binary is missing, or Postgres ends before it answers, or does not let us in: the error quotes its log.
    pub async fn start(bin_dir: &Path, begin: &Begin, dirs: &Dirs, settings: &[Given]) -> Result<Postgres, PostgresError> {
        let binary = bin_dir.join("postgres");
        if !binary.exists() {
            return Err(PostgresError::Missing { version: begin.pg_version, path: binary });
        }
        let log = Log::open(dirs)?;
        let mut command = command(&binary, dirs);
        command
            .args(config::arguments(begin, dirs))
            .stdin(Stdio::null())
            .stdout(log.file.try_clone()?)
            .stderr(log.file.try_clone()?)
            .process_group(0);
        let child = command.spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("it ended as it started"))?;
        let (socket, sessions) = (dirs.postgres_socket(begin.port), Sessions::new(dirs.socket(), begin.port, begin.pg_version));
        let mut postgres = Postgres { child, pid, socket, sessions };
        if let Err(error) = dirs.remember_postmaster(pid) {
            postgres.kill().await; // nobody could end it after us
            return Err(error.into());
        }
        let deadline = Instant::now() + START_MAX;
        let mut refused: Option<Instant> = None;
        loop {
            let answer = if postgres.socket.exists() { Some(postgres.sessions.flushed().await) } else { None };
            if let Some(status) = postgres.child.try_wait()? {
                return Err(PostgresError::Ended { status, said: log.said(settings) });
            }
            match answer {
                Some(Ok(_)) => return Ok(postgres),
                Some(Err(error)) if error.is_refusal() => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    if error.is_locked_out() || since.elapsed() >= REFUSED_MAX {
                        postgres.kill().await;
                        return Err(PostgresError::Refused { error, said: log.said(settings) });
                    }
                }
                Some(Err(_)) | None => refused = None,
            }
            if Instant::now() > deadline {
                postgres.kill().await;
                return Err(PostgresError::Silent { said: log.said(settings) });
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

/// `postgres`, bound to us, as its user, with nothing of our environment.
fn command(binary: &Path, dirs: &Dirs) -> Command {
    let mut command = bound_to_us(binary);
    command
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .env("PGUSER", config::INTERNAL_ROLE);
    if rustix::process::geteuid().is_root() {
        let user = dirs.user();
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// Brings our role back, in Postgres's own single-user mode, in which everybody is superuser and no database need take
/// connections. The data directory is mounted, and no Postgres runs there.
///
/// # Errors
/// When single-user mode does not come about. What the role lacks then, the next login says.
pub async fn repair(bin_dir: &Path, begin: &Begin, dirs: &Dirs, settings: &[Given]) -> Result<(), PostgresError> {
    let log = Log::open(dirs)?;
    let mut last = None;
    for database in REPAIR_DATABASES {
        let mut command = command(&bin_dir.join("postgres"), dirs);
        command.args(["--single", "-j"]).args(config::arguments(begin, dirs)).args(config::repair_arguments()).arg(database);
        command.stdin(Stdio::piped()).stdout(log.file.try_clone()?).stderr(log.file.try_clone()?).process_group(0);
        command.kill_on_drop(true);
        let mut child = command.spawn()?;
        if let Some(pid) = child.id() {
            dirs.remember_postmaster(pid)?;
        }
        if let Some(mut stdin) = child.stdin.take() {
            // One that ended before it read everything says why itself.
            let _ = stdin.write_all(config::repair_statements().as_bytes()).await;
        }
        match tokio::time::timeout(REPAIR_MAX, child.wait()).await {
            Ok(Ok(status)) if status.success() => return Ok(()),
            Ok(Ok(status)) => last = Some(status),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(PostgresError::Silent { said: log.said(settings) }),
        }
    }
    match last {
        Some(status) => Err(PostgresError::NotRepaired { status, said: log.said(settings) }),
        None => Ok(()),
    }
}

/// The server's log, from where this start begins.
struct Log {
    path: PathBuf,
    file: File,
    from: u64,
}

impl Log {
    fn open(dirs: &Dirs) -> io::Result<Log> {
        let path = dirs.file("postgres.log");
        let file = File::options().create(true).append(true).open(&path)?;
        let from = file.metadata()?.len();
        Ok(Log { path, file, from })
    }

    /// What it has of this start.
    fn said(&self, settings: &[Given]) -> Box<Said> {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            let end = file.metadata()?.len();
            file.seek(io::SeekFrom::Start(self.from.max(end.saturating_sub(LOG_TAIL))))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        Box::new(Said::of(&String::from_utf8_lossy(&bytes), settings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_killed_as_it_started_is_started_again() {
        let ended = |status| PostgresError::Ended { status: ExitStatus::from_raw(status), said: Box::new(Said::of("", &[])) };
        assert!(ended(9).is_transient(), "kill -9 says nothing about its next start");
        assert!(!ended(1 << 8).is_transient(), "it says itself that it cannot start");
        assert!(!ended(11).is_transient(), "a fault of its own comes again");
    }
}
