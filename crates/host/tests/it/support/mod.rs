//! What the tests of the mount share: a stopped cluster as the base, and a Postgres that runs on any directory.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod cluster;
pub(crate) mod server;
pub(crate) mod synthetic;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use varve_host::mount::{Mount, MountConfig};

pub(crate) use self::{cluster::StoppedCluster, server::Server};

/// A scratch directory that everybody may enter, as Postgres has to.
pub(crate) fn scratch(name: &str) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::Builder::new().prefix(&format!("varve-{name}-")).tempdir().expect("a temporary directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("open it to postgres");
    dir
}

/// A mount of a stopped cluster, with what it needs beside it.
pub(crate) struct Mounted {
    pub(crate) mount: Option<Mount>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) source: Arc<StoppedCluster>,
    pub(crate) start_time: Duration,
}

impl Mounted {
    /// Mounts `source`, with the configuration changed by `change`.
    pub(crate) fn start(source: &Arc<StoppedCluster>, change: impl FnOnce(&mut MountConfig)) -> Mounted {
        let dir = scratch("mount");
        let mut config = source.mount_config(&dir.path().join("data"), &dir.path().join("cache"), &dir.path().join("wal"));
        change(&mut config);
        let started = Instant::now();
        let mount = Mount::start(config).expect("the mount starts");
        Mounted { mount: Some(mount), dir, source: source.clone(), start_time: started.elapsed() }
    }

    pub(crate) fn mount(&self) -> &Mount {
        self.mount.as_ref().expect("mounted")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A Postgres on the mount.
    pub(crate) fn postgres(&self, settings: &[(&str, &str)]) -> Server {
        Server::start(&self.data(), self.dir.path(), settings)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Before the directory below it is removed.
        self.mount.take();
    }
}
