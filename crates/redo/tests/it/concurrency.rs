//! Redo of what many sessions write at once, autovacuum among them, against Postgres.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use varve_postgres::Major;
use varve_testbed::postgres::{Postgres, is_skipped};
use varve_testbed::redo::{Ending, init, redo_workload};

const SETTINGS: [(&str, &str); 7] = [
    ("autovacuum", "on"),
    ("autovacuum_naptime", "1"),
    ("autovacuum_vacuum_cost_delay", "0"),
    ("autovacuum_vacuum_threshold", "50"),
    ("autovacuum_vacuum_scale_factor", "0.01"),
    ("autovacuum_freeze_max_age", "100000"),
    ("vacuum_freeze_min_age", "50"),
];

/// Locks, savepoints, updates of several rows, deletes and inserts, on few rows so that sessions meet.
const SCRIPT: &str = r"
\set a random(1, 300)
\set b random(1, 300)
\set kind random(1, 6)
BEGIN;
\if :kind = 1
SELECT 1 FROM pgbench_accounts WHERE aid = :a FOR KEY SHARE;
UPDATE pgbench_accounts SET filler = 'x' WHERE aid = :b;
\elif :kind = 2
SELECT 1 FROM pgbench_accounts WHERE aid = :a FOR SHARE;
\elif :kind = 3
SAVEPOINT s;
UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :a;
ROLLBACK TO s;
UPDATE pgbench_accounts SET abalance = abalance - 1 WHERE aid = :a;
\elif :kind = 4
DELETE FROM pgbench_accounts WHERE aid = :a;
INSERT INTO pgbench_accounts VALUES (:a, 1, 0, repeat('f', :b / 4)) ON CONFLICT (aid) DO UPDATE SET abalance = 0;
\elif :kind = 5
INSERT INTO pgbench_history SELECT 1, 1, :a, i, now(), 'h' FROM generate_series(1, :b) i;
DELETE FROM pgbench_history WHERE delta = :b;
\else
SELECT 1 FROM pgbench_accounts WHERE aid = :a FOR UPDATE;
\endif
COMMIT;
";

fn pgbench(postgres: &Postgres, args: &[&str]) -> Result<()> {
    let mut pgbench = Command::new("/usr/lib/postgresql/15/bin/pgbench");
    pgbench.args(args).args(["-U", "postgres", "-h"]).arg(postgres.dir()).arg("postgres");
    let output = pgbench.output().context("running pgbench")?;
    ensure!(output.status.success(), "pgbench {args:?} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn many_sessions(major: Major, ending: Ending) {
    if is_skipped(major) {
        return;
    }
    let redone = init(major, &[], &SETTINGS).and_then(|mut postgres| {
        redo_workload(&mut postgres, ending, false, |postgres| {
            let script = postgres.dir().join("script.sql");
            std::fs::write(&script, SCRIPT)?;
            let script = script.to_string_lossy().into_owned();
            pgbench(postgres, &["-i", "-q", "-s", "1"])?;
            pgbench(postgres, &["-c", "6", "-t", "150", "-n", "--max-tries=10"])?;
            pgbench(postgres, &["-c", "6", "-t", "300", "-n", "--max-tries=10", "-f", &script])?;
            pgbench(postgres, &["-c", "4", "-t", "200", "-N"])
        })
    });
    match redone {
        Ok(report) => assert!(report.mismatch_count == 0, "{major:?}: expected pages as Postgres has them\n{report}"),
        Err(error) => panic!("{major:?}: {error:?}"),
    }
}

macro_rules! majors {
    ($($test:ident, $major:ident;)*) => {
        $(
            mod $test {
                use super::*;

                #[test]
                fn stopped() {
                    many_sessions(Major::$major, Ending::Shutdown);
                }

                #[test]
                fn recovered() {
                    many_sessions(Major::$major, Ending::Recovery);
                }
            }
        )*
    };
}

majors! {
    postgres_14, V14;
    postgres_15, V15;
    postgres_16, V16;
    postgres_17, V17;
    postgres_18, V18;
}
