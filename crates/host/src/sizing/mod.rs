//! The limits of a compute that runs: those of its size, moved between the least and the most by its load, and changed
//! when the size is. No process of it is touched for that.
//!
//! Once a second the load is looked at, and only where a limit can move: a size without a range, and a compute without
//! a size, cost no wake-up. The kernel wakes us when the memory is not enough. Below the most of its range the
//! processes then wait ([`Group::wait_for_memory`]) until they have the most; the kernel kills only at the most.

mod follow;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use varve_api::admin::EventKind;
use varve_api::size::{self, Between, CurrentLimits, Size};

use crate::cgroup::{CgroupError, Group, Limits, OutOfMemory};
use crate::events::Events;
use follow::Follower;

/// How often the load is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long, and how often, it is looked whom the kernel killed after it said that the memory is not enough.
const KILL_MAX: Duration = Duration::from_secs(2);
const KILL_POLL: Duration = Duration::from_millis(50);
/// Wait after the control group could not be watched.
const WATCH_WAIT: Duration = Duration::from_secs(10);

/// Counts the processes that the kernel killed for want of memory, each of them once.
#[derive(Clone, Debug)]
pub struct Kills {
    group: Group,
    seen: Arc<AtomicU64>,
}

impl Kills {
    /// Of a group from now on.
    pub fn of(group: Group) -> Kills {
        let seen = Arc::new(AtomicU64::new(group.out_of_memory_kills()));
        Kills { group, seen }
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Tells of those that nobody has told of. Whether there were any.
    pub(crate) fn tell(&self, events: &Events) -> bool {
        let now = self.group.out_of_memory_kills();
        let news = now.saturating_sub(self.seen.fetch_max(now, Ordering::SeqCst));
        if news > 0 {
            let limit = self.group.memory_limit().map_or_else(String::new, |bytes| format!(" ({})", size::bytes(bytes)));
            let what = if news == 1 { "a process".to_owned() } else { format!("{news} processes") };
            events.tell(EventKind::OutOfMemory, format!("the compute used up its memory{limit}, and the kernel killed {what} of it"));
        }
        news > 0
    }
}

/// The limits of a size, each at its most; what it leaves out is the host's.
pub(crate) fn most(host: &Limits, size: &Size) -> Limits {
    Limits {
        cpu_milli: size.cpu_milli.map(|between| between.max).or(host.cpu_milli),
        memory_bytes: size.memory_bytes.map(|between| between.max).or(host.memory_bytes),
        processes: host.processes,
    }
}

fn follower(host: &Limits, size: &Size) -> Follower {
    let fixed = |limit: Option<u64>| limit.map(|limit| Between { min: limit, max: limit });
    Follower::new(size.cpu_milli.or(fixed(host.cpu_milli)), size.memory_bytes.or(fixed(host.memory_bytes)), Instant::now())
}

/// Keeps the limits of a compute, for ever. It began with the most of its size. `told` is what it may take right now.
pub(crate) async fn keep(
    kills: Kills,
    host: Limits,
    mut sizes: watch::Receiver<Size>,
    told: watch::Sender<Option<CurrentLimits>>,
    events: Events,
) {
    let mut follower = follower(&host, &sizes.borrow_and_update());
    let mut set = follower.limits();
    told.send_replace(Some(set));
    let mut watch = Watch::of(kills.group()).await;
    loop {
        let look = async {
            if follower.moves() {
                tokio::time::sleep(LOOK).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = look => {
                let group = kills.group().clone();
                match tokio::task::spawn_blocking(move || group.load()).await.map_err(std::io::Error::other) {
                    Ok(Ok(load)) => follower.follow(load, Instant::now()),
                    Ok(Err(error)) => tracing::warn!(%error, "the compute's load is not known"),
                    Err(error) => tracing::warn!(%error, "the compute's load is not known"),
                }
            }
            changed = sizes.changed() => {
                if changed.is_err() {
                    return;
                }
                let size = *sizes.borrow_and_update();
                tracing::info!(?size, "the compute has another size");
                // Down to the most of the new one at once, or up to it.
                follower = self::follower(&host, &size);
            }
            () = watch.happens() => {
                if set.memory_bytes < follower.memory_max() {
                    follower.is_out_of_memory(Instant::now());
                } else {
                    let deadline = Instant::now() + KILL_MAX;
                    while !kills.tell(&events) && Instant::now() < deadline {
                        tokio::time::sleep(KILL_POLL).await;
                    }
                }
            }
        }
        let wanted = follower.limits();
        if wanted != set {
            let (group, max) = (kills.group().clone(), follower.memory_max());
            let applied = tokio::task::spawn_blocking(move || apply(&group, set, wanted, max)).await;
            set = applied.unwrap_or(set);
            follower.keep_memory(set.memory_bytes);
            told.send_replace(Some(set));
        }
    }
}

/// Sets limits that differ from those that are set. Gives those that are set then: memory that is in use stays, and is
/// tried again. Blocks while the kernel takes memory back.
fn apply(group: &Group, set: CurrentLimits, wanted: CurrentLimits, memory_max: Option<u64>) -> CurrentLimits {
    let mut now = set;
    let try_to = |what: &str, done: Result<bool, CgroupError>| match done {
        Ok(done) => done,
        Err(error) => {
            tracing::warn!(what, %error, "a limit of the compute is not set");
            false
        }
    };
    if wanted.cpu_milli != set.cpu_milli && try_to("cpu", group.limit_cpu(wanted.cpu_milli).map(|()| true)) {
        now.cpu_milli = wanted.cpu_milli;
    }
    if wanted.memory_bytes != set.memory_bytes {
        let waits = wanted.memory_bytes < memory_max;
        // Who waits is let go on before the kernel may kill, and waits before it has less.
        if waits {
            try_to("memory", group.wait_for_memory(true).map(|()| true));
        }
        if try_to("memory", group.limit_memory(wanted.memory_bytes, memory_max)) {
            now.memory_bytes = wanted.memory_bytes;
        }
        if !waits && now.memory_bytes == wanted.memory_bytes {
            try_to("memory", group.wait_for_memory(false).map(|()| true));
        }
    }
    tracing::debug!(?set, ?wanted, ?now, "limits of the compute");
    now
}

/// Waits for the kernel to say that the memory is not enough.
struct Watch(Option<OutOfMemory>);

impl Watch {
    async fn of(group: &Group) -> Watch {
        let group = group.clone();
        let watch = tokio::task::spawn_blocking(move || group.watch_memory()).await;
        match watch.map_err(std::io::Error::other).flatten() {
            Ok(watch) => Watch(Some(watch)),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not tell when a compute is out of memory");
                Watch(None)
            }
        }
    }

    async fn happens(&mut self) {
        match &self.0 {
            None => std::future::pending().await,
            Some(watch) => {
                if let Err(error) = watch.happens().await {
                    tracing::warn!(%error, "the kernel does not tell when a compute is out of memory");
                    tokio::time::sleep(WATCH_WAIT).await;
                }
            }
        }
    }
}
