//! Running `initdb`: the data directory that new tenants of a Postgres version begin with, as an archive to be sent.
//!
//! What it made is checked where it is imported; here it is only made and packed.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use varve_postgres::Major;

use crate::bin_dirs::Installed;
use crate::dirs::User;

/// The superuser of every tenant.
pub const SUPERUSER: &str = "postgres";
/// The role under which Varve itself connects.
pub const SYSTEM_ROLE: &str = "varve";
/// The collation of every tenant: sorts by code point, and is the same on all machines.
const LOCALE: &str = "C.UTF-8";
/// How much of a program's output an error repeats.
const OUTPUT_MAX: usize = 4000;
/// Mostly zeros and catalogs: this level packs 40 MB into 3 within a third of a second.
const COMPRESSION: i32 = 3;

/// A data directory that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitdbError {
    /// Postgres refuses to run as root.
    #[error("Postgres refuses to run as root: start varve as another user, or give it a user 'postgres' to run it as")]
    Root,
    /// A program did not succeed.
    #[error("{program} failed ({status}); it said:\n{said}")]
    Program {
        /// Which.
        program: &'static str,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
    /// A program did not run, or a file could not be made or read.
    #[error("{what}: {source}")]
    Io {
        /// What we were doing.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl InitdbError {
    fn io(what: &'static str) -> impl Fn(io::Error) -> InitdbError {
        move |source| InitdbError::Io { what, source }
    }
}

/// Runs `initdb` in a temporary folder, makes the roles that every tenant has, and gives the stopped data directory as
/// a tar archive, compressed with zstd. Blocks. `user` is whom it runs as when we are root.
///
/// # Errors
/// [`InitdbError`].
pub fn template_archive(postgres: &Installed, user: User) -> Result<Vec<u8>, InitdbError> {
    let work = tempfile::Builder::new().prefix("varve-template-").tempdir().map_err(InitdbError::io("no temporary folder"))?;
    // The other user must reach what is below.
    fs::set_permissions(work.path(), fs::Permissions::from_mode(0o711)).map_err(InitdbError::io("the temporary folder"))?;
    let data_dir = work.path().join("data");
    make(postgres, &data_dir, user)?;
    pack(&data_dir).map_err(InitdbError::io("the data directory cannot be packed"))
}

fn make(postgres: &Installed, data_dir: &Path, user: User) -> Result<(), InitdbError> {
    let is_root = rustix::process::geteuid().is_root();
    if is_root && user.uid == 0 {
        return Err(InitdbError::Root);
    }
    let run_as = is_root.then_some(user);
    fs::create_dir_all(data_dir).map_err(InitdbError::io("the data directory cannot be made"))?;
    fs::set_permissions(data_dir, fs::Permissions::from_mode(0o700)).map_err(InitdbError::io("the data directory"))?;
    if let Some(user) = run_as {
        chown(data_dir, Some(user.uid), Some(user.gid)).map_err(InitdbError::io("the data directory"))?;
    }

    let mut initdb = command(&postgres.bin_dir.join("initdb"), data_dir, run_as);
    initdb.arg("-D").arg(data_dir).args(["-U", SUPERUSER, "-E", "UTF8", "--locale", LOCALE, "--auth=scram-sha-256", "--no-sync"]);
    // There is no password yet; without this initdb refuses an authentication method that needs one. The files it
    // writes are not used.
    initdb.args(["--auth-local=trust", "--auth-host=reject", "--no-instructions"]);
    if postgres.major >= Major::V15 {
        initdb.arg("--locale-provider=libc");
    }
    if postgres.major >= Major::V18 {
        initdb.arg("--no-data-checksums");
    }
    run(&mut initdb, "initdb", "")?;

    let mut single = command(&postgres.bin_dir.join("postgres"), data_dir, run_as);
    single.args(["--single", "-F", "-j", "-c", "exit_on_error=on", "-D"]).arg(data_dir).arg("postgres");
    run(&mut single, "postgres --single", &format!("CREATE ROLE {SYSTEM_ROLE} LOGIN SUPERUSER REPLICATION;\n\n"))
}

fn pack(data_dir: &Path) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), COMPRESSION)?);
    archive.follow_symlinks(false);
    archive.sparse(false);
    archive.append_dir_all(".", data_dir)?;
    archive.into_inner()?.finish()
}

fn command(program: &Path, data_dir: &Path, run_as: Option<User>) -> Command {
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

fn run(command: &mut Command, program: &'static str, input: &str) -> Result<(), InitdbError> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(InitdbError::io(program))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended before it read everything says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(InitdbError::io(program))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(OUTPUT_MAX)..]).trim().to_owned();
    Err(InitdbError::Program { program, status: output.status, said })
}
