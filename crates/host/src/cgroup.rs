//! Control groups: what of the machine the processes of a sandbox may take.
//!
//! Both kinds of hierarchies are used, where the controllers are: version 2, or version 1 with one hierarchy for each.
//! A controller that nobody has mounted is mounted. A compute has one group in each, below `varve`; all weigh the same,
//! so that none gets more of the processors than another that wants them, too.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::mount::{MountFlags, mount};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Counts the use of processors, where a hierarchy of version 1 has it apart from their limits.
const CPU_COUNTER: &str = "cpuacct";
/// Name of the group that all of ours are in.
const PARENT: &str = "varve";
/// Where hierarchies are mounted that the machine has not mounted itself.
const OWN_MOUNTS: &str = "/run/varve/cgroup";
/// The controllers that a sandbox needs.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Weight of a compute, beside 1,024 of a process without a group. A version 1 group weighs as one task against each of
/// those, and a Postgres has many.
const SHARES: u64 = 8192;
/// The same in a version 2 hierarchy, where 100 is a process's.
const WEIGHT: u64 = 800;
/// Group of Varve's own processes, and its weight in both kinds: what all tenants wait for comes before any of them.
const SERVICE: &str = "service";
const SERVICE_SHARES: u64 = 32_768;
const SERVICE_WEIGHT: u64 = 3200;
/// Period of a limit of processor time.
const PERIOD_US: u64 = 100_000;
/// A group can be removed once the kernel has buried its processes.
const REMOVE_TRIES: u32 = 50;
const REMOVE_WAIT: Duration = Duration::from_millis(10);

/// What a compute may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a processor; none: what there is.
    pub cpu_milli: Option<u64>,
    /// Bytes of memory, with the page cache that its processes fill; none: what there is.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub processes: u64,
}

