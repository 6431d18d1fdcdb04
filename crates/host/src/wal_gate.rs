//! The gate of a compute's `pg_wal`: Postgres makes a new segment only while there is room for it.
//!
//! Postgres panics where its WAL finds no space, and keeps without a limit what the pageserver has not stored yet. So
//! before it gets a segment, the whole of it must fit: into the cap of this `pg_wal`, and onto the disk. Until then
//! whoever wants to write waits. Nothing is lost, and nobody has to do anything but make room.
//!
//! **How.** Postgres makes a segment as `xlogtemp.<pid>`. The kernel asks us before that is opened (fanotify,
//! `FAN_OPEN_PERM`), and Postgres waits for the answer. Before we give it, we take the blocks of the whole segment from
//! the disk, so that no write within a segment can fail either. If this process ends, the kernel lets everybody go on.
//!
//! **Who waits.** The session that needs the segment holds the lock of WAL's writing; all others that write come to
//! wait for it. Reads go on until somebody logs in while the running transactions are being logged (see below): then
//! whoever needs a snapshot waits, too. What is written can still be sent: a walsender that streams needs no lock for
//! that, nor does our session that asks where the slot is.
//!
//! **How it heals.** Old segments go with a checkpoint, which writes WAL itself. So once the slot has moved, because
//! the pageserver has stored what it lacked, Postgres gets segments beyond the cap until a checkpoint comes through:
//! each after a pause, the longer the more there are. For the same reason two segments are set apart on the disk, for
//! that moment alone. Where something of the tenant's own keeps WAL, a slot of his for one, there is a segment a minute
//! in the end, so that a checkpoint can come once he has mended it.
//!
//! **Who must get in.** Each login takes the lock of transaction numbers for a moment (`XidGenLock`, in
//! `ProcArrayAdd`), and who logs the running transactions holds it while he waits for WAL. So our own session is there
//! before anybody waits. And where the pageserver asks for a connection, and a login of ours does not come through
//! either, there is a segment.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, fallocate, fstat, fstatvfs, ftruncate, statat};
use varve_api::admin::EventKind;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;

use crate::sessions::{SessionError, Sessions, SlotSession};

/// How Postgres names a segment that it makes.
const NEW_SEGMENT: &str = "xlogtemp.";
/// How often it is looked whether those who wait may go on.
const HELD_POLL: Duration = Duration::from_millis(50);
/// How often it is looked otherwise: whether to warn, or to end.
const IDLE_POLL: Duration = Duration::from_millis(1000);
/// How often the slot is asked for while somebody waits.
const SLOT_POLL: Duration = Duration::from_millis(500);
/// Pause before each segment beyond the cap where the slot is not why, for each that it is beyond: a checkpoint gets
/// the time that it needs, which depends on the size of Postgres's cache, and what it needs to come through.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest pause of that kind: something of the tenant's own keeps WAL.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// First pause between two looks whether logins come through, where the pageserver asks for one.
const LOGIN_PAUSE: Duration = Duration::from_secs(2);
/// Longest pause of that kind: where they do not, each look costs a segment.
const LOGIN_PAUSE_MAX: Duration = Duration::from_secs(60);
/// What stays of a disk beside a segment: names and blocks that describe others.
const DISK_MARGIN: u64 = 1024 * 1024;
/// Segments that are set apart for the moment when a full disk can be relieved.
const SPARE_SEGMENTS: u64 = 2;
/// They are set apart while so many are free.
const SPARE_TAKEN_ABOVE: u64 = 4;
/// With so many free segments on the disk somebody may wait soon.
const NEAR_SEGMENTS: u64 = 8;
/// The least that a cap can be: a checkpoint needs two segments of WAL at least, and there is what is sent meanwhile.
const CAP_MIN: u64 = 8 * WAL_SEGMENT_SIZE;
/// Of a small disk `pg_wal` gets this share at most.
const DISK_SHARE: u64 = 4;
/// Postgres is to keep to this share of the cap where nothing else keeps WAL.
const CHECKPOINT_SHARE: u64 = 4;
/// The most that Postgres is told to keep to: its default.
const CHECKPOINT_BYTES_MAX: u64 = 1 << 30;

