//! What an error of a server shows: some are counted, some must never be.

use varve_engine::EngineError;
use varve_engine::LiveTimeline;
use varve_engine::resolve::{Moment, Resolved};
use varve_postgres::Lsn;
use varve_storage::edit_log::EditLogError;
use varve_storage::tenant_log::TenantLog;

use crate::kinds::Kind;
use crate::node::Node;
use crate::world::World;

/// Counts what an error of the engine shows, and violates what must not be.
pub async fn engine_error(world: &World, node: &Node, error: &EngineError) {
    match error {
        EngineError::TailUnknown { .. } => world.counts.add(Kind::TailWasUnknown),
        EngineError::EpochOver { .. } => world.counts.add(Kind::RefusedEpoch),
        EngineError::BranchMoved { .. } => world.counts.add(Kind::RefusedBranch),
        EngineError::Log(error) => log_error(world, node, error).await,
        EngineError::WalLog(error) => node.wal_log_failed(world, error),
        EngineError::DamagedWal { .. } | EngineError::Envelope(_) | EngineError::Relation(_) | EngineError::EmptyLog { .. } => {
            world.violate(format!("server {}: {error}", node.machine()));
        }
        _ => {}
    }
}

/// The same of a log's.
pub async fn log_error(world: &World, node: &Node, error: &EditLogError) {
    match error {
        EditLogError::Unconfirmed { .. } => world.counts.add(Kind::Unconfirmed),
        EditLogError::Fenced { .. } => node.note_lost(),
        EditLogError::Contradiction { .. } | EditLogError::Missing { .. } | EditLogError::Conflict { .. } => {
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

/// The same of the control plane's.
pub async fn control_error(world: &World, node: &Node, error: &varve_control::Error) {
    match error {
        varve_control::Error::Log(error) => log_error(world, node, error).await,
        // What the engine said was judged where it said it.
        varve_control::Error::Refused(_) => {}
        varve_control::Error::Fenced(_) => world.counts.add(Kind::RefusedCompute),
        error if error.code() == varve_api::Code::Internal && !matches!(error, varve_control::Error::NotBack { .. }) => {
            world.violate(format!("control of server {}: {error}", node.machine()));
        }
        _ => {}
    }
}

/// A moment means what the model says it means; head has what was acknowledged before it was asked for, unless the
/// server has not heard yet that the tenant is another one's: then nothing can be written by what it says.
pub async fn moment(
    world: &World,
    log: &TenantLog,
    live: &LiveTimeline,
    (moment, (acknowledged, head)): (Moment, (Lsn, Lsn)),
    at: Resolved,
) {
    match moment {
        Moment::Head if at.lsn < acknowledged => {
            if log.check_ownership().await.is_err() {
                return;
            }
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
