//! Scrubbing in the background: everything that is stored of the tenants that this server owns is read, one tenant
//! after the other by name, at a set rate, again and again.
//!
//! **Its position** is a file in the server's folder, in an envelope (`VSCP`, JSON), written beside and renamed after
//! each tenant: a restart goes on with the next one. A tenant that was begun is read again from its beginning. Where
//! the file cannot be read a pass begins anew, which costs reads and nothing else.
//!
//! **What is found** is logged as an error at once, and stays in [`Scrubber::status`] until a whole pass after that one
//! has not found it. Nothing is written to the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use varve_engine::scrub::{Finding, Report, Scrub, Watch};
use varve_storage::envelope::{self, Codec, Format};
use varve_storage::ids::{TenantId, TenantName};
use varve_storage::store::Store;
use varve_storage::tenant_log::{find_owner, names};
use varve_storage::threads::{RuntimeThreads, Threads};

use crate::error::ServerError;
use crate::server::Pageserver;
use crate::wall_clock;

/// The file's format.
const FORMAT: Format = Format { magic: *b"VSCP", version: 1, what: "the position of a scrub", content_bytes_max: 16 << 20 };
/// The file, in the server's folder.
const FILE: &str = "scrub-position";
/// Names that are listed at once.
const NAMES_AT_ONCE: usize = 100;
/// A pass begins so long after the last one began, or later: of a small store each would be over in a moment.
const PASS_INTERVAL_MICROS: i64 = 6 * 3600 * 1_000_000;
/// How often it is looked whether the next is due, and the pause after the store did not answer.
const PAUSE: Duration = Duration::from_secs(30);
/// Findings that are kept of a pass; further ones are counted, and logged.
const FINDINGS_MAX: usize = 100;

/// What a pass has seen, so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// When it began, microseconds since 2000-01-01 UTC.
    pub begun: i64,
    /// When it ended; none while it goes on.
    pub ended: Option<i64>,
    /// Tenants of this server that were read.
    pub tenants: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Things that are wrong.
    pub findings: u64,
    /// The first of them.
    pub found: Vec<Found>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Of which tenant.
    pub tenant: String,
    /// The object, or the log's folder.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Where a scrub is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The last name that was dealt with; none at the beginning of a pass, and between two.
    pub after: Option<String>,
    /// The pass that goes on; none between two.
    pub current: Option<Pass>,
    /// The last one that was complete.
    pub last: Option<Pass>,
}

impl Status {
    /// What a tenant's report says is taken in.
    fn take(&mut self, tenant: &TenantName, report: &Report) {
        self.after = Some(tenant.to_string());
        let Some(pass) = &mut self.current else { return };
        pass.tenants += 1;
        pass.bytes += report.bytes;
        pass.findings += report.findings;
        let room = FINDINGS_MAX.saturating_sub(pass.found.len());
        pass.found.extend(report.found.iter().take(room).map(|Finding { object, problem }| Found {
            tenant: tenant.to_string(),
            object: object.clone(),
            problem: problem.clone(),
        }));
    }

    /// Whether a pass goes on, or the next is due.
    fn is_due(&self, now: i64) -> bool {
        self.current.is_some() || self.last.as_ref().is_none_or(|last| now.saturating_sub(last.begun) >= PASS_INTERVAL_MICROS)
    }
}

/// Keeps to a rate: what was read before is paid for by waiting.
struct Pace {
    bytes_per_second: u64,
    /// Up to when what was read is paid for.
    paid: Instant,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Pace {
        Pace { bytes_per_second, paid: Instant::now() }
    }
}

impl Watch for Pace {
    fn tenant(&mut self, _name: &str, _number: usize, _of: usize) {}

    fn read(&mut self, bytes: u64) -> BoxFuture<'_, ()> {
        if self.bytes_per_second == 0 {
            return Box::pin(std::future::ready(()));
        }
        let now = Instant::now();
        // Time in which nothing was read is not saved up.
        self.paid = self.paid.max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        Box::pin(tokio::time::sleep(self.paid - now))
    }
}

/// See the module's doc.
#[derive(Debug)]
pub struct Scrubber {
    pageserver: Arc<Pageserver>,
    file: PathBuf,
    bytes_per_second: u64,
    status: Mutex<Status>,
    bytes: AtomicU64,
}

