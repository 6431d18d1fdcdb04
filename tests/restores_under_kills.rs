//! The connection string shows the history that its branch's name has, whatever is killed while the branch is restored
//! under load.
//!
//! `VARVE_TEST_RESTORE_KILLS=n` does n rounds, `VARVE_TEST_SEED=n` begins with the seed n. A seed gives the choices of
//! a round (what is killed, and when), not what the machine makes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use varve_testbed::appended::{Appenders, Around, Counts, Rows, rows};
use varve_testbed::dev::{Dev, amcheck, free_port, psql, signal};
use varve_testbed::limit::{self, COMMAND_MAX, Process};
use varve_testing::random::SeededRng;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// Rounds, unless `VARVE_TEST_RESTORE_KILLS` says how many.
const ROUNDS: u64 = 8;
const CLIENTS: usize = 4;
/// How long everything may take to be back after a kill.
const BACK_MAX: Duration = Duration::from_secs(60);
/// How long a process that is to be killed may be looked for: between two incarnations there is none.
const HIT_MAX: Duration = Duration::from_secs(10);
/// Latest kill after the restore was asked for: some time after its answer, on a quiet machine. Most come earlier,
/// where the commit is.
const DELAY_MAX_MS: u64 = 1000;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Server,
    ComputeProcess,
    Postmaster,
}

/// The choices of one round.
#[derive(Clone, Copy, Debug)]
struct Choices {
    target: Target,
    /// How long rows are written after the moment.
    since: Duration,
    /// When the kill comes, after the restore was asked for.
    delay: Duration,
    /// How long a server that was killed stays away.
    away: Duration,
    /// Whether the moment is told as a time, or else as an LSN.
    by_time: bool,
}

impl Choices {
    fn new(seed: u64) -> Choices {
        let mut random = SeededRng::new(seed);
        let target = [Target::Server, Target::ComputeProcess, Target::Postmaster][random.below(3) as usize];
        let since = Duration::from_millis(random.between(1000, 4000));
        let most = random.between(1, DELAY_MAX_MS);
        let delay = Duration::from_millis(random.below(most));
        let away = Duration::from_millis(random.below(500));
        Choices { target, since, delay, away, by_time: random.chance(500) }
    }
}

/// What came of one round.
struct Outcome {
    target: Target,
    committed: bool,
    told: bool,
    /// The kill came after the answer.
    late: bool,
    back: Duration,
    counts: Counts,
}

struct Test {
    dev: Dev,
    db: String,
    next: Arc<AtomicI64>,
    /// The rows that the branch has.
    kept: BTreeSet<i64>,
}

fn text<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a str> {
    value[field].as_str().with_context(|| format!("{field} of {value}"))
}

/// The TLI on which the server at `db` writes WAL.
fn tli_of(db: &str) -> anyhow::Result<u64> {
    let file = psql(db, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())")?;
    Ok(u64::from_str_radix(file.get(..8).context("a WAL file's name")?, 16)?)
}

impl Test {
    fn start() -> anyhow::Result<Test> {
        let dev = Dev::start(VARVE)?;
        dev.json(&["tenant", "create", "acme"])?;
        let port = free_port()?.to_string();
        let db = dev.compute("acme/main", &["--port", &port])?;
        Appenders::prepare(&db)?;
        Ok(Test { dev, db, next: Arc::default(), kept: BTreeSet::new() })
    }

    fn main(&self) -> anyhow::Result<Value> {
        self.dev.json(&["branch", "show", "acme/main"])
    }

    /// A CLI command in the background.
    fn begin(&self, args: &[&str]) -> anyhow::Result<Child> {
        let mut command = Command::new(VARVE);
        command.args(args).env("VARVE_URL", self.dev.url());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("varve cannot be run")
    }

    /// The process to kill, as it is now: the one compute's own, or its postmaster.
    fn process(&self, target: Target) -> Option<u32> {
        let found = Process::in_folder(self.dev.folder());
        let own = found.iter().find(|process| process.title.contains(" compute-process "))?.pid;
        match target {
            Target::Postmaster => Process::postmaster_below(own).map(|process| process.pid),
            _ => Some(own),
        }
    }

