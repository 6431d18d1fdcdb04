//! One queue for all background work of a pageserver: ingest, flush, merge, of all timelines of all tenants.
//!
//! Work is named by its kind, tenant and timeline ([`WorkId`]), and is there at most once: to schedule what waits
//! already only makes it come sooner, and to schedule what runs makes it run once more afterwards. A piece of work does
//! a bounded step and says what is left ([`Next`]).
//!
//! **Shares.** Each kind has a lane with a fixed number of places, so a long merge never keeps ingest waiting. A lane
//! is a [`FairQueue`]: tenants take turns, whatever each has scheduled.
//!
//! **Cost.** Nothing runs and nobody is woken for a timeline without work. Threads are taken for a step and given back;
//! there are never more than the sum of all places. One task sleeps until the next piece of delayed work is due.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::threads::{Clock, Threads};

use crate::fair_queue::FairQueue;

/// A kind of work; each has a lane of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// WAL becomes versions in memory.
    Ingest,
    /// Memory becomes layers in the store.
    Flush,
    /// Layers become fewer layers.
    Merge,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Ingest, Kind::Flush, Kind::Merge];
}

/// Names a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkId {
    /// What is done.
    pub kind: Kind,
    /// For which tenant.
    pub tenant: TenantId,
    /// On which timeline.
    pub timeline: TimelineId,
}

/// What is left after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until it is scheduled again.
    Done,
    /// More, as soon as it is this tenant's turn again.
    More,
    /// More, not before this time has passed.
    After(Duration),
}

/// Something that can do steps of work. May block.
pub trait Work: Send + Sync + 'static {
    /// Does one bounded step of the kind `kind`.
    fn step(self: Arc<Self>, kind: Kind) -> Next;
}

/// How many steps of each kind may run at a time.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Steps of ingest: short, and readers wait for them.
    pub ingest: usize,
    /// Flushes: mostly waiting for the store.
    pub flush: usize,
    /// Merges: each takes a core and some tens of megabytes.
    pub merge: usize,
}

impl Default for Places {
    fn default() -> Places {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Places { ingest: cores.clamp(2, 16), flush: (2 * cores).clamp(4, 32), merge: cores.clamp(2, 8) }
    }
}

impl Places {
    fn of(&self, kind: Kind) -> usize {
        match kind {
            Kind::Ingest => self.ingest,
            Kind::Flush => self.flush,
            Kind::Merge => self.merge,
        }
        .max(1)
    }
}

enum State {
    /// Not before this time.
    Delayed(Instant),
    /// In its tenant's line.
    Ready,
    /// A step runs.
    Running {
        /// When it is to run again, if it was scheduled meanwhile.
        again: Option<Instant>,
    },
}

struct Entry {
    work: Arc<dyn Work>,
    state: State,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<WorkId, Entry>,
    delayed: BTreeMap<(Instant, WorkId), ()>,
    lanes: [FairQueue<WorkId>; Kind::ALL.len()],
    /// The time for which the task sleeps, so that only earlier work wakes it.
    sleeps_until: Option<Instant>,
}

/// See the module's doc.
pub struct WorkQueue {
    me: Weak<WorkQueue>,
    inner: Mutex<Inner>,
    places: Places,
    threads: Arc<dyn Threads>,
    clock: Clock,
    /// Rung when work becomes due before the time for which the task sleeps.
    earlier: Notify,
    /// Rung when a step has ended.
    ended: Notify,
}

impl fmt::Debug for WorkQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        write!(f, "WorkQueue({} pieces, {} delayed)", inner.entries.len(), inner.delayed.len())
    }
}

impl WorkQueue {
    /// An empty queue whose steps run on `threads`. [`WorkQueue::run_timer`] must run beside it.
    pub fn new(places: Places, threads: Arc<dyn Threads>) -> Arc<WorkQueue> {
        let clock = threads.clock();
        Arc::new_cyclic(|me| WorkQueue {
            me: me.clone(),
            inner: Mutex::default(),
            places,
            threads,
            clock,
            earlier: Notify::new(),
            ended: Notify::new(),
        })
    }

