//! A page stream for async code: one task owns the socket, matches answers to requests by id, and sends what has
//! gathered in one write.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use varve_postgres::{BlockNumber, Oid, RelFork, slru::SlruKind};

use super::{PageClient, ReadLsn, asynchronous::Transport};
use crate::connect::ClientError;
use crate::message::{Answer, Query, RelationSize, Response, SlruSegmentSize};
use crate::wire::{BackendMessage, backend::BACKEND_BODY_SIZE_MAX, frontend, take_frame};

/// Requests that may wait to be sent; callers beyond it wait themselves.
const QUEUE_MAX: usize = 1024;
/// Requests that may be in flight; further ones stay in the queue.
const IN_FLIGHT_MAX: usize = 1024;
/// Bytes that one read asks for at least.
const READ_SIZE: usize = 64 * 1024;

type Reply = oneshot::Sender<Result<Answer, ClientError>>;

struct Call {
    query: Query,
    at: ReadLsn,
    reply: Reply,
}

/// A page stream on one timeline. Clones share the session; it ends with the last of them. All methods may be called at
/// any time from any task: requests are pipelined.
#[derive(Clone)]
pub struct PageStream {
    calls: mpsc::Sender<Call>,
    endpoint: String,
}

impl PageStream {
    pub(super) fn start(client: PageClient) -> PageStream {
        let (calls, queue) = mpsc::channel(QUEUE_MAX);
        let endpoint = client.endpoint.clone();
        let (reader, writer) = tokio::io::split(client.socket);
        let session = Session {
            reader,
            writer,
            input: client.input,
            output: BytesMut::new(),
            endpoint: client.endpoint,
            in_flight: HashMap::new(),
            next_id: 1,
        };
        tokio::spawn(session.run(queue));
        PageStream { calls, endpoint }
    }

