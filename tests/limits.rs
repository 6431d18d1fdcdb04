//! What a compute may take of its machine: its size, which changes while it runs, and follows its load in between. Out
//! of memory ends what took it, and nothing of anybody else's.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use varve_host::cgroup::Group;
use varve_testbed::dev::{Dev, psql};
use varve_testbed::session::Session;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
const MB: u64 = 1 << 20;
/// How long a statement may take on a machine where everything runs at once.
const STATEMENT_MAX: Duration = Duration::from_secs(60);
/// How long limits may take to come down: two steps of an eighth or a quarter need ten seconds.
const DOWN_MAX: Duration = Duration::from_secs(240);
/// How long they may take to go up by the promise of 2 s, and what a busy machine adds.
const UP_MAX: Duration = Duration::from_secs(4);
/// How long another size may take to hold.
const RESIZED_MAX: Duration = Duration::from_secs(30);

/// What the list says of a branch's compute.
fn listed(dev: &Dev, branch: &str) -> anyhow::Result<Value> {
    let computes = dev.json(&["compute", "list"])?;
    let found = computes.as_array().and_then(|computes| computes.iter().find(|compute| compute["branch"] == branch));
    found.cloned().with_context(|| format!("{branch} is not in {computes}"))
}

/// Waits until the limits that are told fit.
fn until_limits(dev: &Dev, what: &str, limit: Duration, fits: impl Fn(u64, u64) -> bool) -> anyhow::Result<()> {
    let mut last = Value::Null;
    let waited = dev.until(what, limit, || {
        last = listed(dev, "acme/main")?["limits"].clone();
        let (cpu, memory) = (last["cpu_milli"].as_u64(), last["memory_bytes"].as_u64());
        Ok(cpu.zip(memory).is_some_and(|(cpu, memory)| fits(cpu, memory)).then_some(()))
    });
    waited.with_context(|| format!("the limits were {last}"))
}

fn group_of(compute: &Value) -> anyhow::Result<Group> {
    let id: String = compute["id"].as_str().context("an id")?.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    Ok(Group::of(&id)?)
}

fn kinds(dev: &Dev, branch: &str) -> anyhow::Result<Vec<String>> {
    let events = dev.json(&["compute", "events", branch])?;
    let kind = |event: &Value| event["kind"].as_str().unwrap_or_default().to_owned();
    Ok(events.as_array().context("a list")?.iter().map(kind).collect())
}

