//! Trying a store before trusting it.

use bytes::Bytes;
use futures::future;

use super::{Failure, ObjectName, PutMode, Store, StoreError};
use crate::ids::random_bytes;

/// Names that are raced for. Each race has two contenders.
const RACES: usize = 4;

impl Store {
    /// Tries the store: races of two conditional creates, each of which must have exactly one winner, reading back,
    /// deleting. Refuses a store that fails any of it, with an error that says what is wrong with it.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let random = u64::from_be_bytes(random_bytes().map_err(|e| self.config_error(e.to_string()))?);
        // One plain create first: what is wrong with the store's address, rights or space shows here, and nothing races
        // yet.
        let first = self.probe_name(random, RACES)?;
        let _ours_by_its_random_name = self.put_if_absent(&first, Bytes::from_static(b"probe")).await?;
        let races = (0..RACES).map(|number| self.race(random, number));
        let raced = future::join_all(races).await.into_iter().collect::<Result<Vec<()>, _>>();
        self.delete(&first).await?;
        raced.map(|_| ())
    }

    async fn race(&self, random: u64, number: usize) -> Result<(), StoreError> {
        let name = self.probe_name(random, number)?;
        let bodies = [0u8, 1].map(|contender| Bytes::from(format!("{random:016x}-{contender}")));
        let [a, b] = [bodies[0].clone(), bodies[1].clone()];
        // Straight at the client: the retries of `put_if_absent` would hide who won.
        let (a, b) = future::join(self.client.put(&name, a, PutMode::Create), self.client.put(&name, b, PutMode::Create)).await;
        let winners = [&a, &b].into_iter().filter(|put| put.is_ok()).count();
        let unclear = [&a, &b].into_iter().find_map(|put| put.as_ref().err().filter(|e| e.failure != Failure::AlreadyExists));
        let found = self.get(&name).await;
        let deleted = self.delete(&name).await;
        if winners == 2 {
            return Err(StoreError::NotConditional { store: self.to_string(), winners });
        }
        if let Some(error) = unclear {
            // A store may ask one of two racers to come again; what counts is that there are never two winners.
            if !error.failure.is_transient() {
                return Err(self.operation_error("create", &name, error.clone(), true));
            }
        } else if winners == 0 {
            return Err(StoreError::NotConditional { store: self.to_string(), winners });
        }
        let expected = if a.is_ok() { Some(&bodies[0]) } else { b.is_ok().then_some(&bodies[1]) };
        if let Some(expected) = expected
            && found? != *expected
        {
            return Err(StoreError::NotConsistent { store: self.to_string(), object: name });
        }
        deleted
    }

    fn probe_name(&self, random: u64, number: usize) -> Result<ObjectName, StoreError> {
        format!("probe/{random:016x}-{number}").parse().map_err(|e: super::ParseObjectNameError| self.config_error(e.to_string()))
    }
}
