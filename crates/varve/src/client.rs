//! The admin HTTP API, as the CLI uses it.

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_api::Problem;

/// A client of one server. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    pub(crate) fn new(url: &str) -> anyhow::Result<Client> {
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().context("no HTTP client")?;
        Ok(Client { http, base: url.trim_end_matches('/').to_owned() })
    }

    /// The server's address.
    pub(crate) fn url(&self) -> &str {
        &self.base
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + Sync)) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// An answer that is no JSON.
    pub(crate) async fn get_bytes(&self, path: &str) -> anyhow::Result<Bytes> {
        self.send(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> anyhow::Result<T> {
        let answer = self.send(method, path, body).await?;
        let json: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(json)
            .with_context(|| format!("the server's answer is not what this varve expects: {}", String::from_utf8_lossy(json)))
    }

    async fn send(&self, method: Method, path: &str, body: Option<&(impl Serialize + Sync)>) -> anyhow::Result<Bytes> {
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.with_context(|| {
            format!("no server answers at {}: start one with 'varve dev', or name it with --url or VARVE_URL", self.base)
        })?;
        let status = response.status();
        let answer = response.bytes().await.context("the server's answer broke off")?;
        if status.is_success() {
            return Ok(answer);
        }
        match serde_json::from_slice::<Problem>(&answer) {
            Ok(problem) => Err(anyhow!("{}", problem.detail)),
            Err(_) => {
                Err(anyhow!("the server answered {status}: {}", String::from_utf8_lossy(&answer).chars().take(300).collect::<String>()))
            }
        }
    }
}

/// A path segment that may hold anything a person typed.
pub(crate) fn segment(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
