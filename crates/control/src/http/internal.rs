//! Routes of hosts and of the computes on them. The door has checked their token.

use axum::Json;
use axum::extract::{FromRequest, Request, State};
use bytes::Bytes;
use futures::StreamExt as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use varve_api::host::{
    Attach, Attached, Begin, BeginRequest, CacheReport, ComputeReport, Ended, EventReport, FileVersion, Hello, HostOrders, LeftoverQuery,
    LeftoverStart, Orders, OrdersQuery, PieceKept, StartupBlocks, Welcome,
};
use varve_api::{Code, Problem, Refusal};

use super::Server;
use super::extract::{self, Limits, Names, Parameters};
use crate::error::{Error, RequestError};
use crate::ports::Pageserver;

type Answer<T> = Result<Json<T>, Error>;

/// A JSON body of a size.
pub(super) struct Sent<T, const KIND: u8>(pub(super) T);

pub(super) const SMALL: u8 = 0;
const BLOCKS: u8 = 1;
const FILE: u8 = 2;
const HELLO: u8 = 3;

const fn limits(kind: u8) -> Limits {
    match kind {
        BLOCKS => extract::BLOCKS,
        FILE => extract::FILE,
        HELLO => extract::HELLO,
        _ => extract::SMALL,
    }
}

impl<P: Pageserver, T: DeserializeOwned, const KIND: u8> FromRequest<Server<P>> for Sent<T, KIND> {
    type Rejection = Error;

    async fn from_request(request: Request, server: &Server<P>) -> Result<Self, Error> {
        let (parts, body) = request.into_parts();
        let (value, _) = extract::json(server, &parts.headers, body, limits(KIND)).await?;
        Ok(Sent(value))
    }
}

/// Runs a call to its end, though its client goes away.
macro_rules! to_its_end {
    ($server:ident, |$control:ident| $work:expr) => {{
        let $control = $server.control.clone();
        $server.control.environment().to_its_end(async move { $work.await }).await
    }};
}
pub(super) use to_its_end;

pub(super) async fn begin<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(request): Sent<BeginRequest, SMALL>,
) -> Answer<Begin> {
    to_its_end!(server, |control| control.begin(&id, &request)).map(Json)
}

pub(super) async fn attach<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(attach): Sent<Attach, SMALL>,
) -> Answer<Attached> {
    to_its_end!(server, |control| control.attach(&id, attach)).map(Json)
}

pub(super) async fn ended<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(ended): Sent<Ended, FILE>,
) -> Answer<()> {
    to_its_end!(server, |control| control.ended(&id, &ended)).map(Json)
}

pub(super) async fn startup_blocks<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(body): Sent<StartupBlocks, BLOCKS>,
) -> Answer<()> {
    server.control.learn_startup_blocks(&id, body.blocks).await.map(Json)
}

pub(super) async fn cache<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(report): Sent<CacheReport, SMALL>,
) -> Answer<()> {
    to_its_end!(server, |control| control.note_cache(&id, &report)).map(Json)
}

pub(super) async fn event<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(report): Sent<EventReport, SMALL>,
) -> Answer<()> {
    server.control.note_event(&id, report).map(Json)
}

pub(super) async fn put_file<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(file): Sent<FileVersion, FILE>,
) -> Answer<()> {
    to_its_end!(server, |control| control.put_file(&id, file)).map(Json)
}

pub(super) async fn put_piece<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    request: Request,
) -> Answer<PieceKept> {
    let (parts, body) = request.into_parts();
    if !extract::is_type(&parts.headers, "application/octet-stream") {
        return Err(RequestError::MediaType("application/octet-stream").into());
    }
    let bytes = extract::read(&server, &parts.headers, body, extract::FILE).await?;
    to_its_end!(server, |control| control.put_piece(&id, bytes)).map(Json)
}

/// Which piece.
#[derive(Debug, Deserialize)]
pub(super) struct PieceQuery {
    name: String,
}

