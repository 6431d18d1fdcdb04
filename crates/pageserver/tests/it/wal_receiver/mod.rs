//! The WAL receiver against stock Postgres: what is acknowledged is whole, durable and the primary's own bytes, and
//! nothing else is.

mod memory_wal;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory_wal::{MemorySink, MemoryWal, config, flushed, insert_position, primary, quick_slot, redo_point};
use rustix::process::{Pid, Signal, kill_process};
use varve_pageserver::wal_receiver::{Receiver, ReceiverConfig, ReceiverError, ReceiverPhase};
use varve_postgres::Lsn;
use varve_postgres::wal::WalError;
use varve_protocol::Endpoint;
use varve_testbed::postgres::Postgres;

const NAME: &str = "varve_standby";
const LONG: Duration = Duration::from_secs(30);
/// How long a primary may take between its answer and its first WAL.
const JOINED: Duration = Duration::from_millis(500);

fn receive(config: ReceiverConfig, wal: &Arc<MemoryWal>) -> Receiver<MemorySink> {
    Receiver::spawn(config, MemorySink(wal.clone())).expect("a thread")
}

fn await_streaming(receiver: &Receiver<MemorySink>) {
    assert!(
        receiver.wait_until(LONG, |_, phase| phase == ReceiverPhase::Streaming),
        "no stream: {:?}, {:?}",
        receiver.phase(),
        receiver.trouble()
    );
}

fn await_framed(receiver: &Receiver<MemorySink>, lsn: Lsn) {
    let reached = receiver.wait_until(LONG, |positions, _| positions.framed >= lsn && positions.flushed >= lsn);
    assert!(reached, "waited for {lsn}, got {:?}, {:?}", receiver.positions(), receiver.trouble());
}

/// Runs `sql` in a psql of its own.
fn start_sql(postgres: &Postgres, sql: &str) -> Child {
    let mut psql = Command::new("psql");
    psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &postgres.conninfo("postgres"), "-c", sql]);
    psql.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("psql must be installed")
}

fn ends_within(child: &mut Child, time: Duration) -> bool {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        if child.try_wait().expect("a child").is_some() {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    false
}

fn assert_ends_well(mut child: Child, what: &str) {
    assert!(ends_within(&mut child, LONG), "{what}: still waits");
    let output = child.wait_with_output().expect("its output");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{what}: {errors}");
}

#[test]
fn a_commit_waits_for_our_acknowledgement_and_no_longer() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let mut commit = start_sql(&postgres, "CREATE TABLE t (i int)");
    assert!(!ends_within(&mut commit, Duration::from_millis(500)), "a commit must wait while nobody is there");

    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    assert_ends_well(commit, "a commit from before the standby came");

    wal.set_disk_stuck(true);
    let mut commit = start_sql(&postgres, "INSERT INTO t VALUES (1)");
    assert!(!ends_within(&mut commit, Duration::from_millis(500)), "a commit must wait for our disk");
    wal.set_disk_stuck(false);
    assert_ends_well(commit, "a commit after the disk went on");

    for i in 0..50 {
        postgres.psql("postgres", &format!("INSERT INTO t VALUES ({i})")).expect("a commit");
        let reached = insert_position(&postgres);
        assert!(wal.framed() >= reached || flushed(&postgres) < reached, "acknowledged before it was there");
    }
    await_framed(&receiver, flushed(&postgres));
    let state = postgres.psql("postgres", "SELECT sync_state, state, flush_lsn = write_lsn FROM pg_stat_replication").expect("statistics");
    assert_eq!(state.trim(), "sync|streaming|t");
    wal.assert_same_as(&postgres);
    let outcome = receiver.join().expect("an outcome");
    assert!(outcome.error.is_none(), "{:?}", outcome.error);
}

