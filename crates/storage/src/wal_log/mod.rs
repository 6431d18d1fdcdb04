//! The WAL log: one sequence of segment files in which WAL bytes of *all* timelines become durable, and from which
//! ingest reads them.
//!
//! **Layout.** Segment files `<number, 16 hexadecimal digits>.wal` of [`SEGMENT_SIZE`] bytes, written full of zeros
//! ahead of use, hold chunks ([`chunk`]) one after another; a position in the log is `number * SEGMENT_SIZE +
//! offset`. A segment that is no longer needed becomes the next spare one. The file `newest` names the newest
//! segment, which would not be missed otherwise ([`newest`]). The file `lock` keeps a second process out.
//!
//! **Durability.** [`WalLog::append`] writes into the page cache, [`WalLog::sync`] makes durable: one caller runs
//! `fdatasync` for all that have appended meanwhile. Nothing counts before its sync returned. After a failed sync
//! nothing is ever acknowledged again by this process, for the kernel may have thrown the pages away. A failed write,
//! or a full disk, fails that append only.
//!
//! **Crash.** At open the log ends at the first place where no whole chunk stands. What stands behind it was never
//! synced, unless a chunk there says that the log had been synced beyond that place: then the log is damaged, and it
//! is refused with the file's name. The rest of the file is zeroed before anything is appended, so that nothing which
//! was never acknowledged can come back. What is not known to be on disk is written again and fsynced before any
//! position is reported: what was reread may only have been in the page cache.
//!
//! **Replacing.** Bytes that are sent again, because the stream had ended within a record, replace what the log has
//! from their start on. So a caller must never append below what it acknowledged. It cannot below its epoch's start,
//! nor below what layers cover.
//!
//! **Epochs.** Bytes at or beyond the start of a later writer epoch are void, now and after a crash:
//! [`WalLog::attach`] is told the epochs from the tenant log. Appends must carry the newest epoch and join on. Bytes
//! of a *newer* epoch than the tenant log knows are no void bytes but evidence that it lost something, and refused.
//!
//! **Space.** A segment is freed once layers cover all that counts in it. What a timeline that lags behind still
//! needs of an old segment [`WalLog::copy_laggards`] copies to the head.
//!
//! What is read is not checked here once more: each WAL record has its own CRC-32C, which its reader checks.

mod chunk;
mod disk;
mod error;
mod index;
mod newest;
mod segments;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use parking_lot::{Condvar, Mutex, MutexGuard};
use varve_postgres::Lsn;

pub use disk::{Folder, LogDisk, LogFile};
pub use error::WalLogError;

use crate::ids::{TenantId, TimelineId, WriterEpoch};
use chunk::{ChunkHeader, HEADER_SIZE, PAYLOAD_SIZE_MAX, chunk_size};
use index::{LiveRuns, Run, TimelineIndex};
use segments::Segments;

/// Bytes in a segment file.
pub const SEGMENT_SIZE: u64 = 16 * 1024 * 1024;
/// An old segment is freed by copying where at most so many quarters of it still count: above half of the limit, and
/// above the limit, when everybody waits. Each copy then wins at least a quarter.
const LAGGARD_QUARTERS: (u64, u64) = (1, 3);

type Owner = (TenantId, TimelineId);

/// How a log works.
#[derive(Clone, Copy, Debug)]
pub struct WalLogOptions {
    /// [`WalLog::is_over_limit`] from here on.
    pub limit_bytes: u64,
    /// Bytes in a segment file, a multiple of 8; always the same for one folder. Tests have small ones.
    pub segment_bytes: u64,
    /// Whether a thread makes spare segments ahead of use.
    pub make_spares: bool,
}

/// A position in the log, up to which [`WalLog::sync`] makes durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition(u64);

#[derive(Debug)]
struct State {
    segments: Segments,
    timelines: HashMap<Owner, TimelineIndex>,
    live: LiveRuns,
    /// Runs that others replace, each with the position up to which the log must be durable until it does not count
    /// any more: should what replaces it be lost, it is still there, whole.
    replaced: VecDeque<(u64, Run)>,
    /// Next byte to write.
    written: u64,
    /// Everything below is durable.
    synced: u64,
    syncing: bool,
    failed: Option<WalLogError>,
    scratch: Vec<u8>,
}

