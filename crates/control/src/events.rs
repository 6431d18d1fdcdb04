//! What happened to computes that their owners should know of. The newest are kept, as long as this process lives;
//! the logs have them all.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use parking_lot::Mutex;
use varve_api::admin::{Event, EventKind};
use varve_api::host::EventReport;
use varve_postgres::Timestamp;
use varve_storage::ids::EndpointId;

use crate::Control;
use crate::error::Error;
use crate::logs::branch;
use crate::moment::rfc3339;
use crate::ports::Pageserver;

/// Events that are kept of one endpoint.
const EVENTS_MAX: usize = 100;
/// Endpoints of which any are kept.
const ENDPOINTS_MAX: usize = 10_000;
/// Characters of one that are kept: its text may quote what a tenant's server says.
const WORDS_MAX: usize = 2000;

/// When, what kind of thing, and in words.
type Happened = (Timestamp, EventKind, String);

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Events {
    lists: Mutex<BTreeMap<EndpointId, VecDeque<Happened>>>,
}

impl Events {
    /// Something happened.
    pub(crate) fn add(&self, id: EndpointId, at: Timestamp, kind: EventKind, words: &str) {
        let words: String = words.chars().take(WORDS_MAX).collect();
        let mut lists = self.lists.lock();
        if lists.len() >= ENDPOINTS_MAX && !lists.contains_key(&id) {
            let newest = |list: &VecDeque<Happened>| list.back().map(|(at, ..)| at.unix_micros());
            let quietest = lists.iter().min_by_key(|(_, list)| newest(list)).map(|(id, _)| *id);
            quietest.map(|id| lists.remove(&id));
        }
        let list = lists.entry(id).or_default();
        list.push_back((at, kind, words));
        if list.len() > EVENTS_MAX {
            list.pop_front();
        }
    }

    /// What is known of an endpoint, oldest first.
    fn of(&self, id: EndpointId) -> Vec<Event> {
        let lists = self.lists.lock();
        let shown = |(at, kind, words): &Happened| Event { at: rfc3339(*at), kind: *kind, words: words.clone() };
        lists.get(&id).map(|list| list.iter().map(shown).collect()).unwrap_or_default()
    }
}

impl<P: Pageserver> Control<P> {
    /// What happened to the compute of a branch, oldest first.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn branch_events(&self, tenant: &str, branch_text: &str) -> Result<Vec<Event>, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        let (name, _) = branch(&state, branch_text)?;
        let endpoint = state.endpoints_of(&name).find(|row| row.moment.is_none()).map(|row| row.id);
        Ok(endpoint.map(|id| self.events.of(id)).unwrap_or_default())
    }

    /// A compute tells what happened to it.
    ///
    /// # Errors
    /// [`Error::NotYetKnown`].
    pub fn note_event(&self, id: &str, report: EventReport) -> Result<(), Error> {
        let entry = self.process(id)?;
        let EventReport { kind, words, age_ms } = report;
        tracing::info!(compute = %entry.id, branch = entry.branch(), kind = kind.name(), words, "an event");
        let age = i64::try_from(Duration::from_millis(age_ms).as_micros()).unwrap_or(0);
        let at = Timestamp::from_unix_micros(self.environment.now().unix_micros().saturating_sub(age));
        self.events.add(entry.id, at, kind, &words);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_and_long_words_are_cut() {
        let (events, id) = (Events::default(), EndpointId([1; 16]));
        for i in 0..EVENTS_MAX as i64 + 5 {
            events.add(id, Timestamp::from_unix_micros(i), EventKind::Resized, &i.to_string());
        }
        events.add(id, Timestamp::from_unix_micros(1000), EventKind::OutOfMemory, &"x".repeat(WORDS_MAX + 1));
        let kept = events.of(id);
        assert_eq!((kept.len(), &*kept[0].words), (EVENTS_MAX, "6"));
        assert_eq!(kept[EVENTS_MAX - 1].words.len(), WORDS_MAX);
        assert_eq!(events.of(EndpointId([2; 16])), []);
    }
}
