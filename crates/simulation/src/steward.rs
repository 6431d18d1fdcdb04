//! What the control plane does with the engine: branches, restores, computes wanted and ended. A model of the real one,
//! with the same order of steps; each may be cut short at any await by its server's end.

use std::sync::Arc;
use std::time::Duration;

use varve_engine::resolve::{Moment, Resolved, resolve};
use varve_engine::timeline::StreamEnd;
use varve_engine::{EngineError, LiveTimeline, Tenant};
use varve_postgres::Lsn;
use varve_storage::edit_log::{CommitError, EditLogError};
use varve_storage::ids::{BranchName, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{Ancestor, TenantEdit, TenantError, TenantState, TimelineFacts, removed_timelines};

use crate::compute::{Begin, Compute};
use crate::kinds::Kind;
use crate::node::Node;
use crate::world::{Plant, World};

/// How long a clean stop waits until everything is durable.
const SHUT_DOWN_MAX: Duration = Duration::from_secs(20);

/// How something went that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// No server that could do it is there, or it ended meanwhile.
    #[error("no server is there, or it has ended")]
    NoServer,
    /// The engine says no.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A host's own record could not be written (planted).
    #[error("the host's record could not be written")]
    HostRecord,
    /// A compute did not stop in time.
    #[error("the compute's WAL is not durable yet")]
    NotDurable,
}

impl From<TenantError> for Refused {
    fn from(error: TenantError) -> Refused {
        Refused::Engine(error.into())
    }
}

impl Refused {
    /// Whether a change may have been written all the same.
    pub fn is_uncertain(&self) -> bool {
        match self {
            Refused::NoServer => true,
            Refused::Engine(EngineError::Log(error)) => matches!(error, EditLogError::Unconfirmed { .. } | EditLogError::Stopped { .. }),
            _ => false,
        }
    }
}

/// Runs `work` as an operation of `kind` on the server that should have the tenant; over when that server ends.
pub async fn on_active<T, F: Future<Output = Result<T, Refused>>>(
    world: &Arc<World>,
    kind: Kind,
    work: impl FnOnce(Arc<Node>) -> F,
) -> Result<T, Refused> {
    let Some(node) = world.active_node() else { return Err(Refused::NoServer) };
    let _under_way = world.under_way(node.machine(), kind);
    let life = node.life().clone();
    let result = tokio::select! {
        biased;
        () = life.ended() => Err(Refused::NoServer),
        done = work(node.clone()) => done,
    };
    if let Err(Refused::Engine(error)) = &result {
        judge(world, &node, error).await;
    }
    result
}

/// Counts what an error shows, and violates what must not be.
async fn judge(world: &World, node: &Node, error: &EngineError) {
    match error {
        EngineError::TailUnknown { .. } => world.counts.add(Kind::TailWasUnknown),
        EngineError::Log(EditLogError::Unconfirmed { .. }) => world.counts.add(Kind::Unconfirmed),
        EngineError::Log(EditLogError::Fenced { .. }) => node.context().lost.note(world.tenant),
        EngineError::WalLog(error) => node.wal_log_failed(world, error),
        EngineError::DamagedWal { .. } | EngineError::Envelope(_) | EngineError::Relation(_) | EngineError::EmptyLog { .. } => {
            world.violate(format!("server {}: {error}", node.machine()));
        }
        EngineError::Log(error @ (EditLogError::Contradiction { .. } | EditLogError::Missing { .. } | EditLogError::Conflict { .. })) => {
            // What belongs to a timeline that is being deleted may be gone in part.
            let (state, error) = (world.learn().await, error.to_string());
            let is_of_one_that_is_gone =
                error.contains("/timelines/") && !state.timelines().any(|timeline| error.contains(&timeline.facts.id.to_string()));
            if !is_of_one_that_is_gone {
                world.violate(format!("server {}: {error}", node.machine()));
            }
        }
        _ => {}
    }
}

async fn live_of(tenant: &Arc<Tenant>, branch: &BranchName) -> Result<Arc<LiveTimeline>, Refused> {
    let timeline = tenant.log().state().branch(branch.as_str())?.facts.id;
    Ok(tenant.timeline(timeline).await?)
}

fn new_timeline(world: &World, at: Resolved) -> Result<TimelineFacts, Refused> {
    let id = TimelineId::random().map_err(EngineError::from)?;
    let ancestor = Some(Ancestor { timeline: at.timeline, lsn: at.lsn });
    Ok(TimelineFacts { id, ancestor, tli: 0, start: at.lsn, created: world.wall_clock().0 })
}

/// Commits, and says what it was refused with.
async fn commit(
    tenant: &Tenant,
    plan: impl FnOnce(&TenantState) -> Result<Vec<TenantEdit>, EngineError>,
) -> Result<Vec<TenantEdit>, Refused> {
    let planned = |state: &TenantState| plan(state).map(|edits| (edits.clone(), edits));
    tenant.log().commit(planned).await.map_err(|error: CommitError<EngineError>| Refused::Engine(error.into()))
}

