//! Runs SQL on a scratch Postgres with `wal_consistency_checking = all` and checks every page that our redo makes of
//! the WAL.
//!
//! A SQL file stands in `tests/sql/redo/`. Lines at its top that begin with `--!` set the server up,
//! `--! wal_log_hints = on`; `--! initdb --data-checksums` gives arguments to initdb, `--! from 16` and `--! until 16`
//! say for which majors the file is. What stands before a line `--! restart` is run before the server is stopped and
//! started once more, so that redo begins with what it left.
//!
//! Redo begins with the files that initdb, or that first stop, left and the WAL behind its checkpoint, so no page is
//! unknown. Besides the comparison of each record's pages with their images, the pages that redo arrives at are
//! compared with the stopped server's files, visibility maps too. After a crash and Postgres's own recovery the
//! free-space maps are compared as well.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use varve_postgres::control::ControlFile;
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName, relation_file};
use varve_postgres::wal::{Framer, Record, rmgr};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Major, Page, RelNode};
use varve_redo::verify::{Report, Verifier, file_differences};

use crate::postgres::{Postgres, bin_dir, is_skipped, wal_segments};

/// Line of a SQL file before which the server is stopped and started once more.
const RESTART: &str = "--! restart\n";
/// Differences with files that are told one by one.
const FILE_DIFFERENCES_MAX: usize = 10;
/// `XLOG_CHECKPOINT_SHUTDOWN`.
const CHECKPOINT_SHUTDOWN: u8 = 0x00;

/// Settings of every server. Without full-page writes each change of a page is redone, not only the second.
const SETTINGS: [(&str, &str); 14] = [
    ("wal_consistency_checking", "all"),
    ("full_page_writes", "off"),
    ("wal_level", "logical"),
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'16GB'"),
    ("checkpoint_timeout", "'1h'"),
    ("autovacuum", "off"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'128MB'"),
    ("bgwriter_lru_maxpages", "0"),
    ("max_parallel_workers_per_gather", "0"),
    ("max_parallel_maintenance_workers", "0"),
    ("track_commit_timestamp", "on"),
    ("restart_after_crash", "off"),
];

/// How the server ends, and so what its files are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It is shut down: its files are as it wrote them.
    Shutdown,
    /// It crashes and recovers, then is shut down: its files are as its own redo wrote them, free-space maps included.
    /// Only for work that makes no checkpoint and leaves buffers enough for all it touches.
    Recovery,
}

/// What the lines at the top of a SQL file say.
#[derive(Debug, Default)]
pub struct Preamble {
    /// Settings, name and value.
    pub settings: Vec<(String, String)>,
    /// Arguments of initdb.
    pub initdb: Vec<String>,
    from: Option<u32>,
    until: Option<u32>,
}

impl Preamble {
    fn read(sql: &str) -> Result<Preamble> {
        let mut preamble = Preamble::default();
        for line in sql.lines().filter_map(|line| line.strip_prefix("--!")) {
            let line = line.trim();
            if line == RESTART.trim_start_matches("--!").trim() {
                break;
            }
            if let Some(args) = line.strip_prefix("initdb ") {
                preamble.initdb.extend(args.split_whitespace().map(str::to_owned));
            } else if let Some(major) = line.strip_prefix("from ") {
                preamble.from = Some(major.trim().parse()?);
            } else if let Some(major) = line.strip_prefix("until ") {
                preamble.until = Some(major.trim().parse()?);
            } else {
                let (name, value) = line.split_once('=').with_context(|| format!("'--! {line}' is not a setting"))?;
                preamble.settings.push((name.trim().to_owned(), value.trim().to_owned()));
            }
        }
        Ok(preamble)
    }

    /// What the file `tests/sql/redo/<name>.sql` says.
    ///
    /// # Errors
    /// When it cannot be read, or says what is none of these.
    pub fn of_file(name: &str) -> Result<Preamble> {
        let path = sql_path(name);
        Self::read(&std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?)
    }

