//! Which tenants this pageserver owns.
//!
//! A tenant is owned by the server that has the newest generation of its log. It is taken ([`Tenants::own`]) only for
//! work: a compute begins, a branch is made, WAL of it lies in this server's WAL log. Everything else reads.
//!
//! A tenant's slot is *awake* (its log is open, and perhaps timelines), *asleep* (nobody had use for it for a while:
//! all that is kept is by what right it is ours, some hundred bytes; it wakes without a write to the store), or *lost*
//! (another server took it: nothing of it is acknowledged, opened or served here, what the WAL log holds of it is kept,
//! and whoever asks is told who has it). The map of slots is locked for look-ups only; each slot is opened by whoever
//! comes first, while others wait for that slot alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use varve_engine::template::Templates;
use varve_engine::{Context, Tenant};
use varve_storage::edit_log::Ownership;
use varve_storage::ids::{Generation, TenantId, TenantName};
use varve_storage::tenant_log::{FoundOwner, Owner, TenantLog, find_owner, names, take_over, tenant_folder};

use crate::error::ServerError;
use crate::wall_clock;

/// How often a tenant's log is told of the sizes of branches that are being written.
const FIGURES_INTERVAL: Duration = Duration::from_secs(60);

/// How often it is looked for tenants that are to be woken for collection.
const DUE_INTERVAL: Duration = Duration::from_secs(2);
/// Tenants that are woken then at most.
const WOKEN_AT_ONCE: usize = 4;

/// Tenants that are looked at at once.
const LOOKED_AT_ONCE: usize = 16;
/// How long the store may take to say whose a tenant is, before the next look.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// Who this server is, as the logs of tenants that it owns say.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name of the server: the id of its WAL log.
    pub server: String,
    /// Address of its admin API.
    pub url: String,
}

/// Who has a tenant that was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostTo {
    /// Its name.
    pub server: String,
    /// Address of its admin API, if it says so.
    pub url: Option<String>,
}

impl From<&Owner> for LostTo {
    fn from(owner: &Owner) -> LostTo {
        LostTo { server: owner.server.clone(), url: Some(owner.url.clone()).filter(|url| !url.is_empty()) }
    }
}

impl fmt::Display for LostTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.url {
            Some(url) => write!(f, "the server at {url}"),
            None => write!(f, "server {}", self.server),
        }
    }
}

/// A tenant whose log is open, or being opened.
#[derive(Debug, Default)]
struct Awake {
    /// By what right it is ours, if it was before.
    ownership: Option<Ownership>,
    tenant: OnceCell<Arc<Tenant>>,
}

/// Held while what was open of a lost tenant is closed: who takes it again waits for that.
type Losing = Arc<tokio::sync::Mutex<()>>;

#[derive(Debug)]
enum Slot {
    Awake(Arc<Awake>),
    Asleep(Ownership),
    Lost(LostTo, Losing),
}

/// What is known of each tenant. Those that sleep are apart: what looks at all others from time to time costs nothing
/// for them, however many there are.
#[derive(Debug, Default)]
struct Slots {
    awake: BTreeMap<TenantId, Arc<Awake>>,
    asleep: HashMap<TenantId, Ownership>,
    /// When history of those that sleep will have left their window, by time and by tenant.
    due: BTreeSet<(Instant, TenantId)>,
    due_of: HashMap<TenantId, Instant>,
    lost: BTreeMap<TenantId, (LostTo, Losing)>,
}

impl Slots {
    fn get(&self, id: TenantId) -> Option<Slot> {
        let awake = || self.awake.get(&id).map(|awake| Slot::Awake(awake.clone()));
        let asleep = || self.asleep.get(&id).map(|ownership| Slot::Asleep(*ownership));
        let lost = || self.lost.get(&id).map(|(owner, losing)| Slot::Lost(owner.clone(), losing.clone()));
        awake().or_else(asleep).or_else(lost)
    }

    fn contains(&self, id: TenantId) -> bool {
        self.awake.contains_key(&id) || self.asleep.contains_key(&id) || self.lost.contains_key(&id)
    }

