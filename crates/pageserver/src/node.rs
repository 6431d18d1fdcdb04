//! The pageserver: everything put together, and what the admin API can ask of it.
//!
//! [`Pageserver`] holds what all tenants share (store, WAL log, caches, templates, computes) and the tenants that are open. A tenant is
//! taken over at its first use: from then on its log has our generation, and a pageserver that had it before learns so at its next write.

mod branches;
mod computes;
mod moments;
mod source;
mod tenants;
mod wal;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use varve_storage::ids::{TenantId, TenantName, WalLogId};
use varve_storage::store::Store;
use varve_storage::tenant_log::{AuditRow, TenantEdit, TenantLog, names, tenant_folder};
use varve_storage::wal_log::WalLog;

pub use source::Source;

use crate::computes::{Computes, Spawner};
use crate::error::{Code, ServerError};
use crate::moment::PostgresTime;
use crate::templates::Templates;
use crate::tenant::Tenant;
use crate::timeline::OpenContext;

/// How often it is looked whether all computes run that should.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// What a pageserver is started with.
#[derive(Clone, Debug)]
pub struct PageserverConfig {
    /// Its own folder: WAL log and caches.
    pub data: PathBuf,
    /// Folder of the computes that run on this host.
    pub computes: PathBuf,
    /// The store.
    pub store: Store,
    /// Where computes reach the page service.
    pub page_service: String,
    /// How compute processes are started.
    pub spawner: Spawner,
    /// Folders of Postgres binaries by major, where they are not in the usual places.
    pub pg_bin_dirs: Vec<(u32, PathBuf)>,
    /// Bytes that the WAL log may hold.
    pub wal_log_limit_bytes: u64,
    /// Bytes for caches of pages and blocks.
    pub cache_bytes: u64,
    /// Bytes for what is not in layers yet, of all timelines.
    pub memtable_bytes: u64,
}

/// See the module's doc.
#[derive(Debug)]
pub struct Pageserver {
    me: Weak<Pageserver>,
    /// Differs between runs of this process.
    run: String,
    config: PageserverConfig,
    context: Arc<OpenContext>,
    templates: Templates,
    computes: Computes,
    tenants: tokio::sync::Mutex<HashMap<TenantId, Arc<Tenant>>>,
    stopping: CancellationToken,
}

pub(crate) fn audit(action: impl Into<String>) -> TenantEdit {
    TenantEdit::Audit(AuditRow { time: PostgresTime::now().0, action: action.into() })
}

impl Pageserver {
    /// Opens everything: probes the store, opens the WAL log, attaches what it holds.
    ///
    /// # Errors
    /// [`ServerError`] with what is wrong and what to do.
    pub async fn open(config: PageserverConfig) -> Result<Arc<Pageserver>, ServerError> {
        let run = uuid::Uuid::new_v4().simple().to_string();
        let (wal, wal_log) = {
            let (folder, limit) = (config.data.join("wal"), config.wal_log_limit_bytes);
            let open = move || -> Result<(WalLog, WalLogId), ServerError> {
                let wal = WalLog::open(&folder, limit).map_err(ServerError::internal)?;
                Ok((wal, wal_log_id(&folder)?))
            };
            tokio::task::spawn_blocking(open).await.map_err(ServerError::internal)??
        };
        config.store.probe().await?;
        let runtime = tokio::runtime::Handle::current();
        let resources =
            crate::layers::resources(&config.store, &runtime, config.data.join("layers"), config.cache_bytes, config.memtable_bytes)?;
        let context =
            Arc::new(OpenContext { wal: Arc::new(wal), wal_log, runtime, store: config.store.clone(), resources: Arc::new(resources) });
        let computes = Computes::open(&config.computes)
            .map_err(|error| ServerError::internal(format!("cannot use {}: {error}", config.computes.display())))?;
        let templates = Templates::new(config.store.clone(), config.pg_bin_dirs.clone(), context.clone());
        let pageserver = Arc::new_cyclic(|me| Pageserver {
            me: me.clone(),
            run,
            templates,
            computes,
            context,
            tenants: tokio::sync::Mutex::default(),
            stopping: CancellationToken::new(),
            config,
        });
        pageserver.attach_what_the_log_holds().await;
        Ok(pageserver)
    }

    /// Opens the timelines of which the WAL log holds bytes, so that these get into the store and the log can let go of them.
    async fn attach_what_the_log_holds(&self) {
        for (tenant, timeline) in self.context.wal.unattached() {
            let opened = match self.tenant_by_id(tenant).await {
                Ok(found) => found.timeline(timeline).await.map(drop),
                Err(error) => Err(error),
            };
            match opened {
                Ok(()) => {}
                Err(error) if matches!(error.code, Code::UnknownTenant | Code::UnknownBranch) => {
                    self.context.wal.forget(tenant, timeline);
                }
                Err(error) => {
                    tracing::error!(%tenant, %timeline, %error, "the WAL log holds WAL of a timeline that cannot be opened; it is kept");
                }
            }
        }
    }

