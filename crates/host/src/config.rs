//! Configuration of the Postgres that a compute runs.
//!
//! Three layers: the user's own files in the data directory; our `postgresql.conf` around them, which holds a default
//! that suits a compute and the one safety setting that changes while the server runs (`synchronous_standby_names`);
//! and the command line, which beats `ALTER SYSTEM`, for all other settings that safety rests on.

use varve_api::host::Begin;

use crate::dirs::Dirs;

/// The internal superuser, for the supervisor and the WAL receiver, over the private socket only.
pub const INTERNAL_ROLE: &str = "varve";

/// Text of our `postgresql.conf`: a default, the user's, then what is ours.
pub fn postgresql_conf(dirs: &Dirs, standby_name: Option<&str>) -> String {
    // In-place tablespaces are directories inside the mount: who has no access to the host can make no others.
    format!(
        "# Written by varve at each start; settings belong into ALTER SYSTEM.\n\
         allow_in_place_tablespaces = on\n\
         include_if_exists '{}'\n\
         synchronous_standby_names = '{}'\n",
        dirs.pgdata().join("postgresql.conf").display(),
        standby_name.unwrap_or("")
    )
}

/// Text of our `pg_hba.conf`: the internal role over the private socket, then the user's lines.
pub fn pg_hba_conf(users_own: &str) -> String {
    format!(
        "# Written by varve at each start: these lines, then those of pg_hba.conf in the data directory.\n\
         local all {INTERNAL_ROLE} trust\n\
         local replication {INTERNAL_ROLE} trust\n\
         host all {INTERNAL_ROLE} all reject\n\
         {users_own}"
    )
}

/// Arguments of `postgres`.
pub fn arguments(begin: &Begin, dirs: &Dirs) -> Vec<String> {
    let settings: Vec<(&str, String)> = vec![
        ("config_file", dirs.file("postgresql.conf").display().to_string()),
        ("hba_file", dirs.file("pg_hba.conf").display().to_string()),
        ("listen_addresses", begin.listen.clone()),
        ("port", begin.port.to_string()),
        ("unix_socket_directories", dirs.socket().display().to_string()),
        ("logging_collector", "off".to_owned()),
        // Durability is the pageserver's: the cache dies with any end but a clean shutdown.
        ("fsync", "off".to_owned()),
        ("full_page_writes", "off".to_owned()),
        ("restart_after_crash", "off".to_owned()),
        // What the WAL receiver needs.
        ("wal_level", "replica".to_owned()),
        ("max_wal_senders", "10".to_owned()),
        ("max_replication_slots", "10".to_owned()),
        ("max_slot_wal_keep_size", "-1".to_owned()),
        ("archive_mode", "off".to_owned()),
        // By their titles the supervisor knows which commits keep the WAL receiver out.
        ("update_process_title", "on".to_owned()),
        // A fresh start must not wait for 16 MiB of zeros.
        ("wal_init_zero", "off".to_owned()),
        ("varve.timeline", begin.timeline_id.clone()),
        ("varve.epoch", begin.epoch.map_or_else(String::new, |epoch| epoch.to_string())),
    ];
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
