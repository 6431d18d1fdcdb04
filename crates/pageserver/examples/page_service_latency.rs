//! GetPage through the page service with a source in memory, beside a bare TCP echo of the same sizes, interleaved in
//! one run.
//!
//! `cargo run --release -p varve-pageserver --example page_service_latency [-- SECONDS]`
//!
//! The echo server reads as many bytes as a request has and writes as many as an answer has: what is left between the
//! two is the page service's own time. Placement noise is large on small machines: compare within a run, and pin with
//! `taskset` for figures at depth 1.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use varve_pageserver::page_service::{Arrival, BackupOptions, PageService, PageServiceConfig, PageSource, SourceError, TimelinePages};
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Oid, Page, RelFork, RelNode};
use varve_protocol::client::BlockingOptions;
use varve_protocol::connect::blocking::{Connection, Received};
use varve_protocol::wire::frontend;
use varve_protocol::{BlockingPageClient, ConnectConfig, Endpoint, Header, Query, ReadLsn, RelationSize, Request, SlruSegmentSize};
use varve_storage::ids::TenantId;

const REL: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: Fork::Main };
const AT: ReadLsn = ReadLsn { lsn: Lsn(0x2000), not_modified_since: Lsn(0x1000) };
/// Bytes of a framed GetPage request and of its answer.
const REQUEST_SIZE: usize = 5 + 42;
const ANSWER_SIZE: usize = 5 + 42 + BLCKSZ;

struct OnePage {
    page: Page,
    warm: bool,
}

struct Source(Arc<OnePage>);

impl PageSource for Source {
    fn resolve(&self, _tenant: &str, _timeline: &str) -> BoxFuture<'_, Result<Arc<dyn TimelinePages>, SourceError>> {
        let found: Arc<dyn TimelinePages> = self.0.clone();
        std::future::ready(Ok(found)).boxed()
    }
}

impl TimelinePages for OnePage {
    fn tenant(&self) -> TenantId {
        TenantId([1; 16])
    }
    fn arrival(&self, _at: ReadLsn) -> Option<Arrival> {
        None
    }
    fn try_get_page_cached(&self, _rel: RelFork, _blkno: BlockNumber, _at: ReadLsn, take: &mut dyn FnMut(&Page)) -> bool {
        if self.warm {
            take(&self.page);
        }
        self.warm
    }
    fn get_page(&self, _rel: RelFork, _blkno: BlockNumber, _at: ReadLsn) -> Result<Box<Page>, SourceError> {
        Ok(Box::new(self.page))
    }
    fn exists(&self, _rel: RelFork, _at: ReadLsn) -> Result<bool, SourceError> {
        Ok(true)
    }
    fn nblocks(&self, _rel: RelFork, _at: ReadLsn) -> Result<BlockNumber, SourceError> {
        Ok(1 << 20)
    }
    fn db_size(&self, _db: Oid, _at: ReadLsn) -> Result<i64, SourceError> {
        Ok(0)
    }
    fn list_relations(&self, _spc: Oid, _db: Oid, _at: ReadLsn) -> Result<Vec<RelationSize>, SourceError> {
        Ok(Vec::new())
    }
    fn slru_range(&self, _: SlruKind, _: u32, _: u32, _: u32, _: ReadLsn, _: &mut Vec<u8>) -> Result<(), SourceError> {
        Ok(())
    }
    fn list_slru(&self, _kind: SlruKind, _at: ReadLsn) -> Result<Vec<SlruSegmentSize>, SourceError> {
        Ok(Vec::new())
    }
    fn lease(&self, lsn: Lsn) -> BoxFuture<'static, Result<String, SourceError>> {
        async move { Err(SourceError::NotFound(lsn.to_string())) }.boxed()
    }
    fn base_backup(&self, _lsn: Option<Lsn>, _options: BackupOptions, _sink: &mut dyn Write) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Answers each request's bytes with an answer's bytes, as many as came at once.
fn echo(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let (mut input, mut pending) = (vec![0; 1 << 16], 0);
    let output = vec![7; ANSWER_SIZE * 128];
    loop {
        let n = socket.read(&mut input)?;
        if n == 0 {
            return Ok(());
        }
        pending += n;
        socket.write_all(&output[..pending / REQUEST_SIZE * ANSWER_SIZE])?;
        pending %= REQUEST_SIZE;
    }
}

/// How often, and how long each took.
struct Figures {
    took: Vec<Duration>,
    wall: Duration,
}

impl Figures {
    fn print(&mut self, name: &str, depth: usize) {
        self.took.sort_unstable();
        let at = |q: f64| self.took[((self.took.len() - 1) as f64 * q) as usize].as_nanos() as f64 / 1000.0;
        let rate = self.took.len() as f64 / self.wall.as_secs_f64();
        println!("{name:<28} depth {depth:>3}   {rate:>9.0} pages/s   p50 {:>7.1} us   p99 {:>7.1} us", at(0.5), at(0.99));
    }
}

