//! A MinIO to test with: a process of its own, on a free port, with its data in a temporary folder.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use varve_storage::store::{Store, StoreConfig};

/// Where `scripts/minio` keeps the binary that it built.
const CACHED_BINARY: &str = "/var/cache/varve/bin/minio";
/// Longest time that MinIO may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Attempts to find a port that nobody else takes between our choice and MinIO's bind.
const PORT_ATTEMPTS: u32 = 5;
/// Name and password of the root user.
const USER: &str = "varve-test";
const PASSWORD: &str = "varve-test-secret";
/// The bucket that exists.
const BUCKET: &str = "varve";

/// A running MinIO; dropping it stops it and removes its data.
#[derive(Debug)]
pub struct Minio {
    process: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Minio {
    /// Starts MinIO, unless `VARVE_TEST_SKIP_MINIO=1` says to do without. Panics, with what to do, where it cannot be
    /// started.
    pub fn start_unless_skipped() -> Option<Minio> {
        if std::env::var("VARVE_TEST_SKIP_MINIO").is_ok_and(|value| value == "1") {
            eprintln!("VARVE_TEST_SKIP_MINIO=1: what needs MinIO is not tested");
            return None;
        }
        match Self::start() {
            Ok(minio) => Some(minio),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Starts MinIO.
    pub fn start() -> anyhow::Result<Minio> {
        let binary = binary()?;
        let mut attempts = 0;
        loop {
            attempts += 1;
            match Self::start_on_free_port(&binary) {
                Err(error) if attempts < PORT_ATTEMPTS => eprintln!("MinIO did not start, it is tried again: {error:#}"),
                outcome => return outcome,
            }
        }
    }

    fn start_on_free_port(binary: &Path) -> anyhow::Result<Minio> {
        let folder = tempfile::tempdir()?;
        // With one drive a bucket is a folder.
        std::fs::create_dir_all(folder.path().join("data").join(BUCKET))?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let port = |listener: TcpListener| listener.local_addr();
        let (address, console) = (port(TcpListener::bind("127.0.0.1:0")?)?, port(TcpListener::bind("127.0.0.1:0")?)?);
        let mut command = Command::new(binary);
        command.arg("server").args(["--address", &address.to_string(), "--console-address", &console.to_string(), "--quiet"]);
        command
            .arg(folder.path().join("data"))
            .env("MINIO_ROOT_USER", USER)
            .env("MINIO_ROOT_PASSWORD", PASSWORD)
            .env("HOME", folder.path());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().with_context(|| format!("starting {}", binary.display()))?;
        let mut minio = Minio { process, address, _folder: folder };
        let deadline = Instant::now() + START_TIMEOUT;
        while !minio.is_ready() {
            let ended = minio.process.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(minio._folder.path().join("log")).unwrap_or_default();
                bail!("MinIO on {address} is not ready (exit status {ended:?}); it said:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(minio)
    }

    fn is_ready(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            write!(stream, "GET /minio/health/cluster HTTP/1.0\r\nHost: {}\r\n\r\n", self.address)?;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer)?;
            Ok(answer.ends_with(b" 200"))
        };
        ask().unwrap_or(false)
    }

    /// URL of a place in the bucket, for [`Store::open`] and `--store`.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// The environment with which a process finds this MinIO.
    pub fn variables(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", USER),
            ("AWS_SECRET_ACCESS_KEY", PASSWORD),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// A store at `prefix` in the bucket.
    pub fn store(&self, prefix: &str) -> anyhow::Result<Store> {
        Ok(Store::open(&self.url(prefix), &StoreConfig::from_variables(self.variables()))?)
    }

    /// Kills it, as a power failure would.
    pub fn kill(&mut self) {
        let _it_may_have_ended = self.process.kill();
        let _reap = self.process.wait();
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        self.kill();
    }
}

fn binary() -> anyhow::Result<PathBuf> {
    // `scripts/test` says which.
    let named = std::env::var_os("VARVE_MINIO").map(PathBuf::from);
    if let Some(binary) = named.into_iter().chain([PathBuf::from(CACHED_BINARY)]).find(|file| file.is_file()) {
        return Ok(binary);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("minio")).find(|file| file.is_file());
    found.context(
        "no MinIO: neither /var/cache/varve/bin/minio nor a 'minio' on the PATH; run scripts/minio to build it, or set VARVE_TEST_SKIP_MINIO=1 to test without",
    )
}