    /// Gives what was there before.
    fn insert(&mut self, id: TenantId, slot: Slot) -> Option<Slot> {
        let before = self.remove(id);
        match slot {
            Slot::Awake(awake) => drop(self.awake.insert(id, awake)),
            Slot::Asleep(ownership) => drop(self.asleep.insert(id, ownership)),
            Slot::Lost(owner, losing) => drop(self.lost.insert(id, (owner, losing))),
        }
        before
    }

    fn remove(&mut self, id: TenantId) -> Option<Slot> {
        if let Some(at) = self.due_of.remove(&id) {
            self.due.remove(&(at, id));
        }
        let awake = self.awake.remove(&id).map(Slot::Awake);
        let asleep = self.asleep.remove(&id).map(Slot::Asleep);
        let lost = self.lost.remove(&id).map(|(owner, losing)| Slot::Lost(owner, losing));
        awake.or(asleep).or(lost)
    }
}

/// See the module's doc.
#[derive(Debug)]
pub struct Tenants {
    context: Arc<Context>,
    templates: Arc<Templates>,
    identity: Identity,
    slots: Mutex<Slots>,
}

impl Tenants {
    /// No tenant yet.
    pub fn new(context: Arc<Context>, templates: Arc<Templates>, identity: Identity) -> Tenants {
        Tenants { context, templates, identity, slots: Mutex::default() }
    }

    /// A tenant that this server owns from now on, if it did not before. `why` it is taken stands in the log.
    ///
    /// # Errors
    /// [`ServerError::UnknownTenant`]; [`ServerError::NotOwner`] when it was lost to another server; what cannot be
    /// read.
    pub async fn own(&self, id: TenantId, why: &str) -> Result<Arc<Tenant>, ServerError> {
        let awake = {
            let mut slots = self.slots.lock();
            let ownership = match slots.get(id) {
                Some(Slot::Awake(awake)) => Err(awake),
                Some(Slot::Asleep(ownership)) => Ok(Some(ownership)),
                Some(Slot::Lost(owner, _)) => return Err(ServerError::NotOwner { tenant: id, owner }),
                None => Ok(None),
            };
            ownership.map_or_else(
                |awake| awake,
                |ownership| {
                    let awake = Arc::new(Awake { ownership, tenant: OnceCell::new() });
                    slots.insert(id, Slot::Awake(awake.clone()));
                    awake
                },
            )
        };
        let opened = awake.tenant.get_or_try_init(|| self.open(id, awake.ownership, why)).await.cloned();
        match opened {
            Ok(tenant) => Ok(tenant),
            Err(error) => {
                self.opening_failed(id, &awake);
                match error {
                    ServerError::Engine(error) if error.is_fenced() => {
                        let owner = self.lose(id).await;
                        Err(ServerError::NotOwner { tenant: id, owner })
                    }
                    error => Err(error),
                }
            }
        }
    }

    /// A tenant to be read here: one that this server owns, by its own words or by those of the tenant's log (it owned
    /// it before it was started again), or that nobody ever owned by name. Another server's is not taken.
    ///
    /// # Errors
    /// As [`Tenants::own`]; [`ServerError::NotOwner`] for another server's.
    pub async fn own_if_ours(&self, id: TenantId, why: &str) -> Result<Arc<Tenant>, ServerError> {
        if !self.slots.lock().contains(id) {
            match find_owner(&self.context.store, id).await? {
                None => return Err(ServerError::UnknownTenant(id)),
                Some(FoundOwner { owner: Some(owner), .. }) if owner.server != self.identity.server => {
                    let mut owner = LostTo::from(&owner);
                    // It had this server's address, before its disk was lost or on another machine: nobody can be sent
                    // there.
                    owner.url.take_if(|url| *url == self.identity.url);
                    return Err(ServerError::NotOwner { tenant: id, owner });
                }
                Some(_) => {}
            }
        }
        self.own(id, why).await
    }

