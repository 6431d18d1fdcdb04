//! Threads of which one runs at a time: blocking work under the simulation's clock and scheduler.
//!
//! The simulation is one tokio runtime on one thread, with paused time. Work that may block runs on an OS thread of its
//! own, but only while it holds the **baton**. A driver task of the runtime hands it over, and stands still until the
//! work ends or has to wait; then the thread gives the baton back and the driver waits in its place, as any task does,
//! while time and the others go on. So the order of everything is the runtime's, which is the seed's.
//!
//! **Death.** A node's threads die with it ([`Life::end`]): whoever asks for the baton afterwards is unwound where it
//! waits. What it held in memory is gone with it; disk and store were cut off before.
//!
//! **A lock that is held by a thread without the baton** stops everything if another one wants it. That is a fault of
//! what is simulated (a lock is held across I/O). [`Watchdog`] notices and says who waits for what.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use varve_storage::chance;
use varve_storage::threads::{Clock, Threads};
use varve_testing::random::SeededRng;

/// A real time after which nothing can still be on its way.
const HANG: Duration = Duration::from_secs(20);

/// Whether a node lives. Cheap to clone; clones are the same life.
#[derive(Clone, Default)]
pub struct Life {
    inner: Arc<LifeInner>,
}

#[derive(Default)]
struct LifeInner {
    over: AtomicBool,
    ended: Notify,
}

impl Life {
    /// Ends it: threads that wait are unwound, work that has not begun never runs.
    pub fn end(&self) {
        self.inner.over.store(true, Ordering::SeqCst);
        self.inner.ended.notify_waiters();
    }

    /// Runs a task that ends with it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let life = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = life.ended() => {}
                () = task => {}
            }
        });
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.inner.over.load(Ordering::SeqCst)
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        let ended = self.inner.ended.notified();
        if !self.is_over() {
            ended.await;
        }
    }
}

/// What a thread is told when it gets the baton.
enum Turn {
    Begin(Box<dyn FnOnce() + Send>),
    GoOn,
    Die,
}

/// What a thread says when it gives the baton back.
enum Answer {
    Ended { panicked: bool },
    Waits(Arc<Bell>),
    Pauses(Duration),
}

/// Rung when a future that a thread waits for may have news.
#[derive(Default)]
struct Bell {
    rung: Notify,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.rung.notify_one();
    }
}

/// The payload with which a dead node's threads are unwound.
struct NodeDied;

struct Worker {
    turns: Sender<Turn>,
    answers: Receiver<Answer>,
}

thread_local! {
    /// This thread's ends of the two channels, while it does work.
    static ENDS: std::cell::RefCell<Option<(Receiver<Turn>, Sender<Answer>)>> = const { std::cell::RefCell::new(None) };
}

/// What all threads of a run share.
pub struct Pool {
    handle: Handle,
    chance: Arc<dyn chance::Source>,
    /// Decides when a thread gets to run; none where each runs at once.
    random: Option<Mutex<SeededRng>>,
    idle: Mutex<Vec<Worker>>,
    jobs: Mutex<Vec<(u64, String)>>,
    next_job: AtomicU64,
    panics: AtomicU64,
    watchdog: Arc<Watchdog>,
}

impl Pool {
    /// Threads beside the runtime behind `handle`, which draw from `source`.
    pub fn new(handle: Handle, seed: u64, source: Arc<dyn chance::Source>, watchdog: Arc<Watchdog>) -> Arc<Pool> {
        Pool::with(handle, Some(Mutex::new(SeededRng::new(seed))), source, watchdog)
    }

    /// Threads that run as soon as they are asked to: for scripts, in which time passes only where they say so.
    pub fn prompt(handle: Handle, source: Arc<dyn chance::Source>, watchdog: Arc<Watchdog>) -> Arc<Pool> {
        Pool::with(handle, None, source, watchdog)
    }

