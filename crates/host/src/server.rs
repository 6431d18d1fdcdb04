//! The admin HTTP API, as a compute process uses it.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_api::host::{Attach, Attached, Begin, Ended, FileVersion, Orders, Problem, StartupBlocks};

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The server could not be reached or did not answer: worth another try.
    #[error("the pageserver at {url} does not answer: {source}")]
    Unreachable {
        /// Its address.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server said no.
    #[error("{detail}")]
    Refused {
        /// The problem's stable code.
        code: String,
        /// Its sentence.
        detail: String,
        /// HTTP status.
        status: u16,
    },
}

impl ServerError {
    /// Whether the same call may succeed later: the server is away, or not ready yet.
    pub fn is_transient(&self) -> bool {
        match self {
            ServerError::Unreachable { .. } => true,
            ServerError::Refused { status, .. } => *status == 503,
        }
    }
}

/// The server, as seen by compute `id`.
#[derive(Clone, Debug)]
pub struct Server {
    http: reqwest::Client,
    base: String,
    id: String,
}

impl Server {
    /// A client of the server at `url` for compute `id`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(url: &str, id: &str) -> Result<Server, reqwest::Error> {
        let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(5)).tcp_nodelay(true).build()?;
        Ok(Server { http, base: url.trim_end_matches('/').to_owned(), id: id.to_owned() })
    }

    fn url(&self, call: &str) -> String {
        format!("{}/v1/computes/{}/{call}", self.base, self.id)
    }

    async fn answer<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, ServerError> {
        let unreachable = |source| ServerError::Unreachable { url: self.base.clone(), source };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return response.json().await.map_err(unreachable);
        }
        let text = response.text().await.map_err(unreachable)?;
        let problem: Option<Problem> = serde_json::from_str(&text).ok();
        Err(ServerError::Refused {
            code: problem.as_ref().map_or_else(String::new, |p| p.code.clone()),
            detail: problem.map_or_else(|| format!("the pageserver answered {status}"), |p| p.detail),
            status: status.as_u16(),
        })
    }

    async fn post<B: Serialize + Sync, T: DeserializeOwned>(&self, call: &str, body: &B, limit: Duration) -> Result<T, ServerError> {
        self.answer(self.http.post(self.url(call)).json(body).timeout(limit)).await
    }

    /// Fences whoever wrote the branch before, and learns what to start.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn begin(&self) -> Result<Begin, ServerError> {
        self.post("begin", &(), Duration::from_secs(120)).await
    }

    /// Says that Postgres runs.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn attach(&self, attach: &Attach) -> Result<Attached, ServerError> {
        self.post("attach", attach, Duration::from_secs(120)).await
    }

    /// Says that Postgres ended.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn ended(&self, ended: &Ended) -> Result<(), ServerError> {
        self.post("ended", ended, Duration::from_secs(120)).await
    }

    /// Tells which blocks a start reads.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn startup_blocks(&self, blocks: &StartupBlocks) -> Result<(), ServerError> {
        self.post("startup-blocks", blocks, Duration::from_secs(60)).await
    }

    /// Uploads a file that has no WAL.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn file(&self, file: &FileVersion) -> Result<(), ServerError> {
        self.post("files", file, Duration::from_secs(60)).await
    }

    /// Waits until the orders differ from "run incarnation `incarnation`, server run `server_run`", or a while has passed.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn orders(&self, incarnation: u64, server_run: &str) -> Result<Orders, ServerError> {
        let query = [("incarnation", incarnation.to_string()), ("server_run", server_run.to_owned())];
        self.answer(self.http.get(self.url("orders")).query(&query).timeout(Duration::from_secs(60))).await
    }
}
