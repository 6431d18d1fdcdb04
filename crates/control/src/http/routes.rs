//! The public routes' handlers.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use varve_api::admin::{
    Branch, BranchChange, BranchMoment, BranchSize, CacheUse, Compute, Deleted, Event, ForgottenWal, NewBranch, NewCompute, NewTenant,
    Ready, Restore, Restored, Server as ServerFacts, Settings, SettingsChange, Stopped, Tenant, TenantPassword, Wal,
};

use varve_api::size::Size;

use super::Server;
use super::extract::{Mutation, Names, Nothing, Parameters};
use super::internal::to_its_end;
use crate::arguments::{Listed, Page};
use crate::error::Error;
use crate::ports::Pageserver;

type Answer<T> = Result<Json<T>, Error>;
type Created<T> = Result<(StatusCode, Json<T>), Error>;

/// A moment in a query string.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MomentQuery {
    lsn: Option<String>,
    at: Option<String>,
}

/// Which part of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    limit: Option<usize>,
    cursor: Option<String>,
    prefix: Option<String>,
}

impl PageQuery {
    fn page(&self) -> Result<Page, Error> {
        Page::parse(self.prefix.as_deref(), self.cursor.as_deref(), self.limit)
    }

    /// The items, with the address of the next page in `Link`. Everything in it is made of letters that an address
    /// takes as they are.
    fn answer<T: Serialize>(&self, path: &str, page: &Page, listed: Listed<T>) -> Response {
        let mut response = Json(listed.items).into_response();
        if let Some(cursor) = listed.next {
            let prefix = if page.prefix.is_empty() { String::new() } else { format!("&prefix={}", page.prefix) };
            let link = format!("<{path}?limit={}&cursor={cursor}{prefix}>; rel=\"next\"", page.limit);
            if let Ok(link) = HeaderValue::from_str(&link) {
                response.headers_mut().insert(header::LINK, link);
            }
        }
        response
    }
}

/// Shows the server itself: its name, its hosts, and the tenants that others took over from it.
#[utoipa::path(get, path = "/v1/server", responses((status = 200, body = ServerFacts)))]
pub(super) async fn show_server<P: Pageserver>(State(server): State<Server<P>>) -> Json<ServerFacts> {
    Json(server.control.server())
}

/// Gives up WAL that the server keeps though no log in the store knows of it: what only it holds is lost for good.
#[utoipa::path(delete, path = "/v1/server/orphaned-wal/{tenant_id}",
    params(("tenant_id", description = "id"), ("timeline_id" = Option<String>, Query, description = "of one timeline only")),
    responses((status = 200, body = ForgottenWal)))]
pub(super) async fn forget_wal<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Parameters(query): Parameters<ForgetQuery>,
) -> Answer<ForgottenWal> {
    server.control.forget_wal(&tenant, query.timeline_id.as_deref()).await.map(Json)
}

/// Which WAL to give up.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForgetQuery {
    #[serde(default)]
    timeline_id: Option<String>,
}

/// Takes a tenant over, whoever has it: that server acknowledges and serves nothing more of it.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/take", params(("tenant", description = "name or id")),
    responses((status = 200, body = Tenant)))]
pub(super) async fn take_tenant<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call: _, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Tenant> {
    to_its_end!(server, |control| control.take_tenant(&tenant)).map(Json)
}

/// Shows the password of a tenant's superuser, as it was given last. What the tenant made of it by SQL is not known.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/password", params(("tenant", description = "name or id")),
    responses((status = 200, body = TenantPassword)))]
pub(super) async fn show_password<P: Pageserver>(State(server): State<Server<P>>, Names(tenant): Names<String>) -> Answer<TenantPassword> {
    server.control.tenant_password(&tenant).await.map(Json)
}

/// Gives a tenant's superuser another password: running computes take it at once, everything else at its next start,
/// once each.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/password", params(("tenant", description = "name or id")),
    responses((status = 200, body = TenantPassword)))]
pub(super) async fn rotate_password<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<TenantPassword> {
    to_its_end!(server, |control| control.rotate_password(&call, &tenant)).map(Json)
}

