//! Golden scripts: what branches, restores, take-overs, flushes and merges promise, as transcripts that a reviewer
//! reads.
//!
//! Each file of `crates/engine/tests/golden` is one scenario, its name the promise. It runs on the real engine, on
//! simulated threads, disks and store ([`world`]), under a clock that stands still but where a script lets time pass.
//! Positions are shown from where the template's history ends (`+88`), timelines by the order in which they appear
//! (`t1`). `UPDATE_GOLDENFILES=1` writes what comes out into the file, to be read before it is committed.

mod compute;
mod server;
mod words;
mod world;

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use goldenscript::{Context, Runner};
use tokio::runtime::Runtime;
use varve_simulation::threads::{Pool, Watchdog, WatchdogGuard};
use varve_simulation::world::SeededSource;
use varve_storage::chance;

use compute::Sent;
use server::Crash;
use world::World;

/// The same for all scripts: only ids and what a power cut leaves depend on it, and scripts show neither.
const SEED: u64 = 16;

/// What a script can say.
#[derive(Debug, goldenscript::Command)]
enum Command {
    /// Server 1 starts, and a tenant is made with a branch `main`.
    Tenant,
    /// A server's process starts.
    Open(#[arg(key = "server")] usize),
    /// A server's process ends, and loses what `how` says.
    Crash(#[arg(key = "server")] usize, #[arg(key = "how", optional)] Crash),
    /// A server takes the tenant, starting if need be. From now on it is the one that is asked.
    Takeover(#[arg(key = "server")] usize),
    /// A server looks whether the tenant is still its own.
    Look(#[arg(key = "server")] usize),
    /// A compute starts on a branch, in the next writer epoch, and is connected.
    Begin(String),
    /// A compute is connected, and sends what the server does not have.
    Attach(String, #[arg(key = "server")] Option<usize>),
    /// A transaction puts a value on a page of the branch's newest compute, or of the compute that is named.
    Write {
        on: String,
        #[arg(key)]
        page: u32,
        #[arg(key)]
        value: String,
        #[arg(key)]
        second: Option<i64>,
        #[arg(key, optional)]
        sent: Sent,
    },
    /// A compute stops cleanly.
    Stop(String),
    /// A compute is gone for good, with its `pg_wal`.
    Kill(String),
    /// A branch is made of another one.
    Branch {
        name: String,
        #[arg(key)]
        from: String,
        #[arg(key)]
        at: Option<u64>,
        #[arg(key)]
        second: Option<i64>,
    },
    /// A branch is taken back.
    Restore {
        branch: String,
        #[arg(key)]
        before: String,
        #[arg(key)]
        at: Option<u64>,
        #[arg(key)]
        second: Option<i64>,
    },
    /// A branch is deleted.
    Delete(String),
    /// A page is read.
    Read {
        branch: String,
        #[arg(key)]
        page: u32,
        #[arg(key)]
        at: Option<u64>,
        #[arg(key)]
        server: Option<usize>,
    },
    /// All that is durable is put into the store.
    Flush(String, #[arg(key = "server")] Option<usize>),
    /// As `flush`; then all background work of the branch is done.
    Merge(String),
    /// Where a branch stands.
    Positions(String),
    /// The layers that a branch's own manifest has, and how many objects there are.
    Layers(String),
    /// The branches, and what they point to.
    Branches,
    /// What was written into the tenant's log since it was last shown: an entry a line.
    Log,
    /// Nobody does anything for so long, and servers close what nobody has use for.
    Idle(#[arg(key = "seconds")] u64),
    /// The timelines that the server which is asked has open.
    Opened,
}

/// A script that runs: its own world in its own runtime.
struct Script {
    runtime: Runtime,
    world: World,
    _watch: WatchdogGuard,
}

impl Script {
    fn new(name: &str) -> anyhow::Result<Script> {
        // Not on the runtime below: its time stands still.
        varve_simulation::template::make()?;
        let (watchdog, watch) = Watchdog::watch(format!("golden script {name}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
        let source: Arc<dyn chance::Source> = Arc::new(SeededSource::new(SEED));
        chance::give(Some(source.clone()));
        let pool = Pool::prompt(runtime.handle().clone(), source, watchdog.clone());
        watchdog.describe(&pool);
        Ok(Script { runtime, world: World::new(pool)?, _watch: watch })
    }
}

impl Runner for Script {
    type Command = Command;

    fn run(&mut self, command: &Command, _context: &Context) -> Result<String, Box<dyn Error>> {
        let Script { runtime, world, .. } = self;
        let said = runtime.block_on(world.run(command));
        match said {
            Ok(said) => Ok(world.words.tell(&said)),
            Err(error) => Err(world.words.tell(&error.to_string()).into()),
        }
    }

    fn end_script(&mut self) -> Result<(), Box<dyn Error>> {
        let panics = self.runtime.block_on(self.world.end());
        if panics > 0 { Err(format!("{panics} pieces of work panicked").into()) } else { Ok(()) }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn run(name: &str) -> anyhow::Result<()> {
    let mut script = Script::new(name)?;
    Ok(goldenscript::run(&mut script, folder().join(format!("{name}.txt")))?)
}

/// A test for each script, so that its name is what fails.
macro_rules! scripts {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() -> anyhow::Result<()> {
                run(stringify!($name))
            }
        )*

        const SCRIPTS: &[&str] = &[$(stringify!($name)),*];
    };
}

scripts! {
    a_branch_has_what_was_acknowledged_before_it_and_nothing_after
    a_branch_of_an_old_moment_belongs_to_the_timeline_in_which_it_lies
    a_branch_point_within_a_record_is_rounded_down
    a_branch_reads_its_parents_layers_and_has_none_until_it_writes
    a_branch_writes_a_history_of_its_own
    a_closed_epoch_is_taken_over_without_its_compute
    a_compute_listens_to_one_server
    a_dead_computes_wal_reaches_the_store_before_its_timeline_is_closed
    a_fenced_server_acknowledges_nothing
    a_flush_of_a_fenced_server_publishes_nothing
    a_flush_puts_everything_durable_into_layers
    a_lost_tail_is_given_up_only_by_an_explicit_restore
    a_restore_is_one_commit
    a_restore_of_a_restore_goes_back_to_any_moment
    a_restore_to_a_second_ends_before_the_first_later_commit
    a_restored_branchs_old_compute_is_fenced
    a_tail_on_another_servers_disk_is_waited_for
    a_timeline_lives_as_long_as_a_branch_of_it
    an_ancestor_stays_open_as_long_as_a_branch_of_it
    an_idle_timeline_is_closed_and_opened_at_its_next_use
    half_a_record_counts_for_nothing
    neighbouring_layers_are_merged_and_every_moment_stays_readable
    the_next_epoch_voids_what_an_older_one_still_writes
    what_was_acknowledged_survives_a_power_cut
    what_was_before_a_restore_keeps_everything
}

#[test]
fn every_script_is_run_and_opens_with_what_it_promises() {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{name} does not begin with a comment that says what it promises");
        found.insert(name);
    }
    let listed: BTreeSet<String> = SCRIPTS.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(found, listed, "files of crates/engine/tests/golden, and those listed in golden/mod.rs");
}
