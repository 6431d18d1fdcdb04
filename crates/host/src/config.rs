//! Configuration of the Postgres that a compute runs.
//!
//! Three layers: the user's own files in the data directory; our `postgresql.conf` around them, which holds a default
//! that suits a compute and the one safety setting that changes while the server runs (`synchronous_standby_names`);
//! and the command line, which beats `ALTER SYSTEM`, for all other settings that safety rests on.

use varve_api::host::Begin;
use varve_api::size::Size;

use crate::asked::Asked;
use crate::dirs::{Dirs, Isolation};
use crate::wal_gate;

/// The internal superuser, for the supervisor and the WAL receiver, over the private socket only.
pub const INTERNAL_ROLE: &str = "varve";

/// Text of our `postgresql.conf`: a default, the user's, then what is ours and what follows from the size.
pub fn postgresql_conf(dirs: &Dirs, standby_name: Option<&str>, size: &Size) -> String {
    // In-place tablespaces are directories inside the mount: who has no access to the host can make no others.
    format!(
        "# Written by varve at each start; settings belong into ALTER SYSTEM.\n\
         allow_in_place_tablespaces = on\n\
         include_if_exists '{}'\n\
         {}synchronous_standby_names = '{}'\n",
        dirs.pgdata().join("postgresql.conf").display(),
        size.memory_bytes.map_or_else(String::new, |memory| format!("shared_buffers = {}MB\n", shared_buffers_mb(memory.min))),
        standby_name.unwrap_or("")
    )
}

/// Postgres's own cache in a memory of so many bytes: a quarter, of the least that the compute has, since it cannot
/// change while Postgres runs. The rest is for sessions and the kernel's cache. `ALTER SYSTEM` beats it.
fn shared_buffers_mb(least_bytes: u64) -> u64 {
    ((least_bytes / 4) >> 20).clamp(16, 16 << 10)
}

/// Text of our `pg_hba.conf`: the internal role over the private socket, then the user's lines. Who may take that role
/// is told by the user that connects, where a sandbox keeps the tenant from being the same.
pub fn pg_hba_conf(isolation: Isolation, users_own: &str) -> String {
    let method = match isolation {
        Isolation::Sandbox { .. } => format!("peer map={INTERNAL_ROLE}"),
        Isolation::None(_) => "trust".to_owned(),
    };
    format!(
        "# Written by varve at each start: these lines, then those of pg_hba.conf in the data directory.\n\
         local all {INTERNAL_ROLE} {method}\n\
         local replication {INTERNAL_ROLE} {method}\n\
         host all {INTERNAL_ROLE} all reject\n\
         {users_own}"
    )
}

/// Text of our `pg_ident.conf`: the supervisor may take the internal role. Then the user's lines, which can name other
/// maps.
pub fn pg_ident_conf(users_own: &str) -> String {
    let foreign = |line: &&str| line.split_whitespace().next().is_none_or(|map| map.trim_matches('"') != INTERNAL_ROLE);
    let users_own: Vec<&str> = users_own.lines().filter(foreign).collect();
    format!(
        "# Written by varve at each start: this line, then those of pg_ident.conf in the data directory.\n\
         {INTERNAL_ROLE} root {INTERNAL_ROLE}\n\
         {}\n",
        users_own.join("\n")
    )
}

/// Arguments of `postgres`, which listens on `addresses`.
pub fn arguments(begin: &Begin, addresses: &str, dirs: &Dirs, asked: &Asked) -> Vec<String> {
    let conf = |name: &str| dirs.conf().join(name).display().to_string();
    let mut settings: Vec<(&str, String)> = vec![
        // A file of the tenant's cannot name another folder, socket or log.
        ("data_directory", dirs.pgdata().display().to_string()),
        ("config_file", conf("postgresql.conf")),
        ("hba_file", conf("pg_hba.conf")),
        ("ident_file", conf("pg_ident.conf")),
        ("external_pid_file", String::new()),
        ("unix_socket_permissions", "0777".to_owned()),
        ("unix_socket_group", String::new()),
        ("log_destination", "stderr".to_owned()),
        ("listen_addresses", addresses.to_owned()),
        ("port", begin.port.to_string()),
        ("unix_socket_directories", dirs.socket().display().to_string()),
        ("logging_collector", "off".to_owned()),
        // Durability is the pageserver's: the cache dies with any end but a clean shutdown.
        ("fsync", "off".to_owned()),
        ("full_page_writes", "off".to_owned()),
        ("restart_after_crash", "off".to_owned()),
        // What the WAL receiver needs, with what is asked for beside it.
        ("max_slot_wal_keep_size", "-1".to_owned()),
        ("archive_mode", "off".to_owned()),
        // By their titles the supervisor knows which commits keep the WAL receiver out.
        ("update_process_title", "on".to_owned()),
        // A fresh start must not wait for 16 MiB of zeros.
        ("wal_init_zero", "off".to_owned()),
        ("varve.timeline", begin.timeline_id.clone()),
        ("varve.epoch", begin.epoch.map_or_else(String::new, |epoch| epoch.to_string())),
    ];
    if begin.pg_version >= 18 && matches!(dirs.isolation(), Isolation::Sandbox { .. }) {
        // io_uring is closed in a sandbox: it goes around the filter of system calls.
        settings.push(("io_method", "worker".to_owned()));
    }
    if let Some(cap) = dirs.wal_cap() {
        settings.push(("max_wal_size", format!("{}MB", wal_gate::max_wal_size_mb(cap))));
    }
    settings.extend(asked.settings());
    // What the user gives to this start beats his files, and nothing of ours.
    let given = begin.settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let mut arguments = vec!["-D".to_owned(), dirs.pgdata().display().to_string()];
    for (name, value) in given.chain(settings) {
        arguments.push("-c".to_owned());
        arguments.push(format!("{name}={value}"));
    }
    arguments
}

/// More arguments, of a single-user mode that is to repair our role: nothing of the tenant's runs in it.
pub fn repair_arguments() -> [&'static str; 10] {
    [
        "-c",
        "session_preload_libraries=",
        "-c",
        "local_preload_libraries=",
        "-c",
        "synchronous_commit=local",
        "-c",
        "default_transaction_read_only=off",
        "-c",
        "search_path=pg_catalog",
    ]
}

/// What makes our role what it must be. Single-user mode goes on after an error, such as that the role is there. Each
/// statement ends with an empty line.
pub fn repair_statements() -> String {
    format!(
        "CREATE ROLE {INTERNAL_ROLE};\n\n\
         ALTER ROLE {INTERNAL_ROLE} LOGIN SUPERUSER REPLICATION CONNECTION LIMIT -1;\n\n\
         ALTER ROLE {INTERNAL_ROLE} RESET ALL;\n\n"
    )
}
