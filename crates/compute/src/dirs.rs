//! Where a compute keeps things on its host, and what a predecessor that was killed left there.
//!
//! The compute's folder holds `cache/` (fetched and written blocks), `pg_wal/`, `socket/`, the mountpoint `pgdata/`, the server
//! configuration and the log. When we are root, Postgres runs as another user, which may not be able to reach the folder (think of
//! `/root` or a private temporary directory) and whose socket paths must be short; so the folder is bound to `/run/varve/<id>`.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a killed process may take to be gone.
const KILL_WAIT_MAX: Duration = Duration::from_secs(10);

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
    bound_to: Option<PathBuf>,
    user: User,
}

impl Dirs {
    /// The folders of compute `id` in `home`, as they are.
    pub fn existing(home: &Path, id: &str, user: User) -> Dirs {
        let root = if rustix::process::geteuid().is_root() {
            let short: String = id.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
            PathBuf::from("/run/varve").join(short)
        } else {
            home.to_owned()
        };
        Dirs { bound_to: (root != home).then(|| home.to_owned()), root, user }
    }

    /// Ends what an earlier process of the compute left running, and removes everything of it.
    pub fn clean_up(&self) {
        self.end_predecessor();
        self.remove();
    }

    /// Prepares the folder `home` of compute `id`, after ending and removing what an earlier incarnation left.
    ///
    /// # Errors
    /// When a folder cannot be made, bound or emptied.
    pub fn prepare(home: &Path, id: &str, user: User) -> io::Result<Dirs> {
        std::fs::create_dir_all(home)?;
        let dirs = Dirs::existing(home, id, user);
        dirs.end_predecessor();
        dirs.unmount();
        for part in ["cache", "pg_wal", "socket", "pgdata"] {
            let path = home.join(part);
            remove_tree(&path)?;
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            chown(&path, Some(user.uid), Some(user.gid))?;
        }
        std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o700))?;
        chown(home, Some(user.uid), Some(user.gid))?;
        if let Some(home) = &dirs.bound_to {
            std::fs::DirBuilder::new().recursive(true).mode(0o711).create("/run/varve")?;
            std::fs::create_dir_all(&dirs.root)?;
            rustix::mount::mount_bind(home, &dirs.root)
                .map_err(|error| io::Error::other(format!("cannot bind {} to {}: {error}", home.display(), dirs.root.display())))?;
        }
        Ok(dirs)
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

    /// Remembers the postmaster, so that a successor can end it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remember_postmaster(&self, pid: u32) -> io::Result<()> {
        let started = process_start(pid).unwrap_or_default();
        self.write("postmaster", &format!("{pid} {started}\n"))
    }

    /// Kills the postmaster that an earlier incarnation started, and its children, if they still run.
    fn end_predecessor(&self) {
        let home = self.bound_to.as_deref().unwrap_or(&self.root);
        let Ok(text) = std::fs::read_to_string(home.join("postmaster")) else { return };
        let mut fields = text.split_ascii_whitespace();
        let (Some(Ok(pid)), Some(started)) = (fields.next().map(str::parse::<u32>), fields.next()) else { return };
        if process_start(pid).as_deref() == Some(started) {
            kill_tree(pid);
        }
    }

    /// Takes the mounts away, whoever still uses them.
    pub fn unmount(&self) {
        use rustix::mount::{UnmountFlags, unmount};
        let home = self.bound_to.as_deref().unwrap_or(&self.root);
        for path in [home.join("pgdata"), self.root.join("pgdata")] {
            while is_mountpoint(&path) && unmount(&path, UnmountFlags::DETACH).is_ok() {}
        }
        if self.bound_to.is_some() {
            while is_mountpoint(&self.root) && unmount(&self.root, UnmountFlags::DETACH).is_ok() {}
        }
    }

    /// Removes everything: the compute is over and what it wrote has arrived.
    pub fn remove(&self) {
        self.unmount();
        if let Some(home) = &self.bound_to {
            let _ = std::fs::remove_dir(&self.root);
            let _ = remove_tree(home);
        } else {
            let _ = remove_tree(&self.root);
        }
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

/// When a process started, in the kernel's ticks: with the pid it names one process for as long as the host is up.
pub fn process_start(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    let state = after_name.split_ascii_whitespace().next()?;
    (state != "Z").then(|| after_name.split_ascii_whitespace().nth(19).map(str::to_owned)).flatten()
}

/// The processes that `pid` has started.
pub(crate) fn children_of(pid: u32) -> Vec<u32> {
    // One file says it where the kernel has it; otherwise every process is asked for its parent.
    if let Ok(list) = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) {
        return list.split_ascii_whitespace().filter_map(|child| child.parse().ok()).collect();
    }
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let parent = |child: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(|child| parent(*child) == Some(pid)).collect()
}

/// What a process calls itself, as `ps` shows it.
pub(crate) fn title(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let end = line.iter().position(|byte| *byte == 0).unwrap_or(line.len());
    Some(String::from_utf8_lossy(&line[..end]).trim_end().to_owned())
}

/// Kills a postmaster and its backends at once, and waits until they are gone.
pub fn kill_tree(pid: u32) {
    let mut all = children_of(pid);
    all.insert(0, pid);
    for pid in &all {
        if let Some(pid) = Pid::from_raw(*pid as i32) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let deadline = Instant::now() + KILL_WAIT_MAX;
    while Instant::now() < deadline && all.iter().any(|pid| process_start(*pid).is_some()) {
        std::thread::sleep(Duration::from_millis(2));
    }
}
