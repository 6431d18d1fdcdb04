//! Taking a stopped data directory into a history.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use varve_postgres::control::{ClusterState, ControlFile};
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::lsn::{WAL_SEGMENT_SIZE, wal_segment_name};
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName};
use varve_postgres::slru::{PAGES_PER_SEGMENT, SlruKind};
use varve_postgres::wal::Framer;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, Oid, RelNode, Timestamp, relation_map, replication_origin, two_phase};
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::database::DatabaseEntry;
use varve_storage::history::HistoryWriter;
use varve_storage::key::Key;
use varve_storage::relation_size::RelationSize;
use varve_storage::slru_extent::SlruExtent;
use varve_storage::value::Value;
use varve_storage::wal_index::{Boundary, WalIndexBuilder, page_of};

use super::TemplateError;
use crate::cluster::ClusterFacts;

/// Blocks that are read at a time.
const BLOCKS_AT_ONCE: usize = 64;
/// Segments of WAL that the last checkpoint's record may touch.
const CHECKPOINT_SEGMENTS_MAX: u64 = 2;

/// How far an import is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes of files taken in.
    pub done_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
}

/// What was taken in.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What is the same for all timelines that go on from it.
    pub cluster: ClusterFacts,
    /// The cluster's own identifier.
    pub system_identifier: u64,
    /// Its Postgres timeline.
    pub tli: u32,
    /// The boundary that the history now stands at: the end of the last checkpoint.
    pub end: Boundary,
}

/// Reads `pg_control` of the data directory `dir`, which must be of `major`.
///
/// # Errors
/// When it is not, or the file is damaged.
pub fn read_control(dir: &Path, major: Major) -> Result<ControlFile, TemplateError> {
    let version = read(&dir.join("PG_VERSION"))?;
    let version = String::from_utf8_lossy(&version).trim().to_owned();
    if version != major.to_string() {
        return Err(TemplateError::OtherMajor { dir: dir.to_owned(), found: version, expected: major });
    }
    ControlFile::decode(&read(&dir.join("global/pg_control"))?, major)
        .map_err(|error| TemplateError::Control { dir: dir.to_owned(), error })
}

/// Takes the cluster in `dir`, which was shut down cleanly, into `history`, which is empty and of its major. `progress`
/// is called after each file.
///
/// # Errors
/// When the cluster cannot be taken in, a file cannot be read, or the history cannot be written; the history is then
/// not to be used.
pub fn import_data_directory(
    dir: &Path,
    history: &(impl HistoryWriter + ?Sized),
    progress: &mut dyn FnMut(Progress),
) -> Result<Imported, TemplateError> {
    let major = history.major();
    let control = read_control(dir, major)?;
    if control.state != ClusterState::ShutDown {
        return Err(TemplateError::NotShutDown { dir: dir.to_owned(), state: control.state.name() });
    }
    let cluster = ClusterFacts::of_control(&control).map_err(|what| TemplateError::Unsupported { dir: dir.to_owned(), what })?;
    let end = Boundary {
        end: end_of_checkpoint(dir, &control)?,
        record_start: control.checkpoint,
        next_xid: control.checkpoint_copy.next_xid,
        time_max: Timestamp::MIN,
        time: None,
    };
    let mut import = Import { history, lsn: end.end, major, progress, done: Progress { done_bytes: 0, total_bytes: 0 } };
    import.whole_directory(dir, &cluster, &control, end)?;
    history.advance(end.end);
    Ok(Imported { cluster, system_identifier: control.system_identifier, tli: control.checkpoint_copy.tli, end })
}

/// Where the record of the last checkpoint ends.
fn end_of_checkpoint(dir: &Path, control: &ControlFile) -> Result<Lsn, TemplateError> {
    let start = control.checkpoint;
    let mut framer = Framer::new(control.major, Some(control.system_identifier), start, None);
    for number in start.segment_number()..start.segment_number() + CHECKPOINT_SEGMENTS_MAX {
        let path = dir.join("pg_wal").join(wal_segment_name(control.checkpoint_copy.tli, number));
        let mut input = Bytes::from(read(&path)?);
        if input.len() as u64 != WAL_SEGMENT_SIZE {
            return Err(TemplateError::BadFile { path, what: format!("has {} bytes, expected {WAL_SEGMENT_SIZE}", input.len()) });
        }
        if number == start.segment_number() {
            input = input.slice(start.segment_offset() as usize..);
        }
        match framer.next_record(&mut input) {
            Ok(Some(record)) => return Ok(record.end),
            Ok(None) => {}
            Err(error) => return Err(TemplateError::BadFile { path, what: error.to_string() }),
        }
    }
    Err(TemplateError::Unsupported { dir: dir.to_owned(), what: format!("the record of its last checkpoint at {start} is not whole") })
}

