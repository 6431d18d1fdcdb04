//! The client's side of authentication: trust, password, MD5 and SCRAM-SHA-256.

use bytes::BytesMut;
use postgres_protocol::authentication::{
    md5_hash,
    sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
};

use crate::wire::{AuthRequest, frontend};

/// Most rounds of key derivation that a server may ask for (`postgres` uses 4,096 unless told otherwise): each costs
/// about a microsecond.
const SCRAM_ITERATIONS_MAX: u32 = 1_000_000;

/// What to do after a request of the server's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuthStep {
    /// Send what was appended, and wait for the next request.
    Continue,
    /// The client is in.
    Done,
}

/// Answers a server's [`AuthRequest`]s.
pub struct Authenticator {
    user: String,
    password: Option<String>,
    scram: Option<ScramSha256>,
    scram_verified: bool,
}

impl Authenticator {
    /// For `user`, with the password, if there is one.
    pub fn new(user: &str, password: Option<&str>) -> Authenticator {
        Authenticator { user: user.to_owned(), password: password.map(str::to_owned), scram: None, scram_verified: false }
    }

    fn need_password(&self) -> Result<&str, String> {
        self.password.as_deref().ok_or_else(|| "the server asks for a password and none was given".to_owned())
    }

    /// Appends the answer to `request`.
    ///
    /// # Errors
    /// Says why the client cannot or will not answer.
    pub fn respond(&mut self, request: &AuthRequest, out: &mut BytesMut) -> Result<AuthStep, String> {
        match request {
            AuthRequest::Ok if self.scram.is_some() && !self.scram_verified => {
                return Err("the server did not prove that it knows the password".to_owned());
            }
            AuthRequest::Ok => return Ok(AuthStep::Done),
            AuthRequest::CleartextPassword => frontend::password(self.need_password()?, out),
            AuthRequest::Md5Password(salt) => {
                let hash = md5_hash(self.user.as_bytes(), self.need_password()?.as_bytes(), *salt);
                frontend::password(&hash, out);
            }
            AuthRequest::Sasl(mechanisms) => {
                if !mechanisms.iter().any(|mechanism| mechanism == SCRAM_SHA_256) {
                    return Err(format!("the server offers {}, expected {SCRAM_SHA_256}", mechanisms.join(", ")));
                }
                let scram = ScramSha256::new(self.need_password()?.as_bytes(), ChannelBinding::unsupported());
                frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), out);
                self.scram = Some(scram);
            }
            AuthRequest::SaslContinue(data) => {
                check_iterations(data)?;
                let scram = self.scram.as_mut().ok_or("the server continues a SASL exchange that did not begin")?;
                scram.update(data).map_err(|error| error.to_string())?;
                frontend::sasl_response(scram.message(), out);
            }
            AuthRequest::SaslFinal(data) => {
                let scram = self.scram.as_mut().ok_or("the server ends a SASL exchange that did not begin")?;
                scram.finish(data).map_err(|error| error.to_string())?;
                self.scram_verified = true;
            }
            AuthRequest::Unsupported(number) => {
                return Err(format!(
                    "the server asks for authentication method {number}; trust, password, md5 and SCRAM-SHA-256 are supported"
                ));
            }
        }
        Ok(AuthStep::Continue)
    }
}

/// The server names the number of rounds; one that lies must not make us work for hours.
fn check_iterations(data: &[u8]) -> Result<(), String> {
    let rounds = data.split(|&b| b == b',').find_map(|part| part.strip_prefix(b"i="));
    let Some(rounds) = rounds.and_then(|rounds| std::str::from_utf8(rounds).ok()) else { return Ok(()) };
    match rounds.parse::<u32>() {
        Ok(rounds) if rounds > SCRAM_ITERATIONS_MAX => {
            Err(format!("the server asks for {rounds} SCRAM rounds, at most {SCRAM_ITERATIONS_MAX} are accepted"))
        }
        _ => Ok(()),
    }
}
