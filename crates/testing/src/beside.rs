//! Plain Postgres servers beside a compute: made from a base backup of it, as its standby, or recovered to a moment of its WAL.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use varve_postgres::{Lsn, Major};

use crate::postgres::Postgres;

/// How long a standby, a recovery or an archive may take to get where it should.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);
/// Pause between looking.
const POLL: Duration = Duration::from_millis(20);
/// The role that computes let in through their private socket.
const INTERNAL_ROLE: &str = "varve";

/// The private side of a running compute, given as the CLI's JSON has it. For tests that run as root, as computes are reached then.
#[derive(Clone, Debug)]
pub struct Private {
    run: PathBuf,
    port: u64,
}

impl Private {
    /// Of this compute.
    ///
    /// # Errors
    /// When the JSON is not a compute's.
    pub fn of(compute: &Value) -> anyhow::Result<Private> {
        let id = compute["id"].as_str().context("a compute has an id")?;
        let port = compute["port"].as_u64().context("a compute has a port")?;
        Ok(Private { run: Path::new("/run/varve").join(id.get(..12).context("an id of 12 characters and more")?), port })
    }

    /// Its mounted data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.run.join("pgdata")
    }

    /// A connection string of the internal superuser.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user={INTERNAL_ROLE}", self.run.join("socket").display(), self.port)
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(crate::postgres::bin_dir(Major::V15).unwrap_or_default().join(program));
        command.arg("-h").arg(self.run.join("socket")).args(["-p", &self.port.to_string(), "-U", INTERNAL_ROLE]).stdin(Stdio::null());
        command
    }

    /// A stopped plain server whose data directory is a base backup of the compute.
    ///
    /// # Errors
    /// When `pg_basebackup` fails.
    pub fn base_backup(&self, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
        let postgres = Postgres::bare(Major::V15)?;
        let mut command = self.client("pg_basebackup");
        run(command.args(["-X", "stream", "-c", "fast", "--no-sync", "-D"]).arg(postgres.data_dir()))?;
        make_plain(&postgres, settings)?;
        Ok(postgres)
    }

    /// A plain server that follows the compute.
    ///
    /// # Errors
    /// When `pg_basebackup` fails or the server does not start.
    pub fn standby(&self, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
        let primary = format!("'{}'", self.conninfo());
        let mut postgres = self.base_backup(&[settings, &[("primary_conninfo", &primary)]].concat())?;
        fs::write(postgres.data_dir().join("standby.signal"), "")?;
        postgres.own()?;
        postgres.start()?;
        Ok(postgres)
    }

    /// Begins to receive the compute's WAL, from the start of its current segment on.
    ///
    /// # Errors
    /// When `pg_receivewal` does not begin.
    pub fn archive(&self) -> anyhow::Result<Archive> {
        let dir = tempfile::Builder::new().prefix("varve-archive-").tempdir()?;
        let log = fs::File::create(dir.path().join("log"))?;
        let mut command = self.client("pg_receivewal");
        let child = command.args(["--no-sync", "-s", "1", "-D"]).arg(dir.path()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let archive = Archive { dir, child };
        let deadline = Instant::now() + CATCH_UP_MAX;
        while crate::postgres::wal_segments(archive.dir.path())?.is_empty() && archive.partial()?.is_none() {
            ensure!(Instant::now() < deadline, "pg_receivewal got nothing: {}", archive.log());
            std::thread::sleep(POLL);
        }
        Ok(archive)
    }
}

/// The WAL of a compute as `pg_receivewal` gets it.
#[derive(Debug)]
pub struct Archive {
    dir: tempfile::TempDir,
    child: Child,
}

