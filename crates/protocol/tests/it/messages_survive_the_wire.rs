//! Every message is the same after the wire, and no bytes make a decoder panic, read past the end or accept leftovers.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use varve_postgres::{BLCKSZ, Fork, Lsn, RelFork, RelNode, slru::SlruKind};
use varve_protocol::message::{ERROR_TEXT_SIZE_MAX, MessageError, RANGE_PAGES_MAX, REQUEST_SIZE_MAX};
use varve_protocol::{Answer, Header, Query, RelationSize, Request, Response, SlruSegmentSize};

fn fork() -> impl Strategy<Value = Fork> {
    prop::sample::select(&Fork::ALL[..])
}

fn kind() -> impl Strategy<Value = SlruKind> {
    prop::sample::select(&SlruKind::ALL[..])
}

fn rel() -> impl Strategy<Value = RelFork> {
    (any::<u32>(), any::<u32>(), any::<u32>(), fork()).prop_map(|(spc, db, rel, fork)| RelNode { spc, db, rel }.fork(fork))
}

fn header() -> impl Strategy<Value = Header> {
    (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(request_id, lsn, since)| Header {
        request_id,
        request_lsn: Lsn(lsn),
        not_modified_since: Lsn(since),
    })
}

fn query() -> impl Strategy<Value = Query> {
    prop_oneof![
        rel().prop_map(Query::Exists),
        rel().prop_map(Query::Nblocks),
        (rel(), any::<u32>()).prop_map(|(rel, blkno)| Query::GetPage(rel, blkno)),
        any::<u32>().prop_map(Query::DbSize),
        (kind(), any::<u32>()).prop_map(|(kind, segno)| Query::SlruSegment(kind, segno)),
        (any::<u32>(), any::<u32>()).prop_map(|(spc, db)| Query::ListRelations { spc, db }),
        (rel(), any::<u32>(), 0..=RANGE_PAGES_MAX).prop_map(|(rel, first, count)| Query::PageRange { rel, first, count }),
        kind().prop_map(Query::ListSlru),
        (kind(), any::<u32>(), any::<u32>(), 0..=RANGE_PAGES_MAX).prop_map(|(kind, segno, first, count)| Query::SlruRange {
            kind,
            segno,
            first,
            count
        }),
    ]
}

fn pages(count_max: usize) -> impl Strategy<Value = Bytes> {
    (0..=count_max, any::<u8>()).prop_map(|(count, fill)| Bytes::from(vec![fill; count * BLCKSZ]))
}

fn answer_to(query: Query) -> BoxedStrategy<Answer> {
    match query {
        Query::Exists(_) => any::<bool>().prop_map(Answer::Exists).boxed(),
        Query::Nblocks(_) => any::<u32>().prop_map(Answer::Nblocks).boxed(),
        Query::GetPage(..) => any::<u8>().prop_map(|fill| Answer::Page(Bytes::from(vec![fill; BLCKSZ]))).boxed(),
        Query::DbSize(_) => any::<i64>().prop_map(Answer::DbSize).boxed(),
        Query::SlruSegment(..) => pages(32).prop_map(Answer::SlruSegment).boxed(),
        Query::PageRange { .. } => pages(8).prop_map(Answer::Pages).boxed(),
        Query::SlruRange { .. } => pages(8).prop_map(Answer::SlruPages).boxed(),
        Query::ListRelations { .. } => {
            let row = (any::<u32>(), fork(), any::<u32>()).prop_map(|(rel, fork, blocks)| RelationSize { rel, fork, blocks });
            prop::collection::vec(row, 0..50).prop_map(Answer::Relations).boxed()
        }
        Query::ListSlru(_) => {
            let row = (any::<u32>(), any::<u32>()).prop_map(|(segno, pages)| SlruSegmentSize { segno, pages });
            prop::collection::vec(row, 0..50).prop_map(Answer::SlruSegments).boxed()
        }
    }
}

fn response() -> impl Strategy<Value = Response> {
    let answered = (header(), query()).prop_flat_map(|(header, query)| {
        let request = Request { header, query };
        answer_to(query).prop_map(move |answer| Response::new(request, answer))
    });
    let refused = (header(), "[^\0]{0,200}").prop_map(|(header, message)| Response::error(header, &message));
    prop_oneof![4 => answered, 1 => refused]
}

fn encoded(response: &Response) -> Bytes {
    let mut out = BytesMut::new();
    response.encode(&mut out);
    out.freeze()
}

