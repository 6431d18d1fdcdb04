//! A tenant is a superuser in his own server, and can run any program there. Nothing that he does reaches another
//! tenant, the host or Varve; and when his server ends, everything of his ends.
//!
//! Each test does what a tenant would, as superuser by SQL and as his user of the operating system by `COPY PROGRAM`.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_testbed::beside::Private;
use varve_testbed::dev::{Dev, program, psql, signal};

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const C_PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/sandbox/escape.c");
/// How long what was ended may take to be gone, on a machine where everything runs at once.
const GONE_MAX: Duration = Duration::from_secs(20);

/// A running compute.
struct Compute {
    answer: Value,
    db: String,
    private: Private,
}

fn start(dev: &Dev, tenant: &str) -> anyhow::Result<Compute> {
    dev.json(&["tenant", "create", tenant])?;
    again(dev, tenant)
}

fn again(dev: &Dev, tenant: &str) -> anyhow::Result<Compute> {
    let answer = dev.json(&["compute", "start", &format!("{tenant}/main")])?;
    let db = answer["conninfo"].as_str().context("a compute has a connection string")?.to_owned();
    let private = Private::of(&answer)?;
    Ok(Compute { answer, db, private })
}

impl Compute {
    /// What a shell script says that runs as the tenant's user.
    fn shell(&self, script: &str) -> anyhow::Result<String> {
        // As base 64 both ways, so that nothing in between has a meaning of its own.
        let encode = |text: &str| psql(&self.db, &format!("SELECT translate(encode($q${text}$q$, 'base64'), E'\\n', '')"));
        let command = format!("echo {} | base64 -d | bash 2>&1 | base64 -w0", encode(script)?);
        let sql = format!(
            "CREATE TEMP TABLE said (line text); COPY said FROM PROGRAM '{command}'; \
             SELECT convert_from(decode(line, 'base64'), 'UTF8') FROM said"
        );
        psql(&self.db, &sql)
    }

    fn uid(&self) -> anyhow::Result<u32> {
        Ok(self.shell("id -u")?.trim().parse()?)
    }

    fn port(&self) -> anyhow::Result<u64> {
        self.answer["port"].as_u64().context("a compute has a port")
    }

    fn run_folder(&self) -> PathBuf {
        self.private.data_dir().parent().map(Path::to_owned).unwrap_or_default()
    }
}

/// Processes of a user.
fn processes_of(uid: u32) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let is_process = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u32>().is_ok());
        if is_process && std::fs::metadata(&path).is_ok_and(|metadata| metadata.uid() == uid) {
            found.push(std::fs::read_to_string(path.join("cmdline")).unwrap_or_default().replace('\0', " "));
        }
    }
    Ok(found)
}

#[test]
fn a_tenant_sees_nothing_but_his_own() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let (a, b) = (start(&dev, "a")?, start(&dev, "b")?);
    ensure!(a.uid()? != b.uid()?, "two computes have two users");
    ensure!(a.uid()? >= 100_000 && psql(&a.db, "SHOW is_superuser")? == "on", "the tenant is a superuser, and nobody on the machine");
    let (data, other) = (dev.data().display().to_string(), b.run_folder().display().to_string());
    for hidden in ["/etc/shadow", "/root", "/home", "/sys", &data, &other, "/proc/1/root", "/proc/1/environ", "/proc/kcore", "/dev/fuse"] {
        let said = a.shell(&format!("ls -la {hidden} && cat {hidden}"))?;
        ensure!(said.contains("No such file") || said.contains("denied"), "{hidden} is seen: {said}");
    }
    let seen = a.shell("ls /run/varve")?;
    ensure!(a.run_folder().ends_with(seen.trim()), "only his own folder is there: {seen}");
    // Only his own processes, and none of the host's by number.
    let processes = a.shell("ls /proc | grep -c '^[0-9]'")?;
    ensure!(processes.trim().parse::<u32>()? < 100, "{processes} processes are seen");
    let server = std::process::id();
    ensure!(a.shell(&format!("kill -0 {server}"))?.contains("No such process"), "this test's process is not there");
    for written in
        ["/x", "/etc/x", "/usr/x", "/usr/lib/postgresql/15/bin/postgres", &format!("{}/conf/pg_hba.conf", a.run_folder().display())]
    {
        let said = a.shell(&format!("echo >> {written}"))?;
        ensure!(said.contains("Read-only") || said.contains("denied"), "{written} can be written: {said}");
    }
    // Who is not the supervisor is not let in as the internal role, whatever he is in his own server.
    let said = a.shell(&format!("psql -h {} -p {} -U varve -c 'SELECT 1' postgres", a.private.socket_dir().display(), a.port()?))?;
    ensure!(said.contains("Peer authentication failed"), "the internal role is not his: {said}");
    // From outside, nobody but root sees into the folders.
    ensure!(std::fs::metadata(a.run_folder())?.mode() & 0o077 == 0, "the compute's folder is private");
    Ok(())
}

