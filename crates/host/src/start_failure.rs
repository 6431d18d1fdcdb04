//! Why a Postgres did not start, in its own words: the lines of its log that count, and the settings of the branch that
//! they speak of. What cannot be named for sure is listed, so that whoever reads it knows what to reset.

use std::fmt;

use varve_postgres::settings::Configuration;

/// Lines of a log that are quoted.
const LINES_MAX: usize = 12;
/// Bytes of a line that are quoted.
const LINE_BYTES_MAX: usize = 600;
/// Settings that are listed.
const SETTINGS_MAX: usize = 20;
/// Bytes of a value that are quoted.
const VALUE_CHARS_MAX: usize = 60;
/// A shorter part of a value may stand in any line.
const TELLING_CHARS_MIN: usize = 3;

/// A setting that a start has from its branch, or from who started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Where it stands.
    pub source: &'static str,
}

/// The settings in a file of the data directory.
pub fn given(file: &[u8], source: &'static str) -> Vec<Given> {
    let file = Configuration::parse(&String::from_utf8_lossy(file));
    let settings = file.settings().into_iter();
    settings.map(|(name, value)| Given { name: name.to_owned(), value: value.to_owned(), source }).collect()
}

/// What Postgres said, and what it spoke of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    lines: Vec<String>,
    named: Vec<Given>,
    /// Whether the log names them; otherwise these are all that there are.
    sure: bool,
}

impl Said {
    /// Takes from what one start logged.
    pub fn of(log: &str, settings: &[Given]) -> Said {
        let lines = what_counts(log);
        let mentioned = |given: &&Given| lines.iter().any(|line| mentions(line, given));
        let named: Vec<Given> = settings.iter().filter(mentioned).take(SETTINGS_MAX).cloned().collect();
        let sure = !named.is_empty();
        let named = if sure { named } else { settings.iter().take(SETTINGS_MAX).cloned().collect() };
        Said { lines, named, sure }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lines.is_empty() {
            write!(f, "it logged nothing")?;
        } else {
            write!(f, "it said: {}", self.lines.join("\n  "))?;
        }
        if self.named.is_empty() {
            return Ok(());
        }
        let shown = self.named.iter().map(|given| {
            let value: String = given.value.chars().take(VALUE_CHARS_MAX).collect();
            format!("{} = '{value}' ({})", given.name, given.source)
        });
        let shown: Vec<String> = shown.collect();
        let what = if self.sure { "that is about" } else { "these settings are not Postgres's defaults:" };
        write!(f, "\n{what} {}; take settings back with 'varve settings TENANT/BRANCH reset NAME'", shown.join(", "))
    }
}

/// Whether a line speaks of a setting: by its name, or by a part of its value that is no common word or number.
fn mentions(line: &str, given: &Given) -> bool {
    let words = |c: char| !(c.is_ascii_alphanumeric() || "_.$-".contains(c));
    if line.split(words).any(|word| word.eq_ignore_ascii_case(&given.name)) {
        return true;
    }
    given.value.split(',').map(str::trim).any(|part| {
        let telling = part.len() >= TELLING_CHARS_MIN && part.contains(|c: char| c.is_alphabetic());
        telling && line.contains(&format!("\"{part}\""))
    })
}

/// The level of a line of Postgres's log, if it begins a message or goes on with one.
fn level(line: &str) -> Option<&'static str> {
    const LEVELS: [&str; 9] = ["FATAL:", "PANIC:", "ERROR:", "WARNING:", "LOG:", "DETAIL:", "HINT:", "CONTEXT:", "STATEMENT:"];
    LEVELS.into_iter().filter_map(|level| Some((line.find(&format!("{level}  "))?, level))).min().map(|(_, level)| level)
}

/// The lines that say why: fatal messages with their details and hints. What is wrong with a configuration file stands
/// in plain messages before the fatal one.
fn what_counts(log: &str) -> Vec<String> {
    let has_errors = log.contains("contains errors");
    let (mut lines, mut counts) = (Vec::new(), false);
    for line in log.lines() {
        match level(line) {
            Some("FATAL:" | "PANIC:") => counts = true,
            Some("LOG:") => {
                counts = has_errors && ["configuration", "parameter", "syntax"].iter().any(|word| line.contains(word));
            }
            Some("DETAIL:" | "HINT:" | "CONTEXT:") => {}
            Some(_) => counts = false,
            // A message of a program that is not Postgres's logger, such as the loader's.
            None if line.starts_with("postgres:") || line.starts_with("setpriv:") => counts = true,
            None => {}
        }
        if counts {
            let at = level(line).and_then(|level| line.find(level)).unwrap_or(0);
            lines.push(line[at..].chars().take(LINE_BYTES_MAX).collect());
        }
    }
    let from = lines.len().saturating_sub(LINES_MAX);
    lines.split_off(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Vec<Given> {
        given(b"work_mem = '4MB'\nshared_preload_libraries = 'pg_stat_statements, nope'\nmax_connections = '0'\n", "ALTER SYSTEM")
    }

    #[test]
    fn a_setting_is_named_by_its_name_or_its_value() {
        let log = "2026-11-30 01:00:00.000 UTC [1] LOG:  starting\n\
                   2026-11-30 01:00:00.000 UTC [1] FATAL:  could not access file \"nope\": No such file or directory\n\
                   2026-11-30 01:00:00.000 UTC [1] LOG:  database system is shut down\n";
        let said = Said::of(log, &settings()).to_string();
        assert!(said.starts_with("it said: FATAL:  could not access file \"nope\": No such file or directory\nthat is about"), "{said}");
        assert!(said.contains("shared_preload_libraries = 'pg_stat_statements, nope' (ALTER SYSTEM)"), "{said}");
        assert!(!said.contains("work_mem"), "{said}");
        let log = "x LOG:  0 is outside the valid range for parameter \"max_connections\" (1 .. 262143)\n\
                   x FATAL:  configuration file \"/x/postgresql.auto.conf\" contains errors\n";
        let said = Said::of(log, &settings()).to_string();
        assert!(said.contains("max_connections = '0'") && said.contains("outside the valid range"), "{said}");
    }

    #[test]
    fn where_nothing_is_named_all_are_listed_and_hints_are_quoted() {
        let log = "x FATAL:  could not map anonymous shared memory: Cannot allocate memory\nx HINT:  This error usually means less.\n";
        let said = Said::of(log, &settings()).to_string();
        assert!(said.contains("HINT:  This error usually means less."), "{said}");
        assert!(said.contains("these settings are not Postgres's defaults: work_mem = '4MB'"), "{said}");
        assert_eq!(Said::of("", &[]).to_string(), "it logged nothing");
    }
}
