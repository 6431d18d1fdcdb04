//! Files that have no WAL and must outlive the compute: the mount tells what was written, and they go to the
//! pageserver.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::Notify;
use varve_api::host::FileVersion;
use varve_postgres::settings::Configuration;

use crate::config;
use crate::dirs::Dirs;
use crate::mount::FileObserver;
use crate::server::{Server, is_transient};

/// Wait between tries to reach a server that is away.
const RETRY_WAIT: Duration = Duration::from_millis(200);
/// Files that an error names.
const NAMED_MAX: usize = 10;
/// How long the end of a compute waits for uploads.
const FLUSH_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Shared {
    /// Newest version of each file that was not uploaded yet: at most one a path.
    pending: Mutex<BTreeMap<String, Option<Vec<u8>>>>,
    /// Files whose newest contents are not kept, and why: at most one a path.
    refused: Mutex<BTreeMap<String, String>>,
    changed: Notify,
    idle: Notify,
    /// Where our own files of who may connect stand.
    access: Mutex<Option<Dirs>>,
    postmaster: Mutex<Option<u32>>,
    standby_names_taken: Notify,
}

impl Shared {
    fn look_at(&self, path: &str, contents: &[u8]) {
        if path == "postgresql.auto.conf" && sets_standby_names(contents) {
            self.standby_names_taken.notify_one();
        }
    }
}

/// The setting that is ours, though it stands in a file: it changes while Postgres runs.
pub(crate) const STANDBY_NAMES: &str = "synchronous_standby_names";

/// Whether a `postgresql.auto.conf` sets `synchronous_standby_names`, which it would do over our own configuration.
pub(crate) fn sets_standby_names(contents: &[u8]) -> bool {
    let file = Configuration::parse(&String::from_utf8_lossy(contents));
    file.settings().iter().any(|(name, _)| name.eq_ignore_ascii_case(STANDBY_NAMES))
}

/// Uploads files in the background, the last version of each.
#[derive(Debug)]
pub struct Uploader {
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

/// Files of the data directory that the server did not take.
#[derive(Debug, thiserror::Error)]
#[error("these files of its data directory are not kept beyond this compute, so save them elsewhere or remove them: {0}")]
pub struct NotKept(String);

impl Uploader {
    /// Starts the upload task; a throw-away compute (`keep` false) forgets what it writes.
    pub fn start(server: Server, incarnation: u64, keep: bool) -> Uploader {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(upload(shared.clone(), server, incarnation, keep));
        Uploader { shared, task }
    }

    /// What the mount is given.
    pub fn observer(&self) -> Arc<dyn FileObserver> {
        Arc::new(Observer { shared: self.shared.clone() })
    }

    /// From now on a written `pg_hba.conf` or `pg_ident.conf` is also taken into ours.
    pub fn watch_access(&self, dirs: &Dirs) {
        *self.shared.access.lock() = Some(dirs.clone());
    }

    /// Says which postmaster to tell when `pg_hba.conf` changed.
    pub fn reload_with(&self, postmaster: u32) {
        *self.shared.postmaster.lock() = Some(postmaster);
    }

    /// Waits until `ALTER SYSTEM` has set `synchronous_standby_names`, which is ours: commits would wait for nobody, or
    /// for somebody else.
    pub async fn standby_names_taken(&self) {
        self.shared.standby_names_taken.notified().await;
    }

    /// Waits until everything was uploaded, within a limit.
    ///
    /// # Errors
    /// [`NotKept`] with what was not.
    pub async fn flush(&self) -> Result<(), NotKept> {
        let wait = async {
            loop {
                let idle = self.shared.idle.notified();
                if self.shared.pending.lock().is_empty() {
                    return;
                }
                self.shared.changed.notify_one();
                idle.await;
            }
        };
        let in_time = tokio::time::timeout(FLUSH_MAX, wait).await.is_ok();
        let mut left = self.shared.refused.lock().clone();
        if !in_time {
            left.extend(self.shared.pending.lock().keys().map(|path| (path.clone(), "the server did not take it in time".to_owned())));
        }
        left.retain(|path, _| !path.starts_with("pg_stat/")); // statistics are no promise
        let mut named: Vec<String> = left.iter().take(NAMED_MAX).map(|(path, why)| format!("{path} ({why})")).collect();
        if left.len() > NAMED_MAX {
            named.push(format!("and {} more", left.len() - NAMED_MAX));
        }
        if named.is_empty() { Ok(()) } else { Err(NotKept(named.join(", "))) }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Observer {
    shared: Arc<Shared>,
}

impl FileObserver for Observer {
    fn written(&self, path: &str, contents: Vec<u8>) {
        if path.starts_with("pg_replslot/varve/") {
            return; // the WAL receiver's own, made anew at each start
        }
        if matches!(path, "pg_hba.conf" | "pg_ident.conf") {
            let text = String::from_utf8_lossy(&contents).into_owned();
            if let Some(dirs) = &*self.shared.access.lock() {
                let ours = if path == "pg_hba.conf" { config::pg_hba_conf(dirs.isolation(), &text) } else { config::pg_ident_conf(&text) };
                if let Err(error) = dirs.write(path, &ours) {
                    tracing::warn!(path, %error, "it could not be taken over");
                }
            }
            if let Some(pid) = self.shared.postmaster.lock().and_then(|pid| Pid::from_raw(pid as i32)) {
                let _ = kill_process(pid, Signal::HUP);
            }
        }
        self.shared.look_at(path, &contents);
        self.shared.pending.lock().insert(path.to_owned(), Some(contents));
        self.shared.changed.notify_one();
    }

    fn removed(&self, path: &str) {
        // Postgres removes its statistics file once it has read it; the kept one serves the next start.
        if path.starts_with("pg_stat/") || path.starts_with("pg_replslot/varve/") {
            return;
        }
        self.shared.refused.lock().remove(path);
        self.shared.pending.lock().insert(path.to_owned(), None);
        self.shared.changed.notify_one();
    }

    fn not_kept(&self, path: &str, why: String) {
        tracing::warn!(path, why, "a file is not kept beyond this compute");
        self.shared.refused.lock().insert(path.to_owned(), why);
    }
}

async fn upload(shared: Arc<Shared>, server: Server, incarnation: u64, keep: bool) {
    loop {
        let next = shared.pending.lock().first_key_value().map(|(path, contents)| (path.clone(), contents.clone()));
        let Some((path, contents)) = next else {
            shared.idle.notify_waiters();
            shared.changed.notified().await;
            continue;
        };
        if keep {
            let version = FileVersion { incarnation, path: path.clone(), contents: contents.as_ref().map(|bytes| BASE64.encode(bytes)) };
            match server.file(&version).await {
                Ok(()) => {
                    shared.refused.lock().remove(&path);
                }
                Err(error) if is_transient(&error) => {
                    tokio::time::sleep(RETRY_WAIT).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(path, %error, "a file was not kept");
                    shared.refused.lock().insert(path.clone(), error.to_string());
                }
            }
        }
        let mut pending = shared.pending.lock();
        if pending.get(&path) == Some(&contents) {
            pending.remove(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_name_in_the_settings_of_alter_system_is_seen() {
        assert!(sets_standby_names(b"# Do not edit\nwork_mem = '4MB'\nsynchronous_standby_names = ''\n"));
        assert!(sets_standby_names(b"  Synchronous_Standby_Names='x'"));
        assert!(!sets_standby_names(b"# synchronous_standby_names = ''\napplication_name = 'synchronous_standby_names'\n"));
    }
}
