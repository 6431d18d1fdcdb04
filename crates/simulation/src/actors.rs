//! Who acts in a run: people who branch, restore, delete, start, stop and read; and misfortune.

use std::sync::Arc;
use std::time::Duration;

use varve_engine::EngineError;
use varve_engine::resolve::Moment;
use varve_postgres::{Lsn, Timestamp};
use varve_storage::history::HistoryError;
use varve_storage::ids::{BranchName, TimelineId};
use varve_storage::store::Failure;
use varve_testing::sim_disk::DiskFaults;
use varve_testing::sim_store::{Faults, Link};

use crate::compute::Compute;
use crate::host::Host;
use crate::kinds::Kind;
use crate::ledger::Shown;
use crate::node::{Crash, Node};
use crate::steward::{self, Refused, on_active};
use crate::world::{HOSTS, MACHINES, World, in_order};

/// Most branches at a time.
const BRANCHES_MAX: usize = 6;
/// Longest pause between two things that somebody does.
const PAUSE_MAX: Duration = Duration::from_millis(900);
/// Longest pause between two misfortunes.
const MISFORTUNE_PAUSE_MAX: Duration = Duration::from_millis(2500);
/// How long a read waits for its LSN.
pub(crate) const READ_WAIT_MAX: Duration = Duration::from_secs(30);

/// Faults of the store in a run; a seed has all, some or none of them.
pub fn store_faults(world: &World) -> Faults {
    let some = |per_mille: u32| if world.chance(500) { per_mille } else { 0 };
    Faults { before: some(40), after: some(40), late: some(25), delay_ms_max: world.below(40), late_ms_max: world.below(9000) }
}

/// A branch's name, of ours.
pub(crate) fn name(text: &str) -> BranchName {
    text.parse().unwrap_or_else(|error| unreachable!("a name of ours: {error}"))
}

/// Some branch there is.
async fn some_branch(world: &Arc<World>) -> (BranchName, TimelineId) {
    let state = world.learn().await;
    let branches: Vec<_> = state.branches().map(|(name, timeline)| (name.clone(), timeline)).collect();
    branches[world.below(branches.len() as u64) as usize].clone()
}

/// A moment of a branch, any; of the first three `kinds` it is not head, if there is a boundary.
fn some_moment(world: &World, timeline: TimelineId, kinds: u64) -> Moment {
    match world.below(kinds) {
        0 => Moment::Time(Timestamp(world.wall_clock().0 - world.below(4_000_000) as i64)),
        1 | 2 => {
            let ledger = world.ledger.lock();
            let boundary = ledger.boundary(timeline, ledger.acknowledged_end(timeline), world.below(1 << 20));
            boundary.map_or(Moment::Head, Moment::Lsn)
        }
        _ => Moment::Head,
    }
}

/// Somebody who does `turns` things.
pub async fn person(world: Arc<World>, who: u32, turns: u32) {
    let world = &world;
    for turn in 0..turns {
        world.pause(PAUSE_MAX).await;
        let (branch, timeline) = some_branch(world).await;
        let what = world.below(100);
        let done: Result<(), Refused> = match what {
            0..16 => {
                let moment = some_moment(world, timeline, 3);
                world.say(format_args!("{who}: restore {branch} to {moment:?}"));
                let restored = steward::restore(world, &branch, moment).await;
                if restored.is_ok() {
                    world.counts.add(match moment {
                        Moment::Time(_) => Kind::RestoredToTime,
                        _ => Kind::RestoredToPosition,
                    });
                }
                restored
            }
            16..30 => {
                if world.learn().await.branch_count() < BRANCHES_MAX {
                    let moment = some_moment(world, timeline, 4);
                    let new = name(&format!("b-{who}-{turn}"));
                    world.say(format_args!("{who}: make branch {new} of {branch} at {moment:?}"));
                    steward::make_branch(world, &branch, &new, moment).await.map(drop)
                } else {
                    world.say(format_args!("{who}: delete {branch}"));
                    steward::delete_branch(world, &branch).await
                }
            }
            30..36 => {
                world.say(format_args!("{who}: delete {branch}"));
                steward::delete_branch(world, &branch).await
            }
            36..60 => {
                world.say(format_args!("{who}: ensure that {branch} runs"));
                steward::ensure_running(world, &branch, false).await.map(drop)
            }
            60..66 => {
                world.say(format_args!("{who}: replace the compute of {branch}"));
                steward::ensure_running(world, &branch, true).await.map(drop)
            }
            66..74 => {
                world.say(format_args!("{who}: stop {branch}"));
                steward::stop(world, &branch).await
            }
            74..80 => {
                on_active(world, |node| async move {
                    let tenant = node.own(world).await?;
                    Ok(tenant.timeline(timeline).await?.flush_all().await?)
                })
                .await
            }
            _ => read(world, timeline).await,
        };
        match done {
            Ok(()) => world.say(format_args!("{who}: done")),
            Err(error) => world.say(format_args!("{who}: {error}")),
        }
        world.learn().await;
    }
}

