//! Moves the base of a mount on when what Postgres has written fills the cache: what the page service has as well by
//! then can be dropped ([`crate::mount::Rebaser`]).
//!
//! A round sets a mark, makes a checkpoint, and waits until the store has its redo point R. The page service could read
//! at R sooner. But what it has on its own disk alone may be lost, and it would get it again from a Postgres that may
//! need pages at R to give it. Then the control plane is told of R, so that nobody throws it away, and the base moves.
//!
//! An idle server makes no checkpoint of its own, so it is asked for one. It writes what is dirty and costs little
//! more: nothing is synced, and no full pages are logged. It runs in a session with a database, a walsender's, which
//! takes no place of the tenant's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use varve_postgres::{BLCKSZ, Lsn};

use crate::cache_report::Reporter;
use crate::mount::{Rebaser, Tally, Terms};
use crate::page_fetcher::PageFetcher;
use crate::sessions::{Checkpointed, SessionError, Sessions};

/// Rest between two rounds, at least;
const REST_MIN: Duration = Duration::from_secs(1);
/// and so many times as long as the checkpoint took.
const REST_CHECKPOINTS: u32 = 4;
/// Rest after rounds that came to little, at most.
const REST_MAX: Duration = Duration::from_secs(60);
/// A round came to little when less than this share of what had been written was handed over, or will be in the next.
/// Then this share of the budget is written before the next.
const LITTLE_SHARE: u64 = 16;
/// How often it is asked whether the store has R: after this time, then after twice as long each time, up to a second.
const STORED_POLL: Duration = Duration::from_millis(100);
const STORED_POLL_MAX: Duration = Duration::from_secs(1);
/// How long a round waits for that.
const STORED_MAX: Duration = Duration::from_secs(120);

/// Why a round came to nothing.
#[derive(Debug, thiserror::Error)]
enum RebaseError {
    /// What Postgres says.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The mount, or its base.
    #[error(transparent)]
    Mount(#[from] std::io::Error),
    /// The control plane does not hear where the base is to be.
    #[error("the control plane is not told: {0}")]
    Told(#[from] varve_api::client::ClientError),
    /// The store does not get it.
    #[error("the store does not have {0} yet")]
    NotStored(Lsn),
    /// Halves of a page that was dropped would be of two versions.
    #[error("pages have checksums: what was written stays")]
    Checksums,
}

/// Moves the base on again and again, for as long as Postgres runs.
pub(crate) async fn keep(rebaser: Rebaser, sessions: Sessions, base: Arc<PageFetcher>, reporter: Arc<Reporter>) {
    let rebaser = Arc::new(rebaser);
    let mut rest = REST_MIN;
    loop {
        rebaser.crowded().await;
        let stayed = rebaser.stays();
        let round = round(&rebaser, &sessions, &base, &reporter).await;
        base.announce(None);
        rest = match round {
            Ok((tally, took)) => {
                tracing::debug!(?tally, took_ms = took.as_millis(), "the base of the mount moved on");
                // What was written lately will be old in the next one.
                if (tally.handed_over + tally.recent) * BLCKSZ as u64 <= stayed / LITTLE_SHARE {
                    // The next one would come to no more before more is written. So an idle server is left alone.
                    wait_for_writes(&rebaser, (rest * 2).min(REST_MAX)).await
                } else {
                    (took * REST_CHECKPOINTS).clamp(REST_MIN, REST_MAX)
                }
            }
            Err(error) => {
                tracing::warn!(%error, "what was written stays in the cache for now");
                (rest * 2).min(REST_MAX)
            }
        };
        sleep(rest).await;
    }
}

/// Waits for this time, and for as long again as too little is written. Gives the time.
async fn wait_for_writes(rebaser: &Rebaser, rest: Duration) -> Duration {
    let before = rebaser.written();
    loop {
        sleep(rest).await;
        if rebaser.written() - before > rebaser.limit() / LITTLE_SHARE {
            return rest;
        }
    }
}

/// One round; gives how long its checkpoint took.
async fn round(
    rebaser: &Arc<Rebaser>,
    sessions: &Sessions,
    base: &Arc<PageFetcher>,
    reporter: &Reporter,
) -> Result<(Tally, Duration), RebaseError> {
    let marker = rebaser.clone();
    blocking(move || marker.mark()).await?;
    let began = Instant::now();
    let Checkpointed { redo, oldest_running, checksums } = sessions.checkpoint().await?;
    let took = began.elapsed();
    if checksums {
        return Err(RebaseError::Checksums);
    }
    wait_until_stored(sessions, redo).await?;
    let waiting = base.clone();
    blocking(move || waiting.wait_for(redo)).await?;
    base.announce(Some(redo));
    reporter.send().await?;
    let (mover, terms) = (rebaser.clone(), Terms { redo, oldest_running });
    let tally = blocking(move || mover.move_to(&terms)).await?;
    // What was before may go from here on, but for calls that are under way; they count until the next report.
    if let Err(error) = reporter.send().await {
        tracing::debug!(%error, "the control plane hears later where the base is");
    }
    Ok((tally, took))
}

async fn wait_until_stored(sessions: &Sessions, redo: Lsn) -> Result<(), RebaseError> {
    let (deadline, mut poll) = (Instant::now() + STORED_MAX, STORED_POLL);
    while sessions.stored().await?.is_none_or(|stored| stored < redo) {
        if Instant::now() > deadline {
            return Err(RebaseError::NotStored(redo));
        }
        sleep(poll).await;
        poll = (poll * 2).min(STORED_POLL_MAX);
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}
