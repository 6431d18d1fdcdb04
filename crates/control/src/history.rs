//! How far back a tenant can go, and the snapshots that stay beyond that.

use varve_api::admin::{Deleted, Tenant};
use varve_api::history::{History, NewSnapshot, Snapshot, TenantChange};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::{SnapshotName, TenantId, TimelineId};
use varve_storage::tenant_log::{HistoryRow, SnapshotRow, TenantEdit, TenantError, TenantState, VerifyEveryRow, removed_timelines};

use crate::call::Call;
use crate::error::{Error, quoted};
use crate::logs::{Plan, branch, facts};
use crate::ports::{Moment, Pageserver, Resolved};
use crate::{Control, moment};

/// A century: more is "for ever".
const SECONDS_MAX: u64 = 100 * 366 * 24 * 3600;
/// Least bytes of WAL that a branch can be given to go back: with less there would be hardly a moment to go back to.
const WAL_BYTES_MIN: u64 = 1 << 20;

/// How far back a tenant can go, as the API says it.
pub(crate) fn history(state: &TenantState) -> History {
    let HistoryRow { seconds, wal_bytes } = state.history();
    History { seconds, wal_bytes }
}

/// The moment that a request names: a snapshot, or what its two texts say.
pub(crate) enum Wanted {
    /// A snapshot's.
    Snapshot(Resolved),
    /// To be found on a branch.
    OnBranch(Moment),
}

impl Wanted {
    /// Reads what a request says, of which one at most is given.
    pub(crate) fn parse(state: &TenantState, snapshot: Option<&str>, lsn: Option<&str>, at: Option<&str>) -> Result<Wanted, Error> {
        let Some(name) = snapshot else { return Ok(Wanted::OnBranch(moment::parse(lsn, at)?)) };
        if lsn.is_some() || at.is_some() {
            return Err(Error::argument("snapshot", "both a snapshot and a moment were given: give one of them"));
        }
        let row = state.snapshot(name)?;
        Ok(Wanted::Snapshot(Resolved { timeline: row.timeline, lsn: row.lsn }))
    }
}

/// The name of a new snapshot.
fn new_snapshot_name(text: &str) -> Result<SnapshotName, Error> {
    text.parse().map_err(|error| Error::argument("name", error))
}

fn describe(state: &TenantState, id: TenantId, row: &SnapshotRow) -> Result<Snapshot, Error> {
    Ok(Snapshot {
        tenant: facts(state, id)?.name.to_string(),
        name: row.name.to_string(),
        branch: row.branch.to_string(),
        timeline_id: row.timeline.to_string(),
        lsn: row.lsn.to_string(),
        created_at: moment::rfc3339(Timestamp(row.created)),
        expires_at: row.expires.map(|expires| moment::rfc3339(Timestamp(expires))),
    })
}

impl<P: Pageserver> Control<P> {
    /// Changes how far back a tenant can go, and how often it is verified that restores of it work. A longer window
    /// grows from now on: what is collected does not come back.
    ///
    /// # Errors
    /// [`Error::Argument`] of a window that cannot be.
    pub async fn change_tenant(&self, call: &Call, tenant: &str, change: &TenantChange) -> Result<Tenant, Error> {
        let TenantChange { history_seconds, history_wal_bytes, verify_restore_seconds } = *change;
        let changes_history = history_seconds.is_some() || history_wal_bytes.is_some();
        if !changes_history && verify_restore_seconds.is_none() {
            let known = "history_seconds, history_wal_bytes or verify_restore_seconds";
            return Err(Error::argument("history_seconds", format!("say what is to change: {known}")));
        }
        if let Some(Some(seconds)) = verify_restore_seconds
            && seconds > SECONDS_MAX
        {
            let expected = format!("expected up to {SECONDS_MAX} seconds, 0 for never, or null for what the server says");
            return Err(Error::argument("verify_restore_seconds", expected));
        }
        if let Some(Some(seconds)) = history_seconds
            && (seconds == 0 || seconds > SECONDS_MAX)
        {
            return Err(Error::argument("history_seconds", format!("expected 1 to {SECONDS_MAX} seconds, or null for ever")));
        }
        if let Some(Some(bytes)) = history_wal_bytes
            && bytes < WAL_BYTES_MIN
        {
            return Err(Error::argument("history_wal_bytes", format!("expected {WAL_BYTES_MIN} bytes or more, or null for any number")));
        }
        let id = self.find(tenant).await?;
        let log = self.own(id, "what it is to keep is changed").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let plan = |state: &TenantState| {
            let before = state.history();
            let row =
                HistoryRow { seconds: history_seconds.unwrap_or(before.seconds), wal_bytes: history_wal_bytes.unwrap_or(before.wal_bytes) };
            let text = |limit: Option<u64>, unit: &str| limit.map_or_else(|| "no limit".to_owned(), |limit| format!("{limit} {unit}"));
            let (mut edits, mut actions) = (Vec::new(), Vec::new());
            if changes_history {
                actions.push(format!("set history to {}, {}", text(row.seconds, "seconds"), text(row.wal_bytes, "bytes of WAL")));
                edits.push(TenantEdit::History(row));
            }
            if let Some(seconds) = verify_restore_seconds {
                let every = seconds.map_or_else(|| "the server's interval".to_owned(), |seconds| format!("{seconds} seconds"));
                actions.push(format!("set verification of restores to {every}"));
                edits.push(TenantEdit::VerifyEvery(VerifyEveryRow { seconds }));
            }
            let answer = |after: &TenantState| self.describe_tenant(after, id);
            Ok(Plan { edits, action: actions.join("; "), answer })
        };
        let changed = self.commit(&log, call, plan).await?;
        self.verifications.look_soon(id, self.environment.now());
        Ok(changed)
    }

