//! What every request passes on its way in.

use std::net::IpAddr;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest as _, Sha256};

use super::Server;
use crate::error::{Error, RequestError, quoted};
use crate::ports::Pageserver;

/// Carries a request's id, in and out.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that a client may give.
const REQUEST_ID_CHARS_MAX: usize = 64;
/// How long a question may take: some wait for an answer as long as a poll does, some for WAL to be applied.
const READ_MAX: Duration = Duration::from_secs(150);
/// How long work may take: a clean stop has five minutes.
const WORK_MAX: Duration = Duration::from_secs(600);

/// A request's id.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub(super) String);

/// Gives each request an id: the client's, or one made here. The answer has it, and the audit log.
pub(super) async fn names_requests<P: Pageserver>(State(server): State<Server<P>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_good = |text: &&str| {
        !text.is_empty() && text.len() <= REQUEST_ID_CHARS_MAX && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let id = match given.filter(is_good) {
        Some(id) => id.to_owned(),
        None => server.control.environment().random().map_or_else(|_| "0".to_owned(), |id| format!("{:016x}", u64::from_be_bytes(id))),
    };
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Says that answers are what their type says.
pub(super) async fn forbids_sniffing(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Refuses what a browser sends on behalf of a web page: with an `Origin`, or with a `Host` that only looks like this
/// server.
pub(super) async fn is_no_web_page<P: Pageserver>(State(server): State<Server<P>>, request: Request, next: Next) -> Response {
    match looks_right(request.headers(), request.uri().host(), &server.config.hosts, &server.config.origins) {
        Ok(()) => next.run(request).await,
        Err(error) => Error::from(error).into_response(),
    }
}

fn looks_right(headers: &HeaderMap, authority: Option<&str>, hosts: &[String], origins: &[String]) -> Result<(), RequestError> {
    let missing = RequestError::Header { name: "Host", problem: "it is missing, given twice, or no text" };
    let mut given = headers.get_all(header::HOST).iter();
    let host = match (given.next(), given.next()) {
        (Some(host), None) => host.to_str().map_err(|_| missing)?,
        _ => return Err(missing),
    };
    // An absolute address names a host of its own.
    for host in std::iter::once(host).chain(authority) {
        if !is_ours(host, hosts) {
            return Err(RequestError::ForeignHost(quoted(host)));
        }
    }
    for origin in headers.get_all(header::ORIGIN) {
        let origin = String::from_utf8_lossy(origin.as_bytes()).into_owned();
        if !origins.contains(&origin) {
            return Err(RequestError::ForeignOrigin(quoted(&origin)));
        }
    }
    Ok(())
}

/// Whether a `Host` is an address of loopback or a name of ours.
fn is_ours(host: &str, hosts: &[String]) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').filter(|(name, _)| !name.contains(':')).map_or(host, |(name, _)| name),
    };
    let loopback = name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    loopback || name.eq_ignore_ascii_case("localhost") || hosts.iter().any(|ours| ours.eq_ignore_ascii_case(name))
}

/// Ends what takes too long. Work that changes something goes on to its end, and only its answer is given up.
pub(super) async fn takes_its_time<P: Pageserver>(State(server): State<Server<P>>, request: Request, next: Next) -> Response {
    let limit = if matches!(*request.method(), Method::GET | Method::HEAD) { READ_MAX } else { WORK_MAX };
    match server.control.environment().within(limit, next.run(request)).await {
        Some(response) => response,
        None => Error::from(RequestError::WorkTooSlow(limit.as_secs())).into_response(),
    }
}

/// Lets hosts and their computes in, and nobody else. The body of others is not read.
pub(super) async fn needs_token<P: Pageserver>(State(server): State<Server<P>>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = shown.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    // Hashes are compared, so that the time it takes tells nothing of how much was right.
    let is_right = |(_, token): (&str, &str)| {
        !server.config.host_token.is_empty() && Sha256::digest(token.trim()) == Sha256::digest(&server.config.host_token)
    };
    if token.is_some_and(is_right) { next.run(request).await } else { Error::from(RequestError::NoToken).into_response() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_ours() {
        let hosts = ["varve.example".to_owned()];
        for ours in ["127.0.0.1:9898", "127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:80", "[::1]", "127.9.9.9:5", "varve.example:443"] {
            assert!(is_ours(ours, &hosts), "{ours}");
        }
        for foreign in ["evil", "evil:9898", "127.0.0.1.evil", "localhost.evil", "", "10.0.0.1:9898", "[::2]:80", "evil@127.0.0.1"] {
            assert!(!is_ours(foreign, &hosts), "{foreign}");
        }
    }

    #[test]
    fn an_origin_is_refused_unless_it_is_allowed() {
        let mut headers = HeaderMap::new();
        assert!(matches!(looks_right(&headers, None, &[], &[]), Err(RequestError::Header { name: "Host", .. })));
        headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:9898"));
        assert_eq!(looks_right(&headers, None, &[], &[]), Ok(()));
        assert_eq!(looks_right(&headers, Some("evil"), &[], &[]), Err(RequestError::ForeignHost("evil".to_owned())));
        headers.insert(header::ORIGIN, HeaderValue::from_static("https://console.example"));
        assert!(matches!(looks_right(&headers, None, &[], &[]), Err(RequestError::ForeignOrigin(_))));
        assert_eq!(looks_right(&headers, None, &[], &["https://console.example".to_owned()]), Ok(()));
        headers.append(header::HOST, HeaderValue::from_static("127.0.0.1:9898"));
        assert!(looks_right(&headers, None, &[], &["https://console.example".to_owned()]).is_err(), "two hosts");
    }
}
