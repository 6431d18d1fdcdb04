//! The admin HTTP API `/v1`: each route takes its request apart, calls [`Control`] and puts the answer together. No
//! decisions here.
//!
//! **The door.** Every request passes the same checks before anybody looks at what it asks for: its `Host` is one of
//! ours, no web page sent it, its size and the time it takes are bounded by its route, a body is JSON and says so.
//! Routes of hosts and computes need the host's token. Every error is an `application/problem+json` with a stable code,
//! those of unknown addresses and methods included.

mod door;
mod extract;
mod history;
mod internal;
mod openapi;
mod routes;
mod serve;
mod verification;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use varve_api::Code;

use crate::Control;
use crate::error::{Error, RequestError};
use crate::ports::Pageserver;

pub use openapi::document;
pub use serve::serve;

/// How the API is served.
#[derive(Clone)]
pub struct HttpConfig {
    /// What hosts and their computes show: `Authorization: Bearer <token>`.
    pub host_token: String,
    /// Names in `Host` that are taken besides those of loopback.
    pub hosts: Vec<String>,
    /// Origins from which a web page may call, such as `https://console.example`; none by default.
    pub origins: Vec<String>,
    /// Connections at once; who comes on top is told to come again.
    pub connections_max: usize,
    /// How long the header of a request may take to arrive, and how long a connection may be idle.
    pub header_max: Duration,
    /// How long a body may take to arrive that is no file.
    pub body_max: Duration,
    /// Lines of the OpenMetrics text format that others have to say, without `# EOF`.
    pub metrics: Option<Arc<dyn Fn() -> String + Send + Sync>>,
}

impl std::fmt::Debug for HttpConfig {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpConfig").field("hosts", &self.hosts).field("connections_max", &self.connections_max).finish_non_exhaustive()
    }
}

impl HttpConfig {
    /// What fits one machine, with this token for hosts.
    pub fn new(host_token: String) -> HttpConfig {
        HttpConfig {
            host_token,
            hosts: Vec::new(),
            origins: Vec::new(),
            connections_max: 4096,
            header_max: Duration::from_secs(10),
            body_max: Duration::from_secs(10),
            metrics: None,
        }
    }
}

/// What routes work with.
pub(crate) struct Server<P: Pageserver> {
    pub(crate) control: Arc<Control<P>>,
    pub(crate) config: Arc<HttpConfig>,
}

impl<P: Pageserver> Clone for Server<P> {
    fn clone(&self) -> Self {
        Server { control: self.control.clone(), config: self.config.clone() }
    }
}

