//! The listener: bounded connections, none of which may dawdle.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::IntoResponse as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{HttpConfig, router};
use crate::Control;
use crate::error::{Error, RequestError};
use crate::ports::Pageserver;

/// Most headers of a request; more are answered with 431 by the HTTP library.
const HEADERS_MAX: usize = 64;
/// Most bytes of a request's header.
const HEADER_BYTES_MAX: usize = 32 << 10;
/// Wait after a connection could not be accepted, such as for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections beyond the limit that are told so at once; the rest is closed without a word.
const REFUSALS_MAX: usize = 64;
/// How long connections may take to end with the server.
const GRACE: Duration = Duration::from_secs(2);

/// Serves the API on `listener` until `stopping`; then requests that run have a moment to end.
pub async fn serve<P: Pageserver>(control: Arc<Control<P>>, config: HttpConfig, listener: TcpListener, stopping: CancellationToken) {
    let environment = control.environment().clone();
    let (places, refusals) = (Arc::new(Semaphore::new(config.connections_max)), Arc::new(Semaphore::new(REFUSALS_MAX)));
    let config = Arc::new(config);
    let router = router(control, config.clone());
    let everybody = Arc::new(Semaphore::new(1 << 20));
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopping.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Once, not twenty times a second.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the admin API cannot accept connections right now; it goes on trying");
                }
                environment.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if std::mem::take(&mut failing) {
            tracing::info!("the admin API accepts connections again");
        }
        let _ = stream.set_nodelay(true);
        let Ok(running) = everybody.clone().acquire_owned().await else { break };
        let (router, header_max) = match places.clone().try_acquire_owned() {
            Ok(place) => (Some((router.clone(), place)), config.header_max),
            Err(_) => (None, Duration::from_secs(1)),
        };
        match router {
            Some((router, place)) => {
                let stopping = stopping.clone();
                environment.spawn(async move {
                    let _held: (OwnedSemaphorePermit, OwnedSemaphorePermit) = (running, place);
                    connection(stream, router, header_max, stopping).await;
                });
            }
            None => {
                let Ok(place) = refusals.clone().try_acquire_owned() else { continue };
                let (waiting, stopping) = (environment.clone(), stopping.clone());
                environment.spawn(async move {
                    let _held: (OwnedSemaphorePermit, OwnedSemaphorePermit) = (running, place);
                    let full = Router::new().fallback(|| async {
                        let refused = Error::from(RequestError::TooMany).into_response();
                        ([(axum::http::header::CONNECTION, "close")], refused)
                    });
                    let _slow = waiting.within(GRACE, connection(stream, full, header_max, stopping)).await;
                });
            }
        }
    }
    let all_ended = everybody.acquire_many(1 << 20);
    if environment.within(GRACE, all_ended).await.is_none() {
        tracing::info!("some requests of the admin API were cut off");
    }
}

/// Serves one connection. A header that does not arrive in time closes it, as does idleness; see `docs/operations.md`.
async fn connection(stream: TcpStream, router: Router, header_max: Duration, stopping: CancellationToken) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let request: Request = request.map(Body::new);
        router.clone().oneshot(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header_max).max_headers(HEADERS_MAX).max_buf_size(HEADER_BYTES_MAX);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of the admin API ended");
    }
}
