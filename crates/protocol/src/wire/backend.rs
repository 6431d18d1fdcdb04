//! Messages that a server sends.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    WireError,
    frame::{Frame, put_frame, show_tag},
    text::{put_cstr, take_cstr_lossy, take_u16, take_u32},
};

/// Most bytes in the body of a server's message; a response of the page service is the largest.
pub const BACKEND_BODY_SIZE_MAX: usize = crate::message::RESPONSE_SIZE_MAX + 64;
/// Most fields that we keep of an error or notice.
const FIELDS_MAX: usize = 32;
/// Most SASL mechanisms that a server may offer.
const MECHANISMS_MAX: usize = 16;

/// `SQLSTATE` codes that we send or that a client decides by.
pub mod sqlstate {
    /// Wrong bytes on the wire.
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    /// A feature that is not there.
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// A command that is not understood.
    pub const SYNTAX_ERROR: &str = "42601";
    /// The named tenant or timeline does not exist.
    pub const UNDEFINED_OBJECT: &str = "42704";
    /// A value that cannot be.
    pub const INVALID_PARAMETER_VALUE: &str = "22023";
    /// No place for another connection.
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    /// What was under way is given up.
    pub const QUERY_CANCELED: &str = "57014";
    /// The server is going down.
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    /// The server, or what was asked for, is not ready yet.
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    /// The server had been waiting for the client for too long.
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
    /// A fault of the server's.
    pub const INTERNAL_ERROR: &str = "XX000";

    /// Whether trying again later may help.
    pub fn is_transient(code: &str) -> bool {
        matches!(code, TOO_MANY_CONNECTIONS | ADMIN_SHUTDOWN | "57P02" | CANNOT_CONNECT_NOW | IDLE_SESSION_TIMEOUT)
    }
}

/// What the server wants to know before it lets the client in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AuthRequest {
    /// Nothing more: the client is in.
    Ok,
    /// The password in clear.
    CleartextPassword,
    /// The password hashed with this salt.
    Md5Password([u8; 4]),
    /// A SASL exchange by one of these mechanisms.
    Sasl(Vec<String>),
    /// The next step of a SASL exchange.
    SaslContinue(Bytes),
    /// The last step of a SASL exchange.
    SaslFinal(Bytes),
    /// Something that we do not speak; its number.
    Unsupported(u32),
}

/// An error or a notice.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServerMessage {
    /// `ERROR`, `FATAL`, `WARNING`, ...
    pub severity: String,
    /// Its `SQLSTATE`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// More about it, or empty.
    pub detail: String,
    /// What to do, or empty.
    pub hint: String,
}

impl ServerMessage {
    /// An error with this code and text.
    pub fn error(code: &str, message: impl Into<String>) -> ServerMessage {
        ServerMessage { severity: "ERROR".to_owned(), code: code.to_owned(), message: message.into(), ..ServerMessage::default() }
    }

    /// The same as a reason to end the connection.
    pub fn fatal(code: &str, message: impl Into<String>) -> ServerMessage {
        ServerMessage { severity: "FATAL".to_owned(), ..Self::error(code, message) }
    }

    fn decode(body: &mut Bytes) -> Result<ServerMessage, WireError> {
        let mut message = ServerMessage::default();
        for _ in 0..FIELDS_MAX {
            match body.try_get_u8().map_err(|_| WireError::malformed("error or notice ends early"))? {
                0 => return Ok(message),
                field => {
                    let value = take_cstr_lossy(body, "field of an error or notice")?;
                    match field {
                        b'V' => message.severity = value,
                        b'S' if message.severity.is_empty() => message.severity = value,
                        b'C' => message.code = value,
                        b'M' => message.message = value,
                        b'D' => message.detail = value,
                        b'H' => message.hint = value,
                        _ => {}
                    }
                }
            }
        }
        Err(WireError::malformed(format!("error or notice with more than {FIELDS_MAX} fields")))
    }
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (SQLSTATE {})", self.severity, self.message, self.code)?;
        if !self.detail.is_empty() {
            write!(f, "; {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, "; {}", self.hint)?;
        }
        Ok(())
    }
}

/// A row's values as text, `None` for NULL.
pub type Row = Vec<Option<String>>;

/// A message from a server.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub enum BackendMessage {
    Authentication(AuthRequest),
    ParameterStatus {
        name: String,
        value: String,
    },
    BackendKeyData,
    /// With the transaction status: `I`, `T` or `E`.
    ReadyForQuery(u8),
    /// With the columns' names.
    RowDescription(Vec<String>),
    DataRow(Row),
    CommandComplete(String),
    EmptyQueryResponse,
    CopyInResponse,
    CopyOutResponse,
    CopyBothResponse,
    CopyData(Bytes),
    CopyDone,
    ErrorResponse(ServerMessage),
    NoticeResponse(ServerMessage),
    /// A message that means nothing to us: answers of the extended protocol, notifications.
    Other(u8),
}

