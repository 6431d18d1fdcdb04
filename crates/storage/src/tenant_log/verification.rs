//! Whether a restore works: what is being verified, what came of it last, and how often it is done.

use std::sync::Arc;

use super::edit::{TenantEdit, VerifiedRow, VerifyEveryRow, VerifyingRow};
use super::state::TenantState;
use crate::ids::TimelineId;

/// What a tenant's log says of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Verification {
    under_way: Option<Arc<VerifyingRow>>,
    last: Option<Arc<VerifiedRow>>,
    every: Option<VerifyEveryRow>,
}

impl Verification {
    /// Takes an edit in, if it is one of these.
    pub(super) fn apply(&mut self, edit: &TenantEdit) {
        match edit {
            TenantEdit::Verifying(row) => self.under_way = Some(Arc::new(row.clone())),
            TenantEdit::Verified(row) => {
                self.under_way = None;
                self.last = Some(Arc::new(VerifiedRow::clone(row)));
            }
            TenantEdit::VerifyEvery(row) => self.every = Some(*row),
            _ => {}
        }
    }

    /// The edits that make this from nothing.
    pub(super) fn edits(&self) -> impl Iterator<Item = TenantEdit> {
        let last = self.last.iter().map(|row| TenantEdit::Verified(Box::new(VerifiedRow::clone(row))));
        let under_way = self.under_way.iter().map(|row| TenantEdit::Verifying(VerifyingRow::clone(row)));
        // What is under way counts from its own row on, which follows the last result.
        self.every.map(TenantEdit::VerifyEvery).into_iter().chain(last).chain(under_way)
    }
}

/// FNV-1a, 64 bits: what it makes of the same bytes stays the same for ever, since it is kept.
struct Fnv(u64);

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl TenantState {
    /// What is being verified, or was when its server ended.
    pub fn verifying(&self) -> Option<&Arc<VerifyingRow>> {
        self.verification.under_way.as_ref()
    }

    /// Whether a timeline was made to see whether a restore works, and goes when that is known.
    pub fn is_verifying(&self, timeline: TimelineId) -> bool {
        self.verifying().is_some_and(|row| row.timeline == timeline)
    }

    /// What the last verification came to.
    pub fn verified(&self) -> Option<&Arc<VerifiedRow>> {
        self.verification.last.as_ref()
    }

    /// How often it is to be verified, in seconds: 0 is never; none is as the tenant's server says.
    pub fn verify_every(&self) -> Option<u64> {
        self.verification.every?.seconds
    }

    /// A number that stays as long as nobody writes to the tenant's branches, makes any or removes any, but for those
    /// of verifications; none while it is not known where one of them ends.
    pub fn history_mark(&self) -> Option<u64> {
        let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
        for (name, timeline) in self.branches().filter(|(_, timeline)| !self.is_verifying(*timeline)) {
            let state = self.timeline(timeline).ok()?;
            // Of one that is being written nobody knows the end.
            if state.epochs.last().is_some_and(|epoch| epoch.closed.is_none()) {
                return None;
            }
            hash.add(name.as_str().as_bytes());
            hash.add(&timeline.0);
            hash.add(&self.head_of(timeline).ok()??.0.to_be_bytes());
        }
        Some(hash.0)
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::Lsn;

    use super::*;
    use crate::ids::{WalLogId, WriterEpoch};
    use crate::tenant_log::{Ancestor, TenantError, TimelineFacts, VerifiedMoment, VerifiedOutcome};

    fn facts(id: u8, ancestor: Option<u8>) -> TimelineFacts {
        let ancestor = ancestor.map(|id| Ancestor { timeline: TimelineId([id; 16]), lsn: Lsn(100) });
        TimelineFacts { id: TimelineId([id; 16]), ancestor, tli: u32::from(id), start: Lsn(100), created: 0 }
    }

    fn began(id: u8) -> VerifyingRow {
        let timeline = TimelineId([1; 16]);
        let of = VerifiedMoment { branch: "main".parse().unwrap(), timeline, lsn: Lsn(100), time: None, seed: Some(7) };
        VerifyingRow { timeline: TimelineId([id; 16]), of, begun: 5, history: Some(9) }
    }

    fn tenant() -> TenantState {
        let mut state = TenantState::default();
        let main = TenantEdit::Branch { name: "main".parse().unwrap(), timeline: TimelineId([1; 16]) };
        [TenantEdit::Timeline(facts(1, None)), main].iter().for_each(|edit| state.apply(edit).unwrap());
        state
    }

    fn with(state: &TenantState, edits: &[TenantEdit]) -> TenantState {
        let mut state = state.clone();
        edits.iter().for_each(|edit| state.apply(edit).unwrap());
        state
    }

    fn verifies(state: &TenantState) -> TenantState {
        let mut edits = state.create_branch(&"verify_restore_1".parse().unwrap(), &facts(2, Some(1))).unwrap();
        edits.push(TenantEdit::Verifying(began(2)));
        with(state, &edits)
    }

    #[test]
    fn a_snapshot_has_it_all() {
        let result = VerifiedRow {
            began: began(3),
            ended: 6,
            outcome: VerifiedOutcome::Damaged,
            problems: vec!["x".to_owned()],
            branch_ms: 1,
            start_ms: Some(2),
            check_ms: None,
            databases: 3,
            relations: 4,
            pages: 5,
        };
        let every = TenantEdit::VerifyEvery(VerifyEveryRow { seconds: Some(60) });
        let state = verifies(&with(&tenant(), &[every, TenantEdit::Verified(Box::new(result.clone()))]));
        let again = with(&TenantState::default(), &state.edits());
        assert_eq!(again.verified().map(|row| VerifiedRow::clone(row)), Some(result.clone()));
        assert_eq!(again.verifying().map(|row| VerifyingRow::clone(row)), Some(began(2)));
        assert_eq!(again.verify_every(), Some(60));
        let done = with(&again, &[TenantEdit::Verified(Box::new(result))]);
        assert!(done.verifying().is_none(), "a result ends what was under way");
    }

    #[test]
    fn a_branch_that_verifies_may_not_be_the_last_one_and_can_always_go() {
        let state = verifies(&tenant());
        assert!(matches!(state.delete_branch("main"), Err(TenantError::LastBranch(_))));
        let edits = state.delete_branch("verify_restore_1").unwrap();
        assert!(with(&state, &edits).branch("verify_restore_1").is_err());
    }

    #[test]
    fn the_mark_is_of_what_was_written_and_not_of_verifications() {
        let state = tenant();
        let mark = state.history_mark().unwrap();
        assert_eq!(verifies(&state).history_mark(), Some(mark));
        let (timeline, epoch) = (TimelineId([1; 16]), WriterEpoch(1));
        let written = with(&state, &[TenantEdit::Epoch { timeline, epoch, lsn: Lsn(100), wal_log: WalLogId([0; 16]) }]);
        assert_eq!(written.history_mark(), None, "it is being written");
        let closed = with(&written, &[TenantEdit::EpochClosed { timeline, epoch, lsn: Lsn(200) }]);
        assert!(closed.history_mark().is_some_and(|now| now != mark));
        let named = with(&state, &state.rename_branch("main", &"other".parse().unwrap()).unwrap());
        assert!(named.history_mark().is_some_and(|now| now != mark));
    }
}
