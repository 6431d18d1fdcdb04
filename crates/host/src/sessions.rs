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
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use varve_api::host::Password;
use varve_postgres::Lsn;
use varve_protocol::ClientError;
use varve_protocol::connect::blocking::Connection;
use varve_protocol::connect::{ConnectConfig, Endpoint, Socket};
use varve_protocol::wire::backend::sqlstate;
use varve_protocol::wire::{Row, ServerMessage};

use crate::{beneath, config};

/// How long Postgres may take to say where its WAL is.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long a login may take until it counts as one that does not come through.
const LOGIN_MAX: Duration = Duration::from_secs(3);

/// Whether there is the superuser, whether he has a password, and which of ours he was given last.
const PASSWORD_QUERY: &str = "SELECT r.rolname, r.rolpassword, shobj_description(t.oid, 'pg_tablespace') \
                              FROM pg_tablespace t LEFT JOIN pg_authid r ON r.rolname = 'postgres' WHERE t.spcname = 'pg_global'";
/// The comment that says so, without the number.
const PASSWORD_COMMENT: &str = "varve password ";
/// Databases in which a session that needs one is tried. The first one that comes into a database after a start makes
/// a file that all later ones read, so it had better be where clients go.
const DATABASES: [&str; 2] = ["postgres", "template1"];
/// What Postgres says to a role that is not there or may not log in, and to one that lacks a right.
const LOCKED_OUT: [&str; 2] = ["28000", "42501"];
/// What it says of a database that is not there, or that takes no connections.
const NO_DATABASE: [&str; 2] = ["3D000", "55000"];
/// Versions before this one load libraries for walsenders, too.
const NO_LIBRARIES_FOR_WALSENDERS: u32 = 15;
/// From this version on there are event triggers at login.
const LOGIN_TRIGGERS: u32 = 17;
/// From this version on a walsender without a database says where a slot is.
const READS_SLOTS: u32 = 15;
/// Type and start of the pageserver's slot.
const READ_SLOT: &str = "READ_REPLICATION_SLOT varve";
/// The same, where that takes a database.
const SLOT_QUERY: &str = "SELECT slot_type, restart_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = 'varve'";
/// Nothing that a tenant sets for sessions, for roles or for databases counts in ours.
const NO_LIBRARIES: &str = "-c session_preload_libraries= -c local_preload_libraries=";
/// The same, in a session with a database.
const OUR_OWN: &str = "-c role=none -c default_transaction_read_only=off -c search_path=pg_catalog -c statement_timeout=0 \
                       -c lock_timeout=0 -c synchronous_commit=local";

/// How long a login into a database of which nothing was read yet may take.
const OPEN_MAX: Duration = Duration::from_secs(60);

/// The databases that take connections. One whose DROP was interrupted has a limit of -2.
const DATABASES_QUERY: &str = "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname";

/// How long a checkpoint may take.
const CHECKPOINT_MAX: Duration = Duration::from_secs(600);

/// A checkpoint that has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpointed {
    /// Its redo point.
    pub redo: Lsn,
    /// The oldest transaction that may still run, but for prepared ones.
    pub oldest_running: u32,
    /// Whether pages have checksums.
    pub checksums: bool,
}

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
    /// An answer that is none, about a checkpoint.
    #[error("Postgres says '{0}' of its checkpoint and transactions")]
    Checkpoint(String),
    /// The thread of the session ended early.
    #[error("a session of the supervisor: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl SessionError {
    /// What Postgres said, if it did.
    pub fn server(&self) -> Option<&ServerMessage> {
        match self {
            SessionError::Client(ClientError::Server { message, .. }) => Some(message),
            _ => None,
        }
    }

    /// Whether Postgres runs and says no, rather than that it is not ready yet.
    pub fn is_refusal(&self) -> bool {
        self.server().is_some_and(|message| !sqlstate::is_transient(&message.code))
    }

    /// Whether it says so because our role is not there, may not log in, or is no superuser any more.
    pub fn is_locked_out(&self) -> bool {
        self.server().is_some_and(|message| LOCKED_OUT.contains(&&*message.code))
    }
}

