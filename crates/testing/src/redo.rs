//! Runs SQL on a scratch Postgres with `wal_consistency_checking = all` and checks every page that our redo makes of the WAL.
//!
//! A SQL file stands in `tests/sql/redo/`. Lines at its top that begin with `--!` set the server up, `--! wal_log_hints = on`; `--! initdb
//! --data-checksums` gives arguments to initdb, `--! from 16` and `--! until 16` say for which majors the file is.
//!
//! Besides the comparison of each record's pages with their images, the pages that redo arrives at are compared with the stopped
//! server's files, visibility maps too.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::wal::{Framer, Record, rmgr};
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, RelFork};
use varve_redo::verify::{Report, Verifier, file_differences};

use crate::postgres::{Postgres, wal_segments};

/// Blocks in a file of a relation (`RELSEG_SIZE`).
const BLOCKS_PER_FILE: u32 = 131_072;
/// Differences with files that are told one by one.
const FILE_DIFFERENCES_MAX: usize = 10;
/// `XLOG_CHECKPOINT_SHUTDOWN`.
const CHECKPOINT_SHUTDOWN: u8 = 0x00;

/// Settings of every server that runs a corpus file. Without full-page writes each change of a page is redone, not only the second.
const SETTINGS: [(&str, &str); 14] = [
    ("wal_consistency_checking", "all"),
    ("full_page_writes", "off"),
    ("wal_level", "logical"),
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'16GB'"),
    ("checkpoint_timeout", "'1h'"),
    ("autovacuum", "off"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'32MB'"),
    ("bgwriter_lru_maxpages", "0"),
    ("max_parallel_workers_per_gather", "0"),
    ("max_parallel_maintenance_workers", "0"),
    ("track_commit_timestamp", "on"),
    ("restart_after_crash", "off"),
];

/// What the lines at the top of a SQL file say.
#[derive(Debug, Default)]
struct Preamble {
    settings: Vec<(String, String)>,
    initdb: Vec<String>,
    from: Option<u32>,
    until: Option<u32>,
}

impl Preamble {
    fn read(sql: &str) -> Result<Preamble> {
        let mut preamble = Preamble::default();
        for line in sql.lines().filter_map(|line| line.strip_prefix("--!")) {
            let line = line.trim();
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

    fn is_for(&self, major: Major) -> bool {
        self.from.is_none_or(|from| major.number() >= from) && self.until.is_none_or(|until| major.number() <= until)
    }
}

/// The SQL file of the corpus with this name, `tests/sql/redo/<name>.sql`.
pub fn sql_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/sql/redo").join(format!("{name}.sql"))
}

/// Runs `tests/sql/redo/<name>.sql` on `major`, redoes its WAL and fails on any mismatch. Gives what was seen; nothing if the file is not
/// for this major.
///
/// # Panics
/// On a mismatch, or when Postgres cannot be run.
#[track_caller]
pub fn assert_redone(major: Major, name: &str) -> Report {
    match redo_sql_file(major, name) {
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
pub fn redo_sql_file(major: Major, name: &str) -> Result<Report> {
    let path = sql_path(name);
    let sql = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let preamble = Preamble::read(&sql)?;
    if !preamble.is_for(major) {
        return Ok(Report::default());
    }
    let mut settings = SETTINGS.to_vec();
    settings.extend(preamble.settings.iter().map(|(name, value)| (&name[..], &value[..])));
    let initdb: Vec<&str> = preamble.initdb.iter().map(String::as_str).collect();
    let mut postgres = Postgres::init(major, &initdb, &settings)?;
    postgres.start()?;
    postgres.psql_file("postgres", &path)?;
    postgres.stop("fast")?;
    let verifier = verify_wal(major, &postgres.data_dir().join("pg_wal"), true)?;
    if verifier.report().mismatch_count == 0 {
        compare_with_files(&verifier, major, &postgres.data_dir())?;
    }
    Ok(verifier.report().clone())
}

/// Redoes all WAL in `dir` (a `pg_wal`), which a clean shutdown ended.
///
/// # Errors
/// When the files cannot be read, or the last record is not a shutdown checkpoint.
pub fn verify_wal(major: Major, dir: &Path, strict_visibility_map: bool) -> Result<Verifier> {
    let segments = wal_segments(dir)?;
    let first = segments.first().with_context(|| format!("no WAL in {}", dir.display()))?;
    let mut verifier = Verifier::new(major);
    if strict_visibility_map {
        verifier = verifier.with_strict_visibility_map();
    }
    let mut framer = Framer::from_page(major, None, segment_start(first)?);
    let mut last = (0, 0);
    'all: for path in &segments {
        if segment_start(path)? != framer.position() {
            break; // a segment that was made ready for later
        }
        let mut input = Bytes::from(std::fs::read(path).with_context(|| format!("reading {}", path.display()))?);
        loop {
            match framer.next_record(&mut input) {
                Ok(Some(framed)) => {
                    let record = Record::decode(&framed.bytes, framed.start, framed.end, major)
                        .with_context(|| format!("decoding the record at {}", framed.start))?;
                    last = (record.header.rmid, record.kind());
                    verifier.record(&record);
                }
                Ok(None) => break,
                Err(error) if last == (rmgr::XLOG, CHECKPOINT_SHUTDOWN) => {
                    let _end_of_wal = error;
                    break 'all;
                }
                Err(error) => return Err(error).context("reading WAL before its shutdown checkpoint"),
            }
        }
    }
    ensure!(last == (rmgr::XLOG, CHECKPOINT_SHUTDOWN), "the WAL in {} does not end with a shutdown checkpoint", dir.display());
    Ok(verifier)
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

/// Compares the pages that redo arrived at with the files of the stopped server.
fn compare_with_files(verifier: &Verifier, major: Major, data_dir: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (rel, blkno, page, rmid) in verifier.pages().iter() {
        // The map is kept outside WAL; images of it appear with checksums.
        if rel.fork == Fork::FreeSpaceMap {
            continue;
        }
        let Some(path) = file(rel, blkno, data_dir) else { continue };
        count += 1;
        let block = read_block(&path, blkno % BLOCKS_PER_FILE)?;
        let found = match block {
            Some(block) => match file_differences(major, rmid, rel.fork, blkno, page, &block) {
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

/// The file of a relation in one of the two built-in tablespaces.
fn file(rel: RelFork, blkno: u32, data_dir: &Path) -> Option<PathBuf> {
    let node = rel.node;
    let dir = match node.spc {
        DEFAULT_TABLESPACE => data_dir.join("base").join(node.db.to_string()),
        GLOBAL_TABLESPACE => data_dir.join("global"),
        _ => return None,
    };
    let segment = match blkno / BLOCKS_PER_FILE {
        0 => String::new(),
        n => format!(".{n}"),
    };
    Some(dir.join(format!("{}{}{segment}", node.rel, rel.fork.suffix())))
}

fn read_block(path: &Path, block: u32) -> Result<Option<[u8; BLCKSZ]>> {
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

/// For each SQL file of the corpus that is named, a module with a test for each major: see [`assert_redone`].
#[macro_export]
macro_rules! redo_tests {
    ($($name:ident),* $(,)?) => {
        $(
            mod $name {
                $crate::redo_tests!(@major $name, postgres_14, V14);
                $crate::redo_tests!(@major $name, postgres_15, V15);
                $crate::redo_tests!(@major $name, postgres_16, V16);
                $crate::redo_tests!(@major $name, postgres_17, V17);
                $crate::redo_tests!(@major $name, postgres_18, V18);
            }
        )*
    };
    (@major $name:ident, $test:ident, $major:ident) => {
        #[test]
        fn $test() {
            let report = $crate::redo::assert_redone(varve_postgres::Major::$major, stringify!($name));
            println!("{report}");
        }
    };
}
