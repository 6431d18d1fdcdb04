//! The password of a tenant's superuser: generated, and checked by Postgres itself with SCRAM.

use postgres_protocol::password::scram_sha_256;

use crate::error::ServerError;

/// Characters of a password: 24 of 62 are 142 bits.
const PASSWORD_CHARS: usize = 24;
const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// A random password of letters and digits, so that it stands in a URI as it is.
///
/// # Errors
/// When the host has no randomness.
pub(crate) fn generate() -> Result<String, ServerError> {
    let mut password = String::with_capacity(PASSWORD_CHARS);
    while password.len() < PASSWORD_CHARS {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|error| ServerError::internal(format!("no random numbers: {error}")))?;
        // Bytes of 248 and more would make some letters likelier than others.
        let letters = random.iter().filter(|byte| **byte < 248).map(|byte| char::from(ALPHABET[usize::from(byte % 62)]));
        password.extend(letters.take(PASSWORD_CHARS - password.len()));
    }
    Ok(password)
}

/// What `pg_authid.rolpassword` holds for this password.
pub(crate) fn verifier(password: &str) -> String {
    scram_sha_256(password.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_long_and_differ() {
        let (one, two) = (generate().unwrap(), generate().unwrap());
        assert_eq!(one.len(), PASSWORD_CHARS);
        assert_ne!(one, two);
        assert!(verifier(&one).starts_with("SCRAM-SHA-256$4096:"));
    }
}
