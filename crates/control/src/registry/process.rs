//! Compute processes: starting them, and noticing that one is gone.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use super::ComputeEntry;
use crate::error::{Code, ServerError};

/// How often it is looked whether a process that is not our child still runs.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// How to start a compute process.
#[derive(Clone, Debug)]
pub struct Spawner {
    /// The `varve` binary.
    pub binary: PathBuf,
    /// Address of the admin HTTP API.
    pub server_url: String,
}

impl Spawner {
    /// Starts the process of `entry` in its folder `home`, detached from us.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, entry: &Arc<ComputeEntry>, home: &Path) -> Result<(), ServerError> {
        let failed = |error: std::io::Error| ServerError::internal(format!("cannot start {}: {error}", self.binary.display()));
        let log = File::options().create(true).append(true).open(log_path(home)).map_err(failed)?;
        let mut child = Command::new(&self.binary)
            .arg("compute-process")
            .arg("--server")
            .arg(&self.server_url)
            .arg("--id")
            .arg(entry.id())
            .arg("--home")
            .arg(home)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().ok_or_else(|| ServerError::internal("the compute process ended as it started"))?;
        entry.change(|record| record.process = identify(pid))?;
        tokio::spawn(async move {
            let _ = child.wait().await; // a child that is not waited for stays a zombie
        });
        Ok(())
    }

    /// Takes away what a compute whose process is gone left in its folder `home`: mounts, processes, files.
    ///
    /// # Errors
    /// When that fails, with what was said.
    pub async fn clean_up(&self, id: &str, home: &Path) -> Result<(), ServerError> {
        if home.exists() {
            let mut command = Command::new(&self.binary);
            command.arg("compute-cleanup").arg("--id").arg(id).arg("--home").arg(home).stdin(Stdio::null());
            let output = command.output().await.map_err(ServerError::internal)?;
            if !output.status.success() {
                return Err(ServerError::internal(String::from_utf8_lossy(&output.stderr).trim()));
            }
        }
        let _ = std::fs::remove_file(log_path(home));
        Ok(())
    }
}

/// A process, named so that no other is ever taken for it; none if it does not run.
pub fn identify(pid: u32) -> Option<(u32, String)> {
    process_start(pid).map(|start| (pid, start))
}

/// Log of the compute process whose folder is `home`.
pub(super) fn log_path(home: &Path) -> PathBuf {
    home.with_extension("log")
}

/// When a process started, in the kernel's ticks; none if it does not run.
fn process_start(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    (fields.next()? != "Z").then(|| fields.nth(18).map(str::to_owned)).flatten()
}

impl ComputeEntry {
    /// Whether its process runs.
    pub fn process_runs(&self) -> bool {
        self.record().process.is_some_and(|(pid, start)| process_start(pid).as_deref() == Some(start.as_str()))
    }

    /// Waits until its process is gone; false if that takes longer than `limit`.
    pub async fn process_gone(&self, limit: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        while self.process_runs() {
            if tokio::time::Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(WATCH_INTERVAL.min(Duration::from_millis(10))).await;
        }
        true
    }

    /// Kills its process at once, and its postmaster, which may be frozen and hold the port.
    pub fn kill_process(&self) {
        let status = self.status();
        let mut pids = vec![];
        if self.process_runs() {
            pids.extend(self.record().process.map(|(pid, _)| pid));
            pids.extend(status.pid);
        }
        for pid in pids {
            if let Some(pid) = Pid::from_raw(pid as i32) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// An error that quotes the end of the process's log.
    pub fn failure(&self, what: &str, home: &Path) -> ServerError {
        let path = log_path(home);
        let text = std::fs::read(&path).unwrap_or_default();
        let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(1000)..]).into_owned();
        ServerError::new(Code::Internal, format!("{what}; the end of {}:\n{tail}", path.display()))
    }
}