impl BackendMessage {
    /// The message in `frame`.
    ///
    /// # Errors
    /// When the tag is unknown or the body is not as the tag demands.
    pub fn decode(frame: Frame) -> Result<BackendMessage, WireError> {
        let mut body = frame.body;
        Ok(match frame.tag {
            b'd' => BackendMessage::CopyData(body),
            b'R' => BackendMessage::Authentication(decode_auth(body)?),
            b'S' => BackendMessage::ParameterStatus {
                name: take_cstr_lossy(&mut body, "name of a parameter")?,
                value: take_cstr_lossy(&mut body, "value of a parameter")?,
            },
            b'K' => BackendMessage::BackendKeyData,
            b'Z' => BackendMessage::ReadyForQuery(body.try_get_u8().map_err(|_| WireError::malformed("ReadyForQuery without a status"))?),
            b'T' => BackendMessage::RowDescription(decode_columns(body)?),
            b'D' => BackendMessage::DataRow(decode_row(body)?),
            b'C' => BackendMessage::CommandComplete(take_cstr_lossy(&mut body, "command tag")?),
            b'I' => BackendMessage::EmptyQueryResponse,
            b'G' => BackendMessage::CopyInResponse,
            b'H' => BackendMessage::CopyOutResponse,
            b'W' => BackendMessage::CopyBothResponse,
            b'c' => BackendMessage::CopyDone,
            b'E' => BackendMessage::ErrorResponse(ServerMessage::decode(&mut body)?),
            b'N' => BackendMessage::NoticeResponse(ServerMessage::decode(&mut body)?),
            tag @ (b'1' | b'2' | b'3' | b'A' | b'n' | b's' | b't' | b'v') => BackendMessage::Other(tag),
            tag => return Err(WireError::malformed(format!("unknown message tag {} from the server", show_tag(tag)))),
        })
    }
}

fn decode_auth(mut body: Bytes) -> Result<AuthRequest, WireError> {
    Ok(match take_u32(&mut body, "authentication request")? {
        0 => AuthRequest::Ok,
        3 => AuthRequest::CleartextPassword,
        5 => match body.first_chunk() {
            Some(salt) => AuthRequest::Md5Password(*salt),
            None => return Err(WireError::malformed("authentication request ends early")),
        },
        10 => {
            let mut mechanisms = Vec::new();
            while !body.is_empty() && body[0] != 0 {
                if mechanisms.len() == MECHANISMS_MAX {
                    return Err(WireError::malformed(format!("authentication request with more than {MECHANISMS_MAX} mechanisms")));
                }
                mechanisms.push(take_cstr_lossy(&mut body, "authentication mechanism")?);
            }
            AuthRequest::Sasl(mechanisms)
        }
        11 => AuthRequest::SaslContinue(body),
        12 => AuthRequest::SaslFinal(body),
        other => AuthRequest::Unsupported(other),
    })
}

fn decode_columns(mut body: Bytes) -> Result<Vec<String>, WireError> {
    const FIXED_SIZE: usize = 18;
    let count = take_u16(&mut body, "row description")?;
    let mut names = Vec::new();
    for _ in 0..count {
        names.push(take_cstr_lossy(&mut body, "column name")?);
        if body.len() < FIXED_SIZE {
            return Err(WireError::malformed("row description ends early"));
        }
        body.advance(FIXED_SIZE);
    }
    Ok(names)
}

fn decode_row(mut body: Bytes) -> Result<Row, WireError> {
    let count = take_u16(&mut body, "row")?;
    let mut row = Vec::new();
    for _ in 0..count {
        row.push(match take_u32(&mut body, "row")? {
            u32::MAX => None,
            len if len as usize <= body.len() => Some(String::from_utf8_lossy(&body.split_to(len as usize)).into_owned()),
            _ => return Err(WireError::malformed("row ends early")),
        });
    }
    Ok(row)
}

/// Appends a request to authenticate.
pub fn authentication(request: &AuthRequest, out: &mut BytesMut) {
    put_frame(b'R', out, |out| match request {
        AuthRequest::Ok => out.put_u32(0),
        AuthRequest::CleartextPassword => out.put_u32(3),
        AuthRequest::Md5Password(salt) => {
            out.put_u32(5);
            out.put_slice(salt);
        }
        AuthRequest::Sasl(mechanisms) => {
            out.put_u32(10);
            for mechanism in mechanisms {
                put_cstr(mechanism, out);
            }
            out.put_u8(0);
        }
        AuthRequest::SaslContinue(data) => {
            out.put_u32(11);
            out.put_slice(data);
        }
        AuthRequest::SaslFinal(data) => {
            out.put_u32(12);
            out.put_slice(data);
        }
        AuthRequest::Unsupported(number) => out.put_u32(*number),
    });
}

