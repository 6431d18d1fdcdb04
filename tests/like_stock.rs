//! A compute beside a stock server: both are led through the same random steps, stops and crashes among them, and all
//! that SQL and the file system show must be the same.
//!
//! What is meant to differ stands in [`Sight::all`], each with its reason, and nowhere else.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;
use varve_postgres::Major;
use varve_testbed::dev::{Dev, free_port, signal};
use varve_testbed::limit::{self, COMMAND_MAX};
use varve_testbed::postgres::Postgres;
use varve_testing::random::SeededRng;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");
/// Steps of a run.
const STEPS: usize = 200;
/// How long a compute may take to be back.
const BACK_MAX: Duration = Duration::from_secs(60);
/// Settings that steps change, with values that no one of them has by default.
const SETTINGS: [(&str, [&str; 2]); 5] = [
    ("work_mem", ["5MB", "6MB"]),
    ("random_page_cost", ["1.5", "2"]),
    ("log_min_duration_statement", ["10s", "20s"]),
    ("effective_cache_size", ["5GB", "6GB"]),
    ("session_replication_role", ["replica", "local"]),
];

/// What became of both servers last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// Nothing: they run.
    Nothing,
    /// They were stopped and started.
    Stop,
    /// Their processes were killed.
    Crash,
}

/// Something to look at, and where it may differ.
struct Sight {
    what: &'static str,
    /// Gives one row.
    sql: String,
    /// Not looked at after a stop, or after a crash, because of this.
    differs: Option<(Last, &'static str)>,
}

impl Sight {
    fn new(what: &'static str, sql: impl Into<String>) -> Sight {
        Sight { what, sql: sql.into(), differs: None }
    }

    fn but_after(mut self, last: Last, why: &'static str) -> Sight {
        self.differs = Some((last, why));
        self
    }

