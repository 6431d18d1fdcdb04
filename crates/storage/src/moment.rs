//! A moment of a timeline's history, as somebody asks for it, and the record boundary that it turns out to be.

use varve_postgres::{Lsn, Timestamp};

use crate::ids::TimelineId;

/// A moment of a timeline's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The end of what is durable.
    Head,
    /// This LSN, rounded down to a record's end.
    Lsn(Lsn),
    /// Before the first commit or abort later than this.
    Time(Timestamp),
}

/// A record boundary in one timeline's own history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The timeline in whose own history it lies: the one asked about, or an ancestor.
    pub timeline: TimelineId,
    /// Where.
    pub lsn: Lsn,
}