/// Stands between a receiver and its primary: hands over the answer to `START_REPLICATION` in one piece with the WAL
/// that follows it, and nothing after that. Gives the folder of its socket.
fn join_answer_and_wal(postgres: &Postgres) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).expect("a socket");
    let target = postgres.dir().join(".s.PGSQL.5432");
    thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("the receiver");
        let mut server = UnixStream::connect(&target).expect("the primary");
        let (mut client_reads, mut server_writes) = (client.try_clone().expect("a clone"), server.try_clone().expect("a clone"));
        let starts = Arc::new(AtomicBool::new(false));
        let seen = starts.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = client_reads.read(&mut buffer) {
                seen.fetch_or(buffer[..n].windows(17).any(|word| word == b"START_REPLICATION"), Ordering::SeqCst);
                if server_writes.write_all(&buffer[..n]).is_err() {
                    return;
                }
            }
        });
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = server.read(&mut buffer) {
            let mut end = n;
            let is_last = starts.load(Ordering::SeqCst);
            server.set_read_timeout(is_last.then_some(JOINED)).expect("a timeout");
            while is_last && let Ok(n @ 1..) = server.read(&mut buffer[end..]) {
                end += n;
            }
            client.write_all(&buffer[..end]).expect("the receiver takes it");
            if is_last {
                thread::sleep(LONG * 2); // nothing else comes
            }
        }
    });
    dir
}

#[test]
fn wal_that_comes_along_with_the_answer_waits_for_nothing_else() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let end = flushed(&postgres);
    assert!(start < end, "there is WAL to send");
    let between = join_answer_and_wal(&postgres);
    let mut joined = config(&postgres, NAME, start);
    joined.connect.endpoint = Endpoint::unix(between.path(), 5432);
    joined.slot = None;
    await_framed(&receive(joined, &wal), end);
}

#[test]
fn a_commit_with_remote_apply_waits_for_the_store() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    await_streaming(&receiver);
    postgres.psql("postgres", "CREATE TABLE t (i int)").expect("a commit that waits for our disk only");
    let mut commit = start_sql(&postgres, "SET synchronous_commit = remote_apply; INSERT INTO t VALUES (1)");
    assert!(!ends_within(&mut commit, Duration::from_millis(700)), "remote_apply must wait for the store");
    wal.set_store_durable(wal.framed());
    assert_ends_well(commit, "remote_apply after the store had it");
    let positions = receiver.positions();
    assert!(positions.applied <= positions.flushed, "{positions:?}");
    wal.set_store_durable(Lsn(u64::MAX / 2));
    thread::sleep(Duration::from_millis(300));
    let positions = receiver.positions();
    assert_eq!(positions.applied, positions.flushed, "applied is never more than flushed");
}

