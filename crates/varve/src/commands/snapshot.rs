//! `varve snapshot`.

use clap::Subcommand;
use reqwest::Method;
use varve_api::history::{NewSnapshot, Snapshot};

use super::BranchPath;
use super::branch::MomentArgs;
use crate::client::{Client, segment};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Give a moment of a branch a name: it stays however long the tenant's history is.
    Create {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// The snapshot's name, unique in the tenant.
        name: String,
        #[command(flatten)]
        moment: MomentArgs,
        /// When it goes by itself: 30d, 12h; never by default.
        #[arg(long, value_parser = humantime::parse_duration)]
        keep: Option<std::time::Duration>,
    },
    /// List a tenant's snapshots.
    List {
        /// The tenant.
        tenant: String,
    },
    /// Show a snapshot.
    Show {
        /// The tenant.
        tenant: String,
        /// The snapshot.
        name: String,
    },
    /// Delete a snapshot: what only it kept is collected.
    Delete {
        /// The tenant.
        tenant: String,
        /// The snapshot.
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

fn path(tenant: &str, name: &str) -> String {
    format!("tenants/{}/snapshots/{}", segment(tenant), segment(name))
}

fn kept_until(snapshot: &Snapshot) -> String {
    snapshot.expires_at.clone().unwrap_or_else(|| "it is deleted".to_owned())
}

pub(crate) async fn run(command: SnapshotCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        SnapshotCommand::Create { branch, name, moment, keep } => {
            let keep_seconds = keep.map(|keep| keep.as_secs());
            let body = NewSnapshot { name, branch: Some(branch.branch.clone()), lsn: moment.lsn, at: moment.at, keep_seconds };
            let made: Snapshot = client.post(&format!("tenants/{}/snapshots", segment(&branch.tenant)), &body).await?;
            output::print(json, &made, || format!("snapshot {} of {branch} at {}, kept until {}", made.name, made.lsn, kept_until(&made)))
        }
        SnapshotCommand::List { tenant } => {
            let found: Vec<Snapshot> = client.get(&format!("tenants/{}/snapshots", segment(&tenant))).await?;
            output::print(json, &found, || {
                let row = |s: &Snapshot| {
                    let until = s.expires_at.clone().unwrap_or_default();
                    vec![s.name.clone(), s.branch.clone(), s.lsn.clone(), output::age(&s.created_at), until]
                };
                output::table(&["SNAPSHOT", "BRANCH", "AT", "AGE", "KEPT UNTIL"], &found.iter().map(row).collect::<Vec<_>>())
            })
        }
        SnapshotCommand::Show { tenant, name } => {
            let found: Snapshot = client.get(&path(&tenant, &name)).await?;
            output::print(json, &found, || {
                format!(
                    "snapshot    {}/{}\nbranch      {}\ntimeline    {}\nat          {}\ncreated     {}\nkept until  {}",
                    found.tenant,
                    found.name,
                    found.branch,
                    found.timeline_id,
                    found.lsn,
                    found.created_at,
                    kept_until(&found)
                )
            })
        }
        SnapshotCommand::Delete { tenant, name, yes } => {
            if !yes {
                let found: Snapshot = client.get(&path(&tenant, &name)).await?;
                output::confirm(&format!("Delete snapshot {name} of {tenant}/{} at {}?", found.branch, found.lsn))?;
            }
            let answer: serde_json::Value = client.call(Method::DELETE, &path(&tenant, &name), None::<&()>).await?;
            output::print(json, &answer, || format!("snapshot {name} is deleted"))
        }
    }
}
