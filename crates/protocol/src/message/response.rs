//! Answers of the page service.

use bytes::{Buf, BufMut, Bytes};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Oid};

use super::{
    ERROR_TEXT_SIZE_MAX, Header, MessageError, Query, RANGE_PAGES_MAX, Request, SEGMENT_SIZE_MAX, Version, cursor::Cursor,
    request::take_fork,
};

const ERROR_TAG: u8 = 103;
const RELATION_SIZE_BYTES: usize = 9;
const SLRU_SIZE_BYTES: usize = 8;

/// A fork and its size, as [`Answer::Relations`] lists them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelationSize {
    /// The relation's file number.
    pub rel: Oid,
    /// Which fork.
    pub fork: Fork,
    /// Its size.
    pub blocks: BlockNumber,
}

/// An SLRU segment and its size, as [`Answer::SlruSegments`] lists them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlruSegmentSize {
    /// The segment.
    pub segno: u32,
    /// Pages in it.
    pub pages: u32,
}

/// What the page service found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// To [`Query::Exists`].
    Exists(bool),
    /// To [`Query::Nblocks`].
    Nblocks(BlockNumber),
    /// To [`Query::GetPage`]: exactly one page.
    Page(Bytes),
    /// To [`Query::DbSize`].
    DbSize(i64),
    /// To [`Query::SlruSegment`]: whole pages.
    SlruSegment(Bytes),
    /// To [`Query::ListRelations`].
    Relations(Vec<RelationSize>),
    /// To [`Query::PageRange`]: whole pages.
    Pages(Bytes),
    /// To [`Query::ListSlru`].
    SlruSegments(Vec<SlruSegmentSize>),
    /// To [`Query::SlruRange`]: whole pages.
    SlruPages(Bytes),
}

/// An answer and the question it belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Response {
    /// The answer was found.
    Answer {
        /// The question.
        request: Request,
        /// The answer, of the kind that the question asks for.
        answer: Answer,
    },
    /// There is none.
    Error {
        /// The question's header.
        header: Header,
        /// Why, for people.
        message: String,
    },
}

impl Answer {
    fn matches(&self, query: &Query) -> bool {
        matches!(
            (self, query),
            (Answer::Exists(_), Query::Exists(_))
                | (Answer::Nblocks(_), Query::Nblocks(_))
                | (Answer::Page(_), Query::GetPage(..))
                | (Answer::DbSize(_), Query::DbSize(_))
                | (Answer::SlruSegment(_), Query::SlruSegment(..))
                | (Answer::Relations(_), Query::ListRelations { .. })
                | (Answer::Pages(_), Query::PageRange { .. })
                | (Answer::SlruSegments(_), Query::ListSlru(_))
                | (Answer::SlruPages(_), Query::SlruRange { .. })
        )
    }

    fn encode(&self, out: &mut impl BufMut) {
        match self {
            Answer::Exists(exists) => out.put_u8(u8::from(*exists)),
            Answer::Nblocks(blocks) => out.put_u32(*blocks),
            Answer::Page(page) => out.put_slice(page),
            Answer::DbSize(size) => out.put_i64(*size),
            Answer::SlruSegment(pages) | Answer::Pages(pages) | Answer::SlruPages(pages) => {
                out.put_u32((pages.len() / BLCKSZ) as u32);
                out.put_slice(pages);
            }
            Answer::Relations(relations) => {
                out.put_u32(relations.len() as u32);
                for relation in relations {
                    out.put_u32(relation.rel);
                    out.put_u8(relation.fork.number());
                    out.put_u32(relation.blocks);
                }
            }
            Answer::SlruSegments(segments) => {
                out.put_u32(segments.len() as u32);
                for segment in segments {
                    out.put_u32(segment.segno);
                    out.put_u32(segment.pages);
                }
            }
        }
    }

    /// The answer that `bytes`, which follow [`Response::encode_start`]'s, are to `query`.
    ///
    /// # Errors
    /// [`MessageError`] says what is wrong with them.
    pub fn decode_to(query: &Query, bytes: Bytes) -> Result<Answer, MessageError> {
        let mut cursor = Cursor::new(bytes, response_tag(query));
        let answer = Self::decode(query, &mut cursor)?;
        cursor.end()?;
        Ok(answer)
    }

    fn decode(query: &Query, cursor: &mut Cursor<impl Buf>) -> Result<Answer, MessageError> {
        Ok(match query {
            Query::Exists(_) => match cursor.u8("exists")? {
                0 => Answer::Exists(false),
                1 => Answer::Exists(true),
                other => return Err(cursor.value_error(format!("'exists' is {other}, expected 0 or 1"))),
            },
            Query::Nblocks(_) => Answer::Nblocks(cursor.u32("blocks")?),
            Query::GetPage(..) => Answer::Page(cursor.bytes("page", BLCKSZ)?),
            Query::DbSize(_) => Answer::DbSize(cursor.u64("size")?.cast_signed()),
            Query::SlruSegment(..) => Answer::SlruSegment(take_pages(cursor, SEGMENT_SIZE_MAX)?),
            Query::PageRange { .. } => Answer::Pages(take_pages(cursor, RANGE_PAGES_MAX as usize * BLCKSZ)?),
            Query::SlruRange { .. } => Answer::SlruPages(take_pages(cursor, RANGE_PAGES_MAX as usize * BLCKSZ)?),
            Query::ListRelations { .. } => {
                let count = take_count(cursor, RELATION_SIZE_BYTES)?;
                let mut relations = Vec::with_capacity(count);
                for _ in 0..count {
                    let (rel, fork, blocks) = (cursor.u32("relation")?, take_fork(cursor)?, cursor.u32("blocks")?);
                    relations.push(RelationSize { rel, fork, blocks });
                }
                Answer::Relations(relations)
            }
            Query::ListSlru(_) => {
                let count = take_count(cursor, SLRU_SIZE_BYTES)?;
                let mut segments = Vec::with_capacity(count);
                for _ in 0..count {
                    segments.push(SlruSegmentSize { segno: cursor.u32("segment")?, pages: cursor.u32("pages")? });
                }
                Answer::SlruSegments(segments)
            }
        })
    }
}

