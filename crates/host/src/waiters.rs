//! Commits that stand in the way of their own acknowledgement.
//!
//! A commit that waits for the pageserver keeps its locks. Our walsenders need one lock to log in, on `pg_authid`: a
//! `VACUUM FULL pg_authid`, or whatever else locks that catalogue, waits for the pageserver, whose WAL receiver waits
//! for it. Neither ends by itself.
//!
//! So [`watch`] looks at the postmaster's children as the system lists them. While no walsender of ours sends WAL, and
//! a login of ours has been waiting for [`PATIENCE`], it cancels waits for synchronous replication, one after the
//! other, until the login goes on. Commands that could lock a catalogue come first. A commit whose wait is cancelled
//! stays, and its client gets a warning: it counts as not acknowledged, and each one is logged.
//!
//! A tenant's walsenders could take our places, too: superusers' places are not kept for walsenders. The command line
//! gives more than the tenant asks for ([`crate::asked`]); who takes more than he may is ended.
//!
//! Postgres says what a process does in its title, for as long as `update_process_title` is on, which a compute's
//! command line sees to.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::config::INTERNAL_ROLE;
use crate::identity;

/// How often the titles are read.
const POLL: Duration = Duration::from_millis(500);
/// How long a login may wait before waits are cancelled. With [`POLL`] and the login itself, commits go on within some
/// 3 s.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long a commit whose wait was cancelled has to notice: it may have to wait for a processor.
const NOTICE_MAX: Duration = Duration::from_secs(2);
/// How long the login then has to go on, before the next wait is cancelled: none is cancelled that need not be.
const LOGIN_MAX: Duration = Duration::from_millis(500);
/// How often both are looked at.
const RELEASE_POLL: Duration = Duration::from_millis(5);
/// Commands that lock nothing but what they write, and are cancelled last.
const ROW_COMMANDS: [&str; 6] = ["INSERT", "UPDATE", "DELETE", "MERGE", "COPY", "SELECT"];

/// Watches over the Postgres of `postmaster`, for ever. Its tenant may have so many walsenders.
pub async fn watch(postmaster: u32, tenants_wal_senders: usize) {
    let mut login: Option<(u32, Instant)> = None;
    loop {
        tokio::time::sleep(POLL).await;
        let looked = tokio::task::spawn_blocking(move || {
            end_surplus(postmaster, tenants_wal_senders);
            look(postmaster, login)
        });
        let looked = looked.await;
        login = looked.unwrap_or_default();
    }
}

