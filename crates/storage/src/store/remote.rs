//! [`ObjectClient`] over the `object_store` crate: a local folder, S3 and what speaks it.
//!
//! The local folder is opened with `fsync`: a create writes a staging file beside the name (`<name>#<n>`, never listed), fsyncs it, links it to
//! the name, which fails if that is taken, and fsyncs the directory. The crate's own retries are off: [`super::Store`] retries, the same way
//! for all.

use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::local::LocalFileSystem;
use object_store::{ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutOptions, RetryConfig, path};

use super::{ClientError, Failure, Listed, ObjectClient, ObjectName, PutMode, StoreConfig, StoreError};

/// A request that has brought nothing for this long has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that does not come about in this time has failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module's doc.
#[derive(Debug)]
pub(super) struct Remote {
    inner: Arc<dyn ObjectStore>,
    /// Empty, or what stands before every name, with a slash at its end.
    prefix: String,
    local: bool,
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
        Ok((Remote { inner, prefix: String::new(), local: true }, absolute))
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
        let mut builder = AmazonS3Builder::new();
        for (variable, value) in &config.variables {
            if let Ok(key) = variable.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let plain_http = config.variables.iter().any(|(name, value)| name.contains("ENDPOINT") && value.starts_with("http://"));
        let client = ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT).with_allow_http(plain_http);
        let retries = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let builder = builder.with_client_options(client).with_retry(retries).with_disable_bulk_delete(true).with_bucket_name(bucket);
        let inner = Arc::new(builder.build().map_err(|e| bad(e.to_string()))?);
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Remote { inner, prefix, local: false })
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

    fn list<'a>(&'a self, prefix: &'a ObjectName) -> BoxFuture<'a, Result<Vec<Listed>, ClientError>> {
        async move {
            let mut listed = Vec::new();
            let path = self.path(prefix);
            let mut objects = self.inner.list(Some(&path));
            while let Some(object) = objects.try_next().await.map_err(|e| client_error(&e))? {
                let name = object.location.as_ref().strip_prefix(&self.prefix).and_then(|name| name.parse().ok());
                match name {
                    Some(name) => listed.push(Listed { name, bytes: object.size }),
                    // Somebody's editor backup or a store's own marker: none of ours, so none of our business.
                    None => tracing::debug!(object = %object.location, local = self.local, "listing skips a foreign name"),
                }
            }
            listed.sort();
            Ok(listed)
        }
        .boxed()
    }
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

/// The kind of failure that stands at the bottom of a chain of errors.
fn failure_of_source(error: &object_store::Error) -> Failure {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io_error) = error.downcast_ref::<io::Error>() {
            match io_error.kind() {
                io::ErrorKind::PermissionDenied => return Failure::AccessDenied,
                io::ErrorKind::ReadOnlyFilesystem => return Failure::ReadOnly,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => return Failure::NoSpace,
                io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable => return Failure::Unreachable,
                io::ErrorKind::NetworkUnreachable => return Failure::Unreachable,
                io::ErrorKind::NotFound => return Failure::StoreMissing,
                _ => {}
            }
        }
        if error.downcast_ref::<HttpError>().is_some_and(|http| http.kind() == HttpErrorKind::Connect) {
            return Failure::Unreachable;
        }
        cause = error.source();
    }
    Failure::Other
}
