//! Verification by itself: who is due, one after the other.
//!
//! A tenant's own interval stands in its log, so each log is read once after a start, and again when something about it
//! may be due. Reading takes nothing over and wakes nobody. Tenants that were never verified get a first time by
//! chance, within their interval, so that thousands that sleep are not woken at once; those that are overdue wait in a
//! queue for one of few places. One whose history did not change since it was found sound is passed over.
//!
//! The same look finds what a server that was killed left behind.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use varve_storage::ids::{TenantId, TenantName};
use varve_storage::tenant_log::{TenantState, VerifiedOutcome, names};

use super::moments::Asked;
use crate::Control;
use crate::call::Call;
use crate::error::Error;
use crate::logs::facts;
use crate::ports::Pageserver;

/// How often it is looked who is due.
const TICK: Duration = Duration::from_secs(1);
/// Logs that are read in one of these: a server with many tenants reads them over some minutes.
const LOOKS_PER_TICK: usize = 20;
/// Names that a list reads at once.
const NAMES_AT_ONCE: usize = 1000;
/// After how long the store's names are listed again when that failed.
const LIST_PAUSE_MICROS: i64 = 60 * 1_000_000;
/// How often they are listed, for tenants that others made or gave away.
const LIST_INTERVAL_MICROS: i64 = 3600 * MICROS;
/// When a tenant is looked at again that is not to be verified, or is another server's.
const LATER_MICROS: i64 = 24 * 3600 * MICROS;
const NOT_OURS_MICROS: i64 = 3600 * MICROS;
/// When one is tried again that could not be looked at, or whose verification said nothing of the data.
const AGAIN_MICROS: i64 = 3600 * MICROS;
/// When it is tried again to read a log, or to take away what was left.
const SOON_MICROS: i64 = 60 * MICROS;
const MICROS: i64 = 1_000_000;

/// How a server verifies restores by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyConfig {
    /// How often those tenants are verified that say nothing else; none: never.
    pub every: Option<Duration>,
    /// Verifications at once, those that people began included.
    pub at_once: usize,
}

/// What is known of when a tenant is to be looked at.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Microseconds since 2000-01-01 UTC.
    at: i64,
    /// Whether its first time was drawn.
    is_drawn: bool,
}

/// When which tenant is to be looked at.
#[derive(Debug, Default)]
pub(super) struct Plans {
    of: BTreeMap<TenantId, Plan>,
    due: BTreeSet<(i64, TenantId)>,
    /// Those that are due, in turn.
    queue: VecDeque<TenantId>,
}

impl Plans {
    fn put(&mut self, id: TenantId, plan: Plan) {
        if let Some(before) = self.of.insert(id, plan) {
            self.due.remove(&(before.at, id));
        }
        self.due.insert((plan.at, id));
    }

    /// Something about the tenant has changed.
    pub(super) fn changed(&mut self, id: TenantId, now: i64) {
        self.put(id, Plan { at: now, is_drawn: false });
    }

    /// Adds one that was not known.
    fn found(&mut self, id: TenantId, now: i64) {
        if !self.of.contains_key(&id) {
            self.changed(id, now);
        }
    }

    fn forget(&mut self, id: TenantId) {
        if let Some(before) = self.of.remove(&id) {
            self.due.remove(&(before.at, id));
        }
        self.queue.retain(|other| *other != id);
    }

    /// Those to look at by now, at most `limit`; they wait for a new plan.
    fn take_due(&mut self, now: i64, limit: usize) -> Vec<(TenantId, Plan)> {
        let taken: Vec<(i64, TenantId)> = self.due.range(..=(now, TenantId([255; 16]))).take(limit).copied().collect();
        for due in &taken {
            self.due.remove(due);
        }
        taken.into_iter().filter_map(|(_, id)| Some((id, *self.of.get(&id)?))).collect()
    }

    fn enqueue(&mut self, id: TenantId) {
        if !self.queue.contains(&id) {
            self.queue.push_back(id);
        }
    }
}