/// `depth` requests in flight for `time`; `send` sends n requests, `receive` waits for at least one answer and says how
/// many came.
fn measure<C>(depth: usize, time: Duration, client: &mut C, send: impl Fn(&mut C, usize), receive: impl Fn(&mut C) -> usize) -> Figures {
    let mut sent_at = std::collections::VecDeque::new();
    let mut took = Vec::new();
    let start = Instant::now();
    send(client, depth);
    sent_at.extend(std::iter::repeat_n(start, depth));
    while start.elapsed() < time {
        let n = receive(client);
        let now = Instant::now();
        took.extend(sent_at.drain(..n).map(|at| now - at));
        send(client, n);
        sent_at.extend(std::iter::repeat_n(now, n));
    }
    let wall = start.elapsed();
    while !sent_at.is_empty() {
        let n = receive(client);
        sent_at.drain(..n);
    }
    Figures { took, wall }
}

fn measure_echo(address: SocketAddr, depth: usize, time: Duration) -> Figures {
    let socket = TcpStream::connect(address).expect("connect");
    socket.set_nodelay(true).expect("nodelay");
    let mut client = (socket, vec![0u8; 1 << 20], 0);
    let requests = vec![1; REQUEST_SIZE * depth];
    measure(
        depth,
        time,
        &mut client,
        |(socket, _, _), n| socket.write_all(&requests[..n * REQUEST_SIZE]).expect("send"),
        |(socket, buffer, pending)| {
            while *pending < ANSWER_SIZE {
                *pending += socket.read(buffer).expect("receive");
            }
            let n = *pending / ANSWER_SIZE;
            *pending %= ANSWER_SIZE;
            n
        },
    )
}

fn measure_service(address: SocketAddr, depth: usize, time: Duration) -> Figures {
    let config = ConnectConfig::new(Endpoint::tcp("127.0.0.1", address.port()), "varve");
    let mut connection = Connection::connect(&config, Duration::from_secs(5)).expect("log in");
    connection.start_copy("pagestream_v3 acme main").expect("a page stream");
    let mut request = BytesMut::new();
    frontend::copy_data(&mut request, |out| {
        let header = Header { request_id: 1, request_lsn: AT.lsn, not_modified_since: AT.not_modified_since };
        Request { header, query: Query::GetPage(REL, 1) }.encode(out);
    });
    assert_eq!(request.len(), REQUEST_SIZE);
    let send = |connection: &mut Connection, n| {
        for _ in 0..n {
            connection.output().extend_from_slice(&request);
        }
        connection.flush().expect("send");
    };
    measure(depth, time, &mut connection, send, |connection| {
        let mut n = 0;
        while n == 0 {
            assert!(matches!(connection.receive().expect("receive"), Received::Bytes { .. }));
            while let Some((_, body)) = connection.take_frame().expect("a frame") {
                assert_eq!((body[0], body.len()), (102, ANSWER_SIZE - 5));
                n += 1;
            }
        }
        n
    })
}

fn measure_client(address: SocketAddr, time: Duration) -> Figures {
    let config = ConnectConfig::new(Endpoint::tcp("127.0.0.1", address.port()), "varve");
    let mut client = BlockingPageClient::new(config, "acme", "main", BlockingOptions::default());
    let mut page = [0; BLCKSZ];
    client.get_page(REL, 1, AT, &mut page).expect("a page");
    measure(
        1,
        time,
        &mut client,
        |_, _| {},
        |client| {
            let mut page = [0; BLCKSZ];
            client.get_page(REL, 1, AT, &mut page).expect("a page");
            1
        },
    )
}

fn serve(runtime: &tokio::runtime::Runtime, warm: bool) -> SocketAddr {
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let service = PageService::new(Arc::new(Source(Arc::new(OnePage { page: [9; BLCKSZ], warm }))), PageServiceConfig::default());
        tokio::spawn(service.run(listener, CancellationToken::new()));
        address
    })
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1.0);
    let time = Duration::from_secs_f64(seconds);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (warm, cold) = (serve(&runtime, true), serve(&runtime, false));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let echo_address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            std::thread::spawn(move || echo(socket));
        }
    });
    for _ in 0..2 {
        for depth in [1, 8, 64] {
            measure_echo(echo_address, depth, time).print("bare TCP echo", depth);
            measure_service(warm, depth, time).print("page service, warm", depth);
            measure_service(cold, depth, time).print("page service, by a job", depth);
        }
        measure_client(warm, time).print("BlockingPageClient, warm", 1);
    }
}
