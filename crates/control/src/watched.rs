//! A value that changes, and those who wait until it is as they want it.
//!
//! tokio's `watch` wakes those who wait in an order that it takes from chance. Here they are woken in the order in
//! which they came, so that a simulation of it can be had again.

use parking_lot::Mutex;
use tokio::sync::Notify;

/// See the module's doc.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Watched<T> {
        Watched { value: Mutex::new(value), changed: Notify::new() }
    }

    /// Looks at it.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value.lock())
    }

    /// Changes it, and wakes who waits.
    pub(crate) fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.value.lock());
        self.changed.notify_waiters();
    }

    /// Waits until `done` says so of it.
    pub(crate) async fn wait_for(&self, mut done: impl FnMut(&T) -> bool) -> T
    where
        T: Clone,
    {
        loop {
            // From here on a change is noticed, though it comes before we wait.
            let changed = self.changed.notified();
            let found = self.with(|value| done(value).then(|| value.clone()));
            if let Some(found) = found {
                return found;
            }
            changed.await;
        }
    }
}
