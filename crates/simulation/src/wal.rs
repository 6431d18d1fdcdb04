//! WAL as a compute writes it: whole, CRC-correct records on pages with headers, made without a Postgres.
//!
//! The records are those of a small heap relation: pages that are initialised, full-page images, inserts, commits and
//! aborts. Redo turns them into real heap pages.

use bytes::Bytes;
use varve_postgres::control::{CheckPoint, Parameters};
use varve_postgres::lsn::WAL_PAGE_SIZE;
use varve_postgres::wal::synthesis::{record_start_after, shutdown_checkpoint_record};
use varve_postgres::wal::{PageHeader, record_crc, rmgr};
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, RelFork, RelNode};

/// The major of all simulated tenants.
pub const MAJOR: Major = Major::V16;
/// Their system identifier.
pub const SYSTEM_IDENTIFIER: u64 = 7_000_000_000_000_000_001;
/// Where the template's history ends: behind the header of the first page of a segment.
pub const START: Lsn = Lsn(0x0100_0028);
/// Transaction ids begin here.
pub const FIRST_XID: u32 = 740;
/// The relation that computes write.
pub const RELATION: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16_384 }, fork: Fork::Main };
/// Its blocks.
pub const BLOCKS: u32 = 4;
/// Tuples on a page after which it is initialised anew.
pub const TUPLES_MAX: u16 = 60;

const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const HEAP_INSERT: u8 = 0x00;
const HEAP_INIT_PAGE: u8 = 0x80;
const XLOG_FPI: u8 = 0xB0;
const BLOCK_HAS_IMAGE: u8 = 0x10;
const BLOCK_HAS_DATA: u8 = 0x20;
const BLOCK_WILL_INIT: u8 = 0x40;
const IMAGE_HAS_HOLE: u8 = 0x01;
const IMAGE_APPLY: u8 = 0x02;

