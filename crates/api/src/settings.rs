//! Settings of Postgres that are Varve's: safety rests on them, or they say where a compute is.

/// Names that a tenant cannot give to his server; `varve.` begins further ones. A compute's command line has them, and
/// so beats what `ALTER SYSTEM` made of them; `synchronous_standby_names`, which changes while it runs, is taken back.
/// What a tenant asks for of `wal_level`, `max_wal_senders` and `max_replication_slots` is his, as far as it is enough.
pub const OURS: [&str; 21] = [
    "config_file",
    "hba_file",
    "ident_file",
    "data_directory",
    "external_pid_file",
    "listen_addresses",
    "port",
    "unix_socket_directories",
    "unix_socket_permissions",
    "unix_socket_group",
    "log_destination",
    "io_method",
    "logging_collector",
    "fsync",
    "full_page_writes",
    "restart_after_crash",
    "max_slot_wal_keep_size",
    "archive_mode",
    "update_process_title",
    "wal_init_zero",
    "synchronous_standby_names",
];

/// Whether a setting is Varve's.
pub fn is_ours(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.starts_with("varve.") || OURS.contains(&&*name)
}
