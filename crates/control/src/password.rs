//! The password of a tenant's superuser: made by chance, and checked by Postgres itself with SCRAM.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

use crate::environment::{Environment, NoRandom};

/// Characters of a password: 24 of 62 are 142 bits.
const PASSWORD_CHARS: usize = 24;
const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
/// Postgres's own number of iterations.
const ITERATIONS: u32 = 4096;

/// A random password of letters and digits, so that it stands in a URI as it is.
pub(crate) fn generate(environment: &Environment) -> Result<String, NoRandom> {
    let mut password = String::with_capacity(PASSWORD_CHARS);
    while password.len() < PASSWORD_CHARS {
        let random: [u8; 32] = environment.random()?;
        // Bytes of 248 and more would make some letters likelier than others.
        let letters = random.iter().filter(|byte| **byte < 248).map(|byte| char::from(ALPHABET[usize::from(byte % 62)]));
        password.extend(letters.take(PASSWORD_CHARS - password.len()));
    }
    Ok(password)
}

/// What `pg_authid.rolpassword` holds for this password, which is plain ASCII, with this salt.
pub(crate) fn verifier(password: &str, salt: &[u8; 16]) -> String {
    let (stored, server) = keys(password, salt);
    format!("SCRAM-SHA-256${ITERATIONS}:{}${}:{}", BASE64.encode(salt), BASE64.encode(stored), BASE64.encode(server))
}

/// Stored key and server key (RFC 5802).
fn keys(password: &str, salt: &[u8; 16]) -> ([u8; 32], [u8; 32]) {
    let mut salted = hmac(password.as_bytes(), &[salt.as_slice(), &[0, 0, 0, 1]].concat());
    let mut last = salted;
    for _ in 1..ITERATIONS {
        last = hmac(password.as_bytes(), &last);
        salted.iter_mut().zip(last).for_each(|(sum, byte)| *sum ^= byte);
    }
    let stored = Sha256::digest(hmac(&salted, b"Client Key"));
    (stored.into(), hmac(&salted, b"Server Key"))
}

fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    // HMAC takes keys of any length; the type cannot say so.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_long_and_differ() {
        let environment = Environment::system();
        let (one, two) = (generate(&environment).unwrap(), generate(&environment).unwrap());
        assert_eq!(one.len(), PASSWORD_CHARS);
        assert_ne!(one, two);
        assert!(verifier(&one, &[7; 16]).starts_with("SCRAM-SHA-256$4096:BwcHBwcHBwcHBwcHBwcHBw==$"));
    }

    #[test]
    fn keys_are_those_of_the_example_in_rfc_7677() {
        let salt: [u8; 16] = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap().try_into().unwrap();
        let (_, server) = keys("pencil", &salt);
        let nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let message = format!("n=user,r=rOprNGfwEbeRWgbNEkqO,r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}");
        assert_eq!(BASE64.encode(hmac(&server, message.as_bytes())), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }
}
