//! The command line.

mod bench;
mod bench_redo;
mod bench_store;
mod branch;
mod compute;
mod dev;
mod host;
mod materialize;
mod scrub;
mod settings;
mod size;
mod snapshot;
mod tenant;
mod verify;
mod verify_restore;
mod wal;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::client::Client;

/// A Postgres of its own for every tenant, with branches and restores that cost nothing.
#[derive(Debug, Parser)]
#[command(name = "varve", version, about)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The server's admin address.
    #[arg(long, global = true, env = "VARVE_URL", default_value = "http://127.0.0.1:9898")]
    pub(crate) url: String,
    /// Print one JSON value.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run pageserver, page service and admin HTTP in this process.
    Dev(dev::DevArgs),
    /// Tenants: one for each customer.
    #[command(subcommand)]
    Tenant(tenant::TenantCommand),
    /// Branches of a tenant: named, writable histories.
    #[command(subcommand)]
    Branch(branch::BranchCommand),
    /// Snapshots: moments of branches that have a name, and stay.
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Computes: stock Postgres servers on a branch.
    #[command(subcommand)]
    Compute(compute::ComputeCommand),
    /// Settings of a branch, while no compute runs on it: the way back from one that keeps it from starting.
    #[command(subcommand)]
    Settings(settings::SettingsCommand),
    /// WAL that the server keeps though no log in the store knows of it.
    #[command(subcommand)]
    Wal(wal::WalCommand),
    /// Run psql on a branch's compute, which is started if need be.
    Psql {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// Arguments for psql.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Download a branch at a moment as a plain data directory, for any stock Postgres.
    Materialize(materialize::MaterializeArgs),
    /// Measure a running server, or redo.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Check redo, or a branch's pages, against Postgres.
    #[command(subcommand)]
    Verify(verify::VerifyCommand),
    /// Read a whole store, or one tenant's part, and check every checksum and reference; servers may go on meanwhile.
    Scrub(scrub::ScrubArgs),
    /// Run computes on this machine for a control plane.
    Host(host::HostArgs),
    /// One compute's mount and supervisor; started by the host.
    #[command(hide = true)]
    ComputeProcess(host::ComputeProcessArgs),
    /// Makes the namespaces of a compute's sandbox.
    #[command(hide = true)]
    SandboxLaunch(SandboxArgs),
    /// The first process of a compute's sandbox.
    #[command(hide = true)]
    SandboxInit(SandboxArgs),
}

/// What the processes of a sandbox are told.
#[derive(Debug, Args)]
pub(crate) struct SandboxArgs {
    #[arg(long)]
    spec: String,
}

/// Does what is to be done by a process of one thread, and gives its exit status; none for all else.
pub(crate) fn run_alone(cli: &Cli) -> Option<i32> {
    match &cli.command {
        Command::SandboxLaunch(args) => Some(varve_host::sandbox::launch(&args.spec)),
        Command::SandboxInit(args) => Some(varve_host::sandbox::init(&args.spec)),
        _ => None,
    }
}

/// A branch as a person writes it: `tenant/branch`.
#[derive(Clone, Debug)]
pub(crate) struct BranchPath {
    pub(crate) tenant: String,
    pub(crate) branch: String,
}

impl std::str::FromStr for BranchPath {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((tenant, branch)) if !tenant.is_empty() && !branch.is_empty() && !branch.contains('/') => {
                Ok(BranchPath { tenant: tenant.to_owned(), branch: branch.to_owned() })
            }
            _ => Err(format!("'{text}' names no branch: write tenant/branch, such as acme/main")),
        }
    }
}

impl BranchPath {
    /// Path of the branch in the API.
    pub(crate) fn api(&self) -> String {
        format!("tenants/{}/branches/{}", crate::client::segment(&self.tenant), crate::client::segment(&self.branch))
    }
}

impl std::fmt::Display for BranchPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.tenant, self.branch)
    }
}

pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Common { url, json } = cli.common;
    match cli.command {
        Command::Dev(args) => dev::run(args).await?,
        Command::Tenant(command) => return tenant::run(command, &Client::new(&url)?, json).await,
        Command::Snapshot(command) => snapshot::run(command, &Client::new(&url)?, json).await?,
        Command::Branch(command) => branch::run(command, &Client::new(&url)?, json).await?,
        Command::Compute(command) => compute::run(command, &Client::new(&url)?, json).await?,
        Command::Settings(command) => settings::run(command, &Client::new(&url)?, json).await?,
        Command::Wal(command) => wal::run(command, &Client::new(&url)?, json).await?,
        Command::Psql { branch, args } => return compute::psql(&branch, &args, &Client::new(&url)?).await,
        Command::Materialize(args) => materialize::run(args, &Client::new(&url)?, json).await?,
        Command::Bench(command) => bench::run(command, &Client::new(&url)?, json).await?,
        Command::Verify(command) => return verify::run(command, &Client::new(&url)?, json).await,
        Command::Scrub(args) if args.status => scrub::show_status(&Client::new(&url)?, json).await?,
        Command::Scrub(args) => return scrub::run(args, json).await,
        Command::Host(args) => host::run(args).await?,
        Command::ComputeProcess(args) => host::compute_process(args).await?,
        Command::SandboxLaunch(_) | Command::SandboxInit(_) => anyhow::bail!("a sandbox is made by a process of one thread"),
    }
    Ok(ExitCode::SUCCESS)
}