    /// Whether the file is for this major.
    pub fn is_for(&self, major: Major) -> bool {
        self.from.is_none_or(|from| major.number() >= from) && self.until.is_none_or(|until| major.number() <= until)
    }
}

/// The SQL file of the corpus with this name, `tests/sql/redo/<name>.sql`.
pub fn sql_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/sql/redo").join(format!("{name}.sql"))
}

/// Runs `tests/sql/redo/<name>.sql` on `major`, redoes its WAL and fails on any mismatch. Gives what was seen; nothing
/// if the file is not for this major.
///
/// # Panics
/// On a mismatch, or when Postgres cannot be run.
#[track_caller]
pub fn assert_redone(major: Major, name: &str) -> Report {
    assert_no_mismatch(major, name, Ending::Shutdown)
}

/// The same as [`assert_redone`], but the server crashes and recovers before it is shut down: see [`Ending::Recovery`].
///
/// # Panics
/// On a mismatch, or when Postgres cannot be run.
#[track_caller]
pub fn assert_recovered(major: Major, name: &str) -> Report {
    assert_no_mismatch(major, name, Ending::Recovery)
}

#[track_caller]
fn assert_no_mismatch(major: Major, name: &str, ending: Ending) -> Report {
    if is_skipped(major) {
        return Report::default();
    }
    match redo_sql_file(major, name, ending) {
        Ok(report) => {
            assert!(report.mismatch_count == 0, "{name}.sql on {major:?}: expected pages as Postgres has them\n{report}");
            report
        }
        Err(error) => panic!("{name}.sql on {major:?}: {error:?}"),
    }
}

/// Runs `tests/sql/redo/<name>.sql` on `major` and redoes its WAL.
///
/// # Errors
/// When Postgres cannot be run, its WAL cannot be read, or pages differ from the stopped server's files.
pub fn redo_sql_file(major: Major, name: &str, ending: Ending) -> Result<Report> {
    let path = sql_path(name);
    let sql = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let preamble = Preamble::read(&sql)?;
    if !preamble.is_for(major) {
        return Ok(Report::default());
    }
    let initdb: Vec<&str> = preamble.initdb.iter().map(String::as_str).collect();
    let settings: Vec<(&str, &str)> = preamble.settings.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    let (before, after) = sql.split_once(RESTART).unwrap_or(("", &sql));
    let run = |postgres: &Postgres, sql: &str| {
        let path = postgres.dir().join("run.sql");
        std::fs::write(&path, sql).with_context(|| format!("writing {}", path.display()))?;
        postgres.psql_file("postgres", &path).map(drop)
    };
    let mut postgres = init(major, &initdb, &settings)?;
    if !before.is_empty() {
        postgres.start()?;
        run(&postgres, before)?;
        postgres.stop("fast")?;
    }
    redo_workload(&mut postgres, ending, true, |postgres| run(postgres, after))
}

/// Makes a cluster whose WAL can be verified; `settings` go beside the ones that this takes.
///
/// # Errors
/// When the major is not installed, or initdb fails.
pub fn init(major: Major, initdb_args: &[&str], settings: &[(&str, &str)]) -> Result<Postgres> {
    init_with(bin_dir(major)?, major, initdb_args, settings)
}

/// The same with the programs in a directory, which are of any minor of `major`.
///
/// # Errors
/// When initdb fails.
pub fn init_with(programs: PathBuf, major: Major, initdb_args: &[&str], settings: &[(&str, &str)]) -> Result<Postgres> {
    let settings: Vec<(&str, &str)> = SETTINGS.iter().chain(settings).copied().collect();
    Postgres::init_with(programs, major, initdb_args, &settings)
}

