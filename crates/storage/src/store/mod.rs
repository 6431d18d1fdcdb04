//! The object store: where everything lives in the end.
//!
//! A [`Store`] is a local folder (the default) or a bucket (`s3://bucket/prefix`), with the few operations that Varve
//! needs of it. The one that all safety rests on is [`Store::put_if_absent`]: of any number of servers that create one
//! name exactly one wins, and each learns whether it was the one, even where its own request had succeeded and only the
//! answer was lost. For that every object that is written so carries a nonce: an object found under the name that
//! equals ours is ours.
//!
//! Requests that fail in passing are tried again, a bounded number of times, with growing pauses. There is no rename,
//! and no listing but when something is opened.

mod blocking;
mod client;
mod error;
mod object_name;
mod probe;
mod remote;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use blocking::BlockingStore;
pub use client::{Listed, ObjectClient, PageRequest, PutMode};
pub use error::{ClientError, Failure, StoreError};
pub use object_name::{ObjectName, ParseObjectNameError};

use crate::threads::Threads;

/// Attempts at a request before its error is given to the caller.
pub const ATTEMPTS_MAX: u32 = 6;
/// Objects that one request may delete: what S3 allows.
const DELETES_MAX: usize = 1000;
/// Pause after the first failed attempt; it doubles with each.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How a store is reached, beside its URL.
#[derive(Clone, Default)]
pub struct StoreConfig {
    /// `AWS_*` names and their values.
    variables: Vec<(String, String)>,
}

impl StoreConfig {
    /// Takes the `AWS_*` settings out of `variables` (the binary passes the environment's): endpoint, keys, region and
    /// the rest of what `object_store` knows.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> StoreConfig {
        StoreConfig { variables: variables.into_iter().filter(|(name, _)| name.starts_with("AWS_")).collect() }
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names only: the values are secrets.
        f.debug_list().entries(self.variables.iter().map(|(name, _)| name)).finish()
    }
}

/// How a conditional create ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Created {
    /// The object is ours.
    Ours,
    /// The name was taken, by this.
    Taken(Bytes),
}

/// What the attempts at one operation have come to so far.
#[derive(Default)]
struct Attempts {
    failed: u32,
    /// Whether one of them failed so that it may have been carried out all the same.
    uncertain: bool,
}

/// See the module's doc. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    client: Arc<dyn ObjectClient>,
    name: Arc<str>,
    root: Option<Arc<Path>>,
}

impl Store {
    /// Opens the store at `location`: `s3://bucket/prefix`, a `file://` URL, or the path of a folder, which is made if
    /// its parent exists. Nothing is sent to a bucket yet: [`Store::probe`] does that.
    pub fn open(location: &str, config: &StoreConfig) -> Result<Store, StoreError> {
        let bad = |problem: &str| StoreError::Config { store: location.to_owned(), problem: problem.to_owned() };
        let Some((scheme, _)) = location.split_once("://") else {
            let is_scheme = |word: &str| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
            if location.split_once(':').is_some_and(|(word, _)| is_scheme(word)) {
                return Err(bad("expected s3://bucket/prefix, with two slashes; a folder of this name is written with ./ in front"));
            }
            return Self::open_folder(Path::new(location));
        };
        let url = url::Url::parse(location).map_err(|e| bad(&e.to_string()))?;
        match scheme {
            "file" => Self::open_folder(&url.to_file_path().map_err(|()| bad("expected file:///absolute/path"))?),
            "s3" => {
                let client = Arc::new(remote::Remote::s3(location, &url, config)?);
                Ok(Store { client, name: location.into(), root: None })
            }
            _ => Err(bad("expected the path of a folder, or s3://bucket/prefix")),
        }
    }

    /// Opens the folder `root` as a store.
    pub fn open_folder(root: &Path) -> Result<Store, StoreError> {
        let (client, root) = remote::Remote::local(root)?;
        Ok(Store { client: Arc::new(client), name: root.display().to_string().into(), root: Some(root.into()) })
    }

    /// A store over any client; `name` stands for it in messages.
    pub fn with_client(client: Arc<dyn ObjectClient>, name: &str) -> Store {
        Store { client, name: name.into(), root: None }
    }

    /// This store for work that may block, on `threads`.
    pub fn blocking(&self, threads: Arc<dyn Threads>) -> BlockingStore {
        BlockingStore::new(self.clone(), threads)
    }

