//! Where a compute keeps things on its host, and what a predecessor that was killed left there.
//!
//! The compute's folder holds `cache/` (fetched and written blocks), `pg_wal/`, `socket/`, the mountpoint `pgdata/`,
//! the server configuration and the log. When we are root, Postgres runs as another user, which may not be able to
//! reach the folder (think of `/root` or a private temporary directory) and whose socket paths must be short; so the
//! folder is bound to `<run folder>/<id>`.
//!
//! The postmaster's record stands beside the folder, where Postgres's user cannot write: whom it names is killed.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::identity::ProcessId;
use crate::leftover::Leftover;
use crate::record::{PostmasterRecord, Record as _, RecordError, remove_file};

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
    user: User,
}

impl Dirs {
    /// The folders of compute `id` in `home`, as they are. Sockets and bound folders are in `run`.
    pub fn existing(home: &Path, run: &Path, id: &str, user: User) -> Dirs {
        let short_id: String = id.chars().filter(char::is_ascii_alphanumeric).take(SHORT_ID).collect();
        let root = if rustix::process::geteuid().is_root() { run.join(&short_id) } else { home.to_owned() };
        Dirs { root, home: home.to_owned(), run: run.to_owned(), short_id, user }
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

    /// Ends what a process of the compute that is gone left running, and its mounts; keeps its files, `pg_wal` among
    /// them. Blocks.
    pub fn end_leftovers(&self) {
        self.end_predecessor();
        self.unmount();
        let _ = std::fs::remove_file(self.walsender());
    }

    /// Prepares the folder, after ending and removing what an earlier incarnation left. Blocks.
    ///
    /// # Errors
    /// When a folder cannot be made, bound or emptied.
    pub fn prepare(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.home)?;
        self.end_predecessor();
        self.unmount();
        for part in ["cache", "pg_wal", "socket", "pgdata"] {
            let path = self.home.join(part);
            remove_tree(&path)?;
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            chown(&path, Some(self.user.uid), Some(self.user.gid))?;
        }
        std::fs::set_permissions(&self.home, std::fs::Permissions::from_mode(0o700))?;
        chown(&self.home, Some(self.user.uid), Some(self.user.gid))?;
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

    /// Postgres's user.
    pub fn user(&self) -> User {
        self.user
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

    /// The private unix socket's directory.
    pub fn socket(&self) -> PathBuf {
        self.root.join("socket")
    }

    /// The socket of Postgres in it.
    pub fn postgres_socket(&self, port: u16) -> PathBuf {
        self.socket().join(format!(".s.PGSQL.{port}"))
    }

    /// The socket on which connections to the walsender are handed out.
    pub fn walsender(&self) -> PathBuf {
        self.run.join(format!("{}.walsender", self.short_id))
    }

    /// A file of the compute itself, such as its configuration.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Writes a file of the compute itself, readable by Postgres.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, name: &str, contents: &str) -> io::Result<()> {
        let (path, temporary) = (self.file(name), self.file(&format!("{name}.new")));
        std::fs::write(&temporary, contents)?;
        chown(&temporary, Some(self.user.uid), Some(self.user.gid))?;
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
