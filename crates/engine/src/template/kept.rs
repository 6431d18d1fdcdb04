//! Templates: for each Postgres version the cluster that new tenants begin with, made once and kept in the store.
//!
//! A template is `templates/<name>/template`, with its layers' rows and what else a tenant must know of it;
//! `templates/<name>/startup` has the blocks that a start reads, without which starts are merely slower;
//! `templates/current-<major>` names the one for new tenants. The name is new each time one is made, so that a tenant
//! never sees another than the one that it began with. Releases up to 0.1 wrote the three as bare JSON and text; they
//! are still read.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use varve_postgres::{Lsn, Major};
use varve_storage::envelope::{self, Codec, EnvelopeError, Format};
use varve_storage::ids::random_bytes;
use varve_storage::manifest::LayerRow;
use varve_storage::store::{ObjectName, ParseObjectNameError, Store};

use super::{TemplateError, import_data_directory};
use crate::cluster::ClusterFacts;
use crate::context::Context;
use crate::error::EngineError;
use crate::histories::TemplateHistory;

/// Most blocks that a start is given in one batch; a stock one reads about 100.
const STARTUP_BLOCKS_MAX: usize = 1000;
const TEMPLATE_FORMAT: Format = Format { magic: *b"VTPL", version: 1, what: "a template", content_bytes_max: 16 << 20 };
const STARTUP_FORMAT: Format = Format { magic: *b"VTSB", version: 1, what: "a template's startup blocks", content_bytes_max: 1 << 20 };
const CURRENT_FORMAT: Format = Format { magic: *b"VTCU", version: 1, what: "the name of a template", content_bytes_max: 1024 };

/// A block that a start of Postgres reads: tablespace, database, relation, fork, block.
pub type StartupBlock = (u32, u32, u32, u8, u32);

/// What is kept of a template, as JSON in its envelope.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TemplateFacts {
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
    startup_blocks: RwLock<Vec<StartupBlock>>,
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

    /// Blocks that a start of Postgres reads, learnt from the first one.
    pub fn startup_blocks(&self) -> Vec<StartupBlock> {
        self.startup_blocks.read().clone()
    }
}

/// The templates of a store.
#[derive(Debug)]
pub struct Templates {
    store: Store,
    known: Mutex<BTreeMap<String, Arc<Template>>>,
}

impl Templates {
    /// The templates of `store`.
    pub fn new(store: Store) -> Templates {
        Templates { store, known: Mutex::default() }
    }

