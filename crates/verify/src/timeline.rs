//! Compares every page of a branch at an LSN with what Postgres itself has.
//!
//! Pages are masked as Postgres masks them in its own consistency check. Beyond that, some may differ without either
//! being wrong, and are counted apart ([`Allowed`]):
//! - free-space maps: hints, which a server keeps without WAL;
//! - sequences: WAL runs up to 32 values ahead of the page of the server that wrote it, so two pages of one LSN may
//!   differ;
//! - visibility maps with fewer bits than Postgres's: it logs the maps of a database made block by block as if their
//!   bits were a page's hole, so its own standbys lose them, too, unless they began with a copy made later.
//!
//! Pages that nothing was ever put on are equal to ones that are not there: Postgres extends relations without WAL.
//! Unlogged relations have no pages but those of their init fork.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use varve_postgres::control::ControlFile;
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::page::{self, PAGE_HEADER_SIZE, ZERO_PAGE};
use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork};
use varve_protocol::client::{BaseBackup, BaseBackupOptions, BlockingOptions, BlockingPageClient};
use varve_protocol::{ClientError, ConnectConfig, ReadLsn};
use varve_redo::mask::{mask_page, rmgr_of_page};
use varve_redo::verify::file_differences;

use crate::{DataDirectory, ForkSize, Standby, VerifyError};

/// Blocks that are compared at a time: 4 MiB.
const CHUNK_BLOCKS: BlockNumber = 512;
/// Threads that compare; most of the time they wait.
const THREADS: usize = 4;
/// Differences that are told in full; the rest is counted.
const DIFFERENCES_KEPT_MAX: usize = 100;
/// Offsets that are told of one page.
const OFFSETS_KEPT_MAX: usize = 64;
/// How long the page service may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// What a branch is compared with.
#[derive(Debug)]
pub enum Reference {
    /// The stopped server that wrote the WAL, or whose files came from the branch.
    Directory(DataDirectory),
    /// A paused standby.
    Standby(Standby),
    /// Nothing: only that each page can be read and is sound.
    Nothing,
}

impl Reference {
    /// The moment of its pages.
    pub fn at(&self) -> Option<Lsn> {
        match self {
            Reference::Directory(directory) => Some(directory.checkpoint()),
            Reference::Standby(standby) => Some(standby.at()),
            Reference::Nothing => None,
        }
    }

    fn forks(&self) -> Result<Vec<ForkSize>, VerifyError> {
        match self {
            Reference::Directory(directory) => directory.forks(),
            Reference::Standby(standby) => standby.forks(),
            Reference::Nothing => Ok(Vec::new()),
        }
    }

    fn read(&self, rel: RelFork, first: BlockNumber, out: &mut [Page]) -> Result<(), VerifyError> {
        match self {
            Reference::Directory(directory) => directory.read(rel, first, out),
            Reference::Standby(standby) => standby.read(rel, first, out),
            Reference::Nothing => Ok(()),
        }
    }

    /// Checks that it is of this cluster.
    ///
    /// # Errors
    /// When it is of another.
    pub fn check_cluster(&self, pg_version: u32, system_identifier: u64) -> Result<(), VerifyError> {
        let (found, major) = match self {
            Reference::Directory(directory) => (directory.control().system_identifier, directory.major()),
            Reference::Standby(standby) => (standby.system_identifier(), standby.major()),
            Reference::Nothing => return Ok(()),
        };
        if (found, major.number()) == (system_identifier, pg_version) {
            return Ok(());
        }
        let what = format!(
            "is another cluster: {major:?} with system identifier {found}; the branch is PostgreSQL {pg_version} with {system_identifier}"
        );
        Err(match self {
            Reference::Directory(directory) => VerifyError::not_usable(directory.path(), what),
            Reference::Standby(standby) => VerifyError::Server { server: standby.server().to_owned(), what },
            Reference::Nothing => VerifyError::Internal("nothing is no cluster"),
        })
    }
}

