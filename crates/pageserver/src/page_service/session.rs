//! A client's session: logging in, then one command after the other, by the simple or the extended query protocol.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use tokio::time::{Instant, timeout, timeout_at};
use varve_protocol::wire::{
    AuthRequest, FrontendMessage, ServerMessage, StartupPacket, backend, backend::sqlstate, frontend::FRONTEND_BODY_SIZE_MAX, take_frame,
};

use super::connection::{Connection, End};
use super::page_stream::{PageStream, StreamEnd, put_end};
use super::pool::FairPool;
use super::shares::{Share, Shares};
use super::{Command, PageSource, TimelinePages, backup};

/// Requests for encryption that a client may make before it starts.
const ENCRYPTION_REQUESTS_MAX: usize = 4;
/// What we say we are, since drivers want to know; only the major matters to them.
const SERVER_VERSION: &str = concat!("15.0 (Varve ", env!("CARGO_PKG_VERSION"), ")");

/// What sessions share.
pub(super) struct Shared {
    pub(super) source: Arc<dyn PageSource>,
    /// Answers requests.
    pub(super) jobs: FairPool,
    /// Makes base backups into memory.
    pub(super) backups: FairPool,
    /// Makes base backups as fast as they are taken.
    pub(super) full_backups: FairPool,
    /// Base backups in memory.
    pub(super) backups_of_tenant: Shares,
    /// Connections with a command.
    pub(super) connections_of_tenant: Shares,
}

/// A session on a connection.
pub(super) struct Session<'a> {
    connection: &'a mut Connection,
    shared: Arc<Shared>,
    /// The unnamed prepared statement.
    prepared: String,
    /// After an error in the extended protocol everything up to the next Sync is skipped.
    skipping: bool,
    /// The connection's place among those of the tenant that its last command was about. Who has none has to command
    /// something soon.
    share: Option<Share>,
    /// When a client without a share has to go.
    deadline: Instant,
}

