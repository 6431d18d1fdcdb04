//! Moments as people write them: an LSN, a time, or *head*.

use jiff::Timestamp;
use varve_postgres::Lsn;

use crate::error::{Code, ServerError};

/// Microseconds from 1970-01-01 to 2000-01-01 UTC, where Postgres's clock begins.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A time as WAL has it: microseconds since 2000-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PostgresTime(pub(crate) i64);

impl PostgresTime {
    /// Now, by this host's clock.
    pub(crate) fn now() -> PostgresTime {
        PostgresTime(Timestamp::now().as_microsecond().saturating_sub(POSTGRES_EPOCH_MICROS))
    }

    /// RFC 3339 in UTC.
    pub(crate) fn to_rfc3339(self) -> String {
        Timestamp::from_microsecond(self.0.saturating_add(POSTGRES_EPOCH_MICROS))
            .map_or_else(|_| "out of range".to_owned(), |t| t.to_string())
    }
}

/// A moment that someone asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The end of what is durable.
    Head,
    /// This LSN, rounded down.
    Lsn(Lsn),
    /// Before the first commit or abort later than this.
    Time(PostgresTime),
}

impl Moment {
    /// Reads the two texts of a request, of which at most one is given.
    ///
    /// # Errors
    /// When both are given, or one cannot be read.
    pub(crate) fn parse(lsn: Option<&str>, at: Option<&str>) -> Result<Moment, ServerError> {
        let wrong = |what: String| ServerError::new(Code::InvalidArgument, what);
        match (lsn, at) {
            (Some(_), Some(_)) => Err(wrong("both an LSN and a time were given: give one of them".to_owned())),
            (None, None) => Ok(Moment::Head),
            (Some(text), None) if text.eq_ignore_ascii_case("head") => Ok(Moment::Head),
            (Some(text), None) => text.parse().map(Moment::Lsn).map_err(|error| wrong(format!("{error}"))),
            (None, Some(text)) if text.eq_ignore_ascii_case("head") => Ok(Moment::Head),
            (None, Some(text)) => {
                // Postgres prints a space where RFC 3339 has a T, and may leave out the minutes of the offset.
                let time: Result<Timestamp, _> = text.trim().parse();
                let time = time.map_err(|_| {
                    let shown: String = text.chars().take(64).collect();
                    wrong(format!("'{shown}' is not a time: expected RFC 3339 with an offset, such as 2026-11-24T08:30:00Z"))
                })?;
                Ok(Moment::Time(PostgresTime(time.as_microsecond().saturating_sub(POSTGRES_EPOCH_MICROS))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        assert_eq!(Moment::parse(None, None).unwrap(), Moment::Head);
        assert_eq!(Moment::parse(Some("0/16B3748"), None).unwrap(), Moment::Lsn(Lsn(0x16B_3748)));
        let one_second = Moment::Time(PostgresTime(1_000_000));
        for text in ["2000-01-01T00:00:01Z", "2000-01-01 00:00:01+00", "2000-01-01T01:00:01+01:00", "2000-01-01 00:00:01.000000+00:00"] {
            assert_eq!(Moment::parse(None, Some(text)).unwrap(), one_second, "{text}");
        }
        for text in ["yesterday", "2000-01-01", "2000-01-01T00:00:01", ""] {
            assert_eq!(Moment::parse(None, Some(text)).unwrap_err().code, Code::InvalidArgument, "{text}");
        }
        assert_eq!(PostgresTime(1_000_000).to_rfc3339(), "2000-01-01T00:00:01Z");
    }
}
