//! Clients that commit without pause and remember what was acknowledged, to ask later whether it is all there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::warned::Warned;
use anyhow::{Context as _, ensure};

/// How long a client waits for one answer before it connects anew. Commits wait as long as a server restarts.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How long a server that was killed may take to answer again.
const BACK_MAX: Duration = Duration::from_secs(60);

/// Writers on one database; each inserts (writer, 0), (writer, 1), ... one a transaction.
#[derive(Debug)]
pub struct Writers {
    conninfo: String,
    stop: Arc<AtomicBool>,
    /// For each writer: rows acknowledged.
    acknowledged: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    /// Makes the table and starts `n` writers on `conninfo`.
    ///
    /// # Errors
    /// When the table cannot be made.
    pub fn start(conninfo: &str, n: usize) -> anyhow::Result<Writers> {
        crate::dev::psql(
            conninfo,
            "CREATE TABLE IF NOT EXISTS acknowledged (writer int, n bigint, filler text DEFAULT repeat('x', 100), PRIMARY KEY (writer, n))",
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Writers { conninfo: conninfo.to_owned(), stop: stop.clone(), acknowledged: Vec::new(), threads: Vec::new() };
        for writer in 0..n {
            let (conninfo, stop, count) = (conninfo.to_owned(), stop.clone(), Arc::new(AtomicU64::new(0)));
            writers.acknowledged.push(count.clone());
            writers.threads.push(std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                if let Ok(runtime) = runtime {
                    runtime.block_on(write(&conninfo, writer as i32, &stop, &count));
                }
            }));
        }
        Ok(writers)
    }

    /// Rows acknowledged so far, of all writers.
    pub fn total(&self) -> u64 {
        self.acknowledged.iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }

    /// Waits until `more` further rows were acknowledged.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn wait_for(&self, more: u64, limit: Duration) -> anyhow::Result<()> {
        let (before, what) = (self.total(), format!("{more} further rows to be acknowledged"));
        crate::limit::until(&what, limit, None, || Ok((self.total() >= before + more).then_some(())))
            .with_context(|| format!("only {} of {more} rows were acknowledged", self.total() - before))
    }

    /// Stops the writers and gives each one's count of acknowledged rows.
    pub fn stop(mut self) -> Acknowledged {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let counts = self.acknowledged.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        Acknowledged { conninfo: self.conninfo.clone(), counts }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// What was acknowledged.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    /// Where it was written.
    pub conninfo: String,
    /// For each writer: rows 0 to this, exclusively.
    pub counts: Vec<u64>,
}

impl Acknowledged {
    /// Asks the database at `conninfo` whether each acknowledged row is there.
    ///
    /// # Errors
    /// When one is missing: which.
    pub fn check(&self, conninfo: &str) -> anyhow::Result<()> {
        for (writer, count) in self.counts.iter().enumerate() {
            let sql = format!("SELECT count(*) FROM acknowledged WHERE writer = {writer} AND n < {count}");
            // What was killed may take a moment to be gone, and its successor another one to be there.
            let deadline = std::time::Instant::now() + BACK_MAX;
            let found = loop {
                match crate::dev::psql(conninfo, &sql) {
                    Err(_) if std::time::Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
                    answer => break answer?,
                }
            };
            let found: u64 = found.parse().context("a count")?;
            ensure!(found == *count, "writer {writer} was acknowledged {count} rows, of which {found} are there");
        }
        Ok(())
    }
}

async fn write(conninfo: &str, writer: i32, stop: &AtomicBool, count: &AtomicU64) {
    while !stop.load(Ordering::SeqCst) {
        let Ok(session) = Warned::connect(conninfo, ANSWER_MAX).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !stop.load(Ordering::SeqCst) {
            let n = count.load(Ordering::SeqCst) as i64;
            session.begin();
            // A row that was committed but not acknowledged may be there already.
            let sql = "INSERT INTO acknowledged (writer, n) VALUES ($1, $2) ON CONFLICT DO NOTHING";
            match tokio::time::timeout(ANSWER_MAX, session.client.execute(sql, &[&writer, &n])).await {
                // Nothing was inserted: the row is visible but its commit may never have been acknowledged; write
                // another to be sure.
                Ok(Ok(0)) => {
                    let sql = "UPDATE acknowledged SET filler = 'again' WHERE writer = $1 AND n = $2";
                    match tokio::time::timeout(ANSWER_MAX, session.client.execute(sql, &[&writer, &n])).await {
                        Ok(Ok(1)) if !session.is_warned() => count.store(n as u64 + 1, Ordering::SeqCst),
                        _ => break,
                    };
                }
                Ok(Ok(_)) if !session.is_warned() => count.store(n as u64 + 1, Ordering::SeqCst),
                _ => break,
            }
        }
        drop(session);
        if !stop.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
