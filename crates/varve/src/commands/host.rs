//! `varve host`: runs computes on this machine for a control plane elsewhere, and the compute processes themselves.

use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use varve_api::token::Token;
use varve_host::agent::{self, HostConfig, TokenSource};
use varve_host::bin_dirs::BinDirs;
use varve_host::process::{self, ProcessConfig};

use super::dev;
use crate::host_token;

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Address of the control plane's HTTP API.
    #[arg(long)]
    control: String,
    /// Folder of this host: its id, records of computes, their caches and pg_wal.
    #[arg(long)]
    data: PathBuf,
    /// File with the token that the control plane gave this host.
    #[arg(long)]
    token_file: PathBuf,
    /// Where the binaries of a Postgres version are, as 15=/usr/lib/postgresql/15/bin; may be given several times.
    #[arg(long, value_parser = dev::version_and_folder)]
    pg_bin_dir: Vec<(u32, PathBuf)>,
    /// Folder of sockets, with a short path; by default /run/varve for root, else run in --data.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Name of this host, for people; by default the machine's.
    #[arg(long)]
    name: Option<String>,
}

pub(crate) async fn run(args: HostArgs) -> anyhow::Result<()> {
    dev::log_to_stderr();
    host_token::read_token(&args.token_file)?;
    let config = HostConfig {
        data: args.data,
        control_url: args.control,
        token: TokenSource::File(args.token_file.canonicalize()?),
        name: args.name.unwrap_or_else(machine_name),
        pg_bin_dirs: args.pg_bin_dir,
        run_dir: args.run_dir,
        program: std::env::current_exe().context("the path of this program is not known")?,
    };
    let shutdown = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let told = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("the host ends; its computes go on");
        told.cancel();
    });
    Ok(agent::run(config, shutdown).await?)
}

/// The machine's name.
pub(crate) fn machine_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[derive(Debug, Args)]
pub(crate) struct ComputeProcessArgs {
    #[arg(long)]
    server: String,
    #[arg(long)]
    id: String,
    #[arg(long)]
    host: String,
    #[arg(long)]
    home: PathBuf,
    #[arg(long)]
    run_dir: PathBuf,
    #[arg(long)]
    token_file: PathBuf,
    #[arg(long, value_parser = dev::version_and_folder)]
    pg_bin_dir: Vec<(u32, PathBuf)>,
}

/// One compute's mount and supervisor. The line on standard input, a token, is the host's word that it knows of us;
/// without it we end.
pub(crate) async fn compute_process(args: ComputeProcessArgs) -> anyhow::Result<()> {
    dev::log_to_stderr();
    let mut line = String::new();
    std::io::stdin().take(8192).read_to_string(&mut line).context("no token on standard input")?;
    let token = Token::parse(&line).context("the host said nothing: it ended, or does not want this process any more")?;
    let config = ProcessConfig {
        server_url: args.server,
        id: args.id,
        host: args.host,
        home: args.home,
        run_dir: args.run_dir,
        token,
        token_file: args.token_file,
        bin_dirs: BinDirs::new(args.pg_bin_dir),
    };
    Ok(process::run(config).await?)
}
