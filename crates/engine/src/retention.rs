//! How far back a tenant can go: cutoffs follow the clock, and what lies behind them is collected.
//!
//! A cutoff is a record boundary, so a position at or above it is never rounded down to one below. It is moved from
//! time to time only: each move is a write into the tenant's log, and until it is made, more than the window stays.

use std::sync::Arc;
use std::time::Duration;

use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::TimelineId;
use varve_storage::retained::Retained;
use varve_storage::tenant_log::{HistoryRow, TenantState, TimelineState, removed_timelines};

use crate::error::EngineError;
use crate::moments::{self, Found};
use crate::resolve::{Moment, resolve};
use crate::tenant::Tenant;
use crate::timeline::LiveTimeline;

/// Cutoffs move so many times in a window.
const MOVES_IN_A_WINDOW: u32 = 16;
/// Pause between two moves, at least and at most.
const PAUSE_MIN: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// Pause after which a cutoff moves though nothing is gained by it yet.
const IDLE_MOVE: Duration = Duration::from_secs(3600);
/// A timeline that was just opened is looked at after this long, even if the window is long.
const FIRST_LOOK: Duration = Duration::from_secs(20);
/// Pause while somebody waits until everything is collected.
const COLLECTED_POLL: Duration = Duration::from_millis(20);
/// How long he waits for one timeline.
const COLLECTED_MAX: Duration = Duration::from_secs(1800);

/// Pause between two looks at what could be collected.
fn between_looks(history: HistoryRow) -> Duration {
    let window = history.seconds.map_or(PAUSE_MAX, Duration::from_secs);
    (window / MOVES_IN_A_WINDOW).clamp(PAUSE_MIN, PAUSE_MAX)
}

/// Pause between two moves of a cutoff by which nothing is gained.
fn between_moves(history: HistoryRow) -> Duration {
    let window = history.seconds.map_or(IDLE_MOVE, Duration::from_secs);
    (window / MOVES_IN_A_WINDOW).clamp(PAUSE_MIN, IDLE_MOVE)
}

impl LiveTimeline {
    /// Where its own history could be cut off at `now`; `None` where all of it is within the window. Blocks.
    fn cutoff_at(&self, history: HistoryRow, now: Timestamp) -> Result<Option<Lsn>, EngineError> {
        let read = &**self.history();
        // Of a timeline that nobody goes on with the end may be gone.
        let (from, to) = (self.first_whole(), self.positions().applied().min(read.collected().top));
        if from >= to || !read.collected().holds(to) {
            return Ok(None);
        }
        let window = history.seconds.map(|seconds| i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000));
        let by_time = match window.map(|window| moments::moment(read, Timestamp(now.0.saturating_sub(window)), from, to)).transpose()? {
            Some(Found::At(boundary) | Found::AllOfIt(boundary)) => Some(boundary.end),
            Some(Found::Before) | None => None,
        };
        let oldest = history.wal_bytes.map(|bytes| Lsn(to.0.saturating_sub(bytes))).filter(|oldest| *oldest > from);
        let by_bytes = oldest.map(|oldest| moments::round_down(read, oldest, from, to)).transpose()?.map(|boundary| boundary.end);
        Ok(by_time.max(by_bytes).filter(|cutoff| *cutoff > from))
    }

    /// What its tenant's log says must stay readable; everything of a timeline that it does not know any more.
    pub(crate) fn retained(&self, state: &TenantState) -> Retained {
        let retained = state.retained(self.id()).unwrap_or_default();
        // What is still to come goes on from the end.
        if self.is_complete() { retained } else { retained.up_to(Lsn::MAX) }
    }

    /// Whether a collection is due.
    fn wants_collection(&self, state: &TenantState) -> bool {
        self.history().wants_collection(&self.retained(state))
    }
}

impl Tenant {
    /// Moves the cutoffs of open timelines to where the window begins at `now`, removes what has expired, and sees to
    /// it that what is not retained any more is collected in the background. Cheap when called often; `at_once` does
    /// not wait for the next time that something is due.
    ///
    /// # Errors
    /// When the log cannot be written; to be called again later. A history that cannot be read is logged, and keeps no
    /// other from being looked at.
    pub async fn look_after_history(&self, now: Timestamp, at_once: bool) -> Result<(), EngineError> {
        let history = self.log().state().history();
        let mut moves = Vec::new();
        let mut looked_at = Vec::new();
        for live in self.all_opened() {
            let pause = if live.looks().is_first() { between_looks(history).min(FIRST_LOOK) } else { between_looks(history) };
            if !at_once && !live.looks().is_due(pause) {
                continue;
            }
            match self.cutoff_of(&live, history, now, at_once).await {
                Ok(cutoff) => moves.extend(cutoff.map(|cutoff| (live.id(), cutoff))),
                // It may have been deleted meanwhile.
                Err(EngineError::Tenant(_)) => {}
                Err(error) => tracing::warn!(timeline = live.name(), %error, "where its history could be cut off is not known"),
            }
            looked_at.push(live);
        }
        self.commit_retention(moves, now).await?;
        let state = self.log().state();
        for live in looked_at.iter().filter(|live| live.wants_collection(&state)) {
            live.merge_soon();
        }
        Ok(())
    }

