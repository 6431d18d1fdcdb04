//! Where the mount gets what it has not yet, and the patience it has with it.

use std::{
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use varve_postgres::{Fork, Lsn, Oid, RelFork, slru::SlruKind};

/// The database at the base LSN, as the page service serves it.
///
/// Called from threads that serve the mount; may block. An error of a kind that waiting cannot cure
/// ([`io::ErrorKind::NotFound`], `InvalidData`, `InvalidInput`, `PermissionDenied`, `Unsupported`) is given to Postgres
/// at once; any other is taken for a pageserver that restarts, and the call is made again.
pub trait BaseSource: Send + Sync {
    /// The relations of database `db` in tablespace `spc` (shared relations: `db` 0, `spc` 1664), with each fork's size
    /// in blocks.
    fn relations(&self, spc: Oid, db: Oid) -> io::Result<Vec<(Oid, Fork, u32)>>;

    /// `count` blocks of a fork from block `first` on, all below its size: `count * 8192` bytes.
    fn read_blocks(&self, rel: RelFork, first: u32, count: u32) -> io::Result<Bytes>;

    /// The segments of an SLRU area: (segment number, size in pages).
    fn slru_segments(&self, kind: SlruKind) -> io::Result<Vec<(u32, u32)>>;

    /// `count` pages of a segment from page `first` on: `count * 8192` bytes.
    fn read_slru(&self, kind: SlruKind, segno: u32, first: u32, count: u32) -> io::Result<Bytes>;

    /// Scattered blocks in one pipelined batch, each 8192 bytes, in the order asked.
    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>>;

    /// All calls that begin from now on are about the database at `lsn`.
    ///
    /// # Errors
    /// When the source cannot do that.
    fn move_to(&self, lsn: Lsn) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("this base does not move to {lsn}")))
    }
}

/// First wait before a failed call is made again; doubles up to [`RETRY_WAIT_MAX`].
const RETRY_WAIT_MIN: Duration = Duration::from_millis(20);
/// Longest wait between two attempts: after a pageserver is back, nobody waits longer than this.
const RETRY_WAIT_MAX: Duration = Duration::from_secs(1);
/// How often a call that keeps failing is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A [`BaseSource`] that is asked again while it fails, until `patience` has passed or the mount closes.
pub(super) struct PatientSource {
    source: Arc<dyn BaseSource>,
    name: String,
    patience: Duration,
    closing: Mutex<bool>,
    closed: Condvar,
}

impl PatientSource {
    pub(super) fn new(source: Arc<dyn BaseSource>, name: String, patience: Duration) -> PatientSource {
        PatientSource { source, name, patience, closing: Mutex::new(false), closed: Condvar::new() }
    }

    /// Ends all waiting: calls that fail from now on are not repeated.
    pub(super) fn close(&self) {
        *self.closing.lock() = true;
        self.closed.notify_all();
    }

    /// The source is about the database at `lsn` from now on.
    pub(super) fn move_to(&self, lsn: Lsn) -> io::Result<()> {
        self.source.move_to(lsn)
    }

    /// Calls the source until it answers. `what` says in the log what was asked.
    pub(super) fn call<T>(&self, what: impl fmt::Display, ask: impl Fn(&dyn BaseSource) -> io::Result<T>) -> io::Result<T> {
        let mut error = match ask(&*self.source) {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let started = Instant::now();
        let mut wait = RETRY_WAIT_MIN;
        let mut logged: Option<Instant> = None;
        loop {
            if is_permanent(error.kind()) {
                tracing::error!(mount = self.name, "the base cannot give {what}: {error}");
                return Err(error);
            }
            if started.elapsed() >= self.patience {
                tracing::error!(mount = self.name, "gave up on {what} after {:?} of asking the pageserver: {error}", self.patience);
                return Err(error);
            }
            if logged.is_none_or(|last| last.elapsed() >= LOG_INTERVAL) {
                tracing::warn!(mount = self.name, "waiting for the pageserver for {what}, at most {:?}: {error}", self.patience);
                logged = Some(Instant::now());
            }
            let mut closing = self.closing.lock();
            if !*closing {
                self.closed.wait_for(&mut closing, wait);
            }
            if *closing {
                return Err(error);
            }
            drop(closing);
            wait = (wait * 2).min(RETRY_WAIT_MAX);
            match ask(&*self.source) {
                Ok(answer) => {
                    tracing::info!(mount = self.name, "the pageserver answers again ({what}, after {:?})", started.elapsed());
                    return Ok(answer);
                }
                Err(again) => error = again,
            }
        }
    }
}

fn is_permanent(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, NotFound, PermissionDenied, Unsupported};
    matches!(kind, NotFound | InvalidData | InvalidInput | PermissionDenied | Unsupported)
}

/// The error for an answer of the wrong length.
pub(super) fn wrong_length(expected: usize, got: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the base answered with {got} bytes where {expected} were asked for"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct NoSource;

    impl BaseSource for NoSource {
        fn relations(&self, _: Oid, _: Oid) -> io::Result<Vec<(Oid, Fork, u32)>> {
            Ok(Vec::new())
        }
        fn read_blocks(&self, _: RelFork, _: u32, _: u32) -> io::Result<Bytes> {
            Ok(Bytes::new())
        }
        fn slru_segments(&self, _: SlruKind) -> io::Result<Vec<(u32, u32)>> {
            Ok(Vec::new())
        }
        fn read_slru(&self, _: SlruKind, _: u32, _: u32, _: u32) -> io::Result<Bytes> {
            Ok(Bytes::new())
        }
        fn read_scattered(&self, _: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
            Ok(Vec::new())
        }
    }

    fn patient(patience: Duration) -> PatientSource {
        PatientSource::new(Arc::new(NoSource), "test".to_owned(), patience)
    }

    #[test]
    fn a_source_that_comes_back_in_time_is_waited_for() {
        let calls = AtomicU32::new(0);
        let answer = patient(Duration::from_secs(60)).call("it", |_| match calls.fetch_add(1, Ordering::Relaxed) {
            0..3 => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            n => Ok(n),
        });
        assert_eq!(answer.expect("the fourth call answers"), 3);
    }

    #[test]
    fn patience_ends() {
        let error = patient(Duration::from_millis(50)).call("it", |_| Err::<(), _>(io::Error::from(io::ErrorKind::TimedOut)));
        assert_eq!(error.expect_err("it never answers").kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn what_waiting_cannot_cure_is_an_error_at_once() {
        let calls = AtomicU32::new(0);
        let error = patient(Duration::from_secs(60)).call("it", |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            Err::<(), _>(io::Error::from(io::ErrorKind::InvalidData))
        });
        assert!(error.is_err());
        assert_eq!(calls.into_inner(), 1, "asked once only");
    }

    #[test]
    fn closing_ends_the_waiting() {
        let source = patient(Duration::from_secs(600));
        std::thread::scope(|scope| {
            let call = scope.spawn(|| source.call("it", |_| Err::<(), _>(io::Error::from(io::ErrorKind::TimedOut))));
            std::thread::sleep(Duration::from_millis(50));
            source.close();
            assert!(call.join().expect("no panic").is_err());
        });
    }
}
