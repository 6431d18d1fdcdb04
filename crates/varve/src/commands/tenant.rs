//! `varve tenant`.

use std::io::{IsTerminal as _, Write as _};

use anyhow::bail;
use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{NewTenant, Tenant};

use crate::client::{Client, segment};
use crate::output;
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
    List,
    /// Show a tenant.
    Show {
        /// Its name.
        name: String,
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
        TenantCommand::List => {
            let tenants: Vec<Tenant> = client.get("tenants").await?;
            output::print(json, &tenants, || {
                let rows: Vec<Vec<String>> = tenants
                    .iter()
                    .map(|t| vec![t.name.clone(), t.pg_version.to_string(), t.branches.to_string(), output::age(&t.created_at)])
                    .collect();
                output::table(&["TENANT", "POSTGRES", "BRANCHES", "AGE"], &rows)
            })
        }
        TenantCommand::Show { name } => {
            let t: Tenant = client.get(&format!("tenants/{}", segment(&name))).await?;
            output::print(json, &t, || {
                format!(
                    "tenant             {}\nid                 {}\nPostgreSQL         {}\nsystem identifier  {}\nbranches           {}\ncreated            {}",
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

fn confirm(question: &str) -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked here: give --yes to go on without a question");
    }
    eprint!("{question} Type yes to go on: ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if answer.trim() != "yes" {
        bail!("nothing was deleted");
    }
    Ok(())
}
