//! Creating, taking over and reading logs.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::entry::{Entry, LogNames, NamedEntry, Nonce, push_row};
use super::snapshot::Cadence;
use super::{EditLog, EditLogError, EntryId, EntryKind, Ownership, State};
use crate::ids::Generation;
use crate::store::{Created, ObjectName, Store};

/// Entries that are read at once.
const READS_AT_ONCE: usize = 32;
/// Generations that are tried when others take them at the same time.
const CLAIM_ATTEMPTS_MAX: u32 = 100;
/// Times that a reader without a claim starts again because what it had listed was pruned meanwhile.
const READ_ATTEMPTS_MAX: u32 = 10;

/// What a listing of the log's folder says.
struct Listing {
    /// Newest snapshot.
    snapshot: Option<EntryId>,
    snapshot_bytes: u64,
    /// Each generation's highest number, of entries and snapshots.
    last: BTreeMap<Generation, u64>,
}

impl Listing {
    async fn of(store: &Store, names: &LogNames) -> Result<Listing, EditLogError> {
        let mut listing = Listing { snapshot: None, snapshot_bytes: 0, last: BTreeMap::new() };
        for listed in store.list(names.folder()).await? {
            let Some(NamedEntry { id, is_snapshot }) = names.parse(&listed.name) else { continue };
            let last = listing.last.entry(id.generation).or_default();
            *last = (*last).max(id.number);
            if is_snapshot && listing.snapshot.is_none_or(|newest| newest < id) {
                (listing.snapshot, listing.snapshot_bytes) = (Some(id), listed.bytes);
            }
        }
        Ok(listing)
    }

    fn newest_generation(&self) -> Option<Generation> {
        self.last.keys().next_back().copied()
    }

    /// Generations whose entries are to be read, each with the first and the last number.
    fn to_read(&self) -> Vec<(Generation, u64, u64)> {
        let of_generation = |(&generation, &last): (&Generation, &u64)| match self.snapshot {
            Some(snapshot) if generation < snapshot.generation => None,
            Some(snapshot) if generation == snapshot.generation => Some((generation, snapshot.number + 1, last)),
            _ => Some((generation, 0, last)),
        };
        self.last.iter().filter_map(of_generation).collect()
    }
}

/// Reads objects of one log and applies them.
struct Reader<'a, S> {
    store: &'a Store,
    names: &'a LogNames,
    state: S,
    cadence: Cadence,
}

impl<'a, S: State> Reader<'a, S> {
    async fn start(store: &'a Store, names: &'a LogNames, listing: &Listing) -> Result<Self, EditLogError> {
        let mut reader = Reader { store, names, state: S::default(), cadence: Cadence::default() };
        if let Some(id) = listing.snapshot {
            let (object, bytes) = reader.get(NamedEntry { id, is_snapshot: true }).await?;
            reader.apply(&Entry::decode(&S::FORMAT, &object, NamedEntry { id, is_snapshot: true }, &bytes)?, &object)?;
            reader.cadence.snapshot_bytes = listing.snapshot_bytes;
        }
        Ok(reader)
    }

    async fn get(&self, named: NamedEntry) -> Result<(ObjectName, bytes::Bytes), EditLogError> {
        let object = if named.is_snapshot { self.names.snapshot(named.id)? } else { self.names.entry(named.id)? };
        match self.store.get_optional(&object).await? {
            Some(bytes) => Ok((object, bytes)),
            None => Err(EditLogError::Missing { object }),
        }
    }

    fn apply(&mut self, entry: &Entry, object: &ObjectName) -> Result<(), EditLogError> {
        for edit in entry.edits(S::FORMAT.edit_kinds, object)? {
            let contradiction = |problem| EditLogError::Contradiction { object: object.clone(), problem };
            self.state.apply(&edit).map_err(contradiction)?;
        }
        Ok(())
    }

