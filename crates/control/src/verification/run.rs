//! The steps of a verification: a branch, its compute, the check, the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use varve_api::Code;
use varve_api::admin::{EventKind, NewCompute};
use varve_api::host::Desired;
use varve_api::size::{Between, Size};
use varve_api::verification::{CheckReport, RestoreVerification, VerificationStep};
use varve_postgres::Timestamp;
use varve_storage::ids::{BranchName, TenantId, TimelineId};
use varve_storage::tenant_log::{
    Ancestor, TenantEdit, TenantLog, TenantState, TimelineFacts, VerifiedMoment, VerifiedOutcome, VerifiedRow, VerifyingRow,
    removed_timelines,
};

use super::moments::Asked;
use super::{Running, outcome};
use crate::Control;
use crate::call::Call;
use crate::error::Error;
use crate::logs::{Plan, branch, facts};
use crate::moment;
use crate::ports::Pageserver;
use crate::registry::{Entry, Phase, Status};
use crate::sizes::size_of;

/// Whom the audit log names.
const ACTOR: &str = "verification of restores";
/// How long a compute that checks may say nothing. It tells each few seconds that it goes on.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// How long a check may take in all.
const CHECK_MAX: Duration = Duration::from_secs(24 * 3600);
/// How often Postgres may end by itself during a check, which then begins anew.
const RESTARTS_MAX: u64 = 2;
/// Problems that a result keeps.
const PROBLEMS_MAX: usize = 50;
/// Characters of one: it may quote what a tenant's server says.
const WORDS_MAX: usize = 600;
/// How long the host of what a killed server left may take to say hello, before its branch is deleted without it.
const HOST_BACK_MAX: Duration = Duration::from_secs(60);
/// How often that is looked at.
const HOST_BACK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the end is tried while the store is away, and the pause after the first time, which doubles.
const END_TRIES: u32 = 8;
const END_PAUSE: Duration = Duration::from_millis(500);
/// What the compute may take: a check is in no hurry, and others are.
const CPU_MILLI: Between = Between { min: 100, max: 1000 };
const MEMORY_BYTES: Between = Between { min: 256 << 20, max: 1 << 30 };
/// Settings of the compute, over those of the branch. It must not take part in what the branch's own compute does: a
/// subscription would take from the publisher what that one waits for, and jobs would run twice. And it has little
/// memory.
const SETTINGS: [(&str, &str); 8] = [
    ("max_logical_replication_workers", "0"),
    ("max_worker_processes", "0"),
    ("cron.launch_active_jobs", "off"),
    ("autovacuum", "off"),
    ("shared_buffers", "64MB"),
    ("maintenance_work_mem", "64MB"),
    ("work_mem", "16MB"),
    ("jit", "off"),
];

/// The settings with which the compute of a temporary branch starts, whoever starts it.
pub(crate) fn settings() -> BTreeMap<String, String> {
    SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// What a verification has come to, so far.
#[derive(Default)]
struct Findings {
    is_damaged: bool,
    problems: Vec<String>,
    start_ms: Option<u64>,
    check_ms: Option<u64>,
    checked: CheckReport,
}

impl Findings {
    fn add(&mut self, is_damage: bool, words: &str) {
        self.is_damaged |= is_damage;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(words.chars().take(WORDS_MAX).collect());
        }
    }

    fn row(self, began: VerifyingRow, branch_ms: u64, ended: Timestamp) -> VerifiedRow {
        let outcome = match (self.is_damaged, self.problems.is_empty()) {
            (true, _) => VerifiedOutcome::Damaged,
            (false, false) => VerifiedOutcome::Failed,
            (false, true) => VerifiedOutcome::Sound,
        };
        let CheckReport { databases, relations, pages, .. } = self.checked;
        let Findings { problems, start_ms, check_ms, .. } = self;
        VerifiedRow { began, ended: ended.0, outcome, problems, branch_ms, start_ms, check_ms, databases, relations, pages }
    }
}

/// Whether an error is about what is stored.
fn is_about_data(error: &Error) -> bool {
    match error {
        Error::Refused(refusal) => refusal.code == Code::Internal,
        Error::Log(_) | Error::Store(_) | Error::Tenant(_) => error.code() == Code::Internal,
        _ => false,
    }
}

/// Whether a check cannot go on.
fn is_over(status: &Status, first: u64) -> bool {
    status.desired != Desired::Run || matches!(status.phase, Phase::Failed(_)) || status.incarnation > first + RESTARTS_MAX
}

fn call() -> Call {
    Call { actor: ACTOR.to_owned(), ..Call::default() }
}

