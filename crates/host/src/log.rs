//! Postgres's log, from a pipe into a file of bounded size.
//!
//! Whoever does not read the pipe stops the server: a session that logs waits for room in it. So it is always read.
//! What a tenant writes faster than [`RATE_MAX`] is dropped, and the log says how much. It is his text, not ours:
//! whatever runs in his sandbox can write there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::task::JoinHandle;

/// Bytes of a log file; then it becomes `<name>.1`, and a new one begins.
const FILE_MAX: u64 = 16 * 1024 * 1024;
/// Bytes a second that are kept.
const RATE_MAX: u64 = 4 * 1024 * 1024;
const SECOND: Duration = Duration::from_secs(1);
/// Bytes that are read at once.
const PIECE: usize = 64 * 1024;
/// How long the rest may take to come once Postgres has ended.
const REST_MAX: Duration = Duration::from_secs(1);

/// A log that is being written.
#[derive(Debug)]
pub(crate) struct Log {
    task: JoinHandle<()>,
}

impl Log {
    /// Writes what comes from `pipe` to the end of the file `path`, until the pipe ends.
    pub(crate) fn start(path: &Path, pipe: impl AsyncRead + Send + Unpin + 'static) -> Log {
        Log { task: tokio::spawn(drain(path.to_owned(), pipe)) }
    }

    /// Waits until all is in the file, for a moment: who is left in the sandbox may hold the pipe.
    pub(crate) async fn rest(&mut self) {
        let _ = tokio::time::timeout(REST_MAX, &mut self.task).await;
    }
}

async fn drain(path: PathBuf, mut pipe: impl AsyncRead + Unpin) {
    let mut piece = vec![0; PIECE];
    let mut written = Rate { since: Instant::now(), bytes: 0, dropped: 0 };
    loop {
        let read = match pipe.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let note = written.begin(Instant::now());
        let taken = written.take(read);
        let (path, bytes) = (path.clone(), piece[..taken].to_vec());
        let appended = tokio::task::spawn_blocking(move || append(&path, note.as_deref(), &bytes)).await;
        // A log on a full disk is no reason to stop the server.
        if let Err(error) = appended.map_err(io::Error::other).flatten() {
            tracing::debug!(%error, "Postgres's log");
        }
    }
}

/// What was kept and dropped in the second that runs.
struct Rate {
    since: Instant,
    bytes: u64,
    dropped: u64,
}

impl Rate {
    /// Begins a new second where one is over; gives what is to be said of it.
    fn begin(&mut self, now: Instant) -> Option<String> {
        if now - self.since < SECOND {
            return None;
        }
        let dropped = std::mem::take(&mut self.dropped);
        (self.since, self.bytes) = (now, 0);
        (dropped > 0).then(|| format!("\n[varve: {dropped} bytes of this log came too fast and were dropped]\n"))
    }

    /// How many of `bytes` are kept.
    fn take(&mut self, bytes: usize) -> usize {
        let kept = bytes.min(usize::try_from(RATE_MAX.saturating_sub(self.bytes)).unwrap_or(usize::MAX));
        self.bytes += kept as u64;
        self.dropped += (bytes - kept) as u64;
        kept
    }
}

fn append(path: &Path, note: Option<&str>, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    if file.metadata()?.len() > FILE_MAX {
        let mut before = path.as_os_str().to_owned();
        before.push(".1");
        fs::rename(path, before)?;
        file = File::options().create(true).append(true).open(path)?;
    }
    file.write_all(note.unwrap_or_default().as_bytes())?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_is_bounded_and_what_comes_too_fast_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("postgres.log");
        fs::write(&path, vec![b'x'; FILE_MAX as usize + 1]).unwrap();
        let mut log = Log::start(&path, &b"a line\n"[..]);
        log.rest().await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "a line\n");
        assert_eq!(fs::metadata(folder.path().join("postgres.log.1")).unwrap().len(), FILE_MAX + 1);

        let now = Instant::now();
        let mut rate = Rate { since: now, bytes: 0, dropped: 0 };
        assert_eq!(rate.take(RATE_MAX as usize - 1), RATE_MAX as usize - 1);
        assert_eq!((rate.take(10), rate.begin(now)), (1, None));
        assert!(rate.begin(now + SECOND).unwrap().contains("9 bytes"));
        assert_eq!((rate.take(10), rate.begin(now + SECOND * 3)), (10, None));
    }
}
