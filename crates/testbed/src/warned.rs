//! A connection that notes whether it was warned: a commit whose wait for the pageserver was let go ends with a
//! warning, and was not acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio_postgres::{AsyncMessage, Client, NoTls};

/// See the module's doc.
pub(crate) struct Warned {
    pub(crate) client: Client,
    warned: Arc<AtomicBool>,
    driver: JoinHandle<()>,
}

impl Warned {
    /// Connects, within `limit`.
    pub(crate) async fn connect(conninfo: &str, limit: Duration) -> anyhow::Result<Warned> {
        let connected = tokio::time::timeout(limit, tokio_postgres::connect(conninfo, NoTls)).await;
        let (client, mut connection) = connected.with_context(|| format!("no connection within {limit:?}"))??;
        let warned = Arc::new(AtomicBool::new(false));
        let seen = warned.clone();
        let driver = tokio::spawn(async move {
            loop {
                match std::future::poll_fn(|context| connection.poll_message(context)).await {
                    Some(Ok(AsyncMessage::Notice(_))) => seen.store(true, Ordering::SeqCst),
                    Some(Ok(_)) => {}
                    _ => return,
                }
            }
        });
        Ok(Warned { client, warned, driver })
    }

    /// What was warned of before does not count.
    pub(crate) fn begin(&self) {
        self.warned.store(false, Ordering::SeqCst);
    }

    /// Whether it was warned since.
    pub(crate) fn is_warned(&self) -> bool {
        self.warned.load(Ordering::SeqCst)
    }
}

impl Drop for Warned {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
