//! A branch at any LSN, or at any time, is what stock Postgres recovers to there.
//!
//! The oracle has nothing of ours: a base backup of the compute, its WAL as `pg_receivewal` gets it, record boundaries
//! as `pg_waldump` prints them, and `recovery_target_lsn` and `recovery_target_time`.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use varve_postgres::{Lsn, Major};
use varve_testbed::application::{load, start};
use varve_testbed::beside::{Archive, Private, Target, WalRecord, recovered};
use varve_testbed::dev::{Dev, psql};
use varve_testbed::dump::{Sequences, ensure_same, everything};
use varve_testbed::postgres::{Postgres, is_skipped};
use varve_testing::random::SeededRng;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// LSNs that are compared, unless `VARVE_TEST_LSNS` says how many.
const LSNS: usize = 30;
/// The same for other majors than 15.
const LSNS_OF_OTHERS: usize = 4;
/// Among so many LSNs comes one time.
const LSNS_PER_TIME: usize = 5;
/// Comparisons that run side by side.
const LANES: usize = 2;
/// Bytes in a WAL page, and of its header: that of a segment's first page, and of others.
const WAL_PAGE: u64 = 8192;
const LONG_HEADER: u64 = 40;
const SHORT_HEADER: u64 = 24;
/// Settings of the recovered servers.
const PLAIN: [(&str, &str); 3] = [("shared_buffers", "'32MB'"), ("autovacuum", "off"), ("wal_recycle", "off")];

/// A moment as a person gives it.
#[derive(Debug)]
enum Moment {
    Lsn(Lsn),
    /// As Postgres prints it, in UTC.
    Time(String),
}

/// A load that is over, with all that recovery needs.
struct Loaded {
    major: Major,
    dev: Dev,
    base: Postgres,
    archive: Archive,
    /// Records from the base backup's end on.
    records: Vec<WalRecord>,
}

fn loaded(major: Major) -> anyhow::Result<Loaded> {
    // Row by row, copies are only the same where nobody cleans up on one of them.
    let autovacuum = if major <= Major::V15 { "on" } else { "off" };
    let dev = Dev::start_for(VARVE, major, &[])?;
    let compute = start(&dev, major, &[("autovacuum", autovacuum)])?;
    let db = compute["conninfo"].as_str().context("a compute has a conninfo")?;
    let private = Private::of(&compute)?;
    let base = private.base_backup(&[])?;
    let from: Lsn = psql(db, "SELECT pg_current_wal_flush_lsn()")?.parse().context("an LSN")?;
    load(db, major, 1, 4, &["-R", "250"])?;
    // Everything up to here is flushed, and no record goes on behind it.
    let end: Lsn = psql(db, "SELECT pg_switch_wal()")?.parse().context("an LSN")?;
    let archive = private.archive()?;
    let records = archive.records(1, from, end)?;
    ensure!(records.len() > 1000, "the load wrote {} records", records.len());
    Ok(Loaded { major, dev, base, archive, records })
}

/// Where the first record at or after a boundary begins: behind the page's header.
fn first_record_at(boundary: Lsn) -> Lsn {
    if !boundary.0.is_multiple_of(WAL_PAGE) {
        return boundary;
    }
    let header = if boundary.segment_offset() == 0 { LONG_HEADER } else { SHORT_HEADER };
    Lsn(boundary.0 + header)
}

/// Where the record before the one that begins at `start` ends.
fn boundary_before(start: Lsn) -> Lsn {
    let page = Lsn(start.0 - start.0 % WAL_PAGE);
    if start.0 > page.0 && start <= first_record_at(page) { page } else { start }
}

impl Loaded {
    /// The boundary that a branch at `lsn` must begin at: the end of the last record that ends at or before it.
    fn round_down(&self, lsn: Lsn) -> Lsn {
        let begun = self.records.partition_point(|record| boundary_before(record.start) <= lsn);
        boundary_before(self.records[begun.saturating_sub(1)].start)
    }