#[test]
fn nothing_leads_out_of_its_network() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let (a, b) = (start(&dev, "a")?, start(&dev, "b")?);
    let listener = TcpListener::bind("0.0.0.0:0")?;
    listener.set_nonblocking(true)?;
    let http: u16 = dev.url().rsplit(':').next().unwrap_or_default().parse()?;
    let outside = [listener.local_addr()?.port(), http, dev.pages_port(), u16::try_from(b.port()?)?];
    for port in outside {
        let said = a.shell(&format!("timeout 5 bash -c 'echo x > /dev/tcp/127.0.0.1/{port}' && echo connected"))?;
        ensure!(!said.contains("connected"), "port {port} of the host is reached: {said}");
    }
    let said =
        a.shell("for to in 169.254.169.254/80 10.0.0.1/80; do timeout 5 bash -c \"echo x > /dev/tcp/$to\" && echo connected; done; true")?;
    ensure!(!said.contains("connected"), "something outside is reached: {said}");
    ensure!(listener.accept().is_err(), "nobody connected to the host");
    // His own server is reached from inside, and from outside with the client's address.
    let own = a.shell(&format!("timeout 5 bash -c 'echo x > /dev/tcp/127.0.0.1/{}' && echo connected", a.port()?))?;
    ensure!(own.contains("connected"), "his own server is there: {own}");
    let seen = psql(&a.db, "SELECT inet_client_addr(), inet_server_addr(), inet_server_port()")?;
    ensure!(seen == format!("127.0.0.1|127.0.0.1|{}", a.port()?), "{seen}");
    Ok(())
}

#[test]
fn system_calls_that_lead_out_are_refused() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let a = start(&dev, "a")?;
    let folder = tempfile::tempdir()?;
    let built = folder.path().join("escape").display().to_string();
    program("gcc", &["-static", "-o", &built, C_PROGRAM])?;
    std::fs::copy(&built, a.private.data_dir().join("escape"))?;
    let said = a.shell(&format!("{}", a.private.data_dir().join("escape").display()))?;
    let got: BTreeMap<&str, &str> = said.lines().filter_map(|line| line.split_once('=')).collect();
    ensure!(got.len() >= 29, "all calls were made: {said}");
    for (call, error) in got {
        let expected: &[&str] = match call {
            "clone3" | "io_uring_setup" | "x32" => &["ENOSYS"],
            "vsock" | "netlink" | "packet" | "alg" => &["EAFNOSUPPORT"],
            // Without the filter, too.
            "raw" | "setuid" | "mknod" => &["EPERM"],
            _ => &["EPERM"],
        };
        ensure!(expected.contains(&error), "{call} gave {error}, expected {expected:?}");
    }
    // Signals from inside do nothing to init.
    a.shell("kill -9 1; kill -STOP 1; kill -TERM 1")?;
    ensure!(psql(&a.db, "SELECT 1")? == "1", "the compute lives");
    Ok(())
}

