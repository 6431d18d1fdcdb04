//! Processes, named so that none is ever taken for another, and how to learn that one is gone.
//!
//! A process counts as gone when the kernel says so, never because it could not be looked at: out of descriptors is not
//! "gone".

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long a killed process may take to be gone.
const KILL_WAIT_MAX: Duration = Duration::from_secs(10);

/// A process of this machine, running or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number, which the kernel uses again.
    pub pid: u32,
    /// When it started, in the kernel's ticks since the machine did.
    pub start: String,
    /// The run of the machine.
    pub boot: String,
}

impl ProcessId {
    /// The process that has number `pid` now; none if it does not run.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn of(pid: u32) -> io::Result<Option<ProcessId>> {
        let Some(start) = start_of(pid)? else { return Ok(None) };
        Ok(Some(ProcessId { pid, start, boot: boot()? }))
    }

    /// Whether it runs. One that has ended and was not waited for does not.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn runs(&self) -> io::Result<bool> {
        Ok(boot()? == self.boot && start_of(self.pid)?.as_deref() == Some(self.start.as_str()))
    }

    /// Takes hold of it; none if it is gone. To be called in a runtime.
    ///
    /// # Errors
    /// When the kernel gives no descriptor: then nobody knows whether it is gone.
    pub fn hold(&self) -> io::Result<Option<Held>> {
        let Some(pid) = raw(self.pid) else { return Ok(None) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only now is it sure that the descriptor is of the process that we mean. Deprecated for types that may close
        // or change their descriptor meanwhile. `OwnedFd` cannot; the other way is unsafe code.
        #[expect(deprecated)]
        let descriptor = AsyncFd::with_interest(descriptor, Interest::READABLE)?;
        Ok(self.runs()?.then_some(Held { descriptor }))
    }

    /// Kills it, if it runs.
    pub fn kill(&self) {
        if matches!(self.runs(), Ok(true))
            && let Some(pid) = raw(self.pid)
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Kills it and its children at once, and waits until they are gone. Blocks.
    pub fn kill_tree(&self) {
        if !matches!(self.runs(), Ok(true)) {
            return;
        }
        let mut all = children_of(self.pid);
        all.insert(0, self.pid);
        for pid in all.iter().filter_map(|pid| raw(*pid)) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let deadline = Instant::now() + KILL_WAIT_MAX;
        while Instant::now() < deadline && !all.iter().all(|pid| matches!(start_of(*pid), Ok(None))) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A process that we hold by a descriptor: its number may be used again, the descriptor stays its own.
#[derive(Debug)]
pub struct Held {
    descriptor: AsyncFd<OwnedFd>,
}

impl Held {
    /// Kills it.
    ///
    /// # Errors
    /// When we may not.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended. May be dropped and called again.
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub async fn gone(&self) -> io::Result<()> {
        self.descriptor.readable().await.map(drop)
    }
}

fn raw(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

fn boot() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// What `/proc/<pid>/stat` says behind the name; none if there is no such process.
fn stat(pid: u32) -> io::Result<Option<String>> {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => Ok(stat.rsplit_once(')').map(|(_, behind)| behind.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // It ended between the open and the read.
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn start_of(pid: u32) -> io::Result<Option<String>> {
    let Some(stat) = stat(pid)? else { return Ok(None) };
    let mut fields = stat.split_ascii_whitespace();
    let runs = fields.next().is_some_and(|state| !matches!(state, "Z" | "X"));
    Ok(runs.then(|| fields.nth(18).map(str::to_owned)).flatten())
}

/// The processes that `pid` has started.
pub(crate) fn children_of(pid: u32) -> Vec<u32> {
    // One file says it where the kernel has it; otherwise every process is asked for its parent.
    if let Ok(list) = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) {
        return list.split_ascii_whitespace().filter_map(|child| child.parse().ok()).collect();
    }
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let parent = |child: u32| -> Option<u32> { stat(child).ok()??.split_ascii_whitespace().nth(1)?.parse().ok() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(|child| parent(*child) == Some(pid)).collect()
}

/// What a process calls itself, as `ps` shows it.
pub(crate) fn title(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let end = line.iter().position(|byte| *byte == 0).unwrap_or(line.len());
    Some(String::from_utf8_lossy(&line[..end]).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_process_is_held_until_it_is_gone_and_no_other_is_taken_for_it() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        assert!(id.runs().unwrap());
        let held = id.hold().unwrap().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), held.gone()).await.is_err());
        for other in [ProcessId { start: "1".to_owned(), ..id.clone() }, ProcessId { boot: "another".to_owned(), ..id.clone() }] {
            assert!(!other.runs().unwrap());
            assert!(other.hold().unwrap().is_none());
            other.kill_tree();
        }
        assert!(id.runs().unwrap(), "what is not the process must not be killed in its place");
        held.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(10), held.gone()).await.unwrap().unwrap();
        assert!(!id.runs().unwrap(), "a zombie does not run");
        child.wait().unwrap();
        assert!(id.hold().unwrap().is_none());
        assert!(ProcessId::of(id.pid).unwrap().is_none_or(|now| now != id));
    }

    #[test]
    fn a_tree_is_killed_with_its_children() {
        let mut child = Command::new("sh").args(["-c", "sleep 600 & wait"]).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while children_of(id.pid).is_empty() {
            assert!(Instant::now() < deadline, "the shell has no child");
            std::thread::sleep(Duration::from_millis(2));
        }
        let below = ProcessId::of(children_of(id.pid)[0]).unwrap().unwrap();
        // Nobody waits for the shell while it is killed, so it stays a zombie, which counts as gone.
        id.kill_tree();
        assert!(!below.runs().unwrap() && !id.runs().unwrap());
        child.wait().unwrap();
    }
}
