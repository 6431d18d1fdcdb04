//! From a stream of WAL bytes to whole, checked records.

use std::borrow::Cow;
use std::ops::Deref;

use bytes::{Buf, Bytes};

use super::record::RecordCrc;
use super::{PageHeader, RECORD_HEADER_SIZE, RecordHeader, SegmentSize, WalError, rmgr};
use crate::lsn::WAL_PAGE_SIZE;
use crate::{Lsn, Major};

/// `XLogRecordMaxSize`: no record is longer.
const RECORD_SIZE_MAX: u32 = 1020 * 1024 * 1024;
/// Most memory that is taken for a record in pieces on its length alone: enough for a page's image.
const RESERVED_MAX: usize = 16 * 1024;
/// `XLOG_SWITCH` of `catalog/pg_control.h`.
const XLOG_SWITCH: u8 = 0x40;

/// WAL bytes from whose front a [`Framer`] takes.
pub trait WalInput: Deref<Target = [u8]> {
    /// A record's bytes: a view of the input, unless they came in pieces.
    type Record: Deref<Target = [u8]>;
    /// Takes `n` bytes off the front, which are there.
    fn take(&mut self, n: usize) -> Self::Record;
    /// Passes over `n` bytes, which are there.
    fn skip(&mut self, n: usize);
    /// A record that was put together from pieces.
    fn from_pieces(bytes: Vec<u8>) -> Self::Record;
}

impl WalInput for Bytes {
    type Record = Bytes;

    fn take(&mut self, n: usize) -> Bytes {
        self.split_to(n)
    }

    fn skip(&mut self, n: usize) {
        self.advance(n);
    }

    fn from_pieces(bytes: Vec<u8>) -> Bytes {
        bytes.into()
    }
}

impl<'a> WalInput for &'a [u8] {
    type Record = Cow<'a, [u8]>;

    fn take(&mut self, n: usize) -> Cow<'a, [u8]> {
        let (taken, rest) = self.split_at(n);
        *self = rest;
        Cow::Borrowed(taken)
    }

    fn skip(&mut self, n: usize) {
        *self = &self[n..];
    }

    fn from_pieces(bytes: Vec<u8>) -> Cow<'a, [u8]> {
        Cow::Owned(bytes)
    }
}

/// A whole record whose CRC was found right.
#[derive(Clone, Debug)]
pub struct FramedRecord<B = Bytes> {
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends, rounded up to 8 bytes as Postgres does; the end of the segment for a segment switch, which is
    /// given when that has come.
    pub end: Lsn,
    /// The record without page headers.
    pub bytes: B,
}

impl<B: Deref<Target = [u8]>> FramedRecord<B> {
    /// See [`RecordHeader::has_check_images`].
    pub fn has_check_images(&self) -> bool {
        RecordHeader::decode(&self.bytes).is_some_and(|header| header.has_check_images())
    }
}

/// Takes WAL bytes in order, however they are cut, and gives whole records.
///
/// It checks page headers (magic, position, continuation, system identifier), record lengths, `xl_prev` and CRCs.
/// Memory is what the record under way has brought so far, beyond 16 KiB never what a length field announces. After an
/// error it stays at the error.
#[derive(Debug)]
pub struct Framer {
    major: Major,
    system_identifier: Option<u64>,
    segments: SegmentSize,
    /// Next byte to take.
    position: Lsn,
    /// End of the last whole record: nothing behind it counts.
    framed: Lsn,
    last_record: Option<Lsn>,
    header: Vec<u8>,
    in_page_header: bool,
    /// Bytes before this position belong to no record that we give: padding, or a continuation that began before us.
    skip_until: Lsn,
    /// Bytes before this position are the rest of a segment after a switch: meaningless, page headers included.
    switched_until: Lsn,
    /// The switch itself, which counts when that rest has come: then a boundary is never ahead of what is there.
    switch: Option<FramedRecord<Vec<u8>>>,
    partial: Vec<u8>,
    partial_start: Lsn,
    /// Whether the first page may begin in the middle of a record, which is skipped.
    skip_first_continuation: bool,
    crc: RecordCrc,
    error: Option<WalError>,
}

