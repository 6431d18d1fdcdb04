//! What people ask of the control plane, as the admin API has it: branches, restores, computes. They know the one
//! address, and give up after a while; what they asked for may be done all the same.

use std::sync::Arc;
use std::time::Duration;

use varve_api::Refusal;
use varve_api::admin::{NewBranch, NewCompute, Restore};
use varve_control::{Call, Error};
use varve_engine::EngineError;
use varve_engine::resolve::Moment;
use varve_storage::ids::BranchName;

use crate::compute::Compute;
use crate::door::Plane;
use crate::judge;
use crate::kinds::Kind;
use crate::network::{About, PLAIN, call};
use crate::node::Node;
use crate::world::World;

/// How long somebody waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same when faults have ended: longer than anything that the control plane waits for.
const PATIENCE_AT_REST: Duration = Duration::from_secs(400);

/// Why something that was asked for was not done, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// No server that could do it is there, or it ended meanwhile.
    #[error("no server is there, or it has ended")]
    NoServer,
    /// The engine says no.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The control plane says no, or nothing.
    #[error(transparent)]
    Control(#[from] Refusal),
    /// There is no answer yet.
    #[error("no answer yet")]
    NoAnswer,
    /// The control plane says that a compute runs, and none does.
    #[error("no compute of the branch runs")]
    NotRunning,
    /// A compute's WAL is not durable in time.
    #[error("the compute's WAL is not durable yet")]
    NotDurable,
}

/// Runs `work` with the engine of the server that should have the tenant; over when that server ends.
///
/// # Errors
/// Those of `work`.
pub async fn on_active<T, F: Future<Output = Result<T, Refused>>>(
    world: &Arc<World>,
    work: impl FnOnce(Arc<Node>) -> F,
) -> Result<T, Refused> {
    let Some(node) = world.active_node() else { return Err(Refused::NoServer) };
    let life = node.life().clone();
    let result = tokio::select! {
        biased;
        () = life.ended() => Err(Refused::NoServer),
        done = work(node.clone()) => done,
    };
    if let Err(Refused::Engine(error)) = &result {
        judge::engine_error(world, &node, error).await;
    }
    result
}

/// Asks the control plane for something that counts as `crash` when its server ends meanwhile.
async fn ask<T, F>(world: &Arc<World>, crash: Kind, work: impl FnOnce(Arc<Plane>, String) -> F + Send) -> Result<T, Refused>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    let tenant = world.tenant.to_string();
    let patience = if world.is_calm() { PATIENCE_AT_REST } else { PATIENCE };
    let answer = call(world, About { crash: Some(crash), ..PLAIN }, |plane| work(plane, tenant));
    let answer = tokio::time::timeout(patience, answer).await;
    Ok(answer.map_err(|_| Refused::NoAnswer)??)
}

fn texts(moment: Moment) -> (Option<String>, Option<String>) {
    match moment {
        Moment::Head => (None, None),
        Moment::Lsn(lsn) => (Some(lsn.to_string()), None),
        Moment::Time(time) => (None, jiff::Timestamp::from_microsecond(time.unix_micros()).ok().map(|time| time.to_string())),
    }
}

/// Makes a branch of another one's `moment`.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn make_branch(world: &Arc<World>, from: &BranchName, name: &BranchName, moment: Moment) -> Result<(), Refused> {
    let (lsn, at) = texts(moment);
    let new = NewBranch { name: name.to_string(), from: Some(from.to_string()), lsn, at, snapshot: None };
    ask(world, Kind::CrashInBranch, |plane, tenant| async move { plane.create_branch(&Call::default(), &tenant, &new).await }).await?;
    Ok(())
}

/// Takes a branch back to `moment`.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn restore(world: &Arc<World>, branch: &BranchName, moment: Moment) -> Result<(), Refused> {
    let ((lsn, at), branch) = (texts(moment), branch.to_string());
    let to = Restore { lsn, at, snapshot: None };
    let restored =
        ask(
            world,
            Kind::CrashInRestore,
            |plane, tenant| async move { plane.restore_branch(&Call::default(), &tenant, &branch, &to).await },
        );
    restored.await?;
    Ok(())
}

/// Deletes a branch.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn delete_branch(world: &Arc<World>, branch: &BranchName) -> Result<(), Refused> {
    let branch = branch.to_string();
    ask(world, Kind::CrashInDelete, |plane, tenant| async move { plane.delete_branch(&Call::default(), &tenant, &branch).await }).await?;
    Ok(())
}

/// Sees to it that a compute runs on a branch; one that runs already is left alone, unless it is to be replaced.
///
/// # Errors
/// When it is refused, or does not run in time.
pub async fn ensure_running(world: &Arc<World>, branch: &BranchName, replace: bool) -> Result<Arc<Compute>, Refused> {
    let (text, new) = (branch.to_string(), NewCompute { replace, ..NewCompute::default() });
    ask(
        world,
        Kind::CrashInStart,
        |plane, tenant| async move { plane.ensure_running(&Call::default(), &tenant, &text, &new).await.map(drop) },
    )
    .await?;
    world.compute(branch).filter(|compute| !compute.is_over()).ok_or(Refused::NotRunning)
}

/// Stops a branch's compute cleanly.
///
/// # Errors
/// When it is refused, or not everything is durable.
pub async fn stop(world: &Arc<World>, branch: &BranchName) -> Result<(), Refused> {
    let branch = branch.to_string();
    ask(world, Kind::CrashInStopCall, |plane, tenant| async move {
        for compute in plane.list_branch_computes(&tenant, &branch).await? {
            plane.stop_compute(&Call::default(), &compute.id).await?;
        }
        Ok(())
    })
    .await
}

/// An operator has the server to which the address leads take the tenant.
///
/// # Errors
/// When it is refused, or may not have been done.
pub async fn take_over(world: &Arc<World>) -> Result<(), Refused> {
    ask(world, Kind::CrashInTakeOver, |plane, tenant| async move { plane.take_tenant(&tenant).await.map(drop) }).await
}
