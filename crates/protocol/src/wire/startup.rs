//! The first packet of a connection, which has no tag: `length u32 (itself included) | code u32 | rest`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    WireError,
    text::{put_cstr, take_cstr, take_u32},
};

/// `MAX_STARTUP_PACKET_LENGTH`: no startup packet is longer.
pub const STARTUP_PACKET_SIZE_MAX: usize = 10_000;
/// Most parameters that we keep of a startup packet.
const PARAMETERS_MAX: usize = 64;

const PROTOCOL_MAJOR: u32 = 3;
const CANCEL_REQUEST: u32 = 1234 << 16 | 5678;
const SSL_REQUEST: u32 = 1234 << 16 | 5679;
const GSS_ENC_REQUEST: u32 = 1234 << 16 | 5680;

/// What a client says first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartupPacket {
    /// It asks for TLS; the answer is one byte, `S` or `N`, and then it begins anew.
    SslRequest,
    /// It asks for GSSAPI encryption; the answer is one byte, `G` or `N`, and then it begins anew.
    GssEncRequest,
    /// It asks that another connection's query be cancelled; there is no answer.
    CancelRequest {
        /// Process id that the other connection was given.
        process_id: u32,
        /// Secret that the other connection was given.
        secret: Vec<u8>,
    },
    /// It starts a session.
    Startup {
        /// Minor version of protocol 3 that it would like.
        minor_version: u16,
        /// `user`, `database`, `application_name`, `replication`, settings.
        parameters: Vec<(String, String)>,
    },
}

impl StartupPacket {
    /// A start of a session with these parameters.
    pub fn startup(parameters: &[(&str, &str)]) -> StartupPacket {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        StartupPacket::Startup { minor_version: 0, parameters }
    }

    /// Takes a startup packet off the front of `buffer`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// When this is no startup packet of protocol 3, or it is too long.
    pub fn take(buffer: &mut BytesMut) -> Result<Option<StartupPacket>, WireError> {
        let Some(len) = buffer.first_chunk().map(|b| u32::from_be_bytes(*b)) else { return Ok(None) };
        if len < 8 {
            return Err(WireError::malformed(format!("startup packet with length {len}, which is less than 8")));
        }
        if len as usize > STARTUP_PACKET_SIZE_MAX {
            return Err(WireError::TooLong { what: "startup packet".to_owned(), len: u64::from(len), max: STARTUP_PACKET_SIZE_MAX });
        }
        if buffer.len() < len as usize {
            return Ok(None);
        }
        let mut body = buffer.split_to(len as usize).freeze();
        body.advance(4);
        Self::decode(body).map(Some)
    }

    fn decode(mut body: Bytes) -> Result<StartupPacket, WireError> {
        let code = take_u32(&mut body, "startup packet")?;
        let packet = match code {
            SSL_REQUEST => StartupPacket::SslRequest,
            GSS_ENC_REQUEST => StartupPacket::GssEncRequest,
            CANCEL_REQUEST => {
                let process_id = take_u32(&mut body, "cancel request")?;
                StartupPacket::CancelRequest { process_id, secret: std::mem::take(&mut body).to_vec() }
            }
            _ if code >> 16 == PROTOCOL_MAJOR => {
                let mut parameters = Vec::new();
                loop {
                    let name = take_cstr(&mut body, "name of a startup parameter")?;
                    if name.is_empty() {
                        break;
                    }
                    if parameters.len() == PARAMETERS_MAX {
                        return Err(WireError::malformed(format!("startup packet with more than {PARAMETERS_MAX} parameters")));
                    }
                    let value = take_cstr(&mut body, "value of a startup parameter")?;
                    parameters.push((name, value));
                }
                StartupPacket::Startup { minor_version: (code & 0xFFFF) as u16, parameters }
            }
            _ => {
                let (major, minor) = (code >> 16, code & 0xFFFF);
                return Err(WireError::malformed(format!("protocol version {major}.{minor} is not supported, 3.0 is")));
            }
        };
        if !body.is_empty() {
            return Err(WireError::malformed(format!("startup packet has {} bytes too many", body.len())));
        }
        Ok(packet)
    }

    /// Appends this packet's bytes to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        let start = out.len();
        out.put_u32(0);
        match self {
            StartupPacket::SslRequest => out.put_u32(SSL_REQUEST),
            StartupPacket::GssEncRequest => out.put_u32(GSS_ENC_REQUEST),
            StartupPacket::CancelRequest { process_id, secret } => {
                out.put_u32(CANCEL_REQUEST);
                out.put_u32(*process_id);
                out.put_slice(secret);
            }
            StartupPacket::Startup { minor_version, parameters } => {
                out.put_u32(PROTOCOL_MAJOR << 16 | u32::from(*minor_version));
                for (name, value) in parameters {
                    put_cstr(name, out);
                    put_cstr(value, out);
                }
                out.put_u8(0);
            }
        }
        let len = (out.len() - start) as u32;
        out[start..start + 4].copy_from_slice(&len.to_be_bytes());
    }
}
