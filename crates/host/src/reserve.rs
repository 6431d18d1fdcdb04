//! Space that a host keeps on its disk for its own records.
//!
//! Whether a compute runs, which process it is, whose WAL its `pg_wal` holds: a record of that must not depend on
//! whether a tenant has filled the disk. So the host's folder has a file whose blocks stand for that. Who writes a
//! record and finds the disk full gives up a piece of the file and tries again. The file grows back with the next
//! record that is written while there is space.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

/// The file's name in the host's folder.
const FILE_NAME: &str = "reserve";
/// Bytes of it: records of hundreds of computes, each some hundred bytes and a block.
const BYTES: u64 = 1024 * 1024;
/// What is given up at a time: others who fill the disk may be faster than the record that it is for.
const PIECE: u64 = 64 * 1024;

/// Whether an error says that a disk is full, or somebody's share of it.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an error, or what is behind it, says that a disk is full. Postgres says it in words.
pub fn comes_of_a_full_disk(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let said = error.downcast_ref::<io::Error>().is_some_and(is_disk_full);
        if said || error.to_string().contains("No space left on device") {
            return true;
        }
        next = error.source();
    }
    false
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FILE_NAME)
}

/// Makes the reserve of a folder whole again.
///
/// # Errors
/// Those of the file system: there is no space for it right now, mostly.
pub fn fill(folder: &Path) -> io::Result<()> {
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path(folder))?;
    let length = file.metadata()?.len();
    if length < BYTES {
        fallocate(&file, FallocateFlags::empty(), length, BYTES - length)?;
        file.sync_all()?;
    }
    Ok(())
}

/// Gives up a piece of the reserve. Whether there was any.
fn give_up_some(folder: &Path) -> io::Result<bool> {
    let file = match File::options().write(true).open(path(folder)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    let length = file.metadata()?.len();
    file.set_len(length.saturating_sub(PIECE))?;
    Ok(length > 0)
}

/// Does `write` in a folder, as often as the reserve gives way for it where the disk is full.
///
/// # Errors
/// What `write` fails with.
pub(crate) fn with_reserve(folder: &Path, write: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match write() {
            Err(error) if is_disk_full(&error) => {
                if !give_up_some(folder)? {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
            Ok(()) => {
                // It is whole nearly always, so this costs a look. Where it cannot be, the next record tries again.
                if let Err(error) = refill(folder) {
                    tracing::debug!(%error, "the host's reserve of space is not whole");
                }
                return Ok(());
            }
        }
    }
}

/// As [`fill`], where there is a reserve at all: a folder of a test may have none.
fn refill(folder: &Path) -> io::Result<()> {
    if path(folder).exists() { fill(folder) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_known_by_what_it_says() {
        #[derive(Debug, thiserror::Error)]
        #[error("a start")]
        struct Start(#[source] io::Error);
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        assert!(comes_of_a_full_disk(&full()) && comes_of_a_full_disk(&Start(full())));
        assert!(comes_of_a_full_disk(&io::Error::other("could not write lock file: No space left on device")));
        assert!(!comes_of_a_full_disk(&Start(io::ErrorKind::NotFound.into())));
    }

    #[test]
    fn the_reserve_gives_way_piece_by_piece_and_grows_back() {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path()).unwrap();
        let length = || std::fs::metadata(path(folder.path())).unwrap().len();
        assert_eq!(length(), BYTES);
        let tries = std::cell::Cell::new(0);
        let written = with_reserve(folder.path(), || {
            tries.set(tries.get() + 1);
            assert_eq!(length(), BYTES - PIECE * (tries.get() - 1));
            if tries.get() < 4 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        });
        written.unwrap();
        assert_eq!((tries.get(), length()), (4, BYTES));
        let never = with_reserve(folder.path(), || Err(io::ErrorKind::StorageFull.into()));
        assert!(is_disk_full(&never.unwrap_err()) && length() == 0);
        with_reserve(folder.path(), || Ok(())).unwrap();
        assert_eq!(length(), BYTES);
    }
}
