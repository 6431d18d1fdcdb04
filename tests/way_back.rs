//! There is a way back: a start that fails says why, at once; a setting that keeps a server from starting is taken
//! back; nothing that a superuser can do with SQL locks him out.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use varve_postgres::Major;
use varve_testbed::dev::{Dev, program, psql};
use varve_testbed::postgres::is_skipped;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");

/// How long a start that fails may take until it says so, on a machine where everything runs at once: what it takes to
/// begin comes on top of the 5 s.
const SAYS_WITHIN: Duration = Duration::from_secs(10);

fn tenant() -> anyhow::Result<(Dev, String)> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    Ok((dev, db))
}

/// Runs statements in one session, each in a transaction of its own.
fn psql_steps(conninfo: &str, statements: &[&str]) -> anyhow::Result<()> {
    let arguments: Vec<&str> = statements.iter().flat_map(|statement| ["-c", statement]).collect();
    program("psql", &[&[conninfo, "-XqAt", "-v", "ON_ERROR_STOP=1"], &*arguments].concat()).map(|_| ())
}

/// The same server's database `name`.
fn in_database(conninfo: &str, name: &str) -> String {
    format!("{}/{name}", conninfo.strip_suffix("/postgres").unwrap_or(conninfo))
}

/// A start that must fail, soon, and say all of this.
fn says(dev: &Dev, branch: &str, words: &[&str]) -> anyhow::Result<()> {
    let begun = Instant::now();
    let said = dev.refused(&["compute", "start", branch])?;
    let took = begun.elapsed();
    for word in words {
        ensure!(said.contains(word), "'{word}' in what the failed start says: {said}");
    }
    ensure!(took < SAYS_WITHIN, "it says so within {SAYS_WITHIN:?}, took {took:?}: {said}");
    Ok(())
}

#[test]
fn a_setting_that_keeps_a_server_from_starting_is_named_and_taken_back() -> anyhow::Result<()> {
    let (dev, db) = tenant()?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let bad = [
        ("shared_buffers", "900GB", "FATAL:  could not map anonymous shared memory"),
        ("shared_preload_libraries", "nope", "could not access file \"nope\""),
        ("ssl", "on", "FATAL:  could not load server certificate file"),
        ("max_connections", "2", "must be less than max_connections (2)"),
    ];
    let mut db = db;
    for (name, value, words) in bad {
        psql(&db, &format!("ALTER SYSTEM SET {name} = '{value}'"))?;
        dev.json(&["compute", "stop", "acme/main"])?;
        says(&dev, "acme/main", &[words, &format!("{name} = '{value}'"), "varve settings"])?;
        let listed = dev.json(&["settings", "list", "acme/main"])?;
        ensure!(listed["settings"][name] == value, "the settings of a branch are listed: {listed}");
        // It holds for one start, and beats ALTER SYSTEM.
        let good = match name {
            "shared_buffers" => "16MB",
            "ssl" => "off",
            "max_connections" => "30",
            _ => "",
        };
        db = dev.compute("acme/main", &["--set", &format!("{name}={good}")])?;
        ensure!(psql(&db, "SELECT i FROM t")? == "1", "a start with --set {name}={good} brings everything back");
        let running = dev.refused(&["settings", "reset", "acme/main", name])?;
        ensure!(running.contains("ALTER SYSTEM") && running.contains("compute stop"), "it says what to do: {running}");
        dev.json(&["compute", "stop", "acme/main"])?;
        says(&dev, "acme/main", &[words])?;
        let left = dev.json(&["settings", "reset", "acme/main", name])?;
        ensure!(left["settings"].get(name).is_none(), "{name} is reset: {left}");
        db = dev.compute("acme/main", &[])?;
        ensure!(psql(&db, "SELECT i FROM t")? == "1", "without {name} everything is back");
    }
    Ok(())
}

