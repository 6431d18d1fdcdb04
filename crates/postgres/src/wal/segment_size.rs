//! The size of the segments that a cluster's WAL is cut into, chosen by `initdb --wal-segsize`.
//!
//! Clusters that Varve makes have segments of 16 MiB ([`SegmentSize::VARVE`]). WAL that is only read may have others:
//! its first page says which.

use crate::Lsn;
use crate::lsn::WAL_SEGMENT_SIZE;

/// Bytes in a WAL segment: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSize(u64);

impl SegmentSize {
    /// That of every cluster that Varve makes.
    pub const VARVE: SegmentSize = SegmentSize(WAL_SEGMENT_SIZE);
    /// `WalSegMinSize`.
    const MIN: u64 = 1 << 20;
    /// `WalSegMaxSize`.
    const MAX: u64 = 1 << 30;

    /// Segments of so many bytes, if Postgres can have such.
    pub fn new(bytes: u64) -> Option<SegmentSize> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(SegmentSize(bytes))
    }

    /// What `SHOW wal_segment_size` says: `16MB`, `1GB`.
    pub fn from_setting(text: &str) -> Option<SegmentSize> {
        let (number, unit) = text.split_at_checked(text.len().checked_sub(2)?)?;
        let unit = match unit {
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => return None,
        };
        SegmentSize::new(number.parse::<u64>().ok()?.checked_mul(unit)?)
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Number of the segment that holds this position.
    pub fn number(self, lsn: Lsn) -> u64 {
        lsn.0 / self.0
    }

    /// Offset of this position within its segment.
    pub fn offset(self, lsn: Lsn) -> u64 {
        lsn.0 % self.0
    }

    /// Where a segment begins.
    pub fn start(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(self.0))
    }

    /// Name of a segment's file on Postgres timeline `tli` (`XLogFileName`).
    pub fn name(self, tli: u32, number: u64) -> String {
        let per_id = self.per_id();
        format!("{tli:08X}{:08X}{:08X}", number / per_id, number % per_id)
    }

    /// The number of the segment with these two halves in its name; none if there are fewer of this size.
    pub fn number_of_name(self, (high, low): (u32, u32)) -> Option<u64> {
        (u64::from(low) < self.per_id()).then(|| u64::from(high) * self.per_id() + u64::from(low))
    }

    /// Segments in 4 GiB (`XLogSegmentsPerXLogId`).
    fn per_id(self) -> u64 {
        0x1_0000_0000 / self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_initdb_takes() {
        for (text, bytes) in [("1MB", 1 << 20), ("16MB", 16 << 20), ("1GB", 1 << 30)] {
            assert_eq!(SegmentSize::from_setting(text), SegmentSize::new(bytes));
            assert_eq!(SegmentSize::new(bytes).map(SegmentSize::bytes), Some(bytes));
        }
        for bad in [0, 1 << 19, 3 << 20, 1 << 31] {
            assert_eq!(SegmentSize::new(bad), None, "{bad}");
        }
        for bad in ["", "MB", "3MB", "16kB", "2GB", "é"] {
            assert_eq!(SegmentSize::from_setting(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_and_numbers_are_postgress() {
        let (small, large) = (SegmentSize(1 << 20), SegmentSize(1 << 30));
        assert_eq!(small.name(1, 4096 + 0xABC), "000000010000000100000ABC");
        assert_eq!(small.number_of_name((1, 0xABC)), Some(4096 + 0xABC));
        assert_eq!(large.name(1, 7), "000000010000000100000003");
        assert_eq!(large.number_of_name((1, 3)), Some(7));
        assert_eq!(large.number_of_name((1, 4)), None, "the fifth gigabyte of four");
    }
}
