//! `varve tenant`.

use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{NewTenant, Tenant, TenantPassword};

use crate::client::{Client, ListArgs, segment};
use crate::output;
use crate::output::confirm;
use crate::progress::spinner;

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Create a tenant with a branch `main`.
    Create {
        /// Unique name.
        name: String,
        /// Postgres major; by default the newest that the server has.
        #[arg(long)]
        pg_version: Option<u32>,
    },
    /// List the tenants.
    List(ListArgs),
    /// Show a tenant.
    Show {
        /// Its name.
        name: String,
    },
    /// Take a tenant over from the server that has it: that one acknowledges and serves nothing more of it.
    Take {
        /// Its name.
        name: String,
    },
    /// Show the password of a tenant's superuser, as Varve gave it last.
    Password {
        /// Its name.
        name: String,
        /// Give another one: to running computes at once, to everything else at its next start.
        #[arg(long)]
        rotate: bool,
    },
    /// Delete a tenant: its computes stop, its history goes for good.
    Delete {
        /// Its name.
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

pub(crate) async fn run(command: TenantCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        TenantCommand::Create { name, pg_version } => {
            let body = NewTenant { name, pg_version };
            let work = client.post::<Tenant>("tenants", &body);
            let tenant = spinner("creating the tenant (the first of a Postgres version makes a template)", work).await?;
            output::print(json, &tenant, || {
                format!("tenant {} (PostgreSQL {}) with branch {}/main", tenant.name, tenant.pg_version, tenant.name)
            })
        }
        TenantCommand::Take { name } => {
            let path = format!("tenants/{}/take", segment(&name));
            let tenant: Tenant = client.post(&path, &serde_json::json!({})).await?;
            output::print(json, &tenant, || format!("tenant {} is this server's", tenant.name))
        }
        TenantCommand::Password { name, rotate } => {
            let path = format!("tenants/{}/password", segment(&name));
            let password: TenantPassword =
                if rotate { client.post(&path, &serde_json::json!({})).await? } else { client.get(&path).await? };
            output::print(json, &password, || password.password.clone())
        }
        TenantCommand::List(list) => {
            let tenants: Vec<Tenant> = client.list("tenants", &list).await?;
            output::print(json, &tenants, || {
                let rows: Vec<Vec<String>> = tenants
                    .iter()
                    .map(|t| match &t.problem {
                        None => vec![t.name.clone(), t.pg_version.to_string(), t.branches.to_string(), output::age(&t.created_at)],
                        Some(problem) => vec![t.name.clone(), String::new(), String::new(), String::new(), problem.clone()],
                    })
                    .collect();
                let problems = tenants.iter().any(|t| t.problem.is_some());
                let header = ["TENANT", "POSTGRES", "BRANCHES", "AGE", "PROBLEM"];
                output::table(if problems { &header } else { &header[..4] }, &rows)
            })
        }
        TenantCommand::Show { name } => {
            let t: Tenant = client.get(&format!("tenants/{}", segment(&name))).await?;
            output::print(json, &t, || {
                let owner = t.owner.as_ref().map_or_else(
                    || "not known".to_owned(),
                    |owner| format!("{} at {}{}", owner.server, owner.url, if owner.here { " (this server)" } else { "" }),
                );
                format!(
                    "tenant             {}\nid                 {}\nPostgreSQL         {}\nsystem identifier  {}\nbranches           {}\n\
                     created            {}\nowner              {owner}",
                    t.name, t.id, t.pg_version, t.system_identifier, t.branches, t.created_at
                )
            })
        }
        TenantCommand::Delete { name, yes } => {
            let path = format!("tenants/{}", segment(&name));
            if !yes {
                let tenant: Tenant = client.get(&path).await?;
                confirm(&format!("Delete tenant {} with its {} branches and all their history?", tenant.name, tenant.branches))?;
            }
            let work = client.call::<serde_json::Value>(Method::DELETE, &path, None::<&()>);
            let answer = spinner("deleting the tenant", work).await?;
            output::print(json, &answer, || format!("tenant {name} is deleted"))
        }
    }
}