/// Ends the newest walsenders of a tenant who has more than he may.
fn end_surplus(postmaster: u32, max: usize) {
    let mut senders: Vec<u32> = identity::children_of(postmaster);
    senders.retain(|pid| identity::title(*pid).is_some_and(|title| is_tenants_sender(&title)));
    senders.sort_unstable();
    for pid in senders.into_iter().skip(max) {
        tracing::warn!(pid, max, "a walsender of the tenant's is ended: the places that are left are ours; max_wal_senders gives more");
        if let Some(pid) = Pid::from_raw(pid as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// Whether a title is that of a walsender that is not ours.
fn is_tenants_sender(title: &str) -> bool {
    title.split_once(": walsender ").is_some_and(|(_, whose)| whose.split(' ').next() != Some(INTERNAL_ROLE))
}

/// Looks once. `login` is the login that waited last time, and since when; gives the one that waits now.
fn look(postmaster: u32, login: Option<(u32, Instant)>) -> Option<(u32, Instant)> {
    let children = identity::children_of(postmaster);
    if children.iter().any(|pid| identity::title(*pid).is_some_and(|title| is_stream_title(&title))) {
        return None; // commits are acknowledged; a login of the slot's keeper may wait as long as it likes
    }
    let waiting = children.iter().copied().find(|pid| is_waiting_login(*pid))?;
    let since = match login {
        Some((pid, since)) if pid == waiting => since,
        _ => Instant::now(),
    };
    if since.elapsed() < PATIENCE {
        return Some((waiting, since));
    }
    let mut commits: Vec<(u32, Commit)> = children.iter().filter_map(|pid| Some((*pid, Commit::of(&identity::title(*pid)?)?))).collect();
    commits.sort_by_key(|(pid, commit)| (commit.rank(), *pid));
    for (pid, commit) in commits {
        let waits = || identity::title(pid).is_some_and(|title| Commit::of(&title).as_ref() == Some(&commit));
        // Meanwhile it may have been acknowledged: what it does now is not to be cancelled.
        if !waits() {
            continue;
        }
        tracing::warn!(
            pid,
            command = commit.command,
            lsn = commit.lsn,
            "a commit waits for the pageserver and keeps it from connecting: its wait is cancelled, it is not acknowledged"
        );
        if let Some(pid) = Pid::from_raw(pid as i32) {
            let _ = kill_process(pid, Signal::INT);
        }
        poll_until(NOTICE_MAX, || !waits());
        if poll_until(LOGIN_MAX, || !is_waiting_login(waiting)) {
            return None;
        }
    }
    Some((waiting, Instant::now()))
}

/// Looks until something is so, or `limit` is over; whether it is so.
fn poll_until(limit: Duration, is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(RELEASE_POLL);
    }
}

/// Whether a process is a login of ours that waits.
fn is_waiting_login(pid: u32) -> bool {
    identity::title(pid).is_some_and(|title| is_login_title(&title))
}

/// Whether a title is that of a walsender of ours without a database which waits for a lock before it is logged in. The
/// role is looked up for `pg_hba.conf`, and then to become it.
fn is_login_title(title: &str) -> bool {
    let ours = format!(": walsender {INTERNAL_ROLE} [local] ");
    title.split_once(&ours).is_some_and(|(_, does)| matches!(does, "authentication waiting" | "startup waiting"))
}

/// Whether a title is that of a walsender of ours that sends WAL.
fn is_stream_title(title: &str) -> bool {
    title.contains(&format!(": walsender {INTERNAL_ROLE} [local] streaming "))
}

/// A commit that waits for synchronous replication.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Commit {
    command: String,
    lsn: String,
}

impl Commit {
    /// What the title `postgres: role database client COMMAND waiting for 0/16B3748` says.
    fn of(title: &str) -> Option<Commit> {
        let (before, lsn) = title.rsplit_once(" waiting for ")?;
        lsn.parse::<varve_postgres::Lsn>().ok()?;
        let command = before.rsplit(' ').next()?;
        Some(Commit { command: command.to_owned(), lsn: lsn.to_owned() })
    }

    /// The order in which waits are cancelled: a transaction's end may be that of anything, a command that writes rows
    /// locks no catalogue.
    fn rank(&self) -> u8 {
        match &*self.command {
            "COMMIT" => 1,
            command if ROW_COMMANDS.contains(&command) => 2,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_that_wait_are_told_by_their_title() {
        for does in ["authentication waiting", "startup waiting"] {
            assert!(is_login_title(&format!("postgres: walsender varve [local] {does}")));
            assert!(is_login_title(&format!("postgres: name: walsender varve [local] {does}")));
            // With a database nothing depends on it, and a tenant's is not ours to help.
            assert!(!is_login_title(&format!("postgres: walsender varve postgres [local] {does}")));
            assert!(!is_login_title(&format!("postgres: walsender app 127.0.0.1(4242) {does}")));
        }
        for does in ["startup", "idle", "streaming 0/16B3748"] {
            let title = format!("postgres: walsender varve [local] {does}");
            assert!(!is_login_title(&title));
            assert_eq!(is_stream_title(&title), does.starts_with("streaming"));
        }
    }

    #[test]
    fn walsenders_of_tenants_are_told_from_ours() {
        for title in
            ["walsender app 127.0.0.1(4242) streaming 0/16B3748", "walsender varved db [local] idle", "walsender postgres [local] startup"]
        {
            assert!(is_tenants_sender(&format!("postgres: {title}")) && is_tenants_sender(&format!("postgres: name: {title}")), "{title}");
        }
        for title in
            ["walsender varve [local] streaming 0/16B3748", "walsender varve postgres [local] idle", "app db [local] SELECT", "walwriter "]
        {
            assert!(!is_tenants_sender(&format!("postgres: {title}")), "{title}");
        }
    }

    #[test]
    fn commits_that_wait_are_told_by_their_title() {
        let commit = Commit::of("postgres: postgres app 127.0.0.1(4242) VACUUM waiting for 0/136C53A8").unwrap();
        assert_eq!((&*commit.command, &*commit.lsn, commit.rank()), ("VACUUM", "0/136C53A8", 0));
        let rank = |title: &str| Commit::of(title).map(|commit| commit.rank());
        assert_eq!(rank("postgres: name: postgres app [local] COMMIT waiting for 1/0"), Some(1));
        assert_eq!(rank("postgres: postgres app [local] INSERT waiting for 1/0"), Some(2));
        for other in ["INSERT waiting", "INSERT", "idle in transaction", "SELECT waiting for it", "startup waiting"] {
            assert_eq!(rank(&format!("postgres: postgres app [local] {other}")), None);
        }
    }
}
