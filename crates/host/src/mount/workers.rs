//! Threads for what has to wait.
//!
//! The few threads that take requests from the kernel also serve what is in the cache, so they must not all wait for a
//! pageserver. A job that may wait runs on the thread that took it (a hop to another costs as much as the fetch itself)
//! while enough others are free to take requests; beyond that it goes to a thread of its own. The kernel bounds how
//! many requests are under way: at most one for each process of Postgres, and those in the background.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::AcqRel},
    },
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

/// Threads at most; what is beyond waits for one of them.
const THREADS_MAX: usize = 64;
/// Jobs that wait for a thread, at most. Beyond it the thread that took the request runs the job after all.
const QUEUE_MAX: usize = 4096;
/// How long a thread without work lives on.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
pub(super) struct Workers {
    inline: AtomicUsize,
    inline_max: usize,
    pool: Arc<Pool>,
}

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// `inline_max`: how many of the threads that take requests may wait at a time.
    pub(super) fn new(inline_max: usize) -> Workers {
        Workers { inline: AtomicUsize::new(0), inline_max, pool: Arc::default() }
    }

    /// Runs a job that may wait, here or on another thread.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.inline.fetch_add(1, AcqRel) < self.inline_max {
            job();
            self.inline.fetch_sub(1, AcqRel);
            return;
        }
        self.inline.fetch_sub(1, AcqRel);
        if let Some(job) = self.pool.submit(Box::new(job)) {
            job();
        }
    }
}

impl Pool {
    /// Hands the job to a thread, or back if there is none for it.
    fn submit(self: &Arc<Self>, job: Job) -> Option<Job> {
        let mut state = self.state.lock();
        if state.queue.len() >= QUEUE_MAX {
            return Some(job);
        }
        if state.idle <= state.queue.len() && state.threads < THREADS_MAX {
            let pool = self.clone();
            match thread::Builder::new().name("mount-worker".to_owned()).spawn(move || pool.work()) {
                Ok(_) => state.threads += 1,
                Err(error) => {
                    tracing::warn!("cannot start a thread for the mount: {error}");
                    if state.threads == 0 {
                        return Some(job);
                    }
                }
            }
        }
        state.queue.push_back(job);
        self.work.notify_one();
        None
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if timed_out && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_beyond_those_that_may_wait_here_run_elsewhere() {
        let workers = Workers::new(0);
        let (done, results) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for n in 0..100 {
            let (done, gate) = (done.clone(), gate.clone());
            workers.run(move || {
                if n < 10 {
                    let _ = gate.lock().recv();
                }
                let _ = done.send(n);
            });
        }
        for _ in 10..100 {
            assert!(results.recv_timeout(Duration::from_secs(10)).expect("jobs behind waiting ones run") >= 10);
        }
        for _ in 0..10 {
            release.send(()).unwrap();
        }
        for _ in 0..10 {
            assert!(results.recv_timeout(Duration::from_secs(10)).expect("waiting jobs end") < 10);
        }
    }

    #[test]
    fn a_job_runs_here_while_others_are_free() {
        let workers = Workers::new(1);
        let here = thread::current().id();
        let (done, results) = mpsc::channel();
        workers.run(move || {
            let _ = done.send(thread::current().id());
        });
        assert_eq!(results.recv().unwrap(), here);
    }
}
