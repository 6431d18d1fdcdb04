//! The stream itself: bytes in, one sync for all that is there, a reply.

use std::time::{Duration, Instant};

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::wal::{FramedRecord, Framer};
use varve_protocol::ClientError;
use varve_protocol::connect::blocking::{Connection, Received};
use varve_protocol::wire::replication::{StandbyStatus, WalSenderMessage};
use varve_protocol::wire::{BackendMessage, Frame, ServerMessage, frontend};

use super::receiver::SessionEnd;
use super::shared::{ReceiverPositions, Shared};
use super::{ReceiverError, WalSink};

/// Bytes that are taken from the socket before they are synced, however many more there are: the first ones wait for an
/// acknowledgement.
const GROUP_SIZE_MAX: u64 = 4 * 1024 * 1024;
/// How often the store's position is looked at while a commit waits for it.
const AWAITED_POLL: Duration = Duration::from_millis(2);
/// How often the store's position is looked at while it lags.
const STORE_POLL: Duration = Duration::from_millis(25);
/// How often anything is looked at otherwise.
const IDLE_POLL: Duration = Duration::from_secs(5);
/// How often the server hears of us at least.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// First pause between statuses at the start of a stream, doubled up to [`REPEAT_MAX`]: a status that comes before the
/// walsender has caught up releases nobody, and if nothing else is written there would be no other.
const REPEAT_MIN: Duration = Duration::from_millis(4);
/// See [`REPEAT_MIN`].
const REPEAT_MAX: Duration = Duration::from_secs(2);
/// After so long a silence the server is asked for a sign of life.
const SILENCE_ASK: Duration = Duration::from_secs(20);
/// After so long a silence the connection is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A record that stays unfinished for so long, while nothing more comes, is fetched anew: if a byte of its length
/// changed on the way, commits would wait for bytes that will never come.
const UNFINISHED_MAX: Duration = Duration::from_secs(10);

/// A stream of WAL on a connection.
pub(super) struct Stream<'a, S> {
    connection: Connection,
    sink: &'a mut S,
    framer: &'a mut Framer,
    shared: &'a Shared,
    positions: ReceiverPositions,
    /// What the server was told last.
    told: Option<(Lsn, Lsn)>,
    told_at: Instant,
    /// When the last whole message came.
    heard_at: Instant,
    /// When the last WAL came.
    wal_at: Instant,
    /// The server was asked for a sign of life and gave none yet.
    asked: bool,
    /// Pause before the next of the repeated statuses, none when there were enough.
    repeat: Option<Duration>,
    reply_requested: bool,
    /// Records that became whole with one message.
    records: Vec<FramedRecord>,
}

