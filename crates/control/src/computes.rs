//! Computes: started and stopped at an operator's word, and what they themselves ask.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use varve_postgres::Lsn;
use varve_api::admin::{Compute, NewCompute};
use varve_api::host::{Attach, Attached, Begin, BlockName, Desired, Ended, FileVersion, Orders};
use varve_storage::ids::WriterEpoch;
use varve_storage::tenant_log::{FileContents, TenantEdit};

use super::Pageserver;
use crate::computes::{ComputeEntry, ComputeRecord, Phase};
use crate::error::{Code, ServerError};
use crate::moment::Moment;
use crate::tenant::Tenant;
use crate::timeline::ComputeAddress;
use crate::timeline_pages::{databases, tablespaces};

/// How long a compute may take to start.
const START_MAX: Duration = Duration::from_secs(120);
/// How long a clean stop may take: a checkpoint, the rest of its WAL, the upload of its layers.
const STOP_MAX: Duration = Duration::from_secs(300);
/// How long a compute that was fenced may take to end by itself before its processes are killed.
const FENCED_END_MAX: Duration = Duration::from_secs(3);
/// How long a poll for orders waits.
const ORDERS_WAIT: Duration = Duration::from_secs(20);
/// Largest file that stands in the tenant log itself.
const INLINE_FILE_MAX: usize = 64 * 1024;
const ADDRESS_ANY: [&str; 3] = ["*", "0.0.0.0", "::"];

