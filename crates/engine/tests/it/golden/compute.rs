//! A compute: it writes real WAL on the timeline that it was started on, sends it, and knows what was acknowledged.

use std::str::FromStr;

use bytes::Bytes;
use varve_engine::{EpochStart, WalStream};
use varve_postgres::Lsn;
use varve_postgres::wal::Framer;
use varve_simulation::threads::Life;
use varve_simulation::wal::{MAJOR, SYSTEM_IDENTIFIER, WalWriter};
use varve_storage::ids::{BranchName, TimelineId, WriterEpoch};

use super::server::Process;
use super::world::Said;

/// What of a transaction reaches the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sent {
    /// All of it, and the server makes it durable.
    #[default]
    All,
    /// Half of it, and the server makes that durable.
    Half,
    /// All of it, and the server has not made it durable yet.
    Unsynced,
    /// Nothing: it is in the compute's `pg_wal` only.
    Nothing,
}

impl FromStr for Sent {
    type Err = String;

    fn from_str(text: &str) -> Result<Sent, String> {
        match text {
            "all" => Ok(Sent::All),
            "half" => Ok(Sent::Half),
            "unsynced" => Ok(Sent::Unsynced),
            "nothing" => Ok(Sent::Nothing),
            _ => Err(format!("sent is one of all, half, unsynced, nothing, not {text}")),
        }
    }
}

/// What became of what was sent.
pub(super) struct Taken {
    /// Up to where the server that the compute waits for has acknowledged it, or why it has not.
    pub(super) acknowledged: Result<Lsn, String>,
    /// Other servers that took it.
    pub(super) also: Vec<usize>,
}

/// A connection to a server.
struct Connection {
    server: usize,
    life: Life,
    stream: WalStream,
    framer: Framer,
    /// The name under which the server acknowledges.
    standby_name: String,
}

/// See the module's doc.
pub(super) struct Compute {
    pub(super) name: String,
    pub(super) branch: BranchName,
    pub(super) timeline: TimelineId,
    pub(super) epoch: WriterEpoch,
    pub(super) writer: WalWriter,
    /// Tuples on each page.
    pub(super) tuples: Vec<u16>,
    /// Whose acknowledgements count.
    pub(super) standby_name: String,
    connections: Vec<Connection>,
}

impl Compute {
    /// A compute that is not connected.
    pub(super) fn new(
        name: String,
        branch: BranchName,
        timeline: TimelineId,
        start: EpochStart,
        writer: WalWriter,
        tuples: Vec<u16>,
    ) -> Compute {
        let EpochStart { epoch, standby_name, .. } = start;
        Compute { name, branch, timeline, epoch, writer, tuples, standby_name, connections: Vec::new() }
    }

    /// The compute's walsender is read by a server's stream from now on, and the compute waits for that server. Others
    /// that read it go on.
    pub(super) fn connect(&mut self, server: usize, process: &Process, stream: WalStream, standby_name: String) {
        let framer = Framer::new(MAJOR, Some(SYSTEM_IDENTIFIER), stream.start(), None);
        self.standby_name.clone_from(&standby_name);
        self.connections.retain(|connection| connection.server != server);
        self.connections.push(Connection { server, life: process.life().clone(), stream, framer, standby_name });
    }

    /// All connections end.
    pub(super) fn disconnect(&mut self) {
        self.connections.clear();
    }

    /// Sends what was written and not sent yet, of what is new from `from` on as much as `sent` says. A connection over
    /// which nothing comes is over.
    pub(super) async fn send(&mut self, from: Lsn, sent: Sent) -> Said<Taken> {
        let mut taken = Taken { acknowledged: Err("no server is connected".to_owned()), also: Vec::new() };
        if sent == Sent::Nothing {
            taken.acknowledged = Err("it was not sent".to_owned());
            return Ok(taken);
        }
        for connection in std::mem::take(&mut self.connections) {
            let (server, is_waited_for) = (connection.server, connection.standby_name == self.standby_name);
            let result = match self.send_over(connection, from, sent).await? {
                Ok(connection) => {
                    let framed = connection.framer.framed();
                    self.connections.push(connection);
                    if sent == Sent::Unsynced { Err("it is not durable yet".to_owned()) } else { Ok(framed) }
                }
                Err(reason) => Err(reason),
            };
            if is_waited_for {
                taken.acknowledged = result;
            } else if result.is_ok() {
                taken.also.push(server);
            }
        }
        Ok(taken)
    }

    async fn send_over(&self, connection: Connection, from: Lsn, sent: Sent) -> Said<Result<Connection, String>> {
        if connection.life.is_over() {
            return Ok(Err("the server is gone".to_owned()));
        }
        let at = connection.framer.position();
        let bytes = self.writer.bytes(at, usize::MAX);
        let mut bytes = bytes.ok_or("the compute does not have the WAL that the server asks for")?;
        if sent == Sent::Half {
            let half = from.distance_from(at) + self.writer.end().distance_from(from) / 2;
            bytes.truncate(half as usize & !7);
        }
        take(connection, at, bytes, sent).await
    }
}

/// The WAL receiver: what comes is framed, appended, made durable.
async fn take(connection: Connection, at: Lsn, bytes: Bytes, sent: Sent) -> Said<Result<Connection, String>> {
    let Connection { server, life, mut stream, mut framer, standby_name } = connection;
    let mut input = bytes.clone();
    while framer.next_record(&mut input)?.is_some() {}
    let framed = framer.framed();
    let threads = stream.timeline().threads().clone();
    let appended = threads.call(move || {
        let result = stream.append(at, &bytes).and_then(|()| {
            stream.framed(framed);
            if sent == Sent::Unsynced { Ok(()) } else { stream.sync().map(drop) }
        });
        (stream, result)
    });
    let (stream, result) = appended.await?;
    Ok(match result {
        Ok(()) => Ok(Connection { server, life, stream, framer, standby_name }),
        Err(error) => Err(error.to_string()),
    })
}
