//! Log sequence numbers: positions in a timeline's WAL.

use std::fmt;
use std::str::FromStr;

use crate::wal::SegmentSize;

/// Bytes in a WAL page (`XLOG_BLCKSZ`).
pub const WAL_PAGE_SIZE: u64 = 8192;
/// Bytes in a WAL segment of every cluster that Varve makes (`DEFAULT_XLOG_SEG_SIZE`).
pub const WAL_SEGMENT_SIZE: u64 = 16 * 1024 * 1024;

/// A position in WAL, in bytes from its beginning. Printed as Postgres prints it: `0/16B3748`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `InvalidXLogRecPtr`.
    pub const INVALID: Lsn = Lsn(0);
    /// Beyond every position; on the page service it means *newest*.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// Whether this is a real position (not zero).
    pub fn is_valid(self) -> bool {
        self != Self::INVALID
    }

    /// The next multiple of 8 at or after this position (`MAXALIGN`): where a record may begin.
    pub fn align(self) -> Lsn {
        Lsn(self.0.saturating_add(7) & !7)
    }

    /// Offset within the WAL page.
    pub fn page_offset(self) -> u64 {
        self.0 % WAL_PAGE_SIZE
    }

    /// Start of the WAL page that holds this position.
    pub fn page_start(self) -> Lsn {
        Lsn(self.0 - self.page_offset())
    }

    /// Offset within the WAL segment.
    pub fn segment_offset(self) -> u64 {
        self.0 % WAL_SEGMENT_SIZE
    }

    /// Number of the WAL segment that holds this position.
    pub fn segment_number(self) -> u64 {
        self.0 / WAL_SEGMENT_SIZE
    }

    /// Start of the WAL segment that holds this position.
    pub fn segment_start(self) -> Lsn {
        Lsn(self.0 - self.segment_offset())
    }

    /// Bytes from `earlier` to here; zero if `earlier` is later.
    pub fn distance_from(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Name of the WAL segment file `segment_number` on Postgres timeline `tli` (`XLogFileName`).
pub fn wal_segment_name(tli: u32, segment_number: u64) -> String {
    SegmentSize::VARVE.name(tli, segment_number)
}

impl std::ops::Add<u64> for Lsn {
    type Output = Lsn;
    fn add(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }
}

impl std::ops::AddAssign<u64> for Lsn {
    fn add_assign(&mut self, bytes: u64) {
        *self = *self + bytes;
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an LSN: expected two hexadecimal numbers of at most 8 digits with a slash between them, such as 0/16B3748")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |part: &str| {
            let hex = !part.is_empty() && part.len() <= 8 && part.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseLsnError(text.chars().take(64).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_as_postgres_does() {
        let lsn = Lsn(0x1_016B_3748);
        assert_eq!(lsn.to_string(), "1/16B3748");
        assert_eq!("1/16B3748".parse(), Ok(lsn));
        for bad in ["", "1", "1/", "/1", "1/123456789", "+1/2", "x/1", "1/2/3"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn names_segments_as_postgres_does() {
        assert_eq!(wal_segment_name(1, 1), "000000010000000000000001");
        assert_eq!(wal_segment_name(3, 256 * 2 + 0xFF), "0000000300000002000000FF");
    }
}