pub(super) async fn get_piece<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Parameters(query): Parameters<PieceQuery>,
) -> Result<Bytes, Error> {
    server.control.get_piece(&id, &query.name).await
}

pub(super) async fn leftover_start<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Parameters(query): Parameters<LeftoverQuery>,
) -> Answer<LeftoverStart> {
    server.control.leftover_start(&id, &query).await.map(Json)
}

/// WAL of any size, as it comes: its sender may be slow, but not silent.
pub(super) async fn take_leftover<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Parameters(query): Parameters<LeftoverQuery>,
    request: Request,
) -> Answer<LeftoverStart> {
    let (parts, body) = request.into_parts();
    if !extract::is_type(&parts.headers, "application/octet-stream") {
        return Err(RequestError::MediaType("application/octet-stream").into());
    }
    let (environment, silence) = (server.control.environment().clone(), server.config.body_max);
    let bytes = futures::stream::unfold(body.into_data_stream(), move |mut body| {
        let environment = environment.clone();
        async move {
            let next = match environment.within(silence, body.next()).await {
                Some(next) => next?.map_err(|error| RequestError::BrokeOff(error.to_string())),
                None => Err(RequestError::TooSlow(silence.as_secs())),
            };
            Some((next.map_err(|error| Error::from(error).refusal()), body))
        }
    });
    server.control.take_leftover(&id, &query, bytes.boxed()).await.map(Json)
}

pub(super) async fn orders<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Parameters(query): Parameters<OrdersQuery>,
) -> Answer<Orders> {
    server.control.orders(&id, &query).await.map(Json)
}

pub(super) async fn hello<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Sent(hello): Sent<Hello, HELLO>,
) -> Answer<Welcome> {
    server.control.hello(&id, hello).await.map(Json)
}

/// Which orders a waiting host knows.
#[derive(Debug, Deserialize)]
pub(super) struct HostOrdersQuery {
    known: Option<u64>,
}

pub(super) async fn host_orders<P: Pageserver>(
    State(server): State<Server<P>>,
    Names(id): Names<String>,
    Parameters(query): Parameters<HostOrdersQuery>,
) -> Answer<HostOrders> {
    server.control.host_orders(&id, query.known).await.map(Json)
}

pub(super) async fn report<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((host, compute)): Names<(String, String)>,
    Sent(report): Sent<ComputeReport, SMALL>,
) -> Answer<()> {
    server.control.report(&host, &compute, report).await.map(Json)
}

/// What `initdb` made, or why it did not.
pub(super) struct Archive(Result<Bytes, Refusal>);

impl<P: Pageserver> FromRequest<Server<P>> for Archive {
    type Rejection = Error;

    async fn from_request(request: Request, server: &Server<P>) -> Result<Self, Error> {
        let (parts, body) = request.into_parts();
        if extract::is_type(&parts.headers, "application/problem+json") {
            let text = extract::read(server, &parts.headers, body, extract::SMALL).await?;
            let problem: Problem = serde_json::from_slice(&text).map_err(|error| RequestError::Body(error.to_string()))?;
            let code = Code::from_name(&problem.code).unwrap_or(Code::HostUnfit);
            return Ok(Archive(Err(Refusal::new(code, problem.detail))));
        }
        if !extract::is_type(&parts.headers, "application/zstd") {
            return Err(RequestError::MediaType("application/zstd").into());
        }
        Ok(Archive(Ok(extract::read(server, &parts.headers, body, extract::TEMPLATE).await?)))
    }
}

pub(super) async fn template<P: Pageserver>(
    State(server): State<Server<P>>,
    Names((host, order)): Names<(String, String)>,
    Archive(made): Archive,
) -> Answer<()> {
    // A problem of the host's own is told to who waits for the template; its report of it succeeded.
    let was_made = made.is_ok();
    let taken = to_its_end!(server, |control| control.template_made(&host, &order, made));
    match taken {
        Err(Error::Refused(_)) if !was_made => Ok(Json(())),
        other => other.map(Json),
    }
}
