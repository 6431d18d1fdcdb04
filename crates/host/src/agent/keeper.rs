//! One compute on this host: its process and its record, seen to by one task.

use std::fs::File;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::Instant;
use varve_api::Code;
use varve_api::host::{ComputeOrder, ComputeReport, HostAction};

use super::{Known, Sandboxing, Shared};
use crate::identity::{Held, ProcessId};
use crate::ports::{self, PortError};
use crate::record::{ComputeRecord, Record as _, RecordError, remove_file};
use crate::uids::UidError;

/// Wait before a process that could not be looked at is looked at again.
const UNSURE_WAIT: Duration = Duration::from_secs(1);
/// Shortest and longest wait before a process that failed is started again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A process that ran for so long did not fail at its start.
const RAN_WELL: Duration = Duration::from_secs(10);
/// How long a killed process may take to be gone.
const KILL_WAIT_MAX: Duration = Duration::from_secs(30);

/// What a keeper is told by each answer to a poll.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// The compute's order; none: it is left alone.
    pub(super) order: Option<ComputeOrder>,
    /// Number of the poll.
    pub(super) round: u64,
    /// The control plane's run.
    pub(super) server_run: String,
}

/// The compute's process.
#[derive(Debug)]
enum Process {
    /// There is none.
    None,
    /// One that an earlier run of the host started, and that could not be looked at: it may run.
    Unsure(ProcessId),
    /// One that an earlier run of the host started.
    Adopted(Held),
    /// Our child.
    Child(Child),
}

/// Why a compute was not started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Unfit(String),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error(transparent)]
    Uid(#[from] UidError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
}

impl StartError {
    fn io(what: &'static str) -> impl Fn(std::io::Error) -> StartError {
        move |source| StartError::Io { what, source }
    }

    fn report(&self) -> ComputeReport {
        let code = match self {
            StartError::Unfit(_) | StartError::Uid(_) => Code::HostUnfit,
            StartError::Port(_) => Code::PortInUse,
            StartError::Record(_) | StartError::Io { .. } => Code::Internal,
        };
        ComputeReport::Refused { code: code.name().to_owned(), detail: self.to_string() }
    }
}

