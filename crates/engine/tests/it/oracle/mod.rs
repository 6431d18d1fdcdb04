//! What the tests of ingest and base backup share: a stock Postgres's WAL in a naive history, and comparisons with its
//! data directory.

#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test uses a part")]

pub mod servers;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use varve_engine::ingest::Ingest;
use varve_engine::template::{Imported, import_data_directory, read_control};
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::page::{self, PAGE_HEADER_SIZE, ZERO_PAGE};
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName};
use varve_postgres::slru::{PAGES_PER_SEGMENT, SlruKind};
use varve_postgres::wal::records::database::{self, DatabaseRecord};
use varve_postgres::wal::{Framer, Record, WalError, rmgr};
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, relation_map};
use varve_redo::mask::rmgr_of_page;
use varve_redo::verify::differences;
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::database::DatabaseEntry;
use varve_storage::history::History;
use varve_storage::key::{Key, KeyKind};
use varve_storage::relation;
use varve_testbed::postgres::{Postgres, wal_segments};
use varve_testing::naive_history::NaiveHistory;

/// Records after which the history is advanced.
const BATCH_RECORDS: usize = 500;
/// Records after which a new ingest takes over; a multiple of the above.
const RECORDS_BETWEEN_OPENS: usize = 5000;
/// Differences that are told one by one.
const TOLD_MAX: usize = 20;

/// A history that holds what a cluster holds.
pub struct Loaded {
    pub history: Arc<NaiveHistory>,
    pub imported: Imported,
    /// Ends of all records that were ingested, ascending.
    pub boundaries: Vec<Lsn>,
    /// Databases that were made block by block in WAL. Postgres writes their visibility maps as pages with a hole, so
    /// what is in them is lost on its own standbys too.
    pub logged_databases: Vec<Oid>,
}

impl Loaded {
    pub fn end(&self) -> Lsn {
        self.history.applied()
    }
}

/// Takes a stopped cluster into a new history.
pub fn import(postgres: &Postgres) -> Result<Loaded> {
    let history = Arc::new(NaiveHistory::new(postgres.major(), Lsn(8)));
    let imported = import_data_directory(&postgres.data_dir(), &*history, &mut |_| {})?;
    Ok(Loaded { history, imported, boundaries: Vec::new(), logged_databases: Vec::new() })
}

/// Ingests what the stopped cluster has written since.
pub fn ingest(postgres: &Postgres, loaded: &mut Loaded) -> Result<()> {
    ingest_opened_every(RECORDS_BETWEEN_OPENS, postgres, loaded)
}

/// Likewise with a new ingest after each `records`.
pub fn ingest_opened_every(records: usize, postgres: &Postgres, loaded: &mut Loaded) -> Result<()> {
    let start = loaded.end();
    let mut ingest = Ingest::open(loaded.history.clone(), start)?;
    let ended = each_record(postgres.major(), &postgres.data_dir().join("pg_wal"), start, &mut |record| {
        ingest.record(&record).with_context(|| format!("ingesting the record at {}", record.start))?;
        loaded.boundaries.push(record.end);
        let decoded = Record::decode(&record.bytes, record.start, record.end, postgres.major())?;
        if decoded.header.rmid == rmgr::DBASE
            && let Ok(DatabaseRecord::CreateWalLog { db, .. }) = database::parse(decoded.kind(), decoded.main_data, postgres.major())
        {
            loaded.logged_databases.push(db);
        }
        if loaded.boundaries.len().is_multiple_of(BATCH_RECORDS) {
            ingest.advance()?;
        }
        if loaded.boundaries.len().is_multiple_of(records) {
            // One that begins anew must know all that it needs from the history.
            ingest = Ingest::open(loaded.history.clone(), ingest.end())?;
        }
        Ok(())
    });
    ingest.advance()?;
    ended?;
    ensure!(ingest.end() == *loaded.boundaries.last().context("the load wrote no WAL")?, "the ingest stands at the last record's end");
    Ok(())
}

