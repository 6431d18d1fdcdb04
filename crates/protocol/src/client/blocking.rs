//! A client of the page service for plain threads.

use std::time::{Duration, Instant};

use bytes::Bytes;
use varve_postgres::{BLCKSZ, BlockNumber, Oid, Page, RelFork, slru::SlruKind};

use super::{
    ReadLsn,
    pool::{Each, Pool, Taken, Timeouts},
};
use crate::connect::{ClientError, ConnectConfig};
use crate::message::{Answer, Query, RANGE_PAGES_MAX, RelationSize, SlruSegmentSize};

/// First pause before trying again.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(5);
/// Longest pause before trying again: a server that is back is noticed within this time.
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Limits of a [`BlockingPageClient`].
#[derive(Clone, Copy, Debug)]
pub struct BlockingOptions {
    /// Most sessions; a thread that finds all busy waits.
    pub sessions_max: usize,
    /// How long making a session may take.
    pub connect_timeout: Duration,
    /// How long the server may be silent while it owes an answer; then the session is given up and the question asked
    /// anew.
    pub answer_timeout: Duration,
    /// How long to go on trying while the server is away or not ready.
    pub retry_for: Duration,
}

impl Default for BlockingOptions {
    fn default() -> Self {
        BlockingOptions {
            sessions_max: 16,
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(60),
            retry_for: Duration::from_secs(600),
        }
    }
}

/// Reads pages of one timeline from plain threads, any number at a time.
///
/// The calling thread itself writes to and reads from a socket: between question and answer there is no hop to another
/// thread. Several questions of one call are in flight together. A server that is away (restarted, upgraded, out of
/// reach) or that says it is not ready is waited for; all questions are reads, so asking again is safe. Only an answer
/// that says no, or a server that does not speak our language, is an error at once.
pub struct BlockingPageClient {
    pool: Pool,
    retry_for: Duration,
    endpoint: String,
    timeline: String,
}

impl BlockingPageClient {
    /// A client of the timeline; nothing is connected yet.
    pub fn new(config: ConnectConfig, tenant: &str, timeline: &str, options: BlockingOptions) -> BlockingPageClient {
        let endpoint = config.endpoint.to_string();
        let timeouts = Timeouts { connect: options.connect_timeout, answer: options.answer_timeout };
        BlockingPageClient {
            pool: Pool::new(config, tenant, timeline, timeouts, options.sessions_max),
            retry_for: options.retry_for,
            endpoint,
            timeline: format!("{tenant}/{timeline}"),
        }
    }

    /// Ends all waiting: whoever waits for the server, now or later, gets [`ClientError::Closed`]. An answer that is
    /// under way still comes.
    pub fn stop(&self) {
        self.pool.stop();
    }

