//! The launcher: a process of one thread that makes the namespaces and starts init in them. It then only waits: its
//! exit status is init's.

use std::io;
use std::process::{Command, ExitStatus};

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::UnshareFlags;

use super::spec::{NetworkAccess, Spec};

/// The first descriptor behind input, output and errors.
const FIRST_OTHER: libc::c_uint = 3;

/// Runs as the launcher; gives the exit status. `spec` is a [`Spec`] in JSON.
pub fn launch(spec: &str) -> i32 {
    super::exit_status(spec, |parsed| run(spec, parsed))
}

fn run(text: &str, spec: &Spec) -> Result<ExitStatus, String> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| format!("PR_SET_PDEATHSIG: {error}"))?;
    only_standard_descriptors()?;
    for group in &spec.cgroups {
        let path = group.join("cgroup.procs");
        std::fs::write(&path, std::process::id().to_string()).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    if spec.network == NetworkAccess::Own {
        flags |= UnshareFlags::NEWNET;
    }
    // Deprecated because of CLONE_FILES, which may take descriptors away from code that has them. It is not among
    // these.
    #[expect(deprecated)]
    rustix::thread::unshare(flags).map_err(|error| format!("the kernel makes no namespaces ({flags:?}): {error}"))?;
    // The first process that is started now is pid 1 of the new namespace.
    let mut init = Command::new("/proc/self/exe");
    init.args(["sandbox-init", "--spec", text]);
    init.status().map_err(|error| format!("init cannot be started: {error}"))
}

/// What else is open here, such as what a shell left open, is closed where init begins: it would be open in the
/// sandbox.
fn only_standard_descriptors() -> Result<(), String> {
    #[expect(unsafe_code, reason = "there is no safe way to name descriptors that nobody here owns")]
    // SAFETY: it takes three numbers. Nothing is closed under anybody here: the flag has them closed by `exec`.
    let failed = unsafe { libc::close_range(FIRST_OTHER, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    if failed == 0 { Ok(()) } else { Err(format!("close_range: {}", io::Error::last_os_error())) }
}
