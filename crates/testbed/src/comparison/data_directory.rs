//! A data directory on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use varve_postgres::control::ControlFile;
use varve_postgres::ids::DEFAULT_TABLESPACE;
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName, database_directory};
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, BlockNumber, Major, Oid, Page, RelFork, RelNode};

use super::{Cluster, SHARED};

/// The files of a server that is stopped, or has just made a checkpoint with nobody writing.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    major: Major,
    control: ControlFile,
}

impl DataDirectory {
    /// Reads which cluster it is.
    ///
    /// # Errors
    /// When it is no data directory of a supported major.
    pub fn open(path: &Path) -> Result<DataDirectory> {
        let version = fs::read_to_string(path.join("PG_VERSION")).with_context(|| format!("{} is no data directory", path.display()))?;
        let major = version.trim().parse().ok().and_then(Major::from_number).with_context(|| format!("unknown major {version:?}"))?;
        let control = fs::read(path.join("global/pg_control")).context("reading pg_control")?;
        Ok(DataDirectory { path: path.to_owned(), major, control: ControlFile::decode(&control, major)? })
    }

    /// Its major.
    pub fn major(&self) -> Major {
        self.major
    }

    /// Its `pg_control`.
    pub fn control(&self) -> &ControlFile {
        &self.control
    }

    /// All databases' directories: tablespace and database, the shared relations' first.
    ///
    /// # Errors
    /// When the directories cannot be read.
    pub fn databases(&self) -> Result<Vec<(Oid, Oid)>> {
        let mut found = vec![SHARED];
        found.extend(numbered(&self.path.join("base"))?.into_iter().map(|db| (DEFAULT_TABLESPACE, db)));
        for spc in numbered(&self.path.join("pg_tblspc"))? {
            let inside = self.major.tablespace_directory(self.control.catalog_version);
            found.extend(numbered(&self.path.join(format!("pg_tblspc/{spc}/{inside}")))?.into_iter().map(|db| (spc, db)));
        }
        Ok(found)
    }

    fn directory(&self, spc: Oid, db: Oid) -> PathBuf {
        self.path.join(database_directory(spc, db, self.major, self.control.catalog_version))
    }

    /// The files that are no relations and no SLRU segments, and that every copy of the cluster must have just so:
    /// versions and relation maps of databases, prepared transactions, progress of replication origins.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn small_files(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut paths = vec!["PG_VERSION".to_owned(), "pg_logical/replorigin_checkpoint".to_owned()];
        for (spc, db) in self.databases()? {
            let directory = database_directory(spc, db, self.major, self.control.catalog_version);
            paths.push(format!("{directory}/PG_VERSION"));
            paths.push(format!("{directory}/pg_filenode.map"));
        }
        for entry in fs::read_dir(self.path.join("pg_twophase"))? {
            paths.push(format!("pg_twophase/{}", entry?.file_name().to_string_lossy()));
        }
        let mut files = BTreeMap::new();
        for path in paths {
            match fs::read(self.path.join(&path)) {
                Ok(bytes) => files.insert(path, bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(error).with_context(|| format!("reading {path}")),
            };
        }
        Ok(files)
    }
}

impl Cluster for DataDirectory {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn forks(&self, spc: Oid, db: Oid) -> Result<BTreeMap<RelFork, BlockNumber>> {
        let mut forks = BTreeMap::new();
        let directory = self.directory(spc, db);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(forks),
            entries => entries.with_context(|| format!("reading {}", directory.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            let Some(file) = entry.file_name().to_str().and_then(RelationFileName::parse) else { continue };
            let bytes = entry.metadata()?.len();
            if bytes % BLCKSZ as u64 != 0 {
                bail!("{} has {bytes} bytes, which are no whole blocks", entry.path().display());
            }
            let blocks = file.file_number * BLOCKS_PER_FILE + (bytes / BLCKSZ as u64) as BlockNumber;
            let known = forks.entry(RelNode { spc, db, rel: file.rel }.fork(file.fork)).or_insert(0);
            *known = blocks.max(*known);
        }
        Ok(forks)
    }

    fn pages(&self, rel: RelFork, blocks: BlockNumber) -> Result<Vec<Page>> {
        let mut pages = Vec::with_capacity(blocks as usize);
        for number in 0..blocks.div_ceil(BLOCKS_PER_FILE) {
            let name = varve_postgres::paths::relation_file(rel, number, self.major, self.control.catalog_version);
            let bytes = fs::read(self.path.join(&name)).with_context(|| format!("reading {name}"))?;
            pages.extend_from_slice(bytes.as_chunks().0);
        }
        pages.truncate(blocks as usize);
        Ok(pages)
    }

    fn slru(&self, area: SlruKind) -> Result<BTreeMap<u32, Vec<Page>>> {
        let mut segments = BTreeMap::new();
        for entry in fs::read_dir(self.path.join(area.directory()))? {
            let entry = entry?;
            if let Ok(segno) = u32::from_str_radix(&entry.file_name().to_string_lossy(), 16) {
                segments.insert(segno, fs::read(entry.path())?.as_chunks().0.to_vec());
            }
        }
        Ok(segments)
    }
}

/// Entries of a directory whose names are numbers, in order.
fn numbered(dir: &Path) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        found.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}