/// What a server that begins at `START` would find in pg_control.
pub fn checkpoint(next_xid: u32, tli: u32) -> CheckPoint {
    CheckPoint {
        redo: START,
        tli,
        prev_tli: tli,
        full_page_writes: true,
        wal_level: Parameters::default().wal_level,
        next_xid: u64::from(next_xid),
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

/// A record as a compute wrote it.
#[derive(Clone, Debug)]
pub struct Written {
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends.
    pub end: Lsn,
    /// Its bytes, page headers left out.
    pub bytes: Bytes,
    /// When its transaction ended, if it says so.
    pub time: Option<i64>,
}

/// One compute's WAL from its base on.
#[derive(Debug)]
pub struct WalWriter {
    base: Lsn,
    tli: u32,
    prev: Lsn,
    end: Lsn,
    stream: Vec<u8>,
}

impl WalWriter {
    /// A writer on timeline `tli` that begins at `base`, before which stands the record at `prev`.
    pub fn new(base: Lsn, prev: Lsn, tli: u32) -> WalWriter {
        WalWriter { base, tli, prev, end: base, stream: Vec::new() }
    }

    /// The end of the last record.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// The bytes of the stream from `from` on, page headers and all, at most `max`; none below the base.
    pub fn bytes(&self, from: Lsn, max: usize) -> Option<Bytes> {
        let at = usize::try_from(from.0.checked_sub(self.base.0)?).ok()?;
        let rest = self.stream.get(at..)?;
        Some(Bytes::copy_from_slice(&rest[..rest.len().min(max)]))
    }

    fn push(&mut self, mut record: Vec<u8>, time: Option<i64>) -> Written {
        let start = record_start_after(self.end);
        record[8..16].copy_from_slice(&self.prev.0.to_le_bytes());
        let crc = record_crc(&record);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        self.header_at(self.end, 0);
        let mut rest = &record[..];
        loop {
            let at = self.base + self.stream.len() as u64;
            let (now, later) = rest.split_at(rest.len().min((WAL_PAGE_SIZE - at.page_offset()) as usize));
            self.stream.extend_from_slice(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
            self.header_at(at + now.len() as u64, rest.len() as u32);
        }
        let at = self.base + self.stream.len() as u64;
        self.end = at.align();
        self.stream.resize(self.end.distance_from(self.base) as usize, 0);
        self.prev = start;
        Written { start, end: self.end, bytes: record.into(), time }
    }

    /// The header of the page that begins at `at`, if one does.
    fn header_at(&mut self, at: Lsn, remaining_len: u32) {
        if at.page_offset() == 0 {
            let system_identifier = Some(SYSTEM_IDENTIFIER);
            let header =
                PageHeader { major: MAJOR, tli: self.tli, lsn: at, remaining_len, overwrites_contrecord: false, system_identifier };
            self.stream.extend_from_slice(&header.encode());
        }
    }

    /// The shutdown checkpoint with which a server starts.
    pub fn begin(&mut self, next_xid: u32) -> Written {
        let checkpoint = CheckPoint { redo: record_start_after(self.end), ..checkpoint(next_xid, self.tli) };
        self.push(shutdown_checkpoint_record(&checkpoint, self.prev, MAJOR), None)
    }

    /// A tuple that holds `marker` is put on a page, which is initialised before if `offset` is 1.
    pub fn insert(&mut self, xid: u32, block: u32, offset: u16, marker: [u8; 16]) -> Written {
        let init = if offset == 1 { HEAP_INIT_PAGE } else { 0 };
        // Two attributes' worth of nothing, then the tuple's bytes behind its header: padding to 24, the marker.
        let mut data = vec![1, 0, 2, 8, 24, 0];
        data.extend_from_slice(&marker);
        let flags = BLOCK_HAS_DATA | if init != 0 { BLOCK_WILL_INIT } else { 0 };
        let mut body = block_header(flags, data.len());
        push_rel(&mut body, block);
        body.extend_from_slice(&[255, 3]);
        body.extend_from_slice(&data);
        body.extend_from_slice(&offset.to_le_bytes());
        body.push(0);
        self.push(record(rmgr::HEAP, HEAP_INSERT | init, xid, &body), None)
    }

    /// A page without tuples, as an image with a hole; its special space is `special` bytes long, to tell images apart.
    pub fn image(&mut self, block: u32, special: u8) -> Written {
        let upper = BLCKSZ - 8 - usize::from(special & 0x78);
        let mut front = vec![0; 24];
        front[12..14].copy_from_slice(&24u16.to_le_bytes());
        front[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        front[16..18].copy_from_slice(&(upper as u16).to_le_bytes());
        front[18..20].copy_from_slice(&(BLCKSZ as u16 | 4).to_le_bytes());
        let back = vec![special; BLCKSZ - upper];
        let mut body = block_header(BLOCK_HAS_IMAGE, 0);
        body.extend_from_slice(&((front.len() + back.len()) as u16).to_le_bytes());
        body.extend_from_slice(&24u16.to_le_bytes());
        body.push(IMAGE_HAS_HOLE | IMAGE_APPLY);
        push_rel(&mut body, block);
        body.extend_from_slice(&front);
        body.extend_from_slice(&back);
        self.push(record(rmgr::XLOG, XLOG_FPI, 0, &body), None)
    }

    /// The end of a transaction.
    pub fn end_transaction(&mut self, xid: u32, commits: bool, time: i64) -> Written {
        let info = if commits { XACT_COMMIT } else { XACT_ABORT };
        let mut body = vec![255, 8];
        body.extend_from_slice(&time.to_le_bytes());
        self.push(record(rmgr::XACT, info, xid, &body), Some(time))
    }
}

fn block_header(flags: u8, data_len: usize) -> Vec<u8> {
    let mut header = vec![0, flags];
    header.extend_from_slice(&(data_len as u16).to_le_bytes());
    header
}

fn push_rel(body: &mut Vec<u8>, block: u32) {
    for number in [RELATION.node.spc, RELATION.node.db, RELATION.node.rel, block] {
        body.extend_from_slice(&number.to_le_bytes());
    }
}

fn record(rmid: u8, info: u8, xid: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[4..8].copy_from_slice(&xid.to_le_bytes());
    bytes[16..18].copy_from_slice(&[info, rmid]);
    bytes.extend_from_slice(body);
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use varve_postgres::wal::{Framer, Record};

    use super::*;

    #[test]
    fn what_is_written_is_framed_as_it_was_written() {
        let mut writer = WalWriter::new(START, Lsn(START.0 - 0x28), 3);
        let mut written = vec![writer.begin(740)];
        for round in 0..80u16 {
            written.push(writer.image(u32::from(round) % BLOCKS, round as u8));
            written.push(writer.insert(740 + u32::from(round), 1, round + 1, [9; 16]));
            written.push(writer.end_transaction(740, round % 3 == 0, 5));
        }
        assert!(writer.end().distance_from(START) > 2 * WAL_PAGE_SIZE, "it spans pages");
        let mut framer = Framer::new(MAJOR, Some(SYSTEM_IDENTIFIER), START, None);
        let mut bytes = writer.bytes(START, usize::MAX).unwrap();
        for expected in &written {
            let found = framer.next_record(&mut bytes).unwrap().expect("a record");
            assert_eq!((found.start, found.end, &found.bytes), (expected.start, expected.end, &expected.bytes));
            Record::decode(&found.bytes, found.start, found.end, MAJOR).unwrap();
        }
        assert_eq!(framer.framed(), writer.end());
        let middle = written[40].end;
        assert_eq!(writer.bytes(middle, 16).unwrap().len(), 16);
        assert!(writer.bytes(Lsn(START.0 - 8), 16).is_none());
    }
}
