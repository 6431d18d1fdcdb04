//! WAL that no server wrote: the one shutdown checkpoint with which a server starts at any record boundary.
//!
//! At the boundary X stands an `XLOG_CHECKPOINT_SHUTDOWN` record whose `xl_prev` is the true record before X, so that a
//! timeline stays one continuous stream over all the servers that wrote it. The pages from the start of X's segment to
//! X hold no WAL, only headers that say "a record that began before this segment goes on, and ends at X": `xlp_rem_len`
//! counts down from page to page. `pg_waldump` and the server's own readers then skip to X. Behind the record stand
//! zeros, the end of WAL.
//!
//! What is written, with X in the middle of a segment's third page:
//! ```text
//! segment start        page 2               page 3         X
//! | header, rem=a | 0  | header, rem=b | 0  | header, rem=c | checkpoint record | 0 ... segment end
//! ```
//! with `c` the bytes from the header to X, `b = c +` what page 2 holds, and so on. Where X is the start of a page,
//! that page begins with the record.

use crate::control::{CHECKPOINT_SIZE, CheckPoint};
use crate::lsn::{WAL_PAGE_SIZE, WAL_SEGMENT_SIZE, wal_segment_name};
use crate::{Lsn, Major};

use super::{PageHeader, RECORD_HEADER_SIZE, record_crc, rmgr};

/// Bytes of a checkpoint record.
pub const CHECKPOINT_RECORD_SIZE: usize = RECORD_HEADER_SIZE + 2 + CHECKPOINT_SIZE;
/// `XLR_BLOCK_ID_DATA_SHORT`.
const ID_DATA_SHORT: u8 = 255;
/// A server that starts with its WAL beyond this part of a segment fills the next segment with zeros
/// (`PreallocXlogFiles`).
const PREALLOCATE_FROM: u64 = WAL_SEGMENT_SIZE / 4 * 3;

/// A file in `pg_wal`: some bytes and then zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentFile {
    /// Name in `pg_wal`.
    pub name: String,
    /// What it begins with.
    pub bytes: Vec<u8>,
    /// Its whole size; all behind `bytes` is zero.
    pub size: u64,
}

/// What [`base_wal`] needs to know.
#[derive(Clone, Copy, Debug)]
pub struct BaseWal {
    /// Major of the server that will start.
    pub major: Major,
    /// The cluster's identifier.
    pub system_identifier: u64,
    /// Record boundary at which the server starts.
    pub base: Lsn,
    /// Start of the record that ends at `base`.
    pub prev_record: Lsn,
    /// The checkpoint; its `redo` is set to where the record begins, its `tli` is that of all pages.
    pub checkpoint: CheckPoint,
}

/// The WAL with which a server starts at a boundary.
#[derive(Clone, Debug)]
pub struct BaseWalFiles {
    /// Where the checkpoint record begins: the boundary, or behind the page header that stands there.
    pub checkpoint_start: Lsn,
    /// The end of WAL.
    pub end: Lsn,
    /// The checkpoint as the record has it.
    pub checkpoint: CheckPoint,
    /// The segments, in order.
    pub segments: Vec<SegmentFile>,
}

/// Where a record that follows the boundary `boundary` begins: there, or behind a page header.
pub fn record_start_after(boundary: Lsn) -> Lsn {
    let page = boundary.page_start();
    let header_end = page + PageHeader::size_at(page) as u64;
    boundary.max(header_end)
}

/// The bytes of a shutdown-checkpoint record.
pub fn shutdown_checkpoint_record(checkpoint: &CheckPoint, prev: Lsn, major: Major) -> Vec<u8> {
    let mut record = Vec::with_capacity(CHECKPOINT_RECORD_SIZE);
    record.extend_from_slice(&(CHECKPOINT_RECORD_SIZE as u32).to_le_bytes());
    record.extend_from_slice(&0u32.to_le_bytes()); // no transaction
    record.extend_from_slice(&prev.0.to_le_bytes());
    record.extend_from_slice(&[super::records::xlog::CHECKPOINT_SHUTDOWN, rmgr::XLOG, 0, 0]);
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&[ID_DATA_SHORT, CHECKPOINT_SIZE as u8]);
    record.extend_from_slice(&checkpoint.encode(major));
    let crc = record_crc(&record);
    record[20..24].copy_from_slice(&crc.to_le_bytes());
    record
}

