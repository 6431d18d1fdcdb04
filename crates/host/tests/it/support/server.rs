//! A Postgres on a given data directory.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use varve_postgres::Major;
use varve_testbed::postgres::bin_dir;

/// Settings of every server: a socket of its own, and what a compute runs with.
const SETTINGS: [(&str, &str); 4] =
    [("listen_addresses", ""), ("fsync", "off"), ("full_page_writes", "off"), ("max_prepared_transactions", "10")];

/// A running Postgres; stopped at once when dropped.
pub(crate) struct Server {
    data: PathBuf,
    dir: PathBuf,
    options: String,
    major: Major,
    uid: u32,
    gid: u32,
    running: bool,
}

impl Server {
    /// Starts it on `data`; its socket and its log are in `dir`.
    pub(crate) fn start(data: &Path, dir: &Path, settings: &[(&str, &str)]) -> Server {
        let meta = fs::metadata(data).expect("a data directory");
        let dir = dir.join("server");
        fs::create_dir_all(&dir).expect("a directory for the socket");
        chown(&dir, Some(meta.uid()), Some(meta.gid())).expect("its owner");
        let mut options = format!("-c unix_socket_directories={}", dir.display());
        for (name, value) in SETTINGS.iter().chain(settings) {
            options += &format!(" -c {name}='{value}'");
        }
        let version = fs::read_to_string(data.join("PG_VERSION")).expect("PG_VERSION");
        let major = version.trim().parse().ok().and_then(Major::from_number).expect("a major");
        let mut server = Server { data: data.to_owned(), dir, options, major, uid: meta.uid(), gid: meta.gid(), running: false };
        server.start_again();
        server
    }

    pub(crate) fn start_again(&mut self) {
        let log = self.dir.join("log");
        let mut start = self.command("pg_ctl");
        start.args(["start", "-w", "-t", "120"]).arg("-D").arg(&self.data).arg("-l").arg(&log).args(["-o", &self.options]);
        let status = start.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pg_ctl runs");
        assert!(status.success(), "Postgres starts on {}; its log:\n{}", self.data.display(), self.log());
        self.running = true;
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// A program of Postgres, as the user that owns the data.
    pub(crate) fn command(&self, program: &str) -> Command {
        // The packages of other majors lack some programs; those of 15 work with all servers.
        let own = bin_dir(self.major).expect("the programs of this major").join(program);
        let program = if own.exists() { own } else { bin_dir(Major::V15).expect("Postgres 15").join(program) };
        let mut command = Command::new(program);
        command.current_dir(&self.dir).uid(self.uid).gid(self.gid).stdin(Stdio::null());
        command.env("PGHOST", &self.dir).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    /// Runs a program of Postgres that must succeed; gives what it prints.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program).args(args).output().expect("it runs");
        self.check(&format!("{program} {args:?}"), &output)
    }

    /// Runs SQL that must succeed, gives what psql prints.
    pub(crate) fn psql(&self, db: &str, sql: &str) -> String {
        self.try_psql(db, sql).unwrap_or_else(|error| panic!("{error}\nPostgres's log:\n{}", self.log()))
    }

    /// Runs SQL, gives what psql prints, or what it says is wrong.
    pub(crate) fn try_psql(&self, db: &str, sql: &str) -> Result<String, String> {
        let output = self.command("psql").args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", db, "-c", sql]).output().expect("psql runs");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
        } else {
            Err(format!("{sql}\n{}", String::from_utf8_lossy(&output.stderr)))
        }
    }

    fn check(&self, what: &str, output: &Output) -> String {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{what} should succeed:\n{out}{err}\nPostgres's log:\n{}", self.log());
        out.into_owned()
    }

    pub(crate) fn stop(&mut self, mode: &str) {
        let output = self.command("pg_ctl").args(["stop", "-w", "-m", mode]).arg("-D").arg(&self.data).output().expect("pg_ctl runs");
        self.running = false;
        self.check("pg_ctl stop", &output);
    }

    pub(crate) fn postmaster_pid(&self) -> i32 {
        let file = fs::read_to_string(self.data.join("postmaster.pid")).expect("postmaster.pid");
        file.lines().next().and_then(|line| line.parse().ok()).expect("a process id")
    }

    /// Kills the postmaster and all its children, as the kernel's out-of-memory killer would.
    pub(crate) fn kill(&mut self) {
        let postmaster = self.postmaster_pid();
        let children = fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).unwrap_or_default();
        kill(postmaster);
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            kill(child);
        }
        // What is left of them keeps the shared memory.
        while Path::new(&format!("/proc/{postmaster}")).exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        self.running = false;
    }
}

pub(crate) fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.running {
            let _ = self.command("pg_ctl").args(["stop", "-w", "-m", "immediate"]).arg("-D").arg(&self.data).output();
        }
    }
}