/// The cap of a `pg_wal` for which `asked` is configured (none: whatever there is), on the disk that `folder` is on.
pub fn cap_of(folder: &Path, asked: Option<u64>) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).map_or(u64::MAX, |disk| disk.f_blocks.saturating_mul(disk.f_frsize));
    asked.map(|asked| asked.min(disk / DISK_SHARE).max(CAP_MIN))
}

/// Postgres's `max_wal_size` in megabytes below a cap: so that checkpoints come long before it.
pub fn max_wal_size_mb(cap: u64) -> u64 {
    (cap / CHECKPOINT_SHARE).min(CHECKPOINT_BYTES_MAX) >> 20
}

/// What a decision needs.
#[derive(Clone, Copy, Debug)]
struct Facts {
    /// The cap, if there is one.
    cap: Option<u64>,
    /// Bytes of `pg_wal`.
    held: u64,
    /// Bytes that the slot keeps, if that was learnt since somebody waits.
    needed: Option<u64>,
    /// Free bytes of the disk.
    free: u64,
    /// Bytes that are set apart.
    spare: u64,
    /// Postgres is to end, whatever that takes.
    gives_way: bool,
    /// When somebody got a segment last.
    since_grant: Duration,
    /// Our own sessions do not come through.
    is_stuck: bool,
}

/// Why somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Cap,
    Disk,
}

impl Facts {
    /// Whether a checkpoint would free most of it.
    fn is_relieved(&self) -> bool {
        self.needed.is_some_and(|needed| self.cap.is_none_or(|cap| needed + WAL_SEGMENT_SIZE <= cap / 2))
    }

    /// Whether this is the moment for which segments are set apart.
    fn may_take_spare(&self) -> bool {
        self.gives_way || self.is_relieved() || self.is_stuck
    }

    /// Why nobody may make a segment now; none if somebody may.
    fn closed(&self) -> Option<Why> {
        let spare = if self.may_take_spare() { self.spare } else { 0 };
        if self.free + spare < WAL_SEGMENT_SIZE + DISK_MARGIN {
            return Some(Why::Disk);
        }
        let cap = self.cap.filter(|_| !self.gives_way)?;
        let beyond = (self.held + WAL_SEGMENT_SIZE).saturating_sub(cap).div_ceil(WAL_SEGMENT_SIZE);
        let is_open = beyond == 0 || self.is_stuck || self.is_relieved() && self.since_grant >= (PAUSE * beyond as u32).min(PAUSE_MAX);
        (!is_open).then_some(Why::Cap)
    }
}

/// What the gate and its owner share.
#[derive(Debug)]
struct Shared {
    /// Wakes the thread.
    wake: OwnedFd,
    closing: AtomicBool,
    gives_way: AtomicBool,
    /// Somebody waits.
    waits: AtomicBool,
    /// Somebody may wait soon.
    is_near: AtomicBool,
    /// What the slot keeps, and one; 0 while it is not known.
    needed: AtomicU64,
    /// Sessions of ours do not come through.
    is_stuck: AtomicBool,
}

/// See the module. Dropped, it lets everybody go on.
#[derive(Debug)]
pub(crate) struct WalGate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Told of what happens, in words.
type Told = Box<dyn Fn(EventKind, String) + Send>;

