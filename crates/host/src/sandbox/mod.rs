//! The sandbox that a compute's Postgres runs in: the tenant is a real superuser there, and can run any program, so the
//! boundary is the operating system.
//!
//! ```text
//! compute process (root) ── orders, standard input ──> init (uid of the sandbox, pid 1) ──> Postgres and all of its
//!        └── varve sandbox-launch ── namespaces ────────┘
//! ```
//! - **Identity**: a user id that no other compute has. Nothing of another one, nor of Varve's, is readable by it.
//! - **Namespaces**: mount, pid, ipc, uts, cgroup and network ([`NetworkAccess`]); no user namespace, so that Postgres
//!   tells our connections from the tenant's by their user id. The root directory has read-only system folders and what
//!   [`Spec`] names ([`mod@root`]).
//! - **Privileges**: none, and none to be had; system calls that lead out are refused ([`filter`]).
//! - **Life**: when the compute process ends, however that comes, init reads the end of its orders or is killed by the
//!   kernel, and with pid 1 everything in the sandbox ends. Postgres is never pid 1, because it would take orphans of a
//!   tenant's programs for its own children.
//!
//! What the sandbox cannot be made without is refused with its name: nothing is left out silently.
//!
//! Must never know: what a compute is, or the server.

mod filter;
mod init;
mod launch;
mod network;
mod orders;
mod root;
mod running;
mod spec;

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

pub use init::init;
pub use launch::launch;
pub use network::Dialer;
pub use running::{Running, SandboxError, Shell, probe};
pub use spec::{NetworkAccess, Program, Spec};

/// Does the work of the launcher or of init, for the [`Spec`] in JSON that it was given, and gives the exit status. Why
/// it cannot stands in the log then.
fn exit_status(text: &str, work: impl FnOnce(&Spec) -> Result<ExitStatus, String>) -> i32 {
    let spec = serde_json::from_str(text).map_err(|error| format!("the specification: {error}"));
    match spec.and_then(|spec| work(&spec)) {
        Ok(status) => status.code().unwrap_or_else(|| SIGNALLED + status.signal().unwrap_or_default()),
        Err(error) => {
            eprintln!("varve sandbox: {error}");
            FAILED
        }
    }
}

/// Exit status of the launcher and of init when they cannot do their work; what they say comes on standard error.
pub(crate) const FAILED: i32 = 125;
/// Exit statuses from here on say that a signal ended the program: 128 and its number.
pub(crate) const SIGNALLED: i32 = 128;
