//! Where a timeline stands: one set of positions, read by whoever serves, receives or tells of it, and waiting for
//! them.
//!
//! - *head*: end of the last whole record that is durable here. It moves before a commit is acknowledged, so it covers
//!   every acknowledged commit.
//! - *applied*: everything up to here can be read; it follows head.
//! - *layered*: everything up to here is in published layers; it follows applied.
//! - *stored*: everything up to here is in the store, as WAL or in layers; it is at least layered.
//!
//! All only grow. To move one costs next to nothing while nobody waits. A wait takes no thread: it is a future,
//! and over when that is dropped.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use varve_postgres::Lsn;

use crate::ids::TimelineId;

/// Which of a timeline's positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// See the module's doc.
    Head,
    /// See the module's doc.
    Applied,
    /// See the module's doc.
    Layered,
    /// See the module's doc.
    Stored,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Position::Head => "durable",
            Position::Applied => "applied",
            Position::Layered => "in layers",
            Position::Stored => "in the store",
        })
    }
}

/// Why nothing more is applied.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// What was applied then.
    pub at: Lsn,
    /// The error that stopped it.
    pub reason: Arc<dyn Error + Send + Sync>,
}

/// A wait that did not come about.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WaitError {
    /// The time is over.
    #[error("timeline {timeline} is {position} up to {now}, not up to {lsn}, and its WAL ends at {head}")]
    Deadline {
        /// The timeline.
        timeline: TimelineId,
        /// Which position.
        position: Position,
        /// What was waited for.
        lsn: Lsn,
        /// Where that position is.
        now: Lsn,
        /// Where head is.
        head: Lsn,
    },
    /// Nothing more will be applied.
    #[error("timeline {timeline} stopped at {}, before {lsn}: {}", .stopped.at, .stopped.reason)]
    Stopped {
        /// The timeline.
        timeline: TimelineId,
        /// What was waited for.
        lsn: Lsn,
        /// Where and why.
        stopped: Stopped,
    },
    /// The timeline is being closed here.
    #[error("timeline {timeline} is being closed by this server")]
    Closing {
        /// The timeline.
        timeline: TimelineId,
    },
}

/// See the module's doc.
pub struct Positions {
    timeline: TimelineId,
    head: AtomicU64,
    applied: AtomicU64,
    layered: AtomicU64,
    stored: AtomicU64,
    stopped: OnceLock<Stopped>,
    closing: OnceLock<()>,
    waiters: AtomicUsize,
    notify: Notify,
}

impl Positions {
    pub(super) fn new(timeline: TimelineId, applied: Lsn) -> Positions {
        let at = || AtomicU64::new(applied.0);
        Positions {
            timeline,
            head: at(),
            applied: at(),
            layered: at(),
            stored: at(),
            stopped: OnceLock::new(),
            closing: OnceLock::new(),
            waiters: AtomicUsize::new(0),
            notify: Notify::new(),
        }
    }

    fn of(&self, position: Position) -> &AtomicU64 {
        match position {
            Position::Head => &self.head,
            Position::Applied => &self.applied,
            Position::Layered => &self.layered,
            Position::Stored => &self.stored,
        }
    }

    /// Where `position` is.
    pub fn get(&self, position: Position) -> Lsn {
        Lsn(self.of(position).load(Ordering::SeqCst))
    }

    /// End of the last whole record that is durable here.
    pub fn head(&self) -> Lsn {
        self.get(Position::Head)
    }

    /// Everything up to here can be read.
    pub fn applied(&self) -> Lsn {
        self.get(Position::Applied)
    }

    /// Everything up to here is in published layers.
    pub fn layered(&self) -> Lsn {
        self.get(Position::Layered)
    }

    /// Everything up to here is in the store.
    pub fn stored(&self) -> Lsn {
        self.get(Position::Stored)
    }

    /// Why nothing more is applied, if so.
    pub fn stopped(&self) -> Option<&Stopped> {
        self.stopped.get()
    }

    /// Moves a position on, never back.
    pub fn raise(&self, position: Position, lsn: Lsn) {
        if self.of(position).fetch_max(lsn.0, Ordering::SeqCst) < lsn.0 {
            if position == Position::Layered {
                self.stored.fetch_max(lsn.0, Ordering::SeqCst);
            }
            self.wake();
        }
    }

    /// Nothing more is applied, for that reason; only the first counts.
    pub fn stop(&self, reason: Arc<dyn Error + Send + Sync>) {
        let at = self.applied();
        self.stopped.get_or_init(|| Stopped { at, reason });
        self.wake();
    }

    /// Ends all waiting: the timeline is being closed.
    pub fn close(&self) {
        self.closing.get_or_init(|| ());
        self.wake();
    }

    /// Whether the timeline is being closed.
    pub fn is_closing(&self) -> bool {
        self.closing.get().is_some()
    }