/// A branch at a moment, on a page service.
#[derive(Debug, Clone)]
pub struct Branch {
    /// The page service.
    pub connect: ConnectConfig,
    /// Tenant, by name or id.
    pub tenant: String,
    /// Timeline, by id or by its branch's name.
    pub timeline: String,
    /// The moment.
    pub lsn: Lsn,
}

/// Pages that differ without either being wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Allowed {
    /// Pages of free-space maps.
    pub free_space_map: u64,
    /// Pages of visibility maps that have fewer bits than Postgres's.
    pub visibility_map: u64,
    /// Pages of sequences.
    pub sequence: u64,
}

/// A page or fork that is not as it must be.
#[derive(Debug, Clone, Serialize)]
pub struct PageDifference {
    /// Relation fork, tablespace/database/file number.
    pub relation: String,
    /// Block; none if it is about the whole fork.
    pub block: Option<BlockNumber>,
    /// In words.
    pub what: String,
    /// Offsets of the first bytes that differ.
    pub differs_at: Vec<u16>,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct TimelineReport {
    /// The moment.
    pub lsn: String,
    /// Relation forks.
    pub forks: u64,
    /// Pages compared (or only read, if there was nothing to compare with).
    pub pages: u64,
    /// Forks of unlogged relations, which have no history.
    pub unlogged_forks: u64,
    /// Pages that differ without either being wrong.
    pub allowed: Allowed,
    /// Pages and forks that differ.
    pub differences: u64,
    /// Whether there was something to compare and all of it was as it must be.
    pub matched: bool,
    /// Whether the work was stopped before its end.
    pub stopped: bool,
    /// The first differences.
    pub first_differences: Vec<PageDifference>,
}

/// How far the work is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Pages done.
    pub pages: u64,
    /// Of so many.
    pub total: u64,
    /// Differences so far.
    pub differences: u64,
}

/// Compares all of `branch` with `reference`. `progress` is called now and then.
///
/// # Errors
/// When one of them cannot be read as a whole; a page of the branch that cannot be read is a difference.
pub fn compare(
    branch: &Branch,
    reference: &Reference,
    stop: &AtomicBool,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<TimelineReport, VerifyError> {
    let outline = Outline::of_branch(branch)?;
    reference.check_cluster(outline.control.major.number(), outline.control.system_identifier)?;
    let options =
        BlockingOptions { sessions_max: THREADS, answer_timeout: SILENCE_MAX, retry_for: SILENCE_MAX, ..BlockingOptions::default() };
    let client = BlockingPageClient::new(branch.connect.clone(), &branch.tenant, &branch.timeline, options);
    let theirs = reference.forks()?;
    let mut directories = outline.directories.clone();
    directories.extend(theirs.iter().map(|fork| (fork.rel.node.spc, fork.rel.node.db)));
    let mut ours = Vec::new();
    for (spc, db) in directories {
        let listed = client.list_relations(spc, db, ReadLsn::at(branch.lsn))?;
        let node = |rel| varve_postgres::RelNode { spc, db, rel };
        ours.extend(listed.into_iter().map(|listed| ForkSize { rel: node(listed.rel).fork(listed.fork), blocks: listed.blocks }));
    }
    let work = Work::plan(&ours, &theirs, matches!(reference, Reference::Nothing));
    let comparison = Comparison { client: &client, lsn: branch.lsn, major: outline.control.major, reference, found: Mutex::default() };
    {
        let mut found = comparison.found.lock();
        found.lsn = branch.lsn.to_string();
        found.forks = work.forks;
        found.unlogged_forks = work.unlogged_forks;
    }
    let next = std::sync::atomic::AtomicUsize::new(0);
    let failed: Mutex<Option<VerifyError>> = Mutex::default();
    let worker = || {
        while let Some(chunk) = work.chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) || failed.lock().is_some() {
                return;
            }
            if let Err(error) = comparison.chunk(chunk) {
                failed.lock().get_or_insert(error);
                return;
            }
            let found = comparison.found.lock();
            progress(Progress { pages: found.pages, total: work.pages, differences: found.differences });
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..THREADS {
            scope.spawn(worker);
        }
        worker();
    });
    if let Some(error) = failed.into_inner() {
        return Err(error);
    }
    let mut report = comparison.found.into_inner();
    report.stopped = stop.load(Ordering::Relaxed);
    report.matched = report.differences == 0 && report.pages > 0 && !report.stopped;
    Ok(report)
}