impl Pageserver {
    /// Lists the computes.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn list_computes(&self) -> Result<Vec<Compute>, ServerError> {
        self.describe_all(self.computes().all()).await
    }

    /// Lists a branch's computes.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn list_branch_computes(&self, tenant: &str, branch: &str) -> Result<Vec<Compute>, ServerError> {
        let tenant = self.tenant(tenant).await?;
        let (_, timeline) = Self::find_branch(&tenant, branch)?;
        self.describe_all(self.computes().of_timeline(tenant.id(), timeline)).await
    }

    /// Shows a compute.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn show_compute(&self, id: &str) -> Result<Compute, ServerError> {
        let entry = self.computes().get(id)?;
        self.describe_compute(&entry).await
    }

    async fn describe_all(&self, entries: Vec<Arc<ComputeEntry>>) -> Result<Vec<Compute>, ServerError> {
        let mut computes = Vec::with_capacity(entries.len());
        for entry in entries {
            match self.describe_compute(&entry).await {
                Ok(compute) => computes.push(compute),
                Err(error) => tracing::warn!(compute = entry.id(), %error, "left out of a list"),
            }
        }
        Ok(computes)
    }

    async fn describe_compute(&self, entry: &ComputeEntry) -> Result<Compute, ServerError> {
        let (record, status) = (entry.record(), entry.status());
        let tenant = self.tenant_by_id(record.tenant_id).await?;
        let state = tenant.log().state();
        let branch = state.branch_of(record.timeline_id).map_or_else(|| record.timeline_id.to_string(), ToString::to_string);
        let host = record.listen.split(',').next().unwrap_or("127.0.0.1").trim();
        let host = if ADDRESS_ANY.contains(&host) { "127.0.0.1" } else { host };
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let (state_name, error) = match &status.phase {
            Phase::Starting => ("starting", None),
            Phase::Running => ("running", None),
            Phase::Stopping | Phase::Ended { .. } => ("stopping", None),
            Phase::Failed(reason) => ("failed", Some(reason.clone())),
        };
        Ok(Compute {
            id: record.id,
            branch: format!("{}/{branch}", tenant.name()),
            state: state_name.to_owned(),
            conninfo: format!("postgresql://postgres:{}@{host}:{}/postgres", tenant.facts().password, record.port),
            pid: status.pid,
            mount_pid: status.mount_pid,
            port: record.port,
            lsn: record.lsn.map(|lsn| lsn.to_string()),
            error,
        })
    }

    /// Starts a compute on a branch, and answers when it takes connections.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn start_compute(&self, tenant: &str, branch: &str, new: NewCompute) -> Result<Compute, ServerError> {
        let moment = Moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        let tenant = self.tenant(tenant).await?;
        let (_, mut timeline) = Self::find_branch(&tenant, branch)?;
        self.host_is_fit(&tenant)?;
        let listen = new.listen.unwrap_or_else(|| "127.0.0.1".to_owned());
        if listen.is_empty() || !listen.chars().all(|c| c.is_ascii_alphanumeric() || ".:,*- ".contains(c)) {
            return Err(ServerError::new(Code::InvalidArgument, "listen is one or more addresses, such as 127.0.0.1 or *"));
        }
        let mut lsn = None;
        if moment != Moment::Head {
            let at = self.resolve(&tenant, timeline, moment).await?;
            (timeline, lsn) = (at.timeline, Some(at.lsn));
        }
        let before = match lsn {
            None => self.computes().writer_of(tenant.id(), timeline),
            Some(_) => None,
        };
        let port = match new.port {
            Some(port) => {
                // The compute that will be fenced may hold the port: it has to go first.
                if let Some(before) = before.as_ref().filter(|before| before.record().port == port) {
                    self.stop_computes(vec![before.clone()], Desired::Fenced).await?;
                }
                check_port(&listen, port)?;
                port
            }
            None => free_port()?,
        };
        let id = uuid::Uuid::new_v4().simple().to_string();
        let record = ComputeRecord {
            id: id.clone(),
            tenant_id: tenant.id(),
            tenant: tenant.name().to_string(),
            timeline_id: timeline,
            listen,
            port,
            lsn,
            should_run: true,
            begun: false,
            process: None,
        };
        let entry = self.computes().add(record)?;
        let started = std::time::Instant::now();
        if let Err(error) = self.spawner().spawn(&entry, &self.computes().home(&id)) {
            self.computes().remove(&id);
            return Err(error);
        }
        let status = entry.wait(START_MAX, |status| status.phase != Phase::Starting).await;
        let failed = match status.map(|status| status.phase) {
            Some(Phase::Running) => {
                tracing::info!(tenant = %tenant.name(), compute = id, elapsed_ms = started.elapsed().as_millis(), "compute started");
                return self.describe_compute(&entry).await;
            }
            Some(Phase::Failed(reason)) => ServerError::new(Code::HostUnfit, reason),
            Some(_) => {
                ServerError::new(Code::Fenced, format!("another compute was started on {}/{branch} at the same time", tenant.name()))
            }
            None => entry.failure(&format!("the compute did not start within {START_MAX:?}"), &self.computes().home(&id)),
        };
        self.stop_computes(vec![entry], Desired::Fenced).await?;
        Err(failed)
    }

    /// What a compute needs of this host, checked before a process is started for it.
    fn host_is_fit(&self, tenant: &Tenant) -> Result<(), ServerError> {
        if !std::path::Path::new("/dev/fuse").exists() {
            return Err(ServerError::new(
                Code::HostUnfit,
                "there is no /dev/fuse here, which a compute's data directory needs: 'modprobe fuse', or allow the device in this container",
            ));
        }
        self.templates().bin_dir(tenant.facts().pg_version).map(drop)
    }

    /// Stops a compute cleanly.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn stop_compute(&self, id: &str) -> Result<(), ServerError> {
        let entry = self.computes().get(id)?;
        self.stop_computes(vec![entry], Desired::Stop).await
    }

    /// Tells computes to end, cleanly or at once, and waits until their processes are gone.
    pub(super) async fn stop_computes(&self, entries: Vec<Arc<ComputeEntry>>, desired: Desired) -> Result<(), ServerError> {
        for entry in &entries {
            entry.tell_to_end(desired)?;
        }
        let limit = if desired == Desired::Stop { STOP_MAX } else { FENCED_END_MAX };
        for entry in &entries {
            if !entry.process_gone(limit).await {
                tracing::warn!(compute = entry.id(), "it does not end by itself and is killed");
                entry.kill_process();
                entry.process_gone(FENCED_END_MAX).await;
            }
            let clean = matches!(entry.status().phase, Phase::Ended { clean: true });
            if desired == Desired::Stop && !clean && entry.record().lsn.is_none() {
                // What it wrote last is in the WAL log as far as it was acknowledged.
                tracing::warn!(compute = entry.id(), "it did not end cleanly");
            }
            self.clean_up(entry).await;
            self.computes().remove(entry.id());
        }
        Ok(())
    }

    /// Takes away what a compute left on this host.
    async fn clean_up(&self, entry: &ComputeEntry) {
        if let Err(error) = self.spawner().clean_up(entry.id(), &self.computes().home(entry.id())).await {
            tracing::warn!(compute = entry.id(), %error, "its folder is not gone");
        }
    }

    /// A compute begins an incarnation: whoever wrote the timeline before is fenced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn begin_compute(&self, id: &str) -> Result<Begin, ServerError> {
        let entry = self.computes().get(id)?;
        let begun = self.begin(id, &entry).await;
        if let Err(error) = begun.as_ref().map_err(Clone::clone).map(drop)
            && error.code != Code::Unavailable
            && entry.should_run()
        {
            // Trying again will not help: it fails, and says why, until an operator has done something about it.
            entry.change(|record| record.should_run = false)?;
            entry.update(|status| status.phase = Phase::Failed(error.detail.clone()));
        }
        begun
    }

    async fn begin(&self, id: &str, entry: &Arc<ComputeEntry>) -> Result<Begin, ServerError> {
        let _turn = entry.turn.lock().await;
        let record = entry.record();
        let tenant = self.tenant_by_id(record.tenant_id).await?;
        let served = tenant.timeline(record.timeline_id).await?;
        // Of computes that race, each fences those that have begun before it: the last one writes.
        let _beginning = served.beginning.lock().await;
        if !entry.should_run() {
            return Err(ServerError::new(Code::Fenced, "this compute was told to end"));
        }
        let (lsn, epoch, standby_name) = match record.lsn {
            Some(lsn) => (lsn, None, None),
            None => {
                if let Some(reason) = served.stopped() {
                    return Err(ServerError::internal(reason)); // waiting will not help
                }
                for other in self.computes().of_timeline(tenant.id(), record.timeline_id) {
                    if other.id() != id && other.record().lsn.is_none() && other.record().begun && other.should_run() {
                        self.fence(&other)?;
                    }
                }
                let start = served.begin_epoch(tenant.log(), self.context().wal_log).await?;
                (start.lsn, Some(start.epoch), Some(start.standby_name))
            }
        };
        entry.change(|record| record.begun = true)?;
        entry.update(|status| {
            status.incarnation += 1;
            status.epoch = epoch;
            status.phase = Phase::Starting;
            status.pid = None;
        });
        // What this timeline did not put into the store yet is only here: see to it that this does not stay so.
        served.flush_soon();
        let (databases, tablespaces) = {
            let served = served.clone();
            tokio::task::spawn_blocking(move || {
                served.wait_applied(lsn, START_MAX).map_err(|reason| match served.stopped() {
                    Some(_) => ServerError::internal(reason), // waiting will not help
                    None => ServerError::unavailable(reason),
                })?;
                let history = &**served.history();
                let places = databases(history, lsn).and_then(|found| Ok((found, tablespaces(history, lsn)?)));
                places.map_err(ServerError::internal)
            })
            .await
            .map_err(ServerError::internal)??
        };
        let state = tenant.log().state();
        let branch = state.branch_of(record.timeline_id).map_or_else(|| record.timeline_id.to_string(), ToString::to_string);
        let facts = tenant.facts();
        Ok(Begin {
            tenant: facts.name.to_string(),
            branch,
            tenant_id: facts.id.to_string(),
            timeline_id: record.timeline_id.to_string(),
            pg_version: facts.pg_version,
            pg_bin_dir: self.templates().bin_dir(facts.pg_version)?.display().to_string(),
            base_lsn: lsn.to_string(),
            epoch: epoch.map(|epoch| epoch.0),
            standby_name,
            incarnation: entry.status().incarnation,
            page_service: self.page_service_address(),
            listen: record.listen,
            port: record.port,
            password_verifier: facts.password_verifier.clone(),
            databases,
            tablespaces,
            catalog_version: tenant.template().facts().cluster.catalog_version,
            startup_blocks: tenant.template().startup_blocks(),
        })
    }

    /// Tells a compute that another one writes now; its processes are killed if they do not end soon.
    fn fence(&self, other: &Arc<ComputeEntry>) -> Result<(), ServerError> {
        tracing::info!(compute = other.id(), "fenced by a later compute");
        other.tell_to_end(Desired::Fenced)?;
        let (server, other) = (self.me(), other.clone());
        tokio::spawn(async move {
            if let Some(server) = server.upgrade()
                && let Err(error) = server.stop_computes(vec![other.clone()], Desired::Fenced).await
            {
                tracing::warn!(compute = other.id(), %error, "a fenced compute is not gone");
            }
        });
        Ok(())
    }

    /// A compute's Postgres runs: its WAL is received from now on.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn attach_compute(&self, id: &str, attach: Attach) -> Result<Attached, ServerError> {
        let entry = self.computes().get(id)?;
        let _turn = entry.turn.lock().await;
        let fenced = || ServerError::new(Code::Fenced, "this compute was fenced, or moved to another history");
        let record = entry.record();
        if !entry.should_run() || attach.timeline_id != record.timeline_id.to_string() {
            return Err(fenced());
        }
        let tenant = self.tenant_by_id(record.tenant_id).await?;
        let mut standby_name = None;
        if record.lsn.is_none() {
            let epoch = WriterEpoch(attach.epoch.ok_or_else(fenced)?);
            let flushed: Lsn = attach.flushed.parse().map_err(|error| ServerError::new(Code::InvalidArgument, format!("{error}")))?;
            let served = tenant.timeline(record.timeline_id).await?;
            let address = ComputeAddress { socket_dir: attach.socket_dir.clone(), port: attach.port, flushed };
            standby_name = Some(served.attach_writer(tenant.log(), self.context().wal_log, epoch, &address).await?);
        }
        entry.change(|record| record.process = crate::computes::identify(attach.mount_pid))?;
        entry.update(|status| {
            status.incarnation = attach.incarnation;
            status.epoch = attach.epoch.map(WriterEpoch);
            status.pid = Some(attach.pid);
            status.mount_pid = Some(attach.mount_pid);
            status.phase = Phase::Running;
        });
        Ok(Attached { standby_name })
    }

    /// A compute's process ends.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn compute_ended(&self, id: &str, ended: Ended) -> Result<(), ServerError> {
        let entry = self.computes().get(id)?;
        let _turn = entry.turn.lock().await;
        let status = entry.status();
        if ended.incarnation != status.incarnation {
            return Ok(());
        }
        let record = entry.record();
        if let (Some(epoch), true) = (status.epoch, ended.clean) {
            let tenant = self.tenant_by_id(record.tenant_id).await?;
            tenant.timeline(record.timeline_id).await?.close_epoch(tenant.log(), epoch).await?;
        }
        tracing::info!(compute = id, clean = ended.clean, reason = ended.reason, "compute ended");
        let gave_up = record.should_run && !ended.clean;
        entry.change(|record| record.should_run = false)?;
        entry.update(|status| {
            status.phase = if gave_up { Phase::Failed(ended.reason.clone()) } else { Phase::Ended { clean: ended.clean } };
        });
        if record.should_run && ended.clean {
            // It was told to end by a signal, not by us: nobody else takes it off the list.
            self.computes().remove(id);
        }
        Ok(())
    }

    /// A compute tells which blocks its start read: later starts of the same template get them in one batch.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn learn_startup_blocks(&self, id: &str, blocks: Vec<BlockName>) -> Result<(), ServerError> {
        let entry = self.computes().get(id)?;
        let tenant = self.tenant_by_id(entry.record().tenant_id).await?;
        self.templates().learn_startup_blocks(tenant.template(), blocks).await
    }

    /// What a compute is to do; waits while that is what it does already.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn orders(&self, id: &str, incarnation: u64, server_run: &str) -> Result<Orders, ServerError> {
        let entry = self.computes().get(id)?;
        let known = server_run == self.run();
        let status = if known {
            let news = |status: &crate::computes::Status| status.desired != Desired::Run || status.incarnation != incarnation;
            entry.wait(ORDERS_WAIT, news).await.unwrap_or_else(|| entry.status())
        } else {
            entry.status()
        };
        // After our own restart the incarnation is the compute's, until it has attached.
        let number = if status.incarnation == 0 { incarnation } else { status.incarnation };
        Ok(Orders { desired: status.desired, incarnation: number, server_run: self.run().to_owned() })
    }

    /// Keeps a new version of a file that has no WAL.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn put_compute_file(&self, id: &str, file: FileVersion) -> Result<(), ServerError> {
        let entry = self.computes().get(id)?;
        let (record, status) = (entry.record(), entry.status());
        if file.incarnation != status.incarnation || status.epoch.is_none() {
            return Err(ServerError::new(Code::Fenced, "a file of an incarnation that is over"));
        }
        let tenant = self.tenant_by_id(record.tenant_id).await?;
        let contents = match file.contents {
            None => FileContents::Removed,
            Some(text) => {
                let bytes = BASE64.decode(text).map_err(|error| ServerError::new(Code::InvalidArgument, format!("contents: {error}")))?;
                if bytes.len() <= INLINE_FILE_MAX { FileContents::Inline(bytes) } else { tenant.put_file_object(bytes).await? }
            }
        };
        let timeline = record.timeline_id;
        let lsn = tenant.timeline(timeline).await?.head();
        tenant
            .log()
            .commit(|state| {
                state.timeline(timeline)?;
                Ok::<_, ServerError>((vec![TenantEdit::File { timeline, path: file.path, lsn, contents }], ()))
            })
            .await?;
        Ok(())
    }

    /// Starts again the computes that should run and whose process is gone. Called now and then.
    pub(super) async fn watch_computes(&self) {
        for entry in self.computes().all() {
            // Without a process it is just being started.
            if !entry.should_run() || entry.record().process.is_none() || entry.process_runs() {
                continue;
            }
            let Ok(_turn) = entry.turn.try_lock() else { continue };
            if !entry.should_run() || entry.process_runs() {
                continue;
            }
            tracing::warn!(compute = entry.id(), "its process is gone; it is started again");
            entry.update(|status| status.phase = Phase::Starting);
            if let Err(error) = self.spawner().spawn(&entry, &self.computes().home(entry.id())) {
                tracing::error!(compute = entry.id(), %error, "it cannot be started");
            }
        }
    }
}

/// A port that is free on loopback.
fn free_port() -> Result<u16, ServerError> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(ServerError::internal)?;
    Ok(listener.local_addr().map_err(ServerError::internal)?.port())
}

/// Whether a compute could listen there.
fn check_port(listen: &str, port: u16) -> Result<(), ServerError> {
    let host = listen.split(',').next().unwrap_or("127.0.0.1").trim();
    let host = if ADDRESS_ANY.contains(&host) { "0.0.0.0" } else { host };
    match std::net::TcpListener::bind((host, port)) {
        Ok(_) => Ok(()),
        Err(error) => Err(ServerError::new(
            Code::PortInUse,
            format!("port {port} on {host} cannot be used ({error}): choose another one, or leave it out to get a free one"),
        )),
    }
}
