//! Manifests: which layers a timeline has, up to where they cover its history, and which WAL is kept beside them.
//!
//! A manifest is an edit log ([`crate::edit_log`]) at `tenants/<tenant>/timelines/<timeline>/log/...`; its first
//! entry comes with the timeline's first layer. Its owner writes it by the right by which it took over the tenant: a
//! server that was replaced collides with the seal.
//!
//! **A sleeper must not add layers behind its successor's back**, for it may have ingested bytes that are void since.
//! So a server that has taken the tenant over from another (generation 2 and up) claims the manifest when it opens
//! the timeline, before it decides where the next writer epoch begins. In generation 1 there is no earlier owner, and
//! a timeline without layers costs no object.

use std::sync::Arc;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use varve_postgres::Lsn;

use crate::edit_log::{ApplyError, CommitError, EditLog, EditLogError, LogFormat, Ownership, State};
use crate::envelope::{Codec, Format};
use crate::ids::{Generation, LayerId, TenantId, TimelineId};
use crate::kept_wal::KeptWal;
use crate::key::Key;
use crate::layer::LayerInfo;
use crate::retained::Retained;
use crate::store::{ObjectName, ParseObjectNameError, Store};

/// Whose an object is: only this timeline merges it away, and only what deletes this timeline deletes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOwner {
    /// The tenant.
    pub tenant: TenantId,
    /// The timeline.
    pub timeline: TimelineId,
}

impl LayerOwner {
    /// Whose a layer is of which the row does not say it: it was written when each manifest named the timeline's own
    /// layers only, and those stood in its folder.
    fn by_name(object: &ObjectName) -> Option<LayerOwner> {
        let (tenant, rest) = object.as_str().strip_prefix("tenants/")?.split_once("/timelines/")?;
        let (timeline, _) = rest.split_once("/layers/")?;
        Some(LayerOwner { tenant: tenant.parse().ok()?, timeline: timeline.parse().ok()? })
    }
}

/// A layer as its timeline's manifest has it: all that is needed to find it, to know whether to read it, and to check
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRow {
    /// Identity within the tenant.
    pub id: LayerId,
    /// The object that holds it.
    pub object: ObjectName,
    /// Where in the object it begins.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// Key of its first version.
    #[serde(with = "crate::row_fields::key")]
    pub first_key: Key,
    /// Key of its last version.
    #[serde(with = "crate::row_fields::key")]
    pub last_key: Key,
    /// Its versions are above this.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn_start: Lsn,
    /// Its versions are at or below this.
    #[serde(with = "crate::row_fields::lsn")]
    pub lsn_end: Lsn,
    /// Number of its versions.
    pub versions: u64,
    /// Generation that wrote it.
    pub generation: Generation,
    /// How its blocks are compressed.
    pub codec: Codec,
    /// Key that it is encrypted with; 0 = not.
    pub key_id: u32,
    /// CRC-32C of its bytes.
    pub checksum: u32,
    /// Whose its object is. Not known of a template's: nobody may merge or delete it. Stands beside the row in an edit.
    #[serde(skip)]
    pub owner: Option<LayerOwner>,
}

impl LayerRow {
    /// The row of a layer that `generation` wrote for `owner` as an object of its own.
    pub fn of(info: &LayerInfo, object: ObjectName, owner: LayerOwner, generation: Generation) -> LayerRow {
        let LayerInfo { id, first_key, last_key, lsn_start, lsn_end, versions, length, codec, checksum } = *info;
        let (offset, key_id, owner) = (0, 0, Some(owner));
        LayerRow {
            id,
            object,
            offset,
            length,
            first_key,
            last_key,
            lsn_start,
            lsn_end,
            versions,
            generation,
            codec,
            key_id,
            checksum,
            owner,
        }
    }

    /// What a layer's reader needs to know of it.
    pub fn info(&self) -> LayerInfo {
        let LayerRow { id, first_key, last_key, lsn_start, lsn_end, versions, length, codec, checksum, .. } = *self;
        LayerInfo { id, first_key, last_key, lsn_start, lsn_end, versions, length, codec, checksum }
    }

