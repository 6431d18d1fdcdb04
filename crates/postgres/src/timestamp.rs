//! Moments as Postgres stores them in WAL records.

/// `TimestampTz`: microseconds since 2000-01-01 00:00 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timestamp(pub i64);

/// Microseconds from 1970-01-01 to 2000-01-01.
const UNIX_EPOCH_DISTANCE_US: i64 = 946_684_800_000_000;

impl Timestamp {
    /// Before every moment.
    pub const MIN: Timestamp = Timestamp(i64::MIN);

    /// The moment `micros` microseconds after 1970-01-01 00:00 UTC.
    pub fn from_unix_micros(micros: i64) -> Timestamp {
        Timestamp(micros.saturating_sub(UNIX_EPOCH_DISTANCE_US))
    }

    /// Microseconds after 1970-01-01 00:00 UTC.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_add(UNIX_EPOCH_DISTANCE_US)
    }
}