#[test]
fn settings_are_set_without_a_compute_and_those_of_varve_are_refused() -> anyhow::Result<()> {
    let (dev, _) = tenant()?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.json(&["settings", "set", "acme/main", "work_mem=7MB", "app.motto=it's \\ 'so'", "search_path="])?;
    let db = dev.compute("acme/main", &["--set", "maintenance_work_mem=17MB"])?;
    let shown =
        psql(&db, "SELECT current_setting('work_mem') || '|' || current_setting('app.motto') || '|' || current_setting('search_path')")?;
    ensure!(shown == "7MB|it's \\ 'so'|", "the start has the settings: {shown}");
    ensure!(psql(&db, "SHOW maintenance_work_mem")? == "17MB", "--set holds for this start");
    psql(&db, "ALTER SYSTEM SET work_mem = '9MB'")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    ensure!(dev.json(&["settings", "list", "acme/main"])?["settings"]["work_mem"] == "9MB", "what ALTER SYSTEM made is listed");
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW work_mem")? == "9MB" && psql(&db, "SHOW maintenance_work_mem")? != "17MB", "and --set is over");
    dev.json(&["compute", "stop", "acme/main"])?;
    for (setting, why) in [
        ("fsync=on", "fsync is Varve's own"),
        ("varve.epoch=9", "varve.epoch is Varve's own"),
        ("a b=1", "no name of a setting"),
        ("work_mem=4MB\nfsync=on", "line break"),
    ] {
        for command in [["settings", "set", "acme/main", setting].as_slice(), &["compute", "start", "acme/main", "--set", setting]] {
            let said = dev.refused(command)?;
            ensure!(said.contains(why), "{setting:?} is refused by name: {said}");
        }
    }
    let left = dev.json(&["settings", "reset", "acme/main", "--all"])?;
    ensure!(left["settings"].as_object().is_some_and(serde_json::Map::is_empty), "all are reset: {left}");
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW work_mem")? == "4MB", "so the default is back");
    Ok(())
}

#[test]
fn settings_at_a_moment_are_those_of_the_moment() -> anyhow::Result<()> {
    let (dev, db) = tenant()?;
    psql(&db, "ALTER SYSTEM SET work_mem = '7MB'")?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let x = psql(&db, "SELECT pg_current_wal_lsn()")?;
    // No record lies between the moment and the setting: it is told apart from it all the same.
    psql(&db, "ALTER SYSTEM SET shared_preload_libraries = 'nope'")?;
    psql(&db, "ALTER SYSTEM SET work_mem = '9MB'")?;
    dev.until("the setting to be kept", Duration::from_secs(30), || {
        Ok((dev.json(&["settings", "list", "acme/main"])?["settings"]["work_mem"] == "9MB").then_some(()))
    })?;
    let past = dev.compute("acme/main", &["--lsn", &x])?;
    ensure!(psql(&past, "SHOW work_mem")? == "7MB", "a throw-away compute has the settings of its moment");
    dev.json(&["branch", "create", "acme/head"])?;
    dev.json(&["compute", "stop", "acme/main"])?;
    says(&dev, "acme/main", &["shared_preload_libraries = 'nope'"])?;
    says(&dev, "acme/head", &["shared_preload_libraries = 'nope'"])?;
    dev.json(&["branch", "create", "acme/before", "--lsn", &x])?;
    let branch = dev.compute("acme/before", &[])?;
    ensure!(psql(&branch, "SHOW work_mem")? == "7MB", "a branch has the settings of its moment");
    ensure!(psql(&branch, "SELECT i FROM t")? == "1", "and its rows");
    dev.json(&["branch", "restore", "acme/main", "--lsn", &x])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW work_mem")? == "7MB", "and so has a restore");
    Ok(())
}

/// Runs SQL where an error may be, such as that of a session that ends itself.
fn whatever(db: &str, sql: &str) {
    let _ = psql(db, sql);
}