impl<P: Pageserver> Control<P> {
    /// Makes the branch, and has the rest done by a task.
    pub(super) async fn begin_verification(
        &self,
        call: &Call,
        id: TenantId,
        log: TenantLog,
        branch_text: &str,
        asked: Asked,
    ) -> Result<RestoreVerification, Error> {
        let turn = self.verifications.turns.take(id).await;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        if let Some(left) = log.state().verifying().cloned() {
            if self.verifications.running(id).is_some() {
                return Err(Error::Verifies(facts(&log.state(), id)?.name.to_string()));
            }
            self.abandon(id, &log, &left).await?;
        }
        let (of, timeline) = branch(&log.state(), branch_text)?;
        let begun = self.environment.now();
        let history = log.state().history_mark();
        let at = match self.moment_to_verify(id, &log, (&of, timeline), asked).await {
            Ok(at) => at,
            Err(error) if is_about_data(&error) => {
                let lsn = log.state().earliest(timeline)?;
                let at = VerifiedMoment { branch: of, timeline, lsn, time: None, seed: None };
                return self.cannot_be_branched(id, &log, VerifyingRow { timeline, of: at, begun: begun.0, history }, &error).await;
            }
            Err(error) => return Err(error),
        };
        let row = VerifyingRow { timeline: TimelineId(self.environment.random()?), of: at, begun: begun.0, history };
        let running = Arc::new(Running::new(row.timeline));
        self.verifications.running.lock().insert(id, running.clone());
        let answer = match self.make_branch(call, id, &log, &row).await {
            Ok(answer) => answer,
            Err(error) => {
                self.verifications.running.lock().remove(&id);
                return Err(error);
            }
        };
        let branch_ms = self.millis_since(begun);
        drop(turn);
        let Some(me) = self.me.upgrade() else { return Err(Error::Stopping) };
        self.environment.spawn(async move {
            let findings = me.look_at(id, &log, &row, &running).await;
            running.goes_on_to(VerificationStep::Ending);
            let result = findings.row(row, branch_ms, me.environment.now());
            let ended = me.end_verification(id, &log, &result).await;
            me.verifications.running.lock().remove(&id);
            if let Err(error) = ended {
                let tenant = log.state().facts().map(|facts| facts.name.to_string()).unwrap_or_default();
                tracing::error!(tenant, %error, "a branch that verified a restore is not deleted yet; that is tried again");
            }
            me.verifications.look_soon(id, me.environment.now());
        });
        Ok(answer)
    }

    /// One commit: the branch, and whose it is.
    async fn make_branch(&self, call: &Call, id: TenantId, log: &TenantLog, row: &VerifyingRow) -> Result<RestoreVerification, Error> {
        let VerifiedMoment { timeline: ancestor, lsn, .. } = row.of;
        let facts = TimelineFacts {
            id: row.timeline,
            ancestor: Some(Ancestor { timeline: ancestor, lsn }),
            tli: 0,
            start: lsn,
            created: row.begun,
        };
        let stamp: String = moment::rfc3339(Timestamp(row.begun)).chars().filter(char::is_ascii_digit).take(14).collect();
        let name: BranchName =
            format!("verify_restore_{stamp}_{:02x}", row.timeline.0[0]).parse().map_err(|error| Error::argument("name", error))?;
        let made = self.commit(log, call, |state| {
            let mut edits = state.create_branch(&name, &facts)?;
            edits.push(TenantEdit::Verifying(row.clone()));
            let action = format!("made branch {name} of branch {} at {lsn} to verify that a restore works", row.of.branch);
            Ok(Plan { edits, action, answer: |after: &TenantState| Ok(self.describe_verification(after, id)) })
        });
        let made = made.await?;
        tracing::info!(tenant = %id, branch = %row.of.branch, %lsn, temporary = %name, "whether a restore works is verified");
        Ok(made)
    }

    /// Not even the moment could be read: that is the result.
    async fn cannot_be_branched(
        &self,
        id: TenantId,
        log: &TenantLog,
        began: VerifyingRow,
        error: &Error,
    ) -> Result<RestoreVerification, Error> {
        let mut findings = Findings::default();
        findings.add(true, &error.to_string());
        self.name_damage(id, &mut findings).await;
        let result = findings.row(began, 0, self.environment.now());
        self.end_verification(id, log, &result).await?;
        Ok(self.describe_verification(&log.state(), id))
    }

    /// Starts the branch's compute and has it look at everything.
    async fn look_at(&self, id: TenantId, log: &TenantLog, row: &VerifyingRow, running: &Running) -> Findings {
        let mut findings = Findings::default();
        let begun = self.environment.now();
        let started = match self.start_to_verify(id, log, row).await {
            Ok(entry) => entry,
            Err(error) => {
                findings.add(is_about_data(&error), &error.to_string());
                // Postgres may have ended over a page that it could not read.
                if is_about_data(&error) || matches!(error, Error::NotStarted { .. }) {
                    self.name_damage(id, &mut findings).await;
                }
                return findings;
            }
        };
        findings.start_ms = Some(self.millis_since(begun));
        running.goes_on_to(VerificationStep::Checking);
        let begun = self.environment.now();
        let was_done = self.wait_checked(&started, running, &mut findings).await;
        if was_done {
            findings.check_ms = Some(self.millis_since(begun));
        }
        // Where its Postgres failed, that may be over a page that it could not read.
        if findings.is_damaged || !was_done && matches!(started.status().phase, Phase::Failed(_)) {
            self.name_damage(id, &mut findings).await;
        }
        findings
    }

