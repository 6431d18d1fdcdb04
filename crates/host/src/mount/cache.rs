//! The cache directory: one sparse file for each file of the mount that has anything of its own.
//!
//! ```text
//! <cache_dir>/files/<inode % 16, hex>/<inode, hex>     a file's written and fetched cells; holes are zeros
//! <cache_dir>/old-<n>/                                  what an earlier mount left, being deleted
//! <cache_dir>/files/ballast                             blocks for what the kernel has gathered, should the disk be full
//! ```
//! Scratch space: nothing in it is trusted after the process that wrote it ended, so nothing is ever synced and no
//! metadata is stored. The number of open files is bounded; the one opened longest ago and not used since is closed,
//! and opened again when it is needed.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::reserve::is_disk_full;

/// Folders of cache files, so that creating and unlinking from several threads does not queue on one.
const SHARDS: u64 = 16;
/// Open cache files at most, however many descriptors the process may have.
const OPEN_FILES_MAX: usize = 16_384;
/// A file that stands for space.
const BALLAST: &str = "ballast";
/// Its size, and what is given up at a time: others who fill the disk may be faster.
const BALLAST_BYTES: u64 = 8 << 20;
const BALLAST_PIECE: u64 = 1 << 20;
/// Descriptors left to the rest of the process.
const DESCRIPTORS_RESERVED: u64 = 256;

/// See the module.
pub(super) struct CacheDir {
    dir: PathBuf,
    open_max: usize,
    /// Files that are open, oldest first.
    open: Mutex<VecDeque<Weak<CacheFile>>>,
}

/// The cache file of one inode, created at its first write.
pub(super) struct CacheFile {
    ino: u64,
    file: RwLock<Option<Arc<File>>>,
    exists: AtomicBool,
    used: AtomicBool,
    /// The inode is gone: a straggler must not create the file again.
    deleted: AtomicBool,
}

impl CacheFile {
    /// The (not yet existing) cache file of inode `ino`.
    pub(super) fn new(ino: u64) -> Arc<CacheFile> {
        let no = || AtomicBool::new(false);
        Arc::new(CacheFile { ino, file: RwLock::new(None), exists: no(), used: no(), deleted: no() })
    }

    /// Number of the inode whose file it is.
    pub(super) fn ino(&self) -> u64 {
        self.ino
    }

    /// Whether the inode is gone.
    pub(super) fn is_deleted(&self) -> bool {
        self.deleted.load(Relaxed)
    }

    /// Whether the file was ever written to.
    pub(super) fn exists(&self) -> bool {
        self.exists.load(Acquire)
    }
}

impl CacheDir {
    /// Takes `dir`, which is created if need be; what an earlier mount left there is moved aside and deleted in the
    /// background.
    pub(super) fn create(dir: &Path) -> io::Result<CacheDir> {
        fs::create_dir_all(dir)?;
        let files = dir.join("files");
        if files.exists() {
            let old = (0..).map(|n: u32| dir.join(format!("old-{n}"))).find(|old| !old.exists()).unwrap_or_else(|| dir.join("old"));
            fs::rename(&files, old)?;
        }
        fs::create_dir(&files)?;
        delete_old(dir);
        Ok(CacheDir { dir: files, open_max: raise_descriptor_limit(), open: Mutex::new(VecDeque::new()) })
    }

    fn path(&self, ino: u64) -> PathBuf {
        self.dir.join(format!("{:x}/{ino:x}", ino % SHARDS))
    }

