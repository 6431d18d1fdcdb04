//! The segment files: finding what they hold at open, writing, recycling, and keeping a spare one ready.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::chunk::{ChunkHeader, Found, HEADER_SIZE, chunk_size};
use super::disk::{LogDisk, LogFile};
use super::newest::{self, Newest, UnsupportedVersion};
use super::{WalLogError, WalLogOptions};

/// Freed segments that are kept for reuse; more are removed.
const SPARES_MAX: usize = 4;

/// A segment that is ready for use, and its name.
type Spare = (String, Arc<dyn LogFile>);

#[derive(Debug)]
pub(super) struct Segments {
    disk: Arc<dyn LogDisk>,
    segment_bytes: u64,
    files: BTreeMap<u64, Arc<dyn LogFile>>,
    /// Notes the newest of them.
    newest: Newest,
    spares: Vec<Spare>,
    /// Number for the next spare's name.
    next_spare: u64,
    /// Whether a spare is to be kept ready.
    make_spares: bool,
    /// Makes one spare file, off the path of those who append.
    maker: Option<JoinHandle<io::Result<Spare>>>,
}

fn file_name(number: u64) -> String {
    format!("{number:016x}.wal")
}

/// Whether a file of this name is a spare segment, finished or not, or one that was never finished.
fn is_left_over(name: &str) -> bool {
    name.starts_with("spare-") || name.ends_with(".wal.new") || name == "newest.new"
}

/// What the log's files held at open.
struct Scan<'a> {
    folder: &'a str,
    segment_bytes: u64,
    /// Where the log ends: no whole chunk stands there.
    end: Option<u64>,
    /// Up to here the log was known to be fsynced, by what stands in it.
    synced: u64,
}

impl Segments {
    /// Opens the log's files, gives every whole chunk to `found` in log order, and returns where the log ends. Makes
    /// everything durable.
    pub(super) fn open(
        disk: &Arc<dyn LogDisk>,
        options: WalLogOptions,
        mut found: impl FnMut(&ChunkHeader),
    ) -> Result<(Segments, u64), WalLogError> {
        let WalLogOptions { segment_bytes, make_spares, .. } = options;
        let folder = disk.describe();
        let io_error = |action: String, error| WalLogError::Io { folder: folder.clone(), action, error: Arc::new(error) };
        let (files, spares, newest) = (BTreeMap::new(), Vec::new(), Newest::default());
        let mut segments = Segments { disk: disk.clone(), segment_bytes, files, newest, spares, next_spare: 0, make_spares, maker: None };
        for name in disk.list().map_err(|error| io_error("list the folder".to_owned(), error))? {
            let number = name.strip_suffix(".wal").filter(|stem| stem.len() == 16).and_then(|stem| u64::from_str_radix(stem, 16).ok());
            if let Some(number) = number {
                let file = disk.open(&name).map_err(|error| io_error(format!("open {name}"), error))?;
                segments.files.insert(number, file);
            } else if name == newest::FILE_NAME {
                let read = disk.open(&name).and_then(Newest::read).map_err(|error| io_error(format!("read {name}"), error))?;
                segments.newest = read.map_err(|UnsupportedVersion(version)| WalLogError::Unsupported {
                    folder: folder.clone(),
                    file: name,
                    offset: 0,
                    what: format!("format version {version}"),
                })?;
            } else if is_left_over(&name) {
                // Cheaper to make anew than to trust.
                disk.remove(&name).map_err(|error| io_error(format!("remove {name}"), error))?;
            }
        }
        // What is noted has a file: it is noted later, and the newest file is never freed.
        if let Some(number) = segments.newest.number().filter(|number| !segments.files.contains_key(number)) {
            return Err(WalLogError::MissingSegment { folder, file: file_name(number) });
        }
        let mut expected = segments.files.keys().next().copied().unwrap_or(0);
        let mut scan = Scan { folder: &folder, segment_bytes, end: None, synced: expected * segment_bytes };
        let mut buffer = vec![0; segment_bytes as usize];
        for (number, file) in &segments.files {
            if scan.end.is_none() && *number != expected {
                return Err(WalLogError::MissingSegment { folder, file: file_name(expected) });
            }
            file.read_at(&mut buffer, 0).map_err(|error| io_error(format!("read {}", file_name(*number)), error))?;
            scan.segment(&buffer, *number, &mut found)?;
            expected = number + 1;
        }
        let Scan { end, synced, .. } = scan;
        let end = end.unwrap_or(expected * segment_bytes);
        segments.make_durable(synced.min(end), end).map_err(|error| io_error("make durable what it holds".to_owned(), error))?;
        segments.discard_behind(end).map_err(|error| io_error("clear what was not acknowledged".to_owned(), error))?;
        Ok((segments, end))
    }