impl WalGate {
    /// Keeps the gate of the `pg_wal` in `folder`, with a file that sets space apart on the same disk. `is_kept` says
    /// whether a slot keeps WAL for the pageserver.
    ///
    /// # Errors
    /// When the kernel does not let us: it takes root.
    pub(crate) fn keep((folder, spare): (&Path, PathBuf), cap: Option<u64>, is_kept: bool, told: Told) -> io::Result<WalGate> {
        let folder = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let init = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        // A name there may be anything that the tenant made: opening it must not wait.
        let group = Fanotify::init(init, EventFFlags::O_RDWR | EventFFlags::O_NONBLOCK | EventFFlags::O_CLOEXEC)?;
        let none: Option<&Path> = None;
        group.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD, &folder, none)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Where no slot keeps anything, that is known.
        let needed = AtomicU64::new(u64::from(!is_kept));
        let no = || AtomicBool::new(false);
        let shared = Arc::new(Shared { wake, closing: no(), gives_way: no(), waits: no(), is_near: no(), needed, is_stuck: no() });
        let keeper = Keeper { spare, group, folder, cap, is_kept, shared: shared.clone(), told, warned: None, granted: Instant::now() };
        let thread = std::thread::Builder::new().name("wal-gate".to_owned()).spawn(move || keeper.run())?;
        Ok(WalGate { shared, thread: Some(thread) })
    }

    /// Postgres is told to end, and writes a checkpoint for that: the cap counts no more.
    pub(crate) fn give_way(&self) {
        self.shared.tell(&self.shared.gives_way);
    }

    /// Learns what the slot keeps as long as somebody waits. For ever. It keeps a session from before on, since logins
    /// may not come through then.
    pub(crate) fn follow(&self, sessions: &Sessions) -> impl Future<Output = ()> + Send + use<> {
        let (shared, sessions) = (self.shared.clone(), sessions.clone());
        async move {
            let (mut session, mut pause, mut connects) = (None, LOGIN_PAUSE, sessions.socket().connects());
            let mut tried = Instant::now();
            loop {
                tokio::time::sleep(SLOT_POLL).await;
                if !shared.is_near.load(Ordering::Relaxed) {
                    (session, pause, connects) = (None, LOGIN_PAUSE, sessions.socket().connects());
                    continue;
                }
                if session.is_none() && (!shared.waits.load(Ordering::Relaxed) || tried.elapsed() >= pause) {
                    session = shared.log_in(&sessions).await;
                    (tried, connects) = (Instant::now(), sessions.socket().connects());
                    pause = if session.is_some() { LOGIN_PAUSE } else { (pause * 2).min(LOGIN_PAUSE_MAX) };
                }
                if !shared.waits.load(Ordering::Relaxed) {
                    continue;
                }
                if let Some(open) = session.take() {
                    session = shared.ask(open).await;
                }
                // Where the pageserver asks to come in, it must get in. Ours says whether that is so.
                if sessions.socket().connects() != connects && tried.elapsed() >= pause {
                    let is_in = shared.log_in(&sessions).await.is_some();
                    (tried, connects) = (Instant::now(), sessions.socket().connects());
                    pause = if is_in { LOGIN_PAUSE } else { (pause * 2).min(LOGIN_PAUSE_MAX) };
                }
            }
        }
    }
}

impl Drop for WalGate {
    fn drop(&mut self) {
        self.shared.tell(&self.shared.closing);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of pg_wal's gate panicked");
        }
    }
}

impl Shared {
    /// Raises a flag that the thread is to see at once.
    fn tell(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Relaxed);
        // It fails where it was told often already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// A new session; none where it does not come through, which is worth a segment while somebody waits.
    async fn log_in(&self, sessions: &Sessions) -> Option<SlotSession> {
        match sessions.slot_session().await {
            Ok(session) => Some(session),
            Err(error) => {
                if self.waits.load(Ordering::Relaxed) {
                    tracing::warn!(%error, "no session comes through while pg_wal waits for room: it gets a segment");
                    self.tell(&self.is_stuck);
                }
                None
            }
        }
    }

