//! One run: what a seed makes of the world.

use std::sync::Arc;
use std::time::Duration;

use varve_storage::chance;
use varve_testing::random::SeededRng;

use crate::actors;
use crate::kinds::{Counts, Kind};
use crate::threads::{Pool, Watchdog};
use crate::world::{Plant, SeededSource, World};

/// People who act at the same time.
const PEOPLE: u32 = 2;
/// A run whose people are not done by then is over all the same.
const RUN_MAX: Duration = Duration::from_secs(240);

/// What a run is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What decides everything.
    pub seed: u64,
    /// What is planted.
    pub plant: Plant,
    /// Whether the trace is printed.
    pub prints: bool,
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// Number and hash of its events.
    pub trace: (u64, u64),
    /// How often what happened.
    pub counts: Counts,
    /// What was violated, and what came before.
    pub violation: Option<(String, String)>,
}

/// Runs a seed to its end.
///
/// # Errors
/// When no runtime or folder can be made.
pub fn run(options: Options) -> anyhow::Result<Outcome> {
    crate::template::make()?;
    let (watchdog, _watch) = Watchdog::watch(format!("seed {}", options.seed));
    let folder = tempfile::Builder::new().prefix("varve-simulation").tempdir_in(folder_in_memory())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let mut random = SeededRng::new(options.seed);
    let source: Arc<dyn chance::Source> = Arc::new(SeededSource::new(random.bits()));
    chance::give(Some(source.clone()));
    let pool = Pool::new(runtime.handle().clone(), random.bits(), source, watchdog.clone());
    watchdog.describe(&pool);
    let outcome = runtime.block_on(async {
        let world = World::new(random.bits(), options.plant, options.prints, pool, watchdog, folder.path()).await?;
        tokio::select! {
            biased;
            () = world.violated() => {}
            () = live(&world) => {}
        }
        let (trace, violation) = (world.trace.sum(), world.violation().map(|violation| (violation, world.trace.last())));
        let counts = Counts::default();
        counts.merge(&world.counts);
        counts.add_all(Kind::RecordVoided, world.ledger.lock().voided());
        // All threads end before the runtime does.
        for machine in &world.machines {
            machine.end(&world, crate::node::Crash::Process);
        }
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        world.pool.let_go();
        anyhow::Ok(Outcome { trace, counts, violation })
    });
    chance::give(None);
    outcome
}

async fn live(world: &Arc<World>) {
    for machine in &world.machines {
        actors::start(world, machine.index()).await;
    }
    for host in &world.hosts {
        host.start(world);
    }
    let turns = 6 + world.below(10) as u32;
    let main = "main".parse().unwrap_or_else(|error| unreachable!("a name of ours: {error}"));
    let _later = crate::steward::ensure_running(world, &main, false).await;
    let people = async {
        let mut people = tokio::task::JoinSet::new();
        for who in 0..PEOPLE {
            people.spawn(actors::person(world.clone(), who, turns));
        }
        while people.join_next().await.is_some() {}
    };
    tokio::select! {
        biased;
        () = actors::misfortune(world) => {}
        _ = tokio::time::timeout(RUN_MAX, people) => {}
    }
    world.say(format_args!("faults end"));
    crate::rest::come_to_rest(world).await;
    if world.pool.panics() > 0 {
        world.violate(format!("{} pieces of work panicked", world.pool.panics()));
    }
}

/// Layers' local copies are written and fsynced; in memory that costs nothing.
fn folder_in_memory() -> std::path::PathBuf {
    let memory = std::path::PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}
