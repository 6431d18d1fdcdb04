//! Proof that restores work: a branch at a moment of a tenant's window is started, all that is in it is looked at, and
//! it is deleted.
//!
//! **Whose a branch is.** The entry of the tenant's log that makes the branch says that it is one of these
//! ([`TenantEdit::Verifying`]); the entry that deletes it has the result. So neither is ever there without the other.
//! What a server that was killed left is found by whoever owns the tenant next ([`schedule`]), and goes.
//!
//! **What a result says.** *Damaged* is said of data only. That no host took it, or that it broke off, is *failed*,
//! which says nothing of the data. Where a start came to nothing the tenant's part of the store is read, to tell the
//! two apart.
//!
//! [`run`] has the steps, [`schedule`] what happens by itself.

mod moments;
pub(crate) mod run;
mod schedule;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use varve_api::verification::{
    NewVerification, RestoreVerification, RunningVerification, Verification, VerificationOutcome, VerificationStep,
    VerifiedMoment as MomentAnswer,
};
use varve_postgres::Timestamp;
use varve_storage::ids::{TenantId, TenantName, TimelineId};
use varve_storage::tenant_log::{TenantState, VerifiedMoment, VerifiedOutcome, VerifiedRow};

use crate::Control;
use crate::call::Call;
use crate::error::Error;
use crate::moment;
use crate::ports::Pageserver;
use crate::registry::Turns;

use moments::Asked;
use schedule::Plans;

pub use schedule::VerifyConfig;

/// Tenants of which the last result is told in figures.
const TOLD_MAX: usize = 100_000;

/// How far a verification of this process is.
#[derive(Clone, Copy, Debug)]
struct Progress {
    step: VerificationStep,
    relations: u64,
    pages: u64,
}

/// A verification of this process.
#[derive(Debug)]
struct Running {
    /// The temporary branch's.
    timeline: TimelineId,
    progress: Mutex<Progress>,
}

impl Running {
    fn new(timeline: TimelineId) -> Running {
        Running { timeline, progress: Mutex::new(Progress { step: VerificationStep::Starting, relations: 0, pages: 0 }) }
    }

    fn goes_on_to(&self, step: VerificationStep) {
        self.progress.lock().step = step;
    }
}

/// What figures tell of a tenant.
#[derive(Clone, Debug)]
struct Told {
    name: TenantName,
    outcome: VerificationOutcome,
    /// Microseconds since 2000-01-01 UTC.
    ended: i64,
    took_ms: u64,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Verifications {
    running: Mutex<BTreeMap<TenantId, Arc<Running>>>,
    /// One decides about a tenant's at a time.
    turns: Turns<TenantId>,
    plans: Mutex<Option<Plans>>,
    told: Mutex<BTreeMap<TenantId, Told>>,
    /// How many came to what, since this process was started.
    counted: Mutex<BTreeMap<VerificationOutcome, u64>>,
}

impl Verifications {
    fn running(&self, id: TenantId) -> Option<Arc<Running>> {
        self.running.lock().get(&id).cloned()
    }

    /// The tenant is looked at again soon: something about it has changed.
    pub(crate) fn look_soon(&self, id: TenantId, now: Timestamp) {
        if let Some(plans) = &mut *self.plans.lock() {
            plans.changed(id, now.0);
        }
    }

    /// Nothing more is told of a tenant.
    fn forget(&self, id: TenantId) {
        self.told.lock().remove(&id);
    }

    /// What a tenant's log says is told.
    fn tell(&self, id: TenantId, name: &TenantName, row: &VerifiedRow) {
        let mut told = self.told.lock();
        if told.len() < TOLD_MAX || told.contains_key(&id) {
            let took_ms = row.branch_ms + row.start_ms.unwrap_or(0) + row.check_ms.unwrap_or(0);
            told.insert(id, Told { name: name.clone(), outcome: outcome(row.outcome), ended: row.ended, took_ms });
        }
    }