    /// Writes what stands from `synced` to `end` once more, and fsyncs it. An fsync alone does not do: where an earlier
    /// one has failed, the kernel may take pages for clean that never reached the disk.
    fn make_durable(&self, synced: u64, end: u64) -> io::Result<()> {
        for (number, file) in self.files.range(synced / self.segment_bytes..) {
            let base = number * self.segment_bytes;
            let (from, to) = (synced.max(base) - base, end.min(base + self.segment_bytes).saturating_sub(base));
            if from < to {
                let mut bytes = vec![0; (to - from) as usize];
                file.read_at(&mut bytes, from)?;
                file.write_at(&bytes, from)?;
            }
            file.sync()?;
        }
        Ok(())
    }

    /// Makes sure that nothing stands behind `end`, so that it cannot be taken for what will be written there.
    fn discard_behind(&mut self, end: u64) -> io::Result<()> {
        let number = end / self.segment_bytes;
        // Before any file goes, and anew even where it reads so already: what was read may not be on disk.
        if self.newest.has_file()
            && let Some((&last, _)) = self.files.range(..=number).next_back()
        {
            self.newest.write(&*self.disk, last)?;
        }
        // The last first: should this be cut short, what is left still begins where nothing whole stands.
        for (number, _) in self.files.split_off(&(number + 1)).into_iter().rev() {
            self.disk.remove(&file_name(number))?;
        }
        if let Some(file) = self.files.get(&number) {
            let offset = end % self.segment_bytes;
            let mut rest = vec![0; (self.segment_bytes - offset) as usize];
            file.read_at(&mut rest, offset)?;
            if rest.iter().any(|byte| *byte != 0) {
                rest.fill(0);
                file.write_at(&rest, offset)?;
                file.sync()?;
            }
        }
        Ok(())
    }

    /// Writes `bytes`, which lie in one segment, at log position `position`. After an error they may stand there in
    /// part.
    pub(super) fn write(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let number = position / self.segment_bytes;
        if !self.files.contains_key(&number) {
            let file = self.new_file(number)?;
            self.files.insert(number, file);
        }
        if self.newest.number() != Some(number) {
            self.newest.write(&*self.disk, number)?;
        }
        let file = self.files.get(&number).ok_or_else(|| io::Error::other("the segment is gone"))?;
        file.write_at(bytes, position % self.segment_bytes)
    }

    fn new_file(&mut self, number: u64) -> io::Result<Arc<dyn LogFile>> {
        let name = file_name(number);
        if self.spares.is_empty()
            && let Some(maker) = self.maker.take()
        {
            match maker.join() {
                Ok(Ok(spare)) => self.spares.push(spare),
                Ok(Err(error)) => tracing::warn!(folder = self.disk.describe(), %error, "no spare WAL log segment could be made"),
                Err(_) => return Err(io::Error::other("the maker of spare segments has panicked")),
            }
        }
        let file = match self.spares.pop() {
            Some((spare, file)) => {
                self.disk.rename(&spare, &name)?;
                file
            }
            None => self.disk.create(&name, self.segment_bytes)?,
        };
        if self.make_spares && self.spares.is_empty() && self.maker.is_none() {
            let (disk, spare, size) = (self.disk.clone(), self.spare_name(), self.segment_bytes);
            self.maker = Some(std::thread::spawn(move || disk.create(&spare, size).map(|file| (spare, file))));
        }
        Ok(file)
    }

