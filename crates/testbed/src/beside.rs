//! Plain Postgres servers beside a compute: made from a base backup of it, as its standby, or recovered to a moment of
//! its WAL.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, Bytes};
use serde_json::Value;
use varve_postgres::lsn::{WAL_SEGMENT_SIZE, wal_segment_name};
use varve_postgres::wal::{Framer, RecordHeader, rmgr};
use varve_postgres::{Lsn, Major};

use crate::limit::{self, COMMAND_MAX, WaitError};
use crate::postgres::Postgres;

/// How long a standby or a recovery may take to get where it should.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);
/// Pause between looking.
const POLL: Duration = Duration::from_millis(20);
/// The role that computes let in through their private socket.
const INTERNAL_ROLE: &str = "varve";

/// The private side of a running compute, given as the CLI's JSON has it. For tests that run as root, as computes are
/// reached then.
#[derive(Clone, Debug)]
pub struct Private {
    major: Major,
    run: PathBuf,
    port: u64,
    /// As a client of the tenant's connects.
    uri: String,
}

impl Private {
    /// Of this compute.
    ///
    /// # Errors
    /// When the JSON is not a compute's, or its data directory is not there.
    pub fn of(compute: &Value) -> anyhow::Result<Private> {
        let id = compute["id"].as_str().context("a compute has an id")?;
        let port = compute["port"].as_u64().context("a compute has a port")?;
        let run = Path::new("/run/varve").join(id.get(..12).context("an id of 12 characters and more")?);
        let version = fs::read_to_string(run.join("pgdata/PG_VERSION")).context("a running compute has a data directory")?;
        let major = version.trim().parse().ok().and_then(Major::from_number).with_context(|| format!("unknown major {version:?}"))?;
        let uri = compute["conninfo"].as_str().context("a compute has a connection string")?.to_owned();
        Ok(Private { major, run, port, uri })
    }

    /// Its mounted data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.run.join("pgdata")
    }

    /// The folder of its private socket.
    pub fn socket_dir(&self) -> PathBuf {
        self.run.join("socket")
    }

    /// A connection string of the internal superuser.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user={INTERNAL_ROLE}", self.socket_dir().display(), self.port)
    }

    /// A stopped plain server whose data directory is a base backup of the compute: by `pg_basebackup`, or by hand
    /// where a major's package has none. Nobody may write meanwhile.
    ///
    /// # Errors
    /// When there is no base backup.
    pub fn base_backup(&self, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
        let postgres = Postgres::bare(self.major)?;
        let program = crate::postgres::bin_dir(self.major)?.join("pg_basebackup");
        if program.exists() {
            let mut command = Command::new(program);
            command.arg("-h").arg(self.socket_dir()).args(["-p", &self.port.to_string(), "-U", INTERNAL_ROLE]);
            run(command.args(["-X", "stream", "-c", "fast", "--no-sync", "-D"]).arg(postgres.data_dir()))?;
        } else {
            self.backup_by_hand(&postgres.data_dir())?;
        }
        make_plain(&postgres, settings)?;
        Ok(postgres)
    }

    fn backup_by_hand(&self, to: &Path) -> anyhow::Result<()> {
        let (start, stop) = if self.major < Major::V15 {
            ("pg_start_backup('by hand', true, false)", "pg_stop_backup(false, false)")
        } else {
            ("pg_backup_start('by hand', true)", "pg_backup_stop(false)")
        };
        let mut psql = Command::new("psql");
        psql.arg(format!("{} dbname=postgres", self.conninfo())).args(["-XqAt", "-v", "ON_ERROR_STOP=1"]);
        // All in one session, which must live from the backup's start to its end.
        psql.args(["-o", "/dev/null", "-c", &format!("SELECT {start}")]);
        psql.args(["-c", &format!("\\! cp -a {} {}", self.data_dir().display(), to.display()), "-c", "\\o"]);
        let label = run(psql.args(["-c", &format!("SELECT labelfile FROM {stop}")]))?;
        fs::write(to.join("backup_label"), label.trim_end().to_owned() + "\n")?;
        for file in ["postmaster.pid", "postmaster.opts", "pg_wal"] {
            fs::remove_file(to.join(file)).with_context(|| format!("removing {file} from the backup"))?;
        }
        let copied = to.join("pg_wal");
        fs::create_dir(&copied)?;
        for segment in crate::postgres::wal_segments(&self.data_dir().join("pg_wal"))? {
            fs::copy(&segment, copied.join(segment.file_name().context("a segment has a name")?))?;
        }
        fs::remove_dir_all(to.join("pg_replslot"))?;
        fs::create_dir(to.join("pg_replslot")).context("a backup has no slots")
    }

    /// A plain server that follows the compute.
    ///
    /// # Errors
    /// When `pg_basebackup` fails or the server does not start.
    pub fn standby(&self, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
        // It runs as a user whom the private socket does not take for Varve.
        let primary = format!("'{}'", self.uri);
        let mut postgres = self.base_backup(&[settings, &[("primary_conninfo", &primary)]].concat())?;
        fs::write(postgres.data_dir().join("standby.signal"), "")?;
        postgres.own()?;
        postgres.start()?;
        Ok(postgres)
    }

    /// Copies the compute's WAL, which must have been kept: `wal_keep_size` says how much of it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn archive(&self) -> anyhow::Result<Archive> {
        let dir = tempfile::Builder::new().prefix("varve-archive-").tempdir()?;
        // Servers that recover from it run as another user.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        for segment in crate::postgres::wal_segments(&self.data_dir().join("pg_wal"))? {
            let copied = dir.path().join(segment.file_name().context("a segment has a name")?);
            fs::copy(&segment, &copied)?;
            fs::set_permissions(copied, fs::Permissions::from_mode(0o644))?;
        }
        Ok(Archive { major: self.major, dir })
    }
}

