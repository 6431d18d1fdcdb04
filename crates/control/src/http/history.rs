//! The routes of how far back a tenant can go, and of its snapshots.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use varve_api::admin::{Deleted, Tenant};
use varve_api::history::{NewSnapshot, Snapshot, TenantChange};

use super::Server;
use super::extract::{Mutation, Names, Nothing};
use super::internal::to_its_end;
use crate::error::Error;
use crate::ports::Pageserver;

type Answer<T> = Result<Json<T>, Error>;

/// Changes how far back a tenant can go. A longer window grows from now on: what is collected does not come back.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}", params(("tenant", description = "name or id")), request_body = TenantChange,
    responses((status = 200, body = Tenant)))]
pub(super) async fn change_tenant<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body }: Mutation<TenantChange>,
) -> Answer<Tenant> {
    to_its_end!(server, |control| control.change_tenant(&call, &tenant, &body)).map(Json)
}

/// Collects at once what a tenant need not keep any more, and answers when that is done. It happens by itself, too.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/collect", params(("tenant", description = "name or id")),
    responses((status = 200, body = Tenant)))]
pub(super) async fn collect_tenant<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call: _, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Tenant> {
    to_its_end!(server, |control| control.collect_tenant(&tenant)).map(Json)
}

/// Lists a tenant's snapshots by name.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/snapshots", params(("tenant", description = "name or id")),
    responses((status = 200, body = [Snapshot])))]
pub(super) async fn list_snapshots<P: Pageserver>(State(server): State<Server<P>>, Names(tenant): Names<String>) -> Answer<Vec<Snapshot>> {
    server.control.list_snapshots(&tenant).await.map(Json)
}

/// Gives a moment of a branch a name; it stays readable however long the tenant's history is, also when the branch is
/// deleted.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/snapshots", params(("tenant", description = "name or id")),
    request_body = NewSnapshot, responses((status = 201, body = Snapshot)))]
pub(super) async fn create_snapshot<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body }: Mutation<NewSnapshot>,
) -> Result<(StatusCode, Json<Snapshot>), Error> {
    let made = to_its_end!(server, |control| control.create_snapshot(&call, &tenant, &body))?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// Shows a snapshot.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/snapshots/{snapshot}",
    params(("tenant", description = "name or id"), ("snapshot", description = "name")), responses((status = 200, body = Snapshot)))]
pub(super) async fn show_snapshot<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, snapshot)): Names<(String, String)>,
) -> Answer<Snapshot> {
    server.control.show_snapshot(&tenant, &snapshot).await.map(Json)
}

/// Deletes a snapshot: what only it kept is collected.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/snapshots/{snapshot}",
    params(("tenant", description = "name or id"), ("snapshot", description = "name")), responses((status = 200, body = Deleted)))]
pub(super) async fn delete_snapshot<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, snapshot)): Names<(String, String)>,
    Mutation { call, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Deleted> {
    to_its_end!(server, |control| control.delete_snapshot(&call, &tenant, &snapshot)).map(Json)
}