    async fn start_to_verify(&self, id: TenantId, log: &TenantLog, row: &VerifyingRow) -> Result<Arc<Entry>, Error> {
        let state = log.state();
        let name = state.branch_of(row.timeline).ok_or_else(|| Error::Moved(row.of.branch.to_string()))?;
        let host = self.hosts.choose(&self.environment, facts(&state, id)?.pg_version, None, &Size::default()).await?;
        let within = |wanted: Between, most: u64| Between { min: wanted.min.min(most), max: wanted.max.min(most) };
        let size = host.hello().capacity.map_or_else(Size::default, |capacity| Size {
            cpu_milli: Some(within(CPU_MILLI, capacity.cpu_milli)),
            memory_bytes: Some(within(MEMORY_BYTES, capacity.memory_bytes)),
        });
        let settings = settings();
        let new = NewCompute { settings, size, ..NewCompute::default() };
        let started = self.ensure_running(&call(), &id.to_string(), name.as_str(), &new).await?;
        self.entry(&started.compute.id)
    }

    /// Orders the check, and waits until it is done; false when it was not.
    async fn wait_checked(&self, entry: &Arc<Entry>, running: &Running, findings: &mut Findings) -> bool {
        let begun = self.environment.now();
        let number = begun.unix_micros().unsigned_abs();
        let mut first = 0;
        entry.update(|status| {
            (status.check, status.checked) = (Some(number), None);
            first = status.incarnation;
        });
        let mut seen: Option<CheckReport> = None;
        loop {
            let is_news = |status: &Status| status.checked != seen || is_over(status, first);
            let Some(status) = entry.wait(&self.environment, SILENCE_MAX, is_news).await else {
                findings.add(false, &format!("its compute said nothing of its check for {} s", SILENCE_MAX.as_secs()));
                return false;
            };
            if let Some(report) = &status.checked {
                let mut progress = running.progress.lock();
                (progress.relations, progress.pages) = (report.relations, report.pages);
                findings.checked = report.clone();
            }
            if let Some(report) = status.checked.as_ref().filter(|report| report.done) {
                report.problems.iter().for_each(|problem| findings.add(problem.is_damage, &problem.words));
                return true;
            }
            if is_over(&status, first) {
                let told = findings.checked.problems.clone();
                told.iter().for_each(|problem| findings.add(problem.is_damage, &problem.words));
                let words = match &status.phase {
                    Phase::Failed(reason) => format!("its compute failed: {reason}"),
                    _ if status.desired != Desired::Run => "its branch was deleted, or its compute stopped, before it was done".to_owned(),
                    _ => "its Postgres ended by itself, again and again; see the log of its host".to_owned(),
                };
                findings.add(false, &words);
                return false;
            }
            if self.millis_since(begun) > CHECK_MAX.as_millis() as u64 {
                findings.add(false, &format!("it was not done within {} h", CHECK_MAX.as_secs() / 3600));
                return false;
            }
            seen = status.checked;
        }
    }

    /// Reads the tenant's part of the store, and names what is damaged there.
    async fn name_damage(&self, id: TenantId, findings: &mut Findings) {
        match self.pageserver.scrub(id).await {
            Ok(found) => found.iter().for_each(|words| findings.add(true, words)),
            Err(error) => tracing::warn!(tenant = %id, %error, "its part of the store was not read"),
        }
    }