/// The WAL of a compute.
#[derive(Debug)]
pub struct Archive {
    major: Major,
    dir: tempfile::TempDir,
}

impl Archive {
    /// Where the segments are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// All records of WAL timeline `tli` that begin between two record boundaries: as `pg_waldump` reads them where the
    /// major's package has one, or as we do.
    ///
    /// # Errors
    /// When what is found is no record before the end of WAL.
    pub fn records(&self, tli: u32, from: Lsn, to: Lsn) -> anyhow::Result<Vec<WalRecord>> {
        let program = crate::postgres::bin_dir(self.major)?.join("pg_waldump");
        if !program.exists() {
            return self.framed(tli, from, to);
        }
        let mut command = Command::new(program);
        command.args(["-t", &tli.to_string(), "-s", &from.to_string(), "-e", &to.to_string(), "-p"]).arg(self.dir.path());
        let text = run(command.env("TZ", "UTC"))?;
        // It says so on a line of its own when the first record begins later.
        text.lines().filter(|line| line.starts_with("rmgr: ")).map(WalRecord::parse).collect()
    }

    fn framed(&self, tli: u32, from: Lsn, to: Lsn) -> anyhow::Result<Vec<WalRecord>> {
        let mut framer = Framer::from_page(self.major, None, from);
        let mut records = Vec::new();
        for number in from.segment_number()..=to.segment_number() {
            let begin = from.page_start().max(Lsn(number * WAL_SEGMENT_SIZE));
            let mut bytes = Bytes::from(fs::read(self.dir().join(wal_segment_name(tli, number)))?);
            bytes.advance(begin.segment_offset() as usize);
            if number == to.segment_number() {
                bytes.truncate((to.0 - begin.0) as usize);
            }
            while let Some(record) = framer.next_record(&mut bytes)? {
                if record.start >= from {
                    let header = RecordHeader::decode(&record.bytes).context("a whole record has a header")?;
                    records.push(WalRecord { start: record.start, rmgr: rmgr::name(header.rmid), end_time: None });
                }
            }
        }
        Ok(records)
    }
}

/// A record of an [`Archive`].
#[derive(Clone, Debug)]
pub struct WalRecord {
    /// Where it begins.
    pub start: Lsn,
    /// Its resource manager.
    pub rmgr: String,
    /// When it ended a transaction, as `pg_waldump` prints the time, in UTC.
    pub end_time: Option<String>,
}

impl WalRecord {
    fn parse(line: &str) -> anyhow::Result<WalRecord> {
        let parse = || {
            let rmgr = line.strip_prefix("rmgr: ")?.split_whitespace().next()?;
            let (_, rest) = line.split_once("lsn: ")?;
            let (lsn, rest) = rest.split_once(',')?;
            let (_, description) = rest.split_once("desc: ")?;
            let end_time = if rmgr == "Transaction" { end_time(description) } else { None };
            Some(WalRecord { start: lsn.parse().ok()?, rmgr: rmgr.to_owned(), end_time })
        };
        parse().with_context(|| format!("pg_waldump printed {line:?}"))
    }
}

/// The time in the description of a commit or an abort.
fn end_time(description: &str) -> Option<String> {
    let (what, rest) = description.split_once(' ')?;
    if !what.starts_with("COMMIT") && !what.starts_with("ABORT") {
        return None;
    }
    // "COMMIT_PREPARED 749: 2026-..." names the transaction first.
    let rest = rest.split_once(": ").filter(|(xid, _)| xid.bytes().all(|byte| byte.is_ascii_digit())).map_or(rest, |(_, time)| time);
    rest.split_once(" UTC").map(|(time, _)| time.to_owned())
}

/// Where a recovery stops.
#[derive(Clone, Debug)]
pub enum Target {
    /// Before the first record that begins here or later: all that ends here or before is there.
    Lsn(Lsn),
    /// As `recovery_target_time` means it.
    Time(String),
}

/// Starts a plain server on a copy of `base` (a stopped base backup) and lets it recover from the WAL in `archive` to
/// `target`.
///
/// # Errors
/// When it does not get there.
pub fn recovered(base: &Postgres, archive: &Archive, target: &Target, settings: &[(&str, &str)]) -> anyhow::Result<Postgres> {
    let mut postgres = Postgres::bare(base.major())?;
    run(Command::new("cp").arg("-a").arg(base.data_dir()).arg(postgres.data_dir()))?;
    let restore = format!("'test -e \"{0}/%f\" && cp \"{0}/%f\" \"%p\"'", archive.dir().display());
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
            let late = WaitError::new(format!("the standby, at {replayed}, to replay up to {lsn}"), CATCH_UP_MAX, Some(standby.dir()));
            bail!("{late}\nits log:\n{}", standby.log());
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
    let output = limit::output(command, COMMAND_MAX, None)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}): {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
