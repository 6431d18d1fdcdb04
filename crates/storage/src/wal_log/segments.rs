//! The segment files: finding what they hold at open, writing, recycling, and keeping a spare one ready.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::chunk::{ChunkHeader, Found, HEADER_SIZE, chunk_size};
use super::disk::{LogDisk, LogFile};
use super::{SEGMENT_SIZE, WalLogError};

/// Freed segments that are kept for reuse; more are removed.
const SPARES_MAX: usize = 4;

#[derive(Debug)]
pub(super) struct Segments {
    disk: Arc<dyn LogDisk>,
    files: BTreeMap<u64, Arc<dyn LogFile>>,
    spares: Vec<(String, Arc<dyn LogFile>)>,
    /// Number for the next spare's name.
    next_spare: u64,
    /// Makes one spare file, off the path of those who append.
    maker: Option<JoinHandle<io::Result<(String, Arc<dyn LogFile>)>>>,
}

fn file_name(number: u64) -> String {
    format!("{number:016x}.wal")
}

/// Where the log ends within a segment, as far as a look at that segment alone tells.
enum SegmentEnd {
    /// It is full.
    Full,
    /// No whole chunk stands at this offset.
    At(usize),
}

impl Segments {
    /// Opens the log's files, gives every whole chunk to `found` in log order, and returns where the log ends. Makes everything durable.
    pub(super) fn open(disk: Arc<dyn LogDisk>, mut found: impl FnMut(&ChunkHeader)) -> Result<(Segments, u64), WalLogError> {
        let folder = disk.describe();
        let io_error = |action: String, error| WalLogError::Io { folder: folder.clone(), action, error: Arc::new(error) };
        let mut segments = Segments { disk: disk.clone(), files: BTreeMap::new(), spares: Vec::new(), next_spare: 0, maker: None };
        for name in disk.list().map_err(|error| io_error("list the folder".to_owned(), error))? {
            let number = name.strip_suffix(".wal").filter(|stem| stem.len() == 16).and_then(|stem| u64::from_str_radix(stem, 16).ok());
            if let Some(number) = number {
                let file = disk.open(&name).map_err(|error| io_error(format!("open {name}"), error))?;
                segments.files.insert(number, file);
            } else if name != "lock" {
                // Spares, finished or not: cheaper to make anew than to trust.
                disk.remove(&name).map_err(|error| io_error(format!("remove {name}"), error))?;
            }
        }
        let mut end = None;
        let mut expected = segments.files.keys().next().copied().unwrap_or(0);
        let mut buffer = vec![0; SEGMENT_SIZE as usize];
        for (number, file) in &segments.files {
            let name = file_name(*number);
            let base = number * SEGMENT_SIZE;
            file.sync().map_err(|error| io_error(format!("fsync {name}"), error))?;
            file.read_at(&mut buffer, 0).map_err(|error| io_error(format!("read {name}"), error))?;
            match end {
                None if *number == expected => {
                    if let SegmentEnd::At(offset) = scan(&buffer, base, &folder, &name, &mut found)? {
                        end = Some(base + offset as u64);
                        check_torn(&buffer, base, offset, base + offset as u64, &folder, &name)?;
                    }
                }
                None => {
                    let name = file_name(expected);
                    return Err(WalLogError::Damaged { folder, file: name, offset: 0 });
                }
                Some(end) => check_torn(&buffer, base, 0, end, &folder, &file_name(end / SEGMENT_SIZE))?,
            }
            expected = number + 1;
        }
        let end = end.unwrap_or(expected * SEGMENT_SIZE);
        segments.discard_behind(end).map_err(|error| io_error("clear what was not acknowledged".to_owned(), error))?;
        Ok((segments, end))
    }

    /// Makes sure that nothing stands behind `end`, so that it cannot be taken for what will be written there.
    fn discard_behind(&mut self, end: u64) -> io::Result<()> {
        let number = end / SEGMENT_SIZE;
        if let Some(file) = self.files.get(&number) {
            let offset = end % SEGMENT_SIZE;
            let mut rest = vec![0; (SEGMENT_SIZE - offset) as usize];
            file.read_at(&mut rest, offset)?;
            if rest.iter().any(|byte| *byte != 0) {
                rest.fill(0);
                file.write_at(&rest, offset)?;
                file.sync()?;
            }
        }
        for (number, _) in self.files.split_off(&(number + 1)) {
            self.disk.remove(&file_name(number))?;
        }
        Ok(())
    }

