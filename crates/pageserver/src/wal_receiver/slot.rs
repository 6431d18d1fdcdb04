//! Keeping the slot: a physical replication slot that no stream uses, moved now and then to what the store has, so that
//! the primary retains the rest whatever happens to us. (A slot in use by the stream would follow what we flushed,
//! which is less than what can be lost with this machine.)
//!
//! Functions need a database, so this session may wait behind locks of commits that wait for us. Nothing waits for it:
//! it connects while WAL streams, so that those commits end.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use varve_postgres::Lsn;
use varve_protocol::ClientError;
use varve_protocol::ConnectConfig;
use varve_protocol::connect::blocking::Connection;

use super::shared::{ReceiverPhase, Shared};
use super::{ReceiverConfig, SlotConfig};

/// How long connecting and each statement may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before trying again while the slot does not exist yet.
const CREATE_RETRY: Duration = Duration::from_millis(200);
/// First pause after a try that was not answered, doubled up to [`UNANSWERED_PAUSE_MAX`]: what waits for a lock of a
/// tenant's goes on waiting when we have hung up, and holds a place that the WAL receiver may need.
const UNANSWERED_PAUSE_MIN: Duration = Duration::from_secs(10);
/// See [`UNANSWERED_PAUSE_MIN`].
const UNANSWERED_PAUSE_MAX: Duration = Duration::from_secs(600);
/// A connection that had nothing to do for so long is closed: it is a process on the primary.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// The thread that keeps the slot.
pub(super) struct SlotKeeper {
    thread: JoinHandle<()>,
}

impl SlotKeeper {
    pub(super) fn spawn(config: &ReceiverConfig, slot: SlotConfig, shared: Arc<Shared>) -> io::Result<SlotKeeper> {
        // A walsender, since tenants may hold all places of ordinary sessions. It writes nothing that anybody should
        // wait for a standby for.
        let connect = config
            .connect
            .clone()
            .parameter("replication", "database")
            .parameter("database", config.database.as_str())
            .parameter("application_name", "varve slot")
            .parameter("options", "-c synchronous_commit=local");
        let worker =
            Worker { label: config.label.clone(), connect, slot, shared, connection: None, moved_to: None, used_at: Instant::now() };
        let name = format!("slot-{}", config.label).chars().take(15).collect();
        Ok(SlotKeeper { thread: std::thread::Builder::new().name(name).spawn(move || worker.run())? })
    }

    /// Waits for its end, which the receiver's stop brings about.
    pub(super) fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("the thread that keeps a replication slot panicked");
        }
    }
}

struct Worker {
    label: String,
    connect: ConnectConfig,
    slot: SlotConfig,
    shared: Arc<Shared>,
    connection: Option<Connection>,
    /// Where the slot is; `None` as long as we do not know that it exists.
    moved_to: Option<Lsn>,
    used_at: Instant,
}

impl Worker {
    fn run(mut self) {
        let mut complained = false;
        let mut unanswered = UNANSWERED_PAUSE_MIN;
        loop {
            let mut pause = if self.moved_to.is_none() { CREATE_RETRY } else { self.slot.interval };
            let target = self.shared.positions().applied;
            let streams = self.shared.phase() == ReceiverPhase::Streaming;
            if streams && self.moved_to.is_none_or(|at| target > at) {
                match self.advance(target) {
                    Ok(()) => (complained, unanswered) = (false, UNANSWERED_PAUSE_MIN),
                    Err(error) => {
                        self.connection = None;
                        if matches!(error, ClientError::TimedOut { .. }) {
                            (pause, unanswered) = (unanswered, (unanswered * 2).min(UNANSWERED_PAUSE_MAX));
                        }
                        if !complained && self.moved_to.is_some() {
                            tracing::warn!(timeline = %self.label, slot = self.slot.name, %error, "cannot advance the slot: the primary keeps more WAL than it need");
                            complained = true;
                        }
                    }
                }
            } else if self.connection.is_some() && self.used_at.elapsed() >= IDLE_MAX {
                self.connection = None;
            }
            if self.shared.pause(pause).is_err() {
                return;
            }
        }
    }

    fn advance(&mut self, target: Lsn) -> Result<(), ClientError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let mut connection = Connection::connect(&self.connect, ANSWER_TIMEOUT)?;
                connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                none.insert(connection)
            }
        };
        self.used_at = Instant::now();
        let name = &self.slot.name;
        // Advancing backwards is an error, and one that has never reserved WAL cannot be advanced.
        let rows = connection.simple_query(&format!(
            "SELECT restart_lsn, wal_status, \
             CASE WHEN restart_lsn < '{target}' THEN (pg_replication_slot_advance(slot_name, '{target}')).end_lsn END \
             FROM pg_replication_slots WHERE slot_name = '{name}' AND slot_type = 'physical'"
        ))?;
        let Some(row) = rows.first() else {
            let rows = connection.simple_query(&format!("SELECT lsn FROM pg_create_physical_replication_slot('{name}', true)"))?;
            self.moved_to = Some(position(rows.first().and_then(|row| row.first())));
            tracing::info!(timeline = %self.label, slot = name, "created the slot that keeps WAL until the store has it");
            return Ok(());
        };
        if row.get(1).and_then(Option::as_deref) == Some("lost") {
            tracing::error!(timeline = %self.label, slot = name, "the primary has removed WAL that the slot should have kept (max_slot_wal_keep_size?)");
        }
        let (was, moved) = (position(row.first()), position(row.get(2)));
        self.moved_to = Some(was.max(moved));
        Ok(())
    }
}

fn position(value: Option<&Option<String>>) -> Lsn {
    value.and_then(Option::as_deref).and_then(|text| text.parse().ok()).unwrap_or(Lsn::INVALID)
}
