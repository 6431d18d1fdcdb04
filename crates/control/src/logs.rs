//! Finding tenants, and reading their logs. Reading takes nothing: it reads what the store has, or the log that is
//! owned here anyway.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_api::admin::TenantOwner;
use varve_postgres::Timestamp;
use varve_storage::edit_log::{CommitError, EditLogError, read_state};
use varve_storage::ids::{BranchName, TenantId, TenantName, TimelineId};
use varve_storage::tenant_log::{AuditRow, TenantEdit, TenantFacts, TenantLog, TenantState, names, tenant_folder};

use crate::Control;
use crate::call::Call;
use crate::error::{Error, quoted};
use crate::moment;
use crate::ports::{Lost, Moment, Pageserver, Resolved};

/// Names of which it is remembered whose they are.
const NAMES_MAX: usize = 10_000;
/// Logs that were read for a list of which more pages may be asked for.
const READ_MAX: usize = 8;
/// How long a list goes on with what its first page was read from.
const READ_AGE_MAX: Duration = Duration::from_secs(10);

/// What was found out, so that it need not be again.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// A hint: whose a name is, to be checked with the tenant's own log.
    names: Mutex<BTreeMap<TenantName, TenantId>>,
    /// Logs of tenants that are not owned here, newest last.
    read: Mutex<VecDeque<(TenantId, Timestamp, Arc<TenantState>)>>,
}

/// What a mutation is about to do.
pub(crate) struct Plan<A> {
    /// Its edits.
    pub(crate) edits: Vec<TenantEdit>,
    /// What the audit log says.
    pub(crate) action: String,
    /// Its answer, from the state that the edits make.
    pub(crate) answer: A,
}

/// The facts of a tenant that is there.
pub(crate) fn facts(state: &TenantState, id: TenantId) -> Result<&Arc<TenantFacts>, Error> {
    state.facts().filter(|_| !state.is_removed()).ok_or_else(|| Error::UnknownTenant(id.to_string()))
}

/// A branch's name and timeline: it is named, or its timeline is.
pub(crate) fn branch(state: &TenantState, text: &str) -> Result<(BranchName, TimelineId), Error> {
    let tenant = state.facts().map(|facts| facts.name.to_string()).unwrap_or_default();
    let unknown = || Error::UnknownBranch { tenant: tenant.clone(), branch: quoted(text) };
    if let (Ok(name), Ok(timeline)) = (text.parse::<BranchName>(), state.branch(text)) {
        return Ok((name, timeline.facts.id));
    }
    let timeline: TimelineId = text.parse().map_err(|_| unknown())?;
    let name = state.branch_of(timeline).ok_or_else(unknown)?;
    Ok((name.clone(), timeline))
}

impl<P: Pageserver> Control<P> {
    /// The tenant with this name or id. Only its name was looked up: it may be gone.
    pub(crate) async fn find(&self, text: &str) -> Result<TenantId, Error> {
        let unknown = || Error::UnknownTenant(quoted(text));
        if let Ok(id) = text.parse::<TenantId>() {
            return Ok(id);
        }
        let name: TenantName = text.parse().map_err(|_| unknown())?;
        let hint = self.known.names.lock().get(&name).copied();
        if let Some(id) = hint {
            let log = self.pageserver.owned(id);
            let right = log.is_some_and(|log| log.ended().is_none() && facts(&log.state(), id).is_ok_and(|facts| facts.name == name));
            if right {
                return Ok(id);
            }
        }
        let id = names::lookup(&self.store, &name).await?.ok_or_else(unknown)?;
        self.remember(name, id);
        Ok(id)
    }

    /// Remembers whose a name is.
    pub(crate) fn remember(&self, name: TenantName, id: TenantId) {
        let mut names = self.known.names.lock();
        if names.len() >= NAMES_MAX {
            names.clear();
        }
        names.insert(name, id);
    }

    /// What a tenant's log says. Takes nothing.
    pub(crate) async fn read(&self, id: TenantId) -> Result<Arc<TenantState>, Error> {
        if let Some(log) = self.pageserver.owned(id).filter(|log| log.ended().is_none()) {
            let state = log.state();
            facts(&state, id)?;
            return Ok(state);
        }
        let read = read_state::<TenantState>(&self.store, &tenant_folder(id)?).await?;
        let state = Arc::new(read.ok_or_else(|| Error::UnknownTenant(id.to_string()))?.0);
        facts(&state, id)?;
        Ok(state)
    }

    /// As [`Control::read`], for a list: its later pages (`goes_on`) may go on with what the first was read from.
    pub(crate) async fn read_for_list(&self, id: TenantId, goes_on: bool) -> Result<Arc<TenantState>, Error> {
        let now = self.environment.now();
        let is_fresh = |read: Timestamp| now.unix_micros() - read.unix_micros() <= READ_AGE_MAX.as_micros() as i64;
        if goes_on && self.pageserver.owned(id).is_none() {
            let read = self.known.read.lock();
            if let Some((.., state)) = read.iter().rev().find(|(tenant, at, _)| *tenant == id && is_fresh(*at)) {
                return Ok(state.clone());
            }
        }
        let state = self.read(id).await?;
        let mut read = self.known.read.lock();
        read.retain(|(tenant, at, _)| *tenant != id && is_fresh(*at));
        read.push_back((id, now, state.clone()));
        while read.len() > READ_MAX {
            read.pop_front();
        }
        Ok(state)
    }

