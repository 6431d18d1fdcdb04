//! A `varve dev` to test against: starts the binary on free ports with folders of its own, runs CLI commands on it,
//! kills it, loses its disk, and takes everything away at the end.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use varve_postgres::{Lsn, Major};

use crate::limit::{self, COMMAND_MAX, Process};
use crate::postgres::bin_dir;

/// How long a server may take until it answers, on a machine where everything runs at once.
const START_MAX: Duration = Duration::from_secs(60);

/// How long one question whether it answers may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How long each step of taking everything away may take, before it is killed.
const END_MAX: Duration = Duration::from_secs(30);

/// How long background work of Postgres may take to end.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// A running `varve dev` and its folders.
#[derive(Debug)]
pub struct Dev {
    binary: PathBuf,
    folder: tempfile::TempDir,
    store: Option<String>,
    variables: Vec<(String, String)>,
    pg_bin_dirs: Vec<String>,
    arguments: Vec<String>,
    http: u16,
    pages: u16,
    process: Option<Child>,
}

/// Ports of tests: below those that the kernel gives to whoever asks for any, such as computes and clients.
const PORTS: std::ops::Range<u16> = 10_240..32_768;

/// A port that is free, and that nobody in this process was given before.
///
/// # Errors
/// When none is.
pub fn free_port() -> anyhow::Result<u16> {
    static NEXT: OnceLock<AtomicU32> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU32::new(std::process::id().wrapping_mul(7919)));
    for _ in PORTS {
        let port = PORTS.start + (next.fetch_add(1, Ordering::Relaxed) % PORTS.len() as u32) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no port from {} to {} is free", PORTS.start, PORTS.end - 1)
}

