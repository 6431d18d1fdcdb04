//! WAL in the segment files of a `pg_wal` folder.
//!
//! Such a folder does not say where its WAL ends: the last segment goes on with zeros, or with what a recycled file
//! held before, and whole files are kept ready under future names. So the end is where a record cannot be read *and* no
//! page behind it says that it belongs where it is; if one does, the WAL is damaged.
//!
//! If there are several timelines, each segment is taken from the newest: it begins with what its ancestor wrote.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use varve_postgres::lsn::{WAL_PAGE_SIZE, WAL_SEGMENT_SIZE, wal_segment_name};
use varve_postgres::wal::{Framer, LONG_HEADER_SIZE, PageHeader, WalError};
use varve_postgres::{Lsn, Major};

use crate::VerifyError;
use crate::wal::{Next, WalSource};

/// Bytes that are read at a time.
const READ_SIZE: usize = 1 << 20;

/// The segment files of a folder.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    /// By number.
    files: BTreeMap<u64, PathBuf>,
}

impl Segments {
    /// Those of a `pg_wal` folder, or of the data directory `path`.
    pub(crate) fn list(path: &Path) -> Result<Segments, VerifyError> {
        let inside = path.join("pg_wal");
        let dir = if inside.is_dir() { inside } else { path.to_owned() };
        let files = list(&dir)?;
        Ok(Segments { dir, files })
    }

    fn open(&self, number: u64) -> Result<Option<File>, VerifyError> {
        self.files.get(&number).map(|path| File::open(path).map_err(VerifyError::io(path))).transpose()
    }

    /// Makes `bytes` the WAL from `start` on, up to `max` bytes of its segment. Whether the segment is there.
    pub(crate) fn read_into(&self, start: Lsn, max: usize, bytes: &mut Vec<u8>) -> Result<bool, VerifyError> {
        let Some(file) = self.open(start.segment_number())? else { return Ok(false) };
        self.read_from(&file, start.segment_number(), start.segment_offset(), max, bytes).map(|()| true)
    }

    fn read_from(&self, file: &File, number: u64, offset: u64, max: usize, bytes: &mut Vec<u8>) -> Result<(), VerifyError> {
        let left = usize::try_from(WAL_SEGMENT_SIZE.saturating_sub(offset)).unwrap_or(usize::MAX);
        bytes.resize(left.min(max), 0);
        match file.read_exact_at(bytes, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err(VerifyError::not_usable(&self.path(number), format!("is shorter than the {WAL_SEGMENT_SIZE} bytes of a WAL segment")))
            }
            Err(source) => Err(VerifyError::Io { path: self.path(number), source }),
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.files.get(&number).unwrap_or(&self.dir).clone()
    }
}

/// The WAL of a `pg_wal` folder, from one of its records to its end.
#[derive(Debug)]
pub struct WalDirectory {
    segments: Segments,
    major: Major,
    system_identifier: u64,
    framer: Framer,
    input: Bytes,
    open: Option<(u64, File)>,
    ended: bool,
}

impl WalDirectory {
    /// Opens a `pg_wal` folder, or that of the data directory `path`. Its WAL begins with the first record that begins
    /// in it.
    ///
    /// # Errors
    /// When there is no WAL of a supported major in it.
    pub fn open(path: &Path) -> Result<WalDirectory, VerifyError> {
        let segments = Segments::list(path)?;
        let first = segments.files.first_key_value();
        let (number, first) = first.ok_or_else(|| {
            VerifyError::not_usable(&segments.dir, "there is no WAL segment in it; expected files such as 000000010000000000000001")
        })?;
        let header = first_header(first, segment_start(*number))?;
        let (major, system_identifier) = (header.major, header.system_identifier.unwrap_or_default());
        let framer = Framer::from_page(major, Some(system_identifier), segment_start(*number));
        Ok(WalDirectory { segments, major, system_identifier, framer, input: Bytes::new(), open: None, ended: false })
    }

    /// The cluster that wrote it.
    pub fn system_identifier(&self) -> u64 {
        self.system_identifier
    }

    /// Goes to the record that begins at `start`, or, if no record begins there, to the first behind the start of its
    /// page. Gives the position from which records are read.
    ///
    /// # Errors
    /// When there is no WAL of that position.
    pub fn seek(&mut self, start: Lsn) -> Result<(), VerifyError> {
        if !self.segments.files.contains_key(&start.segment_number()) {
            let oldest = self.segments.files.first_key_value().map_or(Lsn::INVALID, |(number, _)| segment_start(*number));
            let what = format!("WAL at {start} is not there: segment {} is missing; what is there begins at {oldest}", self.name_of(start));
            return Err(VerifyError::not_usable(&self.segments.dir, what));
        }
        self.framer = Framer::from_page(self.major, Some(self.system_identifier), start.page_start());
        self.input = Bytes::new();
        self.ended = false;
        Ok(())
    }

    /// Bytes of WAL in the folder from here on, at most; what is at the end may be no WAL.
    pub fn bytes_left_max(&self) -> u64 {
        let end = self.segments.files.last_key_value().map_or(Lsn::INVALID, |(number, _)| segment_start(number + 1));
        end.distance_from(self.framer.position())
    }

    fn name_of(&self, lsn: Lsn) -> String {
        match self.segments.files.values().next_back().and_then(|path| tli_and_number(path)) {
            Some((tli, _)) => wal_segment_name(tli, lsn.segment_number()),
            None => wal_segment_name(1, lsn.segment_number()),
        }
    }