    /// Reads the entries `first..=last` of a generation, which exist, up to its seal; says who sealed it.
    async fn read(&mut self, generation: Generation, first: u64, last: u64) -> Result<Option<Generation>, EditLogError> {
        let (store, names) = (self.store, self.names);
        let gets = (first..=last).map(|number| async move {
            let named = NamedEntry { id: EntryId { generation, number }, is_snapshot: false };
            let object = names.entry(named.id)?;
            let bytes = store.get_optional(&object).await?.ok_or_else(|| EditLogError::Missing { object: object.clone() })?;
            let entry = Entry::decode(&S::FORMAT, &object, named, &bytes)?;
            Ok::<_, EditLogError>((entry, object, bytes.len() as u64))
        });
        let mut entries = stream::iter(gets).buffered(READS_AT_ONCE);
        while let Some((entry, object, bytes)) = entries.try_next().await? {
            if let EntryKind::Seal { by } = entry.kind {
                return Ok(Some(by));
            }
            self.apply(&entry, &object)?;
            self.cadence.count(bytes);
        }
        Ok(None)
    }

    /// Seals `generation`, whose next entry would be `number`, on behalf of `owner`; reads what was written there
    /// meanwhile.
    async fn seal(&mut self, generation: Generation, mut number: u64, owner: Ownership) -> Result<(), EditLogError> {
        loop {
            let id = EntryId { generation, number };
            let object = self.names.entry(id)?;
            let seal = Entry::bare(EntryKind::Seal { by: owner.generation }, owner.nonce, id).encode(&S::FORMAT, &object)?;
            let Created::Taken(bytes) = self.store.put_if_absent(&object, seal).await? else { return Ok(()) };
            let entry = Entry::decode(&S::FORMAT, &object, NamedEntry { id, is_snapshot: false }, &bytes)?;
            match entry.kind {
                EntryKind::Seal { by } if by > owner.generation => return Err(fenced(self.names, owner.generation, by)),
                // By one that took over before us.
                EntryKind::Seal { .. } => return Ok(()),
                _ => self.apply(&entry, &object)?,
            }
            self.cadence.count(bytes.len() as u64);
            number += 1;
        }
    }
}

pub(super) fn fenced(names: &LogNames, own: Generation, by: Generation) -> EditLogError {
    EditLogError::Fenced { log: names.folder().clone(), own, by }
}

/// Creates entry 0 of the owner's generation, or finds it created by the same owner. Gives who else has it.
async fn claim<S: State>(store: &Store, names: &LogNames, owner: Ownership, edits: &[S::Edit]) -> Result<Option<Nonce>, EditLogError> {
    let named = NamedEntry { id: EntryId { generation: owner.generation, number: 0 }, is_snapshot: false };
    let mut rows = Vec::new();
    for edit in edits {
        push_row(&mut rows, edit)?;
    }
    let claim = Entry { row_count: edits.len() as u32, rows: rows.into(), ..Entry::bare(EntryKind::Claim, owner.nonce, named.id) };
    let object = names.entry(named.id)?;
    match store.put_if_absent(&object, claim.encode(&S::FORMAT, &object)?).await? {
        Created::Ours => Ok(None),
        Created::Taken(bytes) => Ok(Some(Entry::decode(&S::FORMAT, &object, named, &bytes)?.nonce)),
    }
}

impl<S: State> EditLog<S> {
    /// Creates a log with its first edits, in one write. `prefix` must be unique to this call (hold a fresh random
    /// id): nobody else creates a log there.
    ///
    /// # Errors
    /// [`EditLogError::Invalid`] when the edits do not fit an empty state; [`EditLogError::Conflict`] when there is a
    /// log; the store's.
    pub async fn create(store: &Store, prefix: &ObjectName, edits: &[S::Edit]) -> Result<Self, EditLogError> {
        let names = LogNames::new(prefix)?;
        let mut state = S::default();
        for edit in edits {
            state.apply(edit).map_err(|problem| EditLogError::Invalid { log: names.folder().clone(), problem })?;
        }
        let owner = Ownership::new(Generation(1))?;
        if claim::<S>(store, &names, owner, edits).await?.is_some() {
            return Err(EditLogError::Conflict { object: names.entry(EntryId { generation: owner.generation, number: 0 })? });
        }
        Ok(EditLog::new(store.clone(), names, owner, state, 1, Cadence::default()))
    }

