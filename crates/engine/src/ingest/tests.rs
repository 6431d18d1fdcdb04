//! Records made by hand: what is refused, and what the WAL index says of them.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use varve_postgres::control::{CheckPoint, Parameters};
use varve_postgres::lsn::WAL_PAGE_SIZE;
use varve_postgres::wal::synthesis::record_start_after;
use varve_postgres::wal::{FramedRecord, PageHeader, record_crc, rmgr};
use varve_postgres::{Lsn, Major, Timestamp};
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::history::{History, HistoryWriter};
use varve_storage::key::Key;
use varve_storage::value::Value;
use varve_storage::wal_index::{Boundary, WalIndexBuilder, page_of};
use varve_testing::naive_history::NaiveHistory;

use super::{Ingest, IngestError};
use crate::base_backup::{BackupTimeline, Options, write_base_backup};
use crate::cluster::ClusterFacts;
use crate::moments::{self, Found, MomentError};

const START: Lsn = Lsn(0x0100_0028);
const COMMIT: u8 = 0x00;
const ABORT: u8 = 0x20;

/// A history with nothing in it but what an ingest needs to begin.
fn begun() -> Arc<NaiveHistory> {
    let history = Arc::new(NaiveHistory::new(Major::V15, Lsn(8)));
    let checkpoint = CheckPoint {
        redo: Lsn(0x28),
        tli: 1,
        prev_tli: 1,
        full_page_writes: true,
        wal_level: 0,
        next_xid: 740,
        next_oid: 16384,
        next_multi: 1,
        next_multi_offset: 0,
        oldest_xid: 716,
        oldest_xid_db: 1,
        oldest_multi: 1,
        oldest_multi_db: 1,
        time: 0,
        oldest_commit_ts_xid: 0,
        newest_commit_ts_xid: 0,
        oldest_active_xid: 0,
    };
    let fields = CheckpointFields::of_checkpoint(&checkpoint, Parameters::default());
    history.put(Key::checkpoint(), START, Value::Image(fields.encode())).unwrap();
    let before = Boundary { end: Lsn(0), record_start: Lsn(0), next_xid: 740, time_max: Timestamp::MIN, time: None };
    let mut index = WalIndexBuilder::new(page_of(START), before);
    assert!(index.push(START, Lsn(START.0 - 0x28), 740, None));
    history.put(Key::wal_index(index.page()), START, Value::Image(index.encode())).unwrap();
    history.advance(START);
    history
}

/// Makes records one behind the other.
struct Stream {
    end: Lsn,
}

impl Stream {
    fn new() -> Stream {
        Stream { end: START }
    }

    /// The next record.
    fn record(&mut self, rmid: u8, info: u8, xid: u32, main_data: &[u8]) -> FramedRecord {
        let mut bytes = vec![0; 24];
        bytes[4..8].copy_from_slice(&xid.to_le_bytes());
        bytes[16..18].copy_from_slice(&[info, rmid]);
        if main_data.len() > 255 {
            bytes.push(254);
            bytes.extend_from_slice(&(main_data.len() as u32).to_le_bytes());
        } else {
            bytes.extend_from_slice(&[255, main_data.len() as u8]);
        }
        bytes.extend_from_slice(main_data);
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let crc = record_crc(&bytes);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        let start = record_start_after(self.end);
        let (mut at, mut left) = (start, u64::from(len));
        loop {
            let here = (WAL_PAGE_SIZE - at.page_offset()).min(left);
            at += here;
            left -= here;
            if left == 0 {
                break;
            }
            at += PageHeader::size_at(at) as u64;
        }
        self.end = at.align();
        FramedRecord { start, end: self.end, bytes: Bytes::from(bytes) }
    }
}

fn ingest_all(history: &Arc<NaiveHistory>, records: &[FramedRecord]) -> Ingest {
    let mut ingest = Ingest::open(history.clone(), history.applied()).unwrap();
    for record in records {
        ingest.record(record).unwrap();
    }
    ingest.advance().unwrap();
    ingest
}