    /// The boundary that a moment of a timeline is. No time of the future is one, whatever was written before it.
    pub(crate) async fn resolve(&self, tenant: TenantId, timeline: TimelineId, moment: Moment) -> Result<Resolved, Error> {
        if let Moment::Time(at) = moment
            && at > self.environment.now()
        {
            return Err(Error::InTheFuture(moment::rfc3339(at)));
        }
        let found = match self.pageserver.resolve(tenant, timeline, moment).await {
            Ok(found) => found,
            Err(refusal) if refusal.code == varve_api::Code::NotRetained => {
                let state = self.read(tenant).await?;
                // Before all history there is nothing that could have been kept.
                let is_whole = state.ancestry(timeline)?.iter().all(|(state, _)| state.cutoff <= state.facts.start);
                let what = moment::in_words(moment);
                return Err(if is_whole { refusal.into() } else { self.not_kept(&state, tenant, timeline, &what).await });
            }
            Err(refusal) => return Err(refusal.into()),
        };
        self.check_retained(&*self.read(tenant).await?, tenant, timeline, found.lsn).await?;
        Ok(found)
    }

    /// A tenant's log to write: `why` is work that needs ownership.
    pub(crate) async fn own(&self, id: TenantId, why: &'static str) -> Result<TenantLog, Error> {
        let log = self.pageserver.own(id, why).await?;
        facts(&log.state(), id)?;
        Ok(log)
    }

    /// As [`Control::own`], for what computes ask by themselves: that never takes a tenant back that somebody else took
    /// over.
    pub(crate) async fn own_for_compute(&self, id: TenantId, why: &'static str) -> Result<TenantLog, Error> {
        match self.lost(id) {
            Some(lost) => Err(Error::NotOwner(Box::new(lost))),
            None => self.own(id, why).await,
        }
    }

    /// Who has a tenant that was taken from this server.
    pub(crate) fn lost(&self, id: TenantId) -> Option<Lost> {
        if self.pageserver.owned(id).is_some_and(|log| log.ended().is_none()) {
            return None;
        }
        let mut lost = self.pageserver.lost().into_iter().find(|lost| lost.tenant == id)?;
        if lost.name.is_none() {
            let names = self.known.names.lock();
            lost.name = names.iter().find(|(_, known)| **known == id).map(|(name, _)| name.to_string());
        }
        Some(lost)
    }

    /// Who took a tenant over last, as its log says.
    pub(crate) fn owner(&self, state: &TenantState, id: TenantId) -> Option<TenantOwner> {
        let owner = state.owner()?;
        let here = owner.server == self.config.server && self.lost(id).is_none();
        let (server, url) = (owner.server.clone(), owner.url.clone());
        Some(TenantOwner { server, url, generation: owner.generation.0, here })
    }

    /// A row of the audit log.
    pub(crate) fn audit(&self, call: &Call, action: &str) -> TenantEdit {
        TenantEdit::Audit(AuditRow { time: self.environment.now().0, action: call.audit(action) })
    }

    /// Commits what `plan` makes of the log's state, with its audit row and its answer's; or gives the answer that the
    /// same call got before.
    pub(crate) async fn commit<T, A>(
        &self,
        log: &TenantLog,
        call: &Call,
        plan: impl FnOnce(&TenantState) -> Result<Plan<A>, Error>,
    ) -> Result<T, Error>
    where
        T: Serialize + DeserializeOwned,
        A: FnOnce(&TenantState) -> Result<T, Error>,
    {
        let committed = log.commit(|state| {
            if let Some(answer) = call.prior(state)? {
                return Ok((Vec::new(), answer));
            }
            let Plan { mut edits, action, answer } = plan(state)?;
            let mut after = state.clone();
            edits.iter().try_for_each(|edit| after.apply(edit))?;
            let answer = answer(&after)?;
            edits.push(self.audit(call, &action));
            edits.extend(call.row(&answer)?);
            Ok::<_, Error>((edits, answer))
        });
        committed.await.map_err(|error| self.named(log, error))
    }

    /// Commits edits that nobody asked for by a call of his own.
    pub(crate) async fn commit_edits(
        &self,
        log: &TenantLog,
        plan: impl FnOnce(&TenantState) -> Result<Vec<TenantEdit>, Error>,
    ) -> Result<(), Error> {
        log.commit(|state| Ok::<_, Error>((plan(state)?, ()))).await.map_err(|error| self.named(log, error))
    }

    /// An error of a log; where it was fenced it is said by whom.
    fn named(&self, log: &TenantLog, error: CommitError<Error>) -> Error {
        if let CommitError::Log(EditLogError::Fenced { .. }) = &error
            && let Some(lost) = log.state().facts().and_then(|facts| self.lost(facts.id))
        {
            return Error::NotOwner(Box::new(lost));
        }
        error.into()
    }
}