/// Makes a branch of another one's `moment`.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn make_branch(world: &Arc<World>, from: &BranchName, name: &BranchName, moment: Moment) -> Result<Lsn, Refused> {
    on_active(world, Kind::CrashInBranch, |node| async move {
        let tenant = node.own(world).await?;
        let live = live_of(&tenant, from).await?;
        let before = world.ledger.lock().acknowledged_end(live.id());
        let head = live.positions().head();
        let at = resolve(&live, moment).await?;
        check_moment(world, &live, moment, (before, head), at);
        let facts = new_timeline(world, at)?;
        commit(&tenant, |state| {
            state.check_free(name)?;
            state.timeline(at.timeline)?;
            let facts = TimelineFacts { tli: state.next_tli()?, ..facts };
            let (timeline, name) = (facts.id, name.clone());
            Ok(vec![TenantEdit::Timeline(facts), TenantEdit::Branch { name, timeline }])
        })
        .await?;
        Ok(at.lsn)
    })
    .await
}

/// A moment means what the model says it means; head has what was acknowledged before it was asked for.
fn check_moment(world: &World, live: &LiveTimeline, moment: Moment, (acknowledged, head): (Lsn, Lsn), at: Resolved) {
    match moment {
        Moment::Head if at.lsn < acknowledged => {
            world.violate(format!("head of {} is {}, and {acknowledged} had been acknowledged", live.id(), at.lsn));
        }
        Moment::Lsn(lsn) if at.lsn != lsn => world.violate(format!("boundary {lsn} of {} is taken for {}", live.id(), at.lsn)),
        Moment::Time(time) => {
            let ledger = world.ledger.lock();
            let now = live.positions().head();
            let possible = [ledger.moment(live.id(), head, time.0), ledger.moment(live.id(), now, time.0)];
            let found = Some((at.timeline, at.lsn));
            // Head moves on while it is looked for.
            let is_between = at.timeline == live.id() && at.lsn >= head && at.lsn <= now;
            drop(ledger);
            if !possible.contains(&found) && !is_between {
                world.violate(format!("time {time:?} of {} is taken for {found:?}, it is {possible:?}", live.id()));
            }
        }
        _ => {}
    }
}

/// Takes a branch back to `moment`: one commit. What it was gets the name `before`.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn restore(world: &Arc<World>, branch: &BranchName, before: &BranchName, moment: Moment) -> Result<Lsn, Refused> {
    on_active(world, Kind::CrashInRestore, |node| async move {
        let tenant = node.own(world).await?;
        let live = live_of(&tenant, branch).await?;
        let acknowledged = world.ledger.lock().acknowledged_end(live.id());
        let head = live.positions().head();
        let at = resolve(&live, moment).await?;
        check_moment(world, &live, moment, (acknowledged, head), at);
        let facts = new_timeline(world, at)?;
        commit(&tenant, |state| {
            if state.branch(branch.as_str())?.facts.id != live.id() {
                return Err(EngineError::BranchMoved { branch: branch.clone(), timeline: live.id() });
            }
            Ok(state.restore_branch(branch.as_str(), before, &facts)?)
        })
        .await?;
        if world.plant == Plant::HostRecordAfterCommit && world.chance(600) {
            // The old order: who serves what stood in a file of the host, too, and writing that one failed.
            return Err(Refused::HostRecord);
        }
        // Nobody is told: the stream ends, and who comes again is refused.
        live.end_stream(StreamEnd::Ended).await?;
        Ok(at.lsn)
    })
    .await
}

/// Deletes a branch, and the timelines that nothing refers to any more.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn delete_branch(world: &Arc<World>, branch: &BranchName) -> Result<(), Refused> {
    on_active(world, Kind::CrashInDelete, |node| async move {
        let tenant = node.own(world).await?;
        let timeline = tenant.log().state().branch(branch.as_str())?.facts.id;
        let edits = commit(&tenant, |state| Ok(state.delete_branch(branch.as_str())?)).await?;
        if let Some(live) = tenant.opened(timeline) {
            live.end_stream(StreamEnd::Ended).await?;
        }
        for timeline in removed_timelines(&edits) {
            tenant.remove_timeline(timeline).await;
        }
        Ok(())
    })
    .await
}

/// Sees to it that a compute runs on a branch; one that runs already is left alone, unless it is to be replaced.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn ensure_running(world: &Arc<World>, branch: &BranchName, replace: bool) -> Result<Arc<Compute>, Refused> {
    on_active(world, Kind::CrashInBegin, |node| async move {
        let tenant = node.own(world).await?;
        let live = live_of(&tenant, branch).await?;
        if let Some(running) = world.compute(branch)
            && running.timeline == live.id()
            && !running.is_over()
            && !replace
        {
            return Ok(running);
        }
        let start = live.begin_epoch(tenant.log(), branch).await?;
        world.learn().await;
        let begin = Begin {
            branch: branch.clone(),
            timeline: live.id(),
            tli: live.facts().tli,
            epoch: start.epoch.0,
            base: start.lsn,
            standby_name: start.standby_name,
        };
        Ok(Compute::start(world, begin))
    })
    .await
}

/// Stops a branch's compute cleanly.
///
/// # Errors
/// When it is refused, or not everything is durable.
pub async fn stop(world: &Arc<World>, branch: &BranchName) -> Result<(), Refused> {
    let Some(compute) = world.compute(branch).filter(|compute| !compute.is_over()) else { return Ok(()) };
    if !compute.shut_down(SHUT_DOWN_MAX).await {
        compute.write_again();
        return Err(Refused::NotDurable);
    }
    compute.kill(world, "stopped");
    on_active(world, Kind::CrashInStop, |node| async move {
        let tenant = node.own(world).await?;
        let live = tenant.timeline(compute.timeline).await?;
        Ok(live.close_epoch(tenant.log(), WriterEpoch(compute.epoch)).await?)
    })
    .await
}
