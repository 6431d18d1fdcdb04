//! Whether WAL goes to the store before layers do.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use varve_storage::store::Store;

/// See the module's doc.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShipWal {
    /// Unless the store is a folder on the disk of the WAL log: what that disk takes with it, it takes both with it.
    #[default]
    UnlessSameDisk,
    /// Always.
    Always,
}

impl ShipWal {
    /// Whether it goes, for the WAL log in `folder`. Blocks.
    pub(crate) fn applies(self, folder: &Path, store: &Store) -> io::Result<bool> {
        match (self, store.folder()) {
            (ShipWal::UnlessSameDisk, Some(root)) => Ok(std::fs::metadata(folder)?.dev() != std::fs::metadata(root)?.dev()),
            _ => Ok(true),
        }
    }
}
