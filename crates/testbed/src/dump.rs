//! Everything in a cluster as text, by `pg_dumpall` or row by row, and where two such texts differ.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use varve_postgres::Major;

use crate::limit::{self, COMMAND_MAX};

/// `SEQ_LOG_VALS`: how many values of a sequence are logged ahead.
const LOGGED_AHEAD_MAX: i64 = 32;
/// Lines around a difference that are told.
const LINES_AROUND: usize = 3;
/// Characters of a line that are told.
const LINE_TOLD_MAX: usize = 200;

/// How exact the positions of sequences must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sequences {
    /// The same.
    Exact,
    /// The second cluster's may stand where the WAL says that they stand: up to 32 values ahead.
    LoggedAhead,
}

/// For each table, catalogs included, each materialised view and each TOAST table: its name, the count of its rows and
/// their digest, system columns and places included. For each sequence lines such as a dump has, which [`ensure_same`]
/// understands. Shared catalogs come with `postgres`.
const ROWS: &str = r"
SELECT CASE WHEN relkind = 'S' THEN format(
        $$SELECT 'CREATE SEQUENCE ' || %1$L, 'INCREMENT BY ' || (SELECT seqincrement FROM pg_sequence WHERE seqrelid = %2$s),
            format('SELECT pg_catalog.setval(%%L, %%s, %%s);', %1$L, last_value, is_called::text) FROM %1$s$$, oid::regclass, oid)
    ELSE format(
        $$SELECT %1$L, count(*), md5(coalesce(string_agg(t::text, ' ' ORDER BY ctid), '')) FROM (SELECT ctid, xmin, xmax, * FROM ONLY %1$s) t$$,
        oid::regclass) END
FROM pg_class
WHERE relkind IN ('r', 'm', 't', 'S') AND relpersistence = 'p' AND (NOT relisshared OR current_database() = 'postgres')
ORDER BY oid
\gexec
";

/// All that is in the cluster at `conninfo` (a libpq URI or string): by `pg_dumpall` where we have one for its major,
/// or by its [`rows`].
///
/// # Errors
/// When it cannot be had: with what the program said.
pub fn everything(conninfo: &str, major: Major) -> anyhow::Result<String> {
    if major <= Major::V15 { dump(Path::new("/usr/lib/postgresql/15/bin"), conninfo) } else { rows(conninfo) }
}

/// All that is in the cluster at `conninfo` row by row. That also tells where each row is, who made it, and all that
/// the catalogs say, so nothing may have changed one copy only, such as autovacuum.
///
/// # Errors
/// When it cannot be had: with what psql said.
pub fn rows(conninfo: &str) -> anyhow::Result<String> {
    // A connection limit of -2 is that of a database whose drop did not come to its end.
    let list = "SELECT quote_ident(datname) FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname";
    let databases = crate::dev::psql(conninfo, list)?;
    let script: String = databases.lines().map(|name| format!("\\c {name}\n\\echo database {name}\n{ROWS}")).collect();
    let mut command = Command::new("psql");
    command.args([conninfo, "-XqAt", "-F", "\n", "-v", "ON_ERROR_STOP=1"]).env("PGOPTIONS", "-c search_path=pg_catalog");
    let mut psql = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("psql cannot be run")?;
    psql.stdin.take().context("psql reads")?.write_all(script.as_bytes())?;
    let output = limit::wait_with_output(psql, "psql to give all rows", COMMAND_MAX, None)?;
    ensure!(output.status.success(), "psql failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).context("rows in UTF-8")?;
    let (expected, found) = (databases.lines().count(), text.lines().filter(|line| *line == "pg_class").count());
    ensure!(found == expected, "pg_class is told of in {found} databases, expected {expected}");
    Ok(text)
}

/// What the `pg_dumpall` in the folder `bin`, whose major must not be below the server's, says of the server at
/// `conninfo` (a libpq URI or string), without what unlogged tables hold. After a recovery that ended between a
/// tablespace's drop and the end of its transaction, a server does not know where the tablespace is: then what it says
/// to that, and the rest.
///
/// # Errors
/// When it fails: with what it said.
pub fn dump(bin: &Path, conninfo: &str) -> anyhow::Result<String> {
    match dump_with(&[], bin, conninfo) {
        Err(error) if error.to_string().contains("could not stat file \"pg_tblspc/") => {
            Ok(format!("{error}\n{}", dump_with(&["--no-tablespaces"], bin, conninfo)?))
        }
        dumped => dumped,
    }
}

fn dump_with(options: &[&str], bin: &Path, conninfo: &str) -> anyhow::Result<String> {
    let mut command = Command::new(bin.join("pg_dumpall"));
    command.args(["--no-unlogged-table-data", "--no-password", "-d", conninfo]).args(options);
    // pg_dumpall does not hand a URI's password on to the pg_dump of each database.
    if let Some(password) = conninfo.strip_prefix("postgresql://").and_then(|uri| uri.split([':', '@']).nth(1)) {
        command.env("PGPASSWORD", password);
    }
    let output = limit::output(&mut command, COMMAND_MAX, None)?;
    ensure!(output.status.success(), "pg_dumpall failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).context("a dump in UTF-8")?;
    Ok(text.lines().filter_map(comparable).fold(String::new(), |all, line| all + line + "\n"))
}

/// The part of a line that two dumps of the same cluster have in common: each dump has a random key, and each server
/// its tablespaces elsewhere.
fn comparable(line: &str) -> Option<&str> {
    if line.starts_with("\\restrict") || line.starts_with("\\unrestrict") {
        return None;
    }
    let of_tablespace = line.starts_with("CREATE TABLESPACE ").then(|| line.split_once(" LOCATION ")).flatten();
    Some(of_tablespace.map_or(line, |(statement, _)| statement))
}

/// Checks that two dumps are the same.
///
/// # Errors
/// When they are not: where they differ first.
pub fn ensure_same(expected: &str, found: &str, sequences: Sequences) -> anyhow::Result<()> {
    if expected == found {
        return Ok(());
    }
    let (expected, found): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), found.lines().collect());
    let increments = increments(&expected);
    let same = |a: &str, b: &str| {
        a == b
            || (sequences == Sequences::LoggedAhead
                && matches!((position(a), position(b)), (Some(a), Some(b)) if is_ahead(&increments, a, b)))
    };
    let shorter = expected.len().min(found.len());
    let at = (0..shorter).find(|&at| !same(expected[at], found[at])).unwrap_or(shorter);
    ensure!(
        at == expected.len() && at == found.len(),
        "the dumps differ at line {at}; expected\n{}\nfound\n{}",
        around(&expected, at),
        around(&found, at)
    );
    Ok(())
}