    /// Brings delayed work into its line when it is due. Runs until the queue is gone or the future is dropped.
    pub async fn run_timer(queue: Weak<WorkQueue>) {
        loop {
            let Some(strong) = queue.upgrade() else { return };
            let next = strong.take_due();
            let earlier = strong.earlier.notified();
            let pause = next.map(|next| next.saturating_duration_since((strong.clock)()));
            match pause {
                // Somebody may have scheduled sooner work since: that has rung the bell, which keeps one ring.
                Some(pause) => drop(tokio::time::timeout(pause, earlier).await),
                None => earlier.await,
            }
        }
    }

    /// Moves what is due into the lanes; gives when the next is due.
    fn take_due(&self) -> Option<Instant> {
        let mut inner = self.inner.lock();
        let now = (self.clock)();
        let mut next = None;
        while let Some((&(due, id), ())) = inner.delayed.first_key_value() {
            if due > now {
                next = Some(due);
                break;
            }
            inner.delayed.pop_first();
            if let Some(entry) = inner.entries.get_mut(&id) {
                entry.state = State::Ready;
                inner.lanes[id.kind as usize].push(id.tenant, id);
            }
        }
        inner.sleeps_until = next;
        self.start_what_may(inner);
        next
    }

    /// Sees to it that a step of `work` runs in `delay` at the latest, as far as there are places.
    pub fn schedule(&self, id: WorkId, work: &Arc<impl Work>, delay: Duration) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let now = (self.clock)();
        let due = now + delay;
        match inner.entries.get_mut(&id).map(|entry| &mut entry.state) {
            Some(State::Ready) => return,
            Some(State::Delayed(old)) if *old <= due => return,
            Some(State::Delayed(old)) => drop(inner.delayed.remove(&(*old, id))),
            Some(State::Running { again }) => {
                *again = Some(again.map_or(due, |old| old.min(due)));
                return;
            }
            None => drop(inner.entries.insert(id, Entry { work: work.clone(), state: State::Ready })),
        }
        self.put(inner, id, due, now);
        self.start_what_may(guard);
    }

    /// Puts an entry that is nowhere into its line, or among the delayed.
    fn put(&self, inner: &mut Inner, id: WorkId, due: Instant, now: Instant) {
        let Some(entry) = inner.entries.get_mut(&id) else { return };
        if due <= now {
            entry.state = State::Ready;
            inner.lanes[id.kind as usize].push(id.tenant, id);
            return;
        }
        entry.state = State::Delayed(due);
        inner.delayed.insert((due, id), ());
        if inner.sleeps_until.is_none_or(|until| due < until) {
            inner.sleeps_until = Some(due);
            self.earlier.notify_one();
        }
    }

    /// Starts what there are places for. Threads that take nothing more, because the process ends, drop a step at once,
    /// and a step that is dropped comes back here: so they are asked without the lock.
    fn start_what_may(&self, mut inner: MutexGuard<'_, Inner>) {
        let mut steps = Vec::new();
        for kind in Kind::ALL {
            let places = self.places.of(kind);
            while let Some((_, id)) = inner.lanes[kind as usize].pop(places) {
                let Some(entry) = inner.entries.get_mut(&id) else {
                    inner.lanes[kind as usize].ended(id.tenant);
                    continue;
                };
                entry.state = State::Running { again: None };
                steps.push((entry.work.clone(), Step { queue: self.me.clone(), id, next: Next::Done, has_begun: false }));
            }
        }
        drop(inner);
        for (work, step) in steps {
            self.threads.run(Box::new(move || step.run(work)));
        }
    }

    fn step_ended(&self, id: WorkId, next: Next, has_begun: bool) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        inner.lanes[id.kind as usize].ended(id.tenant);
        let now = (self.clock)();
        let due = match next {
            Next::Done => None,
            Next::More => Some(now),
            Next::After(pause) => Some(now + pause),
        };
        let again = match inner.entries.get(&id).map(|entry| &entry.state) {
            Some(State::Running { again }) => *again,
            _ => None,
        };
        match due.into_iter().chain(again).min() {
            Some(due) => self.put(inner, id, due, now),
            None => drop(inner.entries.remove(&id)),
        }
        // Where there are no threads for one, there are none for the next.
        if has_begun {
            self.start_what_may(guard);
        } else {
            drop(guard);
        }
        self.ended.notify_waiters();
    }

    /// Whether nothing is scheduled or runs on a timeline.
    pub fn is_idle(&self, tenant: TenantId, timeline: TimelineId) -> bool {
        let inner = self.inner.lock();
        Kind::ALL.iter().all(|&kind| !inner.entries.contains_key(&WorkId { kind, tenant, timeline }))
    }

    /// Forgets all work, of a process that ends as if it were killed: work holds its timeline, and that holds the
    /// queue.
    pub fn forget_all(&self) {
        let entries = std::mem::take(&mut self.inner.lock().entries);
        // In an order that is the same in each run.
        drop(entries.into_iter().collect::<BTreeMap<WorkId, Entry>>());
    }

    /// Takes away what is scheduled on a timeline, and waits for steps that run. The caller sees to it that nothing is
    /// scheduled any more.
    pub async fn cancel(&self, tenant: TenantId, timeline: TimelineId) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if !self.cancel_waiting(tenant, timeline) {
                return;
            }
            ended.await;
        }
    }

    /// Takes away what waits; whether a step still runs.
    fn cancel_waiting(&self, tenant: TenantId, timeline: TimelineId) -> bool {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let mut runs = false;
        for kind in Kind::ALL {
            let id = WorkId { kind, tenant, timeline };
            match inner.entries.get_mut(&id).map(|entry| &mut entry.state) {
                Some(State::Running { again }) => {
                    *again = None;
                    runs = true;
                    continue;
                }
                Some(State::Delayed(due)) => drop(inner.delayed.remove(&(*due, id))),
                Some(State::Ready) => inner.lanes[kind as usize].remove(tenant, |other| *other == id),
                None => {}
            }
            inner.entries.remove(&id);
        }
        runs
    }
}