    /// The template for new tenants of a major, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn current(&self, major: Major) -> Result<Option<Arc<Template>>, EngineError> {
        let known = self.known.lock().values().find(|template| template.facts.cluster.major == major).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let pointer = current_object(major)?;
        let Some(bytes) = self.store.get_optional(&pointer).await? else { return Ok(None) };
        let name = content(&CURRENT_FORMAT, &pointer, &bytes)?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| damaged(&pointer, "it names no template"))?;
        self.by_name(name.trim()).await.map(Some)
    }

    /// The template that a tenant began with.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn by_name(&self, name: &str) -> Result<Arc<Template>, EngineError> {
        if let Some(template) = self.known.lock().get(name) {
            return Ok(template.clone());
        }
        let object = template_object(name)?;
        let (object, bytes) = match self.store.get_optional(&object).await? {
            Some(bytes) => (object, bytes),
            None => {
                let old: ObjectName = format!("templates/{name}/template.json").parse()?;
                let bytes = self.store.get(&old).await?;
                (old, bytes)
            }
        };
        let json = content(&TEMPLATE_FORMAT, &object, &bytes)?;
        let facts: TemplateFacts = serde_json::from_slice(&json).map_err(|error| damaged(&object, &error.to_string()))?;
        let startup_blocks = self.read_startup_blocks(name).await?;
        Ok(self.keep(Template { name: name.to_owned(), facts, startup_blocks: RwLock::new(startup_blocks) }))
    }

    /// What is not there or cannot be read is learnt anew.
    async fn read_startup_blocks(&self, name: &str) -> Result<Vec<StartupBlock>, EngineError> {
        let object = startup_object(name)?;
        let found = match self.store.get_optional(&object).await? {
            Some(bytes) => Some(bytes),
            None => self.store.get_optional(&format!("templates/{name}/startup.json").parse()?).await?,
        };
        let decoded = found.and_then(|bytes| content(&STARTUP_FORMAT, &object, &bytes).ok());
        Ok(decoded.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default())
    }

    fn keep(&self, template: Template) -> Arc<Template> {
        self.known.lock().entry(template.name.clone()).or_insert_with(|| Arc::new(template)).clone()
    }

    /// Keeps what the first start of a template's Postgres read.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn learn_startup_blocks(&self, template: &Template, mut blocks: Vec<StartupBlock>) -> Result<(), EngineError> {
        blocks.truncate(STARTUP_BLOCKS_MAX);
        {
            let mut known = template.startup_blocks.write();
            if !known.is_empty() {
                return Ok(());
            }
            known.clone_from(&blocks);
        }
        let object = startup_object(&template.name)?;
        let json = serde_json::to_vec(&blocks).map_err(|error| damaged(&object, &error.to_string()))?;
        let bytes = envelope::encode(&STARTUP_FORMAT, Codec::Zstd, object.as_str(), &json)?;
        Ok(self.store.put(&object, bytes).await?)
    }

    /// Takes a data directory of `major` that was shut down cleanly as the template for new tenants.
    ///
    /// # Errors
    /// When it cannot be taken in, or the store does not take it.
    pub async fn import(&self, context: &Arc<Context>, major: Major, dir: &Path) -> Result<Arc<Template>, EngineError> {
        let facts = {
            let (context, dir) = (context.clone(), dir.to_owned());
            let threads = context.threads.clone();
            let import = move || -> Result<TemplateFacts, EngineError> {
                let history = TemplateHistory::new(&context, major)?;
                let imported = import_data_directory(&dir, history.timeline(), &mut |_| {})?;
                Ok(TemplateFacts { cluster: imported.cluster, end: imported.end.end, layers: history.into_layers()? })
            };
            threads.call(import).await??
        };
        if facts.cluster.major != major {
            return Err(TemplateError::OtherMajor { dir: dir.to_owned(), found: facts.cluster.major.to_string(), expected: major }.into());
        }
        let name = format!("{}-{:032x}", major.number(), u128::from_be_bytes(random_bytes()?));
        let (object, pointer) = (template_object(&name)?, current_object(major)?);
        let json = serde_json::to_vec(&facts).map_err(|error| damaged(&object, &error.to_string()))?;
        self.store.put(&object, envelope::encode(&TEMPLATE_FORMAT, Codec::Zstd, object.as_str(), &json)?).await?;
        self.store.put(&pointer, envelope::encode(&CURRENT_FORMAT, Codec::None, pointer.as_str(), name.as_bytes())?).await?;
        Ok(self.keep(Template { name, facts, startup_blocks: RwLock::default() }))
    }
}

fn template_object(name: &str) -> Result<ObjectName, ParseObjectNameError> {
    format!("templates/{name}/template").parse()
}

fn startup_object(name: &str) -> Result<ObjectName, ParseObjectNameError> {
    format!("templates/{name}/startup").parse()
}

/// Object that names the template for new tenants of a major.
fn current_object(major: Major) -> Result<ObjectName, ParseObjectNameError> {
    format!("templates/current-{}", major.number()).parse()
}

/// What is in an envelope; what has none was written bare by an older release.
fn content(format: &Format, object: &ObjectName, bytes: &Bytes) -> Result<Bytes, EnvelopeError> {
    if bytes.starts_with(&format.magic) {
        Ok(envelope::decode(format, object.as_str(), bytes)?.content)
    } else if bytes.starts_with(b"V") {
        // Of another kind: let the envelope say so.
        envelope::decode(format, object.as_str(), bytes).map(|decoded| decoded.content)
    } else {
        Ok(bytes.clone())
    }
}

fn damaged(object: &ObjectName, problem: &str) -> EnvelopeError {
    EnvelopeError::Damaged { object: object.to_string(), problem: problem.to_owned() }
}
