//! What the mount costs: Postgres on it against Postgres on a plain directory, run in turn (A B A B) because placement
//! noise is large.
//!
//! `cargo run --release -p varve-compute --example mount_bench -- [--scale 50] [--seconds 10] [--rounds 3] [--clients
//! 4]`, as root.

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use support::{Mounted, Server, StoppedCluster};
use varve_postgres::Major;
use varve_testbed::postgres::Postgres;

const BLOCK: usize = 8192;

struct Options {
    scale: u32,
    seconds: u32,
    rounds: usize,
    clients: u32,
}

fn options() -> Options {
    let mut options = Options { scale: 50, seconds: 10, rounds: 3, clients: 4 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().and_then(|value| value.parse().ok());
        let value: u32 = value.unwrap_or_else(|| panic!("{arg} needs a number"));
        match arg.as_str() {
            "--scale" => options.scale = value,
            "--seconds" => options.seconds = value,
            "--rounds" => options.rounds = value as usize,
            "--clients" => options.clients = value,
            _ => panic!("unknown option {arg}"),
        }
    }
    options
}

fn main() {
    let options = options();
    let mut origin = Postgres::init(Major::V15, &[], &[]).expect("a cluster");
    origin.start().expect("it starts");
    let mut pgbench = origin.command("pgbench").expect("pgbench");
    let scale = options.scale.to_string();
    let made = pgbench.args(["-i", "-q", "-s", &scale, "-h"]).arg(origin.dir()).args(["-U", "postgres", "postgres"]).output();
    assert!(made.expect("pgbench runs").status.success(), "pgbench -i succeeds");
    let accounts = origin.psql("postgres", "SELECT pg_relation_filepath('pgbench_accounts')").expect("a path");
    origin.stop("fast").expect("it stops");
    let source = StoppedCluster::open(&origin.data_dir());

    raw_reads(&source, accounts.trim());
    start_up(&source);
    pgbench_ratios(&source, &options);
}

fn raw_reads(source: &Arc<StoppedCluster>, accounts: &str) {
    let mounted = Mounted::start(source, |_| {});
    let file = File::open(mounted.data().join(accounts)).expect("the table's file");
    let blocks = file.metadata().expect("its size").len() / BLOCK as u64;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
    let mut page = vec![0; BLOCK];
    let mut times = Vec::new();
    let mut again = Vec::new();
    for n in 0..4000u64 {
        let block = n.wrapping_mul(2_654_435_761) % blocks;
        let started = Instant::now();
        file.read_exact_at(&mut page, block * BLOCK as u64).expect("a block");
        times.push(started.elapsed());
        let started = Instant::now();
        file.read_exact_at(&mut page, block * BLOCK as u64).expect("the block again");
        again.push(started.elapsed());
    }
    println!("first touch of a block:  p50 {:?}  p99 {:?}", percentile(&mut times, 50), percentile(&mut times, 99));
    println!("the same block again:    p50 {:?}  p99 {:?}", percentile(&mut again, 50), percentile(&mut again, 99));
    drop(file);
    drop(mounted);

    let mounted = Mounted::start(source, |_| {});
    let before = mounted.mount().statistics();
    let (bytes, elapsed) = read_sequentially(&mounted.data().join(accounts));
    let after = mounted.mount().statistics();
    println!(
        "sequential first read:   {:.0} MB/s, {:.0} KiB a fetch",
        bytes as f64 / 1e6 / elapsed.as_secs_f64(),
        (after.blocks_fetched - before.blocks_fetched) as f64 * 8.0 / (after.fetches - before.fetches) as f64
    );
    drop(mounted);
    let (bytes, elapsed) = read_sequentially(&source.data_dir().join(accounts));
    println!("the same from plain:     {:.0} MB/s (page cache)", bytes as f64 / 1e6 / elapsed.as_secs_f64());
}

