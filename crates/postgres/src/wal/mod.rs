//! Write-ahead log: pages, records and what is inside them.
//!
//! Bytes of a stream go into a [`Framer`], which checks page headers and each record's CRC and gives whole records as
//! [`FramedRecord`]; [`Record::decode`] takes one apart into blocks and main data, [`PlainRecord::decode`] those that
//! come most often, at fixed places, and [`records`] reads the main data of those that change what Postgres keeps
//! outside relation blocks. [`synthesis`] makes the WAL with which a server starts.

mod framer;
pub mod image;
mod page_header;
mod plain;
mod record;
pub mod record_type;
pub mod records;
pub mod rmgr;
mod segment_size;
pub mod synthesis;

pub use framer::{FramedRecord, Framer, WalInput};
pub use page_header::{LONG_HEADER_SIZE, PageHeader, SHORT_HEADER_SIZE};
pub use plain::PlainRecord;
pub use record::{Block, RECORD_HEADER_SIZE, Record, RecordHeader, record_crc};
pub use segment_size::SegmentSize;

use crate::Lsn;

/// WAL that is not as Postgres writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// A page header that cannot be right.
    #[error("WAL page at {lsn}: {what}")]
    Page {
        /// Where the page begins.
        lsn: Lsn,
        /// What was found and what was expected.
        what: String,
    },
    /// A record that cannot be right.
    #[error("WAL record at {lsn}: {what}")]
    Record {
        /// Where the record begins.
        lsn: Lsn,
        /// What was found and what was expected.
        what: String,
    },
    /// A record whose bytes are not those that were written.
    #[error("WAL record at {lsn}: CRC is {found:08X}, the record says {expected:08X}")]
    Crc {
        /// Where the record begins.
        lsn: Lsn,
        /// CRC-32C of the bytes.
        found: u32,
        /// CRC-32C that the record carries.
        expected: u32,
    },
}
