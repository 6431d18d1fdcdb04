//! The end of a server: what the store lacks is put there, as long as it takes anything.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use varve_engine::{LiveTimeline, StreamEnd};

/// How long a server that stops tries to put something into a store that fails each time.
const STORE_PATIENCE: Duration = Duration::from_secs(5);
/// And into one that neither takes nor refuses it.
const STORE_SILENCE: Duration = Duration::from_secs(30);
/// How often it is looked then whether it still fails.
const STORE_LOOK: Duration = Duration::from_millis(500);

/// Ends a timeline's stream and puts everything of it into the store. One that fails, or says nothing, is not waited
/// for: the WAL log keeps what it lacks.
pub(crate) async fn put_away(live: &Arc<LiveTimeline>) {
    let flushed = async {
        // No acknowledgement from here on; then all that was acknowledged can be put into the store.
        live.end_stream(StreamEnd::Closing).await?;
        live.flush_all().await
    };
    tokio::select! {
        flushed = flushed => {
            if let Err(error) = flushed {
                tracing::warn!(timeline = live.name(), %error, "not all is in the store; the WAL log keeps the rest");
            }
        }
        () = store_fails(live) => {
            tracing::warn!(timeline = live.name(), "the store does not take what it lacks; the WAL log keeps it");
        }
    }
}

/// Waits until the store has not taken anything of a timeline for a while: it is full, or away.
async fn store_fails(live: &LiveTimeline) {
    let (mut layered, mut since) = (live.positions().layered(), Instant::now());
    loop {
        tokio::time::sleep(STORE_LOOK).await;
        let now = live.positions().layered();
        if now > layered {
            (layered, since) = (now, Instant::now());
        }
        let patience = if live.flush_fails() { STORE_PATIENCE } else { STORE_SILENCE };
        if since.elapsed() >= patience {
            return;
        }
    }
}