/// A step that runs. Its place is given back however it ends, also when it panics.
struct Step {
    queue: Weak<WorkQueue>,
    id: WorkId,
    next: Next,
    has_begun: bool,
}

impl Step {
    fn run(mut self, work: Arc<dyn Work>) {
        self.has_begun = true;
        self.next = work.step(self.id.kind);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(work = ?self.id, "a step of background work panicked; it is not run again until there is news for it");
        }
        if let Some(queue) = self.queue.upgrade() {
            queue.step_ended(self.id, self.next, self.has_begun);
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test of real threads")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use varve_storage::threads::RuntimeThreads;

    use super::*;

    /// Work that counts its steps and waits in each until it is let go.
    struct Counted {
        steps: AtomicUsize,
        next: Mutex<Vec<Next>>,
        gate: Option<std::sync::Barrier>,
    }

    impl Counted {
        fn new(next: &[Next]) -> Arc<Counted> {
            Arc::new(Counted { steps: AtomicUsize::new(0), next: Mutex::new(next.iter().rev().copied().collect()), gate: None })
        }

        fn steps(&self) -> usize {
            self.steps.load(Ordering::SeqCst)
        }
    }

    impl Work for Counted {
        fn step(self: Arc<Self>, _kind: Kind) -> Next {
            if let Some(gate) = &self.gate {
                gate.wait();
            }
            self.steps.fetch_add(1, Ordering::SeqCst);
            self.next.lock().pop().unwrap_or(Next::Done)
        }
    }

    fn id(kind: Kind, tenant: u8, timeline: u8) -> WorkId {
        WorkId { kind, tenant: TenantId([tenant; 16]), timeline: TimelineId([timeline; 16]) }
    }

    fn queue(places: Places) -> Arc<WorkQueue> {
        let queue = WorkQueue::new(places, Arc::new(RuntimeThreads::new(tokio::runtime::Handle::current())));
        tokio::spawn(WorkQueue::run_timer(Arc::downgrade(&queue)));
        queue
    }

    async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        for _ in 0..2000 {
            if is_so() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it did not come about that {what}");
    }

    #[test]
    fn a_step_that_no_thread_takes_is_forgotten() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let queue = WorkQueue::new(Places::default(), Arc::new(RuntimeThreads::new(runtime.handle().clone())));
        runtime.shutdown_background();
        let work = Counted::new(&[]);
        let id = id(Kind::Flush, 1, 1);
        queue.schedule(id, &work, Duration::ZERO);
        assert!(queue.is_idle(id.tenant, id.timeline));
        assert_eq!(work.steps(), 0);
    }

