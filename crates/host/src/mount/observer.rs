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
use varve_api::kept_files;

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
    /// The file has other contents, which could not be handed over.
    fn not_kept(&self, path: &str, why: String);
}

/// Changed paths waiting for the observer, at most.
const PATHS_MAX: usize = 4096;
/// Largest file that is handed on. Statistics of 100,000 tables are some 30 MB.
const FILE_BYTES_MAX: u64 = kept_files::FILE_BYTES_MAX as u64;
/// How long a change rests before the file is read, so that a burst of writes is one.
const SETTLE: Duration = Duration::from_millis(20);
/// How long a change of a file rests that changes all the time, such as what an extension dumps every few minutes. At
/// the mount's end none rests.
const REST_MAX: Duration = Duration::from_secs(3600);

/// Whether a file must outlive the compute: one that has no WAL.
pub(super) fn is_observed(path: &str) -> bool {
    kept_files::check(path).is_ok()
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
    /// Changed paths, and when they are told of; `None`: removed.
    paths: BTreeMap<Arc<str>, (Option<Arc<Node>>, Instant)>,
    rests: Rests,
    /// The thread is telling the observer.
    busy: bool,
    /// Somebody waits: no rest.
    hurry: bool,
    closing: bool,
    lost: u64,
}

/// How long the next change of a path rests.
#[derive(Default)]
struct Rests(BTreeMap<Arc<str>, Duration>);

impl Rests {
    fn next(&mut self, path: &str) -> Duration {
        if kept_files::is_urgent(path) {
            return SETTLE;
        }
        let rest = self.0.get(path).copied().unwrap_or(SETTLE);
        if self.0.len() >= PATHS_MAX && !self.0.contains_key(path) {
            self.0.clear();
        }
        self.0.insert(path.into(), (rest * 2).min(REST_MAX));
        rest
    }
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
        if let Some((newest, _)) = state.paths.get_mut(&path) {
            *newest = node;
            return;
        }
        let due = Instant::now() + state.rests.next(&path);
        state.paths.insert(path, (node, due));
        self.changed.notify_all();
    }

    fn run(&self, observer: &dyn FileObserver, files: &FileContext) {
        let mut state = self.state.lock();
        loop {
            let first = state.paths.values().map(|(_, due)| *due).min();
            let at_once = state.hurry || state.closing;
            match first {
                None if state.closing => return,
                None => self.changed.wait(&mut state),
                Some(due) if !at_once && Instant::now() < due => {
                    self.changed.wait_until(&mut state, due);
                }
                Some(_) => {
                    let now = Instant::now();
                    let all = std::mem::take(&mut state.paths);
                    let (paths, resting): (BTreeMap<_, _>, _) = all.into_iter().partition(|(_, (_, due))| at_once || *due <= now);
                    state.paths = resting;
                    state.busy = true;
                    drop(state);
                    for (path, (node, _)) in paths {
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
            observer.not_kept(path, format!("it has {} bytes, more than {FILE_BYTES_MAX}", file.size()));
        }
        Some(Content::File(file)) => match file.read_all(files) {
            Ok(contents) => observer.written(path, contents),
            Err(error) => observer.not_kept(path, format!("it cannot be read: {error}")),
        },
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_goes_on_changing_rests_longer_each_time() {
        let mut rests = Rests::default();
        let of = |rests: &mut Rests, path: &str| (0..40).map(|_| rests.next(path)).collect::<Vec<_>>();
        assert!(of(&mut rests, "postgresql.auto.conf").iter().all(|rest| *rest == SETTLE));
        let dumped = of(&mut rests, "autoprewarm.blocks");
        assert_eq!((dumped[0], dumped[1], dumped[39]), (SETTLE, SETTLE * 2, REST_MAX));
        for i in 0..2 * PATHS_MAX {
            rests.next(&format!("x/{i}"));
        }
        assert!(rests.0.len() <= PATHS_MAX);
    }
}
