//! `scripts/simulate`: many seeds, or one with a trace that can be read.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use varve_simulation::kinds::Kind;
use varve_simulation::many::{Many, run_many};
use varve_simulation::run::{Options, run};
use varve_simulation::world::Plant;

/// Simulates servers, computes, branches and misfortune, seed after seed, until one fails.
#[derive(Parser)]
#[command(name = "simulate")]
struct Arguments {
    /// Run this one seed and print what happens in it (with RUST_LOG=debug also what the engine says).
    #[arg(long)]
    seed: Option<u64>,
    /// How many seeds to run.
    #[arg(long, default_value_t = 2000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Go on for so many minutes, whatever the number of seeds.
    #[arg(long)]
    minutes: Option<u64>,
    /// Go on after a seed has failed, and name all that fail.
    #[arg(long)]
    goes_on: bool,
    /// Runs at a time; as many as there are cores unless given.
    #[arg(long)]
    jobs: Option<usize>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed {
        let asked = std::env::var("RUST_LOG").unwrap_or_else(|_| "error".to_owned()).parse::<Targets>()?;
        tracing_subscriber::registry().with(tracing_subscriber::fmt::layer().without_time()).with(asked).init();
        let outcome = run(Options { seed, plant: Plant::Nothing, prints: true })?;
        let (events, hash) = outcome.trace;
        println!("seed {seed}: {events} events, trace {hash:016x}");
        return Ok(match outcome.violation {
            Some((violation, _)) => {
                println!("VIOLATED: {violation}");
                ExitCode::FAILURE
            }
            None => ExitCode::SUCCESS,
        });
    }
    let jobs = arguments.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let limit = arguments.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let seeds = if limit.is_some() { u64::MAX - arguments.first } else { arguments.seeds };
    let began = Instant::now();
    let report = run_many(Many { first: arguments.first, seeds, limit, jobs, plant: Plant::Nothing, goes_on: arguments.goes_on })?;
    for kind in Kind::ALL {
        println!("{:>9} {kind:?}", report.counts.get(*kind));
    }
    println!("{} seeds, {} events, {:.1} s", report.runs, report.events, began.elapsed().as_secs_f64());
    for failure in &report.failures {
        println!("{}seed {}: {}\nagain: {}\n", failure.last, failure.seed, failure.violation, failure.command());
    }
    if !report.failures.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    let missing = report.missing();
    if !missing.is_empty() {
        println!("never came about: {missing:?}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
