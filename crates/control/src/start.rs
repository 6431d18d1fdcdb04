//! *Ensure running*: a branch's compute is started unless it runs; and what is thrown away afterwards is started at a
//! moment.
//!
//! **Order.** Every argument is read first. Then a host looks whether the addresses and the port can be used, and
//! starts the process (or, where one runs, only looks). Then the endpoint's row is committed. Only then may the compute
//! begin, and so fence whoever wrote before. A refusal at any step leaves nothing behind: no row, nobody fenced.

use std::sync::Arc;
use std::time::Duration;

use varve_api::Code;
use varve_api::admin::{Compute, NewCompute};
use varve_api::host::{Desired, HostAction};
use varve_api::size::Size;
use varve_storage::ids::{BranchName, EndpointId, TenantId};
use varve_storage::tenant_log::{EndpointMoment, EndpointRow, TenantFacts, TenantLog, TenantState, removed_timelines};

use crate::call::Call;
use crate::error::Error;
use crate::logs::{Plan, branch, facts};
use crate::ports::{Moment, Pageserver};
use crate::registry::{Entry, Phase, Process, Status, is_expendable, not_there};
use crate::sizes::{size_edit, size_of};
use crate::{Control, arguments, moment, settings};

/// How long a compute may take to start.
pub(crate) const START_MAX: Duration = Duration::from_secs(120);
/// How long a host may take to say that it does what it was ordered.
const HOST_MAX: Duration = Duration::from_secs(30);
/// How long a compute that is being stopped keeps its next start waiting.
const STOPPING_MAX: Duration = Duration::from_secs(300);
/// Where a compute listens when nobody says where.
pub(crate) const LISTEN_DEFAULT: &str = "127.0.0.1";

/// Answer to *ensure running*.
#[derive(Clone, Debug)]
pub struct Started {
    /// The compute, with its password.
    pub compute: Compute,
    /// Whether it was started, or begun anew, for this call; else it ran already.
    pub fresh: bool,
}

/// What was asked for, read.
struct Wanted {
    port: Option<u16>,
    listen: Option<String>,
    moment: Moment,
    replace: bool,
    settings: Vec<(String, String)>,
    size: Size,
}

impl Wanted {
    fn parse(new: &NewCompute) -> Result<Wanted, Error> {
        let moment = moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        if new.replace && moment != Moment::Head {
            return Err(Error::argument("replace", "a compute at a moment replaces none: leave it out"));
        }
        new.size.check()?;
        let port = new.port.map(arguments::port).transpose()?;
        let listen = new.listen.as_deref().map(arguments::listen).transpose()?;
        Ok(Wanted { port, listen, moment, replace: new.replace, settings: settings::of_the_tenant(&new.settings)?, size: new.size })
    }

    /// Whether a compute that runs is what is wanted.
    fn fits(&self, row: &EndpointRow, entry: &Entry) -> bool {
        let set = self.settings.is_empty() || self.settings == entry.settings();
        set && self.port.is_none_or(|port| port == row.port) && self.listen.as_ref().is_none_or(|listen| *listen == row.listen)
    }

    /// The row that this makes of the one there is.
    fn row(&self, row: &EndpointRow) -> EndpointRow {
        EndpointRow {
            port: self.port.unwrap_or(row.port),
            listen: self.listen.clone().unwrap_or_else(|| row.listen.clone()),
            wanted: true,
            ..row.clone()
        }
    }
}

/// Where a start goes.
struct Place {
    log: TenantLog,
    tenant: TenantId,
    facts: Arc<TenantFacts>,
}

/// Whether a compute runs, or is about to.
fn is_alive(row: &EndpointRow, status: &Status) -> bool {
    row.wanted && status.desired == Desired::Run && matches!(status.phase, Phase::Starting | Phase::Running)
}

