//! Connections to a walsender are handed over to who shows the credential, and to nobody else, however many ask.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use varve_host::handover::{Handover, HandoverError};
use varve_host::sessions::PrivateSocket;
use varve_protocol::connect::{ClientError, Endpoint, Socket};

const LIMIT: Duration = Duration::from_secs(20);

/// A stand-in for Postgres that answers each connection's first bytes with `hello <bytes>`.
fn postgres(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 100];
                let n = stream.read(&mut buffer).unwrap();
                stream.write_all(&[b"hello ", &buffer[..n]].concat()).unwrap();
            });
        }
    });
}

struct Place {
    _folder: tempfile::TempDir,
    postgres: PathBuf,
    door: PathBuf,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let (postgres, door) = (folder.path().join(".s.PGSQL.5432"), folder.path().join("door"));
    Place { _folder: folder, postgres, door }
}

/// The socket of a Postgres that we run.
fn private(postgres: &Path) -> PrivateSocket {
    PrivateSocket::new(postgres.parent().unwrap(), 5432, rustix::process::geteuid().as_raw())
}

async fn ask(endpoint: Endpoint, limit: Duration) -> Result<Socket, ClientError> {
    tokio::task::spawn_blocking(move || Socket::connect(&endpoint, limit)).await.unwrap()
}

async fn talk(mut socket: Socket) -> String {
    let said = tokio::task::spawn_blocking(move || {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.write_all(b"you").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    });
    said.await.unwrap()
}

fn right(handover: &Handover) -> Endpoint {
    let walsender = handover.walsender();
    Endpoint::handover(walsender.socket, walsender.credential)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_credential_opens_and_nothing_else_does() {
    let place = place();
    postgres(&place.postgres);
    let handover = Handover::open(&place.door, &private(&place.postgres)).unwrap();
    let mode = std::fs::metadata(&place.door).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666, "another user's pageserver must be able to connect");
    for _ in 0..3 {
        let socket = ask(right(&handover), LIMIT).await.unwrap();
        assert_eq!(talk(socket).await, "hello you");
    }
    let credential = handover.walsender().credential;
    for wrong in ["", "x", &credential[1..], &format!("{credential}0"), &credential.to_uppercase(), &"y".repeat(100_000)] {
        let error = ask(Endpoint::handover(&place.door, wrong), LIMIT).await.unwrap_err();
        assert!(matches!(error, ClientError::Io { .. }), "{error}");
        assert!(!error.to_string().contains(&credential), "{error}");
        if wrong.len() < 500 {
            assert!(error.to_string().contains("wrong credential"), "{error}");
        }
    }
    let another = Handover::open(&place.door, &private(&place.postgres)).unwrap();
    let error = ask(Endpoint::handover(&place.door, credential), LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("wrong credential"), "an incarnation's credential ends with it: {error}");
    drop(handover);
    drop(another);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_away_is_told() {
    let place = place();
    let handover = Handover::open(&place.door, &private(&place.postgres)).unwrap();
    let error = ask(right(&handover), LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("Postgres takes no connection"), "{error}");
    assert!(error.is_transient(), "it may be there soon");
    postgres(&place.postgres);
    assert_eq!(talk(ask(right(&handover), LIMIT).await.unwrap()).await, "hello you");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_clients_keep_nobody_out_and_are_sent_away() {
    let place = place();
    postgres(&place.postgres);
    let handover = Handover::open(&place.door, &private(&place.postgres)).unwrap();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(UnixStream::connect(&place.door).unwrap());
    }
    let began = Instant::now();
    assert_eq!(talk(ask(right(&handover), LIMIT).await.unwrap()).await, "hello you");
    assert!(began.elapsed() < Duration::from_secs(4), "it waited for silent clients: {:?}", began.elapsed());
    // The first ones were sent away for the others, the last ones after a while, with the reason.
    for (at, said) in [(0, ""), (299, "no credential came in time\n")] {
        let mut stream = silent[at].try_clone().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let heard = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(heard.await.unwrap(), said, "client {at}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_does_not_wait_for_ever() {
    let place = place();
    // Somebody who takes connections and says nothing; one who closes at once; one who hands nothing over.
    for (answer, kind) in [(None, "TimedOut"), (Some(""), "UnexpectedEof"), (Some("\n"), "PermissionDenied")] {
        let _ = std::fs::remove_file(&place.door);
        let listener = UnixListener::bind(&place.door).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 7];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"sesame\n");
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).unwrap(),
                // Until the client has gone.
                None => assert_eq!(stream.read(&mut line).unwrap(), 0),
            }
        });
        let error = ask(Endpoint::handover(&place.door, "sesame"), Duration::from_millis(300)).await.unwrap_err();
        let ClientError::Io { source, .. } = &error else { panic!("{error}") };
        assert_eq!(format!("{:?}", source.kind()), kind, "{error}");
        server.join().unwrap();
    }
    // A door before which too many stand: nobody accepts.
    let _ = std::fs::remove_file(&place.door);
    let listener = rustix_listener(&place.door);
    let _standing: Vec<_> = (0..2).map_while(|_| connect_at_once(&place.door)).collect();
    let began = Instant::now();
    let error = ask(Endpoint::handover(&place.door, "sesame"), Duration::from_millis(300)).await.unwrap_err();
    assert!(error.is_transient() && began.elapsed() < LIMIT, "{error}");
    drop(listener);
}

/// A socket with room for one connection that nobody has accepted yet.
fn rustix_listener(path: &Path) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    listener
}

fn connect_at_once(path: &Path) -> Option<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    connect(&client, &SocketAddrUnix::new(path).unwrap()).is_ok().then_some(client)
}

#[tokio::test]
async fn a_path_that_no_socket_can_have_is_named() {
    let path = PathBuf::from(format!("/tmp/{}", "long/".repeat(30)));
    let error = Handover::open(&path, &private(Path::new("/nowhere/socket"))).unwrap_err();
    assert!(matches!(error, HandoverError::PathTooLong(_)), "{error}");
}
