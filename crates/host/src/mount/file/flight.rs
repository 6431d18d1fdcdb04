//! Blocks on their way from the base: who fetches them, what has landed, and that it is kept where nothing newer is.

use std::io;
use std::ops::Range;

use bytes::Bytes;

use super::super::cells::BLOCK_BYTES;
use super::{FileContext, FileData};

/// A run of blocks in flight, with its contents once it has landed.
pub(super) struct Leg {
    pub(super) run: Range<u32>,
    pub(super) contents: Option<Bytes>,
}

/// Contents of absent cells: those from `start` on, a multiple of a cell.
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) bytes: Bytes,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Puts the piece into `buffer`, which starts at `offset` of the file.
    pub(super) fn overlay(&self, offset: u64, buffer: &mut [u8]) {
        let from = self.start.max(offset);
        let to = self.end().min(offset + buffer.len() as u64);
        if from < to {
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&self.bytes[(from - self.start) as usize..(to - self.start) as usize]);
        }
    }
}

/// Blocks of a file that this thread fetches or is about to keep. When it is dropped, it does so no more.
pub(in super::super) struct Flight<'a> {
    pub(super) file: &'a FileData,
    pub(super) runs: Vec<Range<u32>>,
    /// The contents of each run, once they have landed.
    pub(super) contents: Vec<Bytes>,
}

impl<'a> Flight<'a> {
    /// The runs of blocks.
    pub(in super::super) fn runs(&self) -> &[Range<u32>] {
        &self.runs
    }

    /// Asks the base for them.
    pub(super) fn fetch(&mut self, context: &FileContext) -> io::Result<()> {
        let contents = self.file.base.fetch(&context.source, &self.runs)?;
        if !self.file.base.is_in_memory() {
            context.counters.count_fetch(self.runs.iter().map(ExactSizeIterator::len).sum());
        }
        self.land(contents);
        Ok(())
    }

    /// The contents of the runs are there: all readers may have them.
    pub(in super::super) fn land(&mut self, contents: Vec<Bytes>) {
        let mut blocks = self.file.blocks.lock();
        for (run, contents) in self.runs.iter().zip(&contents) {
            if let Some(leg) = blocks.in_flight.iter_mut().find(|leg| leg.run == *run) {
                leg.contents = Some(contents.clone());
            }
        }
        self.contents = contents;
        self.file.landed.notify_all();
    }

    /// Takes over the blocks of another flight of the same file.
    pub(super) fn join(mut self, mut other: Flight<'a>) -> Flight<'a> {
        self.runs.append(&mut other.runs);
        self.contents.append(&mut other.contents);
        self
    }

    /// As [`Flight::keep`], after room was made for it, and if there is room on the disk.
    pub(in super::super) fn keep_within_budget(self, context: &FileContext) -> io::Result<()> {
        let bytes: usize = self.contents.iter().map(Bytes::len).sum();
        context.budget.reserve(bytes as i64);
        context.budget.make_room(context, true);
        let kept = if context.room.may_keep(bytes as u64) { self.keep(context) } else { Ok(()) };
        context.budget.reserve(-(bytes as i64));
        context.budget.make_room(context, true);
        kept
    }

    /// Keeps what landed, wherever nothing newer is there.
    pub(in super::super) fn keep(self, context: &FileContext) -> io::Result<()> {
        for (run, contents) in self.runs.iter().zip(&self.contents) {
            self.file.keep(context, &Piece { start: u64::from(run.start) * BLOCK_BYTES, bytes: contents.clone() }, false)?;
        }
        Ok(())
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut blocks = self.file.blocks.lock();
        blocks.in_flight.retain(|leg| !self.runs.contains(&leg.run));
        self.file.landed.notify_all();
    }
}
