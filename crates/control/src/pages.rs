//! Pages that WAL does not give back ([`varve_api::kept_pages`]): kept with the end of a compute that ended cleanly,
//! given to one that begins exactly there.
//!
//! They are files of the timeline, at the LSN at which the epoch was closed: a list of its sequences', a list of its
//! unlogged relations', and the note that a compute has run from there on, after which the second does not count for
//! this timeline. Both lists stay good for what branches off there.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use varve_api::Code;
use varve_api::host::PieceKept;
use varve_api::kept_pages::{KeptPages, PIECE_BYTES, PagesOfFile};
use varve_postgres::Lsn;
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{FileContents, PAGES_FOLDER, TenantEdit, TenantLog, TenantState};

use crate::Control;
use crate::error::{Error, quoted};
use crate::ports::Pageserver;

const SEQUENCES: &str = "varve_pages/sequences";
const UNLOGGED: &str = "varve_pages/unlogged";
const RAN: &str = "varve_pages/ran";
/// Version of the lists. Another one does not count.
const VERSION: u32 = 1;

/// A list as it is kept.
#[derive(Serialize, Deserialize)]
struct List {
    version: u32,
    files: Vec<PagesOfFile>,
}

/// Whether a file of a timeline is none of a data directory.
pub(crate) fn is_of_pages(path: &str) -> bool {
    path.starts_with(PAGES_FOLDER)
}

/// The version of a file that was kept exactly at `lsn`, the timeline's own or that of one that it branches off there.
fn exactly_at<'a>(state: &'a TenantState, timeline: TimelineId, lsn: Lsn, path: &str) -> Result<Option<&'a FileContents>, Error> {
    for (timeline, limit) in state.ancestry(timeline)? {
        let versions = timeline.files.get(path).into_iter().flatten();
        if let Some((_, contents)) = versions.rev().find(|(at, _)| *at == lsn && lsn <= limit) {
            return Ok(Some(&**contents));
        }
    }
    Ok(None)
}

/// Whether a compute has run on this very timeline from `lsn` on.
fn has_run(state: &TenantState, timeline: TimelineId, lsn: Lsn) -> Result<bool, Error> {
    let notes = state.timeline(timeline)?.files.get(RAN).into_iter().flatten();
    Ok(notes.rev().any(|(at, _)| *at == lsn))
}

impl<P: Pageserver> Control<P> {
    /// Keeps a piece of a file, before the list in which it is named.
    ///
    /// # Errors
    /// [`Error::Argument`] of one that is too large, or so small that the list has room for it.
    pub async fn put_piece(&self, id: &str, bytes: Bytes) -> Result<PieceKept, Error> {
        if bytes.len() > PIECE_BYTES {
            return Err(Error::argument("body", format!("a piece has {PIECE_BYTES} bytes at most")));
        }
        let entry = self.process(id)?;
        self.own_for_compute(entry.tenant, "a compute keeps pages").await?;
        match self.pageserver.put_file(entry.tenant, bytes.to_vec()).await? {
            FileContents::Object { name, .. } => Ok(PieceKept { name }),
            FileContents::Inline(_) | FileContents::Removed => Err(Error::argument("body", "so little belongs into the list itself")),
        }
    }

    /// The bytes of a piece.
    ///
    /// # Errors
    /// [`Error::Argument`] of a name that is no piece of the compute's tenant.
    pub async fn get_piece(&self, id: &str, name: &str) -> Result<Bytes, Error> {
        let entry = self.process(id)?;
        let number = name.strip_prefix(&format!("tenants/{}/files/", entry.tenant));
        if !number.is_some_and(|number| number.len() == 32 && number.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            return Err(Error::argument("name", format!("'{}' is no piece of this tenant's", quoted(name))));
        }
        let contents = FileContents::Object { name: name.to_owned(), len: 0 };
        Ok(self.pageserver.get_file(entry.tenant, contents).await?.into())
    }

