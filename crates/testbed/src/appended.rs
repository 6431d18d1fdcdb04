//! Clients that append rows and remember of each when it was sent and when it was acknowledged; and which rows a branch
//! must have after a restore of it, which may or may not have committed.
//!
//! No row is sent twice, so that each row is in the histories that it was written to and in no other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::warned::Warned;
use anyhow::{Context as _, ensure};
use parking_lot::Mutex;

/// How long a client waits for one answer before it connects anew. Commits wait as long as a server restarts.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Pause after a row: the test is about when rows come, not about how many.
const PAUSE: Duration = Duration::from_millis(5);
/// Pause before a client that was sent away connects again.
const AGAIN: Duration = Duration::from_millis(20);

/// A row that was sent.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// The row.
    pub n: i64,
    /// No earlier than this was it sent.
    pub sent: Instant,
    /// No later than this was it acknowledged, if it was.
    pub acknowledged: Option<Instant>,
}

/// Clients that append rows to the table `appended`.
#[derive(Debug)]
pub struct Appenders {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    /// Why the last row that was not acknowledged was not.
    trouble: Arc<Mutex<String>>,
    threads: Vec<JoinHandle<anyhow::Result<Vec<Attempt>>>>,
}

impl Appenders {
    /// Makes the table.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prepare(conninfo: &str) -> anyhow::Result<()> {
        let filler = "filler text DEFAULT md5(random()::text) || repeat('x', 100)";
        crate::dev::psql(conninfo, &format!("CREATE TABLE appended (n bigint PRIMARY KEY, {filler})")).map(drop)
    }

    /// Starts `clients`, which take the numbers of their rows from `next`.
    pub fn start(conninfo: &str, clients: usize, next: &Arc<AtomicI64>) -> Appenders {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let trouble: Arc<Mutex<String>> = Arc::default();
        let client = |_| {
            let (conninfo, stop, count, next) = (conninfo.to_owned(), stop.clone(), count.clone(), next.clone());
            let trouble = trouble.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let mut attempts = Vec::new();
                runtime.block_on(append(&conninfo, &stop, &count, &next, &trouble, &mut attempts));
                Ok(attempts)
            })
        };
        let threads = (0..clients).map(client).collect();
        Appenders { stop, count, trouble, threads }
    }

    /// Waits until `more` further rows were acknowledged.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn wait_for(&self, more: u64, limit: Duration) -> anyhow::Result<()> {
        let enough = self.count.load(Ordering::SeqCst) + more;
        let what = format!("{more} further rows to be acknowledged");
        let waited = crate::limit::until(&what, limit, None, || Ok((self.count.load(Ordering::SeqCst) >= enough).then_some(())));
        waited.with_context(|| format!("the last row that was not acknowledged: {}", self.trouble.lock()))
    }

    /// Stops the clients when they have their answers, and gives what they sent.
    ///
    /// # Errors
    /// When a client could not run.
    pub fn stop(mut self) -> anyhow::Result<Vec<Attempt>> {
        self.stop.store(true, Ordering::SeqCst);
        let mut attempts = Vec::new();
        for thread in self.threads.drain(..) {
            attempts.extend(thread.join().ok().context("a client panicked")??);
        }
        Ok(attempts)
    }
}

