//! Edits of a tenant's log.
//!
//! Each is one row of an entry; the rows of one entry count together. Kinds are numbered in the order of this enum: new
//! ones come at its end, and none is ever changed.

use serde::{Deserialize, Serialize};
use varve_postgres::Lsn;

use crate::ids::{BranchName, EndpointId, Generation, HostId, SnapshotName, TenantId, TenantName, TimelineId, WalLogId, WriterEpoch};

/// What a tenant is from its first day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantFacts {
    /// Id.
    pub id: TenantId,
    /// Name.
    pub name: TenantName,
    /// Postgres major.
    pub pg_version: u32,
    /// Postgres's system identifier.
    pub system_identifier: u64,
    /// Microseconds since 2000-01-01 UTC.
    pub created: i64,
    /// The template that its first timeline begins with: name of its object folder.
    pub template: String,
    /// Password of the superuser `postgres`, for the connection string.
    pub password: String,
    /// Its SCRAM verifier.
    pub password_verifier: String,
}

/// Where a timeline comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// The timeline.
    pub timeline: TimelineId,
    /// The position at which this one leaves it.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn: Lsn,
}

/// What a timeline is from its first day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineFacts {
    /// Id.
    pub id: TimelineId,
    /// Where it comes from; none for a tenant's first, which begins with the template.
    pub ancestor: Option<Ancestor>,
    /// Postgres timeline: unique in the tenant, above its ancestor's.
    pub tli: u32,
    /// Where its own history begins.
    #[serde(with = "crate::row_fields::lsn")]
    pub start: Lsn,
    /// Microseconds since 2000-01-01 UTC.
    pub created: i64,
}

/// A file of the data directory that has no WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileContents {
    /// Small ones stand in the row.
    Inline(Vec<u8>),
    /// Others are objects of their own.
    Object {
        /// Name of the object.
        name: String,
        /// Bytes.
        len: u64,
    },
    /// The file was removed.
    Removed,
}

impl FileContents {
    /// Bytes of the file.
    #[allow(clippy::len_without_is_empty, reason = "an empty file is a file")]
    pub fn len(&self) -> u64 {
        match self {
            FileContents::Inline(bytes) => bytes.len() as u64,
            FileContents::Object { len, .. } => *len,
            FileContents::Removed => 0,
        }
    }
}

/// The moment of the past that a throw-away compute shows. It stays the same whatever becomes of the names of branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointMoment {
    /// The timeline.
    pub timeline: TimelineId,
    /// The position.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn: Lsn,
}

/// Where a branch's compute is reached, and whether one should run: all of an endpoint, so that a change writes it
/// anew.
///
/// An endpoint belongs to a branch's *name*. A restore moves the name to another timeline, and the endpoint with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// Id.
    pub id: EndpointId,
    /// The branch whose compute it is.
    pub branch: BranchName,
    /// What a throw-away compute shows; none for one that follows the branch.
    pub moment: Option<EndpointMoment>,
    /// Address that the compute listens on.
    pub listen: String,
    /// Port that it listens on; 0: none yet.
    pub port: u16,
    /// Whether a compute should run.
    pub wanted: bool,
    /// The host that runs it, or ran it last.
    pub host: Option<HostId>,
}

/// The least and the most of something that a compute may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeRange {
    /// The least: it has that whatever it does.
    pub min: u64,
    /// The most: it has that when it needs it.
    pub max: u64,
}

/// How much of a machine the computes of an endpoint may take. What is none is its host's own limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeRow {
    /// The endpoint.
    pub id: EndpointId,
    /// Thousandths of a processor.
    pub cpu_milli: Option<SizeRange>,
    /// Bytes of memory.
    pub memory_bytes: Option<SizeRange>,
}

/// How far back a tenant can go. What lies further back is collected, unless something else holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRow {
    /// Seconds; none: for ever.
    pub seconds: Option<u64>,
    /// Bytes of WAL of each branch; none: however many the time brings.
    pub wal_bytes: Option<u64>,
}

impl Default for HistoryRow {
    /// A week.
    fn default() -> HistoryRow {
        HistoryRow { seconds: Some(7 * 24 * 3600), wal_bytes: None }
    }
}