    #[tokio::test]
    async fn work_goes_on_as_long_as_it_says_and_is_forgotten_then() {
        let queue = queue(Places::default());
        let work = Counted::new(&[Next::More, Next::After(Duration::from_millis(20)), Next::Done]);
        let id = id(Kind::Flush, 1, 1);
        queue.schedule(id, &work, Duration::ZERO);
        until("three steps are done", || work.steps() == 3).await;
        until("nothing is left", || queue.is_idle(id.tenant, id.timeline)).await;
        queue.schedule(id, &work, Duration::from_secs(1000));
        queue.schedule(id, &work, Duration::from_millis(10));
        until("the sooner time counts", || work.steps() == 4).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tenant_that_hangs_leaves_room_for_others() {
        let queue = queue(Places { ingest: 4, flush: 4, merge: 1 });
        let hanging: Vec<_> = (0..8u8)
            .map(|timeline| {
                let work = Arc::new(Counted { gate: Some(std::sync::Barrier::new(2)), ..Arc::into_inner(Counted::new(&[])).unwrap() });
                queue.schedule(id(Kind::Flush, 1, timeline), &work, Duration::ZERO);
                work
            })
            .collect();
        let other = Counted::new(&[]);
        queue.schedule(id(Kind::Flush, 2, 1), &other, Duration::ZERO);
        until("the other tenant's work is done", || other.steps() == 1).await;
        assert!(hanging.iter().all(|work| work.steps() == 0));
        let letting_go = std::thread::spawn(move || {
            for work in &hanging {
                work.gate.as_ref().unwrap().wait();
            }
            hanging
        });
        let hanging = letting_go.join().unwrap();
        until("all are done at last", || hanging.iter().all(|work| work.steps() == 1)).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn cancelling_waits_for_the_step_that_runs() {
        let queue = queue(Places::default());
        let work = Arc::new(Counted { gate: Some(std::sync::Barrier::new(2)), ..Arc::into_inner(Counted::new(&[Next::Done])).unwrap() });
        let ingest = id(Kind::Ingest, 1, 1);
        queue.schedule(ingest, &work, Duration::ZERO);
        let delayed = Counted::new(&[]);
        queue.schedule(id(Kind::Merge, 1, 1), &delayed, Duration::from_millis(50));
        let cancelled = {
            let queue = queue.clone();
            tokio::spawn(async move { queue.cancel(ingest.tenant, ingest.timeline).await })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!cancelled.is_finished(), "the step still runs");
        let gate = work.clone();
        std::thread::spawn(move || gate.gate.as_ref().unwrap().wait());
        cancelled.await.unwrap();
        assert_eq!((work.steps(), delayed.steps()), (1, 0));
        assert!(queue.is_idle(ingest.tenant, ingest.timeline));
    }
}
