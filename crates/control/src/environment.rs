//! Time, chance, waiting and tasks: given from outside, so that a simulation can give its own. Nothing else in this
//! crate takes them from the air.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use varve_postgres::Timestamp;

use crate::error::Error;

/// There are no random bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no random bytes ({0}): check /dev/urandom and getrandom(2) on this machine")]
pub struct NoRandom(pub String);

/// What the world gives.
pub trait Surroundings: Send + Sync + 'static {
    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// Fills `bytes` by chance.
    ///
    /// # Errors
    /// [`NoRandom`].
    fn fill(&self, bytes: &mut [u8]) -> Result<(), NoRandom>;

    /// Ends after `duration`.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Runs `task` to its end, whoever started it.
    fn spawn(&self, task: BoxFuture<'static, ()>);
}

/// The surroundings that this process was given. Cheap to clone.
#[derive(Clone)]
pub struct Environment(Arc<dyn Surroundings>);

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Environment")
    }
}

impl Environment {
    /// These surroundings.
    pub fn new(surroundings: impl Surroundings) -> Environment {
        Environment(Arc::new(surroundings))
    }

    /// The real ones: the system's clock and random numbers, tokio's timer and tasks.
    pub fn system() -> Environment {
        Environment::new(System)
    }

    /// The wall clock.
    pub fn now(&self) -> Timestamp {
        self.0.now()
    }

    /// Random bytes.
    ///
    /// # Errors
    /// [`NoRandom`].
    pub fn random<const N: usize>(&self) -> Result<[u8; N], NoRandom> {
        let mut bytes = [0; N];
        self.0.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Waits.
    pub fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.0.sleep(duration)
    }

    /// What `work` gives, unless it takes longer than `limit`.
    pub async fn within<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.sleep(limit) => None,
        }
    }

    /// Runs a task that nobody waits for.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(task.boxed());
    }

    /// Runs `work` to its end, even if whoever asked for it goes away meanwhile: half of a change is worse than a
    /// change nobody hears of.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Stopping`] when the task was ended with the process.
    pub async fn to_its_end<T: Send + 'static>(&self, work: impl Future<Output = Result<T, Error>> + Send + 'static) -> Result<T, Error> {
        let (done, is_done) = tokio::sync::oneshot::channel();
        self.spawn(async move {
            let _nobody_waits = done.send(work.await);
        });
        is_done.await.unwrap_or(Err(Error::Stopping))
    }
}

/// See [`Environment::system`].
struct System;

impl Surroundings for System {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_micros(jiff::Timestamp::now().as_microsecond())
    }

    fn fill(&self, bytes: &mut [u8]) -> Result<(), NoRandom> {
        varve_storage::chance::fill(bytes).map_err(|error| NoRandom(error.to_string()))
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}