    /// Lists a tenant's snapshots, by name. Takes nothing over.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list_snapshots(&self, tenant: &str) -> Result<Vec<Snapshot>, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        state.snapshots().map(|row| describe(&state, id, row)).collect()
    }

    /// Shows a snapshot. Takes nothing over.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn show_snapshot(&self, tenant: &str, name: &str) -> Result<Snapshot, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        describe(&state, id, state.snapshot(name)?)
    }

    /// Gives a moment of a branch a name; it stays readable until the snapshot is deleted or expires, also when the
    /// branch is deleted.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_snapshot(&self, call: &Call, tenant: &str, new: &NewSnapshot) -> Result<Snapshot, Error> {
        let name = new_snapshot_name(&new.name)?;
        let asked = moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        if new.keep_seconds.is_some_and(|seconds| seconds == 0 || seconds > SECONDS_MAX) {
            return Err(Error::argument("keep_seconds", format!("expected 1 to {SECONDS_MAX} seconds; leave it out for ever")));
        }
        let id = self.find(tenant).await?;
        let log = self.own(id, "a snapshot is made").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let (of, timeline) = branch(&log.state(), new.branch.as_deref().unwrap_or("main"))?;
        if log.state().snapshot(name.as_str()).is_ok() {
            return Err(TenantError::SnapshotExists(name).into());
        }
        let at = self.resolve(id, timeline, asked).await?;
        let created = self.environment.now().0;
        let expires = new.keep_seconds.map(|seconds| created.saturating_add((seconds as i64).saturating_mul(1_000_000)));
        let row = SnapshotRow { name: name.clone(), branch: of.clone(), timeline: at.timeline, lsn: at.lsn, created, expires };
        let made = self.commit(&log, call, |state| {
            let answer = {
                let row = row.clone();
                move |after: &TenantState| describe(after, id, &row)
            };
            let action = format!("made snapshot {name} of branch {of} at {}", row.lsn);
            Ok(Plan { edits: state.add_snapshot(row)?, action, answer })
        });
        let made = made.await?;
        tracing::info!(tenant = %id, snapshot = %name, lsn = %at.lsn, "snapshot made");
        Ok(made)
    }

    /// Deletes a snapshot: what only it kept is collected.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete_snapshot(&self, call: &Call, tenant: &str, name: &str) -> Result<Deleted, Error> {
        let id = self.find(tenant).await?;
        let log = self.own(id, "a snapshot is deleted").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let name = log.state().snapshot(name)?.name.clone();
        let tenant_name = facts(&log.state(), id)?.name.clone();
        let mut gone: Vec<TimelineId> = Vec::new();
        let deleted = self.commit(&log, call, |state| {
            let edits = state.remove_snapshot(&name)?;
            gone = removed_timelines(&edits).collect();
            let answer = Deleted { deleted: format!("{tenant_name}/{name}") };
            Ok(Plan { edits, action: format!("deleted snapshot {name}"), answer: move |_: &TenantState| Ok(answer) })
        });
        let deleted = deleted.await?;
        if !gone.is_empty() {
            self.pageserver.remove_timelines(id, gone).await;
        }
        Ok(deleted)
    }

    /// Collects at once what a tenant need not keep any more, and waits for it. It happens by itself, too, while a
    /// tenant is used.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn collect_tenant(&self, tenant: &str) -> Result<Tenant, Error> {
        let id = self.find(tenant).await?;
        self.own(id, "its history is collected").await?;
        self.pageserver.collect(id).await?;
        self.describe_tenant(&*self.read(id).await?, id)
    }

    /// That a moment is retained; else who asks is told from when on there is something.
    pub(crate) async fn check_retained(&self, state: &TenantState, tenant: TenantId, timeline: TimelineId, at: Lsn) -> Result<(), Error> {
        match state.check_retained(timeline, at) {
            Err(TenantError::Collected { .. }) => Err(self.not_kept(state, tenant, timeline, &at.to_string()).await),
            other => Ok(other?),
        }
    }

    /// The error that `what` is not kept any more, with what is.
    pub(crate) async fn not_kept(&self, state: &TenantState, tenant: TenantId, timeline: TimelineId, what: &str) -> Error {
        let earliest = match state.earliest(timeline) {
            Ok(earliest) => earliest,
            Err(error) => return error.into(),
        };
        let owner = state.owner_of(timeline, earliest).unwrap_or(timeline);
        let time = self.pageserver.time_at(tenant, Resolved { timeline: owner, lsn: earliest }).await.ok().flatten();
        let time = time.map_or_else(String::new, |time| format!(", which is {}", moment::rfc3339(time)));
        let of = state.branch_of(timeline).map_or_else(|| "this history".to_owned(), |name| format!("branch {}", quoted(name.as_str())));
        Error::NotKept { what: what.to_owned(), of, from: format!("{earliest}{time}") }
    }
}
