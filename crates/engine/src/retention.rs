//! How far back a tenant can go: cutoffs follow the clock, and what lies behind them is collected.
//!
//! A cutoff is a record boundary, so a position at or above it is never rounded down to one below. It is moved from
//! time to time only: each move is a write into the tenant's log, and until it is made, more than the window stays.

use std::time::Duration;

use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::TimelineId;
use varve_storage::retained::Retained;
use varve_storage::tenant_log::{HistoryRow, TenantState, TimelineState, removed_timelines};

use crate::error::EngineError;
use crate::moments::{self, Found};
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
        let (from, to) = (self.first_whole(), self.positions().applied());
        let read = &**self.history();
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
    /// When a history cannot be read, or the log cannot be written; to be called again later.
    pub async fn look_after_history(&self, now: Timestamp, at_once: bool) -> Result<(), EngineError> {
        let history = self.log().state().history();
        let mut moves = Vec::new();
        let mut looked_at = Vec::new();
        for live in self.all_opened() {
            let pause = if live.looks().is_first() { between_looks(history).min(FIRST_LOOK) } else { between_looks(history) };
            if !at_once && !live.looks().is_due(pause) {
                continue;
            }
            looked_at.push(live.clone());
            let looked = live.clone();
            let cutoff = self.context().threads.call(move || looked.cutoff_at(history, now)).await??;
            let Some(cutoff) = cutoff else { continue };
            let state = self.log().state();
            let (cutoff, retained) = (cutoff.min(state.cutoff_max(live.id())?), state.retained(live.id())?);
            // Else the log is written for nothing.
            let is_moved = cutoff > retained.cutoff;
            let is_due = || at_once || live.looks().is_move_due(between_moves(history));
            if is_moved && (is_due() || live.history().wants_collection(&retained.from(cutoff))) {
                moves.push((live.id(), cutoff));
                live.looks().note_move();
            }
        }
        let removed = self.commit_retention(moves, now).await?;
        for timeline in removed {
            self.remove_timeline(timeline).await;
        }
        let state = self.log().state();
        for live in looked_at.iter().filter(|live| live.wants_collection(&state)) {
            live.merge_soon();
        }
        Ok(())
    }

    /// Writes the cutoffs and what has expired, in one entry; nothing where there is nothing. Gives the timelines that
    /// are gone.
    async fn commit_retention(&self, moves: Vec<(TimelineId, Lsn)>, now: Timestamp) -> Result<Vec<TimelineId>, EngineError> {
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
            return Ok(Vec::new());
        }
        let mut removed = Vec::new();
        self.log()
            .commit(|state| {
                let (edits, gone) = edits(state)?;
                removed = gone;
                Ok::<_, EngineError>((edits, ()))
            })
            .await?;
        Ok(removed)
    }

    /// Keeps a position of a timeline readable for `duration` from `now` on, or longer. Gives until when. Asked for
    /// again and again, the log is written once in half of that time.
    ///
    /// # Errors
    /// [`varve_storage::tenant_log::TenantError::Collected`]; when the log cannot be written.
    pub async fn lease(&self, timeline: TimelineId, lsn: Lsn, now: Timestamp, duration: Duration) -> Result<Timestamp, EngineError> {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        if let Some(until) = self.log().state().leased_until(timeline, lsn).filter(|until| *until >= now.0.saturating_add(micros / 2)) {
            return Ok(Timestamp(until));
        }
        let until = now.0.saturating_add(micros);
        self.log().commit(|state| Ok::<_, EngineError>((state.lease(timeline, lsn, until)?, ()))).await?;
        Ok(Timestamp(until))
    }

    /// After how long all that it has now will have left its window, so that it is worth to collect it once more; none
    /// where there is nothing to gain, or no window.
    pub fn collects_after(&self) -> Option<Duration> {
        let state = self.log().state();
        // More than it was cut off at: what is above is behind the cutoff then.
        let has_history = |state: &TimelineState| state.figures.is_some_and(|figures| figures.head > state.cutoff.max(state.facts.start));
        let seconds = state.history().seconds?;
        state.timelines().any(has_history).then(|| Duration::from_secs(seconds))
    }

    /// Opens all timelines, collects whatever is not retained at `now`, and waits until that is done.
    ///
    /// # Errors
    /// When a timeline cannot be opened or read, or the log cannot be written.
    pub async fn collect_everything(&self, now: Timestamp) -> Result<(), EngineError> {
        let timelines: Vec<TimelineId> = self.log().state().timelines().map(|state| state.facts.id).collect();
        // Children are looked at with their ancestors, which are open as long as they are.
        let mut opened = Vec::with_capacity(timelines.len());
        for id in timelines {
            match self.timeline(id).await {
                Ok(live) => opened.push(live),
                // Deleted meanwhile.
                Err(EngineError::Tenant(_)) => {}
                Err(error) => return Err(error),
            }
        }
        for live in &opened {
            live.flush_all().await?;
        }
        self.look_after_history(now, true).await?;
        for live in &opened {
            while live.wants_collection(&self.log().state()) {
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
