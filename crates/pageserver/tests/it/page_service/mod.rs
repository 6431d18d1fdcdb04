//! The page service: right answers in order, whatever is warm or cold; no client hurts another or the server.

mod connections;
mod fairness;
mod memory_pages;
mod served;

use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::TryStreamExt;
use memory_pages::{BLOCKS, page};
use served::{AT, REL, Served, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use varve_pageserver::page_service::PageServiceConfig;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, Fork, Lsn, RelNode};
use varve_protocol::client::BlockingOptions;
use varve_protocol::wire::{BackendMessage, frame::put_frame, frontend, take_frame};
use varve_protocol::{Answer, BaseBackupOptions, BlockingPageClient, ClientError, PageClient, Query, Response};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_right_and_in_the_order_of_the_requests() {
    let served = Served::start(PageServiceConfig::default()).await;
    let mut raw = served.raw().await;
    raw.stream().await;
    // Warm, cold, absent, and other questions, in any mixture, some sent in one packet and some alone.
    let queries: Vec<Query> = (0..5000u32)
        .map(|i| match i % 97 {
            13 => Query::Nblocks(REL),
            31 => Query::Exists(REL),
            55 => Query::GetPage(REL, BLOCKS + i),
            60 => Query::PageRange { rel: REL, first: i, count: 5 },
            80 => Query::SlruRange { kind: SlruKind::Clog, segno: 1, first: 30, count: 9 },
            81 => Query::ListSlru(SlruKind::CommitTs),
            _ => Query::GetPage(REL, i * 31 % BLOCKS),
        })
        .collect();
    let (mut reader, mut writer) = raw.socket.into_split();
    let sending = {
        let queries = queries.clone();
        tokio::spawn(async move {
            let mut out = BytesMut::new();
            for (i, &query) in queries.iter().enumerate() {
                frontend::copy_data(&mut out, |out| request(i as u64, query).encode(out));
                if i % 53 == 0 || i > 4900 {
                    writer.write_all(&out).await.expect("send");
                    out.clear();
                    tokio::task::yield_now().await;
                }
            }
            frontend::copy_done(&mut out);
            writer.write_all(&out).await.expect("send");
            writer
        })
    };
    let mut input = raw.input;
    let mut next = 0;
    loop {
        let Some(frame) = take_frame(&mut input, 1 << 26).expect("frames") else {
            assert!(reader.read_buf(&mut input).await.expect("answers") > 0, "the server closed after {next} answers");
            continue;
        };
        let bytes = match BackendMessage::decode(frame).expect("messages") {
            BackendMessage::CopyData(bytes) => bytes,
            BackendMessage::CopyDone => break,
            other => panic!("unexpected {other:?}"),
        };
        let response = Response::decode(&bytes).expect("an answer");
        assert_eq!(response.header().request_id, next as u64, "answers keep the order of the requests");
        match (queries[next], response) {
            (Query::GetPage(_, blkno), Response::Error { message, .. }) => assert!(blkno >= BLOCKS && message.contains("does not exist")),
            (query, Response::Answer { request, answer }) => {
                assert_eq!(query, request.query);
                match (query, answer) {
                    (Query::GetPage(_, blkno), Answer::Page(found)) => assert_eq!(found[..], page(REL, blkno, AT.lsn)[..]),
                    (Query::Nblocks(_), Answer::Nblocks(n)) => assert_eq!(n, BLOCKS),
                    (Query::Exists(_), Answer::Exists(exists)) => assert!(exists),
                    (Query::PageRange { first, .. }, Answer::Pages(found)) => {
                        assert_eq!(found.len(), 5 * BLCKSZ);
                        assert_eq!(found[4 * BLCKSZ..], page(REL, first + 4, AT.lsn)[..]);
                    }
                    (Query::SlruRange { .. }, Answer::SlruPages(found)) => assert_eq!(found.len(), 2 * BLCKSZ),
                    (Query::ListSlru(_), Answer::SlruSegments(found)) => assert_eq!(found.len(), 4),
                    (query, answer) => panic!("{query:?} was answered with {answer:?}"),
                }
            }
            (query, response) => panic!("{query:?} was answered with {response:?}"),
        }
        next += 1;
    }
    assert_eq!(next, queries.len(), "every request gets one answer");
    drop(sending.await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_the_second_version_get_bare_answers() {
    let served = Served::start(PageServiceConfig::default()).await;
    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.command("pagestream_v2 acme main").await;
    assert_eq!(raw.message().await, Some(BackendMessage::CopyBothResponse));
    // Warm and cold, a size, and one behind the end; without ids.
    let queries = [Query::GetPage(REL, 7), Query::Nblocks(REL), Query::GetPage(REL, BLOCKS), Query::GetPage(REL, 8), Query::Exists(REL)];
    for query in queries {
        let mut v3 = BytesMut::new();
        request(9, query).encode(&mut v3);
        raw.send(|out| frontend::copy_data(out, |out| out.extend_from_slice(&[&v3[..1], &v3[9..]].concat()))).await;
    }
    for query in queries {
        let Some(BackendMessage::CopyData(bytes)) = raw.message().await else { panic!("expected the answer to {query:?}") };
        match query {
            Query::GetPage(_, BLOCKS) => assert!(bytes[0] == 103 && bytes.ends_with(&[0]), "an error is a tag and a text: {bytes:?}"),
            Query::GetPage(_, blkno) => assert_eq!(bytes[..], [&[102][..], &page(REL, blkno, AT.lsn)[..]].concat()[..]),
            Query::Nblocks(_) => assert_eq!(bytes[..], [&[101][..], &BLOCKS.to_be_bytes()].concat()[..]),
            _ => assert_eq!(bytes[..], [100, 1]),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_clients_get_what_they_ask_for() {
    let served = Served::start(PageServiceConfig::default()).await;
    let stream = PageClient::connect(&served.config()).await.expect("log in").pagestream_v3("acme", "main").await.expect("a stream");
    assert_eq!(stream.list_relations(1663, 5, AT).await.expect("a list").len(), 100_000);
    assert_eq!(stream.db_size(5, AT).await.expect("a size"), 1 << 40);
    assert_eq!(stream.slru_segment(SlruKind::Clog, 0, AT).await.expect("a segment").len(), 32 * BLCKSZ);
    assert!(matches!(stream.slru_segment(SlruKind::Clog, 9, AT).await, Err(ClientError::Answer(text)) if text.contains("segment 9")));
    let gone = PageClient::connect(&served.config()).await.expect("log in").pagestream_v3("acme", "dev").await;
    assert!(matches!(gone, Err(ClientError::Server { message, .. }) if message.code == "42704" && message.message.contains("acme/dev")));

    let client = BlockingPageClient::new(served.config(), "acme", "main", BlockingOptions::default());
    let read = tokio::task::spawn_blocking(move || {
        let range = client.page_range(REL, 100, 1000, AT).expect("a range");
        assert_eq!(range.len(), 1000 * BLCKSZ);
        assert_eq!(range[999 * BLCKSZ..], page(REL, 1099, AT.lsn)[..]);
        let blocks: Vec<_> = (0..2000).map(|i| (REL, i * 5 % BLOCKS)).collect();
        let mut seen = 0;
        client
            .get_pages(&blocks, AT, &mut |index, found| {
                assert_eq!(found[..], page(REL, blocks[index].1, AT.lsn)[..]);
                seen += 1;
            })
            .expect("pages");
        assert_eq!(seen, 2000);
    });
    read.await.expect("the blocking client");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_backup_is_whole_or_an_error() {
    let served = Served::start(PageServiceConfig::default()).await;
    let fetch = |lsn, options| {
        let config = served.config();
        async move {
            let backup = PageClient::connect(&config).await?.basebackup("acme", "main", lsn, options).await?;
            Ok::<_, ClientError>(backup.into_stream().try_collect::<Vec<_>>().await?.concat())
        }
    };
    let plain = fetch(None, BaseBackupOptions::default()).await.expect("a backup");
    assert!(
        plain.starts_with(b"None BackupOptions { full: false, no_slru: false, newest_files: false, short_wal: false }\n")
            && plain.len() > 10_000_000
    );
    let options = BaseBackupOptions { gzip: true, full: false, no_slru: true, newest_files: false, short_wal: false };
    let zipped = fetch(Some(Lsn(0x28)), options).await.expect("a backup");
    let mut unzipped = Vec::new();
    flate2::read::GzDecoder::new(&zipped[..]).read_to_end(&mut unzipped).expect("gzip");
    assert!(
        unzipped.starts_with(b"Some(0/28) BackupOptions { full: false, no_slru: true, newest_files: false, short_wal: false }\n")
            && unzipped.len() > 10_000_000
    );
    let broken = fetch(Some(Lsn(0xBAD)), BaseBackupOptions::default()).await.expect_err("a backup that fails half-way");
    assert!(broken.to_string().contains("layer 17 is corrupt"), "{broken}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_can_talk_to_it() {
    let served = Served::start(PageServiceConfig::default()).await;
    let psql = |sql: &'static str| {
        let uri = format!("postgresql://u@127.0.0.1:{}/db", served.address.port());
        tokio::task::spawn_blocking(move || {
            Command::new("psql").args(["-X", "-d", &uri, "-c", sql]).output().expect("psql must be installed")
        })
    };
    let output = psql("fullbackup acme main 0/28").await.expect("psql");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.starts_with(b"Some(0/28) BackupOptions { full: true") && output.stdout.len() > 10_000_000);
    let output = psql("SELECT 1").await.expect("psql");
    assert!(String::from_utf8_lossy(&output.stderr).contains("for SQL, connect to a compute"), "{output:?}");
    assert!(psql("SET x TO 1").await.expect("psql").status.success());
}

#[tokio::test]
async fn drivers_that_prepare_their_copy_are_served() {
    let served = Served::start(PageServiceConfig::default()).await;
    let mut raw = served.raw().await;
    raw.log_in().await;
    let parse = |sql: &'static str| {
        move |out: &mut BytesMut| put_frame(b'P', out, |out| out.extend_from_slice(format!("\0{sql}\0\0\0").as_bytes()))
    };
    raw.send(parse("basebackup acme main --gzip")).await;
    raw.send(|out| put_frame(b'D', out, |out| out.extend_from_slice(b"S\0"))).await;
    raw.send(|out| put_frame(b'S', out, |_| {})).await;
    for expected in
        [BackendMessage::Other(b'1'), BackendMessage::Other(b't'), BackendMessage::Other(b'n'), BackendMessage::ReadyForQuery(b'I')]
    {
        assert_eq!(raw.message().await, Some(expected));
    }
    raw.send(|out| put_frame(b'B', out, |out| out.extend_from_slice(b"\0\0\0\0\0\0\0\0"))).await;
    raw.send(|out| put_frame(b'E', out, |out| out.extend_from_slice(b"\0\0\0\0\0"))).await;
    raw.send(|out| put_frame(b'S', out, |_| {})).await;
    assert_eq!(raw.message().await, Some(BackendMessage::Other(b'2')));
    assert_eq!(raw.message().await, Some(BackendMessage::CopyOutResponse));
    while let Some(BackendMessage::CopyData(_)) = raw.message().await {} // eats CopyDone, too
    assert!(matches!(raw.message().await, Some(BackendMessage::CommandComplete(_))));
    assert_eq!(raw.message().await, Some(BackendMessage::ReadyForQuery(b'I')));
    // After an error everything up to the next Sync is skipped.
    raw.send(parse("nonsense")).await;
    for (tag, body) in [(b'E', &b"\0\0\0\0\0"[..]), (b'E', b"\0\0\0\0\0"), (b'S', b"")] {
        raw.send(|out| put_frame(tag, out, |out| out.extend_from_slice(body))).await;
    }
    assert_eq!(raw.message().await, Some(BackendMessage::Other(b'1')));
    assert!(matches!(raw.message().await, Some(BackendMessage::ErrorResponse(_))));
    assert_eq!(raw.message().await, Some(BackendMessage::ReadyForQuery(b'I')));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_half_messages_and_4_gib_get_an_error_and_the_connection_ends() {
    let served = Served::start(PageServiceConfig::default()).await;
    let copy_data = |body: &'static [u8]| move |out: &mut BytesMut| frontend::copy_data(out, |out| out.extend_from_slice(body));

    let mut raw = served.raw().await;
    raw.send(|out| out.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n")).await;
    raw.assert_refused("08P01", "startup packet").await;

    let mut raw = served.raw().await;
    raw.send(|out| out.extend_from_slice(&[0xFF; 8])).await;
    raw.assert_refused("08P01", "startup packet of 4294967295 bytes").await;

    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.send(|out| out.extend_from_slice(&[b'Q', 0xFF, 0xFF, 0xFF, 0xFF])).await;
    raw.assert_refused("08P01", "message with tag 'Q' of 4294967295 bytes").await;

    let mut raw = served.raw().await;
    raw.log_in().await;
    raw.send(|out| put_frame(b'~', out, |_| {})).await;
    raw.assert_refused("08P01", "unknown message tag '~'").await;

    for (write, text) in [
        (
            Box::new(|out: &mut BytesMut| out.extend_from_slice(&[b'd', 0xFF, 0xFF, 0xFF, 0xFF])) as Box<dyn FnOnce(&mut BytesMut)>,
            "4294967295",
        ),
        (Box::new(copy_data(b"")), "tag"),
        (Box::new(copy_data(b"\x02abc")), "ends early"),
        (Box::new(copy_data(&[77; 25])), "unknown page service message tag 77"),
        (Box::new(copy_data(&[2; 60])), "fork number 2"),
        (Box::new(copy_data(&[0; 40])), "2 bytes too many"),
        (Box::new(|out: &mut BytesMut| put_frame(b'Q', out, |out| out.extend_from_slice(b"x\0"))), "in a page stream"),
        (Box::new(|out: &mut BytesMut| out.extend_from_slice(&[0, 0, 0, 0, 0])), "less than 4"),
    ] {
        let mut raw = served.raw().await;
        raw.stream().await;
        raw.send(write).await;
        let text = if text == "fork number 2" { "page service message" } else { text };
        raw.assert_refused("08P01", text).await;
    }

    let mut raw = served.raw().await;
    raw.stream().await;
    raw.send(|out| {
        frontend::copy_data(out, |out| request(1, Query::GetPage(REL, 1)).encode(out));
        out.extend_from_slice(&[b'd', 0, 0]);
    })
    .await;
    raw.socket.shutdown().await.expect("shutdown");
    assert!(matches!(raw.message().await, Some(BackendMessage::CopyData(_))), "the whole request before it is answered");
    raw.assert_refused("08P01", "ended in the middle of a message, after 3 bytes").await;
    served.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_and_a_timeline_that_left_end_their_own_connection_only() {
    let served = Served::start(PageServiceConfig::default()).await;
    for (rel, code, text) in [(666, "XX000", "internal error"), (667, "57P03", "another pageserver")] {
        let mut raw = served.raw().await;
        raw.stream().await;
        let rel = RelNode { spc: 1, db: 2, rel }.fork(Fork::Main);
        raw.send(|out| {
            frontend::copy_data(out, |out| request(1, Query::GetPage(REL, 7)).encode(out));
            frontend::copy_data(out, |out| request(2, Query::GetPage(rel, 1)).encode(out));
        })
        .await;
        raw.assert_refused(code, text).await;
    }
    served.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_tells_clients_and_ends_everything() {
    let served = Served::start(PageServiceConfig::default()).await;
    let mut idle = served.raw().await;
    idle.stream().await;
    let mut busy = served.raw().await;
    busy.stream().await;
    busy.send(|out| {
        for i in 0..2000 {
            frontend::copy_data(out, |out| request(i, Query::GetPage(REL, 7)).encode(out));
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    served.shutdown.cancel();
    idle.assert_refused("57P01", "shutting down").await;
    busy.assert_refused("57P01", "shutting down").await;
    drop((idle, busy));
    served.running.await.expect("run() returns");
    assert!(start.elapsed() < Duration::from_secs(5), "shutdown took {:?}", start.elapsed());
    assert!(TcpStream::connect(served.address).await.is_err(), "nobody listens any more");
}