    /// What is looked at after each stop and crash, and at the end.
    fn all(tables: &BTreeSet<(u64, bool)>, sequences: &BTreeSet<u64>) -> Vec<Sight> {
        let settings: Vec<String> = SETTINGS.iter().map(|(name, _)| format!("'{name}'")).collect();
        let mut all = vec![
            Sight::new(
                "relations",
                "SELECT string_agg(format('%s %s %s %s', relname, relkind, relpersistence, relnatts), ', ' ORDER BY relname) \
                 FROM pg_class WHERE relnamespace = 'public'::regnamespace",
            ),
            Sight::new(
                "settings",
                format!(
                    "SELECT string_agg(name || '=' || setting || ' ' || source, ', ' ORDER BY name) FROM pg_settings WHERE name IN ({})",
                    settings.join(", ")
                ),
            ),
            Sight::new("settings of roles and databases", "SELECT string_agg(setconfig::text, ', ' ORDER BY setconfig) FROM pg_db_role_setting"),
            // Postgres's superuser has the tenant's password, and `varve` is ours.
            Sight::new(
                "roles",
                "SELECT string_agg(format('%s %s %s %s', rolname, rolcreatedb, rolconnlimit, rolpassword), ', ' ORDER BY rolname) \
                 FROM pg_authid WHERE rolname NOT LIKE 'pg\\_%' AND rolname NOT IN ('postgres', 'varve')",
            ),
            Sight::new("prepared transactions", "SELECT string_agg(gid, ', ' ORDER BY gid) FROM pg_prepared_xacts"),
            Sight::new("the slots of the tenant", "SELECT string_agg(slot_name, ', ' ORDER BY slot_name) FROM pg_replication_slots WHERE slot_name <> 'varve'"),
            Sight::new("large objects", "SELECT string_agg(loid || ' ' || md5(data), ', ' ORDER BY loid, pageno) FROM pg_largeobject"),
            // The files that tenants make, wherever.
            Sight::new(
                "files",
                "WITH RECURSIVE files(path, isdir) AS (SELECT name, (pg_stat_file(name)).isdir FROM pg_ls_dir('.') name WHERE name LIKE 'my%' \
                 UNION ALL SELECT path || '/' || name, (pg_stat_file(path || '/' || name)).isdir FROM files, pg_ls_dir(path) name WHERE isdir) \
                 SELECT string_agg(path || ' ' || md5(pg_read_binary_file(path)), ', ' ORDER BY path) FROM files WHERE NOT isdir",
            ),
            Sight::new(
                "other names in the data directory",
                // What one has that is away, the other may not have.
                "SELECT string_agg(name, ' ' ORDER BY name) FROM pg_ls_dir('.') name WHERE name NOT LIKE 'my%' AND name <> 'postmaster.opts'",
            ),
            Sight::new(
                "counts of rows in statistics",
                "SELECT string_agg(format('%s %s %s %s', relname, n_tup_ins, n_tup_upd, n_tup_del), ', ' ORDER BY relname) FROM pg_stat_user_tables",
            )
            .but_after(
                Last::Crash,
                "a stock server throws statistics away after a crash; a compute begins with those of its last clean stop",
            ),
        ];
        for (table, unlogged) in tables {
            all.push(Sight::new("rows", format!("SELECT count(*) || ' ' || coalesce(sum(hashtext(t::text)), 0) FROM t{table} t")));
            // What stock keeps is kept with its forks, to the byte.
            if *unlogged {
                let size = format!("pg_relation_size('t{table}', fork)");
                let forks = "unnest('{main,fsm,vm,init}'::text[]) fork";
                all.push(Sight::new("sizes of unlogged relations", format!("SELECT string_agg(fork || ' ' || {size}, ', ') FROM {forks}")));
            }
        }
        for sequence in sequences {
            let stands = Sight::new("a sequence", format!("SELECT last_value, log_cnt, is_called FROM s{sequence}"));
            all.push(stands.but_after(
                Last::Crash,
                "after a crash both stand at what they logged last, and how far ahead that is depends on when checkpoints came",
            ));
        }
        all
    }
}

/// A stock server and a compute.
struct Both {
    stock: Postgres,
    dev: Dev,
    db: String,
    port: String,
}

/// Runs SQL, and gives what it said, or the error without places that may differ.
fn run(conninfo: &str, sql: &str) -> anyhow::Result<String> {
    // Not Debian's wrapper, which takes as long as all the rest.
    let mut command = Command::new("/usr/lib/postgresql/15/bin/psql");
    let output = limit::output(command.args([conninfo, "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", sql]), COMMAND_MAX, None)?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).trim_end().to_owned())
}

impl Both {
    fn start() -> anyhow::Result<Both> {
        let mut stock = Postgres::init(Major::V15, &[], &[])?;
        stock.start()?;
        let dev = Dev::start(VARVE)?;
        dev.json(&["tenant", "create", "acme"])?;
        let port = free_port()?.to_string();
        let db = dev.compute("acme/main", &["--port", &port])?;
        let both = Both { stock, dev, db, port };
        both.sql("ALTER SYSTEM SET autovacuum = off")?;
        both.sql("ALTER SYSTEM SET max_prepared_transactions = 3")?;
        Ok(both)
    }

    /// Runs the same on both, which must say the same.
    fn sql(&self, sql: &str) -> anyhow::Result<String> {
        let (stock, compute) = (run(&self.stock.conninfo("postgres"), sql)?, run(&self.db, sql)?);
        ensure!(stock == compute, "{sql}\nstock:   {stock}\ncompute: {compute}");
        Ok(stock)
    }