    /// Asks a session what the slot keeps. Gives it back if it answers.
    async fn ask(&self, mut session: SlotSession) -> Option<SlotSession> {
        let asked = tokio::task::spawn_blocking(move || session.kept().map(|kept| (session, kept))).await;
        match asked.map_err(SessionError::from).flatten() {
            Ok((session, kept)) => {
                if let Some((from, to)) = kept {
                    self.needed.store(to.distance_from(from).saturating_add(1), Ordering::Relaxed);
                }
                Some(session)
            }
            Err(error) => {
                tracing::info!(%error, "what the slot keeps is not known while pg_wal waits for room");
                None
            }
        }
    }
}

struct Keeper {
    group: Fanotify,
    folder: OwnedFd,
    spare: PathBuf,
    cap: Option<u64>,
    is_kept: bool,
    shared: Arc<Shared>,
    told: Told,
    /// What was told last, while it holds.
    warned: Option<EventKind>,
    granted: Instant,
}

impl Keeper {
    fn run(mut self) {
        let mut waiting: Vec<FanotifyEvent> = Vec::new();
        let _ = self.take_spare();
        while !self.shared.closing.load(Ordering::Relaxed) {
            let limit = if waiting.is_empty() { IDLE_POLL } else { HELD_POLL };
            self.take_events(&mut waiting, limit);
            let closed = self.let_through(&mut waiting);
            if closed.is_none()
                && let Err(error) = self.take_spare()
            {
                tracing::debug!(%error, "no segments are set apart for pg_wal");
            }
            self.tell(closed, waiting.len());
        }
        // With the group all who wait go on.
    }