    /// Whether it holds relation blocks; else it holds everything but.
    pub fn is_blocks(&self) -> bool {
        self.first_key.is_block()
    }
}

/// One row of a manifest's entry. Kinds are numbered in the order of this enum: new ones come at its end, and none is
/// ever changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestEdit {
    /// A layer is there; it was uploaded before. Only older releases wrote this: it does not say whose it is.
    AddLayer(LayerRow),
    /// A layer is not needed any more; its object is deleted afterwards.
    RemoveLayer {
        /// The layer.
        id: LayerId,
    },
    /// Layers cover the whole history up to here.
    Layered {
        /// The position.
        #[serde(with = "crate::row_fields::lsn")]
        lsn: Lsn,
    },
    /// A piece of WAL is kept; it was uploaded before.
    KeepWal(KeptWal),
    /// A layer is there; it was uploaded before, by this timeline or by another one.
    AddLayerOf {
        /// Whose its object is.
        owner: LayerOwner,
        /// The layer.
        layer: LayerRow,
    },
    /// The layers were reduced to what is retained, up to the cutoff: elsewhere below it they give no answer.
    Collected(Retained),
}

impl ManifestEdit {
    /// How many kinds there are. A row of a kind at or above this was written by a newer release.
    pub const KINDS: u32 = 6;

    /// The edit that adds a layer.
    pub fn add(layer: LayerRow) -> ManifestEdit {
        match layer.owner {
            Some(owner) => ManifestEdit::AddLayerOf { owner, layer },
            None => ManifestEdit::AddLayer(layer),
        }
    }

    /// The layer that it adds, if it does.
    pub fn added(&self) -> Option<LayerRow> {
        match self {
            ManifestEdit::AddLayer(layer) => {
                let owner = layer.owner.or_else(|| LayerOwner::by_name(&layer.object));
                Some(LayerRow { owner, ..layer.clone() })
            }
            ManifestEdit::AddLayerOf { owner, layer } => Some(LayerRow { owner: Some(*owner), ..layer.clone() }),
            _ => None,
        }
    }
}

/// What a manifest says, all edits taken together. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManifestState {
    layers: OrdMap<LayerId, Arc<LayerRow>>,
    layered: Lsn,
    /// By start; no two overlap.
    kept_wal: OrdMap<Lsn, Arc<KeptWal>>,
    collected: Retained,
}

impl ManifestState {
    /// The layers, by id.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<LayerRow>> {
        self.layers.values()
    }

    /// The layer with this id.
    pub fn layer(&self, id: LayerId) -> Option<&Arc<LayerRow>> {
        self.layers.get(&id)
    }

    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Up to where layers cover the whole history; [`Lsn::INVALID`] where there are none yet.
    pub fn layered(&self) -> Lsn {
        self.layered
    }

    /// Where the layers can be read: at the cutoff and above, and at the pins.
    pub fn collected(&self) -> &Retained {
        &self.collected
    }

    /// The pieces of WAL that are kept, ascending.
    pub fn kept_wal(&self) -> impl Iterator<Item = &Arc<KeptWal>> {
        self.kept_wal.values()
    }

    /// The end of the last piece of WAL that is kept; [`Lsn::INVALID`] if there is none.
    pub fn kept_wal_end(&self) -> Lsn {
        self.kept_wal.get_max().map_or(Lsn::INVALID, |(_, piece)| piece.lsn_end)
    }

    /// The kept piece that holds the byte at `lsn`.
    pub fn kept_wal_at(&self, lsn: Lsn) -> Option<&Arc<KeptWal>> {
        self.kept_wal.get_prev(&lsn).map(|(_, piece)| piece).filter(|piece| lsn < piece.lsn_end)
    }

    /// Whether a kept piece has bytes of `piece`'s range.
    fn keeps_part_of(&self, piece: &KeptWal) -> bool {
        let last_before = Lsn(piece.lsn_end.0.saturating_sub(1));
        self.kept_wal.get_prev(&last_before).is_some_and(|(_, known)| known.lsn_end > piece.lsn_start)
    }
}

