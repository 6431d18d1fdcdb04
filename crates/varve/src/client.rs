//! The admin HTTP API, as the CLI uses it.

use anyhow::{Context as _, anyhow};
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_protocol::control::Problem;

/// A client of one server.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    pub(crate) fn new(url: &str) -> anyhow::Result<Client> {
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().context("no HTTP client")?;
        Ok(Client { http, base: url.trim_end_matches('/').to_owned() })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + Sync)) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> anyhow::Result<T> {
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.with_context(|| {
            format!("no server answers at {}: start one with 'varve dev', or name it with --url or VARVE_URL", self.base)
        })?;
        let status = response.status();
        let text = response.text().await.context("the server's answer broke off")?;
        if status.is_success() {
            let text = if text.is_empty() { "null" } else { &text };
            return serde_json::from_str(text).with_context(|| format!("the server's answer is not what this varve expects: {text}"));
        }
        match serde_json::from_str::<Problem>(&text) {
            Ok(problem) => Err(anyhow!("{}", problem.detail)),
            Err(_) => Err(anyhow!("the server answered {status}: {}", text.chars().take(300).collect::<String>())),
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