/// Starts the server, lets `workload` work on it, stops it, redoes the WAL that it wrote since and compares with its
/// files, if no mismatch was found before. `one_session` says that nothing wrote beside it, so that visibility maps can
/// be compared at each record.
///
/// # Errors
/// When Postgres cannot be run, the workload fails, the WAL cannot be read, or pages differ from the stopped server's
/// files.
pub fn redo_workload(
    postgres: &mut Postgres,
    ending: Ending,
    one_session: bool,
    workload: impl FnOnce(&mut Postgres) -> Result<()>,
) -> Result<Report> {
    let major = postgres.major();
    let mut verifier = Verifier::new(major).with_complete_base().with_loose_pages();
    if one_session {
        verifier = verifier.with_strict_visibility_map();
    }
    if ending == Ending::Recovery {
        verifier = verifier.with_free_space_maps();
    }
    know_files(&mut verifier, &postgres.data_dir())?;
    let start = control_file(postgres)?.checkpoint;
    postgres.start()?;
    workload(postgres)?;
    if ending == Ending::Recovery {
        postgres.stop("immediate")?;
        postgres.start()?;
    }
    postgres.stop("fast")?;
    verify_wal(&mut verifier, major, &postgres.data_dir().join("pg_wal"), Some(start))?;
    if verifier.report().mismatch_count == 0 {
        compare_with_files(&verifier, postgres, ending)?;
    }
    Ok(verifier.report().clone())
}

/// Redoes the WAL in `dir` (a `pg_wal`), which a clean shutdown ended, from the record at `start`, or all of it.
///
/// # Errors
/// When the files cannot be read, or the last record is not a shutdown checkpoint.
pub fn verify_wal(verifier: &mut Verifier, major: Major, dir: &Path, start: Option<Lsn>) -> Result<()> {
    let segments = wal_segments(dir)?;
    let first = segments.first().with_context(|| format!("no WAL in {}", dir.display()))?;
    let mut framer = match start {
        Some(start) => Framer::new(major, None, start, None),
        None => Framer::from_page(major, None, segment_start(first)?),
    };
    let mut last = (0, 0);
    'all: for path in &segments {
        let segment = segment_start(path)?;
        if segment < framer.position().segment_start() {
            continue;
        }
        if segment != framer.position().segment_start() {
            break; // a segment that was made ready for later
        }
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let mut input = Bytes::from(bytes).slice(framer.position().segment_offset() as usize..);
        loop {
            match framer.next_record(&mut input) {
                Ok(Some(framed)) => {
                    let record = Record::decode(&framed.bytes, framed.start, framed.end, major)
                        .with_context(|| format!("decoding the record at {}", framed.start))?;
                    last = (record.header.rmid, record.kind());
                    verifier.record(&record)?;
                }
                Ok(None) => break,
                Err(_) if last == (rmgr::XLOG, CHECKPOINT_SHUTDOWN) => break 'all, // whatever the file held before
                Err(error) => return Err(error).context("reading WAL before its shutdown checkpoint"),
            }
        }
    }
    ensure!(last == (rmgr::XLOG, CHECKPOINT_SHUTDOWN), "the WAL in {} does not end with a shutdown checkpoint", dir.display());
    Ok(())
}

/// Where the WAL segment at `path` begins, by its name.
fn segment_start(path: &Path) -> Result<Lsn> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let part = |range| name.get(range).and_then(|digits| u64::from_str_radix(digits, 16).ok());
    match (part(8..16), part(16..24)) {
        (Some(high), Some(low)) => Ok(Lsn(high << 32 | low << 24)),
        _ => bail!("{} is not the name of a WAL segment", path.display()),
    }
}

fn control_file(postgres: &Postgres) -> Result<ControlFile> {
    let path = postgres.data_dir().join("global/pg_control");
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(ControlFile::decode(&bytes, postgres.major())?)
}

/// Tells the verifier all pages of the relations in the two built-in tablespaces.
fn know_files(verifier: &mut Verifier, data_dir: &Path) -> Result<()> {
    know_directory(verifier, &data_dir.join("global"), GLOBAL_TABLESPACE, 0)?;
    for entry in std::fs::read_dir(data_dir.join("base"))? {
        let entry = entry?;
        if let Some(db) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            know_directory(verifier, &entry.path(), DEFAULT_TABLESPACE, db)?;
        }
    }
    Ok(())
}

