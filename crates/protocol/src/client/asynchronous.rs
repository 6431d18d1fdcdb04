//! A session with a page service, for async code.

use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use varve_postgres::Lsn;

use super::{BaseBackupOptions, PageStream, command};
use crate::connect::{AuthStep, Authenticator, ClientError, ConnectConfig, Endpoint, Socket};
use crate::wire::{BackendMessage, backend::BACKEND_BODY_SIZE_MAX, frontend, take_frame};

/// Bytes that one read asks for at least.
const READ_SIZE: usize = 64 * 1024;

/// How long a handover of a connection may take.
const HANDOVER_MAX: Duration = Duration::from_secs(30);

/// Either kind of socket.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A session with a page service that has not begun a command. A broken one stays broken: to connect again is the
/// caller's business.
pub struct PageClient {
    pub(super) socket: Box<dyn Transport>,
    pub(super) input: BytesMut,
    pub(super) endpoint: String,
}

/// A connection that another process makes, without blocking the executor's thread.
async fn handed_over(endpoint: Endpoint) -> Result<UnixStream, ClientError> {
    let name = endpoint.to_string();
    let failed = |source| ClientError::io(&name, "cannot connect", source);
    let socket = tokio::task::spawn_blocking(move || Socket::connect(&endpoint, HANDOVER_MAX));
    match socket.await.map_err(|error| failed(std::io::Error::other(error)))?? {
        Socket::Unix(stream) => {
            stream.set_nonblocking(true).map_err(failed)?;
            UnixStream::from_std(stream).map_err(failed)
        }
        Socket::Tcp(_) => Err(failed(std::io::ErrorKind::Unsupported.into())),
    }
}

impl PageClient {
    /// Connects and authenticates.
    ///
    /// # Errors
    /// [`ClientError`] says what went wrong. There is no timeout: the caller sets one around it.
    pub async fn connect(config: &ConnectConfig) -> Result<PageClient, ClientError> {
        let endpoint = config.endpoint.to_string();
        let failed = |source| ClientError::io(&endpoint, "cannot connect", source);
        let socket: Box<dyn Transport> = match &config.endpoint {
            Endpoint::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                Box::new(stream)
            }
            Endpoint::Unix { .. } => Box::new(UnixStream::connect(Path::new(&endpoint)).await.map_err(failed)?),
            Endpoint::Handover { .. } => Box::new(handed_over(config.endpoint.clone()).await?),
        };
        let mut client = PageClient { socket, input: BytesMut::new(), endpoint };
        client.log_in(config).await?;
        Ok(client)
    }

    async fn log_in(&mut self, config: &ConnectConfig) -> Result<(), ClientError> {
        let mut output = BytesMut::new();
        config.startup_packet().encode(&mut output);
        self.send(&output).await?;
        let mut authenticator = Authenticator::new(&config.user, config.password.as_deref());
        loop {
            match self.message().await? {
                BackendMessage::Authentication(request) => {
                    output.clear();
                    let step = authenticator.respond(&request, &mut output).map_err(|what| ClientError::Authentication {
                        endpoint: self.endpoint.clone(),
                        user: config.user.clone(),
                        what,
                    })?;
                    if step == AuthStep::Continue {
                        self.send(&output).await?;
                    }
                }
                BackendMessage::ReadyForQuery(_) => return Ok(()),
                BackendMessage::BackendKeyData
                | BackendMessage::ParameterStatus { .. }
                | BackendMessage::NoticeResponse(_)
                | BackendMessage::Other(_) => {}
                BackendMessage::ErrorResponse(error) => return Err(ClientError::server(&self.endpoint, error)),
                other => return Err(self.unexpected("ReadyForQuery", &other)),
            }
        }
    }

    /// Begins a page stream on the timeline: requests and answers, many in flight.
    ///
    /// # Errors
    /// [`ClientError::Server`] when there is no such timeline.
    pub async fn pagestream_v3(mut self, tenant: &str, timeline: &str) -> Result<PageStream, ClientError> {
        self.start_copy(&command::pagestream(tenant, timeline)).await?;
        Ok(PageStream::start(self))
    }

    /// Asks for a base backup, at the newest LSN unless `lsn` says otherwise.
    ///
    /// # Errors
    /// [`ClientError::Server`] when there is no such timeline or moment.
    pub async fn basebackup(
        mut self,
        tenant: &str,
        timeline: &str,
        lsn: Option<Lsn>,
        options: BaseBackupOptions,
    ) -> Result<BaseBackupStream, ClientError> {
        self.start_copy(&command::base_backup(tenant, timeline, lsn, options)).await?;
        Ok(BaseBackupStream { client: self })
    }

    async fn start_copy(&mut self, sql: &str) -> Result<(), ClientError> {
        let mut output = BytesMut::new();
        frontend::query(sql, &mut output);
        self.send(&output).await?;
        loop {
            match self.message().await? {
                BackendMessage::CopyBothResponse | BackendMessage::CopyOutResponse => return Ok(()),
                BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
                BackendMessage::ErrorResponse(error) => return Err(ClientError::server(&self.endpoint, error)),
                other => return Err(self.unexpected("a COPY", &other)),
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.socket.write_all(bytes).await.map_err(|source| ClientError::io(&self.endpoint, "cannot send", source))
    }

    async fn message(&mut self) -> Result<BackendMessage, ClientError> {
        loop {
            let frame = take_frame(&mut self.input, BACKEND_BODY_SIZE_MAX).map_err(|error| ClientError::wire(&self.endpoint, &error))?;
            if let Some(frame) = frame {
                return BackendMessage::decode(frame).map_err(|error| ClientError::wire(&self.endpoint, &error));
            }
            self.input.reserve(READ_SIZE);
            let n = self.socket.read_buf(&mut self.input).await;
            if n.map_err(|source| ClientError::io(&self.endpoint, "cannot receive", source))? == 0 {
                return Err(ClientError::Closed { endpoint: self.endpoint.clone() });
            }
        }
    }

    fn unexpected(&self, expected: &str, found: &BackendMessage) -> ClientError {
        let found: String = format!("{found:?}").chars().take(200).collect();
        ClientError::protocol(&self.endpoint, format!("expected {expected}, got {found}"))
    }
}

/// The bytes of a base backup as they arrive.
pub struct BaseBackupStream {
    client: PageClient,
}

impl BaseBackupStream {
    /// The next bytes; `None` at the end of a whole backup. A backup that breaks off is an error.
    ///
    /// # Errors
    /// [`ClientError`] says why it broke off.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.client.message().await? {
                BackendMessage::CopyData(chunk) => return Ok(Some(chunk)),
                BackendMessage::CopyDone => return Ok(None),
                BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
                BackendMessage::ErrorResponse(error) => return Err(ClientError::server(&self.client.endpoint, error)),
                other => return Err(self.client.unexpected("a base backup's bytes", &other)),
            }
        }
    }

    /// The same as a [`Stream`].
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, ClientError>> + Send {
        futures::stream::try_unfold(self, |mut backup| async move { Ok(backup.next_chunk().await?.map(|chunk| (chunk, backup))) })
    }
}