    /// Asks all of `queries` about the moment `at` and hands each answer's bytes to `each`, in whatever order they
    /// come.
    fn ask(&self, queries: &[Query], at: ReadLsn, each: Each<'_>) -> Result<(), ClientError> {
        let mut deadline = Instant::now() + self.retry_for;
        let mut answered = vec![false; queries.len()];
        let mut pause = RETRY_PAUSE_MIN;
        let mut waiting = false;
        loop {
            let mut used = false;
            let answered_before = answered.iter().filter(|&&done| done).count();
            let result = self.pool.take(deadline).and_then(|taken| {
                used = matches!(taken, Taken::Used(_));
                let (Taken::Used(mut session) | Taken::Fresh(mut session)) = taken;
                let result = session.ask(queries, &mut answered, at, each);
                match result {
                    Ok(()) | Err(ClientError::Answer(_)) => self.pool.put_back(session),
                    Err(_) => self.pool.discard(),
                }
                result
            });
            match result {
                Err(error) if error.is_transient() => {
                    if used {
                        self.pool.discard_idle(); // most likely the server was restarted: try a new session at once
                        continue;
                    }
                    if answered.iter().filter(|&&done| done).count() > answered_before {
                        (deadline, pause) = (Instant::now() + self.retry_for, RETRY_PAUSE_MIN); // it was there
                    }
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(error);
                    }
                    if !waiting {
                        tracing::warn!(timeline = %self.timeline, %error, "waiting for the page service at {}", self.endpoint);
                        waiting = true;
                    }
                    if !self.pool.pause(pause.min(left)) {
                        return Err(error);
                    }
                    pause = (pause * 2).min(RETRY_PAUSE_MAX);
                }
                other => {
                    if waiting && other.is_ok() {
                        tracing::info!(timeline = %self.timeline, "the page service at {} is back", self.endpoint);
                    }
                    return other;
                }
            }
        }
    }

    fn ask_one(&self, query: Query, at: ReadLsn) -> Result<Answer, ClientError> {
        let mut found = None;
        self.ask(&[query], at, &mut |_, bytes| {
            let answer = Answer::decode_to(&query, Bytes::copy_from_slice(bytes));
            found = Some(answer.map_err(|error| ClientError::message(&self.endpoint, &error))?);
            Ok(())
        })?;
        found.ok_or_else(|| ClientError::protocol(&self.endpoint, "no answer"))
    }

    fn wrong_kind(&self) -> ClientError {
        ClientError::protocol(&self.endpoint, "answer of another kind")
    }

    /// One page, into `page`.
    ///
    /// # Errors
    /// [`ClientError::Answer`] when the page service says that there is none; others when the server stayed away.
    pub fn get_page(&self, rel: RelFork, blkno: BlockNumber, at: ReadLsn, page: &mut Page) -> Result<(), ClientError> {
        self.get_pages(&[(rel, blkno)], at, &mut |_, found| page.copy_from_slice(found))
    }

    /// Any pages, all in flight together; `each` gets the index in `blocks` and the page, in whatever order they come,
    /// once each.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`]; some pages may have been handed over then.
    pub fn get_pages(&self, blocks: &[(RelFork, BlockNumber)], at: ReadLsn, each: &mut dyn FnMut(usize, &Page)) -> Result<(), ClientError> {
        let queries: Vec<Query> = blocks.iter().map(|&(rel, blkno)| Query::GetPage(rel, blkno)).collect();
        self.ask(&queries, at, &mut |index, bytes| {
            let page: &Page = bytes
                .try_into()
                .map_err(|_| ClientError::protocol(&self.endpoint, format!("a page of {} bytes, expected {BLCKSZ}", bytes.len())))?;
            each(index, page);
            Ok(())
        })
    }

    /// Up to `count` pages from block `first` on, one behind the other; fewer where the fork ends.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn page_range(&self, rel: RelFork, first: BlockNumber, count: u32, at: ReadLsn) -> Result<Vec<u8>, ClientError> {
        self.ranges(first, count, at, |first, count| Query::PageRange { rel, first, count })
    }

    /// Up to `count` pages of an SLRU segment from its page `first` on; fewer where the segment ends.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn slru_range(&self, kind: SlruKind, segno: u32, first: u32, count: u32, at: ReadLsn) -> Result<Vec<u8>, ClientError> {
        self.ranges(first, count, at, |first, count| Query::SlruRange { kind, segno, first, count })
    }

    /// Cuts a range into as many questions as it takes, all in flight together.
    fn ranges(&self, first: u32, count: u32, at: ReadLsn, query: impl Fn(u32, u32) -> Query) -> Result<Vec<u8>, ClientError> {
        const COUNT_SIZE: usize = 4;
        let count = count.min(u32::MAX - first);
        let starts = (0..count).step_by(RANGE_PAGES_MAX as usize);
        let queries: Vec<Query> = starts.map(|start| query(first + start, (count - start).min(RANGE_PAGES_MAX))).collect();
        let mut pieces: Vec<Vec<u8>> = vec![Vec::new(); queries.len()];
        self.ask(&queries, at, &mut |index, bytes| {
            let asked = (count - index as u32 * RANGE_PAGES_MAX).min(RANGE_PAGES_MAX) as usize;
            let pages = bytes.get(COUNT_SIZE..).unwrap_or_default();
            let announced = bytes.first_chunk().map(|count| u32::from_be_bytes(*count) as usize);
            if announced.map(|announced| announced * BLCKSZ) != Some(pages.len()) || pages.len() > asked * BLCKSZ {
                let what = format!("{} bytes for {asked} pages, {announced:?} announced", pages.len());
                return Err(ClientError::protocol(&self.endpoint, what));
            }
            pieces[index].extend_from_slice(pages);
            Ok(())
        })?;
        // A piece that is not full is the last: whatever follows it lies behind the end.
        let end = pieces.iter().position(|piece| piece.len() < RANGE_PAGES_MAX as usize * BLCKSZ).map_or(pieces.len(), |short| short + 1);
        pieces.truncate(end);
        Ok(if pieces.len() == 1 { pieces.remove(0) } else { pieces.concat() })
    }

    /// Whether the fork exists.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn exists(&self, rel: RelFork, at: ReadLsn) -> Result<bool, ClientError> {
        match self.ask_one(Query::Exists(rel), at)? {
            Answer::Exists(exists) => Ok(exists),
            _ => Err(self.wrong_kind()),
        }
    }

    /// The fork's size in blocks.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn nblocks(&self, rel: RelFork, at: ReadLsn) -> Result<BlockNumber, ClientError> {
        match self.ask_one(Query::Nblocks(rel), at)? {
            Answer::Nblocks(blocks) => Ok(blocks),
            _ => Err(self.wrong_kind()),
        }
    }

    /// Bytes in all main forks of a database.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn db_size(&self, db: Oid, at: ReadLsn) -> Result<i64, ClientError> {
        match self.ask_one(Query::DbSize(db), at)? {
            Answer::DbSize(size) => Ok(size),
            _ => Err(self.wrong_kind()),
        }
    }

    /// All forks in a database's directory of a tablespace, with their sizes.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn list_relations(&self, spc: Oid, db: Oid, at: ReadLsn) -> Result<Vec<RelationSize>, ClientError> {
        match self.ask_one(Query::ListRelations { spc, db }, at)? {
            Answer::Relations(relations) => Ok(relations),
            _ => Err(self.wrong_kind()),
        }
    }

    /// All segments of an SLRU area, with the pages in each.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn list_slru(&self, kind: SlruKind, at: ReadLsn) -> Result<Vec<SlruSegmentSize>, ClientError> {
        match self.ask_one(Query::ListSlru(kind), at)? {
            Answer::SlruSegments(segments) => Ok(segments),
            _ => Err(self.wrong_kind()),
        }
    }

    /// All pages of an SLRU segment, one behind the other.
    ///
    /// # Errors
    /// As [`BlockingPageClient::get_page`].
    pub fn slru_segment(&self, kind: SlruKind, segno: u32, at: ReadLsn) -> Result<Bytes, ClientError> {
        match self.ask_one(Query::SlruSegment(kind, segno), at)? {
            Answer::SlruSegment(pages) => Ok(pages),
            _ => Err(self.wrong_kind()),
        }
    }
}