#[test]
fn whoever_takes_our_role_away_gets_his_server_back_and_is_told() -> anyhow::Result<()> {
    let (dev, mut db) = tenant()?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    for (index, locks_out) in
        ["DROP ROLE varve", "ALTER ROLE varve NOLOGIN NOSUPERUSER", "ALTER ROLE varve RENAME TO other"].iter().enumerate()
    {
        psql(&db, locks_out)?;
        let branch = format!("acme/b{index}");
        dev.json(&["branch", "create", &branch])?;
        dev.json(&["compute", "stop", "acme/main"])?;
        for name in ["acme/main", &branch] {
            let compute = dev.json(&["compute", "start", name])?;
            let warning = compute["warnings"][0].as_str().unwrap_or_default();
            ensure!(warning.contains("was brought back"), "{locks_out}: the answer says what was done: {compute}");
            let conninfo = compute["conninfo"].as_str().context("a conninfo")?;
            ensure!(psql(conninfo, "SELECT i FROM t")? == "1", "{locks_out}: {name} is back");
            psql(conninfo, "INSERT INTO t SELECT 1 WHERE false; CREATE TABLE IF NOT EXISTS written (i int)")?;
        }
        dev.json(&["compute", "stop", &branch])?;
        dev.json(&["compute", "stop", "acme/main"])?;
        let compute = dev.json(&["compute", "start", "acme/main"])?;
        ensure!(compute["warnings"].as_array().is_none_or(Vec::is_empty), "a repair is said once: {compute}");
        db = compute["conninfo"].as_str().context("a conninfo")?.to_owned();
    }
    Ok(())
}

#[test]
fn no_database_need_be_there_or_take_connections() -> anyhow::Result<()> {
    let (mut dev, db) = tenant()?;
    psql(&db, "CREATE DATABASE mine")?;
    let mine = in_database(&db, "mine");
    psql(&mine, "CREATE TABLE t AS SELECT 1 AS i")?;
    psql(&mine, "DROP DATABASE postgres")?;
    psql(&mine, "ALTER DATABASE template1 ALLOW_CONNECTIONS false")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.compute("acme/main", &[])?;
    let moment = psql(&mine, "SELECT pg_current_wal_lsn()")?;
    psql(&mine, "CREATE TABLE later (i int)")?;
    // From here on nobody gets in any more.
    psql(&mine, "UPDATE pg_database SET datallowconn = false")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    ensure!(compute["state"] == "running", "it runs: {compute}");
    dev.kill()?;
    dev.run()?;
    dev.until("the compute to attach again", Duration::from_secs(60), || {
        Ok((dev.json(&["compute", "list"])?[0]["state"] == "running").then_some(()))
    })?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.json(&["branch", "create", "acme/before", "--lsn", &moment])?;
    let before = in_database(&dev.compute("acme/before", &[])?, "mine");
    ensure!(psql(&before, "SELECT i FROM t")? == "1", "a branch of the moment before takes connections");
    dev.json(&["branch", "restore", "acme/main", "--lsn", &moment])?;
    dev.compute("acme/main", &[])?;
    let again = in_database(&dev.compute("acme/main", &[])?, "mine");
    ensure!(psql(&again, "SELECT to_regclass('later') IS NULL")? == "t", "and a restore does");
    Ok(())
}

