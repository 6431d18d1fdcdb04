//! Postgres's own test suites, run with its own runners against any server. `scripts/postgres-regress` puts them where
//! they are sought.

use std::fmt;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use varve_postgres::Major;

use crate::limit::{self, SUITE_MAX};
use crate::postgres::postgres_user;

/// Where `scripts/postgres-regress` puts what it fetches and builds.
const CACHE: &str = "/var/cache/varve";
/// Lines of what differs from a suite's expectations that are told.
const DIFF_LINES_MAX: usize = 300;
/// Extensions whose suites write pages: generic WAL, index methods with operator classes of their own, pages changed
/// from outside.
const EXTENSIONS: [&str; 15] = [
    "bloom",
    "pg_visibility",
    "pg_surgery",
    "pgstattuple",
    "pageinspect",
    "amcheck",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "hstore",
    "intarray",
    "ltree",
    "pg_trgm",
    "seg",
];

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// The regression tests, by the parallel schedule.
    Regression,
    /// Tests with several sessions.
    Isolation,
    /// Those of an extension in contrib.
    Extension(&'static str),
}

impl Suite {
    /// All of them.
    pub fn all() -> Vec<Suite> {
        [Suite::Regression, Suite::Isolation].into_iter().chain(EXTENSIONS.map(Suite::Extension)).collect()
    }

    /// The database that it works in and leaves behind: one each, so that what it holds can be compared.
    pub fn database(self) -> String {
        match self {
            Suite::Regression => "regression".to_owned(),
            Suite::Isolation => "isolation_regression".to_owned(),
            Suite::Extension(name) => format!("contrib_regression_{name}"),
        }
    }

    /// Those with these names; `contrib` names all extensions.
    ///
    /// # Errors
    /// When there is none of a name.
    pub fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Suite>> {
        let mut suites = Vec::new();
        for name in names {
            let of_name = |suite: &Suite| suite.to_string() == name || name == "contrib" && matches!(suite, Suite::Extension(_));
            let found: Vec<Suite> = Self::all().into_iter().filter(of_name).collect();
            ensure!(!found.is_empty(), "there is no suite '{name}'; there are: regression, isolation, contrib, {}", EXTENSIONS.join(", "));
            suites.extend(found);
        }
        Ok(suites)
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Suite::Regression => f.write_str("regression"),
            Suite::Isolation => f.write_str("isolation"),
            Suite::Extension(name) => f.write_str(name),
        }
    }
}

/// The suites of a major, as they are on this host.
#[derive(Debug)]
pub struct Suites {
    major: Major,
    source: PathBuf,
    /// Programs of the server and its clients.
    bin: PathBuf,
    runners: PathBuf,
    /// `regress.so` and what else the suites load.
    libraries: PathBuf,
}

/// The server that a suite is run against, reached without a password.
#[derive(Debug)]
pub struct Target {
    /// Host, or folder of its socket.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What a suite found.
#[derive(Debug)]
pub struct Outcome {
    /// The runner's lines about tests that failed, and its summary.
    pub summary: Vec<String>,
    /// How what the failed tests printed differs from what was expected; empty if all passed.
    pub differences: String,
    /// Whether all tests passed.
    pub passed: bool,
}

impl Suites {
    /// Those of `major`.
    ///
    /// # Errors
    /// When they are not there: the message says how to get them.
    pub fn of(major: Major) -> Result<Suites> {
        let cache = Path::new(CACHE);
        let (source, bin, runners) = match major {
            Major::V15 => ("postgresql-15-15.18", "/usr/lib/postgresql/15/bin".into(), "/usr/lib/postgresql/15/lib/pgxs/src/test".into()),
            Major::V18 => {
                ("postgresql-18-18.6", cache.join("built/postgresql-18/bin"), cache.join("built/postgresql-18/lib/pgxs/src/test"))
            }
            _ => bail!("no suites are known for {major:?}, only for 15 and 18"),
        };
        let suites =
            Suites { major, source: cache.join("src").join(source), bin, runners, libraries: cache.join(format!("regress-{major}")) };
        for needed in [&suites.libraries.join("regress.so"), &suites.source, &suites.bin, &suites.runners] {
            ensure!(needed.exists(), "{} is not there: run scripts/postgres-regress {major}", needed.display());
        }
        Ok(suites)
    }

