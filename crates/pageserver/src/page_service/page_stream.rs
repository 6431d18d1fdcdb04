//! A page stream: see the module above for how it is served.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::sync::oneshot;
use varve_postgres::{BLCKSZ, slru::PAGES_PER_SEGMENT};
use varve_protocol::message::REQUEST_SIZE_MAX;
use varve_protocol::wire::{FRAME_HEADER_SIZE, ServerMessage, backend, backend::sqlstate, peek_frame};
use varve_protocol::{Query, Request};

use super::answer::{answer_all, moment, put_page};
use super::connection::{Connection, End, Waited};
use super::pool::BlockingPool;
use super::{SourceError, TimelinePages};

/// Most requests in one job.
const BATCH_REQUESTS_MAX: usize = 32;
/// Most jobs of one connection at a time.
const JOBS_MAX: usize = 8;
/// Bytes of answers, sent or still being made, beyond which no further request is read.
const UNSENT_SIZE_MAX: usize = 4 * 1024 * 1024;
/// Bytes of answers after which they are sent before more requests are looked at.
const WRITE_SIZE: usize = 512 * 1024;
/// What a list is taken to be while it is being made.
const LIST_SIZE_ESTIMATE: usize = 256 * 1024;
/// What an answer has beside its pages, at most.
const ANSWER_OVERHEAD: usize = 64;

/// A job's answers, and whether the timeline is still there.
type JobResult = (BytesMut, Result<(), SourceError>);

struct Job {
    result: oneshot::Receiver<JobResult>,
    /// Bytes that its answers will have, about.
    estimate: usize,
}

/// A page stream on a connection, from `CopyBothResponse` to the client's `CopyDone`.
pub(super) struct PageStream<'a> {
    connection: &'a mut Connection,
    timeline: Arc<dyn TimelinePages>,
    pool: BlockingPool,
    /// Requests that are not at hand, to be made a job.
    batch: Vec<Request>,
    /// Jobs that run, in the order of their requests. While there is one, nothing may be answered before it.
    jobs: VecDeque<Job>,
    /// Sum of their estimates.
    jobs_size: usize,
    /// The client has ended its side.
    done: bool,
}

impl<'a> PageStream<'a> {
    pub(super) fn new(connection: &'a mut Connection, timeline: Arc<dyn TimelinePages>, pool: BlockingPool) -> PageStream<'a> {
        PageStream { connection, timeline, pool, batch: Vec::new(), jobs: VecDeque::new(), jobs_size: 0, done: false }
    }

    /// Serves until the client ends its side; the connection can be used for other commands then.
    pub(super) async fn run(mut self) -> Result<(), End> {
        loop {
            tokio::task::coop::consume_budget().await; // others want to run, too, even if this client never pauses
            self.take_requests()?;
            self.collect_finished()?;
            if !self.connection.output.is_empty() {
                self.connection.flush().await?;
            }
            if self.done && self.jobs.is_empty() {
                return Ok(());
            }
            if self.has_room() && self.next_request()?.is_some() {
                continue;
            }
            let read = self.has_room();
            let waited = match self.jobs.front_mut() {
                Some(job) => self.connection.wait(read, &mut job.result).await?,
                None => self.connection.wait(read, std::future::pending()).await?,
            };
            if let Waited::Other(result) = waited {
                self.finish_front(result)?;
            }
        }
    }

    fn has_room(&self) -> bool {
        !self.done
            && self.jobs.len() < JOBS_MAX
            && self.connection.output.len() < WRITE_SIZE
            && self.connection.output.len() + self.jobs_size < UNSENT_SIZE_MAX
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
                    let request = Request::decode(body).map_err(|error| violation(error.to_string()))?;
                    self.connection.input.advance(FRAME_HEADER_SIZE + body_len);
                    self.take_request(request);
                }
                b'c' => {
                    self.connection.input.advance(FRAME_HEADER_SIZE + body_len);
                    self.done = true;
                }
                b'X' => return Err(End::Over),
                b'f' => return Err(End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, "the client gave up the page stream"))),
                b'H' | b'S' => self.connection.input.advance(FRAME_HEADER_SIZE + body_len), // Postgres ignores these during a COPY, too
                tag => return Err(violation(format!("message with tag {tag} in a page stream: expected CopyData with a request"))),
            }
        }
        self.start_job();
        Ok(())
    }

    fn take_request(&mut self, request: Request) {
        if let Query::GetPage(rel, blkno) = request.query
            && self.batch.is_empty()
            && self.jobs.is_empty()
        {
            let output = &mut self.connection.output;
            let mut put = |page: &varve_postgres::Page| put_page(&request, page, output);
            if self.timeline.try_get_page_cached(rel, blkno, moment(&request.header), &mut put) {
                return;
            }
        }
        self.batch.push(request);
        if self.batch.len() == BATCH_REQUESTS_MAX {
            self.start_job();
        }
    }

    fn start_job(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let requests = std::mem::take(&mut self.batch);
        let estimate = requests.iter().map(answer_size).sum();
        let timeline = self.timeline.clone();
        let result = self.pool.run(move || {
            let mut out = BytesMut::with_capacity(estimate);
            let result = answer_all(&*timeline, &requests, &mut out);
            (out, result)
        });
        self.jobs_size += estimate;
        self.jobs.push_back(Job { result, estimate });
    }

    /// Takes the answers of all jobs that are finished and whose turn it is.
    fn collect_finished(&mut self) -> Result<(), End> {
        while let Some(job) = self.jobs.front_mut() {
            match job.result.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => break,
                Err(oneshot::error::TryRecvError::Closed) => return Err(job_panicked()),
                Ok(result) => self.append(result)?,
            }
        }
        Ok(())
    }

    fn finish_front(&mut self, result: Result<JobResult, oneshot::error::RecvError>) -> Result<(), End> {
        self.append(result.map_err(|_| job_panicked())?)
    }

    fn append(&mut self, (answers, result): JobResult) -> Result<(), End> {
        if let Some(job) = self.jobs.pop_front() {
            self.jobs_size -= job.estimate;
        }
        let output = &mut self.connection.output;
        if output.is_empty() {
            *output = answers;
        } else {
            output.extend_from_slice(&answers);
        }
        result.map_err(|error| End::Fatal(ServerMessage::fatal(error.sqlstate(), error.to_string())))
    }
}

/// Bytes of the answer to `request`, about.
fn answer_size(request: &Request) -> usize {
    ANSWER_OVERHEAD
        + match request.query {
            Query::GetPage(..) => BLCKSZ,
            Query::PageRange { count, .. } | Query::SlruRange { count, .. } => count as usize * BLCKSZ,
            Query::SlruSegment(..) => PAGES_PER_SEGMENT as usize * BLCKSZ,
            Query::ListRelations { .. } | Query::ListSlru(_) => LIST_SIZE_ESTIMATE,
            Query::Exists(_) | Query::Nblocks(_) | Query::DbSize(_) => 0,
        }
}

fn violation(what: String) -> End {
    End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, what))
}

fn job_panicked() -> End {
    End::Fatal(ServerMessage::fatal(sqlstate::INTERNAL_ERROR, "internal error while answering; the server's log has more"))
}

/// Appends what ends a page stream in good order.
pub(super) fn put_end(out: &mut BytesMut) {
    backend::copy_done(out);
    backend::command_complete("COPY 0", out);
}
