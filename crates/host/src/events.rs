//! What happens to a compute that its owner should know of, told to the control plane in order.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use varve_api::admin::EventKind;
use varve_api::host::EventReport;

use crate::server::{Server, is_transient};

/// Events that wait for a server that is away; what comes on top is in the log only.
const WAITING_MAX: usize = 100;
/// Wait between tries to tell.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// Where events are told. Cheap to clone; the task behind it ends with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Events(mpsc::Sender<(Instant, EventKind, String)>);

impl Events {
    /// To `server`, by a task of its own.
    pub(crate) fn start(server: Server) -> Events {
        let (events, waiting) = mpsc::channel(WAITING_MAX);
        tokio::spawn(tell(server, waiting));
        Events(events)
    }

    /// Something happened.
    pub(crate) fn tell(&self, kind: EventKind, words: String) {
        tracing::warn!(kind = kind.name(), "{words}");
        if self.0.try_send((Instant::now(), kind, words)).is_err() {
            tracing::warn!("too many events wait for the server: this one is only here");
        }
    }
}

async fn tell(server: Server, mut waiting: mpsc::Receiver<(Instant, EventKind, String)>) {
    while let Some((at, kind, words)) = waiting.recv().await {
        loop {
            let age_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
            match server.event(&EventReport { kind, words: words.clone(), age_ms }).await {
                Ok(()) => break,
                Err(error) if is_transient(&error) => tokio::time::sleep(RETRY_WAIT).await,
                Err(error) => {
                    tracing::warn!(%error, "the server does not take an event");
                    break;
                }
            }
        }
    }
}
