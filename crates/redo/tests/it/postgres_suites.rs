//! Postgres's own regression and isolation suites (15) under `wal_consistency_checking = all`: they pass, and every
//! page that redo makes of their WAL is Postgres's. They take minutes and gigabytes, so they are run on demand:
//! `scripts/postgres-regress`, then `cargo test -p varve-redo --test it postgres_suites:: -- --ignored --nocapture`.
//! `scripts/regress` does the same on a compute.

use anyhow::{Result, ensure};
use varve_postgres::Major;
use varve_testbed::postgres::Postgres;
use varve_testbed::redo::{Ending, init, redo_workload};
use varve_testbed::suites::{Suite, Suites, Target};

/// The port that a server has which is told none.
const PORT: u16 = 5432;

fn run(suite: Suite, postgres: &Postgres) -> Result<()> {
    let target = Target { host: postgres.dir().display().to_string(), port: PORT };
    let outcome = Suites::of(postgres.major())?.run(suite, &target, &postgres.dir().join("suite"))?;
    println!("{outcome}");
    ensure!(outcome.passed, "the suite does not pass");
    Ok(())
}

#[track_caller]
fn assert_redone(suite: Suite) {
    let settings = [
        ("wal_compression", "lz4"),
        ("autovacuum", "on"),
        ("autovacuum_naptime", "5"),
        ("max_parallel_workers_per_gather", "2"), // the suites expect the default
        ("max_parallel_maintenance_workers", "2"),
    ];
    let redone = init(Major::V15, &[], &settings)
        .and_then(|mut postgres| redo_workload(&mut postgres, Ending::Shutdown, false, |postgres| run(suite, postgres)));
    match redone {
        Ok(report) => {
            println!("{report}");
            assert!(report.mismatch_count == 0, "expected pages as Postgres has them");
        }
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
#[ignore = "minutes and gigabytes"]
fn regression() {
    assert_redone(Suite::Regression);
}

#[test]
#[ignore = "minutes and gigabytes"]
fn isolation() {
    assert_redone(Suite::Isolation);
}
