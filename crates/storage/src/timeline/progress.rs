//! What of a timeline is applied, and waiting for it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use varve_postgres::Lsn;

use crate::ids::TimelineId;

/// A wait for an LSN that did not come about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The deadline has passed.
    #[error(
        "timeline {timeline} is applied up to {applied}, and {lsn} did not arrive in time: check that its compute runs and streams WAL"
    )]
    Deadline {
        /// The timeline.
        timeline: TimelineId,
        /// What was waited for.
        lsn: Lsn,
        /// What is applied.
        applied: Lsn,
    },
    /// Nothing more will be applied.
    #[error("timeline {timeline} stopped at {applied}, before {lsn}: {reason}")]
    Stopped {
        /// The timeline.
        timeline: TimelineId,
        /// What was waited for.
        lsn: Lsn,
        /// What is applied.
        applied: Lsn,
        /// Why.
        reason: String,
    },
}

/// The applied LSN, and who waits for it. To move it on costs next to nothing while nobody waits.
pub(super) struct Progress {
    timeline: TimelineId,
    applied: AtomicU64,
    stopped: OnceLock<String>,
    waiters: AtomicUsize,
    notify: Notify,
    mutex: Mutex<()>,
    condvar: Condvar,
}

impl Progress {
    pub(super) fn new(timeline: TimelineId, applied: Lsn) -> Progress {
        Progress {
            timeline,
            applied: AtomicU64::new(applied.0),
            stopped: OnceLock::new(),
            waiters: AtomicUsize::new(0),
            notify: Notify::new(),
            mutex: Mutex::new(()),
            condvar: Condvar::new(),
        }
    }

    pub(super) fn applied(&self) -> Lsn {
        Lsn(self.applied.load(Ordering::SeqCst))
    }

    /// Why nothing more is applied, if so.
    pub(super) fn stopped(&self) -> Option<&str> {
        self.stopped.get().map(String::as_str)
    }

    pub(super) fn advance(&self, lsn: Lsn) {
        self.applied.fetch_max(lsn.0, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn stop(&self, reason: String) {
        self.stopped.get_or_init(|| reason);
        self.wake();
    }

    /// A waiter counts itself before it looks at what is applied, so either it sees the news, or we see it.
    fn wake(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.notify.notify_waiters();
            drop(self.mutex.lock());
            self.condvar.notify_all();
        }
    }

    /// Whether `lsn` is applied; an error if it never will be.
    fn check(&self, lsn: Lsn) -> Result<bool, WaitError> {
        if self.applied() >= lsn {
            return Ok(true);
        }
        match self.stopped() {
            None => Ok(false),
            // It may have been applied just before the stop.
            Some(_) if self.applied() >= lsn => Ok(true),
            Some(reason) => Err(WaitError::Stopped { timeline: self.timeline, lsn, applied: self.applied(), reason: reason.to_owned() }),
        }
    }

    fn late(&self, lsn: Lsn) -> WaitError {
        WaitError::Deadline { timeline: self.timeline, lsn, applied: self.applied() }
    }

    pub(super) async fn wait(&self, lsn: Lsn, deadline: Instant) -> Result<(), WaitError> {
        if self.check(lsn)? {
            return Ok(());
        }
        let _waiter = Waiter::new(&self.waiters);
        loop {
            let notified = self.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.check(lsn)? {
                return Ok(());
            }
            if tokio::time::timeout_at(deadline.into(), notified).await.is_err() {
                return if self.check(lsn)? { Ok(()) } else { Err(self.late(lsn)) };
            }
        }
    }

    pub(super) fn wait_blocking(&self, lsn: Lsn, deadline: Instant) -> Result<(), WaitError> {
        if self.check(lsn)? {
            return Ok(());
        }
        let _waiter = Waiter::new(&self.waiters);
        let mut guard = self.mutex.lock();
        loop {
            if self.check(lsn)? {
                return Ok(());
            }
            if self.condvar.wait_until(&mut guard, deadline).timed_out() {
                return if self.check(lsn)? { Ok(()) } else { Err(self.late(lsn)) };
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
    use std::time::Duration;

    use super::*;

    fn progress() -> Progress {
        Progress::new(TimelineId([1; 16]), Lsn(10))
    }

    #[test]
    fn plain_threads_wait_until_it_is_applied() {
        let progress = progress();
        let far = Instant::now() + Duration::from_secs(20);
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (1..=100)
                .map(|i| {
                    scope.spawn({
                        let progress = &progress;
                        move || progress.wait_blocking(Lsn(10 + i), far)
                    })
                })
                .collect();
            (11..=110).for_each(|lsn| progress.advance(Lsn(lsn)));
            for waiter in waiting {
                assert_eq!(waiter.join().unwrap(), Ok(()));
            }
        });
        assert_eq!(progress.waiters.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn tasks_wait_until_it_is_applied_is_late_or_never_will_be() {
        let progress = progress();
        let far = Instant::now() + Duration::from_secs(20);
        let (waited, ()) = tokio::join!(progress.wait(Lsn(20), far), async {
            tokio::task::yield_now().await;
            progress.advance(Lsn(19));
            tokio::task::yield_now().await;
            progress.advance(Lsn(20));
        });
        assert_eq!(waited, Ok(()));
        let late = progress.wait(Lsn(30), Instant::now() + Duration::from_millis(5)).await.unwrap_err();
        assert!(late.to_string().contains("is applied up to 0/14, and 0/1E did not arrive in time"), "{late}");
        let (waited, ()) = tokio::join!(progress.wait(Lsn(30), far), async {
            tokio::task::yield_now().await;
            progress.stop("a record of rmgr 200".to_owned());
        });
        assert!(waited.unwrap_err().to_string().contains("a record of rmgr 200"));
        assert_eq!(progress.wait(Lsn(20), far).await, Ok(()), "what is applied stays so");
        assert_eq!(progress.waiters.load(Ordering::SeqCst), 0);
    }
}
