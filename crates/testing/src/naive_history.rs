//! The naive model of a timeline: every version of every key in one ordered map, nothing frozen, flushed, cached or
//! merged.
//!
//! It says what the engine must answer, so it is written to be obviously right: a read walks the versions of its key
//! from the newest to the oldest, here and then in the ancestors up to the branch points, until one does not need an
//! older one. It is strict about its callers: a read above what is applied and a write at or below it are errors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::{BLCKSZ, Lsn, Major, Page};
use varve_redo::change::Change;
use varve_storage::history::{History, HistoryError, HistoryWriter, Visit};
use varve_storage::key::{Key, KeyKind};
use varve_storage::value::Value;

/// See the module's doc.
pub struct NaiveHistory {
    major: Major,
    /// The timeline that this one branched off, and where.
    ancestor: Option<(Arc<NaiveHistory>, Lsn)>,
    state: RwLock<State>,
}

struct State {
    applied: Lsn,
    /// The values of a (key, LSN) in the order in which they were put.
    versions: BTreeMap<(Key, Lsn), Vec<Value>>,
}

impl NaiveHistory {
    /// An empty history that begins at `start`.
    pub fn new(major: Major, start: Lsn) -> NaiveHistory {
        NaiveHistory { major, ancestor: None, state: RwLock::new(State { applied: start, versions: BTreeMap::new() }) }
    }

    /// A branch that has this history up to `lsn` and then its own.
    ///
    /// # Errors
    /// When `lsn` is above what is applied.
    pub fn branch(self: &Arc<Self>, lsn: Lsn) -> Result<NaiveHistory, HistoryError> {
        self.check_applied(lsn)?;
        let state = RwLock::new(State { applied: lsn, versions: BTreeMap::new() });
        Ok(NaiveHistory { major: self.major, ancestor: Some((Arc::clone(self), lsn)), state })
    }

    /// What is applied: the newest LSN that can be read.
    pub fn applied(&self) -> Lsn {
        self.state.read().applied
    }

    /// Every value put here (not in ancestors), by key and LSN ascending.
    pub fn versions(&self) -> Vec<(Key, Lsn, Value)> {
        let state = self.state.read();
        state.versions.iter().flat_map(|((key, lsn), values)| values.iter().map(|value| (*key, *lsn, value.clone()))).collect()
    }

    /// The newest value of `key` at `lsn` above `floor` and what it rests on, newest first, down to the first that
    /// needs nothing older.
    fn chain(&self, key: Key, floor: Lsn, lsn: Lsn) -> Vec<(Lsn, Value)> {
        let mut chain = Vec::new();
        let (mut timeline, mut lsn) = (self, lsn);
        loop {
            let state = timeline.state.read();
            for ((_, at), values) in state.versions.range((key, Lsn(0))..=(key, lsn)).rev() {
                if *at <= floor {
                    return chain;
                }
                for value in values.iter().rev() {
                    chain.push((*at, value.clone()));
                    if value.is_base() {
                        return chain;
                    }
                }
            }
            let Some((ancestor, branch_lsn)) = &timeline.ancestor else { return chain };
            (timeline, lsn) = (ancestor, lsn.min(*branch_lsn));
        }
    }

    /// Keys in `from..to` that have a version at `lsn`, here or in an ancestor.
    fn keys(&self, from: Key, to: Key, lsn: Lsn) -> BTreeSet<Key> {
        let mut keys =
            self.ancestor.as_ref().map(|(ancestor, branch_lsn)| ancestor.keys(from, to, lsn.min(*branch_lsn))).unwrap_or_default();
        let state = self.state.read();
        keys.extend(state.versions.range((from, Lsn(0))..(to, Lsn(0))).filter(|((_, at), _)| *at <= lsn).map(|((key, _), _)| *key));
        keys
    }

    fn check_applied(&self, lsn: Lsn) -> Result<(), HistoryError> {
        let applied = self.applied();
        if lsn > applied {
            return Err(HistoryError(format!("a read at {lsn}, but only what ends at or before {applied} is applied")));
        }
        Ok(())
    }
}

/// The number by which redo knows the page that `key` names; `None` if it names no page.
fn page_number(key: Key) -> Option<u32> {
    match key.kind()? {
        KeyKind::Block { block, .. } => Some(block),
        KeyKind::SlruPage { page, .. } => Some(page),
        _ => None,
    }
}

impl History for NaiveHistory {
    fn major(&self) -> Major {
        self.major
    }

