//! Accepting connections, as many as there may be, and ending them all at shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use varve_protocol::wire::{ServerMessage, backend::sqlstate};

use super::connection::{Connection, End};
use super::pool::FairPool;
use super::session::{Session, Shared, refuse};
use super::shares::Shares;
use super::{PageServiceConfig, PageSource};

/// Clients that are being told that there is no place for them; further ones are closed without a word.
const REFUSALS_MAX: usize = 64;
/// Pause after a failed accept, such as for want of descriptors: they do not come back faster by asking.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How often failing accepts are told of.
const ACCEPT_COMPLAINT: Duration = Duration::from_secs(10);

/// A page service that serves from a source.
pub struct PageService {
    shared: Arc<Shared>,
    config: PageServiceConfig,
    places: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl PageService {
    /// A page service on `source`.
    pub fn new(source: Arc<dyn PageSource>, config: PageServiceConfig) -> PageService {
        let shared = Shared {
            source,
            jobs: FairPool::new(config.jobs_max),
            backups: FairPool::new(config.backups_max),
            full_backups: FairPool::new(config.full_backups_max),
            backups_of_tenant: Shares::new(config.backups_of_tenant_max),
            connections_of_tenant: Shares::new(config.connections_max / 2),
        };
        PageService {
            shared: Arc::new(shared),
            config,
            places: Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS))),
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            tasks: TaskTracker::new(),
        }
    }

    /// Serves clients of `listener` until `shutdown`, then ends all connections and waits for them and their jobs,
    /// within the configured time.
    pub async fn run(self, listener: TcpListener, shutdown: CancellationToken) {
        let mut complained: Option<Instant> = None;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            match accepted {
                Ok((stream, peer)) => self.admit(stream, peer, &shutdown),
                // Want of descriptors, say. It concerns who comes, not who is there.
                Err(error) => {
                    if complained.is_none_or(|at| at.elapsed() >= ACCEPT_COMPLAINT) {
                        tracing::warn!(%error, "the page service cannot accept connections; it goes on trying");
                        complained = Some(Instant::now());
                    }
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
        drop(listener);
        self.tasks.close();
        let limit = self.config.shutdown_timeout;
        let ended = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        let Shared { jobs, backups, full_backups, .. } = &*self.shared;
        let (jobs, backups, full_backups) = tokio::join!(jobs.drained(limit), backups.drained(limit), full_backups.drained(limit));
        let drained = jobs && backups && full_backups;
        if !ended || !drained {
            tracing::warn!(connections = self.tasks.len(), drained, "page service connections or jobs did not end within {limit:?}");
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr, shutdown: &CancellationToken) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "the client went before it was served");
            return;
        }
        let mut connection = Connection::new(stream, peer, self.config, shutdown.clone());
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            let shared = self.shared.clone();
            self.tasks.spawn(async move {
                let end = Session::new(&mut connection, shared).run().await;
                match &end {
                    End::Over => tracing::debug!(%peer, "page service client left"),
                    End::Broken(error) => tracing::debug!(%peer, %error, "page service connection broke"),
                    End::Fatal(message) => tracing::info!(%peer, %message, "page service connection closed"),
                }
                connection.close(&end).await;
                drop(place);
            });
            return;
        }
        tracing::warn!(%peer, limit = self.config.connections_max, "page service connection refused: all places are taken");
        if let Ok(permit) = self.refusals.clone().try_acquire_owned() {
            let message = format!("all {} connections of the page service are taken: try again later", self.config.connections_max);
            let why = ServerMessage::fatal(sqlstate::TOO_MANY_CONNECTIONS, message);
            self.tasks.spawn(async move {
                refuse(connection, why).await;
                drop(permit);
            });
        }
    }
}
