//! What the mount asks of the host: /dev/fuse, a free mountpoint, kernel settings that make it fast, and cleaning up
//! after a process that was killed.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    sync::mpsc,
    thread,
    time::{Duration, SystemTime},
};

use rustix::mount::{UnmountFlags, unmount};

use super::MountError;

/// Name of the mounts in /proc/mounts.
pub(super) const FILE_SYSTEM_NAME: &str = "varve";
const DEVICE: &str = "/dev/fuse";
/// How long a mount may take to answer before it is taken for a process that is stopped or hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Mounts on top of each other that are cleaned up at most.
const STACKED_MAX: usize = 16;
/// Read-ahead of sequential reads: the largest request that the kernel sends by default.
const READ_AHEAD_KB: u32 = 1024;
/// Share of the memory for unwritten data (`vm.dirty_ratio`) that the mount's may take, in percent. The kernel's
/// default for FUSE is 1: it would make Postgres wait for the mount at every checkpoint.
const DIRTY_SHARE_PERCENT: u32 = 50;
/// A limit in bytes above this is none: the kernel gathers less than that on most machines, and slower with a limit.
const DIRTY_LIMIT_MAX: u64 = 4 << 30;

/// Checks that FUSE can be used here.
pub(super) fn check_device() -> Result<(), MountError> {
    check_device_at(DEVICE)
}

fn check_device_at(device: &str) -> Result<(), MountError> {
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(source) => {
            let advice = match source.kind() {
                io::ErrorKind::NotFound => {
                    "load the kernel module (`modprobe fuse`), or start the container with `--device /dev/fuse --cap-add SYS_ADMIN`"
                }
                io::ErrorKind::PermissionDenied => "run as root, or give this user access to the device",
                _ => "check that the kernel has FUSE and that the container may use the device",
            };
            Err(MountError::NoFuse { source, advice })
        }
    }
}

/// The source of the topmost file system that is mounted at `path`.
fn mounted_at(path: &Path) -> io::Result<Option<(String, String)>> {
    let mut table = String::new();
    fs::File::open("/proc/self/mountinfo")?.read_to_string(&mut table)?;
    Ok(table.lines().rev().filter_map(parse_mount).find(|mount| mount.0 == path).map(|(_, kind, source)| (kind, source)))
}

/// Mountpoint, type and source of a line of mountinfo.
fn parse_mount(line: &str) -> Option<(PathBuf, String, String)> {
    let (before, after) = line.split_once(" - ")?;
    let mountpoint = before.split(' ').nth(4)?;
    let mut after = after.split(' ');
    Some((PathBuf::from(unescape(mountpoint)), after.next()?.to_owned(), after.next()?.to_owned()))
}

/// Undoes mountinfo's octal escapes of space, tab, newline and backslash.
fn unescape(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (from, to)| path.replace(from, to))
}

/// The path as mountinfo has it: absolute, without symbolic links. The last part is not touched, for a dead mount
/// answers nothing.
fn resolve(mountpoint: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(mountpoint)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => Ok(absolute),
    }
}

/// Removes what a killed process left mounted at `mountpoint`. Returns whether there was anything.
///
/// A mount whose process lives is left alone, and so is any mount that is not one of Varve's: both are errors.
pub fn remove_stale_mount(mountpoint: &Path) -> Result<bool, MountError> {
    let fail = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
    let path = match resolve(mountpoint) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        path => path.map_err(fail)?,
    };
    let mut removed = false;
    for _ in 0..STACKED_MAX {
        let Some((kind, source)) = mounted_at(&path).map_err(fail)? else { return Ok(removed) };
        if !kind.starts_with("fuse") || source != FILE_SYSTEM_NAME {
            return Err(MountError::ForeignMount { path, what: source });
        }
        if answers(&path) {
            return Err(MountError::InUse { path });
        }
        unmount(&path, UnmountFlags::DETACH).map_err(|error| fail(error.into()))?;
        removed = true;
    }
    Err(MountError::InUse { path })
}

/// Whether a process serves the mount. One that does not answer in time counts as one: it may be stopped only.
fn answers(mountpoint: &Path) -> bool {
    // A name that the kernel does not know yet, not even as one that does not exist: so the process has to be asked.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let probe = mountpoint.join(format!(".varve-probe-{}-{}", process::id(), now.as_nanos()));
    let (done, answer) = mpsc::channel();
    thread::spawn(move || {
        let dead = fs::symlink_metadata(probe).is_err_and(|error| {
            matches!(error.raw_os_error(), Some(code) if code == rustix::io::Errno::NOTCONN.raw_os_error() || code == rustix::io::Errno::CONNABORTED.raw_os_error())
        });
        let _ = done.send(!dead);
    });
    answer.recv_timeout(ANSWER_WITHIN).unwrap_or(true)
}

