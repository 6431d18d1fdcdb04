//! `varve verify` finds nothing where nothing is wrong, and finds and names what is.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, program, psql};
use varve_testbed::limit::{self, COMMAND_MAX};
use varve_testbed::minio::Minio;
use varve_testbed::postgres::{Postgres, bin_dir, minor_bin_dir};
use varve_testbed::redo;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// How long what should happen at once may take.
const SOON: Duration = Duration::from_secs(30);

/// Work that touches tables, indexes, sequences and maps.
const WORK: &str = "
CREATE TABLE work (id serial PRIMARY KEY, word text);
CREATE INDEX ON work USING hash (word);
INSERT INTO work (word) SELECT md5(i::text) FROM generate_series(1, 3000) i;
UPDATE work SET word = word || 'x' WHERE id % 3 = 0;
DELETE FROM work WHERE id % 5 = 0;
VACUUM work;
TRUNCATE work;
INSERT INTO work (word) SELECT md5(i::text) FROM generate_series(1, 500) i;";

/// Runs statements one by one.
fn statements(sql: &str, mut run: impl FnMut(&str) -> anyhow::Result<String>) -> anyhow::Result<()> {
    sql.split(';').filter(|statement| !statement.trim().is_empty()).try_for_each(|statement| run(statement).map(drop))
}

/// Runs `varve verify ...`; gives whether all matched, and its JSON.
fn verify(args: &[&str]) -> anyhow::Result<(bool, Value)> {
    let output = limit::output(Command::new(VARVE).arg("verify").args(args).arg("--json"), COMMAND_MAX, None)?;
    let json = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("varve verify {} printed no JSON: {}{}", args.join(" "), text(&output.stdout), text(&output.stderr)))?;
    Ok((output.status.success(), json))
}

