//! Writing layers to files: where each goes, how it becomes durable, how it is checked, and how it gets into a bucket.
//!
//! Where the store is a folder, a layer is written in place, once: its name is new, and nothing refers to it before it
//! is published, so a crash leaves a file that nobody knows. Where the store is a bucket, the file is a local copy in
//! the cache folder, which gets its name when it is whole, and the bucket gets the same bytes.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::Lsn;

use super::{Resources, TimelineSpec, open_layer};
use crate::chain::Version;
use crate::envelope::Codec;
use crate::ids::{LayerId, RandomError};
use crate::key::Key;
use crate::layer::{LayerError, LayerWriter};
use crate::manifest::{LayerRow, layer_object};
use crate::store::{ObjectName, ParseObjectNameError, StoreError};

/// Bytes handed to the file system at once.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Layers that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The layer itself.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The file.
    #[error("layer file {}: could not {action} ({source}); check the disk's space and the folder's mode", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The bucket.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No id could be made.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// No name could be made.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::Io { path, action, source }
}

/// A layer that is written and checked.
#[derive(Clone)]
pub(super) struct WrittenLayer {
    pub(super) row: LayerRow,
    path: PathBuf,
    uploaded: bool,
}

impl WrittenLayer {
    /// Removes the file of a layer that is not published.
    pub(super) fn discard(&self) {
        discard(&self.path);
    }
}

struct Open {
    writer: LayerWriter<BufWriter<File>>,
    object: ObjectName,
    /// The file while it is written.
    part: PathBuf,
    /// The file when it is whole.
    path: PathBuf,
    last_key: Option<Key>,
}

/// Writes versions, which come in order, into as many layers as they need. What was written is removed again if it is
/// not finished.
pub(super) struct LayerFiles<'a> {
    spec: &'a TimelineSpec,
    resources: &'a Resources,
    lsn_start: Lsn,
    lsn_end: Lsn,
    codec: Codec,
    open: Option<Open>,
    written: Vec<WrittenLayer>,
}

impl<'a> LayerFiles<'a> {
    pub(super) fn new(spec: &'a TimelineSpec, resources: &'a Resources, (lsn_start, lsn_end): (Lsn, Lsn), codec: Codec) -> LayerFiles<'a> {
        LayerFiles { spec, resources, lsn_start, lsn_end, codec, open: None, written: Vec::new() }
    }

    /// Adds a version. Blocks and everything else go into layers of their own.
    pub(super) fn push(&mut self, key: &Key, version: &Version) -> Result<(), WriteError> {
        let is_full = self.open.as_ref().is_some_and(|open| {
            let next_key = open.last_key.filter(|last| last != key);
            next_key
                .is_some_and(|last| open.writer.written_bytes() >= self.resources.layer_bytes_target || last.is_block() != key.is_block())
        });
        if is_full {
            self.finish_layer()?;
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.begin_layer()?,
        };
        let pushed = open.writer.push(key, version);
        open.last_key = Some(*key);
        self.open = Some(open);
        Ok(pushed?)
    }

    /// Whether there are finished layers.
    pub(super) fn has_written(&self) -> bool {
        !self.written.is_empty()
    }

    /// The finished layers.
    pub(super) fn written_mut(&mut self) -> &mut [WrittenLayer] {
        &mut self.written
    }

    /// The finished layers, taken out: they are not removed any more, whatever happens.
    pub(super) fn take_written(&mut self) -> Vec<WrittenLayer> {
        std::mem::take(&mut self.written)
    }

    /// Finishes; gives the layers that were not taken out yet.
    pub(super) fn finish(mut self) -> Result<Vec<WrittenLayer>, WriteError> {
        self.finish_layer()?;
        Ok(self.take_written())
    }

    fn begin_layer(&self) -> Result<Open, WriteError> {
        let id = LayerId::random()?;
        let object = layer_object(self.spec.tenant, self.spec.id, self.spec.generation, id)?;
        let (part, path) = match self.resources.store.store().local_path(&object) {
            Some(path) => (path.clone(), path),
            None => {
                let path = self.resources.cache_dir.join(object.as_str());
                (path.with_extension("part"), path)
            }
        };
        make_parents(&path)?;
        let file = File::create_new(&part).map_err(io_error(&part, "create it"))?;
        let out = BufWriter::with_capacity(WRITE_BUFFER_BYTES, file);
        let writer = LayerWriter::new(object.to_string(), id, self.lsn_start, self.lsn_end, self.codec, out);
        Ok(Open { writer, object, part, path, last_key: None })
    }

    /// Finishes the layer that is being written, if there is one.
    pub(super) fn finish_layer(&mut self) -> Result<(), WriteError> {
        let Some(Open { writer, object, part, path, .. }) = self.open.take() else { return Ok(()) };
        let finished = finish_file(writer, &part, &path).and_then(|info| {
            let row = LayerRow::of(&info, object, self.spec.owner(), self.spec.generation);
            Arc::new(open_layer(self.resources, self.spec, &row)).verify()?;
            Ok(row)
        });
        match finished {
            Ok(row) => {
                self.written.push(WrittenLayer { row, path, uploaded: false });
                Ok(())
            }
            Err(error) => {
                discard(&part);
                discard(&path);
                Err(error)
            }
        }
    }
}

impl Drop for LayerFiles<'_> {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            discard(&open.part);
        }
        for layer in &self.written {
            discard(&layer.path);
        }
    }
}

/// Makes the file durable under its name.
fn finish_file(writer: LayerWriter<BufWriter<File>>, part: &Path, path: &Path) -> Result<crate::layer::LayerInfo, WriteError> {
    let (info, out) = writer.finish()?;
    let file = out.into_inner().map_err(|error| io_error(part, "write it")(error.into_error()))?;
    file.sync_all().map_err(io_error(part, "fsync it"))?;
    if part != path {
        fs::rename(part, path).map_err(io_error(part, "give it its name"))?;
    }
    if let Some(parent) = path.parent() {
        sync_folder(parent)?;
    }
    Ok(info)
}

/// Makes the folders above `path`, each durable in the one above it.
fn make_parents(path: &Path) -> Result<(), WriteError> {
    let Some(parent) = path.parent().filter(|parent| !parent.is_dir()) else { return Ok(()) };
    make_parents(parent)?;
    match fs::create_dir(parent) {
        Ok(()) => parent.parent().map_or(Ok(()), sync_folder),
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(io_error(parent, "make the folder")(error)),
    }
}

fn sync_folder(folder: &Path) -> Result<(), WriteError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error(folder, "fsync the folder"))
}

/// Removes what nothing refers to. If that fails, it is garbage that the collector finds.
fn discard(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a layer file that is not needed could not be removed");
        }
        _ => {}
    }
}

/// Puts into the bucket what is not there yet; a folder has it already.
pub(super) fn upload(resources: &Resources, layers: &mut [WrittenLayer]) -> Result<(), WriteError> {
    for layer in layers.iter_mut().filter(|layer| !layer.uploaded) {
        if resources.store.store().local_path(&layer.row.object).is_none() {
            let bytes = fs::read(&layer.path).map_err(io_error(&layer.path, "read it"))?;
            let checksum = crc_fast::crc32_iscsi(&bytes);
            if checksum != layer.row.checksum {
                let problem = format!("its CRC-32C is {checksum:08x}, it should be {:08x}", layer.row.checksum);
                let object = layer.row.object.to_string();
                return Err(LayerError::Corrupt { object, offset: 0, key: None, problem }.into());
            }
            resources.store.put(&layer.row.object, Bytes::from(bytes))?;
        }
        layer.uploaded = true;
    }
    Ok(())
}