/// What a look at a tenant says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// There is no such tenant any more.
    Gone,
    /// To be looked at again then.
    At(i64),
    /// To be looked at again at a time by chance, so many microseconds from now at most.
    Within(i64),
    /// Due.
    Now,
    /// A verification of a server that ended is to be taken away.
    Left,
}

/// What the log of a tenant that is ours says.
fn look(state: &TenantState, every: Option<Duration>, now: i64, is_drawn: bool) -> Look {
    let every = match state.verify_every() {
        None => every.map(|every| i64::try_from(every.as_micros()).unwrap_or(i64::MAX)),
        Some(0) => None,
        Some(seconds) => Some(i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(MICROS)),
    };
    let Some(every) = every else { return Look::At(now.saturating_add(LATER_MICROS)) };
    let Some(last) = state.verified() else { return if is_drawn { Look::Now } else { Look::Within(every) } };
    let due = match last.outcome {
        VerifiedOutcome::Failed => last.ended.saturating_add(every.min(AGAIN_MICROS)),
        VerifiedOutcome::Sound | VerifiedOutcome::Damaged => last.began.begun.saturating_add(every),
    };
    if due > now {
        return Look::At(due);
    }
    let is_unchanged = last.began.history.is_some() && last.began.history == state.history_mark();
    if last.outcome == VerifiedOutcome::Sound && is_unchanged { Look::At(now.saturating_add(every)) } else { Look::Now }
}