impl<'a, S: WalSink> Stream<'a, S> {
    pub(super) fn new(connection: Connection, sink: &'a mut S, framer: &'a mut Framer, shared: &'a Shared) -> Stream<'a, S> {
        let now = Instant::now();
        let positions = ReceiverPositions { received: framer.position(), framed: framer.framed(), ..shared.positions() };
        Stream {
            connection,
            sink,
            framer,
            shared,
            positions,
            told: None,
            told_at: now,
            heard_at: now,
            wal_at: now,
            asked: false,
            repeat: Some(REPEAT_MIN),
            reply_requested: false,
            records: Vec::new(),
        }
    }

    /// Until something ends it.
    pub(super) fn run(mut self) -> SessionEnd {
        let end = match self.stream() {
            Ok(never) => match never {},
            Err(end) => end,
        };
        self.shared.set_positions(self.positions);
        end
    }

    fn stream(&mut self) -> Result<std::convert::Infallible, SessionEnd> {
        self.update_positions();
        self.send_status(false)?;
        // What came in one piece with the server's answer is here already. Commits may wait for it, and nothing else
        // may come for long.
        self.take_group(false)?;
        loop {
            self.update_positions();
            self.reply()?;
            self.connection.set_read_timeout(Some(self.pause()))?;
            match self.connection.receive()? {
                Received::Bytes { more } => self.take_group(more)?,
                Received::Nothing => {}
                Received::Closed => return Err(self.closed().into()),
            }
        }
    }

    fn closed(&self) -> ClientError {
        ClientError::Closed { endpoint: self.connection.endpoint().to_owned() }
    }

    /// Takes what the socket holds, then syncs once.
    fn take_group(&mut self, mut more: bool) -> Result<(), SessionEnd> {
        let group_start = self.framer.position();
        let framed_before = self.framer.framed();
        let ended = loop {
            if let Err(end) = self.take_messages() {
                break Some(end);
            }
            if !more || self.framer.position().distance_from(group_start) >= GROUP_SIZE_MAX {
                break None;
            }
            match self.connection.receive_now()? {
                Received::Bytes { more: further } => more = further,
                Received::Nothing => break None,
                Received::Closed => break Some(self.closed().into()),
            }
        };
        // Even where the stream has ended: what came whole before is worth keeping, though nobody hears of it.
        if self.framer.framed() > framed_before && !matches!(ended, Some(SessionEnd::Failed(ReceiverError::Sink(_)))) {
            self.positions.durable = self.sink.sync()?;
            if self.shared.set_not_kept(None) {
                tracing::info!(from = self.connection.endpoint(), "WAL is kept again");
            }
        }
        ended.map_or(Ok(()), Err)
    }

    fn take_messages(&mut self) -> Result<(), SessionEnd> {
        const COPY_DATA: u8 = b'd';
        let now = Instant::now();
        loop {
            let Some((tag, body)) = self.connection.take_frame()? else { return Ok(()) };
            (self.heard_at, self.asked) = (now, false);
            if tag != COPY_DATA {
                let frame = Frame { tag, body: Bytes::copy_from_slice(body) };
                self.other_message(frame)?;
                continue;
            }
            match WalSenderMessage::decode(body) {
                Ok(WalSenderMessage::Keepalive { reply_requested }) => self.reply_requested |= reply_requested,
                Ok(WalSenderMessage::XLogData { start, data }) => {
                    self.wal_at = now;
                    let data = Bytes::copy_from_slice(data);
                    self.take_wal(start, data)?;
                }
                Err(what) => {
                    let endpoint = self.connection.endpoint().to_owned();
                    return Err(ClientError::Protocol { endpoint, what }.into());
                }
            }
        }
    }

    fn other_message(&self, frame: Frame) -> Result<(), SessionEnd> {
        let endpoint = self.connection.endpoint().to_owned();
        let message =
            BackendMessage::decode(frame).map_err(|error| ClientError::Protocol { endpoint: endpoint.clone(), what: error.to_string() })?;
        match message {
            BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => Ok(()),
            BackendMessage::ErrorResponse(message) => Err(self.server_error(message)),
            // The server has sent everything and shuts down.
            BackendMessage::CommandComplete(_) => Err(self.closed().into()),
            BackendMessage::CopyDone => {
                let what = "its Postgres timeline ended: it was promoted".to_owned();
                Err(ReceiverError::Refused { endpoint, what }.into())
            }
            other => Err(ClientError::Protocol { endpoint, what: format!("unexpected in a stream of WAL: {other:?}") }.into()),
        }
    }

    /// Whatever ended it (somebody who cancels backends, for one), a stream that ran can be had again; whether the
    /// history is still right is asked when it starts.
    fn server_error(&self, message: ServerMessage) -> SessionEnd {
        ClientError::Server { endpoint: self.connection.endpoint().to_owned(), message: Box::new(message) }.into()
    }

    /// Frames, then keeps. A message in which something is wrong is not kept at all.
    fn take_wal(&mut self, start: Lsn, data: Bytes) -> Result<(), SessionEnd> {
        let expected = self.framer.position();
        if start != expected {
            let endpoint = self.connection.endpoint().to_owned();
            return Err(ReceiverError::Gap { endpoint, expected, found: start }.into());
        }
        let (framed, last_record) = (self.framer.framed(), self.framer.last_record());
        self.records.clear();
        let mut rest = data.clone();
        loop {
            match self.framer.next_record(&mut rest) {
                Ok(Some(record)) => self.records.push(record),
                Ok(None) => break,
                Err(source) => {
                    let endpoint = self.connection.endpoint().to_owned();
                    return Err(ReceiverError::Wal { endpoint, framed: self.positions.flushed, source }.into());
                }
            }
        }
        if let Err(error) = self.sink.append(start, data) {
            // What is not kept must come again: the next connection goes on behind the last whole record that is.
            *self.framer = self.framer.anew(framed, last_record);
            return Err(error.into());
        }
        if !self.records.is_empty() {
            self.sink.records(&mut self.records)?;
        }
        self.positions.received = self.framer.position();
        self.positions.framed = self.framer.framed();
        Ok(())
    }

    fn update_positions(&mut self) {
        let positions = &mut self.positions;
        positions.flushed = positions.framed.min(positions.durable);
        positions.applied = self.sink.store_durable().min(positions.flushed);
        positions.not_needed_before = self.sink.not_needed_before().min(positions.flushed);
    }

    /// Tells the server what it should know by now.
    fn reply(&mut self) -> Result<(), SessionEnd> {
        let now = Instant::now();
        let since_told = now - self.told_at;
        let silence = now - self.heard_at;
        if silence >= SILENCE_MAX {
            let endpoint = self.connection.endpoint().to_owned();
            return Err(ClientError::TimedOut { endpoint, seconds: SILENCE_MAX.as_secs() }.into());
        }
        if self.positions.received > self.positions.framed && now - self.wal_at >= UNFINISHED_MAX {
            let endpoint = self.connection.endpoint().to_owned();
            let ReceiverPositions { received, framed, .. } = self.positions;
            let what = format!("the record at {framed} is still unfinished at {received} after {} s", UNFINISHED_MAX.as_secs());
            return Err(ClientError::Protocol { endpoint, what }.into());
        }
        let news = self.told != Some((self.positions.flushed, self.positions.applied));
        let ask = silence >= SILENCE_ASK && !self.asked;
        let repeat = self.repeat.is_some_and(|pause| since_told >= pause);
        if repeat {
            self.repeat = self.repeat.map(|pause| pause * 2).filter(|&pause| pause <= REPEAT_MAX);
        }
        if news || ask || repeat || self.reply_requested || since_told >= STATUS_INTERVAL {
            self.send_status(ask)?;
        }
        Ok(())
    }

    fn send_status(&mut self, ask: bool) -> Result<(), SessionEnd> {
        let Stream { connection, positions, .. } = self;
        let status = StandbyStatus { written: positions.flushed, flushed: positions.flushed, applied: positions.applied };
        frontend::copy_data(connection.output(), |out| status.encode(ask, out));
        self.shared.send(|| connection.flush())??;
        self.shared.set_positions(*positions);
        self.told = Some((positions.flushed, positions.applied));
        self.told_at = Instant::now();
        self.asked |= ask;
        self.reply_requested = false;
        Ok(())
    }

    /// How long to wait for the server at most. Few different values, since each change is a system call.
    fn pause(&self) -> Duration {
        match self.repeat {
            Some(pause) => pause,
            None if self.positions.applied < self.sink.awaited().min(self.positions.flushed) => AWAITED_POLL,
            None if self.positions.applied < self.positions.flushed => STORE_POLL,
            None => IDLE_POLL,
        }
    }
}
