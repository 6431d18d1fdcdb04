//! The admin HTTP API, as the CLI uses it: the one client of `varve-api`, with words for people.

use anyhow::anyhow;
use bytes::Bytes;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use varve_api::client::{Call, ClientError};

pub(crate) use varve_api::client::segment;

/// A client of one server. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client(varve_api::client::Client);

impl Client {
    pub(crate) fn new(url: &str) -> anyhow::Result<Client> {
        Ok(Client(varve_api::client::Client::new(url, None)?))
    }

    /// The server's address.
    pub(crate) fn url(&self) -> &str {
        self.0.url()
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + Sync)) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// A list, page after page, until it ends or has `limit` items.
    pub(crate) async fn list<T: DeserializeOwned>(&self, path: &str, list: &ListArgs) -> anyhow::Result<Vec<T>> {
        let limit = list.limit.map_or(usize::MAX, |limit| limit as usize);
        let page = limit.min(PAGE_ITEMS);
        let prefix = list.prefix.as_deref().map(|prefix| format!("&prefix={}", segment(prefix))).unwrap_or_default();
        let mut next = Some(format!("{path}?limit={page}{prefix}"));
        let mut items = Vec::new();
        while let Some(path) = next.filter(|_| items.len() < limit) {
            let call = self.prepare(Method::GET, &path, None::<&()>);
            let (more, following) = call.send_for_page::<T>().await.map_err(|error| self.words(error))?;
            items.extend(more);
            next = following;
        }
        items.truncate(limit);
        Ok(items)
    }

    /// An answer that is no JSON.
    pub(crate) async fn get_bytes(&self, path: &str) -> anyhow::Result<Bytes> {
        self.prepare(Method::GET, path, None::<&()>).send_for_bytes().await.map_err(|error| self.words(error))
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> anyhow::Result<T> {
        self.prepare(method, path, body).send().await.map_err(|error| self.words(error))
    }

    fn prepare(&self, method: Method, path: &str, body: Option<&(impl Serialize + Sync)>) -> Call {
        // The server has limits of its own for what takes long, and says more than we could.
        let call = self.0.call(method, path).within(CALL_MAX);
        match body {
            Some(body) => call.json(body),
            None => call,
        }
    }

    fn words(&self, error: ClientError) -> anyhow::Error {
        match error {
            ClientError::Unreachable { source, .. } if source.is_connect() => anyhow!(source)
                .context(format!("no server answers at {}: start one with 'varve dev', or name it with --url or VARVE_URL", self.url())),
            ClientError::Refused(refusal) => anyhow!(refusal.detail),
            other => other.into(),
        }
    }
}

/// Which part of a list.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct ListArgs {
    /// At most so many; all by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: Option<u32>,
    /// Only names that begin so.
    #[arg(long)]
    pub(crate) prefix: Option<String>,
}

/// Items of a page: as many as the API gives at once.
const PAGE_ITEMS: usize = 1000;
/// Longer than anything that a server does while a client waits: a clean stop has 300 s.
const CALL_MAX: std::time::Duration = std::time::Duration::from_secs(600);