    fn with(handle: Handle, random: Option<Mutex<SeededRng>>, source: Arc<dyn chance::Source>, watchdog: Arc<Watchdog>) -> Arc<Pool> {
        Arc::new(Pool {
            handle,
            chance: source,
            random,
            idle: Mutex::default(),
            jobs: Mutex::default(),
            next_job: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            watchdog,
        })
    }

    /// Lets the threads go that have nothing to do: whoever still holds us need not hold them.
    pub fn let_go(&self) {
        self.idle.lock().clear();
    }

    /// How much work has panicked, other than by its node's death.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::SeqCst)
    }

    fn worker(self: &Arc<Self>) -> Worker {
        if let Some(worker) = self.idle.lock().pop() {
            return worker;
        }
        let (turns, my_turns) = channel();
        let (my_answers, answers) = channel();
        let (handle, source) = (self.handle.clone(), self.chance.clone());
        // The one place that makes threads: they run one at a time.
        std::thread::spawn(move || {
            let _entered = handle.enter();
            chance::give(Some(source));
            ENDS.with(|ends| *ends.borrow_mut() = Some((my_turns, my_answers)));
            while let Some(Turn::Begin(work)) = next_turn() {
                let outcome = catch_unwind(AssertUnwindSafe(work));
                let panicked = outcome.is_err_and(|payload| !payload.is::<NodeDied>());
                answer(Answer::Ended { panicked });
            }
        });
        Worker { turns, answers }
    }

    /// When a thread gets to run: mostly soon, sometimes late.
    fn delay(&self) -> Duration {
        let Some(random) = &self.random else { return Duration::ZERO };
        let mut random = random.lock();
        match random.below(100) {
            0..70 => Duration::ZERO,
            70..98 => Duration::from_micros(random.below(5_000)),
            _ => Duration::from_millis(random.below(400)),
        }
    }

    async fn drive(self: Arc<Self>, life: Life, job: u64, work: Box<dyn FnOnce() + Send>) {
        match self.delay() {
            Duration::ZERO => tokio::task::yield_now().await,
            delay => tokio::time::sleep(delay).await,
        }
        if life.is_over() {
            return;
        }
        let worker = self.worker();
        let mut turn = Turn::Begin(work);
        loop {
            self.watchdog.step();
            self.note(job, "runs");
            // A thread that is gone has nothing more to say.
            let Some(answer) = worker.turns.send(turn).ok().and_then(|()| worker.answers.recv().ok()) else { break };
            match answer {
                Answer::Ended { panicked } => {
                    self.panics.fetch_add(u64::from(panicked), Ordering::SeqCst);
                    self.idle.lock().push(worker);
                    break;
                }
                Answer::Waits(bell) => {
                    self.note(job, "waits for a future");
                    tokio::select! {
                        biased;
                        () = life.ended() => {}
                        () = bell.rung.notified() => {}
                    }
                }
                Answer::Pauses(duration) => {
                    self.note(job, "pauses");
                    tokio::select! {
                        biased;
                        () = life.ended() => {}
                        () = tokio::time::sleep(duration) => {}
                    }
                }
            }
            turn = if life.is_over() { Turn::Die } else { Turn::GoOn };
        }
        self.jobs.lock().retain(|(other, _)| *other != job);
    }

    fn note(&self, job: u64, what: &str) {
        let mut jobs = self.jobs.lock();
        match jobs.iter_mut().find(|(other, _)| *other == job) {
            Some((_, doing)) => what.clone_into(doing),
            None => jobs.push((job, what.to_owned())),
        }
    }

    /// What all threads do, for somebody who looks for a hang.
    pub fn describe(&self) -> String {
        self.jobs.lock().iter().map(|(job, what)| format!("  thread of job {job} {what}\n")).collect()
    }
}

fn next_turn() -> Option<Turn> {
    ENDS.with(|ends| ends.borrow().as_ref().and_then(|(turns, _)| turns.recv().ok()))
}

