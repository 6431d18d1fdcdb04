/* Tries what a process of a sandbox must not be able to do, and prints each call with the error that it got (0: none). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static void tell(const char *name, long result) {
    printf("%s=%s\n", name, result < 0 ? strerrorname_np(errno) : "0");
}

int main(void) {
    char buffer[256] = {0};
    tell("mount", mount("tmpfs", "/tmp", "tmpfs", 0, ""));
    tell("umount", umount2("/proc", MNT_DETACH));
    tell("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    tell("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    tell("unshare_user", unshare(CLONE_NEWUSER));
    tell("unshare_net", unshare(CLONE_NEWNET));
    tell("clone_user", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
    tell("clone3", syscall(SYS_clone3, buffer, 64));
    tell("setns", setns(0, 0));
    tell("chroot", chroot("/tmp"));
    tell("mknod", mknod("/tmp/disk", S_IFBLK | 0600, makedev(254, 0)));
    tell("setuid", setuid(0));
    tell("ptrace", ptrace(PTRACE_ATTACH, 1, 0, 0));
    tell("process_vm_readv", syscall(SYS_process_vm_readv, 1, 0, 0, 0, 0, 0));
    tell("pidfd_getfd", syscall(SYS_pidfd_getfd, 0, 0, 0));
    tell("bpf", syscall(SYS_bpf, 0, buffer, 64));
    tell("keyctl", syscall(SYS_keyctl, 0, -3, 0));
    tell("perf_event_open", syscall(SYS_perf_event_open, buffer, 0, -1, -1, 0));
    tell("userfaultfd", syscall(SYS_userfaultfd, 0));
    tell("io_uring_setup", syscall(SYS_io_uring_setup, 1, buffer));
    tell("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, buffer, 0));
    tell("quotactl", syscall(SYS_quotactl, 0, 0, 0, 0));
    tell("sethostname", sethostname("x", 1));
    tell("tiocsti", ioctl(0, TIOCSTI, "x"));
    tell("vsock", socket(40, SOCK_STREAM, 0));
    tell("netlink", socket(AF_NETLINK, SOCK_RAW, 0));
    tell("packet", socket(AF_PACKET, SOCK_RAW, 0));
    tell("raw", socket(AF_INET, SOCK_RAW, 1));
    tell("alg", socket(38, SOCK_SEQPACKET, 0));
#ifdef __x86_64__
    tell("x32", syscall(0x40000000 + SYS_getpid));
#endif
    return 0;
}
