//! Postgres's own regression and isolation suites (15) under `wal_consistency_checking = all`: they pass, and every page that redo makes of
//! their WAL is Postgres's. They take minutes and gigabytes, so they are run on demand: `scripts/postgres-regress`, then
//! `cargo test -p varve-redo --test postgres_suites -- --ignored --nocapture`.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use varve_postgres::Major;
use varve_testing::postgres::Postgres;
use varve_testing::redo::{Ending, init, redo_workload};

const SOURCE: &str = "/var/cache/varve/src/postgresql-15-15.18/src/test";
const LIBRARY_DIR: &str = "/var/cache/varve/regress-15";
const RUNNERS: &str = "/usr/lib/postgresql/15/lib/pgxs/src/test";
/// Lines of what differs from a suite's expectations that are printed.
const DIFF_LINES_MAX: usize = 100;

struct Suite {
    /// Its folder in Postgres's source, and in the installation.
    name: &'static str,
    runner: &'static str,
    schedule: &'static str,
}

impl Suite {
    /// Runs the suite, which must pass.
    fn run(&self, postgres: &Postgres) -> Result<()> {
        ensure!(Path::new(LIBRARY_DIR).join("regress.so").exists(), "the suite is not there: run scripts/postgres-regress");
        let results = postgres.dir().join("results");
        std::fs::create_dir(&results).with_context(|| format!("making {}", results.display()))?;
        std::fs::set_permissions(&results, Permissions::from_mode(0o777))?; // the server writes there too
        let input = Path::new(SOURCE).join(self.name);
        let output = Command::new(Path::new(RUNNERS).join(self.name).join(self.runner))
            .arg(format!("--inputdir={}", input.display()))
            .arg(format!("--outputdir={}", postgres.dir().display()))
            .arg(format!("--dlpath={LIBRARY_DIR}"))
            .arg(format!("--host={}", postgres.dir().display()))
            .args(["--bindir=/usr/lib/postgresql/15/bin", "--user=postgres", "--max-concurrent-tests=20"])
            .arg(format!("--schedule={}", input.join(self.schedule).display()))
            .current_dir(postgres.dir())
            .output()
            .with_context(|| format!("running {}", self.runner))?;
        let out = String::from_utf8_lossy(&output.stdout);
        out.lines().filter(|line| line.contains("FAILED") || line.contains("tests")).for_each(|line| println!("{line}"));
        let diffs = std::fs::read_to_string(postgres.dir().join("regression.diffs")).unwrap_or_default();
        diffs.lines().take(DIFF_LINES_MAX).for_each(|line| println!("{line}"));
        ensure!(output.status.success(), "the suite does not pass:\n{out}");
        Ok(())
    }

    fn assert_redone(&self) {
        let settings = [
            ("wal_compression", "lz4"),
            ("autovacuum", "on"),
            ("autovacuum_naptime", "5"),
            ("max_parallel_workers_per_gather", "2"), // the suites expect the default
            ("max_parallel_maintenance_workers", "2"),
        ];
        let redone = init(Major::V15, &[], &settings)
            .and_then(|mut postgres| redo_workload(&mut postgres, Ending::Shutdown, false, |postgres| self.run(postgres)));
        match redone {
            Ok(report) => {
                println!("{report}");
                assert!(report.mismatch_count == 0, "expected pages as Postgres has them");
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
#[ignore = "minutes and gigabytes"]
fn regression() {
    Suite { name: "regress", runner: "pg_regress", schedule: "parallel_schedule" }.assert_redone();
}

#[test]
#[ignore = "minutes and gigabytes"]
fn isolation() {
    Suite { name: "isolation", runner: "pg_isolation_regress", schedule: "isolation_schedule" }.assert_redone();
}
