//! The contents of one regular file: what is here, what is still in the base, and how the one becomes the other.
//!
//! The cache file holds the present cells (see [`super::cells`]), with zeros where it has holes or ends early. Whoever
//! needs an absent cell *takes off* for its block, in one call of the source for all that is needed; others wait for
//! the blocks in flight instead of fetching them again. When the blocks have *landed*, in memory, all readers have
//! them. Then they are *kept*: under the file's lock, those cells that are still absent are written to the cache file
//! and become present. A write makes its cells present under the same lock. So a fetch, however late it lands, cannot
//! overwrite anything newer; and a file without absent cells is read and written without any lock.

use std::{
    cell::RefCell,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::fs::{FallocateFlags, fallocate};

use super::{
    base::Base,
    cache::{CacheDir, CacheFile},
    cells::{AbsentCells, BLOCK_BYTES, CELL_BYTES, CELLS_PER_BLOCK, blocks_of, cells_of},
    source::PatientSource,
    startup_set::StartupSet,
};

/// Bytes read at a time where a whole file is read.
const WHOLE_READ_BYTES: u64 = 1 << 20;

/// What the files of a mount share.
pub(super) struct FileContext {
    pub(super) source: PatientSource,
    pub(super) cache: CacheDir,
    pub(super) startup_set: StartupSet,
    pub(super) counters: Counters,
}

/// What the mount did so far.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) fetches: AtomicU64,
    pub(super) blocks_fetched: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
}

impl Counters {
    /// One call of the source brought `blocks` blocks.
    pub(super) fn count_fetch(&self, blocks: usize) {
        self.fetches.fetch_add(1, Relaxed);
        self.blocks_fetched.fetch_add(blocks as u64, Relaxed);
    }
}

/// See the module.
pub(super) struct FileData {
    base: Base,
    size: AtomicU64,
    /// Number of absent cells. Changed under the lock of `blocks`, after the cache file was written.
    absent: AtomicU32,
    blocks: Mutex<Blocks>,
    /// Notified when blocks land.
    landed: Condvar,
    cache: Arc<CacheFile>,
}

struct Blocks {
    absent: AbsentCells,
    /// Disjoint runs of blocks that somebody fetches or is about to keep.
    in_flight: Vec<Leg>,
}

/// A run of blocks in flight, with its contents once it has landed.
struct Leg {
    run: Range<u32>,
    contents: Option<Bytes>,
}

/// Contents of absent cells: those from `start` on, a multiple of a cell.
struct Piece {
    start: u64,
    bytes: Bytes,
}

impl FileData {
    /// File `ino` as it is in the base.
    pub(super) fn new(ino: u64, base: Base) -> FileData {
        let size = base.bytes();
        let absent = AbsentCells::all(size);
        FileData {
            base,
            size: AtomicU64::new(size),
            absent: AtomicU32::new(absent.count()),
            blocks: Mutex::new(Blocks { absent, in_flight: Vec::new() }),
            landed: Condvar::new(),
            cache: CacheFile::new(ino),
        }
    }

    /// The file's size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// What the file is in the base.
    pub(super) fn base(&self) -> &Base {
        &self.base
    }

    /// The cache file.
    pub(super) fn cache_file(&self) -> &CacheFile {
        &self.cache
    }

    /// Whether asking the base takes no time: there is nothing to ask for, or the contents are in memory.
    fn base_is_at_hand(&self) -> bool {
        self.absent.load(Acquire) == 0 || matches!(self.base, Base::Memory(_))
    }

    /// Whether reading these bytes has to wait for the base.
    pub(super) fn read_waits(&self, offset: u64, length: u64) -> bool {
        let end = offset.saturating_add(length).min(self.size());
        !self.base_is_at_hand() && offset < end && self.blocks.lock().absent.any(cells_of(offset, end))
    }

    /// Whether writing these bytes, or making them zero, has to wait for the base.
    pub(super) fn write_waits(&self, offset: u64, length: u64) -> bool {
        !self.base_is_at_hand() && self.absent_edge(&self.blocks.lock(), offset, offset.saturating_add(length)).is_some()
    }

