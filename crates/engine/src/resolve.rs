//! From a moment as somebody asks for it to a record boundary in one timeline's own history.

use std::sync::Arc;
use std::time::Duration;

use varve_postgres::{Lsn, Timestamp};
use varve_storage::timeline::{Position, WaitError};

pub use varve_storage::moment::{Moment, Resolved};

use crate::error::EngineError;
use crate::moments::{self, Found, MomentError};
use crate::timeline::LiveTimeline;

/// How long a question about the past waits for ingest.
const INGEST_WAIT_MAX: Duration = Duration::from_secs(60);

/// How long an LSN may be on its way from the compute that wrote it.
const ARRIVAL_WAIT_MAX: Duration = Duration::from_secs(3);

/// Finds the boundary that `moment` means on a timeline, or on the ancestor in whose history it lies. For what may be
/// newer than what is known here it waits for the compute that has the tail.
///
/// # Errors
/// [`MomentError`] for what is in the future or before the history; when it cannot be read.
pub async fn resolve(live: &Arc<LiveTimeline>, moment: Moment) -> Result<Resolved, EngineError> {
    // What is sure already stays as it is, whatever the newest writer may have besides.
    if !matches!(moment, Moment::Lsn(lsn) if lsn <= live.sure_end()) {
        live.wait_tail().await?;
    }
    // What a compute has just written, and somebody else has heard of, is on its way.
    if let Moment::Lsn(lsn) = moment
        && live.has_stream()
    {
        match live.positions().wait(Position::Head, lsn, ARRIVAL_WAIT_MAX).await {
            Ok(()) | Err(WaitError::Deadline { .. } | WaitError::Stopped { .. }) => {}
            Err(closing) => return Err(closing.into()),
        }
    }
    let head = live.positions().head();
    match moment {
        Moment::Head => Ok(Resolved { timeline: live.id(), lsn: head }),
        Moment::Lsn(lsn) if lsn > head => Err(MomentError::Future { lsn, end: head }.into()),
        Moment::Lsn(lsn) if lsn < live.first_lsn() => Err(MomentError::BeforeHistory { lsn, start: live.first_lsn() }.into()),
        Moment::Lsn(lsn) => {
            let owner = live.owners(head).into_iter().find(|(owner, _)| lsn >= owner.facts().start);
            let (owner, limit) = owner.ok_or(MomentError::BeforeHistory { lsn, start: live.first_lsn() })?;
            let lsn = lsn.min(limit);
            // What comes later does not matter: ingest may lag, or have stopped there.
            in_history(&owner, lsn, move |owner| {
                let collected = owner.history().collected();
                if !collected.holds(lsn) && lsn > owner.facts().start {
                    return Err(MomentError::Collected { earliest: owner.first_whole() }.into());
                }
                // Of a timeline that nobody goes on with the end may be gone.
                let newest = limit.min(owner.positions().applied());
                let known = if collected.holds(newest) { newest } else { lsn };
                let boundary = moments::round_down(&**owner.history(), lsn, owner.facts().start, known)?;
                Ok(Resolved { timeline: owner.id(), lsn: boundary.end })
            })
            .await
        }
        Moment::Time(at) => resolve_time(live, head, at).await,
    }
}

async fn resolve_time(live: &Arc<LiveTimeline>, head: Lsn, at: Timestamp) -> Result<Resolved, EngineError> {
    for (owner, limit) in live.owners(head) {
        let found =
            in_history(&owner, limit, move |owner| Ok(moments::moment(&**owner.history(), at, owner.first_whole().min(limit), limit)?))
                .await?;
        match found {
            // It may lie where the history is collected, and then in no ancestor's.
            Found::Before if owner.first_whole() > owner.facts().start => {
                return Err(MomentError::Collected { earliest: owner.first_whole() }.into());
            }
            Found::Before => {}
            Found::At(boundary) | Found::AllOfIt(boundary) => return Ok(Resolved { timeline: owner.id(), lsn: boundary.end }),
        }
    }
    Err(MomentError::BeforeTime { at }.into())
}

/// When the last transaction before the boundary `lsn` in the timeline's own history ended; none before any.
///
/// # Errors
/// When it cannot be read.
pub async fn time_at(owner: &Arc<LiveTimeline>, lsn: Lsn) -> Result<Option<Timestamp>, EngineError> {
    in_history(owner, lsn, move |owner| {
        let boundary = moments::round_down(&**owner.history(), lsn, owner.facts().start, lsn)?;
        Ok((boundary.time_max != Timestamp::MIN).then_some(boundary.time_max))
    })
    .await
}

/// Runs `work` on a thread that may block, once the timeline is applied up to `lsn`.
async fn in_history<T: Send + 'static>(
    live: &Arc<LiveTimeline>,
    lsn: Lsn,
    work: impl FnOnce(&LiveTimeline) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    live.wait_applied(lsn, INGEST_WAIT_MAX).await?;
    let owner = live.clone();
    live.threads().call(move || work(&owner)).await?
}