proptest! {
    #[test]
    fn a_request_survives(header in header(), query in query()) {
        let request = Request { header, query };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        prop_assert!(out.len() <= REQUEST_SIZE_MAX, "a request of {} bytes is longer than REQUEST_SIZE_MAX", out.len());
        let bytes = out.freeze();
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
        for cut in 0..bytes.len() {
            let is_short = matches!(Request::decode(&bytes[..cut]), Err(MessageError::Short { .. }));
            prop_assert!(is_short, "a request cut at {} must be refused as short", cut);
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        let is_long = matches!(Request::decode(&longer), Err(MessageError::Long { extra: 1, .. }));
        prop_assert!(is_long, "a request with a byte too many must be refused");
    }

    #[test]
    fn a_response_survives(response in response(), cut in any::<prop::sample::Index>()) {
        let bytes = encoded(&response);
        prop_assert_eq!(Response::decode(&bytes), Ok(response.clone()));
        let cut = cut.index(bytes.len());
        prop_assert!(Response::decode(&bytes.slice(..cut)).is_err(), "a response cut at {} must be refused", cut);
        if matches!(response, Response::Answer { .. }) {
            let mut longer = bytes.to_vec();
            longer.push(0);
            prop_assert!(Response::decode(&longer.into()).is_err(), "a response with a byte too many must be refused");
        }
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(tag in prop_oneof![0u8..5, 32u8..36, 100u8..106, 132u8..136, any::<u8>()],
                                           rest in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = vec![tag];
        bytes.extend(rest);
        let bytes = Bytes::from(bytes);
        if let Ok(request) = Request::decode(&bytes) {
            let mut out = BytesMut::new();
            request.encode(&mut out);
            prop_assert_eq!(out.freeze(), bytes.clone(), "what was accepted as a request must be its one encoding");
        }
        let _ = Response::decode(&bytes);
    }
}

#[test]
fn the_layout_is_that_of_neons_page_service() {
    let header = Header { request_id: 0x0102_0304_0506_0708, request_lsn: Lsn::MAX, not_modified_since: Lsn(0x16B_3748) };
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::VisibilityMap);
    let request = Request { header, query: Query::GetPage(rel, 7) };
    let mut out = BytesMut::new();
    request.encode(&mut out);
    let rest = [
        1, 2, 3, 4, 5, 6, 7, 8, // request id
        255, 255, 255, 255, 255, 255, 255, 255, // request LSN
        0, 0, 0, 0, 1, 0x6B, 0x37, 0x48, // not modified since
        0, 0, 6, 0x7F, 0, 0, 0, 5, 0, 0, 0x40, 0, 2, // relation and fork
        0, 0, 0, 7, // block
    ];
    assert_eq!(out[0], 2, "the tag of get page");
    assert_eq!(out[1..], rest);
    let bytes = encoded(&Response::new(request, Answer::Page(Bytes::from(vec![9; BLCKSZ]))));
    assert_eq!(bytes[0], 102, "the tag of a page");
    assert_eq!(bytes[1..=rest.len()], rest, "the answer repeats the question");
    assert_eq!(bytes.len(), 1 + rest.len() + BLCKSZ);
    let bytes = encoded(&Response::error(header, "no such page"));
    assert_eq!(bytes[0], 103);
    assert_eq!(bytes[1..25], rest[..24]);
    assert_eq!(&bytes[25..], b"no such page\0");
}

#[test]
fn an_announced_length_that_did_not_arrive_allocates_nothing() {
    for (query, row) in [(Query::ListRelations { spc: 1, db: 2 }, 9), (Query::ListSlru(SlruKind::Clog), 8)] {
        let request = Request { header: Header { request_id: 1, request_lsn: Lsn(1), not_modified_since: Lsn(1) }, query };
        let mut out = BytesMut::new();
        Response::encode_start(&request, &mut out);
        out.extend_from_slice(&u32::MAX.to_be_bytes());
        out.extend_from_slice(&vec![0; row]);
        let error = Response::decode(&out.freeze()).expect_err("a count of four thousand million rows must be refused");
        assert!(error.to_string().contains("4294967295 rows"), "the error must say what was announced: {error}");
    }
}

#[test]
fn a_range_is_bounded() {
    let rel = RelNode { spc: 1, db: 2, rel: 3 }.fork(Fork::Main);
    let header = Header { request_id: 1, request_lsn: Lsn(1), not_modified_since: Lsn(1) };
    let mut out = BytesMut::new();
    Request { header, query: Query::PageRange { rel, first: 0, count: RANGE_PAGES_MAX + 1 } }.encode(&mut out);
    let error = Request::decode(&out.freeze()).expect_err("a range of too many pages must be refused");
    assert!(error.to_string().contains("at most 256"), "{error}");
}

#[test]
fn error_texts_are_cut_and_hold_no_nul() {
    let header = Header { request_id: 1, request_lsn: Lsn(1), not_modified_since: Lsn(1) };
    let Response::Error { message, .. } = Response::error(header, &format!("a\0b{}", "ä".repeat(ERROR_TEXT_SIZE_MAX))) else { panic!() };
    assert!(message.starts_with("a bä") && message.len() <= ERROR_TEXT_SIZE_MAX, "cut to {} bytes", message.len());
    let response = Response::error(header, &message);
    assert_eq!(Response::decode(&encoded(&response)), Ok(response));
}

#[test]
fn an_answer_of_another_kind_becomes_an_error() {
    let header = Header { request_id: 1, request_lsn: Lsn(1), not_modified_since: Lsn(1) };
    let response = Response::new(Request { header, query: Query::DbSize(5) }, Answer::Exists(true));
    assert!(matches!(response, Response::Error { .. }), "{response:?}");
}