#[test]
fn a_receiver_that_is_killed_again_and_again_leaves_no_gap() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let mut pgbench_init = postgres.command("pgbench").expect("pgbench");
    let receiver = receive(config(&postgres, NAME, start), &wal);
    assert!(
        pgbench_init
            .args(["-i", "-q", "-s", "2", "-h"])
            .arg(postgres.dir())
            .args(["-U", "postgres", "postgres"])
            .output()
            .expect("pgbench")
            .status
            .success()
    );
    let mut load = postgres.command("pgbench").expect("pgbench");
    let mut load = load
        .args(["-n", "-c", "4", "-T", "6", "-h"])
        .arg(postgres.dir())
        .args(["-U", "postgres", "postgres"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("pgbench");
    let mut outcome = receiver.join().expect("an outcome");
    let mut rounds = 0;
    while load.try_wait().expect("pgbench").is_none() {
        assert!(outcome.error.is_none(), "{:?}", outcome.error);
        assert!(outcome.positions.flushed <= wal.framed(), "acknowledged more than there is");
        let go_on = ReceiverConfig { start: wal.framed(), last_record: wal.last_record(), base: start, ..config(&postgres, NAME, start) };
        let receiver = receive(go_on, &wal);
        thread::sleep(Duration::from_millis(50 + 37 * rounds % 400));
        if rounds % 3 == 0 {
            // 16 MiB that mean nothing are on their way
            postgres.psql("postgres", "SELECT pg_switch_wal()").expect("a switch");
        }
        outcome = receiver.join().expect("an outcome");
        rounds += 1;
    }
    assert!(load.wait().expect("pgbench").success() && rounds > 5, "{rounds} rounds");
    let go_on = ReceiverConfig { start: wal.framed(), last_record: wal.last_record(), base: start, ..config(&postgres, NAME, start) };
    let receiver = receive(go_on, &wal);
    await_framed(&receiver, flushed(&postgres));
    wal.assert_same_as(&postgres);
}

#[test]
fn what_a_full_disk_did_not_take_comes_again() {
    let postgres = primary("varve", &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    wal.fail_every(7);
    let receiver = receive(config(&postgres, "varve", start), &wal);
    await_streaming(&receiver);
    postgres.psql("postgres", "CREATE TABLE t AS SELECT i, repeat('x', 200) AS a FROM generate_series(1, 20000) i").unwrap();
    let end = insert_position(&postgres);
    await_framed(&receiver, end);
    wal.fail_every(0);
    assert!(receiver.join().expect("it ends").error.is_none());
    wal.assert_same_as(&postgres);
}

#[test]
fn switches_and_records_longer_than_a_segment_come_whole() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    await_streaming(&receiver);
    for megabytes in [1, 20, 3] {
        postgres
            .psql("postgres", &format!("SELECT 1 FROM pg_logical_emit_message(true, 'x', repeat('y', {megabytes} * 1024 * 1024))"))
            .expect("a long record");
        postgres.psql("postgres", "SELECT pg_switch_wal()").expect("a switch");
        postgres.psql("postgres", "SELECT pg_switch_wal()").expect("a switch where there is nothing to switch");
    }
    postgres.psql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 100000)").expect("a commit");
    await_framed(&receiver, flushed(&postgres));
    wal.assert_same_as(&postgres);
    assert!(
        wal.framed().distance_from(start) > 60 << 20,
        "24 MB of records and 3 switches are more than {}",
        wal.framed().distance_from(start)
    );
    assert!(wal.records() > 1000);
}

#[test]
fn a_primary_that_is_killed_and_recovers_goes_on_where_it_was() {
    let mut postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    postgres.psql("postgres", "CREATE TABLE t (i int)").expect("a commit");
    for round in 0..3 {
        let load = "DO $$ BEGIN FOR i IN 1..100000 LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; END $$";
        let mut load = start_sql(&postgres, load);
        thread::sleep(Duration::from_millis(300 + round * 150));
        kill_postmaster(&postgres);
        let _ = load.wait();
        start_again(&mut postgres);
        // Recovery ends with a checkpoint; then the standby must be there again without being told.
        postgres.psql("postgres", &format!("INSERT INTO t VALUES (-{round})")).expect("a commit after recovery");
    }
    await_framed(&receiver, flushed(&postgres));
    wal.assert_same_as(&postgres);
}

/// Kills the postmaster that this test started, and waits until its children have noticed.
fn kill_postmaster(postgres: &Postgres) {
    let pid_file = std::fs::read_to_string(postgres.data_dir().join("postmaster.pid")).expect("a running postmaster");
    signal(pid_file.lines().next().expect("its pid"), Signal::KILL);
}

/// Signals the one process `pid`, which belongs to a cluster of this test. (Not by kill(1): procps 4.0.2 takes a
/// negative number for all processes.)
fn signal(pid: &str, signal: Signal) {
    let pid = pid.trim().parse().ok().filter(|&pid: &i32| pid > 1).and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("a signal to a process of our own");
}

