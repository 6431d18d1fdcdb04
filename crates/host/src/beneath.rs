//! Files and sockets in folders where a tenant can make names: nothing is followed that is a link.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// Opens what is at `path` below `folder`, where no part of the way is a link and nothing leads out.
fn open(folder: &Path, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let folder = File::open(folder)?;
    Ok(openat2(folder.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Opens a plain file to read.
///
/// # Errors
/// When it is not there, or is something else.
pub(crate) fn file(folder: &Path, path: &str) -> io::Result<File> {
    // A pipe would keep us waiting.
    let file = File::from(open(folder, Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other(format!("{path} is no plain file"))) }
}

/// Connects to a Unix socket, on which a process of user `uid` listens. Never waits.
///
/// # Errors
/// When there is none, it has no room, or somebody else listens.
pub(crate) fn connect(folder: &Path, name: &str, uid: u32) -> io::Result<UnixStream> {
    let socket = open(folder, Path::new(name), OFlags::PATH)?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other(format!("{name} is no socket")));
    }
    // Its name may lead elsewhere by now; the descriptor does not.
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    rustix::net::connect(&stream, &address)?;
    let listener = socket_peercred(&stream)?.uid.as_raw();
    if listener != uid {
        let what = format!("user {listener} listens on {name}, expected {uid}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn links_are_not_followed() {
        let (outside, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        std::fs::create_dir(folder.path().join("plain")).unwrap();
        std::fs::write(folder.path().join("plain/file"), "y").unwrap();
        symlink(outside.path().join("secret"), folder.path().join("plain/link")).unwrap();
        symlink(outside.path(), folder.path().join("way")).unwrap();
        symlink("/proc/self/root/etc/passwd", folder.path().join("magic")).unwrap();
        let mut found = String::new();
        file(folder.path(), "plain/file").unwrap().read_to_string(&mut found).unwrap();
        assert_eq!(found, "y");
        for path in ["plain/link", "way/secret", "magic", "../secret", "/etc/passwd", "plain"] {
            file(folder.path(), path).expect_err(path);
        }
    }

    #[test]
    fn a_socket_is_that_of_the_right_user() {
        let (outside, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let _other = UnixListener::bind(outside.path().join("s")).unwrap();
        let _ours = UnixListener::bind(folder.path().join("s")).unwrap();
        symlink(outside.path().join("s"), folder.path().join("link")).unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let me = rustix::process::geteuid().as_raw();
        connect(folder.path(), "s", me).unwrap();
        connect(folder.path(), "s", me + 1).expect_err("another user");
        for name in ["link", "file", "none"] {
            connect(folder.path(), name, me).expect_err(name);
        }
    }
}
