//! A page stream: see the module above for how it is served.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use varve_protocol::message::REQUEST_SIZE_MAX;
use varve_protocol::wire::{FRAME_HEADER_SIZE, ServerMessage, backend, backend::sqlstate, peek_frame};
use varve_protocol::{Query, ReadLsn, Request, Version};

use super::answer::{moment, put_page};
use super::connection::{Connection, End, Waited};
use super::jobs::{JobResult, Jobs};
use super::pool::FairPool;
use super::{Arrival, TimelinePages};

/// Most requests in one job.
const BATCH_REQUESTS_MAX: usize = 32;
/// Most jobs of one connection at a time.
const JOBS_MAX: usize = 8;
/// Bytes of answers, sent or still being made, beyond which no further request is read.
const UNSENT_SIZE_MAX: usize = 4 * 1024 * 1024;
/// Bytes of answers after which they are sent before more requests are looked at.
const WRITE_SIZE: usize = 512 * 1024;

/// Requests that are not at hand, to be made a job. All of them have arrived, or all wait for the same moment.
#[derive(Default)]
struct Batch {
    requests: Vec<Request>,
    /// The moment of the last.
    moment: Option<ReadLsn>,
    /// What they wait for.
    arrival: Option<Arrival>,
}

/// How a client ended its page stream.
pub(super) enum StreamEnd {
    /// All its requests are answered.
    Done,
    /// It wants no more answers.
    GivenUp,
}

/// A page stream on a connection, from `CopyBothResponse` to the client's `CopyDone`.
pub(super) struct PageStream<'a> {
    version: Version,
    connection: &'a mut Connection,
    timeline: Arc<dyn TimelinePages>,
    batch: Batch,
    /// While there is one, nothing may be answered before it.
    jobs: Jobs,
    /// How the client has ended its side.
    end: Option<StreamEnd>,
}

impl<'a> PageStream<'a> {
    pub(super) fn new(
        version: Version,
        connection: &'a mut Connection,
        timeline: Arc<dyn TimelinePages>,
        pool: FairPool,
    ) -> PageStream<'a> {
        let jobs = Jobs::new(version, timeline.clone(), pool);
        PageStream { version, connection, timeline, batch: Batch::default(), jobs, end: None }
    }

    /// Serves until the client ends its side; the connection can be used for other commands then.
    pub(super) async fn run(mut self) -> Result<StreamEnd, End> {
        loop {
            tokio::task::coop::consume_budget().await; // others want to run, too, even if this client never pauses
            self.take_requests()?;
            while let Some(result) = self.jobs.take_finished()? {
                self.append(result)?;
            }
            if !self.connection.output.is_empty() {
                self.connection.flush().await?;
            }
            match self.end {
                Some(StreamEnd::Done) if self.jobs.is_empty() => return Ok(StreamEnd::Done),
                Some(StreamEnd::GivenUp) => return Ok(StreamEnd::GivenUp),
                _ => {}
            }
            if self.has_room() && self.next_request()?.is_some() {
                continue;
            }
            let read = self.has_room();
            if let Waited::Other(result) = self.connection.wait(read, poll_fn(|cx| self.jobs.poll_first(cx))).await? {
                self.append(result?)?;
            }
        }
    }

    fn has_room(&self) -> bool {
        self.end.is_none()
            && self.jobs.len() < JOBS_MAX
            && self.connection.output.len() < WRITE_SIZE
            && self.connection.output.len() + self.jobs.size() < UNSENT_SIZE_MAX
    }

    /// Tag and body length of the next whole message in the input.
    fn next_request(&self) -> Result<Option<(u8, usize)>, End> {
        let input = &self.connection.input;
        // A client that gives up says why, in a text; all other messages are requests.
        const FAREWELL_SIZE_MAX: usize = 1024;
        let body_size_max = if input.first() == Some(&b'f') { FAREWELL_SIZE_MAX } else { REQUEST_SIZE_MAX };
        let frame = peek_frame(input, body_size_max)?;
        Ok(frame.filter(|&(_, body_len)| input.len() >= FRAME_HEADER_SIZE + body_len))
    }

    /// Answers what is at hand and makes jobs of the rest, as far as there is room.
    fn take_requests(&mut self) -> Result<(), End> {
        while self.has_room() {
            let Some((tag, body_len)) = self.next_request()? else { break };
            let body = &self.connection.input[FRAME_HEADER_SIZE..FRAME_HEADER_SIZE + body_len];
            match tag {
                b'd' => {
                    let request = Request::decode_as(self.version, body).map_err(|error| violation(error.to_string()))?;
                    self.connection.input.advance(FRAME_HEADER_SIZE + body_len);
                    self.take_request(request);
                }
                b'c' => {
                    self.connection.input.advance(FRAME_HEADER_SIZE + body_len);
                    self.end = Some(StreamEnd::Done);
                }
                b'X' => return Err(End::Over),
                b'f' => {
                    self.connection.input.advance(FRAME_HEADER_SIZE + body_len);
                    self.end = Some(StreamEnd::GivenUp);
                }
                // Postgres ignores these during a COPY, too
                b'H' | b'S' => self.connection.input.advance(FRAME_HEADER_SIZE + body_len),
                tag => return Err(violation(format!("message with tag {tag} in a page stream: expected CopyData with a request"))),
            }
        }
        self.start_job();
        Ok(())
    }

    fn take_request(&mut self, request: Request) {
        let at = moment(&request.header);
        if let Query::GetPage(rel, blkno) = request.query
            && self.batch.requests.is_empty()
            && self.jobs.is_empty()
        {
            let (version, output) = (self.version, &mut self.connection.output);
            let mut put = |page: &varve_postgres::Page| put_page(version, &request, page, output);
            if self.timeline.try_get_page_cached(rel, blkno, at, &mut put) {
                return;
            }
        }
        if self.batch.moment != Some(at) {
            let arrival = self.timeline.arrival(at);
            if arrival.is_some() || self.batch.arrival.is_some() {
                self.start_job(); // what has arrived does not wait for what has not
            }
            self.batch.moment = Some(at);
            self.batch.arrival = arrival;
        }
        self.batch.requests.push(request);
        if self.batch.requests.len() == BATCH_REQUESTS_MAX {
            self.start_job();
        }
    }

    fn start_job(&mut self) {
        let Batch { requests, arrival, .. } = std::mem::take(&mut self.batch);
        if !requests.is_empty() {
            self.jobs.push(requests, arrival);
        }
    }

    fn append(&mut self, (answers, result): JobResult) -> Result<(), End> {
        let output = &mut self.connection.output;
        if output.is_empty() {
            *output = answers;
        } else {
            output.extend_from_slice(&answers);
        }
        result.map_err(|error| End::Fatal(ServerMessage::fatal(error.sqlstate(), error.to_string())))
    }
}

fn violation(what: String) -> End {
    End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, what))
}

/// Appends what ends a page stream in good order.
pub(super) fn put_end(out: &mut BytesMut) {
    backend::copy_done(out);
    backend::command_complete("COPY 0", out);
}
