//! The contents of one regular file: what is here, what is still in the base, and how the one becomes the other.
//!
//! The cache file holds the present cells (see [`super::cells`]), with zeros where it has holes or ends early. Whoever
//! needs an absent cell *takes off* for its block, in one call of the source for all that is needed; others wait for
//! the blocks in flight instead of fetching them again. When the blocks have *landed*, in memory, all readers have
//! them. Then they are *kept*: under the file's lock, those cells that are still absent are written to the cache file
//! and become present. A write makes its cells present under the same lock. So a fetch, however late it lands, cannot
//! overwrite anything newer.
//!
//! A block that was fetched and never written (see [`super::fetched`]) may be *dropped* to make room: under the file's
//! lock its cells become absent, the file's count of evictions goes up, and then its part of the cache file becomes a
//! hole. A reader looks which cells are absent, reads the cache file without the lock, and looks at the count again.
//! Where it is the same, no hole was made since: a reader that saw the hole sees the count, and one that saw the count
//! before had seen the cells absent. Otherwise it begins again. A writer takes its blocks off the list of those that
//! may go, under the lock, before it writes without it. A file all of whose cells were written has nothing that could
//! go or come, and is written without any lock.
//!
//! A block that was written is *handed over* when the base has it as well: it counts as fetched from then on
//! ([`FileData::hand_over`], [`super::rebase`]). Nobody writes meanwhile: writers share a lock for as long as they
//! write, and whoever hands over has it alone. A block that somebody fetches is passed over: what comes may be older.

mod flight;
mod hand_over;

use std::{
    cell::RefCell,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        },
    },
};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use rustix::fs::{FallocateFlags, fallocate};

use super::{
    base::Base,
    budget::CacheBudget,
    cache::{CacheDir, CacheFile},
    cells::{
        AbsentCells, BLOCK_BYTES, CELL_BYTES, CELLS_PER_BLOCK, blocks_of, blocks_of_cells, cells_in, cells_of, cells_of_blocks,
        whole_blocks, without,
    },
    fetched::FetchedBlocks,
    recent::RecentWrites,
    room::Room,
    source::PatientSource,
    startup_set::StartupSet,
};

pub(super) use self::flight::Flight;
use self::flight::{Leg, Piece};
pub use self::hand_over::Tally;

/// Bytes read at a time where a whole file is read.
const WHOLE_READ_BYTES: u64 = 1 << 20;
/// Times that a reader reads the cache file without the lock; if each time a hole was made meanwhile, it takes the
/// lock.
const UNLOCKED_READS_MAX: u32 = 2;

/// What the files of a mount share.
pub(super) struct FileContext {
    pub(super) source: PatientSource,
    pub(super) cache: CacheDir,
    pub(super) budget: CacheBudget,
    pub(super) room: Room,
    pub(super) startup_set: StartupSet,
    pub(super) counters: Counters,
    /// Grows at each mark (see [`super::recent`]).
    pub(super) mark: AtomicU64,
    /// What a test does at the moment when a thread has let go of a file's lock and has not read or written yet.
    #[cfg(test)]
    pub(super) meanwhile: fn(&FileContext, &FileData),
}

impl FileContext {
    /// Whether the disk has no room for so much more, also when what was only fetched has gone.
    pub(super) fn has_no_room_for(&self, bytes: u64) -> bool {
        if self.room.is_too_little_for(bytes) {
            self.budget.make_room(self, true);
            self.room.look_again(&self.cache);
        }
        self.room.is_too_little_for(bytes)
    }
}

impl FileContext {
    fn meanwhile(&self, file: &FileData) {
        #[cfg(test)]
        (self.meanwhile)(self, file);
        #[cfg(not(test))]
        let _ = file;
    }
}

/// What the mount did so far.
#[derive(Default)]
pub(super) struct Counters {
    /// Reads that waited for nothing.
    pub(super) hits: AtomicU64,
    pub(super) fetches: AtomicU64,
    pub(super) blocks_fetched: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    /// How often the base moved on.
    pub(super) rebases: AtomicU64,
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
    me: Weak<FileData>,
    base: Base,
    size: AtomicU64,
    /// Number of absent cells. Changed under the lock of `blocks`: after the cache file was written, and before a hole
    /// is made in it.
    absent: AtomicU32,
    /// Number of cells that are absent or may become it. Where it is 0 nothing comes or goes until blocks are handed
    /// over, which happens to main forks only.
    unsettled: AtomicU32,
    /// How often blocks were dropped. Counts under the lock of `blocks`, between `absent` and the hole.
    evictions: AtomicU64,
    /// The blocks that can be dropped.
    fetched: FetchedBlocks,
    /// Shared while somebody writes. Comes before the lock of `blocks`.
    writers: RwLock<()>,
    blocks: Mutex<Blocks>,
    /// Notified when blocks land.
    landed: Condvar,
    cache: Arc<CacheFile>,
}