impl Scrubber {
    /// Goes on where the file in `folder` says. `bytes_per_second` is what is read at most; 0: nothing is.
    pub async fn open(pageserver: Arc<Pageserver>, folder: &Path, bytes_per_second: u64) -> Arc<Scrubber> {
        let file = folder.join(FILE);
        let status = match tokio::fs::read(&file).await {
            Ok(bytes) => decode(&file, bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Status::default(),
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "where the scrub was cannot be read: a pass begins anew");
                Status::default()
            }
        };
        Arc::new(Scrubber { pageserver, file, bytes_per_second, status: Mutex::new(status), bytes: AtomicU64::new(0) })
    }

    /// Where it is.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Bytes that it reads in a second at most; 0: it does not run.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// Lines of the OpenMetrics text format.
    pub fn figures(&self) -> String {
        let status = self.status.lock();
        let findings = [&status.current, &status.last].into_iter().flatten().map(|pass| pass.findings).max().unwrap_or(0);
        let mut text = format!(
            "# TYPE varve_scrub_read_bytes counter\n# UNIT varve_scrub_read_bytes bytes\nvarve_scrub_read_bytes_total {}\n\
             # TYPE varve_scrub_findings gauge\nvarve_scrub_findings {findings}\n",
            self.bytes.load(Ordering::Relaxed),
        );
        if let Some(ended) = status.last.as_ref().and_then(|last| last.ended) {
            let age = wall_clock::now().0.saturating_sub(ended).max(0) as f64 / 1e6;
            text += "# TYPE varve_scrub_pass_age_seconds gauge\n# UNIT varve_scrub_pass_age_seconds seconds\n";
            text += &format!("varve_scrub_pass_age_seconds {age:.3}\n");
        }
        text
    }

    /// Scrubs until `stopping`.
    pub async fn run(&self, stopping: &CancellationToken) {
        if self.bytes_per_second == 0 {
            return;
        }
        let work = async {
            loop {
                let is_due = self.status.lock().is_due(wall_clock::now().0);
                let passed = if is_due { self.pass().await } else { Ok(()) };
                if let Err(error) = passed {
                    tracing::warn!(%error, "the scrub goes on later");
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            () = stopping.cancelled() => {}
            () = work => {}
        }
    }

    /// A pass from where the last one broke off, to its end.
    async fn pass(&self) -> Result<(), ServerError> {
        let store = self.pageserver.store().clone();
        let mut pace = Pace::new(self.bytes_per_second);
        let mut scrub = Scrub::new(&store, threads(), &mut pace);
        self.status.lock().current.get_or_insert_with(|| Pass { begun: wall_clock::now().0, ..Pass::default() });
        loop {
            let after = self.status.lock().after.clone().and_then(|name| name.parse::<TenantName>().ok());
            let page = names::page(&store, "", after.as_ref(), NAMES_AT_ONCE).await?;
            for (name, id) in &page.tenants {
                if self.is_ours(&store, *id).await? {
                    let report = scrub.one(*id).await?;
                    self.bytes.fetch_add(report.bytes, Ordering::Relaxed);
                    // One that was deleted meanwhile lacks all that its log named.
                    if report.findings == 0 || names::lookup(&store, name).await? == Some(*id) && self.is_there(&store, *id).await? {
                        tell(name, &report);
                        self.status.lock().take(name, &report);
                    }
                } else {
                    self.status.lock().after = Some(name.to_string());
                }
                self.save().await?;
            }
            if page.next.is_none() {
                break;
            }
        }
        {
            let mut status = self.status.lock();
            status.after = None;
            if let Some(pass) = status.current.take() {
                tracing::info!(tenants = pass.tenants, bytes = pass.bytes, findings = pass.findings, "a pass of the scrub is complete");
                status.last = Some(Pass { ended: Some(wall_clock::now().0), ..pass });
            }
        }
        self.save().await
    }

    /// Whether this server owns a tenant, by its own words or by those of the tenant's log.
    async fn is_ours(&self, store: &Store, id: TenantId) -> Result<bool, ServerError> {
        if self.pageserver.tenants().owns(id) {
            return Ok(true);
        }
        match find_owner(store, id).await {
            Ok(Some(found)) => Ok(found.owner.is_some_and(|owner| owner.server == self.pageserver.tenants().identity().server)),
            // A name without a log: whoever sees that says so.
            Ok(None) => Ok(true),
            // Whose a log is that is damaged is not known: it is better told twice than not at all.
            Err(error) if !matches!(error, varve_storage::edit_log::EditLogError::Store(_)) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a tenant is still there, or is being deleted.
    async fn is_there(&self, store: &Store, id: TenantId) -> Result<bool, ServerError> {
        match varve_storage::tenant_log::read(store, id).await {
            Ok(read) => Ok(read.is_none_or(|state| !state.is_removed())),
            Err(varve_storage::edit_log::EditLogError::Store(error)) => Err(error.into()),
            Err(_) => Ok(true), // damaged, which is what was found
        }
    }

    async fn save(&self) -> Result<(), ServerError> {
        let (status, file) = (self.status.lock().clone(), self.file.clone());
        threads().call(move || write(&file, &status)).await?
    }
}

fn threads() -> Arc<dyn Threads> {
    Arc::new(RuntimeThreads::new(tokio::runtime::Handle::current()))
}

/// Says of each thing what is wrong, where, and what to do.
fn tell(tenant: &TenantName, report: &Report) {
    for Finding { object, problem } in &report.found {
        tracing::error!(
            %tenant, object, problem,
            "what is stored is damaged: restore this object from the bucket's versions; nothing wrong is served meanwhile"
        );
    }
}

fn decode(file: &Path, bytes: Vec<u8>) -> Status {
    let opened = envelope::decode(&FORMAT, &file.display().to_string(), &Bytes::from(bytes));
    let status = opened.map_err(|error| error.to_string());
    let status = status.and_then(|opened| serde_json::from_slice(&opened.content).map_err(|error| error.to_string()));
    status.unwrap_or_else(|problem| {
        tracing::warn!(file = %file.display(), problem, "where the scrub was cannot be read: a pass begins anew");
        Status::default()
    })
}

/// Writes the file beside and renames it, so that there is always a whole one.
fn write(file: &Path, status: &Status) -> Result<(), ServerError> {
    let failed = |error: std::io::Error| ServerError::file(file)(error);
    let json = serde_json::to_vec(status).map_err(|error| failed(error.into()))?;
    let bytes =
        envelope::encode(&FORMAT, Codec::Zstd, &file.display().to_string(), &json).map_err(|error| failed(std::io::Error::other(error)))?;
    let beside = file.with_extension("new");
    std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, file)).map_err(failed)
}

impl Pageserver {
    /// Reads all that is stored of a tenant, as fast as it goes.
    ///
    /// # Errors
    /// When the store does not answer. What is damaged is in the report.
    pub async fn scrub(&self, tenant: TenantId) -> Result<Report, ServerError> {
        let mut pace = Pace::new(0);
        Ok(Scrub::new(self.store(), threads(), &mut pace).one(tenant).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(findings: usize) -> Report {
        let found = (0..findings).map(|i| Finding { object: format!("o{i}"), problem: "gone".to_owned() }).collect();
        Report { bytes: 10, findings: findings as u64, found, ..Report::default() }
    }

    #[test]
    fn a_pass_goes_on_where_its_file_says() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        let mut status = Status { current: Some(Pass { begun: 7, ..Pass::default() }), ..Status::default() };
        status.take(&"acme".parse().unwrap(), &report(2));
        status.take(&"other".parse().unwrap(), &report(FINDINGS_MAX));
        write(&file, &status).unwrap();
        let read = decode(&file, std::fs::read(&file).unwrap());
        assert_eq!(read, status);
        let pass = read.current.unwrap();
        assert_eq!((read.after.as_deref(), pass.tenants, pass.bytes, pass.findings), (Some("other"), 2, 20, FINDINGS_MAX as u64 + 2));
        assert_eq!(pass.found.len(), FINDINGS_MAX, "the rest is counted");
        assert_eq!((pass.found[0].tenant.as_str(), pass.found[2].tenant.as_str()), ("acme", "other"));
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[40] ^= 1;
        assert_eq!(decode(&file, bytes), Status::default(), "a damaged file begins anew");
    }

    #[test]
    fn a_pass_is_due_when_none_was_and_a_while_after_the_last_began() {
        let mut status = Status::default();
        assert!(status.is_due(5));
        status.last = Some(Pass { begun: 5, ended: Some(6), ..Pass::default() });
        assert!(!status.is_due(4 + PASS_INTERVAL_MICROS));
        assert!(status.is_due(5 + PASS_INTERVAL_MICROS));
        status.current = Some(Pass::default());
        assert!(status.is_due(6), "one that broke off goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_read_is_paid_for_by_waiting() {
        let begun = tokio::time::Instant::now();
        let mut pace = Pace::new(1000);
        pace.read(2000).await;
        assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
    }
}
