//! What the mount costs: Postgres on it against Postgres on a plain directory, run in turn (A B A B) because placement noise is large.
//!
//! `cargo run --release -p varve-compute --example mount_bench -- [--scale 50] [--seconds 10] [--rounds 3] [--clients 4]`, as root.

#[path = "../tests/support/mod.rs"]
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
use varve_testing::postgres::Postgres;

const CATALOG_VERSION_15: u32 = 202_209_061;
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
    let source = StoppedCluster::new(&origin.data_dir(), Major::V15, CATALOG_VERSION_15);

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
    let mounted = Mounted::start(source, |_| {});
    let plain_dir = support::scratch("plain");
    let plain_data = plain_dir.path().join("data");
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::metadata(source.data_dir()).expect("the cluster");
    support::cluster::copy_directory(source.data_dir(), &plain_data, owner.uid(), owner.gid());
    let settings = [("shared_buffers", "128MB"), ("max_wal_size", "4GB")];
    for (name, args) in [("-S", ["-S"].as_slice()), ("TPC-B", &[]), ("TPC-B -N", &["-N"])] {
        let mut ratios = Vec::new();
        for round in 0..options.rounds {
            let mut tps = [0.0; 2];
            for (side, data, dir) in [(0, plain_data.as_path(), plain_dir.path()), (1, &mounted.data(), mounted.dir.path())] {
                let server = Server::start(data, dir, &settings);
                tps[side] = pgbench(&server, args, options);
                drop_server(server);
            }
            println!("{name}: round {round}: plain {:.0} tps, mount {:.0} tps, ratio {:.3}", tps[0], tps[1], tps[1] / tps[0]);
            ratios.push(tps[1] / tps[0]);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{name}, {} clients: median ratio {:.3}", options.clients, ratios[ratios.len() / 2]);
    }
}

fn drop_server(mut server: Server) {
    server.stop("fast");
}

fn pgbench(server: &Server, args: &[&str], options: &Options) -> f64 {
    // Everything into the caches first.
    server.psql("postgres", "SELECT sum(abalance) FROM pgbench_accounts");
    server.psql("postgres", "CHECKPOINT");
    let (seconds, clients) = (options.seconds.to_string(), options.clients.to_string());
    let mut all = vec!["-n", "-T", &seconds, "-c", &clients, "-M", "prepared"];
    all.extend_from_slice(args);
    let output = server.run("pgbench", &all);
    let tps = output.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("pgbench prints a rate:\n{output}"))
}