/// See the module's doc.
#[derive(Debug)]
pub struct WalLog {
    disk: Arc<dyn LogDisk>,
    state: Mutex<State>,
    synced: Condvar,
    options: WalLogOptions,
    _lock: Option<std::fs::File>,
}

/// A timeline of which the log holds bytes though it is not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unattached {
    /// Its tenant.
    pub tenant: TenantId,
    /// Its id.
    pub timeline: TimelineId,
    /// The newest epoch of which there are bytes.
    pub newest: WriterEpoch,
}

/// A run that is to be copied to the head.
struct Laggard {
    owner: Owner,
    run: Run,
    bytes: Vec<u8>,
}

impl WalLog {
    /// Opens the log in a folder, which no other process may use.
    ///
    /// # Errors
    /// [`WalLogError`]: in use, damaged, of a newer version, or the file system's.
    pub fn open(folder: &Path, limit_bytes: u64) -> Result<WalLog, WalLogError> {
        let io_error = |action: &str, error| WalLogError::Io {
            folder: folder.display().to_string(),
            action: action.to_owned(),
            error: Arc::new(error),
        };
        let disk = Folder::open(folder).map_err(|error| io_error("make the folder", error))?;
        let lock = std::fs::File::create(folder.join("lock")).map_err(|error| io_error("make the lock file", error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| WalLogError::InUse { folder: folder.display().to_string() })?;
        let options = WalLogOptions { limit_bytes, segment_bytes: SEGMENT_SIZE, make_spares: true };
        let mut log = Self::open_on(Arc::new(disk), options)?;
        log._lock = Some(lock);
        Ok(log)
    }

    /// Opens the log on any disk.
    ///
    /// # Errors
    /// As [`WalLog::open`].
    pub fn open_on(disk: Arc<dyn LogDisk>, options: WalLogOptions) -> Result<WalLog, WalLogError> {
        let mut timelines: HashMap<Owner, TimelineIndex> = HashMap::new();
        let mut live = LiveRuns::new(options.segment_bytes);
        let (segments, end) = Segments::open(&disk, options, |header| {
            if header.payload_len == 0 {
                // It was forgotten: what came before counts for nothing.
                if let Some(mut index) = timelines.remove(&(header.tenant, header.timeline)) {
                    index.forget(&mut live);
                }
                return;
            }
            let run = Run {
                start: header.start,
                end: header.start + u64::from(header.payload_len),
                epoch: header.epoch,
                at: header.position + HEADER_SIZE as u64,
                origin: header.origin,
            };
            timelines.entry((header.tenant, header.timeline)).or_default().found(run, &mut live);
        })?;
        let state = State {
            segments,
            timelines,
            live,
            replaced: VecDeque::new(),
            written: end,
            synced: end,
            syncing: false,
            failed: None,
            scratch: Vec::new(),
        };
        Ok(WalLog { disk, state: Mutex::new(state), synced: Condvar::new(), options, _lock: None })
    }

    /// Timelines of which the log holds bytes and that are not attached, each with the newest epoch of which it holds
    /// some.
    pub fn unattached(&self) -> Vec<Unattached> {
        let state = self.state.lock();
        let unattached = |(owner, index): (&Owner, &TimelineIndex)| {
            let newest = index.newest_epoch().filter(|_| index.attached == 0)?;
            Some(Unattached { tenant: owner.0, timeline: owner.1, newest })
        };
        let mut found: Vec<_> = state.timelines.iter().filter_map(unattached).collect();
        // Always the same order, so that a simulation can be repeated.
        found.sort_unstable_by_key(|held| (held.tenant, held.timeline));
        found
    }

    /// Attaches a timeline: `epochs` are all its writer epochs, ascending, each with the LSN at which it began; below
    /// `layered`, layers cover everything. Returns the durable end.
    ///
    /// # Errors
    /// [`WalLogError::UnknownEpoch`] when the log holds bytes of an epoch that is newer than all of these: an epoch
    /// is durable in the tenant log before its first byte is, so the tenant log has lost something.
    /// [`WalLogError::NotHeld`] when bytes between `layered` and later ones that the log holds are missing.
    pub fn attach(&self, tenant: TenantId, timeline: TimelineId, epochs: &[(WriterEpoch, Lsn)], layered: Lsn) -> Result<Lsn, WalLogError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let index = state.timelines.entry((tenant, timeline)).or_default();
        // Another server may have had the tenant since this was attached before: then there are epochs that the index
        // does not know.
        let is_known = index.settled && epochs.last().is_none_or(|last| *last == (index.epoch, index.epoch_start));
        let known = epochs.last().map_or(WriterEpoch(0), |(epoch, _)| *epoch);
        if !is_known && let Some(found) = index.newest_epoch().filter(|newest| *newest > known) {
            let folder = self.disk.describe();
            return Err(WalLogError::UnknownEpoch { folder, tenant, timeline, found: found.0, known: known.0 });
        }
        if is_known {
            // It may also have put more into layers than this log ever held, of the epoch that both know.
            index.release(layered, &mut state.live);
        } else if let Some(lsn) = index.settle(epochs, layered, &mut state.live) {
            return Err(WalLogError::NotHeld { timeline, lsn });
        }
        index.attached += 1;
        let end = index.end;
        self.free_segments(state);
        Ok(end)
    }

