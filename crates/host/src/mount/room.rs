//! Room on the disk that the cache is on.
//!
//! A full disk must be noticed while what Postgres has written can still be stored, and by Postgres: it has an error
//! for whoever wanted more, and goes on. So the mount keeps a reserve.
//!
//! - **Reads never take it.** Below twice the reserve, fetched blocks go; what room there is not for them is fetched
//!   again each time.
//! - **Growth is refused below it** (`ENOSPC`): of relations and temporary files. What is written where a file has
//!   bytes already, and files of Postgres's own, may take the reserve: a checkpoint must come through.
//! - **The kernel asks.** It gathers what is written and says that it succeeded, without asking us. Below the reserve
//!   all files are said to be set-user-id: such files the kernel writes through, and gives our error to the writer
//!   (`FUSE_HANDLE_KILLPRIV_V2`). It is told to look at their attributes anew, both times.
//! - **What is gathered already fits.** As the disk fills, what the kernel may gather shrinks to half of what is left
//!   above the reserve. Should somebody else take the reserve just then, there is some ballast.
//!
//! A thread looks at the disk, the more often the fuller it is. In between, what the mount takes is counted.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread::{self, JoinHandle, Thread},
    time::Duration,
};

use fuser::Notifier;

use super::{cache::CacheDir, host::DirtyLimit, tree::Tree};

/// The share of the disk that is kept, and the least and the most of it.
const RESERVE_SHARE: u64 = 16;
const RESERVE_MIN: u64 = 16 << 20;
const RESERVE_MAX: u64 = 512 << 20;
/// With so many times the reserve there is room again after a lack of it.
const ROOM_AGAIN: u64 = 2;
/// Somebody should be told below so many times the reserve.
const NEAR: u64 = 3;
/// The disk is looked at often below so many times the reserve.
const WATCHED: u64 = 16;
/// How often then, and how often otherwise.
const LOOK_OFTEN: Duration = Duration::from_millis(100);
const LOOK_SELDOM: Duration = Duration::from_secs(2);
/// What the kernel may gather whatever room there is: less than the reserve.
const GATHERED_MIN: u64 = 4 << 20;

/// How full the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fullness {
    /// There is room.
    Room,
    /// It will be full soon.
    Near,
    /// What needs more of it is refused.
    Full,
}

impl Fullness {
    /// What follows on `self`, with so many bytes free. Where it was near, there must be some more until it is not.
    fn next(self, is_low: bool, free: u64, reserve: u64) -> Fullness {
        let near = if self == Fullness::Room { NEAR } else { NEAR + 1 };
        match free {
            _ if is_low => Fullness::Full,
            free if free < reserve * near => Fullness::Near,
            _ => Fullness::Room,
        }
    }
}

/// Told how full the disk is by now, when that is worse than before or well again, and how many bytes are free.
pub type RoomCallback = Box<dyn Fn(Fullness, u64) + Send + Sync>;

/// See the module.
pub(super) struct Room {
    reserve: u64,
    /// By the last look, less what was taken since.
    free: AtomicU64,
    low: AtomicBool,
    watcher: OnceLock<Thread>,
    closing: AtomicBool,
}

impl Room {
    /// On the disk of `cache`, as it is now.
    pub(super) fn on(cache: &CacheDir) -> io::Result<Room> {
        let space = cache.space()?;
        let disk = space.f_blocks.saturating_mul(space.f_frsize);
        let room = Room::with_reserve((disk / RESERVE_SHARE).clamp(RESERVE_MIN, RESERVE_MAX));
        room.look(cache)?;
        Ok(room)
    }

    pub(super) fn with_reserve(reserve: u64) -> Room {
        let no = || AtomicBool::new(false);
        Room { reserve, free: AtomicU64::new(u64::MAX), low: no(), watcher: OnceLock::new(), closing: no() }
    }

    fn look(&self, cache: &CacheDir) -> io::Result<u64> {
        let space = cache.space()?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        self.note(free);
        Ok(free)
    }

    /// So many bytes are free.
    fn note(&self, free: u64) {
        self.free.store(free, Relaxed);
        if free < self.reserve {
            self.low.store(true, Release);
        } else if free >= self.reserve * ROOM_AGAIN {
            self.low.store(false, Release);
        }
    }

    /// Bytes that are kept.
    pub(super) fn reserve(&self) -> u64 {
        self.reserve
    }

    /// Whether files must not grow.
    pub(super) fn is_low(&self) -> bool {
        self.low.load(Acquire)
    }

    /// Whether a file must not grow by so much at once.
    pub(super) fn is_too_little_for(&self, bytes: u64) -> bool {
        self.is_low() || self.free.load(Relaxed) < self.reserve.saturating_add(bytes)
    }

    /// Looks at the disk anew; what it says then is what is known of it.
    pub(super) fn look_again(&self, cache: &CacheDir) {
        if let Err(error) = self.look(cache) {
            tracing::debug!(%error, "how much room the disk has is not known");
        }
    }

    /// Bytes of fetched blocks that should go.
    pub(super) fn shortage(&self) -> u64 {
        (self.reserve * ROOM_AGAIN).saturating_sub(self.free.load(Relaxed))
    }