impl Drop for Appenders {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

async fn append(
    conninfo: &str,
    stop: &AtomicBool,
    count: &AtomicU64,
    next: &AtomicI64,
    trouble: &Mutex<String>,
    attempts: &mut Vec<Attempt>,
) {
    while !stop.load(Ordering::SeqCst) {
        let session = match Warned::connect(conninfo, ANSWER_MAX).await {
            Ok(session) => session,
            Err(error) => {
                *trouble.lock() = format!("{error:#}");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        while !stop.load(Ordering::SeqCst) {
            let n = next.fetch_add(1, Ordering::SeqCst);
            session.begin();
            attempts.push(Attempt { n, sent: Instant::now(), acknowledged: None });
            let answer = tokio::time::timeout(ANSWER_MAX, session.client.execute("INSERT INTO appended (n) VALUES ($1)", &[&n])).await;
            // A commit that was let go ends with a warning.
            if !matches!(answer, Ok(Ok(1))) || session.is_warned() {
                *trouble.lock() = format!("{answer:?}, with a warning: {}", session.is_warned());
                break;
            }
            if let Some(attempt) = attempts.last_mut() {
                attempt.acknowledged = Some(Instant::now());
                count.fetch_add(1, Ordering::SeqCst);
            }
            tokio::time::sleep(PAUSE).await;
        }
        drop(session);
        if !stop.load(Ordering::SeqCst) {
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// The rows that a database shows. The index and the table must agree.
///
/// # Errors
/// When it cannot be asked, or a row is there twice.
pub fn rows(conninfo: &str) -> anyhow::Result<Rows> {
    let sql = "SET enable_seqscan = off; SELECT n FROM appended ORDER BY n; \
               SET enable_seqscan = on; SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off; \
               SELECT count(*) || ' ' || coalesce(sum(hashtextextended(appended::text, 0)), 0) FROM appended";
    let answer = crate::dev::psql(conninfo, sql)?;
    let (listed, digest) = answer.rsplit_once('\n').unwrap_or(("", &answer));
    let rows = listed.lines().map(str::parse).collect::<Result<Vec<i64>, _>>().context("the number of a row")?;
    let numbers: BTreeSet<i64> = rows.iter().copied().collect();
    ensure!(numbers.len() == rows.len(), "the index shows {} rows, which have {} numbers", rows.len(), numbers.len());
    let counted = digest.split(' ').next().unwrap_or_default();
    ensure!(counted == rows.len().to_string(), "the index shows {} rows, the table {counted}", rows.len());
    Ok(Rows { numbers, digest: digest.to_owned() })
}

/// See [`rows`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Their numbers.
    pub numbers: BTreeSet<i64>,
    /// How many they are, and a digest of all that stands in them.
    pub digest: String,
}

/// A branch shows what it must not. The rows named are the first few.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    /// What was acknowledged is in no history that must have it.
    #[error("{where_from}: missing are {rows:?}, which {why}")]
    Missing {
        /// Which history.
        where_from: &'static str,
        /// Why they must be there.
        why: &'static str,
        /// The rows.
        rows: Vec<i64>,
    },
    /// What was restored away is there.
    #[error("restored away, and still there: {0:?}")]
    StillThere(Vec<i64>),
    /// What nobody wrote is there.
    #[error("nobody wrote these rows: {0:?}")]
    Strange(Vec<i64>),
    /// A row went into the old history after one was acknowledged in the new one.
    #[error("row {old} was sent and acknowledged in the old history after row {new} had been acknowledged in the new one")]
    BackAndForth {
        /// In the old one.
        old: i64,
        /// In the new one.
        new: i64,
    },
}

/// What clients did around one restore, and what is there when all has come to rest.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// Rows that were there when the clients began.
    pub kept: &'a BTreeSet<i64>,
    /// What they sent.
    pub attempts: &'a [Attempt],
    /// The moment that was restored to lies between these two.
    pub moment: (Instant, Instant),
    /// When the restore was asked for.
    pub asked: Instant,
    /// When it was said to be done.
    pub told: Option<Instant>,
    /// What the branch shows.
    pub served: &'a BTreeSet<i64>,
    /// What its old history shows; none when the restore did not commit.
    pub before: Option<&'a BTreeSet<i64>>,
}

/// What a restore did to rows that were sent after its moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Acknowledged, all in all.
    pub acknowledged: usize,
    /// Acknowledged, and only in the old history.
    pub restored_away: usize,
    /// Acknowledged in the new history, after the restore.
    pub after: usize,
    /// There, though nobody was told so.
    pub unacknowledged: usize,
}

impl Around<'_> {
    /// Checks that each row is where it must be, and nowhere else.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<Counts, Fault> {
        let sent: BTreeSet<i64> = self.attempts.iter().map(|attempt| attempt.n).collect();
        let nothing = BTreeSet::new();
        let before = self.before.unwrap_or(&nothing);
        let strange = self.served.union(before).filter(|n| !self.kept.contains(n) && !sent.contains(n)).copied();
        none(strange, Fault::Strange)?;

        let unacknowledged = self.attempts.iter().filter(|attempt| attempt.acknowledged.is_none());
        let unacknowledged = unacknowledged.filter(|attempt| self.served.contains(&attempt.n) || before.contains(&attempt.n)).count();
        let acknowledged: Vec<(i64, Instant, Instant)> =
            self.attempts.iter().filter_map(|attempt| Some((attempt.n, attempt.sent, attempt.acknowledged?))).collect();
        let all = |chosen: &dyn Fn(Instant, Instant) -> bool| -> Vec<i64> {
            acknowledged.iter().filter(|(_, sent, ended)| chosen(*sent, *ended)).map(|(n, ..)| *n).collect()
        };
        let served = |why, rows: &mut dyn Iterator<Item = i64>| missing("the branch", why, rows, &[self.served]);
        served("were there before", &mut self.kept.iter().copied())?;
        let mut counts = Counts { acknowledged: acknowledged.len(), unacknowledged, ..Counts::default() };
        if self.before.is_none() {
            served("were acknowledged, and nothing was restored", &mut all(&|_, _| true).into_iter())?;
            return Ok(counts);
        }

        let old = |why, rows: &mut dyn Iterator<Item = i64>| missing("the old history", why, rows, &[before]);
        old("were there before", &mut self.kept.iter().copied())?;
        old("were acknowledged before the restore was asked for", &mut all(&|_, ended| ended < self.asked).into_iter())?;
        served("were acknowledged before the moment", &mut all(&|_, ended| ended < self.moment.0).into_iter())?;
        if let Some(told) = self.told {
            served("were sent after the restore was said to be done", &mut all(&|sent, _| sent > told).into_iter())?;
        }
        missing("both histories", "were acknowledged", &mut all(&|_, _| true).into_iter(), &[self.served, before])?;
        let since = |attempt: &&Attempt| attempt.sent > self.moment.1;
        let in_both = self.attempts.iter().filter(since).map(|attempt| attempt.n);
        none(in_both.filter(|n| self.served.contains(n) && before.contains(n)), Fault::StillThere)?;

        let since: Vec<_> = acknowledged.iter().filter(|(_, sent, _)| *sent > self.moment.1).collect();
        let (new, old): (Vec<_>, Vec<_>) = since.into_iter().partition(|(n, ..)| self.served.contains(n));
        counts.restored_away = old.len();
        counts.after = new.len();
        let last_old = old.iter().max_by_key(|(_, sent, _)| *sent);
        let first_new = new.iter().min_by_key(|(_, _, ended)| *ended);
        match (last_old, first_new) {
            (Some((old, sent, _)), Some((new, _, ended))) if sent > ended => Err(Fault::BackAndForth { old: *old, new: *new }),
            _ => Ok(counts),
        }
    }
}