/// A moment that has a name, and stays readable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRow {
    /// Its name.
    pub name: SnapshotName,
    /// The branch that it was made of.
    pub branch: BranchName,
    /// The timeline in whose own history it lies.
    pub timeline: TimelineId,
    /// The position.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn: Lsn,
    /// Microseconds since 2000-01-01 UTC.
    pub created: i64,
    /// When it goes by itself, microseconds since 2000-01-01 UTC; none: never.
    pub expires: Option<i64>,
}

/// A position that somebody reads for a while, and has asked to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRow {
    /// The timeline in whose own history it lies.
    pub timeline: TimelineId,
    /// The position.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn: Lsn,
    /// When it ends, microseconds since 2000-01-01 UTC.
    pub expires: i64,
}

/// A branch that was made to see whether a restore works. It is ours, whatever its name is by now, and goes when that
/// is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyingRow {
    /// Its timeline.
    pub timeline: TimelineId,
    /// What is verified.
    pub of: VerifiedMoment,
    /// Microseconds since 2000-01-01 UTC.
    pub begun: i64,
    /// What [`crate::tenant_log::TenantState::history_mark`] said then.
    pub history: Option<u64>,
}

/// The moment to which a restore is verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedMoment {
    /// The branch.
    pub branch: BranchName,
    /// The timeline in whose own history it lies.
    pub timeline: TimelineId,
    /// The position.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn: Lsn,
    /// When the last transaction before it ended, microseconds since 2000-01-01 UTC; none before any.
    pub time: Option<i64>,
    /// The number from which it was drawn; none where somebody named it.
    pub seed: Option<u64>,
}

/// What a verification of a restore came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VerifiedOutcome {
    /// Postgres started, and everything that was looked at is sound.
    Sound,
    /// Something that is stored, or that Postgres made of it, is not sound.
    Damaged,
    /// It could not be looked at: that says nothing of the data.
    Failed,
}

/// The last verification of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedRow {
    /// The row that it began with.
    pub began: VerifyingRow,
    /// When it ended, microseconds since 2000-01-01 UTC.
    pub ended: i64,
    /// What it came to.
    pub outcome: VerifiedOutcome,
    /// What was found, or what was in the way, in words.
    pub problems: Vec<String>,
    /// Milliseconds until there was a branch.
    pub branch_ms: u64,
    /// Milliseconds from then on until Postgres answered; none if it did not.
    pub start_ms: Option<u64>,
    /// Milliseconds from then on until everything was looked at; none if it was not.
    pub check_ms: Option<u64>,
    /// Databases that were looked at.
    pub databases: u64,
    /// Relations.
    pub relations: u64,
    /// Their pages, each of 8 KiB.
    pub pages: u64,
}

