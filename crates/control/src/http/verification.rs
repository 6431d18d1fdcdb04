//! The routes of proof that restores work.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use varve_api::verification::{CheckReport, NewVerification, RestoreVerification};

use super::Server;
use super::extract::{Mutation, Names};
use super::internal::{SMALL, Sent, to_its_end};
use crate::error::Error;
use crate::ports::Pageserver;

type Answer<T> = Result<Json<T>, Error>;

/// Shows what is known of restores of a tenant: what is under way, and what came of it last. The tenant is not taken
/// over for it.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/restore-verification", params(("tenant", description = "name or id")),
    responses((status = 200, body = RestoreVerification)))]
pub(super) async fn restore_verification<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
) -> Answer<RestoreVerification> {
    server.control.restore_verification(&tenant).await.map(Json)
}

/// Verifies that a restore works: a branch is made at a moment, drawn by chance unless one is named, its compute is
/// started, all its relations are checked, and it is deleted. Answers once there is a branch; `GET` tells how far it is
/// and what came of it. Where not even a branch could be made for damage, nothing is under way, and `last` says so.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/restore-verification", params(("tenant", description = "name or id")),
    request_body = NewVerification, responses((status = 202, body = RestoreVerification)))]
pub(super) async fn verify_restore<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(tenant): Names<String>,
    Mutation { call, body }: Mutation<NewVerification>,
) -> Result<(StatusCode, Json<RestoreVerification>), Error> {
    let begun = to_its_end!(server, |control| control.verify_restore(&call, &tenant, &body))?;
    Ok((StatusCode::ACCEPTED, Json(begun)))
}

/// A compute tells of its check.
pub(super) async fn check<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(report): Sent<CheckReport, SMALL>,
) -> Answer<()> {
    server.control.note_check(&id, report).map(Json)
}
