//! One client's socket with its buffers, deadlines and end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use varve_protocol::wire::{ServerMessage, WireError, backend, backend::sqlstate};

use super::PageServiceConfig;

/// Bytes that one read asks for at least.
const READ_SIZE: usize = 16 * 1024;
/// An output buffer that grew beyond this is given back once it is sent; a round of answers fits.
const KEEP_OUTPUT_SIZE_MAX: usize = 1024 * 1024;
/// How often we look whether a client is still there whose bytes we do not read.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long and how much we listen to a client that was told to go: closing at once would discard what it has not read
/// yet.
const LINGER_TIME: Duration = Duration::from_secs(1);
/// See [`LINGER_TIME`].
const LINGER_SIZE_MAX: usize = 1024 * 1024;

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client said goodbye, or went without a word where it may.
    Over,
    /// The socket broke: nobody is there to be told.
    Broken(io::Error),
    /// The client is to be told why.
    Fatal(ServerMessage),
}

impl From<WireError> for End {
    fn from(error: WireError) -> End {
        End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string()))
    }
}

/// What a wait brought.
pub(super) enum Waited<T> {
    /// More bytes are in the input.
    Input,
    /// The other future's output.
    Other(T),
}

/// A client's connection.
pub(super) struct Connection {
    stream: TcpStream,
    pub(super) peer: SocketAddr,
    /// Bytes that were received and not used yet.
    pub(super) input: BytesMut,
    /// Bytes to send with the next flush.
    pub(super) output: BytesMut,
    /// How much of it was sent by a flush that did not come to its end.
    sent: usize,
    config: PageServiceConfig,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Rung now and then; whether it means anything is decided by `last_input`, so that it need not be set anew for
    /// each message.
    alarm: Pin<Box<Sleep>>,
    last_input: Instant,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, peer: SocketAddr, config: PageServiceConfig, shutdown: CancellationToken) -> Connection {
        Connection {
            stream,
            peer,
            input: BytesMut::new(),
            output: BytesMut::new(),
            sent: 0,
            config,
            shutdown: Box::pin(shutdown.cancelled_owned()),
            alarm: Box::pin(sleep(config.stalled_timeout)),
            last_input: Instant::now(),
        }
    }

    pub(super) fn config(&self) -> &PageServiceConfig {
        &self.config
    }

    /// Reads more into the input, waiting for it.
    pub(super) async fn fill(&mut self) -> Result<(), End> {
        self.wait(true, std::future::pending::<()>()).await.map(|_| ())
    }

    /// Waits for `other`, and for more input if `read`. Ends when the client closes its side, whether that is read or
    /// not.
    pub(super) async fn wait<T>(&mut self, read: bool, other: impl Future<Output = T>) -> Result<Waited<T>, End> {
        let mut other = std::pin::pin!(other);
        loop {
            if read {
                self.input.reserve(READ_SIZE);
                match self.stream.try_read_buf(&mut self.input) {
                    Ok(0) => return Err(self.end_of_input()),
                    Ok(_) => {
                        self.last_input = Instant::now();
                        return Ok(Waited::Input);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(End::Broken(error)),
                }
            }
            tokio::select! {
                output = &mut other => return Ok(Waited::Other(output)),
                ready = self.stream.readable(), if read => ready.map_err(End::Broken)?,
                () = closed(&self.stream), if !read => return Err(End::Over),
                () = &mut self.shutdown => return Err(shutting_down()),
                () = &mut self.alarm => self.check_silence(read)?,
            }
        }
    }

    /// Waits for `other` or the client's end; what the client sends meanwhile stays unread.
    pub(super) async fn wait_unread<T>(&mut self, other: impl Future<Output = T>) -> Result<T, End> {
        let mut other = std::pin::pin!(other);
        loop {
            if let Waited::Other(output) = self.wait(false, &mut other).await? {
                return Ok(output);
            }
        }
    }

    fn end_of_input(&self) -> End {
        if self.input.is_empty() {
            return End::Over;
        }
        let what = format!("the connection ended in the middle of a message, after {} bytes of it", self.input.len());
        End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, what))
    }

    /// The alarm rang: has the client been silent for too long? While we owe it an answer and do not read, its silence
    /// means nothing.
    fn check_silence(&mut self, reading: bool) -> Result<(), End> {
        if !reading {
            self.last_input = Instant::now();
        }
        let (allowed, what) = if self.input.is_empty() {
            (self.config.idle_timeout, "between messages")
        } else {
            (self.config.stalled_timeout, "in the middle of a message")
        };
        let silent = self.last_input.elapsed();
        if silent >= allowed {
            let message = format!("closing the connection: the client was silent for {} s {what}", silent.as_secs());
            return Err(End::Fatal(ServerMessage::fatal(sqlstate::IDLE_SESSION_TIMEOUT, message)));
        }
        let next = Instant::now() + (allowed - silent).min(self.config.stalled_timeout);
        self.alarm.as_mut().reset(next);
        Ok(())
    }

    /// Sends all output. When that fails, what was not sent yet is still in the output.
    pub(super) async fn flush(&mut self) -> Result<(), End> {
        while self.sent < self.output.len() {
            match self.stream.try_write(&self.output[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let writable = timeout(self.config.stalled_timeout, self.stream.writable());
                    tokio::select! {
                        ready = writable => ready.map_err(|_| End::Broken(io::ErrorKind::TimedOut.into()))?.map_err(End::Broken)?,
                        () = &mut self.shutdown => return Err(shutting_down()),
                    }
                }
                Err(error) => return Err(End::Broken(error)),
            }
        }
        if self.output.capacity() > KEEP_OUTPUT_SIZE_MAX {
            self.output = BytesMut::new();
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// Tells the client why the connection ends, if that is so, and ends it. The client gets the chance to read what
    /// was sent.
    pub(super) async fn close(mut self, end: &End) {
        if let End::Fatal(message) = end {
            backend::error_response(message, &mut self.output);
        }
        if matches!(end, End::Broken(_)) {
            return;
        }
        let _ = timeout(LINGER_TIME, self.linger()).await;
    }

    async fn linger(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.output[self.sent..]).await?;
        self.stream.shutdown().await?;
        let mut listened = 0;
        while listened < LINGER_SIZE_MAX {
            self.input.clear();
            self.input.reserve(READ_SIZE);
            self.stream.readable().await?;
            match self.stream.try_read_buf(&mut self.input) {
                Ok(0) => break,
                Ok(n) => listened += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Ends when the client has closed its side of `stream`, of which nothing is read.
async fn closed(stream: &TcpStream) {
    while let Ok(ready) = stream.ready(Interest::READABLE).await {
        if ready.is_read_closed() {
            return;
        }
        // There are bytes that nobody wants yet: they would wake us again and again.
        sleep(LOOK_AGAIN).await;
    }
}

pub(super) fn shutting_down() -> End {
    End::Fatal(ServerMessage::fatal(sqlstate::ADMIN_SHUTDOWN, "the page service is shutting down"))
}
