//! The value of a WAL-index key: which records end on one 8 KiB page of WAL, and when transactions ended.
//!
//! It gives the boundaries of records (to round a position down, and for `xl_prev`), the next transaction id at each of
//! them, and the running maximum of all commit and abort times from the beginning, so that "the first commit or abort
//! later than T" is a binary search over pages although times are not monotonic.
//!
//! A record belongs to the page on which it ends, by the rule that intervals of WAL are open at the left and closed at
//! the right: page `n` has the ends in `n * 8192 + 1 ..= (n + 1) * 8192`. A page on which no record ends has no value.
//! These are facts about WAL, not about a moment of it: a value read at LSN X may also name records that end later than
//! X, and readers leave them out.
//!
//! Layout, little-endian: version `u8`, then the last boundary before the page: end `u64`, record start `u64`, next
//! transaction `u64`, maximum of times `i64`. For each record: `u16` with (end - page start) / 8 - 1 in its low 10 bits
//! and flags above; then, as flags say,
//! - 1: where the record starts, `u64`, if not behind the boundary before (a record that was overwritten stands
//!   between);
//! - 2: how far the next transaction id moved, zigzag varint;
//! - 4: when the record's transaction ended, `i64`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use varve_postgres::wal::synthesis::record_start_after;
use varve_postgres::{Lsn, Timestamp, lsn::WAL_PAGE_SIZE};

const VERSION: u8 = 1;
const SLOT_MASK: u16 = 0x3FF;
const FLAG_START: u16 = 1 << 10;
const FLAG_XID: u16 = 1 << 11;
const FLAG_TIME: u16 = 1 << 12;
/// Bytes of a varint of 64 bits.
const VARINT_SIZE_MAX: usize = 10;

/// A place between two records, and what is known of all WAL before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boundary {
    /// End of the record before, which is where the boundary is.
    pub end: Lsn,
    /// Start of that record.
    pub record_start: Lsn,
    /// Next transaction id, with its epoch.
    pub next_xid: u64,
    /// Latest end of a transaction in all WAL up to here; [`Timestamp::MIN`] if there was none.
    pub time_max: Timestamp,
    /// When the record's own transaction ended, if it is a commit or an abort.
    pub time: Option<Timestamp>,
}

/// Number of the page on which a record that ends at `end` is indexed.
pub fn page_of(end: Lsn) -> u64 {
    end.0.saturating_sub(1) / WAL_PAGE_SIZE
}

/// The boundaries on one page, and the last one before it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalIndexPage {
    /// The last boundary before the page.
    pub before: Boundary,
    /// The boundaries on the page, ascending.
    pub boundaries: Vec<Boundary>,
}

impl WalIndexPage {
    /// Reads the stored form of page `page`; `None` if it is not one.
    pub fn decode(page: u64, mut bytes: &[u8]) -> Option<WalIndexPage> {
        let page_start = Lsn(page.checked_mul(WAL_PAGE_SIZE)?);
        if bytes.try_get_u8().ok()? != VERSION {
            return None;
        }
        let before = Boundary {
            end: Lsn(bytes.try_get_u64_le().ok()?),
            record_start: Lsn(bytes.try_get_u64_le().ok()?),
            next_xid: bytes.try_get_u64_le().ok()?,
            time_max: Timestamp(bytes.try_get_i64_le().ok()?),
            time: None,
        };
        let mut boundaries: Vec<Boundary> = Vec::with_capacity(bytes.len() / 2);
        let mut last = before;
        while bytes.has_remaining() {
            let word = bytes.try_get_u16_le().ok()?;
            let end = page_start + (u64::from(word & SLOT_MASK) + 1) * 8;
            if end <= last.end {
                return None;
            }
            let record_start = if word & FLAG_START != 0 { Lsn(bytes.try_get_u64_le().ok()?) } else { record_start_after(last.end) };
            let moved = if word & FLAG_XID != 0 { get_varint(&mut bytes)? } else { 0 };
            let time = if word & FLAG_TIME != 0 { Some(Timestamp(bytes.try_get_i64_le().ok()?)) } else { None };
            last = Boundary {
                end,
                record_start,
                next_xid: last.next_xid.wrapping_add_signed(moved),
                time_max: time.map_or(last.time_max, |time| time.max(last.time_max)),
                time,
            };
            boundaries.push(last);
        }
        Some(WalIndexPage { before, boundaries })
    }

    /// The last boundary at or before `lsn`; `None` if even the one before the page is later.
    pub fn at_or_before(&self, lsn: Lsn) -> Option<Boundary> {
        let n = self.boundaries.partition_point(|boundary| boundary.end <= lsn);
        match n.checked_sub(1) {
            Some(i) => self.boundaries.get(i).copied(),
            None => Some(self.before).filter(|before| before.end <= lsn),
        }
    }
}

/// Makes the value of one page, record by record.
#[derive(Clone, Debug)]
pub struct WalIndexBuilder {
    page: u64,
    bytes: BytesMut,
    last: Boundary,
}

impl WalIndexBuilder {
    /// For page `page`, with `before` as the last boundary before it.
    pub fn new(page: u64, before: Boundary) -> WalIndexBuilder {
        let mut bytes = BytesMut::with_capacity(256);
        bytes.put_u8(VERSION);
        bytes.put_u64_le(before.end.0);
        bytes.put_u64_le(before.record_start.0);
        bytes.put_u64_le(before.next_xid);
        bytes.put_i64_le(before.time_max.0);
        WalIndexBuilder { page, bytes, last: before }
    }