#[test]
fn a_size_follows_the_load_and_changes_under_a_session() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    let compute = dev.json(&["compute", "start", "acme/main", "--cpu", "0.25..2", "--memory", "256MB..1GB"])?;
    let db = compute["conninfo"].as_str().context("a URI")?;
    let group = group_of(&compute)?;
    ensure!(psql(db, "SHOW shared_buffers")? == "64MB", "what cannot change is set for the least");
    let mut session = Session::open(db)?;
    let before = session.run("SELECT pg_backend_pid()", STATEMENT_MAX)?;
    until_limits(&dev, "the limits of an idle compute come down", DOWN_MAX, |cpu, memory| cpu == 250 && memory == 256 * MB)?;
    ensure!(group.memory_limit() == Some(256 * MB), "what is told is what is set");
    println!("limits are down");

    // Processors: up as soon as they are used.
    let begun = Instant::now();
    session.begin("SELECT count(*) FROM generate_series(1, 30000000)")?;
    until_limits(&dev, "processors go up with the load", UP_MAX, |cpu, _| cpu == 2000)?;
    let up = begun.elapsed();
    session.end(STATEMENT_MAX)?;
    println!("processors went up within {up:?}");

    // Memory: a burst of more than there is waits for more, and nobody is killed.
    session.run("SELECT set_config('varve_test.a', repeat('x', 150000000), false) IS NULL", STATEMENT_MAX)?;
    session.run("SELECT set_config('varve_test.b', repeat('x', 150000000), false) IS NULL", STATEMENT_MAX)?;
    until_limits(&dev, "memory goes up with the use", UP_MAX, |_, memory| memory == 1024 * MB)?;

    // Less than is in use: what is in use stays, until it is given back.
    dev.json(&["compute", "resize", "acme/main", "--cpu", "0.5..1", "--memory", "256MB"])?;
    until_limits(&dev, "processors have the new size", RESIZED_MAX, |cpu, memory| (500..=1000).contains(&cpu) && memory > 256 * MB)?;
    ensure!(session.run("SELECT length(current_setting('varve_test.a'))", STATEMENT_MAX)? == ["150000000"]);
    session.run("SET varve_test.a = ''; SET varve_test.b = ''", STATEMENT_MAX)?;
    until_limits(&dev, "memory has the new size once it is given back", RESIZED_MAX, |_, memory| memory == 256 * MB)?;

    // Larger than at the start.
    dev.json(&["compute", "resize", "acme/main", "--memory", "512MB..1536MB"])?;
    until_limits(&dev, "memory has the next size", RESIZED_MAX, |_, memory| (512 * MB..=1536 * MB).contains(&memory))?;
    ensure!(session.run("SELECT pg_backend_pid()", STATEMENT_MAX)? == before, "the session is the same");
    ensure!(kinds(&dev, "acme/main")? == ["resized", "resized"], "nobody was killed: {:?}", kinds(&dev, "acme/main")?);
    let size = listed(&dev, "acme/main")?["size"].clone();
    ensure!(size["cpu_milli"]["min"] == 500 && size["memory_bytes"]["max"] == 1536 * MB, "what is left out stays: {size}");

    // The next start has what Postgres cannot change while it runs.
    drop(session);
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.json(&["compute", "resize", "acme/main", "--memory", "400MB..800MB"])?;
    let db = dev.compute("acme/main", &[])?;
    ensure!(psql(&db, "SHOW shared_buffers")? == "100MB");
    until_limits(&dev, "the next start has the size", RESIZED_MAX, |_, memory| (400 * MB..=800 * MB).contains(&memory))?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn a_size_that_cannot_be_is_refused_and_changes_nothing() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    // Before the first start.
    dev.json(&["compute", "resize", "acme/main", "--memory", "300MB"])?;
    for (arguments, said) in [
        (&["--cpu", "2..0.25"][..], "is more than the most"),
        (&["--cpu", "0"], "is too little"),
        (&["--cpu", "much"], "cannot be read"),
        (&["--cpu", "0.5..5000"], "more than the host gives"),
        (&["--memory", "2GB..256MB"], "is more than the most"),
        (&["--memory", "1MB"], "is too little"),
        (&["--memory", "512"], "with its unit"),
        (&["--memory", "256MB..900TB"], "more than the host gives"),
        (&[], "say what is to change"),
    ] {
        let refused = dev.refused(&[&["compute", "resize", "acme/main"], arguments].concat())?;
        ensure!(refused.contains(said), "{arguments:?}: {refused}");
        if !arguments.is_empty() {
            let refused = dev.refused(&[&["compute", "start", "acme/main"], arguments].concat())?;
            ensure!(refused.contains(said), "start {arguments:?}: {refused}");
        }
    }
    ensure!(dev.refused(&["compute", "resize", "acme/nobody", "--cpu", "1"])?.contains("nobody"));
    let compute = dev.json(&["compute", "start", "acme/main"])?;
    ensure!(compute["size"]["memory_bytes"]["max"] == 300 * MB && compute["size"]["cpu_milli"].is_null(), "{}", compute["size"]);
    // One that runs takes a size with its next call of start, too.
    let again = dev.json(&["compute", "start", "acme/main", "--cpu", "1"])?;
    ensure!(again["id"] == compute["id"] && again["size"]["cpu_milli"]["max"] == 1000, "{again}");
    until_limits(&dev, "the size of a start that found it running", RESIZED_MAX, |cpu, _| cpu == 1000)?;
    dev.json(&["compute", "stop", "acme/main"])?;
    Ok(())
}

#[test]
fn who_is_out_of_memory_loses_a_backend_and_is_told() -> anyhow::Result<()> {
    let dev = Dev::start(VARVE)?;
    dev.json(&["tenant", "create", "acme"])?;
    dev.json(&["tenant", "create", "beside"])?;
    let hog = dev.json(&["compute", "start", "acme/main", "--memory", "256MB..384MB"])?;
    let db = hog["conninfo"].as_str().context("a URI")?;
    psql(db, "CREATE TABLE kept AS SELECT 7 AS n")?;
    let mut neighbour = Session::open(&dev.compute("beside/main", &[])?)?;
    let pid = neighbour.run("SELECT pg_backend_pid()", STATEMENT_MAX)?;
    let mut session = Session::open(db)?;
    session.begin("SELECT array_length(array_agg(repeat('x', 1000) || i), 1) FROM generate_series(1, 900000) i")?;
    dev.until("an event tells of it", STATEMENT_MAX, || {
        ensure!(neighbour.run("SELECT pg_backend_pid()", STATEMENT_MAX)? == pid, "the neighbour's session goes on");
        Ok(kinds(&dev, "acme/main")?.contains(&"out_of_memory".to_owned()).then_some(()))
    })?;
    let said = session.end(STATEMENT_MAX).map_or_else(|error| error.to_string(), |said| said.join(" "));
    ensure!(said.contains("connection to server was lost"), "the statement ended: {said}");
    let is_back = || Ok(psql(db, "SELECT n FROM kept").ok().filter(|n| n == "7").map(drop));
    dev.until("the compute is back with its data", STATEMENT_MAX, is_back)?;
    let now = listed(&dev, "acme/main")?;
    ensure!(now["mount_pid"] == hog["mount_pid"] && now["state"] == "running", "its supervisor is the same: {now}");
    ensure!(neighbour.run("SELECT pg_backend_pid()", STATEMENT_MAX)? == pid);
    ensure!(!kinds(&dev, "beside/main")?.contains(&"out_of_memory".to_owned()), "it is not the neighbour's");
    let events = dev.json(&["compute", "events", "acme/main"])?.to_string();
    ensure!(events.contains("384 MB") && events.contains("the kernel killed"), "{events}");
    for branch in ["acme/main", "beside/main"] {
        dev.json(&["compute", "stop", branch])?;
    }
    Ok(())
}
