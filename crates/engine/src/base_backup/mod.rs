//! Base backup: the tar of a data directory with which a stock Postgres starts at a record boundary of a timeline.
//!
//! It holds `pg_control` in the shut-down state and the WAL with one shutdown checkpoint exactly at the boundary
//! ([`varve_postgres::wal::synthesis`]), so the server starts without recovery and goes on with the timeline's own
//! stream; besides these, what a start needs to find: the directories, `PG_VERSION` and `pg_filenode.map` of each
//! database, two-phase files, replication origins, the history file of the timeline, the configuration, and files that
//! have no WAL, which the caller gives. SLRU segments and relations are left out unless asked for: a mount fetches them
//! block by block, and then no block layer is read here at all.
//!
//! Where slots are among the files, and want WAL from before the boundary, it is there, too ([`wal_before`]).
//!
//! [`state`] collects all that from the history before the first byte is written, so an error in it never leaves half a
//! tar; relations are streamed. An unlogged relation's history is its init fork alone; since the shut-down state resets
//! nothing, its main fork is written as a copy of that.

mod files;
mod state;
mod wal_before;

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use varve_postgres::control::{ClusterState, CompiledSizes, ControlFile};
use varve_postgres::wal::synthesis::{AncestorTimeline, BaseWal, BaseWalFiles, base_wal, history_file, history_file_name};
use varve_postgres::{Lsn, replication_origin, replication_slot, two_phase};
use varve_storage::history::{History, HistoryError};
use varve_storage::relation::RelationError;
use varve_storage::wal_index::Boundary;

use crate::cluster::ClusterFacts;
use files::TarWriter;
pub use state::StateAt;
pub use wal_before::{ReadWal, WalBefore};

/// `FirstNormalUnloggedLSN`.
const FIRST_UNLOGGED_LSN: Lsn = Lsn(1000);

/// A base backup that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BaseBackupError {
    /// The history could not be read, or does not hold what it must.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// A page could not be read.
    #[error(transparent)]
    Relation(#[from] RelationError),
    /// A file that the caller gave cannot go into a data directory.
    #[error("the file '{path}' cannot go into a base backup: its path must be relative and stay inside the data directory")]
    BadPath {
        /// Its path.
        path: String,
    },
    /// The tar could not be written.
    #[error("writing the base backup: {0}")]
    Io(#[from] io::Error),
}

/// A file that has no WAL: configuration, statistics, logical slots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtraFile {
    /// Path relative to the data directory.
    pub path: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Whose data directory it is, and where in its history.
#[derive(Clone, Debug)]
pub struct BackupTimeline {
    /// The cluster's identifier.
    pub system_identifier: u64,
    /// The timeline's Postgres timeline.
    pub tli: u32,
    /// Its ancestors, oldest first, each with where the next one branched off.
    pub ancestors: Vec<AncestorTimeline>,
    /// The boundary at which the server starts, as [`crate::moments::round_down`] gives it.
    pub base: Boundary,
    /// Random bytes that are the cluster's own, for authentication exchanges that must not tell which roles exist.
    pub mock_authentication_nonce: [u8; 32],
}

/// What goes into the tar beyond what every start needs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// SLRU segments; a mount fetches them by itself.
    pub slru: bool,
    /// Relations: then it is a whole data directory.
    pub relations: bool,
    /// WAL segments without their pages of zeros, as pieces `<segment>.<offset, 8 hexadecimal digits>`: whoever unpacks
    /// the tar puts them together and gives the segments their size.
    pub short_wal: bool,
    /// Whether to compress the tar.
    pub gzip: bool,
    /// A physical replication slot that keeps WAL from the boundary on.
    pub slot: Option<String>,
    /// WAL of the timeline before the boundary, for slots that want it.
    pub wal_before: Option<WalBefore>,
    /// Files that replace the defaults or are added to them.
    pub extra_files: Vec<ExtraFile>,
    /// Seconds since 1970, for the times in `pg_control`, the checkpoint and the tar.
    pub time_unix: i64,
}

/// Writes the base backup of `timeline` to `out`.
///
/// # Errors
/// [`BaseBackupError`]; only reading relations and SLRU pages, and writing, can fail after the first byte.
pub fn write_base_backup(
    history: &(impl History + ?Sized),
    cluster: &ClusterFacts,
    timeline: &BackupTimeline,
    options: &Options,
    out: impl Write,
) -> Result<(), BaseBackupError> {
    let at = StateAt::read(history, &timeline.base)?;
    if options.gzip {
        let mut encoder = GzEncoder::new(out, Compression::fast());
        write_tar(history, cluster, timeline, options, &at, &mut encoder)?;
        encoder.finish()?.flush()?;
        return Ok(());
    }
    let mut out = out;
    write_tar(history, cluster, timeline, options, &at, &mut out)?;
    Ok(out.flush()?)
}