    /// Whether truncating to `size` has to wait for the base.
    pub(super) fn truncate_waits(&self, size: u64) -> bool {
        self.write_waits(size, u64::MAX)
    }

    /// Reads up to `length` bytes at `offset`, fewer at the end of the file, and gives them to `reply`. What comes from
    /// the base is passed on before it is kept: the reader does not wait for the cache.
    pub(super) fn read<R>(&self, context: &FileContext, offset: u64, length: u64, reply: impl FnOnce(io::Result<&[u8]>) -> R) -> R {
        let end = offset.saturating_add(length).min(self.size());
        if offset >= end {
            return reply(Ok(&[]));
        }
        context.counters.bytes_read.fetch_add(end - offset, Relaxed);
        context.startup_set.note(&self.base, blocks_of(offset, end));
        let (pieces, flight) = match self.find(context, cells_of(offset, end)) {
            Ok(found) => found,
            Err(error) => return reply(Err(error)),
        };
        let answer = match pieces.as_slice() {
            [piece] if piece.start <= offset && piece.end() >= end => {
                reply(Ok(&piece.bytes[(offset - piece.start) as usize..(end - piece.start) as usize]))
            }
            _ => with_buffer((end - offset) as usize, |buffer| match self.read_cache(context, offset, buffer) {
                Ok(()) => {
                    pieces.iter().for_each(|piece| piece.overlay(offset, buffer));
                    reply(Ok(buffer))
                }
                Err(error) => reply(Err(error)),
            }),
        };
        if let Some(flight) = flight
            && let Err(error) = flight.keep(context)
        {
            tracing::warn!("cannot keep fetched blocks in the cache, they will be fetched again: {error}");
        }
        answer
    }