    /// Folder of the programs of the server that the suites belong to.
    pub fn bin_dir(&self) -> &Path {
        &self.bin
    }

    /// Runs `suite`; what it prints goes into `folder`, which the server must be able to reach and which is made if
    /// need be.
    ///
    /// # Errors
    /// When the runner cannot be run. Tests that fail are in the outcome.
    pub fn run(&self, suite: Suite, target: &Target, folder: &Path) -> Result<Outcome> {
        // Some tests write a file by psql and again by the server, so both must be the same user.
        let (uid, gid) = postgres_user()?;
        for folder in [folder, &folder.join("results")] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
            chown(folder, Some(uid), Some(gid)).with_context(|| format!("giving {} to postgres", folder.display()))?;
        }
        let (runner, input) = match suite {
            Suite::Regression => ("regress/pg_regress", self.source.join("src/test/regress")),
            Suite::Isolation => ("isolation/pg_isolation_regress", self.source.join("src/test/isolation")),
            Suite::Extension(name) => ("regress/pg_regress", self.source.join("contrib").join(name)),
        };
        let mut command = Command::new(self.runners.join(runner));
        command
            .arg(format!("--inputdir={}", input.display()))
            .arg(format!("--outputdir={}", folder.display()))
            .arg(format!("--dlpath={}", self.libraries.display()))
            .arg(format!("--bindir={}", self.bin.display()))
            .args([format!("--host={}", target.host), format!("--port={}", target.port)])
            .args(["--user=postgres", "--encoding=UTF8", "--no-locale", "--max-concurrent-tests=20"])
            .current_dir(&input); // where extensions look for their data
        if rustix::process::geteuid().is_root() {
            command.uid(uid).gid(gid);
        }
        match suite {
            Suite::Regression => command.arg(format!("--schedule={}", input.join("parallel_schedule").display())),
            Suite::Isolation => command.arg(format!("--schedule={}", input.join("isolation_schedule").display())),
            Suite::Extension(_) => command.arg(format!("--dbname={}", suite.database())).args(tests_of(&input.join("Makefile"))?),
        };
        let output = limit::output(&mut command, SUITE_MAX, None).with_context(|| format!("running {runner} of {:?}", self.major))?;
        let out = String::from_utf8_lossy(&output.stdout);
        // Before 16 "test x ... FAILED" and "All 5 tests passed.", then "not ok 3 - x" and "# All 5 tests passed.".
        let is_told = |line: &&str| line.contains("FAILED") || line.starts_with("not ok") || line.contains(" tests ");
        let mut summary: Vec<String> = out.lines().filter(is_told).map(|line| line.trim().to_owned()).collect();
        if summary.is_empty() {
            summary.push(format!("{out}{}", String::from_utf8_lossy(&output.stderr)));
        }
        let differences = fs::read_to_string(folder.join("regression.diffs")).unwrap_or_default();
        let differences = differences.lines().take(DIFF_LINES_MAX).collect::<Vec<_>>().join("\n");
        Ok(Outcome { summary, differences, passed: output.status.success() })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary.join("\n"))?;
        if !self.differences.is_empty() {
            write!(f, "\n{}", self.differences)?;
        }
        Ok(())
    }
}

/// The names of an extension's tests, from its Makefile.
fn tests_of(makefile: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(makefile).with_context(|| format!("reading {}", makefile.display()))?.replace("\\\n", " ");
    let line =
        text.lines().find_map(|line| line.strip_prefix("REGRESS = ")).with_context(|| format!("{} has no REGRESS", makefile.display()))?;
    Ok(line.split_whitespace().map(str::to_owned).collect())
}
