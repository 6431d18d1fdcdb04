//! What the WAL log holds of timelines that are not open: what the store may lack is opened, so that it gets there;
//! what is not needed any more is let go of; what no log in the store knows is kept and told.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use varve_engine::held::{Claim, claim};
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::tenant_log;
use varve_storage::wal_log::Unattached;

use crate::server::{Pageserver, SWEEP_INTERVAL};
use crate::tenants::LostTo;

/// How often it is looked for WAL in the WAL log that no open timeline has.
const SETTLE_INTERVAL: Duration = Duration::from_secs(30);
/// Tenants that are opened at once when the server starts.
const OPENED_AT_ONCE: usize = 8;

/// WAL in the WAL log that cannot be put into the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrphanedWal {
    /// The tenant that it is of.
    pub tenant: TenantId,
    /// The timeline.
    pub timeline: TimelineId,
    /// What is wrong and what to do.
    pub problem: String,
    /// Whether no log in the store knows of it: an operator may give it up.
    pub is_unknown: bool,
}

/// Why WAL in the WAL log stays there.
struct Unsettled {
    problem: String,
    is_unknown: bool,
}

impl Unsettled {
    /// No log in the store knows of it.
    fn unknown(problem: String) -> Unsettled {
        Unsettled { problem, is_unknown: true }
    }

    /// It may be settled later.
    fn for_now(problem: impl std::fmt::Display) -> Unsettled {
        Unsettled { problem: format!("{problem}"), is_unknown: false }
    }
}

impl Pageserver {
    /// Looks after what the WAL log holds of timelines that are not open: what the store may lack is opened, so that it
    /// gets there; what is not needed any more is let go of; what nobody knows is kept and told.
    pub(crate) async fn settle_held(&self) {
        let held = self.context.wal.unattached();
        let orphans: Vec<OrphanedWal> = stream::iter(held)
            .map(|held| async move {
                let Unsettled { problem, is_unknown } = self.settle(held).await.err()?;
                Some(OrphanedWal { tenant: held.tenant, timeline: held.timeline, problem, is_unknown })
            })
            .buffer_unordered(OPENED_AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let mut known = self.orphans.lock();
        for orphan in orphans.iter().filter(|orphan| !known.contains(orphan)) {
            let OrphanedWal { tenant, timeline, problem, .. } = orphan;
            tracing::error!(%tenant, %timeline, problem, "the WAL log holds WAL that cannot be put into the store; it is kept");
        }
        *known = orphans;
    }

    /// Looks after the WAL log from time to time, and at once while everybody waits for space in it.
    pub(crate) async fn keep_settled(&self) {
        let mut settled = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            let is_full = self.context.wal.is_over_limit();
            if is_full || settled.elapsed() >= SETTLE_INTERVAL {
                self.settle_held().await;
                settled = tokio::time::Instant::now();
            }
            if is_full {
                self.free_wal_log().await;
            }
        }
    }

    /// What who hardly needs it holds of the oldest segments is moved out of the way.
    async fn free_wal_log(&self) {
        let context = self.context.clone();
        if let Err(error) = self.context.threads.call(move || context.free_wal_log()).await {
            tracing::error!(%error, "the WAL log was not freed");
        }
    }

    async fn settle(&self, held: Unattached) -> Result<(), Unsettled> {
        let Unattached { tenant, timeline, .. } = held;
        let state = match self.tenants.awake(tenant) {
            Some(tenant) => tenant.log().state(),
            None => match tenant_log::read(&self.context.store, tenant).await.map_err(Unsettled::for_now)? {
                Some(state) => Arc::new(state),
                None => {
                    return Err(Unsettled::unknown(format!(
                        "the store has no log of tenant {tenant}: if the tenant was deleted, 'varve wal forget {tenant}' lets go of its WAL; if \
                         not, the store has lost it: restore the objects below tenants/{tenant} from the bucket's versions, then start this \
                         server again"
                    )));
                }
            },
        };
        match claim(&state, &held, self.context.wal_log) {
            Claim::Void => {
                self.context.forget_void(held).await;
                return Ok(());
            }
            Claim::Unknown => {
                return Err(Unsettled::unknown(format!(
                    "the log of tenant {tenant} knows no timeline {timeline}: if its branch was deleted, 'varve wal forget {tenant} {timeline}' \
                     lets go of its WAL; if not, the newest objects below tenants/{tenant}/log are lost: restore them from the bucket's versions"
                )));
            }
            Claim::Needed => {}
        }
        let me = self.context.wal_log.to_string();
        if let Some(owner) = state.owner().filter(|owner| owner.server != me) {
            if !self.tenants.is_known(tenant) {
                self.tenants.note_lost(tenant, LostTo::from(owner));
            }
            return Err(Unsettled::for_now("another server has taken the tenant over; its computes send there what that one lacks"));
        }
        let owned = self.tenants.own(tenant, "the WAL log holds WAL of it").await.map_err(Unsettled::for_now)?;
        owned.timeline(timeline).await.map(drop).map_err(Unsettled::for_now)
    }

    /// Lets go of WAL of which no log in the store knows, at an operator's word. How many timelines' that was.
    pub async fn forget_orphans(&self, tenant: TenantId, timeline: Option<TimelineId>) -> usize {
        // What was unknown a while ago may be known by now.
        self.settle_held().await;
        let is_meant = |orphan: &&OrphanedWal| {
            orphan.is_unknown && orphan.tenant == tenant && timeline.is_none_or(|timeline| timeline == orphan.timeline)
        };
        let meant: Vec<TimelineId> = self.orphans.lock().iter().filter(is_meant).map(|orphan| orphan.timeline).collect();
        let held = self.context.wal.unattached();
        let held = held.into_iter().filter(|held| held.tenant == tenant && meant.contains(&held.timeline));
        let count = meant.len();
        for held in held {
            self.context.forget_void(held).await;
        }
        self.settle_held().await;
        tracing::warn!(%tenant, timelines = count, "WAL of which no log in the store knows was given up, as an operator said");
        count
    }

    /// WAL in the WAL log that cannot be put into the store.
    pub fn orphans(&self) -> Vec<OrphanedWal> {
        self.orphans.lock().clone()
    }
}
