//! The admin HTTP API `/v1`: each route takes its body apart, calls [`Pageserver`] and puts the answer together. No decisions here.

mod openapi;
mod routes;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::de::DeserializeOwned;

use crate::error::{Code, ServerError};
use crate::pageserver::Pageserver;

/// Largest body: a file of a compute, base64.
const BODY_SIZE_MAX: usize = 100 * 1024 * 1024;

/// The API's routes.
pub fn router(pageserver: Arc<Pageserver>) -> Router {
    Router::new()
        .route("/v1/tenants", get(routes::list_tenants).post(routes::create_tenant))
        .route("/v1/tenants/{tenant}", get(routes::show_tenant).delete(routes::delete_tenant))
        .route("/v1/tenants/{tenant}/branches", get(routes::list_branches).post(routes::create_branch))
        .route(
            "/v1/tenants/{tenant}/branches/{branch}",
            get(routes::show_branch).patch(routes::rename_branch).delete(routes::delete_branch),
        )
        .route("/v1/tenants/{tenant}/branches/{branch}/restore", post(routes::restore_branch))
        .route("/v1/tenants/{tenant}/branches/{branch}/moment", get(routes::moment))
        .route("/v1/tenants/{tenant}/branches/{branch}/wal", get(routes::branch_wal))
        .route("/v1/tenants/{tenant}/branches/{branch}/wal/bytes", get(routes::branch_wal_bytes))
        .route("/v1/tenants/{tenant}/branches/{branch}/computes", get(routes::list_branch_computes).post(routes::start_compute))
        .route("/v1/computes", get(routes::list_computes))
        .route("/v1/computes/{id}", get(routes::show_compute).merge(delete(routes::stop_compute)))
        .route("/v1/computes/{id}/begin", post(routes::begin))
        .route("/v1/computes/{id}/attach", post(routes::attach))
        .route("/v1/computes/{id}/startup-blocks", post(routes::startup_blocks))
        .route("/v1/computes/{id}/ended", post(routes::ended))
        .route("/v1/computes/{id}/orders", get(routes::orders))
        .route("/v1/computes/{id}/files", post(routes::put_file))
        .route("/v1/server", get(routes::show_server))
        .route("/v1/openapi.json", get(openapi::document))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }))
        .route("/metrics", get(routes::metrics))
        .fallback(|| async { ServerError::new(Code::InvalidArgument, "there is no such address in this API; /v1/openapi.json lists all") })
        .method_not_allowed_fallback(|| async {
            ServerError::new(Code::InvalidArgument, "this address does not take this method; /v1/openapi.json says which it takes")
        })
        .layer(DefaultBodyLimit::max(BODY_SIZE_MAX))
        .with_state(pageserver)
}

impl IntoResponse for ServerError {
    fn into_response(self) -> Response {
        let problem = self.problem();
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&problem).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

/// A JSON body; what is wrong with it is told as every other error is.
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ServerError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ServerError> {
        let wrong = |what: String| ServerError::new(Code::InvalidArgument, format!("the request's body is not right: {what}"));
        let bytes = axum::body::Bytes::from_request(request, state).await.map_err(|error| wrong(error.to_string()))?;
        let text = if bytes.is_empty() { b"{}" } else { bytes.as_ref() };
        serde_json::from_slice(text).map(Body).map_err(|error| wrong(error.to_string()))
    }
}