/// Root opens files and sockets in folders where the tenant makes names.
#[test]
fn links_of_the_tenant_lead_nowhere() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    let (a, b) = (start(&dev, "a")?, start(&dev, "b")?);
    psql(&b.db, "CREATE TABLE secret AS SELECT 'of b' AS what")?;
    let secret = dev.folder().join("secret");
    std::fs::write(&secret, "of root")?;
    let socket = |compute: &Compute| -> anyhow::Result<String> {
        Ok(format!("{}/.s.PGSQL.{}", compute.private.socket_dir().display(), compute.port()?))
    };
    let (own, other) = (socket(&a)?, socket(&b)?);
    // The supervisor's next connection is at the next server, where A's leads to B. While A cannot attach, its commits
    // wait, so it undoes that by itself.
    let undo = format!("(sleep 15; rm {own}; mv {own}.mine {own}) > /dev/null 2>&1 &");
    let said = a.shell(&format!("mv {own} {own}.mine && ln -s {other} {own} && echo done; {undo}"))?;
    ensure!(said.contains("done"), "the link is made: {said}");
    dev.kill()?;
    dev.run()?;
    let attached = |db: &str| anyhow::Ok(psql(db, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")? == "1");
    dev.until("the other tenant's walsender", GONE_MAX, || Ok(attached(&b.db)?.then_some(())))?;
    ensure!(psql(&b.db, "INSERT INTO secret VALUES ('more'); SELECT count(*) FROM secret")? == "2", "the other tenant works");
    ensure!(!attached(&a.db)?, "nothing is received from where the link leads");
    dev.until("its own walsender", GONE_MAX * 2, || Ok(attached(&a.db)?.then_some(())))?;
    ensure!(
        psql(&b.db, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")? == "1",
        "the other tenant has one walsender"
    );
    ensure!(psql(&a.db, "CREATE TABLE t AS SELECT 1 AS i; SELECT i FROM t")? == "1", "with its own socket it goes on");

    // Files that are read when it stops: the control file, WAL, settings.
    let (data, wal) = (a.private.data_dir(), a.run_folder().join("pg_wal"));
    let script = format!(
        "cd {data} && ln -s {secret} leaked && ln -sf {secret} pg_ident.conf && rm -f {wal}/0000000100000000000000FF && \
         ln -s {secret} {wal}/0000000100000000000000FF && ln -s {secret} pg_stat/leaked.stat && echo done",
        data = data.display(),
        wal = wal.display(),
        secret = secret.display()
    );
    let said = a.shell(&script)?;
    ensure!(said.contains("done"), "the links are made: {said}");
    dev.json(&["compute", "stop", "a/main"])?;
    let a = again(&dev, "a")?;
    let said = a.shell(&format!("cat {0}/leaked {0}/pg_ident.conf {0}/pg_stat/leaked.stat; true", a.private.data_dir().display()))?;
    ensure!(!said.contains("of root"), "a file of root's came in: {said}");
    ensure!(std::fs::read_to_string(&secret)? == "of root", "a file of root's was written");
    Ok(())
}

#[test]
fn with_its_supervisor_everything_in_it_ends() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    let a = start(&dev, "a")?;
    let uid = a.uid()?;
    a.shell("setsid nohup sleep 98765 > /dev/null 2>&1 & sleep 0.2")?;
    let is_left = |marker: &str| Ok::<_, anyhow::Error>(processes_of(uid)?.iter().any(|line| line.contains(marker)));
    ensure!(is_left("sleep 98765")?, "the tenant's own process runs");
    signal(u32::try_from(a.answer["mount_pid"].as_u64().context("a pid")?)?, rustix::process::Signal::KILL);
    dev.until("the tenant's process to be gone", GONE_MAX, || Ok((!is_left("sleep 98765")?).then_some(())))?;
    let back = |db: &str| Ok(psql(db, "SELECT 1").is_ok().then_some(()));
    dev.until("the compute to be back", GONE_MAX, || back(&a.db))?;
    // A stop leaves nothing: no process, no control group, no mount.
    a.shell("setsid nohup sleep 98765 > /dev/null 2>&1 & sleep 0.2")?;
    let name = a.run_folder().file_name().context("a name")?.to_owned();
    dev.json(&["compute", "stop", "a/main"])?;
    dev.until("all of it to be gone", GONE_MAX, || {
        let groups = ["cpu", "memory", "pids"].map(|controller| Path::new("/sys/fs/cgroup").join(controller).join("varve").join(&name));
        let is_clean = processes_of(uid)?.is_empty() && !groups.iter().any(|group| group.exists()) && !a.run_folder().exists();
        Ok(is_clean.then_some(()))
    })?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&*name.to_string_lossy()), "a mount is left");
    Ok(())
}

