//! The Postgres wire protocol: what one side writes the other reads, lengths are checked before anything is kept,
//! garbage is an error.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use varve_protocol::connect::{AuthStep, Authenticator, InputBuffer};
use varve_protocol::wire::{
    AuthRequest, BackendMessage, Frame, FrontendMessage, ServerMessage, StartupPacket, WireError, backend, frontend,
    startup::STARTUP_PACKET_SIZE_MAX, take_frame,
};

const LIMIT: usize = 1 << 20;

fn one_frame(bytes: &BytesMut) -> Frame {
    let mut bytes = bytes.clone();
    let frame = take_frame(&mut bytes, LIMIT).expect("a frame that we wrote").expect("a whole frame");
    assert!(bytes.is_empty(), "{} bytes are left", bytes.len());
    frame
}

fn from_server(write: impl FnOnce(&mut BytesMut)) -> BackendMessage {
    let mut out = BytesMut::new();
    write(&mut out);
    BackendMessage::decode(one_frame(&out)).expect("a message that we wrote")
}

fn from_client(write: impl FnOnce(&mut BytesMut)) -> FrontendMessage {
    let mut out = BytesMut::new();
    write(&mut out);
    FrontendMessage::decode(one_frame(&out)).expect("a message that we wrote")
}

#[test]
fn what_a_client_writes_a_server_reads() {
    assert_eq!(from_client(|out| frontend::query("basebackup a b", out)), FrontendMessage::Query("basebackup a b".into()));
    assert_eq!(from_client(|out| frontend::password("s", out)), FrontendMessage::Password(Bytes::from_static(b"s\0")));
    assert_eq!(from_client(|out| frontend::copy_data(out, |out| out.extend_from_slice(b"xy"))), FrontendMessage::CopyData("xy".into()));
    assert_eq!(from_client(frontend::copy_done), FrontendMessage::CopyDone);
    assert_eq!(from_client(frontend::terminate), FrontendMessage::Terminate);
}

#[test]
fn what_a_server_writes_a_client_reads() {
    assert_eq!(from_server(|out| backend::authentication(&AuthRequest::Ok, out)), BackendMessage::Authentication(AuthRequest::Ok));
    let sasl = AuthRequest::Sasl(vec!["SCRAM-SHA-256-PLUS".into(), "SCRAM-SHA-256".into()]);
    assert_eq!(from_server(|out| backend::authentication(&sasl, out)), BackendMessage::Authentication(sasl));
    let status = BackendMessage::ParameterStatus { name: "server_version".into(), value: "15".into() };
    assert_eq!(from_server(|out| backend::parameter_status("server_version", "15", out)), status);
    assert_eq!(from_server(backend::ready_for_query), BackendMessage::ReadyForQuery(b'I'));
    assert_eq!(from_server(|out| backend::row_description(&["a", "b"], out)), BackendMessage::RowDescription(vec!["a".into(), "b".into()]));
    assert_eq!(from_server(|out| backend::data_row(&[Some("1"), None], out)), BackendMessage::DataRow(vec![Some("1".into()), None]));
    assert_eq!(from_server(backend::copy_both_response), BackendMessage::CopyBothResponse);
    assert_eq!(from_server(backend::copy_out_response), BackendMessage::CopyOutResponse);
    assert_eq!(from_server(|out| backend::command_complete("SELECT 1", out)), BackendMessage::CommandComplete("SELECT 1".into()));
    let error = ServerMessage { detail: "d".into(), hint: "h".into(), ..ServerMessage::fatal("57P01", "going down") };
    assert_eq!(from_server(|out| backend::error_response(&error, out)), BackendMessage::ErrorResponse(error));
}

