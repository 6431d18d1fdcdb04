//! Where a compute's tablespaces are: their data always lies in the mount, and Postgres sees the name that its user
//! gave.
//!
//! A name is shown where it can be: in the sandbox's own `/tmp` and `/dev/shm`, which are empty at each start, and in
//! `/tablespaces`, which is a folder of the mount. Elsewhere in a sandbox nobody can make one.

use std::path::{Component, Path};

use varve_api::host::Begin;
use varve_postgres::Oid;

use crate::dirs::{Dirs, Isolation};

/// The folder of a sandbox for tablespaces. What is made there lies in the mount.
pub(crate) const NAMED: &str = "/tablespaces";
/// Folders of a sandbox that are empty at each start, in memory.
const IN_MEMORY: [&str; 2] = ["/tmp", "/dev/shm"];
/// Longest name; Postgres has a limit of its own (`MAXPGPATH`).
const NAME_BYTES_MAX: usize = 500;

/// Where a tablespace is to be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In `pg_tblspc` itself, as Postgres makes it without a location.
    InPlace,
    /// Under this name, which leads to the mount.
    Named(String),
    /// In the mount's folder of tablespaces.
    Mount,
}

/// The tablespaces of a start, and where they are.
pub(crate) fn of(begin: &Begin, isolation: Isolation) -> Vec<(Oid, Location)> {
    let is_apart = matches!(isolation, Isolation::Sandbox { .. });
    let names: Vec<&str> = begin.tablespace_locations.iter().map(|(_, name)| name.as_str()).filter(|name| !name.is_empty()).collect();
    let location = |spc: &Oid| match begin.tablespace_locations.iter().find(|(known, _)| known == spc) {
        Some((_, name)) if name.is_empty() => Location::InPlace,
        Some((_, name)) if is_apart && can_be_shown(name, &names) => Location::Named(name.clone()),
        _ => Location::Mount,
    };
    begin.tablespaces.iter().map(|spc| (*spc, location(spc))).collect()
}

/// Whether a name can lead to the mount, and no other one goes through it.
fn can_be_shown(name: &str, all: &[&str]) -> bool {
    let path = Path::new(name);
    let is_plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_))) && !name.chars().any(char::is_control);
    let lies_in = |folder: &str| path.strip_prefix(folder).is_ok_and(|rest| rest.components().next().is_some());
    let is_alone = all.iter().filter(|other| Path::new(other).starts_with(path) || path.starts_with(other)).count() == 1;
    name.len() <= NAME_BYTES_MAX && path.is_absolute() && is_plain && is_alone && (lies_in(NAMED) || IN_MEMORY.into_iter().any(lies_in))
}

/// The links in folders in memory that lead to the mount: from where, to where.
pub(crate) fn links(begin: &Begin, dirs: &Dirs) -> Vec<(String, String)> {
    let named = of(begin, dirs.isolation()).into_iter().filter_map(|(spc, location)| match location {
        Location::Named(name) if !Path::new(&name).starts_with(NAMED) => Some((name, spc)),
        _ => None,
    });
    let data = |spc: Oid| dirs.pgdata().join(crate::mount::TABLESPACES).join(spc.to_string());
    named.map(|(name, spc)| (name, data(spc).to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_where_only_the_tenant_makes_any() {
        for name in ["/tmp/ts", "/tmp/deep/er", "/dev/shm/fast", "/tablespaces/a", "/tablespaces/a b"] {
            assert!(can_be_shown(name, &[name, "/tmp/other"]), "{name}");
        }
        for name in ["/tmp", "/tablespaces", "tmp/x", "/etc/x", "/tmp/../etc", "/tmp/a/../../etc", "/tmp/a\nb", "/run/x", ""] {
            assert!(!can_be_shown(name, &[name]), "{name:?}");
        }
        assert!(!can_be_shown("/tmp/a", &["/tmp/a", "/tmp/a/b"]) && !can_be_shown("/tmp/a/b", &["/tmp/a", "/tmp/a/b"]));
        assert!(can_be_shown("/tmp/a", &["/tmp/a", "/tmp/ab"]));
    }
}