    /// Goes on with a page that was read, leaving out what ends later than `lsn`.
    pub fn resume(page: u64, read: &WalIndexPage, lsn: Lsn) -> WalIndexBuilder {
        let mut builder = WalIndexBuilder::new(page, read.before);
        for boundary in read.boundaries.iter().take_while(|boundary| boundary.end <= lsn) {
            builder.push(boundary.end, boundary.record_start, boundary.next_xid, boundary.time);
        }
        builder
    }

    /// The page's number.
    pub fn page(&self) -> u64 {
        self.page
    }

    /// The last boundary.
    pub fn last(&self) -> Boundary {
        self.last
    }

    /// Adds a record. `end` is on this page and later than the last; if not, nothing is added and the answer is false.
    pub fn push(&mut self, end: Lsn, record_start: Lsn, next_xid: u64, time: Option<Timestamp>) -> bool {
        if page_of(end) != self.page || end <= self.last.end {
            return false;
        }
        let mut word = ((end.0 - self.page * WAL_PAGE_SIZE) / 8 - 1) as u16 & SLOT_MASK;
        let explicit_start = record_start != record_start_after(self.last.end);
        let moved = next_xid.wrapping_sub(self.last.next_xid).cast_signed();
        word |= if explicit_start { FLAG_START } else { 0 };
        word |= if moved != 0 { FLAG_XID } else { 0 };
        word |= if time.is_some() { FLAG_TIME } else { 0 };
        self.bytes.put_u16_le(word);
        if explicit_start {
            self.bytes.put_u64_le(record_start.0);
        }
        if moved != 0 {
            put_varint(&mut self.bytes, moved);
        }
        if let Some(time) = time {
            self.bytes.put_i64_le(time.0);
        }
        let time_max = time.map_or(self.last.time_max, |time| time.max(self.last.time_max));
        self.last = Boundary { end, record_start, next_xid, time_max, time };
        true
    }

    /// The stored form of what was added so far.
    pub fn encode(&self) -> Bytes {
        Bytes::copy_from_slice(&self.bytes)
    }
}

fn put_varint(out: &mut BytesMut, value: i64) {
    let mut rest = (value << 1 ^ value >> 63).cast_unsigned();
    while rest >= 0x80 {
        out.put_u8(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

fn get_varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for i in 0..VARINT_SIZE_MAX {
        let byte = bytes.try_get_u8().ok()?;
        value |= u64::from(byte & 0x7F).checked_shl(i as u32 * 7)?;
        if byte & 0x80 == 0 {
            return Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start() -> Boundary {
        Boundary { end: Lsn(8 * 8192 - 64), record_start: Lsn(8 * 8192 - 128), next_xid: 740, time_max: Timestamp::MIN, time: None }
    }

    #[test]
    fn an_end_at_a_page_s_start_belongs_to_the_page_before() {
        assert_eq!((page_of(Lsn(8192)), page_of(Lsn(8193)), page_of(Lsn(2 * 8192))), (0, 1, 1));
        let mut builder = WalIndexBuilder::new(8, start());
        assert!(builder.push(Lsn(9 * 8192), Lsn(8 * 8192 - 64), 741, None), "the last place of the page");
        assert!(!builder.push(Lsn(9 * 8192 + 32), Lsn(9 * 8192 + 24), 741, None), "the next page's");
        let page = WalIndexPage::decode(8, &builder.encode()).unwrap();
        assert_eq!(page.boundaries, vec![builder.last()]);
        assert_eq!(page.at_or_before(Lsn(9 * 8192 - 8)), Some(start()));
        assert_eq!(page.at_or_before(Lsn(8)), None);
    }

    #[test]
    fn times_and_xids_may_go_back() {
        let mut builder = WalIndexBuilder::new(8, start());
        let at = |n: u64| Lsn(8 * 8192 + n);
        assert!(builder.push(at(64), at(24), 750, Some(Timestamp(100))));
        assert!(builder.push(at(128), at(64), 745, Some(Timestamp(90))));
        assert!(builder.push(at(256), at(200), 745, None), "a record after a gap");
        let page = WalIndexPage::decode(8, &builder.encode()).unwrap();
        let times: Vec<_> = page.boundaries.iter().map(|b| (b.next_xid, b.time_max.0, b.time.is_some())).collect();
        assert_eq!(times, vec![(750, 100, true), (745, 100, true), (745, 100, false)]);
        assert_eq!(page.boundaries[2].record_start, at(200));
        let resumed = WalIndexBuilder::resume(8, &page, at(130));
        assert_eq!(resumed.last(), page.boundaries[1]);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(records in proptest::collection::vec((1u64..40, any::<Option<u64>>(), any::<i32>(), any::<Option<i64>>()), 0..60)) {
            let mut builder = WalIndexBuilder::new(8, start());
            let (mut expected, mut end, mut xid) = (Vec::new(), Lsn(8 * 8192), 740u64);
            for (len, begun, moved, time) in records {
                end += len * 8;
                xid = xid.wrapping_add_signed(i64::from(moved));
                let record_start = begun.map_or(record_start_after(builder.last().end), Lsn);
                if builder.push(end, record_start, xid, time.map(Timestamp)) {
                    expected.push(builder.last());
                }
            }
            let page = WalIndexPage::decode(8, &builder.encode()).unwrap();
            prop_assert_eq!(page.before, start());
            prop_assert_eq!(page.boundaries, expected);
        }

        #[test]
        fn anything_decodes_or_is_refused(mut bytes in proptest::collection::vec(any::<u8>(), 1..200), page in any::<u64>()) {
            bytes[0] = VERSION;
            let _ = WalIndexPage::decode(page, &bytes);
        }
    }
}
