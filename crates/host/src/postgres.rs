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
use varve_postgres::Lsn;

use crate::beneath;
use crate::cgroup::{CgroupError, Group};
use crate::config;
use crate::dirs::{Dirs, Isolation, User};
use crate::identity::ProcessId;
use crate::log::Log;
use crate::passage::Passage;
use crate::ports::{self, PortError};
use crate::record::RecordError;
use crate::sandbox::{Dialer, Program, Running, SandboxError, Shell, Spec};
use crate::sessions::{PrivateSocket, SessionError, Sessions};
use crate::sizing::{self, Kills};
use crate::start::Brought;
use crate::start_failure::{Given, Said};
use crate::tablespaces;

/// How long Postgres may take until it answers: as long as it says that it starts, or nothing at all.
const START_MAX: Duration = Duration::from_secs(120);
/// How long it may refuse our login for a reason that may pass.
const REFUSED_MAX: Duration = Duration::from_secs(3);
/// How often a starting Postgres is looked at.
const START_POLL: Duration = Duration::from_millis(1);
/// How long it may not say that it is ready before it is asked nevertheless: the file that says so is the tenant's.
const SILENT_MAX: Duration = Duration::from_secs(1);
/// The postmaster's lock file, the line in which it says what it does, and what that is once it takes connections
/// (`src/include/utils/pidfile.h`).
const LOCK_FILE: &str = "postmaster.pid";
const LOCK_FILE_STATUS: usize = 7;
const LOCK_FILE_READY: &str = "ready";
const LOCK_FILE_MAX: u64 = 8192;
/// How long a fast shutdown may take (it writes a checkpoint and sends all WAL) before Postgres is killed.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Bytes of what a start logged that are looked at for an error.
const LOG_TAIL: u64 = 256 * 1024;
/// How long single-user mode may take.
const REPAIR_MAX: Duration = Duration::from_secs(60);
/// Databases that single-user mode is tried in: nobody gets rid of the first one without changing catalogues by hand.
const REPAIR_DATABASES: [&str; 3] = ["template0", "template1", "postgres"];
/// What single-user mode is told, in the folder of the configuration.
const REPAIR_FILE: &str = "repair.sql";
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
            | PostgresError::Record(_)
            | PostgresError::Sandbox(_)
            | PostgresError::Cgroup(_)
            | PostgresError::Port(_) => false,
        }
    }

    /// Whether our role is not there, or may not log in: what [`repair`] is for.
    pub fn is_locked_out(&self) -> bool {
        matches!(self, PostgresError::Refused { error, .. } if error.is_locked_out())
    }
}

/// The processes of a Postgres.
#[derive(Debug)]
enum Processes {
    /// In a sandbox, with its log and, where it has a network of its own, the way in.
    Sandboxed { running: Running, log: Log, kills: Kills, passage: Option<Passage> },
    /// As they are.
    Plain(Child),
}

/// A running Postgres.
#[derive(Debug)]
pub struct Postgres {
    processes: Processes,
    pid: u32,
    sessions: Sessions,
    flushed: Lsn,
}

impl Postgres {
    /// Starts the `postgres` in `bin_dir` and waits until it answers: in `empty`, or, where it needs a sandbox and
    /// there is none yet, in a new one. `brought` are the settings of its branch, to be named where one of them is why
    /// it does not start.
    ///
    /// # Errors
    /// When the binary is missing, or Postgres ends before it answers, or does not let us in: the error quotes its log.
    pub async fn start(
        bin_dir: &Path,
        begin: &Begin,
        dirs: &Dirs,
        brought: &Brought,
        empty: Option<EmptySandbox>,
    ) -> Result<Postgres, PostgresError> {
        let binary = bin_dir.join("postgres");
        if !binary.exists() {
            return Err(PostgresError::Missing { version: begin.pg_version, path: binary });
        }
        let log = LogOfStart::open(dirs)?;
        let mut postgres = match dirs.isolation() {
            Isolation::Sandbox { limits, .. } => {
                let empty = match empty {
                    Some(empty) => empty,
                    None => EmptySandbox::make(dirs).await?,
                };
                empty.group.limit(&sizing::most(&limits, &begin.size))?;
                Self::sandboxed(bin_dir, begin, dirs, brought, empty).await?
            }
            Isolation::None(user) => Self::plain(&binary, begin, dirs, user, brought)?,
        };
        if let Err(error) = postgres.remember(dirs) {
            postgres.kill().await; // nobody could end it after us
            return Err(error.into());
        }
        postgres.answers(&log, &brought.given, dirs).await?;
        if let Err(error) = postgres.let_clients_in(begin).await {
            postgres.kill().await;
            return Err(error);
        }
        Ok(postgres)
    }

