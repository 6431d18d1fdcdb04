//! Init: pid 1 of a sandbox. It makes the root directory and waits for its orders. Then it shows what they name, gives
//! up every privilege, starts the program, passes signals on, and reaps. Its exit status is the program's.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{
    DumpableBehavior, Gid, Pid, Resource, Rlimit, Signal, Uid, WaitOptions, kill_process, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit, wait,
};
use rustix::thread::{
    CapabilitySet, capability_is_in_bounding_set, clear_ambient_capability_set, remove_capability_from_bounding_set, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::spec::{NetworkAccess, Program, Spec};
use super::{FAILED, filter, network, orders, root};

/// What init says on its standard output once the shell is there: everything but what its compute shows in it.
pub(super) const READY: &str = "ready\n";
/// What it says once the program runs.
pub(super) const STARTED: &str = "started\n";
/// Name of the machine in the sandbox.
const HOST_NAME: &str = "varve";

/// Runs as init; gives the exit status. `spec` is a [`Spec`] in JSON.
pub fn init(spec: &str) -> i32 {
    super::exit_status(spec, run)
}

fn run(spec: &Spec) -> Result<ExitStatus, String> {
    if std::process::id() != 1 {
        return Err("init has to be the first process of a namespace".to_owned());
    }
    die_with_the_launcher()?;
    rustix::system::sethostname(HOST_NAME.as_bytes()).map_err(|error| format!("sethostname: {error}"))?;
    if spec.network == NetworkAccess::Own {
        network::bring_up().map_err(|error| format!("the loopback of the network namespace: {error}"))?;
    }
    root::make(spec)?;
    tell(READY);
    let mut orders = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(|error| format!("the orders: {error}"))?);
    let (ordered, folders) = match orders::receive(&mut orders) {
        Ok(Some(ordered)) => ordered,
        // The supervisor needs no sandbox any more.
        Ok(None) => std::process::exit(FAILED),
        Err(error) => return Err(format!("the orders: {error}")),
    };
    for ((path, writable), folder) in ordered.shown().zip(&folders) {
        root::show(folder, path, writable)?;
    }
    drop(folders);
    for (name, target) in &ordered.root_links {
        root::link(name, target)?;
    }
    root::close()?;
    give_up_privileges(spec)?;
    filter::apply()?;
    make_links(&ordered);

    let errors = io::stderr().as_fd().try_clone_to_owned().map_err(|error| format!("the log: {error}"))?;
    let mut program = Command::new(&ordered.path);
    program.args(&ordered.arguments).env_clear().envs(ordered.environment.iter().cloned());
    // A program's output goes to the log; our standard output is for lines to the supervisor.
    let input = match &ordered.input {
        Some(path) => Stdio::from(std::fs::File::open(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Stdio::null(),
    };
    program.stdin(input).stdout(Stdio::from(errors)).process_group(0);
    let child = program.spawn().map_err(|error| format!("{}: {error}", ordered.path.display()))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("the program has no process id")?;
    std::thread::spawn(move || follow_orders(pid, &mut orders));
    tell(STARTED);
    loop {
        match wait(WaitOptions::empty()) {
            // Others are orphans of the program, which are reaped and forgotten.
            Ok(Some((ended, status))) if ended == pid => return Ok(ExitStatus::from_raw(status.as_raw())),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("waiting for the program: {error}")),
        }
    }
}

/// Says a line to the supervisor. One that does not read it is gone, and then our orders end.
fn tell(line: &str) {
    let _ = io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush());
}

/// Nobody else has been here. What cannot be made is missed by the user alone, and told in his log.
fn make_links(ordered: &Program) {
    for (path, target) in &ordered.links {
        let made = Path::new(path).parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| symlink(target, path));
        if let Err(error) = made {
            let _ = writeln!(io::stderr(), "the link {path} could not be made: {error}");
        }
    }
}

/// Each byte of the orders is the number of a signal for the program. Their end is the end of the sandbox: with pid 1
/// the kernel ends all that is in it.
fn follow_orders(program: Pid, orders: &mut UnixStream) {
    let mut order = [0];
    loop {
        match orders.read(&mut order) {
            Ok(0) => std::process::exit(FAILED),
            Ok(_) => {
                if let Some(signal) = Signal::from_named_raw(i32::from(order[0])) {
                    let _ = kill_process(program, signal);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => std::process::exit(FAILED),
        }
    }
}

fn die_with_the_launcher() -> Result<(), String> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| format!("PR_SET_PDEATHSIG: {error}"))
}

/// After this there is nothing that a user id alone does not give, for this process and all that come from it.
fn give_up_privileges(spec: &Spec) -> Result<(), String> {
    let limit = |resource, maximum| {
        setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) }).map_err(|error| format!("{resource:?}: {error}"))
    };
    limit(Resource::Nofile, spec.files_max)?;
    limit(Resource::Core, 0)?;
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        // The kernel refuses to be asked for those that it does not know.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability).map_err(|error| format!("the capability {capability:?} stays: {error}"))?;
        }
    }
    clear_ambient_capability_set().map_err(|error| format!("ambient capabilities: {error}"))?;
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.uid));
    // There is one thread, so this is for the process.
    set_thread_groups(&[]).map_err(|error| format!("setgroups: {error}"))?;
    set_thread_res_gid(gid, gid, gid).map_err(|error| format!("setresgid: {error}"))?;
    set_thread_res_uid(uid, uid, uid).map_err(|error| format!("setresuid: {error}"))?;
    set_no_new_privs(true).map_err(|error| format!("PR_SET_NO_NEW_PRIVS: {error}"))?;
    // The change of the user has cleared it.
    die_with_the_launcher()?;
    // The tenant's processes have our user id, and must not reach into us.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| format!("PR_SET_DUMPABLE: {error}"))
}
