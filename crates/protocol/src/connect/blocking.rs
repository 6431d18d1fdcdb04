//! A blocking connection to a server that speaks the Postgres protocol, for code that has a thread of its own.

use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::{AuthStep, Authenticator, ClientError, ConnectConfig, InputBuffer, Socket, SocketCloser};
use crate::wire::{BackendMessage, Frame, Row, ServerMessage, backend::BACKEND_BODY_SIZE_MAX, frontend};

/// Most rows that a simple query may bring.
const ROWS_MAX: usize = 100_000;

/// A session: connected, authenticated, ready for a query.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    input: InputBuffer,
    output: BytesMut,
    endpoint: String,
    parameters: Vec<(String, String)>,
    read_timeout: Option<Duration>,
}

/// What one read brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Received {
    /// Bytes; `more` says that the socket may hold further ones already.
    Bytes {
        /// The read filled all the room it had.
        more: bool,
    },
    /// Nothing came within the read timeout.
    Nothing,
    /// The peer closed its side.
    Closed,
}

impl Connection {
    /// Connects, authenticates, and waits until the server is ready, all within about `timeout`.
    ///
    /// # Errors
    /// [`ClientError`] says what went wrong.
    pub fn connect(config: &ConnectConfig, timeout: Duration) -> Result<Connection, ClientError> {
        Self::connect_interruptibly(config, timeout, |_| {})
    }

    /// The same; `connected` gets a way to end the connection from another thread, as soon as there is one.
    ///
    /// # Errors
    /// [`ClientError`] says what went wrong.
    pub fn connect_interruptibly(
        config: &ConnectConfig,
        timeout: Duration,
        connected: impl FnOnce(SocketCloser),
    ) -> Result<Connection, ClientError> {
        Self::start(Socket::connect(&config.endpoint, timeout)?, config, timeout, connected)
    }

    /// The same on a socket that is connected already, to what `config` names as its endpoint.
    ///
    /// # Errors
    /// [`ClientError`] says what went wrong.
    pub fn over(socket: Socket, config: &ConnectConfig, timeout: Duration) -> Result<Connection, ClientError> {
        Self::start(socket, config, timeout, |_| {})
    }

    fn start(
        socket: Socket,
        config: &ConnectConfig,
        timeout: Duration,
        connected: impl FnOnce(SocketCloser),
    ) -> Result<Connection, ClientError> {
        let endpoint = config.endpoint.to_string();
        connected(socket.closer().map_err(|source| ClientError::io(&endpoint, "cannot duplicate the socket", source))?);
        let mut connection = Connection {
            socket,
            input: InputBuffer::default(),
            output: BytesMut::new(),
            endpoint,
            parameters: Vec::new(),
            read_timeout: None,
        };
        connection.set_read_timeout(Some(timeout))?;
        connection.set_write_timeout(Some(timeout))?;
        config.startup_packet().encode(&mut connection.output);
        connection.flush()?;
        connection.authenticate(config)?;
        connection.set_read_timeout(None)?;
        connection.set_write_timeout(None)?;
        Ok(connection)
    }

    fn authenticate(&mut self, config: &ConnectConfig) -> Result<(), ClientError> {
        let mut authenticator = Authenticator::new(&config.user, config.password.as_deref());
        loop {
            match self.message()? {
                BackendMessage::Authentication(request) => {
                    let step = authenticator.respond(&request, &mut self.output).map_err(|what| ClientError::Authentication {
                        endpoint: self.endpoint.clone(),
                        user: config.user.clone(),
                        what,
                    })?;
                    if step == AuthStep::Continue {
                        self.flush()?;
                    }
                }
                BackendMessage::ParameterStatus { name, value } => self.parameters.push((name, value)),
                BackendMessage::BackendKeyData | BackendMessage::NoticeResponse(_) | BackendMessage::Other(_) => {}
                BackendMessage::ReadyForQuery(_) => return Ok(()),
                BackendMessage::ErrorResponse(error) => return Err(self.server_error(error)),
                other => return Err(self.unexpected("ReadyForQuery", &other)),
            }
        }
    }

