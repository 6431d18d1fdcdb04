//! A stock Postgres to start: a scratch cluster in a temporary directory that goes when the value goes.
//!
//! It listens on a unix socket only, in its own directory, so that any number of them run side by side.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use varve_postgres::Major;

use crate::limit::{self, COMMAND_MAX};

/// The user that Postgres runs as: it refuses to run as root.
const POSTGRES_USER: &str = "postgres";
/// Where `scripts/postgres-majors` puts the majors that the system does not have.
const MAJORS_DIR: &str = "/var/cache/varve/pg";

/// Uid and gid of the user that Postgres runs as.
pub(crate) fn postgres_user() -> Result<(u32, u32)> {
    let passwd = std::fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|entry| entry[0] == POSTGRES_USER);
    let entry = entry.with_context(|| format!("there is no user '{POSTGRES_USER}': install postgresql-15"))?;
    match (entry.get(2).and_then(|uid| uid.parse().ok()), entry.get(3).and_then(|gid| gid.parse().ok())) {
        (Some(uid), Some(gid)) => Ok((uid, gid)),
        _ => bail!("/etc/passwd has no uid and gid of '{POSTGRES_USER}'"),
    }
}

/// Directory of the programs of `major`: that in the variable `VARVE_TEST_PG_BIN_<major>`, if it is set, to test with
/// another minor.
///
/// # Errors
/// When it is not installed; the message says how to get it.
pub fn bin_dir(major: Major) -> Result<PathBuf> {
    let named = std::env::var_os(format!("VARVE_TEST_PG_BIN_{major}")).map(PathBuf::from);
    let system = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    let fetched = PathBuf::from(format!("{MAJORS_DIR}/{major}/bin"));
    named
        .into_iter()
        .chain([system, fetched])
        .find(|dir| dir.join("postgres").exists())
        .with_context(|| format!("{major:?} is not installed: run scripts/postgres-majors, or apt-get install postgresql-{major}"))
}

/// Whether tests of `major` are to be left out: it is not installed, and `VARVE_TEST_SKIP_MAJORS=1` says that this is
/// no fault.
pub fn is_skipped(major: Major) -> bool {
    let skipped =
        major != Major::V15 && std::env::var_os("VARVE_TEST_SKIP_MAJORS").is_some_and(|value| value == "1") && bin_dir(major).is_err();
    if skipped {
        println!("{major:?} is not installed, and VARVE_TEST_SKIP_MAJORS=1 leaves out its tests");
    }
    skipped
}

/// A scratch cluster.
#[derive(Debug)]
pub struct Postgres {
    major: Major,
    programs: PathBuf,
    dir: tempfile::TempDir,
    running: bool,
}

/// Directory of the programs of `minor` (`15.18`), which `scripts/postgres-majors` fetches. None if it was not fetched,
/// and `VARVE_TEST_SKIP_MAJORS=1` says that this is no fault.
///
/// # Errors
/// When it was not fetched.
pub fn minor_bin_dir(minor: &str) -> Result<Option<PathBuf>> {
    let dir = PathBuf::from(format!("{MAJORS_DIR}/{minor}/bin"));
    if dir.join("postgres").exists() {
        return Ok(Some(dir));
    }
    if std::env::var_os("VARVE_TEST_SKIP_MAJORS").is_some_and(|value| value == "1") {
        println!("PostgreSQL {minor} is not installed, and VARVE_TEST_SKIP_MAJORS=1 leaves out its tests");
        return Ok(None);
    }
    bail!("PostgreSQL {minor} is not in {}: run scripts/postgres-majors", dir.display())
}

impl Postgres {
    /// Makes a cluster of `major` with the superuser `postgres`, and these lines at the end of its configuration.
    /// `initdb_args` go to initdb.
    ///
    /// # Errors
    /// When the major is not installed, or initdb fails.
    pub fn init(major: Major, initdb_args: &[&str], settings: &[(&str, &str)]) -> Result<Postgres> {
        Postgres::init_with(bin_dir(major)?, major, initdb_args, settings)
    }

    /// The same with the programs in a directory, which are of any minor of `major`.
    ///
    /// # Errors
    /// When initdb fails.
    pub fn init_with(programs: PathBuf, major: Major, initdb_args: &[&str], settings: &[(&str, &str)]) -> Result<Postgres> {
        let mut postgres = Postgres::bare(major)?;
        postgres.programs = programs;
        let mut initdb = postgres.command("initdb")?;
        initdb.arg("-D").arg(postgres.data_dir()).args(["-U", POSTGRES_USER, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]);
        if major >= Major::V18 && !initdb_args.contains(&"--data-checksums") {
            initdb.arg("--no-data-checksums");
        }
        run(initdb.args(initdb_args))?;
        postgres.configure(settings)?;
        Ok(postgres)
    }