pub(super) struct Keeper {
    shared: Arc<Shared>,
    id: String,
    orders: watch::Receiver<Told>,
    record: Option<ComputeRecord>,
    process: Process,
    started: Instant,
    /// Starts that failed in a row.
    failures: u32,
    /// Not to be started before.
    not_before: Option<Instant>,
    /// Not to be started by orders of this poll or an earlier one.
    stale_round: u64,
    /// The last thing reported on an order of this run of the control plane.
    reported: Option<(String, ComputeOrder, ComputeReport)>,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, id: String, record: Option<ComputeRecord>, orders: watch::Receiver<Told>) -> Keeper {
        let process = record.as_ref().and_then(|record| record.process.clone()).map_or(Process::None, Process::Unsure);
        Keeper {
            shared,
            id,
            orders,
            record,
            process,
            started: Instant::now(),
            failures: 0,
            not_before: None,
            stale_round: 0,
            reported: None,
        }
    }

    /// Sees to the compute until the agent drops the other end of the orders.
    pub(super) async fn run(mut self) {
        if matches!(self.process, Process::None) {
            self.end_leftovers().await;
        }
        loop {
            if let Process::Unsure(process) = &self.process {
                match process.hold() {
                    Ok(Some(held)) => {
                        tracing::info!(compute = self.id, pid = process.pid, "adopted");
                        self.process = Process::Adopted(held);
                    }
                    Ok(None) => self.is_gone(None).await,
                    Err(error) => {
                        tracing::warn!(compute = self.id, %error, "whether its process runs is not known yet");
                        tokio::time::sleep(UNSURE_WAIT).await;
                        continue;
                    }
                }
            }
            let told = self.orders.borrow_and_update().clone();
            let again = self.act(&told).await;
            tokio::select! {
                changed = self.orders.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                status = gone(&mut self.process) => self.is_gone(status).await,
                () = until(again) => {}
            }
        }
    }

    /// Does what an order says. Gives when it is to be tried again, if nothing else happens.
    async fn act(&mut self, told: &Told) -> Option<Instant> {
        let order = told.order.as_ref()?;
        let runs = !matches!(self.process, Process::None);
        match order.action {
            HostAction::Run if runs => {
                self.say_that_it_runs(told, order).await;
                None
            }
            HostAction::Run => {
                if told.round <= self.stale_round {
                    return None; // newer ones are on their way
                }
                if let Some(not_before) = self.not_before
                    && not_before > Instant::now()
                {
                    return Some(not_before);
                }
                let error = self.start(order).await.err()?;
                tracing::error!(compute = self.id, branch = order.branch, %error, "it cannot be started");
                self.report(told, order, error.report()).await;
                Some(self.back_off())
            }
            HostAction::End => {
                if self.end().await {
                    self.report(told, order, ComputeReport::Gone).await;
                    return None;
                }
                Some(self.back_off())
            }
            HostAction::Remove => {
                if self.end().await && self.remove().await {
                    self.report(told, order, ComputeReport::Removed).await;
                    return None;
                }
                Some(self.back_off())
            }
        }
    }

    /// Says that the process runs already. Where the order has other addresses or another port than it was started
    /// with, these are looked at: the process takes them when it begins its next incarnation.
    async fn say_that_it_runs(&mut self, told: &Told, order: &ComputeOrder) {
        let Some(record) = self.record.clone() else { return };
        let same_port = order.port == 0 || order.port == record.port;
        if record.listen == order.listen && same_port {
            return self.report(told, order, ComputeReport::Started { port: record.port }).await;
        }
        // Its own Postgres holds its port until it begins anew: then only the addresses can be looked at, with another
        // port.
        let chosen = if same_port {
            let any_port = ComputeOrder { port: 0, ..order.clone() };
            self.choose_port(&any_port).await.map(|_| record.port)
        } else {
            self.choose_port(order).await
        };
        let kept = match chosen {
            Ok(port) => self.keep(ComputeRecord { listen: order.listen.clone(), port, ..record }).map(|()| port).map_err(StartError::from),
            Err(error) => Err(StartError::from(error)),
        };
        match kept {
            Ok(port) => self.report(told, order, ComputeReport::Started { port }).await,
            Err(error) => self.report(told, order, error.report()).await,
        }
    }

    /// Reports what became of an order, unless this run of the control plane knows it.
    async fn report(&mut self, told: &Told, order: &ComputeOrder, report: ComputeReport) {
        let now = Some((told.server_run.clone(), order.clone(), report.clone()));
        if self.reported != now && self.shared.control.report(&self.id, &report).await {
            self.reported = now;
        }
    }

    fn back_off(&mut self) -> Instant {
        let wait = (BACKOFF.0 * 2u32.pow(self.failures.min(16))).min(BACKOFF.1);
        self.failures += 1;
        let not_before = Instant::now() + wait;
        self.not_before = Some(not_before);
        not_before
    }

    async fn start(&mut self, order: &ComputeOrder) -> Result<(), StartError> {
        if let Some(lack) = self.shared.lacks().into_iter().next() {
            return Err(StartError::Unfit(lack));
        }
        if let Some(crowded) = self.shared.is_crowded(&order.tenant_id) {
            return Err(StartError::Unfit(crowded));
        }
        // What is left may hold the port.
        self.end_leftovers().await;
        let port = self.choose_port(order).await?;
        let uid = match self.uid() {
            Some(uid) => Some(uid),
            None => {
                let shared = self.shared.clone();
                let taken = tokio::task::spawn_blocking(move || shared.take_uid()).await;
                taken.map_err(|error| StartError::io("a user id")(std::io::Error::other(error)))??
            }
        };
        let mut record = ComputeRecord {
            endpoint: self.id.clone(),
            tenant: order.tenant_id.clone(),
            listen: order.listen.clone(),
            port,
            process: None,
            uid,
        };
        self.keep(record.clone())?;
        let mut child = self.spawn(uid)?;
        let pid = child.id().unwrap_or_default();
        record.process = ProcessId::of(pid).map_err(StartError::io("the new process cannot be looked at"))?;
        // A child whose record is not durable gets no line, and ends.
        self.keep(record)?;
        let stdin = child.stdin.take();
        self.process = Process::Child(child);
        self.started = Instant::now();
        tracing::info!(compute = self.id, branch = order.branch, pid, port, "its process is started");
        let taken = self.shared.control.report(&self.id, &ComputeReport::Started { port }).await;
        self.reported = None;
        let Some(mut stdin) = stdin.filter(|_| taken) else { return Ok(()) };
        let token = self.shared.config.token.token().ok();
        let line = format!("{}\n", token.as_ref().map_or("", |token| token.reveal()));
        if let Err(error) = stdin.write_all(line.as_bytes()).await {
            // Its end is noticed like any other.
            tracing::warn!(compute = self.id, %error, "its process ended before it began");
        }
        Ok(())
    }

    async fn choose_port(&self, order: &ComputeOrder) -> Result<u16, PortError> {
        let (listen, ordered) = (order.listen.clone(), order.port);
        let before = self.record.as_ref().filter(|record| record.listen == listen).map(|record| record.port);
        let others: Vec<u16> = self.shared.known.lock().iter().filter(|(id, _)| **id != self.id).map(|(_, known)| known.port).collect();
        // Names of addresses are looked up, which may take a while.
        let chosen = tokio::task::spawn_blocking(move || match (ordered, before) {
            (0, Some(port)) if ports::check(&listen, port).is_ok() => Ok(port),
            (0, _) => ports::free(&listen, &others),
            (port, _) => ports::check(&listen, port).map(|()| port),
        });
        chosen
            .await
            .unwrap_or_else(|error| Err(PortError { port: ordered, address: order.listen.clone(), source: std::io::Error::other(error) }))
    }

    /// Writes the record, and says so to the rest of the host.
    fn keep(&mut self, record: ComputeRecord) -> Result<(), RecordError> {
        record.write(&self.shared.record_path(&self.id))?;
        let known = Known { tenant: record.tenant.clone(), runs: record.process.is_some(), port: record.port };
        self.shared.known.lock().insert(self.id.clone(), known);
        self.record = Some(record);
        Ok(())
    }

    /// The user id of its sandbox, if it has had one.
    fn uid(&self) -> Option<u32> {
        self.record.as_ref().and_then(|record| record.uid)
    }

    fn spawn(&self, uid: Option<u32>) -> Result<Child, StartError> {
        let log = File::options().create(true).append(true).open(self.shared.log_path(&self.id));
        let log = log.map_err(StartError::io("its log cannot be opened"))?;
        let errors = log.try_clone().map_err(StartError::io("its log cannot be opened"))?;
        let mut command = Command::new(&self.shared.config.program);
        command
            .arg("compute-process")
            .args(["--server", &self.shared.config.control_url, "--id", &self.id, "--host", self.shared.control.host()])
            .arg("--home")
            .arg(self.shared.home(&self.id))
            .arg("--run-dir")
            .arg(&self.shared.run_dir)
            .arg("--token-file")
            .arg(self.shared.token_path());
        for dir in self.shared.bin_dirs.arguments() {
            command.args(["--pg-bin-dir", &dir]);
        }
        if let (Some(uid), Sandboxing::Full { network, limits, .. }) = (uid, &self.shared.config.sandboxing) {
            command.args(["--uid", &uid.to_string(), "--network", network.name(), "--processes", &limits.processes.to_string()]);
            if let Some(cpu_milli) = limits.cpu_milli {
                command.args(["--cpu-milli", &cpu_milli.to_string()]);
            }
            if let Some(bytes) = limits.memory_bytes {
                command.args(["--memory-bytes", &bytes.to_string()]);
            }
        }
        if let Some(bytes) = self.shared.config.cache_bytes {
            command.args(["--cache-bytes", &bytes.to_string()]);
        }
        if let Some(bytes) = self.shared.config.wal_bytes {
            command.args(["--wal-bytes", &bytes.to_string()]);
        }
        // In a group of its own: the Ctrl-C that ends us in a terminal is not for it.
        command.current_dir("/").process_group(0).stdin(Stdio::piped()).stdout(log).stderr(errors);
        command.spawn().map_err(StartError::io("its process cannot be started"))
    }

    /// The process is gone.
    async fn is_gone(&mut self, status: Option<ExitStatus>) {
        tracing::info!(compute = self.id, status = status.map(|status| status.to_string()), "its process is gone");
        self.process = Process::None;
        if status.is_some_and(|status| status.success()) || self.started.elapsed() > RAN_WELL {
            self.failures = 0;
            self.not_before = None;
        } else {
            self.back_off();
        }
        self.end_leftovers().await;
        if let Some(mut record) = self.record.clone() {
            record.process = None;
            if let Err(error) = self.keep(record) {
                // The old one names a process that is gone, which does no harm.
                tracing::warn!(compute = self.id, %error, "that its process is gone is not noted");
            }
        }
        if let Some(known) = self.shared.known.lock().get_mut(&self.id) {
            known.runs = false;
        }
        self.stale_round = self.shared.round.load(Ordering::SeqCst);
        self.shared.control.report(&self.id, &ComputeReport::Gone).await;
        self.reported = None;
        self.shared.refresh.notify_one();
    }

    /// Ends the process and all that belongs to it. Whether it is gone.
    async fn end(&mut self) -> bool {
        let killed = match &mut self.process {
            Process::None => Ok(()),
            Process::Unsure(_) => return false,
            Process::Adopted(held) => held.kill(),
            Process::Child(child) => child.start_kill(),
        };
        if let Err(error) = killed {
            tracing::error!(compute = self.id, %error, "its process cannot be killed");
        }
        if !matches!(self.process, Process::None) {
            tracing::warn!(compute = self.id, "its process is ended by the host");
            match tokio::time::timeout(KILL_WAIT_MAX, gone(&mut self.process)).await {
                Ok(status) => self.is_gone(status).await,
                Err(_) => {
                    tracing::error!(compute = self.id, "its process is killed and does not go");
                    return false;
                }
            }
        }
        true
    }

    /// Takes folder, log and record away. Whether they are gone.
    async fn remove(&mut self) -> bool {
        if self.record.is_none() && !self.shared.record_path(&self.id).exists() {
            return true;
        }
        let (dirs, log, record) =
            (self.shared.dirs(&self.id, self.uid()), self.shared.log_path(&self.id), self.shared.record_path(&self.id));
        let (shared, uid) = (self.shared.clone(), self.uid());
        let removed = tokio::task::spawn_blocking(move || {
            if let Some(dirs) = dirs {
                dirs.remove()?;
            }
            remove_file(&log)?;
            // Last: as long as there is something, there is a record of it.
            remove_file(&record)?;
            if let (Some(uids), Some(uid)) = (&shared.uids, uid)
                && let Err(error) = uids.release(uid)
            {
                tracing::warn!(%error, "a user id stays claimed until the host starts again");
            }
            Ok(())
        });
        match removed.await.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(()) => {
                self.record = None;
                self.shared.known.lock().remove(&self.id);
                true
            }
            Err(error) => {
                tracing::error!(compute = self.id, %error, "its folder cannot be removed");
                false
            }
        }
    }

    /// Ends a postmaster and mounts that a compute process which was killed has left.
    async fn end_leftovers(&self) {
        let Some(dirs) = self.shared.dirs(&self.id, self.uid()) else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || dirs.end_leftovers()).await {
            tracing::error!(compute = self.id, %error, "what its process left cannot be ended");
        }
    }
}

/// Waits until the process has ended; for ever where there is none. Its exit status, where it was our child.
async fn gone(process: &mut Process) -> Option<ExitStatus> {
    loop {
        match process {
            Process::None | Process::Unsure(_) => std::future::pending().await,
            Process::Adopted(held) => match held.gone().await {
                Ok(()) => return None,
                Err(error) => tracing::warn!(%error, "a compute process cannot be watched right now"),
            },
            Process::Child(child) => match child.wait().await {
                Ok(status) => return Some(status),
                Err(error) => tracing::warn!(%error, "a compute process cannot be waited for right now"),
            },
        }
        tokio::time::sleep(UNSURE_WAIT).await;
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_kind_it_is() {
        let taken = PortError { port: 5432, address: "127.0.0.1".to_owned(), source: std::io::ErrorKind::AddrInUse.into() };
        let ComputeReport::Refused { code, detail } = StartError::from(taken).report() else { panic!("expected a refusal") };
        assert_eq!(code, "port_in_use");
        assert!(detail.contains("5432"), "{detail}");
    }
}
