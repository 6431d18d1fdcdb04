//! Sending a base backup: a job makes it, the connection sends it, a short queue between them makes the faster wait for the slower.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use tokio::sync::mpsc;
use varve_postgres::Lsn;
use varve_protocol::wire::{ServerMessage, backend, backend::sqlstate};

use super::connection::{Connection, End, Waited};
use super::pool::BlockingPool;
use super::{BackupOptions, SourceError, TimelinePages};

/// Bytes in a chunk of a backup.
const CHUNK_SIZE: usize = 64 * 1024;
/// Chunks between the maker and the sender.
const QUEUE_CHUNKS_MAX: usize = 8;

/// Sends a base backup from `CopyOutResponse` to `CopyDone`.
///
/// # Errors
/// The outer one ends the connection; the inner one is told to the client, and the connection goes on.
pub(super) async fn send(
    connection: &mut Connection,
    timeline: Arc<dyn TimelinePages>,
    lsn: Option<Lsn>,
    gzip: bool,
    options: BackupOptions,
    pool: &BlockingPool,
) -> Result<Result<(), ServerMessage>, End> {
    let (sender, mut chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let result = pool.run(move || make(&*timeline, lsn, gzip, options, sender));
    backend::copy_out_response(&mut connection.output);
    loop {
        connection.flush().await?;
        // Nothing is read meanwhile: a client that goes away is noticed by what it does not take.
        let Waited::Other(chunk) = connection.wait(false, chunks.recv()).await? else { continue };
        match chunk {
            Some(chunk) => backend::copy_data(&mut connection.output, |out| out.extend_from_slice(&chunk)),
            None => break,
        }
    }
    let result = match result.await {
        Ok(result) => result.map_err(|error| ServerMessage::error(error.sqlstate(), error.to_string())),
        Err(_) => Err(ServerMessage::error(sqlstate::INTERNAL_ERROR, "internal error while making the backup; the server's log has more")),
    };
    if result.is_ok() {
        backend::copy_done(&mut connection.output);
    }
    Ok(result)
}

fn make(
    timeline: &dyn TimelinePages,
    lsn: Option<Lsn>,
    gzip: bool,
    options: BackupOptions,
    sender: mpsc::Sender<Bytes>,
) -> Result<(), SourceError> {
    let gone = |error: io::Error| SourceError::Failed(format!("the backup could not be sent: {error}"));
    let mut chunks = ChunkWriter { chunk: BytesMut::new(), sender };
    if gzip {
        let mut encoder = GzEncoder::new(&mut chunks, Compression::fast());
        timeline.base_backup(lsn, options, &mut encoder)?;
        encoder.finish().map_err(gone)?;
    } else {
        timeline.base_backup(lsn, options, &mut chunks)?;
    }
    chunks.flush().map_err(gone)
}

/// Cuts what is written into chunks for the connection.
struct ChunkWriter {
    chunk: BytesMut,
    sender: mpsc::Sender<Bytes>,
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
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
        self.sender.blocking_send(chunk).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone"))
    }
}
