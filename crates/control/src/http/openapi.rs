//! The OpenAPI 3.1 document, generated from the routes' own annotations.

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::OpenApi;

use super::routes;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Varve admin API",
        description = "Tenants, branches, restores and computes. Errors are application/problem+json with a stable code."
    ),
    paths(
        routes::list_tenants,
        routes::create_tenant,
        routes::show_tenant,
        routes::delete_tenant,
        routes::list_branches,
        routes::create_branch,
        routes::show_branch,
        routes::rename_branch,
        routes::delete_branch,
        routes::restore_branch,
        routes::moment,
        routes::branch_wal,
        routes::branch_wal_bytes,
        routes::list_branch_computes,
        routes::start_compute,
        routes::list_computes,
        routes::show_compute,
        routes::stop_compute,
        routes::show_server
    )
)]
struct Document;

/// `GET /v1/openapi.json`.
pub(super) async fn document() -> impl IntoResponse {
    let json = Document::openapi().to_json().unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], json)
}
