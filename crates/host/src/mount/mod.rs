//! The lazily cloned data directory: a FUSE file system that looks like a data directory of the timeline at the base
//! LSN, and fetches what is touched.
//!
//! ```text
//! Postgres ── kernel ──> filesystem ──> tree ──> directory (listed at first need)
//!                            │            └────> node ──> file ──> cells: what is here
//!                            │                              ├────> cache: one sparse file each
//!                            └─ workers: what must wait     └────> base ──> source ──> page service
//! ```
//! - **Lazy**: starting copies nothing. A directory asks the base for its relations when it is first needed; a block is
//!   fetched when it is first read, with all that the kernel wants in the same request, and kept in the cache
//!   directory.
//! - **Exact**: each part of a file is either still in the base, or here. It comes here by being fetched, written,
//!   truncated or punched, and only what the base has as well may go again; a file that is removed is gone, and a new
//!   one of its name has nothing to do with it.
//! - **Bounded**: what the base has as well goes when the cache reaches its budget. What is written becomes that when
//!   the base moves on, to a checkpoint of Postgres's.
//!   A full disk is told to whoever writes, as an error, while all that was written can still be stored.
//! - **Disposable**: all metadata is in memory and nothing is synced. When this process ends, the data directory is
//!   gone; durability is the pageserver's.
//! - **Patient**: while the pageserver is away, what is here is read and written as always, and first touches wait.
//!
//! What lies outside: `pg_wal` (a symbolic link among the initial files, to plain disk), and tablespaces that a user
//! creates while the compute runs with a location that is not the mount's. Tablespaces of the base are directories of
//! the mount, wherever they are to be seen ([`crate::tablespaces`]).
//!
//! Must never know: Postgres's processes, WAL, branches, or how the page service is spoken to.

mod base;
mod beside_wal;
mod budget;
mod build;
mod cache;
mod cells;
mod directory;
mod fetched;
mod file;
#[cfg(test)]
mod file_tests;
mod filesystem;
#[cfg(test)]
mod hand_over_tests;
mod host;
mod node;
mod observer;
mod prefetch;
mod rebase;
mod recent;
mod room;
mod rule;
mod source;
mod startup_set;
mod tree;
mod workers;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use parking_lot::Mutex;
use varve_postgres::{Major, Oid, RelFork};

use crate::tablespaces::Location;

pub(crate) use self::build::{NAMED, TABLESPACES};
use self::{
    base::Base,
    budget::CacheBudget,
    cache::CacheDir,
    file::{Counters, FileContext},
    filesystem::{DataDirectory, Failure},
    observer::Observer,
    room::{Room, Watcher},
    source::PatientSource,
    startup_set::StartupSet,
    tree::Tree,
};
pub use self::{
    beside_wal::{BesideWal, RelationFile, StagedFile},
    file::Tally,
    filesystem::FailureCallback,
    host::remove_stale_mount,
    observer::FileObserver,
    rebase::Rebaser,
    room::{Fullness, RoomCallback},
    rule::Terms,
    source::BaseSource,
};

/// Threads that take requests from the kernel, at least: more do not pay on two CPUs, fewer would leave too few when
/// some wait for the base.
const REQUEST_THREADS_MIN: usize = 4;
/// And at most; each has a buffer of 16 MiB, of which it uses as much as its largest request.
const REQUEST_THREADS_MAX: usize = 16;
/// How long [`Mount::unmount`] waits for whoever still uses the mount.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(5);
/// Wait between two attempts to unmount.
const UNMOUNT_RETRY: Duration = Duration::from_millis(20);

/// A file of the base backup. Directories on the way to it are made as Postgres makes them.
#[derive(Clone, Debug)]
pub struct InitialFile {
    /// Relative to the data directory.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub content: InitialContent,
}

/// What an [`InitialFile`] is.
#[derive(Clone, Debug)]
pub enum InitialContent {
    /// A regular file with these contents.
    File(Bytes),
    /// A symbolic link to this target.
    Symlink(PathBuf),
    /// An empty directory.
    Directory,
}