/// Starts a cluster whose postmaster was killed, once its last child is gone.
fn start_again(postgres: &mut Postgres) {
    let deadline = Instant::now() + LONG;
    while let Err(error) = postgres.start() {
        assert!(Instant::now() < deadline, "{error:#}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_clean_shutdown_sends_everything_first() {
    let mut postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    await_streaming(&receiver);
    postgres.psql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 10000)").expect("a commit");
    let begin = Instant::now();
    postgres.stop("fast").expect("a clean stop");
    assert!(begin.elapsed() < Duration::from_secs(10), "the walsender waits for our acknowledgement: {:?}", begin.elapsed());
    let control = postgres.command("pg_controldata").expect("pg_controldata").arg(postgres.data_dir()).output().expect("pg_controldata");
    let control = String::from_utf8_lossy(&control.stdout).into_owned();
    let checkpoint: Lsn = control
        .lines()
        .find_map(|line| line.strip_prefix("Latest checkpoint location:"))
        .expect("a checkpoint")
        .trim()
        .parse()
        .expect("an LSN");
    assert!(wal.framed() > checkpoint, "the shutdown checkpoint at {checkpoint} must have arrived: {}", wal.framed());
    wal.assert_same_as(&postgres);
    let outcome = receiver.join().expect("an outcome");
    assert!(outcome.error.is_none() && outcome.positions.flushed == wal.framed(), "{:?} {:?}", outcome.error, outcome.positions);
}

/// What the receiver ends with, when it ends by itself.
fn refusal(config: ReceiverConfig) -> ReceiverError {
    let start = config.start;
    let wal = MemoryWal::new(start);
    let receiver = receive(config, &wal);
    assert!(
        receiver.wait_until(LONG, |_, phase| phase == ReceiverPhase::Ended),
        "must end by itself: {:?}, {:?}",
        receiver.phase(),
        receiver.trouble()
    );
    let outcome = receiver.join().expect("an outcome");
    assert!(outcome.positions.flushed <= start, "nothing that came may have been acknowledged: {:?}", outcome.positions);
    outcome.error.expect("an error")
}

#[test]
fn another_server_timeline_or_epoch_is_refused() {
    let postgres = primary(NAME, &[("varve.timeline", "'7f3a'"), ("varve.epoch", "'4'")]);
    let start = redo_point(&postgres);
    let good = config(&postgres, NAME, start);
    let with = |name: &str, value: &str| ReceiverConfig { settings: vec![(name.to_owned(), value.to_owned())], ..good.clone() };
    for (config, why) in [
        (ReceiverConfig { system_identifier: 7, ..good.clone() }, "the tenant's is 7: this is another cluster"),
        (ReceiverConfig { tli: 2, ..good.clone() }, "it is on Postgres timeline 1, this branch is 2"),
        (ReceiverConfig { major: varve_postgres::Major::V16, ..good.clone() }, "the tenant's data is of PostgreSQL 16"),
        (ReceiverConfig { base: start + 8, ..good.clone() }, "below the timeline's base"),
        (with("varve.timeline", "7f3b"), "its varve.timeline is '7f3a', expected '7f3b'"),
        (with("varve.epoch", "5"), "its varve.epoch is '4', expected '5'"),
        (with("varve.tenant", "x"), "unrecognized configuration parameter \"varve.tenant\""),
        (ReceiverConfig { start: Lsn(0x7000_0000_0000), ..good.clone() }, "its WAL ends at "),
    ] {
        let error = refusal(config).to_string();
        assert!(error.contains(why), "expected '{why}' in '{error}'");
    }
    let wal = MemoryWal::new(start);
    let settings = vec![("varve.timeline".to_owned(), "7f3a".to_owned()), ("varve.epoch".to_owned(), "4".to_owned())];
    let receiver = receive(ReceiverConfig { settings, ..good }, &wal);
    await_streaming(&receiver);
}

#[test]
fn nothing_is_received_until_the_primary_waits_for_this_standby() {
    let postgres = primary("*", &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    assert!(receiver.wait_until(LONG, |_, phase| phase == ReceiverPhase::WaitingForStandbyName), "{:?}", receiver.phase());
    let mut commit = start_sql(&postgres, "CREATE TABLE t (i int)");
    assert!(!ends_within(&mut commit, Duration::from_millis(500)), "nothing may be acknowledged");
    assert_eq!(receiver.positions().flushed, Lsn::INVALID);
    assert!(receiver.trouble().is_some_and(|trouble| trouble.contains("is '*', expected 'varve_standby'")), "{:?}", receiver.trouble());
    let reload = format!("ALTER SYSTEM SET synchronous_standby_names = '{NAME}'");
    postgres.psql("postgres", &reload).expect("ALTER SYSTEM");
    postgres.psql("postgres", "SELECT pg_reload_conf()").expect("a reload");
    await_streaming(&receiver);
    assert_ends_well(commit, "the commit that waited");
    assert!(receiver.trouble().is_none());
}

#[test]
fn stop_is_at_once_and_nothing_is_acknowledged_after_it() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(config(&postgres, NAME, start), &wal);
    await_streaming(&receiver);
    postgres.psql("postgres", "CREATE TABLE t (i int)").expect("a commit");
    // While the thread waits for the socket.
    thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    receiver.stop();
    let outcome = receiver.join().expect("an outcome");
    assert!(begin.elapsed() < Duration::from_millis(500) && outcome.error.is_none(), "{:?} {:?}", begin.elapsed(), outcome.error);

    // While the thread waits for the disk: what it would acknowledge afterwards must not go out.
    let go_on = ReceiverConfig { start: wal.framed(), last_record: wal.last_record(), ..config(&postgres, NAME, start) };
    let receiver = receive(go_on, &wal);
    await_streaming(&receiver);
    wal.set_disk_stuck(true);
    let mut commit = start_sql(&postgres, "INSERT INTO t VALUES (1)");
    assert!(!ends_within(&mut commit, Duration::from_millis(300)));
    let begin = Instant::now();
    receiver.stop();
    assert!(begin.elapsed() < Duration::from_millis(100), "stop took {:?}", begin.elapsed());
    wal.set_disk_stuck(false);
    let outcome = receiver.join().expect("an outcome");
    assert!(!ends_within(&mut commit, Duration::from_millis(500)), "a commit was acknowledged after stop()");
    let durable = outcome.positions.durable.min(outcome.positions.framed);
    assert!(durable >= outcome.positions.flushed, "what was drained is at least what was acknowledged");
    assert_eq!(outcome.positions.framed, wal.framed());

    // While the primary is frozen.
    let go_on = ReceiverConfig { start: wal.framed(), last_record: wal.last_record(), ..config(&postgres, NAME, start) };
    let receiver = receive(go_on, &wal);
    assert_ends_well(commit, "the commit, by the next receiver");
    let pid = postgres.psql("postgres", "SELECT pid FROM pg_stat_replication").expect("a walsender").trim().to_owned();
    signal(&pid, Signal::STOP);
    let begin = Instant::now();
    let outcome = receiver.join().expect("an outcome");
    assert!(begin.elapsed() < Duration::from_millis(500) && outcome.error.is_none(), "{:?}", begin.elapsed());
    signal(&pid, Signal::CONT);
}

/// Stands between a receiver and its primary, counts what the primary sends, and flips one bit of it.
struct Flipper {
    dir: tempfile::TempDir,
    /// Bytes after which one is spoilt; negative: none.
    flip_after: Arc<AtomicI64>,
    flipped: Arc<AtomicUsize>,
}

impl Flipper {
    fn start(postgres: &Postgres) -> Flipper {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).expect("a socket");
        let target = postgres.dir().join(".s.PGSQL.5432");
        let flipper = Flipper { dir, flip_after: Arc::new(AtomicI64::new(-1)), flipped: Arc::default() };
        let (flip_after, flipped) = (flipper.flip_after.clone(), flipper.flipped.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(mut client) = client else { return };
                let Ok(mut server) = UnixStream::connect(&target) else { return };
                let (mut client_reads, mut server_writes) = (client.try_clone().expect("a clone"), server.try_clone().expect("a clone"));
                thread::spawn(move || {
                    let _ = std::io::copy(&mut client_reads, &mut server_writes);
                    let _ = server_writes.shutdown(std::net::Shutdown::Both);
                });
                let (flip_after, flipped) = (flip_after.clone(), flipped.clone());
                thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(n @ 1..) = server.read(&mut buffer) {
                        let left = flip_after.load(Ordering::SeqCst);
                        if left >= 0 {
                            if left < n as i64 {
                                buffer[left as usize] ^= 0x10;
                                flipped.fetch_add(1, Ordering::SeqCst);
                                flip_after.store(-1, Ordering::SeqCst);
                            } else {
                                flip_after.store(left - n as i64, Ordering::SeqCst);
                            }
                        }
                        if client.write_all(&buffer[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = client.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        flipper
    }
}

#[test]
fn a_byte_that_changed_on_the_way_is_never_acknowledged() {
    let postgres = primary(NAME, &[]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let flipper = Flipper::start(&postgres);
    let mut next = config(&postgres, NAME, start);
    next.connect.endpoint = Endpoint::unix(flipper.dir.path(), 5432);
    let (mut crc, mut other) = (0, 0);
    let stop = Arc::new(AtomicBool::new(false));
    let load = {
        let conninfo = postgres.conninfo("postgres");
        let stop = stop.clone();
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let sql = "CREATE TABLE IF NOT EXISTS t (i int, x text); INSERT INTO t SELECT i, repeat('x', i % 700) FROM generate_series(1, 400) i";
                let _ = Command::new("psql").args(["-X", "-q", "-d", &conninfo, "-c", sql]).stderr(Stdio::null()).status();
            }
        })
    };
    for round in 0..12u64 {
        let receiver = receive(next.clone(), &wal);
        await_streaming(&receiver);
        flipper.flip_after.store(5000 + (round as i64 * 7919) % 30_000, Ordering::SeqCst);
        // At once where a CRC finds it, later where a length became longer: then bytes are waited for that will not
        // come. Never where it hit the time at which the primary sent a message: what was received is compared at the
        // end.
        let noticed = receiver.wait_until(LONG * 3, |_, phase| phase != ReceiverPhase::Streaming);
        let flips = flipper.flipped.load(Ordering::SeqCst) as u64;
        assert!(noticed || flips == round + 1, "{flips} flips in round {round}, none noticed: {:?}", receiver.positions());
        let outcome = receiver.join().expect("an outcome");
        assert!(outcome.positions.flushed <= wal.framed());
        match outcome.error {
            Some(ReceiverError::Wal { framed, source, .. }) => {
                let (WalError::Crc { lsn, .. } | WalError::Record { lsn, .. } | WalError::Page { lsn, .. }) = source;
                crc += usize::from(matches!(source, WalError::Crc { .. }));
                assert!(lsn >= wal.framed() || lsn.page_start() <= wal.framed(), "the error names {lsn}");
                assert_eq!(framed, outcome.positions.flushed);
            }
            // The flip hit a length, a position or a tag of the protocol around the WAL, or a status while nothing else
            // came.
            Some(_) | None => other += 1,
        }
        next = ReceiverConfig { start: wal.framed(), last_record: wal.last_record(), ..next };
        let acknowledged = outcome.positions.flushed;
        assert!(wal.framed() >= acknowledged, "{acknowledged} was acknowledged, {} is there", wal.framed());
    }
    assert!(crc >= 6, "{crc} of 12 flips were found by a CRC, {other} otherwise");
    stop.store(true, Ordering::SeqCst);
    let receiver = receive(next, &wal);
    load.join().expect("the load");
    await_framed(&receiver, flushed(&postgres));
    wal.assert_same_as(&postgres);
}

#[test]
fn the_slot_follows_the_store_and_keeps_the_rest() {
    let postgres =
        primary(NAME, &[("wal_keep_size", "0"), ("max_wal_size", "48MB"), ("min_wal_size", "32MB"), ("checkpoint_timeout", "1h")]);
    let start = redo_point(&postgres);
    let wal = MemoryWal::new(start);
    let receiver = receive(ReceiverConfig { slot: quick_slot(), ..config(&postgres, NAME, start) }, &wal);
    let restart_lsn = || -> Option<Lsn> {
        let lsn = postgres
            .psql("postgres", "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'varve' AND NOT active")
            .expect("slots");
        lsn.trim().parse().ok()
    };
    let await_slot = |what: &str, reached: &dyn Fn(Lsn) -> bool| {
        let deadline = Instant::now() + LONG;
        while !restart_lsn().is_some_and(reached) {
            assert!(Instant::now() < deadline, "{what}: the slot is at {:?}", restart_lsn());
            thread::sleep(Duration::from_millis(50));
        }
    };
    await_slot("the slot must be made", &|lsn| lsn <= start + WAL_SLACK);
    let before = restart_lsn();
    for _ in 0..6 {
        postgres
            .psql(
                "postgres",
                "CREATE TABLE IF NOT EXISTS t (x text); INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 12000); CHECKPOINT",
            )
            .expect("WAL");
    }
    assert_eq!(restart_lsn(), before, "the store has nothing yet, so the slot stays");
    let first = varve_postgres::lsn::wal_segment_name(1, start.segment_number());
    assert!(postgres.data_dir().join("pg_wal").join(&first).exists(), "{first} must be kept: the store does not have it");
    await_framed(&receiver, flushed(&postgres));
    let stored = wal.framed();
    wal.set_store_durable(stored);
    await_slot("the slot must follow", &|lsn| lsn == stored);
    postgres.psql("postgres", "INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 12000); CHECKPOINT").expect("WAL");
    postgres.psql("postgres", "INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 12000); CHECKPOINT").expect("WAL");
    assert!(!postgres.data_dir().join("pg_wal").join(&first).exists(), "{first} is in the store and must not be kept");
    receiver.join().expect("an outcome");
}

/// Where a slot begins is the last checkpoint's redo point, which is near the start.
const WAL_SLACK: u64 = 1 << 20;

#[test]
fn passwords_are_proven_by_scram_and_md5() {
    let postgres = primary("", &[]);
    postgres
        .psql("postgres", "SET password_encryption = 'scram-sha-256'; CREATE ROLE s LOGIN REPLICATION PASSWORD 'geheim'; SET password_encryption = 'md5'; CREATE ROLE m LOGIN REPLICATION PASSWORD 'geheim'")
        .expect("roles");
    let hba = postgres.data_dir().join("pg_hba.conf");
    std::fs::write(&hba, "local all postgres trust\nlocal replication s scram-sha-256\nlocal replication m md5\nlocal all s scram-sha-256\nlocal all m md5\n").expect("pg_hba.conf");
    postgres.psql("postgres", "SELECT pg_reload_conf()").expect("a reload");
    let start = redo_point(&postgres);
    for user in ["s", "m"] {
        let good = ReceiverConfig { synchronous_standby_names: None, slot: quick_slot(), ..config(&postgres, NAME, start) };
        let mut connect = good.connect.clone();
        connect.user = user.to_owned();
        let wal = MemoryWal::new(start);
        let receiver = receive(ReceiverConfig { connect: connect.clone().password("falsch"), ..good.clone() }, &wal);
        let deadline = Instant::now() + LONG;
        while !receiver.trouble().is_some_and(|trouble| trouble.contains("password authentication failed")) {
            assert!(Instant::now() < deadline, "{user}: {:?}", receiver.trouble());
            thread::sleep(Duration::from_millis(10));
        }
        drop(receiver);
        let receiver = receive(ReceiverConfig { connect: connect.password("geheim"), ..good }, &wal);
        await_streaming(&receiver);
        let deadline = Instant::now() + LONG;
        while postgres.psql("postgres", "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'varve'").expect("slots").trim() != "1"
        {
            assert!(Instant::now() < deadline, "{user}: the slot must be made");
            thread::sleep(Duration::from_millis(20));
        }
        receiver.join().expect("an outcome");
        postgres.psql("postgres", "SELECT pg_drop_replication_slot('varve')").expect("drop the slot");
    }
}
