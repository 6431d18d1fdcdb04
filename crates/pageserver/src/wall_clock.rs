//! What time it is for people.

use std::time::{SystemTime, UNIX_EPOCH};

use varve_postgres::Timestamp;

/// Now. A clock that stands before 1970 says 1970.
pub(crate) fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_unix_micros(i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX))
}