/// See the module's doc. `base` must be a multiple of 8, as every record boundary is.
pub fn base_wal(wal: &BaseWal) -> BaseWalFiles {
    let checkpoint_start = record_start_after(wal.base);
    let checkpoint = CheckPoint { redo: checkpoint_start, ..wal.checkpoint };
    let record = shutdown_checkpoint_record(&checkpoint, wal.prev_record, wal.major);
    let segment_start = checkpoint_start.segment_start();
    let header = |page: Lsn, remaining_len: u64| PageHeader {
        major: wal.major,
        tli: checkpoint.tli,
        lsn: page,
        remaining_len: remaining_len as u32,
        overwrites_contrecord: false,
        system_identifier: Some(wal.system_identifier),
    };
    let data_start = |page: Lsn| page + PageHeader::size_at(page) as u64;

    let mut stream = Stream { start: segment_start, bytes: Vec::new() };
    let last_page = checkpoint_start.page_start();
    let mut page = segment_start;
    while page <= last_page {
        // Bytes from here to the record, page headers left out.
        let gross = checkpoint_start.distance_from(data_start(page));
        let headers = last_page.distance_from(page) / WAL_PAGE_SIZE * PageHeader::size_at(page + WAL_PAGE_SIZE) as u64;
        stream.write_at(page, &header(page, gross - headers).encode());
        page += WAL_PAGE_SIZE;
    }
    let (mut at, mut rest) = (checkpoint_start, &record[..]);
    loop {
        let n = rest.len().min((WAL_PAGE_SIZE - at.page_offset()) as usize);
        let (now, later) = rest.split_at(n);
        stream.write_at(at, now);
        at += n as u64;
        rest = later;
        if rest.is_empty() {
            break;
        }
        stream.write_at(at, &header(at, rest.len() as u64).encode());
        at = data_start(at);
    }
    let end = at.align();

    let name = |segment_number: u64| wal_segment_name(checkpoint.tli, segment_number);
    let first = segment_start.segment_number();
    let mut segments: Vec<SegmentFile> = stream
        .bytes
        .chunks(WAL_SEGMENT_SIZE as usize)
        .zip(first..)
        .map(|(bytes, number)| SegmentFile { name: name(number), bytes: bytes.to_vec(), size: WAL_SEGMENT_SIZE })
        .collect();
    let last_byte = Lsn(end.0 - 1);
    if last_byte.segment_offset() >= PREALLOCATE_FROM {
        let number = last_byte.segment_number() + 1;
        segments.push(SegmentFile { name: name(number), bytes: Vec::new(), size: WAL_SEGMENT_SIZE });
    }
    BaseWalFiles { checkpoint_start, end, checkpoint, segments }
}

/// Bytes from a position in WAL on, zeros where nothing was written.
struct Stream {
    start: Lsn,
    bytes: Vec<u8>,
}

impl Stream {
    fn write_at(&mut self, at: Lsn, bytes: &[u8]) {
        let from = at.distance_from(self.start) as usize;
        let to = from + bytes.len();
        if self.bytes.len() < to {
            self.bytes.resize(to, 0);
        }
        self.bytes[from..to].copy_from_slice(bytes);
    }
}

/// An ancestor in a timeline history file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AncestorTimeline {
    /// Its Postgres timeline.
    pub tli: u32,
    /// Where the next one branched off.
    pub switch: Lsn,
}

/// Name of the history file of timeline `tli` (`TLHistoryFileName`).
pub fn history_file_name(tli: u32) -> String {
    format!("{tli:08X}.history")
}

