//! Tokens: secrets that a caller shows, random, never printed, and compared in a time that tells nothing.

use std::fmt;
use std::hint::black_box;

/// Bytes of chance in a token.
const RANDOM_BYTES: usize = 32;

/// A secret that opens a door. Neither `Debug` nor an error ever shows it.
#[derive(Clone)]
pub struct Token(String);

/// A text that cannot be a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token is one line of 16 to 4096 visible ASCII characters")]
pub struct TokenError;

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// When the system gives no chance.
    pub fn random() -> std::io::Result<Token> {
        let mut bytes = [0; RANDOM_BYTES];
        getrandom::fill(&mut bytes)?;
        let mut text = String::with_capacity(2 * RANDOM_BYTES);
        for byte in bytes {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        Ok(Token(text))
    }

    /// Takes a token from a text, such as a file's, without the white space around it.
    ///
    /// # Errors
    /// When it cannot be one.
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        let text = text.trim();
        let fits = (16..=4096).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Token(text.to_owned())).ok_or(TokenError)
    }

    /// The secret itself, for who sends or keeps it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether somebody showed this token.
    pub fn is(&self, shown: &[u8]) -> bool {
        same(self.0.as_bytes(), shown)
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Token) -> bool {
        self.is(other.0.as_bytes())
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(...)")
    }
}

/// Whether two secrets are the same, in a time that depends on the length of `shown` only.
pub fn same(secret: &[u8], shown: &[u8]) -> bool {
    let mut difference = u8::from(secret.len() != shown.len());
    for (at, byte) in shown.iter().enumerate() {
        difference |= byte ^ secret.get(at).copied().unwrap_or_default();
        // Keeps the compiler from leaving the loop at the first difference.
        difference = black_box(difference);
    }
    difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_one_that_was_made_and_shows_in_no_text() {
        let token = Token::random().unwrap();
        assert_eq!(Token::parse(&format!("{}\n", token.reveal())).unwrap(), token);
        assert_ne!(Token::random().unwrap(), token);
        assert!(!format!("{token:?}").contains(token.reveal()));
        for bad in ["", "short", "sixteen letters and a space", "0123456789abcdef\n0123456789abcdef"] {
            assert_eq!(Token::parse(bad), Err(TokenError), "{bad:?}");
        }
    }

    #[test]
    fn only_the_same_bytes_are_the_same() {
        assert!(same(b"secret", b"secret") && same(b"", b""));
        for other in [&b""[..], b"secre", b"secreT", b"secrets", b"Secret", b"secret\0"] {
            assert!(!same(b"secret", other), "{other:?}");
        }
    }
}