/// Reads a timeline at any of its boundaries, and compares.
///
/// # Errors
/// When it cannot be read.
pub async fn read(world: &Arc<World>, timeline: TimelineId) -> Result<(), Refused> {
    on_active(world, |node| async move {
        let tenant = node.own(world).await?;
        let live = tenant.timeline(timeline).await?;
        let head = live.sure_end();
        let boundary = world.ledger.lock().boundary(timeline, head, world.below(1 << 20));
        let Some(lsn) = boundary.filter(|_| world.chance(700)).or(Some(head)).filter(|lsn| *lsn >= live.facts().start) else {
            return Ok(());
        };
        read_at(world, &node, timeline, lsn).await
    })
    .await
}

/// Reads at `lsn`, which is durable, and compares.
///
/// # Errors
/// When it cannot be read.
pub async fn read_at(world: &Arc<World>, node: &Arc<Node>, timeline: TimelineId, lsn: Lsn) -> Result<(), Refused> {
    let tenant = node.own(world).await?;
    let live = tenant.timeline(timeline).await?;
    // What is not retained may be gone, or never be ingested.
    let is_retained = || tenant.log().state().check_retained(timeline, lsn).is_ok();
    if !is_retained() {
        world.counts.add(Kind::NotRetained);
        return Ok(());
    }
    if let Some(stopped) = live.stopped() {
        world.violate(format!("ingest of {timeline} stopped at {}: {}", stopped.at, stopped.reason));
    }
    live.wait_applied(lsn, READ_WAIT_MAX).await.map_err(EngineError::from)?;
    let history = live.history().clone();
    let found = node.context().threads.call(move || Shown::of(&*history, lsn)).await.map_err(EngineError::from)?;
    let expected = world.ledger.lock().shown(timeline, lsn);
    match (world.check(expected), found) {
        (Some(expected), Ok(found)) if expected != found => {
            world.violate(format!("{timeline} at {lsn} is not as it was written: {}", expected.difference(&found)));
        }
        (_, Err(_)) if !is_retained() => world.counts.add(Kind::NotRetained),
        (_, Err(HistoryError(error))) if !error.contains("simulated") => {
            world.violate(format!("{timeline} at {lsn} cannot be read: {error}"));
        }
        _ => {}
    }
    Ok(())
}

/// Misfortune, until it is told to end.
pub async fn misfortune(world: &Arc<World>) {
    loop {
        world.pause(MISFORTUNE_PAUSE_MAX).await;
        let machine = world.below(MACHINES as u64) as usize;
        match world.below(100) {
            0..20 => crash(world, machine, Crash::Process, Kind::ProcessCrashed).await,
            20..34 => crash(world, machine, Crash::Power, Kind::PowerCut).await,
            34..40 => lose_disk(world).await,
            40..46 => {
                world.say(format_args!("an fsync of machine {machine} will fail"));
                world.machines[machine].disk().set_faults(DiskFaults { sync_fails: 500, ..DiskFaults::default() });
                world.pause(Duration::from_millis(300)).await;
                world.machines[machine].disk().set_faults(DiskFaults::default());
            }
            46..58 => {
                // An operator has the other server take the tenant, and leads the address there.
                world.move_address();
                world.say(format_args!("server {} is to take over", world.active()));
                world.counts.add(Kind::TookOver);
                let _refused = steward::take_over(world).await;
            }
            58..66 => {
                if let Some(node) = world.machines[machine].node() {
                    world.say(format_args!("the store hangs for server {machine}"));
                    world.counts.add(Kind::StoreHung);
                    let link = if world.chance(500) { Link::Frozen } else { Link::Failing(Failure::Other) };
                    node.client().set_link(link);
                    world.pause(Duration::from_secs(if world.chance(300) { 150 } else { 20 })).await;
                    if !node.life().is_over() {
                        node.client().set_link(Link::Up);
                    }
                }
            }
            66..72 => {
                world.say(format_args!("the clock of machine {machine} jumps"));
                world.counts.add(Kind::ServerClockJumped);
                world.machines[machine].jump_clock(world.below(30_000_000));
            }
            72..82 => {
                let by_us = world.below(6_000_000) as i64 - 3_000_000;
                world.say(format_args!("wall clocks jump by {by_us} us"));
                world.counts.add(Kind::WallClockJumped);
                world.jump_wall_clock(by_us);
            }
            82..90 => kill_compute(world).await,
            what => {
                let host = &world.hosts[world.below(HOSTS as u64) as usize];
                if what < 96 {
                    crash_host(world, host);
                } else {
                    world.say(format_args!("a host is slow"));
                    world.counts.add(Kind::HostSlow);
                    host.slow_down(Some(tokio::time::Instant::now() + Duration::from_secs(world.below(20))));
                }
            }
        }
        for machine in &world.machines {
            // A process that ended by itself is started again, too.
            if machine.node().is_none() {
                start(world, machine.index()).await;
            }
        }
        // An operator insists.
        if world.active_node().is_some_and(|node| node.has_lost()) {
            let _refused = steward::take_over(world).await;
        }
    }
}

