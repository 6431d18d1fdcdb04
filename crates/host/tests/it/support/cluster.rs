//! A stopped data directory as the base of a mount.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use varve_host::mount::{BaseSource, InitialContent, InitialFile, MountConfig};
use varve_host::tablespaces::Location;
use varve_postgres::{
    Fork, Major, Oid, RelFork,
    paths::{BLOCKS_PER_FILE, RelationFileName, database_directory, relation_file},
    slru::{self, SlruKind},
};

const BLOCK: usize = 8192;

/// A data directory that nobody writes to, and how often it was asked.
pub(crate) struct StoppedCluster {
    data: PathBuf,
    major: Major,
    catalog_version: u32,
    uid: u32,
    gid: u32,
    files: Mutex<HashMap<String, Arc<File>>>,
    /// The pageserver is away.
    pub(crate) away: AtomicBool,
    /// Time that each call takes, in microseconds.
    pub(crate) delay_us: AtomicU64,
    pub(crate) calls: AtomicU64,
    /// How often each block of a relation was asked.
    pub(crate) asked: Mutex<HashMap<(RelFork, u32), u32>>,
    pub(crate) count_blocks: AtomicBool,
}

impl StoppedCluster {
    /// The cluster in `data`, which was shut down cleanly.
    pub(crate) fn open(data: &Path) -> Arc<StoppedCluster> {
        let version = fs::read_to_string(data.join("PG_VERSION")).expect("PG_VERSION");
        let major = version.trim().parse().ok().and_then(Major::from_number).expect("a major");
        let control = fs::read(data.join("global/pg_control")).expect("pg_control");
        let catalog_version = u32::from_le_bytes(control[12..16].try_into().expect("four bytes"));
        StoppedCluster::new(data, major, catalog_version)
    }

    /// As [`StoppedCluster::open`], for a directory without a control file.
    pub(crate) fn new(data: &Path, major: Major, catalog_version: u32) -> Arc<StoppedCluster> {
        let meta = fs::metadata(data).expect("the cluster's data directory");
        Arc::new(StoppedCluster {
            data: data.to_owned(),
            major,
            catalog_version,
            uid: meta.uid(),
            gid: meta.gid(),
            files: Mutex::default(),
            away: AtomicBool::new(false),
            delay_us: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            asked: Mutex::default(),
            count_blocks: AtomicBool::new(false),
        })
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data
    }

    /// Where a block of the base stands on disk.
    pub(crate) fn path_of(&self, rel: RelFork, block: u32) -> PathBuf {
        self.data.join(relation_file(rel, block / BLOCKS_PER_FILE, self.major, self.catalog_version))
    }

    fn file(&self, path: String) -> io::Result<Arc<File>> {
        if let Some(file) = self.files.lock().get(&path) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(self.data.join(&path))?);
        self.files.lock().insert(path, file.clone());
        Ok(file)
    }

    fn answer(&self) -> io::Result<()> {
        self.calls.fetch_add(1, Relaxed);
        match self.delay_us.load(Relaxed) {
            0 => {}
            delay => std::thread::sleep(Duration::from_micros(delay)),
        }
        if self.away.load(Relaxed) { Err(io::ErrorKind::ConnectionRefused.into()) } else { Ok(()) }
    }

    fn read(&self, rel: RelFork, first: u32, count: u32, into: &mut Vec<u8>) -> io::Result<()> {
        if self.count_blocks.load(Relaxed) {
            let mut asked = self.asked.lock();
            for block in first..first + count {
                *asked.entry((rel, block)).or_default() += 1;
            }
        }
        let mut block = first;
        while block < first + count {
            let in_file = block % BLOCKS_PER_FILE;
            let here = (first + count - block).min(BLOCKS_PER_FILE - in_file);
            let file = self.file(relation_file(rel, block / BLOCKS_PER_FILE, self.major, self.catalog_version))?;
            let start = into.len();
            into.resize(start + here as usize * BLOCK, 0);
            file.read_exact_at(&mut into[start..], u64::from(in_file) * BLOCK as u64)?;
            block += here;
        }
        Ok(())
    }

    fn databases(&self) -> Vec<(Oid, Oid)> {
        let mut databases = Vec::new();
        let mut add = |spc: Oid, dir: &Path| {
            for entry in fs::read_dir(dir).expect("a directory of databases").flatten() {
                if let Some(db) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                    databases.push((spc, db));
                }
            }
        };
        add(1663, &self.data.join("base"));
        for spc in self.tablespaces() {
            add(spc, &self.data.join(format!("pg_tblspc/{spc}/{}", self.major.tablespace_directory(self.catalog_version))));
        }
        databases
    }

    fn tablespaces(&self) -> Vec<Oid> {
        let entries = fs::read_dir(self.data.join("pg_tblspc")).expect("pg_tblspc").flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// A configuration that mounts the cluster: its files that are no relations, and pg_wal as a copy in `wal`.
    pub(crate) fn mount_config(self: &Arc<Self>, mountpoint: &Path, cache: &Path, wal: &Path) -> MountConfig {
        copy_directory(&self.data.join("pg_wal"), wal, self.uid, self.gid);
        let version = (self.major, self.catalog_version);
        let mut config = MountConfig::new("test", mountpoint, cache, version, self.clone());
        config.uid = self.uid;
        config.gid = self.gid;
        config.databases = self.databases();
        config.tablespaces = self.tablespaces().into_iter().map(|spc| (spc, Location::Mount)).collect();
        self.add_files("", &mut config.initial_files);
        for (spc, db) in &config.databases {
            let path = database_directory(*spc, *db, self.major, self.catalog_version);
            if *spc != 1663 {
                self.add_files(&path, &mut config.initial_files);
            }
        }
        config.initial_files.push(InitialFile { path: "pg_wal".to_owned(), mode: 0o777, content: InitialContent::Symlink(wal.to_owned()) });
        config
    }

    fn add_files(&self, dir: &str, files: &mut Vec<InitialFile>) {
        let is_slru = SlruKind::ALL.iter().any(|kind| kind.directory() == dir);
        for entry in fs::read_dir(self.data.join(dir)).expect("a directory of the cluster").flatten() {
            let name = entry.file_name().into_string().expect("plain names");
            let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
            let meta = entry.metadata().expect("metadata");
            let mode = meta.permissions().mode() & 0o7777;
            let left_out = ["pg_wal", "pg_tblspc", "postmaster.pid", "postmaster.opts"].contains(&path.as_str())
                || name == "pg_internal.init"
                || is_slru
                || RelationFileName::parse(&name).is_some() && !meta.is_dir();
            if path == "pg_tblspc" {
                files.push(InitialFile { path: path.clone(), mode, content: InitialContent::Directory });
            }
            if left_out {
                continue;
            }
            if meta.is_dir() {
                files.push(InitialFile { path: path.clone(), mode, content: InitialContent::Directory });
                self.add_files(&path, files);
            } else {
                let contents = fs::read(entry.path()).expect("a file of the cluster");
                files.push(InitialFile { path, mode, content: InitialContent::File(contents.into()) });
            }
        }
    }
}

