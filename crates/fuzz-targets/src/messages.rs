//! Messages of the page service and of the wire protocol.

use bytes::{Bytes, BytesMut};
use varve_pageserver::page_service::Command;
use varve_protocol::wire::replication::WalSenderMessage;
use varve_protocol::wire::{BackendMessage, FrontendMessage, StartupPacket, take_frame};
use varve_protocol::{Request, Response};

/// Longest frame that is taken.
const FRAME_SIZE_MAX: usize = 1 << 20;

/// Requests, responses and commands of any bytes are understood or refused; what is understood has the same bytes
/// again.
pub(crate) fn page_service(data: &[u8]) {
    let mut out = BytesMut::new();
    if let Ok(request) = Request::decode(data) {
        request.encode(&mut out);
        assert_eq!(out, data, "a request must have the bytes that it came from");
    }
    out.clear();
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(response) = Response::decode(&bytes) {
        response.encode(&mut out);
        assert_eq!(Response::decode(&out.freeze()).ok(), Some(response), "a response must survive the wire");
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Command::parse(text);
    }
}

/// Frames of any bytes are understood or refused.
pub(crate) fn wire(data: &[u8]) {
    let mut buffer = BytesMut::from(data);
    let _ = StartupPacket::take(&mut buffer);
    let mut buffer = BytesMut::from(data);
    while let Ok(Some(frame)) = take_frame(&mut buffer, FRAME_SIZE_MAX) {
        let _ = WalSenderMessage::decode(&frame.body);
        let _ = BackendMessage::decode(frame.clone());
        let _ = FrontendMessage::decode(frame);
    }
}