fn around(lines: &[&str], at: usize) -> String {
    let told = lines.iter().take(at + LINES_AROUND).skip(at.saturating_sub(LINES_AROUND));
    told.map(|line| line.chars().take(LINE_TOLD_MAX).collect::<String>()).collect::<Vec<_>>().join("\n")
}

/// The sequence, value and "is called" of a line that sets a sequence.
fn position(line: &str) -> Option<(&str, i64, bool)> {
    let (name, rest) = line.strip_prefix("SELECT pg_catalog.setval('")?.split_once("', ")?;
    let (value, called) = rest.strip_suffix(");")?.split_once(", ")?;
    Some((name, value.parse().ok()?, called == "true"))
}

fn is_ahead(increments: &HashMap<&str, i64>, (name, value, _): (&str, i64, bool), (other, ahead, called): (&str, i64, bool)) -> bool {
    let increment = increments.get(name).copied().unwrap_or(1);
    let steps = (ahead - value) / increment;
    name == other && called && (ahead - value) % increment == 0 && (0..=LOGGED_AHEAD_MAX).contains(&steps)
}

/// Each sequence's increment, as the statements that create it say.
fn increments<'a>(lines: &[&'a str]) -> HashMap<&'a str, i64> {
    let mut found = HashMap::new();
    let mut current = "";
    for line in lines {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("CREATE SEQUENCE ").or_else(|| line.strip_prefix("SEQUENCE NAME ")) {
            current = name;
        } else if let Some(increment) = line.strip_prefix("INCREMENT BY ").and_then(|n| n.parse().ok()) {
            found.insert(current, increment);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump_with(value: i64, called: bool) -> String {
        format!(
            "CREATE SEQUENCE public.s\n    START WITH 1\n    INCREMENT BY -3\n;\nSELECT pg_catalog.setval('public.s', {value}, {called});\nend\n"
        )
    }

    #[test]
    fn sequences_may_be_ahead_only_where_that_is_allowed() {
        let truth = dump_with(10, true);
        assert!(ensure_same(&truth, &dump_with(10, true), Sequences::Exact).is_ok());
        assert!(ensure_same(&truth, &dump_with(7, true), Sequences::Exact).is_err(), "a difference of one value");
        assert!(ensure_same(&truth, &dump_with(10 - 96, true), Sequences::LoggedAhead).is_ok(), "32 values ahead");
        for (value, called) in [(13, true), (9, true), (10 - 99, true), (7, false)] {
            assert!(
                ensure_same(&truth, &dump_with(value, called), Sequences::LoggedAhead).is_err(),
                "{value}, {called} is not ahead of 10"
            );
        }
    }

    #[test]
    fn a_difference_is_told_with_its_surroundings() {
        let error = ensure_same("a\nb\nc\n", "a\nb\n", Sequences::Exact).expect_err("one line is missing").to_string();
        assert!(error.contains("line 2") && error.contains('c'), "{error}");
    }
}