impl Framer {
    /// A framer for WAL of `major` whose first byte will be the one at `start`, which is a record's start or the start
    /// of a page that begins with one. `prev` is the start of the record before, if it is known and to be checked.
    /// `system_identifier`, if given, must be that of each segment.
    pub fn new(major: Major, system_identifier: Option<u64>, start: Lsn, prev: Option<Lsn>) -> Framer {
        Framer {
            major,
            system_identifier,
            segments: SegmentSize::VARVE,
            position: start,
            framed: start,
            last_record: prev,
            header: Vec::new(),
            in_page_header: start.page_offset() == 0,
            skip_until: start,
            switched_until: start,
            switch: None,
            partial: Vec::new(),
            partial_start: start,
            skip_first_continuation: false,
            crc: RecordCrc::new(),
            error: None,
        }
    }

    /// A framer for the same WAL that goes on at `start`, with `prev` as in [`Framer::new`]: what this one has seen
    /// beyond is to be seen anew.
    pub fn anew(&self, start: Lsn, prev: Option<Lsn>) -> Framer {
        Framer::new(self.major, self.system_identifier, start, prev).with_segments(self.segments)
    }

    /// The same for WAL in segments of another size than Varve's.
    #[must_use]
    pub fn with_segments(mut self, segments: SegmentSize) -> Framer {
        self.segments = segments;
        self
    }

    /// A framer for WAL from the start of the page at `start`, whatever is there: a record that began earlier is
    /// skipped.
    pub fn from_page(major: Major, system_identifier: Option<u64>, start: Lsn) -> Framer {
        let mut framer = Framer::new(major, system_identifier, start.page_start(), None);
        framer.skip_first_continuation = true;
        framer
    }

    /// End of the last whole record (or the start, when there was none yet).
    pub fn framed(&self) -> Lsn {
        self.framed
    }

