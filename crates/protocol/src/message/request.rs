//! Questions to the page service.

use bytes::{Buf, BufMut};
use varve_postgres::{BlockNumber, Fork, Lsn, Oid, RelFork, RelNode, slru::SlruKind};

use super::{MessageError, RANGE_PAGES_MAX, Version, cursor::Cursor};

/// What every request begins with and every response repeats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Chosen by the client, repeated in the answer.
    pub request_id: u64,
    /// The moment that is asked about: history at this position. [`Lsn::MAX`] is the newest.
    pub request_lsn: Lsn,
    /// The client knows that what it asks for did not change between here and `request_lsn`; when unsure, it gives
    /// `request_lsn`.
    pub not_modified_since: Lsn,
}

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Query {
    /// Does this fork exist?
    Exists(RelFork),
    /// How many blocks has it?
    Nblocks(RelFork),
    /// One page.
    GetPage(RelFork, BlockNumber),
    /// Bytes in all main forks of a database.
    DbSize(Oid),
    /// All pages of an SLRU segment.
    SlruSegment(SlruKind, u32),
    /// All forks of all relations in a database's directory of a tablespace, with their sizes.
    ListRelations {
        /// Tablespace.
        spc: Oid,
        /// Database; 0 for shared relations.
        db: Oid,
    },
    /// Neighbouring pages of a fork. The answer may have fewer than asked for: the fork ends there.
    PageRange {
        /// The fork.
        rel: RelFork,
        /// First block.
        first: BlockNumber,
        /// How many, at most [`RANGE_PAGES_MAX`].
        count: u32,
    },
    /// All segments of an SLRU area, with the pages in each.
    ListSlru(SlruKind),
    /// Neighbouring pages of an SLRU segment. The answer may have fewer than asked for: the segment ends there.
    SlruRange {
        /// The area.
        kind: SlruKind,
        /// The segment.
        segno: u32,
        /// First page, counted from the segment's start.
        first: u32,
        /// How many, at most [`RANGE_PAGES_MAX`].
        count: u32,
    },
}

/// A question to the page service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Which answer belongs to it, and what moment it is about.
    pub header: Header,
    /// What it asks.
    pub query: Query,
}

impl Header {
    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_u64(self.request_id);
        out.put_u64(self.request_lsn.0);
        out.put_u64(self.not_modified_since.0);
    }

    pub(super) fn decode(version: Version, cursor: &mut Cursor<impl Buf>) -> Result<Header, MessageError> {
        Ok(Header {
            request_id: if version == Version::V2 { 0 } else { cursor.u64("request id")? },
            request_lsn: Lsn(cursor.u64("request LSN")?),
            not_modified_since: Lsn(cursor.u64("not-modified-since LSN")?),
        })
    }
}

fn put_rel(rel: RelFork, out: &mut impl BufMut) {
    out.put_u32(rel.node.spc);
    out.put_u32(rel.node.db);
    out.put_u32(rel.node.rel);
    out.put_u8(rel.fork.number());
}

fn take_rel(cursor: &mut Cursor<impl Buf>) -> Result<RelFork, MessageError> {
    let (spc, db, rel) = (cursor.u32("tablespace")?, cursor.u32("database")?, cursor.u32("relation")?);
    Ok(RelNode { spc, db, rel }.fork(take_fork(cursor)?))
}

pub(super) fn take_fork(cursor: &mut Cursor<impl Buf>) -> Result<Fork, MessageError> {
    let number = cursor.u8("fork")?;
    Fork::from_number(number).ok_or_else(|| cursor.value_error(format!("fork number {number} does not exist, 0 to 3 do")))
}

fn take_kind(cursor: &mut Cursor<impl Buf>) -> Result<SlruKind, MessageError> {
    let number = cursor.u8("SLRU kind")?;
    SlruKind::from_number(number).ok_or_else(|| cursor.value_error(format!("SLRU kind {number} does not exist, 0 to 3 do")))
}