/// `pg_control` and the WAL of a start at the boundary.
pub fn control_and_wal(cluster: &ClusterFacts, timeline: &BackupTimeline, at: &StateAt, time_unix: i64) -> (ControlFile, BaseWalFiles) {
    let prev_tli = timeline.ancestors.last().map_or(timeline.tli, |ancestor| ancestor.tli);
    let wal = base_wal(&BaseWal {
        major: cluster.major,
        system_identifier: timeline.system_identifier,
        base: timeline.base.end,
        prev_record: timeline.base.record_start,
        checkpoint: at.checkpoint(timeline.tli, prev_tli, time_unix),
    });
    let control = ControlFile {
        major: cluster.major,
        system_identifier: timeline.system_identifier,
        catalog_version: cluster.catalog_version,
        state: ClusterState::ShutDown,
        time: time_unix,
        checkpoint: wal.checkpoint_start,
        checkpoint_copy: wal.checkpoint,
        unlogged_lsn: FIRST_UNLOGGED_LSN,
        min_recovery_point: Lsn::INVALID,
        min_recovery_point_tli: 0,
        backup_start_point: Lsn::INVALID,
        backup_end_point: Lsn::INVALID,
        backup_end_required: false,
        parameters: at.fields.parameters,
        sizes: CompiledSizes::default(),
        data_checksum_version: cluster.data_checksum_version,
        default_char_signedness: cluster.default_char_signedness,
        mock_authentication_nonce: timeline.mock_authentication_nonce,
    };
    (control, wal)
}

fn write_tar(
    history: &(impl History + ?Sized),
    cluster: &ClusterFacts,
    timeline: &BackupTimeline,
    options: &Options,
    at: &StateAt,
    out: &mut impl Write,
) -> Result<(), BaseBackupError> {
    let major = cluster.major;
    let mut tar = TarWriter::new(out, options.time_unix);
    for file in &options.extra_files {
        files::check_path(&file.path)?;
    }
    for directory in files::directories(major) {
        tar.directory(directory)?;
    }
    for (path, bytes) in files::default_configuration(major, !at.tablespaces.is_empty()) {
        if !options.extra_files.iter().any(|file| file.path == path) {
            tar.file(path, bytes.as_bytes())?;
        }
    }
    let version = format!("{major}\n");
    tar.file("PG_VERSION", version.as_bytes())?;
    at.write_databases(&mut tar, cluster, &version)?;
    for (xid, state) in &at.prepared {
        tar.file(&two_phase::file_path(*xid, major), &two_phase::file(state))?;
    }
    if !at.origins.is_empty() {
        tar.file(replication_origin::CHECKPOINT_PATH, &replication_origin::encode(&at.origins))?;
    }
    if let Some(slot) = &options.slot {
        tar.directory(&format!("pg_replslot/{slot}"))?;
        let state = replication_slot::physical_slot_state(slot, timeline.base.end, major);
        tar.file(&replication_slot::state_path(slot), &state)?;
    }
    for file in &options.extra_files {
        tar.parents_of(&file.path)?;
        tar.file(&file.path, &file.bytes)?;
    }
    if options.slru {
        at.write_slrus(history, &mut tar)?;
    }
    if options.relations {
        at.write_relations(history, cluster, &mut tar)?;
    }
    if !timeline.ancestors.is_empty() {
        let path = format!("pg_wal/{}", history_file_name(timeline.tli));
        tar.file(&path, history_file(&timeline.ancestors).as_bytes())?;
    }
    let (control, mut wal) = control_and_wal(cluster, timeline, at, options.time_unix);
    if let Some(before) = &options.wal_before {
        before.write(&mut tar, cluster, timeline, at, &mut wal)?;
    }
    for segment in &wal.segments {
        let path = format!("pg_wal/{}", segment.name);
        if options.short_wal {
            for (offset, piece) in files::pieces(&segment.bytes) {
                tar.file(&format!("{path}.{offset:08X}"), piece)?;
            }
        } else {
            tar.padded_file(&path, &segment.bytes, segment.size)?;
        }
    }
    // Last, so that what was cut off on its way does not start.
    tar.file("global/pg_control", &control.encode())?;
    tar.finish()
}
