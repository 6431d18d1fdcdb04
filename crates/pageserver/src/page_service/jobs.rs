//! The jobs of a page stream, in the order of their requests: what waits for WAL, what has a place or a turn in the
//! pool, what is answered.
//!
//! A job whose moment has not arrived is a future, polled by the connection's task; it enters the pool when that is
//! over. All end with the connection, since dropping [`Jobs`] drops the futures, and the pool leaves out what nobody
//! waits for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use futures::FutureExt;
use tokio::sync::oneshot;
use varve_postgres::{BLCKSZ, slru::PAGES_PER_SEGMENT};
use varve_protocol::wire::{ServerMessage, backend::sqlstate};
use varve_protocol::{Query, Request, Version};

use super::answer::{answer_all, put_error};
use super::connection::End;
use super::pool::FairPool;
use super::{Arrival, SourceError, TimelinePages};

/// What a list is taken to be while it is being made.
const LIST_SIZE_ESTIMATE: usize = 256 * 1024;
/// What an answer has beside its pages, at most.
const ANSWER_OVERHEAD: usize = 64;

/// A job's answers, and whether the timeline is still there.
pub(super) type JobResult = (BytesMut, Result<(), SourceError>);

enum State {
    Waits { arrival: Arrival, requests: Vec<Request> },
    Runs(oneshot::Receiver<JobResult>),
}

struct Job {
    state: State,
    /// Bytes that its answers will have, about.
    estimate: usize,
}

/// See the module's doc.
pub(super) struct Jobs {
    version: Version,
    timeline: Arc<dyn TimelinePages>,
    pool: FairPool,
    list: VecDeque<Job>,
    /// Sum of the estimates.
    size: usize,
}

impl Jobs {
    pub(super) fn new(version: Version, timeline: Arc<dyn TimelinePages>, pool: FairPool) -> Jobs {
        Jobs { version, timeline, pool, list: VecDeque::new(), size: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Bytes that the answers of all will have, about.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Adds a job for `requests`, which have to wait for `arrival` if there is one.
    pub(super) fn push(&mut self, requests: Vec<Request>, arrival: Option<Arrival>) {
        let estimate = requests.iter().map(answer_size).sum();
        let state = match arrival {
            Some(arrival) => State::Waits { arrival, requests },
            None => State::Runs(start(self.version, &self.timeline, &self.pool, requests, estimate)),
        };
        self.size += estimate;
        self.list.push_back(Job { state, estimate });
    }

    /// The first job's result, if it is there.
    pub(super) fn take_finished(&mut self) -> Result<Option<JobResult>, End> {
        let Some(Job { state: State::Runs(result), .. }) = self.list.front_mut() else { return Ok(None) };
        let result = match result.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => return Ok(None),
            Err(oneshot::error::TryRecvError::Closed) => return Err(panicked()),
            Ok(result) => result,
        };
        self.forget_first();
        Ok(Some(result))
    }

    /// The first job's result, when it is there. Meanwhile every job whose moment arrives is started.
    pub(super) fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<Result<JobResult, End>> {
        for Job { state, estimate } in &mut self.list {
            if let State::Waits { arrival, requests } = state
                && let Poll::Ready(arrived) = arrival.poll_unpin(cx)
            {
                let requests = std::mem::take(requests);
                *state = State::Runs(match arrived {
                    Ok(()) => start(self.version, &self.timeline, &self.pool, requests, *estimate),
                    Err(error) => refused(self.version, &requests, &error),
                });
            }
        }
        let Some(Job { state: State::Runs(result), .. }) = self.list.front_mut() else { return Poll::Pending };
        let result = ready!(result.poll_unpin(cx)).map_err(|_| panicked())?;
        self.forget_first();
        Poll::Ready(Ok(result))
    }

    fn forget_first(&mut self) {
        if let Some(job) = self.list.pop_front() {
            self.size -= job.estimate;
        }
    }
}

fn start(
    version: Version,
    timeline: &Arc<dyn TimelinePages>,
    pool: &FairPool,
    requests: Vec<Request>,
    estimate: usize,
) -> oneshot::Receiver<JobResult> {
    let tenant = timeline.tenant();
    let timeline = timeline.clone();
    pool.run(tenant, move || {
        let mut out = BytesMut::with_capacity(estimate);
        let result = answer_all(version, &*timeline, &requests, &mut out);
        (out, result)
    })
}

/// The answers to requests whose moment did not arrive.
fn refused(version: Version, requests: &[Request], error: &SourceError) -> oneshot::Receiver<JobResult> {
    let (sender, receiver) = oneshot::channel();
    let mut out = BytesMut::new();
    let result = match error {
        // The connection is to end, so that its client looks for the timeline again.
        SourceError::NotReady(_) => Err(error.clone()),
        SourceError::NotFound(_) | SourceError::Failed(_) => {
            requests.iter().for_each(|request| put_error(version, request, error, &mut out));
            Ok(())
        }
    };
    // The receiver is here.
    let _sent = sender.send((out, result));
    receiver
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

fn panicked() -> End {
    End::Fatal(ServerMessage::fatal(sqlstate::INTERNAL_ERROR, "internal error while answering; the server's log has more"))
}