    fn spare_name(&mut self) -> String {
        self.next_spare += 1;
        format!("spare-{}", self.next_spare)
    }

    /// The file that holds log position `position`.
    pub(super) fn file(&self, position: u64) -> Option<Arc<dyn LogFile>> {
        self.files.get(&(position / self.segment_bytes)).cloned()
    }

    /// The files that hold positions `from..to`.
    pub(super) fn files(&self, from: u64, to: u64) -> Vec<Arc<dyn LogFile>> {
        let numbers = from / self.segment_bytes..=to.saturating_sub(1) / self.segment_bytes;
        self.files.range(numbers).map(|(_, file)| file.clone()).collect()
    }

    /// Number of the oldest segment in use.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.files.keys().next().copied()
    }

    /// Gives up all segments below number `number`, except for the newest.
    pub(super) fn free_below(&mut self, number: u64) -> io::Result<()> {
        while let Some(old) = self.oldest().filter(|old| *old < number && self.files.len() > 1) {
            if self.spares.len() < SPARES_MAX {
                let spare = self.spare_name();
                self.disk.rename(&file_name(old), &spare)?;
                self.spares.extend(self.files.remove(&old).map(|file| (spare, file)));
            } else {
                self.disk.remove(&file_name(old))?;
                self.files.remove(&old);
            }
        }
        Ok(())
    }

    /// Bytes of all segments in use.
    pub(super) fn bytes(&self) -> u64 {
        self.files.len() as u64 * self.segment_bytes
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        if let Some(maker) = self.maker.take() {
            let _ = maker.join();
        }
    }
}

impl Scan<'_> {
    /// Gives the chunks of a segment to `found`, until no whole chunk stands where one should: there the log ends. What
    /// stands behind the end was never made durable, unless it says otherwise.
    fn segment(&mut self, segment: &[u8], number: u64, found: &mut impl FnMut(&ChunkHeader)) -> Result<(), WalLogError> {
        let base = number * self.segment_bytes;
        let mut offset = 0;
        while self.end.is_none() && segment.len() - offset >= chunk_size(8) {
            let position = base + offset as u64;
            match ChunkHeader::find(&segment[offset..], position) {
                Found::Chunk(header) => {
                    self.synced = self.synced.max(header.synced);
                    found(&header);
                    offset += chunk_size(header.payload_len as usize);
                }
                Found::Nothing => self.end = Some(position),
                Found::Unsupported(what) => {
                    let (folder, file) = (self.folder.to_owned(), file_name(number));
                    return Err(WalLogError::Unsupported { folder, file, offset: offset as u64, what });
                }
            }
        }
        match self.end {
            Some(end) => self.check_torn(segment, base, offset, end),
            None => Ok(()),
        }
    }

    /// The log seems to end at `end`, for no whole chunk stands there. That is a torn write, unless a chunk behind it
    /// (in `segment` from `offset` on) was written after the log had been made durable beyond `end`.
    fn check_torn(&self, segment: &[u8], base: u64, offset: usize, end: u64) -> Result<(), WalLogError> {
        for at in (offset..segment.len().saturating_sub(HEADER_SIZE - 1)).step_by(8) {
            let position = base + at as u64;
            // A cheap look before the checksum: the chunk's own position.
            if segment[at + 16..at + 24] != position.to_le_bytes() {
                continue;
            }
            if let Found::Chunk(header) = ChunkHeader::find(&segment[at..], position)
                && header.synced > end
            {
                let file = file_name(end / self.segment_bytes);
                return Err(WalLogError::Damaged { folder: self.folder.to_owned(), file, offset: end % self.segment_bytes });
            }
        }
        Ok(())
    }
}
