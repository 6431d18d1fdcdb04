//! After all faults have ended: everything comes to rest, every branch is served by one compute, every history is what
//! it must be.
//!
//! What only one machine's disk has, only that machine can serve: WAL below the base of a compute's epoch that is not
//! in layers yet, or the tail of a compute that is gone. So the tenant is given to one machine and then to the other,
//! and each branch and timeline must be served by one of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_engine::EngineError;
use varve_engine::resolve::{Moment, resolve};
use varve_postgres::Lsn;
use varve_storage::ids::{BranchName, TimelineId};
use varve_storage::tenant_log::TenantState;
use varve_storage::timeline::Position;
use varve_testing::sim_disk::DiskFaults;
use varve_testing::sim_store::{Faults, Link};

use crate::actors::{self, READ_WAIT_MAX};
use crate::compute::Compute;
use crate::kinds::Kind;
use crate::steward::{self, Refused, on_active};
use crate::world::{World, in_order};

/// How often it is tried, each machine in turn twice.
const ATTEMPTS: u32 = 12;
/// Time between two attempts: more than anything waits for by itself.
const PAUSE: Duration = Duration::from_secs(15);
/// How long a commit may take.
const COMMIT_MAX: Duration = Duration::from_secs(20);

/// What has been seen to be as it must.
#[derive(Default)]
struct Seen {
    branches: BTreeSet<BranchName>,
    timelines: BTreeSet<TimelineId>,
}

/// See the module's doc.
pub async fn come_to_rest(world: &Arc<World>) {
    world.quiet.store(true, Ordering::SeqCst);
    let mut seen = Seen::default();
    let mut last = String::new();
    for attempt in 0..ATTEMPTS {
        for machine in &world.machines {
            machine.disk().set_faults(DiskFaults::default());
            if machine.node().is_none() {
                actors::start(world, machine.index()).await;
            }
            if let Some(node) = machine.node() {
                node.client().set_faults(Faults::default());
                node.client().set_link(Link::Up);
            }
        }
        for host in &world.hosts {
            host.slow_down(None);
            host.start(world);
        }
        if world.active_node().is_some_and(|node| node.has_lost())
            && let Err(error) = steward::take_over(world).await
        {
            world.say(format_args!("not taken over: {error}"));
        }
        tokio::time::sleep(PAUSE).await;
        match look(world, &mut seen).await {
            None => return world.say(format_args!("at rest")),
            Some(error) => last = error,
        }
        world.say(format_args!("not at rest yet: {last}"));
        if attempt % 2 == 1 {
            world.move_address();
            let _tried_again = steward::take_over(world).await;
        }
    }
    world.violate(format!("it does not come to rest: {last}"));
}

/// Looks at all branches and timelines that were not yet seen to be as they must; what is wrong with the last that are
/// not.
async fn look(world: &Arc<World>, seen: &mut Seen) -> Option<String> {
    let mut wrong = None;
    let state = world.learn().await;
    for (branch, timeline) in state.branches() {
        if !seen.branches.contains(branch) {
            match is_served(world, &state, branch, timeline).await {
                Ok(()) => drop(seen.branches.insert(branch.clone())),
                Err(error) => wrong = Some(format!("{branch}: {error}")),
            }
        }
    }
    let state = world.learn().await;
    for timeline in in_order(&state) {
        let id = timeline.facts.id;
        if !seen.timelines.contains(&id) {
            match is_whole(world, &state, id).await {
                Ok(()) => drop(seen.timelines.insert(id)),
                Err(error) => wrong = Some(error.to_string()),
            }
        }
    }
    wrong
}