    /// The whole file.
    pub(super) fn read_all(&self, context: &FileContext) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        loop {
            let read = self.read(context, contents.len() as u64, WHOLE_READ_BYTES, |read| {
                read.map(|bytes| {
                    contents.extend_from_slice(bytes);
                    bytes.len()
                })
            })?;
            if read == 0 {
                return Ok(contents);
            }
        }
    }

    /// The contents of those of `cells` that are absent, fetched if need be. What was fetched here is still to be kept.
    fn find(&self, context: &FileContext, cells: Range<u64>) -> io::Result<(Vec<Piece>, Option<Flight<'_>>)> {
        if self.absent.load(Acquire) == 0 {
            return Ok((Vec::new(), None));
        }
        let mut flight: Option<Flight<'_>> = None;
        let mut blocks = self.blocks.lock();
        loop {
            let unclaimed = blocks.unclaimed(&blocks.absent.blocks(cells.clone()));
            if !unclaimed.is_empty() {
                let mut claimed = self.claim_runs(&mut blocks, unclaimed);
                drop(blocks);
                claimed.fetch(context)?;
                match &mut flight {
                    Some(flight) => flight.join(claimed),
                    None => flight = Some(claimed),
                }
                blocks = self.blocks.lock();
            } else if let Some(pieces) = blocks.pieces(cells.clone()) {
                return Ok((pieces, flight));
            } else {
                self.landed.wait(&mut blocks);
            }
        }
    }

    fn claim_runs(&self, blocks: &mut Blocks, runs: Vec<Range<u32>>) -> Flight<'_> {
        blocks.in_flight.extend(runs.iter().map(|run| Leg { run: run.clone(), contents: None }));
        Flight { file: self, runs, contents: Vec::new() }
    }

    /// Claims those of the blocks `wanted` that are absent and that nobody fetches yet.
    pub(super) fn claim(&self, wanted: &[Range<u32>]) -> Option<Flight<'_>> {
        let mut blocks = self.blocks.lock();
        let absent: Vec<Range<u32>> = wanted.iter().flat_map(|run| blocks.absent.blocks(cells_of_blocks(run))).collect();
        let runs = blocks.unclaimed(&absent);
        (!runs.is_empty()).then(|| self.claim_runs(&mut blocks, runs))
    }

    /// Writes `piece` to the cache file wherever nothing newer is there.
    fn keep(&self, context: &FileContext, piece: &Piece) -> io::Result<()> {
        let file = match context.cache.open(&self.cache) {
            // Unlinked while the blocks were on their way.
            Err(_) if self.cache.is_deleted() => return Ok(()),
            file => file?,
        };
        let mut blocks = self.blocks.lock();
        for cells in blocks.absent.runs(cells_of(piece.start, piece.end())) {
            let from = (cells.start * CELL_BYTES - piece.start) as usize;
            let to = ((cells.end * CELL_BYTES - piece.start) as usize).min(piece.bytes.len());
            file.write_all_at(&piece.bytes[from..to], cells.start * CELL_BYTES)?;
            self.make_present(&mut blocks, cells);
        }
        Ok(())
    }

    /// Reads from the cache file; what it does not have is zero.
    fn read_cache(&self, context: &FileContext, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        if self.cache.exists() {
            let file = context.cache.open(&self.cache)?;
            while filled < buffer.len() {
                match file.read_at(&mut buffer[filled..], offset + filled as u64) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        buffer[filled..].fill(0);
        Ok(())
    }

    /// The first absent cell of which `start..end` covers a part only (as far as the base has it).
    fn absent_edge(&self, blocks: &Blocks, start: u64, end: u64) -> Option<u64> {
        let base_end = self.base.bytes();
        let first = (!start.is_multiple_of(CELL_BYTES)).then_some(start / CELL_BYTES);
        let last = (!end.is_multiple_of(CELL_BYTES) && end < base_end).then_some(end / CELL_BYTES);
        [first, last].into_iter().flatten().find(|cell| blocks.absent.any(*cell..cell + 1))
    }

    /// Locks the file when no cell at the edges of `start..end` is absent any more.
    fn lock_for_change(&self, context: &FileContext, start: u64, end: u64) -> io::Result<MutexGuard<'_, Blocks>> {
        loop {
            let blocks = self.blocks.lock();
            let Some(cell) = self.absent_edge(&blocks, start, end) else { return Ok(blocks) };
            drop(blocks);
            let (pieces, _flight) = self.find(context, cell..cell + 1)?;
            pieces.iter().try_for_each(|piece| self.keep(context, piece))?;
        }
    }

    fn make_present(&self, blocks: &mut Blocks, cells: Range<u64>) {
        blocks.absent.clear(cells);
        self.absent.store(blocks.absent.count(), Release);
    }

    /// Writes `data` at `offset`.
    pub(super) fn write(&self, context: &FileContext, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        context.counters.bytes_written.fetch_add(data.len() as u64, Relaxed);
        let file = context.cache.open(&self.cache)?;
        if self.absent.load(Acquire) == 0 {
            file.write_all_at(data, offset)?;
        } else {
            let mut blocks = self.lock_for_change(context, offset, end)?;
            file.write_all_at(data, offset)?;
            self.make_present(&mut blocks, cells_of(offset, end));
        }
        self.size.fetch_max(end, AcqRel);
        Ok(())
    }

    /// Cuts or extends the file; what is added is zero.
    pub(super) fn truncate(&self, context: &FileContext, size: u64) -> io::Result<()> {
        let mut blocks = self.lock_for_change(context, size, u64::MAX)?;
        if self.cache.exists() {
            context.cache.open(&self.cache)?.set_len(size)?;
        }
        self.make_present(&mut blocks, size.div_ceil(CELL_BYTES)..u64::MAX);
        self.size.store(size, Release);
        Ok(())
    }

    /// `fallocate`: reserves space, punches a hole or makes a range zero. Other modes are refused as not supported.
    pub(super) fn allocate(&self, context: &FileContext, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::FileTooLarge)?;
        let zeroes = match mode - FallocateFlags::KEEP_SIZE {
            none if none.is_empty() => false,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE => true,
            _ => return Err(rustix::io::Errno::OPNOTSUPP.into()),
        };
        let file = context.cache.open(&self.cache)?;
        if zeroes {
            let mut blocks = self.lock_for_change(context, offset, end)?;
            fallocate(&*file, mode, offset, length)?;
            self.make_present(&mut blocks, cells_of(offset, end));
        } else {
            fallocate(&*file, mode, offset, length)?;
        }
        if !mode.contains(FallocateFlags::KEEP_SIZE) {
            self.size.fetch_max(end, AcqRel);
        }
        Ok(())
    }
}

