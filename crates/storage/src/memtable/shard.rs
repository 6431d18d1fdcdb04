//! One shard of a memtable: a hash table of chains, and the arenas that hold them.

use std::collections::HashMap;
use std::collections::hash_map;

use bytes::Bytes;
use varve_postgres::Lsn;

use super::MemtableFull;
use super::arena::{Entries, Entry, EntryAt, Kind, ValueArena};
use crate::chain::{CHAIN_BYTES_MAX, CHAIN_CHANGES_MAX, Lookup, Version};
use crate::key::Key;
use crate::key_hash::BuildKeyHasher;
use crate::value::Value;

/// Entries of a chain from one milestone to the next.
const MILESTONE_ENTRIES: u16 = 64;
/// Memory of a key in the hash table: key, head and control byte; a table is on average two thirds full.
const HEAD_BYTES: usize = (size_of::<(Key, Head)>() + 1) * 3 / 2;

/// The newest version of a key, and what is needed to add the next.
#[derive(Clone, Copy)]
struct Head {
    newest: EntryAt,
    milestone: EntryAt,
    /// Bytes of changes since the last version that needs nothing older, or since an image was asked for.
    bytes: u32,
    /// Number of those changes.
    changes: u16,
    /// Entries since the milestone.
    since_milestone: u16,
}

/// What a put did.
pub(super) struct Put {
    /// The chain should get an image.
    pub(super) wants_image: bool,
    /// The key is new.
    pub(super) is_new: bool,
    /// By how much the shard's memory grew.
    pub(super) grown_bytes: usize,
}

/// See the module's doc.
#[derive(Default)]
pub(super) struct Shard {
    heads: HashMap<Key, Head, BuildKeyHasher>,
    entries: Entries,
    values: ValueArena,
}

impl Shard {
    pub(super) fn put(&mut self, key: Key, lsn: Lsn, kind: Kind, bytes: &[u8]) -> Result<Put, MemtableFull> {
        let (value, grown_values) = self.values.push(bytes)?;
        let mut entry = Entry::new(lsn, kind, value, bytes.len());
        let fresh = Head { newest: EntryAt::NONE, milestone: EntryAt::NONE, bytes: 0, changes: 0, since_milestone: 0 };
        let (head, is_new) = match self.heads.entry(key) {
            hash_map::Entry::Occupied(found) => (found.into_mut(), false),
            hash_map::Entry::Vacant(place) => (place.insert(fresh), true),
        };
        entry.older = head.newest;
        entry.milestone = head.milestone;
        let (at, grown_entries) = self.entries.push(entry)?;
        head.newest = at;
        head.since_milestone += 1;
        if head.since_milestone == MILESTONE_ENTRIES {
            head.milestone = at;
            head.since_milestone = 0;
        }
        let mut wants_image = false;
        if kind == Kind::Change {
            head.changes += 1;
            head.bytes += bytes.len() as u32;
            wants_image = usize::from(head.changes) >= CHAIN_CHANGES_MAX || head.bytes as usize >= CHAIN_BYTES_MAX;
        }
        if kind != Kind::Change || wants_image {
            head.changes = 0;
            head.bytes = 0;
        }
        let grown_bytes = grown_values + grown_entries + if is_new { HEAD_BYTES } else { 0 };
        Ok(Put { wants_image, is_new, grown_bytes })
    }

    /// Puts an image in front of the newest version at or below `lsn`; gives by how much the memory grew, `None` if
    /// there is no such version.
    pub(super) fn insert_image(&mut self, key: &Key, lsn: Lsn, image: &[u8]) -> Result<Option<usize>, MemtableFull> {
        let Some(newest) = self.heads.get(key).map(|head| head.newest) else { return Ok(None) };
        let (mut newer, mut at) = (EntryAt::NONE, newest);
        while let Some(entry) = self.entries.get(at)
            && entry.lsn > lsn
        {
            (newer, at) = (at, entry.older);
        }
        let Some(below) = self.entries.get(at).copied() else { return Ok(None) };
        let (value, grown_values) = self.values.push(image)?;
        let mut entry = Entry::new(below.lsn, Kind::Image, value, image.len());
        entry.older = at;
        entry.milestone = below.milestone;
        let (image_at, grown_entries) = self.entries.push(entry)?;
        match self.entries.get_mut(newer) {
            Some(newer) => newer.older = image_at,
            None => {
                if let Some(head) = self.heads.get_mut(key) {
                    head.newest = image_at;
                }
            }
        }
        Ok(Some(grown_values + grown_entries))
    }

    /// The newest version of `key` at or below `lsn`.
    fn newest(&self, key: &Key, lsn: Lsn) -> Option<&Entry> {
        let mut entry = self.entries.get(self.heads.get(key)?.newest)?;
        while entry.lsn > lsn {
            entry = match self.entries.get(entry.milestone) {
                Some(milestone) if milestone.lsn > lsn => milestone,
                _ => self.entries.get(entry.older)?,
            };
        }
        Some(entry)
    }

    /// LSN of the newest version of `key` at or below `lsn`.
    pub(super) fn newest_lsn(&self, key: &Key, lsn: Lsn) -> Option<Lsn> {
        self.newest(key, lsn).map(|entry| entry.lsn)
    }

    /// Adds what the shard has for `lookup`.
    pub(super) fn read(&self, lookup: &mut Lookup) {
        let Some(newest) = self.newest(&lookup.key, lookup.upto) else { return };
        // One buffer for all, as the bytes must outlive the lock.
        let (mut found, mut bytes) = (Vec::new(), Vec::new());
        let mut at = Some(newest);
        while let Some(entry) = at.filter(|entry| entry.lsn > lookup.above) {
            let start = bytes.len();
            bytes.extend_from_slice(entry.bytes(&self.values));
            found.push((entry.lsn, entry.kind(), start..bytes.len()));
            at = if entry.is_base() { None } else { self.entries.get(entry.older) };
        }
        let bytes = Bytes::from(bytes);
        for (lsn, kind, range) in found {
            lookup.push(Version { lsn, value: value(kind, bytes.slice(range)) });
        }
    }

    /// The keys of the shard.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        self.heads.keys().copied()
    }

    /// All versions of `key`, newest first.
    pub(super) fn versions(&self, key: &Key) -> Vec<Version> {
        let mut versions = Vec::new();
        let mut at = self.heads.get(key).map_or(EntryAt::NONE, |head| head.newest);
        while let Some(entry) = self.entries.get(at) {
            versions.push(Version { lsn: entry.lsn, value: value(entry.kind(), Bytes::copy_from_slice(entry.bytes(&self.values))) });
            at = entry.older;
        }
        versions
    }
}

fn value(kind: Kind, bytes: Bytes) -> Value {
    match kind {
        Kind::Image => Value::Image(bytes),
        Kind::Change => Value::Change { will_init: false, bytes },
        Kind::Init => Value::Change { will_init: true, bytes },
        Kind::Absent => Value::Absent,
    }
}