    /// Reads on; whether there was anything.
    fn read(&mut self) -> Result<bool, VerifyError> {
        let position = self.framer.position();
        let number = position.segment_number();
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            self.open = self.segments.open(number)?.map(|file| (number, file));
        }
        let Some((_, file)) = &self.open else { return Ok(false) };
        let mut bytes = Vec::new();
        self.segments.read_from(file, number, position.segment_offset(), READ_SIZE, &mut bytes)?;
        self.input = bytes.into();
        Ok(true)
    }

    /// What it means that nothing can be read where the framer is: the end, or damage. A record whose beginning is
    /// there and whose rest is not may have begun pages before.
    fn end(&mut self, at: Lsn, error: Option<WalError>) -> Result<Next, VerifyError> {
        self.ended = true;
        let Some(later) = self.valid_page_behind(at)? else { return Ok(Next::End) };
        let path = self.segments.files.get(&at.segment_number()).cloned();
        match (path, error) {
            (Some(path), Some(source)) => Err(VerifyError::Damaged { path, source, later }),
            (Some(_), None) => Err(VerifyError::Internal("WAL ends within a segment without an error")),
            (None, _) => {
                let what = format!("segment {} is missing, but the WAL goes on at {later}", self.name_of(at));
                Err(VerifyError::not_usable(&self.segments.dir, what))
            }
        }
    }

    /// The first page that begins behind `at` and says that it belongs there.
    fn valid_page_behind(&self, at: Lsn) -> Result<Option<Lsn>, VerifyError> {
        for (number, path) in self.segments.files.range(at.segment_number()..) {
            let file = File::open(path).map_err(VerifyError::io(path))?;
            let start = segment_start(*number);
            let behind = if at.page_offset() == 0 { at } else { at.page_start() + WAL_PAGE_SIZE };
            let mut lsn = behind.max(start);
            while lsn.segment_number() == *number {
                let mut header = [0; LONG_HEADER_SIZE];
                if file.read_exact_at(&mut header, lsn.segment_offset()).is_err() {
                    break;
                }
                if PageHeader::decode(&header, lsn).is_ok_and(|header| self.is_ours(&header)) {
                    return Ok(Some(lsn));
                }
                if start > at {
                    break; // of a later segment, the first page tells
                }
                lsn += WAL_PAGE_SIZE;
            }
        }
        Ok(None)
    }

    fn is_ours(&self, header: &PageHeader) -> bool {
        header.major == self.major && header.system_identifier.is_none_or(|found| found == self.system_identifier)
    }
}

impl WalSource for WalDirectory {
    fn major(&self) -> Major {
        self.major
    }

    fn position(&self) -> Lsn {
        self.framer.framed()
    }

    fn next(&mut self) -> Result<Next, VerifyError> {
        while !self.ended {
            match self.framer.next_record(&mut self.input) {
                Ok(Some(record)) => return Ok(Next::Record(record)),
                Ok(None) if self.read()? => {}
                Ok(None) => return self.end(self.framer.position(), None),
                Err(error) => return self.end(self.framer.position(), Some(error)),
            }
        }
        Ok(Next::End)
    }
}

fn segment_start(number: u64) -> Lsn {
    Lsn(number.saturating_mul(WAL_SEGMENT_SIZE))
}

fn first_header(path: &Path, start: Lsn) -> Result<PageHeader, VerifyError> {
    let file = File::open(path).map_err(VerifyError::io(path))?;
    let mut header = [0; LONG_HEADER_SIZE];
    file.read_exact_at(&mut header, 0).map_err(VerifyError::io(path))?;
    PageHeader::decode(&header, start).map_err(|error| VerifyError::not_usable(path, error.to_string()))
}

/// Timeline and number of a segment, by its file's name.
fn tli_and_number(path: &Path) -> Option<(u32, u64)> {
    let name = path.file_name()?.to_str()?;
    if name.len() != 24 || !name.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte)) {
        return None;
    }
    let part = |range| u64::from_str_radix(name.get(range)?, 16).ok();
    let per_id = 0x1_0000_0000 / WAL_SEGMENT_SIZE;
    Some((part(0..8)? as u32, part(8..16)? * per_id + part(16..24)?))
}

/// The segments of a folder, each from the newest timeline that has it; none of an older timeline behind one of a
/// newer.
fn list(dir: &Path) -> Result<BTreeMap<u64, PathBuf>, VerifyError> {
    let mut all: BTreeMap<(u64, u32), PathBuf> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(VerifyError::io(dir))? {
        let path = entry.map_err(VerifyError::io(dir))?.path();
        if let Some((tli, number)) = tli_and_number(&path) {
            all.insert((number, tli), path);
        }
    }
    let mut segments = BTreeMap::new();
    let mut newest = 0;
    for ((number, tli), path) in all {
        if tli >= newest {
            newest = tli;
            segments.insert(number, path);
        }
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_taken_from_the_newest_timeline() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "000000010000000000000001",
            "000000010000000000000002",
            "000000020000000000000002",
            "000000010000000000000003",
            "000000020000000000000003.partial",
            "00000002.history",
            "archive_status",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<String> =
            list(dir.path()).unwrap().values().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["000000010000000000000001", "000000020000000000000002"]);
    }
    #[test]
    fn segments_of_another_size_are_named() {
        let dir = tempfile::tempdir().unwrap();
        // The first of a cluster with segments of 1 MiB begins at 0/100000.
        let header = PageHeader {
            major: Major::V15,
            tli: 1,
            lsn: Lsn(0),
            remaining_len: 0,
            overwrites_contrecord: false,
            system_identifier: Some(7),
        };
        let mut page = header.encode();
        page[8..16].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        page[32..36].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        fs::write(dir.path().join("000000010000000000000001"), page).unwrap();
        let told = WalDirectory::open(dir.path()).unwrap_err().to_string();
        assert!(told.contains("segments of 1048576 bytes"), "{told}");
    }
}