/// Says whether the server can work: it can while the store answers. Tenants that others took over are named; they do
/// not make it unready.
#[utoipa::path(get, path = "/readyz", responses((status = 200, body = Ready)))]
pub(super) async fn ready<P: Pageserver>(State(server): State<Server<P>>) -> Answer<Ready> {
    server.control.ready().await.map(Json)
}

/// Lists tenants by name. The header `Link` has the address of the next page, if there is one. No tenant is taken over
/// for it.
#[utoipa::path(get, path = "/v1/tenants",
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "items of a page; 100 by default"),
        ("cursor" = Option<String>, Query, description = "from the last page's Link"),
        ("prefix" = Option<String>, Query, description = "only names that begin so")),
    responses((status = 200, body = [Tenant], headers(("Link" = String, description = "address of the next page")))))]
pub(super) async fn list_tenants<P: Pageserver>(
    State(server): State<Server<P>>,
    Parameters(query): Parameters<PageQuery>,
) -> Result<Response, Error> {
    let page = query.page()?;
    let listed = server.control.list_tenants(&page).await?;
    Ok(query.answer("/v1/tenants", &page, listed))
}

/// Creates a tenant with a branch `main`.
#[utoipa::path(post, path = "/v1/tenants", request_body = NewTenant, responses((status = 201, body = Tenant)))]
pub(super) async fn create_tenant<P: Pageserver>(
    State(server): State<Server<P>>,
    Mutation { call, body }: Mutation<NewTenant>,
) -> Created<Tenant> {
    let created = to_its_end!(server, |control| control.create_tenant(&call, &body))?;
    Ok((StatusCode::CREATED, Json(created)))
}

/// Shows a tenant, and who owns it. It is not taken over for it.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", params(("tenant", description = "name or id")), responses((status = 200, body = Tenant)))]
pub(super) async fn show_tenant<P: Pageserver>(State(server): State<Server<P>>, Names(tenant): Names<String>) -> Answer<Tenant> {
    server.control.show_tenant(&tenant).await.map(Json)
}

/// Deletes a tenant with all its history.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}", params(("tenant", description = "name or id")),
    responses((status = 200, body = Deleted)))]
pub(super) async fn delete_tenant<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Deleted> {
    to_its_end!(server, |control| control.delete_tenant(&call, &tenant)).map(Json)
}

/// Lists a tenant's branches by name. The header `Link` has the address of the next page, if there is one. Heads and
/// sizes are what is known without opening anything.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches",
    params(("tenant", description = "name or id"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "items of a page; 100 by default"),
        ("cursor" = Option<String>, Query, description = "from the last page's Link"),
        ("prefix" = Option<String>, Query, description = "only names that begin so")),
    responses((status = 200, body = [Branch], headers(("Link" = String, description = "address of the next page")))))]
pub(super) async fn list_branches<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Parameters(query): Parameters<PageQuery>,
) -> Result<Response, Error> {
    let page = query.page()?;
    let listed = server.control.list_branches(&tenant, &page).await?;
    // Found, so it is a name or an id: both are made of plain letters.
    Ok(query.answer(&format!("/v1/tenants/{tenant}/branches"), &page, listed))
}

/// Creates a branch.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches", params(("tenant", description = "name or id")), request_body = NewBranch,
    responses((status = 201, body = Branch)))]
pub(super) async fn create_branch<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body }: Mutation<NewBranch>,
) -> Created<Branch> {
    let created = to_its_end!(server, |control| control.create_branch(&call, &tenant, &body))?;
    Ok((StatusCode::CREATED, Json(created)))
}

/// Shows a branch.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = Branch)))]
pub(super) async fn show_branch<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<Branch> {
    server.control.show_branch(&tenant, &branch).await.map(Json)
}

/// Gives a branch another name; its computes go along.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}/branches/{branch}",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    request_body = BranchChange, responses((status = 200, body = Branch)))]
pub(super) async fn rename_branch<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body }: Mutation<BranchChange>,
) -> Answer<Branch> {
    to_its_end!(server, |control| control.rename_branch(&call, &tenant, &branch, &body.name)).map(Json)
}

