//! Threads that may block: given to whatever has blocking work, so that a simulation can give others, one of which runs
//! at a time.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Tells the time, for measuring.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Where blocking work runs. Work that was given to [`Threads::run`] may call the other functions; async tasks must
/// not.
pub trait Threads: fmt::Debug + Send + Sync + 'static {
    /// Runs `work` on a thread that may block. How many run at a time is for the caller to bound.
    fn run(&self, work: Box<dyn FnOnce() + Send>);

    /// Waits, on such a thread, until `future` is done.
    fn block_on(&self, future: BoxFuture<'_, ()>);

    /// Waits, on such a thread, for that long.
    fn pause(&self, duration: Duration);

    /// The clock that goes with these threads.
    fn clock(&self) -> Clock;
}

impl dyn Threads {
    /// Waits for `future` and gives its output.
    pub fn wait<T: Send>(&self, future: impl Future<Output = T> + Send) -> T {
        let mut output = None;
        self.block_on(Box::pin(async { output = Some(future.await) }));
        match output {
            Some(output) => output,
            // `block_on` has returned, so the future was polled to its end.
            None => unreachable!("a future that was waited for has no output"),
        }
    }

    /// Runs `work` on a thread that may block, and waits for it as a future. Work whose caller has gone runs to its end
    /// all the same.
    ///
    /// # Errors
    /// [`Panicked`] when the work panicked.
    pub async fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        let (sender, receiver) = oneshot::channel();
        self.run(Box::new(move || {
            // Who has gone does not want the result.
            let _gone = sender.send(work());
        }));
        receiver.await.map_err(|_| Panicked)
    }
}

/// Work on a thread panicked: a bug of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("internal error: work on a thread panicked; the server's log has more")]
pub struct Panicked;

/// The threads of a tokio runtime: its blocking pool, and its clock.
#[derive(Clone, Debug)]
pub struct RuntimeThreads {
    handle: Handle,
}

impl RuntimeThreads {
    /// The threads of the runtime behind `handle`.
    pub fn new(handle: Handle) -> RuntimeThreads {
        RuntimeThreads { handle }
    }
}

impl Threads for RuntimeThreads {
    fn run(&self, work: Box<dyn FnOnce() + Send>) {
        drop(self.handle.spawn_blocking(work));
    }

    fn block_on(&self, future: BoxFuture<'_, ()>) {
        self.handle.block_on(future);
    }

    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    fn clock(&self) -> Clock {
        Arc::new(Instant::now)
    }
}
