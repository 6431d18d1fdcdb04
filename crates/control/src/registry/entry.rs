//! One compute as the pageserver knows it.

use std::io::Write as _;
use std::path::PathBuf;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use varve_postgres::Lsn;
use varve_api::host::Desired;
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};

use crate::error::{Code, ServerError};

/// What outlives the pageserver of a compute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ComputeRecord {
    /// Id, random.
    pub id: String,
    /// Tenant.
    pub tenant_id: TenantId,
    /// Tenant's name, for people.
    pub tenant: String,
    /// The timeline it runs on; an in-place restore moves it to another.
    pub timeline_id: TimelineId,
    /// Addresses to listen on.
    pub listen: String,
    /// Port to listen on.
    pub port: u16,
    /// The moment that a throw-away compute shows.
    #[serde(with = "optional_lsn")]
    pub lsn: Option<Lsn>,
    /// Whether it should run.
    pub should_run: bool,
    /// Whether it has begun an incarnation: then a later compute fences it; else it will fence the others itself.
    pub begun: bool,
    /// Process id of the compute process, with its start time; of the last that was started or attached.
    pub process: Option<(u32, String)>,
}

mod optional_lsn {
    use serde::{Deserialize, Deserializer, Serializer};
    use varve_postgres::Lsn;

    pub(super) fn serialize<S: Serializer>(lsn: &Option<Lsn>, serializer: S) -> Result<S::Ok, S::Error> {
        match lsn {
            Some(lsn) => serializer.collect_str(lsn),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Lsn>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
    }
}

/// Where a compute stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its process was started and has not attached yet.
    Starting,
    /// Postgres takes connections.
    Running,
    /// It was told to end.
    Stopping,
    /// It gave up.
    Failed(String),
    /// It ended as it was told; whether cleanly.
    Ended {
        /// Whether all its WAL arrived.
        clean: bool,
    },
}

/// What changes about a compute while it runs.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it stands.
    pub phase: Phase,
    /// What it is told.
    pub desired: Desired,
    /// The incarnation that should run.
    pub incarnation: u64,
    /// Writer epoch of that incarnation.
    pub epoch: Option<WriterEpoch>,
    /// Postmaster.
    pub pid: Option<u32>,
    /// Mount and supervisor.
    pub mount_pid: Option<u32>,
}

/// A compute.
#[derive(Debug)]
pub struct ComputeEntry {
    id: String,
    path: PathBuf,
    record: Mutex<ComputeRecord>,
    status: watch::Sender<Status>,
    /// Held while one of begin, attach, restore or stop decides about it.
    pub turn: tokio::sync::Mutex<()>,
}

impl ComputeEntry {
    pub(super) fn new(record: ComputeRecord, path: PathBuf) -> ComputeEntry {
        let desired = if record.should_run { Desired::Run } else { Desired::Stop };
        let phase = if record.should_run { Phase::Starting } else { Phase::Stopping };
        let status = Status { phase, desired, incarnation: 0, epoch: None, pid: None, mount_pid: None };
        ComputeEntry {
            id: record.id.clone(),
            path,
            record: Mutex::new(record),
            status: watch::channel(status).0,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What outlives us of it.
    pub fn record(&self) -> ComputeRecord {
        self.record.lock().clone()
    }

    /// Whether it should run.
    pub fn should_run(&self) -> bool {
        self.record.lock().should_run
    }

    /// Where it stands now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Changes where it stands, and wakes who waits for that.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    /// Waits until `done` says so of its status; `None` if that takes longer than `limit`.
    pub async fn wait(&self, limit: std::time::Duration, done: impl FnMut(&Status) -> bool) -> Option<Status> {
        let mut receiver = self.status.subscribe();
        let status = tokio::time::timeout(limit, receiver.wait_for(done)).await.ok()?.ok()?;
        Some(status.clone())
    }

    /// Changes the record and writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn change(&self, change: impl FnOnce(&mut ComputeRecord)) -> Result<(), ServerError> {
        change(&mut self.record.lock());
        self.save()
    }

    /// Tells it to end: `desired` is stop or fenced.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn tell_to_end(&self, desired: Desired) -> Result<(), ServerError> {
        self.change(|record| record.should_run = false)?;
        self.update(|status| {
            status.desired = desired;
            if matches!(status.phase, Phase::Starting | Phase::Running) {
                status.phase = Phase::Stopping;
            }
        });
        Ok(())
    }

    pub(super) fn save(&self) -> Result<(), ServerError> {
        let record = self.record.lock();
        let temporary = self.path.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(&*record)?)?;
            std::fs::rename(&temporary, &self.path)
        };
        write().map_err(|error| ServerError::new(Code::Internal, format!("cannot write {}: {error}", self.path.display())))
    }

    pub(super) fn forget(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
