//! A page service on a [`MemorySource`], and a client that says what it wants.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use varve_pageserver::page_service::{PageService, PageServiceConfig};
use varve_postgres::{Fork, Lsn, RelFork, RelNode};
use varve_protocol::wire::{BackendMessage, StartupPacket, frontend, take_frame};
use varve_protocol::{Answer, ConnectConfig, Endpoint, Header, PageClient, Query, ReadLsn, Request, Response};

use super::memory_pages::{MemorySource, page};

pub(super) const REL: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: Fork::Main };
pub(super) const AT: ReadLsn = ReadLsn { lsn: Lsn(0x2000), not_modified_since: Lsn(0x1000) };

pub(super) struct Served {
    pub(super) address: SocketAddr,
    pub(super) source: Arc<MemorySource>,
    pub(super) shutdown: CancellationToken,
    pub(super) running: tokio::task::JoinHandle<()>,
}

impl Served {
    pub(super) async fn start(config: PageServiceConfig) -> Served {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port on loopback");
        let address = listener.local_addr().expect("its address");
        let source = Arc::new(MemorySource::default());
        let service = PageService::new(source.clone(), config);
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(service.run(listener, shutdown.clone()));
        Served { address, source, shutdown, running }
    }

    pub(super) fn config(&self) -> ConnectConfig {
        ConnectConfig::new(Endpoint::tcp("127.0.0.1", self.address.port()), "varve")
    }

    pub(super) async fn raw(&self) -> Raw {
        Raw { socket: TcpStream::connect(self.address).await.expect("a connection"), input: BytesMut::new() }
    }

    /// The server works as if nothing had been.
    pub(super) async fn assert_alive(&self) {
        let stream = PageClient::connect(&self.config()).await.expect("log in").pagestream_v3("acme", "main").await.expect("a stream");
        assert_eq!(stream.get_page(REL, 7, AT).await.expect("a page")[..], page(REL, 7, AT.lsn)[..]);
    }
}

/// A client that says what it wants.
pub(super) struct Raw {
    pub(super) socket: TcpStream,
    pub(super) input: BytesMut,
}

impl Raw {
    pub(super) async fn send(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        write(&mut out);
        let _ = self.socket.write_all(&out).await;
    }

    pub(super) async fn log_in(&mut self) {
        assert!(self.is_let_in().await, "the server must let a client in");
    }

    /// Logs in; whether the server lets it.
    pub(super) async fn is_let_in(&mut self) -> bool {
        self.send(|out| StartupPacket::startup(&[("user", "u")]).encode(out)).await;
        while let Some(message) = self.message().await {
            if matches!(message, BackendMessage::ReadyForQuery(_)) {
                return true;
            }
        }
        false
    }

    pub(super) async fn stream(&mut self) {
        self.stream_of("acme").await;
    }

    pub(super) async fn stream_of(&mut self, tenant: &str) {
        self.log_in().await;
        self.command(&format!("pagestream_v3 {tenant} main")).await;
        assert_eq!(self.message().await, Some(BackendMessage::CopyBothResponse));
    }

    pub(super) async fn command(&mut self, text: &str) {
        self.send(|out| frontend::query(text, out)).await;
    }

    /// Asks for a page.
    pub(super) async fn ask(&mut self, request_id: u64, blkno: u32, lsn: Lsn) {
        self.send(|out| frontend::copy_data(out, |out| page_request(request_id, blkno, lsn).encode(out))).await;
    }

    /// The next answer must be this page.
    pub(super) async fn assert_page(&mut self, request_id: u64, blkno: u32, lsn: Lsn) {
        let Some(BackendMessage::CopyData(bytes)) = self.message().await else { panic!("expected the answer to {request_id}") };
        let response = Response::decode(&bytes).expect("an answer");
        assert_eq!(response.header().request_id, request_id, "answers keep the order of the requests");
        let Response::Answer { answer: Answer::Page(found), .. } = response else { panic!("expected a page, got {response:?}") };
        assert_eq!(found[..], page(REL, blkno, lsn)[..]);
    }

    /// Whether nothing comes for a little while.
    pub(super) async fn is_silent(&mut self) -> bool {
        let read = self.socket.read_buf(&mut self.input);
        tokio::time::timeout(Duration::from_millis(100), read).await.is_err()
    }

    pub(super) async fn message(&mut self) -> Option<BackendMessage> {
        loop {
            if let Some(frame) = take_frame(&mut self.input, 1 << 26).expect("frames from the server") {
                return Some(BackendMessage::decode(frame).expect("messages from the server"));
            }
            let read = tokio::time::timeout(Duration::from_secs(20), self.socket.read_buf(&mut self.input));
            if read.await.expect("the server must answer or close").ok()? == 0 {
                return None;
            }
        }
    }

    /// Everything up to the end must be an error with this code and text, then the end.
    pub(super) async fn assert_refused(&mut self, code: &str, text: &str) {
        let mut seen = None;
        while let Some(message) = self.message().await {
            if let BackendMessage::ErrorResponse(error) = message {
                seen = Some(error);
            }
        }
        let error = seen.unwrap_or_else(|| panic!("expected an ErrorResponse about '{text}' before the end"));
        assert!(error.code == code && error.message.contains(text), "expected {code} '{text}', got {error}");
    }
}

pub(super) fn page_request(request_id: u64, blkno: u32, lsn: Lsn) -> Request {
    Request { header: Header { request_id, request_lsn: lsn, not_modified_since: lsn }, query: Query::GetPage(REL, blkno) }
}

/// A request at [`AT`].
pub(super) fn request(request_id: u64, query: Query) -> Request {
    Request { header: Header { request_id, request_lsn: AT.lsn, not_modified_since: AT.not_modified_since }, query }
}
