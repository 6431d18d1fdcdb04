//! A page service of a few lines, to try clients on.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bytes::{Bytes, BytesMut};
use varve_postgres::{BLCKSZ, Lsn};
use varve_protocol::wire::{AuthRequest, FrontendMessage, ServerMessage, StartupPacket, backend, take_frame};
use varve_protocol::{Answer, ConnectConfig, Endpoint, Query, RelationSize, Request, Response};

/// Blocks in every fork of this service.
pub(crate) const BLOCKS: u32 = 1000;

/// A server thread for each connection; ends with the value.
pub(crate) struct FakeService {
    pub(crate) port: u16,
    pub(crate) connections: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

/// Odd answers, for those who must cope with them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mood {
    /// As it should be.
    Good,
    /// Answers of one round in reverse order.
    Reversed,
    /// Closes each connection after so many answers.
    ClosesAfter(usize),
    /// Says that it is not ready.
    NotReady,
    /// Answers with another request's id.
    WrongId,
}

/// The page of this service at a block.
pub(crate) fn page(blkno: u32, lsn: Lsn) -> Vec<u8> {
    let mut page = vec![blkno as u8; BLCKSZ];
    page[..4].copy_from_slice(&blkno.to_be_bytes());
    page[4..12].copy_from_slice(&lsn.0.to_be_bytes());
    page
}

impl FakeService {
    pub(crate) fn start(mood: Mood) -> FakeService {
        Self::start_at(0, mood)
    }

    pub(crate) fn start_at(port: u16, mood: Mood) -> FakeService {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a port on loopback");
        let port = listener.local_addr().expect("its address").port();
        let (stopped, connections) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (stop, count) = (stopped.clone(), connections.clone());
        let accepting = thread::spawn(move || {
            thread::scope(|scope| {
                for socket in listener.incoming() {
                    let socket = socket.expect("a connection");
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    count.fetch_add(1, Ordering::SeqCst);
                    scope.spawn(|| serve(socket, mood, &stop));
                }
            });
        });
        FakeService { port, connections, stopped, accepting: Some(accepting) }
    }

    pub(crate) fn config(&self) -> ConnectConfig {
        ConnectConfig::new(Endpoint::tcp("127.0.0.1", self.port), "varve")
    }
}

impl Drop for FakeService {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn serve(mut socket: TcpStream, mood: Mood, stopped: &AtomicBool) -> Option<()> {
    socket.set_nodelay(true).ok()?;
    socket.set_read_timeout(Some(std::time::Duration::from_millis(20))).ok()?;
    let mut input = BytesMut::new();
    let fill = |input: &mut BytesMut, socket: &mut TcpStream| -> Option<()> {
        let mut chunk = [0; 65536];
        loop {
            if stopped.load(Ordering::SeqCst) {
                return None;
            }
            match socket.read(&mut chunk) {
                Ok(0) => return None,
                Ok(n) => {
                    input.extend_from_slice(&chunk[..n]);
                    return Some(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
    };
    while StartupPacket::take(&mut input).ok()?.is_none() {
        fill(&mut input, &mut socket)?;
    }
    let mut out = BytesMut::new();
    backend::authentication(&AuthRequest::Ok, &mut out);
    backend::ready_for_query(&mut out);
    socket.write_all(&out).ok()?;
    let command = loop {
        if let Some(frame) = take_frame(&mut input, 1 << 16).ok()? {
            match FrontendMessage::decode(frame).ok()? {
                FrontendMessage::Query(sql) => break sql,
                _ => return None,
            }
        }
        fill(&mut input, &mut socket)?;
    };
    out.clear();
    if mood == Mood::NotReady {
        backend::error_response(&ServerMessage::fatal("57P03", "the tenant is being attached"), &mut out);
        return socket.write_all(&out).ok();
    }
    if command.starts_with("basebackup") {
        backend::copy_out_response(&mut out);
        for i in 0..100u8 {
            backend::copy_data(&mut out, |out| out.extend_from_slice(&vec![i; 1000]));
        }
        if mood == Mood::Good {
            backend::copy_done(&mut out);
            backend::command_complete("SELECT", &mut out);
            backend::ready_for_query(&mut out);
        }
        return socket.write_all(&out).ok();
    }
    if !command.starts_with("pagestream_v3 acme main") {
        backend::error_response(&ServerMessage::error("42704", "no such timeline"), &mut out);
        return socket.write_all(&out).ok();
    }
    backend::copy_both_response(&mut out);
    socket.write_all(&out).ok()?;
    let mut answered = 0;
    loop {
        let mut responses = Vec::new();
        while let Some(frame) = take_frame(&mut input, 1 << 16).ok()? {
            match FrontendMessage::decode(frame).ok()? {
                FrontendMessage::CopyData(bytes) => responses.push(answer(Request::decode(&bytes).ok()?)),
                _ => return None,
            }
        }
        match mood {
            Mood::Reversed => responses.reverse(),
            Mood::WrongId => responses.iter_mut().for_each(spoil),
            _ => {}
        }
        out.clear();
        for response in &responses {
            if mood == Mood::ClosesAfter(answered) {
                let _ = socket.write_all(&out);
                return None;
            }
            backend::copy_data(&mut out, |out| response.encode(out));
            answered += 1;
        }
        socket.write_all(&out).ok()?;
        fill(&mut input, &mut socket)?;
    }
}

fn spoil(response: &mut Response) {
    if let Response::Answer { request, .. } = response {
        request.header.request_id += 1;
    }
}

fn pages(first: u32, count: u32, end: u32, lsn: Lsn) -> Bytes {
    (first..first.saturating_add(count).min(end).max(first)).flat_map(|blkno| page(blkno, lsn)).collect::<Vec<u8>>().into()
}

fn answer(request: Request) -> Response {
    let lsn = request.header.request_lsn;
    let answer = match request.query {
        Query::Exists(rel) => Answer::Exists(rel.node.rel < 10_000),
        Query::Nblocks(_) => Answer::Nblocks(BLOCKS),
        Query::GetPage(_, blkno) if blkno < BLOCKS => Answer::Page(page(blkno, lsn).into()),
        Query::GetPage(_, blkno) => return Response::error(request.header, &format!("no block {blkno}")),
        Query::DbSize(db) => Answer::DbSize(i64::from(db) * 8192),
        Query::SlruSegment(..) => Answer::SlruSegment(pages(0, 32, 32, lsn)),
        Query::ListRelations { .. } => {
            let rel = |rel| RelationSize { rel, fork: varve_postgres::Fork::Main, blocks: BLOCKS };
            Answer::Relations((0..50_000).map(rel).collect())
        }
        Query::PageRange { first, count, .. } => Answer::Pages(pages(first, count, BLOCKS, lsn)),
        Query::ListSlru(_) => Answer::SlruSegments(Vec::new()),
        Query::SlruRange { first, count, .. } => Answer::SlruPages(pages(first, count, 32, lsn)),
    };
    Response::new(request, answer)
}
