//! The OpenAPI 3.1 document: generated from the routes' own annotations, and completed with what the door says to any
//! of them.

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::OpenApi;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{Object, Ref, Type};
use utoipa::openapi::{ContentBuilder, RefOr, Required, ResponseBuilder};
use varve_api::Problem;

use super::{history, routes, verification};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Varve admin API",
        description = "Tenants, branches, restores and computes. Errors are application/problem+json with a stable code. \
                       Lists are paged: follow the header Link."
    ),
    components(schemas(Problem)),
    paths(
        routes::list_tenants,
        routes::create_tenant,
        routes::show_tenant,
        routes::delete_tenant,
        history::change_tenant,
        history::collect_tenant,
        verification::restore_verification,
        verification::verify_restore,
        history::list_snapshots,
        history::create_snapshot,
        history::show_snapshot,
        history::delete_snapshot,
        routes::list_branches,
        routes::create_branch,
        routes::show_branch,
        routes::rename_branch,
        routes::delete_branch,
        routes::restore_branch,
        routes::show_settings,
        routes::change_settings,
        routes::show_size,
        routes::resize,
        routes::list_events,
        routes::moment,
        routes::branch_wal,
        routes::branch_wal_bytes,
        routes::list_branch_computes,
        routes::start_compute,
        routes::list_computes,
        routes::show_compute,
        routes::stop_compute,
        routes::take_tenant,
        routes::show_password,
        routes::rotate_password,
        routes::forget_wal,
        routes::show_server,
        routes::ready
    )
)]
struct Document;

/// What any request may be answered.
const ANY: [(&str, &str); 5] = [
    ("400", "An argument, the address, a header or the body cannot be read"),
    ("403", "The request came from a web page, or its Host is none of this server's"),
    ("500", "Something stored is damaged, or a bug; nothing wrong was served"),
    ("503", "Not possible right now; try again"),
    ("405", "The address does not take this method; Allow says which it takes"),
];
/// What a request that names something may be answered.
const NAMED: [(&str, &str); 3] = [
    ("404", "There is no such tenant, branch, compute or address"),
    ("409", "A name, a port, a key or the tenant itself is somebody else's, or the state does not allow it"),
    ("422", "The moment is not kept or in the future, or no host can do it"),
];
/// What a request with a body may be answered.
const WITH_BODY: [(&str, &str); 6] = [
    ("404", "There is no such tenant, branch, compute or address"),
    ("408", "The body did not arrive in time"),
    ("409", "A name, a port, a key or the tenant itself is somebody else's, or the state does not allow it"),
    ("413", "The body is too large"),
    ("415", "The body is not application/json, or does not say so"),
    ("422", "The moment is not kept or in the future, or no host can do it"),
];

fn add(operation: &mut Operation, answers: &[(&str, &str)]) {
    for (status, description) in answers {
        let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        let mut response = ResponseBuilder::new().description(*description).content("application/problem+json", problem);
        if *status == "405" {
            let text: RefOr<_> = Object::with_type(Type::String).into();
            response = response.header("Allow", HeaderBuilder::new().schema(text).build());
        }
        operation.responses.responses.entry((*status).to_owned()).or_insert_with(|| response.build().into());
    }
}

fn header(name: &str, description: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(Object::with_type(Type::String)))
        .build()
}

/// The document.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    for item in document.paths.paths.values_mut() {
        let mutations = [&mut item.post, &mut item.patch, &mut item.delete, &mut item.put];
        for operation in mutations.into_iter().flatten() {
            add(operation, &ANY);
            add(operation, &WITH_BODY);
            operation.parameters.get_or_insert_default().push(header(
                "Idempotency-Key",
                "1 to 255 visible ASCII characters: the same request with the same key is done once, and gets the same answer again. \
                 The newest 1,000 keys of a tenant are remembered, also over restarts",
            ));
        }
        if let Some(operation) = &mut item.get {
            add(operation, &ANY);
            if operation.parameters.as_ref().is_some_and(|parameters| parameters.iter().any(|p| p.parameter_in == ParameterIn::Path)) {
                add(operation, &NAMED);
            }
        }
    }
    document
}

/// `GET /v1/openapi.json`.
pub(super) async fn show() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], document().to_json().unwrap_or_default())
}