    /// The folder that it is; `None` for a bucket.
    pub fn folder(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Path of an object in a local folder, so that it can be read in place; `None` for a bucket.
    pub fn local_path(&self, name: &ObjectName) -> Option<PathBuf> {
        self.root.as_ref().map(|root| root.join(name.as_str()))
    }

    /// Creates `name`, which nobody may have created before. `bytes` must hold a nonce, or something else that nobody
    /// else would write: an object that exists already and equals `bytes` is taken for our own.
    ///
    /// An error whose [`StoreError::is_uncertain`] is true leaves open whether the object was, or will yet be, created;
    /// calling again with the same bytes finds out.
    pub async fn put_if_absent(&self, name: &ObjectName, bytes: Bytes) -> Result<Created, StoreError> {
        let mut attempts = Attempts::default();
        loop {
            let error = match self.client.put(name, bytes.clone(), PutMode::Create).await {
                Ok(()) => return Ok(Created::Ours),
                Err(error) if error.failure == Failure::AlreadyExists => match self.client.get(name, None).await {
                    Ok(found) if found == bytes => return Ok(Created::Ours),
                    Ok(found) => return Ok(Created::Taken(found)),
                    Err(error) => {
                        attempts.uncertain = true;
                        match error.failure {
                            // Deleted in between, or a store that announces a create before it can be read.
                            Failure::NotFound => ClientError { failure: Failure::Other, ..error },
                            _ => error,
                        }
                    }
                },
                Err(error) => error,
            };
            self.pause_or_fail("create", name, error, &mut attempts).await?;
        }
    }

    /// Writes `name`, over whatever is there.
    pub async fn put(&self, name: &ObjectName, bytes: Bytes) -> Result<(), StoreError> {
        let mut attempts = Attempts::default();
        loop {
            match self.client.put(name, bytes.clone(), PutMode::Overwrite).await {
                Ok(()) => return Ok(()),
                Err(error) => self.pause_or_fail("write", name, error, &mut attempts).await?,
            }
        }
    }

    /// Reads `name`.
    pub async fn get(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        self.read(name, None).await
    }

    /// Reads `name` if it exists.
    pub async fn get_optional(&self, name: &ObjectName) -> Result<Option<Bytes>, StoreError> {
        match self.read(name, None).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads exactly the bytes `range` of `name`.
    pub async fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let bytes = self.read(name, Some(range.clone())).await?;
        if bytes.len() as u64 == range.end - range.start {
            return Ok(bytes);
        }
        let (start, end, got) = (range.start, range.end, bytes.len() as u64);
        Err(StoreError::Short { object: name.clone(), store: self.to_string(), start, end, got })
    }

    async fn read(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let mut attempts = Attempts::default();
        loop {
            match self.client.get(name, range.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => self.pause_or_fail("read", name, error, &mut attempts).await?,
            }
        }
    }

    /// Removes `name`; it need not exist.
    pub async fn delete(&self, name: &ObjectName) -> Result<(), StoreError> {
        let mut attempts = Attempts::default();
        loop {
            match self.client.delete(name).await {
                Ok(()) => return Ok(()),
                Err(error) => self.pause_or_fail("delete", name, error, &mut attempts).await?,
            }
        }
    }

    /// Removes all of `names`, up to a thousand in a request; none needs to exist.
    pub async fn delete_all(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        for some in names.chunks(DELETES_MAX) {
            let Some(first) = some.first() else { continue };
            let mut attempts = Attempts::default();
            while let Err(error) = self.client.delete_many(some).await {
                self.pause_or_fail("delete", first, error, &mut attempts).await?;
            }
        }
        Ok(())
    }

    /// All objects below the folder `prefix`, by name. Never on a hot path: a bucket answers slowly, a thousand names
    /// at a time.
    pub async fn list(&self, prefix: &ObjectName) -> Result<Vec<Listed>, StoreError> {
        let mut attempts = Attempts::default();
        loop {
            match self.client.list(prefix).await {
                Ok(listed) => return Ok(listed),
                Err(error) => self.pause_or_fail("list", prefix, error, &mut attempts).await?,
            }
        }
    }

    /// The names, within `folder`, of the first objects right in it that `page` asks for, ascending. A bucket is asked
    /// for these only; a local folder is read whole, names only.
    pub async fn list_page(&self, folder: &ObjectName, page: PageRequest<'_>) -> Result<Vec<String>, StoreError> {
        let mut attempts = Attempts::default();
        loop {
            match self.client.list_page(folder, page).await {
                Ok(names) => return Ok(names),
                Err(error) => self.pause_or_fail("list", folder, error, &mut attempts).await?,
            }
        }
    }

    /// Waits before the next attempt, or gives the error up to the caller.
    async fn pause_or_fail(
        &self,
        action: &'static str,
        name: &ObjectName,
        error: ClientError,
        attempts: &mut Attempts,
    ) -> Result<(), StoreError> {
        attempts.failed += 1;
        attempts.uncertain |= !error.failure.is_definite();
        if !error.failure.is_transient() || attempts.failed >= ATTEMPTS_MAX {
            return Err(self.operation_error(action, name, error, attempts.uncertain));
        }
        let pause = PAUSE_FIRST.saturating_mul(1 << (attempts.failed - 1).min(16)).min(PAUSE_MAX);
        let (attempt, message) = (attempts.failed, error.message);
        tracing::debug!(store = %self, object = %name, action, attempt, message, "a store request failed, it is tried again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn operation_error(&self, action: &'static str, name: &ObjectName, error: ClientError, uncertain: bool) -> StoreError {
        let ClientError { failure, message } = error;
        StoreError::Operation { action, object: name.clone(), store: self.to_string(), failure, message, uncertain }
    }

    fn config_error(&self, problem: String) -> StoreError {
        StoreError::Config { store: self.to_string(), problem }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.name)
    }
}
