//! Templates: for each Postgres version the cluster that new tenants begin with, made once and kept in the store.
//!
//! A template is `templates/<name>/template.json`, with its layers' rows and what else a tenant must know of it. The name is new each time one is
//! made, so that a tenant never sees another than the one that it began with.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use varve_postgres::{Lsn, Major};
use varve_api::host::BlockName;
use varve_storage::manifest::LayerRow;
use varve_storage::store::{ObjectName, Store};

use crate::cluster::ClusterFacts;
use crate::error::{Code, ServerError};
use crate::layers::TemplateHistory;
use crate::template::{RunAs, import_data_directory, prepare_template, server_major};
use crate::timeline::OpenContext;

/// Most blocks that a start is given in one batch; a stock one reads about 100.
const STARTUP_BLOCKS_MAX: usize = 1000;
/// Version of `template.json`.
const FORMAT_VERSION: u32 = 1;

/// What is kept of a template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TemplateFacts {
    format_version: u32,
    /// What `initdb` fixed.
    pub cluster: ClusterFacts,
    /// Where its history ends and tenants' begin.
    #[serde(with = "lsn_text")]
    pub end: Lsn,
    /// Its layers.
    pub layers: Vec<LayerRow>,
}

mod lsn_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use varve_postgres::Lsn;

    pub(super) fn serialize<S: Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(lsn)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Lsn, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A template.
#[derive(Debug)]
pub struct Template {
    name: String,
    facts: TemplateFacts,
    /// Blocks that a start of Postgres reads, learnt from the first one; an object of its own, without which starts are merely slower.
    startup_blocks: RwLock<Vec<BlockName>>,
}

impl Template {
    /// Name of its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is kept of it.
    pub fn facts(&self) -> &TemplateFacts {
        &self.facts
    }

    /// Blocks that a start of Postgres reads.
    pub fn startup_blocks(&self) -> Vec<BlockName> {
        self.startup_blocks.read().clone()
    }
}

/// The templates of a store.
#[derive(Debug)]
pub struct Templates {
    store: Store,
    bin_dirs: Vec<(u32, PathBuf)>,
    /// Versions whose binaries were found to be of that version.
    checked: Mutex<BTreeSet<u32>>,
    context: Arc<OpenContext>,
    known: tokio::sync::Mutex<HashMap<String, Arc<Template>>>,
}

impl Templates {
    /// The templates of `store`, made with the Postgres binaries in `bin_dirs` or where Debian puts them.
    pub fn new(store: Store, bin_dirs: Vec<(u32, PathBuf)>, context: Arc<OpenContext>) -> Templates {
        Templates { store, bin_dirs, checked: Mutex::default(), context, known: tokio::sync::Mutex::default() }
    }

    /// Folder of the binaries of a Postgres version. The first time, the server in it is asked which version it is.
    ///
    /// # Errors
    /// [`Code::HostUnfit`] when there are none here, or of another version.
    pub fn bin_dir(&self, version: u32) -> Result<PathBuf, ServerError> {
        let given = self.bin_dirs.iter().find(|(number, _)| *number == version).map(|(_, path)| path.clone());
        let path = given.unwrap_or_else(|| Path::new("/usr/lib/postgresql").join(version.to_string()).join("bin"));
        let postgres = path.join("postgres");
        let unfit = |what: String| ServerError::new(Code::HostUnfit, format!("{what} start varve dev with --pg-bin-dir {version}=DIR"));
        if !postgres.exists() {
            return Err(unfit(format!(
                "there is no PostgreSQL {version} here: {} does not exist; install postgresql-{version}, or",
                postgres.display()
            )));
        }
        if !self.checked.lock().contains(&version) {
            let found = server_major(&path).map_err(|error| unfit(format!("{error};")))?;
            if found.number() != version {
                return Err(unfit(format!("{} is PostgreSQL {found}, expected PostgreSQL {version};", postgres.display())));
            }
            self.checked.lock().insert(version);
        }
        Ok(path)
    }