    /// Takes over the log at `prefix` with the next generation; `None` when there is no log.
    ///
    /// # Errors
    /// [`EditLogError::Fenced`] when somebody else took over at the same time and came later; what cannot be read;
    /// the store's.
    pub async fn take_over(store: &Store, prefix: &ObjectName) -> Result<Option<Self>, EditLogError> {
        Self::take_over_with(store, prefix, |_| Vec::new()).await
    }

    /// As [`EditLog::take_over`], with edits that come with the claim itself. They must fit whatever the log says.
    ///
    /// # Errors
    /// As [`EditLog::take_over`].
    pub async fn take_over_with(
        store: &Store,
        prefix: &ObjectName,
        edits: impl Fn(Generation) -> Vec<S::Edit>,
    ) -> Result<Option<Self>, EditLogError> {
        let names = LogNames::new(prefix)?;
        let Some(newest) = Listing::of(store, &names).await?.newest_generation() else { return Ok(None) };
        let mut generation = newest;
        for _ in 0..CLAIM_ATTEMPTS_MAX {
            let exhausted = || EditLogError::Damaged { object: names.folder().clone(), problem: "its generations are used up".to_owned() };
            generation = generation.next().ok_or_else(exhausted)?;
            let owner = Ownership::new(generation)?;
            if claim::<S>(store, &names, owner, &edits(generation)).await?.is_none() {
                return Self::open(store, names, owner).await.map(Some);
            }
        }
        Err(EditLogError::Contended { log: names.folder().clone(), attempts: CLAIM_ATTEMPTS_MAX })
    }

    /// Takes over, or begins, the log at `prefix` by the right of `owner`, who has taken the tenant over. May be
    /// called again after it failed.
    ///
    /// # Errors
    /// As [`EditLog::take_over`].
    pub async fn take_over_as(store: &Store, prefix: &ObjectName, owner: Ownership) -> Result<Self, EditLogError> {
        let names = LogNames::new(prefix)?;
        if claim::<S>(store, &names, owner, &[]).await?.is_some_and(|nonce| nonce != owner.nonce) {
            return Err(EditLogError::Conflict { object: names.entry(EntryId { generation: owner.generation, number: 0 })? });
        }
        Self::open(store, names, owner).await
    }

    /// Opens the log at `prefix` again, by the right of `owner`, who had it open before and dropped it when it was
    /// idle ([`EditLog::is_idle`]). Writes nothing. `None` when the owner has no claim there: it never had the log,
    /// or the log was deleted.
    ///
    /// # Errors
    /// [`EditLogError::Fenced`] when somebody has taken over since; [`EditLogError::Conflict`] when the claim is
    /// another's; what cannot be read; the store's.
    pub async fn reopen(store: &Store, prefix: &ObjectName, owner: Ownership) -> Result<Option<Self>, EditLogError> {
        let names = LogNames::new(prefix)?;
        let named = NamedEntry { id: EntryId { generation: owner.generation, number: 0 }, is_snapshot: false };
        let object = names.entry(named.id)?;
        match store.get_optional(&object).await? {
            Some(bytes) if Entry::decode(&S::FORMAT, &object, named, &bytes)?.nonce == owner.nonce => {
                // All older generations were sealed when the owner opened the log first, so nothing is left to write.
                Self::open(store, names, owner).await.map(Some)
            }
            Some(_) => Err(EditLogError::Conflict { object }),
            None => match Listing::of(store, &names).await?.newest_generation().filter(|newest| *newest > owner.generation) {
                Some(by) => Err(fenced(&names, owner.generation, by)),
                None => Ok(None),
            },
        }
    }

    /// Whether there is a log at `prefix`.
    pub async fn exists(store: &Store, prefix: &ObjectName) -> Result<bool, EditLogError> {
        Ok(Listing::of(store, &LogNames::new(prefix)?).await?.newest_generation().is_some())
    }