    /// Whether anybody waits for anything.
    pub fn is_awaited(&self) -> bool {
        self.waiters.load(Ordering::SeqCst) > 0
    }

    /// A waiter counts itself before it looks at what is there, so either it sees the news, or we see it.
    fn wake(&self) {
        if self.is_awaited() {
            self.notify.notify_waiters();
        }
    }

    /// Whether `lsn` is reached; an error if it never will be.
    fn check(&self, position: Position, lsn: Lsn) -> Result<bool, WaitError> {
        if self.get(position) >= lsn {
            return Ok(true);
        }
        if self.is_closing() {
            return Err(WaitError::Closing { timeline: self.timeline });
        }
        match self.stopped() {
            // What is applied may be put into the store yet; what was received may still be received.
            Some(stopped) if position == Position::Applied || position == Position::Layered && lsn > stopped.at => {
                // It may have come about just before the stop.
                let stopped = stopped.clone();
                let reached = self.get(position) >= lsn;
                if reached { Ok(true) } else { Err(WaitError::Stopped { timeline: self.timeline, lsn, stopped }) }
            }
            _ => Ok(false),
        }
    }

    /// Waits until `position` is at or beyond `lsn`, at most `limit`.
    ///
    /// # Errors
    /// [`WaitError`], when that does not happen in time, or never will.
    pub async fn wait(&self, position: Position, lsn: Lsn, limit: Duration) -> Result<(), WaitError> {
        if self.check(position, lsn)? {
            return Ok(());
        }
        let _waiter = Waiter::new(&self.waiters);
        let reached = async {
            loop {
                let notified = self.notify.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                if self.check(position, lsn)? {
                    return Ok(());
                }
                notified.await;
            }
        };
        match tokio::time::timeout(limit, reached).await {
            Ok(result) => result,
            Err(_) if self.check(position, lsn)? => Ok(()),
            Err(_) => {
                let (timeline, now, head) = (self.timeline, self.get(position), self.head());
                Err(WaitError::Deadline { timeline, position, lsn, now, head })
            }
        }
    }
}

/// Counts a waiter while it lives, so that one whose future is dropped is not counted for ever.
struct Waiter<'a>(&'a AtomicUsize);

impl Waiter<'_> {
    fn new(waiters: &AtomicUsize) -> Waiter<'_> {
        waiters.fetch_add(1, Ordering::SeqCst);
        Waiter(waiters)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: Duration = Duration::from_secs(20);

    fn positions() -> Arc<Positions> {
        Arc::new(Positions::new(TimelineId([1; 16]), Lsn(10)))
    }

    #[tokio::test]
    async fn each_of_many_waits_is_over_when_its_lsn_is_reached() {
        let positions = positions();
        let waiting: Vec<_> = (1..=1000u64)
            .map(|i| {
                let positions = positions.clone();
                tokio::spawn(async move {
                    positions.wait(Position::Applied, Lsn(10 + i), FAR).await.unwrap();
                    assert!(positions.applied() >= Lsn(10 + i));
                })
            })
            .collect();
        let raiser = positions.clone();
        let raised = std::thread::spawn(move || (11..=1010).for_each(|lsn| raiser.raise(Position::Applied, Lsn(lsn))));
        for waiter in waiting {
            waiter.await.unwrap();
        }
        raised.join().unwrap();
        assert!(!positions.is_awaited());
    }

    #[tokio::test]
    async fn a_wait_is_late_is_stopped_or_goes_away() {
        let positions = positions();
        let late = positions.wait(Position::Applied, Lsn(30), Duration::from_millis(5)).await.unwrap_err();
        assert!(late.to_string().contains("is applied up to 0/A, not up to 0/1E"), "{late}");
        let waiting = {
            let positions = positions.clone();
            tokio::spawn(async move { positions.wait(Position::Applied, Lsn(30), FAR).await })
        };
        let gone = {
            let positions = positions.clone();
            tokio::spawn(async move { positions.wait(Position::Head, Lsn(30), FAR).await })
        };
        while positions.waiters.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        gone.abort();
        assert!(gone.await.is_err());
        positions.raise(Position::Applied, Lsn(20));
        positions.stop(Arc::from(Box::<dyn Error + Send + Sync>::from("a record of rmgr 200")));
        assert!(waiting.await.unwrap().unwrap_err().to_string().contains("stopped at 0/14, before 0/1E: a record of rmgr 200"));
        positions.wait(Position::Applied, Lsn(20), FAR).await.expect("what is applied stays so");
        positions.raise(Position::Layered, Lsn(20));
        positions.wait(Position::Layered, Lsn(20), FAR).await.expect("and can be put into the store");
        assert!(!positions.is_awaited(), "who went away is not counted");
        positions.close();
        assert!(matches!(positions.wait(Position::Head, Lsn(30), FAR).await, Err(WaitError::Closing { .. })));
    }
}