    /// Whether so many fetched bytes may be kept.
    pub(super) fn may_keep(&self, bytes: u64) -> bool {
        self.free.load(Relaxed) >= (self.reserve * ROOM_AGAIN).saturating_add(bytes)
    }

    /// So many bytes of the disk are taken.
    pub(super) fn take(&self, bytes: u64) {
        let before = self.free.fetch_update(Relaxed, Relaxed, |free| Some(free.saturating_sub(bytes))).unwrap_or(0);
        let passed = |limit: u64| before >= limit && before.saturating_sub(bytes) < limit;
        if (passed(self.reserve) || passed(self.reserve * WATCHED))
            && let Some(watcher) = self.watcher.get()
        {
            watcher.unpark();
        }
    }

    /// So many are given back.
    pub(super) fn give_back(&self, bytes: u64) {
        let _ = self.free.fetch_update(Relaxed, Relaxed, |free| Some(free.saturating_add(bytes)));
    }

    /// The watcher's end.
    pub(super) fn close(&self) {
        self.closing.store(true, Release);
        if let Some(watcher) = self.watcher.get() {
            watcher.unpark();
        }
    }
}

/// Watches the disk of a mount.
pub(super) struct Watcher {
    pub(super) tree: Arc<Tree>,
    pub(super) notifier: Notifier,
    pub(super) dirty: Option<DirtyLimit>,
    pub(super) callback: Option<RoomCallback>,
}

impl Watcher {
    /// Until the room is closed.
    pub(super) fn spawn(self) -> io::Result<JoinHandle<()>> {
        let tree = self.tree.clone();
        let watcher = thread::Builder::new().name("mount-room".to_owned()).spawn(move || {
            super::host::become_file_system_thread();
            self.watch();
        })?;
        let _ = tree.files.room.watcher.set(watcher.thread().clone());
        Ok(watcher)
    }

    fn watch(mut self) {
        let tree = self.tree.clone();
        let (files, room) = (&tree.files, &tree.files.room);
        let mut told = Fullness::Room;
        // An answer that was on its way when the kernel was told may have been an old one.
        let (mut was_low, mut tell_again) = (false, false);
        while !room.closing.load(Acquire) {
            let free = match room.look(&files.cache) {
                Ok(free) => free,
                Err(error) => {
                    tracing::warn!("the disk of the cache cannot be looked at: {error}");
                    u64::MAX
                }
            };
            if free >= room.reserve * ROOM_AGAIN
                && let Err(error) = files.cache.take_ballast()
            {
                tracing::debug!("the cache has no ballast: {error}");
            }
            // A disk that others fill must make fetched blocks go, too.
            files.budget.make_room(files, false);
            if let Some(dirty) = &mut self.dirty {
                dirty.set((free.saturating_sub(room.reserve) / 2).max(GATHERED_MIN));
            }
            let is_low = room.is_low();
            if is_low != was_low || tell_again {
                self.say_attributes_changed();
            }
            tell_again = is_low != was_low;
            was_low = is_low;
            told = self.tell(told, free);
            thread::park_timeout(if free < room.reserve * WATCHED { LOOK_OFTEN } else { LOOK_SELDOM });
        }
    }

    /// The kernel asks for the attributes of all files again before it writes to them.
    fn say_attributes_changed(&self) {
        for ino in self.tree.nodes.known_files() {
            if let Err(error) = self.notifier.inval_inode(fuser::INodeNo(ino), -1, 0)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::debug!("the kernel does not hear that inode {ino} has other attributes: {error}");
            }
        }
    }

    /// Tells what is worse than what was told, or well again.
    fn tell(&self, told: Fullness, free: u64) -> Fullness {
        let room = &self.tree.files.room;
        let now = told.next(room.is_low(), free, room.reserve);
        if (now > told || now < told && now == Fullness::Room)
            && let Some(callback) = &self.callback
        {
            callback(now, free);
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_leave_twice_the_reserve_and_growth_the_reserve() {
        let room = Room::with_reserve(100);
        room.note(1000);
        assert!(room.may_keep(800) && !room.may_keep(801) && room.shortage() == 0);
        room.take(850);
        assert_eq!((room.may_keep(0), room.shortage(), room.is_low()), (false, 50, false));
        assert!(room.is_too_little_for(51) && !room.is_too_little_for(50));
        room.note(99);
        assert!(room.is_low() && room.is_too_little_for(0));
        room.note(150);
        assert!(room.is_low(), "there is no room yet");
        room.note(200);
        assert!(!room.is_low());
        room.give_back(100);
        assert!(room.may_keep(100) && !room.may_keep(101));
    }

    #[test]
    fn a_disk_that_is_about_as_full_as_before_is_no_news() {
        use Fullness::{Full, Near, Room};
        assert_eq!([Room.next(false, 300, 100), Room.next(false, 299, 100), Room.next(true, 150, 100)], [Room, Near, Full]);
        assert_eq!([Near.next(false, 399, 100), Near.next(false, 400, 100), Full.next(false, 399, 100)], [Near, Room, Near]);
    }
}
