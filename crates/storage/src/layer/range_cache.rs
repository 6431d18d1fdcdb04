//! A cache on local disk for parts of objects in a bucket.
//!
//! Objects are divided into chunks of [`CHUNK_BYTES`]; what is read of an object is fetched in whole chunks, missing
//! neighbours in one request, so a cold page does not pull a whole layer, and its neighbours are there when they are
//! wanted next. The chunks of an object are in one sparse file at their own offsets, which has no name: it is gone with
//! this process, whatever ends it. When the cache is full, the objects that were not used for longest go.
//!
//! Nothing is checked here: whoever reads a layer checks each byte, and says so if a chunk was damaged
//! ([`RangeCache::forget`]).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use crate::store::ObjectName;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// Objects of which something is kept at most; each holds a file open.
const OBJECTS_MAX: usize = 256;

/// Chunks of one object.
struct Chunks {
    file: File,
    /// One bit for each chunk that is there.
    present: Mutex<Vec<u64>>,
    bytes: AtomicU64,
    used_at: AtomicU64,
}

impl Chunks {
    /// The chunks of `wanted` from the first that is missing to the last.
    fn missing(&self, wanted: Range<u64>) -> Range<u64> {
        let present = self.present.lock();
        let is_missing = |chunk: &u64| present.get((chunk / 64) as usize).is_none_or(|word| word & 1 << (chunk % 64) == 0);
        let first = wanted.clone().find(is_missing);
        let last = wanted.rev().find(is_missing);
        first.zip(last).map_or(0..0, |(first, last)| first..last + 1)
    }

    fn set_present(&self, chunks: Range<u64>) {
        let mut present = self.present.lock();
        let words = (chunks.end.div_ceil(64) as usize).max(present.len());
        present.resize(words, 0);
        for chunk in chunks {
            if let Some(word) = present.get_mut((chunk / 64) as usize) {
                *word |= 1 << (chunk % 64);
            }
        }
    }
}

#[derive(Default)]
struct State {
    objects: HashMap<ObjectName, Arc<Chunks>>,
    used_bytes: u64,
    /// Counts uses, to tell what was not used for longest.
    clock: u64,
}

/// See the module's doc.
pub struct RangeCache {
    folder: PathBuf,
    limit_bytes: u64,
    state: Mutex<State>,
}

impl RangeCache {
    /// A cache of at most `limit_bytes` with its files in `folder`, which must exist.
    pub fn new(folder: PathBuf, limit_bytes: u64) -> Arc<RangeCache> {
        Arc::new(RangeCache { folder, limit_bytes, state: Mutex::default() })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.state.lock().used_bytes
    }