    /// Where a timeline is to be cut off now; `None` where that is not worth a write.
    async fn cutoff_of(
        &self,
        live: &Arc<LiveTimeline>,
        history: HistoryRow,
        now: Timestamp,
        at_once: bool,
    ) -> Result<Option<Lsn>, EngineError> {
        let looked = live.clone();
        let Some(cutoff) = self.context().threads.call(move || looked.cutoff_at(history, now)).await?? else { return Ok(None) };
        let state = self.log().state();
        let (cutoff, retained) = (cutoff.min(state.cutoff_max(live.id())?), state.retained(live.id())?);
        let is_due = || at_once || live.looks().is_move_due(between_moves(history));
        let moves = cutoff > retained.cutoff && (is_due() || live.history().wants_collection(&retained.from(cutoff)));
        if moves {
            live.looks().note_move();
        }
        Ok(moves.then_some(cutoff))
    }

    /// Writes the cutoffs and what has expired, in one entry; nothing where there is nothing. Timelines that only lived
    /// for what has expired are removed.
    async fn commit_retention(&self, moves: Vec<(TimelineId, Lsn)>, now: Timestamp) -> Result<(), EngineError> {
        let edits = |state: &TenantState| {
            let mut edits = state.expire(now.0)?;
            let gone: Vec<TimelineId> = removed_timelines(&edits).collect();
            let is_known = |(timeline, _): &&(TimelineId, Lsn)| !gone.contains(timeline) && state.timeline(*timeline).is_ok();
            for (timeline, cutoff) in moves.iter().filter(is_known) {
                edits.extend(state.cut_off(*timeline, *cutoff)?);
            }
            Ok::<_, EngineError>((edits, gone))
        };
        if edits(&self.log().state())?.0.is_empty() {
            return Ok(());
        }
        let mut removed = Vec::new();
        self.log()
            .commit(|state| {
                let (edits, gone) = edits(state)?;
                removed = gone;
                Ok::<_, EngineError>((edits, ()))
            })
            .await?;
        for timeline in removed {
            self.remove_timeline(timeline).await;
        }
        Ok(())
    }

    /// Keeps a position of a timeline readable for `duration` from `now` on, or longer. Gives until when. Asked for
    /// again and again, the log is written once in half of that time.
    ///
    /// # Errors
    /// [`varve_storage::tenant_log::TenantError::Collected`]; when the log cannot be written.
    pub async fn lease(&self, live: &Arc<LiveTimeline>, lsn: Lsn, now: Timestamp, duration: Duration) -> Result<Timestamp, EngineError> {
        let timeline = live.id();
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        if let Some(until) = self.log().state().leased_until(timeline, lsn).filter(|until| *until >= now.0.saturating_add(micros / 2)) {
            return Ok(Timestamp(until));
        }
        let until = now.0.saturating_add(micros);
        // A base backup there is one at the end of the last record.
        let boundary = resolve(live, Moment::Lsn(lsn)).await?;
        let edits = |state: &TenantState| {
            let mut edits = state.lease(timeline, lsn, until)?;
            if boundary.lsn != lsn {
                edits.extend(state.lease(boundary.timeline, boundary.lsn, until)?);
            }
            Ok::<_, EngineError>((edits, ()))
        };
        self.log().commit(edits).await?;
        Ok(Timestamp(until))
    }

    /// After how long all that it has now will have left its window, so that it is worth to collect it once more; none
    /// where there is nothing to gain, or no window.
    pub fn collects_after(&self) -> Option<Duration> {
        let state = self.log().state();
        // More than it was cut off at: what is above is behind the cutoff then.
        let has_history = |known: &TimelineState| {
            let top = state
                .retained(known.facts.id)
                .map_or(Lsn::MAX, |retained| retained.top.min(state.cutoff_max(known.facts.id).unwrap_or(Lsn::MAX)));
            known.figures.is_some_and(|figures| figures.head.min(top) > known.cutoff.max(known.facts.start))
        };
        let seconds = state.history().seconds?;
        state.timelines().any(has_history).then(|| Duration::from_secs(seconds))
    }

    /// Collects whatever is not retained at `now`, timeline by timeline, waits until that is done, and deletes orphans.
    ///
    /// # Errors
    /// When a timeline cannot be opened or read, or the log cannot be written; [`EngineError::NotCollected`].
    pub async fn collect_everything(&self, now: Timestamp) -> Result<(), EngineError> {
        let state = self.log().state();
        // A branch that nobody has written to has nothing of its own.
        let has_own = |state: &&TimelineState| !state.epochs.is_empty();
        let timelines: Vec<TimelineId> = state.timelines().filter(has_own).map(|state| state.facts.id).collect();
        let history = state.history();
        drop(state);
        self.commit_retention(Vec::new(), now).await?;
        for id in timelines {
            let live = match self.timeline(id).await {
                Ok(live) => live,
                // Deleted meanwhile.
                Err(EngineError::Tenant(_)) => continue,
                Err(error) => return Err(error),
            };
            // What a lost server has of it is still to come.
            if live.is_complete() {
                live.flush_all().await?;
            }
            if let Some(cutoff) = self.cutoff_of(&live, history, now, true).await? {
                self.commit_retention(vec![(id, cutoff)], now).await?;
            }
            let begun = live.now();
            while live.wants_collection(&self.log().state()) {
                let problem = match live.history().collect_problem() {
                    _ if live.is_closing() => Some("it is being closed".to_owned()),
                    None if live.now().duration_since(begun) > COLLECTED_MAX => Some("it takes long".to_owned()),
                    problem => problem,
                };
                if let Some(problem) = problem {
                    return Err(EngineError::NotCollected { timeline: id, problem });
                }
                live.touch();
                live.merge_soon();
                tokio::time::sleep(COLLECTED_POLL).await;
            }
        }
        let orphans = self.delete_orphans(now).await?;
        if orphans > 0 {
            tracing::info!(tenant = %self.name(), orphans, "objects that nothing referred to were deleted");
        }
        Ok(())
    }
}
