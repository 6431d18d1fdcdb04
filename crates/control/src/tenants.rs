//! Tenants: created from a template with two small objects, deleted with all that is theirs.

use futures::{StreamExt as _, stream};
use varve_api::Code;
use varve_api::admin::{Deleted, NewTenant, Tenant, TenantPassword};
use varve_postgres::Timestamp;
use varve_storage::edit_log::{EditLogError, read_state};
use varve_storage::ids::{BranchName, Generation, TenantId, TenantName, TimelineId};
use varve_storage::tenant_log::{
    CreateTenantError, PasswordRow, TenantEdit, TenantFacts, TenantLog, TenantState, TimelineFacts, create_tenant, delete_objects, names,
    tenant_folder,
};

use crate::arguments::{Listed, Page};
use crate::call::Call;
use crate::error::Error;
use crate::logs::{Plan, facts};
use crate::ports::{Pageserver, Template};
use crate::{Control, arguments, history, moment, password};

/// The role that has the tenant's password.
const SUPERUSER: &str = "postgres";
/// Postgres timeline of a tenant's first timeline.
const FIRST_TLI: u32 = 1;
/// The generation that creates a tenant's log.
const FIRST_GENERATION: Generation = Generation(1);
/// Logs that a list reads at once.
const READS_AT_ONCE: usize = 32;
/// Deletions that are remembered under their keys.
const DELETIONS_MAX: usize = 1000;

impl<P: Pageserver> Control<P> {
    /// What the API says of a tenant, from its log alone.
    pub(crate) fn describe_tenant(&self, state: &TenantState, id: TenantId) -> Result<Tenant, Error> {
        let facts = facts(state, id)?;
        Ok(Tenant {
            name: facts.name.to_string(),
            id: facts.id.to_string(),
            pg_version: facts.pg_version,
            system_identifier: facts.system_identifier.to_string(),
            created_at: moment::rfc3339(Timestamp(facts.created)),
            branches: state.branch_count(),
            history: history::history(state),
            restore_verification: self.describe_verification(state, id),
            owner: self.owner(state, id),
            problem: None,
        })
    }

    /// Lists tenants, by name. Takes none over and opens nothing.
    ///
    /// # Errors
    /// The store's. One tenant whose log cannot be read does not fail the list: it says so.
    pub async fn list_tenants(&self, page: &Page) -> Result<Listed<Tenant>, Error> {
        let after = page.after.as_deref().map(str::parse::<TenantName>).transpose().map_err(|error| Error::argument("cursor", error))?;
        let found = names::page(&self.store, &page.prefix, after.as_ref(), page.limit).await?;
        let next = found.next.map(|name| Page::cursor(name.as_str()));
        let shown = found.tenants.into_iter().map(|(name, id)| self.listed_tenant(name, id));
        let items: Vec<Option<Tenant>> = stream::iter(shown).buffered(READS_AT_ONCE).collect().await;
        Ok(Listed { items: items.into_iter().flatten().collect(), next })
    }

    /// A tenant in a list; none if it was deleted since.
    async fn listed_tenant(&self, name: TenantName, id: TenantId) -> Option<Tenant> {
        let shown = self.read(id).await.and_then(|state| self.describe_tenant(&state, id));
        match shown {
            Ok(tenant) => Some(tenant),
            Err(Error::UnknownTenant(_)) => None,
            Err(error) => {
                tracing::warn!(tenant = %name, %error, "its log cannot be read");
                Some(Tenant {
                    name: name.to_string(),
                    id: id.to_string(),
                    pg_version: 0,
                    system_identifier: String::new(),
                    created_at: String::new(),
                    branches: 0,
                    history: varve_api::history::History::default(),
                    restore_verification: varve_api::verification::RestoreVerification::default(),
                    owner: None,
                    problem: Some(error.to_string()),
                })
            }
        }
    }

