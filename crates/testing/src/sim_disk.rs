//! A disk for the WAL log, in memory, that loses what was not made durable as a seed says.
//!
//! A write goes to the page cache: it is read back at once, and durable after the next successful fsync of its file.
//! Two kinds of end: [`SimDisk::crash_process`] keeps the page cache, [`SimDisk::cut_power`] keeps of each write that
//! was not made durable an arbitrary part: some of its pieces, each cut at any byte, in any combination. A failed fsync
//! does what Linux does: what it should have written is lost to later fsyncs, and still read back until the power is
//! cut.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use varve_storage::wal_log::{LogDisk, LogFile};

use crate::random::SeededRng;

/// Pieces into which a lost power supply cuts a write.
const PIECE_BYTES: usize = 512;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFaults {
    /// Fsyncs that fail, in a thousand.
    pub sync_fails: u32,
    /// Writes that fail after a part of them, in a thousand.
    pub write_fails: u32,
    /// Bytes that all files together may have.
    pub capacity_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    /// What is on the disk.
    durable: Vec<u8>,
    /// What reads give.
    cached: Vec<u8>,
    /// Writes since the last fsync: offset and length.
    dirty: Vec<(usize, usize)>,
    /// Writes that a failed fsync was to make durable.
    forgotten: Vec<(usize, usize)>,
}

type SharedContents = Arc<Mutex<Contents>>;

#[derive(Debug)]
struct Inner {
    files: BTreeMap<String, SharedContents>,
    faults: DiskFaults,
    random: SeededRng,
    syncs: u64,
}

/// See the module's doc. Cheap to clone; clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    inner: Arc<Mutex<Inner>>,
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> SimDisk {
        let random = SeededRng::new(seed);
        SimDisk { inner: Arc::new(Mutex::new(Inner { files: BTreeMap::new(), faults: DiskFaults::default(), random, syncs: 0 })) }
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&self, faults: DiskFaults) {
        self.inner.lock().faults = faults;
    }

    /// How many fsyncs there were.
    pub fn syncs(&self) -> u64 {
        self.inner.lock().syncs
    }

    /// The process ends; the disk as the next one finds it. What the old process still does has no effect on it.
    pub fn crash_process(&self) -> SimDisk {
        self.after(|contents, _| contents)
    }

    /// The power fails; the disk as the next process finds it.
    pub fn cut_power(&self) -> SimDisk {
        self.after(|contents, random| {
            let Contents { mut durable, cached, dirty, forgotten } = contents;
            // Whole writes, in any combination, or pieces of them.
            let whole = random.chance(500);
            for (offset, length) in forgotten.into_iter().chain(dirty) {
                if whole && random.chance(500) {
                    durable[offset..offset + length].copy_from_slice(&cached[offset..offset + length]);
                }
                let mut at = offset;
                while !whole && at < offset + length {
                    let piece = (PIECE_BYTES - at % PIECE_BYTES).min(offset + length - at);
                    let kept = match random.below(4) {
                        0 => 0,
                        1 => random.below(piece as u64) as usize,
                        _ => piece,
                    };
                    durable[at..at + kept].copy_from_slice(&cached[at..at + kept]);
                    at += piece;
                }
            }
            Contents { cached: durable.clone(), durable, ..Contents::default() }
        })
    }

    fn after(&self, mut change: impl FnMut(Contents, &mut SeededRng) -> Contents) -> SimDisk {
        let mut inner = self.inner.lock();
        let mut random = inner.random.fork();
        let files = inner.files.iter().map(|(name, contents)| {
            let changed = change(contents.lock().clone(), &mut random);
            (name.clone(), Arc::new(Mutex::new(changed)))
        });
        let files = files.collect();
        SimDisk { inner: Arc::new(Mutex::new(Inner { files, faults: DiskFaults::default(), random, syncs: 0 })) }
    }

    /// Names and contents, as they are read, of all files.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.inner.lock().files.iter().map(|(name, contents)| (name.clone(), contents.lock().cached.clone())).collect()
    }

    /// Changes a byte of a file for good, as a bad disk does.
    pub fn flip(&self, name: &str, offset: usize) {
        if let Some(contents) = self.inner.lock().files.get(name) {
            let mut contents = contents.lock();
            contents.cached[offset] ^= 1;
            contents.durable[offset] ^= 1;
        }
    }

    fn file(&self, name: &str) -> io::Result<SharedContents> {
        self.inner.lock().files.get(name).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.inner.lock().files.keys()).finish()
    }
}

impl LogDisk for SimDisk {
    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>> {
        let mut inner = self.inner.lock();
        let used: usize = inner.files.values().map(|contents| contents.lock().cached.len()).sum();
        if inner.faults.capacity_bytes.is_some_and(|capacity| used as u64 + size > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let zeros = vec![0; size as usize];
        let contents = Arc::new(Mutex::new(Contents { durable: zeros.clone(), cached: zeros, ..Contents::default() }));
        inner.files.insert(name.to_owned(), contents.clone());
        Ok(Arc::new(SimFile { disk: self.clone(), contents }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(SimFile { disk: self.clone(), contents: self.file(name)? }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.inner.lock();
        let contents = inner.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        inner.files.insert(to.to_owned(), contents);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.lock().files.remove(name).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.inner.lock().files.keys().cloned().collect())
    }

    fn describe(&self) -> String {
        "the simulated disk".to_owned()
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    contents: SharedContents,
}

impl LogFile for SimFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = {
            let mut inner = self.disk.inner.lock();
            let fails = inner.faults.write_fails;
            if inner.random.chance(fails) { inner.random.below(bytes.len() as u64) as usize } else { bytes.len() }
        };
        let (mut contents, offset) = (self.contents.lock(), offset as usize);
        contents.cached[offset..offset + written].copy_from_slice(&bytes[..written]);
        contents.dirty.push((offset, written));
        if written == bytes.len() { Ok(()) } else { Err(io::Error::other("simulated: the write failed")) }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let contents = self.contents.lock();
        let found = contents.cached.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let fails = {
            let mut inner = self.disk.inner.lock();
            inner.syncs += 1;
            let fails = inner.faults.sync_fails;
            inner.random.chance(fails)
        };
        let mut guard = self.contents.lock();
        let contents = &mut *guard;
        let dirty = std::mem::take(&mut contents.dirty);
        if fails {
            contents.forgotten.extend(dirty);
            return Err(io::Error::other("simulated: the fsync failed"));
        }
        for (offset, length) in dirty {
            contents.durable[offset..offset + length].copy_from_slice(&contents.cached[offset..offset + length]);
        }
        Ok(())
    }
}
