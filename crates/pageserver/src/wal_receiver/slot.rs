//! Keeping the slot: a physical replication slot that no stream of ours follows, moved now and then to what the store
//! has, so that the primary retains the rest whatever happens to us. (A slot in use by the stream would follow what we
//! flushed, which is less than what can be lost with this machine.)
//!
//! **How it is moved.** The function that moves a slot needs a session with a database, which would keep its owner from
//! dropping or copying that database, and wait behind locks of commits that wait for us. A walsender needs neither. So
//! this one begins a stream with the slot where WAL ends right now, says at once what the store has, and ends the
//! stream: Postgres moves the slot to what its standby says, and nearly nothing is sent.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use varve_postgres::Lsn;
use varve_protocol::ClientError;
use varve_protocol::ConnectConfig;
use varve_protocol::connect::blocking::Connection;
use varve_protocol::wire::replication::StandbyStatus;
use varve_protocol::wire::{BackendMessage, frontend};

use super::shared::{ReceiverPhase, Shared};
use super::{ReceiverConfig, SlotConfig};

/// How long connecting and each statement may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// What Postgres says when the slot is there.
const DUPLICATE_OBJECT: &str = "42710";
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
        let connect = config.connect.clone().parameter("replication", "true").parameter("application_name", "varve slot");
        let worker = Worker {
            label: config.label.clone(),
            connect,
            slot,
            base: config.base,
            shared,
            connection: None,
            moved_to: None,
            used_at: Instant::now(),
        };
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
    /// Where the timeline begins, which no slot need be below.
    base: Lsn,
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
            let target = self.shared.positions().not_needed_before;
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
        let moved_to = match self.moved_to {
            Some(moved_to) => moved_to,
            None => {
                match connection.simple_query(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL")) {
                    Ok(_) => tracing::info!(timeline = %self.label, slot = name, "created the slot that keeps WAL until the store has it"),
                    Err(ClientError::Server { message, .. }) if message.code == DUPLICATE_OBJECT => {}
                    Err(error) => return Err(error),
                }
                *self.moved_to.insert(self.base)
            }
        };
        if target <= moved_to {
            return Ok(());
        }
        let rows = connection.simple_query("IDENTIFY_SYSTEM")?;
        let end = rows.first().and_then(|row| row.get(2)).and_then(Option::as_deref).unwrap_or_default();
        connection.start_copy(&format!("START_REPLICATION SLOT {name} PHYSICAL {end}"))?;
        let status = StandbyStatus { written: target, flushed: target, applied: target };
        frontend::copy_data(connection.output(), |out| status.encode(false, out));
        frontend::copy_done(connection.output());
        connection.flush()?;
        // What was flushed meanwhile comes, too, and is not wanted.
        loop {
            match connection.message()? {
                BackendMessage::ReadyForQuery(_) => break,
                BackendMessage::ErrorResponse(message) => {
                    let endpoint = connection.endpoint().to_owned();
                    return Err(ClientError::Server { endpoint, message: Box::new(message) });
                }
                _ => {}
            }
        }
        self.moved_to = Some(target);
        Ok(())
    }
}