/// A branch has a compute on its timeline, which commits.
async fn is_served(world: &Arc<World>, state: &TenantState, branch: &BranchName, timeline: TimelineId) -> Result<(), Refused> {
    if let Some(head) = given_up_from(world, state, timeline).await {
        world.say(format_args!("what {branch} had on a lost disk is given up from {head} on"));
        world.counts.add(Kind::TailGivenUp);
        steward::restore(world, branch, Moment::Lsn(head)).await?;
    }
    let before = world.learn().await.branch(branch.as_str()).map_err(EngineError::from)?.facts.id;
    let compute = steward::ensure_running(world, branch, false).await?;
    let timeline = world.learn().await.branch(branch.as_str()).map_err(EngineError::from)?.facts.id;
    if before != timeline {
        // A restore that nobody heard of came through only now.
        return Err(EngineError::BranchMoved { branch: branch.clone(), timeline: before }.into());
    }
    if compute.timeline != timeline {
        world.violate(format!("{branch} is {timeline}, and its compute serves {}", compute.timeline));
    }
    match tokio::time::timeout(COMMIT_MAX, compute.commit(world)).await {
        Ok(()) => Ok(()),
        Err(_) => {
            world.say(format_args!("{} waits: {}", compute.name(), compute.progress()));
            Err(Refused::NotDurable)
        }
    }
}

/// Where a history ends whose rest was on a lost disk and will not be sent again.
async fn given_up_from(world: &Arc<World>, state: &TenantState, timeline: TimelineId) -> Option<Lsn> {
    if !is_lost_for_good(world, state, timeline) {
        return None;
    }
    let head = on_active(world, |node| async move {
        let live = node.own(world).await?.timeline(timeline).await?;
        Ok(resolve(&live, Moment::Head).await?)
    });
    match head.await {
        Err(Refused::Engine(EngineError::TailUnknown { head, timeline, .. })) => {
            let stored = world.ledger.lock().stored(timeline);
            if head < stored {
                world.violate(format!("{timeline} ends at {head} without its compute, and the store was said to have it up to {stored}"));
            }
            Some(head)
        }
        _ => None,
    }
}

/// A timeline has everything that was acknowledged, and reads as it was written.
async fn is_whole(world: &Arc<World>, state: &TenantState, id: TimelineId) -> Result<(), Refused> {
    let is_lost = is_lost_for_good(world, state, id);
    on_active(world, |node| async move {
        let tenant = node.own(world).await?;
        let live = tenant.timeline(id).await?;
        let acknowledged = world.ledger.lock().acknowledged_end(id);
        if live.positions().head() < acknowledged && !is_lost {
            // Its compute has it, and is on its way.
            live.wait_tail().await?;
            live.positions().wait(Position::Head, acknowledged, READ_WAIT_MAX).await.map_err(EngineError::from)?;
        }
        let (head, stored) = (live.sure_end(), world.ledger.lock().stored(id));
        if head < stored {
            world.violate(format!("{id} ends at {head}, and the store was said to have it up to {stored}"));
        }
        match actors::read_at(world, &node, id, head).await {
            // What it shows of an ancestor was given up.
            Err(_) if is_lost => return Ok(()),
            read => read?,
        }
        let boundary = world.ledger.lock().boundary(id, head, world.below(1 << 20));
        match boundary {
            Some(boundary) => actors::read_at(world, &node, id, boundary).await,
            None => Ok(()),
        }
    })
    .await
}

/// Whether what a lost disk may have had of a timeline, or of an ancestor, will not be sent again: its compute is gone.
fn is_lost_for_good(world: &World, state: &TenantState, timeline: TimelineId) -> bool {
    let chain = state.ancestry(timeline).unwrap_or_default();
    chain.into_iter().any(|(timeline, _)| {
        let id = timeline.facts.id;
        timeline.epochs.last().is_some_and(|newest| {
            let has_it = |compute: &Arc<Compute>| compute.timeline == id && compute.epoch == newest.epoch.0 && !compute.is_over();
            let is_kept = world.machines.iter().any(|machine| machine.wal_log() == newest.wal_log);
            !is_kept && !world.computes().iter().any(has_it)
        })
    })
}