/// A file of a relation.
struct RelationFile {
    path: PathBuf,
    node: RelNode,
    name: RelationFileName,
    bytes: u64,
}

struct Import<'a, H: ?Sized> {
    history: &'a H,
    lsn: Lsn,
    major: Major,
    progress: &'a mut dyn FnMut(Progress),
    done: Progress,
}

impl<H: HistoryWriter + ?Sized> Import<'_, H> {
    fn put(&self, key: Key, value: Value) -> Result<(), TemplateError> {
        Ok(self.history.put(key, self.lsn, value)?)
    }

    fn whole_directory(&mut self, dir: &Path, cluster: &ClusterFacts, control: &ControlFile, end: Boundary) -> Result<(), TemplateError> {
        let mut files = Vec::new();
        self.directory(&dir.join("global"), GLOBAL_TABLESPACE, 0, &mut files)?;
        self.databases(&dir.join("base"), DEFAULT_TABLESPACE, &mut files)?;
        for (name, path) in entries(&dir.join("pg_tblspc"))? {
            let Ok(spc) = name.parse::<Oid>() else { continue };
            let target = fs::read_link(&path).map(|target| target.to_string_lossy().into_owned()).unwrap_or_default();
            self.put(Key::tablespace(spc), Value::Image(target.into_bytes().into()))?;
            self.databases(&path.join(self.major.tablespace_directory(cluster.catalog_version)), spc, &mut files)?;
        }
        self.relations(files)?;
        for area in SlruKind::ALL {
            self.slru(dir, area)?;
        }
        for (name, path) in entries(&dir.join("pg_twophase"))? {
            self.two_phase_file(&name, &path, control)?;
        }
        let origins = dir.join(replication_origin::CHECKPOINT_PATH);
        if let Some(bytes) = read_if_exists(&origins)? {
            for (origin, remote) in replication_origin::decode(&bytes).map_err(|what| TemplateError::BadFile { path: origins, what })? {
                self.put(Key::replication_origin(origin), Value::Image(varve_storage::replication_origin::encode(remote)))?;
            }
        }
        let fields = CheckpointFields::of_checkpoint(&control.checkpoint_copy, control.parameters);
        self.put(Key::checkpoint(), Value::Image(fields.encode()))?;
        let before = Boundary { end: Lsn::INVALID, record_start: Lsn::INVALID, ..end };
        let mut index = WalIndexBuilder::new(page_of(end.end), before);
        index.push(end.end, end.record_start, end.next_xid, None);
        self.put(Key::wal_index(index.page()), Value::Image(index.encode()))
    }

    /// The databases in `dir`, the tablespace `spc`'s part of this server version.
    fn databases(&mut self, dir: &Path, spc: Oid, files: &mut Vec<RelationFile>) -> Result<(), TemplateError> {
        for (name, path) in entries(dir)? {
            if let Ok(db) = name.parse::<Oid>() {
                self.directory(&path, spc, db, files)?;
            }
        }
        Ok(())
    }

    /// One database's directory, or `global`.
    fn directory(&mut self, dir: &Path, spc: Oid, db: Oid, files: &mut Vec<RelationFile>) -> Result<(), TemplateError> {
        if spc != GLOBAL_TABLESPACE {
            self.put(Key::database(spc, db), Value::Image(DatabaseEntry { exists: true, floor: Lsn::INVALID }.encode()))?;
        }
        for (name, path) in entries(dir)? {
            if name == relation_map::FILE_NAME {
                let map = read(&path)?;
                relation_map::decode(&map, self.major).map_err(|what| TemplateError::BadFile { path, what })?;
                self.put(Key::relation_map(spc, db), Value::Image(map.into()))?;
            } else if let Some(parsed) = RelationFileName::parse(&name) {
                let bytes = fs::metadata(&path).map_err(TemplateError::io(&path))?.len();
                files.push(RelationFile { path, node: RelNode { spc, db, rel: parsed.rel }, name: parsed, bytes });
            }
        }
        Ok(())
    }

    fn relations(&mut self, mut files: Vec<RelationFile>) -> Result<(), TemplateError> {
        // A relation with an init fork is unlogged: nothing else of it has a history, and a start makes the rest from
        // that fork.
        let unlogged: std::collections::HashSet<RelNode> =
            files.iter().filter(|file| file.name.fork == Fork::Init).map(|file| file.node).collect();
        files.retain(|file| file.name.fork == Fork::Init || !unlogged.contains(&file.node));
        files.sort_by_key(|file| (file.node, file.name.fork, file.name.file_number));
        self.done.total_bytes = files.iter().map(|file| file.bytes).sum();
        for fork in files.chunk_by(|a, b| a.node == b.node && a.name.fork == b.name.fork) {
            let Some(last) = fork.last() else { continue };
            let rel = last.node.fork(last.name.fork);
            let mut size = RelationSize::default();
            let blocks = u64::from(last.name.file_number) * u64::from(BLOCKS_PER_FILE) + last.bytes / BLCKSZ as u64;
            size.extend(
                u32::try_from(blocks).map_err(|_| TemplateError::BadFile { path: last.path.clone(), what: "too large".to_owned() })?,
            );
            self.put(Key::relation_size(rel), Value::Image(size.encode()))?;
            for file in fork {
                self.blocks_of(file)?;
            }
        }
        Ok(())
    }

    fn blocks_of(&mut self, file: &RelationFile) -> Result<(), TemplateError> {
        let rel = file.node.fork(file.name.fork);
        let open = File::open(&file.path).map_err(TemplateError::io(&file.path))?;
        let first = file.name.file_number * BLOCKS_PER_FILE;
        let blocks = (file.bytes / BLCKSZ as u64) as u32;
        let mut buffer = vec![0; BLOCKS_AT_ONCE * BLCKSZ];
        let mut at = 0;
        while at < blocks {
            let n = (blocks - at).min(BLOCKS_AT_ONCE as u32);
            let bytes = &mut buffer[..n as usize * BLCKSZ];
            open.read_exact_at(bytes, u64::from(at) * BLCKSZ as u64).map_err(TemplateError::io(&file.path))?;
            for (block, page) in (first + at..).zip(bytes.chunks_exact(BLCKSZ)) {
                if page.iter().any(|byte| *byte != 0) {
                    self.put(Key::block(rel, block), Value::Image(Bytes::copy_from_slice(page)))?;
                }
            }
            at += n;
        }
        self.done.done_bytes += file.bytes;
        (self.progress)(self.done);
        Ok(())
    }

    fn slru(&mut self, dir: &Path, area: SlruKind) -> Result<(), TemplateError> {
        let mut extent = SlruExtent::default();
        for (name, path) in entries(&dir.join(area.directory()))? {
            let is_segment = name.len() >= 4 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            let Some(segment) = is_segment.then(|| u32::from_str_radix(&name, 16).ok()).flatten() else { continue };
            let bytes = read(&path)?;
            let pages = bytes.chunks_exact(BLCKSZ);
            let too_many = || TemplateError::BadFile { path: path.clone(), what: format!("is no segment of {area}") };
            let first =
                segment.checked_mul(PAGES_PER_SEGMENT).filter(|_| pages.len() <= PAGES_PER_SEGMENT as usize).ok_or_else(too_many)?;
            extent.insert(first..first + pages.len() as u32);
            for (page, contents) in (first..).zip(pages) {
                if contents.iter().any(|byte| *byte != 0) {
                    self.put(Key::slru_page(area, page), Value::Image(Bytes::copy_from_slice(contents)))?;
                }
            }
        }
        self.put(Key::slru_extent(area), Value::Image(extent.encode()))
    }

    fn two_phase_file(&mut self, name: &str, path: &Path, control: &ControlFile) -> Result<(), TemplateError> {
        let Ok(number) = u64::from_str_radix(name, 16) else { return Ok(()) };
        let next = control.checkpoint_copy.next_xid;
        let xid = if self.major.two_phase_name_has_epoch() {
            number
        } else {
            // Of the next transaction's epoch, or of the one before if it would be later.
            let epoch = if number > next & 0xFFFF_FFFF { (next >> 32).saturating_sub(1) } else { next >> 32 };
            epoch << 32 | number
        };
        let file = read(path)?;
        let bad = |what| TemplateError::BadFile { path: path.to_owned(), what };
        let state = two_phase::state_of_file(&file).map_err(bad)?;
        two_phase::Prepared::decode(state, self.major).map_err(bad)?;
        self.put(Key::two_phase(xid), Value::Image(Bytes::copy_from_slice(state)))
    }
}

/// Names and paths in a directory, sorted; none if there is no such directory.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, TemplateError> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TemplateError::Io { path: dir.to_owned(), error }),
    };
    let mut entries = Vec::new();
    for entry in listing {
        let entry = entry.map_err(TemplateError::io(dir))?;
        entries.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    entries.sort();
    Ok(entries)
}

fn read(path: &Path) -> Result<Vec<u8>, TemplateError> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(TemplateError::io(path))?;
    Ok(bytes)
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>, TemplateError> {
    match read(path) {
        Err(TemplateError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
