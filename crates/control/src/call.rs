//! A mutation as it was asked for: by whom, and under which idempotency key.
//!
//! **Keys.** A client that does not know whether its request was done sends it again with the same `Idempotency-Key`,
//! and gets the answer that the first one got. The row that says so is part of the mutation's own commit, so this holds
//! over restarts, too. Keys are remembered within a tenant, the newest 1,000 of them, among them that of the call that
//! created it. A key is 1 to 255 visible ASCII characters. A failure is not remembered.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use varve_storage::tenant_log::{TenantEdit, TenantState};

use crate::error::{Error, RequestError};

/// Longest key.
const KEY_CHARS_MAX: usize = 255;

/// An idempotency key with the request that it was sent with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    key: String,
    request: String,
}

impl Key {
    /// Reads a key; `request` is everything that makes two requests the same one.
    ///
    /// # Errors
    /// [`RequestError::Header`].
    pub fn parse(key: &str, request: &[&[u8]]) -> Result<Key, RequestError> {
        if key.is_empty() || key.len() > KEY_CHARS_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(RequestError::Header { name: "Idempotency-Key", problem: "expected 1 to 255 visible ASCII characters" });
        }
        let mut hash = Sha256::new();
        for part in request {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Ok(Key { key: key.to_owned(), request: hex(&hash.finalize()) })
    }

    /// The key itself.
    pub(crate) fn as_str(&self) -> &str {
        &self.key
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Who asks for what, once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The idempotency key.
    pub key: Option<Key>,
    /// Who asks, for the audit log.
    pub actor: String,
    /// The request's id, for the audit log.
    pub request_id: String,
}

/// What an idempotency row holds.
#[derive(Serialize, Deserialize)]
struct Kept {
    request: String,
    answer: serde_json::Value,
}

impl Call {
    /// The answer that this call was given before.
    pub(crate) fn prior<T: DeserializeOwned>(&self, state: &TenantState) -> Result<Option<T>, Error> {
        let Some(key) = &self.key else { return Ok(None) };
        let Some(kept) = state.answer_to(&key.key) else { return Ok(None) };
        let kept: Kept = serde_json::from_str(kept).map_err(|error| Error::Answer(error.to_string()))?;
        if kept.request != key.request {
            return Err(Error::KeyReused(key.key.clone()));
        }
        serde_json::from_value(kept.answer).map(Some).map_err(|error| Error::Answer(error.to_string()))
    }

    /// The row that keeps `answer`, if this call has a key.
    pub(crate) fn row<T: Serialize>(&self, answer: &T) -> Result<Option<TenantEdit>, Error> {
        let Some(key) = &self.key else { return Ok(None) };
        let failed = |error: serde_json::Error| Error::Answer(error.to_string());
        let kept = Kept { request: key.request.clone(), answer: serde_json::to_value(answer).map_err(failed)? };
        Ok(Some(TenantEdit::Idempotency { key: key.key.clone(), answer: serde_json::to_string(&kept).map_err(failed)? }))
    }

    /// What the audit log says of it.
    pub(crate) fn audit(&self, action: &str) -> String {
        match (self.actor.as_str(), self.request_id.as_str()) {
            ("", "") => action.to_owned(),
            (actor, "") => format!("{action} (by {actor})"),
            ("", request) => format!("{action} (request {request})"),
            (actor, request) => format!("{action} (by {actor}, request {request})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_for_one_request() {
        let key = |body: &str| Call { key: Some(Key::parse("k", &[b"POST", body.as_bytes()]).unwrap()), ..Call::default() };
        let mut state = TenantState::default();
        assert_eq!(key("a").prior::<u32>(&state).unwrap(), None);
        state.apply(&key("a").row(&7u32).unwrap().unwrap()).unwrap();
        assert_eq!(key("a").prior::<u32>(&state).unwrap(), Some(7));
        assert!(matches!(key("b").prior::<u32>(&state), Err(Error::KeyReused(_))));
        assert_eq!(Call::default().prior::<u32>(&state).unwrap(), None);
        for bad in ["", "a b", "ä", &"k".repeat(256)] {
            assert!(Key::parse(bad, &[]).is_err(), "{bad:?}");
        }
    }
}
