//! A data directory that no server runs on, as a source of pages.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use varve_postgres::control::{ClusterState, ControlFile};
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName, relation_file};
use varve_postgres::{BLCKSZ, BlockNumber, Lsn, Major, Oid, Page, RelFork, RelNode, page};
use varve_redo::verify::{BasePages, StoreError};

use crate::VerifyError;

/// Files that are kept open; when there are more, all are closed.
const OPEN_FILES_MAX: usize = 256;

/// A relation fork and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForkSize {
    /// The fork.
    pub rel: RelFork,
    /// Blocks that it has.
    pub blocks: BlockNumber,
}

/// Files by fork and segment number; none where there is no file.
type OpenFiles = HashMap<(RelFork, u32), Option<Arc<File>>>;

/// A data directory, read only.
#[derive(Debug)]
pub struct DataDirectory {
    dir: PathBuf,
    control: ControlFile,
    open: Mutex<OpenFiles>,
}

impl DataDirectory {
    /// Opens the data directory `dir`, which must have been shut down: only then are its files the pages of one moment.
    ///
    /// # Errors
    /// When it is none, is of an unsupported major, or a server runs on it or crashed.
    pub fn open(dir: &Path) -> Result<DataDirectory, VerifyError> {
        let directory = Self::open_in_any_state(dir)?;
        match directory.control.state {
            ClusterState::ShutDown => Ok(directory),
            ClusterState::ShutDownInRecovery => Err(VerifyError::not_usable(
                dir,
                "is a standby's: when one stops, what it replayed since its last restartpoint is not in its files; give its connection string \
                 while it runs, or promote it before it stops",
            )),
            state => Err(VerifyError::not_usable(
                dir,
                format!(
                    "the server that owns it is '{}': its files are not the pages of one moment; stop it with pg_ctl stop -m fast",
                    state.name()
                ),
            )),
        }
    }

    /// The same, whatever became of its server.
    pub(crate) fn open_in_any_state(dir: &Path) -> Result<DataDirectory, VerifyError> {
        let version_path = dir.join("PG_VERSION");
        let version = fs::read_to_string(&version_path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => VerifyError::not_usable(dir, "is no data directory: there is no PG_VERSION in it"),
            _ => VerifyError::Io { path: version_path.clone(), source },
        })?;
        let version = version.trim();
        let major = version.parse().ok().and_then(Major::from_number);
        let major = major.ok_or_else(|| VerifyError::not_usable(dir, format!("is of PostgreSQL {version}; 14 to 18 are supported")))?;
        let path = dir.join("global/pg_control");
        let bytes = fs::read(&path).map_err(VerifyError::io(&path))?;
        let control = ControlFile::decode(&bytes, major).map_err(|error| VerifyError::not_usable(&path, error.to_string()))?;
        Ok(DataDirectory { dir: dir.to_owned(), control, open: Mutex::default() })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Its `pg_control`.
    pub fn control(&self) -> &ControlFile {
        &self.control
    }

    /// Its major.
    pub fn major(&self) -> Major {
        self.control.major
    }

    /// Start of the record of its last checkpoint: its files are the pages of that moment, if it was shut down.
    pub fn checkpoint(&self) -> Lsn {
        self.control.checkpoint
    }

    /// All relation forks, temporary relations left out.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn forks(&self) -> Result<Vec<ForkSize>, VerifyError> {
        let mut forks = BTreeMap::new();
        self.directory(&self.dir.join("global"), GLOBAL_TABLESPACE, 0, &mut forks)?;
        for (db, path) in numbered(&self.dir.join("base"))? {
            self.directory(&path, DEFAULT_TABLESPACE, db, &mut forks)?;
        }
        for (spc, path) in numbered(&self.dir.join("pg_tblspc"))? {
            for (db, path) in numbered(&path.join(self.major().tablespace_directory(self.control.catalog_version)))? {
                self.directory(&path, spc, db, &mut forks)?;
            }
        }
        Ok(forks.into_iter().map(|((node, fork), blocks)| ForkSize { rel: node.fork(fork), blocks }).collect())
    }

    fn directory(
        &self,
        dir: &Path,
        spc: Oid,
        db: Oid,
        forks: &mut BTreeMap<(RelNode, varve_postgres::Fork), BlockNumber>,
    ) -> Result<(), VerifyError> {
        for entry in fs::read_dir(dir).map_err(VerifyError::io(dir))? {
            let entry = entry.map_err(VerifyError::io(dir))?;
            let Some(name) = entry.file_name().to_str().and_then(RelationFileName::parse) else { continue };
            let bytes = entry.metadata().map_err(VerifyError::io(&entry.path()))?.len();
            let blocks = (bytes / BLCKSZ as u64).min(u64::from(BLOCKS_PER_FILE)) as BlockNumber;
            let end = if blocks == 0 { 0 } else { name.file_number.saturating_mul(BLOCKS_PER_FILE).saturating_add(blocks) };
            let known = forks.entry((RelNode { spc, db, rel: name.rel }, name.fork)).or_insert(0);
            *known = end.max(*known);
        }
        Ok(())
    }

    /// Reads block by block from `first` on into `out`, which is as many pages long. What the files do not have is
    /// zeros.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(&self, rel: RelFork, first: BlockNumber, out: &mut [Page]) -> Result<(), VerifyError> {
        for (blkno, page) in (first..).zip(out) {
            *page = self.page_or_none(rel, blkno)?.unwrap_or(page::ZERO_PAGE);
        }
        Ok(())
    }

    fn page_or_none(&self, rel: RelFork, blkno: BlockNumber) -> Result<Option<Page>, VerifyError> {
        let file_number = blkno / BLOCKS_PER_FILE;
        let Some(file) = self.file(rel, file_number)? else { return Ok(None) };
        let mut page = page::ZERO_PAGE;
        match file.read_exact_at(&mut page, u64::from(blkno % BLOCKS_PER_FILE) * BLCKSZ as u64) {
            Ok(()) => Ok(Some(page)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(source) => Err(VerifyError::Io { path: self.file_path(rel, file_number), source }),
        }
    }

    fn file_path(&self, rel: RelFork, file_number: u32) -> PathBuf {
        self.dir.join(relation_file(rel, file_number, self.major(), self.control.catalog_version))
    }

    fn file(&self, rel: RelFork, file_number: u32) -> Result<Option<Arc<File>>, VerifyError> {
        let mut open = self.open.lock();
        if let Some(file) = open.get(&(rel, file_number)) {
            return Ok(file.clone());
        }
        let path = self.file_path(rel, file_number);
        let file = match File::open(&path) {
            Ok(file) => Some(Arc::new(file)),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(source) => return Err(VerifyError::Io { path, source }),
        };
        if open.len() >= OPEN_FILES_MAX {
            open.clear();
        }
        open.insert((rel, file_number), file.clone());
        Ok(file)
    }
}

impl BasePages for DataDirectory {
    fn page(&self, rel: RelFork, blkno: BlockNumber) -> Result<Option<Page>, StoreError> {
        self.page_or_none(rel, blkno).map_err(|error| StoreError(error.to_string()))
    }
}

/// Entries of a directory whose names are numbers; none if it is not there.
fn numbered(dir: &Path) -> Result<Vec<(Oid, PathBuf)>, VerifyError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(VerifyError::Io { path: dir.to_owned(), source }),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(VerifyError::io(dir))?;
        if let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