/// Runs `varve verify ...` with a server; all must match. Gives its JSON.
fn matched(dev: &Dev, args: &[&str]) -> anyhow::Result<Value> {
    let output = dev.cli(&[&["verify"], args, &["--json"]].concat())?;
    ensure!(output.status.success(), "varve verify {}: {}{}", args.join(" "), text(&output.stdout), text(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs `varve verify ...`, which must fail without a finding; gives what it says.
fn refused(args: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(VARVE);
    let output = limit::output(command.arg("verify").args(args).env("VARVE_URL", "http://127.0.0.1:1"), COMMAND_MAX, None)?;
    ensure!(!output.status.success(), "varve verify {} must be refused", args.join(" "));
    Ok(text(&output.stderr))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of UTF-8")
}

/// A copy of a data directory.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    program("cp", &["-a", path(from)?, path(to)?]).map(drop)
}

/// Flips a bit of a file.
fn damage(file: &Path, at: u64) -> anyhow::Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 1;
    Ok(file.write_all_at(&byte, at)?)
}

/// Asserts that a report has this number under this name.
#[track_caller]
fn expect(report: &Value, name: &str, expected: impl Into<Value>) {
    assert_eq!(report[name], expected.into(), "{name} in {report:#}");
}

#[test]
fn wal_in_a_folder_is_redone_from_the_pages_before_it() -> anyhow::Result<()> {
    let mut postgres = redo::init(Major::V15, &[], &[])?;
    postgres.start()?;
    postgres.psql("postgres", "CREATE TABLE before AS SELECT i, 'unchanged' AS word FROM generate_series(1, 100) i")?;
    let file = postgres.psql("postgres", "SELECT pg_relation_filepath('before')")?;
    postgres.stop("fast")?;
    let base = postgres.dir().join("base");
    copy(&postgres.data_dir(), &base)?;
    postgres.start()?;
    statements(WORK, |sql| postgres.psql("postgres", sql))?;
    postgres.psql("postgres", "UPDATE before SET word = 'changed' WHERE i = 1")?;
    let running = refused(&["wal", path(&postgres.data_dir())?, "--base", path(&postgres.data_dir())?])?;
    ensure!(running.contains("pg_ctl stop"), "pages of a running server are no base: {running}");
    postgres.stop("fast")?;
    let (data, base_arg) = (postgres.data_dir(), path(&base)?);

    let (matched, report) = verify(&["wal", path(&data)?, "--base", base_arg])?;
    ensure!(matched, "expected no mismatch: {report:#}");
    expect(&report, "adopted", 0);
    let types = report["types"].as_array().context("a list of types")?;
    let inserts = types.iter().find(|t| t["rmgr"] == "Heap" && t["record"] == "INSERT").context("heap inserts")?;
    ensure!(inserts["count"].as_u64() > Some(3000) && inserts["ns_per_record"].as_u64() > Some(0), "all inserts are there: {inserts}");

    // With little memory, pages go to a file and come back.
    let (matched, spilled) = verify(&["wal", path(&data)?, "--base", base_arg, "--memory-mb", "0"])?;
    ensure!(matched && spilled["overflow_bytes"].as_u64() > Some(0), "the same with a page in memory: {spilled:#}");
    expect(&spilled, "compared", report["compared"].clone());

    // Without the pages before, the first image of each is taken for true.
    let from = report["from"].as_str().context("a start")?.to_owned();
    let (matched, report) = verify(&["wal", path(&data.join("pg_wal"))?, "--from", &from])?;
    ensure!(matched && report["adopted"].as_u64() > Some(0), "without a base all that can be compared matches: {report:#}");

    // A page that is not what Postgres had before shows when it is changed.
    damage(&base.join(file.trim()), 8191 - 8)?;
    let (matched, report) = verify(&["wal", path(&data)?, "--base", base_arg])?;
    ensure!(!matched, "a wrong page must be found: {report:#}");
    expect(&report, "mismatches", 1);
    let mismatch = &report["first_mismatches"][0];
    ensure!(mismatch["rmgr"] == "Heap" && mismatch["block"] == 0, "the mismatch names record and block: {mismatch}");
    let output = limit::output(Command::new(VARVE).args(["verify", "wal", path(&data)?, "--base", base_arg]), COMMAND_MAX, None)?;
    let shown = text(&output.stdout);
    ensure!(!output.status.success() && shown.contains("item ") && shown.contains('*'), "the page's difference is shown:\n{shown}");
    Ok(())
}

#[test]
fn redo_of_a_crashed_servers_wal_arrives_where_its_recovery_does() -> anyhow::Result<()> {
    let mut postgres = redo::init(Major::V15, &[], &[])?;
    let (base, crashed) = (postgres.dir().join("base"), postgres.dir().join("crashed"));
    postgres.start()?;
    postgres.psql("postgres", "CREATE TABLE before AS SELECT i, 'unchanged' AS word FROM generate_series(1, 5000) i")?;
    postgres.stop("fast")?;
    copy(&postgres.data_dir(), &base)?;
    postgres.start()?;
    statements(WORK, |sql| postgres.psql("postgres", sql))?;
    postgres.psql("postgres", "UPDATE before SET word = 'changed' WHERE i % 2 = 0; SELECT pg_switch_wal()")?;
    // A record that is longer than what is redone at a time.
    postgres.psql("postgres", "SELECT pg_logical_emit_message(false, 'long', repeat('x', 3000000))")?;
    postgres.psql("postgres", "DELETE FROM before WHERE i % 3 = 0; DROP TABLE work")?;
    postgres.stop("immediate")?;
    copy(&postgres.data_dir(), &crashed)?;
    postgres.start()?;
    postgres.stop("fast")?;
    let recovered = postgres.data_dir();
    let redo = |threads: &str| -> anyhow::Result<Value> {
        let args = ["bench", "redo", path(&base)?, path(&crashed)?, "--compare", path(&recovered)?, "--threads", threads, "--json"];
        let output = limit::output(Command::new(VARVE).args(args), COMMAND_MAX, None)?;
        ensure!(output.status.success(), "varve {}: {}", args.join(" "), text(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let (one, three) = (redo("1")?, redo("3")?);
    ensure!(one["pages_compared"].as_u64() > Some(50) && one["wal_bytes"].as_u64() > Some(10 << 20), "all of it was redone: {one:#}");
    for what in ["records", "changes", "wal_bytes", "pages_compared"] {
        expect(&three, what, one[what].clone());
    }
    // Pages that are not so are found.
    let file = postgres_file(&recovered, &mut postgres, "before")?;
    damage(&file, 8191 - 8)?;
    let told = redo("2").err().context("a wrong page must be found")?.to_string();
    ensure!(told.contains("differ"), "{told}");
    Ok(())
}

/// The file of a relation of a stopped server.
fn postgres_file(data: &Path, postgres: &mut Postgres, relation: &str) -> anyhow::Result<PathBuf> {
    postgres.start()?;
    let file = postgres.psql("postgres", &format!("SELECT pg_relation_filepath('{relation}')"))?;
    postgres.stop("fast")?;
    Ok(data.join(file.trim()))
}

#[test]
fn damaged_wal_is_told_from_its_end() -> anyhow::Result<()> {
    let mut postgres = redo::init(Major::V15, &[], &[])?;
    postgres.start()?;
    statements(WORK, |sql| postgres.psql("postgres", sql))?;
    postgres.stop("fast")?;
    let (whole, report) = verify(&["wal", path(&postgres.data_dir())?])?;
    ensure!(whole, "whole WAL is verified: {report:#}");
    let segments = postgres.wal_segments()?;
    let first = segments.first().context("a segment")?;
    damage(first, 1 << 20)?;
    let (matched, report) = verify(&["wal", path(&postgres.data_dir())?])?;
    let failure = report["failure"].as_str().unwrap_or_default();
    ensure!(!matched && failure.contains("goes on behind"), "a damaged record in the middle is no end of WAL: {report:#}");
    std::fs::rename(first, first.with_extension("moved"))?;
    let gone = verify(&["wal", path(&postgres.data_dir())?, "--from", "0/1000028"]);
    ensure!(gone.is_err(), "WAL that is not there cannot be verified");
    let told = refused(&["wal", path(&postgres.data_dir())?, "--from", "0/1000028"])?;
    ensure!(told.contains("000000010000000000000001"), "the missing segment is named: {told}");
    Ok(())
}

#[test]
fn the_wal_of_a_running_server_is_followed() -> anyhow::Result<()> {
    let mut postgres =
        redo::init(Major::V15, &[], &[("max_wal_senders", "4"), ("synchronous_standby_names", "'*'"), ("synchronous_commit", "local")])?;
    postgres.start()?;
    let from = postgres.psql("postgres", "SELECT pg_current_wal_lsn()")?;
    let conninfo = postgres.conninfo("postgres");
    let follower = std::thread::spawn({
        let (conninfo, from) = (conninfo.clone(), from.trim().to_owned());
        // The last record of the work is not known yet; a point that the server is made to pass does.
        move || verify(&["wal", &conninfo, "--from", &from, "--until", "0/6000000"])
    });
    statements(WORK, |sql| postgres.psql("postgres", sql))?;
    let released = postgres.psql("postgres", "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'varve_verify' AND sync_state = 'sync' AND flush_lsn IS NOT NULL")?;
    ensure!(released.trim() == "0", "who verifies is no standby that releases commits");
    for _ in 0..5 {
        postgres.psql(
            "postgres",
            "CREATE TABLE IF NOT EXISTS more (i int); INSERT INTO more SELECT generate_series(1, 2000); SELECT pg_switch_wal()",
        )?;
    }
    let (matched, report) = follower.join().map_err(|_| anyhow::anyhow!("the follower panicked"))??;
    ensure!(matched && report["compared"].as_u64() > Some(5000), "the followed WAL matches: {report:#}");
    Ok(())
}

/// Vacuum of a GiST index, and insertion that removes what an index scan found dead: minors differ in a flag that this
/// sets, a standby from its primary.
const GIST: &str = "
CREATE TABLE points (id int, at point);
CREATE INDEX ON points USING gist (at);
INSERT INTO points SELECT i, point(i % 100, i / 100) FROM generate_series(1, 3000) i;
DELETE FROM points WHERE id % 2 = 0;
VACUUM points;
CREATE TABLE killed (id int, at point);
CREATE INDEX ON killed USING gist (at);
INSERT INTO killed SELECT i, point(i % 40, i / 40) FROM generate_series(1, 1200) AS i;
DELETE FROM killed WHERE id % 3 <> 0;
ALTER DATABASE postgres SET enable_seqscan = off;
ALTER DATABASE postgres SET enable_bitmapscan = off;
SELECT count(*) FROM killed WHERE at <@ box '((-1,-1),(100,100))';
INSERT INTO killed SELECT i, point(i % 40, i / 40) FROM generate_series(1, 1200) AS i";

/// 15.18 sets GiST's flag when it vacuums, 15.20 does not.
#[test]
fn minors_of_one_major_are_verified_alike() -> anyhow::Result<()> {
    let newest = bin_dir(Major::V15)?;
    for programs in [Some(newest), minor_bin_dir("15.18")?].into_iter().flatten() {
        let mut postgres = redo::init_with(programs.clone(), Major::V15, &[], &[])?;
        postgres.start()?;
        statements(WORK, |sql| postgres.psql("postgres", sql))?;
        statements(GIST, |sql| postgres.psql("postgres", sql))?;
        let version = postgres.psql("postgres", "SHOW server_version")?;
        postgres.stop("fast")?;
        let (matched, report) = verify(&["wal", path(&postgres.data_dir())?])?;
        ensure!(matched, "expected no mismatch on {version} in {}: {report:#}", programs.display());
        expect(&report, "postgres_own", 0);
    }
    Ok(())
}

#[test]
fn wal_in_segments_of_any_size_is_verified() -> anyhow::Result<()> {
    for size_mb in ["1", "64"] {
        let mut postgres = redo::init(Major::V15, &["--wal-segsize", size_mb], &[("max_wal_senders", "4")])?;
        let base = postgres.dir().join("base");
        copy(&postgres.data_dir(), &base)?;
        postgres.start()?;
        let from = postgres.psql("postgres", "SELECT pg_current_wal_lsn()")?;
        // Records that go over the edges of segments, and the empty rest of one.
        statements(WORK, |sql| postgres.psql("postgres", sql))?;
        postgres.psql("postgres", "SELECT pg_logical_emit_message(false, 'long', repeat('x', 3000000))")?;
        let until = postgres.psql("postgres", "SELECT pg_switch_wal()")?;
        statements("CREATE TABLE more (i int); INSERT INTO more SELECT generate_series(1, 3000)", |sql| postgres.psql("postgres", sql))?;
        let (matched, report) = verify(&["wal", &postgres.conninfo("postgres"), "--from", from.trim(), "--until", until.trim()])?;
        ensure!(matched && report["compared"].as_u64() > Some(1000), "followed in segments of {size_mb} MiB: {report:#}");
        postgres.stop("immediate")?;
        let crashed = postgres.dir().join("crashed");
        copy(&postgres.data_dir(), &crashed)?;
        let (matched, report) = verify(&["wal", path(&crashed)?, "--base", path(&base)?])?;
        ensure!(matched && report["compared"].as_u64() > Some(4000), "read in segments of {size_mb} MiB: {report:#}");
        expect(&report, "adopted", 0);
        // Pages as recovery makes them.
        postgres.start()?;
        postgres.stop("fast")?;
        let recovered = postgres.data_dir();
        let args = ["bench", "redo", path(&base)?, path(&crashed)?, "--compare", path(&recovered)?, "--threads", "2", "--json"];
        let output = limit::output(Command::new(VARVE).args(args), COMMAND_MAX, None)?;
        ensure!(output.status.success(), "varve {}: {}", args.join(" "), text(&output.stderr));
    }
    Ok(())
}

#[test]
fn what_postgres_finds_wrong_of_itself_is_told_apart() -> anyhow::Result<()> {
    let mut postgres = redo::init(Major::V15, &[], &[])?;
    postgres.start()?;
    // A mark of a combined command id, which freezing leaves on the tuple, and locking it, in redo only, does not.
    for sql in [
        "CREATE TABLE locked (i int)",
        "BEGIN; INSERT INTO locked VALUES (1), (2); SAVEPOINT s; DELETE FROM locked; ROLLBACK TO s; COMMIT",
        "VACUUM (FREEZE) locked",
        "BEGIN; SELECT * FROM locked FOR UPDATE; COMMIT",
        "UPDATE locked SET i = i + 10",
    ] {
        postgres.psql("postgres", sql)?;
    }
    postgres.stop("immediate")?;
    let (matched, report) = verify(&["wal", path(&postgres.data_dir())?])?;
    ensure!(matched, "what Postgres's own recovery makes so, too, fails no run: {report:#}");
    expect(&report, "mismatches", 0);
    expect(&report, "postgres_own", 2);
    let lock = report["types"].as_array().and_then(|types| types.iter().find(|t| t["rmgr"] == "Heap" && t["record"] == "LOCK"));
    expect(lock.context("locks")?, "postgres_own", 2);
    let output = limit::output(Command::new(VARVE).args(["verify", "wal", path(&postgres.data_dir())?]), COMMAND_MAX, None)?;
    ensure!(text(&output.stdout).contains("2 pages differ as those of Postgres's own recovery do"), "{}", text(&output.stdout));
    // The oracle: stock recovery with the same check.
    ensure!(postgres.start().is_err(), "Postgres's own check complains");
    ensure!(postgres.log().contains("inconsistent page found"), "{}", postgres.log());
    Ok(())
}

#[test]
fn a_branch_holds_what_postgres_has() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    check_consistency(&db)?;
    statements(WORK, |sql| psql(&db, sql))?;
    let until = psql(&db, "SELECT pg_current_wal_lsn()")?;

    // Its WAL, while a compute writes it.
    let report = matched(&dev, &["wal", "acme/main", "--until", &until])?;
    ensure!(report["compared"].as_u64() > Some(1000), "the branch's WAL is verified up to what was just written: {report:#}");
    // Its pages, on their own.
    matched(&dev, &["timeline", "acme/main"])?;

    // Against a stock standby of the compute.
    let standby = standby_of(&db)?;
    let password = db.split([':', '@']).nth(2).context("a password in the URI")?;
    let standby_db = format!("{} password={password}", standby.conninfo("postgres"));
    let report = matched(&dev, &["timeline", "acme/main", "--against", &standby_db])?;
    ensure!(report["pages"].as_u64() > Some(1000), "all pages were compared: {report:#}");
    let state = psql(&standby_db, "SELECT pg_get_wal_replay_pause_state()")?;
    ensure!(state == "not paused", "afterwards replay goes on, it is {state}");
    psql(&db, "INSERT INTO work (word) VALUES ('later')")?;
    matched(&dev, &["timeline", "acme/main", "--against", &standby_db, "--lsn", &until])?;

    // What the standby redoes itself.
    statements(GIST, |sql| psql(&db, sql))?;
    let until = psql(&db, "SELECT pg_current_wal_lsn()")?;
    matched(&dev, &["timeline", "acme/main", "--against", &standby_db, "--lsn", &until])?;
    let report = matched(&dev, &["wal", "acme/main", "--until", &until])?;
    let types = report["types"].as_array().context("types of records")?;
    for record in ["PAGE_UPDATE", "DELETE"] {
        let seen = types.iter().any(|seen| seen["rmgr"] == "Gist" && seen["record"] == record && seen["compared"].as_u64() > Some(0));
        ensure!(seen, "GiST's {record} is among them: {report:#}");
    }

    // Against a data directory.
    let folder = dev.folder().join("materialized");
    dev.json(&["materialize", "acme/main", path(&folder)?])?;
    matched(&dev, &["timeline", "acme/main", "--against", path(&folder)?])?;
    let file = folder.join(psql(&db, "SELECT pg_relation_filepath('work')")?);
    damage(&file, 8192 + 8191 - 8)?;
    let output = dev.cli(&["verify", "timeline", "acme/main", "--against", path(&folder)?])?;
    let shown = text(&output.stdout);
    let name = file.file_name().context("a name")?.to_string_lossy().into_owned();
    ensure!(!output.status.success(), "a page that differs must be found: {shown}");
    ensure!(shown.contains(&format!("{name} block 1 ")) && shown.contains("1 differences"), "relation and block are named: {shown}");

    // Against others.
    let stranger = Postgres::init(Major::V15, &[], &[])?;
    let told = dev.refused(&["verify", "timeline", "acme/main", "--against", path(&stranger.data_dir())?])?;
    ensure!(told.contains("another cluster"), "{told}");
    let told = dev.refused(&["verify", "timeline", "acme/main", "--against", &db])?;
    ensure!(told.contains("no standby"), "{told}");
    Ok(())
}

/// Makes the server at `conninfo` put each page into its WAL.
fn check_consistency(conninfo: &str) -> anyhow::Result<()> {
    psql(conninfo, "ALTER SYSTEM SET wal_consistency_checking = 'all'")?;
    reload(conninfo, "all")
}

/// Makes the server read its settings, and waits until sessions find `wal_consistency_checking` to be `expected`.
fn reload(conninfo: &str, expected: &str) -> anyhow::Result<()> {
    psql(conninfo, "SELECT pg_reload_conf()")?;
    limit::until(&format!("wal_consistency_checking to become '{expected}'"), SOON, None, || {
        Ok((psql(conninfo, "SHOW wal_consistency_checking")? == expected).then_some(()))
    })
}

/// Indexes of all kinds on the table of [`WORK`], and changes of them.
const INDEXES: &str = "
CREATE INDEX ON work USING gin (to_tsvector('simple', word));
CREATE INDEX ON work USING gist (point(id, id));
CREATE INDEX ON work USING spgist (word);
CREATE INDEX ON work USING brin (id);
UPDATE work SET word = md5(word) WHERE id % 2 = 0;
INSERT INTO work (word) SELECT md5(i::text) || ' more' FROM generate_series(1, 2000) i;
DELETE FROM work WHERE id % 3 = 0;
VACUUM work";

#[test]
fn the_wal_of_a_branch_is_verified_without_its_compute() -> anyhow::Result<()> {
    kept_wal(Dev::start(VARVE)?)
}

#[test]
fn the_wal_of_a_branch_is_verified_from_the_bucket() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    kept_wal(Dev::start_on(VARVE, Some(minio.url("varve")), minio.variables())?)
}

fn kept_wal(mut dev: Dev) -> anyhow::Result<()> {
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    statements(WORK, |sql| psql(&db, sql))?;
    let told = dev.refused(&["verify", "wal", "acme/main"])?;
    ensure!(told.contains("ALTER SYSTEM SET wal_consistency_checking"), "without check images it says how to get them: {told}");
    psql(&db, "DROP TABLE work")?;
    check_consistency(&db)?;
    statements(WORK, |sql| psql(&db, sql))?;
    let early = psql(&db, "SELECT pg_current_wal_lsn()")?;

    // A server that was killed ingests its WAL log anew: what was kept, and what is still to be, join on.
    dev.kill()?;
    dev.run()?;
    statements(INDEXES, |sql| psql(&db, sql))?;
    let until = psql(&db, "SELECT pg_current_wal_lsn()")?;
    let running = matched(&dev, &["wal", "acme/main", "--until", &until])?;
    expect(&running, "gaps", 0);

    // Without the compute, and without the pageserver's disk: from the store alone.
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.stop()?;
    dev.wipe()?;
    dev.run()?;
    let told = dev.refused(&["verify", "wal", "acme/main"])?;
    ensure!(told.contains("belongs to server ") && told.contains("varve tenant take"), "a read takes no tenant of a lost server: {told}");
    dev.json(&["tenant", "take", "acme"])?;
    let whole = matched(&dev, &["wal", "acme/main"])?;
    expect(&whole, "gaps", 0);
    let types = whole["types"].as_array().context("a list of types")?;
    for rmgr in ["Heap", "Heap2", "Btree", "Hash", "Gin", "Gist", "SPGist", "BRIN"] {
        let compared = types.iter().filter(|t| t["rmgr"] == rmgr).filter_map(|t| t["compared"].as_u64()).sum::<u64>();
        ensure!(compared > 0, "pages of {rmgr} are compared: {whole:#}");
    }
    let from = matched(&dev, &["wal", "acme/main", "--from", &early])?;
    ensure!(from["records"].as_u64() < whole["records"].as_u64(), "it begins where it is told to: {from:#}");
    let told = dev.refused(&["verify", "wal", "acme/main", "--from", "0/1000028"])?;
    ensure!(told.contains("no WAL is kept at 0/1000028; there is 0/"), "it says what there is: {told}");

    // A branch has its ancestor's WAL up to where it left it, and then its own.
    dev.json(&["branch", "create", "acme/child", "--lsn", &early])?;
    let db = dev.compute("acme/child", &[])?;
    psql(&db, "UPDATE work SET word = 'of the child'")?;
    dev.json(&["compute", "stop", "acme/child"])?;
    let child = matched(&dev, &["wal", "acme/child"])?;
    expect(&child, "from", whole["from"].clone());
    let of_ancestor = matched(&dev, &["wal", "acme/child", "--until", &early])?;
    ensure!(of_ancestor["compared"].as_u64() < child["compared"].as_u64(), "its own WAL is verified, too: {child:#}");

    // What does not carry its pages is not kept: more than a pause of that makes a gap.
    let db = dev.compute("acme/child", &[])?;
    psql(&db, "ALTER SYSTEM RESET wal_consistency_checking")?;
    reload(&db, "")?;
    // A flush for itself.
    dev.json(&["compute", "stop", "acme/child"])?;
    let before = matched(&dev, &["wal", "acme/child"])?;
    let gaps = before["gaps"].as_u64().context("a number of gaps")?;
    let db = dev.compute("acme/child", &[])?;
    psql(&db, "INSERT INTO work (word) SELECT md5(i::text) FROM generate_series(1, 30000) i")?;
    dev.json(&["compute", "stop", "acme/child"])?;
    let same = matched(&dev, &["wal", "acme/child"])?;
    expect(&same, "compared", before["compared"].clone());
    let db = dev.compute("acme/child", &[])?;
    check_consistency(&db)?;
    statements("UPDATE work SET word = 'checked again'; UPDATE work SET word = 'and again'", |sql| psql(&db, sql))?;
    dev.json(&["compute", "stop", "acme/child"])?;
    let behind = matched(&dev, &["wal", "acme/child"])?;
    expect(&behind, "gaps", gaps + 1);
    ensure!(behind["compared"].as_u64() > before["compared"].as_u64(), "what lies behind the gap is verified: {behind:#}");
    Ok(())
}

#[test]
fn wal_that_cannot_be_uploaded_is_not_let_go_of() -> anyhow::Result<()> {
    let mut dev = Dev::start(VARVE)?;
    let tenant = dev.json(&["tenant", "create", "acme"])?;
    let branch = dev.json(&["branch", "show", "acme/main"])?;
    let (tenant, timeline) = (tenant["id"].as_str().context("an id")?, branch["timeline_id"].as_str().context("a timeline")?);
    let folder = Path::new(&dev.store()).join("tenants").join(tenant).join("timelines").join(timeline);
    let db = dev.compute("acme/main", &[])?;
    check_consistency(&db)?;
    // A file stands where the folder of kept WAL is to be made; layers can be written.
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("wal"), "")?;
    statements(WORK, |sql| psql(&db, sql))?;
    let from_log = matched(&dev, &["wal", "acme/main", "--until", &psql(&db, "SELECT pg_current_wal_lsn()")?])?;
    std::thread::scope(|scope| {
        // Returns when layers have everything.
        let stop = scope.spawn(|| dev.json(&["compute", "stop", "acme/main"]));
        dev.until("a flush whose WAL cannot be kept to fail", SOON * 2, || {
            Ok(std::fs::read_to_string(dev.log())?.contains("a flush failed, it is tried again").then_some(()))
        })?;
        ensure!(!stop.is_finished(), "what is not in the store is not said to be there");
        std::fs::remove_file(folder.join("wal"))?;
        stop.join().map_err(|_| anyhow::anyhow!("the stop panicked"))?
    })?;
    dev.stop()?;
    dev.wipe()?;
    dev.run()?;
    dev.json(&["tenant", "take", "acme"])?;
    let from_store = matched(&dev, &["wal", "acme/main"])?;
    expect(&from_store, "gaps", 0);
    expect(&from_store, "from", from_log["from"].clone());
    ensure!(from_store["compared"].as_u64() >= from_log["compared"].as_u64(), "nothing was lost meanwhile: {from_store:#}");
    Ok(())
}

/// A streaming standby of the server at `conninfo`, running.
fn standby_of(conninfo: &str) -> anyhow::Result<Postgres> {
    let mut standby = Postgres::bare(Major::V15)?;
    let data: PathBuf = standby.data_dir();
    let mut backup = standby.command("pg_basebackup")?;
    backup.args(["-d", conninfo, "-X", "stream", "-R", "--no-sync", "-D"]).arg(&data);
    let status = limit::status(&mut backup, COMMAND_MAX, None)?;
    ensure!(status.success(), "pg_basebackup from the compute failed");
    standby.configure(&[("hot_standby", "on")])?;
    standby.start()?;
    Ok(standby)
}

#[test]
fn sources_that_are_none_are_refused_in_words() -> anyhow::Result<()> {
    let empty = tempfile::tempdir()?;
    for (args, why) in [
        (vec!["wal", "nothing"], "no tenant/branch"),
        (vec!["wal", "/no/such/folder"], "no tenant/branch"),
        (vec!["wal", path(empty.path())?], "no WAL segment"),
        (vec!["wal", "host=/nowhere user=x"], "/nowhere"),
        (vec!["wal", "postgresql://h/?sslmode=require"], "TLS"),
        (vec!["wal", path(empty.path())?, "--base", path(empty.path())?], "PG_VERSION"),
        (vec!["timeline", "acme"], "tenant/branch"),
    ] {
        let told = refused(&args)?;
        ensure!(told.contains(why), "varve verify {}: expected '{why}' in: {told}", args.join(" "));
    }
    Ok(())
}
