//! Answering requests, on a thread that may block, into the bytes that go to the client.

use bytes::{BufMut, BytesMut};
use varve_postgres::{BlockNumber, RelFork};
use varve_protocol::message::RESPONSE_SIZE_MAX;
use varve_protocol::wire::backend;
use varve_protocol::{Answer, Header, Query, ReadLsn, Request, Response, Version};

use super::{SourceError, TimelinePages};

/// Bytes in a row of a list of relations.
const RELATION_ROW_SIZE: usize = 9;

/// The moment that a request is about.
pub(super) fn moment(header: &Header) -> ReadLsn {
    ReadLsn { lsn: header.request_lsn, not_modified_since: header.not_modified_since }
}

/// Appends a page as the answer to `request`.
pub(super) fn put_page(version: Version, request: &Request, page: &[u8], out: &mut BytesMut) {
    backend::copy_data(out, |out| {
        Response::encode_start_as(version, request, out);
        out.put_slice(page);
    });
}

/// Appends the answers to `requests`, in their order. Neighbouring page requests about the same moment are one walk.
///
/// # Errors
/// [`SourceError::NotReady`], behind the answers before it: the connection is to end.
pub(super) fn answer_all(
    version: Version,
    timeline: &dyn TimelinePages,
    requests: &[Request],
    out: &mut BytesMut,
) -> Result<(), SourceError> {
    let mut rest = requests;
    while let Some(first) = rest.first() {
        let at = moment(&first.header);
        let run = rest.iter().take_while(|request| moment(&request.header) == at).map_while(|request| match request.query {
            Query::GetPage(rel, blkno) => Some((rel, blkno)),
            _ => None,
        });
        let blocks: Vec<(RelFork, BlockNumber)> = run.collect();
        if blocks.is_empty() {
            answer_one(version, timeline, first, at, out)?;
            rest = &rest[1..];
            continue;
        }
        let (asked, later) = rest.split_at(blocks.len());
        answer_pages(version, timeline, asked, &blocks, at, out)?;
        rest = later;
    }
    Ok(())
}

fn answer_pages(
    version: Version,
    timeline: &dyn TimelinePages,
    asked: &[Request],
    blocks: &[(RelFork, BlockNumber)],
    at: ReadLsn,
    out: &mut BytesMut,
) -> Result<(), SourceError> {
    let mut next = 0;
    let mut not_ready = None;
    timeline.get_pages(blocks, at, &mut |index, page| {
        // Each page once, in order: then every request gets its one answer in its place, whatever the source does.
        if index != next || not_ready.is_some() {
            return;
        }
        let Some(request) = asked.get(index) else { return };
        next += 1;
        match page {
            Ok(page) => put_page(version, request, page, out),
            Err(error @ SourceError::NotReady(_)) => not_ready = Some(error),
            Err(error) => put_error(version, request, &error, out),
        }
    });
    if let Some(error) = not_ready {
        return Err(error);
    }
    for request in &asked[next.min(asked.len())..] {
        put_error(version, request, &SourceError::Failed("internal error: the page was not delivered".to_owned()), out);
    }
    Ok(())
}

fn answer_one(
    version: Version,
    timeline: &dyn TimelinePages,
    request: &Request,
    at: ReadLsn,
    out: &mut BytesMut,
) -> Result<(), SourceError> {
    match find(timeline, &request.query, at) {
        Ok(answer) => {
            let response = Response::new(*request, answer);
            backend::copy_data(out, |out| response.encode_as(version, out));
        }
        Err(error @ SourceError::NotReady(_)) => return Err(error),
        Err(error) => put_error(version, request, &error, out),
    }
    Ok(())
}

fn find(timeline: &dyn TimelinePages, query: &Query, at: ReadLsn) -> Result<Answer, SourceError> {
    Ok(match *query {
        Query::Exists(rel) => Answer::Exists(timeline.exists(rel, at)?),
        Query::Nblocks(rel) => Answer::Nblocks(timeline.nblocks(rel, at)?),
        Query::GetPage(rel, blkno) => Answer::Page(timeline.get_page(rel, blkno, at)?.to_vec().into()),
        Query::DbSize(db) => Answer::DbSize(timeline.db_size(db, at)?),
        Query::SlruSegment(kind, segno) => Answer::SlruSegment(gather(|out| timeline.slru_segment(kind, segno, at, out))?),
        Query::ListRelations { spc, db } => {
            let relations = timeline.list_relations(spc, db, at)?;
            if relations.len() > RESPONSE_SIZE_MAX / RELATION_ROW_SIZE - RELATION_ROW_SIZE {
                return Err(SourceError::Failed(format!("{} relation forks do not fit into one answer", relations.len())));
            }
            Answer::Relations(relations)
        }
        Query::PageRange { rel, first, count } => Answer::Pages(gather(|out| timeline.page_range(rel, first, count, at, out))?),
        Query::ListSlru(kind) => Answer::SlruSegments(timeline.list_slru(kind, at)?),
        Query::SlruRange { kind, segno, first, count } => {
            Answer::SlruPages(gather(|out| timeline.slru_range(kind, segno, first, count, at, out))?)
        }
    })
}

fn gather(read: impl FnOnce(&mut Vec<u8>) -> Result<(), SourceError>) -> Result<bytes::Bytes, SourceError> {
    let mut pages = Vec::new();
    read(&mut pages)?;
    Ok(pages.into())
}

/// Appends an error as the answer to `request`.
pub(super) fn put_error(version: Version, request: &Request, error: &SourceError, out: &mut BytesMut) {
    let response = Response::error(request.header, &error.to_string());
    backend::copy_data(out, |out| response.encode_as(version, out));
}