    /// Waits for opens. Those that make no segment go through.
    fn take_events(&self, waiting: &mut Vec<FanotifyEvent>, limit: Duration) {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        let mut ready = [PollFd::new(&self.group, PollFlags::IN), PollFd::new(&self.shared.wake, PollFlags::IN)];
        if poll(&mut ready, Some(&limit)).is_err() {
            return;
        }
        let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
        let events = match self.group.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EAGAIN) => return,
            // What cannot be opened for us is refused by the kernel: no file that Postgres would write.
            Err(error) => return tracing::debug!(%error, "an open in pg_wal was refused"),
        };
        for event in events {
            if makes_segment(&event) {
                waiting.push(event);
            } else {
                self.answer(&event);
            }
        }
    }

    fn answer(&self, event: &FanotifyEvent) {
        if let Some(file) = event.fd()
            && let Err(error) = self.group.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW))
        {
            tracing::error!(%error, "an open in pg_wal could not be let through");
        }
    }

    /// Lets through who may make a segment. Why the first of the others waits, if there are any.
    fn let_through(&mut self, waiting: &mut Vec<FanotifyEvent>) -> Option<Why> {
        if waiting.is_empty() {
            self.note_waits(false);
            return None;
        }
        while let Some(first) = waiting.first() {
            let (closed, may_take_spare) = match self.facts() {
                Ok(facts) => (facts.closed(), facts.may_take_spare()),
                Err(error) => {
                    tracing::error!(%error, "pg_wal cannot be looked at: nobody waits for room there");
                    (None, false)
                }
            };
            let make = || match allocate(first) {
                Err(_) if may_take_spare && self.give_spare().is_ok() => allocate(first),
                made => made,
            };
            // The disk may have less than it says, or somebody else was faster.
            let closed = closed.or_else(|| make().err().map(|_| Why::Disk));
            if let Some(why) = closed {
                self.note_waits(true);
                return Some(why);
            }
            self.answer(&waiting.remove(0));
            self.granted = Instant::now();
            self.shared.is_stuck.store(false, Ordering::Relaxed);
        }
        None
    }

    fn note_waits(&self, waits: bool) {
        if self.shared.waits.swap(waits, Ordering::Relaxed) != waits && waits && self.is_kept {
            // What was learnt when somebody waited before is no help.
            self.shared.needed.store(0, Ordering::Relaxed);
        }
    }

    fn facts(&self) -> io::Result<Facts> {
        let disk = fstatvfs(&self.folder)?;
        Ok(Facts {
            cap: self.cap,
            held: self.held()?,
            needed: self.shared.needed.load(Ordering::Relaxed).checked_sub(1),
            free: disk.f_bavail.saturating_mul(disk.f_frsize),
            spare: self.spare.symlink_metadata().map_or(0, |spare| spare.len()),
            gives_way: self.shared.gives_way.load(Ordering::Relaxed),
            since_grant: self.granted.elapsed(),
            is_stuck: self.shared.is_stuck.load(Ordering::Relaxed),
        })
    }

    /// Sets segments apart, while there are enough.
    fn take_spare(&self) -> io::Result<()> {
        let facts = self.facts()?;
        let missing = (SPARE_SEGMENTS * WAL_SEGMENT_SIZE).saturating_sub(facts.spare);
        if missing > 0 && facts.free >= SPARE_TAKEN_ABOVE * WAL_SEGMENT_SIZE {
            let file = File::options().create(true).truncate(false).write(true).open(&self.spare)?;
            fallocate(&file, FallocateFlags::empty(), facts.spare, missing)?;
        }
        Ok(())
    }

    /// Gives up one of them.
    fn give_spare(&self) -> io::Result<()> {
        let file = File::options().write(true).open(&self.spare)?;
        file.set_len(file.metadata()?.len().saturating_sub(WAL_SEGMENT_SIZE))
    }

    /// Bytes that the files of `pg_wal` take. A segment that is being made counts once it was let through.
    fn held(&self) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in rustix::fs::Dir::read_from(&self.folder)? {
            let entry = entry?;
            if let Ok(found) = statat(&self.folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                && FileType::from_raw_mode(found.st_mode).is_file()
            {
                bytes += u64::try_from(found.st_blocks).unwrap_or(0) * 512;
            }
        }
        Ok(bytes)
    }

    /// Tells once of each state that is worth it.
    fn tell(&mut self, closed: Option<Why>, waiting: usize) {
        let Ok(facts) = self.facts() else { return };
        let is_half_full = self.cap.is_some_and(|cap| facts.held >= cap / 2);
        self.shared.is_near.store(closed.is_some() || is_half_full || facts.free < NEAR_SEGMENTS * WAL_SEGMENT_SIZE, Ordering::Relaxed);
        let (held, free) = (facts.held >> 20, facts.free >> 20);
        let cap = self.cap.map_or_else(|| "no cap".to_owned(), |cap| format!("a cap of {} MB", cap >> 20));
        let is_near = self.cap.is_some_and(|cap| facts.held >= cap - cap / 4);
        let now = match closed {
            Some(Why::Cap) => Some(EventKind::WalFull),
            Some(Why::Disk) => Some(EventKind::DiskFull),
            None if is_near => Some(EventKind::WalNearlyFull),
            None => None,
        };
        if now == self.warned || now == Some(EventKind::WalNearlyFull) && self.warned.is_some() {
            return;
        }
        match now {
            Some(kind @ EventKind::WalFull) => (self.told)(
                kind,
                format!(
                    "pg_wal has {held} MB, with {cap}: {waiting} that write WAL wait until the pageserver has stored more of it, and go on by \
                     themselves then"
                ),
            ),
            Some(kind @ EventKind::DiskFull) => {
                (self.told)(
                    kind,
                    format!("the disk of pg_wal has {free} MB left: who writes waits until there is room for a segment of WAL"),
                );
            }
            Some(kind) => (self.told)(
                kind,
                format!("pg_wal has {held} MB, with {cap}: the pageserver stores WAL more slowly than it is written, or not at all"),
            ),
            None => tracing::info!(held, free, "there is room in pg_wal again"),
        }
        self.warned = now;
    }
}

/// Whether an open is that of a segment which Postgres makes.
fn makes_segment(event: &FanotifyEvent) -> bool {
    let Some(file) = event.fd() else { return false };
    let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
    path.is_ok_and(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NEW_SEGMENT.as_bytes())))
}