    /// The file itself, opened or created if need be.
    pub(super) fn open(&self, slot: &Arc<CacheFile>) -> io::Result<Arc<File>> {
        if let Some(file) = &*slot.file.read() {
            slot.used.store(true, Relaxed);
            return Ok(file.clone());
        }
        let file = {
            let mut opened = slot.file.write();
            if let Some(file) = &*opened {
                return Ok(file.clone());
            }
            if slot.is_deleted() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let path = self.path(slot.ino);
            let exists = slot.exists();
            let open = || OpenOptions::new().read(true).write(true).create(!exists).truncate(false).open(&path);
            let file = match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound && !exists => {
                    path.parent().map_or(Ok(()), fs::create_dir_all)?;
                    open()?
                }
                opened => opened?,
            };
            slot.exists.store(true, Release);
            let file = Arc::new(file);
            *opened = Some(file.clone());
            file
        };
        self.note_open(slot);
        Ok(file)
    }

    fn note_open(&self, slot: &Arc<CacheFile>) {
        let mut open = self.open.lock();
        open.push_back(Arc::downgrade(slot));
        // Two rounds at most: the first clears the marks of those used since.
        let mut chances = open.len() * 2;
        while open.len() > self.open_max && chances > 0 {
            chances -= 1;
            let Some(oldest) = open.pop_front().and_then(|oldest| oldest.upgrade()) else { continue };
            if oldest.used.swap(false, Relaxed) {
                open.push_back(Arc::downgrade(&oldest));
            } else if let Some(mut file) = oldest.file.try_write() {
                *file = None;
            } else {
                open.push_back(Arc::downgrade(&oldest));
            }
        }
    }

    /// Writes to a cache file what must not be lost. On a full disk the ballast gives way for it, piece by piece.
    pub(super) fn store(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        loop {
            match file.write_all_at(bytes, offset) {
                Err(error) if is_disk_full(&error) && self.ballast_gives_way()? => {}
                done => return done,
            }
        }
    }

    fn ballast_gives_way(&self) -> io::Result<bool> {
        let file = match OpenOptions::new().write(true).open(self.dir.join(BALLAST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        let length = file.metadata()?.len();
        file.set_len(length.saturating_sub(BALLAST_PIECE))?;
        Ok(length > 0)
    }

    /// Makes the ballast whole, while there is room.
    pub(super) fn take_ballast(&self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(self.dir.join(BALLAST))?;
        let length = file.metadata()?.len();
        if length < BALLAST_BYTES {
            fallocate(&file, FallocateFlags::empty(), length, BALLAST_BYTES - length)?;
        }
        Ok(())
    }

    /// Deletes the cache file of an inode that is gone.
    pub(super) fn delete(&self, slot: &CacheFile) {
        let mut file = slot.file.write();
        *file = None;
        slot.deleted.store(true, Relaxed);
        if slot.exists.swap(false, Release)
            && let Err(error) = fs::remove_file(self.path(slot.ino))
        {
            tracing::warn!("cannot delete cache file {}: {error}", self.path(slot.ino).display());
        }
    }

    /// Size and free space of the file system that holds the cache.
    pub(super) fn space(&self) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::statvfs(&self.dir)?)
    }

    /// Deletes all cache files. For the end of the mount.
    pub(super) fn delete_all(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot delete the cache {}: {error}", self.dir.display());
        }
    }
}

/// Deletes the leftovers of earlier mounts without making this one wait.
fn delete_old(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let is_old = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b"old");
    let old: Vec<PathBuf> = entries.flatten().filter(is_old).map(|entry| entry.path()).collect();
    if old.is_empty() {
        return;
    }
    std::thread::spawn(move || {
        for path in old {
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!("cannot delete the old cache {}: {error}", path.display());
            }
        }
    });
}

/// Raises the soft limit of open files to the hard one; returns how many cache files may be open at a time.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!("cannot raise the limit of open files from {:?}: {error}", limit.current);
        }
    }
    let available = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX).saturating_sub(DESCRIPTORS_RESERVED);
    usize::try_from(available / 2).unwrap_or(usize::MAX).clamp(16, OPEN_FILES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_beyond_the_limit_are_closed_and_open_again_with_their_contents() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = CacheDir::create(dir.path()).unwrap();
        cache.open_max = 3;
        let slots: Vec<_> = (100..110).map(CacheFile::new).collect();
        for slot in &slots {
            cache.open(slot).unwrap().write_all_at(&slot.ino.to_le_bytes(), 8192).unwrap();
        }
        let open = slots.iter().filter(|slot| slot.file.read().is_some()).count();
        assert!(open <= 3, "{open} files are open, at most 3 expected");
        for slot in &slots {
            let mut read = [0; 8];
            cache.open(slot).unwrap().read_exact_at(&mut read, 8192).unwrap();
            assert_eq!(u64::from_le_bytes(read), slot.ino);
        }
        for slot in &slots {
            cache.delete(slot);
            assert!(!cache.path(slot.ino).exists());
        }
    }

    #[test]
    fn what_an_earlier_mount_left_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let cache = CacheDir::create(dir.path()).unwrap();
        let slot = CacheFile::new(7);
        cache.open(&slot).unwrap();
        let path = cache.path(7);
        drop(CacheDir::create(dir.path()).unwrap());
        assert!(!path.exists());
        for _ in 0..100 {
            if fs::read_dir(dir.path()).unwrap().count() == 1 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("only `files` should remain in the cache directory");
    }
}
