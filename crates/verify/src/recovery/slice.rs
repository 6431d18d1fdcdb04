//! One slice of WAL: the records that begin in it, and what they do.

use std::borrow::Cow;

use typed_arena::Arena;
use varve_postgres::Lsn;
use varve_postgres::control::ControlFile;
use varve_postgres::wal::{FramedRecord, Framer, Record};

use super::batch::{Batch, Tasks};
use super::partitioning::Partitioning;
use crate::VerifyError;
use crate::wal_directory::Segments;

/// Bytes of WAL in a slice. A segment is whole slices.
pub(super) const SLICE_SIZE: u64 = 128 * 1024;
/// Bytes of the next slice that are read at a time to complete a slice's last record.
const NEXT_READ_SIZE: usize = 4 * 1024;

/// Where slices come from, and how what is made of them is cut.
pub(super) struct Source<'a> {
    pub(super) segments: &'a Segments,
    pub(super) control: &'a ControlFile,
    pub(super) partitioning: Partitioning,
    /// Records in a portion.
    pub(super) portion: u64,
}

/// Memory for one slice, which is filled again and again.
pub(super) struct Slice {
    wal: Vec<u8>,
    /// Records that came in pieces.
    pieced: Arena<Vec<u8>>,
    pub(super) empty_tasks: Tasks<'static>,
}

impl Slice {
    pub(super) fn new() -> Slice {
        Slice { wal: Vec::new(), pieced: Arena::new(), empty_tasks: Tasks::default() }
    }

    /// Reads the slice at `from` and gives what the records do that begin in it at or behind `from`. Where these are
    /// many, `work` is called with those of each portion of it, and only the rest is given.
    pub(super) fn fill(
        &mut self,
        source: &Source<'_>,
        from: Lsn,
        mut work: impl FnMut(&Batch<'_>) -> Result<(), VerifyError>,
    ) -> Result<Batch<'_>, VerifyError> {
        let Source { segments, control, partitioning, portion } = source;
        self.pieced = Arena::new();
        let mut batch = Batch::new(control.major, *partitioning, from, std::mem::take(&mut self.empty_tasks));
        let slice_end = Lsn((from.0 / SLICE_SIZE + 1) * SLICE_SIZE);
        let mut framer = if from.page_offset() == 0 {
            Framer::from_page(control.major, Some(control.system_identifier), from)
        } else {
            Framer::new(control.major, Some(control.system_identifier), from, None)
        }
        .with_segments(segments.size());
        if !segments.read_into(from, slice_end.distance_from(from) as usize, &mut self.wal)? {
            batch.ended = true;
            return Ok(batch);
        }
        let mut input = &self.wal[..];
        let mut place = Record::empty();
        while !batch.is_complete() {
            match framer.next_record(&mut input) {
                Ok(Some(framed)) => {
                    let bytes = match framed.bytes {
                        Cow::Borrowed(bytes) => bytes,
                        Cow::Owned(bytes) => self.pieced.alloc(bytes),
                    };
                    batch.add(bytes, framed.start, framed.end, &mut place)?;
                    if batch.records >= *portion && !batch.is_complete() {
                        batch.put_down_transactions();
                        work(&batch)?;
                        batch.clear();
                    }
                }
                Ok(None) => break,
                Err(_) => batch.ended = true,
            }
        }
        // The last record may go on in the next slice.
        let mut read_to = slice_end;
        let mut next = Vec::new();
        while !batch.is_complete() && framer.framed() < slice_end {
            if !segments.read_into(read_to, NEXT_READ_SIZE, &mut next)? {
                batch.ended = true;
                break;
            }
            read_to += next.len() as u64;
            match framer.next_record(&mut &next[..]) {
                Ok(Some(FramedRecord { start, .. })) if start >= slice_end => break,
                Ok(Some(FramedRecord { start, end, bytes })) => {
                    batch.add(self.pieced.alloc(bytes.into_owned()), start, end, &mut place)?;
                    break;
                }
                Ok(None) => {}
                Err(_) => batch.ended = true,
            }
        }
        batch.put_down_transactions();
        Ok(batch)
    }
}