/// The history file of a timeline whose ancestors are these, oldest first (`writeTimeLineHistory`).
pub fn history_file(ancestors: &[AncestorTimeline]) -> String {
    ancestors.iter().map(|ancestor| format!("{}\t{}\tbranch\n", ancestor.tli, ancestor.switch)).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::wal::{Framer, Record};

    const SYSTEM: u64 = 7_123_456_789;

    fn checkpoint() -> CheckPoint {
        CheckPoint {
            redo: Lsn(0),
            tli: 3,
            prev_tli: 2,
            full_page_writes: true,
            wal_level: 1,
            next_xid: 740,
            next_oid: 24_576,
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
        }
    }

    fn check(base: Lsn) {
        let prev = Lsn(base.0 - 64);
        let wal = BaseWal { major: Major::V15, system_identifier: SYSTEM, base, prev_record: prev, checkpoint: checkpoint() };
        let files = base_wal(&wal);
        let mut stream = Vec::new();
        for (i, segment) in files.segments.iter().enumerate() {
            let number = files.checkpoint_start.segment_number() + i as u64;
            assert_eq!(segment.name, wal_segment_name(3, number));
            assert_eq!(segment.size, WAL_SEGMENT_SIZE);
            stream.extend_from_slice(&segment.bytes);
            if i + 1 < files.segments.len() {
                stream.resize((i + 1) * WAL_SEGMENT_SIZE as usize, 0);
            }
        }
        let last = Lsn(files.end.0 - 1);
        let expected =
            last.segment_number() - files.checkpoint_start.segment_number() + 1 + u64::from(last.segment_offset() >= PREALLOCATE_FROM);
        assert_eq!(files.segments.len() as u64, expected, "segments for {base}");

        // A reader that starts at the segment's first page skips to the record, wherever it stands.
        let mut framer = Framer::from_page(Major::V15, Some(SYSTEM), files.checkpoint_start.segment_start());
        let mut input = Bytes::from(stream);
        let framed = framer.next_record(&mut input).unwrap().unwrap_or_else(|| panic!("one record at {base}"));
        assert_eq!((framed.start, framed.end), (files.checkpoint_start, files.end));
        assert_eq!(files.checkpoint_start, record_start_after(base));
        let record = Record::decode(&framed.bytes, framed.start, framed.end, Major::V15).unwrap();
        assert_eq!(record.header.prev, prev);
        let decoded = CheckPoint::decode(record.main_data, Major::V15).unwrap();
        assert_eq!(decoded, CheckPoint { wal_level: 0, ..files.checkpoint });
        assert_eq!(decoded.redo, files.checkpoint_start);
    }

    #[test]
    fn the_checkpoint_stands_at_page_and_segment_edges() {
        let segment = 5 * WAL_SEGMENT_SIZE;
        for offset in
            [0, 48, 8192 - 8, 8192, 8192 + 32, 3 * 8192 - 64, 100 * 8192, WAL_SEGMENT_SIZE - 8, WAL_SEGMENT_SIZE - 112, PREALLOCATE_FROM]
        {
            check(Lsn(segment + offset));
        }
    }

    #[test]
    fn a_history_file_lists_the_ancestors() {
        let ancestors = [AncestorTimeline { tli: 1, switch: Lsn(0x16B_3748) }, AncestorTimeline { tli: 2, switch: Lsn(0x1_0000_0028) }];
        assert_eq!(history_file(&ancestors), "1\t0/16B3748\tbranch\n2\t1/28\tbranch\n");
        assert_eq!(history_file_name(0x1F), "0000001F.history");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_checkpoint_stands_anywhere(page in 0u64..2048, slot in 0u64..1021) {
            let offset = page * 8192 + 24 + slot * 8;
            prop_assume!(offset >= 40);
            check(Lsn(9 * WAL_SEGMENT_SIZE + offset));
        }
    }
}
