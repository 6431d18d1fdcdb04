//! The routes' handlers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};
use varve_api::admin::{
    Branch, BranchChange, Compute, Moment, NewBranch, NewCompute, NewTenant, Restore, Restored, Server as ServerFacts, Tenant, Wal,
};
use varve_api::host::{Attach, Attached, Begin, Ended, FileVersion, Orders, StartupBlocks};

use super::Body;
use crate::error::ServerError;
use crate::pageserver::Pageserver;

type Server = State<Arc<Pageserver>>;
type Answer<T> = Result<Json<T>, ServerError>;
type Created<T> = Result<(StatusCode, Json<T>), ServerError>;

/// A moment in a query string.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct MomentQuery {
    lsn: Option<String>,
    at: Option<String>,
}

/// Shows the server itself.
#[utoipa::path(get, path = "/v1/server", responses((status = 200, body = ServerFacts)))]
pub(super) async fn show_server(State(server): Server) -> Json<ServerFacts> {
    Json(server.facts())
}

/// Lists the tenants.
#[utoipa::path(get, path = "/v1/tenants", responses((status = 200, body = [Tenant])))]
pub(super) async fn list_tenants(State(server): Server) -> Answer<Vec<Tenant>> {
    server.list_tenants().await.map(Json)
}

/// Creates a tenant with a branch `main`.
#[utoipa::path(post, path = "/v1/tenants", request_body = NewTenant, responses((status = 201, body = Tenant)))]
pub(super) async fn create_tenant(State(server): Server, Body(body): Body<NewTenant>) -> Created<Tenant> {
    Ok((StatusCode::CREATED, Json(server.create_tenant(body).await?)))
}

/// Shows a tenant.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", params(("tenant", description = "name")), responses((status = 200, body = Tenant)))]
pub(super) async fn show_tenant(State(server): Server, Path(tenant): Path<String>) -> Answer<Tenant> {
    server.show_tenant(&tenant).await.map(Json)
}

/// Deletes a tenant with all its history.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}", params(("tenant", description = "name")), responses((status = 200)))]
pub(super) async fn delete_tenant(State(server): Server, Path(tenant): Path<String>) -> Answer<Value> {
    server.delete_tenant(&tenant).await?;
    Ok(Json(json!({ "deleted": tenant })))
}

/// Lists a tenant's branches.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches", params(("tenant", description = "name")),
    responses((status = 200, body = [Branch])))]
pub(super) async fn list_branches(State(server): Server, Path(tenant): Path<String>) -> Answer<Vec<Branch>> {
    server.list_branches(&tenant).await.map(Json)
}

/// Creates a branch.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches", params(("tenant", description = "name")), request_body = NewBranch,
    responses((status = 201, body = Branch)))]
pub(super) async fn create_branch(State(server): Server, Path(tenant): Path<String>, Body(body): Body<NewBranch>) -> Created<Branch> {
    Ok((StatusCode::CREATED, Json(server.create_branch(&tenant, body).await?)))
}

/// Shows a branch.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}", params(("tenant", description = "name"), ("branch", description = "name")),
    responses((status = 200, body = Branch)))]
pub(super) async fn show_branch(State(server): Server, Path((tenant, branch)): Path<(String, String)>) -> Answer<Branch> {
    server.show_branch(&tenant, &branch).await.map(Json)
}

/// Gives a branch another name.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}/branches/{branch}", params(("tenant", description = "name"), ("branch", description = "name")),
    request_body = BranchChange, responses((status = 200, body = Branch)))]
pub(super) async fn rename_branch(
    State(server): Server,
    Path((tenant, branch)): Path<(String, String)>,
    Body(body): Body<BranchChange>,
) -> Answer<Branch> {
    server.rename_branch(&tenant, &branch, &body.name).await.map(Json)
}

/// Deletes a branch that has no children.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/branches/{branch}", params(("tenant", description = "name"), ("branch", description = "name")),
    responses((status = 200)))]
pub(super) async fn delete_branch(State(server): Server, Path((tenant, branch)): Path<(String, String)>) -> Answer<Value> {
    server.delete_branch(&tenant, &branch).await?;
    Ok(Json(json!({ "deleted": format!("{tenant}/{branch}") })))
}

/// Takes a branch back to a moment; the old history stays under another name.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches/{branch}/restore", params(("tenant", description = "name"), ("branch", description = "name")),
    request_body = Restore, responses((status = 200, body = Restored)))]
pub(super) async fn restore_branch(
    State(server): Server,
    Path((tenant, branch)): Path<(String, String)>,
    Body(body): Body<Restore>,
) -> Answer<Restored> {
    server.restore_branch(&tenant, &branch, body).await.map(Json)
}

/// Says which LSN a time is, or which time an LSN.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/moment",
    params(("tenant", description = "name"), ("branch", description = "name"), ("lsn" = Option<String>, Query), ("at" = Option<String>, Query)),
    responses((status = 200, body = Moment)))]
