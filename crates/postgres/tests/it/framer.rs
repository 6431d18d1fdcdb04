//! The framer: the same records however the stream is cut, wherever it begins; nothing that changed on the way passes;
//! no input makes it panic.

use bytes::Bytes;
use proptest::prelude::*;
use varve_postgres::lsn::{WAL_PAGE_SIZE, WAL_SEGMENT_SIZE};
use varve_postgres::wal::{FramedRecord, Framer, PageHeader, RECORD_HEADER_SIZE, WalError, record_crc, rmgr};
use varve_postgres::{Lsn, Major};
use varve_testbed::postgres::Postgres;

const MAJOR: Major = Major::V15;
const SYSTEM: u64 = 0x1234_5678_9ABC_DEF0;
const XLOG_SWITCH: u8 = 0x40;

/// WAL written as Postgres writes it, without Postgres.
struct WalWriter {
    start: Lsn,
    bytes: Vec<u8>,
    prev: Lsn,
    records: Vec<(Lsn, Lsn, Vec<u8>)>,
}

impl WalWriter {
    fn new(start: Lsn) -> WalWriter {
        WalWriter { start, bytes: Vec::new(), prev: Lsn(start.0 - 64), records: Vec::new() }
    }

    fn at(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    fn page_header(&mut self, remaining_len: u32, overwrites_contrecord: bool) {
        let at = self.at();
        if at.page_offset() == 0 {
            let header =
                PageHeader { major: MAJOR, tli: 1, lsn: at, remaining_len, overwrites_contrecord, system_identifier: Some(SYSTEM) };
            self.bytes.extend_from_slice(&header.encode());
        }
    }

    fn record(&mut self, payload: &[u8], rmid: u8, info: u8) {
        self.page_header(0, false);
        let start = self.at();
        let record = record(payload, self.prev, rmid, info);
        let mut rest = &record[..];
        while !rest.is_empty() {
            self.page_header(rest.len() as u32, false);
            let n = rest.len().min((WAL_PAGE_SIZE - self.at().page_offset()) as usize);
            self.bytes.extend_from_slice(&rest[..n]);
            rest = &rest[n..];
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.prev = start;
        self.records.push((start, self.at(), record));
    }

    fn switch(&mut self) {
        self.record(&[], rmgr::XLOG, XLOG_SWITCH);
        let end = Lsn(self.at().0.next_multiple_of(WAL_SEGMENT_SIZE));
        self.bytes.resize((end.0 - self.start.0) as usize, 0);
        self.records.last_mut().expect("the switch").1 = end;
    }

    /// A record whose end was never written, and what a server writes after it recovered from that.
    fn aborted_record(&mut self, len: usize) {
        self.page_header(0, false);
        let room = (WAL_PAGE_SIZE - self.at().page_offset()) as usize;
        let record = record(&vec![7; len.max(room)], self.prev, rmgr::HEAP, 0);
        self.bytes.extend_from_slice(&record[..room]);
        self.page_header(0, true);
    }
}

fn record(payload: &[u8], prev: Lsn, rmid: u8, info: u8) -> Vec<u8> {
    let mut record = Vec::new();
    record.extend_from_slice(&((RECORD_HEADER_SIZE + payload.len()) as u32).to_le_bytes());
    record.extend_from_slice(&77u32.to_le_bytes());
    record.extend_from_slice(&prev.0.to_le_bytes());
    record.extend_from_slice(&[info, rmid, 0, 0, 0, 0, 0, 0]);
    record.extend_from_slice(payload);
    let crc = record_crc(&record);
    record[20..24].copy_from_slice(&crc.to_le_bytes());
    record
}

#[derive(Clone, Debug)]
enum Step {
    Record(usize),
    Switch,
    Aborted(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (0usize..300).prop_map(Step::Record),
        4 => (0usize..40_000).prop_map(Step::Record),
        1 => Just(Step::Switch),
        1 => (0usize..30_000).prop_map(Step::Aborted),
    ];
    prop::collection::vec(step, 1..60)
}

/// Begins a little before the end of a segment, so that its edge is crossed.
fn written(before_edge: u64, steps: &[Step]) -> WalWriter {
    let mut wal = WalWriter::new(Lsn(5 * WAL_SEGMENT_SIZE - before_edge / 8 * 8));
    let mut switches = 0;
    for (i, step) in steps.iter().enumerate() {
        match step {
            Step::Record(len) => wal.record(&vec![i as u8; *len], rmgr::HEAP, 0),
            Step::Switch if switches == 0 => {
                wal.switch(); // one is enough: each fills up 16 MiB
                switches += 1;
            }
            Step::Switch => wal.record(&[], rmgr::HEAP, 0),
            Step::Aborted(len) => {
                wal.aborted_record(*len);
                wal.record(b"overwritten", rmgr::XLOG, 0xD0);
            }
        }
    }
    wal
}

/// All records that come out of `stream` cut into pieces of these sizes, over and over.
fn frame(framer: &mut Framer, stream: &Bytes, cuts: &[usize]) -> Result<Vec<FramedRecord>, WalError> {
    let mut records = Vec::new();
    let mut rest = stream.clone();
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let mut piece = rest.split_to((*cuts.next().expect("a cut")).clamp(1, rest.len()));
        while let Some(record) = framer.next_record(&mut piece)? {
            assert!(record.end == framer.framed() && record.end <= framer.position().align(), "a boundary is not ahead of what came");
            records.push(record);
        }
        assert!(piece.is_empty(), "without a record the input must be used up");
    }
    Ok(records)
}

fn as_written(records: &[FramedRecord]) -> Vec<(Lsn, Lsn, Vec<u8>)> {
    records.iter().map(|record| (record.start, record.end, record.bytes.to_vec())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cuts_do_not_matter(before_edge in 64u64..60_000, steps in steps(), cuts in prop::collection::vec(1usize..9000, 1..8)) {
        let wal = written(before_edge, &steps);
        let stream = Bytes::from(wal.bytes.clone());
        for cuts in [&cuts[..], &[usize::MAX], &[131_072]] {
            let mut framer = Framer::new(MAJOR, Some(SYSTEM), wal.start, Some(Lsn(wal.start.0 - 64)));
            let records = frame(&mut framer, &stream, cuts).expect("WAL as Postgres writes it");
            prop_assert!(as_written(&records) == wal.records, "cut into {:?}", cuts);
            prop_assert_eq!(framer.framed(), wal.records.last().expect("a record").1);
            prop_assert_eq!(framer.position(), wal.at());
            prop_assert_eq!(framer.last_record(), Some(wal.prev));

            let mut framer = Framer::new(MAJOR, Some(SYSTEM), wal.start, Some(Lsn(wal.start.0 - 64)));
            let (mut views, mut rest) = (Vec::new(), &wal.bytes[..]);
            for cut in cuts.iter().cycle() {
                let (mut piece, behind) = rest.split_at((*cut).min(rest.len()));
                while let Some(record) = framer.next_record(&mut piece).expect("WAL as Postgres writes it") {
                    views.push((record.start, record.end, record.bytes.to_vec()));
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(views == wal.records, "a slice cut into {:?}", cuts);
        }
    }

    #[test]
    fn it_goes_on_at_any_record_and_from_any_page(before_edge in 64u64..60_000, steps in steps(), pick in any::<prop::sample::Index>()) {
        let wal = written(before_edge, &steps);
        let stream = Bytes::from(wal.bytes.clone());
        let k = pick.index(wal.records.len());
        // At the end of the record before, which may be the start of a page.
        let (from, prev) = if k == 0 { (wal.start, None) } else { (wal.records[k - 1].1, Some(wal.records[k - 1].0)) };
        let mut framer = Framer::new(MAJOR, Some(SYSTEM), from, prev);
        let records = frame(&mut framer, &stream.slice((from.0 - wal.start.0) as usize..), &[777]).expect("the rest");
        prop_assert!(as_written(&records) == wal.records[k..]);

        // From a page's start, whatever is there: all records that begin on it or after it. (Not in the void behind a
        // switch.)
        let from = wal.records[k].0.page_start();
        if from >= wal.start {
            let mut framer = Framer::from_page(MAJOR, Some(SYSTEM), from);
            let records = frame(&mut framer, &stream.slice((from.0 - wal.start.0) as usize..), &[4096, 5]).expect("the rest");
            let first = wal.records.iter().position(|record| record.0 >= from).unwrap_or(wal.records.len());
            prop_assert!(as_written(&records) == wal.records[first..], "from page {}", from);
        }
    }

    #[test]
    fn a_changed_byte_is_found_and_stays_found(before_edge in 64u64..60_000, steps in steps(),
                                               at in any::<prop::sample::Index>(), bit in 0u32..8, cut in 1usize..20_000) {
        let mut wal = written(before_edge, &steps);
        let k = at.index(wal.records.len());
        let (start, _, bytes) = wal.records[k].clone();
        // A byte of the record itself: page headers have fields that nobody checks.
        let mut lsn = start + at.index(bytes.len()) as u64 % (WAL_PAGE_SIZE - start.page_offset());
        if lsn.page_offset() == 0 {
            lsn = start;
        }
        let index = (lsn.0 - wal.start.0) as usize;
        wal.bytes[index] ^= 1 << bit;
        let stream = Bytes::from(wal.bytes.clone());
        // Without the record before, a changed length could hide the very first record behind one that was given up.
        let mut framer = Framer::new(MAJOR, Some(SYSTEM), wal.start, Some(Lsn(wal.start.0 - 64)));
        let mut good = Vec::new();
        let mut rest = stream.clone();
        let error = loop {
            if rest.is_empty() {
                break None;
            }
            let mut piece = rest.split_to(cut.min(rest.len()));
            let step = loop {
                match framer.next_record(&mut piece) {
                    Ok(Some(record)) => good.push(record),
                    other => break other,
                }
            };
            if let Err(error) = step {
                break Some(error);
            }
        };
        prop_assert!(as_written(&good) == wal.records[..k], "records before the change come, it and those after it do not");
        prop_assert!(framer.framed() <= start, "nothing behind the change counts");
        if let Some(error) = error {
            prop_assert_eq!(framer.next_record(&mut Bytes::from(vec![0; 9000])).expect_err("an error is for ever"), error);
        }
    }

    #[test]
    fn garbage_is_an_error_or_nothing(start in any::<u64>(), bytes in prop::collection::vec(any::<u8>(), 0..30_000), from_page in any::<bool>()) {
        let start = Lsn(start >> 8);
        let mut framer = if from_page { Framer::from_page(MAJOR, None, start) } else { Framer::new(MAJOR, None, start, None) };
        let mut input = Bytes::from(bytes);
        while let Ok(Some(_)) = framer.next_record(&mut input) {}
    }
}

#[test]
fn a_record_start_that_cannot_be_does_not_panic() {
    // Three bytes before a page's end no record begins.
    let start = Lsn(WAL_SEGMENT_SIZE + WAL_PAGE_SIZE - 3);
    let mut framer = Framer::new(MAJOR, None, start, None);
    let mut bytes = vec![40, 0, 0];
    let header =
        PageHeader { major: MAJOR, tli: 1, lsn: start + 3, remaining_len: 37, overwrites_contrecord: false, system_identifier: None };
    bytes.extend_from_slice(&header.encode());
    bytes.extend_from_slice(&[0; 100]);
    assert!(framer.next_record(&mut Bytes::from(bytes)).is_err(), "a length that is cut by a page's end is refused");
}

#[test]
fn what_is_not_ours_is_named() {
    let wal = written(64, &[Step::Record(100), Step::Record(9000), Step::Record(9000)]);
    let stream = Bytes::from(wal.bytes.clone());
    for (mut framer, why) in [
        (Framer::new(MAJOR, Some(1), wal.start, None), "system identifier 1311768467463790320, expected 1"),
        (Framer::new(Major::V16, None, wal.start, None), "the page is of PostgreSQL 15, expected PostgreSQL 16"),
        (Framer::new(MAJOR, None, wal.start, Some(Lsn(8))), "says that the record before is at"),
        (Framer::new(MAJOR, None, wal.start + WAL_SEGMENT_SIZE, None), "the page says that it is the one at"),
    ] {
        let error = frame(&mut framer, &stream, &[usize::MAX]).expect_err(why).to_string();
        assert!(error.contains(why), "expected '{why}' in '{error}'");
    }
}

#[test]
fn a_real_stream_comes_out_the_same_however_it_is_cut() {
    let mut postgres = Postgres::init(MAJOR, &[], &[("wal_keep_size", "1GB"), ("max_wal_size", "4GB")]).expect("a cluster");
    postgres.start().expect("a running Postgres");
    postgres
        .psql(
            "postgres",
            "CREATE TABLE t (i int PRIMARY KEY, x text); INSERT INTO t SELECT i, repeat('x', i % 3000) FROM generate_series(1, 20000) i; \
             DELETE FROM t WHERE i % 3 = 0",
        )
        .expect("a load");
    for sql in [
        "VACUUM t",
        "SELECT pg_switch_wal()",
        "SELECT 1 FROM pg_logical_emit_message(true, 'x', repeat('y', 18000000))",
        "SELECT pg_switch_wal()",
        "UPDATE t SET x = 'z'",
    ] {
        postgres.psql("postgres", sql).expect(sql);
    }
    let end: Lsn = postgres.psql("postgres", "SELECT pg_current_wal_flush_lsn()").expect("a position").trim().parse().expect("an LSN");
    let identifier: u64 =
        postgres.psql("postgres", "SELECT system_identifier FROM pg_control_system()").expect("a number").trim().parse().expect("a number");
    let segments = postgres.wal_segments().expect("segments");
    let first = Lsn(WAL_SEGMENT_SIZE); // a new cluster's WAL begins with segment 1
    let mut wal = Vec::new();
    for segment in segments {
        wal.extend_from_slice(&std::fs::read(segment).expect("a segment"));
    }
    wal.truncate((end.0 - first.0) as usize);
    let stream = Bytes::from(wal);

    let mut whole = Framer::from_page(MAJOR, Some(identifier), first);
    let expected = frame(&mut whole, &stream, &[usize::MAX]).expect("Postgres's own WAL");
    assert_eq!(whole.framed(), end, "the flush position is the end of a record");
    assert!(expected.len() > 30_000 && expected.iter().any(|record| record.bytes.len() > 17_000_000), "{} records", expected.len());
    for cuts in [&[1usize, 2, 3, 5, 7, 8191, 8193][..], &[131_072], &[16_777_216], &[24, 40, 8168]] {
        let mut framer = Framer::from_page(MAJOR, Some(identifier), first);
        let records = frame(&mut framer, &stream, cuts).expect("the same WAL");
        assert!(as_written(&records) == as_written(&expected), "cut into {cuts:?}");
    }
    // From the middle of a segment, at a record and at a page.
    for k in (1..expected.len()).step_by(expected.len() / 40) {
        let (from, prev) = (expected[k - 1].end, expected[k - 1].start);
        let rest = stream.slice((from.0 - first.0) as usize..);
        let rest = rest.slice(..rest.len().min(3 << 20));
        let mut framer = Framer::new(MAJOR, Some(identifier), from, Some(prev));
        let records = frame(&mut framer, &rest, &[50_000]).expect("the rest");
        assert!(as_written(&records) == as_written(&expected[k..k + records.len()]), "from the record at {from}");
        let page = expected[k].start.page_start();
        let rest = stream.slice((page.0 - first.0) as usize..);
        let rest = rest.slice(..rest.len().min(3 << 20));
        let records = frame(&mut Framer::from_page(MAJOR, Some(identifier), page), &rest, &[50_000]).expect("the rest");
        let at = expected.iter().position(|record| record.start >= page).expect("a record");
        assert!(as_written(&records) == as_written(&expected[at..at + records.len()]), "from the page at {page}");
    }
}
