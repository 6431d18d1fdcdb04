//! A temporary file for pages that do not fit into memory. It has no name, so it goes with the process, however that
//! ends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use varve_postgres::{BLCKSZ, Page};
use varve_redo::verify::{Overflow, StoreError};

use crate::VerifyError;

/// Pages in a file, slot by slot.
#[derive(Debug)]
pub struct OverflowFile {
    file: File,
}

impl OverflowFile {
    /// A file in `folder`, which needs room for all pages that the WAL touches, less those in memory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(folder: &Path) -> Result<OverflowFile, VerifyError> {
        let file = tempfile::tempfile_in(folder).map_err(VerifyError::io(folder))?;
        Ok(OverflowFile { file })
    }
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> StoreError {
    move |error| StoreError(format!("the temporary file for pages that do not fit into memory cannot be {what}: {error}"))
}

impl Overflow for OverflowFile {
    fn write(&mut self, slot: u64, page: &Page) -> Result<(), StoreError> {
        self.file.write_all_at(page, slot * BLCKSZ as u64).map_err(failed("written"))
    }

    fn read(&self, slot: u64, page: &mut Page) -> Result<(), StoreError> {
        self.file.read_exact_at(page, slot * BLCKSZ as u64).map_err(failed("read"))
    }
}