/// What a tenant takes without end, he takes from himself.
#[test]
fn who_exhausts_his_own_server_harms_nobody_else() -> anyhow::Result<()> {
    let dev = Dev::start_for(VARVE, varve_postgres::Major::V15, &["--compute-memory-mb", "512"])?;
    let (a, b) = (start(&dev, "a")?, start(&dev, "b")?);
    program("pgbench", &["-iq", &b.db])?;
    for (what, script) in [
        ("shared memory", "head -c 2000000000 /dev/zero > /dev/shm/x; rm -f /dev/shm/x"),
        ("temporary files", "head -c 200000000 /dev/zero > /tmp/x; rm -f /tmp/x"),
        ("names", "cd /tmp; for i in $(seq 20000); do : > $i || break; done 2>&1 | tail -1; rm -rf /tmp/*"),
    ] {
        let said = a.shell(script)?;
        ensure!(said.contains("No space left") || said.contains("Killed"), "{what} are limited: {said}");
    }
    let said = a.shell("ulimit -n; ulimit -c")?;
    ensure!(said.trim() == "4096\n0", "descriptors and core files are limited: {said}");
    // More processes than there may be. Each ends by itself after a while, if nobody ends it.
    let bomb = "timeout 60 bash -c 'for i in $(seq 6000); do sleep 50 & done' > /dev/null 2>&1 & sleep 8";
    let _ = a.shell(bomb);
    let said = psql(&b.db, "SELECT count(*) FROM pgbench_accounts")?;
    ensure!(said == "100000", "the other tenant reads: {said}");
    let output = Command::new("pgbench").args(["-n", "-c", "2", "-T", "3", &b.db]).output()?;
    ensure!(output.status.success(), "the other tenant writes: {}", String::from_utf8_lossy(&output.stderr));
    // Out of memory is his own server's end, and a new beginning.
    let _ = a.shell("python3 -c 'x = bytearray(4 << 30)' 2>&1 || perl -e '$x = \"x\" x (4 << 30)'");
    ensure!(psql(&b.db, "SELECT 1")? == "1", "the other tenant is there");
    dev.until("the tenant's own server to be there again", GONE_MAX * 3, || Ok(psql(&a.db, "SELECT 1").is_ok().then_some(())))?;
    Ok(())
}

/// Half a processor is half a processor, however much is free.
#[test]
fn a_limit_of_processors_holds() -> anyhow::Result<()> {
    let dev = Dev::start_for(VARVE, varve_postgres::Major::V15, &["--compute-cpus", "0.5"])?;
    let a = start(&dev, "a")?;
    // Two loops for 4 s; the shell says how many seconds of a processor they had.
    let said = a.shell("TIMEFORMAT='%U'; time (for i in 1 2; do timeout 4 bash -c 'while :; do :; done' & done; wait)")?;
    let had: f64 = said.trim().lines().last().unwrap_or_default().parse().with_context(|| format!("seconds: {said}"))?;
    ensure!((0.1..=2.5).contains(&had), "{had} s in 4 s, expected at most half of them and what a period overlaps");
    Ok(())
}

/// Without a sandbox there is one tenant.
#[test]
fn without_a_sandbox_there_is_one_tenant() -> anyhow::Result<()> {
    let dev = Dev::start_for(VARVE, varve_postgres::Major::V15, &["--sandbox", "none"])?;
    let a = start(&dev, "a")?;
    ensure!(psql(&a.db, "SELECT 1")? == "1", "it runs");
    let log = std::fs::read_to_string(dev.log())?;
    ensure!(log.contains("--sandbox none"), "the log says what that means");
    dev.json(&["tenant", "create", "b"])?;
    let said = dev.refused(&["compute", "start", "b/main"])?;
    ensure!(said.contains("--sandbox none"), "another tenant is refused: {said}");
    Ok(())
}
