//! Server and host are two processes of different users with different data folders, and have no file in common but
//! sockets.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::Value;
use varve_testbed::dev::{free_port, psql, signal};
use varve_testbed::limit::{self, COMMAND_MAX};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// A user that nobody else is, for the server.
const SERVER_USER: u32 = 64_877;
const BACK_MAX: Duration = Duration::from_secs(60);

/// Two machines, as far as one can be two.
struct Two {
    folder: tempfile::TempDir,
    http: u16,
    pages: u16,
    server: Option<Child>,
    host: Option<Child>,
}

impl Two {
    fn start() -> anyhow::Result<Two> {
        let folder = tempfile::Builder::new().prefix("varve-two-").tempdir()?;
        let mut two = Two { folder, http: free_port()?, pages: free_port()?, server: None, host: None };
        std::fs::set_permissions(two.folder.path(), std::fs::Permissions::from_mode(0o711))?;
        for (name, owner) in [("server", SERVER_USER), ("host", 0)] {
            let path = two.path(name);
            std::fs::create_dir(&path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
            chown(&path, Some(owner), Some(owner))?;
        }
        // Where the server's user can run it, wherever it was built.
        std::fs::copy(VARVE, two.path("varve"))?;
        // Each has its own copy of the token, as an operator would give it to them.
        let token = "f".repeat(64);
        for (name, owner) in [("server/host-token", SERVER_USER), ("host/server-token", 0)] {
            let path = two.path(name);
            std::fs::write(&path, &token)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(owner), Some(owner))?;
        }
        two.start_server()?;
        two.start_host()?;
        Ok(two)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self, name: &str) -> anyhow::Result<File> {
        Ok(File::options().create(true).append(true).open(self.path(name))?)
    }

    fn start_server(&mut self) -> anyhow::Result<()> {
        let log = self.log("server.log")?;
        let user = SERVER_USER.to_string();
        let child = Command::new("setpriv")
            .args(["--reuid", &user, "--regid", &user, "--clear-groups", "--"])
            .arg(self.path("varve"))
            .args(["dev", "--no-host", "--http", &format!("127.0.0.1:{}", self.http), "--pages", &format!("127.0.0.1:{}", self.pages)])
            .arg("--data")
            .arg(self.path("server/data"))
            .arg("--host-token-file")
            .arg(self.path("server/host-token"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("the server cannot be started")?;
        self.server = Some(child);
        self.until("the server answers", BACK_MAX, || std::net::TcpStream::connect(("127.0.0.1", self.http)).is_ok())
    }

    fn until(&self, what: &str, max: Duration, mut is: impl FnMut() -> bool) -> anyhow::Result<()> {
        limit::until(what, max, Some(self.folder.path()), || Ok(is().then_some(())))
    }

    fn start_host(&mut self) -> anyhow::Result<()> {
        let log = self.log("host.log")?;
        let child = Command::new(self.path("varve"))
            .args(["host", "--name", "h1", "--control", &format!("http://127.0.0.1:{}", self.http)])
            .arg("--data")
            .arg(self.path("host/data"))
            .arg("--token-file")
            .arg(self.path("host/server-token"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("the host cannot be started")?;
        self.host = Some(child);
        Ok(())
    }

    fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(VARVE);
        command.args(args).arg("--json").env("VARVE_URL", format!("http://127.0.0.1:{}", self.http)).stdin(Stdio::null());
        let output = limit::output(&mut command, COMMAND_MAX, Some(self.folder.path()))?;
        let logs = ["server.log", "host.log"].map(|name| std::fs::read_to_string(self.path(name)).unwrap_or_default()).join("\n-- host\n");
        ensure!(output.status.success(), "varve {args:?}: {}\n{logs}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).context("JSON")
    }

    fn compute(&self) -> anyhow::Result<Value> {
        let list = self.json(&["compute", "list"])?;
        list.as_array().and_then(|list| list.first()).cloned().context("a compute")
    }

    fn kill(child: &mut Option<Child>) -> anyhow::Result<()> {
        if let Some(mut child) = child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        if let Ok(compute) = self.compute()
            && let Some(id) = compute["id"].as_str()
        {
            let _ = self.json(&["compute", "stop", id]);
        }
        let _ = Self::kill(&mut self.host);
        let _ = Self::kill(&mut self.server);
    }
}

fn pid(compute: &Value, which: &str) -> anyhow::Result<u32> {
    compute[which].as_u64().and_then(|pid| u32::try_from(pid).ok()).with_context(|| format!("{which} of {compute}"))
}

fn runs(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn server_and_host_share_nothing_but_sockets() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be two users");
        return Ok(());
    }
    let mut two = Two::start()?;
    // initdb runs on the host: the server's user has no right to anything there.
    two.json(&["tenant", "create", "acme"])?;
    let started = two.json(&["compute", "start", "acme/main"])?;
    let db = started["conninfo"].as_str().context("a conninfo")?.to_owned();
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")?;
    let before = psql(&db, "SELECT pg_current_wal_flush_lsn()")?;
    psql(&db, "DELETE FROM t WHERE i > 10")?;

    // A restore, while the compute runs: its connection string shows what the branch's name has.
    two.json(&["branch", "restore", "acme/main", "--lsn", &before])?;
    two.until("the restored rows are served", BACK_MAX, || psql(&db, "SELECT count(*) FROM t").is_ok_and(|rows| rows == "1000"))?;

    // The server goes and comes: commits wait meanwhile, and nothing is lost.
    Two::kill(&mut two.server)?;
    let writer = {
        let db = db.clone();
        std::thread::spawn(move || psql(&db, "INSERT INTO t VALUES (5000)"))
    };
    two.start_server()?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer"))??;

    // Host and compute process are killed: Postgres does not stay, and the next host has it running again.
    let compute = two.compute()?;
    let (postmaster, mount) = (pid(&compute, "pid")?, pid(&compute, "mount_pid")?);
    Two::kill(&mut two.host)?;
    ensure!(runs(postmaster), "a compute outlives its host");
    signal(mount, Signal::KILL);
    two.until("the postmaster is gone", Duration::from_secs(10), || !runs(postmaster))?;
    two.start_host()?;
    two.until("rows are served again", BACK_MAX, || psql(&db, "SELECT count(*) FROM t").is_ok_and(|rows| rows == "1001"))?;

    let id = two.compute()?["id"].as_str().context("an id")?.to_owned();
    two.json(&["compute", "stop", &id])?;
    ensure!(two.json(&["compute", "list"])?.as_array().is_some_and(Vec::is_empty), "no compute is left");
    ensure!(!two.path("host/data").join(&id).exists(), "what a stopped compute wrote is durable elsewhere; its folder is gone");
    let again = two.json(&["compute", "start", "acme/main"])?;
    let db = again["conninfo"].as_str().context("a conninfo")?;
    ensure!(psql(db, "SELECT count(*), max(i) FROM t")? == "1001|5000", "everything is there after a stop");
    Ok(())
}
