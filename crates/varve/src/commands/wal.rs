//! `varve wal`: WAL that a server keeps though no log in the store knows of it.

use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{ForgottenWal, Server};

use crate::client::{Client, segment};
use crate::output;
use crate::output::confirm;

#[derive(Debug, Subcommand)]
pub(crate) enum WalCommand {
    /// List WAL of which no log in the store knows: it is kept, since the store may have lost something.
    List,
    /// Give such WAL up: what only it holds is lost for good.
    Forget {
        /// The tenant's id.
        tenant_id: String,
        /// One timeline's only.
        timeline_id: Option<String>,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

pub(crate) async fn run(command: WalCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        WalCommand::List => {
            let server: Server = client.get("server").await?;
            output::print(json, &server.orphaned_wal, || {
                let row = |wal: &varve_api::admin::OrphanedWal| vec![wal.tenant_id.clone(), wal.timeline_id.clone(), wal.problem.clone()];
                output::table(&["TENANT", "TIMELINE", "PROBLEM"], &server.orphaned_wal.iter().map(row).collect::<Vec<_>>())
            })
        }
        WalCommand::Forget { tenant_id, timeline_id, yes } => {
            if !yes {
                confirm(&format!("Give up the WAL of tenant {tenant_id} that only this server holds?"))?;
            }
            let query = timeline_id.as_deref().map_or_else(String::new, |id| format!("?timeline_id={}", segment(id)));
            let path = format!("server/orphaned-wal/{}{query}", segment(&tenant_id));
            let forgotten: ForgottenWal = client.call(Method::DELETE, &path, None::<&()>).await?;
            output::print(json, &forgotten, || format!("the WAL of {} timelines is given up", forgotten.timelines))
        }
    }
}