    fn kill(&mut self, choices: Choices) -> anyhow::Result<()> {
        if choices.target == Target::Server {
            self.dev.kill()?;
            std::thread::sleep(choices.away);
            return self.dev.run();
        }
        let what = format!("a {:?} to kill", choices.target);
        let pid = self.dev.until(&what, HIT_MAX, || Ok(self.process(choices.target)))?;
        signal(pid, Signal::KILL);
        Ok(())
    }

    /// Waits until the branch's name and its connection string agree, and gives what is said of the branch.
    fn await_back(&self) -> anyhow::Result<Value> {
        let mut last = String::new();
        let back = self.dev.until("the connection string to show the branch's history", BACK_MAX, || {
            let look = || -> anyhow::Result<Value> {
                let main = self.main()?;
                let (has, shows) = (main["tli"].as_u64(), tli_of(&self.db)?);
                ensure!(has == Some(shows), "the branch is on TLI {has:?}, its compute on {shows}");
                ensure!(main["compute"].is_string(), "a compute is wanted: {main}");
                Ok(main)
            };
            let looked = look();
            last = looked.as_ref().err().map(ToString::to_string).unwrap_or_default();
            Ok(looked.ok())
        });
        back.with_context(|| format!("last: {last}\ncomputes: {:?}", self.dev.json(&["compute", "list"])))
    }

    /// The rows that a branch has, as a compute of a new branch at its head shows them.
    fn rows_at_head(&self, branch: &str, copy: &str) -> anyhow::Result<Rows> {
        let copy = format!("acme/{copy}");
        self.dev.json(&["branch", "create", &copy, "--from", branch])?;
        let shown = rows(&self.dev.compute(&copy, &[])?)?;
        self.dev.json(&["branch", "delete", &copy, "--yes"])?;
        Ok(shown)
    }

    fn branches(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let list = self.dev.json(&["branch", "list", "acme"])?;
        let branches = list.as_array().context("a list of branches")?.iter();
        branches.map(|branch| Ok((text(branch, "timeline_id")?.to_owned(), text(branch, "name")?.to_owned()))).collect()
    }