impl<'a> Session<'a> {
    pub(super) fn new(connection: &'a mut Connection, shared: Arc<Shared>) -> Session<'a> {
        Session { connection, shared, prepared: String::new(), skipping: false, share: None, deadline: Instant::now() }
    }

    /// From the first byte to the end.
    pub(super) async fn run(mut self) -> End {
        let limit = self.connection.config().handshake_timeout;
        let result = match timeout(limit, log_in(self.connection)).await {
            Ok(Ok(())) => {
                self.deadline = Instant::now() + limit;
                self.commands().await
            }
            Ok(Err(end)) => Err(end),
            Err(_) => Err(End::Fatal(ServerMessage::fatal(
                sqlstate::PROTOCOL_VIOLATION,
                format!("no startup packet within {} s", limit.as_secs()),
            ))),
        };
        match result {
            Ok(()) => End::Over,
            Err(end) => end,
        }
    }

    async fn commands(&mut self) -> Result<(), End> {
        loop {
            let message = self.message().await?;
            if matches!(message, FrontendMessage::Terminate) {
                return Ok(());
            }
            self.handle(message).await?;
        }
    }

    async fn message(&mut self) -> Result<FrontendMessage, End> {
        loop {
            if let Some(frame) = take_frame(&mut self.connection.input, FRONTEND_BODY_SIZE_MAX)? {
                return Ok(FrontendMessage::decode(frame)?);
            }
            self.connection.flush().await?;
            if self.share.is_some() {
                self.connection.fill().await?;
            } else if Instant::now() >= self.deadline {
                return Err(self.silent()); // also one that goes on and on about nothing
            } else {
                timeout_at(self.deadline, self.connection.fill()).await.map_err(|_| self.silent())??;
            }
        }
    }

    fn silent(&self) -> End {
        let limit = self.connection.config().handshake_timeout.as_secs();
        let message = format!("closing the connection: no command about a timeline within {limit} s of logging in");
        End::Fatal(ServerMessage::fatal(sqlstate::IDLE_SESSION_TIMEOUT, message))
    }

    async fn handle(&mut self, message: FrontendMessage) -> Result<(), End> {
        match message {
            FrontendMessage::Sync => {
                self.skipping = false;
                backend::ready_for_query(&mut self.connection.output);
            }
            _ if self.skipping => {}
            FrontendMessage::Query(text) => {
                if let Err(error) = self.run_command(&text).await? {
                    backend::error_response(&error, &mut self.connection.output);
                }
                backend::ready_for_query(&mut self.connection.output);
            }
            FrontendMessage::Parse { query, .. } => {
                self.prepared = query;
                backend::empty(b'1', &mut self.connection.output);
            }
            FrontendMessage::Bind { .. } => backend::empty(b'2', &mut self.connection.output),
            FrontendMessage::Close => backend::empty(b'3', &mut self.connection.output),
            FrontendMessage::Describe => {
                backend::no_parameters(&mut self.connection.output);
                backend::empty(b'n', &mut self.connection.output);
            }
            FrontendMessage::Execute => {
                let text = self.prepared.clone();
                if let Err(error) = self.run_command(&text).await? {
                    backend::error_response(&error, &mut self.connection.output);
                    self.skipping = true;
                }
            }
            FrontendMessage::Flush => self.connection.flush().await?,
            // Left over from a COPY that we ended: Postgres ignores these, too.
            FrontendMessage::CopyData(_) | FrontendMessage::CopyDone | FrontendMessage::CopyFail(_) => {}
            FrontendMessage::Password(_) => {
                return Err(End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, "a password that nobody asked for")));
            }
            FrontendMessage::Terminate => {}
        }
        Ok(())
    }

    /// Runs one command. The inner error is the client's to hear, the outer one ends the connection.
    async fn run_command(&mut self, text: &str) -> Result<Result<(), ServerMessage>, End> {
        let command = match Command::parse(text) {
            Ok(command) => command,
            Err(error) => return Ok(Err(error)),
        };
        tracing::debug!(peer = %self.connection.peer, ?command, "command");
        match command {
            Command::Empty => backend::empty(b'I', &mut self.connection.output),
            Command::Set => backend::command_complete("SET", &mut self.connection.output),
            Command::Lease { tenant, timeline, lsn } => {
                let timeline = match self.resolve(tenant, timeline).await? {
                    Ok(timeline) => timeline,
                    Err(error) => return Ok(Err(error)),
                };
                match self.connection.wait_unread(timeline.lease(lsn)).await? {
                    Ok(until) => {
                        backend::text_row("valid_until", &until, &mut self.connection.output);
                        backend::command_complete("SELECT 1", &mut self.connection.output);
                    }
                    Err(error) => return Ok(Err(ServerMessage::error(error.sqlstate(), error.to_string()))),
                }
            }
            Command::PageStream { version, tenant, timeline } => {
                tracing::info!(peer = %self.connection.peer, tenant, timeline, "page stream");
                let timeline = match self.resolve(tenant, timeline).await? {
                    Ok(timeline) => timeline,
                    Err(error) => return Ok(Err(error)),
                };
                backend::copy_both_response(&mut self.connection.output);
                match PageStream::new(version, self.connection, timeline, self.shared.jobs.clone()).run().await? {
                    StreamEnd::Done => put_end(&mut self.connection.output),
                    StreamEnd::GivenUp => {
                        tracing::debug!(peer = %self.connection.peer, "the client gave up its page stream");
                        return Ok(Err(ServerMessage::error(sqlstate::QUERY_CANCELED, "the client gave up the page stream")));
                    }
                }
            }
            Command::Backup { tenant, timeline, lsn, gzip, options } => {
                tracing::info!(peer = %self.connection.peer, tenant, timeline, ?lsn, gzip, ?options, "base backup");
                let timeline = match self.resolve(tenant, timeline).await? {
                    Ok(timeline) => timeline,
                    Err(error) => return Ok(Err(error)),
                };
                let order = backup::Order { timeline, lsn, gzip, options };
                match backup::send(self.connection, order, &self.shared).await? {
                    Ok(()) => backend::command_complete("COPY 0", &mut self.connection.output),
                    Err(error) => return Ok(Err(error)),
                }
            }
        }
        Ok(Ok(()))
    }

    /// The timeline that a command names, and a place among its tenant's connections.
    async fn resolve(&mut self, tenant: String, timeline: String) -> Result<Result<Arc<dyn TimelinePages>, ServerMessage>, End> {
        // No place is held for this: however long it takes, and whatever hangs, others are served.
        let source = self.shared.source.clone();
        let found = AssertUnwindSafe(source.resolve(&tenant, &timeline)).catch_unwind();
        let found = self.connection.wait_unread(found).await?.map_err(|_| {
            End::Fatal(ServerMessage::fatal(
                sqlstate::INTERNAL_ERROR,
                "internal error while looking for the timeline; the server's log has more",
            ))
        })?;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                tracing::info!(peer = %self.connection.peer, %error, "page service command refused");
                return Ok(Err(ServerMessage::error(error.sqlstate(), error.to_string())));
            }
        };
        if self.share.as_ref().is_none_or(|share| share.tenant() != found.tenant()) {
            let shares = &self.shared.connections_of_tenant;
            self.share = shares.try_take(found.tenant());
            if self.share.is_none() {
                let message =
                    format!("all {} connections that tenant {tenant} may have are taken: try again later", shares.of_tenant_max());
                return Err(End::Fatal(ServerMessage::fatal(sqlstate::TOO_MANY_CONNECTIONS, message)));
            }
        }
        Ok(Ok(found))
    }
}