    async fn sandboxed(
        bin_dir: &Path,
        begin: &Begin,
        dirs: &Dirs,
        brought: &Brought,
        empty: EmptySandbox,
    ) -> Result<Postgres, PostgresError> {
        let listen = begin.listen.clone();
        // Inside nobody knows names.
        let addresses = tokio::task::spawn_blocking(move || ports::numeric(&listen)).await.map_err(io::Error::other)??;
        let arguments = config::arguments(begin, &addresses, dirs, &brought.asked);
        let (processes, pid) = empty.run(Program { arguments, ..program(bin_dir, begin, dirs)? }, dirs).await?;
        Ok(Postgres { processes, pid, sessions: sessions(begin, dirs), flushed: Lsn::INVALID })
    }

    fn plain(binary: &Path, begin: &Begin, dirs: &Dirs, user: User, brought: &Brought) -> Result<Postgres, PostgresError> {
        let mut command = command(binary, dirs, user)?;
        let arguments = config::arguments(begin, &begin.listen, dirs, &brought.asked);
        let child = command.args(arguments).stdin(Stdio::null()).spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("it ended as it started"))?;
        Ok(Postgres { processes: Processes::Plain(child), pid, sessions: sessions(begin, dirs), flushed: Lsn::INVALID })
    }

    /// Notes what to end if we cannot: init of the sandbox, with which all of it ends, or the postmaster.
    fn remember(&self, dirs: &Dirs) -> Result<(), RecordError> {
        match &self.processes {
            Processes::Sandboxed { running, .. } => running.processes().map_or(Ok(()), |(init, _)| dirs.remember_postmaster(init.pid)),
            Processes::Plain(_) => dirs.remember_postmaster(self.pid),
        }
    }

    /// Waits until it answers.
    async fn answers(&mut self, log: &LogOfStart, settings: &[Given], dirs: &Dirs) -> Result<(), PostgresError> {
        let begun = Instant::now();
        let deadline = begun + START_MAX;
        let mut refused: Option<Instant> = None;
        loop {
            let answer = if self.is_worth_asking(dirs, begun) { Some(self.sessions.flushed().await) } else { None };
            if let Some(status) = self.try_wait()? {
                self.log_is_whole().await;
                return Err(PostgresError::Ended { status, said: log.said(settings) });
            }
            match answer {
                Some(Ok(flushed)) => {
                    self.flushed = flushed;
                    return Ok(());
                }
                Some(Err(error)) if error.is_refusal() => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    if error.is_locked_out() || since.elapsed() >= REFUSED_MAX {
                        self.kill().await;
                        self.log_is_whole().await;
                        return Err(PostgresError::Refused { error, said: log.said(settings) });
                    }
                }
                Some(Err(_)) | None => refused = None,
            }
            if Instant::now() > deadline {
                self.kill().await;
                self.log_is_whole().await;
                return Err(PostgresError::Silent { said: log.said(settings) });
            }
            tokio::time::sleep(START_POLL).await;
        }
    }

    /// Whether it may take a connection: its lock file says so, or it has had some time. Each connection that it
    /// refuses costs it a process, just when it starts.
    fn is_worth_asking(&self, dirs: &Dirs, begun: Instant) -> bool {
        if !self.sessions.socket().exists() {
            return false;
        }
        let mut lines = String::new();
        let read = beneath::file(&dirs.pgdata(), LOCK_FILE).and_then(|file| file.take(LOCK_FILE_MAX).read_to_string(&mut lines));
        let status = read.ok().and_then(|_| lines.lines().nth(LOCK_FILE_STATUS).map(str::trim_end));
        status == Some(LOCK_FILE_READY) || begun.elapsed() > SILENT_MAX
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

    /// Where its WAL was flushed to when it first answered, before anybody could receive any of it.
    pub fn flushed_at_start(&self) -> Lsn {
        self.flushed
    }

    /// Sessions of ours in it.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// What the kernel kills of it for want of memory; none without a sandbox.
    pub fn kills(&self) -> Option<&Kills> {
        match &self.processes {
            Processes::Sandboxed { kills, .. } => Some(kills),
            Processes::Plain(_) => None,
        }
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
            Processes::Sandboxed { running, .. } => running.wait().await,
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

/// Brings our role back, in Postgres's own single-user mode, in which everybody is superuser and no database need take
/// connections. The data directory is mounted, and no Postgres runs there.
///
/// # Errors
/// When single-user mode does not come about. What the role lacks then, the next login says.
pub async fn repair(bin_dir: &Path, begin: &Begin, dirs: &Dirs, brought: &Brought) -> Result<(), PostgresError> {
    let log = LogOfStart::open(dirs)?;
    dirs.write(REPAIR_FILE, &config::repair_statements())?;
    let mut last = None;
    for database in REPAIR_DATABASES {
        let mut arguments = vec!["--single".to_owned(), "-j".to_owned()];
        arguments.extend(config::arguments(begin, "", dirs, &brought.asked));
        arguments.extend(config::repair_arguments().map(str::to_owned));
        arguments.push(database.to_owned());
        let ended = match dirs.isolation() {
            Isolation::Sandbox { .. } => {
                let input = Some(dirs.conf().join(REPAIR_FILE));
                let program = Program { arguments, input, ..program(bin_dir, begin, dirs)? };
                let (processes, pid) = EmptySandbox::make(dirs).await?.run(program, dirs).await?;
                let mut single = Postgres { pid, sessions: sessions(begin, dirs), processes, flushed: Lsn::INVALID };
                single.remember(dirs)?;
                let ended = tokio::time::timeout(REPAIR_MAX, single.wait()).await;
                single.kill().await;
                single.log_is_whole().await;
                ended
            }
            Isolation::None(user) => {
                let mut command = command(&bin_dir.join("postgres"), dirs, user)?;
                let mut child = command.args(arguments).stdin(Stdio::piped()).kill_on_drop(true).spawn()?;
                if let Some(pid) = child.id() {
                    dirs.remember_postmaster(pid)?;
                }
                if let Some(mut stdin) = child.stdin.take() {
                    // One that ended before it read everything says why itself.
                    let _ = stdin.write_all(config::repair_statements().as_bytes()).await;
                }
                tokio::time::timeout(REPAIR_MAX, child.wait()).await
            }
        };
        match ended {
            Ok(Ok(status)) if status.success() => return Ok(()),
            Ok(Ok(status)) => last = Some(status),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(PostgresError::Silent { said: log.said(&brought.given) }),
        }
    }
    match last {
        Some(status) => Err(PostgresError::NotRepaired { status, said: log.said(&brought.given) }),
        None => Ok(()),
    }
}

fn sessions(begin: &Begin, dirs: &Dirs) -> Sessions {
    Sessions::new(PrivateSocket::new(dirs.socket(), begin.port, dirs.user().uid), begin.pg_version)
}

/// A sandbox in the compute's control groups that has no Postgres yet. It needs nothing of the data directory, so it is
/// made while that is on its way. Dropped, it is gone.
#[derive(Debug)]
pub struct EmptySandbox {
    shell: Shell,
    group: Group,
}

impl EmptySandbox {
    /// Makes one for a compute that is to have one.
    ///
    /// # Errors
    /// [`PostgresError::Sandbox`], [`PostgresError::Cgroup`].
    pub async fn make(dirs: &Dirs) -> Result<EmptySandbox, PostgresError> {
        let Isolation::Sandbox { uid, network, limits } = dirs.isolation() else {
            return Err(io::Error::other("this compute is to have no sandbox").into());
        };
        let (named, run) = (dirs.clone(), dirs.run().to_owned());
        let make_group = move || {
            Dirs::make_run(&run)?;
            let group = named.group()?;
            group.make(&limits)?;
            Ok::<_, PostgresError>(group)
        };
        let group = tokio::task::spawn_blocking(make_group).await.map_err(io::Error::other)??;
        let spec = Spec {
            uid,
            root: dirs.run().to_owned(),
            network,
            shm_bytes: limits.memory_bytes.map_or(SHM_BYTES_MAX, |bytes| (bytes / 2).min(SHM_BYTES_MAX)),
            tmp_bytes: TMP_BYTES,
            files_max: FILES_MAX,
            cgroups: group.folders(),
        };
        Ok(EmptySandbox { shell: Shell::make(Path::new(OURSELVES), &spec).await?, group })
    }

    /// Starts a program in it; its processes, and which one it is.
    async fn run(self, program: Program, dirs: &Dirs) -> Result<(Processes, u32), PostgresError> {
        // The groups may be those of an earlier incarnation, and count on.
        let kills = Kills::of(self.group);
        let (running, pipe) = self.shell.run(program).await?;
        let pid = running.processes().map_or(0, |(_, program)| program);
        let log = Log::start(&dirs.log(), pipe);
        Ok((Processes::Sandboxed { running, log, kills, passage: None }, pid))
    }
}

/// Postgres in a sandbox, and what it sees: the compute's own folders, and its installation.
fn program(bin_dir: &Path, begin: &Begin, dirs: &Dirs) -> io::Result<Program> {
    // Programs find their libraries and files beside their folder. What is below /usr is seen anyway.
    let installation = |bin_dir: &Path| bin_dir.parent().filter(|parent| parent.parent().is_some()).map(Path::to_owned);
    let mut read_only: Vec<PathBuf> = [bin_dir, &bin_dir.canonicalize()?].into_iter().filter_map(installation).collect();
    read_only.dedup();
    read_only.retain(|path| !path.starts_with("/usr"));
    read_only.push(dirs.conf());
    Ok(Program {
        read_only,
        writable: vec![dirs.pgdata(), dirs.pg_wal(), dirs.socket()],
        root_links: vec![(
            tablespaces::NAMED.trim_start_matches('/').to_owned(),
            dirs.pgdata().join(crate::mount::NAMED).to_string_lossy().into_owned(),
        )],
        links: tablespaces::links(begin, dirs),
        path: bin_dir.join("postgres"),
        arguments: Vec::new(),
        input: None,
        environment: environment().into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
    })
}

/// Where memory is not enough, a backend goes before the postmaster.
fn environment() -> [(&'static str, &'static str); 5] {
    [
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("LC_ALL", "C.UTF-8"),
        ("PGUSER", config::INTERNAL_ROLE),
        ("PG_OOM_ADJUST_FILE", "/proc/self/oom_score_adj"),
        ("PG_OOM_ADJUST_VALUE", "500"),
    ]
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

/// `postgres`, bound to us, as its user, with nothing of our environment, and with its log.
fn command(binary: &Path, dirs: &Dirs, user: User) -> io::Result<Command> {
    let log = File::options().create(true).append(true).open(dirs.log())?;
    let mut command = bound_to_us(binary);
    command.current_dir("/").stdout(log.try_clone()?).stderr(log).process_group(0).env_clear().envs(environment());
    if rustix::process::geteuid().is_root() {
        command.uid(user.uid).gid(user.gid);
    }
    Ok(command)
}

/// The server's log, from where this start begins.
struct LogOfStart {
    path: PathBuf,
    from: u64,
}

impl LogOfStart {
    fn open(dirs: &Dirs) -> io::Result<LogOfStart> {
        let path = dirs.log();
        let from = match std::fs::metadata(&path) {
            Ok(file) => file.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(LogOfStart { path, from })
    }

    /// What it has of this start.
    fn said(&self, settings: &[Given]) -> Box<Said> {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            let end = file.metadata()?.len();
            // A log that is shorter than it was has begun anew.
            let from = if end < self.from { 0 } else { self.from };
            file.seek(io::SeekFrom::Start(from.max(end.saturating_sub(LOG_TAIL))))?;
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
