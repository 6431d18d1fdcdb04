//! Bad input gets a clear error that names the thing and the remedy, and nothing is lost.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use varve_testbed::beside::Private;
use varve_testbed::dev::{Dev, psql};
use varve_testbed::limit::{self, COMMAND_MAX};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");

fn says(text: &str, parts: &[&str]) -> anyhow::Result<()> {
    for part in parts {
        ensure!(text.contains(part), "expected the error to say '{part}', it says: {text}");
    }
    Ok(())
}

#[test]
fn names_moments_and_ports() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    says(&dev.refused(&["tenant", "create", "acme"])?, &["acme"])?;
    says(&dev.refused(&["tenant", "create", "No/Good"])?, &["No/Good"])?;
    says(&dev.refused(&["tenant", "create", "old", "--pg-version", "9"])?, &["9"])?;
    says(&dev.refused(&["tenant", "show", "nobody"])?, &["nobody"])?;
    says(&dev.refused(&["branch", "show", "acme/nothing"])?, &["nothing"])?;
    says(&dev.refused(&["branch", "show", "acme"])?, &["tenant/branch"])?;
    says(&dev.refused(&["branch", "create", "acme/main"])?, &["main"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--from", "nothing"])?, &["nothing"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--lsn", "FF/0"])?, &["FF/0"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--lsn", "0/10"])?, &["0/10"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--lsn", "xyz"])?, &["xyz"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--at", "2001-01-01T00:00:00Z"])?, &["2001-01-01"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--at", "2999-01-01T00:00:00Z"])?, &["2999-01-01"])?;
    says(&dev.refused(&["branch", "create", "acme/b", "--at", "soon"])?, &["soon"])?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    says(&dev.refused(&["compute", "start", "acme/main", "--port", &port])?, &[&port])?;
    let branches = dev.json(&["branch", "list", "acme"])?;
    ensure!(branches.as_array().is_some_and(|list| list.len() == 1), "refused calls leave nothing behind: {branches}");
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t (i int)")?;
    Ok(())
}

#[test]
fn a_second_server_on_the_same_folder() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let mut second = Command::new(VARVE);
    second.arg("dev").arg("--data").arg(dev.data());
    let output = dev.output(second.args(["--store", &dev.store(), "--http", "127.0.0.1:0", "--pages", "127.0.0.1:0"]))?;
    ensure!(!output.status.success(), "a second server on one folder must be refused");
    says(&String::from_utf8_lossy(&output.stderr), &["in use"])
}

#[test]
fn a_store_that_is_not_there() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut server = Command::new(VARVE);
    server
        .arg("dev")
        .arg("--data")
        .arg(folder.path())
        .args(["--store", "s3://nothing/here", "--http", "127.0.0.1:0", "--pages", "127.0.0.1:0"])
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        .env("AWS_ACCESS_KEY_ID", "x")
        .env("AWS_SECRET_ACCESS_KEY", "y");
    let output = limit::output(&mut server, COMMAND_MAX, Some(folder.path()))?;
    ensure!(!output.status.success(), "a server whose store cannot be reached must not start");
    says(&String::from_utf8_lossy(&output.stderr), &["s3://nothing"])
}

#[test]
fn garbage_on_the_page_service() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xFF; 64],
        &[0, 0, 0, 8, 4, 210, 22, 47, b'Q', 0xFF, 0xFF, 0xFF, 0xFF],
        &[0, 0, 0, 9, 0, 3, 0, 0, 0, b'd', 0xFF, 0xFF, 0xFF, 0xFF, 1, 2, 3],
        &[0, 0],
    ];
    for bytes in garbage {
        let mut socket = TcpStream::connect(("127.0.0.1", dev.pages_port()))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.write_all(bytes)?;
        let mut answer = [0; 512];
        let _ = socket.read(&mut answer);
    }
    ensure!(psql(&db, "SELECT i FROM t")? == "1", "the server goes on");
    dev.compute("acme/main", &[])?;
    Ok(())
}

#[test]
fn the_api_says_what_is_wrong_as_a_problem() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let get = |path: &str| -> anyhow::Result<String> {
        let address = dev.url().replace("http://", "");
        let mut socket = TcpStream::connect(&address)?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = get("/v1/tenants/nobody")?;
    says(&answer, &["404", "application/problem+json", "unknown_tenant", "nobody"])?;
    let document = get("/v1/openapi.json")?;
    says(&document, &["\"openapi\":\"3.1", "/v1/tenants/{tenant}/branches", "/v1/computes/{id}"])?;
    says(&get("/livez")?, &["200"])
}

#[test]
fn a_reader_who_has_seen_enough() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    for json in [&["tenant", "list"][..], &["tenant", "list", "--json"][..]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let reading = Command::new(VARVE).args(json).env("VARVE_URL", dev.url()).stdout(writer).stderr(Stdio::piped()).spawn()?;
        let output = limit::wait_with_output(reading, "a list that nobody reads", COMMAND_MAX, Some(dev.folder()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "a closed pipe is no error: {}, {said}", output.status);
    }
    Ok(())
}