    /// Nothing is left of a slot that could not be opened but by what right it was ours. While others wait for it, it
    /// stays: the next of them opens it, and a tenant that is open is in the map, or it would be opened twice.
    fn opening_failed(&self, id: TenantId, awake: &Arc<Awake>) {
        let mut slots = self.slots.lock();
        let is_ours = slots.awake.get(&id).is_some_and(|other| Arc::ptr_eq(other, awake));
        // One is the map's and one our own; whoever takes another has the map locked.
        if is_ours && awake.tenant.get().is_none() && Arc::strong_count(awake) == 2 {
            match awake.ownership {
                Some(ownership) => slots.insert(id, Slot::Asleep(ownership)),
                None => slots.remove(id),
            };
        }
    }

    async fn open(&self, id: TenantId, ownership: Option<Ownership>, why: &str) -> Result<Arc<Tenant>, ServerError> {
        let store = &self.context.store;
        let log = match ownership {
            Some(ownership) => TenantLog::reopen(store, &tenant_folder(id)?, ownership).await?.ok_or(ServerError::UnknownTenant(id))?,
            None => {
                let Identity { server, url } = &self.identity;
                let log = take_over(store, id, server, url).await?.ok_or(ServerError::UnknownTenant(id))?;
                tracing::info!(tenant = %id, generation = log.ownership().generation.0, why, "the tenant is taken: this server owns it from now on");
                log
            }
        };
        if log.state().is_removed() {
            return Err(ServerError::UnknownTenant(id));
        }
        let template = log.state().facts().map(|facts| facts.template.clone()).unwrap_or_default();
        let template = self.templates.by_name(&template).await?;
        Ok(Arc::new(Tenant::new(id, log, template, self.context.clone())?))
    }

    /// What the log of a tenant that this server creates says of its owner.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A tenant that was just created, by its log, is this server's.
    ///
    /// # Errors
    /// When the log cannot be written, or says nothing of a tenant.
    pub async fn adopt(&self, log: TenantLog) -> Result<Arc<Tenant>, ServerError> {
        let state = log.state();
        let Some(facts) = state.facts().cloned() else {
            return Err(varve_engine::EngineError::EmptyLog { tenant: TenantId([0; 16]) }.into());
        };
        let template = self.templates.by_name(&facts.template).await?;
        let tenant = Arc::new(Tenant::new(facts.id, log, template, self.context.clone())?);
        let awake = Arc::new(Awake { ownership: None, tenant: OnceCell::new_with(Some(tenant.clone())) });
        self.slots.lock().insert(facts.id, Slot::Awake(awake));
        Ok(tenant)
    }

    /// A tenant that is awake here; takes nothing.
    pub fn awake(&self, id: TenantId) -> Option<Arc<Tenant>> {
        self.slots.lock().awake.get(&id)?.tenant.get().cloned()
    }

    /// All tenants that are awake here.
    pub fn all_awake(&self) -> Vec<Arc<Tenant>> {
        self.slots.lock().awake.values().filter_map(|awake| awake.tenant.get().cloned()).collect()
    }

    /// Whether the tenant is this server's, as far as it knows.
    pub fn owns(&self, id: TenantId) -> bool {
        matches!(self.slots.lock().get(id), Some(Slot::Awake(_) | Slot::Asleep(_)))
    }

    /// Whether anything was found out about the tenant: it is this server's, or was lost.
    pub(crate) fn is_known(&self, id: TenantId) -> bool {
        self.slots.lock().contains(id)
    }

    /// The tenants that were lost, and to whom.
    pub fn lost(&self) -> Vec<(TenantId, LostTo)> {
        self.slots.lock().lost.iter().map(|(id, (owner, _))| (*id, owner.clone())).collect()
    }

    /// The id of the tenant of a name.
    ///
    /// # Errors
    /// [`ServerError::UnknownTenantName`]; what cannot be read.
    pub async fn id_of(&self, name: &str) -> Result<TenantId, ServerError> {
        let unknown = || ServerError::UnknownTenantName(name.chars().take(64).collect());
        let name: TenantName = name.parse().map_err(|_| unknown())?;
        if let Some(tenant) = self.all_awake().into_iter().find(|tenant| *tenant.name() == name) {
            return Ok(tenant.id());
        }
        names::lookup(&self.context.store, &name).await?.ok_or_else(unknown)
    }