    /// Deletes the branch and writes the result, in one commit.
    async fn end_verification(&self, id: TenantId, log: &TenantLog, result: &VerifiedRow) -> Result<(), Error> {
        let timeline = result.began.timeline;
        let mut pause = END_PAUSE;
        for number in 1.. {
            match self.try_to_end(id, log, timeline, result).await {
                Err(error) if error.is_transient() && number < END_TRIES => {
                    tracing::warn!(tenant = %id, %error, "the end of a verification is tried again");
                    self.environment.sleep(pause).await;
                    pause *= 2;
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        self.tell_result(id, log, result);
        Ok(())
    }

    async fn try_to_end(&self, id: TenantId, log: &TenantLog, timeline: TimelineId, result: &VerifiedRow) -> Result<(), Error> {
        let state = log.state();
        let name = state.branch_of(timeline).filter(|_| state.is_verifying(timeline));
        let computes = || name.map(|name| self.computes.of_branch(id, name)).unwrap_or_default();
        // Its compute first: whoever sees a result finds nothing of it any more.
        self.end_for_good(computes()).await;
        let mut gone = Vec::new();
        let action = format!("verified a restore of branch {}: {}", result.began.of.branch, outcome(result.outcome).name());
        let audit = self.audit(&call(), &action);
        let ended = self.commit_edits(log, |state| {
            if state.verifying().is_some_and(|row| row.timeline != timeline) {
                return Ok(Vec::new()); // another one is under way by now
            }
            let name = state.branch_of(timeline).filter(|_| state.is_verifying(timeline));
            let mut edits = name.map_or_else(|| Ok(Vec::new()), |name| state.delete_branch(name.as_str()))?;
            gone = removed_timelines(&edits).collect();
            edits.push(TenantEdit::Verified(Box::new(result.clone())));
            edits.push(audit);
            Ok(edits)
        });
        ended.await?;
        // One that its host told of meanwhile.
        self.end_for_good(computes()).await;
        if !gone.is_empty() {
            self.pageserver.remove_timelines(id, gone).await;
        }
        Ok(())
    }

    /// Says what came of it: in the log, in figures, and to whoever looks at the branch's events.
    fn tell_result(&self, id: TenantId, log: &TenantLog, result: &VerifiedRow) {
        let VerifiedRow { began, problems, relations, pages, .. } = result;
        let VerifiedMoment { branch, lsn, .. } = &began.of;
        *self.verifications.counted.lock().entry(outcome(result.outcome)).or_default() += 1;
        let state = log.state();
        let Some(facts) = state.facts() else { return };
        self.verifications.tell(id, &facts.name, result);
        let (tenant, words) = (&facts.name, problems.join("; "));
        match result.outcome {
            VerifiedOutcome::Sound => tracing::info!(%tenant, %branch, %lsn, relations, pages, "a restore works"),
            VerifiedOutcome::Damaged => {
                tracing::error!(
                    %tenant, %branch, %lsn, problems = words,
                    "a restore does not give back what was stored: restore the objects that 'varve scrub' names from the bucket's versions"
                );
            }
            VerifiedOutcome::Failed => {
                tracing::error!(%tenant, %branch, %lsn, problems = words, "whether a restore works could not be found out; the data is not in question");
            }
        }
        let endpoint = state.endpoints_of(branch).find(|row| row.moment.is_none());
        if let (Some(endpoint), true) = (endpoint, result.outcome != VerifiedOutcome::Sound) {
            let words = format!("restore to {lsn} {}: {words}", outcome(result.outcome).name());
            self.events.add(endpoint.id, self.environment.now(), EventKind::RestoreNotVerified, &words);
        }
    }

    /// Takes away what a server that ended left of a verification.
    pub(super) async fn abandon(&self, id: TenantId, log: &TenantLog, left: &VerifyingRow) -> Result<(), Error> {
        let state = log.state();
        if let Some(name) = state.branch_of(left.timeline) {
            // Its host is told to take its folder away, so it had better be there.
            let rows: Vec<_> = state.endpoints_of(name).cloned().collect();
            let are_here = || {
                let is_here = |host| self.hosts.get(host).is_some_and(|host| host.is_here(self.environment.now()));
                rows.iter().filter_map(|row| row.host).all(is_here)
            };
            let hosts = async {
                while !are_here() {
                    self.environment.sleep(HOST_BACK_INTERVAL).await;
                }
            };
            self.environment.within(HOST_BACK_MAX, hosts).await;
            for row in &rows {
                let name = facts(&state, id)?.name.clone();
                self.computes.note(Entry::new(id, name, row, size_of(&state, row.id), Phase::Unknown));
            }
        }
        let mut findings = Findings::default();
        findings.add(false, "its server ended before it was done; nothing is known of the data from that");
        let result = findings.row(left.clone(), 0, self.environment.now());
        self.end_verification(id, log, &result).await
    }

    /// A compute tells of its check.
    ///
    /// # Errors
    /// [`Error::NotYetKnown`], [`Error::Argument`].
    pub fn note_check(&self, id: &str, report: CheckReport) -> Result<(), Error> {
        let entry = self.process(id)?;
        if report.problems.len() > PROBLEMS_MAX {
            return Err(Error::argument("problems", format!("at most {PROBLEMS_MAX}")));
        }
        entry.update(|status| {
            if status.incarnation == report.incarnation && status.check == Some(report.check) {
                status.checked = Some(report);
            }
        });
        Ok(())
    }

    fn millis_since(&self, begun: Timestamp) -> u64 {
        u64::try_from(self.environment.now().0.saturating_sub(begun.0) / 1000).unwrap_or(0)
    }
}