/// Why a group is not there.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A controller is nowhere mounted.
    #[error("the kernel's control groups have no '{0}' controller here: mount a cgroup hierarchy that has it")]
    NoController(&'static str),
    /// The file system says no.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The groups of one compute.
#[derive(Clone, Debug)]
pub struct Group {
    /// Each controller's version and folder.
    folders: Vec<(&'static str, Version, PathBuf)>,
}

impl Group {
    /// The groups of compute `name`, whether they are there or not.
    ///
    /// # Errors
    /// When a controller is missing.
    pub fn of(name: &str) -> Result<Group, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mounts = fs::read_to_string(path).map_err(at(path))?;
        let folder = |controller| {
            let found = find(&mounts, controller).or_else(|| mount_own(controller));
            let (version, root) = found.ok_or(CgroupError::NoController(controller))?;
            Ok((controller, version, root.join(PARENT).join(name)))
        };
        let mut folders = CONTROLLERS.into_iter().map(folder).collect::<Result<Vec<_>, _>>()?;
        folders.extend(folder(CPU_COUNTER).ok());
        Ok(Group { folders })
    }

    /// Makes the groups and sets their limits.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn make(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (controller, version, folder) in &self.folders {
            make_folder(controller, *version, folder)?;
        }
        self.limit(limits)
    }

    /// Changes the limits.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        self.limit_cpu(limits.cpu_milli)?;
        self.limit_memory(limits.memory_bytes, limits.memory_bytes)?;
        self.wait_for_memory(false)?;
        for (controller, _, folder) in &self.folders {
            if *controller == "pids" {
                write(folder, "pids.max", &limits.processes.to_string())?;
            }
        }
        Ok(())
    }

    /// Changes the limit of processors; none: what there is.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit_cpu(&self, milli: Option<u64>) -> Result<(), CgroupError> {
        let quota = milli.map(|milli| (milli * PERIOD_US / 1000).max(1000));
        for (controller, version, folder) in &self.folders {
            match (*controller, version) {
                ("cpu", Version::One) => {
                    write(folder, "cpu.shares", &SHARES.to_string())?;
                    write(folder, "cpu.cfs_period_us", &PERIOD_US.to_string())?;
                    write(folder, "cpu.cfs_quota_us", &quota.map_or_else(|| "-1".to_owned(), |quota| quota.to_string()))?;
                }
                ("cpu", Version::Two) => {
                    write(folder, "cpu.weight", &WEIGHT.to_string())?;
                    write(folder, "cpu.max", &format!("{} {PERIOD_US}", or_max(quota)))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Changes the limit of memory; none: what there is. `most` is what it may have at most. False where so much is in
    /// use that the kernel cannot take it back: the limit is then as it was. Nobody is killed for that. Blocks while
    /// the kernel takes memory back.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit_memory(&self, bytes: Option<u64>, most: Option<u64>) -> Result<bool, CgroupError> {
        let Some((version, folder)) = self.folder("memory") else { return Ok(true) };
        match version {
            Version::One => {
                let text = bytes.map_or_else(|| "-1".to_owned(), |bytes| bytes.to_string());
                match write(folder, "memory.limit_in_bytes", &text) {
                    Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => Ok(false),
                    other => other.map(|()| true),
                }
            }
            Version::Two => {
                // Above the first limit its processes are slowed down while the kernel takes memory back; only above
                // the second it kills, so that comes down last.
                write(folder, "memory.high", &or_max(if bytes == most { None } else { bytes }))?;
                let used: u64 = number(folder, "memory.current").unwrap_or(0);
                if most.is_some_and(|most| used > most) {
                    write(folder, "memory.high", &or_max(most))?;
                    if number(folder, "memory.current").unwrap_or(0) > most.unwrap_or(u64::MAX) {
                        return Ok(false);
                    }
                }
                write(folder, "memory.max", &or_max(most)).map(|()| true)
            }
        }
    }

    /// Whether processes that need more memory than there is wait until they get it, instead of being killed. Version 2
    /// slows them down by itself.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn wait_for_memory(&self, wait: bool) -> Result<(), CgroupError> {
        match self.folder("memory") {
            Some((Version::One, folder)) => write(folder, "memory.oom_control", if wait { "1" } else { "0" }),
            _ => Ok(()),
        }
    }

    /// The limit of memory as it is now, if there is one.
    pub fn memory_limit(&self) -> Option<u64> {
        let (version, folder) = self.folder("memory")?;
        number(folder, if version == Version::One { "memory.limit_in_bytes" } else { "memory.max" })
    }

    /// What its processes take right now, and took until now.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn load(&self) -> io::Result<Load> {
        let mut load = Load::default();
        let value = |text: &str, name: &str| -> u64 {
            let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
            found.unwrap_or(0)
        };
        for (controller, version, folder) in &self.folders {
            match (*controller, version) {
                ("cpu", Version::One) => load.throttled_ns = value(&fs::read_to_string(folder.join("cpu.stat"))?, "throttled_time"),
                ("cpu", Version::Two) => {
                    let text = fs::read_to_string(folder.join("cpu.stat"))?;
                    (load.cpu_ns, load.throttled_ns) = (value(&text, "usage_usec") * 1000, value(&text, "throttled_usec") * 1000);
                }
                (CPU_COUNTER, _) => load.cpu_ns = number(folder, "cpuacct.usage").unwrap_or(0),
                ("memory", version) => {
                    let text = fs::read_to_string(folder.join("memory.stat"))?;
                    let names = match version {
                        Version::One => ["total_rss", "total_shmem", "total_workingset_refault_file"],
                        Version::Two => ["anon", "shmem", "workingset_refault_file"],
                    };
                    load.held_bytes = value(&text, names[0]) + value(&text, names[1]);
                    load.refaults = value(&text, names[2]);
                }
                _ => {}
            }
        }
        Ok(load)
    }

    /// Has the kernel tell when the memory is not enough.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn watch_memory(&self) -> io::Result<OutOfMemory> {
        let (version, folder) = self.folder("memory").ok_or(io::ErrorKind::NotFound)?;
        let (told, interest) = match version {
            Version::One => {
                let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let control = fs::File::open(folder.join("memory.oom_control"))?;
                fs::write(folder.join("cgroup.event_control"), format!("{} {}", told.as_raw_fd(), control.as_raw_fd()))?;
                (told, Interest::READABLE)
            }
            Version::Two => {
                let told = fs::File::open(folder.join("memory.events"))?.into();
                (told, Interest::PRIORITY)
            }
        };
        // Deprecated for types that may change their descriptor meanwhile, which `OwnedFd` cannot.
        #[expect(deprecated)]
        let told = AsyncFd::with_interest(told, interest)?;
        Ok(OutOfMemory { told, version })
    }

    fn folder(&self, controller: &str) -> Option<(Version, &Path)> {
        self.folders.iter().find(|(name, ..)| *name == controller).map(|(_, version, folder)| (*version, folder.as_path()))
    }

    /// Their folders, into whose `cgroup.procs` a process writes itself.
    pub fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = self.folders.iter().map(|(_, _, folder)| folder.clone()).collect();
        folders.sort();
        folders.dedup();
        folders
    }

    /// How many processes the kernel has killed because the memory was not enough.
    pub fn out_of_memory_kills(&self) -> u64 {
        let Some((version, folder)) = self.folder("memory") else { return 0 };
        let file = if version == Version::One { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Removes the groups; their processes have ended. Blocks a moment.
    pub fn remove(&self) {
        for folder in self.folders() {
            for _ in 0..REMOVE_TRIES {
                match fs::remove_dir(&folder) {
                    Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => thread::sleep(REMOVE_WAIT),
                    _ => break,
                }
            }
        }
    }
}

/// How a group is: counters count from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Nanoseconds of processors that its processes used.
    pub cpu_ns: u64,
    /// Nanoseconds that they stood still, because the limit was reached.
    pub throttled_ns: u64,
    /// Bytes of memory that cannot be thrown away.
    pub held_bytes: u64,
    /// Pages that were thrown away and needed again soon.
    pub refaults: u64,
}