    /// Position of the next byte to give.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Start of the last whole record, for the next record's `xl_prev`.
    pub fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// Takes bytes from the front of `input` until a record is whole or `input` is empty.
    ///
    /// # Errors
    /// [`WalError`] for the first thing that is not as Postgres writes it; the same again ever after.
    pub fn next_record<I: WalInput>(&mut self, input: &mut I) -> Result<Option<FramedRecord<I::Record>>, WalError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let result = self.advance(input);
        if let Err(error) = &result {
            self.error = Some(error.clone());
        }
        result
    }

    #[inline]
    fn advance<I: WalInput>(&mut self, input: &mut I) -> Result<Option<FramedRecord<I::Record>>, WalError> {
        while !input.is_empty() {
            if self.position < self.switched_until {
                let n = ((self.switched_until.0 - self.position.0) as usize).min(input.len());
                self.skip(input, n);
                self.in_page_header = self.position.page_offset() == 0;
                if self.position == self.switched_until
                    && let Some(FramedRecord { start, end, bytes }) = self.switch.take()
                {
                    self.count(start, end);
                    return Ok(Some(FramedRecord { start, end, bytes: I::from_pieces(bytes) }));
                }
                continue;
            }
            if self.in_page_header {
                self.take_page_header(input)?;
                continue;
            }
            let page_left = (WAL_PAGE_SIZE - self.position.page_offset()) as usize;
            if self.position < self.skip_until {
                let n = ((self.skip_until.0 - self.position.0) as usize).min(page_left).min(input.len());
                self.skip(input, n);
                self.in_page_header = self.position.page_offset() == 0;
                continue;
            }
            if let Some(bytes) = self.take_record_bytes(input, page_left)? {
                let (start, end) = (self.partial_start, self.check(&bytes)?);
                if end > self.position.align() {
                    self.switch = Some(FramedRecord { start, end, bytes: bytes.to_vec() });
                    continue;
                }
                self.count(start, end);
                return Ok(Some(FramedRecord { start, end, bytes }));
            }
        }
        Ok(None)
    }

    fn skip<I: WalInput>(&mut self, input: &mut I, n: usize) {
        self.position += n as u64;
        input.skip(n);
    }

    fn take_page_header<I: WalInput>(&mut self, input: &mut I) -> Result<(), WalError> {
        let page = self.position.page_start();
        let size = PageHeader::size_in(self.segments, page);
        let n = (size - self.header.len()).min(input.len());
        self.header.extend_from_slice(&input[..n]);
        self.skip(input, n);
        if self.header.len() < size {
            return Ok(());
        }
        let header = PageHeader::decode_in(self.segments, &self.header, page)?;
        self.header.clear();
        self.in_page_header = false;
        let wrong = |what: String| Err(WalError::Page { lsn: page, what });
        if header.major != self.major {
            return wrong(format!("the page is of {:?}, expected {:?}", header.major, self.major));
        }
        if let (Some(found), Some(expected)) = (header.system_identifier, self.system_identifier)
            && found != expected
        {
            return wrong(format!("the page is of the cluster with system identifier {found}, expected {expected}"));
        }
        if header.overwrites_contrecord {
            self.partial.clear();
        }
        if self.skip_first_continuation {
            let after = self.position + u64::from(header.remaining_len);
            let page_end = page + WAL_PAGE_SIZE;
            if header.remaining_len == 0 {
                self.skip_first_continuation = false;
            } else if after >= page_end {
                self.skip_until = page_end; // the next page's header says how much is left
                if after == page_end {
                    self.skip_first_continuation = false;
                }
            } else {
                self.skip_until = after.align();
                self.skip_first_continuation = false;
            }
            return Ok(());
        }
        let expected = match u32::from_le_bytes(*self.partial.first_chunk().unwrap_or(&[0; 4])) {
            _ if self.partial.is_empty() => 0,
            // a start that is no multiple of 8 may cut a length
            total => total.saturating_sub(self.partial.len() as u32),
        };
        if header.remaining_len != expected {
            return wrong(format!("begins with {} bytes of an earlier record, expected {expected}", header.remaining_len));
        }
        Ok(())
    }

    /// The bytes of the record that begins at `partial_start`, if it ends in `input`.
    #[inline]
    fn take_record_bytes<I: WalInput>(&mut self, input: &mut I, page_left: usize) -> Result<Option<I::Record>, WalError> {
        if self.partial.is_empty() {
            self.partial_start = self.position;
            // The usual case: the whole record is at hand, and is given as a view of the input.
            if let Some(total) = input.first_chunk().map(|b| u32::from_le_bytes(*b)) {
                self.check_length(total)?;
                let (total, at_hand) = (total as usize, page_left.min(input.len()));
                if total <= at_hand {
                    let record = input.take(total);
                    self.position += total as u64;
                    let padding = self.position.align().distance_from(self.position) as usize;
                    self.skip(input, padding.min(at_hand - total));
                    return Ok(Some(record));
                }
                self.partial.reserve(total.min(RESERVED_MAX));
            }
        }
        let wanted = match self.partial.first_chunk() {
            Some(total) => u32::from_le_bytes(*total) as usize - self.partial.len(),
            None => 4 - self.partial.len(), // a record begins at a multiple of 8, so its length is never cut by a page
        };
        let n = wanted.min(page_left).min(input.len());
        self.partial.extend_from_slice(&input[..n]);
        self.skip(input, n);
        self.in_page_header = self.position.page_offset() == 0;
        let Some(total) = self.partial.first_chunk().map(|b| u32::from_le_bytes(*b)) else { return Ok(None) };
        self.check_length(total)?;
        if self.partial.len() < total as usize {
            return Ok(None);
        }
        Ok(Some(I::from_pieces(std::mem::take(&mut self.partial))))
    }

    fn check_length(&self, total: u32) -> Result<(), WalError> {
        if (RECORD_HEADER_SIZE as u32..=RECORD_SIZE_MAX).contains(&total) {
            return Ok(());
        }
        let what = format!("length {total} is not between {RECORD_HEADER_SIZE} and {RECORD_SIZE_MAX}");
        Err(WalError::Record { lsn: self.partial_start, what })
    }

    /// Checks the whole record `bytes`, which begins at `partial_start`, and gives its end.
    fn check(&mut self, bytes: &[u8]) -> Result<Lsn, WalError> {
        let start = self.partial_start;
        let wrong = |what: String| WalError::Record { lsn: start, what };
        let header = RecordHeader::decode(bytes).ok_or_else(|| wrong("shorter than its header".to_owned()))?;
        let found = self.crc.of(bytes);
        if found != header.crc {
            return Err(WalError::Crc { lsn: start, found, expected: header.crc });
        }
        if let Some(last) = self.last_record
            && header.prev != last
        {
            return Err(wrong(format!("says that the record before is at {}, expected {last}", header.prev)));
        }
        let mut end = self.position.align();
        if header.rmid == rmgr::XLOG && header.kind() == XLOG_SWITCH {
            end = Lsn(end.0.next_multiple_of(self.segments.bytes()));
            self.switched_until = end;
        }
        self.skip_until = self.position.align();
        self.in_page_header = self.position.page_offset() == 0;
        Ok(end)
    }

    fn count(&mut self, start: Lsn, end: Lsn) {
        self.last_record = Some(start);
        self.framed = end;
    }
}