/// Calls `visit` for each record from `start` to the end of the WAL in `dir`.
pub fn each_record(
    major: Major,
    dir: &Path,
    start: Lsn,
    visit: &mut dyn FnMut(varve_postgres::wal::FramedRecord) -> Result<()>,
) -> Result<()> {
    let mut framer = Framer::new(major, None, start, None);
    for path in wal_segments(dir)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = u64::from_str_radix(&name[8..16], 16)? * 256 + u64::from_str_radix(&name[16..24], 16)?;
        if number < framer.position().segment_number() {
            continue;
        }
        if number > framer.position().segment_number() {
            break;
        }
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut input = Bytes::from(bytes).slice(framer.position().segment_offset() as usize..);
        loop {
            match framer.next_record(&mut input) {
                Ok(Some(record)) => visit(record)?,
                Ok(None) => break,
                Err(WalError::Record { .. } | WalError::Page { .. }) => return Ok(()), // the end of WAL
                Err(error) => return Err(error).context("reading WAL"),
            }
        }
    }
    Ok(())
}

/// Differences between a stopped data directory and a history at its newest LSN.
pub struct Comparison<'a> {
    pub history: &'a NaiveHistory,
    pub lsn: Lsn,
    pub major: Major,
    pub catalog_version: u32,
    pub compared_blocks: u64,
    logged_databases: &'a [Oid],
    differences: Vec<String>,
    count: usize,
}

impl<'a> Comparison<'a> {
    pub fn new(loaded: &'a Loaded) -> Comparison<'a> {
        Comparison {
            history: &loaded.history,
            lsn: loaded.end(),
            major: loaded.history.major(),
            catalog_version: loaded.imported.cluster.catalog_version,
            compared_blocks: 0,
            logged_databases: &loaded.logged_databases,
            differences: Vec::new(),
            count: 0,
        }
    }

    fn differs(&mut self, what: String) {
        self.count += 1;
        if self.differences.len() < TOLD_MAX {
            self.differences.push(what);
        }
    }

    /// Compares everything; an error lists the differences.
    pub fn data_directory(&mut self, dir: &Path) -> Result<()> {
        self.directory(&dir.join("global"), GLOBAL_TABLESPACE, 0)?;
        let mut databases = numbered(&dir.join("base"))?.into_iter().map(|(db, path)| (DEFAULT_TABLESPACE, db, path)).collect::<Vec<_>>();
        for (spc, path) in numbered(&dir.join("pg_tblspc"))? {
            let known = self.history.get(Key::tablespace(spc), self.lsn)?;
            if known.is_none() {
                self.differs(format!("tablespace {spc} is on disk and not in the history"));
            }
            let inside = path.join(self.major.tablespace_directory(self.catalog_version));
            databases.extend(numbered(&inside)?.into_iter().map(|(db, path)| (spc, db, path)));
        }
        for (spc, db, path) in &databases {
            self.directory(path, *spc, *db)?;
        }
        let at = varve_engine::moments::round_down(self.history, self.lsn, self.lsn, self.lsn)?;
        let mut known = Vec::new();
        let (from, to) = Key::all_of_kind(Key::database(0, 0));
        self.history.scan(from, to, self.lsn, &mut |key, value| {
            if let Some(KeyKind::Database { spc, db }) = key.kind()
                && DatabaseEntry::decode(&value).is_some_and(|entry| entry.exists)
            {
                known.push((spc, db));
            }
            Ok(())
        })?;
        for (spc, db) in known {
            if !databases.iter().any(|(s, d, _)| (*s, *d) == (spc, db)) {
                self.differs(format!("database {spc}/{db} is in the history and not on disk"));
            }
        }
        for area in SlruKind::ALL {
            self.slru(dir, area)?;
        }
        self.control(dir, at.next_xid)?;
        self.two_phase(dir)?;
        if self.count > 0 {
            bail!(
                "{} differences between the data directory and the history at {}:\n{}",
                self.count,
                self.lsn,
                self.differences.join("\n")
            );
        }
        Ok(())
    }

    fn directory(&mut self, dir: &Path, spc: Oid, db: Oid) -> Result<()> {
        let mut on_disk: BTreeMap<RelFork, Vec<(u32, PathBuf)>> = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == relation_map::FILE_NAME {
                let disk = fs::read(entry.path())?;
                let ours = self.history.get(Key::relation_map(spc, db), self.lsn)?.unwrap_or_default();
                if disk[..] != ours[..] {
                    self.differs(format!("the relation map of {spc}/{db}"));
                }
            }
            let Some(parsed) = RelationFileName::parse(&name) else { continue };
            let rel = RelNode { spc, db, rel: parsed.rel }.fork(parsed.fork);
            on_disk.entry(rel).or_default().push((parsed.file_number, entry.path()));
        }
        let mut ours = BTreeMap::new();
        relation::list(self.history, spc, db, self.lsn, &mut |rel, blocks| {
            ours.insert(rel, blocks);
            Ok(())
        })?;
        for rel in ours.keys().filter(|rel| rel.fork != Fork::FreeSpaceMap) {
            if !on_disk.contains_key(rel) {
                self.differs(format!("{rel} is in the history with {} blocks and not on disk", ours[rel]));
            }
        }
        for (rel, files) in &mut on_disk {
            let unlogged = ours.contains_key(&rel.node.fork(Fork::Init)) && rel.fork != Fork::Init;
            if rel.fork == Fork::FreeSpaceMap || unlogged {
                continue;
            }
            files.sort();
            let mut pages = Vec::new();
            for (file_number, path) in files {
                pages.resize(*file_number as usize * BLOCKS_PER_FILE as usize, ZERO_PAGE);
                pages.extend(fs::read(path)?.chunks_exact(BLCKSZ).map(|page| Page::try_from(page).expect("a page")));
            }
            match ours.get(rel) {
                None if pages.iter().all(is_unused) => {} // a fork that was only ever extended
                None => self.differs(format!("{rel} is on disk with {} blocks and not in the history", pages.len())),
                Some(blocks) => self.fork(*rel, *blocks, &pages)?,
            }
        }
        Ok(())
    }