/// What [`Mount::start`] needs.
pub struct MountConfig {
    /// Says in the log which mount it is: `acme/main`.
    pub name: String,
    /// Where the data directory appears; created if need be.
    pub mountpoint: PathBuf,
    /// Scratch space on plain disk, for this mount alone; created if need be. What an earlier mount left in it is
    /// deleted.
    pub cache_dir: PathBuf,
    /// How many bytes the cache may take, if that is limited. What is written stays until the base moves on.
    pub cache_bytes: Option<u64>,
    /// Owner of the data directory, the user that Postgres runs as.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The files of the base backup.
    pub initial_files: Vec<InitialFile>,
    /// The databases of the base: (tablespace, database).
    pub databases: Vec<(Oid, Oid)>,
    /// The tablespaces of the base, but for the two default ones, and where they are to be seen.
    pub tablespaces: Vec<(Oid, Location)>,
    /// Postgres's major and catalog version, which name its part of a tablespace (`PG_15_202209061`).
    pub major: Major,
    /// See [`MountConfig::major`].
    pub catalog_version: u32,
    /// Where the base is.
    pub source: Arc<dyn BaseSource>,
    /// Hears of files that must outlive the compute.
    pub observer: Option<Arc<dyn FileObserver>>,
    /// Called when the mount has lost data or stops working: Postgres must be stopped then, and started anew from the
    /// pageserver.
    pub on_failure: Option<FailureCallback>,
    /// Called when the disk of the cache fills, and when there is room again.
    pub on_room: Option<RoomCallback>,
    /// How long a first touch waits for a pageserver that is away.
    pub source_patience: Duration,
    /// How long the blocks that are read are noted for [`Mount::touched_blocks`].
    pub note_touched_for: Duration,
}

impl MountConfig {
    /// A configuration with nothing in the data directory yet, owned by the user that runs this.
    pub fn new(name: &str, mountpoint: &Path, cache_dir: &Path, version: (Major, u32), source: Arc<dyn BaseSource>) -> MountConfig {
        MountConfig {
            name: name.to_owned(),
            mountpoint: mountpoint.to_owned(),
            cache_dir: cache_dir.to_owned(),
            cache_bytes: None,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            initial_files: Vec::new(),
            databases: Vec::new(),
            tablespaces: Vec::new(),
            major: version.0,
            catalog_version: version.1,
            source,
            observer: None,
            on_failure: None,
            on_room: None,
            source_patience: Duration::from_secs(300),
            note_touched_for: Duration::from_secs(5),
        }
    }
}

