//! `varve compute` and `varve psql`.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use reqwest::Method;
use varve_api::admin::{BranchSize, Compute, Event, NewCompute, Stopped};
use varve_api::size::{self, Between};

use super::BranchPath;
use super::branch::MomentArgs;
use super::settings::NameValue;
use super::size::SizeArgs;
use crate::client::{Client, segment};
use crate::output;
use crate::progress::spinner;

#[derive(Debug, Subcommand)]
pub(crate) enum ComputeCommand {
    /// See to it that a Postgres runs on a branch; one that runs already is left alone. With --at or --lsn: on that
    /// moment, to look at, thrown away afterwards.
    Start {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Port to listen on; by default the one that it had before, at first a free one.
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        port: Option<u16>,
        /// Addresses to listen on, as Postgres's listen_addresses; by default those that it had before, at first
        /// 127.0.0.1.
        #[arg(long)]
        listen: Option<String>,
        /// Where one runs already: end its sessions, and begin anew with these arguments.
        #[arg(long, conflicts_with_all = ["lsn", "at"])]
        replace: bool,
        /// A setting of Postgres for this start only, over those of the branch; may be given several times.
        #[arg(long, value_name = "NAME=VALUE")]
        set: Vec<NameValue>,
        #[command(flatten)]
        size: SizeArgs,
        #[command(flatten)]
        moment: MomentArgs,
    },
    /// Give the compute of a branch another size: at once where one runs, without ending a session, else at its next
    /// start. What is left out stays.
    Resize {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        #[command(flatten)]
        size: SizeArgs,
    },
    /// List what happened to the compute of a branch, oldest first.
    Events {
        /// The branch, as tenant/branch.
        branch: BranchPath,
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
        ComputeCommand::Start { branch, port, listen, replace, set, size, moment } => {
            let settings = set.into_iter().map(|NameValue { name, value }| (name, value)).collect();
            let body = NewCompute { port, listen, lsn: moment.lsn, at: moment.at, replace, settings, size: size.size() };
            let path = format!("{}/computes", branch.api());
            let compute: Compute = spinner("starting Postgres", client.post(&path, &body)).await?;
            for warning in &compute.warnings {
                eprintln!("varve: warning: {warning}");
            }
            output::print(json, &compute, || compute.conninfo.clone())
        }
        ComputeCommand::Resize { branch, size } => {
            if size.size().is_empty() {
                bail!("say what is to change: --cpu, --memory or both");
            }
            let path = format!("{}/size", branch.api());
            let resized: BranchSize = client.call(Method::PATCH, &path, Some(&size.size())).await?;
            output::print(json, &resized, || {
                let (cpu, memory) = (range(resized.size.cpu_milli, size::processors), range(resized.size.memory_bytes, size::bytes));
                format!("{}: {cpu}, {memory} of memory", resized.branch)
            })
        }
        ComputeCommand::Events { branch } => {
            let events: Vec<Event> = client.get(&format!("{}/events", branch.api())).await?;
            output::print(json, &events, || {
                let row = |event: &Event| vec![event.at.clone(), event.kind.name().to_owned(), event.words.clone()];
                output::table(&["AT", "KIND", "WHAT"], &events.iter().map(row).collect::<Vec<_>>())
            })
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
            let (mut stopped, mut failed): (Vec<Stopped>, Vec<anyhow::Error>) = (Vec::new(), Vec::new());
            for id in ids {
                let path = format!("computes/{}", segment(&id));
                match spinner("stopping", client.call(Method::DELETE, &path, None::<&()>)).await {
                    Ok(answer) => stopped.push(answer),
                    Err(error) => failed.push(error),
                }
            }
            // All are tried before any of them makes this a failure.
            for warning in stopped.iter().flat_map(|stopped| &stopped.warnings) {
                eprintln!("varve: warning: {warning}");
            }
            match failed.into_iter().next() {
                Some(error) => Err(error),
                None => output::print(json, &stopped, || format!("stopped {what}")),
            }
        }
        ComputeCommand::List => {
            let mut computes: Vec<Compute> = client.get("computes").await?;
            if json {
                // The API's list has no passwords; whoever reads JSON wants to connect.
                let shown = computes.into_iter().map(|compute| with_password(compute, client));
                computes = futures::future::try_join_all(shown).await?;
            }
            output::print(json, &computes, || {
                let rows: Vec<Vec<String>> = computes
                    .iter()
                    .map(|c| {
                        vec![
                            c.branch.clone(),
                            c.lsn.clone().unwrap_or_default(),
                            c.state.clone(),
                            c.port.to_string(),
                            range_now(c.size.cpu_milli, c.limits.and_then(|limits| limits.cpu_milli), size::processors),
                            range_now(c.size.memory_bytes, c.limits.and_then(|limits| limits.memory_bytes), size::bytes),
                            c.pid.map(|pid| pid.to_string()).unwrap_or_default(),
                            c.id.clone(),
                            c.error.clone().unwrap_or_default(),
                        ]
                    })
                    .collect();
                output::table(&["BRANCH", "AT", "STATE", "PORT", "CPU", "MEMORY", "PID", "ID", "ERROR"], &rows)
            })
        }
    }
}

/// The least and the most, as a person reads them.
fn range(between: Option<Between>, words: fn(u64) -> String) -> String {
    match between {
        None => "what the host gives".to_owned(),
        Some(Between { min, max }) if min == max => words(min),
        Some(Between { min, max }) => format!("{} to {}", words(min), words(max)),
    }
}

/// The same, with what of it is there right now.
fn range_now(between: Option<Between>, now: Option<u64>, words: fn(u64) -> String) -> String {
    match (between, now) {
        (Some(between), Some(now)) if between.min < between.max => format!("{}, now {}", range(Some(between), words), words(now)),
        (Some(between), _) => range(Some(between), words),
        (None, now) => now.map(words).unwrap_or_default(),
    }
}

/// The compute as an answer about it alone shows it: with its password. One that has just ended stays as it was listed.
async fn with_password(compute: Compute, client: &Client) -> anyhow::Result<Compute> {
    let shown = client.get::<Option<Compute>>(&format!("computes/{}", segment(&compute.id))).await;
    Ok(shown.ok().flatten().unwrap_or(compute))
}

/// Runs psql on the branch's compute, starting one if none runs.
pub(crate) async fn psql(branch: &BranchPath, args: &[String], client: &Client) -> anyhow::Result<ExitCode> {
    let path = format!("{}/computes", branch.api());
    // One that runs already is the answer.
    let compute: Compute = spinner("starting Postgres", client.post(&path, &NewCompute::default())).await?;
    let status = tokio::process::Command::new("psql")
        .arg(&compute.conninfo)
        .args(args)
        .status()
        .await
        .context("psql cannot be run: install the Postgres client (Debian: postgresql-client)")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