#[test]
fn what_is_not_understood_stops_the_ingest_and_what_came_before_stays_readable() {
    let cases: [(u8, u8, &[u8], &str); 5] = [
        (130, 0x00, b"", "custom130"),
        (rmgr::BTREE, 0xF0, b"", "Btree"),
        (rmgr::XACT, 0x70, b"", "Transaction"),
        (rmgr::XACT, COMMIT, b"short", "cannot be ingested"),
        // max_connections to max_locks_per_transaction, wal_level 0, two switches
        (rmgr::XLOG, 0x60, &[0; 26], "wal_level"),
    ];
    for (rmid, info, data, expected) in cases {
        let history = begun();
        let mut stream = Stream::new();
        let good = stream.record(rmgr::LOGICALMSG, 0, 800, b"message");
        let bad = stream.record(rmid, info, 900, data);
        let after = stream.record(rmgr::LOGICALMSG, 0, 1000, b"message");
        let mut ingest = Ingest::open(history.clone(), history.applied()).unwrap();
        ingest.record(&good).unwrap();
        let error = ingest.record(&bad).unwrap_err();
        assert!(error.to_string().contains(expected) && error.to_string().contains(&bad.start.to_string()), "{error}");
        let again = ingest.record(&after).unwrap_err();
        assert_eq!(again.to_string(), error.to_string(), "it stays stopped");
        ingest.advance().expect("what came before becomes visible");
        assert!(ingest.stopped().is_some(), "it stays stopped");
        assert_eq!(history.applied(), good.end, "readers see the record before and no more");
        let last = moments::round_down(&*history, good.end, START, history.applied()).unwrap();
        assert_eq!((last.end, last.next_xid), (good.end, 801));
    }
}

#[test]
fn a_record_that_does_not_follow_is_refused() {
    let history = begun();
    let mut stream = Stream::new();
    let first = stream.record(rmgr::LOGICALMSG, 0, 0, b"first");
    let mut ingest = ingest_all(&history, std::slice::from_ref(&first));
    assert!(matches!(ingest.record(&first), Err(IngestError::OutOfOrder { .. })));
    let error = Ingest::open(history, Lsn(START.0 + 8)).err().expect("an ingest begins at record boundaries only");
    assert!(error.to_string().contains("boundary") || error.to_string().contains("applied"), "{error}");
}

#[test]
fn the_next_transaction_counts_epochs() {
    let history = begun();
    let mut stream = Stream::new();
    let mut records: Vec<_> = [0x6000_0000u32, 0xC000_0000, 0xFFFF_FFFF].map(|xid| stream.record(rmgr::LOGICALMSG, 0, xid, b"m")).into();
    let wrapped = records.last().unwrap().end;
    records.push(stream.record(rmgr::LOGICALMSG, 0, 100, b"m"));
    records.push(stream.record(rmgr::LOGICALMSG, 0, 0xFFFF_FFF0, b"an older one, still at work"));
    ingest_all(&history, &records);
    let next = |lsn| moments::round_down(&*history, lsn, START, history.applied()).unwrap().next_xid;
    assert_eq!(next(wrapped), 1 << 32 | 3);
    assert_eq!(next(history.applied()), 1 << 32 | 101);
}

#[test]
fn a_branch_does_not_see_its_parent_s_later_records() {
    let parent = begun();
    let mut stream = Stream::new();
    let shared: Vec<_> = (0..3).map(|_| stream.record(rmgr::LOGICALMSG, 0, 0, b"shared")).collect();
    let at = shared[1].end;
    // One batch, so that the index's value at the branch point names what comes later.
    let later: Vec<_> = (0..5).map(|_| stream.record(rmgr::LOGICALMSG, 0, 0, b"parent's own")).collect();
    ingest_all(&parent, &[shared, later].concat());
    let branch = Arc::new(parent.branch(at).unwrap());
    assert_eq!(moments::round_down(&*branch, at, at, at).unwrap().end, at);
    let mut own = Stream { end: at };
    let own: Vec<_> = (0..2).map(|_| own.record(rmgr::LOGICALMSG, 0, 0, &[b'x'; 9000])).collect();
    ingest_all(&branch, &own);
    let end = branch.applied();
    for lsn in at.0..end.0 {
        let expected = if Lsn(lsn) < own[0].end { at } else { own[0].end };
        let found = moments::round_down(&*branch, Lsn(lsn), at, end).unwrap();
        assert_eq!(found.end, expected, "the branch at {}", Lsn(lsn));
    }
}