/// Rows that an error names.
const NAMED_MAX: usize = 10;

fn none(rows: impl Iterator<Item = i64>, fault: impl FnOnce(Vec<i64>) -> Fault) -> Result<(), Fault> {
    let rows: Vec<i64> = rows.take(NAMED_MAX).collect();
    if rows.is_empty() { Ok(()) } else { Err(fault(rows)) }
}

fn missing(
    where_from: &'static str,
    why: &'static str,
    rows: &mut dyn Iterator<Item = i64>,
    histories: &[&BTreeSet<i64>],
) -> Result<(), Fault> {
    let lost = rows.filter(|n| !histories.iter().any(|history| history.contains(n)));
    none(lost, |rows| Fault::Missing { where_from, why, rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row n is sent at second 10 n and acknowledged 5 s later; the moment is between 20 and 21, the restore is asked
    /// for at 40, told at 60.
    struct Case {
        start: Instant,
        attempts: Vec<Attempt>,
    }

    impl Case {
        fn new() -> Case {
            let start = Instant::now();
            let at = |second: i64| start + Duration::from_secs(second.unsigned_abs());
            let attempt = |n: i64| Attempt { n, sent: at(10 * n), acknowledged: (n != 5).then(|| at(10 * n + 5)) };
            Case { start, attempts: (1..=8).map(attempt).collect() }
        }

        fn check(&self, served: &[i64], before: Option<&[i64]>) -> Result<Counts, Fault> {
            let at = |second: u64| self.start + Duration::from_secs(second);
            let set = |rows: &[i64]| rows.iter().copied().collect::<BTreeSet<i64>>();
            let (kept, served, before) = (set(&[0]), set(served), before.map(set));
            let around = Around {
                kept: &kept,
                attempts: &self.attempts,
                moment: (at(20), at(21)),
                asked: at(40),
                told: before.is_some().then(|| at(60)),
                served: &served,
                before: before.as_ref(),
            };
            around.check()
        }
    }

    fn lost(fault: Result<Counts, Fault>) -> Vec<i64> {
        match fault {
            Err(Fault::Missing { rows, .. }) => rows,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_restore_that_committed_divides_the_rows() {
        let case = Case::new();
        let counts = Counts { acknowledged: 7, restored_away: 2, after: 3, unacknowledged: 1 };
        assert_eq!(case.check(&[0, 1, 2, 6, 7, 8], Some(&[0, 1, 2, 3, 4, 5])), Ok(counts));
        // Row 2 was on its way at the moment: it may be restored away, and rows that nobody was told of may be gone.
        assert!(case.check(&[0, 1, 5, 6, 7, 8], Some(&[0, 1, 2, 3, 4])).is_ok());
    }

    #[test]
    fn a_restore_that_did_not_commit_takes_nothing_away() {
        let case = Case::new();
        assert_eq!(case.check(&[0, 1, 2, 3, 4, 6, 7, 8], None).unwrap().acknowledged, 7);
        assert_eq!(lost(case.check(&[0, 1, 2, 4, 6, 7, 8], None)), [3]);
        assert_eq!(lost(case.check(&[1, 2, 3, 4, 6, 7, 8], None)), [0]);
    }

    #[test]
    fn each_fault_is_found() {
        let case = Case::new();
        let before: &[i64] = &[0, 1, 2, 3, 4, 5];
        let served = |rows: &[i64]| case.check(rows, Some(before));
        assert_eq!(lost(served(&[1, 2, 6, 7, 8])), [0], "what was there before is gone");
        assert_eq!(lost(served(&[0, 2, 6, 7, 8])), [1], "acknowledged before the moment");
        assert_eq!(lost(served(&[0, 1, 2, 6, 8])), [7], "acknowledged after the restore");
        assert_eq!(served(&[0, 1, 2, 3, 6, 7, 8]), Err(Fault::StillThere(vec![3])));
        assert_eq!(served(&[0, 1, 2, 5, 6, 7, 8]), Err(Fault::StillThere(vec![5])), "though nobody was told of it");
        assert_eq!(served(&[0, 1, 2, 6, 7, 8, 99]), Err(Fault::Strange(vec![99])));

        let before = |rows: &[i64]| case.check(&[0, 1, 2, 6, 7, 8], Some(rows));
        assert_eq!(lost(before(&[1, 2, 3, 4])), [0], "the old history has lost what was there before");
        assert_eq!(lost(before(&[0, 1, 2, 4])), [3], "the old history has lost what was acknowledged in it");
        assert_eq!(lost(case.check(&[0, 1, 2, 6, 8], Some(&[0, 1, 2, 3, 4, 7]))), [7], "in the old history, after all was said to be done");
        let turned = case.check(&[0, 1, 2, 4, 7, 8], Some(&[0, 1, 2, 3, 6]));
        assert_eq!(turned, Err(Fault::BackAndForth { old: 6, new: 4 }), "the old history is served after the new one");
    }
}