    fn fork(&mut self, rel: RelFork, blocks: u32, disk: &[Page]) -> Result<()> {
        // Postgres extends without WAL, and what it did not use stays zeros.
        let used = disk.iter().rposition(|page| !is_unused(page)).map_or(0, |last| last + 1);
        if (blocks as usize) < used || blocks as usize > disk.len() {
            self.differs(format!("{rel} has {blocks} blocks in the history, and {} on disk of which {used} are used", disk.len()));
        }
        for (block, truth) in (0..blocks).zip(disk) {
            let ours = match relation::block(self.history, rel, block, self.lsn) {
                Ok(page) => page,
                Err(error) => {
                    self.differs(format!("{rel} block {block}: {error}"));
                    continue;
                }
            };
            self.compared_blocks += 1;
            let rmid = rmgr_of_page(truth).unwrap_or(rmgr::HEAP);
            // A sequence's logged values run ahead of those on disk, and an SP-GiST metapage caches last used pages
            // without WAL.
            let not_logged = rmid == rmgr::SEQ || (rmid == rmgr::SPGIST && block == 0);
            if not_logged || ours[..] == truth[..] {
                continue;
            }
            let lossy = rel.fork == Fork::VisibilityMap && self.logged_databases.contains(&rel.node.db);
            if lossy && ours[PAGE_HEADER_SIZE..].iter().zip(&truth[PAGE_HEADER_SIZE..]).all(|(ours, truth)| ours & !truth == 0) {
                continue;
            }
            match differences(self.major, rmid, rel.fork, block, &ours, truth, true) {
                Ok(at) if at.is_empty() => {}
                Ok(at) => self.differs(format!(
                    "{rel} block {block} ({}) differs at {} offsets: {:?}",
                    rmgr::name(rmid),
                    at.len(),
                    &at[..at.len().min(8)]
                )),
                Err(what) => self.differs(format!("{rel} block {block} ({}): {what}", rmgr::name(rmid))),
            }
        }
        Ok(())
    }