fn read_sequentially(path: &Path) -> (u64, Duration) {
    let file = File::open(path).expect("the table's file");
    let blocks = (file.metadata().expect("its size").len() / BLOCK as u64).min(32_768);
    let mut page = vec![0; BLOCK];
    let started = Instant::now();
    for block in 0..blocks {
        file.read_exact_at(&mut page, block * BLOCK as u64).expect("a block");
    }
    (blocks * BLOCK as u64, started.elapsed())
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

fn start_up(source: &Arc<StoppedCluster>) {
    let mut set = Vec::new();
    for prefetched in [false, false, true, true] {
        let mounted = Mounted::start(source, |_| {});
        let mount_time = mounted.start_time;
        let started = Instant::now();
        if prefetched {
            mounted.mount().prefetch(&set).expect("prefetch");
        }
        let prefetch_time = started.elapsed();
        let started = Instant::now();
        let server = mounted.postgres(&[]);
        let start_time = started.elapsed();
        server.psql("postgres", "SELECT 1");
        println!(
            "start: mount {mount_time:?}, prefetch {prefetch_time:?}, pg_ctl start {start_time:?}; {:?}",
            mounted.mount().statistics()
        );
        set = mounted.mount().touched_blocks();
        println!("  {} blocks in the start-up set", set.len());
    }
}

fn pgbench_ratios(source: &Arc<StoppedCluster>, options: &Options) {
    use std::os::unix::fs::MetadataExt;
    let mounted = Mounted::start(source, |_| {});
    let plain_dir = support::scratch("plain");
    let plain_data = plain_dir.path().join("data");
    let owner = std::fs::metadata(source.data_dir()).expect("the cluster");
    support::cluster::copy_directory(source.data_dir(), &plain_data, owner.uid(), owner.gid());
    rustix::fs::sync();
    let settings = [("shared_buffers", "128MB"), ("max_wal_size", "8GB"), ("checkpoint_timeout", "1d"), ("autovacuum", "off")];
    let plain = Server::start(&plain_data, plain_dir.path(), &settings);
    let mount = Server::start(&mounted.data(), mounted.dir.path(), &settings);
    for server in [&plain, &mount] {
        server.psql("postgres", "SELECT sum(abalance) FROM pgbench_accounts");
    }
    for (name, args) in [("-S", ["-S"].as_slice()), ("TPC-B", &[]), ("TPC-B -N", &["-N"])] {
        let (mut speed, mut work, mut best) = (Vec::new(), Vec::new(), [0.0_f64; 2]);
        for _ in 0..options.rounds {
            for server in [&plain, &mount] {
                server.psql("postgres", "CHECKPOINT");
            }
            let [a, b] = [&plain, &mount].map(|server| pgbench(server, args, options));
            speed.push(b.tps / a.tps);
            work.push(b.cpu_us / a.cpu_us);
            best = [best[0].max(a.tps), best[1].max(b.tps)];
            println!(
                "{name}: plain {:.0} tps, {:.1} us of CPU each; mount {:.0} tps, {:.1} us; ratios {:.3} and {:.3}",
                a.tps,
                a.cpu_us,
                b.tps,
                b.cpu_us,
                b.tps / a.tps,
                b.cpu_us / a.cpu_us
            );
        }
        println!(
            "{name}, {} clients: median ratio of speed {:.3}, of CPU time {:.3}; ratio of the best rounds {:.3}",
            options.clients,
            median(&mut speed),
            median(&mut work),
            best[1] / best[0]
        );
    }
}

fn median(ratios: &mut [f64]) -> f64 {
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

struct Run {
    tps: f64,
    /// CPU time of client, server and mount for each transaction.
    cpu_us: f64,
}

fn pgbench(server: &Server, args: &[&str], options: &Options) -> Run {
    let (seconds, clients) = (options.seconds.to_string(), options.clients.to_string());
    let mut all = vec!["-n", "-T", &seconds, "-c", &clients, "-M", "prepared"];
    all.extend_from_slice(args);
    let before = cpu_time(server);
    let output = server.run("pgbench", &all);
    let used = cpu_time(server) - before;
    let number = |label: &str| -> f64 {
        let line = output.lines().find_map(|line| line.strip_prefix(label)).unwrap_or_else(|| panic!("pgbench prints {label}:\n{output}"));
        line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("a number: {line}"))
    };
    Run { tps: number("tps = "), cpu_us: used.as_secs_f64() * 1e6 / number("number of transactions actually processed: ") }
}

/// CPU time that this process (with the mount), its children, and the server have used so far. Shows what tps hides on
/// a machine that others use as well.
fn cpu_time(server: &Server) -> Duration {
    const TICKS_PER_SECOND: u64 = 100;
    // utime, stime, and those of children that have ended, counted from behind the command's name.
    let ticks = |pid: i32, children: bool| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        fields.skip(11).take(if children { 4 } else { 2 }).filter_map(|field| field.parse::<u64>().ok()).sum()
    };
    let postmaster = server.postmaster_pid();
    let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(|pid| ticks(pid, false)).sum::<u64>();
    let all = ticks(postmaster, true) + children + ticks(std::process::id() as i32, true);
    Duration::from_millis(all * 1000 / TICKS_PER_SECOND)
}
