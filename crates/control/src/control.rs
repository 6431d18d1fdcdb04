//! [`Control`]: what the control plane is made of, and its watch over what changes by itself.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use varve_api::admin::{CacheUse, Deleted, ForgottenWal, Host as HostAnswer, LostTenant, Ready, Server, Tenant};
use varve_api::host::{Desired, HostAction};
use varve_storage::ids::{BranchName, TenantId, TenantName};
use varve_storage::store::Store;
use varve_storage::tenant_log::names;

use crate::environment::Environment;
use crate::error::Error;
use crate::events::Events;
use crate::hosts::Hosts;
use crate::logs::Known;
use crate::ports::{Lost, OrphanedWal, Pageserver};
use crate::registry::{Entry, Phase, Registry, Turns};
use crate::verification::Verifications;

/// How often it is looked what was lost, and what is still to be settled with hosts.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often, and how long, it is looked whether a tenant that was taken from here is let go of.
const LOST_INTERVAL: Duration = Duration::from_millis(20);
const LOST_MAX: Duration = Duration::from_secs(10);
/// How long the store may take to show that it is there.
const STORE_MAX: Duration = Duration::from_secs(5);
/// A name that is looked up to see whether the store answers; it need not exist.
const PROBED_NAME: &str = "0";

/// What a control plane is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's name, as tenants' logs say who owns them.
    pub server: String,
    /// Address of the admin API.
    pub url: String,
    /// Version of the program.
    pub version: String,
}

/// The control plane of one server. See the crate's doc.
pub struct Control<P: Pageserver> {
    pub(crate) me: Weak<Control<P>>,
    /// Differs between runs of this process.
    pub(crate) run: String,
    pub(crate) config: Config,
    pub(crate) pageserver: Arc<P>,
    pub(crate) store: Store,
    pub(crate) environment: Environment,
    pub(crate) computes: Registry,
    pub(crate) hosts: Hosts,
    pub(crate) events: Events,
    pub(crate) known: Known,
    /// Who starts a compute of a branch decides alone.
    pub(crate) starting: Turns<(TenantId, BranchName)>,
    /// A name is created once at a time.
    pub(crate) creating: Turns<TenantName>,
    /// A template is made once.
    pub(crate) templating: Turns<u32>,
    /// Proof that restores work.
    pub(crate) verifications: Verifications,
    /// Answers to deletions of tenants under a key: no log is left that could keep them. Key, request, answer.
    pub(crate) deletions: Mutex<VecDeque<(crate::call::Key, Deleted)>>,
}

fn orphaned(found: OrphanedWal) -> varve_api::admin::OrphanedWal {
    let OrphanedWal { tenant, timeline, problem } = found;
    varve_api::admin::OrphanedWal { tenant_id: tenant.to_string(), timeline_id: timeline.to_string(), problem }
}

impl<P: Pageserver> fmt::Debug for Control<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control({}, run {})", self.config.server, self.run)
    }
}

impl<P: Pageserver> Control<P> {
    /// A control plane over a pageserver and the store that it uses. It does nothing by itself but what
    /// [`Control::watch`] does.
    ///
    /// # Errors
    /// [`Error::Random`].
    pub fn new(pageserver: Arc<P>, store: Store, config: Config, environment: Environment) -> Result<Arc<Control<P>>, Error> {
        let run = u128::from_be_bytes(environment.random()?);
        Ok(Arc::new_cyclic(|me| Control {
            me: me.clone(),
            run: format!("{run:032x}"),
            config,
            pageserver,
            store,
            environment,
            computes: Registry::default(),
            hosts: Hosts::default(),
            events: Events::default(),
            known: Known::default(),
            starting: Turns::default(),
            creating: Turns::default(),
            templating: Turns::default(),
            verifications: Verifications::default(),
            deletions: Mutex::default(),
        }))
    }