    fn end(&mut self, how: Last) -> anyhow::Result<()> {
        match how {
            Last::Nothing => Ok(()),
            Last::Stop => {
                self.stock.stop("fast")?;
                self.stock.start()?;
                let stopped = self.dev.json(&["compute", "stop", "acme/main"])?;
                ensure!(stopped[0]["stopped"].is_string(), "a clean stop says so: {stopped}");
                self.dev.compute("acme/main", &["--port", &self.port]).map(drop)
            }
            Last::Crash => {
                self.stock.stop("immediate")?;
                self.stock.start()?;
                let pid = |list: &serde_json::Value| list[0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                let old = pid(&self.dev.json(&["compute", "list"])?).context("a compute that runs")?;
                signal(old, Signal::KILL);
                self.dev.until("the compute to be back", BACK_MAX, || {
                    let again = pid(&self.dev.json(&["compute", "list"])?).is_some_and(|pid| pid != old);
                    Ok((again && run(&self.db, "SELECT 1")? == "1").then_some(()))
                })
            }
        }
    }
}

/// What steps have made.
#[derive(Debug, Default)]
struct Made {
    next: u64,
    /// Tables, and whether they are unlogged.
    tables: BTreeSet<(u64, bool)>,
    sequences: BTreeSet<u64>,
    files: BTreeSet<String>,
    roles: BTreeSet<u64>,
    prepared: BTreeSet<u64>,
    slots: BTreeSet<u64>,
}

fn any<'a, T>(rng: &mut SeededRng, of: &'a BTreeSet<T>) -> Option<&'a T> {
    of.iter().nth(rng.below(of.len() as u64) as usize)
}

impl Made {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The next step's SQL; none where it needs something that was not made yet.
    fn step(&mut self, rng: &mut SeededRng) -> Option<String> {
        let (kind, n, some) = (rng.below(20), self.number(), rng.between(1, 60));
        let table = any(rng, &self.tables).copied();
        Some(match kind {
            0 | 1 => {
                let unlogged = rng.chance(300);
                self.tables.insert((n, unlogged));
                let kind = if unlogged { "UNLOGGED " } else { "" };
                format!("CREATE {kind}TABLE t{n} (id int, n int, word text)")
            }
            2..=5 => {
                let (table, _) = table?;
                format!("INSERT INTO t{table} SELECT i, {n}, repeat(md5(i::text), 3) FROM generate_series(1, {some}) i")
            }
            6 => format!("UPDATE t{} SET n = n + 1 WHERE id % 3 = 0", table?.0),
            7 => format!("DELETE FROM t{} WHERE id % 5 = {}", table?.0, some % 5),
            8 => format!("CREATE INDEX i{n} ON t{} (word, id)", table?.0),
            9 if rng.chance(500) => format!("TRUNCATE t{}", table?.0),
            9 => {
                let table = table?;
                self.tables.remove(&table);
                format!("DROP TABLE t{}", table.0)
            }
            10 => {
                self.sequences.insert(n);
                format!("CREATE SEQUENCE s{n} INCREMENT {}", 1 + some % 3)
            }
            11 => format!("SELECT count(*) FROM (SELECT nextval('s{}') FROM generate_series(1, {some})) of", any(rng, &self.sequences)?),
            12 => {
                let (name, values) = SETTINGS[rng.below(SETTINGS.len() as u64) as usize];
                match rng.below(3) {
                    2 => format!("ALTER SYSTEM RESET {name}"),
                    which => format!("ALTER SYSTEM SET {name} = '{}'", values[which as usize]),
                }
            }
            13 | 14 => {
                let path = ["myserver.crt".to_owned(), format!("my{n}"), format!("myconf.d/{n}.conf"), "my.blocks".to_owned()];
                let path = path[rng.below(4) as usize].clone();
                self.files.insert(path.clone());
                format!("COPY (SELECT repeat('{n} ', {some}00)) TO PROGRAM 'mkdir -p myconf.d; cat > {path}.tmp; mv {path}.tmp {path}'")
            }
            15 => {
                let path = any(rng, &self.files)?.clone();
                self.files.remove(&path);
                format!("COPY (SELECT 1) TO PROGRAM 'rm {path}; cat > /dev/null'")
            }
            16 => match (any(rng, &self.roles).copied(), rng.below(3)) {
                (Some(role), 0) => {
                    self.roles.remove(&role);
                    format!("DROP ROLE r{role}")
                }
                (Some(role), 1) => format!("ALTER ROLE r{role} SET work_mem = '{n}MB'"),
                _ => {
                    self.roles.insert(n);
                    format!("CREATE ROLE r{n} CREATEDB CONNECTION LIMIT {some} PASSWORD 'md5{:032x}'", u128::from(n))
                }
            },
            17 => match any(rng, &self.prepared).copied() {
                Some(gid) => {
                    self.prepared.remove(&gid);
                    format!("{} PREPARED 'g{gid}'", if rng.chance(500) { "COMMIT" } else { "ROLLBACK" })
                }
                None => {
                    self.prepared.insert(n);
                    format!("BEGIN; SELECT lo_from_bytea({}, '{n}'); PREPARE TRANSACTION 'g{n}'", 2_000_000 + n)
                }
            },
            18 => match any(rng, &self.slots).copied() {
                Some(slot) => {
                    self.slots.remove(&slot);
                    format!("SELECT pg_drop_replication_slot('slot{slot}')")
                }
                None => {
                    self.slots.insert(n);
                    format!("SELECT slot_name FROM pg_create_physical_replication_slot('slot{n}', true)")
                }
            },
            _ => format!("SELECT lo_from_bytea({}, '{n}')", 1_000_000 + n),
        })
    }
}

