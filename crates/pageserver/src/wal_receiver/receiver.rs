//! The receiver's thread, and the handle to it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use varve_postgres::wal::Framer;

use super::shared::{ReceiverPhase, ReceiverPositions, Shared, Stopped};
use super::slot::SlotKeeper;
use super::stream::Stream;
use super::{ReceiverConfig, ReceiverError, SinkError, WalSink, session};
use varve_protocol::ClientError;

/// First pause before connecting again.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause before connecting again: a primary that is back finds its standby within this time.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Why a connection to the server ended.
pub(super) enum SessionEnd {
    /// The receiver was told to stop.
    Stopped,
    /// The connection broke, or could not be made: try again.
    Lost(ClientError),
    /// What came could not be kept: try again later.
    NotKept(SinkError),
    /// Trying again is no use.
    Failed(ReceiverError),
}

impl From<Stopped> for SessionEnd {
    fn from(_: Stopped) -> SessionEnd {
        SessionEnd::Stopped
    }
}

impl From<ClientError> for SessionEnd {
    fn from(error: ClientError) -> SessionEnd {
        SessionEnd::Lost(error)
    }
}

impl From<SinkError> for SessionEnd {
    fn from(error: SinkError) -> SessionEnd {
        match error {
            SinkError::NotNow(_) => SessionEnd::NotKept(error),
            SinkError::Over(_) => SessionEnd::Failed(ReceiverError::Sink(error)),
        }
    }
}

impl From<ReceiverError> for SessionEnd {
    fn from(error: ReceiverError) -> SessionEnd {
        SessionEnd::Failed(error)
    }
}

/// How a receiver ended.
pub struct Outcome<S> {
    /// How far it was.
    pub positions: ReceiverPositions,
    /// The sink, with all that it took.
    pub sink: S,
    /// Why, unless it was told to.
    pub error: Option<ReceiverError>,
}

/// Stops a receiver: see [`Receiver::stop`].
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// See [`Receiver::stop`].
    pub fn stop(&self) {
        self.0.stop();
    }
}

/// A running receiver.
pub struct Receiver<S> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Outcome<S>>>,
    slot: Option<SlotKeeper>,
}

impl<S: WalSink> Receiver<S> {
    /// Starts to receive into `sink`. Whether the server is there does not matter yet.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn spawn(config: ReceiverConfig, sink: S) -> io::Result<Receiver<S>> {
        let start =
            ReceiverPositions { received: config.start, framed: config.start, durable: config.start, ..ReceiverPositions::default() };
        let shared = Arc::new(Shared::new(start));
        let slot = match &config.slot {
            Some(slot) => Some(SlotKeeper::spawn(&config, slot.clone(), shared.clone())?),
            None => None,
        };
        let mut worker = Worker {
            framer: Framer::new(config.major, Some(config.system_identifier), config.start, config.last_record),
            config,
            sink,
            shared: shared.clone(),
        };
        let name = format!("wal-{}", worker.config.label).chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let error = worker.run();
            if let Some(error) = &error {
                tracing::error!(timeline = %worker.config.label, %error, "the WAL receiver ended");
                worker.shared.set_trouble(&error.to_string());
            }
            worker.shared.set_phase(ReceiverPhase::Ended);
            Outcome { positions: worker.shared.positions(), sink: worker.sink, error }
        })?;
        Ok(Receiver { shared, thread: Some(thread), slot })
    }

    /// How far it is.
    pub fn positions(&self) -> ReceiverPositions {
        self.shared.positions()
    }

    /// What it is doing.
    pub fn phase(&self) -> ReceiverPhase {
        self.shared.phase()
    }

    /// Why it is not streaming, or why it ended, if there is something to tell.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// Why what came last could not be kept, until something is kept again.
    pub fn not_kept(&self) -> Option<String> {
        self.shared.not_kept()
    }

    /// A way to stop it from elsewhere, which keeps nothing alive but itself.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    /// Waits until `reached` is so, the receiver ends, or `timeout` is over; whether it was reached.
    pub fn wait_until(&self, timeout: Duration, reached: impl FnMut(&ReceiverPositions, ReceiverPhase) -> bool) -> bool {
        self.shared.wait(Instant::now() + timeout, reached)
    }

    /// Ends the stream at once, even while the thread waits for the server. When this has returned, nothing is
    /// acknowledged any more. What was received may still be on its way into the sink; [`Receiver::join`] waits for
    /// that.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Stops, waits until the thread has handed everything it received to the sink, and gives the sink back.
    ///
    /// # Errors
    /// [`ReceiverError::Panicked`] if the sink panicked.
    pub fn join(mut self) -> Result<Outcome<S>, ReceiverError> {
        self.stop();
        if let Some(slot) = self.slot.take() {
            slot.join();
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => Ok(outcome),
            _ => Err(ReceiverError::Panicked),
        }
    }
}

impl<S> Drop for Receiver<S> {
    /// The threads end by themselves, soon.
    fn drop(&mut self) {
        self.shared.stop();
    }
}

struct Worker<S> {
    config: ReceiverConfig,
    sink: S,
    framer: Framer,
    shared: Arc<Shared>,
}

impl<S: WalSink> Worker<S> {
    /// One connection after the other, until there is a reason to end; `None` if told to stop.
    fn run(&mut self) -> Option<ReceiverError> {
        let mut pause = RETRY_PAUSE_MIN;
        loop {
            let framed_before = self.framer.framed();
            let end = self.one_connection();
            self.shared.clear_closer();
            let (error, is_news) = match end {
                SessionEnd::Stopped => return None,
                SessionEnd::Failed(error) => return Some(error),
                SessionEnd::Lost(_) | SessionEnd::NotKept(_) if self.shared.is_stopped() => return None,
                SessionEnd::Lost(error) => (error.to_string(), true),
                SessionEnd::NotKept(error) => {
                    let error = format!("the WAL could not be kept, commits wait: {error}");
                    let news = self.shared.set_not_kept(Some(&error));
                    (error, news)
                }
            };
            self.shared.set_phase(ReceiverPhase::Connecting);
            if self.shared.set_trouble(&error) && is_news {
                tracing::warn!(timeline = %self.config.label, error, framed = %self.framer.framed(), "no WAL from the primary, trying again");
            }
            if self.framer.framed() > framed_before {
                pause = RETRY_PAUSE_MIN;
            }
            if self.shared.pause(pause).is_err() {
                return None;
            }
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    fn one_connection(&mut self) -> SessionEnd {
        // What came behind the last whole record counts for nothing, and the server may have other bytes there by now.
        let (start, last_record) = (self.framer.framed(), self.framer.last_record());
        self.framer = self.framer.anew(start, last_record);
        let connection = match session::start(&self.config, start, &self.shared) {
            Ok(connection) => connection,
            Err(end) => return end,
        };
        tracing::info!(timeline = %self.config.label, from = connection.endpoint(), %start, "receiving WAL");
        self.shared.set_phase(ReceiverPhase::Streaming);
        Stream::new(connection, &mut self.sink, &mut self.framer, &self.shared).run()
    }
}