fn answer(answer: Answer) {
    ENDS.with(|ends| {
        if let Some((_, answers)) = ends.borrow().as_ref() {
            // Whoever drove this thread may be gone with the runtime.
            let _gone = answers.send(answer);
        }
    });
}

/// Gives the baton back, and waits until it comes again.
fn give_back(what: Answer) {
    answer(what);
    match next_turn() {
        Some(Turn::GoOn) => {}
        _ => resume_unwind(Box::new(NodeDied)),
    }
}

/// The threads of one node. See the module's doc.
#[derive(Clone)]
pub struct SimThreads {
    pool: Arc<Pool>,
    life: Life,
    /// How far the node's clock is ahead, in microseconds.
    clock_ahead_us: Arc<AtomicU64>,
}

impl SimThreads {
    /// The threads of the node that lives `life`.
    pub fn new(pool: Arc<Pool>, life: Life, clock_ahead_us: Arc<AtomicU64>) -> SimThreads {
        SimThreads { pool, life, clock_ahead_us }
    }
}

impl fmt::Debug for SimThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimThreads")
    }
}

impl Threads for SimThreads {
    fn run(&self, work: Box<dyn FnOnce() + Send>) {
        let job = self.pool.next_job.fetch_add(1, Ordering::SeqCst);
        self.pool.handle.spawn(self.pool.clone().drive(self.life.clone(), job, work));
    }

    fn block_on(&self, mut future: BoxFuture<'_, ()>) {
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        let mut context = Context::from_waker(&waker);
        while future.as_mut().poll(&mut context).is_pending() {
            give_back(Answer::Waits(bell.clone()));
        }
    }

    fn pause(&self, duration: Duration) {
        give_back(Answer::Pauses(duration));
    }

    fn clock(&self) -> Clock {
        let ahead_us = self.clock_ahead_us.clone();
        Arc::new(move || tokio::time::Instant::now().into_std() + Duration::from_micros(ahead_us.load(Ordering::SeqCst)))
    }
}

/// Notices in real time that a run stands still, says who waits for what, and ends the process.
pub struct Watchdog {
    steps: AtomicU64,
    over: AtomicBool,
    pool: Mutex<Option<std::sync::Weak<Pool>>>,
}

impl Watchdog {
    /// Watches a run, which `what` names, until the guard is dropped.
    pub fn watch(what: String) -> (Arc<Watchdog>, WatchdogGuard) {
        let watchdog = Arc::new(Watchdog { steps: AtomicU64::new(0), over: AtomicBool::new(false), pool: Mutex::default() });
        let watched = watchdog.clone();
        let thread = std::thread::spawn(move || {
            let (mut seen, mut since) = (0, Instant::now());
            while !watched.over.load(Ordering::SeqCst) {
                std::thread::park_timeout(HANG / 4);
                let steps = watched.steps.load(Ordering::SeqCst);
                if steps != seen {
                    (seen, since) = (steps, Instant::now());
                } else if since.elapsed() > HANG && !watched.over.load(Ordering::SeqCst) {
                    let threads = watched.pool.lock().as_ref().and_then(std::sync::Weak::upgrade).map(|pool| pool.describe());
                    eprintln!("{what}: nothing has moved for {HANG:?}: a lock is held across a wait, or nobody will wake anybody");
                    eprintln!("{}", threads.unwrap_or_default());
                    std::process::exit(3);
                }
            }
        });
        (watchdog.clone(), WatchdogGuard { watchdog, thread: Some(thread) })
    }

    /// Says that something moves.
    pub fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Whose threads are described.
    pub fn describe(&self, pool: &Arc<Pool>) {
        *self.pool.lock() = Some(Arc::downgrade(pool));
    }
}

/// See [`Watchdog::watch`].
pub struct WatchdogGuard {
    watchdog: Arc<Watchdog>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for WatchdogGuard {
    fn drop(&mut self) {
        self.watchdog.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ended = thread.join();
        }
    }
}
