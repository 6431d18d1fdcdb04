//! A bound on the blocking jobs of all connections.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

/// Runs jobs on the runtime's blocking threads, at most so many at once; further ones wait. How many wait is bounded by the connections, each of
/// which has few jobs.
#[derive(Clone)]
pub(super) struct BlockingPool {
    permits: Arc<Semaphore>,
    jobs_max: usize,
}

impl BlockingPool {
    pub(super) fn new(jobs_max: usize) -> BlockingPool {
        let jobs_max = jobs_max.clamp(1, Semaphore::MAX_PERMITS);
        BlockingPool { permits: Arc::new(Semaphore::new(jobs_max)), jobs_max }
    }

    /// Starts `job`. The receiver fails if the job panics; a job whose receiver is gone runs to its end all the same.
    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let run = move |permit: tokio::sync::OwnedSemaphorePermit| {
            tokio::task::spawn_blocking(move || {
                let result = job();
                drop(permit);
                // The connection may have ended meanwhile; then nobody wants the result.
                let _ = sender.send(result);
            })
        };
        match self.permits.clone().try_acquire_owned() {
            Ok(permit) => drop(run(permit)),
            Err(_) => {
                let permits = self.permits.clone();
                tokio::spawn(async move {
                    if let Ok(permit) = permits.acquire_owned().await {
                        drop(run(permit));
                    }
                });
            }
        }
        receiver
    }

    /// Waits until no job runs, at most for `timeout`; whether that was so.
    pub(super) async fn drained(&self, timeout: Duration) -> bool {
        let all = u32::try_from(self.jobs_max).unwrap_or(u32::MAX);
        tokio::time::timeout(timeout, self.permits.acquire_many(all)).await.is_ok()
    }
}