/// Postgres's socket, in a folder where the tenant can make names: what is no socket of his Postgres's is not connected
/// to.
#[derive(Clone, Debug)]
pub struct PrivateSocket {
    folder: PathBuf,
    port: u16,
    uid: u32,
    /// How often it was connected to.
    connects: Arc<AtomicU64>,
}

impl PrivateSocket {
    /// In this folder, of a Postgres that has this port and runs as this user.
    pub fn new(folder: impl Into<PathBuf>, port: u16, uid: u32) -> PrivateSocket {
        PrivateSocket { folder: folder.into(), port, uid, connects: Arc::default() }
    }

    /// Whether there is one, as a sign that connecting is worth while.
    pub fn exists(&self) -> bool {
        self.folder.join(self.name()).symlink_metadata().is_ok()
    }

    /// How often it was connected to, by us and for the pageserver.
    pub fn connects(&self) -> u64 {
        self.connects.load(Ordering::Relaxed)
    }

    /// Connects. Never waits: a connection that Postgres has no room for is refused.
    ///
    /// # Errors
    /// When there is no socket of Postgres's, or it takes no connection.
    pub fn connect(&self) -> io::Result<UnixStream> {
        self.connects.fetch_add(1, Ordering::Relaxed);
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
    pg_version: u32,
}

impl Sessions {
    /// Through this socket.
    pub fn new(socket: PrivateSocket, pg_version: u32) -> Sessions {
        Sessions { socket, pg_version }
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
        let rows = self.run(self.walsender(), |connection: &mut Connection| connection.simple_query("IDENTIFY_SYSTEM"), ANSWER_MAX).await?;
        let text = rows.first().and_then(|row| row.get(2)).cloned().flatten().unwrap_or_default();
        text.parse().map_err(|_| SessionError::Position(text))
    }

    /// A session that stays, to be asked what the pageserver's slot keeps. While WAL waits for room logins may not come
    /// through, and what has come through answers.
    ///
    /// # Errors
    /// When Postgres takes no connection, or not in time.
    pub async fn slot_session(&self) -> Result<SlotSession, SessionError> {
        let needs_database = self.pg_version < READS_SLOTS;
        let config = if needs_database { self.database(DATABASES[1]) } else { self.walsender() };
        let socket = self.socket.clone();
        let session = move || {
            let stream = socket.connect().map_err(SessionError::Connect)?;
            let mut connection = Connection::over(Socket::Unix(stream), &config, LOGIN_MAX)?;
            connection.set_read_timeout(Some(ANSWER_MAX))?;
            Ok(SlotSession { connection, query: if needs_database { SLOT_QUERY } else { READ_SLOT } })
        };
        tokio::task::spawn_blocking(session).await?
    }

    /// Gives the superuser the tenant's password, unless this history had it before. The first password is for a
    /// superuser who has none. Of each further one a comment on a tablespace that nobody can drop says that it was
    /// given: it is written in the same transaction, so neither is ever there without the other, in whatever branch or
    /// restore. It does not wait for the pageserver.
    ///
    /// # Errors
    /// When Postgres refuses, or does not come to it within `limit`.
    pub async fn set_password(&self, password: &Password, limit: Duration) -> Result<(), SessionError> {
        let Password { number, verifier } = password.clone();
        let work = move |connection: &mut Connection| {
            connection.simple_query("BEGIN")?;
            let rows = connection.simple_query(PASSWORD_QUERY)?;
            let column = |index: usize| rows.first().and_then(|row| row.get(index)).cloned().flatten();
            let (role, has_one) = (column(0).is_some(), column(1).is_some());
            let given: u32 = column(2).and_then(|text| text.strip_prefix(PASSWORD_COMMENT)?.parse().ok()).unwrap_or(1);
            let quoted = verifier.replace('\'', "''");
            if number == 1 && role && !has_one {
                connection.simple_query(&format!("ALTER ROLE postgres PASSWORD '{quoted}'"))?;
            } else if number > given {
                // Whoever rotates wants to get in.
                if !role {
                    connection.simple_query("CREATE ROLE postgres")?;
                }
                connection.simple_query(&format!("ALTER ROLE postgres LOGIN SUPERUSER PASSWORD '{quoted}'"))?;
                connection.simple_query(&format!("COMMENT ON TABLESPACE pg_global IS '{PASSWORD_COMMENT}{number}'"))?;
            }
            connection.simple_query("COMMIT")
        };
        self.in_a_database(work, limit).await?;
        Ok(())
    }

