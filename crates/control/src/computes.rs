//! Computes as people see them: lists, descriptions, stops.

use std::sync::Arc;
use std::time::Duration;

use varve_api::admin::{Compute, Stopped};
use varve_api::host::{Desired, HostAction};
use varve_storage::tenant_log::{EndpointRow, TenantState, removed_timelines};

use crate::call::Call;
use crate::error::{Error, quoted};
use crate::logs::{branch, facts};
use crate::ports::Pageserver;
use crate::registry::{Entry, Phase, Process, is_expendable};
use crate::sizes::size_of;
use crate::{Control, arguments};

/// How long a clean stop may take: a checkpoint, the rest of its WAL, the upload of its layers.
const STOP_MAX: Duration = Duration::from_secs(300);
/// Addresses that mean all of a machine's.
const ADDRESS_ANY: [&str; 3] = ["*", "0.0.0.0", "::"];
/// What became of the WAL of a compute that did not end cleanly.
const KEPT: &str = "Everything that was acknowledged is kept. What was not (asynchronous commits) is at most in the compute's pg_wal, which \
                    its host keeps, too";

impl<P: Pageserver> Control<P> {
    /// Lists the computes that are known here, without their passwords. Nothing is read, opened or taken over for it.
    pub fn list_computes(&self) -> Vec<Compute> {
        self.computes.all().iter().map(|entry| self.describe_entry(entry, None)).collect()
    }

