//! Many runs: seed after seed on each core, until all are done, time is up, or one fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::kinds::{Counts, Kind};
use crate::run::{Options, Outcome, run};
use crate::world::Plant;

/// From so many seeds on each kind of fault must have come about.
pub const SEEDS_FOR_ALL_KINDS: u64 = 400;

/// Which runs.
#[derive(Clone, Copy, Debug)]
pub struct Many {
    /// The first seed.
    pub first: u64,
    /// How many.
    pub seeds: u64,
    /// Real time after which no further seed is begun.
    pub limit: Option<Duration>,
    /// Runs at a time, each on a thread of its own.
    pub jobs: usize,
    /// What is planted.
    pub plant: Plant,
    /// Whether all seeds are run, also after one has failed.
    pub goes_on: bool,
}

/// What they came to.
#[derive(Debug, Default)]
pub struct Report {
    /// Runs that were made.
    pub runs: u64,
    /// Events of all of them.
    pub events: u64,
    /// How often what happened.
    pub counts: Counts,
    /// The seeds that failed, and how.
    pub failures: Vec<Failure>,
}

/// A run that failed.
#[derive(Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// What was violated.
    pub violation: String,
    /// The last events before.
    pub last: String,
}

impl Failure {
    /// The command that shows it again.
    pub fn command(&self) -> String {
        format!("scripts/simulate --seed {}", self.seed)
    }
}

impl Report {
    /// What the runs should have shown and have not.
    pub fn missing(&self) -> Vec<Kind> {
        if self.runs >= SEEDS_FOR_ALL_KINDS { self.counts.missing() } else { Vec::new() }
    }
}

/// Makes them.
///
/// # Errors
/// When a run cannot be made at all.
pub fn run_many(many: Many) -> anyhow::Result<Report> {
    let (next, failed) = (AtomicU64::new(many.first), AtomicBool::new(false));
    // How long it may take is the caller's; no run sees this clock.
    let began = Instant::now();
    let report: Mutex<anyhow::Result<Report>> = Mutex::new(Ok(Report::default()));
    let job = &|number: usize| {
        stay_on_one_core(number);
        while !failed.load(Ordering::SeqCst) && many.limit.is_none_or(|limit| began.elapsed() < limit) {
            let seed = next.fetch_add(1, Ordering::SeqCst);
            if seed - many.first >= many.seeds {
                return;
            }
            let outcome = run(Options { seed, plant: many.plant, prints: false });
            let mut report = report.lock();
            match (&mut *report, outcome) {
                (Ok(report), Ok(outcome)) => {
                    failed.fetch_or(outcome.violation.is_some() && !many.goes_on, Ordering::SeqCst);
                    take(report, seed, outcome);
                }
                (report @ Ok(_), Err(error)) => {
                    failed.store(true, Ordering::SeqCst);
                    *report = Err(error.context(format!("seed {seed}")));
                }
                (Err(_), _) => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for number in 0..many.jobs.max(1) {
            scope.spawn(move || job(number));
        }
    });
    report.into_inner()
}

/// A run's threads take turns, so they are faster on one core than on several. They inherit it from this one.
fn stay_on_one_core(number: usize) {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    if let Some(core) = cores.get(number % cores.len().max(1)) {
        let mut one = rustix::thread::CpuSet::new();
        one.set(*core);
        // Slower without, and the same.
        let _slower = rustix::thread::sched_setaffinity(None, &one);
    }
}

fn take(report: &mut Report, seed: u64, outcome: Outcome) {
    report.runs += 1;
    report.events += outcome.trace.0;
    report.counts.merge(&outcome.counts);
    if let Some((violation, last)) = outcome.violation {
        report.failures.push(Failure { seed, violation, last });
    }
}
