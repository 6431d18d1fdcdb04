//! The control plane, as a compute process uses it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_api::Code;
use varve_api::client::{Call, Client, ClientError, segment};
use varve_api::host::{
    Attach, Attached, Begin, BeginRequest, CacheReport, Ended, EventReport, FileVersion, LeftoverQuery, LeftoverStart, Orders, OrdersQuery,
    PieceKept, StartupBlocks,
};
use varve_api::token::Token;
use varve_api::verification::CheckReport;
use varve_postgres::Lsn;

/// Limit of a call that moves a `pg_wal`.
const LEFTOVER_MAX: Duration = Duration::from_secs(600);
/// Limit of calls that move a file.
const FILE_MAX: Duration = Duration::from_secs(60);

/// Whether the same call may succeed later: the server is away or not ready, or our token is not the one it takes now.
pub fn is_transient(error: &ClientError) -> bool {
    error.is_transient() || error.code() == Some(Code::Unauthorized)
}

/// Whether the server says that our incarnation is over: another compute writes, or the branch moved to another
/// history.
pub fn is_fenced(error: &ClientError) -> bool {
    error.code() == Some(Code::Fenced)
}

/// The server, as seen by one compute. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server {
    client: Client,
    /// Where the host puts its token when it gets another one.
    token_file: Arc<PathBuf>,
    base: Arc<str>,
    /// The host that started us.
    host: Arc<str>,
}

impl Server {
    /// A client of the server at `url` for compute `id` on `host`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(url: &str, id: &str, host: &str, token: Token, token_file: PathBuf) -> Result<Server, ClientError> {
        let base = format!("computes/{}", segment(id)).into();
        Ok(Server { client: Client::new(url, Some(token))?, token_file: Arc::new(token_file), base, host: host.into() })
    }

    fn path(&self, call: &str) -> String {
        format!("{}/{call}", self.base)
    }

    /// Sends a call; one more time with the host's newest token, when ours is not taken.
    async fn send<T: DeserializeOwned>(&self, call: impl Fn() -> Call) -> Result<T, ClientError> {
        self.with_newest_token(|| call().send()).await
    }

    async fn with_newest_token<T, F: Future<Output = Result<T, ClientError>>>(&self, send: impl Fn() -> F) -> Result<T, ClientError> {
        let answer = send().await;
        if answer.as_ref().err().and_then(ClientError::code) != Some(Code::Unauthorized) {
            return answer;
        }
        match std::fs::read_to_string(&*self.token_file).map(|text| Token::parse(&text)) {
            Ok(Ok(token)) => {
                self.client.set_token(token);
                send().await
            }
            other => {
                tracing::warn!(file = %self.token_file.display(), ?other, "there is no other token");
                answer
            }
        }
    }

    async fn post<T: DeserializeOwned>(&self, call: &str, body: &(impl Serialize + Sync)) -> Result<T, ClientError> {
        self.send(|| self.client.post(&self.path(call), body)).await
    }

    /// Fences whoever wrote the branch before, and learns what to start.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn begin(&self) -> Result<Begin, ClientError> {
        self.post("begin", &BeginRequest { host: Some(self.host.to_string()) }).await
    }

    /// Says that Postgres runs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn attach(&self, attach: &Attach) -> Result<Attached, ClientError> {
        self.post("attach", attach).await
    }

    /// Where the server's WAL of an epoch ends; none when what is left of it does not count any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn leftover_start(&self, query: &LeftoverQuery) -> Result<Option<Lsn>, ClientError> {
        let LeftoverQuery { timeline_id, epoch, .. } = query;
        let epoch = epoch.to_string();
        let query = [("timeline_id", timeline_id.as_str()), ("epoch", epoch.as_str())];
        let answer: LeftoverStart = self.send(|| self.client.get(&self.path("leftover-wal")).query(&query)).await?;
        Ok(answer.lsn.and_then(|lsn| lsn.parse().ok()))
    }

    /// Sends what is left. It may be large, and the server may have to make room first.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn leftover(&self, query: &LeftoverQuery, bytes: BoxStream<'static, io::Result<Bytes>>) -> Result<(), ClientError> {
        let LeftoverQuery { timeline_id, epoch, start, end } = query;
        let epoch = epoch.to_string();
        let (start, end) = (start.as_deref().unwrap_or_default(), end.as_deref().unwrap_or_default());
        let query = [("timeline_id", timeline_id.as_str()), ("epoch", epoch.as_str()), ("start", start), ("end", end)];
        let call = self.client.call(Method::POST, &self.path("leftover-wal")).query(&query);
        call.stream("application/octet-stream", bytes).within(LEFTOVER_MAX).send::<LeftoverStart>().await.map(drop)
    }

    /// Says that Postgres ended.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ended(&self, ended: &Ended) -> Result<(), ClientError> {
        self.send(|| self.client.post(&self.path("ended"), ended).within(FILE_MAX)).await
    }

    /// Tells which blocks a start reads.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn startup_blocks(&self, blocks: &StartupBlocks) -> Result<(), ClientError> {
        self.send(|| self.client.post(&self.path("startup-blocks"), blocks).within(FILE_MAX)).await
    }

    /// Tells how the block cache is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cache(&self, report: &CacheReport) -> Result<(), ClientError> {
        self.post("cache", report).await
    }

    /// Tells that something happened.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn event(&self, event: &EventReport) -> Result<(), ClientError> {
        self.post("events", event).await
    }

    /// Uploads a file that has no WAL.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn file(&self, file: &FileVersion) -> Result<(), ClientError> {
        self.send(|| self.client.post(&self.path("files"), file).within(FILE_MAX)).await
    }

    /// Keeps a piece of a file of pages that WAL does not give back. Gives its name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put_piece(&self, bytes: Bytes) -> Result<String, ClientError> {
        let call = || self.client.call(Method::POST, &self.path("pages")).body("application/octet-stream", bytes.clone()).within(FILE_MAX);
        Ok(self.send::<PieceKept>(call).await?.name)
    }

    /// The bytes of such a piece.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get_piece(&self, name: &str) -> Result<Bytes, ClientError> {
        self.with_newest_token(|| self.client.get(&self.path("pages")).query(&[("name", name)]).within(FILE_MAX).send_for_bytes()).await
    }

    /// Waits until the orders differ from what is `known`, or a while has passed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn orders(&self, known: &OrdersQuery) -> Result<Orders, ClientError> {
        let OrdersQuery { incarnation, server_run, size, check } = known;
        let (incarnation, check) = (incarnation.to_string(), check.unwrap_or(0).to_string());
        let size = size.as_deref().unwrap_or_default();
        let query = [("incarnation", incarnation.as_str()), ("server_run", server_run), ("size", size), ("check", check.as_str())];
        self.send(|| self.client.get(&self.path("orders")).query(&query).within(FILE_MAX)).await
    }

    /// Tells of a check.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn check(&self, report: &CheckReport) -> Result<(), ClientError> {
        self.post("check", report).await
    }
}