    /// Takes `synchronous_standby_names` out of what `ALTER SYSTEM` has set. A reload must follow.
    ///
    /// # Errors
    /// When Postgres refuses, or does not come to it in time.
    pub async fn take_back_standby_names(&self) -> Result<(), SessionError> {
        let work = |connection: &mut Connection| connection.simple_query("ALTER SYSTEM RESET synchronous_standby_names");
        self.in_a_database(work, ANSWER_MAX).await?;
        Ok(())
    }

    /// Makes a checkpoint that begins from now on, and waits until it, or a later one, has completed. Behind it is an
    /// empty commit that asks for the store to have what comes before it, which would take its time otherwise. Nobody
    /// waits for that commit, since its transaction wrote nothing.
    ///
    /// # Errors
    /// When Postgres refuses, or does not come to it in time.
    pub async fn checkpoint(&self) -> Result<Checkpointed, SessionError> {
        let work = |connection: &mut Connection| {
            for sql in ["CHECKPOINT", "BEGIN", "SET LOCAL synchronous_commit = remote_apply", "SELECT pg_current_xact_id()", "COMMIT"] {
                connection.simple_query(sql)?;
            }
            let mut rows = connection.simple_query("SELECT redo_lsn, current_setting('data_checksums') FROM pg_control_checkpoint()")?;
            // A transaction that gets its number after the first of these is no older than what it says.
            rows.extend(connection.simple_query("SELECT pg_snapshot_xmax(pg_current_snapshot())")?);
            rows.extend(connection.simple_query("SELECT backend_xid FROM pg_stat_get_activity(NULL) WHERE backend_xid IS NOT NULL")?);
            Ok(rows)
        };
        let rows = self.in_a_database(work, CHECKPOINT_MAX).await?;
        let column = |row: usize, column: usize| rows.get(row).and_then(|row| row.get(column)).cloned().flatten().unwrap_or_default();
        let wrong = || SessionError::Checkpoint(format!("{rows:?}"));
        let redo: Lsn = column(0, 0).parse().map_err(|_| wrong())?;
        // Numbers of snapshots say how often they began anew, those of backends do not.
        let next = column(1, 0).parse::<u64>().map_err(|_| wrong())? as u32;
        let mut oldest_running = next;
        for row in 2..rows.len() {
            let running: u32 = column(row, 0).parse().map_err(|_| wrong())?;
            if (running.wrapping_sub(oldest_running) as i32) < 0 {
                oldest_running = running;
            }
        }
        Ok(Checkpointed { redo, oldest_running, checksums: column(0, 1) != "off" })
    }

    /// How far the store has its WAL, as the pageserver said last; none while it does not receive any.
    ///
    /// # Errors
    /// When Postgres does not answer.
    pub async fn stored(&self) -> Result<Option<Lsn>, SessionError> {
        let work = |connection: &mut Connection| {
            connection.simple_query("SELECT min(replay_lsn) FROM pg_stat_get_wal_senders() WHERE sync_state = 'sync'")
        };
        let rows = self.in_a_database(work, ANSWER_MAX).await?;
        let Some(text) = rows.first().and_then(|row| row.first()).cloned().flatten() else { return Ok(None) };
        text.parse().map(Some).map_err(|_| SessionError::Position(text))
    }

