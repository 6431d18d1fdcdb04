//! The WAL log: one sequence of segment files in which WAL bytes of *all* timelines become durable, and from which ingest reads them.
//!
//! **Layout.** Segment files `<number, 16 hexadecimal digits>.wal` of [`SEGMENT_SIZE`] bytes, written full of zeros ahead of use, hold chunks
//! ([`chunk`]) one after another; a position in the log is `number * SEGMENT_SIZE + offset`. A segment that is no longer needed becomes
//! the next spare one. The file `lock` keeps a second process out.
//!
//! **Durability.** [`WalLog::append`] writes into the page cache, [`WalLog::sync`] makes durable: one caller runs `fdatasync` for all that
//! have appended meanwhile. Nothing counts before its sync returned. After a failed sync nothing is ever acknowledged again by this
//! process, for the kernel may have thrown the pages away.
//!
//! **Crash.** At open the log ends at the first place where no whole chunk stands. What stands behind it was never synced, unless a chunk
//! there says that the log had been synced beyond that place: then the log is damaged, and it is refused with the file's name. The
//! rest of the file is zeroed before anything is appended, so that nothing which was never acknowledged can come back. Everything found is
//! fsynced before any position is reported: what was reread may only have been in the page cache.
//!
//! **Epochs.** Bytes at or beyond the start of a later writer epoch are void, now and after a crash: [`WalLog::attach`] is told the
//! epochs from the tenant log. Appends must carry the newest epoch and join on.

mod chunk;
mod disk;
mod index;
mod segments;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use parking_lot::{Condvar, Mutex};
use varve_postgres::Lsn;

pub use disk::{Folder, LogDisk, LogFile};

use crate::ids::{TenantId, TimelineId, WriterEpoch};
use chunk::{ChunkHeader, HEADER_SIZE, PAYLOAD_SIZE_MAX, chunk_size};
use index::{Run, TimelineIndex};
use segments::Segments;

/// Bytes in a segment file.
pub const SEGMENT_SIZE: u64 = 16 * 1024 * 1024;

/// What can go wrong in the WAL log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WalLogError {
    /// The file system failed.
    #[error(
        "WAL log in {folder}: cannot {action}: {error}; nothing that was not yet acknowledged will be: free space or mend the disk, then restart"
    )]
    Io {
        /// The log's folder.
        folder: String,
        /// What was tried.
        action: String,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// Another process uses the folder.
    #[error("{folder} is in use by another varve process: stop it, or name another folder with --data")]
    InUse {
        /// The folder.
        folder: String,
    },
    /// A chunk that had been made durable is no longer whole.
    #[error(
        "WAL log in {folder}: file {file} is damaged at byte {offset}: acknowledged WAL stood there. Restore the file from a copy; or move \
         the folder away and start without it: computes that still run then send again what the store lacks"
    )]
    Damaged {
        /// The folder.
        folder: String,
        /// The segment file.
        file: String,
        /// Where no whole chunk stands.
        offset: u64,
    },
    /// A chunk of a newer version.
    #[error(
        "WAL log in {folder}: file {file}, byte {offset}: a chunk that this version cannot read ({what}): use the newer varve that wrote it"
    )]
    Unsupported {
        /// The folder.
        folder: String,
        /// The segment file.
        file: String,
        /// Where the chunk stands.
        offset: u64,
        /// What is not known.
        what: String,
    },
    /// Bytes that do not join on.
    #[error("WAL of timeline {timeline} in epoch {epoch} ends at {end}: bytes from {start} do not join on")]
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that appends.
        epoch: u32,
        /// End of what there is.
        end: Lsn,
        /// Start of what was to be appended.
        start: Lsn,
    },
    /// A writer whose epoch is over.
    #[error("writer epoch {epoch} of timeline {timeline} is over: epoch {current} writes now")]
    Fenced {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch that tried.
        epoch: u32,
        /// The epoch that may.
        current: u32,
    },
    /// A timeline that was not attached.
    #[error("timeline {timeline} is not attached to the WAL log")]
    NotAttached {
        /// The timeline.
        timeline: TimelineId,
    },
    /// Bytes that were released or never there.
    #[error("the WAL log does not hold WAL of timeline {timeline} at {lsn}")]
    NotHeld {
        /// The timeline.
        timeline: TimelineId,
        /// The first byte that was asked for.
        lsn: Lsn,
    },
}