impl<P: Pageserver> Control<P> {
    /// Sees to it that a compute runs on a branch, and answers when it takes connections. One that runs already is the
    /// answer; with other arguments it is an error, unless `replace` says that it is to begin anew with them. At a
    /// moment each call starts another one.
    ///
    /// # Errors
    /// [`Error`]; [`Error::AlreadyRunning`].
    pub async fn ensure_running(&self, call: &Call, tenant: &str, branch_text: &str, new: &NewCompute) -> Result<Started, Error> {
        let wanted = Wanted::parse(new)?;
        let tenant = self.find(tenant).await?;
        self.look_before_taking(call, tenant, branch_text, &wanted).await?;
        let log = self.own(tenant, "a compute is to run").await?;
        let (name, _) = branch(&log.state(), branch_text)?;
        let place = Place { facts: facts(&log.state(), tenant)?.clone(), log, tenant };
        let turn = self.starting.take((tenant, name.clone())).await;
        let state = place.log.state();
        if let Some(prior) = call.prior::<Compute>(&state)? {
            drop(turn);
            return self.started_before(&place, prior).await;
        }
        let (name, timeline) = branch(&state, name.as_str())?;
        let (entry, fresh) = if wanted.moment == Moment::Head {
            self.ensure_writer(call, &place, &state, &name, &wanted).await?
        } else {
            let at = self.resolve(tenant, timeline, wanted.moment).await?;
            let row = self.new_row(&name, &wanted, Some(EndpointMoment { timeline: at.timeline, lsn: at.lsn }))?;
            (self.launch(call, &place, row, &wanted).await?, true)
        };
        drop(turn);
        self.wait_running(&place, &entry, fresh).await?;
        Ok(Started { compute: self.describe_entry(&entry, place.log.state().password().map(|row| row.password).as_deref()), fresh })
    }

    /// Refuses what no host here can run before the tenant is taken from whoever has it. Its log is only read for that.
    async fn look_before_taking(&self, call: &Call, tenant: TenantId, branch_text: &str, wanted: &Wanted) -> Result<(), Error> {
        if self.pageserver.owned(tenant).is_some() {
            return Ok(());
        }
        let state = self.read(tenant).await?;
        let (name, _) = branch(&state, branch_text)?;
        let runs = |row: &Arc<EndpointRow>| self.computes.get(row.id).is_some_and(|entry| is_alive(row, &entry.status()));
        let runs_here = wanted.moment == Moment::Head && state.endpoints_of(&name).any(|row| row.moment.is_none() && runs(row));
        if !runs_here && call.prior::<Compute>(&state)?.is_none() {
            self.hosts.choose(&self.environment, facts(&state, tenant)?.pg_version, None, &wanted.size).await?;
        }
        Ok(())
    }

    fn new_row(&self, branch: &BranchName, wanted: &Wanted, moment: Option<EndpointMoment>) -> Result<EndpointRow, Error> {
        Ok(EndpointRow {
            id: EndpointId(self.environment.random()?),
            branch: branch.clone(),
            moment,
            listen: wanted.listen.clone().unwrap_or_else(|| LISTEN_DEFAULT.to_owned()),
            port: wanted.port.unwrap_or(0),
            wanted: true,
            host: None,
        })
    }

    /// The compute that writes a branch; whether it was started for this call.
    async fn ensure_writer(
        &self,
        call: &Call,
        place: &Place,
        state: &TenantState,
        name: &BranchName,
        wanted: &Wanted,
    ) -> Result<(Arc<Entry>, bool), Error> {
        let row = state.endpoints_of(name).find(|row| row.moment.is_none()).cloned();
        let Some(row) = row else {
            let row = self.new_row(name, wanted, None)?;
            return Ok((self.launch(call, place, row, wanted).await?, true));
        };
        if let Some(entry) = self.computes.get(row.id) {
            let status = entry.status();
            let alive = is_alive(&row, &status);
            if alive && !wanted.replace {
                if !wanted.fits(&row, &entry) {
                    let (port, listen) = (row.port, row.listen.clone());
                    return Err(Error::AlreadyRunning { branch: entry.branch(), port, listen });
                }
                // A call with a key is remembered, though it did nothing.
                self.remember_call(call, place, &entry, wanted.size).await?;
                return Ok((entry, false));
            }
            if alive {
                return Ok((self.replace(call, place, &entry, wanted.row(&row), wanted).await?, true));
            }
            if matches!(status.phase, Phase::Stopping | Phase::Ended { .. }) {
                self.wait_stopped(&entry).await?;
            }
        }
        Ok((self.launch(call, place, wanted.row(&row), wanted).await?, true))
    }

