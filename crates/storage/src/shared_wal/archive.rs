//! Reading: what the runs of a WAL log hold, for whoever goes on without that log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use parking_lot::Mutex;
use varve_postgres::Lsn;

use super::{CHUNK, Directory, FOLDER, Kind, Place, Row, SharedWalError, log_folder};
use crate::envelope;
use crate::ids::{TenantId, TimelineId, WalLogId, random_bytes};
use crate::store::{Created, Listed, ObjectName, Store};

/// Bytes that are read of an object to have its directory; most have it all in these.
const HEAD_BYTES: u64 = 4 * 1024;
/// Objects that are read at once.
const READS_AT_ONCE: usize = 16;
/// Directories that are remembered.
const REMEMBERED_MAX: usize = 16 * 1024;

/// WAL that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its first byte.
    pub start: Lsn,
    /// The bytes.
    pub bytes: Bytes,
}

/// What was found of a timeline.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its WAL, in order and without a gap.
    pub parts: Vec<Stored>,
    /// Objects that are damaged, each with what is wrong: they may have held more.
    pub damaged: Vec<SharedWalError>,
}

impl Found {
    /// The end of what was found.
    pub fn end(&self) -> Option<Lsn> {
        self.parts.last().map(|last| last.start + last.bytes.len() as u64)
    }
}

/// A directory, and where the chunks behind it begin.
type Read = (Arc<Directory>, u64);

/// The objects of shared WAL in a store. It remembers the directories that it has read: an object never changes.
#[derive(Debug)]
pub struct Archive {
    store: Store,
    read: Mutex<BTreeMap<ObjectName, Read>>,
}

impl Archive {
    /// Of `store`.
    pub fn new(store: Store) -> Archive {
        Archive { store, read: Mutex::default() }
    }

