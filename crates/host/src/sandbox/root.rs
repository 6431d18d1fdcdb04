//! The root directory of a sandbox: a small file system in memory, into which folders of the host are bound.

use std::fmt::Display;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, move_mount, unmount,
};

use super::spec::{NetworkAccess, Spec};

/// System folders; on most systems all but the first are links into it.
const SYSTEM: [&str; 5] = ["usr", "bin", "sbin", "lib", "lib64"];
/// What programs look for in `/etc`, where the host has it.
const ETC: [&str; 7] = ["alternatives", "ld.so.cache", "localtime", "services", "ssl/certs", "ssl/openssl.cnf", "timezone"];
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
/// Where links of `/dev` lead.
const DEVICE_LINKS: [(&str, &str); 4] = [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")];
/// The root directory itself holds names and a few lines.
const ROOT_OPTIONS: &str = "mode=0755,size=1m,nr_inodes=1k";
/// What every mount is, at least.
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
/// Files that fit into `/tmp` or `/dev/shm`.
const FILES_MAX: u32 = 16 * 1024;

/// Makes the root directory and makes it this process's. Nothing of the host's is left in sight. It can still be
/// written: [`show`] and [`close`] follow.
pub(super) fn make(spec: &Spec) -> Result<(), String> {
    // What is mounted here is not to be seen elsewhere, nor the other way round.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at("the mounts"))?;
    let root = Root { at: spec.root.clone() };
    root.mount("tmpfs", Path::new(""), PLAIN, ROOT_OPTIONS)?;
    for name in SYSTEM {
        let path = Path::new("/").join(name);
        match fs::read_link(&path) {
            Ok(target) => root.link(name, &target)?,
            Err(_) if path.exists() => root.bind(&path)?,
            Err(_) => {}
        }
    }
    make_etc(&root, spec)?;
    make_dev(&root, spec)?;
    root.folder("tmp")?;
    root.mount("tmpfs", Path::new("tmp"), PLAIN, &format!("mode=1777,size={},nr_inodes={FILES_MAX}", spec.tmp_bytes))?;
    root.folder("var")?;
    root.link("var/tmp", Path::new("/tmp"))?;
    root.folder("proc")?;
    root.mount("proc", Path::new("proc"), PLAIN | MountFlags::NOEXEC, "subset=pid,hidepid=invisible")?;
    std::env::set_current_dir(&root.at).map_err(at(root.at.display()))?;
    // The old root ends up above the new one, and is taken away from there.
    rustix::process::pivot_root(".", ".").map_err(at("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(at("the host's root directory stays"))?;
    std::env::set_current_dir("/").map_err(at("/"))
}

/// Shows a folder, which the supervisor has cloned as a mount of its own, at `path`.
pub(super) fn show(folder: &OwnedFd, path: &Path, writable: bool) -> Result<(), String> {
    fs::create_dir_all(path).map_err(at(path.display()))?;
    move_mount(folder, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(at(path.display()))?;
    let flags = if writable { PLAIN } else { PLAIN | MountFlags::RDONLY };
    mount_remount(path, flags | MountFlags::BIND, "").map_err(at(path.display()))
}

/// Makes a link in the root directory.
pub(super) fn link(name: &str, target: &str) -> Result<(), String> {
    symlink(target, Path::new("/").join(name)).map_err(at(name))
}

/// From here on nothing can be made in the root directory.
pub(super) fn close() -> Result<(), String> {
    mount_remount("/", PLAIN | MountFlags::BIND | MountFlags::RDONLY, "").map_err(at("the root directory"))
}

fn make_etc(root: &Root, spec: &Spec) -> Result<(), String> {
    root.folder("etc/ssl")?;
    for name in ETC {
        let path = Path::new("/etc").join(name);
        if path.exists() {
            root.bind(&path)?;
        }
    }
    if spec.network == NetworkAccess::Host && Path::new("/etc/resolv.conf").exists() {
        root.bind(Path::new("/etc/resolv.conf"))?;
    }
    // Postgres wants to know its own name, and, for `peer`, that of the supervisor.
    let uid = spec.uid;
    root.file("etc/passwd", &format!("root:x:0:0:root:/:/usr/sbin/nologin\npostgres:x:{uid}:{uid}:PostgreSQL:/tmp:/bin/sh\n"))?;
    root.file("etc/group", &format!("root:x:0:\npostgres:x:{uid}:\n"))?;
    // Without localhost 14 collects no statistics and runs no autovacuum.
    root.file("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    root.file("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n")
}

fn make_dev(root: &Root, spec: &Spec) -> Result<(), String> {
    root.folder("dev/shm")?;
    for name in DEVICES {
        root.bind_device(&Path::new("/dev").join(name))?;
    }
    for (name, target) in DEVICE_LINKS {
        root.link(&format!("dev/{name}"), Path::new(target))?;
    }
    let options = format!("mode=1777,size={},nr_inodes={FILES_MAX}", spec.shm_bytes);
    root.mount("tmpfs", Path::new("dev/shm"), PLAIN | MountFlags::NOEXEC, &options)
}

fn at<E: Display>(what: impl Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// The new root directory while it is put together. Nobody else sees it.
struct Root {
    at: PathBuf,
}

impl Root {
    /// Where an absolute path of the sandbox is for now.
    fn inside(&self, path: &Path) -> PathBuf {
        self.at.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn folder(&self, path: impl AsRef<Path>) -> Result<(), String> {
        let path = self.inside(path.as_ref());
        fs::create_dir_all(&path).map_err(at(path.display()))
    }

    fn file(&self, path: &str, contents: &str) -> Result<(), String> {
        fs::write(self.inside(Path::new(path)), contents).map_err(at(path))
    }

    fn link(&self, path: &str, target: &Path) -> Result<(), String> {
        symlink(target, self.inside(Path::new(path))).map_err(at(path))
    }

    fn mount(&self, kind: &str, path: &Path, flags: MountFlags, options: &str) -> Result<(), String> {
        let options = std::ffi::CString::new(options).map_err(at(kind))?;
        mount(kind, self.inside(path), kind, flags, &*options).map_err(at(format_args!("{kind} on /{}", path.display())))
    }

    /// Shows what the host has at `path` at the same path; what is mounted below it is not shown.
    fn bind(&self, path: &Path) -> Result<(), String> {
        self.bind_with(path, PLAIN | MountFlags::RDONLY)
    }

    fn bind_device(&self, path: &Path) -> Result<(), String> {
        self.bind_with(path, MountFlags::NOSUID | MountFlags::NOEXEC)
    }

    fn bind_with(&self, path: &Path, flags: MountFlags) -> Result<(), String> {
        let target = self.inside(path);
        let is_folder = fs::metadata(path).map_err(at(path.display()))?.is_dir();
        let folder = if is_folder { Some(&*target) } else { target.parent() };
        fs::create_dir_all(folder.unwrap_or(&target)).map_err(at(path.display()))?;
        if !is_folder {
            fs::write(&target, "").map_err(at(path.display()))?;
        }
        mount_bind(path, &target).map_err(at(path.display()))?;
        mount_remount(&target, flags | MountFlags::BIND, "").map_err(at(path.display()))
    }
}
