//! The page service's messages: what travels inside `CopyData` after `pagestream_v3`.
//!
//! A [`Request`] is a [`Header`] (an id that the client chose, the LSN it wants to see, and the LSN since which it
//! knows that nothing changed) and a [`Query`]. A [`Response`] repeats both, so that a client can match answers to
//! questions however many are in flight, and check that the answer is one to its question.
//!
//! Tags 0 to 4 and 100 to 105 are those of Neon's page service, version 3, byte for byte; tags from 32 and 132 up are
//! Varve's additions. All integers are big-endian:
//!
//! ```text
//! request    tag u8 | request id u64 | request LSN u64 (all ones = newest) | not modified since u64 | query
//! response   tag u8 | the request's id, LSNs and query repeated | answer           (an error: id and LSNs only, then text and a NUL)
//!
//!            query                                                             answer
//!   0 / 100  exists          spc u32, db u32, rel u32, fork u8                 u8
//!   1 / 101  nblocks         spc u32, db u32, rel u32, fork u8                 u32
//!   2 / 102  get page        spc u32, db u32, rel u32, fork u8, block u32      8192 bytes
//!   3 / 104  database size   db u32                                            i64
//!   4 / 105  SLRU segment    kind u8, segment u32                              u32 count, pages
//!  32 / 132  list relations  spc u32, db u32                                   u32 count, then (rel u32, fork u8, blocks u32) each
//!  33 / 133  page range      spc u32, db u32, rel u32, fork u8, first u32, n u32   u32 count, pages
//!  34 / 134  list SLRU       kind u8                                           u32 count, then (segment u32, pages u32) each
//!  35 / 135  SLRU range      kind u8, segment u32, first u32, n u32            u32 count, pages
//! ```
//!
//! Version 2 ([`Version::V2`]) has no request id, and its responses repeat nothing: a tag, then the answer or the text.
//!
//! Decoding is total: any bytes give a message or a [`MessageError`], a message has no bytes left over, and no length
//! field makes anything be allocated that did not arrive.

/// Which form the messages of a stream have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `pagestream_v2`: answers are told by their order alone.
    V2,
    /// `pagestream_v3`.
    V3,
}

mod cursor;
mod request;
mod response;

pub use request::{Header, Query, Request};
pub use response::{Answer, RelationSize, Response, SlruSegmentSize};

use varve_postgres::BLCKSZ;

/// Most bytes in an encoded request; the largest is a page range's, with 46.
pub const REQUEST_SIZE_MAX: usize = 64;
/// Most pages that one range request may ask for (2 MiB): twice the largest readahead of a FUSE mount.
pub const RANGE_PAGES_MAX: u32 = 256;
/// Most bytes in an encoded response: room for a list of seven million relation forks.
pub const RESPONSE_SIZE_MAX: usize = 64 * 1024 * 1024;
/// Most bytes of text in an error response; what is longer is cut.
pub const ERROR_TEXT_SIZE_MAX: usize = 8 * 1024;
/// Pages in an SLRU segment, the most that a segment answer carries.
const SEGMENT_SIZE_MAX: usize = varve_postgres::slru::PAGES_PER_SEGMENT as usize * BLCKSZ;

/// Bytes that are not a message of the page service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The first byte is no tag that we know.
    #[error("unknown page service message tag {0}")]
    Tag(u8),
    /// The message ends before its fields do.
    #[error("page service message with tag {tag} ends early: {missing} bytes of '{field}' are missing")]
    Short {
        /// The message's tag.
        tag: u8,
        /// The field that is cut.
        field: &'static str,
        /// How many bytes are missing.
        missing: usize,
    },
    /// The message goes on after its last field.
    #[error("page service message with tag {tag} has {extra} bytes too many")]
    Long {
        /// The message's tag.
        tag: u8,
        /// Bytes that are left.
        extra: usize,
    },
    /// A field that has no such value.
    #[error("page service message with tag {tag}: {what}")]
    Value {
        /// The message's tag.
        tag: u8,
        /// Which field, what it holds, and what it may hold.
        what: String,
    },
}
