//! The admin API's door, over real connections: what comes in, what does not, and that each no is a problem with a
//! code.

#![expect(clippy::disallowed_methods, reason = "a test measures how long a real connection takes")]

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use varve_control::http::{HttpConfig, serve};

use crate::world::World;

const TOKEN: &str = "the token of the host of this test";
/// Longest that any answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A server that listens.
struct Door {
    address: SocketAddr,
    world: World,
    stopping: CancellationToken,
}

/// An answer, taken apart.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Answer {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// The code of a problem, which must look like one.
    fn code(&self) -> String {
        assert!(self.head.contains("content-type: application/problem+json"), "{self:?}");
        let problem: Value = serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{self:?}"));
        assert_eq!(problem["status"], self.status);
        assert!(!problem["detail"].as_str().unwrap().is_empty() && !problem["title"].as_str().unwrap().is_empty());
        problem["code"].as_str().unwrap().to_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{self:?}"))
    }
}

impl Door {
    async fn open(change: impl FnOnce(&mut HttpConfig)) -> Door {
        let world = World::with_tenant().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut config = HttpConfig::new(TOKEN.to_owned());
        change(&mut config);
        let stopping = CancellationToken::new();
        tokio::spawn(serve(world.plane.clone(), config, listener, stopping.clone()));
        Door { address, world, stopping }
    }

