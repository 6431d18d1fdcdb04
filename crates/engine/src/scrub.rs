//! Scrubbing a store: reads every object that counts, checks each checksum and each reference, and compares what logs
//! and manifests name with what is there.
//!
//! It only reads, takes nothing over, and may run beside the servers of the store. What a merge takes away meanwhile is
//! no finding: whatever is missing or damaged is looked up once more in the manifest, and counts only if it is still
//! there. An object that nothing refers to was left by a crash, or is about to be published; it is told, and left.
//!
//! Memory: one layer, and one tenant's names and manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::Serialize;
use varve_storage::edit_log::{self, EditLogError};
use varve_storage::envelope;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::kept_wal::KeptWal;
use varve_storage::layer::Layer;
use varve_storage::manifest::{LayerRow, ManifestState, timeline_folder};
use varve_storage::shared_wal::Archive;
use varve_storage::store::{Failure, ObjectName, Store, StoreError};
use varve_storage::tenant_log::{FileContents, PAGES_FOLDER, TenantState, names, tenant_folder};
use varve_storage::threads::Threads;

use crate::error::EngineError;
use crate::histories::TEMPLATE_TENANT;
use crate::template::Templates;
use crate::tenant::FILE_FORMAT;

/// Findings that a report has in full; further ones are counted.
const FINDINGS_MAX: usize = 1000;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The object, or the log's folder.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What a scrub saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tenants whose logs were read.
    pub tenants: u64,
    /// Timelines whose manifests were read.
    pub timelines: u64,
    /// Layers that were read.
    pub layers: u64,
    /// Other objects that were read: entries of logs, kept WAL, files, templates.
    pub others: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Objects that nothing refers to.
    pub unreferenced: u64,
    /// Their bytes.
    pub unreferenced_bytes: u64,
    /// The first of them.
    pub unreferenced_objects: Vec<String>,
    /// Things that are wrong.
    pub findings: u64,
    /// The first of them.
    pub found: Vec<Finding>,
}

impl Report {
    fn find(&mut self, object: &impl ToString, problem: &(impl ToString + ?Sized)) {
        self.findings += 1;
        if self.found.len() < FINDINGS_MAX {
            self.found.push(Finding { object: object.to_string(), problem: problem.to_string() });
        }
    }

    fn find_unreferenced(&mut self, object: &ObjectName, bytes: u64) {
        self.unreferenced += 1;
        self.unreferenced_bytes += bytes;
        if self.unreferenced_objects.len() < FINDINGS_MAX {
            self.unreferenced_objects.push(object.to_string());
        }
    }
}

/// A log as its objects make it.
enum Log<S> {
    /// All of it can be read, and fits together.
    Sound(S),
    /// There is none.
    Missing,
    /// What is wrong with it has been told.
    Damaged,
}

/// What a scrub is told while it goes on.
pub trait Watch: Send + Sync {
    /// The tenant that is next, of so many.
    fn tenant(&mut self, name: &str, number: usize, of: usize);

    /// So many bytes were read: returns when it may go on.
    fn read(&mut self, bytes: u64) -> BoxFuture<'_, ()>;
}

/// Reads a store.
pub struct Scrub<'a> {
    store: &'a Store,
    threads: Arc<dyn Threads>,
    watch: &'a mut dyn Watch,
    report: Report,
    templates: Templates,
    /// Templates that were checked.
    checked: BTreeSet<String>,
}