    /// Runs the background work until [`Pageserver::stop`]: computes that should run are kept running.
    pub async fn watch(&self) {
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(WATCH_INTERVAL) => self.watch_computes().await,
            }
        }
    }

    /// Puts everything into the store and ends all work. Computes go on without us.
    pub async fn stop(&self) {
        self.stopping.cancel();
        let tenants: Vec<_> = self.tenants.lock().await.values().cloned().collect();
        for tenant in tenants {
            for timeline in tenant.all_opened().await {
                // No acknowledgement from here on; then all that was acknowledged can be put into the store.
                let ended = timeline.end_epoch().await.map(drop);
                let flushed = match ended {
                    Ok(()) => timeline.flush_all().await,
                    failed => failed,
                };
                if let Err(error) = flushed {
                    tracing::warn!(timeline = %timeline.id(), %error, "not all is in the store; the WAL log keeps the rest");
                }
            }
            tenant.stop().await;
        }
    }

    /// The tenant with this name, taken over if need be.
    ///
    /// # Errors
    /// [`Code::UnknownTenant`].
    pub async fn tenant(&self, name: &str) -> Result<Arc<Tenant>, ServerError> {
        let unknown = || {
            let shown: String = name.chars().take(64).collect();
            ServerError::new(Code::UnknownTenant, format!("there is no tenant '{shown}'; 'varve tenant list' shows those there are"))
        };
        let name: TenantName = name.parse().map_err(|_| unknown())?;
        if let Some(tenant) = self.tenants.lock().await.values().find(|tenant| *tenant.name() == name) {
            return Ok(tenant.clone());
        }
        let id = names::lookup(&self.config.store, &name).await?.ok_or_else(unknown)?;
        self.tenant_by_id(id).await
    }

    /// The tenant with this id, taken over if need be.
    ///
    /// # Errors
    /// [`Code::UnknownTenant`].
    pub async fn tenant_by_id(&self, id: TenantId) -> Result<Arc<Tenant>, ServerError> {
        let mut tenants = self.tenants.lock().await;
        if let Some(tenant) = tenants.get(&id) {
            return Ok(tenant.clone());
        }
        let unknown = || ServerError::new(Code::UnknownTenant, format!("there is no tenant with id {id}"));
        let log =
            TenantLog::take_over(&self.config.store, &tenant_folder(id).map_err(ServerError::internal)?).await?.ok_or_else(unknown)?;
        let state = log.state();
        let facts = state.facts().filter(|_| !state.is_removed()).ok_or_else(unknown)?;
        let template = self.templates.by_name(&facts.template).await?;
        let tenant = Arc::new(Tenant::new(log, template, self.context.clone())?);
        tenants.insert(id, tenant.clone());
        Ok(tenant)
    }

    async fn keep(&self, tenant: Arc<Tenant>) {
        self.tenants.lock().await.insert(tenant.id(), tenant);
    }

    async fn forget(&self, tenant: &Tenant) {
        self.tenants.lock().await.remove(&tenant.id());
    }

    fn me(&self) -> Weak<Pageserver> {
        self.me.clone()
    }

    fn run(&self) -> &str {
        &self.run
    }

    fn store(&self) -> &Store {
        &self.config.store
    }

    fn templates(&self) -> &Templates {
        &self.templates
    }

    fn computes(&self) -> &Computes {
        &self.computes
    }

    fn context(&self) -> &Arc<OpenContext> {
        &self.context
    }

    fn spawner(&self) -> &Spawner {
        &self.config.spawner
    }

    /// What the API says of the server itself.
    pub fn facts(&self) -> varve_api::admin::Server {
        varve_api::admin::Server { version: env!("CARGO_PKG_VERSION").to_owned(), page_service: self.page_service_address() }
    }

    fn page_service_address(&self) -> String {
        self.config.page_service.clone()
    }

    /// Figures in the OpenMetrics text format.
    pub fn metrics(&self) -> String {
        let running = self.computes.all().iter().filter(|entry| entry.should_run()).count();
        format!(
            "# TYPE varve_wal_log_bytes gauge\n# UNIT varve_wal_log_bytes bytes\nvarve_wal_log_bytes {}\n\
             # TYPE varve_computes gauge\nvarve_computes {running}\n# EOF\n",
            self.context.wal.bytes()
        )
    }
}

/// The identity of the WAL log in a folder, made with the log.
fn wal_log_id(folder: &std::path::Path) -> Result<WalLogId, ServerError> {
    let path = folder.join("id");
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|error| ServerError::internal(format!("{}: {error}", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = WalLogId::random().map_err(ServerError::internal)?;
            let write = || -> std::io::Result<()> {
                use std::io::Write as _;
                let temporary = folder.join("id.new");
                let mut file = std::fs::File::create(&temporary)?;
                writeln!(file, "{id}")?;
                file.sync_all()?;
                std::fs::rename(&temporary, &path)?;
                std::fs::File::open(folder)?.sync_all()
            };
            write().map_err(|error| ServerError::internal(format!("cannot write {}: {error}", path.display())))?;
            Ok(id)
        }
        Err(error) => Err(ServerError::internal(format!("cannot read {}: {error}", path.display()))),
    }
}
