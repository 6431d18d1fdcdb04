//! From nothing to a stream: connecting, making sure that this is the right server, and starting replication.

use std::time::{Duration, Instant};

use varve_postgres::Lsn;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_protocol::ClientError;
use varve_protocol::connect::blocking::Connection;
use varve_protocol::wire::backend::sqlstate;

use super::receiver::SessionEnd;
use super::shared::{ReceiverPhase, Shared};
use super::{ReceiverConfig, ReceiverError, server_version};

/// How long connecting and each answer to a question may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often `synchronous_standby_names` is looked at while it is not right.
const STANDBY_NAME_POLL: Duration = Duration::from_millis(100);
/// How often that is complained of.
const STANDBY_NAME_COMPLAINT: Duration = Duration::from_secs(30);

/// A connection on which WAL from `start` on is about to come.
pub(super) fn start(config: &ReceiverConfig, start: Lsn, shared: &Shared) -> Result<Connection, SessionEnd> {
    if start < config.base {
        let what = format!("asked to start at {start}, below the timeline's base {}, where its WAL is its ancestor's", config.base);
        return Err(ReceiverError::Refused { endpoint: config.connect.endpoint.to_string(), what }.into());
    }
    let connect = config.connect.clone().parameter("replication", "true").parameter("application_name", config.standby_name.as_str());
    let mut connection = Connection::connect_interruptibly(&connect, ANSWER_TIMEOUT, |closer| shared.set_closer(closer))?;
    connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    check_identity(config, &mut connection, start)?;
    await_standby_name(config, &mut connection, shared)?;
    let command = format!("START_REPLICATION PHYSICAL {start} TIMELINE {}", config.tli);
    match shared.send(|| connection.start_copy(&command))? {
        Ok(()) => Ok(connection),
        Err(ClientError::Server { message, .. }) if !sqlstate::is_transient(&message.code) => {
            let source = ClientError::Server { endpoint: connection.endpoint().to_owned(), message };
            Err(ReceiverError::Server { start, source }.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The server must be the one whose WAL this timeline takes.
fn check_identity(config: &ReceiverConfig, connection: &mut Connection, start: Lsn) -> Result<(), SessionEnd> {
    let endpoint = connection.endpoint().to_owned();
    let refused = |what: String| SessionEnd::from(ReceiverError::Refused { endpoint: endpoint.clone(), what });
    let rows = connection.simple_query("IDENTIFY_SYSTEM")?;
    let column = |index: usize| rows.first().and_then(|row| row.get(index)).and_then(Option::as_deref).unwrap_or_default();
    let (system_identifier, tli) = (column(0), column(1));
    if system_identifier != config.system_identifier.to_string() {
        return Err(refused(format!(
            "its system identifier is {system_identifier}, the tenant's is {}: this is another cluster",
            config.system_identifier
        )));
    }
    if tli != config.tli.to_string() {
        return Err(refused(format!(
            "it is on Postgres timeline {tli}, this branch is {}: it was promoted, or belongs to another branch",
            config.tli
        )));
    }
    // A walsender checks this too, but only after it has let us say that we have it.
    let end: Lsn = column(2).parse().unwrap_or(Lsn::INVALID);
    if end < start {
        return Err(refused(format!("its WAL ends at {end}, before {start} where ours does: it has lost WAL, or has another history")));
    }
    let version = show(connection, "server_version_num")?;
    server_version::check(&version, config.major).map_err(&refused)?;
    let segment_size = show(connection, "wal_segment_size")?;
    if segment_size != format!("{}MB", WAL_SEGMENT_SIZE >> 20) {
        return Err(refused(format!("its wal_segment_size is {segment_size}, only {}MB is supported", WAL_SEGMENT_SIZE >> 20)));
    }
    for (name, expected) in &config.settings {
        let found = match show(connection, name) {
            Ok(found) => found,
            // An unknown setting: the server was not started by us, or not for this.
            Err(ClientError::Server { message, .. }) if message.severity == "ERROR" => return Err(refused(message.message.clone())),
            Err(error) => return Err(error.into()),
        };
        if found != *expected {
            return Err(refused(format!("its {name} is '{found}', expected '{expected}': it was started for another timeline or epoch")));
        }
    }
    Ok(())
}

/// The server must wait for this standby before anything is taken from it: else what we acknowledge would release
/// nobody, or what another acknowledges would release those who count on us.
fn await_standby_name(config: &ReceiverConfig, connection: &mut Connection, shared: &Shared) -> Result<(), SessionEnd> {
    let Some(expected) = &config.synchronous_standby_names else { return Ok(()) };
    let mut complained: Option<Instant> = None;
    loop {
        let found = show(connection, "synchronous_standby_names")?;
        if found == *expected {
            return Ok(());
        }
        shared.set_phase(ReceiverPhase::WaitingForStandbyName);
        shared.set_trouble(&format!("synchronous_standby_names is '{found}', expected '{expected}'"));
        if complained.is_none_or(|at| at.elapsed() >= STANDBY_NAME_COMPLAINT) {
            tracing::error!(
                timeline = %config.label, server = connection.endpoint(), found, expected,
                "the primary's synchronous_standby_names is not as it must be: nothing is received or acknowledged until it is"
            );
            complained = Some(Instant::now());
        }
        shared.pause(STANDBY_NAME_POLL)?;
    }
}

/// The value of a setting.
fn show(connection: &mut Connection, name: &str) -> Result<String, ClientError> {
    let rows = connection.simple_query(&format!("SHOW {name}"))?;
    Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default())
}
