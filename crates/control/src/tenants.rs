//! Tenants: created from a template with two small objects, deleted with all that is theirs.

use std::sync::Arc;

use varve_api::admin::{NewTenant, Tenant as TenantAnswer};
use varve_api::host::Desired;
use varve_storage::ids::{BranchName, TenantId, TenantName, TimelineId};
use varve_storage::tenant_log::{CreateTenantError, TenantEdit, TenantFacts, TimelineFacts, create_tenant, delete_objects, names};

use super::Pageserver;
use crate::error::{Code, ServerError};
use crate::moment::PostgresTime;
use crate::password;
use crate::tenant::Tenant;

/// Postgres timeline of a tenant's first timeline.
const FIRST_TLI: u32 = 1;

fn describe(tenant: &Tenant) -> TenantAnswer {
    let facts = tenant.facts();
    TenantAnswer {
        name: facts.name.to_string(),
        id: facts.id.to_string(),
        pg_version: facts.pg_version,
        system_identifier: facts.system_identifier.to_string(),
        created_at: PostgresTime(facts.created).to_rfc3339(),
        branches: tenant.log().state().branch_count(),
    }
}

impl Pageserver {
    /// Lists the tenants, by name.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn list_tenants(&self) -> Result<Vec<TenantAnswer>, ServerError> {
        let mut tenants = Vec::new();
        for (name, _) in names::list(self.store()).await? {
            tenants.push(describe(&*self.tenant(name.as_str()).await?));
        }
        Ok(tenants)
    }

    /// Shows a tenant.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn show_tenant(&self, name: &str) -> Result<TenantAnswer, ServerError> {
        Ok(describe(&*self.tenant(name).await?))
    }

    /// Creates a tenant with a branch `main`.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn create_tenant(&self, new: NewTenant) -> Result<TenantAnswer, ServerError> {
        let name: TenantName = new.name.parse().map_err(|error| ServerError::new(Code::InvalidArgument, format!("{error}")))?;
        let main: BranchName = "main".parse().map_err(ServerError::internal)?;
        let template = self.templates().for_version(new.pg_version).await?;
        let random = |error| ServerError::internal(error);
        let (id, timeline) = (TenantId::random().map_err(random)?, TimelineId::random().map_err(random)?);
        let password = password::generate()?;
        let now = PostgresTime::now();
        let verifier = {
            let password = password.clone();
            tokio::task::spawn_blocking(move || password::verifier(&password)).await.map_err(ServerError::internal)?
        };
        let facts = TenantFacts {
            id,
            name: name.clone(),
            pg_version: template.facts().cluster.major.number(),
            system_identifier: system_identifier(&id, now),
            created: now.0,
            template: template.name().to_owned(),
            password,
            password_verifier: verifier,
        };
        let first = TimelineFacts { id: timeline, ancestor: None, tli: FIRST_TLI, start: template.facts().end, created: now.0 };
        let others =
            vec![TenantEdit::Timeline(first), TenantEdit::Branch { name: main, timeline }, super::audit(format!("created tenant {name}"))];
        let log = create_tenant(self.store(), facts, others).await.map_err(|error| match error {
            CreateTenantError::NameTaken(_) => ServerError::new(Code::NameTaken, error.to_string()),
            other => ServerError::internal(other),
        })?;
        let tenant = Arc::new(Tenant::new(log, template, self.context().clone())?);
        self.keep(tenant.clone()).await;
        tracing::info!(tenant = %name, %id, "tenant created");
        Ok(describe(&tenant))
    }

    /// Deletes a tenant: its computes stop, its objects go, its name is free again.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn delete_tenant(&self, name: &str) -> Result<(), ServerError> {
        let tenant = self.tenant(name).await?;
        self.stop_computes(self.computes().of_tenant(tenant.id()), Desired::Fenced).await?;
        tenant
            .log()
            .commit(|state| {
                let edits = if state.is_removed() { Vec::new() } else { vec![TenantEdit::TenantRemoved] };
                Ok::<_, ServerError>((edits, ()))
            })
            .await?;
        let timelines: Vec<TimelineId> = tenant.log().state().timelines().map(|timeline| timeline.facts.id).collect();
        tenant.stop().await;
        for timeline in timelines {
            tenant.context().wal.forget(tenant.id(), timeline);
        }
        self.forget(&tenant).await;
        // The name goes first: once it is free, nobody finds the objects that are left.
        names::free(self.store(), tenant.name(), tenant.id()).await?;
        delete_objects(self.store(), tenant.id()).await?;
        tracing::info!(tenant = %tenant.name(), "tenant deleted");
        Ok(())
    }
}

/// A system identifier as `initdb` makes one, seconds in the high half, with random bits of the tenant's id in the low one: unique
/// however many tenants a second brings.
fn system_identifier(id: &TenantId, now: PostgresTime) -> u64 {
    let unix_seconds = (now.0 / 1_000_000 + 946_684_800).max(0) as u64;
    let [a, b, c, d, ..] = id.0;
    unix_seconds << 32 | u64::from(u32::from_be_bytes([a, b, c, d]))
}
