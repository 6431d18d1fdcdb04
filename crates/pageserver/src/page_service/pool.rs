//! Blocking jobs of all connections: few threads, and tenants take turns.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use varve_engine::fair_queue::FairQueue;
use varve_storage::ids::TenantId;

type Work = Box<dyn FnOnce() + Send>;

/// Runs jobs on the runtime's blocking threads, at most so many at once; further ones wait in their tenant's line.
///
/// No tenant has more than half of the places. How many jobs wait is bounded by the connections, each of which has few.
#[derive(Clone)]
pub(super) struct FairPool(Arc<Inner>);

struct Inner {
    places: usize,
    queue: Mutex<FairQueue<Work>>,
    /// Told whenever a thread finds nothing more to do.
    rests: Notify,
}

impl FairPool {
    pub(super) fn new(places: usize) -> FairPool {
        FairPool(Arc::new(Inner { places: places.max(1), queue: Mutex::new(FairQueue::default()), rests: Notify::new() }))
    }

    /// Has `job` done in its tenant's turn. The receiver fails if the job panics. A job whose receiver is gone before
    /// its turn is left out.
    pub(super) fn run<T: Send + 'static>(&self, tenant: TenantId, job: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move || {
            if !sender.is_closed() {
                // The connection may end meanwhile; then nobody wants the result.
                let _ = sender.send(job());
            }
        });
        let next = {
            let mut queue = self.0.queue.lock();
            queue.push(tenant, work);
            queue.pop(self.0.places)
        };
        if let Some((tenant, work)) = next {
            let inner = self.0.clone();
            tokio::task::spawn_blocking(move || inner.work(tenant, work));
        }
        receiver
    }

    /// Waits until no job runs or waits, at most for `timeout`; whether that was so.
    pub(super) async fn drained(&self, timeout: Duration) -> bool {
        let rest = async {
            loop {
                let rests = self.0.rests.notified();
                // While a job waits, one runs: the queue leaves no place empty that anybody may have.
                if self.0.queue.lock().running_count() == 0 {
                    return;
                }
                rests.await;
            }
        };
        tokio::time::timeout(timeout, rest).await.is_ok()
    }
}

impl Inner {
    /// One job after the other, until none may run.
    fn work(&self, mut tenant: TenantId, mut work: Work) {
        loop {
            // The panic hook has told the log; dropping the job's sender tells the connection.
            let _ = catch_unwind(AssertUnwindSafe(work));
            let next = {
                let mut queue = self.queue.lock();
                queue.ended(tenant);
                queue.pop(self.places)
            };
            match next {
                Some(next) => (tenant, work) = next,
                None => break,
            }
        }
        self.rests.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_tenant_whose_jobs_hang_leaves_places_and_what_nobody_wants_is_not_done() {
        let pool = FairPool::new(4);
        let (hog, other) = (TenantId([1; 16]), TenantId([2; 16]));
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let mut hanging: Vec<_> = (0..10)
            .map(|_| {
                let held = held.clone();
                pool.run(hog, move || held.lock().recv_timeout(LONG).is_ok())
            })
            .collect();
        let (two, panics) = (pool.run(other, || 2), pool.run(other, || panic!("as the test wants it")));
        assert_eq!(tokio::time::timeout(LONG, two).await.expect("a place for another tenant"), Ok(2));
        assert!(tokio::time::timeout(LONG, panics).await.expect("a place, still").is_err(), "a panic is a lost answer");
        assert!(!pool.drained(Duration::from_millis(10)).await, "jobs still hang");
        // Of ten, eight wait for their turn: their clients leave.
        hanging.truncate(2);
        for _ in 0..2 {
            release.send(()).expect("a job that waits");
        }
        assert!(pool.drained(LONG).await, "the jobs without a client must not run: nobody would release them");
        for result in hanging {
            assert_eq!(result.await, Ok(true));
        }
    }
}
