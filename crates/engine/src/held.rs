//! What the WAL log holds of timelines that are not open: what of it is needed still, by the word of their tenants'
//! logs, and what is let go of.
//!
//! A deletion may become durable without whoever asked for it hearing of it, and a tenant may go on at another server.
//! Nobody comes back for the WAL then, and a log that is full of it would stop every tenant.

use varve_storage::ids::WalLogId;
use varve_storage::tenant_log::TenantState;
use varve_storage::wal_log::Unattached;

use crate::context::Context;

/// What a tenant's log says of WAL of one of its timelines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The store may lack it.
    Needed,
    /// The timeline was deleted, or the newest writer's WAL is in layers, or in another server's log, which has all
    /// that came before.
    Void,
    /// The log knows no such timeline, and does not remember that there was one.
    Unknown,
}

/// What the tenant's log says of WAL that the WAL log `mine` holds.
pub fn claim(state: &TenantState, held: &Unattached, mine: WalLogId) -> Claim {
    if state.is_removed() || state.was_removed(held.timeline) {
        return Claim::Void;
    }
    let Ok(timeline) = state.timeline(held.timeline) else { return Claim::Unknown };
    match timeline.epochs.last() {
        // Of an epoch that is newer than all that the tenant's log knows, that log has lost something: whoever opens
        // the timeline will say so.
        Some(newest) if held.newest > newest.epoch => Claim::Needed,
        // An epoch is closed when all of it is in layers.
        Some(newest) if newest.wal_log != mine || newest.closed.is_some() => Claim::Void,
        _ => Claim::Needed,
    }
}

impl Context {
    /// Lets go of WAL that is [`Claim::Void`], unless its timeline was opened meanwhile.
    pub async fn forget_void(&self, held: Unattached) {
        let wal = self.wal.clone();
        let Unattached { tenant, timeline, .. } = held;
        match self.threads.call(move || wal.forget_unattached(held)).await {
            Ok(Ok(true)) => tracing::info!(%tenant, %timeline, "the WAL log lets go of WAL that the tenant's log says is not needed here"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(%tenant, %timeline, %error, "that WAL is not needed could not be written into the WAL log"),
            Err(error) => tracing::error!(%tenant, %timeline, %error, "WAL that is not needed was not let go of"),
        }
    }

    /// Moves out of the way what timelines that lag behind hold of the WAL log's oldest segments. Blocks.
    pub fn free_wal_log(&self) {
        loop {
            match self.wal.copy_laggards() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "what holds old segments of the WAL log could not be copied");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::Lsn;
    use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
    use varve_storage::tenant_log::{TenantEdit, TimelineFacts};

    use super::*;

    const MINE: WalLogId = WalLogId([1; 16]);
    const OTHERS: WalLogId = WalLogId([2; 16]);
    const TIMELINE: TimelineId = TimelineId([3; 16]);

    fn state(wal_log: WalLogId) -> TenantState {
        let mut state = TenantState::default();
        let facts = TimelineFacts { id: TIMELINE, ancestor: None, tli: 1, start: Lsn(0x100), created: 0 };
        state.apply(&TenantEdit::Timeline(facts)).unwrap();
        state.apply(&TenantEdit::Epoch { timeline: TIMELINE, epoch: WriterEpoch(2), lsn: Lsn(0x100), wal_log }).unwrap();
        state
    }

    #[test]
    fn the_tenants_log_says_what_is_needed() {
        let held = |newest| Unattached { tenant: TenantId([4; 16]), timeline: TIMELINE, newest: WriterEpoch(newest) };
        assert_eq!(claim(&state(MINE), &held(2), MINE), Claim::Needed);
        assert_eq!(claim(&state(OTHERS), &held(2), MINE), Claim::Void, "another log has it");
        assert_eq!(claim(&state(OTHERS), &held(3), MINE), Claim::Needed, "an epoch that the tenant's log has lost");
        let mut closed = state(MINE);
        closed.apply(&TenantEdit::EpochClosed { timeline: TIMELINE, epoch: WriterEpoch(2), lsn: Lsn(0x200) }).unwrap();
        assert_eq!(claim(&closed, &held(2), MINE), Claim::Void, "all of it is in layers");
        assert_eq!(claim(&closed, &held(3), MINE), Claim::Needed, "an epoch that the tenant's log has lost");
        let mut gone = state(MINE);
        gone.apply(&TenantEdit::TimelineRemoved { timeline: TIMELINE }).unwrap();
        assert_eq!(claim(&gone, &held(2), MINE), Claim::Void);
        assert_eq!(claim(&TenantState::default(), &held(2), MINE), Claim::Unknown);
        gone.apply(&TenantEdit::TenantRemoved).unwrap();
        assert_eq!(claim(&gone, &Unattached { timeline: TimelineId([5; 16]), ..held(9) }, MINE), Claim::Void, "the tenant is deleted");
    }
}
