//! WAL from a running server, by the replication protocol.
//!
//! We are a standby that never says what it has: no commit waits for us, and none is released by us. There is no slot,
//! so a server that is far ahead may have removed what we still want; that is an error that says so.

use std::time::{Duration, Instant};

use bytes::Bytes;
use varve_postgres::wal::{Framer, SegmentSize};
use varve_postgres::{Lsn, Major};
use varve_protocol::connect::blocking::{Connection, Received};
use varve_protocol::wire::replication::{StandbyStatus, WalSenderMessage};
use varve_protocol::wire::{BackendMessage, Frame, frontend};
use varve_protocol::{ClientError, ConnectConfig};

use crate::VerifyError;
use crate::wal::{Next, WalSource};

/// How long connecting and each answer to a question may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one wait for more takes at most.
const POLL: Duration = Duration::from_millis(200);
/// How often the server hears of us: far more often than `wal_sender_timeout`.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The WAL of a running server, from a position on.
#[derive(Debug)]
pub struct WalStream {
    connection: Connection,
    major: Major,
    framer: Framer,
    input: Bytes,
    status_at: Instant,
    ended: bool,
}

/// What a server says of itself.
struct Identity {
    system_identifier: u64,
    tli: u32,
    position: Lsn,
    major: Major,
    segments: SegmentSize,
}

impl WalStream {
    /// Connects to the server and asks for its WAL from `start`, or from now on.
    ///
    /// # Errors
    /// When the server cannot be reached, is of an unsupported major, or does not have that WAL.
    pub fn connect(config: &ConnectConfig, start: Option<Lsn>) -> Result<WalStream, VerifyError> {
        let config = config.clone().parameter("replication", "true").parameter("application_name", "varve_verify");
        let mut connection = Connection::connect(&config, ANSWER_TIMEOUT)?;
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let identity = identify(&mut connection)?;
        let checked = show(&mut connection, "wal_consistency_checking")?;
        if checked != "all" {
            tracing::warn!(
                server = connection.endpoint(),
                wal_consistency_checking = checked,
                "the server's WAL does not carry all of its pages, so not all can be compared: ALTER SYSTEM SET wal_consistency_checking = 'all'"
            );
        }
        // From a page's start, the records that begin on it can be found.
        let start = start.unwrap_or(identity.position).page_start();
        let command = format!("START_REPLICATION PHYSICAL {start} TIMELINE {}", identity.tli);
        connection.start_copy(&command).map_err(|error| match error {
            ClientError::Server { endpoint, message } => VerifyError::Server {
                server: endpoint,
                what: format!(
                    "{message}; asked for WAL from {start}, in segment {}",
                    identity.segments.name(identity.tli, identity.segments.number(start))
                ),
            },
            other => other.into(),
        })?;
        let framer = Framer::from_page(identity.major, Some(identity.system_identifier), start).with_segments(identity.segments);
        Ok(WalStream { connection, major: identity.major, framer, input: Bytes::new(), status_at: Instant::now(), ended: false })
    }

    fn receive(&mut self) -> Result<Next, VerifyError> {
        if self.status_at.elapsed() >= STATUS_INTERVAL {
            self.send_status()?;
        }
        if self.take_message()? {
            return Ok(Next::Idle);
        }
        self.connection.set_read_timeout(Some(POLL))?;
        if self.connection.receive()? == Received::Closed {
            self.ended = true;
        }
        Ok(Next::Idle)
    }

    /// Takes the next message of those that came; whether there was one.
    fn take_message(&mut self) -> Result<bool, VerifyError> {
        const COPY_DATA: u8 = b'd';
        let Some((tag, body)) = self.connection.take_frame()? else { return Ok(false) };
        if tag != COPY_DATA {
            let frame = Frame { tag, body: Bytes::copy_from_slice(body) };
            self.other_message(frame)?;
            return Ok(true);
        }
        match WalSenderMessage::decode(body) {
            Ok(WalSenderMessage::XLogData { start, data }) if start == self.framer.position() => {
                self.input = Bytes::copy_from_slice(data);
            }
            Ok(WalSenderMessage::XLogData { start, .. }) => {
                return Err(self.server_error(format!("its WAL goes on at {start}, expected {}", self.framer.position())));
            }
            Ok(WalSenderMessage::Keepalive { reply_requested: true }) => self.send_status()?,
            Ok(WalSenderMessage::Keepalive { reply_requested: false }) => {}
            Err(what) => return Err(self.server_error(what)),
        }
        Ok(true)
    }

    fn other_message(&mut self, frame: Frame) -> Result<(), VerifyError> {
        match BackendMessage::decode(frame).map_err(|error| self.server_error(error.to_string()))? {
            BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
            // The server shuts down, or was promoted: this timeline ends here.
            BackendMessage::CommandComplete(_) | BackendMessage::CopyDone => self.ended = true,
            BackendMessage::ErrorResponse(message) => return Err(self.server_error(message.to_string())),
            other => return Err(self.server_error(format!("unexpected in a stream of WAL: {other:?}"))),
        }
        Ok(())
    }

    fn server_error(&self, what: String) -> VerifyError {
        VerifyError::Server { server: self.connection.endpoint().to_owned(), what }
    }

    fn send_status(&mut self) -> Result<(), VerifyError> {
        frontend::copy_data(self.connection.output(), |out| StandbyStatus::default().encode(false, out));
        self.status_at = Instant::now();
        Ok(self.connection.flush()?)
    }
}

impl WalSource for WalStream {
    fn major(&self) -> Major {
        self.major
    }

    fn position(&self) -> Lsn {
        self.framer.framed()
    }

    fn next(&mut self) -> Result<Next, VerifyError> {
        let framed = self.framer.next_record(&mut self.input);
        match framed.map_err(|source| VerifyError::Wal { of: self.connection.endpoint().to_owned(), source })? {
            Some(record) => Ok(Next::Record(record)),
            None if self.ended => Ok(Next::End),
            None => self.receive(),
        }
    }
}

fn identify(connection: &mut Connection) -> Result<Identity, VerifyError> {
    let rows = connection.simple_query("IDENTIFY_SYSTEM")?;
    let server = connection.endpoint().to_owned();
    let column = |index: usize| rows.first().and_then(|row| row.get(index)).and_then(Option::as_deref).unwrap_or_default();
    let identity = (column(0).parse(), column(1).parse(), column(2).parse());
    let (Ok(system_identifier), Ok(tli), Ok(position)) = identity else {
        return Err(VerifyError::Server { server, what: format!("its answer to IDENTIFY_SYSTEM cannot be understood: {rows:?}") });
    };
    let version = show(connection, "server_version_num")?;
    let major = version.parse::<u32>().ok().and_then(|number| Major::from_number(number / 10_000));
    let major = major.ok_or_else(|| VerifyError::Server {
        server: server.clone(),
        what: format!("server_version_num is {version}; PostgreSQL 14 to 18 are supported"),
    })?;
    let segment_size = show(connection, "wal_segment_size")?;
    let segments = SegmentSize::from_setting(&segment_size)
        .ok_or_else(|| VerifyError::Server { server, what: format!("wal_segment_size is {segment_size}, expected 1MB to 1GB") })?;
    Ok(Identity { system_identifier, tli, position, major, segments })
}

fn show(connection: &mut Connection, name: &str) -> Result<String, VerifyError> {
    let rows = connection.simple_query(&format!("SHOW {name}"))?;
    Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default())
}
