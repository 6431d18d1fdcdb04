//! [`ObjectClient`] over the `object_store` crate: a local folder, S3 and what speaks it.
//!
//! The local folder is opened with `fsync`: a create writes a staging file beside the name (`<name>#<n>`, never
//! listed), fsyncs it, links it to the name, which fails if that is taken, and fsyncs the directory. The crate's own
//! retries are off: [`super::Store`] retries, the same way for all.

use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::local::LocalFileSystem;
use object_store::{ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutOptions, RetryConfig, path};

use super::client::DELETES_AT_ONCE;
use super::{ClientError, Failure, Listed, ObjectClient, ObjectName, PageRequest, PutMode, StoreConfig, StoreError};

/// A request that has brought nothing for this long has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that does not come about in this time has failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Names that a bucket gives in one answer.
const BUCKET_PAGE_MAX: usize = 1000;

/// See the module's doc.
#[derive(Debug)]
pub(super) struct Remote {
    inner: Arc<dyn ObjectStore>,
    /// Deletes many objects in one request (S3's `DeleteObjects`).
    bulk: Option<Arc<dyn ObjectStore>>,
    /// Empty, or what stands before every name, with a slash at its end.
    prefix: String,
    paging: Paging,
}

/// How a page of a folder is listed.
#[derive(Clone)]
enum Paging {
    /// By reading the names in a local folder, without asking for each object's length.
    Folder(PathBuf),
    /// By asking the bucket, which answers in order of names, as all but S3's directory buckets do.
    Bucket(Arc<dyn PaginatedListStore>),
}

impl std::fmt::Debug for Paging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Paging::Folder(root) => write!(f, "Folder({})", root.display()),
            Paging::Bucket(_) => f.write_str("Bucket"),
        }
    }
}

impl Remote {
    /// The folder `root`, which is created if its parent exists; and its absolute path.
    pub(super) fn local(root: &Path) -> Result<(Remote, PathBuf), StoreError> {
        let config = |problem: String| StoreError::Config { store: root.display().to_string(), problem };
        match std::fs::create_dir(root) {
            Ok(()) => {
                let parent = root.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let synced = std::fs::File::open(parent).and_then(|dir| dir.sync_all());
                synced.map_err(|e| config(format!("fsync of the folder that holds it failed ({e})")))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && root.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(config("it is a file; name a folder".to_owned()));
            }
            Err(error) => return Err(config(format!("the folder cannot be made ({error}); make it, or name another"))),
        }
        let absolute = root.canonicalize().map_err(|e| config(format!("its absolute path cannot be found ({e})")))?;
        let inner = LocalFileSystem::new_with_prefix(&absolute).map_err(|e| config(e.to_string()))?;
        let inner = Arc::new(inner.with_fsync(true).with_automatic_cleanup(true));
        Ok((Remote { inner, bulk: None, prefix: String::new(), paging: Paging::Folder(absolute.clone()) }, absolute))
    }

    /// The bucket and prefix that `location` (`s3://bucket/prefix`), parsed as `url`, names, reached as `config` says.
    pub(super) fn s3(location: &str, url: &url::Url, config: &StoreConfig) -> Result<Remote, StoreError> {
        let bad = |problem: String| StoreError::Config { store: location.to_owned(), problem };
        let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
        let bucket = bucket.ok_or_else(|| bad("no bucket is named; expected s3://bucket or s3://bucket/prefix".to_owned()))?;
        let prefix = url.path().trim_matches('/');
        if !prefix.is_empty() {
            prefix.parse::<ObjectName>().map_err(|e| bad(e.to_string()))?;
        }
        // The HTTP client is built without a cryptography of its own. That another part has chosen one already is no
        // error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = AmazonS3Builder::new();
        for (variable, value) in &config.variables {
            if let Ok(key) = variable.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let plain_http = config.variables.iter().any(|(name, value)| name.contains("ENDPOINT") && value.starts_with("http://"));
        let client = ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT).with_allow_http(plain_http);
        let retries = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let builder = builder.with_client_options(client).with_retry(retries).with_bucket_name(bucket);
        let bulk = builder.clone().with_disable_bulk_delete(false).build().map_err(|e| bad(e.to_string()))?;
        let inner = Arc::new(builder.with_disable_bulk_delete(true).build().map_err(|e| bad(e.to_string()))?);
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let paging = Paging::Bucket(inner.clone());
        Ok(Remote { inner, bulk: Some(Arc::new(bulk)), prefix, paging })
    }

