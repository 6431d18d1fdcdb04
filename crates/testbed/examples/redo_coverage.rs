//! Runs the redo corpus and prints how often each record type was exercised. Arguments are majors, by default 14 to 18.
//! Fails on a mismatch, and on a type that was not exercised without a known reason.

use anyhow::{Context, Result, bail};
use varve_postgres::Major;
use varve_testbed::redo_coverage::{run_corpus, table};

fn main() -> Result<()> {
    let mut majors = Vec::new();
    for arg in std::env::args().skip(1) {
        let major = arg.parse().ok().and_then(Major::from_number);
        majors.push(major.with_context(|| format!("'{arg}' is no major: expected 14 to 18"))?);
    }
    if majors.is_empty() {
        majors.extend(Major::ALL);
    }
    let mut seen = Vec::new();
    let mut mismatches = 0;
    for major in majors {
        let report = run_corpus(major)?;
        mismatches += report.mismatch_count;
        for mismatch in &report.mismatches {
            println!("{major:?}: {mismatch}");
        }
        seen.push((major, report));
    }
    let (table, missing) = table(&seen);
    println!("{table}{mismatches} mismatches, {missing} record types not exercised or not known");
    if mismatches > 0 || missing > 0 {
        bail!("the corpus must exercise every record type, and redo every page");
    }
    Ok(())
}
