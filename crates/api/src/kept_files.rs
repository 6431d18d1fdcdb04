//! Which files of a data directory are kept beside WAL, and how much of them.
//!
//! A data directory is made anew at each start: from WAL, by Varve, or by Postgres itself. Whatever else lies in it is
//! its tenant's: settings, certificates, folders of further settings, what extensions dump. That is kept, as a stop of
//! a stock server keeps it. Hosts ask here what to send, the control plane what to take.

/// Bytes of a file at most.
pub const FILE_BYTES_MAX: usize = 64 << 20;
/// Files of a branch at most, beside those in Postgres's own folders.
pub const FILES_MAX: usize = 1000;
/// Their bytes in all.
pub const BYTES_MAX: u64 = 256 << 20;
/// Longest path, relative to the data directory.
const PATH_BYTES_MAX: usize = 1024;

/// What stands in these folders comes from WAL, or is made anew at each start.
const FOLDERS_MADE: [&str; 17] = [
    "base",
    "global",
    "pg_wal",
    "pg_xact",
    "pg_multixact",
    "pg_commit_ts",
    "pg_subtrans",
    "pg_serial",
    "pg_notify",
    "pg_snapshots",
    "pg_twophase",
    "pg_tblspc",
    "pg_dynshmem",
    "pg_stat_tmp",
    "varve_tablespaces",
    "varve_named",
    // Under this name a branch has the lists of pages that WAL does not give back.
    "varve_pages",
];
/// These files Varve makes, or Postgres at each start.
const FILES_MADE: [&str; 10] = [
    "PG_VERSION",
    "postmaster.pid",
    "postmaster.opts",
    "backup_label",
    "backup_manifest",
    "tablespace_map",
    "standby.signal",
    "recovery.signal",
    "current_logfiles",
    "core",
];

/// Why a file is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// Its path is too long, or has control characters.
    #[error("is too long, or has control characters")]
    Name,
    /// Its path leads elsewhere.
    #[error("is not a plain path below the data directory")]
    Path,
    /// It is made anew.
    #[error("comes from WAL, or is made at each start: it is not kept as a file")]
    Made,
}

/// Whether the file at `path`, relative to the data directory, is kept.
///
/// # Errors
/// Why not.
pub fn check(path: &str) -> Result<(), NotKept> {
    if path.len() > PATH_BYTES_MAX || path.chars().any(char::is_control) {
        return Err(NotKept::Name);
    }
    let parts: Vec<&str> = path.split('/').collect();
    if parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
        return Err(NotKept::Path);
    }
    let is_kept = match parts.as_slice() {
        // Postgres writes its files under such names before it gives them their own.
        [file] => !FILES_MADE.contains(file) && !file.ends_with(".tmp") && !file.starts_with("core."),
        ["pg_stat", .., file] => !file.ends_with(".tmp"),
        // A slot is made, and dropped, under a name of its own.
        ["pg_replslot", slot, "state"] => !slot.ends_with(".tmp"),
        // The progress of replication origins has WAL.
        ["pg_logical", "snapshots", file] => file.ends_with(".snap"),
        ["pg_logical", "mappings", file] => file.starts_with("map-"),
        ["pg_logical" | "pg_replslot", ..] => false,
        [folder, ..] => !FOLDERS_MADE.contains(folder),
        [] => false,
    };
    if is_kept { Ok(()) } else { Err(NotKept::Made) }
}

/// Whether a file lies in one of Postgres's own folders, which has only as many as Postgres needs.
pub fn is_postgress(path: &str) -> bool {
    ["pg_stat/", "pg_replslot/", "pg_logical/"].iter().any(|folder| path.starts_with(folder))
}

/// Whether Postgres or its tenant relies on the newest version of a file at once: settings, slots, and what decoding
/// keeps. Of others, versions that follow each other fast need not all be kept.
pub fn is_urgent(path: &str) -> bool {
    is_postgress(path) || matches!(path, "postgresql.auto.conf" | "postgresql.conf" | "pg_hba.conf" | "pg_ident.conf")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wal_does_not_rebuild_is_kept() {
        for path in [
            "postgresql.auto.conf",
            "pg_hba.conf",
            "pg_stat/pgstat.stat",
            "pg_replslot/s/state",
            "pg_logical/snapshots/0-1A2B.snap",
            "server.crt",
            "server.key",
            "conf.d/more.conf",
            "conf.d/deep/er.tmp",
            "autoprewarm.blocks",
            "dump.csv",
        ] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
        for path in [
            "postgresql.auto.conf.tmp",
            "autoprewarm.blocks.tmp",
            "pg_stat/pgstat.tmp",
            "pg_replslot/s.tmp/state",
            "pg_replslot/s/state.tmp",
            "pg_replslot/s/xid-700-lsn-0-1000000.spill",
            "pg_logical/replorigin_checkpoint",
            "base/5/postgresql.auto.conf",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "global/pg_control",
            "global/pg_internal.init",
            "pg_wal/000000010000000000000001",
            "postmaster.pid",
            "PG_VERSION",
            "core.1234",
        ] {
            assert_eq!(check(path), Err(NotKept::Made), "{path}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in ["", "/etc/passwd", "../../x", "a/../b", "a//b", ".", "a/"] {
            assert_eq!(check(path), Err(NotKept::Path), "{path:?}");
        }
        for path in ["a\0b", "a\nb", &*"x".repeat(2000)] {
            assert_eq!(check(path), Err(NotKept::Name), "{path:?}");
        }
    }
}