    /// Compares a branch at a moment with a server that Postgres recovered to it.
    fn compare(&self, name: &str, moment: [&str; 2], target: &Target) -> anyhow::Result<()> {
        let theirs = recovered(&self.base, &self.archive, target, &PLAIN)?;
        let branch = self.dev.json(&["branch", "create", &format!("acme/{name}"), moment[0], moment[1]])?;
        if let Target::Lsn(expected) = target {
            ensure!(branch["branch_lsn"] == expected.to_string().as_str(), "the branch begins at {expected}, got {branch}");
        }
        let branch = format!("acme/{name}");
        let ours = self.dev.compute(&branch, &[])?;
        let theirs_conninfo = theirs.conninfo("postgres");
        let (expected, found) = std::thread::scope(|scope| {
            let expected = scope.spawn(|| everything(&theirs_conninfo, self.major));
            let found = everything(&ours, self.major);
            (expected.join(), found)
        });
        let expected = expected.map_err(|_| anyhow::anyhow!("dumping panicked"))?;
        ensure_same(&expected?, &found?, Sequences::Exact)?;
        let prepared = "SELECT transaction, gid, owner, database FROM pg_prepared_xacts ORDER BY gid";
        let (expected, found) = (theirs.psql("postgres", prepared)?, psql(&ours, prepared)?);
        ensure!(expected.trim_end() == found, "prepared transactions are {found}, expected {expected}");
        self.dev.json(&["compute", "stop", &branch])?;
        Ok(())
    }

    fn check(&self, name: &str, moment: &Moment) -> anyhow::Result<()> {
        match moment {
            Moment::Lsn(lsn) => {
                let boundary = self.round_down(*lsn);
                self.compare(name, ["--lsn", &lsn.to_string()], &Target::Lsn(boundary))
                    .with_context(|| format!("a branch at {lsn}, which is {boundary}"))
            }
            Moment::Time(time) => {
                let rfc3339 = format!("{}Z", time.replace(' ', "T"));
                self.compare(name, ["--at", &rfc3339], &Target::Time(format!("{time}+00"))).with_context(|| format!("a branch at {time}"))
            }
        }
    }
}

/// Microseconds since the first hour of the day, of a time as Postgres prints it; the load does not pass midnight
/// unnoticed.
fn microseconds(time: &str) -> anyhow::Result<i64> {
    let (_, clock) = time.split_once(' ').context("a date and a time")?;
    let parse = || {
        let mut parts = clock.split([':', '.']);
        let mut next = || parts.next().and_then(|part| part.parse::<i64>().ok());
        Some(((next()? * 60 + next()?) * 60 + next()?) * 1_000_000 + next().unwrap_or(0))
    };
    parse().with_context(|| format!("{time} is a time"))
}

/// A time between the ends of two transactions that follow each other, if there is one.
fn between(before: &str, after: &str) -> anyhow::Result<Option<String>> {
    let (a, b) = (microseconds(before)?, microseconds(after)?);
    if b - a < 2 {
        return Ok(None);
    }
    let middle = (a + b) / 2;
    let (seconds, micros) = (middle / 1_000_000, middle % 1_000_000);
    let date = before.split(' ').next().unwrap_or_default();
    Ok(Some(format!("{date} {:02}:{:02}:{:02}.{micros:06}", seconds / 3600, seconds / 60 % 60, seconds % 60)))
}

