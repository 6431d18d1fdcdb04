//! The thread that ingests a timeline: WAL log in, versions out.
//!
//! It reads the WAL log, so that a restart and the live stream are one path, and so that memory is bounded by a read's size. It frames anew,
//! with CRCs: what comes back from disk is checked like what came from the network.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use varve_postgres::Lsn;
use varve_postgres::wal::Framer;

use super::ServedTimeline;
use crate::ingest::Ingest;

/// Bytes of WAL that one read brings.
const READ_SIZE: usize = 1024 * 1024;
/// Records between two moments at which readers may see more.
const RECORDS_BETWEEN_ADVANCES: usize = 256;
/// How long WAL may gather while nobody waits to read it: to be woken for each group of commits costs more than to ingest it, and comes at the
/// very moment when they wait for their acknowledgement.
const GATHER_MAX: Duration = Duration::from_millis(2);
/// So much WAL is ingested at once.
const GATHER_SIZE: u64 = 64 * 1024;
/// How often an idle timeline looks whether it has something old to flush.
const IDLE_WAIT: Duration = Duration::from_millis(500);
/// How often a timeline whose ancestors lag looks whether it should end.
const ANCESTOR_WAIT: Duration = Duration::from_millis(500);
/// Wait while memory is over its budget and flushes catch up.
const MEMORY_WAIT: Duration = Duration::from_millis(5);

impl ServedTimeline {
    /// Starts the thread, which goes on where `applied` is.
    pub(super) fn start_ingest(self: &Arc<Self>) -> std::io::Result<()> {
        let timeline = self.clone();
        let runtime = tokio::runtime::Handle::current();
        let worker = std::thread::Builder::new().name("ingest".to_owned()).spawn(move || {
            if let Err(reason) = timeline.ingest(&runtime) {
                tracing::error!(timeline = timeline.name, reason, "ingest stopped; what came before stays readable");
                timeline.update(|positions| positions.stopped = Some(reason));
            }
        })?;
        *self.worker.lock() = Some(worker);
        Ok(())
    }

    fn ingest(self: &Arc<Self>, runtime: &tokio::runtime::Handle) -> Result<(), String> {
        let mut ingest = None;
        self.ingest_into(&mut ingest, runtime).inspect_err(|_| {
            // What was ingested before whatever went wrong is to be seen.
            if let Some(Err(error)) = ingest.as_mut().map(|ingest| self.advance(ingest)) {
                tracing::error!(timeline = self.name, error, "what was ingested last does not become visible");
            }
        })
    }

    fn ingest_into(self: &Arc<Self>, ingest: &mut Option<Ingest>, runtime: &tokio::runtime::Handle) -> Result<(), String> {
        let start = self.applied();
        let mut framer = Framer::new(self.major, Some(self.system_identifier), start, None);
        loop {
            self.flush_if_due(runtime);
            let Some(head) = self.wait_for_wal(framer.position()) else { return Ok(()) };
            let ingest = match ingest {
                Some(ingest) => ingest,
                // Opened at the first record, so that an idle timeline reads nothing.
                None => {
                    if !self.wait_for_ancestors(start)? {
                        return Ok(());
                    }
                    ingest.insert(Ingest::open(self.history.clone(), start).map_err(|error| error.to_string())?)
                }
            };
            let room = head.0 - framer.position().0;
            let bytes = self.wal.read(self.tenant, self.facts.id, framer.position(), READ_SIZE.min(room as usize));
            let mut bytes = bytes.map_err(|error| error.to_string())?;
            if bytes.is_empty() {
                return Err(format!("the WAL log holds no bytes at {}, and its records end at {head}", framer.position()));
            }
            let mut records = 0;
            while let Some(record) = framer.next_record(&mut bytes).map_err(|error| error.to_string())? {
                if record.has_check_images() {
                    self.note_check_images(record.end);
                }
                if let Err(error) = ingest.record(&record) {
                    return Err(error.to_string());
                }
                records += 1;
                if records % RECORDS_BETWEEN_ADVANCES == 0 {
                    self.advance(ingest)?;
                }
            }
            self.advance(ingest)?;
            while self.history.memory_over_budget() && !self.stopping.load(Ordering::Acquire) {
                self.flush_if_due(runtime);
                std::thread::sleep(MEMORY_WAIT);
            }
        }
    }

    /// Waits until the ancestors have applied what this timeline shows of their history: after a restart all ingest their WAL at the same time. Whether
    /// they have; if not, it is time to end.
    fn wait_for_ancestors(&self, start: Lsn) -> Result<bool, String> {
        let Some((ancestor, branch_lsn)) = &self.ancestor else { return Ok(true) };
        while !self.stopping.load(Ordering::Acquire) {
            let lsn = start.min(*branch_lsn);
            match ancestor.wait_applied(lsn, ANCESTOR_WAIT) {
                Ok(()) => return Ok(true),
                Err(reason) if ancestor.stopped_before(lsn).is_some() => return Err(reason),
                Err(_) => {}
            }
        }
        Ok(false)
    }

    fn advance(self: &Arc<Self>, ingest: &mut Ingest) -> Result<(), String> {
        ingest.advance().map_err(|error| error.to_string())?;
        let end = ingest.end();
        self.update(|positions| positions.applied = positions.applied.max(end));
        if let Some(awaited) = ingest.take_awaited() {
            self.flush_awaited(awaited);
        }
        Ok(())
    }

    /// Waits until there is WAL beyond `position` that is worth the while or waited for; gives head, or nothing when it is time to end. Comes back now and
    /// then for a flush.
    fn wait_for_wal(self: &Arc<Self>, position: Lsn) -> Option<Lsn> {
        let mut gathered = Instant::now() + GATHER_MAX;
        let mut positions = self.positions.lock();
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            let (head, now) = (positions.head, Instant::now());
            if head > position {
                if positions.readers_waiting > 0 || head.distance_from(position) >= GATHER_SIZE || now >= gathered {
                    return Some(head);
                }
                self.ingest_wakes.wait_until(&mut positions, gathered);
                continue;
            }
            positions.ingest_sleeps = true;
            let idle = self.ingest_wakes.wait_until(&mut positions, now + IDLE_WAIT).timed_out();
            positions.ingest_sleeps = false;
            gathered = Instant::now() + GATHER_MAX;
            if idle && self.flush_is_due() {
                drop(positions);
                self.flush_if_due(&self.context.runtime);
                positions = self.positions.lock();
            }
        }
    }
}
