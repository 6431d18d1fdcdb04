//! System calls that the sandbox's processes cannot make. What is not named is allowed: Postgres and its extensions are
//! ordinary programs.
//!
//! Where the kernel has a newer call that a filter cannot look into, it says that it does not have it (`ENOSYS`), and
//! the C library falls back to the older one: `clone3`, whose flags lie in memory. io_uring makes system calls that no
//! filter sees, so it is not there either.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter,
    sock_filter,
};

/// Calls that change mounts, namespaces, other processes, the machine, its clocks or its keys, or read what is theirs.
const FORBIDDEN: &[i64] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_memfd_secret,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];
/// Calls that are not there.
const ABSENT: &[i64] = &[libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
/// Flags with which `clone` makes namespaces.
const NAMESPACES: [i32; 8] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    0x80, // CLONE_NEWTIME
];
/// Requests of `ioctl` that type into a terminal.
const TYPING: [u64; 2] = [0x5412, 0x541C]; // TIOCSTI, TIOCLINUX
/// Families of sockets that there are; vsock, netlink and the rest lead around the network namespace or to its
/// settings.
const FAMILIES: [i32; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
/// From this number on, system calls of x86-64 are those of its x32 programs: the same under other numbers.
const X32: u32 = 0x4000_0000;

/// Puts the filters on this process, and on all that it starts.
pub(super) fn apply() -> Result<(), String> {
    for filter in programs().map_err(|error| format!("the filter of system calls: {error}"))? {
        apply_filter(&filter).map_err(|error| format!("the kernel takes no filter of system calls (seccomp): {error}"))?;
    }
    Ok(())
}

fn programs() -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let is = |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    let mut forbidden: BTreeMap<i64, Vec<SeccompRule>> = FORBIDDEN.iter().map(|number| (*number, Vec::new())).collect();
    let mut clone = Vec::new();
    for flag in NAMESPACES.map(|flag| flag as u32 as u64) {
        clone.push(SeccompRule::new(vec![is(0, SeccompCmpOp::MaskedEq(flag), flag)?])?);
    }
    forbidden.insert(libc::SYS_clone, clone);
    let mut ioctl = Vec::new();
    for request in TYPING {
        ioctl.push(SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, request)?])?);
    }
    forbidden.insert(libc::SYS_ioctl, ioctl);
    let mut other_family = Vec::new();
    for family in FAMILIES {
        other_family.push(is(0, SeccompCmpOp::Ne, family as u64)?);
    }
    let family = vec![SeccompRule::new(other_family)?];
    let families = BTreeMap::from([(libc::SYS_socket, family.clone()), (libc::SYS_socketpair, family)]);
    let absent = ABSENT.iter().map(|number| (*number, Vec::new())).collect();
    let compiled = |rules, errno: i32| -> Result<BpfProgram, seccompiler::BackendError> {
        let arch: TargetArch = std::env::consts::ARCH.try_into()?;
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)?.try_into()
    };
    let mut programs = vec![compiled(families, libc::EAFNOSUPPORT)?, compiled(absent, libc::ENOSYS)?, compiled(forbidden, libc::EPERM)?];
    if cfg!(target_arch = "x86_64") {
        programs.insert(0, no_x32());
    }
    Ok(programs)
}

/// Calls by x32's numbers are not there. (`struct seccomp_data` begins with the number; the architecture is the other
/// filters' to look at.)
fn no_x32() -> BpfProgram {
    let step = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    vec![
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_can_be_compiled() {
        let sizes: Vec<usize> = programs().unwrap().iter().map(Vec::len).collect();
        assert!(sizes.iter().all(|size| (4..=1000).contains(size)), "{sizes:?}");
    }
}