impl<'a> Scrub<'a> {
    /// Of `store`; checksums are computed on `threads`.
    pub fn new(store: &'a Store, threads: Arc<dyn Threads>, watch: &'a mut dyn Watch) -> Scrub<'a> {
        let templates = Templates::new(store.clone());
        Scrub { store, threads, watch, report: Report::default(), templates, checked: BTreeSet::new() }
    }

    /// Scrubs the tenant of this name or id, or, without one, all.
    ///
    /// # Errors
    /// When the store does not answer. What is damaged is in the report.
    pub async fn run(mut self, only: Option<&str>) -> Result<Report, EngineError> {
        let tenants = names::list(self.store).await?;
        let wanted = |name: &str, id: TenantId| only.is_none_or(|only| only == name || only == id.to_string());
        let chosen: Vec<_> = tenants.iter().filter(|(name, id)| wanted(name.as_str(), *id)).collect();
        for (number, (name, id)) in chosen.iter().enumerate() {
            self.watch.tenant(name.as_str(), number + 1, chosen.len());
            self.tenant(*id).await?;
        }
        if only.is_none() {
            self.shared_wal().await?;
            self.layers_of_templates().await?;
        }
        Ok(self.report)
    }

    /// Scrubs one tenant, whatever its name is. A template that was read for another tenant is not read again.
    ///
    /// # Errors
    /// When the store does not answer. What is damaged is in the report.
    pub async fn one(&mut self, id: TenantId) -> Result<Report, EngineError> {
        self.report = Report::default();
        self.tenant(id).await?;
        Ok(std::mem::take(&mut self.report))
    }

    /// WAL of all servers that layers may not have yet.
    async fn shared_wal(&mut self) -> Result<(), EngineError> {
        let archive = Archive::new(self.store.clone());
        for listed in archive.list().await? {
            match archive.verify(&listed.name).await {
                Ok(bytes) => self.count(1, bytes.unwrap_or(0)).await,
                Err(error) => self.report.find(&listed.name, &error.unless_unanswered()?),
            }
        }
        Ok(())
    }

    /// What a store says of one object that it does not give; passes on what is wrong with the store. A disk that
    /// cannot read a file has damaged it; a bucket that answers late, or not us, has not.
    fn unless_unreadable(&self, error: StoreError) -> Result<String, EngineError> {
        let is_bucket = self.store.folder().is_none();
        match error.failure() {
            Some(Failure::Unreachable | Failure::StoreMissing) => Err(error.into()),
            Some(Failure::Other | Failure::AccessDenied) if is_bucket => Err(error.into()),
            _ => Ok(error.to_string()),
        }
    }

    /// Templates that no tenant has, and what nothing refers to among the layers of all.
    async fn layers_of_templates(&mut self) -> Result<(), EngineError> {
        let mut listed: BTreeMap<ObjectName, u64> =
            self.store.list(&tenant_folder(TEMPLATE_TENANT)?).await?.into_iter().map(|l| (l.name, l.bytes)).collect();
        let folder: ObjectName = "templates".parse()?;
        for object in self.store.list(&folder).await? {
            let Some((name, "template" | "template.json")) = folder.relative(&object.name).and_then(|rest| rest.split_once('/')) else {
                continue;
            };
            self.template(name).await?;
            if let Ok(template) = self.templates.by_name(name).await {
                for row in &template.facts().layers {
                    listed.remove(&row.object);
                }
            }
        }
        listed.iter().for_each(|(object, bytes)| self.report.find_unreferenced(object, *bytes));
        Ok(())
    }

    async fn tenant(&mut self, id: TenantId) -> Result<(), EngineError> {
        let folder = tenant_folder(id)?;
        // Before the manifests: what is published meanwhile is not taken for unreferenced.
        let mut listed: BTreeMap<ObjectName, u64> = self.store.list(&folder).await?.into_iter().map(|l| (l.name, l.bytes)).collect();
        self.report.tenants += 1;
        let state = match self.log::<TenantState>(&folder, &mut listed).await? {
            Log::Sound(state) => state,
            Log::Missing => {
                self.report.find(&folder, "the tenant has a name and no log: restore its objects from a copy of the store");
                return Ok(());
            }
            Log::Damaged => return Ok(()),
        };
        if let Some(facts) = state.facts() {
            self.template(&facts.template.clone()).await?;
        }
        for timeline in state.timelines() {
            self.timeline(id, timeline.facts.id, &mut listed).await?;
        }
        for (object, len) in files_of(self.store, &state, true).await? {
            listed.remove(&object);
            self.file(&object, len).await?;
        }
        // What was published since the listing is referred to by now. Each manifest is read once more for that.
        let mut left: BTreeMap<Option<TimelineId>, BTreeMap<ObjectName, u64>> = BTreeMap::new();
        for (object, bytes) in listed {
            left.entry(timeline_of(&folder, &object)).or_default().insert(object, bytes);
        }
        for (timeline, objects) in left {
            let known = self.referenced(id, timeline).await?;
            for (object, bytes) in objects.iter().filter(|(object, _)| !known.contains(*object)) {
                self.report.find_unreferenced(object, *bytes);
            }
        }
        Ok(())
    }

    /// Checks each object of a log, and takes them off the list. Gives what they make together.
    async fn log<S: edit_log::State>(
        &mut self,
        folder: &ObjectName,
        listed: &mut BTreeMap<ObjectName, u64>,
    ) -> Result<Log<S>, EngineError> {
        let log = folder.join("log")?;
        let (mut objects, mut bytes) = (0, 0);
        listed.retain(|object, length| {
            let is_of_log = log.relative(object).is_some();
            if is_of_log {
                (objects, bytes) = (objects + 1, bytes + *length);
            }
            !is_of_log
        });
        self.count(objects, bytes).await;
        // Each object by itself, and then in order: each edit must fit the state before it.
        let read = match edit_log::dump::<S>(self.store, folder).await {
            Ok(_) => edit_log::read_state::<S>(self.store, folder).await,
            Err(error) => Err(error),
        };
        match read {
            Ok(Some((state, _))) => Ok(Log::Sound(state)),
            Ok(None) => Ok(Log::Missing),
            Err(error) => {
                self.report.find(folder, &error);
                unless_damaged(error).map(|()| Log::Damaged)
            }
        }
    }

    async fn count(&mut self, others: u64, bytes: u64) {
        self.report.others += others;
        self.report.bytes += bytes;
        self.watch.read(bytes).await;
    }

    async fn timeline(
        &mut self,
        tenant: TenantId,
        timeline: TimelineId,
        listed: &mut BTreeMap<ObjectName, u64>,
    ) -> Result<(), EngineError> {
        let folder = timeline_folder(tenant, timeline)?;
        self.report.timelines += 1;
        // A timeline without layers has no manifest yet.
        let Log::Sound(state) = self.log::<ManifestState>(&folder, listed).await? else { return Ok(()) };
        let rows: Vec<Arc<LayerRow>> = state.layers().cloned().collect();
        let pieces: Vec<Arc<KeptWal>> = state.kept_wal().cloned().collect();
        drop(state);
        for row in rows {
            let found = listed.remove(&row.object);
            let Some(problem) = self.layer(&row, found).await? else { continue };
            if self.manifest(&folder).await?.is_some_and(|now| now.layer(row.id).is_some()) {
                self.report.find(&row.object, &problem);
            }
        }
        for piece in pieces {
            listed.remove(&piece.object);
            let read = {
                let (store, piece) = (self.store.blocking(self.threads.clone()), piece.clone());
                self.threads.call(move || piece.read(&store, piece.lsn_start).map(drop)).await?
            };
            self.count(1, piece.length).await;
            if let Err(error) = read
                && self.manifest(&folder).await?.is_some_and(|now| now.kept_wal().any(|other| other.object == piece.object))
            {
                self.report.find(&piece.object, &error);
            }
        }
        Ok(())
    }

    /// A manifest as it is now; none if there is none, or it cannot be read, which its log's check tells.
    async fn manifest(&self, folder: &ObjectName) -> Result<Option<ManifestState>, EngineError> {
        match edit_log::read_state::<ManifestState>(self.store, folder).await {
            Ok(read) => Ok(read.map(|(state, _)| state)),
            Err(error) => unless_damaged(error).map(|()| None),
        }
    }

    /// What is wrong with a layer, if anything is. `found` is the object's length as it was listed.
    async fn layer(&mut self, row: &LayerRow, found: Option<u64>) -> Result<Option<String>, EngineError> {
        let bytes = match self.store.get_optional(&row.object).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Some("the manifest names it, and it is not there: restore it from a copy of the store".to_owned())),
            Err(error) => return self.unless_unreadable(error).map(Some),
        };
        self.report.layers += 1;
        self.report.bytes += bytes.len() as u64;
        self.watch.read(bytes.len() as u64).await;
        let length = bytes.len() as u64;
        if length < row.offset.saturating_add(row.length) || found.is_some_and(|listed| listed != length) {
            let expected = row.offset.saturating_add(row.length);
            return Ok(Some(format!("it has {length} bytes, the manifest expects {expected} at least, the listing said {found:?}")));
        }
        let layer = Arc::new(Layer::new(row.info(), row.object.to_string(), row.offset, Box::new(bytes)));
        let verified = self.threads.call(move || layer.verify()).await?;
        Ok(verified.err().map(|error| error.to_string()))
    }

    async fn file(&mut self, object: &ObjectName, len: Option<u64>) -> Result<(), EngineError> {
        match self.store.get_optional(object).await {
            Ok(Some(bytes)) => {
                self.count(1, bytes.len() as u64).await;
                match envelope::decode(&FILE_FORMAT, object.as_str(), &bytes) {
                    Ok(decoded) if len.is_none_or(|len| decoded.content.len() as u64 == len) => {}
                    Ok(decoded) => {
                        self.report.find(object, &format!("it has {} bytes, {} are expected", decoded.content.len(), len.unwrap_or(0)));
                    }
                    Err(error) => self.report.find(object, &error),
                }
            }
            Ok(None) => self.report.find(object, "the tenant's log names it, and it is not there: restore it from a copy of the store"),
            Err(error) => {
                let problem = self.unless_unreadable(error)?;
                self.report.find(object, &problem);
            }
        }
        Ok(())
    }

    /// A template and its layers, once.
    async fn template(&mut self, name: &str) -> Result<(), EngineError> {
        if !self.checked.insert(name.to_owned()) {
            return Ok(());
        }
        let template = match self.templates.by_name(name).await {
            Ok(template) => template,
            Err(EngineError::Store(error)) if !error.is_not_found() => return Err(error.into()),
            Err(error) => {
                self.report.find(&format!("templates/{name}"), &error);
                return Ok(());
            }
        };
        self.count(1, 0).await;
        for row in &template.facts().layers {
            if let Some(problem) = self.layer(row, None).await? {
                self.report.find(&row.object, &problem);
            }
        }
        Ok(())
    }

    /// What a timeline's manifest refers to by now, or, without a timeline, the tenant's log.
    async fn referenced(&self, tenant: TenantId, timeline: Option<TimelineId>) -> Result<BTreeSet<ObjectName>, EngineError> {
        if let Some(timeline) = timeline {
            let Some(now) = self.manifest(&timeline_folder(tenant, timeline)?).await? else { return Ok(BTreeSet::new()) };
            let layers = now.layers().map(|row| row.object.clone());
            return Ok(layers.chain(now.kept_wal().map(|piece| piece.object.clone())).collect());
        }
        match edit_log::read_state::<TenantState>(self.store, &tenant_folder(tenant)?).await {
            Ok(Some((now, _))) => Ok(files_of(self.store, &now, true).await?.into_keys().collect()),
            Ok(None) => Ok(BTreeSet::new()),
            Err(error) => unless_damaged(error).map(|()| BTreeSet::new()),
        }
    }
}