/// A host's process ends, and is started again after a while, sometimes after so long that its computes are moved.
fn crash_host(world: &Arc<World>, host: &Arc<Host>) {
    if host.crash(world) {
        world.counts.add(Kind::HostCrashed);
        let is_long = world.chance(250);
        if is_long {
            world.counts.add(Kind::HostAway);
        }
        let away = Duration::from_millis(if is_long { 60_000 } else { world.below(4_000) });
        let (world, host) = (world.clone(), host.clone());
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            host.start(&world);
        });
    }
}

async fn crash(world: &Arc<World>, machine: usize, how: Crash, kind: Kind) {
    if world.machines[machine].node().is_some() {
        world.say(format_args!("machine {machine}: {how:?}"));
        world.counts.add(kind);
        world.machines[machine].end(world, how);
        world.pause(Duration::from_millis(1500)).await;
    }
}

/// Starts the process of a machine.
pub async fn start(world: &Arc<World>, machine: usize) {
    let faults = store_faults(world);
    match world.machines[machine].start(world, faults).await {
        Ok(_) => world.say(format_args!("server {machine} runs")),
        Err(error) => world.violate(format!("server {machine} does not start: {error}")),
    }
}

/// The machine that has the tenant comes back with an empty disk, if computes that run have all that only it had.
async fn lose_disk(world: &Arc<World>) {
    let machine = world.active();
    let opened = on_active(world, |node| async move {
        let tenant = node.own(world).await?;
        for timeline in in_order(&*world.learn().await) {
            tenant.timeline(timeline.facts.id).await?;
        }
        Ok(tenant)
    });
    let (Ok(tenant), state) = (opened.await, world.learn().await) else { return };
    if world.machines[machine].node().is_none() {
        return;
    }
    let wal_log = world.machines[machine].wal_log();
    let is_safe = state.timelines().all(|timeline| {
        let id = timeline.facts.id;
        let Some(live) = tenant.opened(id) else { return false };
        let Some(newest) = timeline.epochs.last().filter(|newest| newest.wal_log == wal_log) else { return true };
        let layered = live.positions().layered();
        // Who branched off it must not have to do without it, should its compute be ended before it has sent it again.
        let is_of_it = |child: &varve_storage::tenant_log::TimelineState| child.facts.ancestor.filter(|at| at.timeline == id);
        if state.timelines().filter_map(is_of_it).any(|at| at.lsn > layered) {
            return false;
        }
        let has_all = |compute: &Arc<Compute>| {
            compute.timeline == id && compute.epoch == newest.epoch.0 && !compute.is_over() && compute.base() <= layered
        };
        layered >= world.ledger.lock().acknowledged_end(id) || world.computes().iter().any(has_all)
    });
    if is_safe {
        crash(world, machine, Crash::DiskLost, Kind::DiskLost).await;
    }
}

/// A compute is killed, unless it alone has what a lost disk had.
async fn kill_compute(world: &Arc<World>) {
    let state = world.learn().await;
    let computes = world.computes();
    if computes.is_empty() {
        return;
    }
    let compute = &computes[world.below(computes.len() as u64) as usize];
    let newest = state.timeline(compute.timeline).ok().and_then(|timeline| timeline.epochs.last());
    let is_kept = newest.is_none_or(|newest| world.machines.iter().any(|machine| machine.wal_log() == newest.wal_log));
    if is_kept && !compute.is_over() {
        let processes: Vec<_> = world.hosts.iter().flat_map(|host| host.processes()).collect();
        match processes.iter().find(|process| process.runs(compute)) {
            Some(process) if world.chance(500) => {
                world.counts.add(Kind::ProcessKilled);
                process.kill(world, "killed with its process");
            }
            _ => {
                world.counts.add(Kind::ComputeKilled);
                compute.kill(world, "killed");
            }
        }
    }
}
