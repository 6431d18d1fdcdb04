//! The network namespace of a sandbox: a loopback on which *every* address is the sandbox's own, and connections into
//! it.
//!
//! Postgres listens there as it is told to. The host takes clients' connections and dials in for each: from the
//! client's address to the one that the client wanted, so that Postgres sees both as if nobody were in between
//! (`pg_hba.conf`, `client_addr`, TLS). That works because all addresses are local there. What goes out from inside
//! ends inside.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc;
use std::thread;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, recv, sendto, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// Index of the loopback in a new network namespace.
const LOOPBACK: u32 = 1;
/// Connections that are being made at a time.
const DIALLED_MAX: usize = 64;

/// Types, flags and attributes of rtnetlink, from `linux/netlink.h`, `linux/rtnetlink.h` and `linux/if.h`.
mod rtnetlink {
    pub(super) const NEWLINK: u16 = 16;
    pub(super) const NEWROUTE: u16 = 24;
    pub(super) const ERROR: u16 = 2;
    pub(super) const REQUEST: u16 = 1;
    pub(super) const ACK: u16 = 4;
    pub(super) const CREATE: u16 = 0x400;
    pub(super) const IFF_UP: u32 = 1;
    pub(super) const TABLE_LOCAL: u8 = 255;
    pub(super) const PROTOCOL_STATIC: u8 = 4;
    pub(super) const SCOPE_HOST: u8 = 254;
    pub(super) const TYPE_LOCAL: u8 = 2;
    pub(super) const OUTPUT_INTERFACE: u16 = 4;
    pub(super) const HEADER: usize = 16;
}

/// Brings the loopback of this process's network namespace up, and makes every address its own.
pub(super) fn bring_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // struct ifinfomsg: family, padding, type, index, flags, change.
    let mut up = vec![0, 0, 0, 0];
    for field in [LOOPBACK, rtnetlink::IFF_UP, rtnetlink::IFF_UP] {
        up.extend_from_slice(&field.to_ne_bytes());
    }
    request(&socket, rtnetlink::NEWLINK, rtnetlink::ACK, &up)?;
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        // struct rtmsg: family, lengths of destination and source, type of service, table, protocol, scope, type,
        // flags.
        let mut route = vec![family.as_raw() as u8, 0, 0, 0, rtnetlink::TABLE_LOCAL, rtnetlink::PROTOCOL_STATIC];
        route.extend_from_slice(&[rtnetlink::SCOPE_HOST, rtnetlink::TYPE_LOCAL, 0, 0, 0, 0]);
        // struct rtattr: length, type.
        route.extend_from_slice(&8u16.to_ne_bytes());
        route.extend_from_slice(&rtnetlink::OUTPUT_INTERFACE.to_ne_bytes());
        route.extend_from_slice(&LOOPBACK.to_ne_bytes());
        match request(&socket, rtnetlink::NEWROUTE, rtnetlink::ACK | rtnetlink::CREATE, &route) {
            // A kernel without IPv6.
            Err(error) if family == AddressFamily::INET6 => drop(error),
            result => result?,
        }
    }
    Ok(())
}

/// Sends one request and waits for its acknowledgement.
fn request(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(rtnetlink::HEADER + body.len());
    message.extend_from_slice(&((rtnetlink::HEADER + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(rtnetlink::REQUEST | flags).to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port
    message.extend_from_slice(body);
    sendto(socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0u8; 512];
    let (_, length) = recv(socket, &mut answer, RecvFlags::empty())?;
    let answer = &answer[..length.min(answer.len())];
    let kind = answer.get(4..6).and_then(|bytes| Some(u16::from_ne_bytes(bytes.try_into().ok()?)));
    let code = answer.get(rtnetlink::HEADER..rtnetlink::HEADER + 4).and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)));
    match (kind, code) {
        (Some(rtnetlink::ERROR), Some(0)) => Ok(()),
        (Some(rtnetlink::ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::other("the kernel's answer to a request of netlink is none")),
    }
}

/// A connection to be made: from, to, and where it goes.
type Dialled = (SocketAddr, SocketAddr, oneshot::Sender<io::Result<TcpStream>>);

/// Makes connections inside a network namespace, on a thread that lives there. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Dialer {
    orders: mpsc::SyncSender<Dialled>,
}

impl Dialer {
    /// Dials in the network namespace of the process that `namespace` is of (`/proc/<pid>/ns/net`).
    ///
    /// # Errors
    /// When there is no thread, or it may not go there.
    pub fn start(namespace: File) -> io::Result<Dialer> {
        let (orders, taken) = mpsc::sync_channel::<Dialled>(DIALLED_MAX);
        let (entered, wait) = mpsc::channel();
        thread::Builder::new().name("dialer".to_owned()).spawn(move || {
            let went = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
            let is_there = went.is_ok();
            let _ = entered.send(went);
            drop(namespace);
            while is_there && let Ok((from, to, answer)) = taken.recv() {
                // Who asked may be gone.
                let _ = answer.send(dial(from, to));
            }
        })?;
        wait.recv().map_err(io::Error::other)??;
        Ok(Dialer { orders })
    }

    /// A connection to `to` that comes from `from`. It may not be made yet: it becomes writable when it is.
    ///
    /// # Errors
    /// When Postgres takes none, or too many are being made.
    pub async fn dial(&self, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
        let (answer, made) = oneshot::channel();
        self.orders.try_send((from, to, answer)).map_err(|_| io::Error::other("too many connections are being made"))?;
        made.await.map_err(io::Error::other)?
    }
}

fn dial(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    // The port may be taken by a connection that has just ended there; then another one does.
    if bind(&socket, &from).is_err() {
        bind(&socket, &SocketAddr::new(from.ip(), 0))?;
    }
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}
