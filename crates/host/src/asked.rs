//! What a tenant asks for of the settings that the command line holds.
//!
//! Safety rests on the level of WAL and on places for our own walsenders and slot, so the command line sets them, over
//! whatever `ALTER SYSTEM` says. It sets them to what the tenant asks for where that is enough. So his files are read
//! as Postgres reads them: `postgresql.conf` with what it includes, then `postgresql.auto.conf`, and the last one
//! counts. What cannot be understood asks for nothing; Postgres complains of it.
//!
//! Slots that are kept ask, too: Postgres does not start with fewer places than slots, nor with a logical one below
//! `logical`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use varve_postgres::replication_slot::SlotState;

use crate::mount::{InitialContent, InitialFile};

/// Files within files: Postgres's own limit (`CONF_FILE_MAX_DEPTH`).
const DEPTH_MAX: usize = 10;
/// Walsenders that a tenant has at least, and slots: Postgres's defaults.
const TENANTS_MIN: u32 = 10;
/// Walsenders of ours at a time, beside the tenant's: the WAL receiver, the keeper of its slot, and two of the
/// supervisor's.
const OUR_WAL_SENDERS: u32 = 4;
/// Slots of ours.
const OUR_SLOTS: u32 = 1;
/// What a cluster's default `postgresql.conf` says (`engine::base_backup`), so that a stock standby, which must have as
/// many, starts with it: no tenant asks for it.
const DEFAULT_WAL_SENDERS: u32 = TENANTS_MIN + OUR_WAL_SENDERS;
/// The most that Postgres takes (`MAX_BACKENDS`).
const POSTGRES_MAX: u32 = 0x3_FFFF;

/// See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Whether WAL is to be fit for logical decoding.
    logical: bool,
    wal_senders: u32,
    replication_slots: u32,
    folders: Vec<PathBuf>,
}

impl Asked {
    /// What the files of a data directory ask for.
    pub fn of(files: &[InitialFile]) -> Asked {
        let contents = files.iter().filter_map(|file| match &file.content {
            InitialContent::File(bytes) => Some((PathBuf::from(&file.path), &bytes[..])),
            _ => None,
        });
        let contents: BTreeMap<PathBuf, &[u8]> = contents.collect();
        let mut settings = Settings { files: &contents, values: BTreeMap::new(), folders: Vec::new() };
        for file in ["postgresql.conf", "postgresql.auto.conf"] {
            settings.read(Path::new(file), 0);
        }
        let states = files.iter().filter(|file| is_tenants_slot(&file.path));
        let slots: Vec<Option<SlotState>> = states
            .map(|file| match &file.content {
                InitialContent::File(bytes) => SlotState::decode(bytes),
                _ => None,
            })
            .collect();
        let level = settings.values.get("wal_level").map(String::as_str).unwrap_or_default();
        let senders = settings.number("max_wal_senders").filter(|asked| *asked != DEFAULT_WAL_SENDERS).unwrap_or_default();
        let asked_slots = settings.number("max_replication_slots").unwrap_or_default().max(slots.len() as u32);
        Asked {
            logical: level.eq_ignore_ascii_case("logical") || slots.iter().flatten().any(|slot| slot.is_logical),
            wal_senders: (senders.max(TENANTS_MIN).saturating_add(OUR_WAL_SENDERS)).min(POSTGRES_MAX),
            replication_slots: (asked_slots.max(TENANTS_MIN).saturating_add(OUR_SLOTS)).min(POSTGRES_MAX),
            folders: settings.folders,
        }
    }

    /// Walsenders that the tenant may have at a time; the rest of their places is ours.
    pub fn tenants_wal_senders(&self) -> usize {
        self.wal_senders.saturating_sub(OUR_WAL_SENDERS) as usize
    }

    /// Folders of settings without which Postgres does not start. One without files is not kept, so it is to be made.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Settings for the command line, by name.
    pub fn settings(&self) -> [(&'static str, String); 3] {
        [
            // Below `replica`, WAL has not what the pageserver needs.
            ("wal_level", if self.logical { "logical" } else { "replica" }.to_owned()),
            ("max_wal_senders", self.wal_senders.to_string()),
            ("max_replication_slots", self.replication_slots.to_string()),
        ]
    }
}

fn is_tenants_slot(path: &str) -> bool {
    path.starts_with("pg_replslot/") && path.ends_with("/state") && !path.starts_with("pg_replslot/varve/")
}

/// Settings as files say them, the last one of each.
struct Settings<'a> {
    files: &'a BTreeMap<PathBuf, &'a [u8]>,
    values: BTreeMap<String, String>,
    folders: Vec<PathBuf>,
}

impl Settings<'_> {
    fn read(&mut self, path: &Path, depth: usize) {
        let Some(contents) = self.files.get(path).filter(|_| depth <= DEPTH_MAX) else { return };
        let text = String::from_utf8_lossy(contents);
        for (name, value) in text.lines().filter_map(setting) {
            let named = || plain(&path.parent().unwrap_or(Path::new("")).join(&value));
            match &*name {
                "include" | "include_if_exists" => {
                    if let Some(included) = named() {
                        self.read(&included, depth + 1);
                    }
                }
                "include_dir" => {
                    let Some(folder) = named() else { continue };
                    // In the order of names, and without hidden ones.
                    let is_included = |path: &&PathBuf| {
                        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                        path.parent() == Some(&*folder) && file.ends_with(".conf") && !file.starts_with('.')
                    };
                    let included: Vec<PathBuf> = self.files.keys().filter(is_included).cloned().collect();
                    included.iter().for_each(|path| self.read(path, depth + 1));
                    self.folders.push(folder);
                }
                _ => {
                    self.values.insert(name, value);
                }
            }
        }
    }

    fn number(&self, name: &str) -> Option<u32> {
        let text = self.values.get(name)?.trim();
        match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }
}

