//! Limits for what tests wait for: no test waits for ever, and one that waited too long says for what, and what the
//! processes were doing.
//!
//! All that waits goes through here: a command ([`output`], [`status`]), a child in the background ([`wait`],
//! [`wait_with_output`]), a condition ([`until`]). Over the limit a command is killed, and the error ([`WaitError`])
//! lists the processes of Varve and Postgres: those that work in the test's folder and their descendants where the
//! folder is known, all on the machine otherwise.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// How long one command may take, on a machine where everything runs at once: longer than each limit that the product
/// has for itself.
pub const COMMAND_MAX: Duration = Duration::from_secs(400);
/// How long a program for which minutes are normal may take: a test suite, a whole corpus.
pub const SUITE_MAX: Duration = Duration::from_secs(3600);
/// Longest pause between two looks at something that is waited for.
const POLL_MAX: Duration = Duration::from_millis(20);
/// How long the pipes of a command that ended may stay open: a descendant may have inherited them.
const PIPES_MAX: Duration = Duration::from_secs(60);
/// Processes that an error lists.
const LISTED_MAX: usize = 200;
/// Generations of processes that are looked at: ids may have been given anew meanwhile, in a circle.
const ANCESTORS_MAX: usize = 64;
/// Names of the processes that are listed.
const NAMES: [&str; 7] = ["varve", "postgres", "psql", "pgbench", "pg_", "initdb", "minio"];

/// Something took longer than it may.
#[derive(Debug, thiserror::Error)]
#[error("after {limit:?} still waiting for {what}; the processes:\n{processes}")]
pub struct WaitError {
    what: String,
    limit: Duration,
    processes: String,
}

impl WaitError {
    /// `what` did not come within `limit`: looks at what the processes in `folder` do now.
    pub fn new(what: impl Into<String>, limit: Duration, folder: Option<&Path>) -> WaitError {
        WaitError { what: what.into(), limit, processes: describe(folder) }
    }
}

/// Waits until `look` finds something.
///
/// # Errors
/// What `look` fails with, or [`WaitError`].
pub fn until<T>(
    what: &str,
    limit: Duration,
    folder: Option<&Path>,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(WaitError::new(what, limit, folder).into());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(POLL_MAX);
    }
}

/// Runs a command to its end, and gives what it printed.
///
/// # Errors
/// When it cannot be run, or does not end in time: then it is killed.
pub fn output(command: &mut Command, limit: Duration, folder: Option<&Path>) -> anyhow::Result<Output> {
    let what = format!("{command:?}");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    wait_with_output(child.with_context(|| format!("{what} cannot be run"))?, &what, limit, folder)
}

/// Runs a command to its end, whose output goes where it goes.
///
/// # Errors
/// When it cannot be run, or does not end in time: then it is killed.
pub fn status(command: &mut Command, limit: Duration, folder: Option<&Path>) -> anyhow::Result<ExitStatus> {
    let what = format!("{command:?}");
    let mut child = command.spawn().with_context(|| format!("{what} cannot be run"))?;
    wait(&mut child, &what, limit, folder)
}

/// Waits for the end of a child.
///
/// # Errors
/// When it does not end in time: then it is killed.
pub fn wait(child: &mut Child, what: &str, limit: Duration, folder: Option<&Path>) -> anyhow::Result<ExitStatus> {
    let ended = until(what, limit, folder, || Ok(child.try_wait()?));
    if ended.is_err() {
        for process in Process::all_below(child.id()) {
            crate::dev::signal(process.pid, rustix::process::Signal::KILL);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    ended
}

/// Waits for the end of a child, and gives what it printed into its pipes.
///
/// # Errors
/// When it does not end in time: then it is killed.
pub fn wait_with_output(mut child: Child, what: &str, limit: Duration, folder: Option<&Path>) -> anyhow::Result<Output> {
    drop(child.stdin.take());
    let (stdout, stderr) = (child.stdout.take().map(read), child.stderr.take().map(read));
    let status = wait(&mut child, what, limit, folder)?;
    let printed = |pipe: Option<Receiver<Vec<u8>>>| match pipe.map(|pipe| pipe.recv_timeout(PIPES_MAX)) {
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err(_)) => Err(WaitError::new(format!("the end of what {what} prints, though it ended ({status})"), PIPES_MAX, folder)),
        None => Ok(Vec::new()),
    };
    Ok(Output { status, stdout: printed(stdout)?, stderr: printed(stderr)? })
}

/// Reads a pipe to its end beside.
fn read(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, bytes) = channel();
    std::thread::spawn(move || {
        let mut read = Vec::new();
        // Of a pipe that breaks, what came before.
        let _ = pipe.read_to_end(&mut read);
        let _ = send.send(read);
    });
    bytes
}