/// Deletes a branch. Its history goes as far as no other branch came from it. A tenant's last branch stays.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/branches/{branch}",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = Deleted)))]
pub(super) async fn delete_branch<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Deleted> {
    to_its_end!(server, |control| control.delete_branch(&call, &tenant, &branch)).map(Json)
}

/// Takes a branch back to a moment; the old history stays under another name.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches/{branch}/restore",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    request_body = Restore, responses((status = 200, body = Restored)))]
pub(super) async fn restore_branch<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body }: Mutation<Restore>,
) -> Answer<Restored> {
    to_its_end!(server, |control| control.restore_branch(&call, &tenant, &branch, &body)).map(Json)
}

/// Shows the settings of a branch, as `ALTER SYSTEM` or this API made them. No compute need run.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/settings",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = Settings)))]
pub(super) async fn show_settings<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<Settings> {
    server.control.settings(&tenant, &branch).await.map(Json)
}

/// Changes the settings of a branch on which no compute runs; its next start has them. A running one has
/// `ALTER SYSTEM`, and this answers 409.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}/branches/{branch}/settings",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    request_body = SettingsChange, responses((status = 200, body = Settings)))]
pub(super) async fn change_settings<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body }: Mutation<SettingsChange>,
) -> Answer<Settings> {
    to_its_end!(server, |control| control.change_settings(&call, &tenant, &branch, &body)).map(Json)
}

/// Says which LSN a time is, or which time an LSN.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/moment",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline"),
        ("lsn" = Option<String>, Query), ("at" = Option<String>, Query)),
    responses((status = 200, body = BranchMoment)))]
pub(super) async fn moment<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Parameters(query): Parameters<MomentQuery>,
) -> Answer<BranchMoment> {
    server.control.moment(&tenant, &branch, query.lsn.as_deref(), query.at.as_deref()).await.map(Json)
}

/// Shows how much of a machine the compute of a branch may take.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/size",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = BranchSize)))]
pub(super) async fn show_size<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<BranchSize> {
    server.control.branch_size(&tenant, &branch).await.map(Json)
}

/// Gives the compute of a branch another size; what is left out stays. One that runs takes it while it runs, and no
/// session ends; what Postgres cannot change while it runs is set for the least at the next start.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}/branches/{branch}/size",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    request_body = Size, responses((status = 200, body = BranchSize)))]
pub(super) async fn resize<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body }: Mutation<Size>,
) -> Answer<BranchSize> {
    to_its_end!(server, |control| control.resize(&call, &tenant, &branch, &body)).map(Json)
}

/// Lists what happened to the compute of a branch, oldest first: at most 100 events, since this server started.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/events",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = [Event])))]
pub(super) async fn list_events<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<Vec<Event>> {
    server.control.branch_events(&tenant, &branch).await.map(Json)
}

/// Says which WAL of a branch can be had: that of which redo can be checked.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/wal",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = Wal)))]
pub(super) async fn branch_wal<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<Wal> {
    server.control.branch_wal(&tenant, &branch).await.map(Json)
}

/// A position in WAL in a query string.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WalQuery {
    from: String,
}

/// Gives WAL of a branch as it is, from a position on: at least a byte and at most 16 MiB.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/wal/bytes",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline"),
        ("from" = String, Query, description = "an LSN")),
    responses((status = 200, body = [u8], content_type = "application/octet-stream")))]
pub(super) async fn branch_wal_bytes<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Parameters(query): Parameters<WalQuery>,
) -> Result<impl IntoResponse, Error> {
    let bytes = server.control.branch_wal_bytes(&tenant, &branch, &query.from).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// Lists the computes that run, or should run, on a branch; without passwords.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/branches/{branch}/computes",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    responses((status = 200, body = [Compute])))]
pub(super) async fn list_branch_computes<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
) -> Answer<Vec<Compute>> {
    server.control.list_branch_computes(&tenant, &branch).await.map(Json)
}

