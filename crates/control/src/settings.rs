//! The settings of a branch without a running compute: its `postgresql.auto.conf`, read and written as a version of
//! that file. So somebody who cannot start his server any more takes the setting back that keeps it from starting.

use std::collections::BTreeMap;

use varve_api::admin::{Settings, SettingsChange};
use varve_api::host::Desired;
use varve_postgres::settings::Configuration;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::tenant_log::{FileContents, TenantEdit, TenantState};

use crate::Control;
use crate::call::Call;
use crate::error::Error;
use crate::logs::{Plan, branch, facts};
use crate::ports::Pageserver;
use crate::registry::{Phase, Process};

/// The file that `ALTER SYSTEM` writes.
const FILE: &str = "postgresql.auto.conf";
/// Settings that one request may name.
const SETTINGS_MAX: usize = 200;

/// Settings that a tenant may make: names and values that can be written, and none of Varve's own.
pub(crate) fn of_the_tenant(settings: &BTreeMap<String, String>) -> Result<Vec<(String, String)>, Error> {
    if settings.len() > SETTINGS_MAX {
        return Err(Error::argument("settings", format!("at most {SETTINGS_MAX} at once")));
    }
    for (name, value) in settings {
        varve_postgres::settings::check(name, value).map_err(|error| Error::argument("settings", error))?;
        if varve_api::settings::is_ours(name) {
            return Err(Error::argument("settings", format!("{name} is Varve's own: a compute does not work with another value")));
        }
    }
    Ok(settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
}

impl<P: Pageserver> Control<P> {
    /// The settings of a branch, as the newest version of its file has them.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn settings(&self, tenant: &str, branch_text: &str) -> Result<Settings, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        let (name, timeline) = branch(&state, branch_text)?;
        let file = self.configuration(id, &state, timeline).await?;
        Ok(describe(&format!("{}/{name}", facts(&state, id)?.name), &file))
    }

    /// Changes the settings of a branch; the next start has them.
    ///
    /// # Errors
    /// [`Error::ComputeRuns`] while a compute runs on it, which has `ALTER SYSTEM`.
    pub async fn change_settings(&self, call: &Call, tenant: &str, branch_text: &str, change: &SettingsChange) -> Result<Settings, Error> {
        let set = of_the_tenant(&change.set)?;
        for name in &change.reset {
            varve_postgres::settings::check_name(name).map_err(|error| Error::argument("reset", error))?;
        }
        let id = self.find(tenant).await?;
        let log = self.own(id, "its settings change").await?;
        let (name, _) = branch(&log.state(), branch_text)?;
        // Nobody starts a compute with the old ones meanwhile.
        let _turn = self.starting.take((id, name.clone())).await;
        let state = log.state();
        if let Some(prior) = call.prior(&state)? {
            return Ok(prior);
        }
        let (name, timeline) = branch(&state, name.as_str())?;
        let runs = self.computes.of_branch(id, &name).into_iter().find(|entry| {
            let status = entry.status();
            let is_over = matches!(status.phase, Phase::Failed(_) | Phase::Ended { .. }) || matches!(status.process, Process::Gone);
            entry.writes() && (status.desired == Desired::Run || status.phase == Phase::Stopping) && !is_over
        });
        if let Some(entry) = runs {
            return Err(Error::ComputeRuns(entry.branch()));
        }
        let mut file = if change.reset_all { Configuration::default() } else { self.configuration(id, &state, timeline).await? };
        for name in &change.reset {
            file.reset(name);
        }
        for (name, value) in &set {
            file.set(name, value).map_err(|error| Error::argument("settings", error))?;
        }
        let contents = self.pageserver.put_file(id, file.to_text().into_bytes()).await?;
        let lsn = self.behind_head(id, timeline).await?;
        let answer = describe(&format!("{}/{name}", facts(&state, id)?.name), &file);
        let changed: Vec<&str> = change.reset.iter().map(String::as_str).chain(set.iter().map(|(name, _)| name.as_str())).collect();
        let all = if change.reset_all { "all, " } else { "" };
        let action = format!("changed settings of branch {name}: {all}{}", changed.join(", "));
        let plan = |state: &TenantState| {
            let (_, current) = branch(state, name.as_str())?;
            if current != timeline {
                return Err(Error::Moved(name.to_string()));
            }
            let edits = vec![TenantEdit::File { timeline, path: FILE.to_owned(), lsn, contents }];
            Ok(Plan { edits, action, answer: |_: &TenantState| Ok(answer) })
        };
        self.commit(&log, call, plan).await
    }

    /// The newest version of the file.
    async fn configuration(&self, tenant: TenantId, state: &TenantState, timeline: TimelineId) -> Result<Configuration, Error> {
        let files = state.newest_files(timeline)?;
        let bytes = match files.get(FILE).map(|contents| &**contents) {
            None | Some(FileContents::Removed) => Vec::new(),
            Some(FileContents::Inline(bytes)) => bytes.clone(),
            Some(contents @ FileContents::Object { .. }) => self.pageserver.get_file(tenant, contents.clone()).await?,
        };
        Ok(Configuration::parse(&String::from_utf8_lossy(&bytes)))
    }
}

fn describe(branch: &str, file: &Configuration) -> Settings {
    let settings = file.settings().into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    Settings { branch: branch.to_owned(), settings: settings.collect(), others: file.others().map(str::to_owned).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_varves_own_and_what_cannot_be_written_is_refused_by_name() {
        let one = |name: &str, value: &str| of_the_tenant(&BTreeMap::from([(name.to_owned(), value.to_owned())]));
        assert_eq!(one("work_mem", "4MB").unwrap(), [("work_mem".to_owned(), "4MB".to_owned())]);
        for (name, value) in [("fsync", "on"), ("FSYNC", "on"), ("varve.epoch", "7"), ("a b", "1"), ("work_mem", "4\nfsync = on")] {
            let error = one(name, value).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