/// How often it is verified that restores of a tenant work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyEveryRow {
    /// Seconds; 0: never; none: as its server says.
    pub seconds: Option<u64>,
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TenantEdit {
    /// The tenant; first of all edits.
    Tenant(TenantFacts),
    /// A new timeline.
    Timeline(TimelineFacts),
    /// A branch points to a timeline: a new one, or one that moves.
    Branch {
        /// Its name.
        name: BranchName,
        /// The timeline.
        timeline: TimelineId,
    },
    /// A name points to nothing any more.
    BranchRemoved {
        /// Its name.
        name: BranchName,
    },
    /// A timeline is gone; nothing refers to it.
    TimelineRemoved {
        /// Its id.
        timeline: TimelineId,
    },
    /// A writer epoch has begun: bytes of older ones at or beyond `lsn` are void.
    Epoch {
        /// The timeline.
        timeline: TimelineId,
        /// Its number.
        epoch: WriterEpoch,
        /// Where it begins.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
        /// The WAL log that its bytes go to.
        wal_log: WalLogId,
    },
    /// A writer epoch has ended with a clean shutdown, and all its WAL, which ends at `lsn`, arrived.
    EpochClosed {
        /// The timeline.
        timeline: TimelineId,
        /// Its number.
        epoch: WriterEpoch,
        /// The end of its WAL.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// A file without WAL has new contents from `lsn` on.
    File {
        /// The timeline.
        timeline: TimelineId,
        /// Path relative to the data directory.
        path: String,
        /// One past the head of the timeline when it was written: a moment up to head does not have it.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
        /// What it holds.
        contents: FileContents,
    },
    /// The newest writer epoch's bytes that the store does not have are now in another WAL log: the one that they were
    /// in is lost, and its compute has sent them again.
    EpochMoved {
        /// The timeline.
        timeline: TimelineId,
        /// Its number.
        epoch: WriterEpoch,
        /// The WAL log.
        wal_log: WalLogId,
    },
    /// The tenant is deleted; last of all edits.
    TenantRemoved,
    /// Somebody did something.
    Audit(AuditRow),
    /// A mutation that carried this key was done, and answered this.
    Idempotency {
        /// The key.
        key: String,
        /// Its answer, JSON.
        answer: String,
    },
    /// The highest TLI that was ever given, though its timeline may be gone.
    TliGiven {
        /// The TLI.
        tli: u32,
    },
    /// An endpoint, new or changed.
    Endpoint(EndpointRow),
    /// An endpoint is gone.
    EndpointRemoved {
        /// Its id.
        id: EndpointId,
    },
    /// What was known of a timeline when it was last flushed or closed. A hint for lists: never a source of truth.
    Figures {
        /// The timeline.
        timeline: TimelineId,
        /// The end of its history then.
        #[serde(with = "crate::row_fields::lsn")]
        head: Lsn,
        /// Bytes of all its relations then.
        size_bytes: u64,
    },
    /// Who took the tenant over, so that who lost it can say who has it.
    Owner {
        /// By which generation.
        generation: Generation,
        /// Name of the server.
        server: String,
        /// Where it is reached.
        url: String,
    },
    /// A timeline that had writers was removed earlier: what a WAL log holds of it is not needed. Stands in snapshots,
    /// where [`TenantEdit::TimelineRemoved`] does not.
    TimelineGone {
        /// Its id.
        timeline: TimelineId,
    },
    /// The superuser has another password than the tenant was created with.
    Password(PasswordRow),
    /// An endpoint has another size. It goes with its endpoint.
    Size(SizeRow),
    /// How far back the tenant can go from now on.
    History(HistoryRow),
    /// What lies before a position of a timeline's own history need not be readable any more, but where something
    /// holds it. It only grows.
    Cutoff {
        /// The timeline.
        timeline: TimelineId,
        /// The position.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// A moment gets a name.
    Snapshot(SnapshotRow),
    /// A snapshot is gone.
    SnapshotRemoved {
        /// Its name.
        name: SnapshotName,
    },
    /// A position is kept for a while, or longer than it was.
    Lease(LeaseRow),
    /// A lease has ended.
    LeaseRemoved {
        /// The timeline.
        timeline: TimelineId,
        /// The position.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// The compute of the newest writer epoch reads its timeline at positions that move on, none of which is before
    /// this.
    EpochBase {
        /// The timeline.
        timeline: TimelineId,
        /// The epoch.
        epoch: WriterEpoch,
        /// The position.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// A version of a file without WAL is shown at no moment that is retained.
    FileForgotten {
        /// The timeline.
        timeline: TimelineId,
        /// Path relative to the data directory.
        path: String,
        /// From where on it counted.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// It is being verified that a restore works.
    Verifying(VerifyingRow),
    /// It was verified. Nothing is being verified any more.
    Verified(Box<VerifiedRow>),
    /// How often that is to be done.
    VerifyEvery(VerifyEveryRow),
}

/// A password of the superuser `postgres`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PasswordRow {
    /// Which: 1 is the one that the tenant was created with, each further one is one more. A history that has one notes
    /// its number, so that each is given to it once.
    pub number: u32,
    /// Itself, for the connection string.
    pub password: String,
    /// Its SCRAM verifier.
    pub verifier: String,
}

impl TenantEdit {
    /// How many kinds there are. A row of a kind at or above this was written by a newer release.
    pub const KINDS: u32 = 31;
}

/// Who did what, when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// Microseconds since 2000-01-01 UTC.
    pub time: i64,
    /// What was done, in words.
    pub action: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_kind_is_counted() {
        // Postcard writes a variant's number first. Whoever adds a kind after this one must count it, and name it here.
        let last = TenantEdit::VerifyEvery(VerifyEveryRow { seconds: None });
        let row = postcard::to_stdvec(&last).unwrap();
        assert_eq!(u32::from(row[0]) + 1, TenantEdit::KINDS);
    }
}
