//! Sending a base backup, so that a slow client costs its tenant and nobody else.
//!
//! One without relations is small. It is made into memory with a place in a pool, and sent by the connection's task,
//! without a place. How many of them a tenant has in memory is bounded; further ones of that tenant wait, as futures.
//!
//! One with all relations is as large as the database. A job makes it and a short queue carries it to the connection:
//! the faster waits for the slower. Such jobs have a pool of their own, and a client that takes nothing for a while
//! loses its connection and with it the job.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use tokio::sync::{mpsc, oneshot};
use varve_postgres::Lsn;
use varve_protocol::ReadLsn;
use varve_protocol::wire::{ServerMessage, backend, backend::sqlstate};

use super::connection::{Connection, End};
use super::session::Shared;
use super::{BackupOptions, SourceError, TimelinePages};

/// Bytes in a chunk of a backup.
const CHUNK_SIZE: usize = 64 * 1024;
/// Chunks between the maker and the sender.
const QUEUE_CHUNKS_MAX: usize = 8;

/// What is asked for.
#[derive(Clone)]
pub(super) struct Order {
    pub(super) timeline: Arc<dyn TimelinePages>,
    pub(super) lsn: Option<Lsn>,
    pub(super) gzip: bool,
    pub(super) options: BackupOptions,
}

/// Why a backup did not come about.
enum MakeError {
    /// Told to the client.
    Source(SourceError),
    /// It does not fit where it should go.
    TooLarge,
}

/// Sends a base backup from `CopyOutResponse` to `CopyDone`.
///
/// # Errors
/// The outer one ends the connection; the inner one is told to the client, and the connection goes on.
pub(super) async fn send(connection: &mut Connection, order: Order, shared: &Shared) -> Result<Result<(), ServerMessage>, End> {
    if let Some(arrival) = order.timeline.arrival(order.lsn.map_or(ReadLsn::newest(), ReadLsn::at))
        && let Err(error) = connection.wait_unread(arrival).await?
    {
        return Ok(Err(ServerMessage::error(error.sqlstate(), error.to_string())));
    }
    let result =
        if order.options.full { send_while_made(connection, order, shared).await? } else { send_made(connection, order, shared).await? };
    if result.is_ok() {
        backend::copy_done(&mut connection.output);
    }
    Ok(result)
}

/// Made first, sent then.
async fn send_made(connection: &mut Connection, order: Order, shared: &Shared) -> Result<Result<(), ServerMessage>, End> {
    let tenant = order.timeline.tenant();
    let share = connection.wait_unread(shared.backups_of_tenant.take(tenant)).await?;
    let room = connection.config().backup_memory_max;
    let made = shared.backups.run(tenant, {
        let order = order.clone();
        move || {
            let mut chunks = Chunks::new(Kept { chunks: Vec::new(), room });
            match make(&order, &mut chunks) {
                _ if chunks.is_full => Err(MakeError::TooLarge),
                Ok(()) => Ok(chunks.to.chunks),
                Err(error) => Err(MakeError::Source(error)),
            }
        }
    });
    let chunks = match connection.wait_unread(made).await? {
        Ok(Ok(chunks)) => chunks,
        Ok(Err(MakeError::TooLarge)) => {
            drop(share);
            tracing::info!(peer = %connection.peer, room, "a base backup does not fit into memory: it is sent while it is made");
            return send_while_made(connection, order, shared).await;
        }
        Ok(Err(MakeError::Source(error))) => return Ok(Err(told(&error))),
        Err(oneshot::error::RecvError { .. }) => return Ok(Err(panicked())),
    };
    backend::copy_out_response(&mut connection.output);
    for chunk in chunks {
        backend::copy_data(&mut connection.output, |out| out.extend_from_slice(&chunk));
        drop(chunk); // its memory is free as soon as it is sent
        connection.flush().await?;
    }
    drop(share);
    Ok(Ok(()))
}

/// Made and sent side by side.
async fn send_while_made(connection: &mut Connection, order: Order, shared: &Shared) -> Result<Result<(), ServerMessage>, End> {
    let (sender, mut chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let made = shared.full_backups.run(order.timeline.tenant(), move || make(&order, &mut Chunks::new(Sent(sender))));
    backend::copy_out_response(&mut connection.output);
    loop {
        connection.flush().await?;
        match connection.wait_unread(chunks.recv()).await? {
            Some(chunk) => backend::copy_data(&mut connection.output, |out| out.extend_from_slice(&chunk)),
            None => break,
        }
    }
    Ok(match made.await {
        Ok(result) => result.map_err(|error| told(&error)),
        Err(_) => Err(panicked()),
    })
}

fn told(error: &SourceError) -> ServerMessage {
    ServerMessage::error(error.sqlstate(), error.to_string())
}

fn panicked() -> ServerMessage {
    ServerMessage::error(sqlstate::INTERNAL_ERROR, "internal error while making the backup; the server's log has more")
}

fn make(order: &Order, sink: &mut impl Write) -> Result<(), SourceError> {
    let gone = |error: io::Error| SourceError::Failed(format!("the backup could not be sent: {error}"));
    if order.gzip {
        let mut encoder = GzEncoder::new(&mut *sink, Compression::fast());
        order.timeline.base_backup(order.lsn, order.options, &mut encoder)?;
        encoder.finish().map_err(gone)?;
    } else {
        order.timeline.base_backup(order.lsn, order.options, sink)?;
    }
    sink.flush().map_err(gone)
}

/// Where chunks go.
trait ChunkSink {
    /// Takes one; an error ends the backup.
    fn put(&mut self, chunk: Bytes) -> io::Result<()>;
}

/// To memory, while there is room.
struct Kept {
    chunks: Vec<Bytes>,
    room: usize,
}

impl ChunkSink for Kept {
    fn put(&mut self, chunk: Bytes) -> io::Result<()> {
        self.room = self.room.checked_sub(chunk.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.chunks.push(chunk);
        Ok(())
    }
}

/// To the connection.
struct Sent(mpsc::Sender<Bytes>);

impl ChunkSink for Sent {
    fn put(&mut self, chunk: Bytes) -> io::Result<()> {
        self.0.blocking_send(chunk).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone"))
    }
}

/// Cuts what is written into chunks.
struct Chunks<S> {
    chunk: BytesMut,
    to: S,
    is_full: bool,
}

impl<S: ChunkSink> Chunks<S> {
    fn new(to: S) -> Chunks<S> {
        Chunks { chunk: BytesMut::new(), to, is_full: false }
    }
}

impl<S: ChunkSink> Write for Chunks<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if self.chunk.is_empty() {
            self.chunk.reserve(CHUNK_SIZE);
        }
        let n = bytes.len().min(CHUNK_SIZE - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..n]);
        if self.chunk.len() == CHUNK_SIZE {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = self.chunk.split().freeze();
        self.to.put(chunk).inspect_err(|error| self.is_full = error.kind() == io::ErrorKind::FileTooLarge)
    }
}
