//! Looks at everything that is in a compute's databases, as `pg_amcheck --heapallindexed` does, and at the other
//! indexes and sequences, too.
//!
//! It asks by SQL, as [`crate::sessions`] do: so it needs no password of the tenant's and no program beside Postgres,
//! knows by its code whether an error is about data, and can say how far it is. What it asks is what `pg_amcheck` asks:
//! `verify_heapam` with its TOAST for tables, `bt_index_check` with `heapallindexed` for B-trees. Of indexes of other
//! kinds each page is read, and Postgres looks at its header.
//!
//! The extensions that it needs are made in the compute's branch, which is one that is thrown away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use varve_api::verification::{CheckProblem, CheckReport};
use varve_postgres::BLCKSZ;
use varve_protocol::connect::blocking::Connection;
use varve_protocol::wire::{Row, ServerMessage};

use crate::server::{Server, is_transient};
use crate::sessions::{SessionError, Sessions};
use crate::task::AbortOnDrop;

/// How often it is told how far it is.
const TELL_INTERVAL: Duration = Duration::from_secs(3);
/// How often, and how long between, it is told that it is done to a server that is away.
const TELL_TRIES: u32 = 100;
/// Problems that are told; further ones add nothing.
const PROBLEMS_MAX: usize = 40;
/// Characters of one: a report has a limit.
const WORDS_MAX: usize = 250;
/// Rows of one table that are told.
const ROWS_MAX: usize = 5;
/// How long a lock of a relation is waited for, and how long one may be looked at.
const LIMITS: [&str; 2] = ["SET lock_timeout = '60s'", "SET statement_timeout = '6h'"];
/// Relations that are listed at once.
const RELATIONS_AT_ONCE: usize = 5000;
/// What Postgres calls damage: damaged data, a damaged index, and its own faults.
const DAMAGE: [&str; 5] = ["XX000", "XX001", "XX002", "58030", "58P01"];
/// Of these, what is no fault of the installation's, where an extension cannot be made.
const SURE_DAMAGE: [&str; 3] = ["XX001", "XX002", "58030"];

/// The checks that a compute is ordered, one after the other.
pub(crate) struct Checks {
    server: Server,
    incarnation: u64,
    sessions: Sessions,
    number: u64,
    task: Option<AbortOnDrop>,
}

impl Checks {
    /// Of this incarnation, none so far.
    pub(crate) fn new(server: Server, incarnation: u64, sessions: Sessions) -> Checks {
        Checks { server, incarnation, sessions, number: 0, task: None }
    }

    /// The newest that was begun; 0: none.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Begins the one that is ordered, unless it has begun.
    pub(crate) fn follow(&mut self, ordered: u64) {
        if ordered != self.number {
            self.number = ordered;
            let of = (self.server.clone(), self.incarnation, ordered);
            self.task = Some(AbortOnDrop(tokio::spawn(check(of, self.sessions.clone()))));
        }
    }
}

/// How far a check is.
#[derive(Debug, Default)]
struct Progress {
    databases: AtomicU64,
    relations: AtomicU64,
    pages: AtomicU64,
    problems: Mutex<Vec<CheckProblem>>,
    /// Nobody wants to know any more.
    stops: AtomicBool,
}

impl Progress {
    fn add(&self, is_damage: bool, words: &str) {
        let mut problems = self.problems.lock();
        if problems.len() < PROBLEMS_MAX {
            let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MAX).collect();
            problems.push(CheckProblem { is_damage, words });
        }
    }

    /// What Postgres said of `what`; damage by these codes.
    fn refused(&self, what: &str, message: &ServerMessage, damage: &[&str]) {
        let ServerMessage { code, message, detail, .. } = message;
        let detail = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
        self.add(damage.contains(&code.as_str()), &format!("{what}: {message}{detail}"));
    }
}

/// Ends the thread of a check whose task ends.
struct StopsOnDrop(Arc<Progress>);

impl Drop for StopsOnDrop {
    fn drop(&mut self) {
        self.0.stops.store(true, Ordering::Relaxed);
    }
}

