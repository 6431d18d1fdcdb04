//! Files that have no WAL and must outlive the compute: told to whoever keeps them.
//!
//! Postgres writes such a file to a temporary name, closes and renames it; a person may edit it in place. Either way
//! the thread that serves the mount only notes that the path changed; a thread of its own waits a moment, reads what
//! the file holds by then, and tells the [`FileObserver`]. So of several writes in a row the last one wins, and nothing
//! in the mount waits for the observer. At most [`PATHS_MAX`] changed paths are held; a change beyond that is logged
//! and reported by the next [`Observer::flush`].

use std::{
    collections::BTreeMap,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    file::FileContext,
    node::{Content, Node},
};

/// Is told of changes to files that must outlive the compute. Paths are relative to the data directory.
///
/// Called from one thread, one call at a time. What cannot be kept is the observer's to log.
pub trait FileObserver: Send + Sync {
    /// The file holds `contents`.
    fn written(&self, path: &str, contents: Vec<u8>);
    /// The file is gone.
    fn removed(&self, path: &str);
}

/// Changed paths waiting for the observer, at most.
const PATHS_MAX: usize = 4096;
/// Largest file that is handed on. Statistics of 100,000 tables are some 30 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// How long a change rests before the file is read, so that a burst of writes is one.
const SETTLE: Duration = Duration::from_millis(20);

/// Whether a file must outlive the compute: one that has no WAL. The progress of replication origins has, so it comes
/// with the base backup.
pub(super) fn is_observed(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["postgresql.auto.conf" | "postgresql.conf" | "pg_hba.conf" | "pg_ident.conf"] => true,
        ["pg_stat", file] => !file.ends_with(".tmp"),
        // A slot is made, and dropped, under a name of its own.
        ["pg_replslot", slot, "state"] => !slot.ends_with(".tmp"),
        ["pg_logical", "snapshots", file] => file.ends_with(".snap"),
        ["pg_logical", "mappings", file] => file.starts_with("map-"),
        _ => false,
    }
}

/// Carries changes from the mount to the [`FileObserver`].
pub(super) struct Observer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Changed paths; `None`: removed.
    paths: BTreeMap<Arc<str>, Option<Arc<Node>>>,
    /// When the first of them changed.
    since: Option<Instant>,
    /// The thread is telling the observer.
    busy: bool,
    /// Somebody waits: no rest.
    hurry: bool,
    closing: bool,
    lost: u64,
}

impl Observer {
    /// Starts the thread.
    pub(super) fn start(observer: Arc<dyn FileObserver>, files: Arc<FileContext>) -> std::io::Result<Observer> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let worker = shared.clone();
        let thread = thread::Builder::new().name("mount-observer".to_owned()).spawn(move || worker.run(&*observer, &files))?;
        Ok(Observer { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The file at `path` changed.
    pub(super) fn written(&self, path: Arc<str>, node: Arc<Node>) {
        self.shared.note(path, Some(node));
    }

    /// There is no file at `path` any more.
    pub(super) fn removed(&self, path: Arc<str>) {
        self.shared.note(path, None);
    }

    /// Waits until the observer was told of all changes so far. Gives the number of changes that were lost because too
    /// many waited.
    pub(super) fn flush(&self) -> Result<(), u64> {
        let mut state = self.shared.state.lock();
        state.hurry = true;
        self.shared.changed.notify_all();
        while state.busy || !state.paths.is_empty() {
            self.shared.changed.wait(&mut state);
        }
        state.hurry = false;
        match std::mem::take(&mut state.lost) {
            0 => Ok(()),
            lost => Err(lost),
        }
    }

    /// Tells the observer what is left, and ends.
    pub(super) fn close(&self) {
        self.shared.state.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that tells of changed files panicked");
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn note(&self, path: Arc<str>, node: Option<Arc<Node>>) {
        let mut state = self.state.lock();
        if state.paths.len() >= PATHS_MAX && !state.paths.contains_key(&path) {
            tracing::error!("{PATHS_MAX} changed files already wait to be kept; {path} will not outlive the compute");
            state.lost += 1;
            return;
        }
        state.since.get_or_insert_with(Instant::now);
        if state.paths.insert(path, node).is_none() {
            self.changed.notify_all();
        }
    }

    fn run(&self, observer: &dyn FileObserver, files: &FileContext) {
        let mut state = self.state.lock();
        loop {
            let rests_until = state.since.map(|since| since + SETTLE);
            match rests_until {
                None if state.closing => return,
                None => self.changed.wait(&mut state),
                Some(until) if !state.hurry && !state.closing && Instant::now() < until => {
                    self.changed.wait_until(&mut state, until);
                }
                Some(_) => {
                    let paths = std::mem::take(&mut state.paths);
                    state.since = None;
                    state.busy = true;
                    drop(state);
                    for (path, node) in paths {
                        tell(observer, files, &path, node.as_deref());
                    }
                    state = self.state.lock();
                    state.busy = false;
                    self.changed.notify_all();
                }
            }
        }
    }
}

fn tell(observer: &dyn FileObserver, files: &FileContext, path: &str, node: Option<&Node>) {
    match node.map(|node| &node.content) {
        None => observer.removed(path),
        Some(Content::File(file)) if file.size() > FILE_BYTES_MAX => {
            tracing::error!("{path} has {} bytes, more than {FILE_BYTES_MAX}: it will not outlive the compute", file.size());
        }
        Some(Content::File(file)) => match file.read_all(files) {
            Ok(contents) => observer.written(path, contents),
            Err(error) => tracing::error!("cannot read {path} in order to keep it: {error}"),
        },
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_without_wal_are_observed() {
        for path in ["postgresql.auto.conf", "pg_stat/pgstat.stat", "pg_replslot/s/state", "pg_logical/snapshots/0-1A2B.snap"] {
            assert!(is_observed(path), "{path}");
        }
        for path in [
            "postgresql.auto.conf.tmp",
            "pg_stat/pgstat.tmp",
            "pg_replslot/s.tmp/state",
            "pg_replslot/s/state.tmp",
            "base/5/postgresql.auto.conf",
            "postmaster.pid",
        ] {
            assert!(!is_observed(path), "{path}");
        }
    }
}