    /// Lists the computes that run, or should run, on a branch, without their passwords.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list_branch_computes(&self, tenant: &str, branch_text: &str) -> Result<Vec<Compute>, Error> {
        let tenant = self.find(tenant).await?;
        let state = self.read(tenant).await?;
        let (name, _) = branch(&state, branch_text)?;
        let tenant_name = &facts(&state, tenant)?.name;
        for row in state.endpoints_of(&name).filter(|row| row.wanted) {
            // Known from now on, so that it can be shown and stopped, though no host has named it yet.
            self.computes.note(Entry::new(tenant, tenant_name.clone(), row, size_of(&state, row.id), Phase::Unknown));
        }
        Ok(self.computes.of_branch(tenant, &name).iter().map(|entry| self.describe_entry(entry, None)).collect())
    }

    /// Shows a compute, with its password.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn show_compute(&self, id: &str) -> Result<Compute, Error> {
        let entry = self.entry(id)?;
        let state = self.read(entry.tenant).await?;
        Ok(self.describe_entry(&entry, state.password().map(|row| row.password).as_deref()))
    }

    /// The compute with this id.
    pub(crate) fn entry(&self, id: &str) -> Result<Arc<Entry>, Error> {
        let found = self.computes.get(arguments::endpoint_id(id)?);
        found.ok_or_else(|| Error::UnknownCompute(quoted(id)))
    }

    /// What the API says of a compute.
    pub(crate) fn describe_entry(&self, entry: &Entry, password: Option<&str>) -> Compute {
        let (row, status) = (entry.row(), entry.status());
        let host = row.listen.split(',').next().unwrap_or("127.0.0.1").trim();
        let host = if ADDRESS_ANY.contains(&host) { "127.0.0.1" } else { host };
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let password = password.map(|password| format!(":{password}")).unwrap_or_default();
        let (state, error) = match &status.phase {
            Phase::Unknown => ("unknown", None),
            Phase::Starting => ("starting", None),
            // It may wait for a pageserver whose disk is full, for one.
            Phase::Running => ("running", status.timeline.and_then(|timeline| self.pageserver.wal_trouble(entry.tenant, timeline))),
            Phase::Stopping | Phase::Ended { .. } => ("stopping", None),
            Phase::Failed(reason) => ("failed", Some(reason.clone())),
        };
        Compute {
            id: entry.id.to_string(),
            branch: format!("{}/{}", entry.tenant_name, row.branch),
            state: state.to_owned(),
            conninfo: format!("postgresql://postgres{password}@{host}:{}/postgres", row.port),
            pid: status.pid,
            mount_pid: status.mount_pid,
            port: row.port,
            lsn: row.moment.map(|moment| moment.lsn.to_string()),
            error,
            warnings: status.warnings,
            cache: status.cache,
            bases: status.bases,
            size: status.size,
            limits: status.limits,
        }
    }

    /// Stops a compute cleanly, and answers when it has ended. It is stopped for good, whatever restarts, until
    /// somebody starts it.
    ///
    /// # Errors
    /// [`Error::NotClean`] when it ended, or was ended, otherwise; [`Error::NotOwner`] when another server has the
    /// tenant: then it is ended, with its `pg_wal` kept.
    pub async fn stop_compute(&self, call: &Call, id: &str) -> Result<Stopped, Error> {
        let entry = self.entry(id)?;
        if let Some(lost) = self.lost(entry.tenant) {
            entry.tell_to_end(Desired::Fenced);
            self.finish(&entry, HostAction::End).await;
            return Err(Error::NotOwner(Box::new(lost)));
        }
        let log = self.own(entry.tenant, "a compute is to stop").await?;
        let mut answer = Stopped { stopped: entry.id.to_string(), warnings: Vec::new() };
        if let Some(prior) = call.prior::<Stopped>(&log.state())? {
            return Ok(prior);
        }
        if entry.writes() {
            let audit = self.audit(call, &format!("stopped compute {} of branch {}", entry.id, entry.row().branch));
            let unwanted = self.commit_edits(&log, |state| match state.endpoint(entry.id) {
                Ok(row) => {
                    let mut edits = state.put_endpoint(EndpointRow { wanted: false, ..EndpointRow::clone(row) })?;
                    edits.push(audit);
                    Ok(edits)
                }
                Err(_) => Ok(Vec::new()), // its branch was deleted just now
            });
            unwanted.await?;
            self.computes.refresh(entry.tenant, &log.state());
        }
        self.finish_stop(&entry).await?;
        if entry.writes() {
            answer.warnings = entry.status().warnings;
        }
        // Only now is it known what the answer is; asked again before this row is durable, it is stopped a second time,
        // which changes nothing.
        if let Some(row) = call.row(&answer)? {
            self.commit_edits(&log, |_| Ok(vec![row])).await?;
        }
        Ok(answer)
    }

    /// Tells a compute to stop, waits for its end, and has its host keep or remove its folder.
    pub(crate) async fn finish_stop(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        let before = entry.status();
        entry.tell_to_end(Desired::Stop);
        let has_ended = |status: &crate::registry::Status| {
            matches!(status.phase, Phase::Ended { .. } | Phase::Failed(_)) || matches!(status.process, Process::Gone | Process::Removed)
        };
        let nobody_has_it = before.phase == Phase::Unknown && before.process == Process::Unsaid;
        let ended = if nobody_has_it { None } else { entry.wait(&self.environment, STOP_MAX, has_ended).await };
        let log = self.own_for_compute(entry.tenant, "a compute has stopped").await;
        let state = match &log {
            Ok(log) => log.state(),
            Err(_) => Arc::new(TenantState::default()),
        };
        let row = entry.row();
        let reason = match ended.map(|status| status.phase) {
            _ if row.moment.is_some() => None,
            // Its word counts as far as the log says that the epoch was closed.
            Some(Phase::Ended { clean: true, .. }) if is_expendable(&state, &row) => None,
            Some(Phase::Ended { reason, .. }) => Some(reason),
            Some(Phase::Failed(reason)) => Some(format!("it had failed before ({reason})")),
            Some(_) => Some("its process was gone".to_owned()),
            None if nobody_has_it => Some("no host says that it has it".to_owned()),
            None => {
                entry.tell_to_end(Desired::Fenced);
                Some(format!("it did not end within {} s, and was ended", STOP_MAX.as_secs()))
            }
        };
        if row.moment.is_some()
            && let Ok(log) = &log
        {
            self.forget_moment(log, entry).await?;
        }
        let expendable = log.is_ok() && is_expendable(&state, &row);
        self.finish(entry, if expendable { HostAction::Remove } else { HostAction::End }).await;
        match reason {
            None => Ok(()),
            Some(reason) => Err(Error::NotClean { branch: entry.branch(), reason, kept: KEPT }),
        }
    }

    /// Takes a throw-away compute's endpoint out of the log, and what only it needed.
    async fn forget_moment(&self, log: &varve_storage::tenant_log::TenantLog, entry: &Arc<Entry>) -> Result<(), Error> {
        let mut gone = Vec::new();
        let forgotten = self.commit_edits(log, |state| {
            if state.endpoint(entry.id).is_err() {
                return Ok(Vec::new());
            }
            let edits = state.remove_endpoint(entry.id)?;
            gone = removed_timelines(&edits).collect();
            Ok(edits)
        });
        forgotten.await?;
        if !gone.is_empty() {
            self.pageserver.remove_timelines(entry.tenant, gone).await;
        }
        Ok(())
    }

    /// Ends computes at once, since what they served is gone for good: their folders go, too.
    pub(crate) async fn end_for_good(&self, entries: Vec<Arc<Entry>>) {
        for entry in &entries {
            entry.tell_to_end(Desired::Fenced);
        }
        futures::future::join_all(entries.iter().map(|entry| self.finish(entry, HostAction::Remove))).await;
    }
}