impl Dev {
    /// Starts `binary dev` on the local folder.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn start(binary: &str) -> anyhow::Result<Dev> {
        Self::start_on(binary, None, Vec::new())
    }

    /// Starts `binary dev` on the local folder, for tenants of `major`, with more arguments.
    ///
    /// # Errors
    /// When the major is not installed, or the server does not answer in time.
    pub fn start_for(binary: &str, major: Major, arguments: &[&str]) -> anyhow::Result<Dev> {
        Self::start_with(binary, major, &bin_dir(major)?, arguments)
    }

    /// Starts `binary dev` on the local folder, for tenants of `major` whose programs are in `dir`, with more
    /// arguments.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn start_with(binary: &str, major: Major, dir: &Path, arguments: &[&str]) -> anyhow::Result<Dev> {
        let mut dev = Self::prepare(binary, None, Vec::new())?;
        dev.arguments = arguments.iter().map(ToString::to_string).collect();
        dev.set_pg_bin_dir(major, dir);
        dev.run()?;
        Ok(dev)
    }

    /// Starts `binary dev` on `store` (the folder beside its own when `None`) with these environment variables.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn start_on(binary: &str, store: Option<String>, variables: Vec<(String, String)>) -> anyhow::Result<Dev> {
        let mut dev = Self::prepare(binary, store, variables)?;
        dev.run()?;
        Ok(dev)
    }

    fn prepare(binary: &str, store: Option<String>, variables: Vec<(String, String)>) -> anyhow::Result<Dev> {
        Ok(Dev {
            binary: binary.into(),
            folder: tempfile::Builder::new().prefix("varve-dev-").tempdir()?,
            store,
            variables,
            pg_bin_dirs: Vec::new(),
            arguments: Vec::new(),
            http: free_port()?,
            pages: free_port()?,
            process: None,
        })
    }

    /// Tells the server, from its next start on, where the programs of `major` are.
    pub fn set_pg_bin_dir(&mut self, major: Major, dir: &Path) {
        let of_major = format!("{major}=");
        self.pg_bin_dirs.retain(|known| !known.starts_with(&of_major));
        self.pg_bin_dirs.push(format!("{of_major}{}", dir.display()));
    }

    /// Gives the server other arguments, from its next start on.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    /// The pageserver's own folder, which may be lost.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The store's address.
    pub fn store(&self) -> String {
        self.store.clone().unwrap_or_else(|| self.folder.path().join("store").display().to_string())
    }

    /// Where the server logs.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("dev.log")
    }

    /// Address of the admin HTTP API.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    /// The server's process, while it runs.
    pub fn server_pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Port of the page service.
    pub fn pages_port(&self) -> u16 {
        self.pages
    }

    /// The command that starts the server.
    pub fn dev_command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("dev")
            .arg("--data")
            .arg(self.data())
            .args(["--store", &self.store()])
            .args(["--http", &format!("127.0.0.1:{}", self.http)])
            .args(["--pages", &format!("127.0.0.1:{}", self.pages)])
            .args(self.pg_bin_dirs.iter().flat_map(|dir| ["--pg-bin-dir", dir]))
            .args(&self.arguments)
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// Starts the server, which must not run.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn run(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "the server runs already");
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let child = self.dev_command().stdout(log.try_clone()?).stderr(log).spawn().context("varve dev cannot be started")?;
        let child = self.process.insert(child);
        let folder = self.folder.path();
        limit::until("varve dev to answer", START_MAX, Some(folder), || {
            if let Some(status) = child.try_wait()? {
                let log = std::fs::read_to_string(folder.join("dev.log")).unwrap_or_default();
                bail!("varve dev ended ({status}) before it answered:\n{log}");
            }
            Ok(is_alive(self.http).then_some(()))
        })
    }

    /// Stops the server as Ctrl-C does.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.process.take() else { return Ok(()) };
        signal(child.id(), rustix::process::Signal::INT);
        let status = limit::wait(&mut child, "varve dev to end on Ctrl-C", COMMAND_MAX, Some(self.folder()))?;
        ensure!(status.success(), "varve dev ended with {status} on Ctrl-C");
        Ok(())
    }

    /// Kills the server at once.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.process.take() {
            child.kill()?;
            limit::wait(&mut child, "varve dev to be gone", COMMAND_MAX, Some(self.folder()))?;
        }
        Ok(())
    }

    /// Loses the pageserver's own disk. The server must not run.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn wipe(&self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "the server still runs");
        std::fs::remove_dir_all(self.data()).context("the server's folder cannot be removed")
    }

    /// Runs a CLI command and gives what it printed and its status.
    ///
    /// # Errors
    /// When the binary cannot be run, or does not end in time.
    pub fn cli(&self, args: &[&str]) -> anyhow::Result<Output> {
        self.output(Command::new(&self.binary).args(args).env("VARVE_URL", self.url()))
    }

    /// Runs a command to its end, and gives what it printed.
    ///
    /// # Errors
    /// When it cannot be run, or does not end in time: with what the processes of this server did.
    pub fn output(&self, command: &mut Command) -> anyhow::Result<Output> {
        limit::output(command, COMMAND_MAX, Some(self.folder()))
    }

    /// Waits until `look` finds something.
    ///
    /// # Errors
    /// What `look` fails with, or that it took longer than `limit`: with what the processes of this server did.
    pub fn until<T>(&self, what: &str, limit: Duration, look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
        limit::until(what, limit, Some(self.folder()), look)
    }

    /// Runs a CLI command with `--json`, which must succeed, and gives its value.
    ///
    /// # Errors
    /// When the command fails: with what it said.
    pub fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let output = self.cli(&[args, &["--json"]].concat())?;
        ensure!(
            output.status.success(),
            "varve {} failed ({}): {}\nserver log: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log().display()
        );
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("varve {} --json printed no JSON: {}", args.join(" "), String::from_utf8_lossy(&output.stdout)))
    }

    /// Runs a CLI command which must fail, and gives what it said on standard error.
    ///
    /// # Errors
    /// When the command succeeds.
    pub fn refused(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.cli(args)?;
        ensure!(!output.status.success(), "varve {} succeeded, expected an error", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Starts a compute and gives its libpq URI.
    ///
    /// # Errors
    /// When it does not start.
    pub fn compute(&self, branch: &str, args: &[&str]) -> anyhow::Result<String> {
        let compute = self.json(&[&["compute", "start", branch], args].concat())?;
        Ok(compute["conninfo"].as_str().context("a compute has a conninfo")?.to_owned())
    }

    /// Keeps the folders, for someone to look at after a failure.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Sends a signal to a process, which may be gone.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Runs psql on `conninfo` and gives the unaligned output.
///
/// # Errors
/// When psql or a statement fails: with what it said.
pub fn psql(conninfo: &str, sql: &str) -> anyhow::Result<String> {
    let mut command = Command::new("psql");
    let output = limit::output(command.args([conninfo, "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", sql]), COMMAND_MAX, None)?;
    ensure!(output.status.success(), "psql failed on {sql:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Lets background work of the server at `conninfo` end, makes a checkpoint, and gives the end of WAL: from then on its
/// files are what they would be if it was stopped, as long as nobody writes.
///
/// # Errors
/// When a statement fails, or the background work does not end.
pub fn settle(conninfo: &str) -> anyhow::Result<Lsn> {
    psql(conninfo, "ALTER SYSTEM SET autovacuum = off")?;
    psql(conninfo, "SELECT pg_reload_conf()")?;
    limit::until("autovacuum's workers to end", SETTLE_MAX, None, || {
        let workers = psql(conninfo, "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'autovacuum worker'")?;
        Ok((workers == "0").then_some(()))
    })?;
    psql(conninfo, "CHECKPOINT")?;
    psql(conninfo, "SELECT pg_current_wal_flush_lsn()")?.parse().context("an LSN")
}

/// Runs a client program of Postgres, which must succeed, and gives its output.
///
/// # Errors
/// When it fails: with what it said.
pub fn program(name: &str, args: &[&str]) -> anyhow::Result<String> {
    // Debian puts wrappers of the common clients on the PATH, and not all programs.
    let beside = Path::new("/usr/lib/postgresql/15/bin").join(name);
    let name = if beside.exists() { beside.display().to_string() } else { name.to_owned() };
    let output = limit::output(Command::new(&name).args(args), COMMAND_MAX, None)?;
    ensure!(output.status.success(), "{name} {} failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Drop for Dev {
    fn drop(&mut self) {
        let run = |args: &[&str]| {
            let mut command = Command::new(&self.binary);
            limit::output(command.args(args).env("VARVE_URL", self.url()), END_MAX, Some(self.folder()))
        };
        if let Ok(output) = run(&["compute", "list", "--json"]) {
            let computes: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
            for compute in &computes {
                if let Some(id) = compute["id"].as_str() {
                    let _ = run(&["compute", "stop", id]);
                }
            }
        }
        let _ = self.kill();
        // What a failed test left: processes that were started to work in our folder.
        for process in Process::in_folder(self.folder.path()) {
            signal(process.pid, rustix::process::Signal::KILL);
        }
    }
}

/// Whether a server answers on this port. Its socket listens before it has its folder.
fn is_alive(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut socket = std::net::TcpStream::connect(("127.0.0.1", port))?;
        socket.set_read_timeout(Some(ANSWER_MAX))?;
        socket.write_all(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

/// Runs `pg_amcheck --heapallindexed` on all databases of the server at `conninfo`, a libpq URI or string.
///
/// # Errors
/// When it finds corruption: with what it said.
pub fn amcheck(conninfo: &str) -> anyhow::Result<()> {
    let mut command = Command::new("/usr/lib/postgresql/15/bin/pg_amcheck");
    command.args(["--all", "--heapallindexed", "--install-missing", "--maintenance-db", conninfo]);
    // Where the extension is there already, that is noticed.
    let output = limit::output(command.env("PGOPTIONS", "-c client_min_messages=warning"), COMMAND_MAX, None)?;
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    ensure!(output.status.success() && said.is_empty(), "pg_amcheck found: {}", String::from_utf8_lossy(&said));
    Ok(())
}