#[test]
fn startup_packets_survive_and_are_bounded() {
    let packets = [
        StartupPacket::SslRequest,
        StartupPacket::GssEncRequest,
        StartupPacket::CancelRequest { process_id: 7, secret: vec![1, 2, 3, 4] },
        StartupPacket::startup(&[("user", "varve"), ("replication", "true")]),
    ];
    for packet in packets {
        let mut out = BytesMut::new();
        packet.encode(&mut out);
        for cut in 0..out.len() {
            let taken = StartupPacket::take(&mut BytesMut::from(&out[..cut]));
            assert_eq!(taken, Ok(None), "{packet:?} cut at {cut} must wait for more bytes");
        }
        assert_eq!(StartupPacket::take(&mut out), Ok(Some(packet)));
        assert!(out.is_empty());
    }
    for (bytes, what) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "longer than"),
        (&[0, 0, 0, 4, 0, 3, 0, 0], "less than 8"),
        (&[0, 0, 0, 8, 0, 2, 0, 0], "protocol version 2.0"),
        (&[0, 0, 0, 8, 0, 3, 0, 0], "NUL"),
        (&[0, 0, 0, 10, 0, 3, 0, 0, 0, 0], "1 bytes too many"),
    ] {
        let error = StartupPacket::take(&mut BytesMut::from(bytes)).expect_err("must be refused");
        assert!(error.to_string().contains(what), "{bytes:?}: expected '{what}' in '{error}'");
    }
    let big = u32::try_from(STARTUP_PACKET_SIZE_MAX + 1).unwrap().to_be_bytes();
    assert!(matches!(StartupPacket::take(&mut BytesMut::from(&big[..])), Err(WireError::TooLong { .. })));
}

#[test]
fn a_length_of_4_gib_is_refused_at_once() {
    let mut bytes = BytesMut::from(&[b'd', 0xFF, 0xFF, 0xFF, 0xFF][..]);
    let error = take_frame(&mut bytes, 64).expect_err("4 GiB must be refused");
    assert_eq!(error.to_string(), "message with tag 'd' of 4294967295 bytes is longer than the 64 that are allowed here");
    let mut bytes = BytesMut::from(&[0, 0, 0, 0, 3][..]);
    assert!(take_frame(&mut bytes, 64).expect_err("3 is no length").to_string().contains("less than 4"));
}

#[test]
fn frames_come_out_whole_however_they_are_cut() {
    let mut stream = BytesMut::new();
    for i in 0..200u32 {
        frontend::copy_data(&mut stream, |out| out.extend_from_slice(&vec![i as u8; (i * 37) as usize]));
    }
    for step in [1, 3, 100, 4096, 1 << 20] {
        let mut buffer = InputBuffer::default();
        let mut rest = &stream[..];
        let mut seen = 0u32;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(step.min(rest.len()));
            let mut now = now;
            while !now.is_empty() {
                buffer.read_from(&mut now).unwrap();
                while let Some((tag, body)) = buffer.take_frame(LIMIT).unwrap() {
                    assert_eq!((tag, body.len()), (b'd', (seen * 37) as usize));
                    assert!(body.iter().all(|&b| b == seen as u8), "frame {seen} holds another's bytes");
                    seen += 1;
                }
            }
            rest = later;
        }
        assert_eq!((seen, buffer.len()), (200, 0), "cut into pieces of {step}");
    }
}

#[test]
fn authentication_is_answered_and_a_server_must_prove_itself() {
    let mut out = BytesMut::new();
    let mut trust = Authenticator::new("u", None);
    assert_eq!(trust.respond(&AuthRequest::Ok, &mut out), Ok(AuthStep::Done));
    let asked = Authenticator::new("u", None).respond(&AuthRequest::CleartextPassword, &mut out);
    assert!(asked.unwrap_err().contains("none was given"));
    let mut md5 = Authenticator::new("md5_user", Some("password"));
    assert_eq!(md5.respond(&AuthRequest::Md5Password([0x2a, 0x3d, 0x8f, 0xe0]), &mut out), Ok(AuthStep::Continue));
    assert!(out.ends_with(b"md562af4dd09bbb41884907a838a3233294\0"), "Postgres's own example");
    let mut scram = Authenticator::new("u", Some("p"));
    assert_eq!(scram.respond(&AuthRequest::Sasl(vec!["SCRAM-SHA-256".into()]), &mut out), Ok(AuthStep::Continue));
    assert!(scram.respond(&AuthRequest::Ok, &mut out).is_err(), "a server that skips SCRAM's end proved nothing");
    let slow = AuthRequest::SaslContinue(Bytes::from_static(b"r=abc,s=QUJD,i=4000000000"));
    assert!(scram.respond(&slow, &mut out).unwrap_err().contains("4000000000 SCRAM rounds"));
}

proptest! {
    #[test]
    fn garbage_is_an_error_or_a_message(bytes in prop::collection::vec(any::<u8>(), 0..300), tag in any::<u8>()) {
        let body = Bytes::from(bytes.clone());
        let _ = FrontendMessage::decode(Frame { tag, body: body.clone() });
        let _ = BackendMessage::decode(Frame { tag, body });
        let mut buffer = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = take_frame(&mut buffer, 100) {}
        let _ = StartupPacket::take(&mut BytesMut::from(&bytes[..]));
    }
}