impl State for ManifestState {
    type Edit = ManifestEdit;

    const FORMAT: LogFormat = LogFormat {
        entry: Format { magic: *b"VMFE", version: 1, what: "a manifest entry", content_bytes_max: 16 << 20 },
        snapshot: Format { magic: *b"VMFS", version: 1, what: "a manifest snapshot", content_bytes_max: 1 << 30 },
        edit_kinds: ManifestEdit::KINDS,
    };

    fn apply(&mut self, edit: &ManifestEdit) -> Result<(), ApplyError> {
        match edit {
            ManifestEdit::AddLayer(_) | ManifestEdit::AddLayerOf { .. } => {
                let Some(row) = edit.added() else { return Ok(()) };
                if row.first_key > row.last_key || row.lsn_start >= row.lsn_end || row.first_key.is_block() != row.last_key.is_block() {
                    let LayerRow { id, first_key, last_key, lsn_start, lsn_end, .. } = row;
                    let message = format!("layer {id} has the impossible ranges {first_key}..={last_key}, {lsn_start}..{lsn_end}");
                    return Err(ApplyError(message));
                }
                let id = row.id;
                if self.layers.insert(id, Arc::new(row)).is_some() {
                    return Err(ApplyError(format!("layer {id} is added twice")));
                }
            }
            ManifestEdit::RemoveLayer { id } => {
                if self.layers.remove(id).is_none() {
                    return Err(ApplyError(format!("layer {id} is removed and is not there")));
                }
            }
            ManifestEdit::Layered { lsn } => {
                if *lsn < self.layered {
                    return Err(ApplyError(format!("layers covered the history up to {}, and now only to {lsn}", self.layered)));
                }
                self.layered = *lsn;
            }
            ManifestEdit::KeepWal(piece) => {
                if piece.lsn_start >= piece.lsn_end || self.keeps_part_of(piece) {
                    let KeptWal { object, lsn_start, lsn_end, .. } = piece;
                    return Err(ApplyError(format!(
                        "WAL of {lsn_start}..{lsn_end} is kept in {object}: no range, or one that is kept already"
                    )));
                }
                self.kept_wal.insert(piece.lsn_start, Arc::new(piece.clone()));
            }
            ManifestEdit::Collected(retained) => {
                if retained.cutoff < self.collected.cutoff {
                    let (before, now) = (self.collected.cutoff, retained.cutoff);
                    return Err(ApplyError(format!("history was collected up to {before}, and now only up to {now}")));
                }
                self.collected = retained.clone();
            }
        }
        Ok(())
    }

    fn for_each_edit(&self, emit: &mut dyn FnMut(&ManifestEdit)) {
        for row in self.layers.values() {
            emit(&ManifestEdit::add(LayerRow::clone(row)));
        }
        emit(&ManifestEdit::Layered { lsn: self.layered });
        for piece in self.kept_wal.values() {
            emit(&ManifestEdit::KeepWal(KeptWal::clone(piece)));
        }
        if self.collected != Retained::default() {
            emit(&ManifestEdit::Collected(self.collected.clone()));
        }
    }
}

/// Folder of everything that is a timeline's; its manifest stands in `log` below it.
///
/// # Errors
/// None in practice: an id is a good name.
pub fn timeline_folder(tenant: TenantId, timeline: TimelineId) -> Result<ObjectName, ParseObjectNameError> {
    format!("tenants/{tenant}/timelines/{timeline}").parse()
}

/// Object of a layer that `generation` writes for a timeline. The generation in the name keeps two owners from
/// writing the same object.
///
/// # Errors
/// None in practice: ids are good names.
pub fn layer_object(
    tenant: TenantId,
    timeline: TimelineId,
    generation: Generation,
    layer: LayerId,
) -> Result<ObjectName, ParseObjectNameError> {
    timeline_folder(tenant, timeline)?.join(&format!("layers/{:08x}-{layer}", generation.0))
}

