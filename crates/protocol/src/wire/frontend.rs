//! Messages that a client sends after the startup packet.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    WireError,
    frame::{Frame, put_frame, show_tag},
    text::{put_cstr, take_cstr},
};

/// Most bytes in the body of a message from a client that is not streaming: a query, a password.
pub const FRONTEND_BODY_SIZE_MAX: usize = 64 * 1024;

/// A message from a client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FrontendMessage {
    /// A simple query.
    Query(String),
    /// Prepares a statement (only its text is of interest to us).
    Parse {
        /// The statement's name, empty for the unnamed one.
        name: String,
        /// Its text.
        query: String,
    },
    /// Asks what a statement or portal returns.
    Describe,
    /// Makes a portal of a statement.
    Bind {
        /// The statement's name.
        statement: String,
    },
    /// Runs a portal.
    Execute,
    /// Forgets a statement or portal.
    Close,
    /// Ends an extended query.
    Sync,
    /// Asks for what is buffered.
    Flush,
    /// A password, or a step of SASL.
    Password(Bytes),
    /// Data in a COPY.
    CopyData(Bytes),
    /// The end of the client's side of a COPY.
    CopyDone,
    /// The client gives up its side of a COPY.
    CopyFail(String),
    /// The client goes.
    Terminate,
}

impl FrontendMessage {
    /// The message in `frame`.
    ///
    /// # Errors
    /// When the tag is unknown or the body is not as the tag demands.
    pub fn decode(frame: Frame) -> Result<FrontendMessage, WireError> {
        let mut body = frame.body;
        let message = match frame.tag {
            b'Q' => FrontendMessage::Query(take_cstr(&mut body, "query")?),
            b'P' => {
                let name = take_cstr(&mut body, "statement name")?;
                let query = take_cstr(&mut body, "statement")?;
                body.clear(); // parameter types: no command of ours has parameters
                FrontendMessage::Parse { name, query }
            }
            b'D' => {
                body.clear();
                FrontendMessage::Describe
            }
            b'B' => {
                let _portal = take_cstr(&mut body, "portal name")?;
                let statement = take_cstr(&mut body, "statement name")?;
                body.clear();
                FrontendMessage::Bind { statement }
            }
            b'E' => {
                body.clear();
                FrontendMessage::Execute
            }
            b'C' => {
                body.clear();
                FrontendMessage::Close
            }
            b'S' => FrontendMessage::Sync,
            b'H' => FrontendMessage::Flush,
            b'p' => FrontendMessage::Password(std::mem::take(&mut body)),
            b'd' => FrontendMessage::CopyData(std::mem::take(&mut body)),
            b'c' => FrontendMessage::CopyDone,
            b'f' => FrontendMessage::CopyFail(take_cstr(&mut body, "reason of a failed COPY")?),
            b'X' => FrontendMessage::Terminate,
            tag => return Err(WireError::malformed(format!("unknown message tag {} from the client", show_tag(tag)))),
        };
        if !body.is_empty() {
            return Err(WireError::malformed(format!("message with tag {} has {} bytes too many", show_tag(frame.tag), body.len())));
        }
        Ok(message)
    }
}

/// Appends a simple query.
pub fn query(sql: &str, out: &mut BytesMut) {
    put_frame(b'Q', out, |out| put_cstr(sql, out));
}

/// Appends a password, in clear or hashed.
pub fn password(password: &str, out: &mut BytesMut) {
    put_frame(b'p', out, |out| put_cstr(password, out));
}

/// Appends the first message of a SASL exchange.
pub fn sasl_initial_response(mechanism: &str, data: &[u8], out: &mut BytesMut) {
    put_frame(b'p', out, |out| {
        put_cstr(mechanism, out);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
    });
}

/// Appends a later message of a SASL exchange.
pub fn sasl_response(data: &[u8], out: &mut BytesMut) {
    put_frame(b'p', out, |out| out.put_slice(data));
}

/// Appends COPY data, which `body` appends.
pub fn copy_data(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    put_frame(b'd', out, body);
}

/// Appends the end of the client's side of a COPY.
pub fn copy_done(out: &mut BytesMut) {
    put_frame(b'c', out, |_| {});
}

/// Appends a farewell.
pub fn terminate(out: &mut BytesMut) {
    put_frame(b'X', out, |_| {});
}