/// A record of the generated stream: when its transaction ended, or how long it is.
#[derive(Clone, Debug)]
enum Step {
    Commit(i64),
    Abort(i64),
    Other(usize),
    EndOfBatch,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0i64..60).prop_map(Step::Commit),
        2 => (0i64..60).prop_map(Step::Abort),
        3 => (0usize..3000).prop_map(Step::Other),
        1 => (10_000usize..100_000).prop_map(Step::Other),
        2 => Just(Step::EndOfBatch),
    ];
    proptest::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn positions_and_moments_are_those_that_a_walk_over_all_records_finds(steps in steps(), time in 0i64..60) {
        let history = begun();
        let mut stream = Stream::new();
        let mut ingest = Ingest::open(history.clone(), START).unwrap();
        let mut records: Vec<(FramedRecord, Option<i64>)> = Vec::new();
        for step in steps {
            let (record, ended) = match step {
                Step::Commit(time) => (stream.record(rmgr::XACT, COMMIT, 750, &time.to_le_bytes()), Some(time)),
                Step::Abort(time) => (stream.record(rmgr::XACT, ABORT, 751, &time.to_le_bytes()), Some(time)),
                Step::Other(len) => (stream.record(rmgr::LOGICALMSG, 0, 0, &vec![7; len]), None),
                Step::EndOfBatch => {
                    ingest.advance().unwrap();
                    continue;
                }
            };
            ingest.record(&record).unwrap();
            records.push((record, ended));
        }
        ingest.advance().unwrap();
        let end = history.applied();

        let ends: Vec<Lsn> = std::iter::once(START).chain(records.iter().map(|(record, _)| record.end)).collect();
        for (record, _) in &records {
            for lsn in [record.end, Lsn(record.end.0 - 1), record.start] {
                let expected = *ends.iter().rfind(|end| **end <= lsn).unwrap();
                let found = moments::round_down(&*history, lsn, START, end).unwrap();
                prop_assert_eq!(found.end, expected);
                let own = records.iter().find(|(record, _)| record.end == expected);
                prop_assert_eq!(found.record_start, own.map_or(Lsn(START.0 - 0x28), |(record, _)| record.start));
            }
        }
        let later = moments::round_down(&*history, end + 1, START, end);
        let is_refused = matches!(later, Err(MomentError::Future { .. }));
        prop_assert!(is_refused, "the future: {later:?}");
        let earlier = moments::round_down(&*history, Lsn(START.0 - 1), START, end);
        let is_refused = matches!(earlier, Err(MomentError::BeforeHistory { .. }));
        prop_assert!(is_refused, "before history: {earlier:?}");

        let first_later = records.iter().position(|(_, ended)| ended.is_some_and(|ended| ended > time));
        match (moments::moment(&*history, Timestamp(time), START, end).unwrap(), first_later) {
            (Found::At(boundary), Some(i)) => prop_assert_eq!(boundary.end, ends[i]),
            (Found::AllOfIt(boundary), None) => prop_assert_eq!(boundary.end, end),
            other => prop_assert!(false, "{other:?}"),
        }

        // An ingest that goes on from what is stored says the same.
        let reopened = Ingest::open(history.clone(), end).unwrap();
        prop_assert_eq!(reopened.index.last().end, end);
        let checkpoint = history.get(Key::checkpoint(), end).unwrap();
        prop_assert!(checkpoint.is_some());
    }
}

/// A checkpoint of any numbers, then records of any contents.
fn any_records() -> impl Strategy<Value = Vec<(u8, u8, u32, Vec<u8>)>> {
    let data = proptest::collection::vec(any::<u8>(), 0..120);
    let small = (any::<u32>(), any::<u32>(), 0u32..4, proptest::collection::vec(any::<u32>(), 0..8)).prop_map(|(a, b, count, rest)| {
        // Counts where records have them, so that more of them parse.
        [a, b, count].into_iter().chain(rest).flat_map(u32::to_le_bytes).collect()
    });
    let checkpoint = proptest::collection::vec(any::<u8>(), 88);
    let record = prop_oneof![
        2 => (0u8..22, any::<u8>(), any::<u32>(), data),
        4 => (prop_oneof![Just(1u8), Just(2), Just(3), Just(4), Just(5), Just(6), Just(8), Just(18), Just(19)], any::<u8>(), any::<u32>(), small),
        1 => (Just(rmgr::XLOG), prop_oneof![Just(0x00u8), Just(0x10)], any::<u32>(), checkpoint),
    ];
    proptest::collection::vec(record, 1..40)
}

proptest! {
    #[test]
    fn any_record_is_ingested_or_refused_and_a_backup_of_what_comes_of_it_can_be_made(records in any_records()) {
        let history = begun();
        let mut stream = Stream::new();
        let mut ingest = Ingest::open(history.clone(), START).unwrap();
        for (rmid, info, xid, data) in records {
            let record = stream.record(rmid, info, xid, &data);
            if ingest.record(&record).is_err() {
                // Go on behind it, so that one bad record does not end the case.
                stream = Stream { end: ingest.end() };
                let Ok(again) = Ingest::open(history.clone(), history.applied()) else { break };
                stream.end = stream.end.min(again.end());
                ingest = again;
                continue;
            }
            ingest.advance().unwrap();
        }
        let end = history.applied();
        let base = moments::round_down(&*history, end, START, end).unwrap();
        let facts = BackupTimeline { system_identifier: 1, tli: 2, ancestors: Vec::new(), base, mock_authentication_nonce: [0; 32] };
        let cluster =
            ClusterFacts { major: Major::V15, catalog_version: 202_209_061, data_checksum_version: 0, default_char_signedness: true };
        let options = Options { slru: true, ..Options::default() };
        let backup = write_base_backup(&*history, &cluster, &facts, &options, std::io::sink());
        prop_assert!(backup.is_ok(), "{backup:?}");
    }
}