    fn slru(&mut self, dir: &Path, area: SlruKind) -> Result<()> {
        let extent = relation::slru_extent(self.history, area, self.lsn)?;
        let mut segments = BTreeMap::new();
        for entry in fs::read_dir(dir.join(area.directory()))? {
            let entry = entry?;
            if let Ok(segment) = u32::from_str_radix(&entry.file_name().to_string_lossy(), 16) {
                segments.insert(segment, fs::read(entry.path())?);
            }
        }
        for pages in extent.intervals() {
            for page in pages.clone() {
                let at = (page % PAGES_PER_SEGMENT) as usize * BLCKSZ;
                let disk = segments.get(&(page / PAGES_PER_SEGMENT)).and_then(|bytes| bytes.get(at..at + BLCKSZ));
                let ours = relation::slru_page(self.history, area, page, self.lsn)?;
                match disk {
                    None => self.differs(format!("{area} page {page} is in the history and not on disk")),
                    Some(disk) if disk != &ours[..] => {
                        let at = disk.iter().zip(&ours[..]).position(|(a, b)| a != b);
                        self.differs(format!("{area} page {page} differs from offset {at:?} on"));
                    }
                    Some(_) => self.compared_blocks += 1,
                }
            }
        }
        for (segment, bytes) in &segments {
            for (page, contents) in (segment * PAGES_PER_SEGMENT..).zip(bytes.chunks_exact(BLCKSZ)) {
                // A file that begins in the middle of a segment has a hole before.
                if !extent.contains(page) && contents.iter().any(|byte| *byte != 0) {
                    self.differs(format!("{area} page {page} is on disk and not in the history"));
                }
            }
        }
        Ok(())
    }

    fn control(&mut self, dir: &Path, next_xid: u64) -> Result<()> {
        let control = read_control(dir, self.major)?;
        let expected = CheckpointFields::of_checkpoint(&control.checkpoint_copy, control.parameters);
        let ours = self.history.get(Key::checkpoint(), self.lsn)?.context("no checkpoint fields")?;
        let ours = CheckpointFields::decode(&ours).context("malformed checkpoint fields")?;
        if (CheckpointFields { next_xid, ..ours }) != expected {
            self.differs(format!("checkpoint fields are {ours:?} with next_xid {next_xid}, expected {expected:?}"));
        }
        Ok(())
    }

    fn two_phase(&mut self, dir: &Path) -> Result<()> {
        let mut ours = BTreeMap::new();
        let (from, to) = Key::all_of_kind(Key::two_phase(0));
        self.history.scan(from, to, self.lsn, &mut |key, value| {
            if let Some(KeyKind::TwoPhase { xid }) = key.kind() {
                ours.insert(varve_postgres::two_phase::file_path(xid, self.major), varve_postgres::two_phase::file(&value));
            }
            Ok(())
        })?;
        let mut disk = BTreeMap::new();
        for entry in fs::read_dir(dir.join("pg_twophase"))? {
            let entry = entry?;
            disk.insert(format!("pg_twophase/{}", entry.file_name().to_string_lossy()), fs::read(entry.path())?);
        }
        if ours != disk {
            self.differs(format!("prepared transactions are {:?}, on disk {:?}", ours.keys(), disk.keys()));
        }
        Ok(())
    }
}

/// Whether nothing was ever put on the page. Pages of a visibility map are initialised when it is extended, without
/// WAL.
fn is_unused(page: &Page) -> bool {
    let mut empty = ZERO_PAGE;
    page::init(&mut empty, 0);
    *page == ZERO_PAGE || *page == empty
}

/// Entries of a directory whose names are numbers.
fn numbered(dir: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry?;
        if let Ok(number) = entry.file_name().to_string_lossy().parse() {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