type Owner = (TenantId, TimelineId);

/// A position in the log, up to which [`WalLog::sync`] makes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition(u64);

#[derive(Debug)]
struct State {
    segments: Segments,
    timelines: HashMap<Owner, TimelineIndex>,
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
    limit_bytes: u64,
    _lock: Option<std::fs::File>,
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
        let mut log = Self::open_on(Arc::new(disk), limit_bytes)?;
        log._lock = Some(lock);
        Ok(log)
    }

    /// Opens the log on any disk.
    ///
    /// # Errors
    /// As [`WalLog::open`].
    pub fn open_on(disk: Arc<dyn LogDisk>, limit_bytes: u64) -> Result<WalLog, WalLogError> {
        let mut timelines: HashMap<Owner, TimelineIndex> = HashMap::new();
        let (segments, end) = Segments::open(disk.clone(), |header| {
            let run = Run {
                start: header.start,
                end: header.start + u64::from(header.payload_len),
                epoch: header.epoch,
                at: header.position + HEADER_SIZE as u64,
            };
            timelines.entry((header.tenant, header.timeline)).or_default().found(run);
        })?;
        let state = State { segments, timelines, written: end, synced: end, syncing: false, failed: None, scratch: Vec::new() };
        Ok(WalLog { disk, state: Mutex::new(state), synced: Condvar::new(), limit_bytes, _lock: None })
    }

    /// Timelines of which the log holds bytes and that were not attached yet.
    pub fn unattached(&self) -> Vec<(TenantId, TimelineId)> {
        let state = self.state.lock();
        state.timelines.iter().filter(|(_, index)| !index.settled).map(|(owner, _)| *owner).collect()
    }

    /// Attaches a timeline: `epochs` are all its writer epochs, ascending, each with the LSN at which it began; below `layered`, layers
    /// cover everything. Returns the durable end.
    ///
    /// # Errors
    /// [`WalLogError::NotHeld`] when bytes between `layered` and later ones that the log holds are missing.
    pub fn attach(&self, tenant: TenantId, timeline: TimelineId, epochs: &[(WriterEpoch, Lsn)], layered: Lsn) -> Result<Lsn, WalLogError> {
        let mut state = self.state.lock();
        let index = state.timelines.entry((tenant, timeline)).or_default();
        if index.settled {
            return Ok(index.end);
        }
        let mut settled = index.clone();
        if let Some(lsn) = settled.settle(epochs, layered) {
            return Err(WalLogError::NotHeld { timeline, lsn });
        }
        *index = settled;
        Ok(index.end)
    }

    /// Begins a writer epoch at `lsn`: bytes at or beyond it from older epochs are void. The caller has made (epoch, LSN) durable in the
    /// tenant log before.
    ///
    /// # Errors
    /// [`WalLogError::NotAttached`]; [`WalLogError::Fenced`] when a later epoch has begun; [`WalLogError::Gap`] when `lsn` lies beyond the end.
    pub fn start_epoch(&self, tenant: TenantId, timeline: TimelineId, epoch: WriterEpoch, lsn: Lsn) -> Result<(), WalLogError> {
        let mut state = self.state.lock();
        let index = Self::index(&mut state, tenant, timeline)?;
        if epoch <= index.epoch {
            return Err(WalLogError::Fenced { timeline, epoch: epoch.0, current: index.epoch.0 });
        }
        if lsn > index.end {
            return Err(WalLogError::Gap { timeline, epoch: epoch.0, end: index.end, start: lsn });
        }
        index.cut(lsn);
        index.epoch = epoch;
        Ok(())
    }

    /// End of what was appended, durable or not.
    ///
    /// # Errors
    /// [`WalLogError::NotAttached`].
    pub fn end(&self, tenant: TenantId, timeline: TimelineId) -> Result<Lsn, WalLogError> {
        let mut state = self.state.lock();
        Ok(Self::index(&mut state, tenant, timeline)?.end)
    }

    /// Makes everything durable that was appended.
    ///
    /// # Errors
    /// As [`WalLog::sync`].
    pub fn sync_all(&self) -> Result<(), WalLogError> {
        let position = LogPosition(self.state.lock().written);
        self.sync(position)
    }

    fn index(state: &mut State, tenant: TenantId, timeline: TimelineId) -> Result<&mut TimelineIndex, WalLogError> {
        state.timelines.get_mut(&(tenant, timeline)).filter(|index| index.settled).ok_or(WalLogError::NotAttached { timeline })
    }

    /// Appends WAL bytes that begin at `start`. What the log has from there on, the beginning of a record that never became whole, they
    /// replace. Not durable before [`WalLog::sync`] up to the returned position.
    ///
    /// # Errors
    /// [`WalLogError::Fenced`], [`WalLogError::Gap`], [`WalLogError::NotAttached`], or the file system's, after which no append succeeds.
    pub fn append(
        &self,
        tenant: TenantId,
        timeline: TimelineId,
        epoch: WriterEpoch,
        start: Lsn,
        bytes: &[u8],
    ) -> Result<LogPosition, WalLogError> {
        let mut state = self.state.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let index = Self::index(&mut state, tenant, timeline)?;
        if epoch != index.epoch {
            return Err(WalLogError::Fenced { timeline, epoch: epoch.0, current: index.epoch.0 });
        }
        let end = index.end;
        if start > end {
            return Err(WalLogError::Gap { timeline, epoch: epoch.0, end, start });
        }
        index.cut(start);
        let (mut start, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let state = &mut *state;
            let room = (SEGMENT_SIZE - state.written % SEGMENT_SIZE) as usize;
            if room < chunk_size(8) {
                // Too little for a chunk: the rest of the segment stays zero.
                state.written = state.written.next_multiple_of(SEGMENT_SIZE);
                continue;
            }
            let n = rest.len().min(PAYLOAD_SIZE_MAX).min((room - HEADER_SIZE) & !7);
            let position = state.written;
            let header = ChunkHeader { position, synced: state.synced, tenant, timeline, epoch, start, payload_len: n as u32 };
            state.scratch.clear();
            header.encode(&rest[..n], &mut state.scratch);
            if let Err(error) = state.segments.write(position, &state.scratch) {
                let error = self.io_error("write a chunk", error);
                state.failed = Some(error.clone());
                return Err(error);
            }
            state.written += state.scratch.len() as u64;
            let run = Run { start, end: start + n as u64, epoch, at: position + HEADER_SIZE as u64 };
            state.timelines.entry((tenant, timeline)).or_default().push(run);
            start += n as u64;
            rest = &rest[n..];
        }
        Ok(LogPosition(state.written))
    }

    /// Returns once everything up to `position` is durable.
    ///
    /// # Errors
    /// [`WalLogError::Io`] when it cannot be made so; the log then refuses everything.
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
            drop(state);
            let result = files.iter().try_for_each(|file| file.sync());
            state = self.state.lock();
            state.syncing = false;
            match result {
                Ok(()) => state.synced = target,
                Err(error) => state.failed = Some(self.io_error("fsync", error)),
            }
            self.synced.notify_all();
        }
    }

    /// Reads durable bytes of a timeline from `from` on, at most `max` of them; empty at the end.
    ///
    /// # Errors
    /// [`WalLogError::NotHeld`] when the bytes at `from` were released, [`WalLogError::NotAttached`], or the file system's.
    pub fn read(&self, tenant: TenantId, timeline: TimelineId, from: Lsn, max: usize) -> Result<Bytes, WalLogError> {
        let mut pieces = Vec::new();
        {
            let mut guard = self.state.lock();
            let state = &mut *guard;
            let synced = state.synced;
            let index = Self::index(state, tenant, timeline)?;
            if from == index.end {
                return Ok(Bytes::new());
            }
            let runs = index.from(from).ok_or(WalLogError::NotHeld { timeline, lsn: from })?;
            let (mut next, mut left) = (from, max);
            for run in runs {
                if left == 0 || run.start > next {
                    break;
                }
                let skip = next.0 - run.start.0;
                let n = (run.end.0 - next.0).min(left as u64);
                let at = run.at + skip;
                if at + n > synced {
                    break;
                }
                pieces.push((at, n as usize));
                next += n;
                left -= n as usize;
            }
        }
        let mut out = BytesMut::zeroed(pieces.iter().map(|(_, n)| n).sum());
        let mut filled = 0;
        for (at, n) in pieces {
            let file = self.state.lock().segments.file(at).ok_or(WalLogError::NotHeld { timeline, lsn: from + filled as u64 })?;
            file.read_at(&mut out[filled..filled + n], at % SEGMENT_SIZE).map_err(|error| self.io_error("read", error))?;
            filled += n;
        }
        Ok(out.freeze())
    }

    /// Layers cover everything of the timeline below `lsn`. Frees segments that nobody needs.
    pub fn release(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) {
        let mut state = self.state.lock();
        if let Some(index) = state.timelines.get_mut(&(tenant, timeline)) {
            index.release(lsn);
        }
        self.free_segments(&mut state);
    }

    /// The timeline is gone: nothing of it is needed.
    pub fn forget(&self, tenant: TenantId, timeline: TimelineId) {
        let mut state = self.state.lock();
        state.timelines.remove(&(tenant, timeline));
        self.free_segments(&mut state);
    }

    fn free_segments(&self, state: &mut State) {
        let oldest = state.timelines.values().filter_map(TimelineIndex::oldest_needed).min().unwrap_or(state.synced);
        let oldest = oldest.min(state.synced);
        if let Err(error) = state.segments.free_below(oldest / SEGMENT_SIZE) {
            tracing::warn!(folder = self.disk.describe(), %error, "a WAL log segment could not be recycled; it stays");
        }
    }

    /// Whether the log holds more than its limit, so that receivers stop reading until layers catch up.
    pub fn is_over_limit(&self) -> bool {
        self.state.lock().segments.bytes() > self.limit_bytes
    }

    /// Bytes of all segments that are in use.
    pub fn bytes(&self) -> u64 {
        self.state.lock().segments.bytes()
    }

    fn io_error(&self, action: &str, error: io::Error) -> WalLogError {
        WalLogError::Io { folder: self.disk.describe(), action: action.to_owned(), error: Arc::new(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENANT: TenantId = TenantId([1; 16]);
    const TIMELINE: TimelineId = TimelineId([2; 16]);
    const BASE: Lsn = Lsn(0x100_0000);

    fn bytes(from: Lsn, n: usize) -> Vec<u8> {
        (0..n as u64).map(|i| ((from.0 + i) % 251) as u8).collect()
    }

    fn read_all(log: &WalLog, from: Lsn) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            let more = log.read(TENANT, TIMELINE, from + out.len() as u64, 100_000).unwrap();
            if more.is_empty() {
                return out;
            }
            out.extend_from_slice(&more);
        }
    }

    fn append(log: &WalLog, epoch: u32, from: Lsn, n: usize) -> Lsn {
        let position = log.append(TENANT, TIMELINE, WriterEpoch(epoch), from, &bytes(from, n)).unwrap();
        log.sync(position).unwrap();
        from + n as u64
    }

    #[test]
    fn what_was_synced_is_read_back_after_a_restart_and_segments_are_recycled() {
        let folder = tempfile::tempdir().unwrap();
        let epochs = [(WriterEpoch(1), BASE)];
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        assert_eq!(log.attach(TENANT, TIMELINE, &epochs, BASE).unwrap(), BASE);
        let mut end = BASE;
        while end.0 - BASE.0 < 3 * SEGMENT_SIZE {
            end = append(&log, 1, end, 300_001);
        }
        assert!(read_all(&log, BASE) == bytes(BASE, (end.0 - BASE.0) as usize), "the bytes read are those appended");
        assert!(matches!(WalLog::open(folder.path(), 0), Err(WalLogError::InUse { .. })), "a second process is refused");
        drop(log);
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        assert_eq!(log.unattached(), vec![(TENANT, TIMELINE)]);
        assert_eq!(log.attach(TENANT, TIMELINE, &epochs, BASE).unwrap(), end);
        assert!(read_all(&log, BASE) == bytes(BASE, (end.0 - BASE.0) as usize), "the bytes are there after a restart");
        let before = log.bytes();
        log.release(TENANT, TIMELINE, end);
        assert!(log.bytes() < before, "segments below the layers are freed");
        assert!(matches!(log.read(TENANT, TIMELINE, BASE, 10), Err(WalLogError::NotHeld { .. })));
        assert_eq!(append(&log, 1, end, 1000), end + 1000);
    }

    #[test]
    fn bytes_of_an_older_epoch_are_void_from_the_next_ones_start() {
        let folder = tempfile::tempdir().unwrap();
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        log.attach(TENANT, TIMELINE, &[(WriterEpoch(1), BASE)], BASE).unwrap();
        append(&log, 1, BASE, 1000);
        log.start_epoch(TENANT, TIMELINE, WriterEpoch(2), BASE + 600).unwrap();
        let refused = log.append(TENANT, TIMELINE, WriterEpoch(1), BASE + 600, &[0; 8]);
        assert!(matches!(refused, Err(WalLogError::Fenced { current: 2, .. })));
        let refused = log.append(TENANT, TIMELINE, WriterEpoch(2), BASE + 608, &[0; 8]);
        assert!(matches!(refused, Err(WalLogError::Gap { .. })), "bytes that do not join on are refused");
        let position = log.append(TENANT, TIMELINE, WriterEpoch(2), BASE + 600, &[7; 100]).unwrap();
        log.sync(position).unwrap();
        let expected = [bytes(BASE, 600), vec![7; 100]].concat();
        assert!(read_all(&log, BASE) == expected);
        drop(log);
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        let end = log.attach(TENANT, TIMELINE, &[(WriterEpoch(1), BASE), (WriterEpoch(2), BASE + 600)], BASE).unwrap();
        assert_eq!(end, BASE + 700);
        assert!(read_all(&log, BASE) == expected, "void bytes stay void after a restart");
    }

    #[test]
    fn a_torn_tail_is_dropped_and_damage_before_it_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        log.attach(TENANT, TIMELINE, &[], BASE).unwrap();
        let mut end = BASE;
        for _ in 0..3 {
            end = append(&log, 0, end, 1000);
        }
        drop(log);
        let path = folder.path().join("0000000000000000.wal");
        let whole = std::fs::read(&path).unwrap();
        let mut torn = whole.clone();
        torn[2 * chunk_size(1000) + 500] ^= 1;
        std::fs::write(&path, &torn).unwrap();
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        assert_eq!(log.attach(TENANT, TIMELINE, &[], BASE).unwrap(), BASE + 2000, "the last chunk may have been torn by a crash");
        drop(log);
        let mut damaged = whole;
        damaged[chunk_size(1000) + 500] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        match WalLog::open(folder.path(), u64::MAX) {
            Err(WalLogError::Damaged { file, offset, .. }) => {
                assert_eq!((file.as_str(), offset), ("0000000000000000.wal", chunk_size(1000) as u64));
            }
            other => panic!("a damaged chunk that had been acknowledged must be refused, got {other:?}"),
        }
    }
}
