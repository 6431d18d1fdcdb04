//! One slice of WAL: the records that begin in it, and what they do.

use std::borrow::Cow;

use typed_arena::Arena;
use varve_postgres::Lsn;
use varve_postgres::control::ControlFile;
use varve_postgres::wal::{FramedRecord, Framer};

use super::batch::{Batch, Tasks};
use crate::VerifyError;
use crate::wal_directory::Segments;

/// Bytes of WAL in a slice: what is made of them stays in a core's cache until it is done. A segment is whole slices.
pub(super) const SLICE_SIZE: u64 = 256 * 1024;
/// Bytes of the next slice that are read at a time to complete a slice's last record.
const NEXT_READ_SIZE: usize = 16 * 1024;

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

    /// Reads the slice at `from` and gives what the records do that begin in it at or behind `from`.
    pub(super) fn fill(&mut self, segments: &Segments, control: &ControlFile, from: Lsn) -> Result<Batch<'_>, VerifyError> {
        self.pieced = Arena::new();
        let mut batch = Batch::new(control.major, from, std::mem::take(&mut self.empty_tasks));
        let slice_end = Lsn((from.0 / SLICE_SIZE + 1) * SLICE_SIZE);
        let mut framer = if from.page_offset() == 0 {
            Framer::from_page(control.major, Some(control.system_identifier), from)
        } else {
            Framer::new(control.major, Some(control.system_identifier), from, None)
        };
        if !segments.read_into(from, slice_end.distance_from(from) as usize, &mut self.wal)? {
            batch.ended = true;
            return Ok(batch);
        }
        let mut input = &self.wal[..];
        while !batch.is_complete() {
            match framer.next_record(&mut input) {
                Ok(Some(framed)) => {
                    let bytes = match framed.bytes {
                        Cow::Borrowed(bytes) => bytes,
                        Cow::Owned(bytes) => self.pieced.alloc(bytes),
                    };
                    batch.add(bytes, framed.start, framed.end)?;
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
                    batch.add(self.pieced.alloc(bytes.into_owned()), start, end)?;
                    break;
                }
                Ok(None) => {}
                Err(_) => batch.ended = true,
            }
        }
        Ok(batch)
    }
}