/// Looks at all of it on both, and tells all that differs at once.
fn look(both: &Both, made: &Made, last: Last) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for sight in Sight::all(&made.tables, &made.sequences) {
        let (stock, compute) = (run(&both.stock.conninfo("postgres"), &sight.sql)?, run(&both.db, &sight.sql)?);
        let is_meant = sight.differs.is_some_and(|(after, why)| after == last && !why.is_empty());
        if stock != compute && !is_meant {
            wrong.push(format!("{}: {}\nstock:   {stock}\ncompute: {compute}", sight.what, sight.sql));
        }
    }
    for sequence in made.sequences.iter().filter(|_| last == Last::Crash) {
        let sql = format!("SELECT last_value FROM s{sequence}");
        let next = |text: String| text.parse::<i64>().with_context(|| format!("{sql}: {text}"));
        let (stock, compute) = (next(run(&both.stock.conninfo("postgres"), &sql)?)?, next(run(&both.db, &sql)?)?);
        if (stock - compute).abs() > 33 * 3 {
            wrong.push(format!("{sql}\nstock:   {stock}\ncompute: {compute}"));
        }
        // From here on both are where the other is.
        both.sql(&format!("SELECT setval('s{sequence}', {})", stock.max(compute)))?;
    }
    if wrong.is_empty() { Ok(()) } else { bail!("after {last:?}:\n{}", wrong.join("\n")) }
}

fn like_stock(seed: u64) -> anyhow::Result<()> {
    let mut rng = SeededRng::new(seed);
    let mut both = Both::start()?;
    both.end(Last::Stop)?;
    let mut made = Made::default();
    let mut told = Vec::new();
    let mut steps = || -> anyhow::Result<()> {
        for step in 0..STEPS {
            let how = match step % 25 {
                24 if rng.chance(600) => Last::Stop,
                24 => Last::Crash,
                _ => Last::Nothing,
            };
            if how != Last::Nothing {
                told.push(format!("{how:?}"));
                both.end(how)?;
                look(&both, &made, how)?;
                if how == Last::Crash {
                    // So that what is counted from here on is the same.
                    both.sql("SELECT pg_stat_reset()")?;
                }
            } else if let Some(sql) = made.step(&mut rng) {
                told.push(sql.clone());
                both.sql(&sql)?;
            }
        }
        look(&both, &made, Last::Nothing)
    };
    let done = steps();
    done.with_context(|| format!("seed {seed}, after these steps:\n{}", told.join("\n")))
}

#[test]
fn a_compute_shows_what_a_stock_server_shows() -> anyhow::Result<()> {
    [1, 2].into_iter().try_for_each(like_stock)
}
