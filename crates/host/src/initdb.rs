//! Running `initdb`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use varve_postgres::Major;
use varve_postgres::control::ClusterState;

use super::{TemplateError, read_control};
use crate::cluster::ClusterFacts;

/// The superuser of every tenant.
pub const SUPERUSER: &str = "postgres";
/// The role under which Varve itself connects.
pub const SYSTEM_ROLE: &str = "varve";
/// The collation of every tenant: sorts by code point, and is the same on all machines.
const LOCALE: &str = "C.UTF-8";
/// How much of a program's output an error repeats.
const OUTPUT_MAX: usize = 4000;

/// The user that Postgres runs as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A fresh cluster, stopped.
#[derive(Clone, Debug)]
pub struct Template {
    /// Its data directory.
    pub data_dir: PathBuf,
    /// What is the same for all tenants that begin with it.
    pub cluster: ClusterFacts,
}

/// The major of the server whose programs are in `bin_dir`.
///
/// # Errors
/// When there is none, or it is not supported.
pub fn server_major(bin_dir: &Path) -> Result<Major, TemplateError> {
    let postgres = bin_dir.join("postgres");
    let missing = || TemplateError::NoPostgres { bin_dir: bin_dir.to_owned() };
    if !postgres.is_file() {
        return Err(missing());
    }
    let output = Command::new(&postgres).arg("--version").stdin(Stdio::null()).output().map_err(|_| missing())?;
    // "postgres (PostgreSQL) 15.18 (Debian ...)"
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let number =
        text.split_whitespace().nth(2).and_then(|version| version.split(['.', 'd', 'b', 'r']).next()).and_then(|major| major.parse().ok());
    number.and_then(Major::from_number).ok_or_else(|| TemplateError::UnsupportedVersion { bin_dir: bin_dir.to_owned(), version: text })
}

/// Runs the `initdb` in `bin_dir` in the new folder `work_dir/data`, and makes the roles that every tenant has. `run_as` is needed when we are root.
///
/// # Errors
/// When there is no such server, it may not run, or it fails.
pub fn prepare_template(bin_dir: &Path, work_dir: &Path, run_as: Option<RunAs>) -> Result<Template, TemplateError> {
    let major = server_major(bin_dir)?;
    let is_root = rustix::process::geteuid().is_root();
    if is_root && run_as.is_none_or(|user| user.uid == 0) {
        return Err(TemplateError::Root);
    }
    let run_as = run_as.filter(|_| is_root);
    let data_dir = work_dir.join("data");
    fs::create_dir_all(&data_dir).map_err(TemplateError::io(&data_dir))?;
    fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o700)).map_err(TemplateError::io(&data_dir))?;
    if let Some(user) = run_as {
        chown(&data_dir, Some(user.uid), Some(user.gid)).map_err(TemplateError::io(&data_dir))?;
    }

    let mut initdb = command(&bin_dir.join("initdb"), &data_dir, run_as);
    initdb.arg("-D").arg(&data_dir).args(["-U", SUPERUSER, "-E", "UTF8", "--locale", LOCALE, "--auth=scram-sha-256", "--no-sync"]);
    // There is no password yet; without this initdb refuses an authentication method that needs one. The files it writes are not used.
    initdb.args(["--auth-local=trust", "--auth-host=reject", "--no-instructions"]);
    if major >= Major::V15 {
        initdb.arg("--locale-provider=libc");
    }
    if major >= Major::V18 {
        initdb.arg("--no-data-checksums");
    }
    run(&mut initdb, "initdb", "")?;

    let mut single = command(&bin_dir.join("postgres"), &data_dir, run_as);
    single.args(["--single", "-F", "-j", "-c", "exit_on_error=on", "-D"]).arg(&data_dir).arg("postgres");
    run(&mut single, "postgres --single", &format!("CREATE ROLE {SYSTEM_ROLE} LOGIN SUPERUSER REPLICATION;\n\n"))?;

    let control = read_control(&data_dir, major)?;
    if control.state != ClusterState::ShutDown {
        return Err(TemplateError::NotShutDown { dir: data_dir, state: control.state.name() });
    }
    let cluster = ClusterFacts::of_control(&control).map_err(|what| TemplateError::Unsupported { dir: data_dir.clone(), what })?;
    Ok(Template { data_dir, cluster })
}

fn command(program: &Path, data_dir: &Path, run_as: Option<RunAs>) -> Command {
    let mut command = Command::new(program);
    // A folder that the other user may stand in, and settings of ours that must not reach the server.
    command.current_dir(data_dir).env_clear().env("LC_ALL", LOCALE).env("TZ", "UTC");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    if let Some(user) = run_as {
        command.uid(user.uid).gid(user.gid);
    }
    command
}

fn run(command: &mut Command, program: &str, input: &str) -> Result<(), TemplateError> {
    let failed = |what: String| TemplateError::Program { program: program.to_owned(), what };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended before it read everything says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    let said: String = said.trim().chars().rev().take(OUTPUT_MAX).collect::<Vec<_>>().into_iter().rev().collect();
    Err(failed(format!("{}; it said:\n{said}", output.status)))
}