    /// Another server has the tenant: nothing of it is acknowledged or served any more. Gives who has it.
    pub async fn lose(&self, id: TenantId) -> LostTo {
        // First it ends here; who has it is only for people.
        let losing = Losing::default();
        let under_way = losing.clone().lock_owned().await;
        let before = {
            let mut slots = self.slots.lock();
            if let Some((owner, _)) = slots.lost.get(&id) {
                return owner.clone();
            }
            let unknown = LostTo { server: "not known yet".to_owned(), url: None };
            slots.insert(id, Slot::Lost(unknown, losing.clone()))
        };
        let close = async {
            if let Some(Slot::Awake(awake)) = &before
                && let Some(tenant) = awake.tenant.get()
            {
                tenant.lose().await;
            }
        };
        let (owner, ()) = tokio::join!(self.owner_of(id), close);
        if let Some((told, _)) = self.slots.lock().lost.get_mut(&id) {
            *told = owner.clone();
        }
        drop(under_way);
        tracing::error!(tenant = %id, %owner, "the tenant was taken over: nothing of it is acknowledged or served here any more");
        owner
    }

    /// The same, if it is still the server's of `generation`.
    pub async fn lose_generation(&self, id: TenantId, generation: Generation) {
        let is_meant = match self.slots.lock().get(id) {
            Some(Slot::Awake(awake)) => awake.tenant.get().is_some_and(|tenant| tenant.log().ownership().generation == generation),
            Some(Slot::Asleep(ownership)) => ownership.generation == generation,
            Some(Slot::Lost(..)) | None => false,
        };
        if is_meant {
            self.lose(id).await;
        }
    }

    async fn owner_of(&self, id: TenantId) -> LostTo {
        match find_owner(&self.context.store, id).await {
            Ok(Some(FoundOwner { owner: Some(owner), .. })) => LostTo::from(&owner),
            Ok(Some(FoundOwner { generation, .. })) => LostTo { server: format!("of generation {}", generation.0), url: None },
            Ok(None) => LostTo { server: "nobody: its log is gone".to_owned(), url: None },
            Err(error) => {
                tracing::warn!(tenant = %id, %error, "who has the tenant cannot be read");
                LostTo { server: "not known".to_owned(), url: None }
            }
        }
    }

    /// Says that the tenant is another server's, without having had it.
    pub(crate) fn note_lost(&self, id: TenantId, owner: LostTo) {
        self.slots.lock().insert(id, Slot::Lost(owner, Losing::default()));
    }

    /// Gives a tenant that was lost free to be taken again, at an operator's word, once all that was open of it is
    /// closed.
    pub async fn forgive(&self, id: TenantId) {
        let Some((_, losing)) = self.slots.lock().lost.get(&id).cloned() else { return };
        let _closed = losing.lock().await;
        let mut slots = self.slots.lock();
        if slots.lost.get(&id).is_some_and(|(_, now)| Arc::ptr_eq(now, &losing)) {
            slots.lost.remove(&id);
        }
    }

    /// The tenant was deleted: its timelines are closed and it is forgotten.
    pub async fn forget(&self, id: TenantId) {
        let before = self.slots.lock().remove(id);
        if let Some(Slot::Awake(awake)) = before
            && let Some(tenant) = awake.tenant.get()
        {
            tenant.close().await;
        }
    }

    /// Finds tenants that others took over: those whose logs have said so already, and, with a look into the store,
    /// those that a compute writes here. The latter must not wait until the next flush collides.
    pub async fn find_lost(&self) {
        let look = |tenant: Arc<Tenant>| async move {
            if tenant.is_written() {
                match tokio::time::timeout(LOOK_MAX, tenant.log().check_ownership()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(tenant = %tenant.id(), %error, "whose the tenant is was looked for"),
                    Err(_) => tracing::debug!(tenant = %tenant.id(), "the store does not say whose the tenant is"),
                }
            }
            if tenant.log().lost().is_some() {
                self.lose_generation(tenant.id(), tenant.log().ownership().generation).await;
            }
        };
        stream::iter(self.all_awake()).for_each_concurrent(LOOKED_AT_ONCE, look).await;
    }