    /// A session in this database that waits for each answer as long as that takes. Blocks.
    ///
    /// # Errors
    /// When Postgres takes no connection, or not in time.
    pub fn open(&self, database: &str) -> Result<Connection, SessionError> {
        let stream = self.socket.connect().map_err(SessionError::Connect)?;
        Ok(Connection::over(Socket::Unix(stream), &self.database(database), OPEN_MAX)?)
    }

    /// The databases that take connections, by name.
    ///
    /// # Errors
    /// When Postgres does not answer.
    pub async fn databases(&self) -> Result<Vec<String>, SessionError> {
        let work = |connection: &mut Connection| connection.simple_query(DATABASES_QUERY);
        let rows = self.in_a_database(work, OPEN_MAX).await?;
        Ok(rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
    }

    /// Does something for which any database will do. The session ends at once, so that it keeps nobody from dropping
    /// or copying that database.
    async fn in_a_database(&self, work: impl Work + Clone, limit: Duration) -> Result<Vec<Row>, SessionError> {
        let mut result = Ok(Vec::new());
        for database in DATABASES {
            result = self.run(self.database(database), work.clone(), limit).await;
            match &result {
                // It is not there, or takes no connections.
                Err(error) if error.server().is_some_and(|message| NO_DATABASE.contains(&&*message.code)) => {}
                _ => break,
            }
        }
        result
    }

    fn config(&self) -> ConnectConfig {
        let config = ConnectConfig::new(self.socket.endpoint(), config::INTERNAL_ROLE);
        config.parameter("application_name", "varve supervisor")
    }

    fn walsender(&self) -> ConnectConfig {
        let config = self.config().parameter("replication", "true");
        if self.pg_version < NO_LIBRARIES_FOR_WALSENDERS { config.parameter("options", NO_LIBRARIES) } else { config }
    }

    fn database(&self, name: &str) -> ConnectConfig {
        let triggers = if self.pg_version >= LOGIN_TRIGGERS { " -c event_triggers=off" } else { "" };
        let config = self.config().parameter("replication", "database").parameter("database", name);
        config.parameter("options", format!("{NO_LIBRARIES} {OUR_OWN}{triggers}").as_str())
    }

    /// Connects, works, and hangs up.
    async fn run(&self, config: ConnectConfig, work: impl Work, limit: Duration) -> Result<Vec<Row>, SessionError> {
        let socket = self.socket.clone();
        let session = move || {
            let stream = socket.connect().map_err(SessionError::Connect)?;
            let mut connection = Connection::over(Socket::Unix(stream), &config, limit)?;
            connection.set_read_timeout(Some(limit))?;
            Ok(work(&mut connection)?)
        };
        tokio::task::spawn_blocking(session).await?
    }
}

/// See [`Sessions::slot_session`].
pub struct SlotSession {
    connection: Connection,
    query: &'static str,
}

impl SlotSession {
    /// What WAL the pageserver's slot keeps: from where to where; none as long as there is no slot. Blocks.
    ///
    /// # Errors
    /// When Postgres does not answer.
    pub fn kept(&mut self) -> Result<Option<(Lsn, Lsn)>, SessionError> {
        let position = |text: String| text.parse().map_err(|_| SessionError::Position(text));
        let column = |rows: Vec<Row>, index: usize| rows.first().and_then(|row| row.get(index)).cloned().flatten();
        let Some(from) = column(self.connection.simple_query(self.query)?, 1) else { return Ok(None) };
        let to = column(self.connection.simple_query("IDENTIFY_SYSTEM")?, 2).unwrap_or_default();
        Ok(Some((position(from)?, position(to)?)))
    }
}

/// What a session does: one statement after the other, since a walsender of 14 takes no more at once.
trait Work: FnOnce(&mut Connection) -> Result<Vec<Row>, ClientError> + Send + 'static {}
impl<F: FnOnce(&mut Connection) -> Result<Vec<Row>, ClientError> + Send + 'static> Work for F {}
