//! Where a compute keeps things on its host, and what a predecessor that was killed left there.
//!
//! The compute's folder holds `cache/` (fetched and written blocks), `pg_wal/`, `socket/`, the mountpoint `pgdata/`,
//! the server's configuration in `conf/`, and its log.
//! When we are root, the folder is bound to `<run folder>/<id>`: paths of sockets must be short, and a Postgres without
//! a sandbox may not be able to reach the folder itself (think of `/root`). In a sandbox the same paths lead to the
//! parts that Postgres needs.
//!
//! Of a sandboxed compute only `pg_wal/` and `socket/` are its user's. In all else it cannot make a name, so what we
//! write there follows nobody's link. The postmaster's record stands beside the folder: whom it names is killed.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::cgroup::{CgroupError, Group, Limits};
use crate::identity::ProcessId;
use crate::leftover::Leftover;
use crate::record::{PostmasterRecord, Record as _, RecordError, remove_file};
use crate::sandbox::NetworkAccess;
use crate::wal_gate;

/// Characters of a compute's id that names in the run folder have: paths of sockets must be short.
const SHORT_ID: usize = 12;

/// The user that Postgres runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl User {
    /// Ourselves, or the system's user `postgres` when we are root, as whom Postgres refuses to run.
    ///
    /// # Errors
    /// When we are root and there is no such user.
    pub fn for_postgres() -> io::Result<User> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if !uid.is_root() {
            return Ok(User { uid: uid.as_raw(), gid: gid.as_raw() });
        }
        let passwd = std::fs::read_to_string("/etc/passwd")?;
        let found = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some("postgres")).then_some(())?;
            Some(User { uid: fields.nth(1)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
        });
        found.ok_or_else(|| {
            io::Error::other(
                "Postgres refuses to run as root, and there is no user 'postgres' to run it as: install the postgresql package, \
                 or run varve as an ordinary user",
            )
        })
    }
}

/// How a compute's Postgres is kept apart from everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// In a sandbox, as a user of its own.
    Sandbox {
        /// The user and group that nobody else is.
        uid: u32,
        /// What it sees of networks.
        network: NetworkAccess,
        /// What it may take of the machine.
        limits: Limits,
    },
    /// Not at all: as a user of this machine.
    None(User),
}

impl Isolation {
    /// Whom Postgres runs as.
    pub fn user(self) -> User {
        match self {
            Isolation::Sandbox { uid, .. } => User { uid, gid: uid },
            Isolation::None(user) => user,
        }
    }
}

/// The folders of one compute.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// As Postgres sees it.
    root: PathBuf,
    /// The folder itself.
    home: PathBuf,
    /// The folder of what is there while it runs.
    run: PathBuf,
    short_id: String,
    isolation: Isolation,
    /// What `pg_wal` may take, as it is configured.
    wal_bytes: Option<u64>,
}

impl Dirs {
    /// The folders of compute `id` in `home`, as they are. Sockets and bound folders are in `run`.
    pub fn existing(home: &Path, run: &Path, id: &str, isolation: Isolation) -> Dirs {
        let short_id: String = id.chars().filter(char::is_ascii_alphanumeric).take(SHORT_ID).collect();
        let root = if rustix::process::geteuid().is_root() { run.join(&short_id) } else { home.to_owned() };
        Dirs { root, home: home.to_owned(), run: run.to_owned(), short_id, isolation, wal_bytes: None }
    }

    /// The same, with a limit of what `pg_wal` may take.
    #[must_use]
    pub fn with_wal_limit(self, wal_bytes: Option<u64>) -> Dirs {
        Dirs { wal_bytes, ..self }
    }

    /// The cap of `pg_wal`, if it has one.
    pub fn wal_cap(&self) -> Option<u64> {
        wal_gate::cap_of(&self.home, self.wal_bytes)
    }

    /// Makes a run folder: others may pass through it and may not list or change it.
    ///
    /// # Errors
    /// When it cannot be made, or is somebody else's.
    pub fn make_run(run: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(run)?;
        let found = std::fs::symlink_metadata(run)?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
            let what = format!("{} is no folder of ours: name another one with --run-dir", run.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        std::fs::set_permissions(run, std::fs::Permissions::from_mode(0o711))
    }

    /// Ends what a process of the compute that is gone left running, and its mounts. Its cache is worthless and may be
    /// what fills the disk, so it goes first of all; other files are kept, `pg_wal` among them. Blocks.
    pub fn end_leftovers(&self) {
        self.end_predecessor();
        self.unmount();
        if let Err(error) = remove_tree(&self.home.join("cache")).and_then(|()| self.remove_wal_spare()) {
            tracing::warn!(folder = %self.home.display(), %error, "the cache of a compute that is gone stays");
        }
        let _ = std::fs::remove_file(self.walsender());
        if let (Isolation::Sandbox { .. }, Ok(group)) = (self.isolation, self.group()) {
            group.remove();
        }
    }

    /// Prepares the folder, after ending and removing what an earlier incarnation left. Blocks.
    ///
    /// # Errors
    /// When a folder cannot be made, bound or emptied.
    pub fn prepare(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.home)?;
        self.end_predecessor();
        self.unmount();
        std::fs::set_permissions(&self.home, std::fs::Permissions::from_mode(0o700))?;
        let User { uid, gid } = self.user();
        let (is_apart, we) = (matches!(self.isolation, Isolation::Sandbox { .. }), rustix::process::geteuid().as_raw());
        for (part, is_theirs) in [("cache", false), ("pgdata", false), ("conf", false), ("pg_wal", true), ("socket", true)] {
            let path = self.home.join(part);
            remove_tree(&path)?;
            let mode = if part == "conf" { 0o750 } else { 0o700 };
            std::fs::DirBuilder::new().mode(mode).create(&path)?;
            chown(&path, Some(if is_theirs || !is_apart { uid } else { we }), Some(gid))?;
        }
        if is_apart {
            chown(&self.home, Some(we), None)?;
        } else {
            chown(&self.home, Some(uid), Some(gid))?;
        }
        Dirs::make_run(&self.run)?;
        if self.is_bound() {
            std::fs::create_dir_all(&self.root)?;
            rustix::mount::mount_bind(&self.home, &self.root)
                .map_err(|error| io::Error::other(format!("cannot bind {} to {}: {error}", self.home.display(), self.root.display())))?;
        }
        Ok(())
    }

