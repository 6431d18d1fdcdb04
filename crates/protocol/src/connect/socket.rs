//! A blocking stream socket, TCP or Unix.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{ClientError, Endpoint, handover};

/// A connected socket. TCP ones send at once (`TCP_NODELAY`) and notice a peer that is gone.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

/// Ends a connection from another thread: its reads and writes return at once, now and ever after.
#[derive(Debug)]
pub struct SocketCloser(Socket);

impl SocketCloser {
    /// Ends the connection.
    pub fn close(&self) {
        // Fails only where the connection has already ended.
        let _ = match &self.0 {
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Socket::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Socket {
    /// Connects within `timeout`.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn connect(endpoint: &Endpoint, timeout: Duration) -> Result<Socket, ClientError> {
        let failed = |source| ClientError::io(&endpoint.to_string(), "cannot connect", source);
        match endpoint {
            Endpoint::Unix { .. } => UnixStream::connect(endpoint.to_string()).map(Socket::Unix).map_err(failed),
            Endpoint::Handover { socket, credential } => {
                let failed = |source| ClientError::io(&endpoint.to_string(), "no connection was handed over", source);
                handover::receive(socket, credential, timeout).map(Socket::Unix).map_err(failed)
            }
            Endpoint::Tcp { host, port } => Self::connect_tcp(host, *port, timeout).map(Socket::Tcp).map_err(failed),
        }
    }

    fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
        let deadline = Instant::now() + timeout;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    keep_alive(&stream)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A way to end this connection from another thread.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn closer(&self) -> io::Result<SocketCloser> {
        Ok(SocketCloser(match self {
            Socket::Tcp(stream) => Socket::Tcp(stream.try_clone()?),
            Socket::Unix(stream) => Socket::Unix(stream.try_clone()?),
        }))
    }

    /// How long a read waits; `None` is for ever.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_read_timeout(timeout),
            Socket::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// How long a write waits; `None` is for ever.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_write_timeout(timeout),
            Socket::Unix(stream) => stream.set_write_timeout(timeout),
        }
    }
}

/// Lets the kernel find out within about a minute that the peer's machine is gone.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    const IDLE: Duration = Duration::from_secs(30);
    const INTERVAL: Duration = Duration::from_secs(10);
    const PROBES: u32 = 3;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, IDLE)?;
    sockopt::set_tcp_keepintvl(stream, INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    Ok(())
}

impl Socket {
    /// Reads what is there already, without waiting: [`io::ErrorKind::WouldBlock`] when there is nothing.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_now(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use rustix::net::{RecvFlags, recv};
        let (n, _) = match self {
            Socket::Tcp(stream) => recv(stream, buf, RecvFlags::DONTWAIT)?,
            Socket::Unix(stream) => recv(stream, buf, RecvFlags::DONTWAIT)?,
        };
        Ok(n)
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.read(buf),
            Socket::Unix(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.write(buf),
            Socket::Unix(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