    /// Closes timelines that nobody had use for since `unused`, and puts tenants to sleep that have none left and that
    /// nobody holds.
    pub async fn sweep(&self, unused: Duration) {
        self.forget_unopened();
        stream::iter(self.all_awake()).for_each_concurrent(LOOKED_AT_ONCE, |tenant| self.sweep_one(tenant, unused)).await;
    }

    async fn sweep_one(&self, tenant: Arc<Tenant>, unused: Duration) {
        let id = tenant.id();
        tenant.note_figures(FIGURES_INTERVAL.min(unused)).await;
        let now = wall_clock::now();
        if let Err(error) = tenant.look_after_history(now, false).await
            && !error.is_fenced()
        {
            tracing::warn!(tenant = %tenant.name(), %error, "what of its history can go could not be found out; it is looked at again");
        }
        if !tenant.close_idle(unused).await {
            return;
        }
        let due = tenant.collects_after();
        drop(tenant);
        let mut slots = self.slots.lock();
        let Some(awake) = slots.awake.get(&id) else { return };
        let asleep = match awake.tenant.get() {
            // Whoever wants it goes through the map, which is locked.
            Some(tenant) if Arc::strong_count(awake) == 1 && Arc::strong_count(tenant) == 1 && tenant.may_sleep(unused) => {
                tenant.log().ownership()
            }
            _ => return,
        };
        slots.insert(id, Slot::Asleep(asleep));
        if let Some(at) = due.and_then(|after| Instant::now().checked_add(after)) {
            slots.due.insert((at, id));
            slots.due_of.insert(id, at);
        }
    }

    /// Wakes tenants that sleep when their history has left its window; it is collected before they sleep again. After
    /// a restart that waits until they are used. Never ends; it may be long about one tenant.
    pub async fn keep_collected(&self) {
        loop {
            tokio::time::sleep(DUE_INTERVAL).await;
            self.wake_due().await;
        }
    }

    async fn wake_due(&self) {
        let due: Vec<TenantId> = {
            let mut slots = self.slots.lock();
            let now = Instant::now();
            let mut found = Vec::new();
            while found.len() < WOKEN_AT_ONCE
                && let Some((_, id)) = slots.due.first().copied().filter(|(at, _)| *at <= now)
            {
                slots.due.pop_first();
                slots.due_of.remove(&id);
                if slots.asleep.contains_key(&id) {
                    found.push(id);
                }
            }
            found
        };
        for id in due {
            let collected = match self.own_if_ours(id, "its history is collected").await {
                Ok(tenant) => tenant.collect_everything(wall_clock::now()).await.map_err(ServerError::from),
                Err(error) => Err(error),
            };
            if let Err(error) = collected {
                tracing::warn!(tenant = %id, %error, "the history of a tenant that sleeps was not collected");
            }
        }
    }

    /// Slots whose opening failed, and for which nobody waits any more, say only by what right they are ours.
    fn forget_unopened(&self) {
        let mut slots = self.slots.lock();
        let is_unopened = |awake: &Arc<Awake>| awake.tenant.get().is_none() && Arc::strong_count(awake) == 1;
        let found: Vec<_> = slots.awake.iter().filter(|(_, awake)| is_unopened(awake)).map(|(id, awake)| (*id, awake.ownership)).collect();
        for (id, ownership) in found {
            match ownership {
                Some(ownership) => slots.insert(id, Slot::Asleep(ownership)),
                None => slots.remove(id),
            };
        }
    }

    /// Closes everything.
    pub async fn close(&self) {
        for tenant in self.all_awake() {
            tenant.close().await;
        }
    }
}