    /// Writes `bytes`, which lie in one segment, at log position `position`.
    pub(super) fn write(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let number = position / SEGMENT_SIZE;
        if !self.files.contains_key(&number) {
            let file = self.new_file(number)?;
            self.files.insert(number, file);
        }
        let file = self.files.get(&number).ok_or_else(|| io::Error::other("the segment is gone"))?;
        file.write_at(bytes, position % SEGMENT_SIZE)
    }

    fn new_file(&mut self, number: u64) -> io::Result<Arc<dyn LogFile>> {
        let name = file_name(number);
        if self.spares.is_empty()
            && let Some(maker) = self.maker.take()
        {
            self.spares.push(maker.join().map_err(|_| io::Error::other("the maker of spare segments has panicked"))??);
        }
        let file = match self.spares.pop() {
            Some((spare, file)) => {
                self.disk.rename(&spare, &name)?;
                file
            }
            None => self.disk.create(&name, SEGMENT_SIZE)?,
        };
        if self.spares.is_empty() && self.maker.is_none() {
            let (disk, spare) = (self.disk.clone(), self.spare_name());
            self.maker = Some(std::thread::spawn(move || disk.create(&spare, SEGMENT_SIZE).map(|file| (spare, file))));
        }
        Ok(file)
    }

    fn spare_name(&mut self) -> String {
        self.next_spare += 1;
        format!("spare-{}", self.next_spare)
    }

    /// The file that holds log position `position`.
    pub(super) fn file(&self, position: u64) -> Option<Arc<dyn LogFile>> {
        self.files.get(&(position / SEGMENT_SIZE)).cloned()
    }

    /// The files that hold positions `from..to`.
    pub(super) fn files(&self, from: u64, to: u64) -> Vec<Arc<dyn LogFile>> {
        self.files.range(from / SEGMENT_SIZE..=to.saturating_sub(1) / SEGMENT_SIZE).map(|(_, file)| file.clone()).collect()
    }

    /// Gives up all segments below number `number`.
    pub(super) fn free_below(&mut self, number: u64) -> io::Result<()> {
        while let Some(entry) = self.files.first_entry().filter(|entry| *entry.key() < number) {
            let (old, file) = entry.remove_entry();
            if self.spares.len() < SPARES_MAX {
                let spare = self.spare_name();
                self.disk.rename(&file_name(old), &spare)?;
                self.spares.push((spare, file));
            } else {
                self.disk.remove(&file_name(old))?;
            }
        }
        Ok(())
    }

    /// Bytes of all segments in use.
    pub(super) fn bytes(&self) -> u64 {
        self.files.len() as u64 * SEGMENT_SIZE
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        if let Some(maker) = self.maker.take() {
            let _ = maker.join();
        }
    }
}

/// Gives the chunks of a segment to `found` until it is full or no whole chunk stands there.
fn scan(segment: &[u8], base: u64, folder: &str, name: &str, found: &mut impl FnMut(&ChunkHeader)) -> Result<SegmentEnd, WalLogError> {
    let mut offset = 0;
    while segment.len() - offset >= chunk_size(8) {
        match ChunkHeader::find(&segment[offset..], base + offset as u64) {
            Found::Chunk(header) => {
                found(&header);
                offset += chunk_size(header.payload_len as usize);
            }
            Found::Nothing => return Ok(SegmentEnd::At(offset)),
            Found::Unsupported(what) => {
                return Err(WalLogError::Unsupported { folder: folder.to_owned(), file: name.to_owned(), offset: offset as u64, what });
            }
        }
    }
    Ok(SegmentEnd::Full)
}

/// The log seems to end at `end`, for no whole chunk stands there. That is a torn write, unless a chunk behind it (in `segment` from
/// `offset` on) was written after the log had been made durable beyond `end`.
fn check_torn(segment: &[u8], base: u64, offset: usize, end: u64, folder: &str, end_file: &str) -> Result<(), WalLogError> {
    let mut at = offset;
    while at + HEADER_SIZE <= segment.len() {
        // A cheap look before the checksum: the chunk's own position.
        let here = segment[at + 16..at + 24] == (base + at as u64).to_le_bytes();
        if here
            && let Found::Chunk(header) = ChunkHeader::find(&segment[at..], base + at as u64)
            && header.synced > end
        {
            return Err(WalLogError::Damaged { folder: folder.to_owned(), file: end_file.to_owned(), offset: end % SEGMENT_SIZE });
        }
        at += 8;
    }
    Ok(())
}