    fn get_above(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<(Lsn, Bytes)>, HistoryError> {
        self.check_applied(lsn)?;
        if page_number(key).is_some() {
            return Err(HistoryError(format!("{key} is a page and was asked for as a value")));
        }
        match self.chain(key, floor, lsn).into_iter().next() {
            None | Some((_, Value::Absent)) => Ok(None),
            Some((at, Value::Image(bytes))) => Ok(Some((at, bytes))),
            Some((at, Value::Change { .. })) => Err(HistoryError(format!("{key} at {at} has a change, though it is no page"))),
        }
    }

    fn page(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<Box<Page>>, HistoryError> {
        self.check_applied(lsn)?;
        let number = page_number(key).ok_or_else(|| HistoryError(format!("{key} is no page and was asked for as one")))?;
        let chain = self.chain(key, floor, lsn);
        if matches!(chain.first(), None | Some((_, Value::Absent))) {
            return Ok(None);
        }
        let mut page = Box::new(ZERO_PAGE);
        for (at, value) in chain.into_iter().rev() {
            match value {
                Value::Absent => page.fill(0),
                Value::Image(bytes) if bytes.len() == BLCKSZ => page.copy_from_slice(&bytes),
                Value::Image(bytes) => return Err(HistoryError(format!("{key} at {at} has an image of {} bytes", bytes.len()))),
                Value::Change { bytes, .. } => {
                    let change = Change::decode(&bytes).map_err(|what| HistoryError(format!("{key} at {at}: {what}")))?;
                    varve_redo::apply(self.major, at, number, &change, &mut page)
                        .map_err(|error| HistoryError(format!("{key} at {at}: {error}")))?;
                }
            }
        }
        Ok(Some(page))
    }

    fn scan_above(&self, from: Key, to: Key, floor: Lsn, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError> {
        self.check_applied(lsn)?;
        for key in self.keys(from, to, lsn) {
            if page_number(key).is_none()
                && let Some((_, value)) = self.get_above(key, floor, lsn)?
            {
                visit(key, value)?;
            }
        }
        Ok(())
    }
}

impl HistoryWriter for NaiveHistory {
    fn put(&self, key: Key, lsn: Lsn, value: Value) -> Result<(), HistoryError> {
        let mut state = self.state.write();
        if lsn <= state.applied {
            return Err(HistoryError(format!("{key} is put at {lsn}, but everything up to {} is applied already", state.applied)));
        }
        let values = state.versions.entry((key, lsn)).or_default();
        if matches!((values.last(), &value), (Some(Value::Image(_)), Value::Image(_))) {
            values.pop();
        }
        values.push(value);
        Ok(())
    }

    fn advance(&self, lsn: Lsn) {
        let mut state = self.state.write();
        state.applied = state.applied.max(lsn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_postgres::slru::SlruKind;

    fn status(status: u8, xids: &[u32]) -> Value {
        Value::Change { will_init: false, bytes: Change::ClogStatus { status, xids: xids.into() }.encode() }
    }

    #[test]
    fn a_branch_sees_its_ancestor_up_to_the_branch_point_and_then_its_own() {
        let main = Arc::new(NaiveHistory::new(Major::V15, Lsn(100)));
        let (page, map) = (Key::slru_page(SlruKind::Clog, 0), Key::relation_map(1663, 5));
        main.put(page, Lsn(110), Value::Image(Bytes::from(vec![0; BLCKSZ]))).unwrap();
        main.put(page, Lsn(120), status(1, &[4])).unwrap();
        main.put(page, Lsn(120), status(2, &[5])).unwrap();
        main.put(map, Lsn(120), Value::Image(Bytes::from_static(b"old"))).unwrap();
        main.advance(Lsn(120));
        let branch = main.branch(Lsn(120)).unwrap();
        main.put(page, Lsn(130), status(1, &[6])).unwrap();
        main.put(map, Lsn(130), Value::Absent).unwrap();
        main.advance(Lsn(130));
        branch.put(map, Lsn(140), Value::Image(Bytes::from_static(b"new"))).unwrap();
        branch.advance(Lsn(140));

        let byte = |history: &NaiveHistory, lsn| history.page(page, Lsn(0), lsn).unwrap().map(|page| page[1]);
        assert_eq!(byte(&main, Lsn(109)), None, "nothing before the first version");
        assert_eq!(byte(&main, Lsn(110)), Some(0));
        assert_eq!(byte(&main, Lsn(120)), Some(0b1001), "both changes of one record count");
        assert_eq!(byte(&main, Lsn(130)), Some(0b01_1001));
        assert_eq!(byte(&branch, Lsn(140)), Some(0b1001), "what the ancestor did after the branch point does not count");
        assert_eq!(main.page(page, Lsn(130), Lsn(130)).unwrap(), None, "a floor hides what is at or below it");
        assert_eq!(main.get(map, Lsn(130)).unwrap(), None);
        let (from, to) = Key::all_of_kind(map);
        let mut seen = Vec::new();
        branch
            .scan(from, to, Lsn(140), &mut |key, value| {
                seen.push((key, value));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [(map, Bytes::from_static(b"new"))]);
        assert!(main.get(map, Lsn(131)).is_err(), "a read above what is applied is refused");
        assert!(main.put(map, Lsn(130), Value::Absent).is_err(), "a write at what is applied is refused");
    }
}
