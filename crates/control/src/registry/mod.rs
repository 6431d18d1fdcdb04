//! The computes of this host: which should run, which do, and what each is told.
//!
//! A compute is a process of its own that outlives us. What should run stands in one small file each, `<computes>/<id>.json`, beside
//! the compute's folder `<computes>/<id>/`; both lie outside the pageserver's own folder, whose loss must not touch them: their
//! `pg_wal` may hold what the store does not have yet. The watch over processes ([`process`]) starts again what should run and does
//! not.

mod entry;
mod process;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use varve_storage::ids::{TenantId, TimelineId};

pub use entry::{ComputeEntry, ComputeRecord, Phase, Status};
pub use process::{Spawner, identify};

use crate::error::{Code, ServerError};

/// All computes of this host.
#[derive(Debug)]
pub struct Computes {
    folder: PathBuf,
    entries: RwLock<HashMap<String, Arc<ComputeEntry>>>,
}

impl Computes {
    /// Reads what should run from `folder`, which is made if missing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(folder: &Path) -> io::Result<Computes> {
        std::fs::create_dir_all(folder)?;
        let mut entries = HashMap::new();
        for file in std::fs::read_dir(folder)? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match std::fs::read(&path).map_err(|e| e.to_string()).and_then(|b| serde_json::from_slice(&b).map_err(|e| e.to_string())) {
                Ok(record) => {
                    let mut record: ComputeRecord = record;
                    // The last server was killed before it had started the process: that is still to be done.
                    record.process.get_or_insert((0, String::new()));
                    entries.insert(record.id.clone(), Arc::new(ComputeEntry::new(record, path)));
                }
                Err(error) => tracing::error!(file = %path.display(), error, "a compute's file cannot be read and is left alone"),
            }
        }
        Ok(Computes { folder: folder.to_owned(), entries: RwLock::new(entries) })
    }

    /// Folder of compute `id`.
    pub fn home(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// Adds a compute that should run from now on.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn add(&self, record: ComputeRecord) -> Result<Arc<ComputeEntry>, ServerError> {
        let path = self.folder.join(format!("{}.json", record.id));
        let entry = Arc::new(ComputeEntry::new(record, path));
        entry.save()?;
        self.entries.write().insert(entry.id().to_owned(), entry.clone());
        Ok(entry)
    }

    /// Forgets a compute that has ended.
    pub fn remove(&self, id: &str) {
        if let Some(entry) = self.entries.write().remove(id) {
            entry.forget();
        }
    }

    /// The compute `id`.
    ///
    /// # Errors
    /// [`Code::UnknownCompute`].
    pub fn get(&self, id: &str) -> Result<Arc<ComputeEntry>, ServerError> {
        self.entries.read().get(id).cloned().ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            ServerError::new(Code::UnknownCompute, format!("there is no compute '{shown}'; 'varve compute list' shows those there are"))
        })
    }

    /// All computes, by id.
    pub fn all(&self) -> Vec<Arc<ComputeEntry>> {
        let mut all: Vec<_> = self.entries.read().values().cloned().collect();
        all.sort_by(|a, b| a.id().cmp(b.id()));
        all
    }

    /// The computes of a tenant.
    pub fn of_tenant(&self, tenant: TenantId) -> Vec<Arc<ComputeEntry>> {
        self.all().into_iter().filter(|entry| entry.record().tenant_id == tenant).collect()
    }

    /// The computes on a timeline, throw-away ones included.
    pub fn of_timeline(&self, tenant: TenantId, timeline: TimelineId) -> Vec<Arc<ComputeEntry>> {
        self.of_tenant(tenant).into_iter().filter(|entry| entry.record().timeline_id == timeline).collect()
    }

    /// The compute that should write a timeline, if any.
    pub fn writer_of(&self, tenant: TenantId, timeline: TimelineId) -> Option<Arc<ComputeEntry>> {
        self.of_timeline(tenant, timeline).into_iter().find(|entry| entry.record().lsn.is_none() && entry.should_run())
    }
}
