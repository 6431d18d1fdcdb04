//! Proof that a restore works: a branch at a moment of the past is started, looked at, and deleted.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/tenants/{tenant}/restore-verification`. At most one of `lsn`, `at` and `seed`; without any of them
/// the moment is drawn by chance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVerification {
    /// The branch; `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The LSN, or `head`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// The time, as `recovery_target_time` means it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// The number to draw the moment from: the same one gives the same moment of the same window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// What is known of restores of a tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoreVerification {
    /// How often it is done, in seconds: 0 is never; null is as the tenant's server says.
    pub every_seconds: Option<u64>,
    /// What is under way.
    pub running: Option<RunningVerification>,
    /// What came of it last.
    pub last: Option<Verification>,
}

/// The moment that is, or was, verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerifiedMoment {
    /// The branch.
    pub branch: String,
    /// The timeline in whose own history it lies.
    pub timeline_id: String,
    /// The position.
    pub lsn: String,
    /// When the last transaction before it ended; null before any.
    pub time: Option<String>,
    /// The number that it was drawn from; null where somebody named it.
    pub seed: Option<u64>,
}

/// A verification that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunningVerification {
    /// What is verified.
    #[serde(flatten)]
    pub of: VerifiedMoment,
    /// The branch that was made for it, and is deleted afterwards; null once somebody else deleted it.
    pub temporary: Option<String>,
    /// When it began.
    pub begun_at: String,
    /// What it does.
    pub step: VerificationStep,
    /// Relations that were looked at so far.
    pub relations: u64,
    /// Their pages.
    pub pages: u64,
}

/// See [`RunningVerification`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerificationStep {
    /// The branch's compute starts.
    Starting,
    /// Its relations are looked at.
    Checking,
    /// The branch is deleted.
    Ending,
    /// Nobody here does anything about it: the server that did has ended, or another one does it.
    Elsewhere,
}

impl VerificationStep {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            VerificationStep::Starting => "its compute starts",
            VerificationStep::Checking => "its relations are checked",
            VerificationStep::Ending => "its branch is deleted",
            VerificationStep::Elsewhere => "not by this process",
        }
    }
}

/// What a verification came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// What it came to.
    pub outcome: VerificationOutcome,
    /// What was verified.
    #[serde(flatten)]
    pub of: VerifiedMoment,
    /// When it began.
    pub begun_at: String,
    /// When it ended.
    pub ended_at: String,
    /// Milliseconds until there was a branch.
    pub branch_ms: u64,
    /// Milliseconds from then on until Postgres answered; null if it did not.
    pub start_ms: Option<u64>,
    /// Milliseconds from then on until everything was looked at; null if it was not.
    pub check_ms: Option<u64>,
    /// Databases that were looked at.
    pub databases: u64,
    /// Relations that were looked at.
    pub relations: u64,
    /// Their pages, each of 8 KiB.
    pub pages: u64,
    /// What was found, or what was in the way.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// See [`Verification`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerificationOutcome {
    /// Postgres started, and everything that was looked at is sound.
    Sound,
    /// Something that is stored, or that Postgres made of it, is not sound.
    Damaged,
    /// It could not be looked at: that says nothing of the data.
    Failed,
}

impl VerificationOutcome {
    /// As it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            VerificationOutcome::Sound => "sound",
            VerificationOutcome::Damaged => "damaged",
            VerificationOutcome::Failed => "failed",
        }
    }
}

/// What a compute tells of the check that it was ordered: `POST /v1/computes/{id}/check`, again and again until it is
/// done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The incarnation that checks.
    pub incarnation: u64,
    /// Number of the order.
    pub check: u64,
    /// How often it has told: two that are equal otherwise say that it goes on.
    pub number: u64,
    /// Databases that were looked at.
    pub databases: u64,
    /// Relations that were looked at.
    pub relations: u64,
    /// Their pages.
    pub pages: u64,
    /// Whether that was all.
    pub done: bool,
    /// What was found so far, the first of it.
    #[serde(default)]
    pub problems: Vec<CheckProblem>,
}

/// Something that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckProblem {
    /// Whether it is about the data; else it is about what kept it from being looked at.
    pub is_damage: bool,
    /// Where, and what.
    pub words: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_stands_beside_what_came_of_it() {
        let of =
            VerifiedMoment { branch: "main".to_owned(), timeline_id: "1".to_owned(), lsn: "0/8".to_owned(), time: None, seed: Some(3) };
        let running =
            RunningVerification { of, temporary: None, begun_at: String::new(), step: VerificationStep::Checking, relations: 1, pages: 2 };
        let json = serde_json::to_value(&running).unwrap();
        assert_eq!((&json["branch"], &json["step"], &json["seed"]), (&"main".into(), &"checking".into(), &3.into()));
        assert_eq!(serde_json::from_value::<RunningVerification>(json).unwrap(), running);
        assert!(serde_json::from_str::<NewVerification>(r#"{"branch": "main", "what": 1}"#).is_err());
    }
}