impl Blocks {
    /// Those of the runs `wanted` that are not in flight.
    fn unclaimed(&self, wanted: &[Range<u32>]) -> Vec<Range<u32>> {
        self.in_flight.iter().fold(wanted.to_vec(), |left, leg| without(left, &leg.run))
    }

    /// The contents of the absent ones of `cells`, if all have landed.
    fn pieces(&self, cells: Range<u64>) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        for absent in self.absent.runs(cells) {
            let mut at = absent.start;
            while at < absent.end {
                let leg = self.in_flight.iter().find(|leg| cells_of_blocks(&leg.run).contains(&at))?;
                let leg_cells = cells_of_blocks(&leg.run);
                let until = absent.end.min(leg_cells.end);
                let contents = leg.contents.as_ref()?;
                let offset = |cell: u64| (((cell - leg_cells.start) * CELL_BYTES) as usize).min(contents.len());
                pieces.push(Piece { start: at * CELL_BYTES, bytes: contents.slice(offset(at)..offset(until)) });
                at = until;
            }
        }
        Some(pieces)
    }
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Puts the piece into `buffer`, which starts at `offset` of the file.
    fn overlay(&self, offset: u64, buffer: &mut [u8]) {
        let from = self.start.max(offset);
        let to = self.end().min(offset + buffer.len() as u64);
        if from < to {
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&self.bytes[(from - self.start) as usize..(to - self.start) as usize]);
        }
    }
}

/// Blocks of a file that this thread fetches or is about to keep. When it is dropped, it does so no more.
pub(super) struct Flight<'a> {
    file: &'a FileData,
    runs: Vec<Range<u32>>,
    /// The contents of each run, once they have landed.
    contents: Vec<Bytes>,
}

impl<'a> Flight<'a> {
    /// The runs of blocks.
    pub(super) fn runs(&self) -> &[Range<u32>] {
        &self.runs
    }

    /// Asks the base for them.
    fn fetch(&mut self, context: &FileContext) -> io::Result<()> {
        let contents = self.file.base.fetch(&context.source, &self.runs)?;
        if !matches!(self.file.base, Base::Memory(_)) {
            context.counters.count_fetch(self.runs.iter().map(ExactSizeIterator::len).sum());
        }
        self.land(contents);
        Ok(())
    }

    /// The contents of the runs are there: all readers may have them.
    pub(super) fn land(&mut self, contents: Vec<Bytes>) {
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
    fn join(&mut self, mut other: Flight<'a>) {
        self.runs.append(&mut other.runs);
        self.contents.append(&mut other.contents);
    }

    /// Keeps what landed, wherever nothing newer is there.
    pub(super) fn keep(self, context: &FileContext) -> io::Result<()> {
        for (run, contents) in self.runs.iter().zip(&self.contents) {
            self.file.keep(context, &Piece { start: u64::from(run.start) * BLOCK_BYTES, bytes: contents.clone() })?;
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

fn cells_of_blocks(blocks: &Range<u32>) -> Range<u64> {
    u64::from(blocks.start) * u64::from(CELLS_PER_BLOCK)..u64::from(blocks.end) * u64::from(CELLS_PER_BLOCK)
}

/// The parts of the runs `left` that are not in `taken`.
fn without(left: Vec<Range<u32>>, taken: &Range<u32>) -> Vec<Range<u32>> {
    let cut = |run: Range<u32>| [run.start..run.end.min(taken.start), run.start.max(taken.end)..run.end];
    left.into_iter().flat_map(cut).filter(|run| !run.is_empty()).collect()
}

thread_local! {
    /// Each thread's buffer for what it reads from the cache; as large as its largest read.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn with_buffer<R>(length: usize, use_buffer: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        use_buffer(&mut buffer[..length])
    })
}