    fn is_bound(&self) -> bool {
        self.root != self.home
    }

    /// The folder itself.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Postgres's user.
    pub fn user(&self) -> User {
        self.isolation.user()
    }

    /// How Postgres is kept apart.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// The control groups of its sandbox.
    ///
    /// # Errors
    /// When a controller is missing here.
    pub fn group(&self) -> Result<Group, CgroupError> {
        Group::of(&self.short_id)
    }

    /// The folder of what is there while computes run.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Postgres's log.
    pub fn log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// Files that Postgres reads and cannot write: its configuration.
    pub fn conf(&self) -> PathBuf {
        self.root.join("conf")
    }

    /// The mountpoint: Postgres's data directory.
    pub fn pgdata(&self) -> PathBuf {
        self.root.join("pgdata")
    }

    /// Fetched and written blocks.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Postgres's WAL, on plain disk.
    pub fn pg_wal(&self) -> PathBuf {
        self.root.join("pg_wal")
    }

    /// Space that is set apart for Postgres's WAL ([`crate::wal_gate`]).
    pub fn wal_spare(&self) -> PathBuf {
        self.home.join("wal-spare")
    }

    fn remove_wal_spare(&self) -> io::Result<()> {
        match std::fs::remove_file(self.wal_spare()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// The private unix socket's directory.
    pub fn socket(&self) -> PathBuf {
        self.root.join("socket")
    }

    /// The socket on which connections to the walsender are handed out.
    pub fn walsender(&self) -> PathBuf {
        self.run.join(format!("{}.walsender", self.short_id))
    }

    /// Writes a file of the configuration, readable by Postgres.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, name: &str, contents: &str) -> io::Result<()> {
        let (path, temporary) = (self.conf().join(name), self.conf().join(format!("{name}.new")));
        std::fs::write(&temporary, contents)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o640))?;
        let owner = matches!(self.isolation, Isolation::None(_)).then_some(self.user().uid);
        chown(&temporary, owner, Some(self.user().gid))?;
        std::fs::rename(temporary, path)
    }

    /// What is left of a compute that runs no more.
    pub fn leftover(&self) -> Leftover {
        Leftover { pg_wal: self.home.join("pg_wal"), record: self.home.with_extension("writer") }
    }

    fn postmaster_record(&self) -> PathBuf {
        self.home.with_extension("postmaster")
    }

    /// Remembers the postmaster, so that a successor can end it. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remember_postmaster(&self, pid: u32) -> Result<(), RecordError> {
        let path = self.postmaster_record();
        match ProcessId::of(pid) {
            Ok(Some(process)) => PostmasterRecord { process }.write(&path),
            Ok(None) => Ok(()),
            Err(source) => Err(RecordError::Io { path, source }),
        }
    }

    /// Kills the postmaster that an earlier incarnation started, and its children, if they still run.
    fn end_predecessor(&self) {
        let path = self.postmaster_record();
        match PostmasterRecord::read(&path) {
            Ok(Some(record)) => {
                record.process.kill_tree();
                if let Err(error) = remove_file(&path) {
                    tracing::warn!(path = %path.display(), %error, "a record of a postmaster that is gone stays");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "whether a postmaster was left running is not known"),
        }
    }

    /// Takes the mounts away, whoever still uses them.
    pub fn unmount(&self) {
        use rustix::mount::{UnmountFlags, unmount};
        for path in [self.home.join("pgdata"), self.root.join("pgdata")] {
            while is_mountpoint(&path) && unmount(&path, UnmountFlags::DETACH).is_ok() {}
        }
        if self.is_bound() {
            while is_mountpoint(&self.root) && unmount(&self.root, UnmountFlags::DETACH).is_ok() {}
            let _ = std::fs::remove_dir(&self.root);
        }
    }

    /// Removes everything, after ending what is left: what the compute wrote is durable elsewhere. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self) -> io::Result<()> {
        self.end_leftovers();
        if is_mountpoint(&self.home.join("pgdata")) {
            // What is below is not ours to remove.
            return Err(io::Error::other(format!("something is still mounted in {}", self.home.display())));
        }
        remove_tree(&self.home)?;
        remove_file(&self.leftover().record)?;
        remove_file(&self.postmaster_record())
    }
}

/// Whether something is mounted exactly here; a mount whose daemon died counts (it cannot even be looked at).
fn is_mountpoint(path: &Path) -> bool {
    let parent_device = path.parent().and_then(|parent| std::fs::symlink_metadata(parent).ok()).map(|m| m.dev());
    match std::fs::symlink_metadata(path) {
        Ok(here) => {
            // A bind mount of the same file system has the same device: ask the kernel's list.
            parent_device.is_some_and(|device| device != here.dev())
                || std::fs::read_to_string("/proc/self/mountinfo")
                    .is_ok_and(|list| list.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == path)))
        }
        Err(error) => error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()),
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
