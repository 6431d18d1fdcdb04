//! Edit logs lose and invent nothing: racing writers, sleepers that wake up after they were replaced, stores that fail
//! before and after they did what they were asked, all as seeds say. `VARVE_TEST_SEEDS=n` runs n seeds,
//! `VARVE_TEST_SEED=n` runs seed n alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use varve_storage::edit_log::{ApplyError, CommitError, EditLog, EditLogError, LogFormat, State, dump, read_state};
use varve_storage::envelope::Format;
use varve_storage::store::{Failure, ObjectName};
use varve_testing::random::SeededRng;
use varve_testing::sim_store::{Faults, Link, SimStore};

/// Names, each held by at most one value; and every value that was ever there, in order.
#[derive(Clone, Default, Debug, PartialEq)]
struct Names {
    held: imbl::OrdMap<String, u64>,
    past: imbl::Vector<u64>,
}

#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
enum Edit {
    Take { name: String, value: u64 },
    Drop { name: String, value: u64 },
    Past { values: Vec<u64> },
    Held { name: String, value: u64 },
}

const FORMAT: LogFormat = LogFormat {
    entry: Format { magic: *b"TSTE", version: 1, what: "an entry of a test log", content_bytes_max: 8 << 20 },
    snapshot: Format { magic: *b"TSTS", version: 1, what: "a snapshot of a test log", content_bytes_max: 64 << 20 },
    edit_kinds: 4,
};

impl State for Names {
    type Edit = Edit;
    const FORMAT: LogFormat = FORMAT;

    fn apply(&mut self, edit: &Edit) -> Result<(), ApplyError> {
        match edit {
            Edit::Take { name, value } => {
                if let Some(other) = self.held.insert(name.clone(), *value) {
                    return Err(ApplyError(format!("{name} is held by {other}")));
                }
                self.past.push_back(*value);
            }
            Edit::Drop { name, value } => {
                if self.held.remove(name) != Some(*value) {
                    return Err(ApplyError(format!("{name} is not held by {value}")));
                }
            }
            Edit::Past { values } => self.past.extend(values.iter().copied()),
            Edit::Held { name, value } => {
                self.held.insert(name.clone(), *value);
            }
        }
        Ok(())
    }

    fn for_each_edit(&self, emit: &mut dyn FnMut(&Edit)) {
        emit(&Edit::Past { values: self.past.iter().copied().collect() });
        for (name, value) in &self.held {
            emit(&Edit::Held { name: name.clone(), value: *value });
        }
    }
}

fn prefix() -> ObjectName {
    "tenants/t".parse().unwrap()
}

/// Takes a name, giving up the one that holds it if `steal`.
async fn take(log: &EditLog<Names>, name: &str, value: u64, steal: bool) -> Result<(), CommitError<String>> {
    log.commit(|state| {
        let mut edits = Vec::new();
        if let Some(&other) = state.held.get(name) {
            if !steal {
                return Err(format!("{name} is taken"));
            }
            edits.push(Edit::Drop { name: name.to_owned(), value: other });
        }
        edits.push(Edit::Take { name: name.to_owned(), value });
        Ok((edits, ()))
    })
    .await
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let variable = |name| std::env::var(name).ok().and_then(|n: String| n.parse().ok());
    match variable("VARVE_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("VARVE_TEST_SEEDS").unwrap_or(default),
    }
}