struct Blocks {
    absent: AbsentCells,
    /// What was written lately, of a main fork.
    recent: RecentWrites,
    /// Disjoint runs of blocks that somebody fetches or is about to keep.
    in_flight: Vec<Leg>,
    /// Whether the hand that makes room comes by.
    enrolled: bool,
    /// The file is gone: nothing is counted or kept any more.
    gone: bool,
}

/// What a reader found.
struct Found<'a> {
    /// Contents of the absent cells.
    pieces: Vec<Piece>,
    /// The count of evictions when it was seen which cells are absent.
    evictions: u64,
    /// The file's lock, unless none was needed.
    lock: Option<MutexGuard<'a, Blocks>>,
}

impl FileData {
    /// File `ino` as it is in the base.
    pub(super) fn new(ino: u64, base: Base) -> Arc<FileData> {
        let size = base.bytes();
        let absent = AbsentCells::all(size);
        let fetched = FetchedBlocks::none(base.blocks_max());
        let recent = RecentWrites::default();
        Arc::new_cyclic(|me| FileData {
            me: me.clone(),
            base,
            size: AtomicU64::new(size),
            absent: AtomicU32::new(absent.count()),
            unsettled: AtomicU32::new(absent.count()),
            evictions: AtomicU64::new(0),
            fetched,
            writers: RwLock::new(()),
            blocks: Mutex::new(Blocks { absent, recent, in_flight: Vec::new(), enrolled: false, gone: false }),
            landed: Condvar::new(),
            cache: CacheFile::new(ino),
        })
    }

    /// The file's size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// Whether anything of it is written that is not the base's as well, or its size changed.
    pub(super) fn is_changed(&self) -> bool {
        let size = self.size();
        size != self.base.bytes() || i64::from(self.unsettled.load(SeqCst)) < cells_in(size)
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
        self.absent.load(Acquire) == 0 || self.base.is_in_memory()
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
        let (answer, flight) = self.read_from_anywhere(context, offset, (end - offset) as usize, reply);
        match flight {
            None => {
                context.counters.hits.fetch_add(1, Relaxed);
            }
            Some(flight) => {
                if let Err(error) = flight.keep_within_budget(context) {
                    tracing::warn!("cannot keep fetched blocks in the cache, they will be fetched again: {error}");
                }
            }
        }
        answer
    }

    /// Gives `length` bytes at `offset` to `reply`, from the cache file and the base. What was fetched is to be kept.
    fn read_from_anywhere<R>(
        &self,
        context: &FileContext,
        offset: u64,
        length: usize,
        reply: impl FnOnce(io::Result<&[u8]>) -> R,
    ) -> (R, Option<Flight<'_>>) {
        let end = offset + length as u64;
        let mut flight: Option<Flight<'_>> = None;
        let mut tries = 0;
        with_buffer(length, |buffer| {
            loop {
                let locks = tries >= UNLOCKED_READS_MAX;
                let found = match self.find(context, cells_of(offset, end), locks, &mut flight) {
                    Ok(found) => found,
                    Err(error) => return (reply(Err(error)), flight),
                };
                if let [piece] = found.pieces.as_slice()
                    && piece.start <= offset
                    && piece.end() >= end
                {
                    drop(found.lock);
                    return (reply(Ok(&piece.bytes[(offset - piece.start) as usize..(end - piece.start) as usize])), flight);
                }
                let lock = found.lock.filter(|_| locks);
                if lock.is_none() {
                    context.meanwhile(self);
                }
                if let Err(error) = self.read_cache(context, offset, buffer) {
                    return (reply(Err(error)), flight);
                }
                // Without the lock, a hole may have been made before the cache file was read.
                if lock.is_some() || self.evictions.load(SeqCst) == found.evictions {
                    drop(lock);
                    if self.unsettled.load(Relaxed) > 0 {
                        context.budget.count_hot(self.heat(offset, end, &found.pieces));
                    }
                    found.pieces.iter().for_each(|piece| piece.overlay(offset, buffer));
                    return (reply(Ok(buffer)), flight);
                }
                tries += 1;
            }
        })
    }

