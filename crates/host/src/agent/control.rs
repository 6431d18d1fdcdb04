//! The control plane, as a host uses it.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use varve_api::client::{Client, ClientError, segment};
use varve_api::host::{ComputeReport, Hello, HostOrders, Welcome};
use varve_api::token::{Token, TokenError};
use varve_api::{Code, Problem};

/// How long a poll may take: the server answers before that.
const POLL_MAX: Duration = Duration::from_secs(60);
/// How long the import of a template may take.
const TEMPLATE_MAX: Duration = Duration::from_secs(300);
/// Wait between tries to reach a control plane that is away.
const RETRY_WAIT: Duration = Duration::from_millis(200);

/// Where a host has its token from.
#[derive(Clone, Debug)]
pub enum TokenSource {
    /// It was given to us.
    Given(Token),
    /// A file, which is read again when the token in it is not taken any more.
    File(PathBuf),
}

/// A token that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TokenSourceError {
    /// The file cannot be read.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It holds no token.
    #[error("{path}: {source}", path = .path.display())]
    NoToken {
        /// The file.
        path: PathBuf,
        /// What a token is.
        source: TokenError,
    },
}

impl TokenSource {
    /// The token as it is now.
    ///
    /// # Errors
    /// [`TokenSourceError`].
    pub fn token(&self) -> Result<Token, TokenSourceError> {
        match self {
            TokenSource::Given(token) => Ok(token.clone()),
            TokenSource::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| TokenSourceError::Io { path: path.clone(), source })?;
                Token::parse(&text).map_err(|source| TokenSourceError::NoToken { path: path.clone(), source })
            }
        }
    }
}

/// Whether the same call may succeed later. A token that is not taken may be, once it was made anew on either side.
pub(super) fn worth_another_try(error: &ClientError) -> bool {
    error.is_transient() || error.code() == Some(Code::Unauthorized)
}

/// The control plane.
#[derive(Clone, Debug)]
pub(super) struct Control {
    client: Client,
    tokens: TokenSource,
    host: String,
}

impl Control {
    pub(super) fn new(client: Client, tokens: TokenSource, host: &str) -> Control {
        Control { client, tokens, host: host.to_owned() }
    }

    /// Our id.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    fn path(&self, call: &str) -> String {
        format!("hosts/{}/{call}", segment(&self.host))
    }

    /// After a token was refused: the next call shows what its source has now. True where that is another one.
    pub(super) fn renew_token(&self) -> Option<Token> {
        match self.tokens.token() {
            Ok(token) => {
                self.client.set_token(token.clone());
                Some(token)
            }
            Err(error) => {
                tracing::warn!(%error, "the host's token cannot be read again");
                None
            }
        }
    }

    pub(super) async fn hello(&self, hello: &Hello) -> Result<Welcome, ClientError> {
        self.client.post(&self.path("hello"), hello).send().await
    }

    /// Waits while the orders are still those of revision `known`.
    pub(super) async fn orders(&self, known: Option<u64>) -> Result<HostOrders, ClientError> {
        let call = self.client.get(&self.path("orders")).within(POLL_MAX);
        let call = match known {
            Some(revision) => call.query(&[("known", &revision.to_string())]),
            None => call,
        };
        call.send().await
    }

    /// Reports, however long the control plane is away. False where it does not want to know.
    pub(super) async fn report(&self, compute: &str, report: &ComputeReport) -> bool {
        let path = self.path(&format!("computes/{}", segment(compute)));
        loop {
            match self.client.post(&path, report).send::<serde::de::IgnoredAny>().await {
                Ok(_) => return true,
                Err(error) if worth_another_try(&error) => tracing::debug!(compute, %error, "a report waits"),
                Err(error) => {
                    tracing::warn!(compute, ?report, %error, "a report was not taken");
                    return false;
                }
            }
            tokio::time::sleep(RETRY_WAIT).await;
        }
    }

    pub(super) async fn template(&self, order: &str, made: Result<Bytes, Problem>) -> Result<(), ClientError> {
        let call = self.client.call(reqwest::Method::POST, &self.path(&format!("templates/{}", segment(order)))).within(TEMPLATE_MAX);
        let call = match made {
            Ok(archive) => call.body("application/zstd", archive),
            Err(problem) => {
                let json = serde_json::to_vec(&problem).map_err(|source| ClientError::Answer { source, answer: String::new() })?;
                call.body("application/problem+json", json.into())
            }
        };
        call.send::<serde::de::IgnoredAny>().await.map(drop)
    }
}