/// A timeline's manifest, open for writing. There must be one for a timeline in a process.
#[derive(Debug)]
pub struct Manifest {
    store: Store,
    folder: ObjectName,
    owner: Ownership,
    /// Empty as long as there is no object.
    log: OnceCell<EditLog<ManifestState>>,
}

impl Manifest {
    /// Opens the manifest of a timeline by the right of `owner`, who has taken over the tenant.
    ///
    /// # Errors
    /// [`EditLogError::Fenced`] where somebody else has taken the tenant over; what cannot be read; the store's.
    pub async fn open(store: &Store, tenant: TenantId, timeline: TimelineId, owner: Ownership) -> Result<Manifest, EditLogError> {
        let folder = timeline_folder(tenant, timeline)?;
        let manifest = Manifest { store: store.clone(), folder, owner, log: OnceCell::new() };
        if owner.generation > Generation(1) || EditLog::<ManifestState>::exists(store, &manifest.folder).await? {
            manifest.log().await?;
        }
        Ok(manifest)
    }

    /// Opens the manifest of a timeline that `owner` has had open before and dropped when it was idle. Writes
    /// nothing, unless this owner never had it: then as [`Manifest::open`].
    ///
    /// # Errors
    /// As [`Manifest::open`].
    pub async fn reopen(store: &Store, tenant: TenantId, timeline: TimelineId, owner: Ownership) -> Result<Manifest, EditLogError> {
        let folder = timeline_folder(tenant, timeline)?;
        match EditLog::reopen(store, &folder, owner).await? {
            Some(log) => Ok(Manifest { store: store.clone(), folder, owner, log: OnceCell::new_with(Some(log)) }),
            None => Self::open(store, tenant, timeline, owner).await,
        }
    }

    /// Whether nothing is being written: then it can be dropped, and be reopened later.
    pub fn is_idle(&self) -> bool {
        self.log.get().is_none_or(EditLog::is_idle)
    }

    /// The generation that has taken the timeline over, if a write or a check has found one.
    pub fn lost(&self) -> Option<Generation> {
        self.log.get()?.lost()
    }

    async fn log(&self) -> Result<&EditLog<ManifestState>, EditLogError> {
        self.log.get_or_try_init(|| EditLog::take_over_as(&self.store, &self.folder, self.owner)).await
    }

    /// The generation by whose right it is written.
    pub fn generation(&self) -> Generation {
        self.owner.generation
    }

    /// What the manifest says, as far as it is durable.
    pub fn state(&self) -> Arc<ManifestState> {
        self.log.get().map_or_else(Arc::default, EditLog::state)
    }

    /// Makes edits visible and durable, all or none of them. What the manifest says already is left out, so a
    /// publishing whose outcome is not known can be repeated.
    ///
    /// # Errors
    /// See [`EditLog::commit`].
    pub async fn publish(&self, mut edits: Vec<ManifestEdit>) -> Result<(), EditLogError> {
        let plan = |state: &ManifestState| {
            edits.retain(|edit| match edit {
                ManifestEdit::AddLayer(layer) | ManifestEdit::AddLayerOf { layer, .. } => {
                    state.layer(layer.id).is_none_or(|known| edit.added().as_ref() != Some(&**known))
                }
                ManifestEdit::RemoveLayer { id } => state.layer(*id).is_some(),
                ManifestEdit::Layered { lsn } => *lsn > state.layered(),
                ManifestEdit::Collected(retained) => retained.cutoff >= state.collected.cutoff && *retained != state.collected,
                ManifestEdit::KeepWal(piece) => state.kept_wal_at(piece.lsn_start).is_none_or(|known| **known != *piece),
            });
            Ok::<_, std::convert::Infallible>((edits, ()))
        };
        self.log().await?.commit(plan).await.map_err(|error| match error {
            CommitError::Log(error) => error,
            CommitError::Refused(never) => match never {},
        })
    }

