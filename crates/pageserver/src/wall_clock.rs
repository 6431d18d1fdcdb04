//! What time it is for people.

use std::time::{SystemTime, UNIX_EPOCH};

use varve_postgres::Timestamp;

/// Now. A clock that stands before 1970 says 1970.
pub(crate) fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_unix_micros(i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX))
}

/// A moment in RFC 3339, UTC.
pub(crate) fn rfc3339(at: Timestamp) -> String {
    jiff::Timestamp::from_microsecond(at.unix_micros()).map_or_else(|_| "out of range".to_owned(), |time| time.to_string())
}
