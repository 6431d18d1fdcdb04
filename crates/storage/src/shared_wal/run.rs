//! Writing: a run of objects, one after another.

use bytes::{Bytes, BytesMut};

use super::{CHUNK, Chunk, Directory, Kind, Place, Row, SharedWalError, log_folder};
use crate::envelope::{self, Codec};
use crate::ids::{WalLogId, random_bytes};
use crate::store::{Created, ObjectName, Store};

/// Attempts at beginning a run, each of which another process, or a seal, was quicker than.
const ATTEMPTS_MAX: u32 = 16;

/// A run that this process writes.
#[derive(Debug)]
pub struct Run {
    folder: ObjectName,
    nonce: [u8; 16],
    pub(super) next: Place,
}

/// An object that can be put.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Its name.
    pub object: ObjectName,
    /// Where its chunks end.
    pub rows: Vec<Row>,
    bytes: Bytes,
}

impl Encoded {
    /// Bytes that go to the store.
    pub fn stored_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// How a put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Put {
    /// The object is in the store.
    Stored,
    /// Another server has sealed the run: nothing more goes into it.
    Sealed,
}

impl Run {
    /// Begins the next run of `wal_log`, which nobody else may write.
    ///
    /// # Errors
    /// [`SharedWalError`], the store's most of all.
    pub async fn begin(store: &Store, wal_log: WalLogId) -> Result<Run, SharedWalError> {
        let folder = log_folder(wal_log)?;
        let nonce = random_bytes()?;
        let mut at = Place { run: 1, number: 0 };
        for _ in 0..ATTEMPTS_MAX {
            let newest =
                store.list(&folder).await?.iter().filter_map(|listed| Place::of(&folder, &listed.name)).map(|place| place.run).max();
            at.run = newest.unwrap_or(0).max(at.run.saturating_sub(1)) + 1;
            let object = at.object(&folder)?;
            let begin = Directory { nonce, kind: Kind::Begin }.encode(&object)?;
            match store.put_if_absent(&object, begin).await? {
                Created::Ours => {
                    at.number = 1;
                    return Ok(Run { folder, nonce, next: at });
                }
                Created::Taken(_) => at.run += 1,
            }
        }
        Err(SharedWalError::Foreign { object: at.object(&folder)? })
    }

    /// Number of the run.
    pub fn number(&self) -> u32 {
        self.next.run
    }

    /// Makes the next object of `chunks`. It takes a core's time for compression.
    ///
    /// # Errors
    /// When there is too much for an object.
    pub fn encode(&self, chunks: &[Chunk]) -> Result<Encoded, SharedWalError> {
        let object = self.next.object(&self.folder)?;
        let mut rows = Vec::with_capacity(chunks.len());
        let mut stored = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let bytes = envelope::encode(&CHUNK, Codec::Zstd, object.as_str(), &chunk.bytes)?;
            let (tenant, timeline) = (chunk.tenant, chunk.timeline);
            rows.push(Row { tenant, timeline, start: chunk.start, end: chunk.end(), stored_bytes: bytes.len() as u64 });
            stored.push(bytes);
        }
        let directory = Directory { nonce: self.nonce, kind: Kind::Wal(rows.clone()) }.encode(&object)?;
        let mut bytes = BytesMut::with_capacity(directory.len() + stored.iter().map(Bytes::len).sum::<usize>());
        bytes.extend_from_slice(&directory);
        stored.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
        Ok(Encoded { object, rows, bytes: bytes.freeze() })
    }

    /// Puts an object that was made by the last [`Run::encode`]. After an error the same one is to be put again.
    ///
    /// # Errors
    /// [`SharedWalError::Foreign`] when another process writes this run; the store's.
    pub async fn put(&mut self, store: &Store, encoded: &Encoded) -> Result<Put, SharedWalError> {
        match store.put_if_absent(&encoded.object, encoded.bytes.clone()).await? {
            Created::Ours => {
                self.next.number += 1;
                Ok(Put::Stored)
            }
            Created::Taken(found) => {
                let length = envelope::length_of(&found).map_or(found.len(), |length| found.len().min(length as usize));
                match Directory::decode(&encoded.object, &found.slice(..length)).map(|directory| directory.kind) {
                    Ok(Kind::Begin | Kind::Wal(_)) => Err(SharedWalError::Foreign { object: encoded.object.clone() }),
                    // One that cannot be read, of a newer release perhaps, ends the run as well.
                    Ok(Kind::Seal { .. }) | Err(_) => Ok(Put::Sealed),
                }
            }
        }
    }
}