    /// Objects of all WAL logs.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&self) -> Result<Vec<Listed>, SharedWalError> {
        Ok(self.store.list(&FOLDER.parse()?).await?)
    }

    /// The WAL log and place that an object's name tells.
    pub fn place(object: &ObjectName) -> Option<(WalLogId, Place)> {
        let wal_log: WalLogId = object.as_str().strip_prefix("wal/")?.split_once('/')?.0.parse().ok()?;
        Some((wal_log, Place::of(&log_folder(wal_log).ok()?, object)?))
    }

    /// What an object of so many bytes says of itself.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub async fn directory(&self, object: &ObjectName, bytes: u64) -> Result<Arc<Directory>, SharedWalError> {
        Ok(self.read(object, bytes).await?.0)
    }

    async fn read(&self, object: &ObjectName, bytes: u64) -> Result<Read, SharedWalError> {
        if let Some(read) = self.read.lock().get(object) {
            return Ok(read.clone());
        }
        let mut head = self.store.get_range(object, 0..bytes.min(HEAD_BYTES)).await?;
        let length =
            envelope::length_of(&head).filter(|length| *length <= bytes).ok_or_else(|| SharedWalError::damaged(object, "it is cut off"))?;
        if length > head.len() as u64 {
            head = self.store.get_range(object, 0..length).await?;
        }
        let directory = Directory::decode(object, &head.slice(..length as usize))?;
        let stored: u64 = directory.rows().iter().map(|row| row.stored_bytes).sum();
        if length.checked_add(stored) != Some(bytes) {
            return Err(SharedWalError::damaged(
                object,
                format!("its directory tells of {stored} bytes behind it, it has {}", bytes - length),
            ));
        }
        let read = (Arc::new(directory), length);
        let mut remembered = self.read.lock();
        if remembered.len() >= REMEMBERED_MAX {
            remembered.clear();
        }
        remembered.insert(object.clone(), read.clone());
        Ok(read)
    }

    /// Reads the whole of an object, and checks it. Gives its bytes; none if it is gone, as it is once layers cover it.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub async fn verify(&self, object: &ObjectName) -> Result<Option<u64>, SharedWalError> {
        let Some(bytes) = self.store.get_optional(object).await? else { return Ok(None) };
        let cut_off = || SharedWalError::damaged(object, "it is cut off");
        let mut at = envelope::length_of(&bytes).filter(|length| *length <= bytes.len() as u64).ok_or_else(cut_off)? as usize;
        let directory = Directory::decode(object, &bytes.slice(..at))?;
        for row in directory.rows() {
            let end = usize::try_from(row.stored_bytes).ok().and_then(|stored| at.checked_add(stored));
            let end = end.filter(|end| *end <= bytes.len()).ok_or_else(cut_off)?;
            Self::decode_chunk(object, row, &bytes.slice(at..end))?;
            at = end;
        }
        if at < bytes.len() {
            return Err(SharedWalError::damaged(object, format!("{} bytes follow its last chunk", bytes.len() - at)));
        }
        Ok(Some(bytes.len() as u64))
    }

    /// Sees to it that nothing is added to the runs that `wal_log` has begun.
    ///
    /// # Errors
    /// The store's.
    pub async fn seal(&self, wal_log: WalLogId, by: WalLogId) -> Result<(), SharedWalError> {
        let folder = log_folder(wal_log)?;
        let mut newest: BTreeMap<u32, (u64, Listed)> = BTreeMap::new();
        for listed in self.store.list(&folder).await? {
            if let Some(place) = Place::of(&folder, &listed.name) {
                newest.insert(place.run, (place.number, listed));
            }
        }
        for (run, (mut number, last)) in newest {
            if self.is_seal(&last.name, last.bytes).await? {
                continue;
            }
            let nonce = random_bytes()?;
            loop {
                number += 1;
                let object = Place { run, number }.object(&folder)?;
                let seal = Directory { nonce, kind: Kind::Seal { by } }.encode(&object)?;
                match self.store.put_if_absent(&object, seal).await? {
                    Created::Ours => break,
                    // Its writer was quicker, or another one sealed it.
                    Created::Taken(found) => {
                        if self.is_seal(&object, found.len() as u64).await? {
                            break;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether an object is a seal. One that is damaged, or was deleted meanwhile, is none.
    async fn is_seal(&self, object: &ObjectName, bytes: u64) -> Result<bool, SharedWalError> {
        match self.directory(object, bytes).await {
            Ok(directory) => Ok(matches!(directory.kind, Kind::Seal { .. })),
            Err(error) => error.unless_unanswered().map(|_| false),
        }
    }

    /// The WAL of a timeline from `from` on, as far as the runs of `wal_log`, which must be sealed, have it without a
    /// gap.
    ///
    /// # Errors
    /// When the store does not answer. What is damaged is told with what was found.
    pub async fn find(&self, wal_log: WalLogId, tenant: TenantId, timeline: TimelineId, from: Lsn) -> Result<Found, SharedWalError> {
        let listed = self.store.list(&log_folder(wal_log)?).await?;
        let here: BTreeSet<&ObjectName> = listed.iter().map(|listed| &listed.name).collect();
        let of_this_log = |name: &ObjectName| Self::place(name).is_some_and(|(log, _)| log == wal_log);
        self.read.lock().retain(|name, _| !of_this_log(name) || here.contains(name));
        let mut found = Found::default();
        let mut rows: Vec<(ObjectName, u64, Row)> = Vec::new();
        let reads: Vec<_> = listed.iter().map(|listed| self.rows_of(listed, tenant, timeline, from).boxed()).collect();
        let mut read = stream::iter(reads).buffered(READS_AT_ONCE);
        while let Some(some) = read.next().await {
            match some {
                Ok(some) => rows.extend(some),
                Err(error) => found.damaged.push(error.unless_unanswered()?),
            }
        }
        drop(read);
        rows.sort_by_key(|(_, _, row)| (row.start, std::cmp::Reverse(row.end)));
        // Chunks that overlap hold the same: each is wanted only for what those before it do not have.
        let (mut wanted, mut end) = (Vec::new(), from);
        for (object, at, row) in rows {
            if row.start <= end && row.end > end {
                end = row.end;
                wanted.push((object, at, row));
            }
        }
        let mut at = from;
        let reads: Vec<_> = wanted.iter().map(|(object, offset, row)| self.chunk(object, *offset, row).boxed()).collect();
        let mut chunks = stream::iter(reads).buffered(READS_AT_ONCE);
        while let Some(part) = chunks.next().await {
            let part = match part {
                Ok(part) => part,
                Err(error) => {
                    found.damaged.push(error.unless_unanswered()?);
                    break;
                }
            };
            let skip = at.distance_from(part.start) as usize;
            at = part.start + part.bytes.len() as u64;
            found.parts.push(Stored { start: part.start + skip as u64, bytes: part.bytes.slice(skip..) });
        }
        Ok(found)
    }

    /// A timeline's rows of an object, each with where its chunk begins. An object that is gone by now was not needed.
    async fn rows_of(
        &self,
        listed: &Listed,
        tenant: TenantId,
        timeline: TimelineId,
        from: Lsn,
    ) -> Result<Vec<(ObjectName, u64, Row)>, SharedWalError> {
        let (directory, mut at) = match self.read(&listed.name, listed.bytes).await {
            Ok(read) => read,
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut rows = Vec::new();
        for row in directory.rows() {
            if row.tenant == tenant && row.timeline == timeline && row.end > from {
                rows.push((listed.name.clone(), at, *row));
            }
            at += row.stored_bytes;
        }
        Ok(rows)
    }

    async fn chunk(&self, object: &ObjectName, at: u64, row: &Row) -> Result<Stored, SharedWalError> {
        Self::decode_chunk(object, row, &self.store.get_range(object, at..at + row.stored_bytes).await?)
    }

    fn decode_chunk(object: &ObjectName, row: &Row, stored: &Bytes) -> Result<Stored, SharedWalError> {
        let bytes = envelope::decode(&CHUNK, object.as_str(), stored)?.content;
        if row.start + bytes.len() as u64 != row.end {
            return Err(SharedWalError::damaged(
                object,
                format!("{} bytes of WAL where its directory says {}..{}", bytes.len(), row.start, row.end),
            ));
        }
        Ok(Stored { start: row.start, bytes })
    }
}
