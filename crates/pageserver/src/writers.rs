//! The computes whose WAL is received: one receiver for each, between its walsender and its timeline's [`WalStream`].
//!
//! The engine decides when a stream ends; the receiver is told and ends by itself. Nothing here knows what a compute is
//! beyond the connection that its host hands out.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use varve_engine::timeline::Flushed;
use varve_engine::{LiveTimeline, StreamError, Tenant, WalStream};
use varve_postgres::wal::FramedRecord;
use varve_postgres::wal::records::xact;
use varve_postgres::{Lsn, Major};
use varve_protocol::{ConnectConfig, Endpoint};
use varve_storage::ids::{BranchName, TenantId, TimelineId, WriterEpoch};
use varve_storage::wal_log::WalLogError;

use crate::error::ServerError;
use crate::wal_receiver::{Receiver, ReceiverConfig, ReceiverPhase, SinkError, SlotConfig, Stopper, WalSink};

/// The role under which the receiver connects; the bootstrap superuser's over the private socket.
const INTERNAL_ROLE: &str = "varve";
/// How often a compute is told what WAL it need not keep.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);

/// Where a compute's walsender is reached: a socket on which its host hands out connections to whoever knows the
/// credential.
#[derive(Clone, Debug)]
pub struct Walsender {
    /// Path of the host's socket.
    pub socket: PathBuf,
    /// What opens it.
    pub credential: String,
}

/// Receivers by timeline.
#[derive(Default)]
pub struct Writers {
    receivers: Mutex<HashMap<(TenantId, TimelineId), Receiver<Sink>>>,
}

impl std::fmt::Debug for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writers({})", self.receivers.lock().len())
    }
}

/// Tells the receiver that its stream has ended, whichever of the two comes first.
#[derive(Default)]
struct Link(Mutex<LinkState>);

#[derive(Default)]
struct LinkState {
    stopper: Option<Stopper>,
    ended: bool,
}

impl Link {
    fn stream_ended(&self) {
        let stopper = {
            let mut state = self.0.lock();
            state.ended = true;
            state.stopper.take()
        };
        if let Some(stopper) = stopper {
            stopper.stop();
        }
    }

    fn receiver_runs(&self, stopper: &Stopper) {
        let ended = {
            let mut state = self.0.lock();
            state.stopper = Some(stopper.clone());
            state.ended
        };
        if ended {
            stopper.stop();
        }
    }
}

/// A compute that wants its WAL received.
#[derive(Clone, Debug)]
pub struct Writer {
    /// The branch that it belongs to.
    pub branch: BranchName,
    /// Its writer epoch.
    pub epoch: WriterEpoch,
    /// Where its walsender is reached.
    pub walsender: Walsender,
    /// Where its WAL was flushed to when it said so, and whom it waited for.
    pub flushed: Flushed,
}

impl Writers {
    /// Receives a compute's WAL from now on. Gives the standby name that it must wait for.
    ///
    /// # Errors
    /// When a later epoch has begun, or the branch points elsewhere by now.
    pub async fn attach(&self, tenant: &Tenant, live: &Arc<LiveTimeline>, writer: Writer) -> Result<String, ServerError> {
        let link = Arc::new(Link::default());
        let on_close = {
            let link = link.clone();
            move |_| link.stream_ended()
        };
        let (stream, standby) = live.open_stream(tenant.log(), &writer.branch, writer.epoch, writer.flushed, on_close).await?;
        let start = stream.start();
        let endpoint = Endpoint::handover(writer.walsender.socket, writer.walsender.credential);
        let mut connect = ConnectConfig::new(endpoint, INTERNAL_ROLE);
        if live.major() < Major::V15 {
            // That one loads a tenant's libraries for walsenders, too.
            connect = connect.parameter("options", "-c session_preload_libraries= -c local_preload_libraries=");
        }
        let settings = [("varve.timeline", live.id().to_string()), ("varve.epoch", writer.epoch.0.to_string())];
        let config = ReceiverConfig {
            label: live.name().to_owned(),
            connect,
            standby_name: standby.name.clone(),
            system_identifier: live.system_identifier(),
            major: live.major(),
            tli: live.facts().tli,
            base: live.facts().start,
            start,
            last_record: None,
            settings: settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            synchronous_standby_names: Some(standby.first.clone()),
            slot: Some(SlotConfig { name: "varve".to_owned(), interval: SLOT_INTERVAL }),
        };
        let receiver = Receiver::spawn(config, Sink(stream)).map_err(ServerError::Thread)?;
        link.receiver_runs(&receiver.stopper());
        {
            let mut receivers = self.receivers.lock();
            // Those whose streams were ended have nothing more to do.
            receivers.retain(|_, receiver| receiver.phase() != ReceiverPhase::Ended);
            drop(receivers.insert((live.tenant(), live.id()), receiver));
        }
        Ok(live.waits_for(standby).await?)
    }

    /// Why the WAL of a timeline's compute does not come in, if there is something to tell.
    pub fn trouble(&self, tenant: TenantId, timeline: TimelineId) -> Option<String> {
        self.receivers.lock().get(&(tenant, timeline)).and_then(Receiver::trouble)
    }

    /// Why WAL that came cannot be kept; none while all can.
    pub fn not_kept(&self) -> Option<String> {
        self.receivers.lock().values().filter(|receiver| receiver.phase() != ReceiverPhase::Ended).find_map(Receiver::not_kept)
    }

    /// How many computes' WAL is received.
    pub fn count(&self) -> usize {
        self.receivers.lock().values().filter(|receiver| receiver.phase() == ReceiverPhase::Streaming).count()
    }
}

/// Hands what is received to the timeline's stream.
struct Sink(WalStream);

impl WalSink for Sink {
    fn append(&mut self, start: Lsn, bytes: Bytes) -> Result<(), SinkError> {
        self.0.append(start, &bytes).map_err(|error| match error {
            // A full disk, for one: space may come back.
            StreamError::WalLog(WalLogError::Io { .. }) => SinkError::NotNow(Arc::new(error)),
            error => SinkError::Over(Arc::new(error)),
        })
    }

    fn records(&mut self, records: &mut Vec<FramedRecord>) -> Result<(), SinkError> {
        if let Some(last) = records.last() {
            self.0.framed(last.end);
        }
        let major = self.0.timeline().major();
        if let Some(commit) = records.iter().rev().find(|record| xact::awaits_apply(&record.bytes, major)) {
            self.0.awaits_store(commit.end);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<Lsn, SinkError> {
        self.0.sync().map_err(|error| SinkError::Over(Arc::new(error)))
    }

    fn store_durable(&self) -> Lsn {
        self.0.store_durable()
    }

    fn awaited(&self) -> Lsn {
        self.0.awaited()
    }

    fn not_needed_before(&self) -> Lsn {
        self.0.not_needed_before()
    }
}