    fn round(&mut self, choices: Choices) -> anyhow::Result<Outcome> {
        let (old, branches) = (self.main()?, self.branches()?);
        let (old_id, old_tli) = (text(&old, "timeline_id")?, old["tli"].as_u64());
        let clients = Appenders::start(&self.db, CLIENTS, &self.next);
        clients.wait_for(50, BACK_MAX)?;

        let begin = Instant::now();
        let utc = "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        let (option, asked) = if choices.by_time { ("--at", utc) } else { ("--lsn", "pg_current_wal_flush_lsn()") };
        let at = psql(&self.db, &format!("SELECT {asked}"))?;
        let moment = (begin, Instant::now());
        std::thread::sleep(choices.since);
        clients.wait_for(10, BACK_MAX)?;

        let asked = Instant::now();
        let mut restore = self.begin(&["branch", "restore", "acme/main", option, &at, "--json"])?;
        std::thread::sleep(choices.delay);
        let late = restore.try_wait()?.is_some();
        self.kill(choices)?;
        let killed = Instant::now();
        let answer = limit::wait_with_output(restore, "the restore's answer", COMMAND_MAX, Some(self.dev.folder()))?;
        let said = String::from_utf8_lossy(&answer.stderr).trim().to_owned();
        let told = answer.status.success().then(Instant::now);
        ensure!(told.is_some() || !said.is_empty(), "a restore that fails says why");
        if told.is_some() {
            // The first answer that the connection string gives from now on is the new history's.
            let tli = self.dev.until("an answer after the restore", BACK_MAX, || Ok(tli_of(&self.db).ok()))?;
            ensure!(Some(tli) != old_tli, "the restore is said to be done, and the old history is shown");
        }
        let main = self.await_back().with_context(|| format!("the restore said: {said}"))?;
        let back = killed.elapsed();
        clients.wait_for(20, BACK_MAX).with_context(|| format!("the restore said: {said}"))?;
        let attempts = clients.stop()?;

        let now_id = text(&main, "timeline_id")?;
        let committed = now_id != old_id;
        if told.is_some() {
            let answer: Value = serde_json::from_slice(&answer.stdout)?;
            ensure!(text(&answer["branch"], "timeline_id")? == now_id, "the branch is not what the restore said: {answer}, {main}");
        }
        let now = self.branches()?;
        let new: BTreeMap<_, _> = now.iter().filter(|(id, _)| !branches.contains_key(*id)).collect();
        let expected: Vec<&str> = if committed { vec![now_id] } else { vec![] };
        ensure!(new.keys().eq(expected.iter()), "new are {new:?}");
        let served = rows(&self.db)?;
        ensure!(served == self.rows_at_head("main", "check")?, "a new branch at head shows other rows than the connection string");
        let before = match now.get(old_id) {
            Some(name) if committed => {
                ensure!(name.starts_with("main_before_"), "the old history is {name}");
                Some(self.rows_at_head(name, "check_before")?.numbers)
            }
            Some(_) if !committed => None,
            _ => bail!("the history {old_id} has no name any more: {now:?}"),
        };
        let around =
            Around { kept: &self.kept, attempts: &attempts, moment, asked, told, served: &served.numbers, before: before.as_ref() };
        let counts = around.check()?;
        if told.is_none() {
            println!("    the restore said: {}", said.lines().last().unwrap_or_default());
        }
        self.kept = served.numbers;
        Ok(Outcome { target: choices.target, committed, told: told.is_some(), late, back, counts })
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

fn report(outcomes: &[Outcome]) {
    println!("{} rounds", outcomes.len());
    for target in [Target::Server, Target::ComputeProcess, Target::Postmaster] {
        let all: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.target == target).collect();
        let count = |chosen: fn(&Outcome) -> bool| all.iter().filter(|outcome| chosen(outcome)).count();
        let sum = |figure: fn(&Counts) -> usize| all.iter().map(|outcome| figure(&outcome.counts)).sum::<usize>();
        println!(
            "{target:?} killed {} times ({} after the answer): committed and said so {}, committed only {}, not committed {}; \
             back after {:?} at most; rows acknowledged {}, of which restored away {}, after the restore {}; there without a word {}",
            all.len(),
            count(|outcome| outcome.late),
            count(|outcome| outcome.committed && outcome.told),
            count(|outcome| outcome.committed && !outcome.told),
            count(|outcome| !outcome.committed),
            all.iter().map(|outcome| outcome.back).max().unwrap_or_default(),
            sum(|counts| counts.acknowledged),
            sum(|counts| counts.restored_away),
            sum(|counts| counts.after),
            sum(|counts| counts.unacknowledged),
        );
    }
}

#[test]
fn the_connection_string_shows_the_history_that_the_name_has() -> anyhow::Result<()> {
    let rounds = variable("VARVE_TEST_RESTORE_KILLS").unwrap_or(ROUNDS);
    let first = variable("VARVE_TEST_SEED").unwrap_or(1);
    let mut test = Test::start()?;
    let mut outcomes = Vec::new();
    for seed in first..first + rounds {
        let choices = Choices::new(seed);
        let begin = Instant::now();
        println!("seed {seed}: {choices:?}");
        let outcome = test.round(choices).with_context(|| {
            let log = std::fs::read_to_string(test.dev.log()).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(80).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            format!("seed {seed}: {choices:?}\nthe server's log ends with:\n{}\n", tail.join("\n"))
        })?;
        println!(
            "    committed {}, said so {}, killed after the answer {}, back after {:?}, {:?}, the round took {:?}",
            outcome.committed,
            outcome.told,
            outcome.late,
            outcome.back,
            outcome.counts,
            begin.elapsed()
        );
        outcomes.push(outcome);
    }
    report(&outcomes);
    amcheck(&test.db)
}