/// Sees to it that a compute runs on a branch, and answers when it takes connections: 201 when it was started for this
/// call, 200 when it ran already. One that runs with other arguments is left alone unless `replace` is set. At a moment
/// of the past each call starts another one.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/branches/{branch}/computes",
    params(("tenant", description = "name or id"), ("branch", description = "name, or id of its timeline")),
    request_body = NewCompute, responses((status = 201, body = Compute), (status = 200, body = Compute)))]
pub(super) async fn start_compute<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((tenant, branch)): Names<(String, String)>,
    Mutation { call, body }: Mutation<NewCompute>,
) -> Created<Compute> {
    let started = to_its_end!(server, |control| control.ensure_running(&call, &tenant, &branch, &body))?;
    Ok((if started.fresh { StatusCode::CREATED } else { StatusCode::OK }, Json(started.compute)))
}

/// Lists the computes that this server knows; without passwords.
#[utoipa::path(get, path = "/v1/computes", responses((status = 200, body = [Compute])))]
pub(super) async fn list_computes<P: Pageserver>(State(server): State<Server<P>>) -> Json<Vec<Compute>> {
    Json(server.control.list_computes())
}

/// Shows a compute, with its password.
#[utoipa::path(get, path = "/v1/computes/{id}", params(("id", description = "id")), responses((status = 200, body = Compute)))]
pub(super) async fn show_compute<P: Pageserver>(State(server): State<Server<P>>, Names(id): Names<String>) -> Answer<Compute> {
    server.control.show_compute(&id).await.map(Json)
}

/// Stops a compute cleanly; answers when it has ended. One that did not end cleanly is stopped, too, and the answer is
/// an error that says so.
#[utoipa::path(delete, path = "/v1/computes/{id}", params(("id", description = "id")), responses((status = 200, body = Stopped)))]
pub(super) async fn stop_compute<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Mutation { call, body: Nothing {} }: Mutation<Nothing>,
) -> Answer<Stopped> {
    to_its_end!(server, |control| control.stop_compute(&call, &id)).map(Json)
}

/// One of the figures of a block cache: name, kind, and which it is.
type CacheFigure = (&'static str, &'static str, fn(&CacheUse) -> u64);

/// What is told of the block caches of computes.
const CACHE_FIGURES: [CacheFigure; 9] = [
    ("hits", "counter", |cache| cache.hits),
    ("fetches", "counter", |cache| cache.fetches),
    ("fetched_blocks", "counter", |cache| cache.blocks_fetched),
    ("evicted_blocks", "counter", |cache| cache.blocks_evicted),
    ("rebases", "counter", |cache| cache.rebases),
    ("handed_over_blocks", "counter", |cache| cache.blocks_handed_over),
    ("cached_bytes", "gauge", |cache| cache.cached_bytes),
    ("dirty_bytes", "gauge", |cache| cache.dirty_bytes),
    ("limit_bytes", "gauge", |cache| cache.limit_bytes.unwrap_or(0)),
];

fn cache_figures(caches: &[(String, CacheUse)]) -> String {
    let mut text = String::new();
    for (name, kind, figure) in CACHE_FIGURES {
        let suffix = if kind == "counter" { "_total" } else { "" };
        text += &format!("# TYPE varve_compute_cache_{name} {kind}\n");
        for (id, cache) in caches {
            text += &format!("varve_compute_cache_{name}{suffix}{{compute=\"{id}\"}} {}\n", figure(cache));
        }
    }
    text
}

pub(super) async fn metrics<P: Pageserver>(State(server): State<Server<P>>) -> impl IntoResponse {
    let others = server.config.metrics.as_ref().map(|metrics| metrics()).unwrap_or_default();
    let caches = cache_figures(&server.control.caches());
    let verified = server.control.verification_figures();
    let wanted = server.control.computes_wanted();
    let text = format!("{others}# TYPE varve_computes gauge\nvarve_computes {wanted}\n{caches}{verified}# EOF\n");
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0")], text)
}
