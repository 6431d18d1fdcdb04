//! A running standby, held still while its files are read.
//!
//! Its pages are read from files (`pg_read_binary_file`), so they must be there: replay is paused and a restartpoint
//! writes them. A restartpoint needs a checkpoint of the primary's that has not had one yet; without one nothing is
//! written, and what was replayed since is in the standby's memory alone. So this pauses, asks for a restartpoint,
//! looks whether there was one, and if not goes on and tries again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::paths::{BLOCKS_PER_FILE, RelationFileName, relation_file};
use varve_postgres::{BLCKSZ, BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, page};
use varve_protocol::ConnectConfig;
use varve_protocol::connect::blocking::Connection;

use crate::{ForkSize, VerifyError};

/// How long connecting and each answer may take; a restartpoint writes all that is dirty.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// How long to wait until the standby has replayed enough, and until it has a checkpoint to make a restartpoint of.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(120);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Connections that are kept for reading.
const IDLE_CONNECTIONS_MAX: usize = 8;

/// A standby whose replay is paused, and goes on when this is dropped.
#[derive(Debug)]
pub struct Standby {
    config: ConnectConfig,
    server: String,
    major: Major,
    system_identifier: u64,
    catalog_version: u32,
    at: Lsn,
    /// Whether replay was paused by us.
    paused: bool,
    idle: Mutex<Vec<Connection>>,
}

impl Standby {
    /// Waits until the standby has replayed up to `at_least`, pauses it, and makes it write its pages. `checkpoint` is
    /// called when a checkpoint of the primary's would help; it may do nothing.
    ///
    /// # Errors
    /// When the server is no standby, does not get that far, or has no checkpoint to make a restartpoint of.
    pub fn pause(config: &ConnectConfig, at_least: Lsn, checkpoint: &mut dyn FnMut()) -> Result<Standby, VerifyError> {
        let config = config.clone().parameter("application_name", "varve_verify");
        let mut connection = Connection::connect(&config, ANSWER_TIMEOUT)?;
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let server = connection.endpoint().to_owned();
        let wrong = |what: String| VerifyError::Server { server: server.clone(), what };
        let row = one_row(
            &mut connection,
            "SELECT pg_is_in_recovery(), current_setting('server_version_num'), system_identifier, catalog_version_no FROM pg_control_system()",
        )?;
        if row[0] != "t" {
            return Err(wrong(
                "is no standby, so its pages do not stand still: stop it and give its data directory, or give a standby".to_owned(),
            ));
        }
        let major = row[1].parse::<u32>().ok().and_then(|number| Major::from_number(number / 10_000));
        let major = major.ok_or_else(|| wrong(format!("server_version_num is {}; PostgreSQL 14 to 18 are supported", row[1])))?;
        // Both are printed as signed numbers.
        let identifiers = (row[2].parse::<i64>(), row[3].parse::<u32>());
        let (Ok(system_identifier), Ok(catalog_version)) = identifiers else {
            return Err(wrong(format!("pg_control_system() says {row:?}")));
        };
        let mut standby = Standby {
            config,
            server,
            major,
            system_identifier: system_identifier as u64,
            catalog_version,
            at: Lsn::INVALID,
            paused: false,
            idle: Mutex::default(),
        };
        standby.hold_still(&mut connection, at_least, checkpoint)?;
        standby.give_back(connection);
        Ok(standby)
    }

    fn hold_still(&mut self, connection: &mut Connection, at_least: Lsn, checkpoint: &mut dyn FnMut()) -> Result<(), VerifyError> {
        const RESTARTPOINT: &str = "SELECT checkpoint_lsn FROM pg_control_checkpoint()";
        let deadline = Instant::now() + REPLAY_TIMEOUT;
        checkpoint();
        loop {
            self.await_replay(connection, at_least, deadline)?;
            self.pause_replay(connection, deadline)?;
            let before = one_row(connection, RESTARTPOINT)?;
            connection.simple_query("CHECKPOINT")?;
            if one_row(connection, RESTARTPOINT)? != before {
                return Ok(());
            }
            if !self.paused {
                return Err(self.error(format!(
                    "replay was paused already, at {}, and it has no checkpoint to make a restartpoint of, so what it replayed last is in its \
                     memory alone and cannot be compared: let it go on past a checkpoint of its primary's",
                    self.at
                )));
            }
            if Instant::now() > deadline {
                return Err(self.error(format!(
                    "no checkpoint of its primary's came within {} s, and without one it does not write what it has replayed: run CHECKPOINT \
                     on the primary while this waits",
                    REPLAY_TIMEOUT.as_secs()
                )));
            }
            self.resume(connection)?;
            std::thread::sleep(POLL);
            checkpoint();
        }
    }