/// The API's routes, door included.
pub fn router<P: Pageserver>(control: Arc<Control<P>>, config: Arc<HttpConfig>) -> Router {
    let server = Server { control, config };
    let internal = Router::new()
        .route("/v1/computes/{id}/begin", post(internal::begin::<P>))
        .route("/v1/computes/{id}/attach", post(internal::attach::<P>))
        .route("/v1/computes/{id}/startup-blocks", post(internal::startup_blocks::<P>))
        .route("/v1/computes/{id}/cache", post(internal::cache::<P>))
        .route("/v1/computes/{id}/events", post(internal::event::<P>))
        .route("/v1/computes/{id}/check", post(verification::check::<P>))
        .route("/v1/computes/{id}/ended", post(internal::ended::<P>))
        .route("/v1/computes/{id}/leftover-wal", get(internal::leftover_start::<P>).post(internal::take_leftover::<P>))
        .route("/v1/computes/{id}/orders", get(internal::orders::<P>))
        .route("/v1/computes/{id}/pages", get(internal::get_piece::<P>).post(internal::put_piece::<P>))
        .route("/v1/computes/{id}/files", post(internal::put_file::<P>))
        .route("/v1/hosts/{id}/hello", post(internal::hello::<P>))
        .route("/v1/hosts/{id}/orders", get(internal::host_orders::<P>))
        .route("/v1/hosts/{id}/computes/{compute}", post(internal::report::<P>))
        .route("/v1/hosts/{id}/templates/{order}", post(internal::template::<P>))
        .route_layer(from_fn_with_state(server.clone(), door::needs_token::<P>));
    let branch = "/v1/tenants/{tenant}/branches/{branch}";
    Router::new()
        .route("/v1/tenants", get(routes::list_tenants::<P>).post(routes::create_tenant::<P>))
        .route("/v1/tenants/{tenant}", get(routes::show_tenant::<P>).patch(history::change_tenant::<P>).delete(routes::delete_tenant::<P>))
        .route("/v1/tenants/{tenant}/collect", post(history::collect_tenant::<P>))
        .route(
            "/v1/tenants/{tenant}/restore-verification",
            get(verification::restore_verification::<P>).post(verification::verify_restore::<P>),
        )
        .route("/v1/tenants/{tenant}/snapshots", get(history::list_snapshots::<P>).post(history::create_snapshot::<P>))
        .route("/v1/tenants/{tenant}/snapshots/{snapshot}", get(history::show_snapshot::<P>).delete(history::delete_snapshot::<P>))
        .route("/v1/tenants/{tenant}/branches", get(routes::list_branches::<P>).post(routes::create_branch::<P>))
        .route(branch, get(routes::show_branch::<P>).patch(routes::rename_branch::<P>).delete(routes::delete_branch::<P>))
        .route(&format!("{branch}/restore"), post(routes::restore_branch::<P>))
        .route(&format!("{branch}/settings"), get(routes::show_settings::<P>).patch(routes::change_settings::<P>))
        .route(&format!("{branch}/size"), get(routes::show_size::<P>).patch(routes::resize::<P>))
        .route(&format!("{branch}/events"), get(routes::list_events::<P>))
        .route(&format!("{branch}/moment"), get(routes::moment::<P>))
        .route(&format!("{branch}/wal"), get(routes::branch_wal::<P>))
        .route(&format!("{branch}/wal/bytes"), get(routes::branch_wal_bytes::<P>))
        .route(&format!("{branch}/computes"), get(routes::list_branch_computes::<P>).post(routes::start_compute::<P>))
        .route("/v1/computes", get(routes::list_computes::<P>))
        .route("/v1/computes/{id}", get(routes::show_compute::<P>).delete(routes::stop_compute::<P>))
        .route("/v1/tenants/{tenant}/password", get(routes::show_password::<P>).post(routes::rotate_password::<P>))
        .route("/v1/tenants/{tenant}/take", post(routes::take_tenant::<P>))
        .route("/v1/server", get(routes::show_server::<P>))
        .route("/v1/server/orphaned-wal/{tenant_id}", axum::routing::delete(routes::forget_wal::<P>))
        .route("/v1/openapi.json", get(openapi::show))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(routes::ready::<P>))
        .route("/metrics", get(routes::metrics::<P>))
        .merge(internal)
        .fallback(|| async { Error::from(RequestError::NoSuchAddress) })
        .method_not_allowed_fallback(|| async { Error::from(RequestError::MethodNotAllowed) })
        .with_state(server.clone())
        .layer(from_fn_with_state(server.clone(), door::takes_its_time::<P>))
        .layer(from_fn_with_state(server.clone(), door::is_no_web_page::<P>))
        .layer(from_fn_with_state(server, door::names_requests::<P>))
        .layer(from_fn(door::forbids_sniffing))
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let refusal = self.refusal();
        let problem = refusal.problem();
        if problem.status >= 500 {
            tracing::warn!(code = problem.code, detail = problem.detail, "an API request failed");
        }
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&problem).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
        let headers = response.headers_mut();
        match refusal.code {
            Code::Unauthorized => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            Code::Unavailable => drop(headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"))),
            // What is left of the body would be taken for the next request.
            Code::RequestTimeout | Code::TooLarge => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
            Code::NotOwner => {
                // Where a host finds the server that has the tenant.
                if let Error::NotOwner(lost) = &self
                    && let Some(url) = lost.url.as_deref().and_then(|url| HeaderValue::from_str(url).ok())
                {
                    headers.insert(header::LOCATION, url);
                }
            }
            _ => {}
        }
        response
    }
}
