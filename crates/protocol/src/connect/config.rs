//! Where a server is and as whom to go there.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::Credential;
use crate::wire::StartupPacket;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket as Postgres names it: `<directory>/.s.PGSQL.<port>`.
    Unix {
        /// The directory.
        directory: PathBuf,
        /// The port, which is only part of the name.
        port: u16,
    },
    /// A server that only another process reaches, which connects for us and hands the connection over.
    Handover {
        /// The Unix socket of that process.
        socket: PathBuf,
        /// What it wants to see.
        credential: Credential,
    },
}

impl Endpoint {
    /// A TCP endpoint.
    pub fn tcp(host: impl Into<String>, port: u16) -> Endpoint {
        Endpoint::Tcp { host: host.into(), port }
    }

    /// A Unix socket.
    pub fn unix(directory: impl Into<PathBuf>, port: u16) -> Endpoint {
        Endpoint::Unix { directory: directory.into(), port }
    }

    /// An endpoint whose connections are handed over on `socket` to who shows `credential`.
    pub fn handover(socket: impl Into<PathBuf>, credential: impl Into<Credential>) -> Endpoint {
        Endpoint::Handover { socket: socket.into(), credential: credential.into() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "{host}:{port}"),
            Endpoint::Unix { directory, port } => write!(f, "{}/.s.PGSQL.{port}", directory.display()),
            Endpoint::Handover { socket, .. } => write!(f, "{}", socket.display()),
        }
    }
}

/// A text that is no `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an endpoint: expected HOST:PORT, such as 127.0.0.1:6400")]
pub struct ParseEndpointError(String);

impl FromStr for Endpoint {
    type Err = ParseEndpointError;
    fn from_str(text: &str) -> Result<Endpoint, ParseEndpointError> {
        let parse = || {
            let (host, port) = text.rsplit_once(':')?;
            let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            let port = port.parse().ok()?;
            (!host.is_empty()).then(|| Endpoint::tcp(host, port))
        };
        parse().ok_or_else(|| ParseEndpointError(text.to_owned()))
    }
}

/// How to connect to a server that speaks the Postgres protocol.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectConfig {
    /// Where it is.
    pub endpoint: Endpoint,
    /// As whom.
    pub user: String,
    /// The password, if one may be asked for.
    pub password: Option<String>,
    /// More startup parameters: `database`, `application_name`, `replication`, settings.
    pub parameters: Vec<(String, String)>,
}

impl ConnectConfig {
    /// To `endpoint` as `user`, without a password.
    pub fn new(endpoint: Endpoint, user: impl Into<String>) -> ConnectConfig {
        ConnectConfig { endpoint, user: user.into(), password: None, parameters: Vec::new() }
    }

    /// With this password.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> ConnectConfig {
        self.password = Some(password.into());
        self
    }

    /// With one more startup parameter.
    #[must_use]
    pub fn parameter(mut self, name: impl Into<String>, value: impl Into<String>) -> ConnectConfig {
        self.parameters.push((name.into(), value.into()));
        self
    }

    /// The startup packet.
    pub fn startup_packet(&self) -> StartupPacket {
        let mut parameters = vec![("user".to_owned(), self.user.clone())];
        parameters.extend(self.parameters.iter().cloned());
        StartupPacket::Startup { minor_version: 0, parameters }
    }
}

impl fmt::Debug for ConnectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectConfig")
            .field("endpoint", &self.endpoint)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "..."))
            .field("parameters", &self.parameters)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_shows_in_no_text() {
        let config = ConnectConfig::new(Endpoint::handover("/run/varve/c1", "sesame"), "varve");
        let texts = format!("{config:?} {:?} {}", config.endpoint, config.endpoint);
        assert!(texts.contains("/run/varve/c1") && !texts.contains("sesame"), "{texts}");
    }
}