fn know_directory(verifier: &mut Verifier, dir: &Path, spc: u32, db: u32) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().and_then(RelationFileName::parse) else { continue };
        let rel = RelNode { spc, db, rel: name.rel }.fork(name.fork);
        let bytes = std::fs::read(entry.path()).with_context(|| format!("reading {}", entry.path().display()))?;
        for (block, page) in bytes.as_chunks::<BLCKSZ>().0.iter().enumerate() {
            verifier.know(rel, name.file_number * BLOCKS_PER_FILE + block as BlockNumber, page)?;
        }
    }
    Ok(())
}

/// Compares the pages that redo arrived at with the files of the stopped server.
fn compare_with_files(verifier: &Verifier, postgres: &Postgres, ending: Ending) -> Result<()> {
    let (major, catalog_version) = (postgres.major(), control_file(postgres)?.catalog_version);
    let mut wrong = Vec::new();
    let mut count = 0;
    for known in verifier.pages().iter() {
        let (rel, blkno, page, rmid) = known?;
        let rmid = match rmid {
            // What was not redone may have hints that were set since; but no hints are in free-space maps.
            None if rel.fork != Fork::FreeSpaceMap => continue,
            rmid => rmid.unwrap_or(rmgr::HEAP2),
        };
        // The server that wrote the WAL kept its free-space maps beside it, and its sequences lag behind what they
        // logged ahead.
        if (rel.fork == Fork::FreeSpaceMap || rmid == rmgr::SEQ) && ending != Ending::Recovery {
            continue;
        }
        if verifier.pages().is_hollow_map(rel) && ending != Ending::Recovery {
            continue;
        }
        count += 1;
        let path = postgres.data_dir().join(relation_file(rel, blkno / BLOCKS_PER_FILE, major, catalog_version));
        let found = match read_block(&path, blkno % BLOCKS_PER_FILE)? {
            Some(block) => match file_differences(major, rmid, rel.fork, blkno, &page, &block) {
                Ok(at) if at.is_empty() => continue,
                Ok(at) => format!("differs at {at:?}"),
                Err(what) => what,
            },
            None => "is not there".to_owned(),
        };
        wrong.push(format!("{rel} block {blkno} (last changed by {}) {found}", rmgr::name(rmid)));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let total = wrong.len();
    wrong.truncate(FILE_DIFFERENCES_MAX);
    bail!("{total} of {count} pages on disk are not as redo has them:\n{}", wrong.join("\n"))
}

fn read_block(path: &Path, block: BlockNumber) -> Result<Option<Page>> {
    use std::os::unix::fs::FileExt;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
    };
    let mut page = [0; BLCKSZ];
    match file.read_exact_at(&mut page, u64::from(block) * BLCKSZ as u64) {
        Ok(()) => Ok(Some(page)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// For each SQL file of the corpus that is named, a module with a test for each major: see
/// [`assert_redone`](crate::redo::assert_redone). After `recovery:` come files whose server is to crash and recover:
/// see [`assert_recovered`](crate::redo::assert_recovered).
#[macro_export]
macro_rules! redo_tests {
    ($($name:ident),* $(,)?) => {
        $(
            mod $name {
                $crate::redo_tests!(@majors $name, assert_redone);
            }
        )*
    };
    (recovery: $($name:ident),* $(,)?) => {
        mod recovery {
            $(
                mod $name {
                    $crate::redo_tests!(@majors $name, assert_recovered);
                }
            )*
        }
    };
    (@majors $name:ident, $assert:ident) => {
        $crate::redo_tests!(@major $name, $assert, postgres_14, V14);
        $crate::redo_tests!(@major $name, $assert, postgres_15, V15);
        $crate::redo_tests!(@major $name, $assert, postgres_16, V16);
        $crate::redo_tests!(@major $name, $assert, postgres_17, V17);
        $crate::redo_tests!(@major $name, $assert, postgres_18, V18);
    };
    (@major $name:ident, $assert:ident, $test:ident, $major:ident) => {
        #[test]
        fn $test() {
            println!("{}", $crate::redo::$assert(varve_postgres::Major::$major, stringify!($name)));
        }
    };
}