    /// The bytes `range` of `object`, which ends at `end`; what is not here is got by `fetch`, and kept.
    ///
    /// # Errors
    /// What `fetch` says.
    pub fn read(
        &self,
        object: &ObjectName,
        range: Range<u64>,
        end: u64,
        fetch: impl Fn(Range<u64>) -> Result<Bytes, String>,
    ) -> Result<Bytes, String> {
        let Some(chunks) = self.chunks_of(object) else { return fetch(range) };
        let missing = chunks.missing(range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES));
        let mut fetched = (0..0, Bytes::new());
        if !missing.is_empty() {
            let place = missing.start * CHUNK_BYTES..(missing.end * CHUNK_BYTES).min(end).max(range.end);
            let bytes = fetch(place.clone())?;
            match chunks.file.write_all_at(&bytes, place.start) {
                Ok(()) => {
                    chunks.set_present(missing);
                    self.note_kept(object, &chunks, bytes.len() as u64);
                }
                Err(error) => tracing::warn!(%object, %error, "what was fetched of a layer could not be kept on local disk"),
            }
            fetched = (place, bytes);
        }
        let (place, bytes) = fetched;
        if place.start <= range.start && range.end <= place.end {
            let start = (range.start - place.start) as usize;
            return Ok(bytes.slice(start..start + (range.end - range.start) as usize));
        }
        let mut bytes = BytesMut::zeroed((range.end - range.start) as usize);
        match chunks.file.read_exact_at(&mut bytes, range.start) {
            Ok(()) => Ok(bytes.freeze()),
            Err(_) => fetch(range),
        }
    }

    /// Drops what is kept of `object`. Whether there was anything.
    pub fn forget(&self, object: &ObjectName) -> bool {
        let mut state = self.state.lock();
        let gone = state.objects.remove(object);
        if let Some(chunks) = &gone {
            state.used_bytes -= chunks.bytes.load(Ordering::Relaxed);
        }
        gone.is_some()
    }

    fn chunks_of(&self, object: &ObjectName) -> Option<Arc<Chunks>> {
        let mut state = self.state.lock();
        state.clock += 1;
        let clock = state.clock;
        if let Some(chunks) = state.objects.get(object) {
            chunks.used_at.store(clock, Ordering::Relaxed);
            return Some(Arc::clone(chunks));
        }
        let file = match self.new_file(clock) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(folder = %self.folder.display(), %error, "layers are read from the store without a local cache");
                return None;
            }
        };
        let chunks = Arc::new(Chunks { file, present: Mutex::default(), bytes: AtomicU64::new(0), used_at: AtomicU64::new(clock) });
        state.objects.insert(object.clone(), Arc::clone(&chunks));
        Some(chunks)
    }

    /// A file that is gone when it is closed.
    fn new_file(&self, clock: u64) -> io::Result<File> {
        let path = self.folder.join(format!("ranges-{}-{clock}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    }

    /// Counts what was kept, and makes room.
    fn note_kept(&self, object: &ObjectName, chunks: &Arc<Chunks>, bytes: u64) {
        let mut state = self.state.lock();
        if !state.objects.get(object).is_some_and(|kept| Arc::ptr_eq(kept, chunks)) {
            return;
        }
        chunks.bytes.fetch_add(bytes, Ordering::Relaxed);
        state.used_bytes += bytes;
        while state.used_bytes > self.limit_bytes || state.objects.len() > OBJECTS_MAX {
            let oldest =
                state.objects.iter().min_by_key(|(_, chunks)| chunks.used_at.load(Ordering::Relaxed)).map(|(object, _)| object.clone());
            let Some(gone) = oldest.and_then(|oldest| state.objects.remove(&oldest)) else { break };
            state.used_bytes -= gone.bytes.load(Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object(number: usize) -> ObjectName {
        format!("layers/{number}").parse().unwrap()
    }

    fn byte(number: usize, at: u64) -> u8 {
        (at.wrapping_mul(0x9E37_79B9).wrapping_add(number as u64) >> 13) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn what_is_read_is_what_is_in_the_object(reads in proptest::collection::vec((0usize..4, 0u64..500_000, 1u64..200_000), 1..40)) {
            let folder = tempfile::tempdir().unwrap();
            let cache = RangeCache::new(folder.path().to_owned(), 600_000);
            let end = 500_000;
            for (number, start, length) in reads {
                let range = start..(start + length).min(end);
                let fetch = |range: Range<u64>| {
                    assert!(range.end <= end, "nothing behind the object's end is fetched");
                    Ok(range.map(|at| byte(number, at)).collect::<Vec<_>>().into())
                };
                let found = cache.read(&object(number), range.clone(), end, fetch).unwrap();
                prop_assert!(found.iter().copied().eq(range.map(|at| byte(number, at))));
                prop_assert!(cache.used_bytes() <= 600_000);
            }
            prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the files have no names");
        }
    }

    #[test]
    fn what_is_there_is_not_fetched_again_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RangeCache::new(folder.path().to_owned(), 1 << 20);
        let fetches = Mutex::new(Vec::new());
        let read = |range: Range<u64>| {
            let fetch = |range: Range<u64>| {
                fetches.lock().push((range.start, range.end));
                Ok(vec![1; (range.end - range.start) as usize].into())
            };
            assert!(cache.read(&object(1), range, 1_000_000, fetch).is_ok());
            std::mem::take(&mut *fetches.lock())
        };
        assert_eq!(read(70_000..71_000), [(65_536, 131_072)], "a whole chunk is fetched");
        assert_eq!(read(65_536..131_072), []);
        assert_eq!(read(60_000..200_000), [(0, 262_144)], "missing chunks, and what is between them, are one request");
        assert_eq!(read(999_000..1_000_000), [(983_040, 1_000_000)]);
        assert!(cache.forget(&object(1)));
        assert_eq!((cache.used_bytes(), cache.forget(&object(1))), (0, false));
        assert_eq!(read(70_000..71_000).len(), 1);
        let failed = cache.read(&object(2), 0..10, 100, |_| Err("unreachable".to_owned()));
        assert_eq!(failed, Err("unreachable".to_owned()));
    }
}