    fn await_replay(&self, connection: &mut Connection, at_least: Lsn, deadline: Instant) -> Result<(), VerifyError> {
        loop {
            let replayed = replayed(connection)?;
            if replayed >= at_least {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.error(format!("has replayed up to {replayed} after {} s, expected {at_least}", REPLAY_TIMEOUT.as_secs())));
            }
            std::thread::sleep(POLL);
        }
    }

    fn pause_replay(&mut self, connection: &mut Connection, deadline: Instant) -> Result<(), VerifyError> {
        const STATE: &str = "SELECT pg_get_wal_replay_pause_state()";
        if one_row(connection, STATE)?[0] == "not paused" {
            connection.simple_query("SELECT pg_wal_replay_pause()")?;
            self.paused = true;
        }
        while one_row(connection, STATE)?[0] != "paused" {
            if Instant::now() > deadline {
                return Err(self.error("its replay does not pause".to_owned()));
            }
            std::thread::sleep(POLL);
        }
        self.at = replayed(connection)?;
        Ok(())
    }

    fn resume(&mut self, connection: &mut Connection) -> Result<(), VerifyError> {
        connection.simple_query("SELECT pg_wal_replay_resume()")?;
        self.paused = false;
        Ok(())
    }

    fn error(&self, what: String) -> VerifyError {
        VerifyError::Server { server: self.server.clone(), what }
    }

    /// The server, for messages.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Its major.
    pub fn major(&self) -> Major {
        self.major
    }

    /// Its cluster.
    pub fn system_identifier(&self) -> u64 {
        self.system_identifier
    }

    /// Where it stands: its pages are those of this moment.
    pub fn at(&self) -> Lsn {
        self.at
    }

    fn take(&self) -> Result<Connection, VerifyError> {
        if let Some(connection) = self.idle.lock().pop() {
            return Ok(connection);
        }
        let mut connection = Connection::connect(&self.config, ANSWER_TIMEOUT)?;
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(connection)
    }

    fn give_back(&self, connection: Connection) {
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push(connection);
        }
    }

    /// Names in a directory, each with its file's size; nothing if it is not there.
    fn list(&self, connection: &mut Connection, dir: &str) -> Result<Vec<(String, u64)>, VerifyError> {
        // One row, since there may be hundreds of thousands of files. A file may go while the list is made.
        let sql = format!(
            "SELECT string_agg(name || ' ' || coalesce((pg_stat_file('{dir}/' || name, true)).size, 0), E'\\n') FROM pg_ls_dir('{dir}', true, false) name"
        );
        let rows = connection.simple_query(&sql)?;
        let text = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default();
        let entry = |line: &str| {
            let (name, size) = line.rsplit_once(' ')?;
            Some((name.to_owned(), size.parse().ok()?))
        };
        Ok(text.lines().filter_map(entry).collect())
    }

    /// All relation forks, temporary relations left out.
    ///
    /// # Errors
    /// When the server does not tell; the role must be a superuser or a member of `pg_read_server_files` and allowed to
    /// list directories.
    pub fn forks(&self) -> Result<Vec<ForkSize>, VerifyError> {
        let mut connection = self.take()?;
        let mut directories = vec![("global".to_owned(), GLOBAL_TABLESPACE, 0)];
        let numbers =
            |entries: Vec<(String, u64)>| entries.into_iter().filter_map(|(name, _)| name.parse::<Oid>().ok()).collect::<Vec<_>>();
        for db in numbers(self.list(&mut connection, "base")?) {
            directories.push((format!("base/{db}"), DEFAULT_TABLESPACE, db));
        }
        for spc in numbers(self.list(&mut connection, "pg_tblspc")?) {
            let dir = format!("pg_tblspc/{spc}/{}", self.major.tablespace_directory(self.catalog_version));
            for db in numbers(self.list(&mut connection, &dir)?) {
                directories.push((format!("{dir}/{db}"), spc, db));
            }
        }
        let mut forks: BTreeMap<(RelNode, Fork), BlockNumber> = BTreeMap::new();
        for (dir, spc, db) in directories {
            for (name, bytes) in self.list(&mut connection, &dir)? {
                let Some(name) = RelationFileName::parse(&name) else { continue };
                let blocks = (bytes / BLCKSZ as u64).min(u64::from(BLOCKS_PER_FILE)) as BlockNumber;
                let end = if blocks == 0 { 0 } else { name.file_number.saturating_mul(BLOCKS_PER_FILE).saturating_add(blocks) };
                let known = forks.entry((RelNode { spc, db, rel: name.rel }, name.fork)).or_insert(0);
                *known = end.max(*known);
            }
        }
        self.give_back(connection);
        Ok(forks.into_iter().map(|((node, fork), blocks)| ForkSize { rel: node.fork(fork), blocks }).collect())
    }

    /// Reads block by block from `first` on into `out`. What the files do not have is zeros.
    ///
    /// # Errors
    /// When the server does not give them.
    pub fn read(&self, rel: RelFork, first: BlockNumber, out: &mut [Page]) -> Result<(), VerifyError> {
        let mut connection = self.take()?;
        let mut at = first;
        let mut rest = out;
        while !rest.is_empty() {
            let in_file = at % BLOCKS_PER_FILE;
            let count = rest.len().min((BLOCKS_PER_FILE - in_file) as usize);
            let (pages, later) = rest.split_at_mut(count);
            let path = relation_file(rel, at / BLOCKS_PER_FILE, self.major, self.catalog_version);
            let (offset, length) = (u64::from(in_file) * BLCKSZ as u64, count * BLCKSZ);
            let sql = format!("SELECT encode(pg_read_binary_file('{path}', {offset}, {length}, true), 'hex')");
            let rows = connection.simple_query(&sql)?;
            let text = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default();
            let bytes =
                from_hexadecimal(&text).ok_or_else(|| self.error(format!("{path}: its bytes came in another form than hexadecimal")))?;
            pages.fill(page::ZERO_PAGE);
            for (page, bytes) in pages.iter_mut().zip(bytes.chunks_exact(BLCKSZ)) {
                page.copy_from_slice(bytes);
            }
            at += count as BlockNumber;
            rest = later;
        }
        self.give_back(connection);
        Ok(())
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if !self.paused {
            return;
        }
        let resumed = self.take().and_then(|mut connection| self.resume(&mut connection));
        if let Err(error) = resumed {
            tracing::error!(server = self.server, %error, "its replay is still paused: run SELECT pg_wal_replay_resume()");
        }
    }
}

fn replayed(connection: &mut Connection) -> Result<Lsn, VerifyError> {
    Ok(one_row(connection, "SELECT coalesce(pg_last_wal_replay_lsn(), '0/0')")?[0].parse().unwrap_or(Lsn::INVALID))
}

/// The columns of a query's first row; an empty one at least.
fn one_row(connection: &mut Connection, sql: &str) -> Result<Vec<String>, VerifyError> {
    let rows = connection.simple_query(sql)?;
    let row = rows.into_iter().next().unwrap_or_default();
    let mut row: Vec<String> = row.into_iter().map(Option::unwrap_or_default).collect();
    const COLUMNS_MAX: usize = 4;
    row.resize(row.len().max(COLUMNS_MAX), String::new());
    Ok(row)
}

fn from_hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read() {
        assert_eq!(from_hexadecimal("00ff7A"), Some(vec![0, 0xFF, 0x7A]));
        assert_eq!(from_hexadecimal(""), Some(Vec::new()));
        assert_eq!(from_hexadecimal("0"), None);
        assert_eq!(from_hexadecimal("0g"), None);
    }
}