impl Archive {
    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn partial(&self) -> anyhow::Result<Option<PathBuf>> {
        for entry in fs::read_dir(self.dir.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "partial") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Where the whole segments, and at the end all, are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until everything up to `lsn` arrived, ends receiving, and makes the last segment an ordinary one.
    ///
    /// # Errors
    /// When it does not arrive.
    pub fn finish(&mut self, compute: &Private, lsn: Lsn) -> anyhow::Result<()> {
        let sql = "SELECT coalesce(max(write_lsn), '0/0') FROM pg_stat_replication WHERE application_name = 'pg_receivewal'";
        let deadline = Instant::now() + CATCH_UP_MAX;
        loop {
            let written = crate::dev::psql(&format!("{} dbname=postgres", compute.conninfo()), sql)?;
            if written.parse::<Lsn>().context("an LSN")? >= lsn {
                break;
            }
            ensure!(Instant::now() < deadline, "pg_receivewal stays at {written}, expected {lsn}: {}", self.log());
            std::thread::sleep(POLL);
        }
        crate::dev::signal(self.child.id(), rustix::process::Signal::INT);
        self.child.wait()?;
        if let Some(path) = self.partial()? {
            fs::rename(&path, path.with_extension(""))?;
        }
        // Servers that recover from it run as another user.
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o755))?;
        for path in crate::postgres::wal_segments(self.dir.path())? {
            fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
        }
        Ok(())
    }

    /// The starts of all records in the archive from `lsn` on, as `pg_waldump` reads them.
    ///
    /// # Errors
    /// When `pg_waldump` finds a record that is none before the end of WAL.
    pub fn records(&self, tli: u32, from: Lsn, to: Lsn) -> anyhow::Result<Vec<WalDumpRecord>> {
        let mut command = Command::new(crate::postgres::bin_dir(Major::V15)?.join("pg_waldump"));
        command.args(["-t", &tli.to_string(), "-s", &from.to_string(), "-e", &to.to_string(), "-p"]).arg(self.dir.path());
        let text = run(command.env("TZ", "UTC"))?;
        // It says so on a line of its own when the first record begins later.
        text.lines().filter(|line| line.starts_with("rmgr: ")).map(WalDumpRecord::parse).collect()
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A record as `pg_waldump` tells of it.
#[derive(Clone, Debug)]
pub struct WalDumpRecord {
    /// Where it begins.
    pub start: Lsn,
    /// Resource manager.
    pub rmgr: String,
    /// What it does.
    pub description: String,
}

impl WalDumpRecord {
    fn parse(line: &str) -> anyhow::Result<WalDumpRecord> {
        let parse = || {
            let rmgr = line.strip_prefix("rmgr: ")?.split_whitespace().next()?;
            let (_, rest) = line.split_once("lsn: ")?;
            let (lsn, rest) = rest.split_once(',')?;
            let (_, description) = rest.split_once("desc: ")?;
            Some(WalDumpRecord { start: lsn.parse().ok()?, rmgr: rmgr.to_owned(), description: description.to_owned() })
        };
        parse().with_context(|| format!("pg_waldump printed {line:?}"))
    }

    /// When it ended a transaction, as Postgres prints the time, in UTC.
    pub fn end_time(&self) -> Option<&str> {
        let (what, rest) = self.description.split_once(' ')?;
        let ends = self.rmgr == "Transaction" && (what.starts_with("COMMIT") || what.starts_with("ABORT"));
        // "COMMIT_PREPARED 749: 2026-..." names the transaction first.
        let rest = rest.split_once(": ").filter(|(xid, _)| xid.bytes().all(|byte| byte.is_ascii_digit())).map_or(rest, |(_, time)| time);
        ends.then(|| rest.split_once(" UTC").map(|(time, _)| time)).flatten()
    }
}

/// Where a recovery stops.
#[derive(Clone, Debug)]
pub enum Target {
    /// Before the first record that begins here or later: all that ends here or before is there.
    Lsn(Lsn),
    /// As `recovery_target_time` means it.
    Time(String),
}

/// Starts a plain server on a copy of `base` (a stopped base backup) and lets it recover from the WAL in `archive` to `target`.
///
/// # Errors
/// When it does not get there.
pub fn recovered(base: &Path, archive: &Path, target: &Target, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
    let mut postgres = Postgres::bare(Major::V15)?;
    run(Command::new("cp").arg("-a").arg(base).arg(postgres.data_dir()))?;
    let restore = format!("'test -e \"{0}/%f\" && cp \"{0}/%f\" \"%p\"'", archive.display());
    let (name, value) = match target {
        Target::Lsn(lsn) => ("recovery_target_lsn", format!("'{lsn}'")),
        Target::Time(time) => ("recovery_target_time", format!("'{time}'")),
    };
    let inclusive = if matches!(target, Target::Lsn(_)) { "off" } else { "on" };
    let recovery = [
        ("restore_command", &restore[..]),
        (name, &value),
        ("recovery_target_inclusive", inclusive),
        ("recovery_target_action", "'promote'"),
        ("hot_standby", "off"),
    ];
    make_plain(&postgres, &[settings, &recovery].concat())?;
    fs::write(postgres.data_dir().join("recovery.signal"), "")?;
    postgres.own()?;
    postgres.start()?;
    let deadline = Instant::now() + CATCH_UP_MAX;
    // Without hot standby it takes no connections before it was promoted.
    while let Err(error) = postgres.psql("postgres", "SELECT 1") {
        if Instant::now() > deadline || !postgres.data_dir().join("postmaster.pid").exists() {
            return Err(error).with_context(|| format!("recovery to {target:?} does not end; the log:\n{}", postgres.log()));
        }
        std::thread::sleep(POLL);
    }
    Ok(postgres)
}

/// Waits until a standby has replayed everything up to `lsn`.
///
/// # Errors
/// When it does not.
pub fn wait_replayed(standby: &Postgres, lsn: Lsn) -> anyhow::Result<()> {
    let deadline = Instant::now() + CATCH_UP_MAX;
    loop {
        let replayed = standby.psql("postgres", "SELECT pg_last_wal_replay_lsn()")?;
        if replayed.trim().parse::<Lsn>().context("an LSN")? >= lsn {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the standby stays at {replayed}, expected {lsn}; its log:\n{}", standby.log());
        }
        std::thread::sleep(POLL);
    }
}

/// Makes a copy of a cluster one that runs here: reachable by its own socket, with these settings.
///
/// # Errors
/// Those of the file system.
pub fn make_plain(postgres: &Postgres, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    fs::write(postgres.data_dir().join("pg_hba.conf"), "local all all trust\nlocal replication all trust\n")?;
    // In-place tablespaces are known by this setting only.
    postgres.configure(&[&[("allow_in_place_tablespaces", "on")], settings].concat())?;
    postgres.own()
}

/// Runs `command` to its end, gives its standard output.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}): {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