    /// Asks `query` about the moment `at`.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the page service says that there is no answer; others when the session broke.
    pub async fn ask(&self, query: Query, at: ReadLsn) -> Result<Answer, ClientError> {
        let closed = || ClientError::Closed { endpoint: self.endpoint.clone() };
        let (reply, answer) = oneshot::channel();
        self.calls.send(Call { query, at, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    fn wrong_kind(&self, answer: &Answer) -> ClientError {
        let found: String = format!("{answer:?}").chars().take(60).collect();
        ClientError::protocol(&self.endpoint, format!("answer of another kind: {found}"))
    }

    /// Whether the fork exists.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn exists(&self, rel: RelFork, at: ReadLsn) -> Result<bool, ClientError> {
        match self.ask(Query::Exists(rel), at).await? {
            Answer::Exists(exists) => Ok(exists),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// The fork's size in blocks.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn nblocks(&self, rel: RelFork, at: ReadLsn) -> Result<BlockNumber, ClientError> {
        match self.ask(Query::Nblocks(rel), at).await? {
            Answer::Nblocks(blocks) => Ok(blocks),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// One page.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn) -> Result<Bytes, ClientError> {
        match self.ask(Query::GetPage(rel, blkno), at).await? {
            Answer::Page(page) => Ok(page),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// Up to `count` pages from block `first` on, one behind the other; fewer where the fork ends.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn page_range(&self, rel: RelFork, first: BlockNumber, count: u32, at: ReadLsn) -> Result<Bytes, ClientError> {
        match self.ask(Query::PageRange { rel, first, count }, at).await? {
            Answer::Pages(pages) => Ok(pages),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// Bytes in all main forks of a database.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn db_size(&self, db: Oid, at: ReadLsn) -> Result<i64, ClientError> {
        match self.ask(Query::DbSize(db), at).await? {
            Answer::DbSize(size) => Ok(size),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// All pages of an SLRU segment.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn slru_segment(&self, kind: SlruKind, segno: u32, at: ReadLsn) -> Result<Bytes, ClientError> {
        match self.ask(Query::SlruSegment(kind, segno), at).await? {
            Answer::SlruSegment(pages) => Ok(pages),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// Up to `count` pages of an SLRU segment from its page `first` on; fewer where the segment ends.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn slru_range(&self, kind: SlruKind, segno: u32, first: u32, count: u32, at: ReadLsn) -> Result<Bytes, ClientError> {
        match self.ask(Query::SlruRange { kind, segno, first, count }, at).await? {
            Answer::SlruPages(pages) => Ok(pages),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// All forks in a database's directory of a tablespace, with their sizes.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn list_relations(&self, spc: Oid, db: Oid, at: ReadLsn) -> Result<Vec<RelationSize>, ClientError> {
        match self.ask(Query::ListRelations { spc, db }, at).await? {
            Answer::Relations(relations) => Ok(relations),
            other => Err(self.wrong_kind(&other)),
        }
    }

    /// All segments of an SLRU area, with the pages in each.
    ///
    /// # Errors
    /// As [`PageStream::ask`].
    pub async fn list_slru(&self, kind: SlruKind, at: ReadLsn) -> Result<Vec<SlruSegmentSize>, ClientError> {
        match self.ask(Query::ListSlru(kind), at).await? {
            Answer::SlruSegments(segments) => Ok(segments),
            other => Err(self.wrong_kind(&other)),
        }
    }
}

struct Session {
    reader: ReadHalf<Box<dyn Transport>>,
    writer: WriteHalf<Box<dyn Transport>>,
    input: BytesMut,
    output: BytesMut,
    endpoint: String,
    in_flight: HashMap<u64, (Query, Reply)>,
    next_id: u64,
}

impl Session {
    /// Until all handles are gone and all answers are in, or the session breaks; then whoever still waits is told.
    ///
    /// Reading never waits for writing: a server that has too many answers unsent stops to read, and goes on only when
    /// we do.
    async fn run(mut self, mut queue: mpsc::Receiver<Call>) {
        let mut open = true;
        let mut calls = Vec::new();
        while open || !self.in_flight.is_empty() {
            let room = IN_FLIGHT_MAX - self.in_flight.len();
            self.input.reserve(READ_SIZE);
            let step = tokio::select! {
                n = queue.recv_many(&mut calls, room), if open && room > 0 && self.output.is_empty() => {
                    open = n > 0;
                    self.encode(&mut calls);
                    Ok(())
                }
                n = self.writer.write_buf(&mut self.output), if !self.output.is_empty() => {
                    n.map(|_| ()).map_err(|source| ClientError::io(&self.endpoint, "cannot send", source))
                }
                n = self.reader.read_buf(&mut self.input) => self.receive(n),
            };
            if let Err(error) = step {
                self.fail(&error, &mut queue);
                return;
            }
        }
        frontend::copy_done(&mut self.output);
        frontend::terminate(&mut self.output);
        // The server may be gone already; then there is nobody to bid farewell to.
        let _ = self.writer.write_all(&self.output).await;
    }

    fn encode(&mut self, calls: &mut Vec<Call>) {
        for Call { query, at, reply } in calls.drain(..) {
            let request = at.request(self.next_id, query);
            self.next_id += 1;
            frontend::copy_data(&mut self.output, |out| request.encode(out));
            self.in_flight.insert(request.header.request_id, (query, reply));
        }
    }

    fn receive(&mut self, n: std::io::Result<usize>) -> Result<(), ClientError> {
        let endpoint = &self.endpoint;
        if n.map_err(|source| ClientError::io(endpoint, "cannot receive", source))? == 0 {
            return Err(ClientError::Closed { endpoint: endpoint.clone() });
        }
        loop {
            let frame = take_frame(&mut self.input, BACKEND_BODY_SIZE_MAX).map_err(|error| ClientError::wire(endpoint, &error))?;
            let Some(frame) = frame else { return Ok(()) };
            let response = match BackendMessage::decode(frame).map_err(|error| ClientError::wire(endpoint, &error))? {
                BackendMessage::CopyData(bytes) => Response::decode(&bytes).map_err(|error| ClientError::message(endpoint, &error))?,
                BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => continue,
                BackendMessage::ErrorResponse(error) => return Err(ClientError::server(endpoint, error)),
                BackendMessage::CopyDone => return Err(ClientError::Closed { endpoint: endpoint.clone() }),
                _ => return Err(ClientError::protocol(endpoint, "expected an answer of the page stream")),
            };
            let id = response.header().request_id;
            let (query, reply) = self
                .in_flight
                .remove(&id)
                .ok_or_else(|| ClientError::protocol(endpoint, format!("answer to request {id}, which is not in flight")))?;
            // The caller may have gone meanwhile; then nobody wants the answer.
            let _ = match response {
                Response::Error { message, .. } => reply.send(Err(ClientError::Answer(message))),
                Response::Answer { request, answer } if request.query == query => reply.send(Ok(answer)),
                Response::Answer { .. } => return Err(ClientError::protocol(endpoint, "the answer is to another question")),
            };
        }
    }

    /// Tells all who wait why there will be no answer.
    fn fail(&mut self, error: &ClientError, queue: &mut mpsc::Receiver<Call>) {
        queue.close();
        let waiting = self.in_flight.drain().map(|(_, (_, reply))| reply);
        let queued = std::iter::from_fn(|| queue.try_recv().ok().map(|call| call.reply));
        for reply in waiting.chain(queued) {
            let _ = reply.send(Err(error.clone()));
        }
    }
}
