//! Parts of a request, each with limits, and with errors like all others.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Server;
use super::door::RequestId;
use crate::call::{Call, Key};
use crate::error::{Error, RequestError};
use crate::ports::Pageserver;

/// Who asks, in the audit log, as long as people have no tokens of their own.
const ACTOR: &str = "admin API";
/// Bytes of a body that is no file.
pub(super) const SMALL_BYTES_MAX: usize = 64 << 10;

/// How large a body may be and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bytes: usize,
    /// None: as configured.
    pub(super) time: Option<Duration>,
}

/// Of bodies that are no files.
pub(super) const SMALL: Limits = Limits { bytes: SMALL_BYTES_MAX, time: None };
/// Of a hello, which names all computes of a host.
pub(super) const HELLO: Limits = Limits { bytes: 32 << 20, time: Some(Duration::from_secs(30)) };
/// Of a file of a data directory, base64 in JSON: those are at most 64 MiB.
pub(super) const FILE: Limits = Limits { bytes: 90 << 20, time: Some(Duration::from_secs(60)) };
/// Of blocks of a start.
pub(super) const BLOCKS: Limits = Limits { bytes: 8 << 20, time: Some(Duration::from_secs(30)) };
/// Of a template.
pub(super) const TEMPLATE: Limits = Limits { bytes: 512 << 20, time: Some(Duration::from_secs(300)) };

/// Reads a body within its limits.
pub(super) async fn read<P: Pageserver>(server: &Server<P>, headers: &HeaderMap, body: Body, limits: Limits) -> Result<Bytes, Error> {
    let time = limits.time.unwrap_or(server.config.body_max);
    let claimed: Option<u64> = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if claimed.is_some_and(|claimed| claimed > limits.bytes as u64) {
        return Err(RequestError::TooLarge(limits.bytes).into());
    }
    let all = async {
        let mut stream = body.into_data_stream();
        let mut read = BytesMut::with_capacity(claimed.unwrap_or(0).min(1 << 20) as usize);
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| RequestError::BrokeOff(error.to_string()))?;
            if read.len() + chunk.len() > limits.bytes {
                return Err(RequestError::TooLarge(limits.bytes));
            }
            read.extend_from_slice(&chunk);
        }
        Ok(read.freeze())
    };
    let read = server.control.environment().within(time, all).await;
    Ok(read.ok_or(RequestError::TooSlow(time.as_secs()))??)
}

/// Whether a body is of a type.
pub(super) fn is_type(headers: &HeaderMap, wanted: &str) -> bool {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    given.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(wanted)
}

/// Reads a JSON body; none, and `null`, are an empty object.
pub(super) async fn json<P: Pageserver, T: DeserializeOwned>(
    server: &Server<P>,
    headers: &HeaderMap,
    body: Body,
    limits: Limits,
) -> Result<(T, Bytes), Error> {
    // Its type is looked at before it is read, and where none is claimed once it turns out to be there.
    if headers.contains_key(header::CONTENT_TYPE) && !is_type(headers, "application/json") {
        return Err(RequestError::MediaType("application/json").into());
    }
    let bytes = read(server, headers, body, limits).await?;
    if !bytes.is_empty() && !is_type(headers, "application/json") {
        return Err(RequestError::MediaType("application/json").into());
    }
    let text: &[u8] = if bytes.is_empty() || bytes.as_ref() == b"null" { b"{}" } else { &bytes };
    let value = serde_json::from_slice(text).map_err(|error| RequestError::Body(error.to_string()))?;
    Ok((value, bytes))
}

/// A body without anything in it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// A request that changes something: its body, and who asks under which key.
pub(super) struct Mutation<T> {
    pub(super) call: Call,
    pub(super) body: T,
}

impl<P: Pageserver, T: DeserializeOwned> FromRequest<Server<P>> for Mutation<T> {
    type Rejection = Error;

    async fn from_request(request: Request, server: &Server<P>) -> Result<Self, Error> {
        let (parts, body) = request.into_parts();
        let (value, bytes) = json(server, &parts.headers, body, SMALL).await?;
        let mut keys = parts.headers.get_all("idempotency-key").iter();
        let key = match (keys.next(), keys.next()) {
            (None, _) => None,
            (Some(key), None) => {
                let text = key.to_str().unwrap_or_default();
                Some(Key::parse(text, &[parts.method.as_str().as_bytes(), parts.uri.path().as_bytes(), &bytes])?)
            }
            (Some(_), Some(_)) => return Err(RequestError::Header { name: "Idempotency-Key", problem: "it is given twice" }.into()),
        };
        let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
        Ok(Mutation { call: Call { key, actor: ACTOR.to_owned(), request_id }, body: value })
    }
}

/// Segments of the address, decoded.
pub(super) struct Names<T>(pub(super) T);

impl<P: Pageserver, T: DeserializeOwned + Send> FromRequestParts<Server<P>> for Names<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, server: &Server<P>) -> Result<Self, Error> {
        let found = Path::<T>::from_request_parts(parts, server).await;
        found.map(|Path(names)| Names(names)).map_err(|error| RequestError::Address(error.body_text()).into())
    }
}

/// Parameters of the address; one that the route does not know is an error.
pub(super) struct Parameters<T>(pub(super) T);

impl<P: Pageserver, T: DeserializeOwned> FromRequestParts<Server<P>> for Parameters<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, server: &Server<P>) -> Result<Self, Error> {
        let found = Query::<T>::from_request_parts(parts, server).await;
        found.map(|Query(parameters)| Parameters(parameters)).map_err(|error| RequestError::Address(error.body_text()).into())
    }
}