/// Everything up to the first `ReadyForQuery`.
async fn log_in(connection: &mut Connection) -> Result<(), End> {
    for _ in 0..ENCRYPTION_REQUESTS_MAX {
        match startup_packet(connection).await? {
            StartupPacket::SslRequest | StartupPacket::GssEncRequest => {
                connection.output.extend_from_slice(b"N");
                connection.flush().await?;
            }
            StartupPacket::CancelRequest { .. } => return Err(End::Over), // nothing here can be cancelled
            StartupPacket::Startup { minor_version, parameters } => {
                let out = &mut connection.output;
                if minor_version > 0 || parameters.iter().any(|(name, _)| name.starts_with("_pq_.")) {
                    backend::negotiate_protocol_version(out);
                }
                backend::authentication(&AuthRequest::Ok, out);
                for (name, value) in [
                    ("server_version", SERVER_VERSION),
                    ("server_encoding", "UTF8"),
                    ("client_encoding", "UTF8"),
                    ("DateStyle", "ISO, MDY"),
                    ("integer_datetimes", "on"),
                    ("standard_conforming_strings", "on"),
                ] {
                    backend::parameter_status(name, value, out);
                }
                backend::backend_key_data(0, 0, out);
                backend::ready_for_query(out);
                return connection.flush().await;
            }
        }
    }
    Err(End::Fatal(ServerMessage::fatal(sqlstate::PROTOCOL_VIOLATION, "encryption was asked for again and again; this listener has none")))
}

async fn startup_packet(connection: &mut Connection) -> Result<StartupPacket, End> {
    loop {
        if let Some(packet) = StartupPacket::take(&mut connection.input)? {
            return Ok(packet);
        }
        connection.fill().await?;
    }
}

/// Tells a client for whom there is no place.
pub(super) async fn refuse(mut connection: Connection, why: ServerMessage) {
    let limit = connection.config().handshake_timeout;
    // Its first words are read, because closing with unread input would discard what we say.
    match timeout(limit, startup_packet(&mut connection)).await {
        Ok(Ok(_)) => connection.close(&End::Fatal(why)).await,
        _ => connection.close(&End::Over).await,
    }
}