/// Copies a directory and gives it to `uid`.
pub(crate) fn copy_directory(from: &Path, to: &Path, uid: u32, gid: u32) {
    fs::create_dir_all(to).expect("a directory");
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).expect("its mode");
    chown(to, Some(uid), Some(gid)).expect("its owner");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let target = to.join(entry.file_name());
        let kind = entry.file_type().expect("a file type");
        if kind.is_dir() {
            copy_directory(&entry.path(), &target, uid, gid);
        } else if kind.is_file() {
            fs::copy(entry.path(), &target).expect("a copy");
            chown(&target, Some(uid), Some(gid)).expect("its owner");
        } else if kind.is_symlink() {
            // A tablespace: the copy has it in place.
            let location = fs::read_link(entry.path()).expect("a link");
            copy_directory(&location, &target, uid, gid);
        }
    }
}

impl BaseSource for StoppedCluster {
    fn relations(&self, spc: Oid, db: Oid) -> io::Result<Vec<(Oid, Fork, u32)>> {
        self.answer()?;
        let mut forks: BTreeMap<(Oid, Fork), u32> = BTreeMap::new();
        let directory = database_directory(spc, db, self.major, self.catalog_version);
        for entry in fs::read_dir(self.data.join(directory))?.flatten() {
            if let Some(file) = entry.file_name().to_str().and_then(RelationFileName::parse) {
                *forks.entry((file.rel, file.fork)).or_default() += (entry.metadata()?.len() / BLOCK as u64) as u32;
            }
        }
        Ok(forks.into_iter().map(|((rel, fork), blocks)| (rel, fork, blocks)).collect())
    }

    fn read_blocks(&self, rel: RelFork, first: u32, count: u32) -> io::Result<Bytes> {
        self.answer()?;
        let mut bytes = Vec::with_capacity(count as usize * BLOCK);
        self.read(rel, first, count, &mut bytes)?;
        Ok(bytes.into())
    }

    fn slru_segments(&self, kind: SlruKind) -> io::Result<Vec<(u32, u32)>> {
        self.answer()?;
        let mut segments = Vec::new();
        for entry in fs::read_dir(self.data.join(kind.directory()))?.flatten() {
            if let Some(segno) = entry.file_name().to_str().and_then(|name| u32::from_str_radix(name, 16).ok()) {
                segments.push((segno, (entry.metadata()?.len() / BLOCK as u64) as u32));
            }
        }
        Ok(segments)
    }

    fn read_slru(&self, kind: SlruKind, segno: u32, first: u32, count: u32) -> io::Result<Bytes> {
        self.answer()?;
        let file = self.file(format!("{}/{}", kind.directory(), slru::segment_name(segno)))?;
        let mut bytes = vec![0; count as usize * BLOCK];
        file.read_exact_at(&mut bytes, u64::from(first) * BLOCK as u64)?;
        Ok(bytes.into())
    }

    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
        self.answer()?;
        let read = |&(rel, block): &(RelFork, u32)| {
            let mut bytes = Vec::with_capacity(BLOCK);
            self.read(rel, block, 1, &mut bytes).map(|()| bytes.into())
        };
        blocks.iter().map(read).collect()
    }
}