    /// The surroundings that it was given.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Watches until `stopping`: computes of tenants that were lost are told to end, and what hosts have is settled.
    pub async fn watch(&self, stopping: &CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                () = self.environment.sleep(WATCH_INTERVAL) => {}
            }
            self.end_what_was_lost();
            self.settle_all().await;
        }
    }

    /// Ends the computes of tenants that another server took over. Their `pg_wal` is kept: what it has may be nowhere
    /// else.
    pub fn end_what_was_lost(&self) {
        for Lost { tenant, .. } in self.pageserver.lost() {
            let Some(lost) = self.lost(tenant) else { continue };
            for entry in self.computes.of_tenant(tenant) {
                if entry.status().desired == Desired::Fenced {
                    continue;
                }
                let reason = Error::NotOwner(Box::new(lost.clone())).to_string();
                tracing::warn!(compute = %entry.id, branch = entry.branch(), reason, "it is ended, its pg_wal is kept");
                entry.tell_to_end(Desired::Fenced);
                entry.update(|status| status.phase = Phase::Failed(reason));
                self.order(&entry, HostAction::End);
            }
        }
    }

    /// What the API says of the server itself.
    pub fn server(&self) -> Server {
        let hosts = self.hosts.all().into_iter().map(|host| {
            let hello = host.hello();
            HostAnswer {
                id: host.id.to_string(),
                name: hello.name.clone(),
                version: hello.version.clone(),
                postgres: hello.postgres.iter().map(|(major, _)| *major).collect(),
                lacks: hello.lacks.clone(),
                here: host.is_here(self.environment.now()),
            }
        });
        Server {
            version: self.config.version.clone(),
            page_service: self.pageserver.page_service(),
            name: self.config.server.clone(),
            url: self.config.url.clone(),
            hosts: hosts.collect(),
            lost: self.all_lost(),
            scrub: self.pageserver.scrub_status(),
            orphaned_wal: self.pageserver.orphans().into_iter().map(orphaned).collect(),
            store_acknowledgement: self.pageserver.store_acknowledgement(),
        }
    }

    /// Gives up WAL of which no log in the store knows: of a tenant, or of one timeline.
    ///
    /// # Errors
    /// [`Error::Argument`] of an id that cannot be read, or of which there is no such WAL.
    pub async fn forget_wal(&self, tenant: &str, timeline: Option<&str>) -> Result<ForgottenWal, Error> {
        let tenant: TenantId = tenant.parse().map_err(|error| Error::argument("tenant_id", error))?;
        let timeline = timeline.map(|text| text.parse().map_err(|error| Error::argument("timeline_id", error))).transpose()?;
        match self.pageserver.forget_orphans(tenant, timeline).await {
            0 => Err(Error::argument("tenant_id", "there is no WAL to give up of it; 'varve wal list' shows of which there is")),
            timelines => Ok(ForgottenWal { timelines }),
        }
    }

    /// Takes a tenant over, whoever has it.
    ///
    /// # Errors
    /// [`Error::UnknownTenant`]; the store's.
    pub async fn take_tenant(&self, tenant: &str) -> Result<Tenant, Error> {
        let id = self.find(tenant).await?;
        // One that was taken from us, though we have not heard of it, is lost first.
        if let Some(log) = self.pageserver.owned(id)
            && log.check_ownership().await.is_err()
            && log.lost().is_some()
        {
            let is_lost = async {
                while self.lost(id).is_none() {
                    self.environment.sleep(LOST_INTERVAL).await;
                }
            };
            self.environment.within(LOST_MAX, is_lost).await;
        }
        self.pageserver.forgive(id).await;
        self.own(id, "an operator takes it").await?;
        self.verifications.look_soon(id, self.environment.now());
        self.show_tenant(tenant).await
    }

    /// The tenants that it lost.
    fn all_lost(&self) -> Vec<LostTenant> {
        let lost = self.pageserver.lost().into_iter().filter(|lost| self.lost(lost.tenant).is_some());
        let shown = |lost: Lost| LostTenant { id: lost.tenant.to_string(), name: lost.name, owner: lost.owner, url: lost.url };
        lost.map(shown).collect()
    }

    /// Whether the server can work: it can while the store answers and WAL can be kept. A tenant that it lost is served
    /// by another server, and does not keep it from serving the others: it is only named.
    ///
    /// # Errors
    /// [`Error::Store`], or [`Error::Refused`] when the store does not answer, or the disk is full.
    pub async fn ready(&self) -> Result<Ready, Error> {
        let name: TenantName = PROBED_NAME.parse().map_err(|error| Error::argument("name", error))?;
        match self.environment.within(STORE_MAX, names::lookup(&self.store, &name)).await {
            Some(Ok(_)) if let Some(why) = self.pageserver.not_kept() => Err(varve_api::Refusal::unavailable(why).into()),
            Some(Ok(_)) => Ok(Ready { ready: true, lost: self.all_lost() }),
            Some(Err(error)) => Err(error.into()),
            None => Err(varve_api::Refusal::unavailable("the store does not answer").into()),
        }
    }

    /// Lines of the OpenMetrics text format about verifications of restores.
    pub fn verification_figures(&self) -> String {
        self.verifications.figures(self.environment.now())
    }

    /// How many computes should run, as far as is known.
    pub fn computes_wanted(&self) -> usize {
        self.computes.all().iter().filter(|entry| entry.status().desired == Desired::Run).count()
    }

    /// The block caches of computes, as far as they have told, with the computes' ids.
    pub fn caches(&self) -> Vec<(String, CacheUse)> {
        let told = |entry: &Arc<Entry>| Some((entry.id.to_string(), entry.status().cache?));
        self.computes.all().iter().filter_map(told).collect()
    }
}
