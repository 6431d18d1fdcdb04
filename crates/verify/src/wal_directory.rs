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
use varve_postgres::lsn::WAL_PAGE_SIZE;
use varve_postgres::wal::{Framer, LONG_HEADER_SIZE, PageHeader, SegmentSize, WalError};
use varve_postgres::{Lsn, Major};

use crate::VerifyError;
use crate::wal::{Next, WalSource};

/// Bytes that are read at a time.
const READ_SIZE: usize = 1 << 20;

/// The segment files of a folder.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    /// As their first pages say.
    size: SegmentSize,
    /// By number.
    files: BTreeMap<u64, PathBuf>,
}

impl Segments {
    /// Those of a `pg_wal` folder, or of the data directory `path`.
    pub(crate) fn list(path: &Path) -> Result<Segments, VerifyError> {
        let inside = path.join("pg_wal");
        let dir = if inside.is_dir() { inside } else { path.to_owned() };
        let (size, files) = list(&dir)?;
        Ok(Segments { dir, size, files })
    }

    /// Their size.
    pub(crate) fn size(&self) -> SegmentSize {
        self.size
    }

    fn open(&self, number: u64) -> Result<Option<File>, VerifyError> {
        self.files.get(&number).map(|path| File::open(path).map_err(VerifyError::io(path))).transpose()
    }

    /// Makes `bytes` the WAL from `start` on, up to `max` bytes of its segment. Whether the segment is there.
    pub(crate) fn read_into(&self, start: Lsn, max: usize, bytes: &mut Vec<u8>) -> Result<bool, VerifyError> {
        let number = self.size.number(start);
        let Some(file) = self.open(number)? else { return Ok(false) };
        self.read_from(&file, number, self.size.offset(start), max, bytes).map(|()| true)
    }

    fn read_from(&self, file: &File, number: u64, offset: u64, max: usize, bytes: &mut Vec<u8>) -> Result<(), VerifyError> {
        let left = usize::try_from(self.size.bytes().saturating_sub(offset)).unwrap_or(usize::MAX);
        bytes.resize(left.min(max), 0);
        match file.read_exact_at(bytes, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                let what = format!("is shorter than the {} bytes of a WAL segment here", self.size.bytes());
                Err(VerifyError::not_usable(&self.path(number), what))
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
        let (size, start) = (segments.size, segments.size.start(*number));
        let header = PageHeader::decode_in(size, &first_header(first)?, start);
        let header = header.map_err(|error| VerifyError::not_usable(first, error.to_string()))?;
        let (major, system_identifier) = (header.major, header.system_identifier.unwrap_or_default());
        let framer = Framer::from_page(major, Some(system_identifier), start).with_segments(size);
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
        let size = self.segments.size;
        if !self.segments.files.contains_key(&size.number(start)) {
            let oldest = self.segments.files.first_key_value().map_or(Lsn::INVALID, |(number, _)| size.start(*number));
            let what = format!("WAL at {start} is not there: segment {} is missing; what is there begins at {oldest}", self.name_of(start));
            return Err(VerifyError::not_usable(&self.segments.dir, what));
        }
        self.framer = Framer::from_page(self.major, Some(self.system_identifier), start.page_start()).with_segments(size);
        self.input = Bytes::new();
        self.ended = false;
        Ok(())
    }

    /// Bytes of WAL in the folder from here on, at most; what is at the end may be no WAL.
    pub fn bytes_left_max(&self) -> u64 {
        let end = self.segments.files.last_key_value().map_or(Lsn::INVALID, |(number, _)| self.segments.size.start(number + 1));
        end.distance_from(self.framer.position())
    }

    fn name_of(&self, lsn: Lsn) -> String {
        let tli = self.segments.files.values().next_back().and_then(|path| Name::of(path)).map_or(1, |name| name.tli);
        self.segments.size.name(tli, self.segments.size.number(lsn))
    }

    /// Reads on; whether there was anything.
    fn read(&mut self) -> Result<bool, VerifyError> {
        let position = self.framer.position();
        let number = self.segments.size.number(position);
        if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
            self.open = self.segments.open(number)?.map(|file| (number, file));
        }
        let Some((_, file)) = &self.open else { return Ok(false) };
        let mut bytes = Vec::new();
        self.segments.read_from(file, number, self.segments.size.offset(position), READ_SIZE, &mut bytes)?;
        self.input = bytes.into();
        Ok(true)
    }