/// What a branch is, without its pages: read from its base backup, which names its databases.
#[derive(Debug)]
struct Outline {
    control: ControlFile,
    /// Tablespace and database of each directory.
    directories: BTreeSet<(Oid, Oid)>,
}

impl Outline {
    fn of_branch(branch: &Branch) -> Result<Outline, VerifyError> {
        let options = BaseBackupOptions { no_slru: true, ..BaseBackupOptions::default() };
        let backup = BaseBackup::start(&branch.connect, &branch.tenant, &branch.timeline, Some(branch.lsn), options, SILENCE_MAX)?;
        let server = branch.connect.endpoint.to_string();
        let wrong = |what: String| VerifyError::Server { server: server.clone(), what };
        let unreadable = |error: std::io::Error| wrong(format!("the base backup at {} cannot be read: {error}", branch.lsn));
        let (mut control, mut version) = (Vec::new(), String::new());
        let mut directories = BTreeSet::from([(GLOBAL_TABLESPACE, 0)]);
        let mut archive = tar::Archive::new(backup);
        for entry in archive.entries().map_err(unreadable)? {
            let mut entry = entry.map_err(unreadable)?;
            let path = entry.path().map_err(unreadable)?.into_owned();
            match path.to_str() {
                Some("PG_VERSION") => drop(entry.read_to_string(&mut version).map_err(unreadable)?),
                Some("global/pg_control") => drop(entry.read_to_end(&mut control).map_err(unreadable)?),
                _ => directories.extend(database_of(&path)),
            }
        }
        let major = version.trim().parse().ok().and_then(Major::from_number);
        let major = major.ok_or_else(|| wrong(format!("the branch is of PostgreSQL '{}'", version.trim())))?;
        let control = ControlFile::decode(&control, major).map_err(|error| wrong(format!("the branch's pg_control: {error}")))?;
        Ok(Outline { control, directories })
    }
}

/// Tablespace and database, if `path` is the `PG_VERSION` of a database's directory.
fn database_of(path: &Path) -> Option<(Oid, Oid)> {
    let parts: Vec<&str> = path.to_str()?.split('/').collect();
    match parts[..] {
        ["base", db, "PG_VERSION"] => Some((DEFAULT_TABLESPACE, db.parse().ok()?)),
        ["pg_tblspc", spc, _, db, "PG_VERSION"] => Some((spc.parse().ok()?, db.parse().ok()?)),
        _ => None,
    }
}

/// A range of blocks to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    rel: RelFork,
    first: BlockNumber,
    count: BlockNumber,
    /// Blocks of the fork here and there; none if it does not exist.
    ours: Option<BlockNumber>,
    theirs: Option<BlockNumber>,
}

#[derive(Debug, Default)]
struct Work {
    chunks: Vec<Chunk>,
    forks: u64,
    unlogged_forks: u64,
    pages: u64,
}