/// A third of them anywhere; the others before and behind a record of a random type, so that rare ones are met as often
/// as those of rows.
fn random_lsns(loaded: &Loaded, random: &mut SeededRng, count: usize) -> Vec<Moment> {
    let records = &loaded.records;
    let (first, last) = (records[0].start, records[records.len() - 1].start);
    let mut of_type: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    // The one behind is taken too, so it must be there.
    for (at, record) in records[..records.len() - 1].iter().enumerate() {
        of_type.entry(&record.rmgr).or_default().push(at);
    }
    let of_type: Vec<&Vec<usize>> = of_type.values().collect();
    let mut moments = Vec::new();
    for i in 0..count {
        let places = of_type[random.below(of_type.len() as u64) as usize];
        let at = places[random.below(places.len() as u64) as usize];
        moments.push(Moment::Lsn(match i % 3 {
            0 => Lsn(random.between(first.0, last.0)),
            1 => boundary_before(records[at].start),
            _ => boundary_before(records[at + 1].start),
        }));
    }
    moments
}

/// Right behind each record of a tablespace: its drop cannot be undone, and is done before its transaction ends.
fn behind_tablespace_records(loaded: &Loaded) -> impl Iterator<Item = Moment> {
    let pairs = loaded.records.windows(2).filter(|pair| pair[0].rmgr == "Tablespace");
    pairs.map(|pair| Moment::Lsn(boundary_before(pair[1].start)))
}

/// Half of them exactly when a transaction ended, half between two ends.
fn random_times(loaded: &Loaded, random: &mut SeededRng, count: usize) -> anyhow::Result<Vec<Moment>> {
    let times: Vec<&str> = loaded.records.iter().filter_map(|record| record.end_time.as_deref()).collect();
    ensure!(times.len() > 100, "{} transactions ended", times.len());
    let mut chosen = Vec::new();
    while chosen.len() < count {
        let at = random.below(times.len() as u64 - 1) as usize;
        let time = if chosen.len().is_multiple_of(2) { Some(times[at].to_owned()) } else { between(times[at], times[at + 1])? };
        // Recovery stops only at a transaction that ended later.
        chosen.extend(time.filter(|time| times[times.len() - 1] > time.as_str()).map(Moment::Time));
    }
    Ok(chosen)
}

/// Compares branches at so many random LSNs, and, on 15, which has the programs that tell them, at random times.
fn branches_are_what_postgres_recovers_to(major: Major, lsns: usize) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let lsns = match std::env::var("VARVE_TEST_LSNS") {
        Ok(count) => count.parse().with_context(|| format!("VARVE_TEST_LSNS is a number, got {count:?}"))?,
        Err(_) => lsns,
    };
    let loaded = loaded(major)?;
    let mut random = SeededRng::new(u64::from(std::process::id()));
    let mut moments = random_lsns(&loaded, &mut random, lsns);
    if major == Major::V15 {
        moments.extend(random_times(&loaded, &mut random, lsns / LSNS_PER_TIME)?);
        moments.extend(behind_tablespace_records(&loaded));
    }
    println!("{} records; {moments:?}", loaded.records.len());
    let lane = |lane: usize| {
        let mut mine = moments.iter().enumerate().skip(lane).step_by(LANES);
        mine.try_for_each(|(i, moment)| loaded.check(&format!("b{i}"), moment))
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|i| scope.spawn(move || lane(i))).collect();
        lanes.into_iter().try_for_each(|lane| lane.join().map_err(|_| anyhow::anyhow!("a comparison panicked"))?)
    })
}

#[test]
fn during_a_load_on_15() -> anyhow::Result<()> {
    branches_are_what_postgres_recovers_to(Major::V15, LSNS)
}

#[test]
fn during_a_load_on_14() -> anyhow::Result<()> {
    branches_are_what_postgres_recovers_to(Major::V14, LSNS_OF_OTHERS)
}

#[test]
fn during_a_load_on_16() -> anyhow::Result<()> {
    branches_are_what_postgres_recovers_to(Major::V16, LSNS_OF_OTHERS)
}

#[test]
fn during_a_load_on_17() -> anyhow::Result<()> {
    branches_are_what_postgres_recovers_to(Major::V17, LSNS_OF_OTHERS)
}

#[test]
fn during_a_load_on_18() -> anyhow::Result<()> {
    branches_are_what_postgres_recovers_to(Major::V18, LSNS_OF_OTHERS)
}
