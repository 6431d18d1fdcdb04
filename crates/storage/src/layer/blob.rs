//! The bytes of a layer's object, wherever they are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use quick_cache::sync::Cache;

use super::range_cache::RangeCache;
use crate::store::{BlockingStore, ObjectName};

/// Reads ranges of an object. May block.
pub trait LayerBlob: Send + Sync {
    /// The bytes `offset..offset + length`, all of them.
    ///
    /// # Errors
    /// Why they cannot be had.
    fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, String>;

    /// What was read is not sound: forgets copies of the object, so that the next read sees the object itself. Whether
    /// there were any.
    fn forget_copies(&self) -> bool {
        false
    }
}

/// Files kept open, the least useful closed when there are too many: an idle tenant holds none for long.
pub struct OpenFiles {
    files: Cache<Arc<Path>, Arc<File>>,
}

impl OpenFiles {
    /// Keeps up to `files_max` files open.
    pub fn new(files_max: usize) -> Arc<OpenFiles> {
        Arc::new(OpenFiles { files: Cache::new(files_max) })
    }

    /// Number of files open.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether no file is open.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    fn open(&self, path: &Arc<Path>) -> io::Result<Arc<File>> {
        if let Some(file) = self.files.get(path) {
            return Ok(file);
        }
        let file = Arc::new(File::open(path)?);
        self.files.insert(Arc::clone(path), Arc::clone(&file));
        Ok(file)
    }

    fn close(&self, path: &Arc<Path>) {
        self.files.remove(path);
    }
}

/// An object in a local folder, read in place.
pub struct LocalBlob {
    path: Arc<Path>,
    files: Arc<OpenFiles>,
}

impl LocalBlob {
    /// The file `path`, opened when first read.
    pub fn new(path: PathBuf, files: Arc<OpenFiles>) -> LocalBlob {
        LocalBlob { path: path.into(), files }
    }
}

impl LocalBlob {
    fn try_read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let mut bytes = vec![0; length];
        self.files.open(&self.path)?.read_exact_at(&mut bytes, offset)?;
        Ok(Bytes::from(bytes))
    }

    fn problem(&self, offset: u64, length: usize, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("the file {} ends before offset {}", self.path.display(), offset + length as u64),
            _ => format!("{}: {error}", self.path.display()),
        }
    }
}

impl LayerBlob for LocalBlob {
    fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, String> {
        self.try_read(offset, length).map_err(|error| self.problem(offset, length, &error))
    }
}

impl Drop for LocalBlob {
    fn drop(&mut self) {
        self.files.close(&self.path);
    }
}

/// An object in a bucket: read from a whole local copy as long as there is one, else by ranges, which are kept on local
/// disk for a while.
pub struct RemoteBlob {
    store: BlockingStore,
    object: ObjectName,
    /// Where what is read of the object ends.
    end: u64,
    copy: LocalBlob,
    copy_is_gone: AtomicBool,
    ranges: Arc<RangeCache>,
}

impl RemoteBlob {
    /// The object `object` of `store`, of which nothing behind `end` is read, and which may have a whole copy.
    pub fn new(store: BlockingStore, object: ObjectName, end: u64, copy: LocalBlob, ranges: Arc<RangeCache>) -> RemoteBlob {
        RemoteBlob { store, object, end, copy, copy_is_gone: AtomicBool::new(false), ranges }
    }
}

impl LayerBlob for RemoteBlob {
    fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, String> {
        if !self.copy_is_gone.load(Ordering::Relaxed) {
            match self.copy.try_read(offset, length) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    // The copy is a cache: whatever is wrong with it, the bucket has the truth.
                    self.copy_is_gone.store(true, Ordering::Relaxed);
                    if error.kind() != io::ErrorKind::NotFound {
                        let problem = self.copy.problem(offset, length, &error);
                        tracing::warn!(object = %self.object, problem, "the local copy of a layer cannot be read, the store is read instead");
                    }
                }
            }
        }
        let fetch = |range| self.store.get_range(&self.object, range).map_err(|error| error.to_string());
        self.ranges.read(&self.object, offset..offset + length as u64, self.end, fetch)
    }

    fn forget_copies(&self) -> bool {
        let had_copy = !self.copy_is_gone.swap(true, Ordering::Relaxed);
        self.ranges.forget(&self.object) | had_copy
    }
}

/// An object in memory.
impl LayerBlob for Bytes {
    fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, String> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(length) {
            Some(end) if end <= self.len() => Ok(self.slice(start..end)),
            _ => Err(format!("it has {} bytes, {length} at {offset} were asked for", self.len())),
        }
    }
}
