//! `varve host`: runs computes on this machine for a control plane elsewhere, and the compute processes themselves.

use std::io::Read as _;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use varve_api::token::Token;
use varve_host::agent::{self, HostConfig, Sandboxing, TokenSource};
use varve_host::bin_dirs::BinDirs;
use varve_host::cgroup::Limits;
use varve_host::dirs::{Isolation, User};
use varve_host::process::{self, ProcessConfig};
use varve_host::sandbox::NetworkAccess;

use super::dev;
use crate::host_token;

/// How a host keeps computes apart.
#[derive(Debug, Args)]
pub(crate) struct SandboxArgs {
    /// Keep each compute in a sandbox of its own (full; only root can), or run it as a user of this machine (none; for
    /// one tenant whom you trust).
    #[arg(long, value_enum, default_value_t = Sandbox::Full)]
    sandbox: Sandbox,
    /// What computes see of networks: one of their own, on which nothing leads out, or the host's.
    #[arg(long, value_enum, default_value_t = Network::Own)]
    compute_network: Network,
    /// User ids of sandboxes, as first-last: nobody else's on this machine.
    #[arg(long, default_value = "2000000-2065535", value_parser = uid_range)]
    uids: Range<u32>,
    /// Processors that a compute may use, such as 0.5; without it all that are free.
    #[arg(long, value_parser = processors)]
    compute_cpus: Option<u64>,
    /// Megabytes of memory that a compute may use, with what the kernel caches for it; without it half of the
    /// machine's.
    #[arg(long, value_parser = clap::value_parser!(u64).range(64..=1 << 24))]
    compute_memory_mb: Option<u64>,
}

/// Processes and threads of a compute: far beyond what Postgres takes by default.
const PROCESSES_MAX: u64 = 4096;

/// Processors, in thousandths.
fn processors(text: &str) -> Result<u64, String> {
    let wrong = || "write a number of processors from 0.05 to 1024".to_owned();
    let number: f64 = text.parse().map_err(|_| wrong())?;
    if (0.05..=1024.0).contains(&number) { Ok((number * 1000.0) as u64) } else { Err(wrong()) }
}

/// Half of the machine's memory: one compute leaves something for all else.
fn half_of_the_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into()) / 2
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sandbox {
    Full,
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Network {
    Own,
    Host,
}

impl SandboxArgs {
    pub(crate) fn sandboxing(self) -> Sandboxing {
        let network = match self.compute_network {
            Network::Own => NetworkAccess::Own,
            Network::Host => NetworkAccess::Host,
        };
        match self.sandbox {
            Sandbox::Full => {
                let memory = self.compute_memory_mb.map_or_else(half_of_the_memory, |megabytes| megabytes << 20);
                let limits = Limits { cpu_milli: self.compute_cpus, memory_bytes: Some(memory), processes: PROCESSES_MAX };
                Sandboxing::Full { uids: self.uids, network, limits }
            }
            Sandbox::None => Sandboxing::None,
        }
    }
}

/// Lowest user id of a sandbox: below are those of the system and its people.
const UID_MIN: u32 = 100_000;

fn uid_range(text: &str) -> Result<Range<u32>, String> {
    let wrong = || format!("write first-last, with numbers from {UID_MIN} to {}", u32::MAX - 2);
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let (first, last): (u32, u32) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first < UID_MIN || last < first || last >= u32::MAX - 1 { Err(wrong()) } else { Ok(first..last + 1) }
}

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
    /// Megabytes of disk that the block cache of each compute may take; 0: whatever there is. What a compute has
    /// written stays in it, even beyond that.
    #[arg(long, default_value_t = COMPUTE_CACHE_MB)]
    compute_cache_mb: u64,
    /// Megabytes of disk that the pg_wal of each compute may take, at least 128, of a small disk a quarter at most; 0:
    /// whatever there is. At the cap who writes waits until the pageserver has stored more.
    #[arg(long, default_value_t = COMPUTE_WAL_MB)]
    compute_wal_mb: u64,
    /// Folder of sockets, with a short path; by default /run/varve for root, else run in --data.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    #[command(flatten)]
    sandbox: SandboxArgs,
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
        cache_bytes: limit_bytes(args.compute_cache_mb),
        wal_bytes: limit_bytes(args.compute_wal_mb),
        run_dir: args.run_dir,
        program: std::env::current_exe().context("the path of this program is not known")?,
        sandboxing: args.sandbox.sandboxing(),
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

/// How large the cache of a compute may be by default: large enough for the hot set of most, and ten of them fit a
/// disk.
pub(crate) const COMPUTE_CACHE_MB: u64 = 10_240;

/// How large a `pg_wal` may be by default: some minutes of a server that is away, under heavy load.
pub(crate) const COMPUTE_WAL_MB: u64 = 4096;

/// An argument in megabytes, of which 0 means no limit.
pub(crate) fn limit_bytes(megabytes: u64) -> Option<u64> {
    (megabytes > 0).then(|| megabytes.saturating_mul(1 << 20))
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
    /// User id of the sandbox; without it there is none.
    #[arg(long)]
    uid: Option<u32>,
    #[arg(long, default_value = "own")]
    network: NetworkAccess,
    #[arg(long, default_value_t = PROCESSES_MAX)]
    processes: u64,
    #[arg(long)]
    cpu_milli: Option<u64>,
    #[arg(long)]
    memory_bytes: Option<u64>,
    #[arg(long)]
    cache_bytes: Option<u64>,
    #[arg(long)]
    wal_bytes: Option<u64>,
}

/// One compute's mount and supervisor. The line on standard input, a token, is the host's word that it knows of us;
/// without it we end.
pub(crate) async fn compute_process(args: ComputeProcessArgs) -> anyhow::Result<()> {
    dev::log_to_stderr();
    let mut line = String::new();
    std::io::stdin().take(8192).read_to_string(&mut line).context("no token on standard input")?;
    let token = Token::parse(&line).context("the host said nothing: it ended, or does not want this process any more")?;
    let isolation = match args.uid {
        Some(uid) => {
            let limits = Limits { cpu_milli: args.cpu_milli, memory_bytes: args.memory_bytes, processes: args.processes };
            Isolation::Sandbox { uid, network: args.network, limits }
        }
        None => Isolation::None(User::for_postgres()?),
    };
    let config = ProcessConfig {
        isolation,
        server_url: args.server,
        id: args.id,
        host: args.host,
        home: args.home,
        run_dir: args.run_dir,
        token,
        token_file: args.token_file,
        bin_dirs: BinDirs::new(args.pg_bin_dir),
        cache_bytes: args.cache_bytes,
        wal_bytes: args.wal_bytes,
    };
    Ok(process::run(config).await?)
}