/// A path below the data directory without `.` and `..`; none of another.
fn plain(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            Component::ParentDir => plain.pop().then_some(())?,
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

/// The name, in small letters, and the value of a line of a settings file (`guc-file.l`).
fn setting(line: &str) -> Option<(String, String)> {
    let line = line.trim_start();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '.'))).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let value = match rest.strip_prefix('\'') {
        Some(quoted) => unquoted(quoted)?,
        None => rest.split(|c: char| c.is_whitespace() || c == '#').next()?.to_owned(),
    };
    Some((name.to_ascii_lowercase(), value))
}

/// What stands before the closing quote; two quotes, and one behind a backslash, are one.
fn unquoted(text: &str) -> Option<String> {
    let mut value = String::new();
    let mut chars = text.chars().peekable();
    loop {
        match chars.next()? {
            '\'' if chars.next_if_eq(&'\'').is_none() => return Some(value),
            '\\' => value.push(chars.next()?),
            other => value.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use varve_postgres::replication_slot::physical_slot_state;
    use varve_postgres::{Lsn, Major};

    use super::*;

    fn asked(files: &[(&str, &str)]) -> [String; 3] {
        let file = |(path, text): &(&str, &str)| InitialFile {
            path: (*path).to_owned(),
            mode: 0o600,
            content: InitialContent::File(text.as_bytes().to_vec().into()),
        };
        Asked::of(&files.iter().map(file).collect::<Vec<_>>()).settings().map(|(_, value)| value)
    }

    #[test]
    fn who_asks_for_nothing_gets_what_he_had_and_ours_beside_it() {
        assert_eq!(asked(&[]), ["replica", "14", "11"]);
        assert_eq!(asked(&[("postgresql.conf", "max_wal_senders = 14\n")]), ["replica", "14", "11"], "the default says so");
    }

    #[test]
    fn the_last_setting_counts_and_none_takes_away_what_is_ours() {
        let auto = |text| asked(&[("postgresql.conf", "wal_level = logical\nmax_wal_senders 20"), ("postgresql.auto.conf", text)]);
        assert_eq!(auto(""), ["logical", "24", "11"]);
        assert_eq!(auto("wal_level = 'minimal'\nmax_wal_senders = '0'\nmax_replication_slots = '0'"), ["replica", "14", "11"]);
        assert_eq!(auto("# wal_level = replica\nWAL_LEVEL='Logical' # x\nMax_Replication_Slots=0x40"), ["logical", "24", "65"]);
        assert_eq!(auto("max_wal_senders = 4000000000"), ["logical", "262143", "11"]);
    }

    #[test]
    fn included_files_are_read() {
        let conf = "include 'a/one.conf'\ninclude_dir = 'conf.d'\ninclude_if_exists 'nowhere'\ninclude '/etc/passwd'\ninclude '../x'";
        let files = [
            ("postgresql.conf", conf),
            ("a/one.conf", "wal_level = logical\ninclude 'two.conf'"),
            ("a/two.conf", "max_wal_senders = 30\ninclude 'two.conf'"),
            ("conf.d/b.conf", "max_replication_slots = 12"),
            ("conf.d/a.conf", "max_replication_slots = 40"),
            ("conf.d/.hidden.conf", "wal_level = replica"),
            ("conf.d/c.txt", "wal_level = replica"),
        ];
        assert_eq!(asked(&files), ["logical", "34", "13"]);
        let conf = InitialFile { path: "postgresql.conf".to_owned(), mode: 0o600, content: InitialContent::File(conf.as_bytes().into()) };
        assert_eq!(Asked::of(&[conf]).folders(), [PathBuf::from("conf.d")]);
    }

    #[test]
    fn quotes_are_taken_as_postgres_takes_them() {
        assert_eq!(setting(" a.b = 'it''s \\'x\\' ' # c"), Some(("a.b".to_owned(), "it's 'x' ".to_owned())));
        assert_eq!(setting("port=5432#x"), Some(("port".to_owned(), "5432".to_owned())));
        for nothing in ["", "   ", "# x = y", "= 1", "a = 'open"] {
            assert_eq!(setting(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn slots_that_are_kept_have_their_places() {
        let state = |path: &str, logical: bool| {
            let mut bytes = physical_slot_state("s", Lsn(8), Major::V15);
            bytes[80] = u8::from(logical);
            InitialFile { path: path.to_owned(), mode: 0o600, content: InitialContent::File(bytes.into()) }
        };
        let mut files: Vec<InitialFile> = (0..12).map(|i| state(&format!("pg_replslot/s{i}/state"), false)).collect();
        files.push(state("pg_replslot/varve/state", false));
        assert_eq!(Asked::of(&files).settings().map(|(_, value)| value), ["replica", "14", "13"]);
        files.push(state("pg_replslot/decodes/state", true));
        assert_eq!(Asked::of(&files).settings().map(|(_, value)| value), ["logical", "14", "14"]);
    }
}