    /// Keeps the lists of a compute whose epoch was closed.
    pub(crate) async fn keep_pages(
        &self,
        log: &TenantLog,
        tenant: TenantId,
        (timeline, epoch): (TimelineId, WriterEpoch),
        pages: &KeptPages,
    ) -> Result<(), Error> {
        let mut lists = Vec::new();
        for (path, files) in [(SEQUENCES, &pages.sequences), (UNLOGGED, &pages.unlogged)] {
            if !files.is_empty() {
                let list = List { version: VERSION, files: files.clone() };
                let bytes = serde_json::to_vec(&list).map_err(|error| Error::argument("pages", error))?;
                lists.push((path.to_owned(), self.pageserver.put_file(tenant, bytes).await?));
            }
        }
        if lists.is_empty() {
            return Ok(());
        }
        self.commit_edits(log, |state| {
            let newest = state.timeline(timeline)?.epochs.last().filter(|newest| newest.epoch == epoch);
            // Where another has begun since, or it was not closed after all, they are of no use.
            let Some(lsn) = newest.and_then(|newest| newest.closed) else { return Ok(Vec::new()) };
            Ok(lists.into_iter().map(|(path, contents)| TenantEdit::File { timeline, path, lsn, contents }).collect())
        })
        .await
    }

    /// The pages that hold for a compute that begins at `lsn`.
    pub(crate) async fn pages_at(&self, state: &TenantState, tenant: TenantId, timeline: TimelineId, lsn: Lsn) -> Result<KeptPages, Error> {
        let sequences = self.list(tenant, exactly_at(state, timeline, lsn, SEQUENCES)?).await?;
        let unlogged = if has_run(state, timeline, lsn)? { None } else { exactly_at(state, timeline, lsn, UNLOGGED)? };
        Ok(KeptPages { sequences, unlogged: self.list(tenant, unlogged).await? })
    }

    /// What a list holds. One that is damaged holds nothing: no start fails because of it.
    async fn list(&self, tenant: TenantId, contents: Option<&FileContents>) -> Result<Vec<PagesOfFile>, Error> {
        let bytes = match contents {
            None | Some(FileContents::Removed) => return Ok(Vec::new()),
            Some(FileContents::Inline(bytes)) => bytes.clone(),
            Some(object) => match self.pageserver.get_file(tenant, object.clone()).await {
                Ok(bytes) => bytes,
                Err(refusal) if refusal.code == Code::Unavailable => return Err(refusal.into()),
                Err(refusal) => {
                    tracing::error!(%tenant, %refusal, "a list of kept pages cannot be read");
                    return Ok(Vec::new());
                }
            },
        };
        match serde_json::from_slice::<List>(&bytes) {
            Ok(List { version: VERSION, files }) => Ok(files),
            Ok(List { version, .. }) => {
                tracing::error!(%tenant, version, "a list of kept pages was written by another release");
                Ok(Vec::new())
            }
            Err(error) => {
                tracing::error!(%tenant, %error, "a list of kept pages cannot be read");
                Ok(Vec::new())
            }
        }
    }

    /// A compute of this epoch runs: what unlogged relations held where it began does not count for the next.
    pub(crate) async fn note_run(&self, log: &TenantLog, timeline: TimelineId, epoch: WriterEpoch) -> Result<(), Error> {
        let began = |state: &TenantState| -> Result<Option<Lsn>, Error> {
            let epoch = state.timeline(timeline)?.epochs.iter().rev().find(|known| known.epoch == epoch);
            let Some(lsn) = epoch.map(|epoch| epoch.lsn) else { return Ok(None) };
            let counts = exactly_at(state, timeline, lsn, UNLOGGED)?.is_some() && !has_run(state, timeline, lsn)?;
            Ok(counts.then_some(lsn))
        };
        if began(&log.state())?.is_none() {
            return Ok(());
        }
        self.commit_edits(log, |state| {
            let note = |lsn| TenantEdit::File { timeline, path: RAN.to_owned(), lsn, contents: FileContents::Inline(Vec::new()) };
            Ok(began(state)?.map(note).into_iter().collect())
        })
        .await
    }
}