/// What can go wrong around a mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No FUSE on this host.
    #[error("cannot open /dev/fuse: {source}; {advice}, or use --materialize for a plain data directory")]
    NoFuse {
        /// Why.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The mountpoint cannot be used.
    #[error("cannot mount at {}: {source}", path.display())]
    Mountpoint {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process already serves a mount there.
    #[error("{} is already mounted by a process that lives; stop that compute, or choose another directory", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// Something else is mounted there.
    #[error("{} is the mountpoint of another file system ({what}); choose another directory", path.display())]
    ForeignMount {
        /// Where.
        path: PathBuf,
        /// What.
        what: String,
    },
    /// The cache directory cannot be used.
    #[error("cannot use {} as the cache of a mount: {source}", path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An initial file that cannot be.
    #[error("the base backup's file {path:?} cannot be put into the data directory: {reason}")]
    InitialFile {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for the mount: {0}")]
    Thread(io::Error),
    /// Blocks could not be fetched ahead.
    #[error("cannot fetch blocks ahead of their use: {0}")]
    Prefetch(io::Error),
    /// Changed files were lost.
    #[error("{0} changes of files that must outlive the compute were lost, because too many waited")]
    ChangesLost(u64),
}

/// What a mount did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountStatistics {
    /// Reads that did not have to fetch, of those that the kernel could not answer itself.
    pub hits: u64,
    /// Calls of the source for blocks.
    pub fetches: u64,
    /// Blocks that they brought.
    pub blocks_fetched: u64,
    /// Bytes that the kernel read, beyond what it had itself.
    pub bytes_read: u64,
    /// Bytes that the kernel wrote.
    pub bytes_written: u64,
    /// Blocks that were dropped to make room.
    pub blocks_evicted: u64,
    /// How often the base moved on.
    pub rebases: u64,
    /// Blocks that were written, and that the base had as well later.
    pub blocks_handed_over: u64,
    /// Bytes in the cache that the base has as well, and that may be dropped.
    pub cached_bytes: u64,
    /// Bytes that were written, and that the base does not have yet. Holes in files count as well.
    pub dirty_bytes: u64,
    /// What the cache should not exceed; none: whatever there is.
    pub limit_bytes: Option<u64>,
}

fn statistics(files: &FileContext) -> MountStatistics {
    let FileContext { counters, budget, .. } = files;
    let held = budget.held();
    MountStatistics {
        hits: counters.hits.load(Ordering::Relaxed),
        fetches: counters.fetches.load(Ordering::Relaxed),
        blocks_fetched: counters.blocks_fetched.load(Ordering::Relaxed),
        bytes_read: counters.bytes_read.load(Ordering::Relaxed),
        bytes_written: counters.bytes_written.load(Ordering::Relaxed),
        blocks_evicted: budget.evicted(),
        rebases: counters.rebases.load(Ordering::Relaxed),
        blocks_handed_over: budget.handed_over(),
        cached_bytes: held.fetched,
        dirty_bytes: held.written,
        limit_bytes: budget.limit(),
    }
}

/// A mounted data directory. Dropped, it is unmounted.
pub struct Mount {
    mountpoint: PathBuf,
    version: (Major, u32),
    tree: Arc<Tree>,
    failure: Arc<Failure>,
    closing: Arc<AtomicBool>,
    /// Threads that keep what was fetched ahead, and the one that watches the disk.
    keepers: Mutex<Vec<JoinHandle<()>>>,
    session: Mutex<Option<BackgroundSession>>,
}

impl Mount {
    /// Mounts the data directory. It can be used when this returns.
    pub fn start(mut config: MountConfig) -> Result<Mount, MountError> {
        host::check_device()?;
        let mountpoint = config.mountpoint.clone();
        let mountpoint_error = |source| MountError::Mountpoint { path: mountpoint.clone(), source };
        remove_stale_mount(&mountpoint)?;
        std::fs::create_dir_all(&mountpoint).map_err(mountpoint_error)?;
        let cache = CacheDir::create(&config.cache_dir).map_err(|source| MountError::Cache { path: config.cache_dir.clone(), source })?;
        let room = Room::on(&cache).map_err(|source| MountError::Cache { path: config.cache_dir.clone(), source })?;
        let files = Arc::new(FileContext {
            source: PatientSource::new(config.source.clone(), config.name.clone(), config.source_patience),
            cache,
            budget: CacheBudget::new(config.cache_bytes),
            room,
            startup_set: StartupSet::record_for(config.note_touched_for),
            mark: AtomicU64::new(0),
            counters: Counters::default(),
            #[cfg(test)]
            meanwhile: |_, _| {},
        });
        let observer = match &config.observer {
            Some(observer) => Some(Observer::start(observer.clone(), files.clone()).map_err(MountError::Thread)?),
            None => None,
        };
        let failure = Arc::new(Failure::new(config.on_failure.take()));
        let tree = Arc::new(build::build(&config, files, observer)?);
        let closing = Arc::new(AtomicBool::new(false));
        let ended = {
            let (failure, closing) = (failure.clone(), closing.clone());
            move || {
                if !closing.load(Ordering::Acquire) {
                    failure.fail("it was unmounted by somebody else".to_owned());
                }
            }
        };
        let cpus = thread::available_parallelism().map_or(REQUEST_THREADS_MIN, usize::from);
        let threads = cpus.clamp(REQUEST_THREADS_MIN, REQUEST_THREADS_MAX);
        // All but one may wait for the base; that one goes on serving what is here.
        let filesystem = DataDirectory::new(tree.clone(), failure.clone(), threads - 1, Box::new(ended));
        let session = serve(filesystem, &mountpoint, threads).map_err(mountpoint_error)?;
        let dirty = host::tune(&mountpoint);
        let watcher = Watcher { tree: tree.clone(), notifier: session.notifier(), dirty, callback: config.on_room.take() };
        let watcher = watcher.spawn().map_err(MountError::Thread)?;
        tracing::info!(mount = config.name, "mounted {}", mountpoint.display());
        let version = (config.major, config.catalog_version);
        Ok(Mount { mountpoint, version, tree, failure, closing, keepers: Mutex::new(vec![watcher]), session: Mutex::new(Some(session)) })
    }

    /// Where the data directory is.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The blocks of relations that were read since the start, in the order of their first read, up to the time that
    /// the configuration gives. Blocks that the kernel read ahead are among them.
    pub fn touched_blocks(&self) -> Vec<(RelFork, u32)> {
        self.tree.files.startup_set.blocks()
    }

    /// Fetches blocks before they are needed; they can be read when this returns. What is here already, newer or not,
    /// stays as it is; what does not exist is passed over.
    pub fn prefetch(&self, blocks: &[(RelFork, u32)]) -> Result<(), MountError> {
        let landed = self.prefetch_behind(blocks)?;
        landed.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that fetches panicked"))).map_err(MountError::Prefetch)
    }

    /// The same without waiting: who reads one of the blocks meanwhile waits for it. What comes of it is sent.
    pub fn prefetch_behind(&self, blocks: &[(RelFork, u32)]) -> Result<mpsc::Receiver<io::Result<()>>, MountError> {
        let (tree, version, blocks) = (self.tree.clone(), self.version, blocks.to_vec());
        let (landed, wait) = mpsc::channel();
        let keeper = thread::Builder::new().name("mount-prefetch".to_owned()).spawn(move || {
            host::become_file_system_thread();
            prefetch::prefetch(&tree, version, &blocks, |result| {
                if let Err(mpsc::SendError(Err(error))) = landed.send(result) {
                    tracing::warn!("cannot fetch blocks ahead, each will be fetched when it is read: {error}");
                }
            });
        });
        let mut keepers = self.keepers.lock();
        keepers.retain(|keeper| !keeper.is_finished());
        keepers.push(keeper.map_err(MountError::Thread)?);
        drop(keepers);
        Ok(wait)
    }

    /// Waits until the observer was told of all files that changed so far.
    pub fn flush_observer(&self) -> Result<(), MountError> {
        match &self.tree.observer {
            Some(observer) => observer.flush().map_err(MountError::ChangesLost),
            None => Ok(()),
        }
    }

    /// Lets all that waits for a pageserver that is away fail now. A process that reads a first touch cannot be killed
    /// before it is answered, so this comes before Postgres is stopped while the pageserver is away.
    pub fn stop_waiting(&self) {
        self.tree.files.source.close();
    }

    /// Why the mount fails, if it does.
    pub fn failure(&self) -> Option<&str> {
        self.failure.reason()
    }

    /// What the mount did so far.
    pub fn statistics(&self) -> MountStatistics {
        statistics(&self.tree.files)
    }

    /// Says what the mount did so far, for somebody who does not have it.
    pub fn statistics_of(&self) -> impl Fn() -> MountStatistics + Send + Sync + use<> {
        let files = self.tree.files.clone();
        move || statistics(&files)
    }

    /// Unmounts, tells the observer what is left, and deletes the cache. Postgres should have ended: after some seconds
    /// the mount is taken away from whoever still uses it.
    pub fn unmount(self) -> Result<(), MountError> {
        self.close()
    }

    fn close(&self) -> Result<(), MountError> {
        let Some(session) = self.session.lock().take() else { return Ok(()) };
        self.closing.store(true, Ordering::Release);
        let unmounted = self.leave(session);
        self.tree.files.source.close();
        self.tree.files.room.close();
        for keeper in self.keepers.lock().drain(..) {
            if keeper.join().is_err() {
                tracing::error!("a thread of the mount panicked");
            }
        }
        if let Some(observer) = &self.tree.observer {
            observer.close();
        }
        self.tree.files.cache.delete_all();
        unmounted.map_err(|source| MountError::Mountpoint { path: self.mountpoint.clone(), source })
    }

    /// Takes the mount out of the name space and waits for its threads.
    fn leave(&self, session: BackgroundSession) -> io::Result<()> {
        let attempts = UNMOUNT_PATIENCE.as_millis() / UNMOUNT_RETRY.as_millis();
        for attempt in 0..=attempts {
            match rustix::mount::unmount(&self.mountpoint, rustix::mount::UnmountFlags::empty()) {
                Ok(()) => break,
                // Somebody else unmounted it.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
                Err(rustix::io::Errno::BUSY) if attempt < attempts => thread::sleep(UNMOUNT_RETRY),
                Err(error) => {
                    tracing::warn!("{} is still in use ({error}): its users get errors from now on", self.mountpoint.display());
                    self.tree.files.source.close();
                    host::detach(&self.mountpoint)?;
                    break;
                }
            }
        }
        session.join()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!("{error}");
        }
    }
}

/// Mounts, and starts the threads that serve.
fn serve(filesystem: DataDirectory, mountpoint: &Path, threads: usize) -> io::Result<BackgroundSession> {
    let mut config = Config::default();
    config.mount_options =
        vec![MountOption::FSName(host::FILE_SYSTEM_NAME.to_owned()), MountOption::DefaultPermissions, MountOption::NoAtime];
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    config.clone_fd = true;
    // The threads inherit what makes them threads of a file system from the one that starts them.
    thread::scope(|scope| {
        let serve = scope.spawn(|| {
            host::become_file_system_thread();
            Session::new(filesystem, mountpoint, &config)?.spawn()
        });
        serve.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts panicked")))
    })
}