fn broken_sessions(major: Major) -> anyhow::Result<()> {
    if is_skipped(major) {
        return Ok(());
    }
    let dev = Dev::start_for(VARVE, major, &[])?;
    dev.json(&["tenant", "create", "acme", "--pg-version", &major.to_string()])?;
    let db = dev.compute("acme/main", &[])?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let with =
        format!("{db}?options=-csession_preload_libraries%3D%20-clocal_preload_libraries%3D%20-cstatement_timeout%3D0%20-crole%3Dnone");
    for set in [
        "ALTER SYSTEM SET session_preload_libraries = 'nope'",
        "ALTER ROLE ALL SET local_preload_libraries = 'nope'",
        "ALTER ROLE varve SET session_preload_libraries = 'nope'",
        "ALTER ROLE varve SET default_transaction_read_only = on",
        "ALTER DATABASE template1 SET role = 'pg_monitor'",
        "ALTER DATABASE postgres SET statement_timeout = 1",
    ] {
        whatever(&with, set);
    }
    if major >= Major::V17 {
        let function = "CREATE FUNCTION public.no() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'";
        let trigger = "CREATE EVENT TRIGGER no ON login EXECUTE FUNCTION public.no(); ALTER EVENT TRIGGER no ENABLE ALWAYS";
        for name in ["postgres", "template1"] {
            let with = with.replacen("/postgres?", &format!("/{name}?"), 1);
            psql(&with, &format!("{function}; {trigger}"))?;
        }
    }
    dev.json(&["compute", "stop", "acme/main"])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    ensure!(compute["state"] == "running", "it runs: {compute}");
    ensure!(psql(&db, "SELECT 1").is_err(), "the tenant's own sessions are broken");
    // A session of ours with a database: it sets the new password all the same.
    let rotated = dev.json(&["tenant", "password", "acme", "--rotate"])?;
    let with = with_password(&with, rotated["password"].as_str().context("a password")?);
    dev.until("a session of ours to set the password", Duration::from_secs(30), || {
        let said = psql(&with, "SELECT 1").err().map(|error| error.to_string()).unwrap_or_default();
        Ok((!said.contains("password authentication failed")).then_some(()))
    })?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.json(&["settings", "reset", "acme/main", "--all"])?;
    dev.compute("acme/main", &[])?;
    Ok(())
}

#[test]
fn what_breaks_a_tenants_sessions_breaks_none_of_ours_on_14() -> anyhow::Result<()> {
    broken_sessions(Major::V14)
}

#[test]
fn what_breaks_a_tenants_sessions_breaks_none_of_ours_on_15() -> anyhow::Result<()> {
    broken_sessions(Major::V15)
}

#[test]
fn what_breaks_a_tenants_sessions_breaks_none_of_ours_on_18() -> anyhow::Result<()> {
    broken_sessions(Major::V18)
}

#[test]
fn a_standby_name_that_the_tenant_set_is_taken_back_though_nobody_can_connect() -> anyhow::Result<()> {
    let (dev, db) = tenant()?;
    psql(&db, "CREATE TABLE t AS SELECT 1 AS i")?;
    let moment = psql(&db, "SELECT pg_current_wal_lsn()")?;
    let before = dev.json(&["compute", "list"])?[0].clone();
    // His session is the last one; ours finds no database any more, so the compute begins anew without the setting.
    psql_steps(&db, &["UPDATE pg_database SET datallowconn = false", "ALTER SYSTEM SET synchronous_standby_names = ''"])?;
    dev.until("the compute to begin anew", Duration::from_secs(60), || {
        let compute = &dev.json(&["compute", "list"])?[0];
        Ok((compute["state"] == "running" && compute["pid"] != before["pid"]).then_some(()))
    })?;
    dev.json(&["compute", "stop", "acme/main"])?;
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    ensure!(compute["state"] == "running", "it runs: {compute}");
    dev.json(&["branch", "restore", "acme/main", "--lsn", &moment])?;
    ensure!(psql(&db, "SELECT i FROM t")? == "1", "and comes back");
    Ok(())
}

