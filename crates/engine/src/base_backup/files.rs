//! The tar itself, and what is in every data directory.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::{Component, Path};

use tar::{Builder, EntryType, Header};
use varve_postgres::Major;
use varve_postgres::lsn::WAL_PAGE_SIZE;

use super::BaseBackupError;

/// The directories of a data directory without databases and tablespaces. Without some a start fails, without others a
/// checkpoint.
pub(super) fn directories(major: Major) -> impl Iterator<Item = &'static str> {
    const ALL: [&str; 23] = [
        "base",
        "global",
        "pg_commit_ts",
        "pg_dynshmem",
        "pg_logical",
        "pg_logical/mappings",
        "pg_logical/snapshots",
        "pg_multixact",
        "pg_multixact/members",
        "pg_multixact/offsets",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_tblspc",
        "pg_twophase",
        "pg_wal",
        "pg_wal/archive_status",
        "pg_wal/summaries",
        "pg_xact",
    ];
    ALL.into_iter().filter(move |path| major >= Major::V17 || *path != "pg_wal/summaries")
}

/// The configuration files of a cluster that nobody has configured.
pub(super) fn default_configuration(_major: Major, has_tablespaces: bool) -> [(&'static str, String); 3] {
    // A standby made of it must have as many walsenders as its compute, which has some more than Postgres's default.
    let mut settings = "# Settings of this cluster. Changes made with ALTER SYSTEM go to postgresql.auto.conf.\n\
                        max_wal_senders = 14\n"
        .to_owned();
    if has_tablespaces {
        // They are plain directories here, which crash recovery only accepts with this.
        settings.push_str("allow_in_place_tablespaces = on\n");
    }
    let hba = "# TYPE  DATABASE     USER  ADDRESS  METHOD\n\
               local   all          all            scram-sha-256\n\
               host    all          all   all      scram-sha-256\n\
               local   replication  all            scram-sha-256\n\
               host    replication  all   all      scram-sha-256\n";
    let ident = "# MAPNAME  SYSTEM-USERNAME  PG-USERNAME\n";
    [("postgresql.conf", settings), ("pg_hba.conf", hba.to_owned()), ("pg_ident.conf", ident.to_owned())]
}

/// Refuses a path that would leave the data directory.
pub(super) fn check_path(path: &str) -> Result<(), BaseBackupError> {
    let plain = !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if plain { Ok(()) } else { Err(BaseBackupError::BadPath { path: path.to_owned() }) }
}

/// The parts of a WAL segment that are not zeros, each a run of whole pages, with its offset: at least one, which may
/// be empty.
pub(super) fn pieces(segment: &[u8]) -> Vec<(usize, &[u8])> {
    let mut pieces: Vec<(usize, &[u8])> = Vec::new();
    for (offset, page) in segment.chunks(WAL_PAGE_SIZE as usize).enumerate().map(|(n, page)| (n * WAL_PAGE_SIZE as usize, page)) {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        match pieces.last_mut() {
            Some((start, piece)) if *start + piece.len() == offset => *piece = &segment[*start..offset + page.len()],
            _ => pieces.push((offset, page)),
        }
    }
    if pieces.is_empty() {
        pieces.push((0, &[]));
    }
    pieces
}

/// Writes the tar's entries. Files are 0600, directories 0700, as Postgres wants them.
pub(super) struct TarWriter<W: Write> {
    builder: Builder<W>,
    time: u64,
    directories: BTreeSet<String>,
}

impl<W: Write> TarWriter<W> {
    pub(super) fn new(out: W, time_unix: i64) -> TarWriter<W> {
        TarWriter { builder: Builder::new(out), time: u64::try_from(time_unix).unwrap_or(0), directories: BTreeSet::new() }
    }

    fn header(&self, kind: EntryType, mode: u32, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(self.time);
        header
    }

    /// A directory, once.
    pub(super) fn directory(&mut self, path: &str) -> Result<(), BaseBackupError> {
        if self.directories.insert(path.to_owned()) {
            let mut header = self.header(EntryType::Directory, 0o700, 0);
            self.builder.append_data(&mut header, format!("{path}/"), io::empty())?;
        }
        Ok(())
    }

    /// The directories above `path`.
    pub(super) fn parents_of(&mut self, path: &str) -> Result<(), BaseBackupError> {
        for (at, _) in path.match_indices('/') {
            self.directory(&path[..at])?;
        }
        Ok(())
    }

    pub(super) fn file(&mut self, path: &str, bytes: &[u8]) -> Result<(), BaseBackupError> {
        self.stream(path, bytes.len() as u64, bytes)
    }

    /// A file of `size` bytes that begins with `bytes`; the rest is zeros.
    pub(super) fn padded_file(&mut self, path: &str, bytes: &[u8], size: u64) -> Result<(), BaseBackupError> {
        self.stream(path, size, bytes.chain(io::repeat(0)).take(size))
    }

    /// A file of `size` bytes that `contents` gives.
    pub(super) fn stream(&mut self, path: &str, size: u64, contents: impl Read) -> Result<(), BaseBackupError> {
        let mut header = self.header(EntryType::Regular, 0o600, size);
        Ok(self.builder.append_data(&mut header, path, contents)?)
    }

    pub(super) fn finish(mut self) -> Result<(), BaseBackupError> {
        Ok(self.builder.finish()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_segment_make_it_again() {
        let page = WAL_PAGE_SIZE as usize;
        let mut segment = vec![0; 5 * page + 100];
        assert_eq!(pieces(&segment), [(0, &[][..])]);
        assert_eq!(pieces(&[]), [(0, &[][..])]);
        for at in [3, 2 * page - 1, 2 * page, 4 * page + 7, 5 * page + 99] {
            segment[at] = 1;
        }
        let found = pieces(&segment);
        assert_eq!(found.iter().map(|(offset, piece)| (*offset, piece.len())).collect::<Vec<_>>(), [(0, 3 * page), (4 * page, page + 100)]);
        let mut again = vec![0; segment.len()];
        for (offset, piece) in found {
            again[offset..offset + piece.len()].copy_from_slice(piece);
        }
        assert_eq!(again, segment);
    }

    #[test]
    fn paths_stay_inside() {
        for good in ["postgresql.auto.conf", "pg_stat/pgstat.stat", "pg_replslot/s/state"] {
            assert!(check_path(good).is_ok(), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "base/../../x", "./x"] {
            assert!(check_path(bad).is_err(), "{bad:?} must be refused");
        }
    }
}
