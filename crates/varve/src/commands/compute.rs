//! `varve compute` and `varve psql`.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{Compute, NewCompute};

use super::BranchPath;
use super::branch::MomentArgs;
use crate::client::{Client, segment};
use crate::output;
use crate::progress::spinner;

#[derive(Debug, Subcommand)]
pub(crate) enum ComputeCommand {
    /// Start a Postgres on a branch; one that writes it already is fenced. With --at or --lsn: on that moment, to look at, thrown away afterwards.
    Start {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Port to listen on; a free one by default.
        #[arg(long)]
        port: Option<u16>,
        /// Addresses to listen on, as Postgres's listen_addresses.
        #[arg(long, default_value = "127.0.0.1")]
        listen: String,
        #[command(flatten)]
        moment: MomentArgs,
    },
    /// Stop a compute cleanly.
    Stop {
        /// The branch, as tenant/branch, or a compute's id.
        what: String,
    },
    /// List the computes.
    List,
}

pub(crate) async fn run(command: ComputeCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        ComputeCommand::Start { branch, port, listen, moment } => {
            let body = NewCompute { port, listen: Some(listen), lsn: moment.lsn, at: moment.at };
            let path = format!("{}/computes", branch.api());
            let compute: Compute = spinner("starting Postgres", client.post(&path, &body)).await?;
            output::print(json, &compute, || compute.conninfo.clone())
        }
        ComputeCommand::Stop { what } => {
            let ids: Vec<String> = if what.contains('/') {
                let branch: BranchPath = what.parse().map_err(anyhow::Error::msg)?;
                let computes: Vec<Compute> = client.get(&format!("{}/computes", branch.api())).await?;
                computes.into_iter().map(|compute| compute.id).collect()
            } else {
                vec![what.clone()]
            };
            if ids.is_empty() {
                bail!("no compute runs on {what}");
            }
            let mut stopped = Vec::new();
            for id in ids {
                let path = format!("computes/{}", segment(&id));
                let answer: serde_json::Value = spinner("stopping", client.call(Method::DELETE, &path, None::<&()>)).await?;
                stopped.push(answer);
            }
            output::print(json, &stopped, || format!("stopped {what}"))
        }
        ComputeCommand::List => {
            let computes: Vec<Compute> = client.get("computes").await?;
            output::print(json, &computes, || {
                let rows: Vec<Vec<String>> = computes
                    .iter()
                    .map(|c| {
                        vec![
                            c.branch.clone(),
                            c.lsn.clone().unwrap_or_default(),
                            c.state.clone(),
                            c.port.to_string(),
                            c.pid.map(|pid| pid.to_string()).unwrap_or_default(),
                            c.id.clone(),
                            c.error.clone().unwrap_or_default(),
                        ]
                    })
                    .collect();
                output::table(&["BRANCH", "AT", "STATE", "PORT", "PID", "ID", "ERROR"], &rows)
            })
        }
    }
}

/// Runs psql on the branch's compute, starting one if none runs.
pub(crate) async fn psql(branch: &BranchPath, args: &[String], client: &Client) -> anyhow::Result<ExitCode> {
    let path = format!("{}/computes", branch.api());
    let computes: Vec<Compute> = client.get(&path).await?;
    let running = computes.into_iter().find(|compute| compute.state == "running" && compute.lsn.is_none());
    let compute = match running {
        Some(compute) => compute,
        None => spinner("starting Postgres", client.post(&path, &NewCompute::default())).await?,
    };
    let status = tokio::process::Command::new("psql")
        .arg(&compute.conninfo)
        .args(args)
        .status()
        .await
        .context("psql cannot be run: install the Postgres client (Debian: postgresql-client)")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