#[test]
fn no_session_of_ours_keeps_a_database_from_being_dropped_or_copied() -> anyhow::Result<()> {
    let (dev, db) = tenant()?;
    psql(&db, "CREATE TABLE t AS SELECT generate_series(1, 10000) AS i")?;
    psql(&db, "CREATE DATABASE other")?;
    let other = in_database(&db, "other");
    for round in 0..5 {
        // The slot is moved meanwhile, as the store gets WAL.
        psql(&other, &format!("CREATE TABLE w{round} AS SELECT generate_series(1, 10000) AS i"))?;
        psql(&other, "CREATE DATABASE copy TEMPLATE postgres")?;
        psql(&other, "DROP DATABASE copy")?;
        std::thread::sleep(Duration::from_secs(2));
        ensure!(
            psql(&other, "SELECT count(*) FROM pg_stat_activity WHERE datname IN ('postgres', 'template1')")? == "0",
            "no session sits there"
        );
    }
    psql(&other, "DROP DATABASE postgres")?;
    let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'varve'";
    let before = psql(&other, slot)?;
    psql(&other, "CREATE TABLE more AS SELECT generate_series(1, 10000) AS i")?;
    dev.until("the slot to follow the store", Duration::from_secs(60), || Ok((psql(&other, slot)? != before).then_some(())))?;
    Ok(())
}

/// The URI with another password.
fn with_password(conninfo: &str, password: &str) -> String {
    let (before, after) = conninfo.split_once('@').unwrap_or((conninfo, ""));
    let (user, _) = before.rsplit_once(':').unwrap_or((before, ""));
    format!("{user}:{password}@{after}")
}

#[test]
fn the_password_is_the_tenants_and_a_rotation_reaches_each_history_once() -> anyhow::Result<()> {
    let (dev, db) = tenant()?;
    let first = dev.json(&["tenant", "password", "acme"])?;
    ensure!(db.contains(first["password"].as_str().context("a password")?), "the password is the one in the connection string");
    dev.json(&["branch", "create", "acme/early"])?;
    psql(&db, "ALTER ROLE postgres PASSWORD 'mine'")?;
    let moment = psql(&with_password(&db, "mine"), "SELECT pg_current_wal_lsn()")?;
    psql(&with_password(&db, "mine"), "CREATE TABLE t AS SELECT 1 AS i")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.compute("acme/main", &[])?;
    ensure!(psql(&with_password(&db, "mine"), "SELECT i FROM t")? == "1", "what the tenant set stays");
    ensure!(psql(&db, "SELECT 1").is_err(), "and the old one is not back");

    let rotated = dev.json(&["tenant", "password", "acme", "--rotate"])?;
    let new = rotated["password"].as_str().context("a password")?;
    ensure!(dev.json(&["tenant", "password", "acme"])?["password"] == new && new != first["password"], "it is shown: {rotated}");
    let db = with_password(&db, new);
    dev.until("the running compute to take it", Duration::from_secs(30), || Ok(psql(&db, "SELECT 1").is_ok().then_some(())))?;
    ensure!(psql(&with_password(&db, "mine"), "SELECT 1").is_err(), "the one before is void");
    let early = dev.compute("acme/early", &[])?;
    ensure!(early.contains(new) && psql(&early, "SELECT 1")? == "1", "a branch from before takes it when it starts");

    psql(&db, "ALTER ROLE postgres PASSWORD 'mine again'")?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.compute("acme/main", &[])?;
    let mine = with_password(&db, "mine%20again");
    ensure!(psql(&mine, "SELECT 1")? == "1", "a rotation comes once: what the tenant sets afterwards stays");
    dev.json(&["branch", "create", "acme/child"])?;
    let child = with_password(&dev.compute("acme/child", &[])?, "mine%20again");
    ensure!(psql(&child, "SELECT 1")? == "1", "also on a branch of it");
    dev.json(&["branch", "restore", "acme/main", "--lsn", &moment])?;
    ensure!(psql(&db, "SELECT 1")? == "1", "a moment before the rotation gets it when it starts");
    // He locks himself out, and comes back.
    psql(&db, "ALTER ROLE postgres NOLOGIN")?;
    ensure!(psql(&db, "SELECT 1").is_err(), "he is locked out");
    let again = dev.json(&["tenant", "password", "acme", "--rotate"])?;
    let db = with_password(&db, again["password"].as_str().context("a password")?);
    dev.until("the rotation to bring him back", Duration::from_secs(30), || Ok(psql(&db, "SELECT 1").is_ok().then_some(())))
}
