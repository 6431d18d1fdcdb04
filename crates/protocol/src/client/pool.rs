//! Sessions of a page stream that plain threads share: a thread takes one, uses it alone, and puts it back.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::{Condvar, Mutex};

use super::{ReadLsn, command};
use crate::connect::{
    ClientError, ConnectConfig,
    blocking::{Connection, Received},
};
use crate::message::{Query, Response};
use crate::wire::{BackendMessage, Frame, frontend};

/// Requests of one call that may be in flight on a session. Their bytes fit into any socket's buffers, so sending never
/// waits for answers that we do not read.
const IN_FLIGHT_MAX: usize = 64;

/// What takes an answer: the query's index, and the answer's bytes as [`crate::message::Answer::decode_to`] takes them.
pub(super) type Each<'a> = &'a mut dyn FnMut(usize, &[u8]) -> Result<(), ClientError>;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) answer: Duration,
}

/// A session in which a page stream runs.
pub(super) struct Session {
    connection: Connection,
    endpoint: String,
    next_id: u64,
    expected: BytesMut,
}

impl Session {
    fn connect(config: &ConnectConfig, tenant: &str, timeline: &str, timeouts: Timeouts) -> Result<Session, ClientError> {
        let mut connection = Connection::connect(config, timeouts.connect)?;
        connection.set_read_timeout(Some(timeouts.answer))?;
        connection.set_write_timeout(Some(timeouts.answer))?;
        connection.start_copy(&command::pagestream(tenant, timeline))?;
        let endpoint = connection.endpoint().to_owned();
        Ok(Session { connection, endpoint, next_id: 1, expected: BytesMut::new() })
    }

    /// Asks those of `queries` that are not `answered`, marks them as the answers come, and hands each answer to
    /// `each`. When one is refused, [`ClientError::Answer`] is returned after all that were sent have been answered:
    /// the session is fit for further use then, and only then.
    pub(super) fn ask(&mut self, queries: &[Query], answered: &mut [bool], at: ReadLsn, each: Each<'_>) -> Result<(), ClientError> {
        let first_id = self.next_id;
        self.next_id += queries.len() as u64;
        let mut next = 0;
        let mut in_flight = 0;
        let mut refusal = None;
        loop {
            // Topped up by halves: one write for many requests, and never a wait for the last answer before the next
            // request goes.
            if in_flight <= IN_FLIGHT_MAX / 2 && refusal.is_none() {
                while in_flight < IN_FLIGHT_MAX && next < queries.len() {
                    if !answered[next] {
                        let request = at.request(first_id + next as u64, queries[next]);
                        frontend::copy_data(self.connection.output(), |out| request.encode(out));
                        in_flight += 1;
                    }
                    next += 1;
                }
                self.connection.flush()?;
            }
            if in_flight == 0 {
                return refusal.map_or(Ok(()), Err);
            }
            match self.one_answer(first_id, queries, answered, at, each) {
                Err(error @ ClientError::Answer(_)) => refusal = Some(error),
                other => other?,
            }
            in_flight -= 1;
        }
    }

