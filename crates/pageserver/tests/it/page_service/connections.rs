//! Who may have a connection, how many, how long, and how it ends.

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use varve_pageserver::page_service::PageServiceConfig;
use varve_postgres::BLCKSZ;
use varve_protocol::client::BlockingOptions;
use varve_protocol::wire::{BackendMessage, frame::put_frame, frontend};
use varve_protocol::{BlockingPageClient, PageClient, Query};

use super::memory_pages::BLOCKS;
use super::served::{AT, REL, Raw, Served, request};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_clients_are_sent_away() {
    let config = PageServiceConfig {
        handshake_timeout: Duration::from_millis(300),
        idle_timeout: Duration::from_millis(600),
        stalled_timeout: Duration::from_millis(300),
        ..PageServiceConfig::default()
    };
    let served = Served::start(config).await;
    let mut raw = served.raw().await;
    raw.assert_refused("08P01", "no startup packet").await;
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.assert_refused("57P05", "between messages").await;
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(|out| out.extend_from_slice(b"d\0")).await;
    raw.assert_refused("57P05", "in the middle of a message").await;
    // One who speaks now and then may stay.
    let stream = PageClient::connect(&served.config()).await.expect("log in").pagestream_v3("acme", "main").await.expect("a stream");
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        stream.get_page(REL, 1, AT).await.expect("a page");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_the_next_is_told_so() {
    let served = Served::start(PageServiceConfig { connections_max: 3, ..PageServiceConfig::default() }).await;
    let (mut beta, mut nobody, mut acme) = (served.raw().await, served.raw().await, served.raw().await);
    beta.stream_of("beta").await;
    nobody.log_in().await;
    acme.stream().await;
    let refused = PageClient::connect(&served.config()).await.err().expect("no place");
    assert!(refused.is_transient() && refused.to_string().contains("all 3 connections"), "{refused}");
    let client = BlockingPageClient::new(served.config(), "acme", "main", BlockingOptions::default());
    let waits = tokio::task::spawn_blocking(move || client.nblocks(REL, AT));
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(acme);
    assert_eq!(waits.await.expect("joined").expect("a place became free"), BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_no_answers_is_read_no_further_and_then_dropped() {
    let config = PageServiceConfig { stalled_timeout: Duration::from_millis(500), ..PageServiceConfig::default() };
    let served = Served::start(config).await;
    let mut raw = served.raw().await;
    raw.stream().await;
    // A thousand megabytes of answers are asked for and none is taken.
    let mut out = BytesMut::new();
    for i in 0..1000 {
        frontend::copy_data(&mut out, |out| request(i, Query::PageRange { rel: REL, first: 0, count: 128 }).encode(out));
    }
    let sent = tokio::time::timeout(Duration::from_secs(5), raw.socket.write_all(&out)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let read = served.source.acme.pages_read.load(Ordering::SeqCst) as usize * BLCKSZ;
    assert!(read < 64 << 20, "{read} bytes of pages were read for a client that takes none ({sent:?})");
    served.assert_alive().await;
    let start = Instant::now();
    let mut taken = 0;
    let mut sink = vec![0; 1 << 20];
    tokio::time::sleep(Duration::from_secs(1)).await;
    while let Ok(n @ 1..) = raw.socket.read(&mut sink).await {
        taken += n;
    }
    assert!(taken < 64 << 20 && start.elapsed() < Duration::from_secs(10), "the connection must end, {taken} bytes came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_logs_in_and_commands_nothing_has_to_go_soon() {
    let config = PageServiceConfig { connections_max: 4, handshake_timeout: Duration::from_millis(500), ..PageServiceConfig::default() };
    let served = Served::start(config).await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        let mut raw = served.raw().await;
        raw.log_in().await;
        idle.push(raw);
    }
    assert!(PageClient::connect(&served.config()).await.is_err(), "all places are taken");
    for mut raw in idle {
        raw.assert_refused("57P05", "no command about a timeline within").await;
    }
    // Nor does it help to talk about nothing, or about what is not there.
    // The last of those places may be given back a moment after its client was told.
    let start = Instant::now();
    let mut chatty = served.raw().await;
    while !chatty.is_let_in().await {
        assert!(start.elapsed() < Duration::from_secs(20), "the places of those who went are not given back");
        chatty = served.raw().await;
    }
    let start = Instant::now();
    for text in ["SET x TO 1", ";", "SELECT 1", "pagestream_v3 acme nowhere"].iter().cycle() {
        assert!(start.elapsed() < Duration::from_secs(20), "a client that talks about nothing stays for ever");
        chatty.command(text).await;
        let answer = chatty.message().await;
        if matches!(&answer, None | Some(BackendMessage::ErrorResponse(_))) && answer.is_none_or(|answer| is_farewell(&answer)) {
            break;
        }
    }
    // Who has commanded something may take his time.
    let mut working = served.raw().await;
    working.stream().await;
    tokio::time::sleep(Duration::from_millis(800)).await;
    working.ask(1, 1, AT.lsn).await;
    working.assert_page(1, 1, AT.lsn).await;
}

fn is_farewell(answer: &BackendMessage) -> bool {
    matches!(answer, BackendMessage::ErrorResponse(error) if error.code == "57P05")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_at_most_half_of_the_connections() {
    let served = Served::start(PageServiceConfig { connections_max: 6, ..PageServiceConfig::default() }).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut raw = served.raw().await;
        raw.stream().await;
        held.push(raw);
    }
    let mut fourth = served.raw().await;
    fourth.log_in().await;
    fourth.command("basebackup acme main").await;
    fourth.assert_refused("53300", "all 3 connections that tenant acme may have").await;
    let mut other = served.raw().await;
    other.stream_of("beta").await;
    // A place that is given back can be had again; a client that tries again gets it.
    held.pop();
    let client = BlockingPageClient::new(served.config(), "acme", "main", BlockingOptions::default());
    let blocks = tokio::task::spawn_blocking(move || client.nblocks(REL, AT)).await.expect("joined");
    assert_eq!(blocks.expect("a place became free"), BLOCKS);
}

/// Set where the test below runs in a process of its own, since it takes all descriptors there are.
const ALONE: &str = "VARVE_TEST_WITHOUT_DESCRIPTORS";

#[test]
fn want_of_descriptors_keeps_newcomers_waiting_and_harms_nobody() {
    if std::env::var_os(ALONE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        runtime.block_on(run_out_of_descriptors());
        return;
    }
    let name = concat!(module_path!(), "::want_of_descriptors_keeps_newcomers_waiting_and_harms_nobody");
    let name = name.split_once("::").expect("a crate").1;
    let mut itself = Command::new(std::env::current_exe().expect("the test's own binary"));
    let output = itself.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().expect("the test's own binary runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

async fn run_out_of_descriptors() {
    let served = Served::start(PageServiceConfig::default()).await;
    let mut old = served.raw().await;
    old.stream().await;
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).expect("a lower limit");
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    hoard.pop(); // for the client's socket; there is none for the server's
    let mut new = served.raw().await;
    new.send(|out| varve_protocol::wire::StartupPacket::startup(&[("user", "u")]).encode(out)).await;
    assert!(new.is_silent().await, "nobody can have accepted it");
    for i in 0..100 {
        old.ask(i, 7 + 10 * i as u32, AT.lsn).await;
        old.assert_page(i, 7 + 10 * i as u32, AT.lsn).await;
    }
    hoard.clear();
    while !matches!(new.message().await.expect("it is served now"), BackendMessage::ReadyForQuery(_)) {}
}

/// What a subscriber wrote.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// On one thread, so that its log can be had.
#[tokio::test]
async fn an_ordinary_end_is_no_news() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::INFO).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let served = Served::start(PageServiceConfig::default()).await;
    let terminate = |out: &mut BytesMut| put_frame(b'X', out, |_| {});

    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.send(terminate).await;
    assert_eq!(raw.message().await, None);
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(terminate).await;
    assert_eq!(raw.message().await, None);
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.socket.shutdown().await.expect("shutdown");
    assert_eq!(raw.message().await, None);
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(frontend::copy_done).await;
    assert_eq!(raw.message().await, Some(BackendMessage::CopyDone));
    // Who gives up is told so, as by a stock server, and may go on; what he asked for is not answered.
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(|out| {
        frontend::copy_data(out, |out| request(1, Query::GetPage(REL, 7)).encode(out));
        put_frame(b'f', out, |out| out.extend_from_slice(b"enough\0"));
    })
    .await;
    assert!(matches!(raw.message().await, Some(BackendMessage::ErrorResponse(error)) if error.code == "57014"));
    assert!(matches!(raw.message().await, Some(BackendMessage::ReadyForQuery(_))));
    raw.command("pagestream_v3 acme main").await;
    assert_eq!(raw.message().await, Some(BackendMessage::CopyBothResponse));
    drop(raw);
    // One that leaves in the middle of a backup.
    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.command("fullbackup acme main").await;
    assert_eq!(raw.message().await, Some(BackendMessage::CopyOutResponse));
    drop(raw);
    served.source.acme.backups_running.reaches(0, "the backup ends with its client").await;

    let text = String::from_utf8_lossy(&lines.0.lock()).into_owned();
    let news: Vec<_> = text.lines().filter(|line| !line.contains("page stream peer=") && !line.contains("base backup peer=")).collect();
    assert!(news.is_empty(), "{news:#?}");
    assert!(text.contains("page stream peer="), "the log must have been heard: {text}");
    // And what is no ordinary end is told.
    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(|out| out.extend_from_slice(&[b'~', 0, 0, 0, 4])).await;
    raw.assert_refused("08P01", "in a page stream").await;
    assert!(String::from_utf8_lossy(&lines.0.lock()).contains("page service connection closed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_search_that_hangs_or_panics_costs_its_own_connection_only() {
    let served = Served::start(PageServiceConfig { jobs_max: 1, backups_max: 1, ..PageServiceConfig::default() }).await;
    let mut hanging: Vec<Raw> = Vec::new();
    for _ in 0..50 {
        let mut raw = served.raw().await;
        raw.log_in().await;
        raw.command("pagestream_v3 acme hanging").await;
        hanging.push(raw);
    }
    served.source.hanging.reaches(50, "searches that hang").await;
    served.assert_alive().await;
    // One has more to say, which nobody reads: its end is noticed all the same.
    hanging[0].send(|out| frontend::query("SET x TO 1", out)).await;
    drop(hanging);
    served.source.hanging.reaches(0, "a search ends with its client").await;
    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.command("pagestream_v3 acme panic").await;
    assert_eq!(raw.message().await, None, "its connection ends");
    served.assert_alive().await;
}