    /// Waits until a compute that is being stopped is out of the way.
    async fn wait_stopped(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        let is_out = async {
            while self.computes.get(entry.id).is_some_and(|known| Arc::ptr_eq(&known, entry)) {
                self.environment.sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = self.environment.within(STOPPING_MAX, is_out).await;
        waited.ok_or_else(|| Error::NotStarted { branch: entry.branch(), reason: "it is still being stopped; try again".to_owned() })
    }

    /// Remembers a call that found a compute running, and gives that the size that was asked for.
    async fn remember_call(&self, call: &Call, place: &Place, entry: &Arc<Entry>, size: Size) -> Result<(), Error> {
        let host = entry.row().host.and_then(|host| self.hosts.get(host));
        host.map_or(Ok(()), |host| host.gives(&size))?;
        let row = call.row(&self.describe_entry(entry, None))?;
        let id = entry.id;
        self.commit_edits(&place.log, |state| Ok(size_edit(state, id, size).into_iter().chain(row).collect())).await?;
        entry.set_size(size_of(&place.log.state(), id));
        Ok(())
    }

    /// Has a host start a process for `row`, and commits the row once the host says that it can.
    async fn launch(&self, call: &Call, place: &Place, row: EndpointRow, wanted: &Wanted) -> Result<Arc<Entry>, Error> {
        let size = wanted.size.or(size_of(&place.log.state(), row.id));
        let host = self.hosts.choose(&self.environment, place.facts.pg_version, row.host, &size).await?;
        let former = row.host.filter(|former| *former != host.id);
        let row = EndpointRow { host: Some(host.id), wanted: true, ..row };
        let entry = Entry::new(place.tenant, place.facts.name.clone(), &Arc::new(row), size, Phase::Starting);
        entry.set_settings(wanted.settings.clone());
        let entry = self.computes.add(entry);
        // A process that is quick waits for its row.
        let turn = entry.turn.lock().await;
        self.order(&entry, HostAction::Run);
        let committed = match self.host_says(&entry).await {
            Ok(port) => self.commit_row(call, place, &entry, port, wanted.size).await,
            Err(error) => Err(error),
        };
        if let Err(error) = committed {
            entry.tell_to_end(Desired::Fenced);
            if matches!(entry.status().process, Process::Refused(_)) {
                host.withdraw(entry.id);
            } else {
                // It has not begun, so it wrote nothing; but its folder may be older than this start.
                host.order(entry.id, entry.order(HostAction::End));
            }
            self.computes.remove(&entry);
            return Err(error);
        }
        if let Some(former) = former.and_then(|former| self.hosts.get(former)) {
            // It had the order to run it, and would start it for ever, though it may not begin there any more.
            former.order(entry.id, entry.order(HostAction::End));
        }
        drop(turn);
        Ok(entry)
    }

    /// Waits for what the host says to an order: the port.
    async fn host_says(&self, entry: &Arc<Entry>) -> Result<u16, Error> {
        let said = entry.wait(&self.environment, HOST_MAX, |status| matches!(status.process, Process::Started | Process::Refused(_))).await;
        match said.map(|status| (status.process, status.port)) {
            Some((Process::Refused(refusal), _)) => Err(refusal.into()),
            Some((_, port)) => Ok(port),
            None => {
                let host = entry.row().host.and_then(|host| self.hosts.get(host));
                let host = host.map_or_else(|| "?".to_owned(), |host| host.hello().name.clone());
                Err(Error::HostSilent { host, seconds: HOST_MAX.as_secs() })
            }
        }
    }

    async fn commit_row(&self, call: &Call, place: &Place, entry: &Arc<Entry>, port: u16, size: Size) -> Result<(), Error> {
        let row = EndpointRow { port, ..EndpointRow::clone(&entry.row()) };
        entry.set_row(Arc::new(row.clone()));
        let mut gone = Vec::new();
        let plan = |state: &TenantState| {
            let other = |other: &Arc<EndpointRow>| other.moment.is_none() && other.id != row.id;
            if row.moment.is_none() && state.endpoints_of(&row.branch).any(other) {
                return Err(Error::Moved(entry.branch()));
            }
            let mut edits = state.put_endpoint(row.clone())?;
            edits.extend(size_edit(state, row.id, size));
            gone = removed_timelines(&edits).collect();
            let action = format!("started compute {} on branch {}", row.id, row.branch);
            Ok(Plan { edits, action, answer: |_: &TenantState| Ok(self.describe_entry(entry, None)) })
        };
        self.commit::<Compute, _>(&place.log, call, plan).await?;
        entry.set_size(size_of(&place.log.state(), entry.id));
        if !gone.is_empty() {
            self.pageserver.remove_timelines(place.tenant, gone).await;
        }
        Ok(())
    }

    /// Has a compute that runs begin anew with another row, once its host says that it can.
    async fn replace(
        &self,
        call: &Call,
        place: &Place,
        entry: &Arc<Entry>,
        row: EndpointRow,
        wanted: &Wanted,
    ) -> Result<Arc<Entry>, Error> {
        let before = entry.row();
        let host = before.host.and_then(|host| self.hosts.get(host)).filter(|host| host.is_here(self.environment.now()));
        if host.is_none() {
            // Its host is away: another one starts it, and whoever wakes up on the old one is fenced when that begins.
            return self.launch(call, place, row, wanted).await;
        }
        host.map_or(Ok(()), |host| host.gives(&wanted.size))?;
        let turn = entry.turn.lock().await;
        let changed = (row.port, &row.listen) != (before.port, &before.listen);
        entry.set_row(Arc::new(row));
        let committed = if changed {
            self.order(entry, HostAction::Run);
            match self.host_says(entry).await {
                Ok(port) => self.commit_row(call, place, entry, port, wanted.size).await,
                Err(error) => Err(error),
            }
        } else {
            self.commit_row(call, place, entry, before.port, wanted.size).await
        };
        if let Err(error) = committed {
            entry.set_row(before);
            self.order(entry, HostAction::Run);
            return Err(error);
        }
        entry.set_settings(wanted.settings.clone());
        self.begin_anew(entry);
        drop(turn);
        Ok(entry.clone())
    }

    /// Waits until a compute runs. One that this call started and that does not is not wanted any more.
    async fn wait_running(&self, place: &Place, entry: &Arc<Entry>, fresh: bool) -> Result<(), Error> {
        let begun = self.environment.now();
        // Begin has waited for it already.
        let lacks_its_tail = |status: &Status| status.waits_for.as_ref().is_some_and(|refusal| refusal.code == Code::TailUnknown);
        let is_over = |status: &Status| {
            matches!(status.phase, Phase::Running | Phase::Failed(_)) || status.desired != Desired::Run || fresh && lacks_its_tail(status)
        };
        let status = entry.wait(&self.environment, START_MAX, is_over).await;
        if status.is_some_and(|status| status.phase == Phase::Running && status.desired == Desired::Run) {
            let elapsed_ms = (self.environment.now().unix_micros() - begun.unix_micros()) / 1000;
            tracing::info!(branch = entry.branch(), compute = %entry.id, elapsed_ms, "the compute runs");
            return Ok(());
        }
        let error = not_there(entry, START_MAX);
        if fresh && entry.status().desired == Desired::Run {
            self.give_up(place, entry).await;
        }
        Err(error)
    }

    /// Ends a compute that did not start, so that nobody starts it again by himself.
    async fn give_up(&self, place: &Place, entry: &Arc<Entry>) {
        entry.tell_to_end(Desired::Fenced);
        let id = entry.id;
        let mut gone = Vec::new();
        let unwanted = self.commit_edits(&place.log, |state| {
            let row = EndpointRow::clone(state.endpoint(id)?);
            let edits =
                if row.moment.is_some() { state.remove_endpoint(id)? } else { state.put_endpoint(EndpointRow { wanted: false, ..row })? };
            gone = removed_timelines(&edits).collect();
            Ok(edits)
        });
        let unwanted = unwanted.await;
        if let Err(error) = unwanted {
            tracing::warn!(compute = %id, %error, "a compute that did not start is still wanted");
        } else if !gone.is_empty() {
            self.pageserver.remove_timelines(place.tenant, gone).await;
        }
        let expendable = is_expendable(&place.log.state(), &entry.row());
        self.finish(entry, if expendable { HostAction::Remove } else { HostAction::End }).await;
    }

    /// The answer to a call that was answered before: the compute as it is now, or as it was then if it is gone.
    async fn started_before(&self, place: &Place, prior: Compute) -> Result<Started, Error> {
        let entry = prior.id.parse().ok().and_then(|id| self.computes.get(id));
        let Some(entry) = entry else { return Ok(Started { compute: prior, fresh: true }) };
        self.wait_running(place, &entry, false).await?;
        Ok(Started { compute: self.describe_entry(&entry, place.log.state().password().map(|row| row.password).as_deref()), fresh: true })
    }
}
