//! What is promised of the simulation itself, and a run of seeds.

use std::time::Duration;

use varve_simulation::many::{Many, SEEDS_FOR_ALL_KINDS, run_many};
use varve_simulation::run::{Options, run};
use varve_simulation::world::Plant;

/// Runs of the planted fault within which it must be found.
const SEEDS_FOR_THE_PLANT: u64 = 120;

/// Seeds of the run in CI; `VARVE_SIMULATION_SEEDS` says otherwise.
fn seeds() -> u64 {
    std::env::var("VARVE_SIMULATION_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(2000)
}

#[test]
fn one_seed_gives_one_run() {
    for seed in [3, 1_000_003, 77] {
        let runs = [(); 2].map(|()| run(Options { seed, plant: Plant::Nothing, prints: false }).unwrap());
        assert!(runs[0].trace.0 > 50, "a run with {} events shows nothing", runs[0].trace.0);
        assert_eq!(runs[0].trace, runs[1].trace, "seed {seed}");
    }
}

#[test]
fn nothing_is_violated_and_every_kind_of_fault_comes_about() {
    let report = run_many(Many { first: 0, seeds: seeds(), limit: None, jobs: 2, plant: Plant::Nothing, goes_on: false }).unwrap();
    if let Some(failure) = report.failures.first() {
        panic!("{}seed {}: {}\nagain: {}", failure.last, failure.seed, failure.violation, failure.command());
    }
    if seeds() >= SEEDS_FOR_ALL_KINDS {
        assert_eq!(report.missing(), [], "never came about in {} runs", report.runs);
    }
}

/// found.md, case 18: a restore that commits, and then writes elsewhere which timeline the compute serves.
#[test]
fn a_restore_that_is_written_in_two_places_is_found() {
    let limit = Some(Duration::from_secs(120));
    let plant = Plant::HostRecordAfterCommit;
    let report = run_many(Many { first: 0, seeds: SEEDS_FOR_THE_PLANT, limit, jobs: 2, plant, goes_on: false }).unwrap();
    let failure = report.failures.first().expect("the planted fault is found");
    assert!(
        failure.violation.contains("which the branch left") || failure.violation.contains("its compute serves"),
        "another fault was found: {}",
        failure.violation
    );
}