pub(super) async fn moment(
    State(server): Server,
    Path((tenant, branch)): Path<(String, String)>,
    Query(query): Query<MomentQuery>,
) -> Answer<Moment> {
    server.moment(&tenant, &branch, query.lsn.as_deref(), query.at.as_deref()).await.map(Json)
}

/// Says which WAL of a branch can be had: that of which redo can be checked.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/wal", params(("tenant", description = "name"), ("branch", description = "name")),
    responses((status = 200, body = Wal)))]
pub(super) async fn branch_wal(State(server): Server, Path((tenant, branch)): Path<(String, String)>) -> Answer<Wal> {
    server.branch_wal(&tenant, &branch).await.map(Json)
}

/// A position in WAL in a query string.
#[derive(Debug, Deserialize)]
pub(crate) struct WalQuery {
    #[serde(default)]
    from: String,
}

/// Gives WAL of a branch as it is, from a position on: at least a byte and at most 16 MiB.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/wal/bytes",
    params(("tenant", description = "name"), ("branch", description = "name"), ("from" = String, Query, description = "an LSN")),
    responses((status = 200, body = [u8], content_type = "application/octet-stream")))]
pub(super) async fn branch_wal_bytes(
    State(server): Server,
    Path((tenant, branch)): Path<(String, String)>,
    Query(query): Query<WalQuery>,
) -> Result<impl IntoResponse, ServerError> {
    let bytes = server.branch_wal_bytes(&tenant, &branch, &query.from).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// Lists a branch's computes.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/computes", params(("tenant", description = "name"), ("branch", description = "name")),
    responses((status = 200, body = [Compute])))]
pub(super) async fn list_branch_computes(State(server): Server, Path((tenant, branch)): Path<(String, String)>) -> Answer<Vec<Compute>> {
    server.list_branch_computes(&tenant, &branch).await.map(Json)
}

/// Starts a compute; answers when it takes connections.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches/{branch}/computes", params(("tenant", description = "name"), ("branch", description = "name")),
    request_body = NewCompute, responses((status = 201, body = Compute)))]
pub(super) async fn start_compute(
    State(server): Server,
    Path((tenant, branch)): Path<(String, String)>,
    Body(body): Body<NewCompute>,
) -> Created<Compute> {
    Ok((StatusCode::CREATED, Json(server.start_compute(&tenant, &branch, body).await?)))
}

/// Lists the computes.
#[utoipa::path(get, path = "/v1/computes", responses((status = 200, body = [Compute])))]
pub(super) async fn list_computes(State(server): Server) -> Answer<Vec<Compute>> {
    server.list_computes().await.map(Json)
}

/// Shows a compute.
#[utoipa::path(get, path = "/v1/computes/{id}", params(("id", description = "id")), responses((status = 200, body = Compute)))]
pub(super) async fn show_compute(State(server): Server, Path(id): Path<String>) -> Answer<Compute> {
    server.show_compute(&id).await.map(Json)
}

/// Stops a compute cleanly; answers when it has ended.
#[utoipa::path(delete, path = "/v1/computes/{id}", params(("id", description = "id")), responses((status = 200)))]
pub(super) async fn stop_compute(State(server): Server, Path(id): Path<String>) -> Answer<Value> {
    server.stop_compute(&id).await?;
    Ok(Json(json!({ "stopped": id })))
}

pub(super) async fn begin(State(server): Server, Path(id): Path<String>) -> Answer<Begin> {
    server.begin_compute(&id).await.map(Json)
}

pub(super) async fn attach(State(server): Server, Path(id): Path<String>, Body(body): Body<Attach>) -> Answer<Attached> {
    server.attach_compute(&id, body).await.map(Json)
}

pub(super) async fn ended(State(server): Server, Path(id): Path<String>, Body(body): Body<Ended>) -> Answer<()> {
    server.compute_ended(&id, body).await.map(Json)
}

pub(super) async fn startup_blocks(State(server): Server, Path(id): Path<String>, Body(body): Body<StartupBlocks>) -> Answer<()> {
    server.learn_startup_blocks(&id, body.blocks).await.map(Json)
}

/// Where a waiting compute stands.
#[derive(Debug, Deserialize)]
pub(crate) struct OrdersQuery {
    incarnation: u64,
    server_run: String,
}

pub(super) async fn orders(State(server): Server, Path(id): Path<String>, Query(query): Query<OrdersQuery>) -> Answer<Orders> {
    server.orders(&id, query.incarnation, &query.server_run).await.map(Json)
}

pub(super) async fn put_file(State(server): Server, Path(id): Path<String>, Body(body): Body<FileVersion>) -> Answer<()> {
    server.put_compute_file(&id, body).await.map(Json)
}

pub(super) async fn metrics(State(server): Server) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0")], server.metrics())
}