    /// What it means that nothing can be read where the framer is: the end, or damage. A record whose beginning is
    /// there and whose rest is not may have begun pages before.
    fn end(&mut self, at: Lsn, error: Option<WalError>) -> Result<Next, VerifyError> {
        self.ended = true;
        let Some(later) = self.valid_page_behind(at)? else { return Ok(Next::End) };
        let path = self.segments.files.get(&self.segments.size.number(at)).cloned();
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
        let size = self.segments.size;
        for (number, path) in self.segments.files.range(size.number(at)..) {
            let file = File::open(path).map_err(VerifyError::io(path))?;
            let start = size.start(*number);
            let behind = if at.page_offset() == 0 { at } else { at.page_start() + WAL_PAGE_SIZE };
            let mut lsn = behind.max(start);
            while size.number(lsn) == *number {
                let mut header = [0; LONG_HEADER_SIZE];
                if file.read_exact_at(&mut header, size.offset(lsn)).is_err() {
                    break;
                }
                if PageHeader::decode_in(size, &header, lsn).is_ok_and(|header| self.is_ours(&header)) {
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

/// The first bytes of a segment.
fn first_header(path: &Path) -> Result<[u8; LONG_HEADER_SIZE], VerifyError> {
    let file = File::open(path).map_err(VerifyError::io(path))?;
    let mut header = [0; LONG_HEADER_SIZE];
    file.read_exact_at(&mut header, 0).map_err(VerifyError::io(path))?;
    Ok(header)
}

/// What a segment file's name says. The number that its halves stand for depends on the size of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    halves: (u32, u32),
    tli: u32,
}

impl Name {
    fn of(path: &Path) -> Option<Name> {
        let name = path.file_name()?.to_str()?;
        if name.len() != 24 || !name.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte)) {
            return None;
        }
        let part = |range| u32::from_str_radix(name.get(range)?, 16).ok();
        Some(Name { tli: part(0..8)?, halves: (part(8..16)?, part(16..24)?) })
    }
}

/// The segments of a folder, each from the newest timeline that has it; none of an older timeline behind one of a
/// newer. And their size, as the oldest's first page says; one that says another is named. What is kept ready under a
/// future name may say nothing.
fn list(dir: &Path) -> Result<(SegmentSize, BTreeMap<u64, PathBuf>), VerifyError> {
    let mut all: BTreeMap<Name, PathBuf> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(VerifyError::io(dir))? {
        let path = entry.map_err(VerifyError::io(dir))?.path();
        if let Some(name) = Name::of(&path) {
            all.insert(name, path);
        }
    }
    let Some(oldest) = all.values().next() else { return Ok((SegmentSize::VARVE, BTreeMap::new())) };
    let size = PageHeader::segment_size(&first_header(oldest)?);
    let size = size.map_err(|error| VerifyError::not_usable(oldest, error.to_string()))?;
    let of_others = |what: String| format!("{what}; {} says that segments have {} bytes", oldest.display(), size.bytes());
    let mut segments = BTreeMap::new();
    let mut newest = 0;
    for (Name { halves, tli }, path) in &all {
        let number = size.number_of_name(*halves);
        let number = number.ok_or_else(|| VerifyError::not_usable(path, of_others("there is no such segment".to_owned())))?;
        if let Ok(other) = first_header(path)
            .map_err(|error| error.to_string())
            .and_then(|header| PageHeader::segment_size(&header).map_err(|error| error.to_string()))
            && other != size
        {
            return Err(VerifyError::not_usable(path, of_others(format!("its first page says {} bytes", other.bytes()))));
        }
        if *tli >= newest {
            newest = *tli;
            segments.insert(number, path.clone());
        }
    }
    Ok((size, segments))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first page's header of a segment, which says how large segments are.
    fn header(start: u64, size: u32) -> Vec<u8> {
        let lsn = Lsn(0);
        let header =
            PageHeader { major: Major::V15, tli: 1, lsn, remaining_len: 0, overwrites_contrecord: false, system_identifier: Some(7) };
        let mut page = header.encode();
        page[8..16].copy_from_slice(&start.to_le_bytes());
        page[32..36].copy_from_slice(&size.to_le_bytes());
        page
    }

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
            fs::write(dir.path().join(name), header(0x100_0000, 0x100_0000)).unwrap();
        }
        let (_, files) = list(dir.path()).unwrap();
        let names: Vec<String> = files.values().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["000000010000000000000001", "000000020000000000000002"]);
    }

    #[test]
    fn segments_that_do_not_belong_together_are_named() {
        let open = |second: &str, page: Vec<u8>| {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("000000010000000000000001"), header(0x10_0000, 0x10_0000)).unwrap();
            fs::write(dir.path().join(second), page).unwrap();
            WalDirectory::open(dir.path()).map(|wal| wal.segments.size.bytes()).map_err(|error| error.to_string())
        };
        assert_eq!(open("000000010000000000000002", header(0x20_0000, 0x10_0000)), Ok(0x10_0000));
        assert_eq!(open("000000010000000000000002", vec![0; LONG_HEADER_SIZE]), Ok(0x10_0000), "kept ready");
        let told = open("000000010000000000000002", header(0x200_0000, 0x100_0000)).unwrap_err();
        assert!(told.contains("000000000002: its first page says 16777216 bytes") && told.contains("have 1048576 bytes"), "{told}");
        let told = open("000000010000000000001000", header(0, 0x10_0000)).unwrap_err();
        assert!(told.contains("000000001000: there is no such segment"), "{told}");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("000000010000000000000001"), header(0x30_0000, 0x30_0000)).unwrap();
        let told = WalDirectory::open(dir.path()).unwrap_err().to_string();
        assert!(told.contains("segments of 3145728 bytes") && told.contains("1 MiB to 1 GiB"), "{told}");
    }
}