    /// Begins a writer epoch at `lsn`: bytes at or beyond it from older epochs are void. The caller has made (epoch,
    /// LSN) durable in the tenant log before.
    ///
    /// # Errors
    /// [`WalLogError::NotAttached`]; [`WalLogError::Fenced`] when a later epoch has begun; [`WalLogError::Gap`] when
    /// `lsn` lies beyond the end.
    pub fn start_epoch(&self, tenant: TenantId, timeline: TimelineId, epoch: WriterEpoch, lsn: Lsn) -> Result<(), WalLogError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let index = Self::index(&mut state.timelines, tenant, timeline)?;
        if epoch <= index.epoch {
            return Err(WalLogError::Fenced { timeline, epoch: epoch.0, current: index.epoch.0 });
        }
        if lsn > index.end {
            return Err(WalLogError::Gap { timeline, epoch: epoch.0, end: index.end, start: lsn });
        }
        index.cut(lsn).iter().for_each(|run| state.live.remove(run));
        (index.epoch, index.epoch_start) = (epoch, lsn);
        Ok(())
    }

    /// End of what was appended, durable or not.
    ///
    /// # Errors
    /// [`WalLogError::NotAttached`].
    pub fn end(&self, tenant: TenantId, timeline: TimelineId) -> Result<Lsn, WalLogError> {
        Ok(Self::index(&mut self.state.lock().timelines, tenant, timeline)?.end)
    }

    /// Makes everything durable that was appended.
    ///
    /// # Errors
    /// As [`WalLog::sync`].
    pub fn sync_all(&self) -> Result<(), WalLogError> {
        let position = LogPosition(self.state.lock().written);
        self.sync(position)
    }

    fn index(
        timelines: &mut HashMap<Owner, TimelineIndex>,
        tenant: TenantId,
        timeline: TimelineId,
    ) -> Result<&mut TimelineIndex, WalLogError> {
        timelines.get_mut(&(tenant, timeline)).filter(|index| index.settled).ok_or(WalLogError::NotAttached { timeline })
    }

    /// Appends WAL bytes that begin at `start`. What the log has from there on, the beginning of a record that never
    /// became whole, they replace. Not durable before [`WalLog::sync`] up to the returned position.
    ///
    /// # Errors
    /// [`WalLogError::Fenced`], [`WalLogError::Gap`], [`WalLogError::Settled`], [`WalLogError::NotAttached`]; the
    /// file system's, after which a part of the bytes may have been appended, and the whole may be appended again.
    pub fn append(
        &self,
        tenant: TenantId,
        timeline: TimelineId,
        epoch: WriterEpoch,
        start: Lsn,
        bytes: &[u8],
    ) -> Result<LogPosition, WalLogError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let index = Self::index(&mut state.timelines, tenant, timeline)?;
        if epoch != index.epoch {
            return Err(WalLogError::Fenced { timeline, epoch: epoch.0, current: index.epoch.0 });
        }
        let floor = index.epoch_start.max(index.released);
        if start < floor {
            return Err(WalLogError::Settled { timeline, epoch: epoch.0, floor, start });
        }
        if start > index.end {
            return Err(WalLogError::Gap { timeline, epoch: epoch.0, end: index.end, start });
        }
        self.write_run(state, (tenant, timeline), epoch, start, bytes)
    }

    /// Takes over WAL that another log had, and that no writer of this one brings: bytes of `epoch`, which need not be
    /// the newest, from `start` on. What the log has already of it stays. Not durable before [`WalLog::sync`] up to the
    /// returned position.
    ///
    /// # Errors
    /// [`WalLogError::Gap`], [`WalLogError::NotAttached`]; the file system's.
    pub fn import(
        &self,
        tenant: TenantId,
        timeline: TimelineId,
        epoch: WriterEpoch,
        start: Lsn,
        bytes: &[u8],
    ) -> Result<LogPosition, WalLogError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let end = Self::index(&mut state.timelines, tenant, timeline)?.end;
        if start > end {
            return Err(WalLogError::Gap { timeline, epoch: epoch.0, end, start });
        }
        let rest = bytes.get(end.distance_from(start) as usize..).unwrap_or_default();
        self.write_run(state, (tenant, timeline), epoch, end, rest)
    }

    /// Writes bytes that begin at `start`, in place of what the log has from there on.
    fn write_run(&self, state: &mut State, owner: Owner, epoch: WriterEpoch, start: Lsn, bytes: &[u8]) -> Result<LogPosition, WalLogError> {
        let (mut next, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let run = self.write_chunk(state, owner, epoch, next, None, rest)?;
            let index = Self::index(&mut state.timelines, owner.0, owner.1)?;
            let until = state.written;
            state.replaced.extend(index.cut(run.start).into_iter().map(|run| (until, run)));
            index.push(run, &mut state.live);
            rest = &rest[(run.end.0 - run.start.0) as usize..];
            next = run.end;
        }
        Ok(LogPosition(state.written))
    }

    /// Writes as much of `bytes` as one chunk takes; `origin` is that of the run which it copies.
    fn write_chunk(
        &self,
        state: &mut State,
        (tenant, timeline): Owner,
        epoch: WriterEpoch,
        start: Lsn,
        origin: Option<u64>,
        bytes: &[u8],
    ) -> Result<Run, WalLogError> {
        let segment_bytes = self.options.segment_bytes;
        let mut room = (segment_bytes - state.written % segment_bytes) as usize;
        if room < chunk_size(8) {
            // Too little for a chunk: the rest of the segment stays as it is.
            state.written = state.written.next_multiple_of(segment_bytes);
            room = segment_bytes as usize;
        }
        let n = bytes.len().min(PAYLOAD_SIZE_MAX).min((room - HEADER_SIZE) & !7);
        let position = state.written;
        let origin = origin.unwrap_or(position);
        let header = ChunkHeader { position, synced: state.synced, tenant, timeline, epoch, start, origin, payload_len: n as u32 };
        state.scratch.clear();
        header.encode(&bytes[..n], &mut state.scratch);
        state.segments.write(position, &state.scratch).map_err(|error| self.io_error("write a chunk", error))?;
        state.written += state.scratch.len() as u64;
        Ok(Run { start, end: start + n as u64, epoch, at: position + HEADER_SIZE as u64, origin })
    }

    /// Returns once everything up to `position` is durable.
    ///
    /// # Errors
    /// [`WalLogError::SyncFailed`] when it cannot be made so; the log then refuses everything.
    pub fn sync(&self, position: LogPosition) -> Result<(), WalLogError> {
        let mut state = self.state.lock();
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.synced >= position.0 {
                return Ok(());
            }
            if state.syncing {
                self.synced.wait(&mut state);
                continue;
            }
            state.syncing = true;
            let target = state.written;
            let files = state.segments.files(state.synced, target);
            let result = MutexGuard::unlocked(&mut state, || files.iter().try_for_each(|file| file.sync()));
            state.syncing = false;
            match result {
                Ok(()) => state.synced = target,
                Err(error) => state.failed = Some(WalLogError::SyncFailed { folder: self.disk.describe(), error: Arc::new(error) }),
            }
            self.synced.notify_all();
        }
    }

    /// Reads durable bytes of a timeline from `from` on, at most `max` of them; empty at the end.
    ///
    /// # Errors
    /// [`WalLogError::NotHeld`] when the bytes at `from` were released, [`WalLogError::NotAttached`], or the file
    /// system's.
    pub fn read(&self, tenant: TenantId, timeline: TimelineId, from: Lsn, max: usize) -> Result<Bytes, WalLogError> {
        let not_held = WalLogError::NotHeld { timeline, lsn: from };
        let mut pieces = Vec::new();
        let mut length = 0;
        {
            let mut guard = self.state.lock();
            let state = &mut *guard;
            let index = Self::index(&mut state.timelines, tenant, timeline)?;
            if from == index.end {
                return Ok(Bytes::new());
            }
            for run in index.from(from).ok_or_else(|| not_held.clone())? {
                let skip = from.0.saturating_sub(run.start.0);
                let n = (run.end.0 - run.start.0 - skip).min((max - length) as u64);
                let at = run.at + skip;
                if n == 0 || at + n > state.synced {
                    break;
                }
                let file = state.segments.file(at).ok_or_else(|| not_held.clone())?;
                pieces.push((at, n as usize, file));
                length += n as usize;
            }
        }
        let mut out = BytesMut::zeroed(length);
        let mut rest = &mut out[..];
        for (at, n, file) in &pieces {
            let (piece, after) = rest.split_at_mut(*n);
            file.read_at(piece, at % self.options.segment_bytes).map_err(|error| self.io_error("read", error))?;
            rest = after;
        }
        // A segment that was freed meanwhile may hold new bytes already.
        let state = self.state.lock();
        if pieces.iter().all(|(at, ..)| state.segments.file(*at).is_some()) { Ok(out.freeze()) } else { Err(not_held) }
    }

    /// Layers cover everything of the timeline below `lsn`. Frees segments that nobody needs.
    pub fn release(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(index) = state.timelines.get_mut(&(tenant, timeline)) {
            index.release(lsn, &mut state.live);
        }
        self.free_segments(state);
    }

    /// A timeline that was attached is closed: what is held of it stays, and counts; a timeline of which nothing is
    /// held is not remembered.
    pub fn detach(&self, tenant: TenantId, timeline: TimelineId) {
        let mut state = self.state.lock();
        if let Some(index) = state.timelines.get_mut(&(tenant, timeline)) {
            index.attached = index.attached.saturating_sub(1);
            if index.attached == 0 && index.settled && index.live().is_empty() {
                state.timelines.remove(&(tenant, timeline));
            }
        }
    }

    /// As [`WalLog::forget`], unless the timeline is attached by now, or more came to it; whether neither is so.
    ///
    /// # Errors
    /// As [`WalLog::forget`].
    pub fn forget_unattached(&self, held: Unattached) -> Result<bool, WalLogError> {
        let is_as_it_was = |index: &TimelineIndex| index.attached == 0 && index.newest_epoch() <= Some(held.newest);
        self.forget_if(held.tenant, held.timeline, is_as_it_was)
    }

    /// The timeline is gone: nothing of it is needed. A chunk without bytes says so to whoever opens the log next, so
    /// that what is left of the timeline in older segments is not taken for WAL whose tenant log was lost. Blocks until
    /// that is durable.
    ///
    /// # Errors
    /// When that chunk cannot be written: then only this process knows.
    pub fn forget(&self, tenant: TenantId, timeline: TimelineId) -> Result<(), WalLogError> {
        self.forget_if(tenant, timeline, |_| true).map(drop)
    }

    fn forget_if(&self, tenant: TenantId, timeline: TimelineId, may: impl FnOnce(&TimelineIndex) -> bool) -> Result<bool, WalLogError> {
        let position = {
            let mut guard = self.state.lock();
            let state = &mut *guard;
            if state.timelines.get(&(tenant, timeline)).is_some_and(|index| !may(index)) {
                return Ok(false);
            }
            if let Some(mut index) = state.timelines.remove(&(tenant, timeline)) {
                index.forget(&mut state.live);
            }
            self.free_segments(state);
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            self.write_chunk(state, (tenant, timeline), WriterEpoch(0), Lsn::INVALID, None, &[])?;
            LogPosition(state.written)
        };
        self.sync(position)?;
        Ok(true)
    }

    fn free_segments(&self, state: &mut State) {
        while let Some((_, run)) = state.replaced.front().filter(|(until, _)| *until <= state.synced) {
            state.live.remove(run);
            state.replaced.pop_front();
        }
        let head = state.synced / self.options.segment_bytes;
        let needed = state.live.first().map_or(head, |first| first.min(head));
        if let Err(error) = state.segments.free_below(needed) {
            tracing::warn!(folder = self.disk.describe(), %error, "a WAL log segment could not be recycled; it stays");
        }
    }

    /// Where the log takes more than half of its limit, and only a little of its oldest segment still counts: copies
    /// that little to the head, so that the segment is freed. Returns the bytes copied; to be called again until that
    /// is 0. For a background thread.
    ///
    /// # Errors
    /// The file system's, [`WalLogError::SyncFailed`]. Nothing is lost then: what was copied still stands where it
    /// stood.
    pub fn copy_laggards(&self) -> Result<u64, WalLogError> {
        let laggards = self.laggards()?;
        let mut moves = Vec::with_capacity(laggards.len());
        {
            let mut guard = self.state.lock();
            let state = &mut *guard;
            for Laggard { owner, run, bytes } in laggards {
                // What does not count any more may have been read after its segment had been freed, and must not come
                // back.
                if let Some(run) = state.timelines.get(&owner).and_then(|index| index.still(&run)) {
                    let mut copies = Vec::with_capacity(1);
                    let (mut next, mut rest) = (run.start, &bytes[..(run.end.0 - run.start.0) as usize]);
                    while !rest.is_empty() {
                        let copy = self.write_chunk(state, owner, run.epoch, next, Some(run.origin), rest)?;
                        rest = &rest[(copy.end.0 - copy.start.0) as usize..];
                        next = copy.end;
                        copies.push(copy);
                    }
                    moves.push((owner, run, copies));
                }
            }
        }
        self.sync_all()?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut copied = 0;
        for (owner, run, copies) in moves {
            copied += run.end.0 - run.start.0;
            if let Some(index) = state.timelines.get_mut(&owner) {
                index.moved(&run, &copies, &mut state.live);
            }
        }
        self.free_segments(state);
        Ok(copied)
    }

    /// What counts in the oldest segment, if it is worth copying.
    fn laggards(&self) -> Result<Vec<Laggard>, WalLogError> {
        let segment_bytes = self.options.segment_bytes;
        let (found, file) = {
            let state = self.state.lock();
            let Some(oldest) = state.segments.oldest() else { return Ok(Vec::new()) };
            if state.segments.bytes() * 2 <= self.options.limit_bytes || oldest >= state.synced / segment_bytes {
                return Ok(Vec::new());
            }
            let is_full = state.segments.bytes() > self.options.limit_bytes;
            let quarters = if is_full { LAGGARD_QUARTERS.1 } else { LAGGARD_QUARTERS.0 };
            let in_oldest = |run: &&Run| run.at / segment_bytes == oldest;
            let of_timeline = |(owner, index): (&Owner, &TimelineIndex)| {
                let runs = index.live().iter().filter(in_oldest);
                runs.map(|run| (*owner, *run)).collect::<Vec<_>>()
            };
            let mut found: Vec<(Owner, Run)> = state.timelines.iter().flat_map(of_timeline).collect();
            found.sort_unstable_by_key(|(_, run)| run.at);
            let bytes: u64 = found.iter().map(|(_, run)| run.end.0 - run.start.0).sum();
            let Some(file) = state.segments.file(oldest * segment_bytes).filter(|_| bytes * 4 <= segment_bytes * quarters) else {
                return Ok(Vec::new());
            };
            (found, file)
        };
        let read = |(owner, run): (Owner, Run)| {
            let mut bytes = vec![0; (run.end.0 - run.start.0) as usize];
            file.read_at(&mut bytes, run.at % segment_bytes).map_err(|error| self.io_error("read", error))?;
            Ok(Laggard { owner, run, bytes })
        };
        found.into_iter().map(read).collect()
    }

    /// Whether the log holds more than its limit, so that receivers stop reading until layers catch up.
    pub fn is_over_limit(&self) -> bool {
        self.state.lock().segments.bytes() > self.options.limit_bytes
    }

    /// Bytes of all segments that are in use.
    pub fn bytes(&self) -> u64 {
        self.state.lock().segments.bytes()
    }

    fn io_error(&self, action: &str, error: io::Error) -> WalLogError {
        WalLogError::Io { folder: self.disk.describe(), action: action.to_owned(), error: Arc::new(error) }
    }
}