    fn path(&self, name: &ObjectName) -> path::Path {
        path::Path::from(format!("{}{name}", self.prefix))
    }

    fn put_error(&self, error: &object_store::Error) -> ClientError {
        let mut error = client_error(error);
        // To a put, *not found* can only mean the bucket or the root.
        if error.failure == Failure::NotFound {
            error.failure = Failure::StoreMissing;
        }
        error
    }
}

impl ObjectClient for Remote {
    fn put<'a>(&'a self, name: &'a ObjectName, bytes: Bytes, mode: PutMode) -> BoxFuture<'a, Result<(), ClientError>> {
        async move {
            let mode = match mode {
                PutMode::Create => object_store::PutMode::Create,
                PutMode::Overwrite => object_store::PutMode::Overwrite,
            };
            let put = self.inner.put_opts(&self.path(name), bytes.into(), PutOptions::from(mode)).await;
            put.map(|_| ()).map_err(|error| self.put_error(&error))
        }
        .boxed()
    }

    fn get<'a>(&'a self, name: &'a ObjectName, range: Option<Range<u64>>) -> BoxFuture<'a, Result<Bytes, ClientError>> {
        async move {
            let options = GetOptions::new().with_range(range.map(object_store::GetRange::Bounded));
            let got = self.inner.get_opts(&self.path(name), options).await.map_err(|e| client_error(&e))?;
            got.bytes().await.map_err(|e| client_error(&e))
        }
        .boxed()
    }

    fn delete<'a>(&'a self, name: &'a ObjectName) -> BoxFuture<'a, Result<(), ClientError>> {
        async move {
            match self.inner.delete(&self.path(name)).await.map_err(|e| client_error(&e)) {
                Err(error) if error.failure != Failure::NotFound => Err(error),
                _ => Ok(()),
            }
        }
        .boxed()
    }

    fn delete_many<'a>(&'a self, names: &'a [ObjectName]) -> BoxFuture<'a, Result<(), ClientError>> {
        async move {
            if let Some(bulk) = self.bulk.as_ref().filter(|_| names.len() > 1) {
                let paths: Vec<_> = names.iter().map(|name| Ok(self.path(name))).collect();
                let deleted: Result<Vec<_>, _> = bulk.delete_stream(stream::iter(paths).boxed()).try_collect().await;
                // Not every store that speaks S3 has this request. What it did is done, and may be done again.
                match deleted {
                    Ok(_) => return Ok(()),
                    Err(error) => tracing::debug!(%error, "objects were not deleted together, each is by itself"),
                }
            }
            for some in names.chunks(DELETES_AT_ONCE) {
                try_join_all(some.iter().map(|name| self.delete(name))).await?;
            }
            Ok(())
        }
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a ObjectName) -> BoxFuture<'a, Result<Vec<Listed>, ClientError>> {
        async move {
            let mut listed = Vec::new();
            let path = self.path(prefix);
            let mut objects = self.inner.list(Some(&path));
            while let Some(object) = objects.try_next().await.map_err(|e| client_error(&e))? {
                let name = object.location.as_ref().strip_prefix(&self.prefix).and_then(|name| name.parse().ok());
                match name {
                    Some(name) => listed.push(Listed { name, bytes: object.size, written: Some(object.last_modified.timestamp_micros()) }),
                    // Somebody's editor backup or a store's own marker: none of ours, so none of our business.
                    None => tracing::debug!(object = %object.location, store = ?self.paging, "listing skips a foreign name"),
                }
            }
            listed.sort();
            Ok(listed)
        }
        .boxed()
    }

    fn list_page<'a>(&'a self, folder: &'a ObjectName, page: PageRequest<'a>) -> BoxFuture<'a, Result<Vec<String>, ClientError>> {
        async move {
            match &self.paging {
                Paging::Folder(root) => {
                    let path = root.join(folder.as_str());
                    let read = tokio::task::spawn_blocking(move || names_in(&path)).await;
                    let names = read.unwrap_or_else(|ended| Err(io::Error::other(ended))).map_err(|error| io_error(&error))?;
                    Ok(page.select(names.into_iter()))
                }
                Paging::Bucket(bucket) => {
                    let folder = format!("{}{folder}/", self.prefix);
                    bucket_page(&**bucket, &folder, page).await.map_err(|error| client_error(&error))
                }
            }
        }
        .boxed()
    }
}

