//! Which servers may be received from.

use varve_postgres::{Major, minor};

/// Whether a server with this `server_version_num` may be received from; if not, why.
pub(super) fn check(server_version_num: &str, expected: Major) -> Result<(), String> {
    let number: u32 = server_version_num.parse().map_err(|_| format!("server_version_num is '{server_version_num}', expected a number"))?;
    let (major, minor) = (number / 10_000, number % 10_000);
    if major != expected.number() {
        return Err(format!("the server is PostgreSQL {major}.{minor}, the tenant's data is of PostgreSQL {expected}"));
    }
    let min = minor::synchronous_commit_min(expected);
    if minor < min {
        return Err(format!(
            "PostgreSQL {major}.{minor} has known holes in synchronous commit: a commit may count as acknowledged that no standby has; \
             upgrade to {major}.{min} or later"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minors_with_holes_and_other_majors_are_refused() {
        for (number, major) in
            [("140018", Major::V14), ("150013", Major::V15), ("150018", Major::V15), ("160009", Major::V16), ("170005", Major::V17)]
        {
            assert_eq!(check(number, major), Ok(()));
        }
        assert_eq!(check("180000", Major::V18), Ok(()));
        for (number, major, why) in [
            ("140017", Major::V14, "upgrade to 14.18"),
            ("150012", Major::V15, "upgrade to 15.13"),
            ("160008", Major::V16, "upgrade to 16.9"),
            ("170004", Major::V17, "upgrade to 17.5"),
            ("160010", Major::V15, "the server is PostgreSQL 16.10"),
            ("90624", Major::V15, "PostgreSQL 9.624"),
            ("15.18", Major::V15, "expected a number"),
        ] {
            let error = check(number, major).expect_err(number);
            assert!(error.contains(why), "{number}: expected '{why}' in '{error}'");
        }
    }
}