/// Appends a setting that the client should know of.
pub fn parameter_status(name: &str, value: &str, out: &mut BytesMut) {
    put_frame(b'S', out, |out| {
        put_cstr(name, out);
        put_cstr(value, out);
    });
}

/// Appends the key that a client would cancel with.
pub fn backend_key_data(process_id: u32, secret: u32, out: &mut BytesMut) {
    put_frame(b'K', out, |out| {
        out.put_u32(process_id);
        out.put_u32(secret);
    });
}

/// Appends "not in a transaction, ready".
pub fn ready_for_query(out: &mut BytesMut) {
    put_frame(b'Z', out, |out| out.put_u8(b'I'));
}

/// Appends the end of a command.
pub fn command_complete(tag: &str, out: &mut BytesMut) {
    put_frame(b'C', out, |out| put_cstr(tag, out));
}

/// Appends a description of text columns.
pub fn row_description(names: &[&str], out: &mut BytesMut) {
    const TEXT_OID: u32 = 25;
    put_frame(b'T', out, |out| {
        out.put_u16(names.len() as u16);
        for name in names {
            put_cstr(name, out);
            out.put_u32(0); // no table
            out.put_u16(0); // no column of a table
            out.put_u32(TEXT_OID);
            out.put_i16(-1); // varying length
            out.put_i32(-1); // no type modifier
            out.put_u16(0); // text format
        }
    });
}

/// Appends a row of text values.
pub fn data_row(values: &[Option<&str>], out: &mut BytesMut) {
    put_frame(b'D', out, |out| {
        out.put_u16(values.len() as u16);
        for value in values {
            match value {
                None => out.put_i32(-1),
                Some(value) => {
                    out.put_u32(value.len() as u32);
                    out.put_slice(value.as_bytes());
                }
            }
        }
    });
}

/// Appends the start of a COPY from server to client.
pub fn copy_out_response(out: &mut BytesMut) {
    put_frame(b'H', out, |out| out.put_slice(&[0, 0, 0]));
}

/// Appends the start of a COPY in both directions.
pub fn copy_both_response(out: &mut BytesMut) {
    put_frame(b'W', out, |out| out.put_slice(&[0, 0, 0]));
}

/// Appends COPY data, which `body` appends.
pub fn copy_data(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    put_frame(b'd', out, body);
}

/// Appends the end of the server's side of a COPY.
pub fn copy_done(out: &mut BytesMut) {
    put_frame(b'c', out, |_| {});
}

/// Appends a message without a body: `1` ParseComplete, `2` BindComplete, `3` CloseComplete, `n` NoData, `I`
/// EmptyQueryResponse.
pub fn empty(tag: u8, out: &mut BytesMut) {
    put_frame(tag, out, |_| {});
}

/// Appends "this statement has no parameters".
pub fn no_parameters(out: &mut BytesMut) {
    put_frame(b't', out, |out| out.put_u16(0));
}

/// Appends a result of one row with one column of text: its description and the row.
pub fn text_row(column: &str, value: &str, out: &mut BytesMut) {
    /// Oid of the type `text`.
    const TEXT: u32 = 25;
    put_frame(b'T', out, |out| {
        out.put_u16(1);
        out.put_slice(column.as_bytes());
        out.put_u8(0);
        out.put_u32(0); // of no table
        out.put_u16(0);
        out.put_u32(TEXT);
        out.put_i16(-1); // of any length
        out.put_i32(-1);
        out.put_u16(0); // as text
    });
    put_frame(b'D', out, |out| {
        out.put_u16(1);
        out.put_u32(value.len() as u32);
        out.put_slice(value.as_bytes());
    });
}

/// Appends "of protocol 3, minor version 0 is the newest that I speak".
pub fn negotiate_protocol_version(out: &mut BytesMut) {
    put_frame(b'v', out, |out| {
        out.put_u32(3 << 16);
        out.put_u32(0); // no option was refused
    });
}

/// Appends an error.
pub fn error_response(error: &ServerMessage, out: &mut BytesMut) {
    put_frame(b'E', out, |out| {
        for (field, value) in [
            (b'S', &error.severity),
            (b'V', &error.severity),
            (b'C', &error.code),
            (b'M', &error.message),
            (b'D', &error.detail),
            (b'H', &error.hint),
        ] {
            if !value.is_empty() {
                out.put_u8(field);
                put_cstr(value, out);
            }
        }
        out.put_u8(0);
    });
}