/// Checks, and tells how far it is until it is done.
async fn check((server, incarnation, check): (Server, u64, u64), sessions: Sessions) {
    let progress = Arc::new(Progress::default());
    let _stops = StopsOnDrop(progress.clone());
    let looking = look_at_all(&sessions, &progress);
    tokio::pin!(looking);
    let mut report = CheckReport { incarnation, check, ..CheckReport::default() };
    while !report.done {
        tokio::select! {
            () = &mut looking => report.done = true,
            () = tokio::time::sleep(TELL_INTERVAL) => {}
        }
        report.number += 1;
        report.databases = progress.databases.load(Ordering::Relaxed);
        report.relations = progress.relations.load(Ordering::Relaxed);
        report.pages = progress.pages.load(Ordering::Relaxed);
        report.problems.clone_from(&progress.problems.lock());
        let mut tries = if report.done { TELL_TRIES } else { 1 };
        while tries > 0 {
            tries -= 1;
            match server.check(&report).await {
                Err(error) if is_transient(&error) && tries > 0 => tokio::time::sleep(TELL_INTERVAL).await,
                Err(error) => {
                    tracing::info!(%error, "how far the check is was not heard");
                    break;
                }
                Ok(()) => break,
            }
        }
    }
}

/// Looks at all databases, one after the other.
async fn look_at_all(sessions: &Sessions, progress: &Arc<Progress>) {
    let databases = match sessions.databases().await {
        Ok(databases) => databases,
        Err(error) => return note(progress, "the list of databases", &error),
    };
    let mut is_first = true;
    for database in databases {
        let (sessions, of) = (sessions.clone(), progress.clone());
        let with_shared = std::mem::take(&mut is_first);
        let looked = tokio::task::spawn_blocking(move || {
            let what = format!("database {database}");
            match sessions.open(&database) {
                Ok(connection) => Look { connection, database: &database, progress: &of, prewarm: None }.at_all(with_shared),
                Err(error) => note(&of, &what, &error),
            }
        });
        if let Err(error) = looked.await {
            progress.add(false, &format!("a check ended early: {error}"));
        }
    }
}

fn note(progress: &Progress, what: &str, error: &SessionError) {
    match error.server() {
        Some(message) => progress.refused(what, message, &SURE_DAMAGE),
        None => progress.add(false, &format!("{what}: {error}")),
    }
}

/// A relation, as it is listed.
struct Relation {
    oid: String,
    kind: String,
    method: String,
    name: String,
    is_whole: bool,
}

/// A session that looks at one database.
struct Look<'a> {
    connection: Connection,
    database: &'a str,
    progress: &'a Progress,
    /// The schema of `pg_prewarm`, once it is needed.
    prewarm: Option<String>,
}

/// There is nothing more to be had of a database; why has been noted.
struct Over;

fn text(row: &Row, column: usize) -> String {
    row.get(column).cloned().flatten().unwrap_or_default()
}