    /// The server, for messages.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A parameter that the server reported at the start, such as `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// How long [`Connection::receive`] waits; `None` is for ever.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        if timeout != self.read_timeout {
            self.socket.set_read_timeout(timeout).map_err(|source| ClientError::io(&self.endpoint, "cannot set a timeout", source))?;
            self.read_timeout = timeout;
        }
        Ok(())
    }

    /// How long a write waits for the server to take something; `None` is for ever.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.socket.set_write_timeout(timeout).map_err(|source| ClientError::io(&self.endpoint, "cannot set a timeout", source))
    }

    /// Where messages to the server are appended, to go with the next [`Connection::flush`].
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Sends what was appended to [`Connection::output`].
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let result = self.socket.write_all(&self.output);
        self.output.clear();
        result.map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => ClientError::io(&self.endpoint, "cannot send", io::ErrorKind::TimedOut.into()),
            _ => ClientError::io(&self.endpoint, "cannot send", source),
        })
    }

    /// One read from the socket, which waits as long as the read timeout says.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn receive(&mut self) -> Result<Received, ClientError> {
        self.receive_with(Socket::read)
    }

    /// What the socket holds already, without waiting.
    ///
    /// # Errors
    /// [`ClientError::Io`].
    pub fn receive_now(&mut self) -> Result<Received, ClientError> {
        self.receive_with(Socket::read_now)
    }

    fn receive_with(&mut self, mut read: impl FnMut(&mut Socket, &mut [u8]) -> io::Result<usize>) -> Result<Received, ClientError> {
        loop {
            return match self.input.read_with(|room| read(&mut self.socket, room)) {
                Ok((0, _)) => Ok(Received::Closed),
                Ok((_, more)) => Ok(Received::Bytes { more }),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(Received::Nothing),
                Err(source) => Err(ClientError::io(&self.endpoint, "cannot receive", source)),
            };
        }
    }

    /// The next whole frame among what was received: its tag and body, valid until the next call. Does no I/O.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] when the bytes are no frame.
    pub fn take_frame(&mut self) -> Result<Option<(u8, &[u8])>, ClientError> {
        self.input.take_frame(BACKEND_BODY_SIZE_MAX).map_err(|error| ClientError::wire(&self.endpoint, &error))
    }

    /// The next message, waiting for it as long as the read timeout says.
    ///
    /// # Errors
    /// [`ClientError`] says what went wrong; an error that the server reports is a message here.
    pub fn message(&mut self) -> Result<BackendMessage, ClientError> {
        loop {
            let frame = self.input.take_frame(BACKEND_BODY_SIZE_MAX).map_err(|error| ClientError::wire(&self.endpoint, &error))?;
            if let Some((tag, body)) = frame {
                let frame = Frame { tag, body: Bytes::copy_from_slice(body) };
                return BackendMessage::decode(frame).map_err(|error| ClientError::wire(&self.endpoint, &error));
            }
            match self.receive()? {
                Received::Bytes { .. } => {}
                Received::Nothing => return Err(self.timed_out()),
                Received::Closed => return Err(ClientError::Closed { endpoint: self.endpoint.clone() }),
            }
        }
    }

    /// Runs one simple query and gives its rows.
    ///
    /// # Errors
    /// [`ClientError::Server`] when the query failed; the connection can be used again then.
    pub fn simple_query(&mut self, sql: &str) -> Result<Vec<Row>, ClientError> {
        frontend::query(sql, &mut self.output);
        self.flush()?;
        let mut rows = Vec::new();
        let mut error = None;
        loop {
            match self.message()? {
                BackendMessage::DataRow(row) if rows.len() < ROWS_MAX => rows.push(row),
                BackendMessage::DataRow(_) => {
                    return Err(ClientError::protocol(&self.endpoint, format!("'{sql}' brought more than {ROWS_MAX} rows")));
                }
                BackendMessage::ErrorResponse(message) => {
                    if message.severity == "FATAL" || message.severity == "PANIC" {
                        return Err(self.server_error(message));
                    }
                    error = Some(message);
                }
                BackendMessage::ReadyForQuery(_) => match error {
                    Some(message) => return Err(self.server_error(message)),
                    None => return Ok(rows),
                },
                BackendMessage::RowDescription(_)
                | BackendMessage::CommandComplete(_)
                | BackendMessage::EmptyQueryResponse
                | BackendMessage::NoticeResponse(_)
                | BackendMessage::ParameterStatus { .. }
                | BackendMessage::Other(_) => {}
                other => return Err(self.unexpected("rows", &other)),
            }
        }
    }

    /// Runs a query that answers with a COPY, and returns when the COPY has begun.
    ///
    /// # Errors
    /// [`ClientError::Server`] when the server refused.
    pub fn start_copy(&mut self, sql: &str) -> Result<(), ClientError> {
        frontend::query(sql, &mut self.output);
        self.flush()?;
        loop {
            match self.message()? {
                BackendMessage::CopyBothResponse | BackendMessage::CopyOutResponse => return Ok(()),
                BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
                BackendMessage::ErrorResponse(error) => return Err(self.server_error(error)),
                other => return Err(self.unexpected("a COPY", &other)),
            }
        }
    }

    pub(crate) fn server_error(&self, message: ServerMessage) -> ClientError {
        ClientError::server(&self.endpoint, message)
    }

    pub(crate) fn timed_out(&self) -> ClientError {
        ClientError::TimedOut { endpoint: self.endpoint.clone(), seconds: self.read_timeout.map_or(0, |timeout| timeout.as_secs()) }
    }

    pub(crate) fn unexpected(&self, expected: &str, found: &BackendMessage) -> ClientError {
        let found: String = format!("{found:?}").chars().take(200).collect();
        ClientError::protocol(&self.endpoint, format!("expected {expected}, got {found}"))
    }
}