/// Takes the blocks of a whole segment for a file that Postgres has made and not written yet.
fn allocate(event: &FanotifyEvent) -> io::Result<()> {
    let Some(file) = event.fd() else { return Ok(()) };
    let file = file.as_fd();
    let is_new = fstat(file).is_ok_and(|found| found.st_size == 0 && FileType::from_raw_mode(found.st_mode).is_file());
    if !is_new {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, WAL_SEGMENT_SIZE) {
        Ok(()) => Ok(()),
        // There are file systems that cannot: then the look at what is free must do.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        Err(error) => {
            let _ = ftruncate(file, 0);
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = WAL_SEGMENT_SIZE;

    fn facts() -> Facts {
        Facts {
            cap: Some(16 * SEGMENT),
            held: 0,
            needed: None,
            free: 1 << 40,
            spare: 0,
            gives_way: false,
            since_grant: Duration::ZERO,
            is_stuck: false,
        }
    }

    #[test]
    fn the_cap_holds_until_the_slot_has_moved() {
        assert_eq!(Facts { held: 15 * SEGMENT, ..facts() }.closed(), None, "the last one that fits");
        let full = Facts { held: 15 * SEGMENT + 1, ..facts() };
        assert_eq!(full.closed(), Some(Why::Cap));
        assert_eq!(Facts { needed: Some(8 * SEGMENT), ..full }.closed(), Some(Why::Cap), "too much is needed yet");
        let relieved = Facts { needed: Some(7 * SEGMENT), since_grant: PAUSE, ..full };
        assert_eq!(relieved.closed(), None, "a checkpoint can free the rest");
        assert_eq!(Facts { gives_way: true, ..full }.closed(), None, "the end needs WAL, too");
        assert_eq!(Facts { is_stuck: true, ..full }.closed(), None, "whoever is to make room must get in");
        assert_eq!(Facts { cap: None, held: 1 << 40, ..full }.closed(), None);
    }

    #[test]
    fn what_no_checkpoint_frees_gets_a_segment_now_and_then() {
        let kept = Facts { held: 24 * SEGMENT, needed: Some(0), since_grant: PAUSE * 8, ..facts() };
        assert_eq!(kept.closed(), Some(Why::Cap));
        assert_eq!(Facts { since_grant: PAUSE * 9, ..kept }.closed(), None);
        assert_eq!(Facts { since_grant: PAUSE_MAX, needed: None, ..kept }.closed(), Some(Why::Cap), "not where the pageserver is why");
        assert_eq!(Facts { since_grant: PAUSE_MAX, held: 1 << 50, ..kept }.closed(), None);
    }

    #[test]
    fn what_is_set_apart_is_for_a_checkpoint_that_frees_others() {
        let full = Facts { free: SEGMENT, spare: SEGMENT, ..facts() };
        assert_eq!(full.closed(), Some(Why::Disk));
        assert_eq!(Facts { needed: Some(0), ..full }.closed(), None);
        assert_eq!(Facts { gives_way: true, ..full }.closed(), None);
        assert_eq!(Facts { is_stuck: true, ..full }.closed(), None);
        assert_eq!(Facts { gives_way: true, spare: 0, ..full }.closed(), Some(Why::Disk));
        assert_eq!(Facts { free: SEGMENT + DISK_MARGIN, ..full }.closed(), None);
    }

    #[test]
    fn a_cap_leaves_room_for_checkpoints_and_on_the_disk() {
        let disk = rustix::fs::statvfs("/").unwrap();
        let share = disk.f_blocks * disk.f_frsize / DISK_SHARE;
        assert_eq!(cap_of(Path::new("/"), Some(u64::MAX)), Some(share.max(CAP_MIN)));
        assert_eq!((cap_of(Path::new("/"), Some(0)), cap_of(Path::new("/"), None)), (Some(CAP_MIN), None));
        assert_eq!((max_wal_size_mb(CAP_MIN), max_wal_size_mb(4 << 30), max_wal_size_mb(1 << 40)), (32, 1024, 1024));
    }
}