    /// After the claim: see the log's doc.
    async fn open(store: &Store, names: LogNames, owner: Ownership) -> Result<Self, EditLogError> {
        let own = owner.generation;
        let listing = Listing::of(store, &names).await?;
        if let Some(newer) = listing.newest_generation().filter(|newest| *newest > own) {
            return Err(fenced(&names, own, newer));
        }
        let mut reader = Reader::<S>::start(store, &names, &listing).await?;
        for (generation, first, last) in listing.to_read() {
            match reader.read(generation, first, last).await? {
                Some(by) if generation == own || by > own => return Err(fenced(&names, own, by)),
                Some(_) => {}
                None if generation < own => reader.seal(generation, last + 1, owner).await?,
                None => {}
            }
        }
        let next_number = listing.last.get(&own).map_or(1, |last| last + 1);
        let Reader { state, cadence, .. } = reader;
        Ok(EditLog::new(store.clone(), names, owner, state, next_number, cadence))
    }

    /// Finds out whether somebody has taken over since; then nothing more is written. What is deleted from the store
    /// for good must be checked so first.
    ///
    /// # Errors
    /// [`EditLogError::Fenced`], or the store's.
    pub async fn check_ownership(&self) -> Result<(), EditLogError> {
        let shared = &self.shared;
        let own = shared.ownership.generation;
        let newest = Listing::of(&shared.store, &shared.names).await?.newest_generation();
        match newest.filter(|newest| *newest > own) {
            None => Ok(()),
            Some(by) => {
                let error = fenced(&shared.names, own, by);
                shared.end(&error);
                Err(error)
            }
        }
    }
}

/// Reads the state of the log at `prefix` without taking it over, as of about now, and the last entry of it; `None`
/// when there is no log.
///
/// # Errors
/// What cannot be read; the store's.
pub async fn read_state<S: State>(store: &Store, prefix: &ObjectName) -> Result<Option<(S, EntryId)>, EditLogError> {
    let names = LogNames::new(prefix)?;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let listing = Listing::of(store, &names).await?;
        let Some((&generation, &number)) = listing.last.last_key_value() else { return Ok(None) };
        match read_listed(store, &names, &listing).await {
            // Pruned since the listing: a newer snapshot is there.
            Err(EditLogError::Missing { .. }) if attempt < READ_ATTEMPTS_MAX => {}
            read => return read.map(|state| Some((state, EntryId { generation, number }))),
        }
    }
}

async fn read_listed<S: State>(store: &Store, names: &LogNames, listing: &Listing) -> Result<S, EditLogError> {
    let mut reader = Reader::<S>::start(store, names, listing).await?;
    for (generation, first, last) in listing.to_read() {
        reader.read(generation, first, last).await?;
    }
    Ok(reader.state)
}

/// An object of a log, to be shown.
#[derive(Debug, Serialize)]
pub struct DumpedEntry<E> {
    /// The object.
    pub object: ObjectName,
    /// What it is.
    #[serde(flatten)]
    pub entry: EntryId,
    /// Its kind.
    pub kind: EntryKind,
    /// Its edits.
    pub edits: Vec<E>,
}

/// Everything that is left of the log at `prefix`, oldest first, to be shown as JSON.
///
/// # Errors
/// What cannot be read; the store's.
pub async fn dump<S: State>(store: &Store, prefix: &ObjectName) -> Result<Vec<DumpedEntry<S::Edit>>, EditLogError> {
    let names = LogNames::new(prefix)?;
    let mut dumped = Vec::new();
    for listed in store.list(names.folder()).await? {
        let Some(named) = names.parse(&listed.name) else { continue };
        let Some(bytes) = store.get_optional(&listed.name).await? else { continue };
        let entry = Entry::decode(&S::FORMAT, &listed.name, named, &bytes)?;
        let edits = entry.edits(S::FORMAT.edit_kinds, &listed.name)?;
        dumped.push(DumpedEntry { object: listed.name, entry: entry.id, kind: entry.kind, edits });
    }
    Ok(dumped)
}
