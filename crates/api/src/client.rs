//! The one HTTP client of Varve's servers, for hosts, computes and the CLI.
//!
//! A call ends in its answer, in the server's [`Refusal`], or in an error that says why there was none. Each call has a
//! time limit. The client follows no redirect and uses no proxy, so that its token goes to the named server only.

use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use reqwest::{Method, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::token::Token;
use crate::{Code, Problem, Refusal};

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a call may take that names no limit of its own.
const CALL_MAX: Duration = Duration::from_secs(120);
/// How much of an answer that nobody understands an error repeats.
const QUOTE_MAX: usize = 300;

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The HTTP client could not be made.
    #[error("no HTTP client: {0}")]
    Setup(#[source] reqwest::Error),
    /// The server could not be reached, did not answer in time, or the answer broke off: what was asked may have been
    /// done or not.
    #[error("the server at {url} does not answer: {source}")]
    Unreachable {
        /// Its address.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The answer is none that this version knows.
    #[error("the server's answer is not what this varve expects ({source}): {answer}")]
    Answer {
        /// What is wrong with it.
        source: serde_json::Error,
        /// Its beginning.
        answer: String,
    },
}

impl ClientError {
    /// Whether the same call may succeed later: the server is away, or not ready yet.
    pub fn is_transient(&self) -> bool {
        match self {
            ClientError::Unreachable { .. } => true,
            ClientError::Refused(refusal) => matches!(refusal.code, Code::Unavailable | Code::TailUnknown | Code::RequestTimeout),
            ClientError::Setup(_) | ClientError::Answer { .. } => false,
        }
    }

    /// The code of a refusal.
    pub fn code(&self) -> Option<Code> {
        match self {
            ClientError::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }
}

/// A client of one server. Cheap to clone; clones share connections and token.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Arc<str>,
    token: Arc<RwLock<Option<Token>>>,
}

impl Client {
    /// A client of the server at `url`, such as `http://127.0.0.1:9898`, which shows `token` if there is one.
    ///
    /// # Errors
    /// [`ClientError::Setup`].
    pub fn new(url: &str, token: Option<Token>) -> Result<Client, ClientError> {
        // The HTTP client is built without a cryptography of its own, and would read the machine's certificates at each
        // start of a process. There is no server with TLS yet. That another part has chosen one already is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true)
            .build()
            .map_err(ClientError::Setup)?;
        Ok(Client { http, base: url.trim_end_matches('/').into(), token: Arc::new(RwLock::new(token)) })
    }

    /// The server's address.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// From now on, in all clones, show this token.
    pub fn set_token(&self, token: Token) {
        *self.token.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(token);
    }

    /// A call of `method` on `/v1/<path>`, to be completed and sent.
    pub fn call(&self, method: Method, path: &str) -> Call {
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.base)).timeout(CALL_MAX);
        if let Some(token) = &*self.token.read().unwrap_or_else(std::sync::PoisonError::into_inner) {
            request = request.bearer_auth(token.reveal());
        }
        Call { request, url: self.base.clone() }
    }

    /// A `GET`.
    pub fn get(&self, path: &str) -> Call {
        self.call(Method::GET, path)
    }

    /// A `POST` of a JSON body.
    pub fn post(&self, path: &str, body: &(impl Serialize + ?Sized)) -> Call {
        self.call(Method::POST, path).json(body)
    }
}

/// A call that was not sent yet.
#[derive(Debug)]
#[must_use = "a call does nothing until it is sent"]
pub struct Call {
    request: reqwest::RequestBuilder,
    url: Arc<str>,
}

impl Call {
    /// With a JSON body.
    pub fn json(self, body: &(impl Serialize + ?Sized)) -> Call {
        Call { request: self.request.json(body), ..self }
    }

    /// With a body of another type.
    pub fn body(self, content_type: &str, body: Bytes) -> Call {
        Call { request: self.request.header(header::CONTENT_TYPE, content_type).body(body), ..self }
    }

    /// With a body that comes in pieces.
    pub fn stream(self, content_type: &str, pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Call {
        let body = reqwest::Body::wrap_stream(pieces);
        Call { request: self.request.header(header::CONTENT_TYPE, content_type).body(body), ..self }
    }

    /// With parameters in the address.
    pub fn query(self, parameters: &[(&str, &str)]) -> Call {
        Call { request: self.request.query(parameters), ..self }
    }

    /// With a key that makes the server do it once, however often it is sent.
    pub fn idempotency_key(self, key: &str) -> Call {
        Call { request: self.request.header("Idempotency-Key", key), ..self }
    }

    /// Within `limit`, answer included.
    pub fn within(self, limit: Duration) -> Call {
        Call { request: self.request.timeout(limit), ..self }
    }

    /// Sends it and reads a JSON answer; an empty one counts as `null`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        let answer = self.send_for_bytes().await?;
        let json: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(json).map_err(|source| ClientError::Answer { source, answer: quote(json) })
    }

    /// Sends it and reads a page of a list: its items, and the path of the next page as [`Client::get`] takes it, if
    /// there is one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send_for_page<T: DeserializeOwned>(self) -> Result<(Vec<T>, Option<String>), ClientError> {
        let (answer, headers) = self.exchange().await?;
        let items = serde_json::from_slice(&answer).map_err(|source| ClientError::Answer { source, answer: quote(&answer) })?;
        Ok((items, headers.get(header::LINK).and_then(|link| next_page(link.to_str().ok()?))))
    }

    /// Sends it and gives the answer's bytes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send_for_bytes(self) -> Result<Bytes, ClientError> {
        Ok(self.exchange().await?.0)
    }

    async fn exchange(self) -> Result<(Bytes, header::HeaderMap), ClientError> {
        let unreachable = |source: reqwest::Error| ClientError::Unreachable { url: self.url.to_string(), source: source.without_url() };
        let response = self.request.send().await.map_err(unreachable)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let answer = response.bytes().await.map_err(unreachable)?;
        if status.is_success() { Ok((answer, headers)) } else { Err(refusal(status, &answer).into()) }
    }
}