fn take_count(cursor: &mut Cursor<impl Buf>) -> Result<u32, MessageError> {
    let count = cursor.u32("count")?;
    if count > RANGE_PAGES_MAX {
        return Err(cursor.value_error(format!("asks for {count} pages at once, at most {RANGE_PAGES_MAX} are allowed")));
    }
    Ok(count)
}

impl Query {
    /// The tag of a request with this query.
    pub(super) fn request_tag(&self) -> u8 {
        match self {
            Query::Exists(_) => 0,
            Query::Nblocks(_) => 1,
            Query::GetPage(..) => 2,
            Query::DbSize(_) => 3,
            Query::SlruSegment(..) => 4,
            Query::ListRelations { .. } => 32,
            Query::PageRange { .. } => 33,
            Query::ListSlru(_) => 34,
            Query::SlruRange { .. } => 35,
        }
    }

    pub(super) fn encode(&self, out: &mut impl BufMut) {
        match *self {
            Query::Exists(rel) | Query::Nblocks(rel) => put_rel(rel, out),
            Query::GetPage(rel, blkno) => {
                put_rel(rel, out);
                out.put_u32(blkno);
            }
            Query::DbSize(db) => out.put_u32(db),
            Query::SlruSegment(kind, segno) => {
                out.put_u8(kind.number());
                out.put_u32(segno);
            }
            Query::ListRelations { spc, db } => {
                out.put_u32(spc);
                out.put_u32(db);
            }
            Query::PageRange { rel, first, count } => {
                put_rel(rel, out);
                out.put_u32(first);
                out.put_u32(count);
            }
            Query::ListSlru(kind) => out.put_u8(kind.number()),
            Query::SlruRange { kind, segno, first, count } => {
                out.put_u8(kind.number());
                out.put_u32(segno);
                out.put_u32(first);
                out.put_u32(count);
            }
        }
    }

    /// The query of a request with tag `request_tag`.
    pub(super) fn decode(request_tag: u8, cursor: &mut Cursor<impl Buf>) -> Result<Query, MessageError> {
        Ok(match request_tag {
            0 => Query::Exists(take_rel(cursor)?),
            1 => Query::Nblocks(take_rel(cursor)?),
            2 => Query::GetPage(take_rel(cursor)?, cursor.u32("block")?),
            3 => Query::DbSize(cursor.u32("database")?),
            4 => Query::SlruSegment(take_kind(cursor)?, cursor.u32("segment")?),
            32 => Query::ListRelations { spc: cursor.u32("tablespace")?, db: cursor.u32("database")? },
            33 => Query::PageRange { rel: take_rel(cursor)?, first: cursor.u32("first block")?, count: take_count(cursor)? },
            34 => Query::ListSlru(take_kind(cursor)?),
            35 => Query::SlruRange {
                kind: take_kind(cursor)?,
                segno: cursor.u32("segment")?,
                first: cursor.u32("first page")?,
                count: take_count(cursor)?,
            },
            tag => return Err(MessageError::Tag(tag)),
        })
    }
}

impl Request {
    /// Appends this request's bytes to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u8(self.query.request_tag());
        self.header.encode(out);
        self.query.encode(out);
    }

    /// The request that `bytes` are.
    ///
    /// # Errors
    /// [`MessageError`] says what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Request, MessageError> {
        Self::decode_as(Version::V3, bytes)
    }

    /// The request of a stream of this version that `bytes` are.
    ///
    /// # Errors
    /// [`MessageError`] says what is wrong with them.
    pub fn decode_as(version: Version, bytes: &[u8]) -> Result<Request, MessageError> {
        let (&tag, rest) = bytes.split_first().ok_or(MessageError::Short { tag: 0, field: "tag", missing: 1 })?;
        let mut cursor = Cursor::new(rest, tag);
        let request = Request { header: Header::decode(version, &mut cursor)?, query: Query::decode(tag, &mut cursor)? };
        cursor.end()?;
        Ok(request)
    }
}
