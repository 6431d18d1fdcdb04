//! Clients have many requests in flight, match answers by id, wait for a server that is away, and do not wait for one
//! that says no.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::fake_service::{BLOCKS, FakeService, Mood, page};
use futures::TryStreamExt;
use varve_postgres::{BLCKSZ, Fork, Lsn, RelFork, RelNode, slru::SlruKind};
use varve_protocol::client::BlockingOptions;
use varve_protocol::{BaseBackup, BaseBackupOptions, BlockingPageClient, ClientError, PageClient, ReadLsn};

const REL: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: Fork::Main };
const AT: ReadLsn = ReadLsn { lsn: Lsn(0x2000), not_modified_since: Lsn(0x1000) };

fn client(service: &FakeService, retry_for: Duration) -> BlockingPageClient {
    let options = BlockingOptions { retry_for, ..BlockingOptions::default() };
    BlockingPageClient::new(service.config(), "acme", "main", options)
}

#[tokio::test]
async fn a_page_stream_has_many_requests_in_flight_and_matches_answers_by_id() {
    for mood in [Mood::Good, Mood::Reversed] {
        let service = FakeService::start(mood);
        let stream = PageClient::connect(&service.config()).await.unwrap().pagestream_v3("acme", "main").await.unwrap();
        let reads = (0..3000).map(|i| {
            let stream = stream.clone();
            tokio::spawn(async move {
                let blkno = i % BLOCKS;
                let found = stream.get_page(REL, blkno, AT).await.expect("a page");
                assert_eq!(found, page(blkno, AT.lsn), "the answer to another question");
            })
        });
        for read in reads.collect::<Vec<_>>() {
            read.await.unwrap();
        }
        assert_eq!(stream.nblocks(REL, AT).await.unwrap(), BLOCKS);
        assert!(stream.exists(REL, AT).await.is_ok_and(|exists| !exists));
        assert_eq!(stream.db_size(3, AT).await.unwrap(), 3 * 8192);
        assert_eq!(stream.page_range(REL, BLOCKS - 2, 10, AT).await.unwrap().len(), 2 * BLCKSZ, "the fork ends there");
        assert_eq!(stream.list_relations(1663, 5, AT).await.unwrap().len(), 50_000);
        assert_eq!(stream.slru_segment(SlruKind::Clog, 0, AT).await.unwrap().len(), 32 * BLCKSZ);
        let refused = stream.get_page(REL, BLOCKS, AT).await;
        assert!(matches!(refused, Err(ClientError::Answer(ref text)) if text == "no block 1000"), "{refused:?}");
        assert!(stream.get_page(REL, 1, AT).await.is_ok(), "a refusal must not end the stream");
        assert_eq!(service.connections.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn a_page_stream_that_breaks_tells_all_who_wait() {
    let service = FakeService::start(Mood::ClosesAfter(10));
    let stream = PageClient::connect(&service.config()).await.unwrap().pagestream_v3("acme", "main").await.unwrap();
    let reads = (0..50).map(|blkno| stream.get_page(REL, blkno, AT));
    let failed = futures::future::join_all(reads).await.into_iter().filter(Result::is_err).count();
    assert_eq!(failed, 40, "10 were answered");
    assert!(stream.get_page(REL, 1, AT).await.is_err(), "a broken stream stays broken");

    let refused = PageClient::connect(&service.config()).await.unwrap().pagestream_v3("acme", "none").await;
    assert!(matches!(refused, Err(ClientError::Server { ref message, .. }) if message.code == "42704"), "{:?}", refused.err());
}

#[tokio::test]
async fn a_base_backup_ends_when_it_is_whole() {
    let service = FakeService::start(Mood::Good);
    let backup = PageClient::connect(&service.config()).await.unwrap();
    let backup = backup.basebackup("acme", "main", Some(Lsn(0x28)), BaseBackupOptions::default()).await.unwrap();
    let chunks: Vec<_> = backup.into_stream().try_collect().await.unwrap();
    let expected: Vec<u8> = (0..100u8).flat_map(|i| vec![i; 1000]).collect();
    assert_eq!(chunks.concat(), expected);

    let config = service.config();
    let read = move || BaseBackup::start(&config, "acme", "main", None, BaseBackupOptions::default(), Duration::from_secs(5));
    let mut bytes = Vec::new();
    tokio::task::spawn_blocking(move || read().unwrap().read_to_end(&mut bytes).map(|_| bytes))
        .await
        .unwrap()
        .map(|bytes| assert_eq!(bytes, expected))
        .unwrap();

    let service = FakeService::start(Mood::ClosesAfter(0));
    let backup = PageClient::connect(&service.config()).await.unwrap();
    let backup = backup.basebackup("acme", "main", None, BaseBackupOptions::default()).await.unwrap();
    let cut: Result<Vec<_>, _> = backup.into_stream().try_collect().await;
    assert!(cut.is_err(), "a backup that breaks off must not look whole");
}

#[test]
fn threads_share_a_few_sessions() {
    let service = FakeService::start(Mood::Reversed);
    let client = Arc::new(client(&service, Duration::from_secs(10)));
    let threads: Vec<_> = (0..8u32)
        .map(|t| {
            let client = client.clone();
            thread::spawn(move || {
                let mut found = [0; BLCKSZ];
                for i in 0..200 {
                    let blkno = (t * 131 + i * 7) % BLOCKS;
                    client.get_page(REL, blkno, AT, &mut found).expect("a page");
                    assert_eq!(found[..], page(blkno, AT.lsn), "the answer to another question");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(service.connections.load(Ordering::SeqCst) <= 8, "one session a thread is enough");

    let blocks: Vec<_> = (0..BLOCKS).map(|i| (REL, (i * 37) % BLOCKS)).collect();
    let mut seen = vec![0; blocks.len()];
    client
        .get_pages(&blocks, AT, &mut |index, found| {
            seen[index] += 1;
            assert_eq!(found[..], page(blocks[index].1, AT.lsn));
        })
        .unwrap();
    assert!(seen.iter().all(|&n| n == 1), "each page once");

    let all: Vec<u8> = (0..BLOCKS).flat_map(|blkno| page(blkno, AT.lsn)).collect();
    assert!(client.page_range(REL, 0, 5000, AT).unwrap() == all, "a long range is cut into questions and put together");
    assert!(client.page_range(REL, 100, 600, AT).unwrap() == all[100 * BLCKSZ..700 * BLCKSZ]);
    assert_eq!(client.page_range(REL, 0, 0, AT).unwrap().len(), 0);
    assert_eq!(client.slru_range(SlruKind::Clog, 0, 30, 8, AT).unwrap().len(), 2 * BLCKSZ);
    assert_eq!(client.nblocks(REL, AT).unwrap(), BLOCKS);
    assert_eq!(client.list_relations(1663, 5, AT).unwrap().len(), 50_000);
    assert!(client.list_slru(SlruKind::CommitTs, AT).unwrap().is_empty());
}

#[test]
fn a_refusal_is_an_error_at_once_and_the_session_goes_on() {
    let service = FakeService::start(Mood::Good);
    let client = client(&service, Duration::from_secs(60));
    let start = Instant::now();
    let blocks: Vec<_> = (0..500).map(|i| (REL, if i == 100 { BLOCKS + 5 } else { i })).collect();
    let refused = client.get_pages(&blocks, AT, &mut |_, _| {});
    assert!(matches!(refused, Err(ClientError::Answer(ref text)) if text == "no block 1005"), "{refused:?}");
    let mut found = [0; BLCKSZ];
    client.get_page(REL, 1, AT, &mut found).expect("the session is fit for use");
    assert_eq!(service.connections.load(Ordering::SeqCst), 1);
    let other = BlockingPageClient::new(service.config(), "acme", "gone", BlockingOptions::default());
    assert!(matches!(other.nblocks(REL, AT), Err(ClientError::Server { .. })));
    let wrong = FakeService::start(Mood::WrongId);
    assert!(matches!(self::client(&wrong, Duration::from_secs(60)).nblocks(REL, AT), Err(ClientError::Protocol { .. })));
    assert!(start.elapsed() < Duration::from_secs(5), "a refusal is not waited for");
}

#[test]
fn a_server_that_restarts_under_a_call_is_waited_for() {
    let service = FakeService::start(Mood::ClosesAfter(70));
    let client = Arc::new(client(&service, Duration::from_secs(30)));
    let blocks: Vec<_> = (0..BLOCKS).map(|blkno| (REL, blkno)).collect();
    let mut seen = vec![0; blocks.len()];
    client
        .get_pages(&blocks, AT, &mut |index, found| {
            seen[index] += 1;
            assert_eq!(found[..], page(blocks[index].1, AT.lsn));
        })
        .unwrap();
    assert!(seen.iter().all(|&n| n == 1), "each page once, over {} connections", service.connections.load(Ordering::SeqCst));

    let port = service.port;
    drop(service);
    let waits = {
        let client = client.clone();
        thread::spawn(move || client.nblocks(REL, AT))
    };
    thread::sleep(Duration::from_millis(300));
    let not_ready = FakeService::start_at(port, Mood::NotReady);
    thread::sleep(Duration::from_millis(300));
    assert!(!waits.is_finished(), "the call must wait");
    drop(not_ready);
    let service = FakeService::start_at(port, Mood::Good);
    assert_eq!(waits.join().unwrap().unwrap(), BLOCKS);
    drop(service);

    let waits = {
        let client = client.clone();
        thread::spawn(move || client.nblocks(REL, AT))
    };
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    client.stop();
    assert!(waits.join().unwrap().is_err());
    assert!(start.elapsed() < Duration::from_secs(2), "stop ends the waiting");
}

#[test]
fn waiting_has_a_limit() {
    let service = FakeService::start(Mood::NotReady);
    let start = Instant::now();
    let error = client(&service, Duration::from_millis(400)).nblocks(REL, AT).expect_err("never ready");
    assert!(error.to_string().contains("the tenant is being attached"), "{error}");
    assert!((300..3000).contains(&start.elapsed().as_millis()), "gave up after {:?}", start.elapsed());
}