impl Work {
    fn plan(ours: &[ForkSize], theirs: &[ForkSize], alone: bool) -> Work {
        type Sizes = (Option<BlockNumber>, Option<BlockNumber>);
        let mut forks: BTreeMap<(varve_postgres::RelNode, Fork), Sizes> = BTreeMap::new();
        for fork in ours {
            forks.entry((fork.rel.node, fork.rel.fork)).or_default().0 = Some(fork.blocks);
        }
        for fork in theirs {
            forks.entry((fork.rel.node, fork.rel.fork)).or_default().1 = Some(fork.blocks);
        }
        let mut work = Work::default();
        for (&(node, fork), &(ours, theirs)) in &forks {
            if fork != Fork::Init && forks.contains_key(&(node, Fork::Init)) {
                work.unlogged_forks += 1;
                continue;
            }
            work.forks += 1;
            let blocks = if alone { ours.unwrap_or(0) } else { ours.unwrap_or(0).max(theirs.unwrap_or(0)) };
            work.pages += u64::from(blocks);
            let mut first = 0;
            while first < blocks {
                let count = (blocks - first).min(CHUNK_BLOCKS);
                work.chunks.push(Chunk { rel: node.fork(fork), first, count, ours, theirs });
                first += count;
            }
        }
        work
    }
}

/// What became of a page.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Equal,
    Allowed(Allowed),
    Differs { what: String, at: Vec<u16> },
}

impl Verdict {
    fn differs(what: impl Into<String>) -> Verdict {
        Verdict::Differs { what: what.into(), at: Vec::new() }
    }
}

struct Comparison<'a> {
    client: &'a BlockingPageClient,
    lsn: Lsn,
    major: Major,
    reference: &'a Reference,
    found: Mutex<TimelineReport>,
}

