//! Pages that WAL does not give back ([`varve_api::kept_pages`]): taken from the mount when Postgres has ended cleanly,
//! put into the next one before Postgres starts. One piece of a file is in memory at a time.

use std::collections::HashMap;
use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use varve_api::client::ClientError;
use varve_api::kept_pages::{KeptPages, LIST_BYTES_MAX, PIECE_BYTES, PagesOfFile, Piece, UNLOGGED_BYTES_MAX};

use crate::mount::{Mount, RelationFile, StagedFile};
use crate::server::{Server, is_transient};

/// A piece that is no larger than this once it is compressed stands in the list.
const HERE_BYTES_MAX: usize = 4096;
/// The least that the control plane makes an object of; a smaller piece is filled up with zeros.
const OBJECT_BYTES_MIN: usize = (64 << 10) + 1;
/// What a piece takes in the list beside its contents, at most.
const PIECE_ROW_BYTES: usize = 256;
const COMPRESSION: i32 = 1;

/// What a mount gave.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// What is kept.
    pub(crate) pages: KeptPages,
    /// What is not, in words.
    pub(crate) left_out: Vec<String>,
}

/// Pages that could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum PutBackError {
    /// The server does not give a piece.
    #[error("a piece of the pages that were kept: {0}")]
    Server(#[from] ClientError),
    /// A piece is not what it was, or does not fit in.
    #[error("the pages that were kept: {0}")]
    Io(#[from] io::Error),
}

impl PutBackError {
    /// Whether it may go well another time.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, PutBackError::Server(error) if is_transient(error))
    }
}

/// Takes what stands beside WAL out of a mount whose Postgres has ended cleanly. Pieces that `known` has are not sent
/// again. Blocks.
///
/// # Errors
/// When the mount fails, or the server does not take a piece.
pub(crate) fn take(mount: &Mount, server: &Server, known: &KeptPages) -> Result<Taken, PutBackError> {
    let found = mount.beside_wal()?;
    let mut taker = Taker { server, known: objects(known), list_bytes: 0 };
    let mut taken = Taken::default();
    for file in &found.sequences {
        match taker.file(file)? {
            Some(pages) => taken.pages.sequences.push(pages),
            None => {
                taken.left_out.push("so many sequences were used that some go on up to 32 values later".to_owned());
                break;
            }
        }
    }
    let bytes: u64 = found.unlogged.iter().map(|file| file.bytes).sum();
    if bytes > UNLOGGED_BYTES_MAX {
        let max = UNLOGGED_BYTES_MAX >> 20;
        taken.left_out.push(format!("unlogged relations hold {} MiB, more than {max} MiB, and begin empty", bytes >> 20));
        return Ok(taken);
    }
    for file in &found.unlogged {
        match taker.file(file)? {
            Some(pages) => taken.pages.unlogged.push(pages),
            None => {
                // Some of them without the others would be no relations.
                taken.pages.unlogged.clear();
                taken.left_out.push("unlogged relations are too many, and begin empty".to_owned());
                break;
            }
        }
    }
    Ok(taken)
}

fn objects(pages: &KeptPages) -> HashMap<String, String> {
    let pieces = pages.unlogged.iter().chain(&pages.sequences).flat_map(|file| &file.pieces);
    let object = |piece: &Piece| match piece {
        Piece::Object { name, sha256 } => Some((sha256.clone(), name.clone())),
        Piece::Here(_) => None,
    };
    pieces.filter_map(object).collect()
}

struct Taker<'a> {
    server: &'a Server,
    /// Pieces that the server has: their sums, and their names.
    known: HashMap<String, String>,
    list_bytes: usize,
}

impl Taker<'_> {
    /// A file's pieces; none where the list is full.
    fn file(&mut self, file: &RelationFile) -> Result<Option<PagesOfFile>, PutBackError> {
        let mut pieces = Vec::new();
        self.list_bytes += file.path.len() + PIECE_ROW_BYTES;
        for offset in (0..file.bytes).step_by(PIECE_BYTES) {
            let bytes = file.read(offset, PIECE_BYTES)?;
            let piece = self.piece(bytes)?;
            self.list_bytes += match &piece {
                Piece::Here(text) => text.len(),
                Piece::Object { .. } => PIECE_ROW_BYTES,
            };
            if self.list_bytes > LIST_BYTES_MAX {
                return Ok(None);
            }
            pieces.push(piece);
        }
        Ok(Some(PagesOfFile { path: file.path.clone(), bytes: file.bytes, pieces }))
    }

    fn piece(&self, mut bytes: Vec<u8>) -> Result<Piece, PutBackError> {
        let compressed = zstd::bulk::compress(&bytes, COMPRESSION)?;
        if compressed.len() <= HERE_BYTES_MAX {
            return Ok(Piece::Here(BASE64.encode(compressed)));
        }
        if bytes.len() < OBJECT_BYTES_MIN {
            bytes.resize(OBJECT_BYTES_MIN, 0);
        }
        let sha256 = sum(&bytes);
        let name = match self.known.get(&sha256) {
            Some(name) => name.clone(),
            None => Handle::current().block_on(self.server.put_piece(bytes.into()))?,
        };
        Ok(Piece::Object { name, sha256 })
    }
}

/// Puts kept pages into a mount that nobody has looked at. Gives words about what is lost. Blocks.
///
/// # Errors
/// Those that may pass. What is lost for good does not keep a compute from being started.
pub(crate) fn put_back(mount: &Mount, server: &Server, pages: &KeptPages) -> Result<Option<String>, PutBackError> {
    let mut lost = None;
    for (files, what) in [
        (&pages.sequences, "sequences may go on up to 32 values later: where they stood exactly is lost"),
        (&pages.unlogged, "unlogged relations begin empty: what they held is lost"),
    ] {
        let staged = files.iter().map(|file| stage(mount, server, file)).collect::<Result<Vec<_>, _>>();
        match staged.and_then(|staged| Ok(mount.put_in_place(staged)?)) {
            Ok(()) => {}
            Err(error) if error.is_transient() => return Err(error),
            Err(error) => {
                tracing::error!(%error, what);
                lost = Some(what.to_owned());
            }
        }
    }
    Ok(lost)
}

fn stage(mount: &Mount, server: &Server, file: &PagesOfFile) -> Result<StagedFile, PutBackError> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("a piece of {} is damaged", file.path));
    let staged = mount.stage(&file.path, file.bytes)?;
    for (piece, offset) in file.pieces.iter().zip((0..file.bytes).step_by(PIECE_BYTES)) {
        let length = (file.bytes - offset).min(PIECE_BYTES as u64) as usize;
        let bytes: Bytes = match piece {
            Piece::Here(text) => {
                let compressed = BASE64.decode(text).map_err(|_| damaged())?;
                zstd::bulk::decompress(&compressed, length)?.into()
            }
            Piece::Object { name, sha256 } => {
                let bytes = Handle::current().block_on(server.get_piece(name))?;
                if sum(&bytes) != *sha256 {
                    return Err(damaged().into());
                }
                bytes
            }
        };
        staged.write(offset, bytes.get(..length).ok_or_else(damaged)?)?;
    }
    if file.pieces.len() as u64 != file.bytes.div_ceil(PIECE_BYTES as u64) {
        return Err(damaged().into());
    }
    Ok(staged)
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
