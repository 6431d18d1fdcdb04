//! A connection that somebody else makes for us and hands over: the client's side.
//!
//! The client connects to a Unix socket, sends a line with the credential, and gets a descriptor (`SCM_RIGHTS`) that is
//! connected to the server. Without a descriptor comes a line that says why, or nothing. The descriptor is a Unix
//! socket like one that we connected ourselves; nobody else holds it.

use std::fmt;
use std::io::{self, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    socket_with, sockopt,
};

/// Longest line in either direction, its end included.
pub const LINE_MAX: usize = 512;

/// What opens the door. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential(String);

impl Credential {
    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Credential {
    fn from(text: String) -> Credential {
        Credential(text)
    }
}

impl From<&str> for Credential {
    fn from(text: &str) -> Credential {
        Credential(text.to_owned())
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(...)")
    }
}

/// Gets a connection from who listens on `socket`, within `timeout`.
pub(super) fn receive(socket: &Path, credential: &Credential, timeout: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + timeout;
    let mut door = connect_within(socket, timeout)?;
    door.set_write_timeout(Some(left(deadline)?))?;
    // In one piece: a line that comes in two may find the other side's patience at its end.
    door.write_all(format!("{}\n", credential.reveal()).as_bytes()).map_err(timed_out)?;
    let mut line = Vec::new();
    loop {
        door.set_read_timeout(Some(left(deadline)?))?;
        let (bytes, handed_over) = read(&door, LINE_MAX - line.len())?;
        if let Some(descriptor) = handed_over {
            let stream = UnixStream::from(descriptor);
            // Whether reads wait is a property of the open file, which the one who made it may have chosen otherwise.
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        line.extend_from_slice(&bytes);
        if bytes.is_empty() || bytes.contains(&b'\n') || line.len() == LINE_MAX {
            return Err(refused(&line));
        }
    }
}

/// A connected socket; unlike `UnixStream::connect` it does not wait for ever at a door where too many stand already.
fn connect_within(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout.max(Duration::from_millis(1))))?;
    connect(&socket, &address).map_err(|error| timed_out(error.into()))?;
    Ok(UnixStream::from(socket))
}

/// One read: its bytes, and the descriptor that came along.
fn read(door: &UnixStream, room: usize) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; room];
    // Room for one descriptor: the kernel closes what does not fit.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(door, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.map_err(|error| timed_out(error.into()))?,
        }
    };
    bytes.truncate(received.bytes);
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((bytes, descriptor))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket's time limit shows as "would block".
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn refused(line: &[u8]) -> io::Error {
    if line.is_empty() {
        return io::Error::new(io::ErrorKind::UnexpectedEof, "closed without a connection or a reason");
    }
    let reason: String = String::from_utf8_lossy(line).trim_end().chars().filter(|c| !c.is_control()).collect();
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}