impl Comparison<'_> {
    fn chunk(&self, chunk: &Chunk) -> Result<(), VerifyError> {
        let mut theirs = vec![ZERO_PAGE; chunk.count as usize];
        if let Some(blocks) = chunk.theirs {
            let there = blocks.saturating_sub(chunk.first).min(chunk.count) as usize;
            self.reference.read(chunk.rel, chunk.first, &mut theirs[..there])?;
        }
        let mut unreadable = BTreeMap::new();
        let ours = self.ours(chunk, &mut unreadable)?;
        let mut verdicts = Vec::new();
        for (blkno, (ours, theirs)) in (chunk.first..).zip(ours.iter().zip(&theirs)) {
            let verdict = match unreadable.remove(&blkno) {
                Some(what) => Verdict::differs(format!("cannot be read: {what}")),
                None => self.page(chunk, blkno, ours, theirs),
            };
            if verdict != Verdict::Equal {
                verdicts.push((blkno, verdict));
            }
        }
        self.note(chunk, verdicts);
        Ok(())
    }

    fn note(&self, chunk: &Chunk, verdicts: Vec<(BlockNumber, Verdict)>) {
        let mut found = self.found.lock();
        found.pages += u64::from(chunk.count);
        for (blkno, verdict) in verdicts {
            match verdict {
                Verdict::Equal => {}
                Verdict::Allowed(allowed) => {
                    found.allowed.free_space_map += allowed.free_space_map;
                    found.allowed.visibility_map += allowed.visibility_map;
                    found.allowed.sequence += allowed.sequence;
                }
                Verdict::Differs { what, mut at } => {
                    found.differences += 1;
                    at.truncate(OFFSETS_KEPT_MAX);
                    if found.first_differences.len() < DIFFERENCES_KEPT_MAX {
                        found.first_differences.push(PageDifference {
                            relation: chunk.rel.to_string(),
                            block: Some(blkno),
                            what,
                            differs_at: at,
                        });
                    }
                }
            }
        }
    }

    /// The branch's pages of a chunk; those behind the fork's end are zeros, those that cannot be read are in
    /// `unreadable`.
    fn ours(&self, chunk: &Chunk, unreadable: &mut BTreeMap<BlockNumber, String>) -> Result<Vec<Page>, VerifyError> {
        let mut pages = vec![ZERO_PAGE; chunk.count as usize];
        let here = chunk.ours.unwrap_or(0).saturating_sub(chunk.first).min(chunk.count);
        if here == 0 {
            return Ok(pages);
        }
        let at = ReadLsn::at(self.lsn);
        match self.client.page_range(chunk.rel, chunk.first, here, at) {
            Ok(bytes) => {
                for (page, bytes) in pages.iter_mut().zip(bytes.chunks_exact(BLCKSZ)) {
                    page.copy_from_slice(bytes);
                }
            }
            Err(ClientError::Answer(_)) => {
                for (blkno, page) in (chunk.first..chunk.first + here).zip(&mut pages) {
                    match self.client.get_page(chunk.rel, blkno, at, page) {
                        Ok(()) => {}
                        Err(ClientError::Answer(what)) => drop(unreadable.insert(blkno, what)),
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(pages)
    }

    fn page(&self, chunk: &Chunk, blkno: BlockNumber, ours: &Page, theirs: &Page) -> Verdict {
        if matches!(self.reference, Reference::Nothing) {
            return sound(self.major, self.lsn, chunk.rel, blkno, ours);
        }
        let verdict = compare_page(self.major, chunk.rel, blkno, ours, theirs);
        match verdict {
            Verdict::Differs { what, at } => {
                let lengths = |blocks: Option<BlockNumber>| blocks.map_or("no fork".to_owned(), |blocks| format!("{blocks} blocks"));
                let sizes = match (chunk.ours, chunk.theirs) {
                    (ours, theirs) if ours == theirs => String::new(),
                    (ours, theirs) => format!("; the branch has {}, Postgres {}", lengths(ours), lengths(theirs)),
                };
                Verdict::Differs { what: what + &sizes, at }
            }
            other => other,
        }
    }
}

fn compare_page(major: Major, rel: RelFork, blkno: BlockNumber, ours: &Page, theirs: &Page) -> Verdict {
    if ours == theirs || is_unused(ours) && is_unused(theirs) {
        return Verdict::Equal;
    }
    if rel.fork == Fork::FreeSpaceMap {
        return match file_differences(major, rmgr::HEAP2, rel.fork, blkno, ours, theirs) {
            Ok(at) if at.is_empty() => Verdict::Equal,
            _ => Verdict::Allowed(Allowed { free_space_map: 1, ..Allowed::default() }),
        };
    }
    if is_unused(ours) && rel.fork == Fork::Main {
        return Verdict::differs(format!("is empty on the branch, Postgres's is of {}", page::lsn(theirs)));
    }
    let rmid = match rel.fork {
        Fork::VisibilityMap => rmgr::HEAP2,
        _ => rmgr_of_page(ours).unwrap_or(rmgr::HEAP),
    };
    if rmid == rmgr::SEQ && rmgr_of_page(theirs) == Some(rmgr::SEQ) && page::lsn(ours) == page::lsn(theirs) {
        return Verdict::Allowed(Allowed { sequence: 1, ..Allowed::default() });
    }
    let at = match file_differences(major, rmid, rel.fork, blkno, ours, theirs) {
        Ok(at) if at.is_empty() => return Verdict::Equal,
        Ok(at) => at,
        Err(what) => return Verdict::differs(what),
    };
    let fewer_bits = || ours[PAGE_HEADER_SIZE..].iter().zip(&theirs[PAGE_HEADER_SIZE..]).all(|(ours, theirs)| ours & !theirs == 0);
    if rel.fork == Fork::VisibilityMap && fewer_bits() {
        return Verdict::Allowed(Allowed { visibility_map: 1, ..Allowed::default() });
    }
    let what = format!(
        "{} bytes differ; the branch's page ({}) is of {}, Postgres's of {}",
        at.len(),
        rmgr::name(rmid),
        page::lsn(ours),
        page::lsn(theirs)
    );
    Verdict::Differs { what, at }
}

/// Whether a page is one that could be, without another to compare with.
fn sound(major: Major, lsn: Lsn, rel: RelFork, blkno: BlockNumber, ours: &Page) -> Verdict {
    if is_unused(ours) {
        return Verdict::Equal;
    }
    if page::lsn(ours) > lsn {
        return Verdict::differs(format!("is of {}, later than {lsn}", page::lsn(ours)));
    }
    let Some(rmid) = rmgr_of_page(ours).filter(|_| rel.fork == Fork::Main) else { return Verdict::Equal };
    let mut page = *ours;
    match mask_page(major, rmid, &mut page, blkno) {
        Ok(()) => Verdict::Equal,
        Err(what) => Verdict::differs(what),
    }
}

/// Whether nothing was ever put on the page. Pages of a visibility map are initialised when it is extended, without
/// WAL.
fn is_unused(page: &Page) -> bool {
    if *page == ZERO_PAGE {
        return true;
    }
    let mut empty = ZERO_PAGE;
    page::init(&mut empty, 0);
    page::set_checksum(&mut empty, page::checksum(page));
    *page == empty
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_postgres::RelNode;

    const NODE: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };

    fn size(fork: Fork, blocks: BlockNumber) -> ForkSize {
        ForkSize { rel: NODE.fork(fork), blocks }
    }

    #[test]
    fn work_covers_what_either_has() {
        let work = Work::plan(&[size(Fork::Main, 3)], &[size(Fork::Main, 600), size(Fork::VisibilityMap, 1)], false);
        let ranges: Vec<_> = work.chunks.iter().map(|chunk| (chunk.rel.fork, chunk.first, chunk.count)).collect();
        assert_eq!(ranges, [(Fork::Main, 0, 512), (Fork::Main, 512, 88), (Fork::VisibilityMap, 0, 1)]);
        assert_eq!((work.forks, work.pages), (2, 601));
        let work = Work::plan(&[size(Fork::Init, 0)], &[size(Fork::Init, 0), size(Fork::Main, 9)], false);
        assert_eq!((work.unlogged_forks, work.pages), (1, 0), "an unlogged relation's pages are not compared");
    }

    #[test]
    fn databases_are_found_in_a_base_backup() {
        let found = |path: &str| database_of(Path::new(path));
        assert_eq!(found("base/5/PG_VERSION"), Some((1663, 5)));
        assert_eq!(found("pg_tblspc/16400/PG_15_202209061/5/PG_VERSION"), Some((16400, 5)));
        for other in ["PG_VERSION", "base/5/pg_filenode.map", "global/pg_control", "base/x/PG_VERSION"] {
            assert_eq!(found(other), None, "{other}");
        }
    }

    #[test]
    fn what_may_differ_is_told_from_what_may_not() {
        let map = NODE.fork(Fork::VisibilityMap);
        let (mut fewer, mut more) = (ZERO_PAGE, ZERO_PAGE);
        page::init(&mut fewer, 0);
        page::init(&mut more, 0);
        (fewer[100], more[100]) = (0x01, 0x03);
        let compare = |ours: &Page, theirs: &Page| compare_page(Major::V15, map, 0, ours, theirs);
        assert!(matches!(compare(&fewer, &more), Verdict::Allowed(_)), "bits may be lost");
        assert!(matches!(compare(&more, &fewer), Verdict::Differs { .. }), "no bit may be there that Postgres does not have");
        let table = NODE.fork(Fork::Main);
        assert_eq!(compare_page(Major::V15, table, 0, &ZERO_PAGE, &page_of(0)), Verdict::Equal, "extended without WAL");
        assert!(matches!(compare_page(Major::V15, table, 0, &ZERO_PAGE, &page_of(16)), Verdict::Differs { .. }));
    }

    fn page_of(special: usize) -> Page {
        let mut page = ZERO_PAGE;
        page::init(&mut page, special);
        page
    }

    #[test]
    fn a_page_of_later_or_of_nonsense_is_not_sound() {
        let table = NODE.fork(Fork::Main);
        let mut page = page_of(0);
        page::set_lsn(&mut page, Lsn(100));
        assert_eq!(sound(Major::V15, Lsn(100), table, 0, &page), Verdict::Equal);
        assert!(matches!(sound(Major::V15, Lsn(99), table, 0, &page), Verdict::Differs { .. }));
        page::set_lower(&mut page, 9000);
        assert!(matches!(sound(Major::V15, Lsn(100), table, 0, &page), Verdict::Differs { .. }));
    }
}
