//! When a timeline was looked at for what of its history could be collected, and when its cutoff moved last.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use varve_storage::threads::Clock;

/// See the module's doc.
pub(crate) struct Looks {
    clock: Clock,
    times: Mutex<Times>,
}

impl std::fmt::Debug for Looks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.times.lock().fmt(f)
    }
}

#[derive(Debug)]
struct Times {
    looked: Instant,
    is_first: bool,
    moved: Instant,
}

impl Looks {
    /// Of a timeline that is just being opened.
    pub(crate) fn new(clock: Clock) -> Looks {
        let now = clock();
        Looks { clock, times: Mutex::new(Times { looked: now, is_first: true, moved: now }) }
    }

    /// Whether nobody has looked yet.
    pub(crate) fn is_first(&self) -> bool {
        self.times.lock().is_first
    }

    /// Whether the last look was `pause` ago; then this is the next one.
    pub(crate) fn is_due(&self, pause: Duration) -> bool {
        let now = (self.clock)();
        let mut times = self.times.lock();
        let is_due = now.duration_since(times.looked) >= pause;
        if is_due {
            (times.looked, times.is_first) = (now, false);
        }
        is_due
    }

    /// Whether the cutoff has not moved for `pause`.
    pub(crate) fn is_move_due(&self, pause: Duration) -> bool {
        (self.clock)().duration_since(self.times.lock().moved) >= pause
    }

    /// Notes that the cutoff moves.
    pub(crate) fn note_move(&self) {
        self.times.lock().moved = (self.clock)();
    }
}
