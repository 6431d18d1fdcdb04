//! A WAL sink in memory whose disk and store can be made to wait, and a Postgres to receive from.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use varve_pageserver::wal_receiver::{ReceiverConfig, SinkError, SlotConfig, WalSink};
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_postgres::wal::FramedRecord;
use varve_postgres::{Lsn, Major};
use varve_protocol::{ConnectConfig, Endpoint};
use varve_testbed::postgres::Postgres;

#[derive(Default)]
struct Log {
    start: Lsn,
    bytes: Vec<u8>,
    framed: Lsn,
    last_record: Option<Lsn>,
    records: u64,
    disk_stuck: bool,
    /// Appends until one fails for want of space, having kept a part of its bytes; none fails if this is 0.
    appends_between_failures: u64,
    appends: u64,
}

/// See the module.
#[derive(Default)]
pub(crate) struct MemoryWal {
    log: Mutex<Log>,
    disk: Condvar,
    store: AtomicU64,
    pub(crate) syncs: AtomicUsize,
}

/// One receiver's hold on it.
pub(crate) struct MemorySink(pub(crate) Arc<MemoryWal>);

impl MemoryWal {
    pub(crate) fn new(start: Lsn) -> Arc<MemoryWal> {
        let log = Log { start, framed: start, ..Log::default() };
        Arc::new(MemoryWal { log: Mutex::new(log), store: AtomicU64::new(start.0), ..MemoryWal::default() })
    }

    /// While it is stuck, syncs do not return.
    pub(crate) fn set_disk_stuck(&self, stuck: bool) {
        self.log.lock().disk_stuck = stuck;
        self.disk.notify_all();
    }

    /// Every so many appends there is no space, for once.
    pub(crate) fn fail_every(&self, appends: u64) {
        self.log.lock().appends_between_failures = appends;
    }

    pub(crate) fn set_store_durable(&self, lsn: Lsn) {
        self.store.store(lsn.0, Ordering::SeqCst);
    }

    pub(crate) fn framed(&self) -> Lsn {
        self.log.lock().framed
    }

    pub(crate) fn last_record(&self) -> Option<Lsn> {
        self.log.lock().last_record
    }

    pub(crate) fn records(&self) -> u64 {
        self.log.lock().records
    }

    /// Every byte up to the last whole record must be the one that the primary has on disk.
    pub(crate) fn assert_same_as(&self, postgres: &Postgres) {
        let log = self.log.lock();
        assert!(log.framed > log.start, "no record came at all");
        let dir = postgres.data_dir().join("pg_wal");
        let mut at = log.start;
        while at < log.framed {
            let end = (at.segment_start() + WAL_SEGMENT_SIZE).min(log.framed);
            let name = varve_postgres::lsn::wal_segment_name(1, at.segment_number());
            let segment = std::fs::read(dir.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            let theirs = &segment[at.segment_offset() as usize..][..(end.0 - at.0) as usize];
            let ours = &log.bytes[(at.0 - log.start.0) as usize..(end.0 - log.start.0) as usize];
            if let Some(differs) = theirs.iter().zip(ours).position(|(a, b)| a != b) {
                panic!("what was received differs from the primary's {name} at {}", at + differs as u64);
            }
            at = end;
        }
    }
}

impl WalSink for MemorySink {
    fn append(&mut self, start: Lsn, bytes: Bytes) -> Result<(), SinkError> {
        let mut log = self.0.log.lock();
        let end = log.start + log.bytes.len() as u64;
        assert!(
            start == end || start == log.framed,
            "an append at {start}: expected {end}, or {} for the first of a connection",
            log.framed
        );
        let keep = (start.0 - log.start.0) as usize;
        log.bytes.truncate(keep);
        log.appends += 1;
        if log.appends_between_failures > 0 && log.appends.is_multiple_of(log.appends_between_failures) {
            log.bytes.extend_from_slice(&bytes[..bytes.len() / 2]);
            return Err(SinkError::NotNow(Arc::new(std::io::Error::from(std::io::ErrorKind::StorageFull))));
        }
        log.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    fn records(&mut self, records: &mut Vec<FramedRecord>) -> Result<(), SinkError> {
        let mut log = self.0.log.lock();
        for record in records.drain(..) {
            assert!(record.start >= log.framed, "record at {} begins before {}", record.start, log.framed);
            log.framed = record.end;
            log.last_record = Some(record.start);
            log.records += 1;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<Lsn, SinkError> {
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        let mut log = self.0.log.lock();
        while log.disk_stuck {
            self.0.disk.wait(&mut log);
        }
        Ok(log.start + log.bytes.len() as u64)
    }

    fn store_durable(&self) -> Lsn {
        Lsn(self.0.store.load(Ordering::SeqCst))
    }

    fn awaited(&self) -> Lsn {
        Lsn::MAX
    }

    fn not_needed_before(&self) -> Lsn {
        self.store_durable()
    }
}

/// A primary that waits for the standby `standby_name`, if there is a name.
pub(crate) fn primary(standby_name: &str, settings: &[(&str, &str)]) -> Postgres {
    let names = format!("'{standby_name}'");
    let mut all =
        vec![("max_wal_size", "4GB"), ("wal_keep_size", "4GB"), ("wal_sender_timeout", "10s"), ("synchronous_standby_names", &names)];
    all.extend(settings);
    let mut postgres = Postgres::init(Major::V15, &[], &all).expect("a cluster");
    postgres.start().expect("a running Postgres");
    postgres
}

/// Where its WAL stands.
pub(crate) fn flushed(postgres: &Postgres) -> Lsn {
    postgres.psql("postgres", "SELECT pg_current_wal_flush_lsn()").expect("a position").trim().parse().expect("an LSN")
}

pub(crate) fn insert_position(postgres: &Postgres) -> Lsn {
    postgres.psql("postgres", "SELECT pg_current_wal_insert_lsn()").expect("a position").trim().parse().expect("an LSN")
}

/// A start of a record: the redo point of the last checkpoint.
pub(crate) fn redo_point(postgres: &Postgres) -> Lsn {
    postgres.psql("postgres", "SELECT redo_lsn FROM pg_control_checkpoint()").expect("a position").trim().parse().expect("an LSN")
}

/// What it takes to receive from `postgres` as `standby_name`, from `start` on.
pub(crate) fn config(postgres: &Postgres, standby_name: &str, start: Lsn) -> ReceiverConfig {
    let identifier = postgres.psql("postgres", "SELECT system_identifier FROM pg_control_system()").expect("an identifier");
    ReceiverConfig {
        label: "acme/main".to_owned(),
        connect: ConnectConfig::new(Endpoint::unix(postgres.dir(), 5432), "postgres"),
        standby_name: standby_name.to_owned(),
        system_identifier: identifier.trim().parse().expect("a number"),
        major: Major::V15,
        tli: 1,
        base: start,
        start,
        last_record: None,
        settings: Vec::new(),
        synchronous_standby_names: Some(standby_name.to_owned()),
        slot: None,
    }
}

/// The slot `varve`, advanced several times a second.
pub(crate) fn quick_slot() -> Option<SlotConfig> {
    Some(SlotConfig { name: "varve".to_owned(), interval: Duration::from_millis(200) })
}
