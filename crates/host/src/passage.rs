//! The port of a compute whose Postgres is in a network of its own: takes clients' connections and passes their bytes
//! in, from the client's own address ([`Dialer`]).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::io::{Interest, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::ports::{self, PortError};
use crate::sandbox::Dialer;

/// Connections at a time, at least and at most. Postgres has its own limit; this one bounds what those take that it
/// refuses.
const CONNECTIONS_MIN: usize = 64;
const CONNECTIONS_MAX: usize = 4096;
/// Of this process's descriptors, a connection may have so much: each takes two, and half of all are the mount's.
const DESCRIPTORS_EACH: u64 = 8;
/// Bytes that wait in each direction of a connection.
const BUFFER: usize = 16 * 1024;
/// Wait after a connection could not be taken: there are no descriptors right now.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);

/// An open port. It closes, and all connections end, when this is dropped.
#[derive(Debug)]
pub(crate) struct Passage {
    _tasks: JoinSet<()>,
}

impl Passage {
    /// Opens `port` on all addresses of `listen`.
    ///
    /// # Errors
    /// When one cannot be had.
    pub(crate) fn open(listen: &str, port: u16, dialer: Dialer) -> Result<Passage, PortError> {
        let dialer = Arc::new(dialer);
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let places = usize::try_from(descriptors / DESCRIPTORS_EACH).unwrap_or(CONNECTIONS_MAX);
        let places = Arc::new(Semaphore::new(places.clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)));
        let mut tasks = JoinSet::new();
        for listener in ports::listen(listen, port)? {
            let failed = |source| PortError { port, address: listen.to_owned(), source };
            listener.set_nonblocking(true).map_err(failed)?;
            let listener = TcpListener::from_std(listener).map_err(failed)?;
            tasks.spawn(accept(listener, dialer.clone(), places.clone()));
        }
        Ok(Passage { _tasks: tasks })
    }
}

async fn accept(listener: TcpListener, dialer: Arc<Dialer>, places: Arc<Semaphore>) {
    // Ends them when we end.
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, from)) => {
                let dialer = dialer.clone();
                connections.spawn(async move {
                    if let Err(error) = pass(client, from, &dialer).await {
                        tracing::debug!(%from, %error, "a client's connection");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no client can be let in right now");
                tokio::time::sleep(ACCEPT_WAIT).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn pass(mut client: TcpStream, from: SocketAddr, dialer: &Dialer) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut postgres = TcpStream::from_std(dialer.dial(from, client.local_addr()?).await?)?;
    postgres.ready(Interest::WRITABLE).await?;
    if let Some(error) = postgres.take_error()? {
        return Err(error);
    }
    postgres.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut client, &mut postgres, BUFFER, BUFFER).await.map(drop)
}
