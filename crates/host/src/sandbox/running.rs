//! A sandbox as its supervisor has it: made, given a program, told signals, waited for.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use super::init::{READY, STARTED};
use super::spec::{NetworkAccess, Program, Spec};
use super::{FAILED, SIGNALLED, orders};
use crate::cgroup::{CgroupError, Group, Limits};
use crate::identity::{self, ProcessId};

/// How long a sandbox may take to be made, on a machine where everything starts at once.
const MAKE_MAX: Duration = Duration::from_secs(30);
/// How long its processes may take to be gone: those that wait for a mount are gone when it is.
const END_MAX: Duration = Duration::from_secs(30);
/// Bytes of what a sandbox that was not made says.
const SAID_MAX: u64 = 4096;
/// What a sandbox is tried with.
const PROBE_PROGRAM: &str = "/bin/true";
const PROBE_BYTES: u64 = 1 << 20;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A part of the kernel is missing, or something is in the way.
    #[error("the sandbox cannot be made: {0}; mend that, or, for one tenant whom you trust, run with --sandbox none")]
    NotMade(String),
    /// Its control groups.
    #[error("the sandbox cannot be made: {0}; mend that, or, for one tenant whom you trust, run with --sandbox none")]
    Cgroup(#[from] CgroupError),
    /// Its processes could not be started or found.
    #[error("the sandbox cannot be started: {0}")]
    Io(#[from] io::Error),
}

/// A sandbox in which nothing runs yet. Dropped, it is gone.
#[derive(Debug)]
pub struct Shell {
    launcher: Child,
    orders: UnixStream,
    said: BufReader<ChildStdout>,
    log: ChildStderr,
    network: NetworkAccess,
}

impl Shell {
    /// Makes the shell of a sandbox with `varve` (this program).
    ///
    /// # Errors
    /// [`SandboxError`] names what is missing.
    pub async fn make(varve: &Path, spec: &Spec) -> Result<Shell, SandboxError> {
        let spec_text = serde_json::to_string(spec).map_err(io::Error::from)?;
        let (orders, theirs) = UnixStream::pair()?;
        let mut command = Command::new(varve);
        command.args(["sandbox-launch", "--spec", &spec_text]).current_dir("/").process_group(0).env_clear();
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut launcher = command.spawn()?;
        // It has the other end of the orders, and would keep us from seeing that init is gone.
        drop(command);
        let gone = || io::Error::other("the launcher ended as it started");
        let said = BufReader::new(launcher.stdout.take().ok_or_else(gone)?);
        let log = launcher.stderr.take().ok_or_else(gone)?;
        let mut shell = Shell { launcher, orders, said, log, network: spec.network };
        shell.says(READY).await?;
        Ok(shell)
    }

    /// Waits for a line of init's; without it, what went wrong.
    async fn says(&mut self, expected: &str) -> Result<(), SandboxError> {
        let mut line = String::new();
        let said = tokio::time::timeout(MAKE_MAX, (&mut self.said).take(expected.len() as u64).read_line(&mut line)).await;
        if matches!(said, Ok(Ok(_))) && line == expected {
            return Ok(());
        }
        let _ = self.launcher.start_kill();
        let mut why = Vec::new();
        let _ = tokio::time::timeout(MAKE_MAX, (&mut self.log).take(SAID_MAX).read_to_end(&mut why)).await;
        let why = String::from_utf8_lossy(&why).trim().trim_start_matches("varve sandbox: ").to_owned();
        Err(SandboxError::NotMade(if why.is_empty() { format!("it did not start within {MAKE_MAX:?}") } else { why }))
    }

    /// Starts what the sandbox is for. What the program writes to its standard output and error comes from the pipe,
    /// which somebody has to read.
    ///
    /// # Errors
    /// [`SandboxError`] names what is missing.
    pub async fn run(mut self, program: Program) -> Result<(Running, ChildStderr), SandboxError> {
        let mut orders = self.orders.try_clone()?;
        tokio::task::spawn_blocking(move || orders::send(&mut orders, &program)).await.map_err(io::Error::other)??;
        self.says(STARTED).await?;
        let launcher = self.launcher.id();
        let init = launcher.and_then(|launcher| identity::children_of(launcher).first().copied());
        // Nothing has had the time to become an orphan: init's first child is the program.
        let program = init.and_then(|init| identity::children_of(init).first().copied());
        let init = init.map(ProcessId::of).transpose()?.flatten();
        let Shell { launcher, orders, log, network, .. } = self;
        Ok((Running { launcher, orders: Some(orders.into()), processes: init.zip(program), network }, log))
    }
}

/// A sandbox whose program runs, or did.
#[derive(Debug)]
pub struct Running {
    launcher: Child,
    /// Open as long as the sandbox is to live.
    orders: Option<OwnedFd>,
    /// Init and the program, as this machine has them; none where it had ended before it could be looked at.
    processes: Option<(ProcessId, u32)>,
    network: NetworkAccess,
}

impl Running {
    /// Init, with which everything in the sandbox ends, and the program. None if it has ended already.
    pub fn processes(&self) -> Option<(&ProcessId, u32)> {
        self.processes.as_ref().map(|(init, program)| (init, *program))
    }

    /// The network namespace, if it is the sandbox's own.
    ///
    /// # Errors
    /// When the sandbox has ended.
    pub fn network(&self) -> io::Result<Option<File>> {
        let init = self.processes.as_ref().map(|(init, _)| init).ok_or_else(|| io::Error::other("the sandbox has ended"))?;
        match self.network {
            NetworkAccess::Host => Ok(None),
            NetworkAccess::Own => File::open(format!("/proc/{}/ns/net", init.pid)).map(Some),
        }
    }

    /// Sends the program a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(orders) = &self.orders {
            // A pipe takes a byte, unless init is gone.
            let _ = rustix::io::write(orders, &[signal.as_raw() as u8]);
        }
    }

    /// Waits until the program has ended, and with it the sandbox. May be dropped and called again.
    ///
    /// # Errors
    /// When the launcher cannot be waited for.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.launcher.wait().await.map(ended)
    }

    /// How the program ended, if it has.
    ///
    /// # Errors
    /// When the launcher cannot be looked at.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(self.launcher.try_wait()?.map(ended))
    }

    /// Ends everything in the sandbox, at once.
    pub async fn kill(&mut self) {
        // Init ends at the end of its orders, or at a signal if it was stopped; the kernel ends the rest, and the
        // launcher ends when all are gone. Until then init's number is its own.
        self.orders = None;
        if let (Some(_), Some((init, _))) = (self.launcher.id(), &self.processes) {
            init.kill();
        }
        if tokio::time::timeout(END_MAX, self.launcher.wait()).await.is_err() {
            tracing::error!("the processes of the sandbox are killed and do not go");
            let _ = self.launcher.start_kill();
        }
    }
}