    /// Those blocks of `start..end` that did not have to be fetched are read once more. How many are newly hot.
    fn heat(&self, start: u64, end: u64, pieces: &[Piece]) -> u32 {
        if pieces.is_empty() {
            return self.fetched.touch(&blocks_of(start, end));
        }
        let here = pieces.iter().fold(vec![blocks_of(start, end)], |left, piece| without(left, &blocks_of(piece.start, piece.end())));
        here.iter().map(|run| self.fetched.touch(run)).sum()
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

    /// The contents of those of `cells` that are absent, fetched if need be; what was fetched here is added to
    /// `flight`, and still to be kept. With `locks`, what was found stays so while the lock is held.
    fn find<'a>(&'a self, context: &FileContext, cells: Range<u64>, locks: bool, flight: &mut Option<Flight<'a>>) -> io::Result<Found<'a>> {
        // Before the look at what is absent: see the module.
        let evictions = self.evictions.load(SeqCst);
        if !locks && self.absent.load(SeqCst) == 0 {
            return Ok(Found { pieces: Vec::new(), evictions, lock: None });
        }
        let mut blocks = self.blocks.lock();
        loop {
            let unclaimed = blocks.unclaimed(&blocks.absent.blocks(cells.clone()));
            if !unclaimed.is_empty() {
                let mut claimed = self.claim_runs(&mut blocks, unclaimed);
                drop(blocks);
                claimed.fetch(context)?;
                // Without the lock, which the end of a flight takes.
                *flight = Some(match flight.take() {
                    Some(flight) => flight.join(claimed),
                    None => claimed,
                });
                blocks = self.blocks.lock();
            } else if let Some(pieces) = blocks.pieces(cells.clone()) {
                let evictions = self.evictions.load(SeqCst);
                return Ok(Found { pieces, evictions, lock: Some(blocks) });
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

    /// Writes `piece` to the cache file wherever nothing newer is there. Those blocks of it that were wholly absent can
    /// be dropped again, unless it is to `stay`.
    fn keep(&self, context: &FileContext, piece: &Piece, stay: bool) -> io::Result<()> {
        let file = match context.cache.open(&self.cache) {
            // Unlinked while the blocks were on their way.
            Err(_) if self.cache.is_deleted() => return Ok(()),
            file => file?,
        };
        let mut blocks = self.blocks.lock();
        if blocks.gone {
            return Ok(());
        }
        for cells in blocks.absent.runs(cells_of(piece.start, piece.end())) {
            let from = (cells.start * CELL_BYTES - piece.start) as usize;
            let to = ((cells.end * CELL_BYTES - piece.start) as usize).min(piece.bytes.len());
            let (bytes, at) = (&piece.bytes[from..to], cells.start * CELL_BYTES);
            // What is to stay is needed for a write.
            if stay {
                context.cache.store(&file, bytes, at)?;
            } else {
                file.write_all_at(bytes, at)?;
            }
            context.room.take((to - from) as u64);
            let whole = whole_blocks(&cells);
            if stay || self.base.is_in_memory() || whole.is_empty() {
                self.settle(context, &mut blocks, cells);
                continue;
            }
            let whole_cells = cells_of_blocks(&whole);
            self.settle(context, &mut blocks, cells.start..whole_cells.start);
            self.settle(context, &mut blocks, whole_cells.end..cells.end);
            blocks.absent.clear(whole_cells);
            self.absent.store(blocks.absent.count(), SeqCst);
            context.budget.count_fetched(self.fetched.add(&whole, context.budget.lately()));
            if !blocks.enrolled {
                blocks.enrolled = true;
                context.budget.enrol(self.me.clone());
            }
        }
        Ok(())
    }

    /// The number of words that [`FileData::evict`] goes through.
    pub(super) fn words(&self) -> u32 {
        self.fetched.words()
    }

    /// Blocks of word `word` are hot no more, unless they are read again; how many were.
    pub(super) fn cool(&self, word: u32) -> u32 {
        self.fetched.cool(word)
    }

    /// Drops cold blocks of word `word` of the file, `limit` at most; the base still has them. The kernel may keep
    /// their pages: they are the same as those of the base, or newer and will be written. How many were dropped.
    pub(super) fn evict(&self, context: &FileContext, word: u32, limit: u32) -> io::Result<u32> {
        if self.fetched.cold(word, limit).is_empty() {
            return Ok(0);
        }
        let file = match context.cache.open(&self.cache) {
            Err(_) if self.cache.is_deleted() => return Ok(0),
            file => file?,
        };
        let mut blocks = self.blocks.lock();
        let runs = self.fetched.cold(word, limit);
        for run in &runs {
            blocks.absent.set(cells_of_blocks(run));
            context.budget.count_removed(self.fetched.drop(run, context.budget.lately(), context.budget.evicted()));
        }
        // In this order: see the module.
        self.absent.store(blocks.absent.count(), SeqCst);
        self.evictions.fetch_add(1, SeqCst);
        for run in &runs {
            let (start, end) = (u64::from(run.start) * BLOCK_BYTES, u64::from(run.end) * BLOCK_BYTES);
            fallocate(&*file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start)?;
        }
        Ok(runs.iter().map(|run| run.end - run.start).sum())
    }

    /// Whether there is nothing to drop, so that the hand need not come by until there is.
    pub(super) fn leaves(&self) -> bool {
        let mut blocks = self.blocks.lock();
        blocks.enrolled = self.fetched.count() > 0;
        !blocks.enrolled
    }

    /// The file is gone, and its cache file will be: it does not count any more.
    pub(super) fn retire(&self, context: &FileContext) {
        let mut blocks = self.blocks.lock();
        if !blocks.gone {
            blocks.gone = true;
            let removed = self.fetched.remove(&(0..u32::MAX));
            context.budget.count_removed(removed);
            let unwritten = i64::from(blocks.absent.count()) + i64::from(removed.blocks * CELLS_PER_BLOCK);
            context.budget.count_written(unwritten - cells_in(self.size()));
        }
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
        let base_end = if self.base.is_in_memory() { self.base.bytes() } else { blocks.absent.end() };
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
            let mut flight = None;
            let Found { pieces, lock, .. } = self.find(context, cell..cell + 1, false, &mut flight)?;
            drop(lock);
            pieces.iter().try_for_each(|piece| self.keep(context, piece, true))?;
        }
    }

    /// The cells of `cells` are written, for good.
    fn settle(&self, context: &FileContext, blocks: &mut Blocks, cells: Range<u64>) {
        if cells.is_empty() {
            return;
        }
        let removed = self.fetched.remove(&blocks_of_cells(&cells));
        context.budget.count_removed(removed);
        let before = blocks.absent.count();
        blocks.absent.clear(cells);
        let absent = blocks.absent.count();
        self.absent.store(absent, SeqCst);
        self.unsettled.store(absent + self.fetched.count() * CELLS_PER_BLOCK, SeqCst);
        context.budget.count_written(i64::from(before - absent) + i64::from(removed.blocks * CELLS_PER_BLOCK));
    }

    /// Writes `data` at `offset`.
    pub(super) fn write(&self, context: &FileContext, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        context.counters.bytes_written.fetch_add(data.len() as u64, Relaxed);
        let writing = self.writers.read();
        let file = context.cache.open(&self.cache)?;
        context.room.take(end.saturating_sub(self.size().max(offset)));
        if self.unsettled.load(SeqCst) == 0 && self.base.main_fork().is_none() {
            context.cache.store(&file, data, offset)?;
        } else {
            let mut blocks = self.lock_for_change(context, offset, end)?;
            self.note(context, &mut blocks, offset, end);
            let cells = cells_of(offset, end);
            if blocks.absent.any(cells.clone()) {
                context.cache.store(&file, data, offset)?;
                context.room.take(data.len() as u64);
                self.settle(context, &mut blocks, cells);
                drop(blocks);
            } else {
                // From here on nobody drops them.
                self.settle(context, &mut blocks, cells);
                drop(blocks);
                context.meanwhile(self);
                context.cache.store(&file, data, offset)?;
            }
        }
        self.grow(context, end);
        drop(writing);
        context.budget.make_room(context, false);
        Ok(())
    }

    /// Bytes `start..end` are being written.
    fn note(&self, context: &FileContext, blocks: &mut Blocks, start: u64, end: u64) {
        if self.base.main_fork().is_some() {
            let (written, max) = (blocks_of(start, end), self.fetched.capacity());
            blocks.recent.note(context.mark.load(SeqCst), written.start.min(max)..written.end.min(max));
        }
    }

    /// The file has at least `size` bytes.
    fn grow(&self, context: &FileContext, size: u64) {
        let before = self.size.fetch_max(size, AcqRel);
        if before < size {
            context.budget.count_written(cells_in(size) - cells_in(before));
        }
    }

    /// Cuts or extends the file; what is added is zero.
    pub(super) fn truncate(&self, context: &FileContext, size: u64) -> io::Result<()> {
        let writing = self.writers.read();
        let mut blocks = self.lock_for_change(context, size, u64::MAX)?;
        self.note(context, &mut blocks, size, size.max(self.size()));
        if self.cache.exists() {
            context.cache.open(&self.cache)?.set_len(size)?;
        }
        // With the cell that is cut in two, which is here.
        self.settle(context, &mut blocks, cells_of(size, u64::MAX));
        let before = self.size.swap(size, AcqRel);
        context.budget.count_written(cells_in(size) - cells_in(before));
        drop(blocks);
        drop(writing);
        context.budget.make_room(context, false);
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
        let writing = self.writers.read();
        let file = context.cache.open(&self.cache)?;
        if zeroes {
            let mut blocks = self.lock_for_change(context, offset, end)?;
            self.note(context, &mut blocks, offset, end);
            fallocate(&*file, mode, offset, length)?;
            self.settle(context, &mut blocks, cells_of(offset, end));
        } else {
            self.note(context, &mut self.blocks.lock(), offset, end);
            fallocate(&*file, mode, offset, length)?;
        }
        if !mode.contains(FallocateFlags::KEEP_SIZE) {
            self.grow(context, end);
        }
        drop(writing);
        context.budget.make_room(context, false);
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