/// See [`Group::watch_memory`].
#[derive(Debug)]
pub struct OutOfMemory {
    told: AsyncFd<OwnedFd>,
    version: Version,
}

impl OutOfMemory {
    /// Waits until the memory is not enough.
    ///
    /// # Errors
    /// Those of the kernel.
    pub async fn happens(&self) -> io::Result<()> {
        let interest = if self.version == Version::One { Interest::READABLE } else { Interest::PRIORITY };
        let mut ready = self.told.ready(interest).await?;
        ready.clear_ready();
        if self.version == Version::One {
            // The number of times since it was read last, which does not matter.
            let _ = rustix::io::read(self.told.get_ref(), &mut [0; 8]);
        } else {
            // Reading it says that we have seen it.
            let mut text = [0; 512];
            rustix::io::pread(self.told.get_ref(), &mut text, 0)?;
        }
        Ok(())
    }
}

/// Moves this process, and so those that it starts, into the group of Varve's own.
///
/// # Errors
/// [`CgroupError`].
pub fn join_service() -> Result<(), CgroupError> {
    let group = Group::of(SERVICE)?;
    for (controller, version, folder) in group.folders.iter().filter(|(controller, ..)| *controller == "cpu") {
        make_folder(controller, *version, folder)?;
        match version {
            Version::One => write(folder, "cpu.shares", &SERVICE_SHARES.to_string())?,
            Version::Two => write(folder, "cpu.weight", &SERVICE_WEIGHT.to_string())?,
        }
        write(folder, "cgroup.procs", &std::process::id().to_string())?;
    }
    Ok(())
}

/// Makes a group; in a version 2 hierarchy those above have to hand its controller down.
fn make_folder(controller: &str, version: Version, folder: &Path) -> Result<(), CgroupError> {
    if version == Version::Two {
        for above in folder.ancestors().skip(1).take(2).collect::<Vec<_>>().into_iter().rev() {
            fs::create_dir_all(above).map_err(at(above))?;
            write(above, "cgroup.subtree_control", &format!("+{controller}"))?;
        }
    }
    fs::create_dir_all(folder).map_err(at(folder))
}

fn or_max(value: Option<u64>) -> String {
    value.map_or_else(|| "max".to_owned(), |value| value.to_string())
}

fn number(folder: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
}

fn at(path: &Path) -> impl Fn(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path: path.clone(), source }
}

fn write(folder: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    let path = folder.join(file);
    fs::write(&path, value).map_err(at(&path))
}

/// Mounts a hierarchy of version 1 for a controller that nobody has mounted. None where the kernel does not.
fn mount_own(controller: &str) -> Option<(Version, PathBuf)> {
    let folder = Path::new(OWN_MOUNTS).join(controller);
    let options = CString::new(controller).ok()?;
    fs::create_dir_all(&folder).ok()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    match mount("varve", &folder, "cgroup", flags, &*options) {
        Ok(()) => Some((Version::One, folder)),
        Err(error) => {
            tracing::warn!(controller, %error, "a hierarchy of control groups cannot be mounted");
            None
        }
    }
}

/// Where a controller is mounted, by the text of mountinfo.
fn find(mounts: &str, controller: &str) -> Option<(Version, PathBuf)> {
    let mounted = |line: &str| -> Option<(Version, PathBuf)> {
        let (before, after) = line.split_once(" - ")?;
        let folder = PathBuf::from(before.split(' ').nth(4)?);
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        match kind {
            "cgroup" if options.split(',').any(|option| option == controller) => Some((Version::One, folder)),
            "cgroup2" => {
                let there = fs::read_to_string(folder.join("cgroup.controllers")).ok()?;
                there.split_whitespace().any(|name| name == controller).then_some((Version::Two, folder))
            }
            _ => None,
        }
    };
    mounts.lines().find_map(mounted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_where_they_are_mounted() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
                      31 25 0:27 / /sys/fs/cgroup/pids rw - cgroup none rw,pids\n";
        assert_eq!(find(mounts, "cpu"), Some((Version::One, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"))));
        assert_eq!(find(mounts, "pids"), Some((Version::One, PathBuf::from("/sys/fs/cgroup/pids"))));
        assert_eq!(find(mounts, "memory"), None);
    }
}