    /// The template for new tenants of a version; of the newest that this host has if none is named. Made now if there is none.
    ///
    /// # Errors
    /// When this host has no such Postgres, or the template cannot be made.
    pub async fn for_version(&self, version: Option<u32>) -> Result<Arc<Template>, ServerError> {
        let version = match version {
            Some(version) if Major::from_number(version).is_none() => {
                return Err(ServerError::new(Code::InvalidArgument, format!("PostgreSQL {version} is not supported: 14 to 18 are")));
            }
            Some(version) => version,
            None => {
                let newest = Major::ALL.iter().rev().map(|major| major.number()).find(|version| self.bin_dir(*version).is_ok());
                newest.ok_or_else(|| {
                    ServerError::new(Code::HostUnfit, "there is no PostgreSQL here: install one, such as Debian's package postgresql-15")
                })?
            }
        };
        let bin_dir = self.bin_dir(version)?;
        let mut known = self.known.lock().await;
        if let Some(template) = known.values().find(|template| template.facts.cluster.major.number() == version) {
            return Ok(template.clone());
        }
        let pointer = current_pointer(version)?;
        if let Some(bytes) = self.store.get_optional(&pointer).await? {
            let name = String::from_utf8(bytes.to_vec()).map_err(|_| ServerError::internal(format!("{pointer} is damaged")))?;
            return self.read(&mut known, name.trim()).await;
        }
        let name = format!("{version}-{}", uuid::Uuid::new_v4().simple());
        let facts = self.make(version, bin_dir).await?;
        let json = serde_json::to_vec_pretty(&facts).map_err(ServerError::internal)?;
        self.store.put(&facts_object(&name)?, json.into()).await?;
        self.store.put(&pointer, name.clone().into()).await?;
        let template = Arc::new(Template { name: name.clone(), facts, startup_blocks: RwLock::default() });
        known.insert(name, template.clone());
        Ok(template)
    }

    /// The template that a tenant began with.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn by_name(&self, name: &str) -> Result<Arc<Template>, ServerError> {
        let mut known = self.known.lock().await;
        if let Some(template) = known.get(name) {
            return Ok(template.clone());
        }
        self.read(&mut known, name).await
    }

    async fn read(&self, known: &mut HashMap<String, Arc<Template>>, name: &str) -> Result<Arc<Template>, ServerError> {
        let object = facts_object(name)?;
        let bytes = self.store.get(&object).await?;
        let facts: TemplateFacts =
            serde_json::from_slice(&bytes).map_err(|error| ServerError::internal(format!("{object} cannot be read: {error}")))?;
        if facts.format_version > FORMAT_VERSION {
            return Err(ServerError::internal(format!(
                "{object} has format version {}, this varve knows up to {FORMAT_VERSION}: use the newer varve that wrote it",
                facts.format_version
            )));
        }
        let learnt = self.store.get_optional(&startup_object(name)?).await?;
        let startup_blocks = learnt.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let template = Arc::new(Template { name: name.to_owned(), facts, startup_blocks: RwLock::new(startup_blocks) });
        known.insert(name.to_owned(), template.clone());
        Ok(template)
    }

    /// Keeps what the first start of a template's Postgres read.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn learn_startup_blocks(&self, template: &Template, mut blocks: Vec<BlockName>) -> Result<(), ServerError> {
        blocks.truncate(STARTUP_BLOCKS_MAX);
        {
            let mut known = template.startup_blocks.write();
            if !known.is_empty() {
                return Ok(());
            }
            known.clone_from(&blocks);
        }
        let json = serde_json::to_vec(&blocks).map_err(ServerError::internal)?;
        Ok(self.store.put(&startup_object(&template.name)?, json.into()).await?)
    }

    /// Runs `initdb` and takes what it made into layers.
    async fn make(&self, version: u32, bin_dir: PathBuf) -> Result<TemplateFacts, ServerError> {
        let started = std::time::Instant::now();
        let major = Major::from_number(version).ok_or_else(|| ServerError::internal("an unknown major"))?;
        let context = self.context.clone();
        let facts = tokio::task::spawn_blocking(move || -> Result<TemplateFacts, ServerError> {
            let work = work_folder().map_err(ServerError::internal)?;
            let made =
                prepare_template(&bin_dir, work.path(), run_as()).map_err(|error| ServerError::new(Code::HostUnfit, error.to_string()))?;
            let history = TemplateHistory::new(&context, major)?;
            let imported = import_data_directory(&made.data_dir, history.timeline(), &mut |_| {}).map_err(ServerError::internal)?;
            let layers = history.into_layers()?;
            Ok(TemplateFacts { format_version: FORMAT_VERSION, cluster: imported.cluster, end: imported.end.end, layers })
        });
        let facts = facts.await.map_err(ServerError::internal)??;
        tracing::info!(version, elapsed_ms = started.elapsed().as_millis(), "template made");
        Ok(facts)
    }
}

fn facts_object(name: &str) -> Result<ObjectName, ServerError> {
    format!("templates/{name}/template.json").parse().map_err(ServerError::internal)
}

fn startup_object(name: &str) -> Result<ObjectName, ServerError> {
    format!("templates/{name}/startup.json").parse().map_err(ServerError::internal)
}

/// Object that names the template for new tenants of a version.
fn current_pointer(version: u32) -> Result<ObjectName, ServerError> {
    format!("templates/current-{version}").parse().map_err(ServerError::internal)
}

/// A temporary folder that Postgres's user can reach.
fn work_folder() -> std::io::Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::Builder::new().prefix("varve-template-").tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// The user that Postgres runs as when we are root.
fn run_as() -> Option<RunAs> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some("postgres")).then_some(())?;
        Some(RunAs { uid: fields.nth(1)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    })
}