    /// Lines of the OpenMetrics text format.
    pub(crate) fn figures(&self, now: Timestamp) -> String {
        let told = self.told.lock();
        let mut text = "# TYPE varve_restore_verified_sound gauge\n".to_owned();
        for Told { name, outcome, .. } in told.values() {
            text += &format!("varve_restore_verified_sound{{tenant=\"{name}\"}} {}\n", u8::from(*outcome == VerificationOutcome::Sound));
        }
        text += "# TYPE varve_restore_verified_damaged gauge\n";
        for Told { name, outcome, .. } in told.values() {
            text +=
                &format!("varve_restore_verified_damaged{{tenant=\"{name}\"}} {}\n", u8::from(*outcome == VerificationOutcome::Damaged));
        }
        text += "# TYPE varve_restore_verified_age_seconds gauge\n# UNIT varve_restore_verified_age_seconds seconds\n";
        for Told { name, ended, .. } in told.values() {
            let age = now.0.saturating_sub(*ended).max(0) as f64 / 1e6;
            text += &format!("varve_restore_verified_age_seconds{{tenant=\"{name}\"}} {age:.3}\n");
        }
        text += "# TYPE varve_restore_verified_took_seconds gauge\n# UNIT varve_restore_verified_took_seconds seconds\n";
        for Told { name, took_ms, .. } in told.values() {
            text += &format!("varve_restore_verified_took_seconds{{tenant=\"{name}\"}} {:.3}\n", *took_ms as f64 / 1e3);
        }
        text += "# TYPE varve_restore_verifications counter\n";
        for (outcome, count) in &*self.counted.lock() {
            text += &format!("varve_restore_verifications_total{{outcome=\"{}\"}} {count}\n", outcome.name());
        }
        text + &format!(
            "# TYPE varve_restore_verifications_running gauge\nvarve_restore_verifications_running {}\n",
            self.running.lock().len()
        )
    }
}

fn outcome(outcome: VerifiedOutcome) -> VerificationOutcome {
    match outcome {
        VerifiedOutcome::Sound => VerificationOutcome::Sound,
        VerifiedOutcome::Damaged => VerificationOutcome::Damaged,
        VerifiedOutcome::Failed => VerificationOutcome::Failed,
    }
}

fn moment_answer(of: &VerifiedMoment) -> MomentAnswer {
    let VerifiedMoment { branch, timeline, lsn, time, seed } = of;
    MomentAnswer {
        branch: branch.to_string(),
        timeline_id: timeline.to_string(),
        lsn: lsn.to_string(),
        time: time.map(|time| moment::rfc3339(Timestamp(time))),
        seed: *seed,
    }
}

fn result_answer(row: &VerifiedRow) -> Verification {
    Verification {
        outcome: outcome(row.outcome),
        of: moment_answer(&row.began.of),
        begun_at: moment::rfc3339(Timestamp(row.began.begun)),
        ended_at: moment::rfc3339(Timestamp(row.ended)),
        branch_ms: row.branch_ms,
        start_ms: row.start_ms,
        check_ms: row.check_ms,
        databases: row.databases,
        relations: row.relations,
        pages: row.pages,
        problems: row.problems.clone(),
    }
}

impl<P: Pageserver> Control<P> {
    /// What the API says of a tenant's restores, from its log and what this process does.
    pub(crate) fn describe_verification(&self, state: &TenantState, id: TenantId) -> RestoreVerification {
        let running = state.verifying().map(|row| {
            let ours = self.verifications.running(id).filter(|running| running.timeline == row.timeline);
            let elsewhere = Progress { step: VerificationStep::Elsewhere, relations: 0, pages: 0 };
            let Progress { step, relations, pages } = ours.map_or(elsewhere, |running| *running.progress.lock());
            RunningVerification {
                of: moment_answer(&row.of),
                temporary: state.branch_of(row.timeline).map(ToString::to_string),
                begun_at: moment::rfc3339(Timestamp(row.begun)),
                step,
                relations,
                pages,
            }
        });
        RestoreVerification { every_seconds: state.verify_every(), running, last: state.verified().map(|row| result_answer(row)) }
    }

    /// What is known of restores of a tenant. Takes nothing over.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn restore_verification(&self, tenant: &str) -> Result<RestoreVerification, Error> {
        let id = self.find(tenant).await?;
        Ok(self.describe_verification(&*self.read(id).await?, id))
    }

    /// Begins to verify that a restore works, and answers once there is a branch for it. What cannot even be branched
    /// is a result, too, where that is about the data.
    ///
    /// # Errors
    /// [`Error::Verifies`] while one is under way; of arguments, and of moments that cannot be had.
    pub async fn verify_restore(&self, call: &Call, tenant: &str, new: &NewVerification) -> Result<RestoreVerification, Error> {
        let asked = Asked::parse(new)?;
        let id = self.find(tenant).await?;
        let log = self.own(id, "a restore of it is verified").await?;
        self.begin_verification(call, id, log, new.branch.as_deref().unwrap_or("main"), asked).await
    }
}