    /// Shows a tenant. Does not take it over.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn show_tenant(&self, tenant: &str) -> Result<Tenant, Error> {
        let id = self.find(tenant).await?;
        self.describe_tenant(&*self.read(id).await?, id)
    }

    /// Creates a tenant with a branch `main`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_tenant(&self, call: &Call, new: &NewTenant) -> Result<Tenant, Error> {
        let name = arguments::new_tenant_name(&new.name)?;
        let _turn = self.creating.take(name.clone()).await;
        if let Some(before) = self.created_before(call, &name).await? {
            return Ok(before);
        }
        // Never one that was there before, not even under the same key: whoever had that one may not know yet that it
        // was deleted, and would take this one for it.
        let id = TenantId(self.environment.random()?);
        let template = self.template(new.pg_version).await?;
        let (facts, mut edits) = self.first_day(&name, id, &template)?;
        let mut state = TenantState::default();
        let first = TenantEdit::Tenant(facts.clone());
        std::iter::once(&first).chain(&edits).try_for_each(|edit| state.apply(edit))?;
        let answer = self.describe_tenant(&state, id)?;
        edits.push(self.audit(call, &format!("created tenant {name}")));
        edits.extend(call.row(&answer)?);
        let log = match create_tenant(&self.store, facts, edits).await {
            Ok(log) => log,
            Err(error @ CreateTenantError::NameTaken(_)) => {
                // Perhaps by this same call: its first try went on meanwhile, here or at another server.
                return self.created_before(call, &name).await?.ok_or_else(|| error.into());
            }
            Err(error) => return Err(error.into()),
        };
        self.remember(name.clone(), id);
        self.pageserver.adopt(log).await?;
        self.verifications.look_soon(id, self.environment.now());
        tracing::info!(tenant = %name, %id, "tenant created");
        Ok(answer)
    }

    /// The answer to the same call, if it made the tenant that has this name. A first try that did not get as far as
    /// the name made nothing.
    async fn created_before(&self, call: &Call, name: &TenantName) -> Result<Option<Tenant>, Error> {
        if call.key.is_none() {
            return Ok(None);
        }
        let Some(id) = names::lookup(&self.store, name).await? else { return Ok(None) };
        let Some((state, _)) = read_state::<TenantState>(&self.store, &tenant_folder(id)?).await? else { return Ok(None) };
        let answer = call.prior::<Tenant>(&state)?;
        if answer.is_some() && state.is_removed() {
            return Err(
                varve_api::Refusal::unavailable("the tenant that this key made is being deleted: try again, or take a new key").into()
            );
        }
        Ok(answer)
    }

    /// A tenant's facts, and the other edits of its first day.
    fn first_day(&self, name: &TenantName, id: TenantId, template: &Template) -> Result<(TenantFacts, Vec<TenantEdit>), Error> {
        let main: BranchName = "main".parse().map_err(|error| Error::argument("name", error))?;
        let timeline = TimelineId(self.environment.random()?);
        let password = password::generate(&self.environment)?;
        let created = self.environment.now();
        let facts = TenantFacts {
            id,
            name: name.clone(),
            pg_version: template.pg_version,
            system_identifier: system_identifier(self.environment.random()?, created),
            created: created.0,
            template: template.name.clone(),
            password_verifier: password::verifier(&password, &self.environment.random()?),
            password,
        };
        let first = TimelineFacts { id: timeline, ancestor: None, tli: FIRST_TLI, start: template.end, created: created.0 };
        // From its first day its log says whose it is, as each later claim does.
        let (server, url) = (self.config.server.clone(), self.config.url.clone());
        let owner = TenantEdit::Owner { generation: FIRST_GENERATION, server, url };
        Ok((facts, vec![owner, TenantEdit::Timeline(first), TenantEdit::Branch { name: main, timeline }]))
    }

    /// The password of a tenant's superuser, as it was given last.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn tenant_password(&self, tenant: &str) -> Result<TenantPassword, Error> {
        let id = self.find(tenant).await?;
        password_answer(&*self.read(id).await?, id)
    }

    /// Gives a tenant's superuser another password: to computes that run at once, to all other histories when they are
    /// next started. Each gets it once.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn rotate_password(&self, call: &Call, tenant: &str) -> Result<TenantPassword, Error> {
        let id = self.find(tenant).await?;
        let log = self.own(id, "its password is rotated").await?;
        let password = password::generate(&self.environment)?;
        let verifier = password::verifier(&password, &self.environment.random()?);
        let rotated = self.commit(&log, call, |state| {
            let number = state.password().map_or(1, |row| row.number) + 1;
            let edits = vec![TenantEdit::Password(PasswordRow { number, password, verifier })];
            let answer = move |after: &TenantState| password_answer(after, id);
            Ok(Plan { edits, action: format!("rotated the password of role {SUPERUSER}"), answer })
        });
        let rotated = rotated.await?;
        // They hear of it when they attach.
        for entry in self.computes.of_tenant(id) {
            entry.update(|status| status.attach_again += 1);
        }
        Ok(rotated)
    }

    /// Deletes a tenant: its computes end, its objects go, its name is free again.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete_tenant(&self, call: &Call, tenant: &str) -> Result<Deleted, Error> {
        if let Some(answer) = self.deleted_before(call)? {
            return Ok(answer);
        }
        let id = self.find(tenant).await?;
        let name = match self.pageserver.own(id, "the tenant is deleted").await {
            Ok(log) => self.commit_removal(call, id, &log).await?,
            // A deletion that broke off after its commit: nobody can own the tenant any more, and this one goes on.
            Err(refusal) if refusal.code == Code::UnknownTenant => self.removed_name(id).await?.ok_or(refusal)?,
            Err(refusal) => return Err(refusal.into()),
        };
        self.end_for_good(self.computes.of_tenant(id)).await;
        self.pageserver.forget(id).await;
        // The name goes first: once it is free, nobody finds the objects that are left.
        names::free(&self.store, &name, id).await?;
        delete_objects(&self.store, id).await.map_err(|error: EditLogError| Error::Log(error))?;
        self.verifications.look_soon(id, self.environment.now());
        tracing::info!(tenant = %name, %id, "tenant deleted");
        let answer = Deleted { deleted: name.to_string() };
        if let Some(key) = &call.key {
            let mut deletions = self.deletions.lock();
            deletions.push_back((key.clone(), answer.clone()));
            if deletions.len() > DELETIONS_MAX {
                deletions.pop_front();
            }
        }
        Ok(answer)
    }

    /// From here on the tenant is unknown to all servers. Gives its name.
    async fn commit_removal(&self, call: &Call, id: TenantId, log: &TenantLog) -> Result<TenantName, Error> {
        let name = log.state().facts().ok_or_else(|| Error::UnknownTenant(id.to_string()))?.name.clone();
        let audit = self.audit(call, &format!("deleted tenant {name}"));
        self.commit_edits(log, |state| Ok(if state.is_removed() { Vec::new() } else { vec![audit, TenantEdit::TenantRemoved] })).await?;
        Ok(name)
    }

    /// The name of a tenant whose log says that it was removed.
    async fn removed_name(&self, id: TenantId) -> Result<Option<TenantName>, Error> {
        let read = read_state::<TenantState>(&self.store, &tenant_folder(id)?).await?;
        let removed = read.map(|(state, _)| state).filter(TenantState::is_removed);
        Ok(removed.and_then(|state| state.facts().map(|facts| facts.name.clone())))
    }

    /// What a deletion under this key answered. No log is left that could keep it over a restart: after one the tenant
    /// is unknown, which says as much.
    fn deleted_before(&self, call: &Call) -> Result<Option<Deleted>, Error> {
        let Some(key) = &call.key else { return Ok(None) };
        let deletions = self.deletions.lock();
        match deletions.iter().find(|(known, _)| known.as_str() == key.as_str()) {
            Some((known, answer)) if known == key => Ok(Some(answer.clone())),
            Some(_) => Err(Error::KeyReused(key.as_str().to_owned())),
            None => Ok(None),
        }
    }
}

fn password_answer(state: &TenantState, id: TenantId) -> Result<TenantPassword, Error> {
    let tenant = facts(state, id)?.name.to_string();
    let row = state.password().ok_or_else(|| Error::UnknownTenant(id.to_string()))?;
    Ok(TenantPassword { tenant, role: SUPERUSER.to_owned(), password: row.password, number: row.number })
}

/// A system identifier as `initdb` makes one, seconds in the high half, with chance in the low one: unique however many
/// tenants a second brings.
fn system_identifier(chance: [u8; 4], now: Timestamp) -> u64 {
    let unix_seconds = (now.unix_micros() / 1_000_000).max(0) as u64;
    unix_seconds << 32 | u64::from(u32::from_be_bytes(chance))
}