impl Look<'_> {
    /// Runs a statement about `what`; none when Postgres refuses.
    fn ask(&mut self, what: &str, sql: &str, damage: &[&str]) -> Result<Option<Vec<Row>>, Over> {
        let of = format!("database {}, {what}", self.database);
        match self.connection.simple_query(sql).map_err(SessionError::from) {
            Ok(rows) => Ok(Some(rows)),
            Err(error) => match error.server() {
                Some(message) if message.severity == "ERROR" => {
                    self.progress.refused(&of, message, damage);
                    Ok(None)
                }
                Some(message) => {
                    self.progress.refused(&of, message, damage);
                    Err(Over)
                }
                None => {
                    self.progress.add(false, &format!("{of}: {error}"));
                    Err(Over)
                }
            },
        }
    }

    fn at_all(mut self, with_shared: bool) {
        let progress = self.progress;
        if self.at_relations(with_shared).is_ok() {
            progress.databases.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The schema of an extension, which is made where it is not there.
    fn extension(&mut self, name: &str) -> Result<String, Over> {
        let what = format!("extension {name}");
        let query = format!(
            "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = '{name}'"
        );
        if let Some(row) = self.ask(&what, &query, &SURE_DAMAGE)?.ok_or(Over)?.first() {
            return Ok(text(row, 0));
        }
        // No trigger of the tenant's has a say in it.
        self.ask(&what, "SET session_replication_role = replica", &SURE_DAMAGE)?.ok_or(Over)?;
        let create = format!("CREATE EXTENSION {name} WITH SCHEMA pg_catalog");
        self.ask(&what, &create, &SURE_DAMAGE)?.ok_or(Over)?;
        Ok("pg_catalog".to_owned())
    }

    fn at_relations(&mut self, with_shared: bool) -> Result<(), Over> {
        let amcheck = self.extension("amcheck")?;
        // A transaction that was prepared may hold any lock, and an index may compute anything.
        for limit in LIMITS {
            self.ask("the session", limit, &SURE_DAMAGE)?.ok_or(Over)?;
        }
        let mut last = "0".to_owned();
        loop {
            let shared = if with_shared { "" } else { " AND NOT c.relisshared" };
            let query = format!(
                "SELECT c.oid, c.relkind, coalesce(a.amname, ''), concat(quote_ident(n.nspname), '.', quote_ident(c.relname)), \
                 coalesce(i.indisvalid AND i.indisready AND i.indislive, true) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam \
                 LEFT JOIN pg_index i ON i.indexrelid = c.oid \
                 WHERE c.relkind IN ('r', 'm', 't', 'i', 'S') AND c.relpersistence <> 't'{shared} AND c.oid > '{last}' \
                 ORDER BY c.oid LIMIT {RELATIONS_AT_ONCE}"
            );
            let rows = self.ask("the list of relations", &query, &DAMAGE)?.ok_or(Over)?;
            let Some(newest) = rows.last() else { return Ok(()) };
            last = text(newest, 0);
            for row in &rows {
                if self.progress.stops.load(Ordering::Relaxed) {
                    return Err(Over);
                }
                let relation = Relation {
                    oid: text(row, 0),
                    kind: text(row, 1),
                    method: text(row, 2),
                    name: text(row, 3),
                    is_whole: text(row, 4) == "t",
                };
                self.at(&relation, &amcheck)?;
            }
        }
    }

    fn at(&mut self, relation: &Relation, amcheck: &str) -> Result<(), Over> {
        let Relation { oid, kind, method, name, is_whole } = relation;
        let is_index = kind == "i";
        if is_index && !is_whole {
            return Ok(()); // nobody uses it
        }
        let what = format!("{} {name}", if is_index { "index" } else { "relation" });
        let sql = match (kind.as_str(), method.as_str()) {
            ("i", "btree") => format!("SELECT {amcheck}.bt_index_check('{oid}'::regclass, true)"),
            ("i", _) => {
                let schema = match self.prewarm.clone() {
                    Some(schema) => schema,
                    None => self.extension("pg_prewarm")?,
                };
                self.prewarm = Some(schema.clone());
                format!("SELECT {schema}.pg_prewarm('{oid}', 'buffer')")
            }
            (_, "heap") => {
                format!("SELECT blkno, offnum, attnum, left(msg, 1000) FROM {amcheck}.verify_heapam('{oid}', false, true) LIMIT {ROWS_MAX}")
            }
            // A sequence, or a table of another kind.
            _ => format!("SELECT count(*) FROM {name}"),
        };
        let found = self.ask(&what, &sql, &DAMAGE)?;
        if method == "heap" && !is_index {
            let rows = found.as_deref().unwrap_or_default();
            for row in rows.iter().take(ROWS_MAX) {
                let (block, item, message) = (text(row, 0), text(row, 1), text(row, 3));
                let words = format!("database {}, {what}, block {block}, item {item}: {message}", self.database);
                self.progress.add(true, &words);
            }
        }
        let size = format!("SELECT pg_relation_size('{oid}') / {BLCKSZ}");
        let pages = if found.is_some() { self.ask(&what, &size, &DAMAGE)? } else { None };
        let pages = pages.and_then(|rows| text(rows.first()?, 0).parse().ok()).unwrap_or(0);
        self.progress.relations.fetch_add(1, Ordering::Relaxed);
        self.progress.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: &str) -> ServerMessage {
        ServerMessage { detail: "why".to_owned(), ..ServerMessage::error(code, "what") }
    }

    #[test]
    fn damage_is_told_from_what_is_in_the_way() {
        let progress = Progress::default();
        for code in ["XX001", "58030", "53100", "57014", "58P01"] {
            progress.refused("relation public.t", &message(code), &DAMAGE);
        }
        progress.refused("extension amcheck", &message("58P01"), &SURE_DAMAGE);
        let damage: Vec<bool> = progress.problems.lock().iter().map(|problem| problem.is_damage).collect();
        assert_eq!(damage, [true, true, false, false, true, false]);
        assert_eq!(progress.problems.lock()[0].words, "relation public.t: what (why)");
    }

    #[test]
    fn a_report_stays_small() {
        let progress = Progress::default();
        (0..1000).for_each(|_| progress.add(true, &"\u{1F41F}\n".repeat(1000)));
        let report = CheckReport { problems: progress.problems.lock().clone(), ..CheckReport::default() };
        assert!(serde_json::to_vec(&report).unwrap().len() < 60_000);
    }
}
