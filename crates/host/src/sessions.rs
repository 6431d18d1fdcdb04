//! The supervisor's own sessions in the Postgres that it runs.
//!
//! Tenants can fill every place that ordinary sessions have, with commits that wait for the pageserver, and hold locks
//! of catalogues meanwhile. So all of ours are walsenders, which have places of their own. What the pageserver's
//! acknowledgements depend on ([`Sessions::flushed`]) is asked without a database, which needs no lock but one on
//! `pg_authid` ([`crate::waiters`] sees to that one). A session with a database may wait for the locks of commits;
//! whoever uses it says for how long.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use varve_postgres::Lsn;
use varve_protocol::ClientError;
use varve_protocol::connect::blocking::Connection;
use varve_protocol::connect::{ConnectConfig, Endpoint, Socket};
use varve_protocol::wire::Row;

use crate::{beneath, config};

/// How long Postgres may take to say where its WAL is.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Why a session came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// There is no connection.
    #[error("Postgres takes no connection: {0}")]
    Connect(#[source] io::Error),
    /// What Postgres or the connection to it says.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An answer that is none.
    #[error("Postgres says that its WAL is flushed up to '{0}', which is no position")]
    Position(String),
    /// The thread of the session ended early.
    #[error("a session of the supervisor: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Postgres's socket, in a folder where the tenant can make names: what is no socket of his Postgres's is not connected
/// to.
#[derive(Clone, Debug)]
pub struct PrivateSocket {
    folder: PathBuf,
    port: u16,
    uid: u32,
}

impl PrivateSocket {
    /// In this folder, of a Postgres that has this port and runs as this user.
    pub fn new(folder: impl Into<PathBuf>, port: u16, uid: u32) -> PrivateSocket {
        PrivateSocket { folder: folder.into(), port, uid }
    }

    /// Whether there is one, as a sign that connecting is worth while.
    pub fn exists(&self) -> bool {
        self.folder.join(self.name()).symlink_metadata().is_ok()
    }

    /// Connects. Never waits: a connection that Postgres has no room for is refused.
    ///
    /// # Errors
    /// When there is no socket of Postgres's, or it takes no connection.
    pub fn connect(&self) -> io::Result<UnixStream> {
        beneath::connect(&self.folder, &self.name(), self.uid)
    }

    fn name(&self) -> String {
        format!(".s.PGSQL.{}", self.port)
    }

    /// For messages.
    fn endpoint(&self) -> Endpoint {
        Endpoint::unix(self.folder.clone(), self.port)
    }
}

/// Where the sessions of one Postgres are had.
#[derive(Clone, Debug)]
pub struct Sessions {
    socket: PrivateSocket,
}

impl Sessions {
    /// Through this socket.
    pub fn new(socket: PrivateSocket) -> Sessions {
        Sessions { socket }
    }

    /// The socket.
    pub fn socket(&self) -> &PrivateSocket {
        &self.socket
    }

    /// Where its WAL is flushed to: everything that was ever acknowledged ends at or before.
    ///
    /// # Errors
    /// When Postgres does not answer.
    pub async fn flushed(&self) -> Result<Lsn, SessionError> {
        let config = self.config().parameter("replication", "true");
        let rows = self.run(config, "IDENTIFY_SYSTEM".to_owned(), ANSWER_MAX).await?;
        let text = rows.first().and_then(|row| row.get(2)).cloned().flatten().unwrap_or_default();
        text.parse().map_err(|_| SessionError::Position(text))
    }

    /// Gives the superuser the tenant's password, unless it has it. It does not wait for the pageserver.
    ///
    /// # Errors
    /// When Postgres refuses, or does not come to it within `limit`.
    pub async fn set_password(&self, verifier: &str, limit: Duration) -> Result<(), SessionError> {
        let select = "SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'".to_owned();
        let rows = self.run(self.database(), select, limit).await?;
        match rows.first() {
            Some(row) if row.first().and_then(Option::as_deref) != Some(verifier) => {
                let quoted = verifier.replace('\'', "''");
                self.run(self.database(), format!("ALTER ROLE postgres PASSWORD '{quoted}'"), limit).await?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes `synchronous_standby_names` out of what `ALTER SYSTEM` has set. A reload must follow.
    ///
    /// # Errors
    /// When Postgres refuses, or does not come to it in time.
    pub async fn take_back_standby_names(&self) -> Result<(), SessionError> {
        self.run(self.database(), "ALTER SYSTEM RESET synchronous_standby_names".to_owned(), ANSWER_MAX).await?;
        Ok(())
    }

    fn config(&self) -> ConnectConfig {
        ConnectConfig::new(self.socket.endpoint(), config::INTERNAL_ROLE).parameter("application_name", "varve supervisor")
    }

    fn database(&self) -> ConnectConfig {
        let config = self.config().parameter("replication", "database").parameter("database", "postgres");
        config.parameter("options", "-c synchronous_commit=local")
    }

    /// Runs one statement (a walsender of 14 takes no more at once), and gives its rows.
    async fn run(&self, config: ConnectConfig, statement: String, limit: Duration) -> Result<Vec<Row>, SessionError> {
        let socket = self.socket.clone();
        let session = move || -> Result<Vec<Row>, SessionError> {
            let stream = socket.connect().map_err(SessionError::Connect)?;
            let mut connection = Connection::over(Socket::Unix(stream), &config, limit)?;
            connection.set_read_timeout(Some(limit))?;
            Ok(connection.simple_query(&statement)?)
        };
        tokio::task::spawn_blocking(session).await?
    }
}