/// Names of the objects right in a local folder; none where there is no folder.
fn names_in(path: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        // The kind comes with the name. What is no object's name is a staging file, or none of ours.
        let name = entry.file_name().into_string().ok().filter(|name| name.parse::<ObjectName>().is_ok());
        if let Some(name) = name
            && entry.file_type()?.is_file()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// Asks a bucket for a page of what stands below `folder`, which ends with a slash.
async fn bucket_page(bucket: &dyn PaginatedListStore, folder: &str, page: PageRequest<'_>) -> Result<Vec<String>, object_store::Error> {
    let (mut names, mut page_token) = (Vec::new(), None);
    while names.len() < page.limit {
        let options = PaginatedListOptions {
            offset: page.after.map(|after| format!("{folder}{after}")),
            delimiter: Some("/".into()),
            max_keys: Some((page.limit - names.len()).min(BUCKET_PAGE_MAX)),
            page_token: page_token.take(),
            ..PaginatedListOptions::default()
        };
        let answer = bucket.list_paginated(Some(&format!("{folder}{}", page.begin_with)), options).await?;
        let locations = answer.result.objects.iter().map(|object| object.location.as_ref());
        let named = locations.filter_map(|location| location.strip_prefix(folder)).map(ToOwned::to_owned);
        names.extend(named.filter(|name| name.parse::<ObjectName>().is_ok()));
        page_token = answer.page_token;
        if page_token.is_none() {
            break;
        }
    }
    Ok(page.select(names.into_iter()))
}

fn client_error(error: &object_store::Error) -> ClientError {
    use object_store::Error as E;
    let failure = match error {
        E::NotFound { .. } if error.to_string().contains("NoSuchBucket") => Failure::StoreMissing,
        E::NotFound { .. } => Failure::NotFound,
        // S3 answers 409 where two conditional creates run at once: nobody can say yet who won.
        E::AlreadyExists { .. } if error.to_string().contains("ConditionalRequestConflict") => Failure::Other,
        E::AlreadyExists { .. } => Failure::AlreadyExists,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => Failure::AccessDenied,
        E::NotImplemented { .. } | E::NotSupported { .. } => Failure::Unsupported,
        _ => failure_of_source(error),
    };
    // The crate's messages repeat the path and run over several lines.
    let message = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    ClientError { failure, message }
}

fn io_error(error: &io::Error) -> ClientError {
    ClientError { failure: failure_of_io(error).unwrap_or(Failure::Other), message: error.to_string() }
}

/// The kind of failure that the system's error tells, if it tells one.
fn failure_of_io(error: &io::Error) -> Option<Failure> {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Some(Failure::AccessDenied),
        io::ErrorKind::ReadOnlyFilesystem => Some(Failure::ReadOnly),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Failure::NoSpace),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable => Some(Failure::Unreachable),
        io::ErrorKind::NetworkUnreachable => Some(Failure::Unreachable),
        io::ErrorKind::NotFound => Some(Failure::StoreMissing),
        _ => None,
    }
}

/// The kind of failure that stands at the bottom of a chain of errors.
fn failure_of_source(error: &object_store::Error) -> Failure {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(failure) = error.downcast_ref::<io::Error>().and_then(failure_of_io) {
            return failure;
        }
        if error.downcast_ref::<HttpError>().is_some_and(|http| http.kind() == HttpErrorKind::Connect) {
            return Failure::Unreachable;
        }
        cause = error.source();
    }
    Failure::Other
}