    /// Sends bytes and reads until the server closes.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut answer = Vec::new();
        // A server that refuses early may close while we still write.
        let _ = stream.write_all(request).await;
        let read = tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the connection is closed in time");
        let _ = read;
        String::from_utf8(answer).unwrap()
    }

    async fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let (address, length) = (self.address, body.len());
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}");
        Answer::parse(&self.raw(request.as_bytes()).await)
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "", "").await
    }

    async fn post(&self, path: &str, body: &str) -> Answer {
        self.send("POST", path, "Content-Type: application/json\r\n", body).await
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

#[tokio::test]
async fn a_web_page_is_no_client() {
    let door = Door::open(|config| config.origins = vec!["https://console.example".to_owned()]).await;
    let body = r#"{"name":"csrf"}"#;
    for (headers, status, code) in [
        ("Origin: http://evil\r\nContent-Type: application/json\r\n", 403, "forbidden"),
        ("Origin: null\r\nContent-Type: application/json\r\n", 403, "forbidden"),
        ("Content-Type: text/plain\r\n", 415, "unsupported_media_type"),
        ("Content-Type: application/x-www-form-urlencoded\r\n", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
    ] {
        let answer = door.send("POST", "/v1/tenants", headers, body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{headers}");
    }
    let foreign = door.raw(b"GET /v1/tenants HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n").await;
    assert_eq!(Answer::parse(&foreign).code(), "forbidden");
    let absolute = door.raw(b"GET http://evil/v1/tenants HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!(Answer::parse(&absolute).code(), "forbidden");
    let none = door.raw(b"GET /v1/tenants HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!(Answer::parse(&none).code(), "invalid_argument");
    assert_eq!(door.get("/v1/tenants").await.json().as_array().unwrap().len(), 1, "nobody made a tenant");
    let allowed = "Origin: https://console.example\r\nContent-Type: application/json; charset=utf-8\r\n";
    assert_eq!(door.send("POST", "/v1/tenants", allowed, r#"{"name":"ok","pg_version":15}"#).await.status, 201);
}

#[tokio::test]
async fn every_no_is_a_problem() {
    let door = Door::open(|_| {}).await;
    for path in ["/", "/v1", "/v1/nothing", "/v1/tenants/acme/nothing", "/v1/tenants/", "/etc/passwd"] {
        let answer = door.get(path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "no_such_address"), "{path}");
    }
    for (method, path, allow) in [
        ("PUT", "/v1/tenants", &["get", "post"][..]),
        ("POST", "/v1/tenants/acme", &["get", "delete"]),
        ("DELETE", "/v1/server", &["get"]),
        ("GET", "/v1/computes/x/begin", &["post"]),
    ] {
        let answer = door.send(method, path, "", "").await;
        assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
        let allowed = answer.head.lines().find(|line| line.starts_with("allow:")).unwrap_or_else(|| panic!("{answer:?}")).to_owned();
        assert!(allow.iter().all(|method| allowed.contains(method)), "{allowed}");
    }
    for (path, status, code) in [
        ("/v1/tenants/nobody", 404, "unknown_tenant"),
        ("/v1/tenants/No%2FGood", 404, "unknown_tenant"),
        ("/v1/tenants/..%2F..%2Fx", 404, "unknown_tenant"),
        ("/v1/tenants/%FF", 400, "invalid_argument"),
        ("/v1/tenants/acme/branches/nothing", 404, "unknown_branch"),
        ("/v1/computes/nothing", 404, "unknown_compute"),
        ("/v1/tenants?limit=0", 400, "invalid_argument"),
        ("/v1/tenants?limit=x", 400, "invalid_argument"),
        ("/v1/tenants?cursor=%25", 400, "invalid_argument"),
        ("/v1/tenants?prefix=..%2F", 400, "invalid_argument"),
        ("/v1/tenants?order=x", 400, "invalid_argument"),
        ("/v1/tenants/acme/branches/main/moment?lsn=0/1&at=now", 400, "invalid_argument"),
        ("/v1/tenants/acme/branches/main/moment?lsn=FF/0", 422, "in_the_future"),
        ("/v1/tenants/acme/branches/main/wal/bytes", 400, "invalid_argument"),
    ] {
        let answer = door.get(path).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{path}");
    }
    for (path, body, code) in [
        ("/v1/tenants", "{", "invalid_argument"),
        ("/v1/tenants", "[]", "invalid_argument"),
        ("/v1/tenants", "", "invalid_argument"),
        ("/v1/tenants", r#"{"name":"x","more":1}"#, "invalid_argument"),
        ("/v1/tenants", r#"{"name":"0123456789abcdef0123456789abcdef"}"#, "invalid_argument"),
        ("/v1/tenants", r#"{"name":"acme","pg_version":15}"#, "name_taken"),
        ("/v1/tenants/acme/branches", r#"{"name":"main"}"#, "name_taken"),
        ("/v1/tenants/acme/branches/main/restore", "{}", "invalid_argument"),
        ("/v1/tenants/acme/branches/main/computes", r#"{"port":0}"#, "invalid_argument"),
        ("/v1/tenants/acme/branches/main/computes", r#"{"port":70000}"#, "invalid_argument"),
    ] {
        assert_eq!(door.post(path, body).await.code(), code, "{path} {body}");
    }
    assert_eq!(door.send("DELETE", "/v1/tenants/acme/branches/main", "", "").await.code(), "last_branch");
}

#[tokio::test]
async fn bodies_are_bounded_in_size_and_time() {
    let door = Door::open(|config| config.body_max = Duration::from_millis(300)).await;
    let large = format!(r#"{{"name":"{}"}}"#, "x".repeat(70_000));
    let answer = door.post("/v1/tenants", &large).await;
    assert_eq!((answer.status, answer.code().as_str()), (413, "too_large"));
    let head = format!("POST /v1/tenants HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n", door.address);
    let claimed = door.raw(format!("{head}Content-Length: 104857600\r\n\r\n").as_bytes()).await;
    assert_eq!(Answer::parse(&claimed).code(), "too_large", "refused before it is sent");
    let chunks: String = (0..200).map(|_| format!("400\r\n{}\r\n", " ".repeat(0x400))).collect();
    let chunked = door.raw(format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n").as_bytes()).await;
    assert_eq!(Answer::parse(&chunked).code(), "too_large");
    let begun = std::time::Instant::now();
    let slow = door.raw(format!("{head}Content-Length: 100\r\n\r\n{{").as_bytes()).await;
    assert_eq!((Answer::parse(&slow).status, Answer::parse(&slow).code().as_str()), (408, "request_timeout"));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn half_headers_and_idle_connections_are_closed_and_many_headers_refused() {
    let door = Door::open(|config| config.header_max = Duration::from_millis(300)).await;
    let begun = std::time::Instant::now();
    let answer = door.raw(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    let idle = door.raw(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").await;
    assert!(idle.contains("ok\n"), "{idle}");
    assert!(begun.elapsed() < Duration::from_secs(5), "they are closed after some time: {:?}", begun.elapsed());
    let many: String = (0..200).map(|i| format!("X-{i}: y\r\n")).collect();
    let answer = door.raw(format!("GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn who_comes_when_it_is_full_is_told() {
    let door = Door::open(|config| config.connections_max = 2).await;
    let held = [TcpStream::connect(door.address).await.unwrap(), TcpStream::connect(door.address).await.unwrap()];
    let mut told = false;
    for _ in 0..100 {
        let answer = Answer::parse(&door.raw(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").await);
        if answer.status == 503 {
            assert_eq!(answer.code(), "unavailable");
            told = true;
            break;
        }
    }
    assert!(told, "the third one is told to come again");
    drop(held);
    for _ in 0..200 {
        if door.get("/livez").await.status == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("there is room again");
}

#[tokio::test]
async fn internal_routes_need_the_token_and_check_their_arguments() {
    let door = Door::open(|_| {}).await;
    let (host, id) = ("c3".repeat(16), "d4".repeat(16));
    let json = "Content-Type: application/json\r\n";
    let routes = [
        ("POST", format!("/v1/hosts/{host}/hello")),
        ("GET", format!("/v1/hosts/{host}/orders")),
        ("POST", format!("/v1/hosts/{host}/computes/{id}")),
        ("POST", format!("/v1/hosts/{host}/templates/x")),
        ("POST", format!("/v1/computes/{id}/begin")),
        ("POST", format!("/v1/computes/{id}/attach")),
        ("GET", format!("/v1/computes/{id}/orders?incarnation=1")),
        ("POST", format!("/v1/computes/{id}/ended")),
        ("POST", format!("/v1/computes/{id}/files")),
        ("POST", format!("/v1/computes/{id}/pages")),
        ("GET", format!("/v1/computes/{id}/pages?name=x")),
        ("POST", format!("/v1/computes/{id}/startup-blocks")),
    ];
    for (method, path) in &routes {
        for header in ["", "Authorization: Bearer wrong\r\n", "Authorization: Bearer \r\n", "Authorization: Basic dGhl\r\n"] {
            let answer = door.send(method, path, &format!("{json}{header}"), "{}").await;
            assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{method} {path} {header}");
            assert!(answer.head.contains("www-authenticate: bearer"), "{answer:?}");
        }
    }
    let token = format!("{json}Authorization: Bearer {TOKEN}\r\n");
    let compute = door.world.start("main", Default::default()).await.unwrap().0.id;
    let files = format!("/v1/computes/{compute}/files");
    for path in ["../../x", "PG_VERSION", "global/pg_control", "/etc/passwd", "base/1/2", "a/../b"] {
        let body = format!(r#"{{"incarnation":1,"path":"{path}","contents":"eA=="}}"#);
        let answer = door.send("POST", &files, &token, &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_argument"), "{path}");
    }
    let incarnation = door.world.host.serves(&compute).unwrap().1;
    let body =
        |incarnation: u64, contents: &str| format!(r#"{{"incarnation":{incarnation},"path":"pg_hba.conf","contents":"{contents}"}}"#);
    assert_eq!(door.send("POST", &files, &token, &body(incarnation, "%%")).await.code(), "invalid_argument");
    assert_eq!(door.send("POST", &files, &token, &body(incarnation + 7, "eA==")).await.code(), "fenced");
    assert_eq!(door.send("POST", &files, &token, &body(incarnation, "eA==")).await.status, 200);
    assert_eq!(door.send("POST", &format!("/v1/computes/{id}/begin"), &token, "null").await.code(), "unavailable", "not known yet");
    let unknown = door.send("GET", &format!("/v1/hosts/{host}/orders"), &token, "").await;
    assert_eq!((unknown.status, unknown.code().as_str()), (404, "unknown_host"));
    let text = door.send("POST", &format!("/v1/hosts/{host}/templates/x"), &token, "{}").await;
    assert_eq!(text.code(), "unsupported_media_type");
}

#[tokio::test]
async fn lists_are_linked_page_to_page() {
    let door = Door::open(|_| {}).await;
    for number in 0..5 {
        door.world.branch(&format!("b{number}")).await.unwrap();
    }
    let (mut path, mut names) = ("/v1/tenants/acme/branches?limit=2".to_owned(), Vec::new());
    loop {
        let page = door.get(&path).await;
        names.extend(page.json().as_array().unwrap().iter().map(|branch| branch["name"].as_str().unwrap().to_owned()));
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", door.address);
        let text = door.raw(request.as_bytes()).await;
        let Some(link) = text.lines().find(|line| line.to_ascii_lowercase().starts_with("link: ")) else { break };
        assert!(link.ends_with("; rel=\"next\""), "{link}");
        path = link[link.find('<').unwrap() + 1..link.find('>').unwrap()].to_owned();
    }
    assert_eq!(names, ["b0", "b1", "b2", "b3", "b4", "main"]);
    assert_eq!(door.get("/v1/tenants/acme/branches?prefix=b&limit=1000").await.json().as_array().unwrap().len(), 5);
}

#[tokio::test]
async fn a_request_with_a_key_is_done_once() {
    let door = Door::open(|_| {}).await;
    let headers = "Content-Type: application/json\r\nIdempotency-Key: abc\r\nX-Request-Id: r-1\r\n";
    let first = door.send("POST", "/v1/tenants/acme/branches", headers, r#"{"name":"dev"}"#).await;
    let again = door.send("POST", "/v1/tenants/acme/branches", headers, r#"{"name":"dev"}"#).await;
    assert_eq!((first.status, &first.body), (201, &again.body));
    assert_eq!(again.status, 201);
    assert!(first.head.contains("x-request-id: r-1"), "{first:?}");
    let other = door.send("POST", "/v1/tenants/acme/branches", headers, r#"{"name":"other"}"#).await;
    assert_eq!((other.status, other.code().as_str()), (409, "key_reused"));
    let bad = "Content-Type: application/json\r\nIdempotency-Key: a b\r\n";
    assert_eq!(door.send("POST", "/v1/tenants/acme/branches", bad, r#"{"name":"x"}"#).await.code(), "invalid_argument");
    let tenant = door.world.tenant_id().await;
    let log = varve_control::ports::Pageserver::owned(&*door.world.pageserver, tenant).unwrap();
    let audited: Vec<String> = log.state().audit().map(|row| row.action.clone()).collect();
    assert!(audited.iter().any(|action| action.contains("branch dev") && action.contains("r-1")), "{audited:?}");
}

#[tokio::test]
async fn the_document_tells_of_every_route_and_its_errors() {
    let door = Door::open(|_| {}).await;
    let document = door.get("/v1/openapi.json").await.json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(document["components"]["schemas"]["Problem"].is_object());
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 12, "{}", paths.len());
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            let answers = operation["responses"].as_object().unwrap();
            for status in ["400", "403", "405", "500", "503"] {
                let problem = &answers[status]["content"]["application/problem+json"];
                assert!(problem.is_object(), "{method} {path} does not tell of {status}");
            }
            if method != "get" {
                let keys = operation["parameters"].as_array().unwrap().iter().filter(|p| p["name"] == "Idempotency-Key");
                assert_eq!(keys.count(), 1, "{method} {path}");
                assert!(answers.contains_key("415") && answers.contains_key("413") && answers.contains_key("408"));
            }
        }
    }
    let ready = door.get("/readyz").await.json();
    assert_eq!((ready["ready"].as_bool(), ready["lost"].as_array().unwrap().len()), (Some(true), 0));
    assert!(door.get("/metrics").await.body.ends_with("# EOF\n"));
    let server = door.get("/v1/server").await.json();
    assert_eq!((server["name"].as_str(), server["hosts"][0]["here"].as_bool()), (Some("a"), Some(true)));
}