/// The objects that hold files of a tenant's timelines, with the files' lengths, and those that lists of kept pages
/// name. What a list names that is damaged is not known: then it is an error, or, where the damage is told elsewhere,
/// left out.
pub(crate) async fn files_of(
    store: &Store,
    state: &TenantState,
    is_damage_told: bool,
) -> Result<BTreeMap<ObjectName, Option<u64>>, EngineError> {
    let mut objects = BTreeMap::new();
    let mut lists = Vec::new();
    for (path, versions) in state.timelines().flat_map(|timeline| timeline.files.iter()) {
        for (_, contents) in versions {
            if let FileContents::Object { name, len } = &**contents {
                objects.insert(name.parse()?, Some(*len));
            }
            if path.starts_with(PAGES_FOLDER) {
                lists.push((path.clone(), contents.clone()));
            }
        }
    }
    for (path, contents) in lists {
        match pieces_in(store, &path, &contents).await {
            Ok(names) => objects.extend(names.into_iter().map(|name| (name, None))),
            Err(_) if is_damage_told => {}
            Err(error) => return Err(error),
        }
    }
    Ok(objects)
}

/// The objects that a list of kept pages names.
async fn pieces_in(store: &Store, path: &str, contents: &FileContents) -> Result<Vec<ObjectName>, EngineError> {
    let list = match contents {
        FileContents::Removed => return Ok(Vec::new()),
        FileContents::Inline(bytes) => bytes.clone(),
        FileContents::Object { name, .. } => envelope::decode(&FILE_FORMAT, name, &store.get(&name.parse()?).await?)?.content.to_vec(),
    };
    let list: serde_json::Value =
        serde_json::from_slice(&list).map_err(|error| EngineError::KeptPages { path: path.to_owned(), problem: error.to_string() })?;
    Ok(names_in(&list).map(str::parse).collect::<Result<_, _>>()?)
}

/// The names of objects in a list of kept pages (`varve_api::kept_pages`).
fn names_in(list: &serde_json::Value) -> impl Iterator<Item = &str> {
    let files = list["files"].as_array().into_iter().flatten();
    let pieces = files.flat_map(|file| file["pieces"].as_array().into_iter().flatten());
    pieces.filter_map(|piece| piece["object"]["name"].as_str())
}

/// The timeline in whose folder an object stands.
pub(crate) fn timeline_of(tenant: &ObjectName, object: &ObjectName) -> Option<TimelineId> {
    tenant.relative(object)?.strip_prefix("timelines/")?.split('/').next()?.parse().ok()
}

/// Passes on what is the store's fault; what is wrong with the log itself has been told.
fn unless_damaged(error: EditLogError) -> Result<(), EngineError> {
    match error {
        EditLogError::Store(error) => Err(error.into()),
        _ => Ok(()),
    }
}