#[test]
fn a_user_who_takes_the_standby_name_away() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    let name = psql(&db, "SHOW synchronous_standby_names")?;
    ensure!(!name.is_empty(), "a compute waits for its pageserver");
    psql(&db, "ALTER SYSTEM SET synchronous_standby_names = ''")?;
    psql(&db, "SELECT pg_reload_conf()")?;
    dev.until(&format!("synchronous_standby_names to be {name} again"), Duration::from_secs(20), || {
        let set = "SELECT count(*) FROM pg_file_settings WHERE name = 'synchronous_standby_names' AND sourcefile LIKE '%auto.conf'";
        Ok((psql(&db, set)? == "0" && psql(&db, "SHOW synchronous_standby_names")? == name).then_some(()))
    })?;
    psql(&db, "CREATE TABLE t (i int)")?;
    Ok(())
}

/// An extension that writes a record of a resource manager of its own, in what every C compiler understands without
/// Postgres's headers.
const EXTENSION: &str = r#"
typedef struct { int len, version, funcmaxargs, indexmaxkeys, namedatalen, float8byval; char abi_extra[32]; } Magic;
const Magic *Pg_magic_func(void) { static const Magic magic = {sizeof(Magic), 1500, 100, 32, 64, 1, "PostgreSQL"}; return &magic; }
typedef struct { int api_version; } Info;
const Info *pg_finfo_emit(void) { static const Info info = {1}; return &info; }
void XLogBeginInsert(void);
void XLogRegisterData(char *data, int len);
unsigned long XLogInsert(unsigned char rmid, unsigned char info);
unsigned long emit(void *fcinfo) { XLogBeginInsert(); XLogRegisterData("payload", 8); return XLogInsert(130, 0x10); }
"#;

/// Compiles [`EXTENSION`] to where a server can load it.
fn extension(folder: &std::path::Path) -> anyhow::Result<std::path::PathBuf> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    let (source, library) = (folder.join("stranger.c"), folder.join("stranger.so"));
    std::fs::write(&source, EXTENSION)?;
    let output = limit::output(Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]), COMMAND_MAX, None)?;
    ensure!(output.status.success(), "cc failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

#[test]
fn a_record_of_an_extension_ends_what_can_be_read_and_takes_nothing_back() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    let db = compute["conninfo"].as_str().context("a compute has a connection string")?.to_owned();
    let folder = tempfile::tempdir()?;
    // The server sees nothing of this machine but its own folders.
    let library = Private::of(&compute)?.data_dir().join("extension.so");
    std::fs::copy(extension(folder.path())?, &library)?;
    psql(&db, &format!("CREATE FUNCTION emit() RETURNS pg_lsn LANGUAGE c AS '{}', 'emit'", library.display()))?;
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")?;
    // One transaction, so that the records before the extension's come with it.
    let sql = "BEGIN; UPDATE t SET i = -i; SELECT pg_current_wal_insert_lsn(); SELECT emit(); COMMIT";
    let lsns = psql(&db, sql)?;
    let before = lsns.lines().next().unwrap_or_default().to_owned();
    // The compute goes on, and its commits are kept.
    psql(&db, "INSERT INTO t SELECT generate_series(1, 10)")?;
    ensure!(psql(&db, "SELECT count(*) FROM t")? == "1010", "the compute goes on");

    for restarted in [false, true] {
        if restarted {
            dev.kill()?;
            dev.run()?;
        }
        let show = || dev.json(&["branch", "show", "acme/main"]);
        let stopped = || Ok(Some(show()?).filter(|branch| !branch["stopped"].is_null()));
        let branch = dev.until("the branch to say why it stopped", Duration::from_secs(30), stopped)?;
        let reason = branch["stopped"].as_str().unwrap_or_default();
        says(reason, &["custom130", &before, "restore"])?;
        // What came later cannot be had, and what came before can.
        says(&dev.refused(&["verify", "timeline", "acme/main"])?, &["custom130", &before])?;
        dev.json(&["verify", "timeline", "acme/main", "--lsn", &before])?;
        let (late, early) = (format!("acme/late{restarted}"), format!("acme/early{restarted}"));
        dev.json(&["branch", "create", &late])?;
        says(&dev.refused(&["compute", "start", &late])?, &["custom130", &before])?;
        dev.json(&["branch", "create", &early, "--lsn", &before])?;
        let db = dev.compute(&early, &[])?;
        ensure!(psql(&db, "SELECT count(*), min(i) FROM t")? == "1000|1", "the branch from before has the rows of before");
        psql(&db, "INSERT INTO t VALUES (1)")?;
    }
    dev.json(&["branch", "restore", "acme/main", "--lsn", &before])?;
    ensure!(psql(&db, "SELECT count(*) FROM t")? == "1000", "main goes on from before");
    psql(&db, "INSERT INTO t VALUES (1)")?;
    dev.json(&["verify", "timeline", "acme/main"])?;
    Ok(())
}