    /// Finds out whether somebody has taken the timeline over since. To be asked before an object is deleted for good.
    ///
    /// # Errors
    /// [`EditLogError::Fenced`], or the store's.
    pub async fn check_ownership(&self) -> Result<(), EditLogError> {
        match self.log.get() {
            Some(log) => log.check_ownership().await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u8) -> LayerRow {
        LayerRow {
            id: LayerId([id; 16]),
            object: format!("tenants/t/timelines/l/layers/{id}").parse().unwrap(),
            offset: 0,
            length: 1000,
            first_key: Key::FIRST_BLOCK,
            last_key: Key::FIRST_BLOCK.next(),
            lsn_start: Lsn(0x10),
            lsn_end: Lsn(0x16B_3748),
            versions: 2,
            generation: Generation(3),
            codec: Codec::Zstd,
            key_id: 0,
            checksum: 7,
            owner: Some(LayerOwner { tenant: TenantId([1; 16]), timeline: TimelineId([2; 16]) }),
        }
    }

    fn piece(lsn_start: u64, lsn_end: u64) -> KeptWal {
        let object = format!("tenants/t/timelines/l/wal/00000003-{lsn_start:016x}-{lsn_end:016x}").parse().unwrap();
        KeptWal { object, length: 1000, lsn_start: Lsn(lsn_start), lsn_end: Lsn(lsn_end), generation: Generation(3), checksum: 7 }
    }

    fn after(edits: &[ManifestEdit]) -> Result<ManifestState, ApplyError> {
        let mut state = ManifestState::default();
        edits.iter().try_for_each(|edit| state.apply(edit)).map(|()| state)
    }

    #[test]
    fn edits_that_do_not_fit_are_refused() {
        let add = |id| ManifestEdit::add(row(id));
        let layered = |lsn| ManifestEdit::Layered { lsn: Lsn(lsn) };
        let remove = |id| ManifestEdit::RemoveLayer { id: LayerId([id; 16]) };
        let state = after(&[add(1), add(2), layered(9), remove(1), layered(9)]).unwrap();
        assert_eq!((state.layer_count(), state.layered()), (1, Lsn(9)));
        let mut snapshot = Vec::new();
        state.for_each_edit(&mut |edit| snapshot.push(edit.clone()));
        assert_eq!(after(&snapshot).unwrap(), state, "a snapshot makes the same state");
        assert!(after(&[add(1), add(1)]).is_err() && after(&[remove(1)]).is_err() && after(&[layered(9), layered(8)]).is_err());
        let turned = LayerRow { lsn_end: Lsn(0x10), ..row(1) };
        assert!(after(&[ManifestEdit::add(turned)]).unwrap_err().to_string().contains("impossible ranges"));
    }

    #[test]
    fn kept_wal_is_found_by_position_and_never_kept_twice() {
        let keep = |start, end| ManifestEdit::KeepWal(piece(start, end));
        let state = after(&[keep(10, 20), keep(40, 50), keep(20, 30)]).unwrap();
        for (lsn, start) in [(9, None), (10, Some(10)), (19, Some(10)), (20, Some(20)), (30, None), (39, None), (49, Some(40)), (50, None)]
        {
            let found = state.kept_wal_at(Lsn(lsn)).map(|piece| piece.lsn_start.0);
            assert_eq!(found, start, "start of the piece that holds the byte at {lsn}");
        }
        let mut snapshot = Vec::new();
        state.for_each_edit(&mut |edit| snapshot.push(edit.clone()));
        assert_eq!(after(&snapshot).unwrap(), state, "a snapshot makes the same state");
        for (start, end) in [(10, 20), (5, 11), (29, 31), (0, 100), (35, 35), (39, 41), (45, 46)] {
            assert!(after(&[keep(10, 20), keep(40, 50), keep(20, 30), keep(start, end)]).is_err(), "{start}..{end} must be refused");
        }
        assert!(after(&[keep(10, 20), keep(40, 50), keep(30, 40), keep(0, 10)]).is_ok(), "neighbours do not overlap");
    }

    #[test]
    fn rows_are_compact_and_are_shown_as_json() {
        let edit = ManifestEdit::AddLayerOf { owner: row(1).owner.unwrap(), layer: LayerRow { owner: None, ..row(1) } };
        let bytes = postcard::to_stdvec(&edit).unwrap();
        assert!(bytes.len() < 150, "a row has {} bytes", bytes.len());
        assert_eq!(postcard::from_bytes::<ManifestEdit>(&bytes).unwrap(), edit);
        assert_eq!(edit.added(), Some(row(1)));
        let json = serde_json::to_value(&edit).unwrap();
        assert_eq!(json["add_layer_of"]["layer"]["lsn_end"], "0/16B3748");
        assert_eq!(json["add_layer_of"]["layer"]["first_key"], "010000000000000000000000000000000000");
        assert_eq!(json["add_layer_of"]["owner"]["timeline"], "02020202020202020202020202020202");
        assert_eq!(serde_json::from_value::<ManifestEdit>(json).unwrap(), edit);
        let edit = ManifestEdit::Collected(Retained::new(Lsn(0x16B_3748), Lsn::MAX, vec![Lsn(0x10)]));
        let row = postcard::to_stdvec(&edit).unwrap();
        assert_eq!(u32::from(row[0]) + 1, ManifestEdit::KINDS, "whoever adds a kind counts it, and names it here");
        assert_eq!(postcard::from_bytes::<ManifestEdit>(&row).unwrap(), edit);
        let json = serde_json::to_value(&edit).unwrap();
        assert_eq!((&json["collected"]["cutoff"], &json["collected"]["pins"][0]), (&"0/16B3748".into(), &"0/10".into()));
        assert_eq!(serde_json::from_value::<ManifestEdit>(json).unwrap(), edit);
        let edit = ManifestEdit::KeepWal(piece(0x16B_3748, 0x26B_3748));
        let row = postcard::to_stdvec(&edit).unwrap();
        assert_eq!(postcard::from_bytes::<ManifestEdit>(&row).unwrap(), edit);
        assert_eq!(serde_json::to_value(&edit).unwrap()["keep_wal"]["lsn_start"], "0/16B3748");
    }

    /// The bytes of a row as releases wrote it that had no owners in rows.
    fn old_row(object: &str) -> Vec<u8> {
        let key = |key: Key| key.0.to_vec();
        let (object, id) = (object.to_owned(), LayerId([1; 16]));
        let (first, last) = (key(Key::FIRST_BLOCK), key(Key::FIRST_BLOCK.next()));
        let mut row = postcard::to_stdvec(&(0u32, id, object, 0u64, 1000u64)).unwrap();
        row.extend([first, last].concat());
        row.extend(postcard::to_stdvec(&(0x10u64, 0x16B_3748u64, 2u64, 3u32, Codec::Zstd, 0u32, 7u32)).unwrap());
        row
    }

    #[test]
    fn an_old_row_is_read_and_its_object_s_name_says_whose_it_is() {
        let owner = LayerOwner { tenant: TenantId([1; 16]), timeline: TimelineId([2; 16]) };
        let own = format!("tenants/{}/timelines/{}/layers/00000003-{}", owner.tenant, owner.timeline, LayerId([1; 16]));
        for (object, owner) in [(own.as_str(), Some(owner)), ("elsewhere/layers/1", None)] {
            let edit: ManifestEdit = postcard::from_bytes(&old_row(object)).unwrap();
            let expected = LayerRow { object: object.parse().unwrap(), owner, ..row(1) };
            let state = after(std::slice::from_ref(&edit)).unwrap();
            assert_eq!(state.layer(LayerId([1; 16])).map(|row| &**row), Some(&expected));
            let mut snapshot = Vec::new();
            state.for_each_edit(&mut |edit| snapshot.push(edit.clone()));
            assert_eq!(after(&snapshot).unwrap(), state, "and a snapshot remembers it");
        }
    }
}
