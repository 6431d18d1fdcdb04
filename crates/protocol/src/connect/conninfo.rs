//! libpq connection strings, `postgresql://...` or `host=... user=...`, as far as a single server without TLS goes.

use tokio_postgres::config::{Host, SslMode};

use super::{ConnectConfig, Endpoint};

/// The port of a connection string that has none.
const DEFAULT_PORT: u16 = 5432;
/// The user of a connection string that has none.
const DEFAULT_USER: &str = "postgres";

/// A text that is no connection string, or one that asks for what we cannot do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the connection string {0}")]
pub struct ParseConninfoError(String);

impl ConnectConfig {
    /// Where a libpq connection string leads, a URI or `key=value` words. The database is a startup parameter, if there
    /// is one.
    ///
    /// # Errors
    /// [`ParseConninfoError`] says what cannot be understood or done.
    pub fn from_conninfo(text: &str) -> Result<ConnectConfig, ParseConninfoError> {
        let wrong = |what: &str| ParseConninfoError(what.to_owned());
        let parsed: tokio_postgres::Config = text.parse().map_err(|error: tokio_postgres::Error| {
            let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            ParseConninfoError(format!(
                "cannot be understood: {reason}; write postgresql://USER@HOST:PORT/DATABASE or host=... port=... user=..."
            ))
        })?;
        if parsed.get_ssl_mode() == SslMode::Require {
            return Err(wrong("asks for TLS, which this version cannot do: connect over loopback or a tunnel, with sslmode=prefer"));
        }
        let port = match parsed.get_ports() {
            [] => DEFAULT_PORT,
            [port] => *port,
            _ => return Err(wrong("names several ports: name one server")),
        };
        let endpoint = match parsed.get_hosts() {
            [] => return Err(wrong("names no host: add host=127.0.0.1, or the directory of a Unix socket")),
            [Host::Tcp(host)] => Endpoint::tcp(host.clone(), port),
            [Host::Unix(directory)] => Endpoint::unix(directory.clone(), port),
            _ => return Err(wrong("names several hosts: name one server")),
        };
        let mut config = ConnectConfig::new(endpoint, parsed.get_user().unwrap_or(DEFAULT_USER));
        if let Some(password) = parsed.get_password() {
            config = config.password(String::from_utf8_lossy(password));
        }
        if let Some(database) = parsed.get_dbname() {
            config = config.parameter("database", database);
        }
        if let Some(options) = parsed.get_options() {
            config = config.parameter("options", options);
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_understood() {
        let uri = ConnectConfig::from_conninfo("postgresql://me:p%40ss@10.0.0.1:5433/shop").unwrap();
        assert_eq!((uri.endpoint, &uri.user[..], uri.password.as_deref()), (Endpoint::tcp("10.0.0.1", 5433), "me", Some("p@ss")));
        assert_eq!(uri.parameters, [("database".to_owned(), "shop".to_owned())]);
        let words = ConnectConfig::from_conninfo("host=/run/postgresql user='the boss'").unwrap();
        assert_eq!((words.endpoint, &words.user[..]), (Endpoint::unix("/run/postgresql", 5432), "the boss"));
        assert_eq!(words.password, None);
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        for (text, why) in [
            ("postgresql://", "names no host"),
            ("host=a,b", "several hosts"),
            ("host=a sslmode=require", "TLS"),
            ("host=a colour=red", "colour"),
        ] {
            let error = ConnectConfig::from_conninfo(text).expect_err(text).to_string();
            assert!(error.contains(why), "{text}: expected '{why}' in '{error}'");
        }
    }
}