#[tokio::test]
async fn racing_creates_of_one_name_have_one_winner_and_share_writes() {
    let sim = SimStore::new();
    let log = EditLog::<Names>::create(&sim.reliable(), &prefix(), &[]).await.unwrap();
    let racers = (0..1000).map(|value| {
        let log = log.clone();
        tokio::spawn(async move { take(&log, &format!("name{}", value % 10), value, false).await })
    });
    let mut won = 0;
    for racer in racers.collect::<Vec<_>>() {
        match racer.await.unwrap() {
            Ok(()) => won += 1,
            Err(CommitError::Refused(why)) => assert!(why.ends_with("is taken"), "{why}"),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((won, log.state().held.len()), (10, 10));
    assert!(sim.objects().len() < 5, "a thousand racers must share a few writes, there are {:?}", sim.objects().keys());
    let (read, last) = read_state::<Names>(&sim.reliable(), &prefix()).await.unwrap().unwrap();
    assert_eq!(read, *log.state());
    assert_eq!(last.generation.0, 1);
}

#[tokio::test]
async fn a_sleeper_that_wakes_up_learns_that_it_was_fenced() {
    let sim = SimStore::new();
    let old = EditLog::<Names>::create(&sim.reliable(), &prefix(), &[]).await.unwrap();
    take(&old, "a", 1, false).await.unwrap();
    let new = EditLog::<Names>::take_over(&sim.reliable(), &prefix()).await.unwrap().unwrap();
    assert_eq!(*new.state(), *old.state());
    take(&new, "b", 2, false).await.unwrap();

    let CommitError::Log(error) = take(&old, "b", 3, false).await.unwrap_err() else {
        panic!("it must not be refused for its stale state")
    };
    assert!(matches!(error, EditLogError::Fenced { own, by, .. } if own.0 == 1 && by.0 == 2), "{error}");
    assert!(error.to_string().contains("must stop serving the tenant"), "{error}");
    assert_eq!(old.ended(), Some(error.clone()));
    assert_eq!(take(&old, "c", 4, false).await.unwrap_err(), CommitError::Log(error), "and all that follow fail, too");
    assert_eq!(old.state().held.len(), 1, "what was not written is not seen");
    assert!(matches!(old.check_ownership().await, Err(EditLogError::Fenced { .. })));
    new.check_ownership().await.unwrap();

    let dumped = dump::<Names>(&sim.reliable(), &prefix()).await.unwrap();
    let json = serde_json::to_value(&dumped[1]).unwrap();
    let expected = serde_json::json!({
        "object": "tenants/t/log/00000001/000000000001", "generation": 1, "number": 1, "kind": "edits",
        "edits": [{"take": {"name": "a", "value": 1}}],
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::to_value(dumped[2].kind).unwrap(), serde_json::json!({"seal": {"by": 2}}));
}

#[tokio::test]
async fn an_owner_that_slept_reads_its_log_again_without_writing() {
    let sim = SimStore::new();
    let store = sim.reliable();
    drop(EditLog::<Names>::create(&store, &prefix(), &[]).await.unwrap());
    let claim = |generation: varve_storage::ids::Generation| vec![Edit::Past { values: vec![u64::from(generation.0)] }];
    let log = EditLog::<Names>::take_over_with(&store, &prefix(), claim).await.unwrap().unwrap();
    assert_eq!(log.state().past, imbl::vector![2], "what comes with the claim counts");
    take(&log, "a", 10, false).await.unwrap();
    let (owner, state, waiting) = (log.ownership(), log.state(), log.wait_lost());
    assert!(log.is_idle() && log.lost().is_none());
    drop(log);
    assert_eq!(waiting.await, None, "a log that was closed was not lost");
    let before = sim.objects().len();
    let log = EditLog::<Names>::reopen(&store, &prefix(), owner).await.unwrap().unwrap();
    assert_eq!((log.state(), log.ownership(), sim.objects().len()), (state, owner, before));
    take(&log, "b", 11, false).await.unwrap();

    let waiting = tokio::spawn(log.wait_lost());
    let next = EditLog::<Names>::take_over(&store, &prefix()).await.unwrap().unwrap();
    assert_eq!(log.lost(), None, "nobody has looked yet");
    log.check_ownership().await.unwrap_err();
    assert_eq!(log.lost().map(|by| by.0), Some(3));
    assert!(matches!(waiting.await.unwrap(), Some(EditLogError::Fenced { by, .. }) if by.0 == 3));
    let before = sim.objects().len();
    let error = EditLog::<Names>::reopen(&store, &prefix(), owner).await.map(drop).unwrap_err();
    assert!(matches!(error, EditLogError::Fenced { own, by, .. } if own.0 == 2 && by.0 == 3), "{error}");
    assert_eq!(sim.objects().len(), before, "who only looks writes nothing");

    let elsewhere = "tenants/u".parse().unwrap();
    assert!(EditLog::<Names>::reopen(&store, &elsewhere, next.ownership()).await.unwrap().is_none());
    let other = EditLog::<Names>::create(&store, &elsewhere, &[]).await.unwrap();
    let error = EditLog::<Names>::reopen(&store, &prefix(), other.ownership()).await.map(drop).unwrap_err();
    assert!(matches!(error, EditLogError::Conflict { .. }), "another's claim: {error}");
}

#[tokio::test]
async fn a_store_that_says_no_for_certain_fails_the_commit_and_only_that() {
    let sim = SimStore::new();
    let client = sim.client(0, Faults::default());
    let log = EditLog::<Names>::create(&client.store(), &prefix(), &[]).await.unwrap();
    client.set_link(Link::Failing(Failure::ReadOnly));
    let error = take(&log, "a", 1, false).await.unwrap_err();
    assert!(error.to_string().contains("the store is read-only"), "{error}");
    client.set_link(Link::Up);
    take(&log, "a", 2, false).await.unwrap();
    assert_eq!(log.state().past, imbl::vector![2]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_hears_in_time_that_the_store_is_away_and_its_edits_arrive_later() {
    let sim = SimStore::new();
    let client = sim.client(0, Faults::default());
    let log = EditLog::<Names>::create(&client.store(), &prefix(), &[]).await.unwrap();
    client.set_link(Link::Failing(Failure::Unreachable));
    let CommitError::Log(error) = take(&log, "a", 1, false).await.unwrap_err() else { panic!() };
    assert!(matches!(error, EditLogError::Unconfirmed { waited_s: 60, .. }), "{error}");
    assert!(error.to_string().contains("the store cannot be reached"), "{error}");
    client.set_link(Link::Up);
    // Planned with the edits that are still on their way.
    assert_eq!(take(&log, "a", 2, false).await.unwrap_err(), CommitError::Refused("a is taken".to_owned()));
    log.commit(|_| Ok::<_, String>((Vec::new(), ()))).await.unwrap();
    assert_eq!(log.state().past, imbl::vector![1]);
}

#[tokio::test]
async fn snapshots_bound_what_is_read_and_what_is_kept() {
    let sim = SimStore::new();
    let log = EditLog::<Names>::create(&sim.reliable(), &prefix(), &[]).await.unwrap();
    for value in 0..1000 {
        take(&log, &format!("n{value}"), value, false).await.unwrap();
    }
    tokio::task::yield_now().await;
    assert!(sim.objects().len() < 150, "entries that a snapshot covers are deleted, there are {}", sim.objects().len());
    let state = log.state();
    for generation in 2..20 {
        let log = EditLog::<Names>::take_over(&sim.reliable(), &prefix()).await.unwrap().unwrap();
        assert_eq!((log.state(), log.ownership().generation.0), (state.clone(), generation));
    }
    assert_eq!(read_state::<Names>(&sim.reliable(), &prefix()).await.unwrap().unwrap().0, *state);
    let CommitError::Log(EditLogError::Fenced { .. }) = take(&log, "x", 5000, false).await.unwrap_err() else { panic!("not fenced") };
}

#[tokio::test]
async fn what_is_damaged_missing_or_newer_is_refused_by_name() {
    let sim = SimStore::new();
    let log = EditLog::<Names>::create(&sim.reliable(), &prefix(), &[]).await.unwrap();
    for value in 0..3 {
        take(&log, &format!("n{value}"), value, false).await.unwrap();
    }
    let name = |number: u64| prefix().join(&format!("log/00000001/{number:012x}")).unwrap();
    let whole = sim.objects()[&name(2)].clone();
    let open = || async { EditLog::<Names>::take_over(&sim.reliable(), &prefix()).await.unwrap_err().to_string() };

    sim.set(&name(2), None);
    let error = open().await;
    assert_eq!(error, format!("{} is missing, though later entries of its log exist; restore it from a copy", name(2)));
    let mut damaged = whole.to_vec();
    damaged[30] ^= 1;
    sim.set(&name(2), Some(damaged.into()));
    let error = open().await;
    assert!(error.starts_with(&format!("{} is damaged: its CRC-32C is", name(2))), "{error}");
    sim.set(&name(2), Some(sim.objects()[&name(1)].clone()));
    let error = open().await;
    assert!(error.contains("it says that it is entry 1.1"), "{error}");
    sim.set(&name(2), Some(whole));
    open_as_older_release(&sim, &name(1)).await;
    assert!(EditLog::<Names>::take_over(&sim.reliable(), &prefix()).await.unwrap().is_some(), "attempts that failed do no harm");
}

/// A release that does not know the second half of the edits.
async fn open_as_older_release(sim: &SimStore, object: &ObjectName) {
    #[derive(Clone, Default)]
    struct Older;
    #[derive(Serialize, Deserialize, Debug)]
    enum OlderEdit {}
    impl State for Older {
        type Edit = OlderEdit;
        const FORMAT: LogFormat = LogFormat { edit_kinds: 0, ..FORMAT };
        fn apply(&mut self, _edit: &OlderEdit) -> Result<(), ApplyError> {
            Ok(())
        }
        fn for_each_edit(&self, _emit: &mut dyn FnMut(&OlderEdit)) {}
    }
    let error = read_state::<Older>(&sim.reliable(), &prefix()).await.map(|_| ()).unwrap_err();
    assert_eq!(error, EditLogError::NewerEdit { object: object.clone(), kind: 0, known: 0 });
    assert!(error.to_string().contains("upgrade Varve"), "{error}");
}

/// What became of an attempt to commit a value.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    value: u64,
    began: Instant,
    ended: Instant,
    /// `None`: nobody knows.
    acknowledged: Option<bool>,
}

/// Servers that take the log over from each other at random times, while callers of each take names, through clients
/// with every fault.
#[tokio::test(start_paused = true)]
async fn nothing_is_lost_or_invented_whoever_sleeps_and_whatever_fails() {
    let mut seen: HashMap<&str, u64> = HashMap::new();
    for seed in seeds(150) {
        let mut random = SeededRng::new(seed);
        let sim = SimStore::new();
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let next_value = Arc::new(AtomicU64::new(1));
        let (fenced, reopened) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        EditLog::<Names>::create(&sim.reliable(), &prefix(), &[]).await.unwrap();
        let mut servers = Vec::new();
        for _ in 0..3 {
            let faults = Faults {
                before: random.below(150) as u32,
                after: random.below(150) as u32,
                late: random.below(80) as u32,
                delay_ms_max: random.between(1, 40),
                late_ms_max: random.between(1, 20_000),
            };
            let client = sim.client(random.bits(), faults);
            let mut sleeper = random.fork();
            let asleep = client.clone();
            servers.push(tokio::spawn(async move {
                for _ in 0..6 {
                    tokio::time::sleep(Duration::from_millis(sleeper.below(1_500))).await;
                    asleep.set_link(Link::Frozen);
                    tokio::time::sleep(Duration::from_millis(sleeper.below(2_000))).await;
                    asleep.set_link(Link::Up);
                }
            }));
            servers.push(tokio::spawn(serve(
                client.store(),
                random.fork(),
                attempts.clone(),
                next_value.clone(),
                fenced.clone(),
                reopened.clone(),
            )));
        }
        for server in servers {
            server.await.unwrap();
        }
        // Late puts land, sleepers' last requests too.
        tokio::time::sleep(Duration::from_secs(200)).await;
        let (state, _) = read_state::<Names>(&sim.reliable(), &prefix()).await.unwrap_or_else(|e| panic!("seed {seed}: {e}")).unwrap();
        let taken_over = EditLog::<Names>::take_over(&sim.reliable(), &prefix()).await.unwrap().unwrap();
        assert_eq!(*taken_over.state(), state, "seed {seed}: a reader and the next owner must see the same");
        let attempts = attempts.lock().clone();
        check(seed, &state, &attempts);
        let count = |acknowledged| attempts.iter().filter(|a| a.acknowledged == acknowledged).count() as u64;
        for (what, n) in [("acknowledged", count(Some(true))), ("failed", count(Some(false))), ("unknown", count(None))] {
            *seen.entry(what).or_default() += n;
        }
        *seen.entry("fenced").or_default() += fenced.load(Ordering::Relaxed);
        *seen.entry("reopened").or_default() += reopened.load(Ordering::Relaxed);
        *seen.entry("snapshots").or_default() += sim.objects().keys().filter(|name| name.as_str().ends_with(".snapshot")).count() as u64;
    }
    println!("{seen:?}");
    for what in ["acknowledged", "failed", "unknown", "fenced", "reopened", "snapshots"] {
        assert!(seen[what] > 20, "the schedules must reach every outcome: {seen:?}");
    }
}

async fn serve(
    store: varve_storage::store::Store,
    mut random: SeededRng,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    next_value: Arc<AtomicU64>,
    fenced: Arc<AtomicU64>,
    reopened: Arc<AtomicU64>,
) {
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(random.below(3_000))).await;
        let Ok(Some(mut log)) = EditLog::<Names>::take_over(&store, &prefix()).await else { continue };
        let owner = log.ownership();
        for _ in 0..2 {
            let callers = (0..4).map(|_| {
                let (log, random, attempts, next_value) = (log.clone(), random.fork(), attempts.clone(), next_value.clone());
                tokio::spawn(call(log, random, attempts, next_value))
            });
            for caller in callers.collect::<Vec<_>>() {
                caller.await.unwrap();
            }
            if matches!(log.ended(), Some(EditLogError::Fenced { .. })) {
                assert_eq!((log.wait_lost().await, log.lost().is_some()), (log.ended(), true));
                fenced.fetch_add(1, Ordering::Relaxed);
                break;
            } else if let Some(error) = log.ended() {
                panic!("a log must end by fencing only, it ended with: {error}");
            }
            while !log.is_idle() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            // As after a time without callers: the log is dropped, and read again by the same right.
            match EditLog::reopen(&store, &prefix(), owner).await {
                Ok(Some(again)) => {
                    assert_eq!(again.state(), log.state(), "what was durable is there again, and nothing else");
                    reopened.fetch_add(1, Ordering::Relaxed);
                    log = again;
                }
                Ok(None) => panic!("an owner's claim is never deleted"),
                Err(EditLogError::Fenced { .. } | EditLogError::Store(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

async fn call(log: EditLog<Names>, mut random: SeededRng, attempts: Arc<Mutex<Vec<Attempt>>>, next_value: Arc<AtomicU64>) {
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        let value = next_value.fetch_add(1, Ordering::Relaxed);
        let (name, steal) = (format!("n{}", random.below(8)), random.chance(700));
        let began = Instant::now();
        let patience = if random.chance(50) { Duration::from_millis(30) } else { Duration::from_secs(300) };
        let outcome = tokio::time::timeout(patience, take(&log, &name, value, steal)).await;
        let acknowledged = match outcome {
            Ok(Ok(())) => Some(true),
            Ok(Err(CommitError::Log(EditLogError::Unconfirmed { .. }))) | Err(_) => None,
            Ok(Err(_)) => Some(false),
        };
        attempts.lock().push(Attempt { value, began, ended: Instant::now(), acknowledged });
    }
}

fn check(seed: u64, state: &Names, attempts: &[Attempt]) {
    let position: HashMap<u64, usize> = state.past.iter().enumerate().map(|(at, value)| (*value, at)).collect();
    assert_eq!(position.len(), state.past.len(), "seed {seed}: a value was committed twice");
    let tried: HashSet<u64> = attempts.iter().map(|attempt| attempt.value).collect();
    assert!(position.keys().all(|value| tried.contains(value)), "seed {seed}: a value was invented");
    for attempt in attempts {
        match attempt.acknowledged {
            Some(true) => assert!(position.contains_key(&attempt.value), "seed {seed}: acknowledged and lost: {attempt:?}"),
            Some(false) => assert!(!position.contains_key(&attempt.value), "seed {seed}: failed and yet there: {attempt:?}"),
            None => {}
        }
    }
    // What was acknowledged before another attempt began stands before it, whichever servers the two talked to.
    let mut acknowledged: Vec<_> = attempts.iter().filter(|a| a.acknowledged == Some(true)).collect();
    acknowledged.sort_by_key(|attempt| attempt.ended);
    let mut committed: Vec<_> = attempts.iter().filter(|a| position.contains_key(&a.value)).collect();
    committed.sort_by_key(|attempt| attempt.began);
    let (mut highest, mut earlier) = (None, acknowledged.into_iter().peekable());
    for attempt in committed {
        while let Some(before) = earlier.next_if(|before| before.ended < attempt.began) {
            highest = highest.max(Some(position[&before.value]));
        }
        assert!(highest < Some(position[&attempt.value]), "seed {seed}: {attempt:?} stands before one that was acknowledged earlier");
    }
}