    fn one_answer(
        &mut self,
        first_id: u64,
        queries: &[Query],
        answered: &mut [bool],
        at: ReadLsn,
        each: Each<'_>,
    ) -> Result<(), ClientError> {
        const ID: std::ops::Range<usize> = 1..9;
        const COPY_DATA: u8 = b'd';
        let Session { connection, endpoint, expected, .. } = self;
        loop {
            let Some((tag, body)) = connection.take_frame()? else {
                match connection.receive()? {
                    Received::Bytes { .. } => continue,
                    Received::Nothing => return Err(connection.timed_out()),
                    Received::Closed => return Err(ClientError::Closed { endpoint: endpoint.clone() }),
                }
            };
            if tag != COPY_DATA {
                let frame = Frame { tag, body: Bytes::copy_from_slice(body) };
                match BackendMessage::decode(frame).map_err(|error| ClientError::wire(endpoint, &error))? {
                    BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => continue,
                    BackendMessage::ErrorResponse(error) => return Err(ClientError::server(endpoint, error)),
                    BackendMessage::CopyDone => return Err(ClientError::Closed { endpoint: endpoint.clone() }),
                    _ => return Err(ClientError::protocol(endpoint, format!("expected an answer, got a message with tag {tag}"))),
                }
            }
            let id = body.get(ID).and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
            let index = id.and_then(|id| id.checked_sub(first_id)).and_then(|index| usize::try_from(index).ok());
            let Some(index) = index.filter(|&index| answered.get(index) == Some(&false)) else {
                return Err(ClientError::protocol(endpoint, "an answer to a request that is not in flight"));
            };
            let request = at.request(first_id + index as u64, queries[index]);
            // What an answer begins with is known: comparing bytes checks tag, id, LSNs and query at once.
            expected.clear();
            Response::encode_start(&request, expected);
            if let Some(answer) = body.strip_prefix(&expected[..]) {
                answered[index] = true;
                return each(index, answer);
            }
            return match Response::decode(&Bytes::copy_from_slice(body)) {
                Ok(Response::Error { header, message }) if header == request.header => Err(ClientError::Answer(message)),
                Ok(_) => Err(ClientError::protocol(endpoint, "the answer is to another question")),
                Err(error) => Err(ClientError::message(endpoint, &error)),
            };
        }
    }
}

#[derive(Default)]
struct State {
    /// The most recently used last: its thread's caches are warm, and the server's are.
    idle: Vec<Session>,
    /// Sessions that exist, idle or in use or being made.
    open: usize,
    stopped: bool,
}

/// At most a fixed number of sessions with one timeline.
pub(super) struct Pool {
    config: ConnectConfig,
    tenant: String,
    timeline: String,
    timeouts: Timeouts,
    sessions_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// What [`Pool::take`] found.
pub(super) enum Taken {
    /// A session that was used before: the server may have gone away since.
    Used(Session),
    /// A session that was just made.
    Fresh(Session),
}

impl Pool {
    pub(super) fn new(config: ConnectConfig, tenant: &str, timeline: &str, timeouts: Timeouts, sessions_max: usize) -> Pool {
        Pool {
            config,
            tenant: tenant.to_owned(),
            timeline: timeline.to_owned(),
            timeouts,
            sessions_max: sessions_max.max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// A session for the calling thread alone: an idle one, a new one, or the next that somebody puts back before
    /// `deadline`.
    pub(super) fn take(&self, deadline: Instant) -> Result<Taken, ClientError> {
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return Err(ClientError::Closed { endpoint: self.config.endpoint.to_string() });
            }
            if let Some(session) = state.idle.pop() {
                return Ok(Taken::Used(session));
            }
            if state.open < self.sessions_max {
                break;
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                let endpoint = self.config.endpoint.to_string();
                return Err(ClientError::protocol(&endpoint, format!("all {} sessions stayed busy for too long", self.sessions_max)));
            }
        }
        state.open += 1;
        drop(state);
        Session::connect(&self.config, &self.tenant, &self.timeline, self.timeouts).map(Taken::Fresh).inspect_err(|_| self.discard())
    }

    pub(super) fn put_back(&self, session: Session) {
        self.state.lock().idle.push(session);
        self.changed.notify_one();
    }

    /// A session that was taken is no more.
    pub(super) fn discard(&self) {
        self.state.lock().open -= 1;
        self.changed.notify_one();
    }

    /// A used session turned out to be dead: its idle sisters probably are as well.
    pub(super) fn discard_idle(&self) {
        let dead = {
            let mut state = self.state.lock();
            state.open -= state.idle.len();
            std::mem::take(&mut state.idle)
        };
        drop(dead);
        self.changed.notify_all();
    }

    /// Waits for `time` or until [`Pool::stop`]; whether to go on.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !state.stopped && !self.changed.wait_until(&mut state, deadline).timed_out() {}
        !state.stopped
    }

    /// Nobody gets a session any more, and whoever waits is told.
    pub(super) fn stop(&self) {
        self.state.lock().stopped = true;
        self.discard_idle();
    }
}
