//! The base backup of a timeline at a moment: what [`crate::base_backup`] needs to know, gathered from the tenant's log
//! and the history.

use std::io::{self, Write};
use std::sync::Arc;

use varve_postgres::Lsn;
use varve_postgres::replication_slot::SlotState;
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_storage::tenant_log::{PAGES_FOLDER, is_of_slots};

use crate::base_backup::{BackupTimeline, ExtraFile, Options, WalBefore, write_base_backup};
use crate::error::EngineError;
use crate::moments;
use crate::tenant::Tenant;
use crate::timeline::LiveTimeline;

/// Slot that makes a compute keep WAL from the first moment on, until the store has it.
const SLOT: &str = "varve";

/// What a base backup is to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackupOptions {
    /// All relations, rather than only what a lazily cloned directory needs at once.
    pub full: bool,
    /// No SLRU segments.
    pub no_slru: bool,
    /// The newest versions of files that have no WAL, rather than those of the moment.
    pub newest_files: bool,
    /// WAL segments in pieces, without their pages of zeros.
    pub short_wal: bool,
}

/// The WAL before `end` that the slots among these files want, as far as it is there.
fn wal_for_slots(live: &Arc<LiveTimeline>, files: &[ExtraFile], end: Lsn) -> Option<WalBefore> {
    let slots = files.iter().filter(|file| file.path.starts_with("pg_replslot/"));
    let slots: Vec<(&str, Lsn)> = slots.filter_map(|file| Some((&*file.path, SlotState::decode(&file.bytes)?.restart?))).collect();
    let wanted = slots.iter().map(|(_, restart)| *restart).min().filter(|wanted| *wanted < end)?;
    // A standby asks from the start of its segment on; before its first record the timeline has none.
    let start = live.wal_reaches_back(wanted.segment_start().max(live.facts().start), end);
    for (path, restart) in &slots {
        if *restart < start {
            tracing::warn!(timeline = live.name(), path, %restart, %start, "the WAL that a replication slot wants is not kept so far back");
        }
    }
    let live = live.clone();
    let read = move |from: Lsn, limit: Lsn| {
        let bytes = live.wal_bytes(from, limit).map_err(io::Error::other)?;
        bytes.ok_or_else(|| io::Error::other(format!("WAL of timeline {} at {from} is not kept", live.id())))
    };
    (start < end).then(|| WalBefore { start, read: Arc::new(read) })
}

/// Writes the base backup of `live` at `lsn`, which is applied, into `sink`. `time_unix` is what its files say when
/// they were changed. Blocks.
///
/// # Errors
/// When the history cannot be read, or the sink fails.
pub fn write(
    tenant: &Tenant,
    live: &Arc<LiveTimeline>,
    lsn: Lsn,
    options: BackupOptions,
    time_unix: i64,
    sink: &mut dyn Write,
) -> Result<(), EngineError> {
    let state = tenant.log().state();
    let chain = state.ancestry(live.id())?;
    let applied = live.positions().applied();
    // Of a timeline that nobody goes on with the end may be gone.
    let known = if live.history().collected().holds(applied) { applied } else { lsn };
    let base = moments::round_down(&**live.history(), lsn, live.first_lsn(), known)?;
    let mut ancestors: Vec<AncestorTimeline> = Vec::with_capacity(chain.len());
    for (timeline, _) in chain.iter().rev() {
        if let Some(ancestor) = timeline.facts.ancestor {
            let tli = state.timeline(ancestor.timeline)?.facts.tli;
            ancestors.push(AncestorTimeline { tli, switch: ancestor.lsn });
        }
    }
    let mut extra_files = Vec::new();
    let files = if options.newest_files { state.newest_files(live.id())? } else { state.files_at(live.id(), lsn)? };
    for (path, contents) in files {
        // Who reads through a slot does not go on with a copy; and lists of kept pages are no files of a data
        // directory.
        if options.full && is_of_slots(&path) || path.starts_with(PAGES_FOLDER) {
            continue;
        }
        if let Some(bytes) = tenant.file_contents(&contents)? {
            extra_files.push(ExtraFile { path, bytes });
        }
    }
    let wal_before = wal_for_slots(live, &extra_files, base.end);
    let mut nonce = [0; 32];
    nonce[..16].copy_from_slice(&tenant.id().0);
    nonce[16..].copy_from_slice(&live.id().0);
    let facts = BackupTimeline {
        system_identifier: tenant.facts().system_identifier,
        tli: live.facts().tli,
        ancestors,
        base,
        mock_authentication_nonce: nonce,
    };
    let options = Options {
        slru: options.full || !options.no_slru,
        relations: options.full,
        gzip: false,
        short_wal: options.short_wal,
        slot: (!options.full).then(|| SLOT.to_owned()),
        wal_before,
        extra_files,
        time_unix,
    };
    let cluster = &tenant.template().facts().cluster;
    Ok(write_base_backup(&**live.history(), cluster, &facts, &options, sink)?)
}
