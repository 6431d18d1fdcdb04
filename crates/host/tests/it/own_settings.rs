//! What a compute's command line has is Varve's own, so that nobody can ask for another value of it.

use varve_api::host::Begin;
use varve_host::asked::Asked;
use varve_host::config;
use varve_host::dirs::{Dirs, Isolation, User};

#[test]
fn a_tenant_cannot_set_what_the_command_line_has() {
    let begin: Begin = serde_json::from_value(serde_json::json!({
        "tenant": "acme", "branch": "main", "tenant_id": "0", "timeline_id": "0", "pg_version": 15, "base_lsn": "0/28", "epoch": 1,
        "standby_name": null, "incarnation": 1, "page_service": "", "listen": "127.0.0.1", "port": 1, "password_verifier": "",
        "databases": [], "tablespaces": [], "catalog_version": 1, "startup_blocks": [], "settings": [["work_mem", "7MB"]],
    }))
    .expect("what a server of an older release says, too");
    assert_eq!(begin.password().number, 1, "a server without a number has the first password");
    let home = tempfile::tempdir().expect("a folder");
    let dirs = Dirs::existing(home.path(), home.path(), "0123", Isolation::None(User { uid: 0, gid: 0 }));
    let arguments = config::arguments(&begin, "127.0.0.1", &dirs, &Asked::of(&[]));
    let settings: Vec<&str> = arguments.iter().filter_map(|argument| argument.split_once('=').map(|(name, _)| name)).collect();
    assert_eq!(settings[0], "work_mem", "what is given to this start comes first, so ours win");
    for name in &settings[1..] {
        // The tenant is asked for these, and gets at least what we need.
        let is_asked = ["wal_level", "max_wal_senders", "max_replication_slots"].contains(name);
        assert!(is_asked || varve_api::settings::is_ours(name), "{name} is on the command line and can be set");
    }
    assert!(varve_api::settings::is_ours("Synchronous_Standby_Names") && !varve_api::settings::is_ours("work_mem"));
}
