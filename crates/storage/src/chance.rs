//! Chance: the one place in engine and storage that takes random bytes.
//!
//! They come from the operating system, unless the thread was given another source ([`give`]): a simulation gives its
//! threads a seeded one, so that ids, nonces and names are the same whenever the seed is. Nothing else gives one, and
//! only tests and the simulation can afford to: what is drawn here keeps servers apart that must never agree by chance.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

/// No random bytes can be had, so no id can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no random bytes ({0}): check /dev/urandom and getrandom(2) on this host")]
pub struct RandomError(String);

/// Where random bytes come from instead.
pub trait Source: fmt::Debug + Send + Sync {
    /// Fills `bytes`.
    fn fill(&self, bytes: &mut [u8]);
}

thread_local! {
    static GIVEN: RefCell<Option<Arc<dyn Source>>> = const { RefCell::new(None) };
}

/// From now on this thread's random bytes come from `source`; from the operating system again where that is `None`.
pub fn give(source: Option<Arc<dyn Source>>) {
    GIVEN.with(|given| *given.borrow_mut() = source);
}

/// Fills `bytes` by chance.
///
/// # Errors
/// [`RandomError`].
pub fn fill(bytes: &mut [u8]) -> Result<(), RandomError> {
    let given = GIVEN.with(|given| given.borrow().clone());
    match given {
        Some(source) => {
            source.fill(bytes);
            Ok(())
        }
        None => getrandom::fill(bytes).map_err(|error| RandomError(error.to_string())),
    }
}

/// An array of random bytes.
///
/// # Errors
/// [`RandomError`].
pub fn random_bytes<const N: usize>() -> Result<[u8; N], RandomError> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Sevens;

    impl Source for Sevens {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(7);
        }
    }

    #[test]
    fn a_thread_draws_from_what_it_was_given() {
        give(Some(Arc::new(Sevens)));
        assert_eq!(random_bytes().unwrap(), [7; 16]);
        let elsewhere = std::thread::spawn(|| random_bytes::<16>().unwrap()).join().unwrap();
        assert_ne!(elsewhere, [7; 16], "others draw from the system");
        give(None);
        assert_ne!(random_bytes().unwrap(), [7; 16]);
    }
}
