//! Pages that WAL does not give back, and that a clean stop keeps: where sequences stand between the values that they
//! log ahead, and what unlogged relations hold.
//!
//! They count where a compute begins exactly at the end of the shutdown checkpoint with which they were kept. The list
//! goes with the end of the compute ([`crate::host::Ended`]) and comes with a begin ([`crate::host::Begin`]); large
//! pieces go before it, by `POST /v1/computes/{id}/pages`.

use serde::{Deserialize, Serialize};

/// Bytes of a file in one piece.
pub const PIECE_BYTES: usize = 8 << 20;
/// What unlogged relations of a branch may hold in all, to be kept.
pub const UNLOGGED_BYTES_MAX: u64 = 1 << 30;
/// Bytes of the list, at most, as its maker counts them.
pub const LIST_BYTES_MAX: usize = 24 << 20;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptPages {
    /// Pages of sequences. They hold as often as a compute begins there.
    pub sequences: Vec<PagesOfFile>,
    /// All forks of unlogged relations but for the init forks, which have WAL. They hold for the first compute that
    /// runs there, as after a crash they are empty.
    pub unlogged: Vec<PagesOfFile>,
}

impl KeptPages {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.unlogged.is_empty()
    }
}

/// A whole file of a relation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesOfFile {
    /// Its path in the mount, relative to the data directory.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its contents, [`PIECE_BYTES`] each but for the last.
    pub pieces: Vec<Piece>,
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Piece {
    /// A small one: compressed with zstd, in base64.
    Here(String),
    /// An object. Zeros behind the end of the file do not count.
    Object {
        /// Its name, as the control plane gave it.
        name: String,
        /// SHA-256 of its bytes in hexadecimal digits.
        sha256: String,
    },
}