impl<P: Pageserver> Control<P> {
    /// Verifies restores as tenants and `config` say, until `stopping`.
    pub async fn keep_verified(&self, config: VerifyConfig, stopping: &CancellationToken) {
        *self.verifications.plans.lock() = Some(Plans::default());
        let mut listed = None;
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                () = self.environment.sleep(TICK) => {}
            }
            let now = self.environment.now().0;
            if listed.is_none_or(|listed| now - listed >= LIST_INTERVAL_MICROS) {
                listed = Some(now);
                if let Err(error) = self.list_to_verify().await {
                    // Not at once: a name that cannot be read stays so.
                    listed = Some(now - LIST_INTERVAL_MICROS + LIST_PAUSE_MICROS);
                    tracing::warn!(%error, "tenants whose restores are to be verified were not all listed");
                }
            }
            let due = self.with_plans(|plans| plans.take_due(now, LOOKS_PER_TICK));
            for (id, plan) in due {
                self.look_at_tenant(id, config.every, plan.is_drawn).await;
            }
            while self.verifications.running.lock().len() < config.at_once
                && let Some(id) = self.with_plans(|plans| plans.queue.pop_front())
            {
                self.verify_one(id, config.every).await;
            }
        }
    }

    fn with_plans<T: Default>(&self, work: impl FnOnce(&mut Plans) -> T) -> T {
        self.verifications.plans.lock().as_mut().map(work).unwrap_or_default()
    }

    async fn list_to_verify(&self) -> Result<(), Error> {
        let mut after: Option<TenantName> = None;
        loop {
            let page = names::page(&self.store, "", after.as_ref(), NAMES_AT_ONCE).await?;
            let now = self.environment.now().0;
            self.with_plans(|plans| page.tenants.iter().for_each(|(_, id)| plans.found(*id, now)));
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// Looks what is to be done about a tenant, and plans that.
    async fn look_at_tenant(&self, id: TenantId, every: Option<Duration>, is_drawn: bool) {
        let now = self.environment.now().0;
        let looked = match self.read(id).await {
            Ok(state) => self.look(id, &state, every, is_drawn),
            Err(Error::UnknownTenant(_)) => Look::Gone,
            Err(error) => {
                tracing::debug!(tenant = %id, %error, "when its restores are due cannot be read");
                Look::At(now + SOON_MICROS)
            }
        };
        let plan = match looked {
            Look::Gone => {
                self.verifications.forget(id);
                self.with_plans(|plans| plans.forget(id));
                return;
            }
            Look::At(at) => Plan { at, is_drawn: false },
            Look::Within(micros) => {
                let chance = self.environment.random().map_or(0, u64::from_be_bytes);
                let wait = ((u128::from(chance) * u128::from(micros.unsigned_abs())) >> 64) as i64;
                Plan { at: now.saturating_add(wait), is_drawn: true }
            }
            Look::Now => {
                self.with_plans(|plans| plans.enqueue(id));
                Plan { at: now + NOT_OURS_MICROS, is_drawn: true }
            }
            Look::Left => {
                self.take_away(id);
                Plan { at: now + SOON_MICROS, is_drawn: false }
            }
        };
        // Something may have changed while that was read.
        self.with_plans(|plans| {
            if plans.of.get(&id).is_some_and(|known| known.at <= now) {
                plans.put(id, plan);
            }
        });
    }

    fn look(&self, id: TenantId, state: &TenantState, every: Option<Duration>, is_drawn: bool) -> Look {
        let now = self.environment.now().0;
        // Older releases did not say who made a tenant: then it is ours while it is awake here.
        let is_ours = self.owner(state, id).map_or_else(|| self.pageserver.owned(id).is_some(), |owner| owner.here);
        if !is_ours {
            self.verifications.forget(id);
            return Look::At(now + NOT_OURS_MICROS);
        }
        if let (Ok(facts), Some(last)) = (facts(state, id), state.verified()) {
            self.verifications.tell(id, &facts.name, last);
        }
        match (state.verifying().is_some(), self.verifications.running(id).is_some()) {
            (_, true) => Look::At(now + NOT_OURS_MICROS), // it says when it is over
            (true, false) => Look::Left,
            (false, false) => look(state, every, now, is_drawn),
        }
    }

    /// Takes away what a verification of a server that ended has left.
    fn take_away(&self, id: TenantId) {
        let Some(me) = self.me.upgrade() else { return };
        self.environment.spawn(async move {
            let turn = me.verifications.turns.take(id).await;
            let taken = async {
                let log = me.own_for_compute(id, "what a verification has left goes").await?;
                match log.state().verifying().cloned() {
                    Some(left) if me.verifications.running(id).is_none() => me.abandon(id, &log, &left).await,
                    _ => Ok(()),
                }
            };
            let taken = taken.await;
            drop(turn);
            match taken {
                Ok(()) => me.verifications.look_soon(id, me.environment.now()),
                Err(error) => tracing::warn!(tenant = %id, %error, "what a verification has left is not deleted yet; that is tried again"),
            }
        });
    }

    /// Verifies a branch of a tenant, by chance, if it is still due.
    async fn verify_one(&self, id: TenantId, every: Option<Duration>) {
        let now = self.environment.now().0;
        let begun = async {
            let state: Arc<TenantState> = self.read(id).await?;
            if self.look(id, &state, every, true) != Look::Now {
                return Ok(());
            }
            let branches: Vec<String> = state.branches().map(|(name, _)| name.to_string()).collect();
            let chance = u64::from_be_bytes(self.environment.random()?);
            let number = ((u128::from(chance) * branches.len() as u128) >> 64) as usize;
            let branch = branches.get(number).map_or("main", String::as_str);
            let log = self.own_for_compute(id, "a restore of it is verified").await?;
            let call = Call { actor: "schedule".to_owned(), ..Call::default() };
            self.begin_verification(&call, id, log, branch, Asked::Drawn(None)).await.map(drop)
        };
        let begun: Result<(), Error> = begun.await;
        match begun {
            // Who verifies says when it is over.
            Ok(()) if self.verifications.running(id).is_some() => {}
            Ok(()) => self.verifications.look_soon(id, self.environment.now()),
            Err(error) => {
                tracing::error!(tenant = %id, %error, "whether its restores work could not be verified; that is tried again");
                let wait = every.map_or(AGAIN_MICROS, |every| i64::try_from(every.as_micros()).unwrap_or(i64::MAX).min(AGAIN_MICROS));
                self.with_plans(|plans| plans.put(id, Plan { at: now.saturating_add(wait), is_drawn: true }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::Lsn;
    use varve_storage::ids::TimelineId;
    use varve_storage::tenant_log::{TenantEdit, TimelineFacts, VerifiedMoment, VerifiedRow, VerifyEveryRow, VerifyingRow};

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const DAY_MICROS: i64 = 24 * 3600 * MICROS;

    fn state(edits: &[TenantEdit]) -> TenantState {
        let timeline = TimelineId([1; 16]);
        let facts = TimelineFacts { id: timeline, ancestor: None, tli: 1, start: Lsn(8), created: 0 };
        let mut state = TenantState::default();
        let first = [TenantEdit::Timeline(facts), TenantEdit::Branch { name: "main".parse().unwrap(), timeline }];
        first.iter().chain(edits).for_each(|edit| state.apply(edit).unwrap());
        state
    }

    fn verified(outcome: VerifiedOutcome, history: Option<u64>) -> TenantEdit {
        let timeline = TimelineId([1; 16]);
        let of = VerifiedMoment { branch: "main".parse().unwrap(), timeline, lsn: Lsn(8), time: None, seed: None };
        TenantEdit::Verified(Box::new(VerifiedRow {
            began: VerifyingRow { timeline: TimelineId([2; 16]), of, begun: 1000, history },
            ended: 2000,
            outcome,
            problems: Vec::new(),
            branch_ms: 0,
            start_ms: None,
            check_ms: None,
            databases: 0,
            relations: 0,
            pages: 0,
        }))
    }

    #[test]
    fn the_tenants_word_comes_before_the_servers() {
        let every = |seconds| TenantEdit::VerifyEvery(VerifyEveryRow { seconds });
        assert_eq!(look(&state(&[]), None, 5, false), Look::At(5 + LATER_MICROS), "off");
        assert_eq!(look(&state(&[every(Some(0))]), Some(DAY), 5, false), Look::At(5 + LATER_MICROS), "off for this one");
        assert_eq!(look(&state(&[]), Some(DAY), 5, false), Look::Within(DAY_MICROS));
        assert_eq!(look(&state(&[every(Some(60))]), None, 5, false), Look::Within(60 * MICROS));
        assert_eq!(look(&state(&[every(Some(60)), every(None)]), Some(DAY), 5, true), Look::Now);
    }

    #[test]
    fn who_is_sound_and_did_not_change_is_passed_over() {
        let mark = state(&[]).history_mark();
        let at = |outcome, history, now| look(&state(&[verified(outcome, history)]), Some(DAY), now, false);
        let due = 1000 + DAY_MICROS;
        assert_eq!(at(VerifiedOutcome::Sound, mark, due - 1), Look::At(due));
        assert_eq!(at(VerifiedOutcome::Sound, mark, due), Look::At(due + DAY_MICROS));
        assert_eq!(at(VerifiedOutcome::Sound, Some(1), due), Look::Now, "it has changed");
        assert_eq!(at(VerifiedOutcome::Sound, None, due), Look::Now, "it was being written then");
        assert_eq!(at(VerifiedOutcome::Damaged, mark, due), Look::Now);
        assert_eq!(at(VerifiedOutcome::Failed, mark, 2000), Look::At(2000 + AGAIN_MICROS), "sooner than the next time");
    }

    #[test]
    fn plans_come_in_order_and_each_tenant_has_one() {
        let mut plans = Plans::default();
        let id = |number| TenantId([number; 16]);
        plans.found(id(1), 10);
        plans.found(id(2), 5);
        plans.put(id(1), Plan { at: 3, is_drawn: true });
        plans.found(id(1), 1);
        let ids = |taken: Vec<(TenantId, Plan)>| taken.into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(ids(plans.take_due(4, 9)), [id(1)]);
        assert_eq!(ids(plans.take_due(9, 9)), [id(2)]);
        assert_eq!(ids(plans.take_due(99, 9)), []);
        plans.changed(id(2), 7);
        plans.enqueue(id(2));
        plans.enqueue(id(2));
        assert_eq!((plans.due.len(), plans.queue.len()), (1, 1));
        plans.forget(id(2));
        assert_eq!((plans.due.len(), plans.queue.len(), plans.of.len()), (0, 0, 1));
    }
}