/// A count of rows of `row_size` bytes, all of which are there.
fn take_count(cursor: &mut Cursor<impl Buf>, row_size: usize) -> Result<usize, MessageError> {
    let count = cursor.u32("count")? as usize;
    if count.checked_mul(row_size) != Some(cursor.remaining()) {
        let what = format!("says that it has {count} rows of {row_size} bytes, and {} bytes follow", cursor.remaining());
        return Err(cursor.value_error(what));
    }
    Ok(count)
}

/// A count of pages and the pages.
fn take_pages(cursor: &mut Cursor<impl Buf>, size_max: usize) -> Result<Bytes, MessageError> {
    let count = take_count(cursor, BLCKSZ)?;
    if count * BLCKSZ > size_max {
        return Err(cursor.value_error(format!("has {count} pages, at most {} belong into one answer", size_max / BLCKSZ)));
    }
    cursor.bytes("pages", count * BLCKSZ)
}

fn response_tag(query: &Query) -> u8 {
    match query.request_tag() {
        tag @ 0..=2 => 100 + tag,
        tag => match tag {
            3 => 104,
            4 => 105,
            ours => 100 + ours,
        },
    }
}

fn request_tag(response_tag: u8) -> Option<u8> {
    match response_tag {
        100..=102 | 132..=135 => Some(response_tag - 100),
        104 => Some(3),
        105 => Some(4),
        _ => None,
    }
}

impl Response {
    /// The answer `answer` to `request`; an error when it answers another kind of question, which is a fault of the
    /// server's.
    pub fn new(request: Request, answer: Answer) -> Response {
        if answer.matches(&request.query) {
            Response::Answer { request, answer }
        } else {
            Response::error(request.header, &format!("internal error: the answer to {:?} is of another kind", request.query))
        }
    }

    /// An error as the answer to the request with `header`. NULs in the text become spaces, a long text is cut.
    pub fn error(header: Header, message: &str) -> Response {
        let mut end = message.len().min(ERROR_TEXT_SIZE_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        Response::Error { header, message: message[..end].replace('\0', " ") }
    }

    /// The header of the question.
    pub fn header(&self) -> Header {
        match self {
            Response::Answer { request, .. } => request.header,
            Response::Error { header, .. } => *header,
        }
    }

    /// Appends this response's bytes to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        self.encode_as(Version::V3, out);
    }

    /// Appends this response's bytes to `out`, in a stream of this version.
    pub fn encode_as(&self, version: Version, out: &mut impl BufMut) {
        match self {
            Response::Answer { request, answer } => {
                Self::encode_start_as(version, request, out);
                answer.encode(out);
            }
            Response::Error { header, message } => {
                out.put_u8(ERROR_TAG);
                if version == Version::V3 {
                    header.encode(out);
                }
                out.put_slice(message.as_bytes());
                out.put_u8(0);
            }
        }
    }

    /// Appends what a response to `request` begins with: the answer's bytes follow. For servers that have a page at
    /// hand and copy it once.
    pub fn encode_start(request: &Request, out: &mut impl BufMut) {
        Self::encode_start_as(Version::V3, request, out);
    }

    /// The same in a stream of this version.
    pub fn encode_start_as(version: Version, request: &Request, out: &mut impl BufMut) {
        out.put_u8(response_tag(&request.query));
        if version == Version::V3 {
            request.header.encode(out);
            request.query.encode(out);
        }
    }

    /// The response that `bytes` are; pages in it are views of them.
    ///
    /// # Errors
    /// [`MessageError`] says what is wrong with them.
    pub fn decode(bytes: &Bytes) -> Result<Response, MessageError> {
        let tag = *bytes.first().ok_or(MessageError::Short { tag: 0, field: "tag", missing: 1 })?;
        let mut cursor = Cursor::new(bytes.slice(1..), tag);
        let header = Header::decode(Version::V3, &mut cursor)?;
        if tag == ERROR_TAG {
            let text = cursor.bytes("text", cursor.remaining())?;
            let text = match text.split_last() {
                Some((0, text)) if text.len() <= ERROR_TEXT_SIZE_MAX => text,
                Some((0, _)) => return Err(cursor.value_error(format!("the text is longer than {ERROR_TEXT_SIZE_MAX} bytes"))),
                _ => return Err(cursor.value_error("the text does not end with a NUL".to_owned())),
            };
            return Ok(Response::error(header, &String::from_utf8_lossy(text)));
        }
        let query = Query::decode(request_tag(tag).ok_or(MessageError::Tag(tag))?, &mut cursor)?;
        let answer = Answer::decode(&query, &mut cursor)?;
        cursor.end()?;
        Ok(Response::Answer { request: Request { header, query }, answer })
    }
}