/// What an answer that is no success says. A code that this version does not know, and an answer without one, count by
/// their status.
fn refusal(status: StatusCode, answer: &[u8]) -> Refusal {
    let by_status = match status.as_u16() {
        401 => Code::Unauthorized,
        403 => Code::Forbidden,
        404 => Code::NoSuchAddress,
        405 => Code::MethodNotAllowed,
        408 => Code::RequestTimeout,
        409 => Code::Fenced,
        413 => Code::TooLarge,
        415 => Code::UnsupportedMediaType,
        // A gateway between us and the server says the last two.
        429 | 502..=504 => Code::Unavailable,
        400..=499 => Code::InvalidArgument,
        _ => Code::Internal,
    };
    match serde_json::from_slice::<Problem>(answer) {
        Ok(problem) => Refusal::new(Code::from_name(&problem.code).unwrap_or(by_status), problem.detail),
        Err(_) => Refusal::new(by_status, format!("the server answered {status}: {}", quote(answer))),
    }
}

/// The path below `/v1/` of the link that leads to the next page. A link that leads elsewhere is none.
fn next_page(links: &str) -> Option<String> {
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    let (path, _) = next.trim().strip_prefix("</v1/")?.split_once('>')?;
    Some(path.to_owned())
}

fn quote(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer).chars().take(QUOTE_MAX).collect()
}

/// A segment of a path that may hold anything a person typed. `.` and `..` alone are escaped, too: in a path they mean
/// another.
pub fn segment(text: &str) -> String {
    if matches!(text, "." | "..") {
        return text.replace('.', "%2E");
    }
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// A server that answers one request with `answer` and gives what it was asked.
    fn server(answer: &'static str) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let asked = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 4096];
            while !asked.ends_with(b"}") && !asked.ends_with(b"\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                assert!(n > 0, "the request broke off");
                asked.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(asked).unwrap()
        });
        (url, asked)
    }

    #[tokio::test]
    async fn a_call_shows_token_and_key_and_gives_the_answer() {
        let (url, asked) = server("HTTP/1.1 200 OK\r\ncontent-length: 7\r\nconnection: close\r\n\r\n{\"a\":1}");
        let client = Client::new(&url, None).unwrap();
        client.set_token(Token::parse("0123456789abcdef").unwrap());
        let call = client.post("tenants", &serde_json::json!({"name": "acme"})).idempotency_key("once").query(&[("wait", "1")]);
        let answer: serde_json::Value = call.send().await.unwrap();
        assert_eq!(answer["a"], 1);
        let asked = asked.join().unwrap().to_lowercase();
        for part in ["post /v1/tenants?wait=1 ", "authorization: bearer 0123456789abcdef", "idempotency-key: once", "application/json"] {
            assert!(asked.contains(part), "{part} in {asked}");
        }
    }

    #[tokio::test]
    async fn a_problem_is_a_refusal_with_its_code() {
        let body = r#"{"code":"not_owner","status":409,"title":"Conflict","detail":"server b has it"}"#;
        let answer = format!("HTTP/1.1 409 Conflict\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
        let (url, _asked) = server(answer.leak());
        let error = Client::new(&url, None).unwrap().get("x").send::<()>().await.unwrap_err();
        assert_eq!(error.code(), Some(Code::NotOwner));
        assert_eq!(error.to_string(), "server b has it");
        assert!(!error.is_transient());
    }

    #[tokio::test]
    async fn a_server_that_is_away_or_busy_is_worth_another_try_and_a_redirect_is_not_followed() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = Client::new(&format!("http://{free}"), None).unwrap().get("x").send::<()>().await.unwrap_err();
        assert!(error.is_transient() && error.code().is_none(), "{error}");
        for (answer, code) in [
            ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", Code::Unavailable),
            ("HTTP/1.1 307 Temporary Redirect\r\nlocation: http://h/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", Code::Internal),
        ] {
            let (url, _asked) = server(answer);
            let error = Client::new(&url, None).unwrap().get("x").send::<()>().await.unwrap_err();
            assert_eq!(error.code(), Some(code), "{error}");
        }
    }

    #[test]
    fn only_a_link_into_the_api_leads_to_the_next_page() {
        assert_eq!(next_page(r#"</v1/tenants?limit=2&cursor=YQ>; rel="next""#).as_deref(), Some("tenants?limit=2&cursor=YQ"));
        for other in [r#"<http://h/v1/x>; rel="next""#, r#"</v1/x>; rel="prev""#, "", r#"</v1/x; rel="next""#] {
            assert_eq!(next_page(other), None, "{other}");
        }
    }

    #[test]
    fn a_segment_stays_one() {
        assert_eq!(segment("acme-1.x_"), "acme-1.x_");
        assert_eq!(segment("a/b?c#d %"), "a%2Fb%3Fc%23d%20%25");
        assert_eq!((segment(".."), segment(".")), ("%2E%2E".to_owned(), "%2E".to_owned()));
    }
}
