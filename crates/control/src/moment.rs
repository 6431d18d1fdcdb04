//! Moments as people write them: an LSN, a time, or *head*; and times as the API shows them.

use varve_postgres::{Lsn, Timestamp};

use crate::error::Error;
use crate::ports::Moment;

/// RFC 3339 in UTC.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_microsecond(time.unix_micros()).map_or_else(|_| "out of range".to_owned(), |t| t.to_string())
}

/// A moment in words.
pub(crate) fn in_words(moment: Moment) -> String {
    match moment {
        Moment::Head => "head".to_owned(),
        Moment::Lsn(lsn) => lsn.to_string(),
        Moment::Time(at) => rfc3339(at),
    }
}

/// Reads an LSN.
pub(crate) fn lsn(name: &'static str, text: &str) -> Result<Lsn, Error> {
    text.parse().map_err(|error| Error::argument(name, error))
}

/// Reads the two texts of a request, of which at most one is given.
pub(crate) fn parse(lsn_text: Option<&str>, at: Option<&str>) -> Result<Moment, Error> {
    match (lsn_text, at) {
        (Some(_), Some(_)) => Err(Error::argument("at", "both an LSN and a time were given: give one of them")),
        (None, None) => Ok(Moment::Head),
        (Some(text), None) | (None, Some(text)) if text.eq_ignore_ascii_case("head") => Ok(Moment::Head),
        (Some(text), None) => lsn("lsn", text).map(Moment::Lsn),
        (None, Some(text)) => {
            // Postgres prints a space where RFC 3339 has a T, and may leave out the minutes of the offset.
            let time: Result<jiff::Timestamp, _> = text.trim().parse();
            let time = time.map_err(|_| {
                let shown: String = text.chars().take(64).collect();
                let expected = "expected RFC 3339 with an offset, such as 2026-11-24T08:30:00Z";
                Error::argument("at", format!("'{shown}' is not a time: {expected}"))
            })?;
            Ok(Moment::Time(Timestamp::from_unix_micros(time.as_microsecond())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        assert_eq!(parse(None, None).unwrap(), Moment::Head);
        assert_eq!(parse(Some("0/16B3748"), None).unwrap(), Moment::Lsn(Lsn(0x16B_3748)));
        let one_second = Moment::Time(Timestamp(1_000_000));
        for text in ["2000-01-01T00:00:01Z", "2000-01-01 00:00:01+00", "2000-01-01T01:00:01+01:00", "2000-01-01 00:00:01.000000+00:00"] {
            assert_eq!(parse(None, Some(text)).unwrap(), one_second, "{text}");
        }
        for text in ["yesterday", "2000-01-01", "2000-01-01T00:00:01", ""] {
            assert!(matches!(parse(None, Some(text)).unwrap_err(), Error::Argument { name: "at", .. }), "{text}");
        }
        assert_eq!(rfc3339(Timestamp(1_000_000)), "2000-01-01T00:00:01Z");
    }
}