/// A process as `/proc` shows it.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Who started it.
    pub parent: u32,
    /// Its name.
    pub name: String,
    /// `R`unning, `S`leeping, waiting for a `D`isk, `Z`ombie, s`T`opped.
    pub state: char,
    /// Where in the kernel it waits.
    pub waits_in: String,
    /// Its command line, or what it made of it.
    pub title: String,
}

impl Process {
    fn of(pid: u32) -> Option<Process> {
        let file = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).ok();
        let stat = String::from_utf8_lossy(&file("stat")?).into_owned();
        let (before, after) = stat.rsplit_once(')')?;
        let mut fields = after.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let title = String::from_utf8_lossy(&file("cmdline")?).replace('\0', " ").trim_end().to_owned();
        Some(Process {
            pid,
            parent: fields.next()?.parse().ok()?,
            name: before.split_once('(')?.1.to_owned(),
            state,
            waits_in: file("wchan").map(|name| String::from_utf8_lossy(&name).into_owned()).unwrap_or_default(),
            title,
        })
    }

    /// All processes.
    pub fn all() -> Vec<Process> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| Process::of(entry.file_name().to_str()?.parse().ok()?)).collect()
    }

    /// Those that `pid` has started.
    pub fn children_of(pid: u32) -> Vec<Process> {
        Process::all().into_iter().filter(|process| process.parent == pid).collect()
    }

    /// The postmaster that a compute process has started: below its sandbox's launcher and init. Its own children have
    /// its name.
    pub fn postmaster_below(supervisor: u32) -> Option<Process> {
        let all = Process::all_below(supervisor);
        let is_backend = |process: &Process| all.iter().any(|parent| parent.pid == process.parent && parent.name == "postgres");
        all.iter().find(|process| process.name == "postgres" && !is_backend(process)).cloned()
    }

    /// Those that name a path in `folder` on their command line, and all below them.
    pub fn in_folder(folder: &Path) -> Vec<Process> {
        let folder = folder.display().to_string();
        Process::below(|process| process.title.contains(&folder))
    }

    /// Those that `pid` has started, those that these have started, and so on.
    pub fn all_below(pid: u32) -> Vec<Process> {
        let mut below = Process::below(|process| process.pid == pid);
        below.retain(|process| process.pid != pid);
        below
    }

    /// Those that are `roots`, and all below them, but never we.
    fn below(is_root: impl Fn(&Process) -> bool) -> Vec<Process> {
        let all: BTreeMap<u32, Process> = Process::all().into_iter().map(|process| (process.pid, process)).collect();
        let own = std::process::id();
        let belongs = |process: &Process| {
            let ancestors = std::iter::successors(Some(process), |process| all.get(&process.parent));
            ancestors.take(ANCESTORS_MAX).take_while(|process| process.pid != own).any(&is_root)
        };
        all.values().filter(|process| belongs(process)).cloned().collect()
    }
}

/// What processes do, a line each: those in `folder`, or all of Varve and Postgres.
pub fn describe(folder: Option<&Path>) -> String {
    let is_ours = |process: &Process| NAMES.iter().any(|name| process.name.starts_with(name));
    let found = match folder {
        Some(folder) => Process::in_folder(folder),
        None => Process::all().into_iter().filter(is_ours).collect(),
    };
    let mut text = format!("{:>8} {:>8} S {:<24} TITLE\n", "PID", "PARENT", "WAITS IN");
    for Process { pid, parent, state, waits_in, title, .. } in found.iter().take(LISTED_MAX) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{pid:>8} {parent:>8} {state} {waits_in:<24} {title}");
    }
    if found.len() > LISTED_MAX {
        let _ = writeln!(text, "and {} more", found.len() - LISTED_MAX);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(300);
    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn a_command_that_does_not_end_is_told_with_what_it_does_and_killed() {
        let folder = tempfile::tempdir().unwrap();
        // The shell names the folder, its child does not.
        let script = "sleep 86399 & wait # $0";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(folder.path());
        let error = output(&mut command, SOON, Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("after 300ms still waiting for") && error.contains("sleep 86399"), "{error}");
        let left: Vec<_> = Process::all().into_iter().filter(|process| process.title == "sleep 86399").collect();
        assert!(left.is_empty(), "all of it is killed: {left:?}");
    }

    #[test]
    fn a_command_that_ends_gives_all_that_it_printed() {
        let script = "head -c 300000 /dev/zero; echo wrong >&2; exit 3";
        let output = output(Command::new("sh").args(["-c", script]), LATER, None).unwrap();
        assert_eq!((output.status.code(), output.stdout.len(), &*output.stderr), (Some(3), 300_000, &b"wrong\n"[..]));
    }

    #[test]
    fn what_never_comes_is_named() {
        let error = until::<()>("a sign", SOON, None, || Ok(None)).unwrap_err().to_string();
        assert!(error.contains("still waiting for a sign"), "{error}");
        assert_eq!(until("one", LATER, None, || Ok(Some(1))).unwrap(), 1);
    }
}
