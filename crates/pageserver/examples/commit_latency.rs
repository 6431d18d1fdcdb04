//! What a commit costs: stock Postgres with its own fsync, beside Postgres without any whose synchronous standby is our
//! WAL receiver on the WAL log, beside the same with stock `pg_receivewal --synchronous`. Interleaved in one run, on
//! one disk.
//!
//! `cargo run --release -p varve-pageserver --example commit_latency [-- SECONDS [ROUNDS]]` (as root, with Postgres 15
//! installed)
//!
//! Placement noise is large on small machines: quote ratios of one run, and pin with `taskset -c 1` for figures at one
//! client.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use varve_pageserver::wal_receiver::{Receiver, ReceiverConfig, ReceiverPhase, SinkError, WalSink};
use varve_postgres::wal::FramedRecord;
use varve_postgres::{Lsn, Major};
use varve_protocol::{ConnectConfig, Endpoint};
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::wal_log::{LogPosition, WalLog};
use varve_testbed::postgres::Postgres;

const EPOCH: WriterEpoch = WriterEpoch(1);
const TENANT: TenantId = TenantId([1; 16]);
const TIMELINE: TimelineId = TimelineId([2; 16]);

struct LogSink {
    log: Arc<WalLog>,
    end: Lsn,
    at: Option<LogPosition>,
}

impl WalSink for LogSink {
    fn append(&mut self, start: Lsn, bytes: Bytes) -> Result<(), SinkError> {
        self.at = Some(self.log.append(TENANT, TIMELINE, EPOCH, start, &bytes).map_err(|error| SinkError::Over(Arc::new(error)))?);
        self.end = start + bytes.len() as u64;
        Ok(())
    }
    fn records(&mut self, _records: &mut Vec<FramedRecord>) -> Result<(), SinkError> {
        Ok(())
    }
    fn sync(&mut self) -> Result<Lsn, SinkError> {
        if let Some(at) = self.at {
            self.log.sync(at).map_err(|error| SinkError::Over(Arc::new(error)))?;
        }
        Ok(self.end)
    }
    fn store_durable(&self) -> Lsn {
        self.end
    }
    fn awaited(&self) -> Lsn {
        self.end
    }
    fn not_needed_before(&self) -> Lsn {
        self.end
    }
}

fn cluster(settings: &[(&str, &str)]) -> Postgres {
    let mut postgres = Postgres::init(Major::V15, &[], settings).expect("a cluster");
    postgres.start().expect("a running Postgres");
    let mut init = postgres.command("pgbench").expect("pgbench");
    let status = init
        .args(["-i", "-q", "-s", "10", "-h"])
        .arg(postgres.dir())
        .args(["-U", "postgres", "postgres"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "pgbench -i failed");
    postgres
}

fn wait_for_standby_from_now_on(postgres: &Postgres, name: &str) {
    postgres.psql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'")).expect("ALTER SYSTEM");
    postgres.psql("postgres", "SELECT pg_reload_conf()").expect("a reload");
}

fn tps(postgres: &Postgres, clients: u32, seconds: u32) -> f64 {
    let mut run = postgres.command("pgbench").expect("pgbench");
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    run.args(["-n", "-c", &clients, "-T", &seconds, "-h"]).arg(postgres.dir()).args(["-U", "postgres", "postgres"]);
    let output = run.stderr(Stdio::piped()).output().expect("pgbench");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("tps = "))
        .unwrap_or_else(|| panic!("pgbench: {}", String::from_utf8_lossy(&output.stderr)));
    line.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

fn receiver(postgres: &Postgres, log: &Arc<WalLog>) -> Receiver<LogSink> {
    let value = |sql: &str| postgres.psql("postgres", sql).expect(sql).trim().to_owned();
    let start: Lsn = value("SELECT redo_lsn FROM pg_control_checkpoint()").parse().expect("an LSN");
    log.attach(TENANT, TIMELINE, &[(EPOCH, start)], start).expect("attach");
    let config = ReceiverConfig {
        label: "bench".to_owned(),
        connect: ConnectConfig::new(Endpoint::unix(postgres.dir(), 5432), "postgres"),
        standby_name: "varve".to_owned(),
        system_identifier: value("SELECT system_identifier FROM pg_control_system()").parse().expect("a number"),
        major: Major::V15,
        tli: 1,
        base: start,
        start,
        last_record: None,
        settings: Vec::new(),
        synchronous_standby_names: Some("varve".to_owned()),
        slot: None,
    };
    let receiver = Receiver::spawn(config, LogSink { log: log.clone(), end: start, at: None }).expect("a thread");
    assert!(receiver.wait_until(Duration::from_secs(20), |_, phase| phase == ReceiverPhase::Streaming), "{:?}", receiver.trouble());
    receiver
}

fn receivewal(postgres: &Postgres, dir: &std::path::Path) -> Child {
    postgres.psql("postgres", "SELECT pg_create_physical_replication_slot('r', true)").expect("a slot");
    let conninfo = format!("{} application_name=receivewal", postgres.conninfo("postgres"));
    let mut command = Command::new("/usr/lib/postgresql/15/bin/pg_receivewal");
    command.args(["--synchronous", "-S", "r", "-D"]).arg(dir).args(["-d", &conninfo]).stderr(Stdio::null()).spawn().expect("pg_receivewal")
}

fn main() {
    let mut args = std::env::args().skip(1);
    let seconds = args.next().and_then(|arg| arg.parse().ok()).unwrap_or(3);
    let rounds = args.next().and_then(|arg| arg.parse().ok()).unwrap_or(2);
    let dir = tempfile::tempdir().expect("a directory");
    let log = Arc::new(WalLog::open(&dir.path().join("wal"), 8 << 30).expect("a WAL log"));
    let received = dir.path().join("received");
    std::fs::create_dir(&received).expect("a directory");

    let base = [("max_wal_size", "'4GB'"), ("wal_keep_size", "'4GB'")];
    let with = |more: &[(&'static str, &'static str)]| [&base[..], more].concat();
    let stock = cluster(&with(&[("fsync", "on")]));
    let nothing = cluster(&with(&[("full_page_writes", "off")]));
    let ours = cluster(&with(&[("full_page_writes", "off")]));
    let theirs = cluster(&with(&[("full_page_writes", "off")]));
    wait_for_standby_from_now_on(&ours, "varve");
    let receiver = receiver(&ours, &log);
    wait_for_standby_from_now_on(&theirs, "receivewal");
    let mut receivewal = receivewal(&theirs, &received);

    println!("TPC-B, {seconds} s each; tps (ratio to stock)");
    for _ in 0..rounds {
        for clients in [1, 4, 16] {
            let base = tps(&stock, clients, seconds);
            print!("clients {clients:>2}: stock, own fsync {base:>6.0}");
            for (name, postgres) in [("our receiver", &ours), ("pg_receivewal", &theirs), ("no fsync at all", &nothing)] {
                let tps = tps(postgres, clients, seconds);
                print!("   {name} {tps:>6.0} ({:.2})", tps / base);
            }
            println!();
        }
    }
    let positions = receiver.positions();
    println!("received and acknowledged up to {}", positions.flushed);
    // The clusters go first: with their standby gone, nothing would ever be committed.
    let _ = receivewal.kill();
    let _ = receivewal.wait();
    drop(receiver);
}