/// The program's status out of the launcher's.
fn ended(launcher: ExitStatus) -> ExitStatus {
    match launcher.code() {
        Some(code @ SIGNALLED..) => ExitStatus::from_raw(code - SIGNALLED),
        _ => launcher,
    }
}

/// Tries whether sandboxes can be made here, on `folder`, which is seen by nobody else.
///
/// # Errors
/// [`SandboxError`] names what is missing.
pub async fn probe(varve: &Path, folder: &Path, uid: u32, network: NetworkAccess, limits: &Limits) -> Result<(), SandboxError> {
    let group = Group::of(&format!("probe-{}", std::process::id()))?;
    group.make(limits)?;
    let tried = try_in(varve, folder, uid, network, &group).await;
    let _ = tokio::task::spawn_blocking(move || group.remove()).await;
    tried
}

async fn try_in(varve: &Path, folder: &Path, uid: u32, network: NetworkAccess, group: &Group) -> Result<(), SandboxError> {
    let spec = Spec {
        uid,
        root: folder.to_owned(),
        network,
        shm_bytes: PROBE_BYTES,
        tmp_bytes: PROBE_BYTES,
        files_max: 16,
        cgroups: group.folders(),
    };
    let program = Program { path: PROBE_PROGRAM.into(), ..Program::default() };
    let (mut running, mut log) = Shell::make(varve, &spec).await?.run(program).await?;
    let mut said = Vec::new();
    let _ = tokio::time::timeout(MAKE_MAX, (&mut log).take(SAID_MAX).read_to_end(&mut said)).await;
    let status = tokio::time::timeout(END_MAX, running.wait()).await.map_err(io::Error::other)??;
    if status.success() {
        return Ok(());
    }
    let what = if status.code() == Some(FAILED) { "it failed" } else { "a program in it failed" };
    Err(SandboxError::NotMade(format!("{what} ({status}): {}", String::from_utf8_lossy(&said).trim())))
}