/// Ends a mount that is still in use: whoever uses it gets errors from now on. `FORCE` ends the kernel's connection to
/// this process, and all requests that wait; `DETACH` alone would wait for the last user.
pub(super) fn detach(mountpoint: &Path) -> io::Result<()> {
    Ok(unmount(mountpoint, UnmountFlags::FORCE | UnmountFlags::DETACH)?)
}

/// Sets what the kernel lets be set only after mounting. Where that is not allowed the mount works all the same. Gives
/// the limit of what it gathers, to be changed as the disk fills.
pub(super) fn tune(mountpoint: &Path) -> Option<DirtyLimit> {
    let device = fs::symlink_metadata(mountpoint).map(|meta| meta.dev()).ok()?;
    let dir = PathBuf::from(format!("/sys/class/bdi/{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
    for (setting, value) in [("read_ahead_kb", READ_AHEAD_KB), ("max_ratio", DIRTY_SHARE_PERCENT), ("strict_limit", 0)] {
        if let Err(error) = fs::write(dir.join(setting), value.to_string()) {
            tracing::info!("cannot set {}: {error}; the mount will be slower", dir.join(setting).display());
        }
    }
    Some(DirtyLimit { dir, bytes: None })
}

/// How much of what is written the kernel may gather before it gives it to the mount.
pub(super) struct DirtyLimit {
    dir: PathBuf,
    /// What was set; none: the share of the memory that [`tune`] sets.
    bytes: Option<u64>,
}

impl DirtyLimit {
    /// At most so many bytes. A limit that the kernel's share of the memory hardly reaches is not set.
    pub(super) fn set(&mut self, bytes: u64) {
        let bytes = (bytes < DIRTY_LIMIT_MAX).then_some(bytes);
        // Small changes are not worth it, least of all upwards.
        let is_as_before = match (self.bytes, bytes) {
            (None, None) => true,
            (Some(old), Some(new)) => new <= old + old / 4 && new >= old - old / 8,
            _ => false,
        };
        if is_as_before {
            return;
        }
        let set = |setting: &str, value: u64| fs::write(self.dir.join(setting), value.to_string());
        let done = match bytes {
            Some(bytes) => set("strict_limit", 1).and_then(|()| set("max_bytes", bytes)),
            None => set("max_ratio", DIRTY_SHARE_PERCENT.into()).and_then(|()| set("strict_limit", 0)),
        };
        match done {
            Ok(()) => self.bytes = bytes,
            Err(error) => tracing::debug!("what the kernel gathers cannot be limited in {}: {error}", self.dir.display()),
        }
    }
}

/// Marks this thread, and those that it starts, as one that serves a file system: the kernel then does not make it wait
/// for memory or for unwritten data that only it can write.
pub(super) fn become_file_system_thread() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!("cannot mark the mount's threads as those of a file system: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_understood() {
        let line = r"41 29 0:35 / /srv/a\040b rw,nosuid,nodev,noatime shared:20 - fuse varve rw,user_id=0,group_id=0,allow_other";
        let (path, kind, source) = parse_mount(line).unwrap();
        assert_eq!((path.to_str(), kind.as_str(), source.as_str()), (Some("/srv/a b"), "fuse", "varve"));
        assert!(parse_mount("41 29 0:35 / /srv").is_none());
    }

    #[test]
    fn without_fuse_the_error_says_what_to_do() {
        let error = check_device_at("/dev/no-fuse-here").unwrap_err().to_string();
        assert!(error.contains("modprobe fuse") && error.contains("--materialize"), "{error}");
    }

    #[test]
    fn where_nothing_is_mounted_there_is_nothing_stale() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!remove_stale_mount(dir.path()).unwrap());
        assert!(!remove_stale_mount(&dir.path().join("none/at/all")).unwrap());
    }

    #[test]
    fn another_file_system_is_not_touched() {
        let error = remove_stale_mount(Path::new("/proc")).unwrap_err();
        assert!(matches!(error, MountError::ForeignMount { .. }), "{error}");
    }
}