    /// A directory without a cluster, whose data directory is to be filled; then [`Self::own`] it and
    /// [`Self::configure`] it.
    ///
    /// # Errors
    /// When the user that Postgres runs as is missing.
    pub fn bare(major: Major) -> Result<Postgres> {
        let dir = tempfile::Builder::new().prefix("varve-pg-").tempdir().context("making a temporary directory")?;
        let postgres = Postgres { major, programs: bin_dir(major)?, dir, running: false };
        let (uid, gid) = postgres_user()?;
        chown(postgres.dir.path(), Some(uid), Some(gid)).context("giving the temporary directory to postgres")?;
        std::fs::set_permissions(postgres.dir.path(), std::fs::Permissions::from_mode(0o755))?;
        Ok(postgres)
    }

    /// Gives the data directory, and all in it, to the user that Postgres runs as.
    ///
    /// # Errors
    /// When that fails.
    pub fn own(&self) -> Result<()> {
        let (uid, gid) = postgres_user()?;
        run(Command::new("chown").arg("-R").arg(format!("{uid}:{gid}")).arg(self.data_dir()))?;
        std::fs::set_permissions(self.data_dir(), std::fs::Permissions::from_mode(0o700)).context("making the data directory private")
    }

    /// Adds these lines to its configuration, and those without which it does not run here.
    ///
    /// # Errors
    /// When the configuration file cannot be written.
    pub fn configure(&self, settings: &[(&str, &str)]) -> Result<()> {
        let mut conf = format!("\nlisten_addresses = ''\nunix_socket_directories = '{}'\nfsync = off\n", self.dir.path().display());
        for (name, value) in settings {
            conf += &format!("{name} = {value}\n");
        }
        let path = self.data_dir().join("postgresql.conf");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        std::fs::write(&path, text + &conf).with_context(|| format!("writing {}", path.display()))
    }

    /// Its major.
    pub fn major(&self) -> Major {
        self.major
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directory of its socket, which tests may also use for files that Postgres can write.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A libpq connection string for database `db`.
    pub fn conninfo(&self, db: &str) -> String {
        format!("host={} user={POSTGRES_USER} dbname={db}", self.dir.path().display())
    }

    /// The program `name` of this major, to be run as the user that owns the cluster.
    ///
    /// # Errors
    /// When the major or the user is missing.
    pub fn command(&self, name: &str) -> Result<Command> {
        let (uid, gid) = postgres_user()?;
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(uid).gid(gid);
        }
        Ok(command)
    }

    /// Starts it and waits until it takes connections.
    ///
    /// # Errors
    /// When it does not start; the message has the end of its log.
    pub fn start(&mut self) -> Result<()> {
        let log = self.log_path();
        let mut start = self.command("pg_ctl")?;
        start.arg("start").arg("-w").arg("-D").arg(self.data_dir()).arg("-l").arg(&log);
        // The postmaster inherits these, so they must not be pipes that somebody waits to be closed.
        start.stdout(Stdio::null()).stderr(Stdio::null());
        let status = limit::status(&mut start, COMMAND_MAX, Some(self.dir()))?;
        if !status.success() {
            bail!("Postgres did not start ({status}); its log:\n{}", self.log());
        }
        self.running = true;
        Ok(())
    }

    /// Stops it: `fast`, `immediate` or `smart`.
    ///
    /// # Errors
    /// When pg_ctl fails.
    pub fn stop(&mut self, mode: &str) -> Result<()> {
        let mut stop = self.command("pg_ctl")?;
        run(stop.arg("stop").arg("-w").arg("-D").arg(self.data_dir()).args(["-m", mode]))?;
        self.running = false;
        Ok(())
    }

    /// Runs `sql` in database `db`, gives what psql prints (unaligned, without headers).
    ///
    /// # Errors
    /// When a statement fails; the message has it.
    pub fn psql(&self, db: &str, sql: &str) -> Result<String> {
        run(self.psql_command(db).arg("-c").arg(sql))
    }

    /// Runs the SQL file at `path` in database `db`.
    ///
    /// # Errors
    /// When a statement fails; the message has it.
    pub fn psql_file(&self, db: &str, path: &Path) -> Result<String> {
        run(self.psql_command(db).arg("-f").arg(path))
    }

    fn psql_command(&self, db: &str) -> Command {
        // works with every major, and not all packages have one
        let mut psql = Command::new("/usr/lib/postgresql/15/bin/psql");
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d"]).arg(self.conninfo(db)).stdin(Stdio::null());
        psql
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The files of its WAL on disk, in order.
    ///
    /// # Errors
    /// When pg_wal cannot be read.
    pub fn wal_segments(&self) -> Result<Vec<PathBuf>> {
        wal_segments(&self.data_dir().join("pg_wal"))
    }
}

/// The segment files in `dir`, in order.
///
/// # Errors
/// When it cannot be read.
pub fn wal_segments(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            segments.push(path);
        }
    }
    segments.sort();
    Ok(segments)
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.running {
            let _ = self.stop("immediate");
        }
    }
}

/// Runs `command` to its end, gives its standard output.
fn run(command: &mut Command) -> Result<String> {
    let output = limit::output(command, COMMAND_MAX, None)?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{command:?} failed ({}):\n{out}{err}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
